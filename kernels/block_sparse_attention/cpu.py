"""The block plan on a CPU: gathered blocks of keys through torch's fused attention.

Query blocks with equally many listed blocks make one batch; the keys of a batch are gathered a
few megabytes at a time. Full blocks need no mask; partial ones get a small additive mask; the
two results merge by their LSE while they are in cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from rewriter.kernels.attention.fused import attend, attend_row

#: Elements of gathered keys in one batch.
BUDGET = 1 << 20


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    count: Tensor,
    full: Tensor,
    mask: Tensor | None,
    columns: Tensor | None,
    pos_q: Tensor | None,
    pos_k: Tensor | None,
    group_q: Tensor | None,
    group_k: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
    block_q: int,
    block_k: int,
    causal: bool,
    window: int,
    sinks: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Same contract as the op."""
    plain = mask is None and columns is None and key_bias is None
    if plain and query.shape[2] == 1 and bool((full == index.shape[3]).all()):
        return _step(query, key, value, index[:, :, 0], scale, block_k, softcap)
    tiles = _Tiles(
        query, key, value, index, count, full, mask, columns, pos_q, pos_k, group_q, group_k,
        key_bias, block_q, block_k, causal, window, sinks,
    )  # fmt: skip
    batch, heads, length, _ = query.shape
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    shape = (batch, tiles.rows, block_q, tiles.heads, tiles.packed)
    output = query.new_zeros(*shape, value.shape[3])
    lse = torch.full(shape, float("-inf"), dtype=wide)
    for units, fulls, partials in tiles.batches(value.shape[3]):
        b, h, r = tiles.place(units)
        q = tiles.queries(query, units)  # [n, P, block_q, D]
        result: Tensor | None = None
        if fulls:
            k, v = (tiles.blocks(x, units, 0, fulls) for x in (key, value))
            packed = q.flatten(1, 2)[:, None]
            result, normaliser = attend(packed, k[:, None], v[:, None], None, scale, softcap)
            result = result.reshape(*q.shape[:3], -1)
            normaliser = normaliser.reshape(q.shape[:3])
        if partials or columns is not None:
            k, v, seen, extra = tiles.partial(key, value, units, fulls, partials)
            k, v = (x[:, None].expand(-1, tiles.packed, -1, -1) for x in (k, v))
            extra = extra[:, None].expand(-1, tiles.packed, -1, -1)
            some, some_lse = attend(q, k, v, extra, scale, softcap)
            some_lse = some_lse.masked_fill(~seen.any(-1)[:, None], float("-inf"))
            if result is None:
                result, normaliser = some, some_lse
            else:
                weight = torch.sigmoid(some_lse - normaliser)[..., None].to(some.dtype)
                result, normaliser = (
                    torch.lerp(result, some, weight),
                    torch.logaddexp(normaliser, some_lse),
                )
        if result is not None:
            output[b, r, :, h] = result.transpose(1, 2)
            lse[b, r, :, h] = normaliser.transpose(1, 2)
    output = output.flatten(3, 4).flatten(1, 2)[:, :length]
    return output.contiguous(), lse.flatten(3, 4).flatten(1, 2)[:, :length].transpose(
        1, 2
    ).contiguous()


