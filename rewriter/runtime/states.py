"""The states of one batch, in buffers of ONNX Runtime that never leave its device."""

from __future__ import annotations

from typing import Any

import numpy as np

#: Least number of columns by which a cache grows.
ROOM = 64


class States:
    """Binds every state of a session to an input and an output.

    A state that its operator extends or overwrites in place is one buffer, with room if it grows,
    bound on both sides. Any other state of fixed size has two buffers that change sides after
    each call; one that a call lengthens by concatenation is allocated by ONNX Runtime and handed
    on.

    Args:
        binding: the IO binding of a session. specs: the `states` of export.json.
        batch: rows. device: "cpu" or "cuda".
    """

    def __init__(self, binding: Any, specs: list[dict[str, Any]], batch: int, device: str) -> None:
        self.binding, self.device, self.batch = binding, device, batch
        self.bound: list[str] = []  # outputs, in the order in which the binding returns them
        self.capacity = 0  # columns of the caches that grow in place
        self.used = 0
        self.shared = [s for s in specs if s["shared"]]
        self.grown = [s for s in specs if not s["shared"] and s["grows"] is not None]
        self.swapped = [s for s in specs if not s["shared"] and s["grows"] is None]
        self.values: dict[str, Any] = {}
        self.spare: dict[str, Any] = {}
        for spec in specs:
            self.values[spec["input"]] = self._buffer(spec, 0)
            binding.bind_ortvalue_input(spec["input"], self.values[spec["input"]])
        for spec in self.shared:
            if spec["grows"] is None:
                self.bind(spec["output"], self.values[spec["input"]])
        for spec in self.swapped:
            self.spare[spec["input"]] = self._buffer(spec, 0)

    def _buffer(self, spec: dict[str, Any], columns: int) -> Any:
        import onnxruntime

        shape = [self.batch, *spec["shape"]]
        if spec["grows"] is not None:
            shape[spec["grows"]] = columns
        zeros = np.zeros(shape, dtype=spec["dtype"])
        return onnxruntime.OrtValue.ortvalue_from_numpy(zeros, self.device, 0)

    def bind(self, output: str, value: Any = None, device: str | None = None) -> None:
        """To a buffer, or to one that ONNX Runtime allocates on a device (ours by default)."""
        if output not in self.bound:
            self.bound.append(output)
        if value is None:
            self.binding.bind_output(output, device or self.device)
        else:
            self.binding.bind_ortvalue_output(output, value)

    def outputs(self) -> dict[str, Any]:
        """What the last call made, by name."""
        return dict(zip(self.bound, self.binding.get_outputs(), strict=True))

    def prepare(self, total: int, expected: int) -> None:
        """Before a call after which there are `total` columns, of `expected` in the end."""
        growing = [s for s in self.shared if s["grows"] is not None]
        if growing and total > self.capacity:
            columns = max(total, expected, self.capacity + max(ROOM, self.capacity // 2))
            for spec in growing:
                new = self._grow(spec, columns)
                self.values[spec["input"]] = new
                self.binding.bind_ortvalue_input(spec["input"], new)
                self.bind(spec["output"], new)
            self.capacity = columns
        self.used = total
        for spec in self.grown:
            self.bind(spec["output"])
        for spec in self.swapped:
            self.bind(spec["output"], self.spare[spec["input"]])

    def _grow(self, spec: dict[str, Any], columns: int) -> Any:
        import onnxruntime

        if not self.used:
            return self._buffer(spec, columns)
        old = self.values[spec["input"]].numpy()
        shape = list(old.shape)
        shape[spec["grows"]] = columns
        new = np.zeros(shape, dtype=old.dtype)
        kept = [slice(None)] * old.ndim
        kept[spec["grows"]] = slice(self.used)
        new[tuple(kept)] = old[tuple(kept)]
        return onnxruntime.OrtValue.ortvalue_from_numpy(new, self.device, 0)

    def advance(self) -> None:
        """After a call: what came out goes in next."""
        made = self.outputs() if self.grown else {}
        for spec in self.grown:
            self.values[spec["input"]] = made[spec["output"]]
        for spec in self.swapped:
            name = spec["input"]
            self.values[name], self.spare[name] = self.spare[name], self.values[name]
        for spec in (*self.grown, *self.swapped):
            self.binding.bind_ortvalue_input(spec["input"], self.values[spec["input"]])

    def bytes(self) -> int:
        """Of all buffers."""
        held = [*self.values.values(), *self.spare.values()]
        return sum(v.tensor_size_in_bytes() for v in held)
