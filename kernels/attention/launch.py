"""Tile sizes and launches of the kernels in `flash` and `flash_backward`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rewriter.kernels.attention import flash, flash_backward
from rewriter.kernels.kernel import Compilation, Kernel, for_gpu, for_hopper, recording_for

#: Programs that a decode step should have, about two for every processor of a large GPU.
PROGRAMS = 264


_recorded: list[Compilation] | None = None


@contextmanager
def recording(case: str, targets: tuple[str, ...] = ()) -> Iterator[list[Compilation]]:
    """Collect what GPUs would compile instead of launching; on tensors of the meta device.

    targets: GPUs of one kind that it is for; none: for all, as older ones need it.
    """
    global _recorded
    kept: list[Compilation] = []
    before = torch.backends.cuda.matmul.allow_tf32
    _recorded, torch.backends.cuda.matmul.allow_tf32 = kept, True
    try:
        with recording_for(targets[0] if targets else "any"):
            yield kept
    finally:
        _recorded, torch.backends.cuda.matmul.allow_tf32 = None, before
        kept[:] = [replace(c, case=case, targets=targets) for c in kept]


POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int32: "*i32", torch.int64: "*i64", torch.int8: "*i8", torch.bool: "*i1",
}  # fmt: skip


def launch(kernel: Kernel, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """`kernel[grid](...)`, or a note of how it would be compiled, as the JIT specialises it."""
    if _recorded is None:
        kernel[grid](*args, **constants)
        return
    signature, fixed, aligned = {}, dict(constants), []
    options = {name: fixed.pop(name) for name in ("num_warps", "num_stages") if name in fixed}
    for name, value in zip(kernel.arg_names, args, strict=False):
        if value is None or (isinstance(value, int) and value == 1):
            fixed[name] = value
        elif isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            aligned.append(name)
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                aligned.append(name)
    unit = any(word in kernel.__name__ for word in ("attend", "statistic"))
    _recorded.append(
        Compilation(kernel, kernel.__name__, signature, fixed, tuple(aligned), options, unit)
    )


def on_gpu(x: Tensor) -> bool:
    """Whether tiles are for a GPU; the interpreter wants few and large ones."""
    return for_gpu(x) or torch.cuda.is_available()


def power(n: int, least: int = 16) -> int:
    """The power of two that holds n; a matrix unit wants 16."""
    return max(least, 1 << (n - 1).bit_length())


def precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies float32: as torch is told to multiply matrices."""
    if dtype != torch.float32 or torch.version.hip:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


