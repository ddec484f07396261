"""`rewriter::selective_scan`: a Scan over the tokens, whose memory is one state.

com.microsoft LinearAttention could say it (one head a channel, a decay for each key channel), but
its decay is one value for every token, channel and state: 16 times the input of a usual Mamba.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.fx import Node

import rewriter.kernels.selective_scan  # noqa: F401  registers the op
from rewriter.backends.onnx.nodes import DOMAIN, Nodes
from rewriter.backends.onnx.registry import Context, emit, expands, lowers

KIND = torch.float32


@lowers(torch.ops.rewriter.selective_scan.default)
def lower(node: Node, context: Context) -> None:
    context.replace(node, selective_scan)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Shapes as in the op."""
    kind = x.dtype
    x, dt, B, C = (t.to(KIND) for t in (x, dt, B, C))
    if mask is not None:
        real = mask.bool()[..., None]
        x, dt, B, C = (torch.where(real, t, 0.0) for t in (x, dt, B, C))
    batch, length, channels = x.shape
    size = A.shape[1]
    past = x.new_zeros((batch, channels, size)) if state is None else state.to(KIND)
    y, present = emit(
        "SelectiveScan",
        [dt, dt * x, B, C, A.to(KIND), past],
        {},
        [(KIND, (batch, length, channels)), (KIND, (batch, channels, size))],
        domain=DOMAIN,
    )
    y = y if D is None else y + D.to(KIND) * x
    return y.to(kind), present


@expands("SelectiveScan")
def expand(node: ir.Node, op: Nodes, memo: dict[Any, Any]) -> list[ir.Value]:
    """One token: h ← e^(dt A) h + (dt x) Bᵀ, y = h C."""
    dt, write, key, query, decay, past = node.inputs
    scanned = [op.Transpose(t, perm=[1, 0, 2]) for t in (dt, write, key, query)]  # [T, B, n]
    body = op.inner()
    state, *now = (
        ir.val(f"{op.prefix}/{n}", ir.DataType.FLOAT) for n in ("h", "dt", "write", "key", "query")
    )
    step, new, at, asks = (body.Unsqueeze(t, [2 if i != 2 else 1]) for i, t in enumerate(now))
    kept = body.Mul(body.Exp(body.Mul(step, decay)), state)  # [B, C, N]
    after = body.Add(kept, body.Mul(new, at))
    made = body.Squeeze(body.MatMul(after, asks), [2])
    graph = body.graph("token", [state, *now], [after, made])
    present, y = op.Scan(past, *scanned, num_scan_inputs=4, body=graph, outputs=2)
    return [op.Transpose(y, perm=[1, 0, 2]), present]
