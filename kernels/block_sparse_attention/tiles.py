"""Query blocks of a plan, gathered into batches of equally many blocks of keys."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from rewriter.kernels.block_sparse_attention.arguments import Arguments

#: Elements of gathered keys in one batch.
BUDGET = 1 << 20


class Tiles:
    """Units of work, (batch, tile head, query block), and what each gathers.

    A tile head is a query head, or a key head with its queries packed when they share a list.
    """

    def __init__(self, given: Arguments) -> None:
        self.given, self.block_q, self.block_k = given, given.block_q, given.block_k
        batch, heads, self.length, _ = given.query.shape
        self.groups, self.keys = given.key.shape[1:3]
        self.plan_batch, self.plan_heads, self.rows, most = given.index.shape
        self.heads = max(self.plan_heads, self.groups)
        self.packed = heads // self.heads
        place = torch.arange(most)
        listed = place < self.given.count[..., None]
        whole = place < self.given.full[..., None]
        # A block with padding, a tail or a bias in it needs the mask, whole or not.
        clear = whole & ((self.given.index + 1) * self.block_k <= self.keys)
        if self.given.mask is not None:
            tail = -self.keys % self.block_k
            real = pad(self.given.mask.bool(), (0, tail)).unflatten(1, (-1, self.block_k)).all(-1)
            each = torch.arange(batch)[:, None, None, None]
            clear = clear & real[each, self.given.index.clamp_min(0).long()]
        if self.given.key_bias is not None:
            clear = torch.zeros_like(clear)
        order = torch.where(clear, 0, torch.where(listed, 1, 2)).sort(dim=-1, stable=True).indices
        expand = lambda t: t.expand(batch, self.heads, self.rows, -1).flatten(0, 2)  # noqa: E731
        index, whole = (t.expand_as(order).gather(-1, order) for t in (self.given.index, whole))
        self.listed = expand(index).long()
        self.whole = expand(whole)
        self.fulls = expand(clear.sum(-1, keepdim=True))[:, 0]
        self.partials = expand(listed.expand_as(order).sum(-1, keepdim=True))[:, 0] - self.fulls
        if self.given.mask is not None and self.given.window > 0:
            self.first = self.given.mask.bool() & (
                self.given.mask.long().cumsum(-1) <= self.given.sinks
            )

    def batches(self, width: int) -> Iterator[tuple[Tensor, int, int]]:
        """(units, their full blocks, their partial blocks), few enough to gather at once."""
        kinds = self.fulls * (self.listed.shape[1] + 1) + self.partials
        for kind in kinds.unique().tolist():
            fulls, partials = divmod(kind, self.listed.shape[1] + 1)
            units = (kinds == kind).nonzero()[:, 0]
            single = 0 if self.given.columns is None else self.given.columns.shape[2]
            each = max((fulls + partials) * self.block_k + single, 1) * max(
                width, self.packed * self.block_q
            )
            for some in units.split(max(1, BUDGET // each)):
                yield some, fulls, partials

    def place(self, units: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (
            units // (self.heads * self.rows),
            units // self.rows % self.heads,
            units % self.rows,
        )

    def group(self, units: Tensor) -> Tensor:
        """The row of the flattened [B Hk, ...] keys that each unit reads."""
        return units // self.rows // (self.heads // self.groups)

    def queries(self, x: Tensor, units: Tensor) -> Tensor:
        """x: [B, H, L, D]; returns [n, P, block_q, D], zero past the end."""
        b, h, r = self.place(units)
        rows = r[:, None] * self.block_q + torch.arange(self.block_q)
        packed = x.unflatten(1, (self.heads, self.packed))
        if self.length % self.block_q == 0:
            return packed.unflatten(3, (self.rows, self.block_q))[b, h, :, r]
        found = packed[b[:, None], h[:, None], :, rows.clamp(max=self.length - 1)]
        return found.masked_fill((rows >= self.length)[..., None, None], 0).transpose(1, 2)

    def tokens(self, units: Tensor, start: int, blocks: int) -> Tensor:
        """Columns [n, blocks block_k (+ C)] of a unit's listed blocks (and single columns)."""
        first = self.listed[units, start : start + blocks] * self.block_k
        ids = (first[..., None] + torch.arange(self.block_k)).flatten(1)
        if self.given.columns is None:
            return ids
        return torch.cat([ids, self._shared(self.given.columns, units)], 1)

    def blocks(self, x: Tensor, units: Tensor, start: int, blocks: int) -> Tensor:
        """[n, blocks block_k, D] of the listed blocks of a unit."""
        group = self.group(units)[:, None]
        chosen = self.listed[units, start : start + blocks]
        if self.keys % self.block_k == 0 and x.is_contiguous():
            flat = x.view(-1, self.block_k * x.shape[3])
            rows = group * (self.keys // self.block_k) + chosen
            return flat.index_select(0, rows.flatten()).view(len(units), -1, x.shape[3])
        ids = (chosen[..., None] * self.block_k + torch.arange(self.block_k)).flatten(1)
        return x[group // self.groups, group % self.groups, ids.clamp(0, self.keys - 1)]

    def partial(
        self, units: Tensor, start: int, blocks: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys and values [n, E, D], which are visible [n, block_q, E], and the additive mask."""
        ids = self.tokens(units, start, blocks)
        real = (ids >= 0) & (ids < self.keys)
        ids = ids.clamp(0, self.keys - 1)
        b, h, r = self.place(units)
        rows = r[:, None] * self.block_q + torch.arange(self.block_q)
        rows = rows.clamp(max=self.length - 1)
        pos_q = rows + (self.keys - self.length)
        pos_q = (
            pos_q
            if self.given.pos_q is None
            else self._shared(self.given.pos_q, units).gather(1, rows)
        )
        pos_k = (
            ids
            if self.given.pos_k is None
            else self._shared(self.given.pos_k, units).gather(1, ids)
        )
        distance = pos_q[:, :, None] - pos_k[:, None, :]
        before = distance >= 0 if self.given.causal else torch.ones_like(distance, dtype=torch.bool)
        seen = before
        if self.given.window > 0:
            first = (
                ids < self.given.sinks if self.given.mask is None else self.first[b[:, None], ids]
            )
            seen = seen & ((distance.abs() < self.given.window) | first[:, None])
        if self.given.group_q is not None and self.given.group_k is not None:
            mine = self._shared(self.given.group_q, units).gather(1, rows)
            theirs = self._shared(self.given.group_k, units).gather(1, ids)
            seen = seen & (mine[:, :, None] == theirs[:, None])
        inside = blocks * self.block_k
        whole = self.whole[units, start : start + blocks].repeat_interleave(self.block_k, 1)
        seen = seen[..., :inside] | whole[:, None]
        if self.given.columns is not None:
            counted = (self.fulls + self.partials)[units][:, None, None]
            listed = torch.arange(self.listed.shape[1])[:, None] < counted
            single = ids[:, None, inside:] // self.block_k
            twice = ((self.listed[units][..., None] == single) & listed).any(1)
            seen = torch.cat([seen, before[..., inside:] & ~twice[:, None]], -1)
        if self.given.mask is not None:
            real = real & self.given.mask.bool()[b[:, None], ids]
        seen = seen & real[:, None]
        extra = torch.where(seen, 0.0, float("-inf")).to(self.given.query.dtype)
        if self.given.key_bias is not None:
            extra = extra + self._shared(self.given.key_bias, units).gather(1, ids)[:, None].to(
                extra
            )
        group = self.group(units)[:, None]
        if self.given.columns is None:
            k, v = (
                self.blocks(x, units, start, blocks) for x in (self.given.key, self.given.value)
            )
        else:
            k, v = (
                x[group // self.groups, group % self.groups, ids]
                for x in (self.given.key, self.given.value)
            )
        return k, v, seen, extra

    def _shared(self, x: Tensor, units: Tensor) -> Tensor:
        """[Bm, Hm, N] to the row of each unit, [n, N]; int64 where it is an integer."""
        b, h, _ = self.place(units)
        b = b if self.plan_batch > 1 else torch.zeros_like(b)
        found = x[b, h if self.plan_heads > 1 else torch.zeros_like(h)]
        return found if found.is_floating_point() else found.long()
