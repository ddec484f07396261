"""Inputs for a graph: random tokens, and what goes with them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from rewriter.errors import RewriterError
from rewriter.graph import Graph


class Prompts:
    """Makes the inputs of `graph` by name; the same ones in the same order every time."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        config = graph.config
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.vocabulary = int(getattr(text, "vocab_size", 0) or 32)
        self.random = torch.Generator().manual_seed(0)

    def __call__(self, mask: Tensor, new: int) -> list[Tensor]:
        """Inputs, in the graph's order, for the last `new` columns of `mask` [B, T] int64.

        Raises RewriterError: the shape of an input is not known.
        """
        return [self._input(name, mask, new) for name in self.graph.inputs]

    def _input(self, name: str, mask: Tensor, new: int) -> Tensor:
        batch = mask.shape[0]
        if name == "attention_mask":
            return mask
        if name == "position_ids":
            return (mask.cumsum(-1) - 1).clamp_min(0)[:, -new:]
        if name == "input_ids":
            return torch.randint(0, self.vocabulary, (batch, new), generator=self.random)
        if name == "token_type_ids":
            return torch.zeros(batch, new, dtype=torch.long)
        return self._like(self.graph.placeholder(name), batch, new)

    def _like(self, node: Node | None, batch: int, new: int) -> Tensor:
        value = node.meta.get("val") if node is not None else None
        if value is None:  # the graph was read from a folder, which keeps no shapes
            raise RewriterError(
                f"the shape of the graph's input '{node}' is not known",
                "export the model that rewrite() returned, in the same process",
            )
        symbols = list(dict.fromkeys(str(s) for s in value.shape if isinstance(s, torch.SymInt)))
        sizes = {s: (batch if i == 0 else new) for i, s in enumerate(symbols)}
        shape = [sizes.get(str(s), s) if isinstance(s, torch.SymInt) else s for s in value.shape]
        if value.dtype.is_floating_point:
            return torch.randn(*shape, generator=self.random).to(value.dtype)
        return torch.zeros(*shape, dtype=value.dtype)
