"""One Triton kernel, compiled for a GPU or interpreted on CPU tensors, from the same function.

Triton itself chooses once, by an environment variable, for a whole process; we test kernels and
compile them ahead of time in one process without a GPU. Written for triton 3.6 to 3.9.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

#: Arguments of a launch that mean nothing to the interpreter.
COMPILE_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")


class Kernel(JITFunction):
    """`kernel[grid](...)` runs compiled, or interpreted when no tensor is on a GPU.

    A kernel may call other kernels as device functions; they run the same way.
    """

    def __init__(self, fn: Callable[..., Any], **options: Any) -> None:
        super().__init__(fn, **options)
        self.interpreted = InterpretedFunction(fn)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.interpreted(*args, **kwargs)  # only interpreted code gets here

    def run(self, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        if any(t.is_cuda for t in tensors) or warmup:
            return super().run(*args, grid=grid, warmup=warmup, **kwargs)
        _patch_bf16_dot()
        kept = {k: v for k, v in kwargs.items() if k not in COMPILE_OPTIONS}
        with torch.no_grad():
            return self.interpreted[grid](*args, **kept)


def kernel(fn: Callable[..., Any]) -> Kernel:
    """Decorator, in place of `triton.jit`."""
    return Kernel(fn)


@dataclass(frozen=True)
class Compilation:
    """One kernel with the types and constants it is compiled ahead of time for.

    signature: argument name to Triton type (`*fp32`, `*bf16`, `i32`, `fp32` …); arguments that
    are not named are i32. constants: values of the constexpr arguments. aligned: pointers and
    strides that are multiples of 16. matrix_unit: whether it must use one.
    """

    kernel: Kernel
    case: str
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    matrix_unit: bool = True


def _patch_bf16_dot() -> None:
    """The interpreter holds bf16 as uint16 bits and `tl.dot` multiplies the bits: widen first."""
    original = interpreter.InterpreterBuilder.create_dot
    if getattr(original, "_widens", False):
        return

    def widen(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        wide = interpreter._convert_float(handle.data, tl.bfloat16, tl.float32, None)
        return interpreter.TensorHandle(wide.view(interpreter.np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return original(self, widen(a), widen(b), *rest)

    create_dot._widens = True  # type: ignore[attr-defined]
    interpreter.InterpreterBuilder.create_dot = create_dot
