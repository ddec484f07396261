"""The kernel tests are the same on a CPU and on a GPU.

Without a GPU a launch on CPU tensors is interpreted. With one, the same launch is compiled and
runs there: its tensors are copied over and back.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from rewriter.kernels.autograd import TRITON
from rewriter.kernels.kernel import Kernel


@pytest.fixture(autouse=True)
def real_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        monkeypatch.setattr(Kernel, "run", elsewhere("cuda", JITFunction.run))


@pytest.fixture(autouse=True)
def results_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A form's results share memory with no argument and not with each other: torch refuses
    that of an operator, but our tests call the forms themselves."""
    for name in dict.fromkeys(TRITON.values()):
        module = importlib.import_module(name)
        for form in ("forward", "forward_with_lse", "gradients"):
            if hasattr(module, form):
                monkeypatch.setattr(module, form, apart(getattr(module, form)))


def apart(form: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(form)
    def run(*args: Any, **kwargs: Any) -> Any:
        made = form(*args, **kwargs)
        results = made if isinstance(made, tuple) else (made,)
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        places = {t.untyped_storage().data_ptr() for t in tensors if t.numel()}
        for index, result in enumerate(results):
            if isinstance(result, Tensor):
                place = result.untyped_storage().data_ptr()
                if result.numel() and not result.is_meta:
                    assert place not in places, (
                        f"result {index} of {form.__module__} is not its own"
                    )
                    places.add(place)
                assert not any(result is r for r in results[:index]), (
                    f"result {index} is there twice"
                )
        return made

    return run


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
