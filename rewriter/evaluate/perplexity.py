"""Perplexity, excess loss by position, and divergence from the original, on token windows.

All take `tokens` [N, T] (or [T]), windows of text without padding, and need memory for the
logits of 256 positions only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rewriter.errors import RewriterError
from rewriter.evaluate.readout import read


@dataclass(frozen=True)
class Divergence:
    """Two models on the same windows, position by position, in nats; all [N, T - 1] on the CPU.

    Column t is about the prediction of token t + 1. `kl` is KL(original || model); `same` says
    whether both put the same token first.
    """

    original: Tensor
    model: Tensor
    kl: Tensor
    same: Tensor

    @property
    def excess(self) -> Tensor:
        """Loss of the model over the original's, [N, T - 1]."""
        return self.model - self.original


@torch.no_grad()
def token_nll(model: nn.Module, tokens: Tensor, batch: int = 1) -> Tensor:
    """Negative log-likelihood of every token but the first, in nats: [N, T - 1] on the CPU."""
    return torch.cat([_nll(model, rows) for rows in _batches(tokens, batch)])


def perplexity(model: nn.Module, tokens: Tensor, batch: int = 1) -> float:
    """exp of the mean loss over all windows [N, T]; every token but each window's first counts."""
    return mean_exp(token_nll(model, tokens, batch))


def mean_exp(losses: Tensor) -> float:
    """exp of the mean, in float64; infinite where it overflows."""
    return float(losses.double().mean().exp())


@torch.no_grad()
def compare(model: nn.Module, original: nn.Module, tokens: Tensor, batch: int = 1) -> Divergence:
    """Losses of both models, KL(original || model) and top-1 agreement, in one pass over each."""
    parts = [_compare(model, original, rows) for rows in _batches(tokens, batch)]
    return Divergence(*(torch.cat(column) for column in zip(*parts, strict=True)))


def excess_by_block(
    model: nn.Module, original: nn.Module, tokens: Tensor, block: int = 1024, batch: int = 1
) -> list[float]:
    """Mean loss over the original's, in nats per token, for each block of positions.

    Block b holds the tokens at positions b * block ... (b + 1) * block - 1 of their windows; the
    first token of a window has no prediction. A model that drifts with length shows it here
    while its perplexity at short windows looks well.
    """
    return by_block(token_nll(model, tokens, batch) - token_nll(original, tokens, batch), block)


def by_block(values: Tensor, block: int = 1024) -> list[float]:
    """Means of per-token values [N, T - 1] (of tokens 1 ... T - 1) by block of positions."""
    positions = torch.arange(1, values.shape[1] + 1) // block
    return [
        float(values[:, positions == index].double().mean())
        for index in range(int(positions[-1]) + 1)
    ]


def _nll(model: nn.Module, rows: Tensor) -> Tensor:
    targets = rows[:, 1:, None]
    parts = []
    for positions, logits in read(model, rows).slices(rows.shape[1] - 1):
        wanted = logits.gather(-1, targets[:, positions].to(logits.device))[..., 0]
        parts.append((logits.logsumexp(-1) - wanted).cpu())
    return torch.cat(parts, 1)


def _compare(model: nn.Module, original: nn.Module, rows: Tensor) -> tuple[Tensor, ...]:
    end, targets = rows.shape[1] - 1, rows[:, 1:, None]
    columns: list[list[Tensor]] = [[], [], [], []]
    both = zip(read(original, rows).slices(end), read(model, rows).slices(end), strict=True)
    for (positions, theirs), (_, ours) in both:
        if theirs.shape != ours.shape:
            raise RewriterError(
                f"the models have {theirs.shape[-1]} and {ours.shape[-1]} words",
                "compare with the model that this one was made from",
            )
        theirs, ours = theirs.log_softmax(-1), ours.to(theirs.device).log_softmax(-1)
        wanted = targets[:, positions].to(theirs.device)
        found = (
            -theirs.gather(-1, wanted)[..., 0],
            -ours.gather(-1, wanted)[..., 0],
            (theirs.exp() * (theirs - ours)).sum(-1),
            theirs.argmax(-1) == ours.argmax(-1),
        )
        for column, value in zip(columns, found, strict=True):
            column.append(value.cpu())
    return tuple(torch.cat(column, 1) for column in columns)


def _batches(tokens: Tensor, batch: int) -> Iterator[Tensor]:
    tokens = tokens[None] if tokens.dim() == 1 else tokens
    if tokens.dim() != 2 or tokens.shape[0] == 0 or tokens.shape[1] < 2:
        raise RewriterError(
            f"cannot measure on tokens of shape {list(tokens.shape)}",
            "give windows [N, T] of two tokens or more",
        )
    yield from tokens.split(batch)
