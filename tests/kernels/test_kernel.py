"""One kernel, interpreted and compiled, in one process without a GPU."""

from __future__ import annotations

import pytest
import torch
import triton.language as tl
from triton.runtime.jit import JITFunction

from rewriter.kernels.kernel import kernel


@kernel
def _double(x):
    return x + x


@kernel
def _add(X, Y, OUT, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y = tl.load(X + i, mask=i < n, other=0.0), tl.load(Y + i, mask=i < n, other=0.0)
    total = tl.sum(x, 0) * 0 + tl.cdiv(n, BLOCK) * 0  # device functions of Triton's own
    tl.store(OUT + i, _double(x) + y + total, mask=i < n)


@kernel
def _product(A, B, OUT, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(OUT + at, tl.dot(tl.load(A + at), tl.load(B + at)))


def test_interprets_device_functions_and_leaves_the_compiler_alone() -> None:
    x, y, out = torch.randn(50), torch.randn(50), torch.empty(50)
    before = tl.core.load, JITFunction.__call__
    _add[(4,)](x, y, out, 50, BLOCK=16, num_warps=2, num_stages=1)
    torch.testing.assert_close(out, 2 * x + y)
    assert (tl.core.load, JITFunction.__call__) == before
    with pytest.raises(RuntimeError, match="outside of the scope of a kernel"):
        _double(1)


def test_bfloat16_products_are_right_in_the_interpreter() -> None:
    a, b = torch.randn(2, 16, 16).bfloat16()
    out = torch.empty(16, 16)
    _product[(1,)](a, b, out, N=16)
    torch.testing.assert_close(out, a.float() @ b.float())


@kernel
def _narrow(X, OUT, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(OUT + i, tl.load(X + i).to(tl.bfloat16))


def test_bfloat16_is_rounded_as_torch_rounds() -> None:
    x = torch.cat([torch.randn(1000), torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-40])])
    x = torch.nn.functional.pad(x, (0, 19), value=torch.nan)
    out = torch.empty(1024, dtype=torch.bfloat16)
    _narrow[(1,)](x, out, N=1024)
    assert torch.equal(out.nan_to_num(7), x.bfloat16().nan_to_num(7))


def test_errors_in_a_kernel_undo_the_interpreters_patches() -> None:
    before = tl.core.load, JITFunction.__call__
    with pytest.raises(Exception, match="unexpected keyword|missing"):
        _add[(1,)](torch.randn(4), BLOCK=16)
    assert (tl.core.load, JITFunction.__call__) == before


def test_the_way_to_a_gpu_and_back_keeps_views(launch_elsewhere) -> None:
    """A second copy on the CPU stands for the GPU."""
    seen = set()

    def launch(self, *args, grid, warmup, **kwargs):
        seen.update(a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor))
        return self.run(*args, grid=grid, warmup=warmup, **kwargs)

    whole = torch.randn(2, 50)
    kept = whole.clone()
    run = launch_elsewhere("cpu", launch)
    run(_add, whole[0], whole[0], whole[1], 50, BLOCK=64, grid=(1,), warmup=False)
    torch.testing.assert_close(whole[1], 3 * kept[0])
    torch.testing.assert_close(whole[0], kept[0])
    assert len(seen) == 1 and whole.untyped_storage().data_ptr() not in seen
