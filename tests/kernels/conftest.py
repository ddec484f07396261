"""The kernel tests are the same on a CPU and on a GPU.

Without a GPU a launch on CPU tensors is interpreted. With one, the same launch is compiled and
runs there: its tensors are copied over and back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from rewriter.kernels.kernel import Kernel


@pytest.fixture(autouse=True)
def real_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        monkeypatch.setattr(Kernel, "run", elsewhere("cuda", JITFunction.run))


@pytest.fixture
def launch_elsewhere() -> Callable[..., Any]:
    return elsewhere


def elsewhere(device: str, launch: Callable[..., Any]) -> Callable[..., Any]:
    """`Kernel.run` that copies every tensor's storage to `device`, launches, and copies back."""

    def run(self: Kernel, *args: Any, **kwargs: Any) -> Any:
        there: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

        def move(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.is_cuda:
                return value
            storage = value.untyped_storage()  # whole, so that views of one stay views of one
            if storage.data_ptr() not in there:
                copied = torch.empty(storage.nbytes(), dtype=torch.uint8, device=device)
                copied.untyped_storage().copy_(storage)
                there[storage.data_ptr()] = (storage, copied.untyped_storage())
            moved = torch.empty(0, dtype=value.dtype, device=device)
            copied = there[storage.data_ptr()][1]
            return moved.set_(copied, value.storage_offset(), value.shape, value.stride())

        with torch.no_grad():
            made = launch(self, *map(move, args), **{k: move(v) for k, v in kwargs.items()})
            for storage, copied in there.values():
                storage.copy_(copied)
        return made

    return run


@pytest.fixture
def poison() -> Iterator[None]:
    """`torch.empty` is NaN: a kernel that does not write all of its output shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(before)
