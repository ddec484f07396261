"""`linear_attention` on a GPU: chunked kernels for a decay a head, else the recurrence.

The delta rule and decays of every key channel run forward token by token with the state in
registers; their gradients are those of the chunked torch form, which runs on any device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rewriter.kernels.autograd import _recompute
from rewriter.kernels.kernel import (
    COMPILE_OPTIONS,
    NEWER,
    OLDER,
    Compilation,
    Kernel,
    recording_for,
)
from rewriter.kernels.linear_attention import chunked, cpu, launch
from rewriter.kernels.linear_attention.recurrent import recurrent
from rewriter.kernels.linear_attention.reference import inert, state_heads

__all__ = ["backward", "compilations", "forward"]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float = 1.0,
    normalise: bool = False,
    state: Tensor | None = None,
    z: Tensor | None = None,
    mask: Tensor | None = None,
    one_by_one: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Same contract as the package's function; differentiable where it is chunked.

    one_by_one: whether to take the recurrent kernel, instead of by the shapes.
    """
    args = (q, k, v, log_decay, beta, scale, normalise, state, z, mask)
    if v.dtype == torch.float64:
        return cpu.linear_attention(*args)
    states, dtype = state_heads(k, v, log_decay, beta), v.dtype
    q, k, v, log_decay, beta = inert(mask, q, k, v, log_decay, beta)
    q, k = q.to(dtype), k.to(dtype)
    if normalise:  # the sum of the keys is one more column of the state
        v = torch.cat([v, v.new_ones(*v.shape[:3], 1)], 3)
        if (state is None) != (z is None):
            empty = v.new_zeros(v.shape[0], states, k.shape[3], v.shape[3], dtype=torch.float32)
            state = empty[..., :-1] if state is None else state
            z = empty[..., -1] if z is None else z
        state = None if state is None or z is None else torch.cat([state, z[..., None]], 3)
    state = None if state is None else state.float()
    wide = torch.float32 if normalise else dtype
    if one_by_one is None:
        one_by_one = v.shape[1] == 1 or not _is_chunked(log_decay, beta)
    if one_by_one:
        y, final = launch.recurrent(
            q, k, v, log_decay, beta, None, None, state, states, scale, wide
        )
    else:
        chunk = launch.tiles(dtype, k.shape[3], v.shape[3])["BT"]
        g = None if log_decay is None else launch.chunk_sums(log_decay, states, chunk)
        y, final = launch.Chunked.apply(q, k, v, g, None, None, state, states, scale, normalise)
    if not normalise:
        return y, final, final.new_zeros(*final.shape[:2], 0)
    total = y[..., -1:]
    y = torch.where(total == 0, 0, y[..., :-1] / torch.where(total == 0, 1, total))
    return y.to(dtype).contiguous(), final[..., :-1].contiguous(), final[..., -1].contiguous()


def backward(
    grads: Sequence[Tensor | None],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    normalise: bool,
    state: Tensor | None,
    z: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """One gradient or None for each argument of the op."""
    args = [q, k, v, log_decay, beta, scale, normalise, state, z, mask]
    form = cpu.linear_attention
    if _is_chunked(log_decay, beta):
        args.append(False)
        form = forward
    needed = tuple(isinstance(a, Tensor) for a in args)
    return _recompute(form, args, needed, tuple(grads))[:10]


def _is_chunked(log_decay: Tensor | None, beta: Tensor | None) -> bool:
    return beta is None and (log_decay is None or log_decay.dim() == 3)


# ---- ahead of time ----------------------------------------------------------------------------

TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def compilations() -> list[Compilation]:
    """Default configurations: chunked and one step, with a decay a head, for states of 128 x 64."""
    made = []
    for dtype in TYPES:
        made += chunked_compilations(dtype, False)
        made.append(recurrent_compilation(dtype, 1, False))
    made.append(recurrent_compilation(torch.bfloat16, 2, False, beta=True))
    return made


def chunked_compilations(dtype: torch.dtype, mamba: bool) -> list[Compilation]:
    """The chunked kernels; mamba: with gain and skip."""
    flags = {"HAS_DECAY": True, "HAS_GAIN": mamba, "HAS_SKIP": mamba}
    flags |= {"HAS_STATE": True, "HAS_FINAL": True}
    name, low = TYPES[dtype], dtype != torch.float32
    tiles = {
        chunked.leave_gradients: launch.tiles,
        chunked.query_key_gradients: launch.query_key_tiles,
        chunked.value_gradients: launch.value_tiles,
    }
    made = [
        _compilation(item, name, dtype, {**flags, **choose(dtype, 128, 64)}, low)
        for item, choose in tiles.items()
    ]
    like = torch.empty(0, dtype=dtype, device="meta")
    forward = {chunked.enter_states: launch.state_tiles, chunked.outputs: launch.output_tiles}
    for targets in (OLDER, NEWER) if low else ((),):
        case = f"{name} {' '.join(targets)}".strip()
        for item, choose_for in forward.items():
            with recording_for(targets[0] if targets else "any"):
                options = choose_for(like, 128, 64)
            found = _compilation(item, case, dtype, {**flags, **options}, low)
            made.append(replace(found, targets=targets))
    if not mamba and not low:
        values = {"LEAST": launch.LEAST_DECAY, "BT": 64, "num_warps": 1}
        made.append(_compilation(chunked.chunk_sums, name, dtype, values, False))
    return made


def recurrent_compilation(
    dtype: torch.dtype, decay: int, mamba: bool, beta: bool = False
) -> Compilation:
    """The recurrent kernel for 128 key channels."""
    flags = {"DECAY": decay, "HAS_BETA": beta, "HAS_GAIN": mamba, "HAS_SKIP": mamba}
    flags |= {"HAS_STATE": True, **launch.recurrent_tiles(128)}
    case = f"{TYPES[dtype]}{' delta, decay a key channel' if beta else ''}"
    return _compilation(recurrent, case, dtype, flags, False)


def _compilation(
    item: Kernel, case: str, dtype: torch.dtype, values: dict, matrix_unit: bool
) -> Compilation:
    names = item.arg_names
    wide = {"G", "GAIN", "BETA", "SKIP", "S0", "FINAL", "DFINAL", "DS0", "DG", "DGAIN"}
    pointers = {
        n: "*fp32" if n in wide else f"*{TYPES[dtype]}"
        for n in names
        if n[0].isupper() and n != "T"
    }
    constants = {n: v for n, v in values.items() if n in names}
    pointers = {n: t for n, t in pointers.items() if n not in constants}
    strides = [n for n in names if n in ("width_k", "width_v") or (len(n) == 2 and n[1] in "bth")]
    options = {n: v for n, v in values.items() if n in COMPILE_OPTIONS}
    signature = {**pointers, **({"scale": "fp32"} if "scale" in names else {})}
    aligned = (*pointers, *strides)
    return Compilation(item, case, signature, constants, aligned, options, matrix_unit)
