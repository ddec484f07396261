"""One Triton kernel, compiled for a GPU or interpreted on CPU tensors, from the same function.

Triton itself chooses once, by an environment variable, for a whole process; we test kernels and
compile them ahead of time in one process without a GPU. Written for triton 3.6 to 3.9.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

# Triton 3.10 turns it off by default; a kernel's numbers should not depend on the version.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton.language as tl
from torch import Tensor
from triton.language import core
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

#: Arguments of a launch that mean nothing to the interpreter.
COMPILE_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")


#: Called with kernel, args and kwargs before a launch; true: do not run it.
OBSERVERS: list[Callable[[Kernel, tuple[Any, ...], dict[str, Any]], bool]] = []
#: Tuned `num_warps` and `num_stages` by `launch_key`, instead of those that a launch asks for.
CONFIGURATIONS: dict[str, dict[str, int]] = {}


def for_gpu(x: Tensor) -> bool:
    """Whether launches on x will run on a GPU, or are recorded to be compiled for one: what
    differs between a GPU and the interpreter (tiles, precision) must be chosen by this."""
    return x.is_cuda or RECORDING_FOR[0] is not None


def for_hopper(x: Tensor) -> bool:
    """`for_gpu`, and it has the matrix unit and the shared memory of sm_90 and sm_100."""
    if RECORDING_FOR[0] is not None:
        return RECORDING_FOR[0] in NEWER
    if not x.is_cuda or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(x.device)[0] in (9, 10)


#: The GPU for which launches on CPU tensors are recorded, and not interpreted.
RECORDING_FOR: list[str | None] = [None]
#: Targets by what `for_hopper` says of them.
OLDER, NEWER = ("sm_80", "gfx942"), ("sm_90", "sm_100")


@contextmanager
def recording_for(target: str) -> Iterator[None]:
    """Launches choose tiles for `target`; who enters this sees to it that they do not run."""
    before, RECORDING_FOR[0] = RECORDING_FOR[0], target
    try:
        yield
    finally:
        RECORDING_FOR[0] = before


def launch_key(kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """What a configuration is tuned for: the kernel, its constants and the types of its tensors."""
    given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    words = [f"{kernel.fn.__module__}.{kernel.fn.__qualname__}"]
    for parameter in kernel.params:
        value = given.get(parameter.name, parameter.default)
        if parameter.is_constexpr:
            words.append(f"{parameter.name}={value}")
        elif hasattr(value, "dtype"):
            words.append(str(value.dtype).removeprefix("torch."))
    return " ".join(words)


class Kernel(JITFunction):
    """`kernel[grid](...)` runs compiled, or interpreted when no tensor is on a GPU.

    A kernel may call other kernels as device functions; they run the same way.
    """

    def __init__(self, fn: Callable[..., Any], **options: Any) -> None:
        super().__init__(fn, **options)
        self.interpreted = InterpretedFunction(fn)

    def run(self, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if not warmup and any([observe(self, args, kwargs) for observe in OBSERVERS]):
            return None
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        if any(t.is_cuda for t in tensors) or warmup:
            if CONFIGURATIONS:
                kwargs |= CONFIGURATIONS.get(launch_key(self, args, kwargs), {})
            return super().run(*args, grid=grid, warmup=warmup, **kwargs)
        _repair()
        kept = {k: v for k, v in kwargs.items() if k not in COMPILE_OPTIONS}
        with torch.no_grad(), _interpreting():
            return self.interpreted[grid](*args, **kept)


def kernel(fn: Callable[..., Any]) -> Kernel:
    """Decorator, in place of `triton.jit`."""
    return Kernel(fn)


@dataclass(frozen=True)
class Compilation:
    """One kernel with the types and constants it is compiled ahead of time for.

    signature: argument name to Triton type (`*fp32`, `*bf16`, `i32`, `fp32` …); arguments that
    are not named are i32. constants: values of the constexpr arguments. aligned: pointers and
    strides that are multiples of 16. matrix_unit: whether it must use one. targets: GPUs that
    it is for (none: for all).
    """

    kernel: Kernel
    case: str
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    matrix_unit: bool = True
    targets: tuple[str, ...] = ()


def _language(x: Any) -> Any:
    return tl, core, x


@contextmanager
def _interpreting() -> Iterator[None]:
    """Device functions, Triton's own (`tl.cdiv`, `tl.sum` ...) among them, run interpreted too.

    The interpreter would patch the language at every call of one, and not take it back.
    """
    scope = interpreter._patch_lang(_language)
    original = JITFunction.__call__
    JITFunction.__call__ = _call_interpreted  # type: ignore[method-assign]
    try:
        yield
    finally:
        JITFunction.__call__ = original  # type: ignore[method-assign]
        scope.restore()


def _call_interpreted(self: JITFunction[Any], *args: Any, **kwargs: Any) -> Any:
    return InterpretedFunction(self.fn).rewrite()(*args, **kwargs)


def _repair() -> None:
    """Mend the interpreter, once.

    It holds bf16 as uint16 bits: `tl.dot` multiplies the bits, and a conversion cuts them off.
    Multiply widened values, and round to the nearest, as a GPU does.
    """
    builder = interpreter.InterpreterBuilder
    original_dot, original_cast = builder.create_dot, builder.cast_impl
    if getattr(original_dot, "_patched", False):
        return

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return original_dot(self, a, b, *rest)

    def cast(self: Any, src: Any, dst_type: Any) -> Any:
        kinds = src.dtype.scalar, dst_type.scalar
        if kinds == (tl.bfloat16, tl.float32):
            wide = src.data.astype(np.uint32) << 16
            return interpreter.TensorHandle(wide.view(np.float32), tl.float32)
        if kinds == (tl.float32, tl.bfloat16):
            data = np.ascontiguousarray(src.data)
            bits = data.view(np.uint32)
            near = (bits + ((bits >> 16) & 1) + np.uint32(0x7FFF)) >> 16
            near = np.where(np.isnan(data), 0x7FC0, near).astype(np.uint16)
            return interpreter.TensorHandle(near, tl.bfloat16)
        return original_cast(self, src, dst_type)

    original_tensor = interpreter._patch_lang_tensor

    def patch_tensor(tensor: Any, scope: Any) -> None:
        original_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    create_dot._patched = True  # type: ignore[attr-defined]
    builder.create_dot, builder.cast_impl = create_dot, cast
    interpreter._patch_lang_tensor = patch_tensor  # triton 3.6 and numpy 2.4: bounds of a loop