def gradients(
    grad_output: Tensor | None,
    grad_lse: Tensor | None,
    output: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    count: Tensor,
    full: Tensor,
    mask: Tensor | None,
    columns: Tensor | None,
    pos_q: Tensor | None,
    pos_k: Tensor | None,
    group_q: Tensor | None,
    group_k: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
    block_q: int,
    block_k: int,
    causal: bool,
    window: int,
    sinks: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of query, key, value, key_bias, from the saved output and LSE, one batch after another."""
    tiles = _Tiles(
        query, key, value, index, count, full, mask, columns, pos_q, pos_k, group_q, group_k,
        key_bias, block_q, block_k, causal, window, sinks,
    )  # fmt: skip
    wide = lse.dtype
    grad_output = torch.zeros_like(output) if grad_output is None else grad_output
    delta = (grad_output.to(wide) * output.to(wide)).sum(-1).transpose(1, 2)  # [B, H, L]
    if grad_lse is not None:
        delta = delta - grad_lse
    outside = torch.stack([lse.masked_fill(lse == float("-inf"), 0), delta], -1)
    batch, _, length, _ = query.shape
    dq = torch.zeros(batch, tiles.heads, tiles.packed, tiles.rows, block_q, query.shape[3]).to(wide)
    dk = torch.zeros(batch * tiles.groups * tiles.keys, key.shape[3], dtype=wide)
    dv = torch.zeros(batch * tiles.groups * tiles.keys, value.shape[3], dtype=wide)
    bias = torch.zeros(batch * tiles.heads * tiles.keys, dtype=wide)
    for units, fulls, partials in tiles.batches(4 * value.shape[3]):
        if not (fulls or partials or columns is not None):
            continue
        k, v, seen, extra = tiles.partial(key, value, units, 0, fulls + partials)
        b, h, r = tiles.place(units)
        q, do, side = (
            tiles.queries(x, units).to(wide) for x in (query, grad_output.transpose(1, 2), outside)
        )
        k, v = k.to(wide)[:, None], v.to(wide)[:, None]
        logits = q @ k.transpose(-1, -2) * scale
        bent = torch.tanh(logits / softcap) if softcap > 0 else None
        logits = logits if bent is None else softcap * bent
        weights = torch.exp(logits + extra[:, None] - side[..., :1])
        slope = weights * (do @ v.transpose(-1, -2) - side[..., 1:])
        if key_bias is not None:
            ids = tiles.tokens(units, 0, fulls + partials).clamp(0, tiles.keys - 1)
            ids = ids + ((b * tiles.heads + h) * tiles.keys)[:, None]
            bias.index_add_(0, ids.flatten(), slope.sum((1, 2)).flatten())
        slope = (slope if bent is None else slope * (1 - bent.square())) * scale
        dq[b, h, :, r] = slope @ k
        ids = tiles.tokens(units, 0, fulls + partials).clamp(0, tiles.keys - 1)
        ids = (ids + (tiles.group(units) * tiles.keys)[:, None]).flatten()
        dk.index_add_(0, ids, (slope.transpose(-1, -2) @ q).sum(1).flatten(0, 1))
        dv.index_add_(0, ids, (weights.transpose(-1, -2) @ do).sum(1).flatten(0, 1))
    found = query.new_empty(0)
    if key_bias is not None:
        found = bias.view(batch, key_bias.shape[1], -1, tiles.keys).sum(2)
        found = (found.sum(0, keepdim=True) if key_bias.shape[0] == 1 else found).to(key_bias.dtype)
    return (
        dq.flatten(3, 4)[:, :, :, :length].flatten(1, 2).to(query.dtype),
        dk.view(key.shape).to(key.dtype),
        dv.view(value.shape).to(value.dtype),
        found,
    )


def _step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    scale: float,
    page: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """One row, every page whole: gather and attend; index: [Bm, Hm, P]."""
    batch, heads, _, width = query.shape
    groups, keys = key.shape[1], key.shape[2]
    tiles = max(index.shape[1], groups)
    owner = torch.arange(batch * tiles) // (tiles // groups)
    pages = index.expand(batch, tiles, -1).reshape(batch * tiles, -1)
    extra = None
    if keys % page == 0 and key.is_contiguous() and value.is_contiguous():
        chosen = (pages + (owner * (keys // page))[:, None]).flatten()
        k, v = (
            x.view(-1, page * x.shape[3])
            .index_select(0, chosen)
            .view(len(owner), 1, -1, x.shape[3])
            for x in (key, value)
        )
    else:
        ids = (pages[..., None] * page + torch.arange(page)).flatten(1)
        k, v = (
            x[(owner // groups)[:, None], (owner % groups)[:, None], ids.clamp(max=keys - 1)][
                :, None
            ]
            for x in (key, value)
        )
        extra = torch.where(ids < keys, 0.0, float("-inf")).to(query.dtype)[:, None, None]
    q = query.reshape(batch * tiles, 1, heads // tiles, width)
    if extra is not None:
        extra = extra.expand(-1, 1, q.shape[2], -1)
    if softcap == 0 and query.dtype in (torch.float32, torch.float64):
        output, lse = attend_row(q, k, v, extra, scale)
    else:
        output, lse = attend(q, k, v, extra, scale, softcap)
    return output.reshape(batch, 1, heads, -1).contiguous(), lse.reshape(
        batch, heads, 1
    ).contiguous()


@dataclass
class _Tiles:
    """Units of work, (batch, tile head, query block), and what each gathers.

    A tile head is a query head, or a key head with its queries packed when they share a list.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    index: Tensor
    count: Tensor
    full: Tensor
    mask: Tensor | None
    columns: Tensor | None
    pos_q: Tensor | None
    pos_k: Tensor | None
    group_q: Tensor | None
    group_k: Tensor | None
    key_bias: Tensor | None
    block_q: int
    block_k: int
    causal: bool
    window: int
    sinks: int

    def __post_init__(self) -> None:
        batch, heads, self.length, _ = self.query.shape
        self.groups, self.keys = self.key.shape[1], self.key.shape[2]
        self.plan_batch, self.plan_heads, self.rows, most = self.index.shape
        self.heads = max(self.plan_heads, self.groups)
        self.packed = heads // self.heads
        place = torch.arange(most)
        listed = place < self.count[..., None]
        whole = place < self.full[..., None]
        # A block with padding, a tail or a bias in it needs the mask, whole or not.
        clear = whole & ((self.index + 1) * self.block_k <= self.keys)
        if self.mask is not None:
            tail = -self.keys % self.block_k
            real = pad(self.mask.bool(), (0, tail)).unflatten(1, (-1, self.block_k)).all(-1)
            each = torch.arange(batch)[:, None, None, None]
            clear = clear & real[each, self.index.clamp_min(0).long()]
        if self.key_bias is not None:
            clear = torch.zeros_like(clear)
        order = torch.where(clear, 0, torch.where(listed, 1, 2)).sort(dim=-1, stable=True).indices
        expand = lambda t: t.expand(batch, self.heads, self.rows, -1).flatten(0, 2)  # noqa: E731
        index, whole = (t.expand_as(order).gather(-1, order) for t in (self.index, whole))
        self.listed = expand(index).long()
        self.whole = expand(whole)
        self.fulls = expand(clear.sum(-1, keepdim=True))[:, 0]
        self.partials = expand(listed.expand_as(order).sum(-1, keepdim=True))[:, 0] - self.fulls
        if self.mask is not None and self.window > 0:
            self.first = self.mask.bool() & (self.mask.long().cumsum(-1) <= self.sinks)

    def batches(self, width: int) -> Iterator[tuple[Tensor, int, int]]:
        """(units, their full blocks, their partial blocks), few enough to gather at once."""
        kinds = self.fulls * (self.listed.shape[1] + 1) + self.partials
        for kind in kinds.unique().tolist():
            fulls, partials = divmod(kind, self.listed.shape[1] + 1)
            units = (kinds == kind).nonzero()[:, 0]
            single = 0 if self.columns is None else self.columns.shape[2]
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
        if self.columns is None:
            return ids
        return torch.cat([ids, self._shared(self.columns, units)], 1)

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
        self, key: Tensor, value: Tensor, units: Tensor, start: int, blocks: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys and values [n, E, D], which are visible [n, block_q, E], and the additive mask."""
        ids = self.tokens(units, start, blocks)
        real = (ids >= 0) & (ids < self.keys)
        ids = ids.clamp(0, self.keys - 1)
        b, h, r = self.place(units)
        rows = r[:, None] * self.block_q + torch.arange(self.block_q)
        rows = rows.clamp(max=self.length - 1)
        pos_q = rows + (self.keys - self.length)
        pos_q = pos_q if self.pos_q is None else self._shared(self.pos_q, units).gather(1, rows)
        pos_k = ids if self.pos_k is None else self._shared(self.pos_k, units).gather(1, ids)
        distance = pos_q[:, :, None] - pos_k[:, None, :]
        before = distance >= 0 if self.causal else torch.ones_like(distance, dtype=torch.bool)
        seen = before
        if self.window > 0:
            first = ids < self.sinks if self.mask is None else self.first[b[:, None], ids]
            seen = seen & ((distance.abs() < self.window) | first[:, None])
        if self.group_q is not None and self.group_k is not None:
            mine = self._shared(self.group_q, units).gather(1, rows)
            theirs = self._shared(self.group_k, units).gather(1, ids)
            seen = seen & (mine[:, :, None] == theirs[:, None])
        inside = blocks * self.block_k
        whole = self.whole[units, start : start + blocks].repeat_interleave(self.block_k, 1)
        seen = seen[..., :inside] | whole[:, None]
        if self.columns is not None:
            counted = (self.fulls + self.partials)[units][:, None, None]
            listed = torch.arange(self.listed.shape[1])[:, None] < counted
            single = ids[:, None, inside:] // self.block_k
            twice = ((self.listed[units][..., None] == single) & listed).any(1)
            seen = torch.cat([seen, before[..., inside:] & ~twice[:, None]], -1)
        if self.mask is not None:
            real = real & self.mask.bool()[b[:, None], ids]
        seen = seen & real[:, None]
        extra = torch.where(seen, 0.0, float("-inf")).to(self.query.dtype)
        if self.key_bias is not None:
            extra = extra + self._shared(self.key_bias, units).gather(1, ids)[:, None].to(extra)
        group = self.group(units)[:, None]
        if self.columns is None:
            k, v = (self.blocks(x, units, start, blocks) for x in (key, value))
        else:
            k, v = (x[group // self.groups, group % self.groups, ids] for x in (key, value))
        return k, v, seen, extra

    def _shared(self, x: Tensor, units: Tensor) -> Tensor:
        """[Bm, Hm, N] to the row of each unit, [n, N]; int64 where it is an integer."""
        b, h, _ = self.place(units)
        b = b if self.plan_batch > 1 else torch.zeros_like(b)
        found = x[b, h if self.plan_heads > 1 else torch.zeros_like(h)]
        return found if found.is_floating_point() else found.long()
