"""The block plan: which blocks of keys each block of queries reads (specs/sparse.md, 1.2)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class BlockPlan:
    """A plan for one call; Hm, the heads of the plan, is H, Hk or 1, and Bm is B or 1.

    The queries are the last L of S columns; query block t is rows t block_q to (t + 1) block_q.
    A listed block that is *full* is visible whole; in the others ("partial", listed after the
    full ones) an element is visible when all of these hold that are given:
    `causal` position of key <= position of query, `window` |distance| < window or the key is one
    of the first `sinks` real tokens, `group_q == group_k`. Padding and columns past the end are
    never visible. So specs/sparse.md's element masks are: none, causal, window as named;
    group_id is `group_q`, `group_k` (and causal); pos_le is causal with `pos_q`, `pos_k`.

    index: int32 [Bm, Hm, T, K], the full blocks then the partial ones, each ascending, then -1.
    count, full: int32 [Bm, Hm, T], listed blocks and those of them that are full.
    columns: int32 [Bm, Hm, C], single keys for every row (then -1), subject to `causal` only and
        not counted twice where a listed block has them.
    pos_q, pos_k: int32 [Bm, Hm, L] and [Bm, Hm, S], positions after a permutation; else columns.
    group_q, group_k: int32, same shapes.
    key_bias: [Bm, Hm, S], added to the logits (the log of how many keys a summary stands for).
    selection: S, W or G, how far the *choice* of blocks looks ahead (specs/sparse.md, 0).
    """

    index: Tensor
    count: Tensor
    full: Tensor
    block_q: int
    block_k: int
    causal: bool = True
    window: int = 0
    sinks: int = 0
    columns: Tensor | None = None
    pos_q: Tensor | None = None
    pos_k: Tensor | None = None
    group_q: Tensor | None = None
    group_k: Tensor | None = None
    key_bias: Tensor | None = None
    selection: Literal["S", "W", "G"] = "S"

    @classmethod
    def from_blocks(
        cls,
        keep: Tensor,
        block_q: int,
        block_k: int,
        length: int,
        keys: int,
        *,
        causal: bool = True,
        window: int = 0,
        sinks: int = 0,
        selection: Literal["S", "W", "G"] = "S",
        **tensors: Any,
    ) -> BlockPlan:
        """From a map keep: bool [Bm, Hm, T, ceil(S / block_k)].

        Blocks without a visible element are dropped, and full and partial told apart, by the
        extremes of the positions and groups of each block. `tensors` are the plan's own.
        """
        none = keep.new_zeros(0, dtype=torch.int32)
        plan = cls(
            none, none, none, block_q, block_k, causal, window, sinks,
            selection=selection, **tensors,
        )  # fmt: skip
        full, empty = plan._blocks(length, keys, keep.device)
        return plan._listed(keep & ~empty, full)

    @classmethod
    def dense(
        cls, length: int, keys: int, block_q: int, block_k: int, causal: bool = True
    ) -> BlockPlan:
        """Every block: the same as dense attention."""
        keep = torch.ones(1, 1, -(-length // block_q), -(-keys // block_k), dtype=torch.bool)
        return cls.from_blocks(keep, block_q, block_k, length, keys, causal=causal)

    @classmethod
    def sliding_window(
        cls,
        length: int,
        keys: int,
        window: int,
        sinks: int,
        block_q: int,
        block_k: int,
        first: Tensor | None = None,
    ) -> BlockPlan:
        """The latest `window` keys and the first `sinks`; first: [B], the first real column."""
        rows, columns = -(-length // block_q), -(-keys // block_k)
        start = keys - length + torch.arange(rows) * block_q
        end = torch.clamp(start + block_q, max=keys)
        low = torch.arange(columns) * block_k
        near = (low < end[:, None]) & (low + block_k > (start - window + 1)[:, None])
        zero = torch.zeros(1, dtype=torch.long) if first is None else first.long().cpu()
        has_sink = (low < zero[:, None] + sinks) & (low + block_k > zero[:, None]) & (sinks > 0)
        keep = near | (has_sink[:, None, None] & (low < end[:, None]))
        plan = cls.from_blocks(
            keep.reshape(-1, 1, rows, columns), block_q, block_k, length, keys, causal=True
        )
        # Causal only so far, for a sink block may lie outside of the window.
        windowed = replace(plan, window=window, sinks=sinks)
        full, _ = windowed._blocks(length, keys, keep.device)
        return windowed._listed(plan.blocks(keys)[0], full)

    @classmethod
    def from_selection(
        cls, blocks: Tensor, block: int, length: int, keys: int, *, causal: bool = True
    ) -> BlockPlan:
        """From `select_blocks`: int [B, Hm, T, K], distinct blocks of each row, -1 for none."""
        tiles = -(-keys // block)
        keep = torch.zeros(*blocks.shape[:3], tiles + 1, dtype=torch.bool, device=blocks.device)
        keep.scatter_(3, torch.where(blocks < 0, tiles, blocks.long()), True)
        return cls.from_blocks(
            keep[..., :tiles], block, block, length, keys, causal=causal, selection="W"
        )

    def blocks(self, keys: int) -> tuple[Tensor, Tensor]:
        """Maps of the listed blocks and of the full ones: bool [Bm, Hm, T, ceil(S / block_k)]."""
        return block_maps(self.index, self.count, self.full, -(-keys // self.block_k))

    def visible(self, length: int, keys: int, mask: Tensor | None = None) -> Tensor:
        """The plan as a dense mask: bool [B or Bm, Hm, L, S]; mask: [B, S], true at real tokens."""
        from rewriter.kernels.block_sparse_attention.reference import visible

        return visible(
            length, keys, self.index, self.count, self.full, mask, self.columns, self.pos_q,
            self.pos_k, self.group_q, self.group_k, self.block_q, self.block_k, self.causal,
            self.window, self.sinks,
        )  # fmt: skip

    def density(self, length: int, keys: int, mask: Tensor | None = None) -> float:
        """Visible area over the causal area (over the whole area if not causal), counted."""
        seen = self.visible(length, keys, mask)
        every = replace(
            BlockPlan.dense(length, keys, self.block_q, self.block_k, self.causal),
            pos_q=self.pos_q, pos_k=self.pos_k,
        )  # fmt: skip
        every = (
            replace(every, full=torch.zeros_like(every.full)) if self.pos_q is not None else every
        )
        area = every.visible(length, keys, mask).expand_as(seen)
        return float(seen.sum() / area.sum().clamp_min(1))

    def to(self, device: torch.device | str) -> BlockPlan:
        moved: dict[str, Any] = {
            name: value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def _listed(self, keep: Tensor, full: Tensor) -> BlockPlan:
        full = (keep & full).expand(keep.shape)
        count, whole = keep.sum(-1, dtype=torch.int32), full.sum(-1, dtype=torch.int32)
        rank = torch.where(full, 0, torch.where(keep, 1, 2))
        order = torch.sort(rank, dim=-1, stable=True).indices[..., : max(int(count.max()), 1)]
        listed = torch.arange(order.shape[-1], device=keep.device) < count[..., None]
        index = torch.where(listed, order, -1).to(torch.int32)
        return replace(self, index=index.contiguous(), count=count, full=whole)

    def _blocks(self, length: int, keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Which blocks the element mask leaves whole, and which it leaves empty."""
        place = torch.arange(keys, device=device)[None, None]
        q_low, q_high = _extremes(
            place[..., keys - length :] if self.pos_q is None else self.pos_q, self.block_q
        )
        k_low, k_high = _extremes(place if self.pos_k is None else self.pos_k, self.block_k)
        near = q_low[..., :, None] - k_high[..., None, :]  # the smallest distance in the block
        far = q_high[..., :, None] - k_low[..., None, :]
        full, empty = torch.ones_like(near, dtype=torch.bool), torch.zeros_like(near != 0)
        if self.causal:
            full, empty = full & (near >= 0), empty | (far < 0)
        if self.window > 0:
            full = full & (far < self.window) & (near > -self.window)
            if self.sinks == 0:
                empty = empty | (near >= self.window) | (far <= -self.window)
        if self.group_q is not None and self.group_k is not None:
            (a, b), (c, d) = (
                _extremes(self.group_q, self.block_q),
                _extremes(self.group_k, self.block_k),
            )
            a, b, c, d = a[..., :, None], b[..., :, None], c[..., None, :], d[..., None, :]
            full = full & (a == b) & (b == c) & (c == d)
            empty = empty | (b < c) | (d < a)
        return full, empty