@dataclass
class Problem:
    """Attention as the kernels see it; see `flash` for what each tensor does.

    Every tensor of a plan head is [Bm, HM, ...]; `dense` and `bias` broadcast to [B, H, L, S].
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    softcap: float = 0.0
    causal: bool = False
    window: int = 0
    index: Tensor | None = None
    count: Tensor | None = None
    full: Tensor | None = None
    columns: Tensor | None = None
    kind: Tensor | None = None
    dense: Tensor | None = None
    bias: Tensor | None = None
    key_bias: Tensor | None = None
    pos_q: Tensor | None = None
    pos_k: Tensor | None = None
    group_q: Tensor | None = None
    group_k: Tensor | None = None
    sink: Tensor | None = None
    start: Tensor | None = None
    stop: Tensor | None = None
    block_q: int = 1
    block_k: int = 1
    plan_batch: int = 1
    plan_heads: int = 1
    scattered: bool = False

    def __post_init__(self) -> None:
        self.query, self.key, self.value = (
            t if t.stride(-1) == 1 else t.contiguous() for t in (self.query, self.key, self.value)
        )
        self.batch, self.heads, self.length, self.width = self.query.shape
        self.groups, self.keys, self.width_v = (
            self.key.shape[1],
            self.key.shape[2],
            self.value.shape[3],
        )
        self.listed = None
        self.tiles_k = -(-self.keys // self.block_k)
        self.tiles_q = -(-self.length // self.block_q)
        if self.columns is not None and self.index is not None:
            from rewriter.kernels.block_sparse_attention.plan import block_maps

            assert self.count is not None
            found, _ = block_maps(self.index, self.count, self.count, self.tiles_k)
            self.listed = found.to(torch.int8)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Output [B, L, H, Dv] in the queries' dtype and LSE [B, H, L] in float32."""
        tile = self._rows(forward=True)
        programs = -(-self.length // tile["ROWS"]) * self.batch * (self.heads // tile["PACK"])
        reach = self.keys if self.index is None else self.index.shape[3] * self.block_k
        splits = 1
        if self.length <= 16:
            splits = max(1, min(-(-PROGRAMS // programs), reach // 128, 64))
        shape = (self.batch, self.length, self.heads, self.width_v)
        part = torch.float32 if splits > 1 else self.query.dtype
        output = self.query.new_empty((splits, *shape), dtype=part)
        lse = self.query.new_empty(
            (splits, self.batch, self.heads, self.length), dtype=torch.float32
        )
        if not output.numel():
            return output[0], lse[0]
        grid = (
            -(-self.length // tile["ROWS"]),
            programs // -(-self.length // tile["ROWS"]),
            splits,
        )
        launch(
            flash.attend, grid,
            self.query, self.key, self.value, output, lse, *self._lists(), *self._masks(),
            None if splits > 1 else self.sink, self.start, *self._strides(), self.scale,
            self.softcap, self.window, self.batch, *self._sizes(),
            EVEN=self._even(tile["BN"]), **self._constants(), **tile, **self._forward_options(),
        )  # fmt: skip
        if splits == 1:
            return output[0], lse[0]
        return merge_splits(output, lse, self.query.dtype, self.sink)

    def backward(
        self,
        grad_output: Tensor | None,
        grad_lse: Tensor | None,
        output: Tensor,
        lse: Tensor,
        wants_bias: bool = False,
    ) -> dict[str, Tensor | None]:
        """Gradients of query, key, value, bias, key_bias and sink (None for what is not there)."""
        grad = torch.zeros_like(output) if grad_output is None else grad_output.contiguous()
        delta = (grad.float() * output.float()).sum(-1).transpose(1, 2).contiguous()
        if grad_lse is not None:
            delta = delta - grad_lse
        lse = lse.contiguous()
        dq = self.query.new_empty(self.query.shape)
        some = self.columns is not None and self.index is not None
        wide = torch.float32 if some else self.key.dtype
        dk = self.key.new_empty(self.key.shape, dtype=wide)
        dv = self.value.new_empty(self.value.shape, dtype=wide)
        size = (self.batch, self.heads, self.keys)
        rows = None if self.key_bias is None else self.query.new_empty(size, dtype=torch.float32)
        dbias = None
        if self.bias is not None and wants_bias:
            dbias = torch.zeros(self.bias.shape, dtype=torch.float32, device=self.bias.device)
        tile = self._rows(forward=False)
        grid = (-(-self.length // tile["ROWS"]), self.batch * (self.heads // tile["PACK"]))
        launch(
            flash_backward.attend_dq, grid,
            self.query, self.key, self.value, grad, lse, delta, dq, dbias, *self._lists(),
            *self._masks(), self.start, *self._strides(), *self._spread(dbias), self.scale,
            self.softcap, self.window, *self._sizes(),
            **self._constants(), **tile,
            **(self._options(8, 1) if self._widest() > 64 else self._options(4, 2)),
        )  # fmt: skip
        self._backward_keys(grad, lse, delta, dk, dv, rows, None)
        if some:
            self._backward_keys(grad, lse, delta, dk, dv, rows, self.columns)
        found: dict[str, Tensor | None] = {
            "query": dq, "key": dk.to(self.key.dtype), "value": dv.to(self.value.dtype),
            "bias": dbias, "key_bias": None, "sink": None,
        }  # fmt: skip
        if rows is not None:
            rows = rows.unflatten(1, (self.plan_heads, -1)).sum(2)
            found["key_bias"] = rows.sum(0, keepdim=True) if self.plan_batch == 1 else rows
        if self.sink is not None:
            share = torch.exp(self.sink.float()[:, None] - lse)
            found["sink"] = -(share * delta).sum((0, 2))
        return found

    def _backward_keys(
        self,
        grad: Tensor,
        lse: Tensor,
        delta: Tensor,
        dk: Tensor,
        dv: Tensor,
        rows: Tensor | None,
        columns: Tensor | None,
    ) -> None:
        together = self.heads // self.groups if columns is None else 1
        row_blocks = spans = None
        count = self.keys if columns is None else columns.shape[2]
        most = keys = 64
        if on_gpu(self.key):  # two tiles of keys and two of sums must fit in registers
            small = self.key.dtype == torch.float32 or self._widest() > 64
            most, keys = (32 if self.key.dtype == torch.float32 else 64), 32 if small else 64
        if columns is None and self.index is not None:
            assert self.count is not None and self.full is not None
            row_blocks, spans = transposed(self.index, self.count, self.full, self.tiles_k)
            keys = self.block_k if self.block_k <= keys else math.gcd(self.block_k, keys)
        grid = (-(-count // keys), self.batch * self.heads // together)
        masks = self._masks()
        dense = self.index is None
        launch(
            flash_backward.attend_dkv, grid,
            self.query, self.key, self.value, grad, lse, delta, dk, dv, rows,
            row_blocks, spans, columns, self.listed if columns is not None else None, *masks,
            self.stop, *self._strides(), self.scale, self.softcap, self.window,
            self.heads, self.groups, self.plan_heads, int(self.plan_batch > 1), self.length,
            self.keys, self.tiles_q, self.tiles_k, 0 if columns is None else columns.shape[2],
            **(self._constants() | {"SINKS": self.kind is not None and self.window > 0}),
            HEADS=together, KEYS=keys, BM=most, BN=power(keys),
            **self._options(8 if self._widest() > 64 else 4, 1), SCATTERED=self.scattered and dense,
        )  # fmt: skip

    def _rows(self, forward: bool) -> dict[str, Any]:
        """How rows and heads make a tile, and what its walk over keys looks like."""
        gpu, wide = on_gpu(self.query), self.query.dtype == torch.float32
        most = 32 if wide and gpu else (128 if forward and not self._small() else 64)
        narrow = gpu and (wide or (self._widest() > 64 and not forward))
        group = self.heads // self.groups
        pack, rows = 1, most
        if self.index is None:
            if self.length * group <= 64:
                pack, rows = group, self.length
        elif self.block_q < 16 and self.plan_heads <= self.groups and self.block_q * group <= 128:
            pack, rows = group, self.block_q
        else:
            rows = self.block_q if self.block_q <= most else math.gcd(self.block_q, most)
        dense = self.index is None
        columns = self.columns is not None
        return {
            "ROWS": rows, "PACK": pack, "BM": power(rows * pack), "BN": 32 if narrow else 64,
            "SCATTERED": self.scattered, "MODES": 3 if columns else 2,
            "SINKS": self.kind is not None and self.window > 0 and not (dense and columns),
        }  # fmt: skip

    def _lists(self) -> tuple[Tensor | None, ...]:
        return self.index, self.count, self.full, self.columns, self.listed

    def _masks(self) -> tuple[Tensor | None, ...]:
        return (
            self.kind, self.dense, self.bias, self.key_bias, self.pos_q, self.pos_k, self.group_q,
            self.group_k,
        )  # fmt: skip

    def _strides(self) -> tuple[int, ...]:
        return (
            *self.query.stride()[:3], *self.key.stride()[:3], *self.value.stride()[:3],
            *self._spread(self.dense), *self._spread(self.bias),
        )  # fmt: skip

    def _spread(self, x: Tensor | None) -> tuple[int, ...]:
        """Strides over [B, H, L, S], zero where x broadcasts."""
        if x is None:
            return (0, 0, 0, 0)
        return tuple(s if n > 1 else 0 for s, n in zip(x.stride(), x.shape, strict=True))

    def _sizes(self) -> tuple[int, ...]:
        return (
            self.heads, self.groups, self.plan_heads, int(self.plan_batch > 1), self.length,
            self.keys, self.tiles_q, self.tiles_k, 1 if self.index is None else self.index.shape[3],
            0 if self.columns is None else self.columns.shape[2],
        )  # fmt: skip

    def _constants(self) -> dict[str, Any]:
        return {
            "D": self.width, "DV": self.width_v, "DP": power(self.width),
            "DVP": power(self.width_v), "BLOCK_Q": self.block_q, "BLOCK_K": self.block_k,
            "CAUSAL": self.causal, "WINDOW": self.window > 0, "SOFTCAP": self.softcap > 0,
            "PRECISION": precision(self.query.dtype),
        }  # fmt: skip

    def _even(self, keys: int) -> bool:
        """Whether no tile of keys, columns apart, reaches beyond what there is."""
        whole = self.width == power(self.width) and self.width_v == power(self.width_v)
        tile = keys if self.index is None else self.block_k
        return whole and tile % keys == 0 and self.keys % tile == 0 and self.scale > 0

    def _small(self) -> bool:
        """Whether a forward tile has 64 rows: for Hopper, or a wide one that would spill.

        On an H100, at 32,768 tokens and width 128, two such programs on a processor hide each
        other's softmax; 128 x 128 in 8 warps is as fast for a plan, slower when dense, and spills.
        Tensor descriptors and warp specialisation of triton 3.6 change nothing.
        """
        low = self.query.dtype != torch.float32
        return low and (for_hopper(self.query) or (on_gpu(self.query) and self._widest() > 64))

    def _forward_options(self) -> dict[str, int]:
        if self._small():
            return {"num_warps": 4, "num_stages": 3 if for_hopper(self.query) else 2}
        return self._options(8, 2)

    def _widest(self) -> int:
        return max(power(self.width), power(self.width_v))

    def _options(self, warps: int, stages: int) -> dict[str, int]:
        """Warps and pipeline stages in low precision; float32 has small tiles of its own."""
        if self.query.dtype == torch.float32:
            return {"num_warps": 4, "num_stages": 1 if self._widest() > 64 else 2}
        return {"num_warps": warps, "num_stages": stages}


def merge_splits(
    output: Tensor, lse: Tensor, dtype: torch.dtype, sink: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Results over disjoint keys, [n, B, L, H, Dv] and [n, B, H, L] in float32, to one."""
    splits, batch, length, heads, width = output.shape
    result = output.new_empty(output.shape[1:], dtype=dtype)
    normaliser = torch.empty_like(lse[0])
    rows = batch * length * heads
    columns = min(power(width, 1), 64)
    launch(
        flash.merge_splits, (rows, -(-width // columns)),
        output, lse, result, normaliser, rows, heads, length, splits, sink,
        DV=width, BD=columns, MAX=power(splits, 1),
    )  # fmt: skip
    return result, normaliser


def transposed(index: Tensor, count: Tensor, full: Tensor, tiles: int) -> tuple[Tensor, Tensor]:
    """For each key block the query blocks that list it: those that see it whole, then the others.

    Returns the query blocks, int32, and where each run of them begins, int32
    [Bm Hm tiles 2 + 1].
    """
    place = torch.arange(index.shape[3], device=index.device)
    heads = torch.arange(count.shape[0] * count.shape[1], device=index.device)
    heads = heads.view(*count.shape[:2], 1, 1)
    run = (heads * tiles + index.long()) * 2 + (place >= full[..., None])
    runs = heads.numel() * tiles * 2
    run = torch.where(place < count[..., None], run, runs)
    rows = torch.arange(index.shape[2], device=index.device)[:, None].expand_as(index)
    ordered, order = torch.sort(run.flatten(), stable=True)
    spans = torch.searchsorted(ordered, torch.arange(runs + 1, device=index.device))
    return rows.flatten()[order].to(torch.int32), spans.to(torch.int32)