def _extremes(values: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Least and greatest of each block along the last dimension."""
    tail = -values.shape[-1] % block
    if tail:
        values = torch.cat([values, values[..., -1:].expand(*values.shape[:-1], tail)], -1)
    split = values.unflatten(-1, (-1, block))
    return split.amin(-1), split.amax(-1)


def block_maps(index: Tensor, count: Tensor, full: Tensor, tiles: int) -> tuple[Tensor, Tensor]:
    """Lists to maps: bool [..., T, tiles] of the listed blocks and of the full ones."""
    place = torch.arange(index.shape[-1], device=index.device)
    maps = []
    for limit in (count, full):
        target = torch.where(place < limit[..., None], index.long(), tiles)
        found = torch.zeros(*index.shape[:-1], tiles + 1, dtype=torch.bool, device=index.device)
        maps.append(found.scatter_(-1, target, True)[..., :tiles])
    return maps[0], maps[1]


def select_blocks(
    query: Tensor,
    key: Tensor,
    blocks: int,
    block: int,
    *,
    causal: bool = True,
    sink_blocks: int = 1,
    local_blocks: int = 1,
    share: Literal["group", "head"] = "group",
) -> Tensor:
    """The `blocks` key blocks of greatest mean query . mean key for each query block.

    query: [B, H, L, D], key: [B, Hk, S, D]; the queries are the last L. share: one choice for
    the heads of a group (their mean query), or one a head. The first `sink_blocks` and the
    `local_blocks` up to the query's own are always taken, from the budget.

    Returns int32 [B, Hk or H, T, min(blocks, ceil(S / block))], -1 where a row has fewer blocks.
    Class W: the last rows of a query block take part in its choice.
    """
    batch, heads, length, width = query.shape
    groups, keys = key.shape[1], key.shape[2]
    offset = keys - length
    pooled = _means(query, block)  # [B, H, T, D]
    if share == "group":
        pooled = pooled.unflatten(1, (groups, heads // groups)).mean(2)
    scores = pooled.unflatten(1, (groups, -1)).float() @ _means(key, block).transpose(
        -1, -2
    ).unsqueeze(2).to(torch.float32)
    scores = scores.flatten(1, 2)
    rows = torch.arange(pooled.shape[2], device=query.device)
    own = torch.clamp(offset + (rows + 1) * block - 1, max=keys - 1) // block
    tiles = torch.arange(scores.shape[-1], device=query.device)
    behind = own[:, None] - tiles
    scores = scores.masked_fill((behind >= 0) & (behind < local_blocks), float("inf"))
    scores = scores.masked_fill(tiles < sink_blocks, torch.finfo(torch.float32).max)
    scores[..., rows, own] = float("inf")  # its own block before everything else
    if causal:
        scores = scores.masked_fill(behind < 0, float("-inf"))
    top = scores.topk(min(blocks, scores.shape[-1]), -1)
    return torch.where(top.values == float("-inf"), -1, top.indices).to(torch.int32)


def _means(x: Tensor, block: int) -> Tensor:
    """[B, H, N, D] to [B, H, ceil(N / block), D]; the last block over the rows it has."""
    length = x.shape[2]
    tail = -length % block
    if not tail:
        return x.unflatten(2, (-1, block)).mean(3)
    sums = pad(x, (0, 0, 0, tail)).unflatten(2, (-1, block)).mean(3)
    return torch.cat([sums[:, :, :-1], sums[:, :, -1:] * (block / (block - tail))], 2)


@dataclass(frozen=True)
class DecodePlan:
    """Which pages of a cache one step reads; the same lists as a BlockPlan of block_q 1.

    index: int32 [Bm, Hm, P], pages of `page` keys (1, 16, 64, …), -1 at the end; it must hold the
    page of the current token. count: int32 [Bm, Hm].
    """

    index: Tensor
    count: Tensor
    page: int

    @classmethod
    def from_scores(cls, scores: Tensor, pages: int, page: int, keys: int) -> DecodePlan:
        """The last page and the best of the others, `pages` of them.

        scores: [B, Hm, ceil(S / page)], or longer where the cache has room for more.
        """
        tiles = -(-keys // page)
        scores = scores[..., :tiles].clone()
        scores[..., -1] = float("inf")
        index = scores.topk(min(pages, tiles), -1).indices.to(torch.int32).sort(-1).values
        return cls(index, index.new_full(index.shape[:2], index.shape[2]), page)

    def prefill(self) -> BlockPlan:
        """As a block plan: one query row, every page full (its row sees all that is cached)."""
        count = self.count[..., None]
        return BlockPlan(self.index[:, :, None], count, count, 1, self.page)


def select_pages(query: Tensor, means: Tensor, pages: int, page: int, keys: int) -> DecodePlan:
    """The last page, and those of greatest mean query . mean key, `pages` of them.

    query: [B, H, 1, D], of which the heads of a group choose together. means: [B, Hk, T, D], the
    mean key of each page, T = ceil(keys / page) or more. Class S: nothing later takes part.
    """
    batch, groups, tiles, width = means.shape
    together = query.reshape(batch * groups, -1, width).sum(1, keepdim=True)
    scores = torch.bmm(together, means.flatten(0, 1).mT)
    return DecodePlan.from_scores(scores.view(batch, groups, tiles), pages, page, keys)
