"""A rewritten model whose ops run their Triton kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from rewriter.backends.triton import decode, forms
from rewriter.graph import Graph
from rewriter.model import RewrittenModel
from rewriter.state import State


class TritonModel(RewrittenModel):
    """Like the model that it was made of; shares its weights.

    On a GPU what lies between our kernels (norms, rotary, residuals, gates, activations) is
    fused by Inductor, and decoding one token is a CUDA graph. On a CPU the kernels are
    interpreted: right, and thousands of times slower.
    """

    def __init__(self, config: Any, graph: Graph) -> None:
        super().__init__(config, graph)
        self.body: Any = _Body(graph)
        #: Whether decoding uses fixed buffers: on a GPU, where the graph allows it.
        self.fixed_decode: bool | None = None
        self._may_fix = decode.can_be_fixed(graph)

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """See `RewrittenModel.forward`."""
        state, tokens = kwargs.get("past_key_values"), kwargs.get("input_ids")
        if isinstance(state, State) and isinstance(tokens, Tensor):
            wanted = tokens.is_cuda if self.fixed_decode is None else self.fixed_decode
            plain = not torch.is_grad_enabled() and not self.training
            if wanted and plain and self._may_fix and tokens.shape[1] == 1 and state.seen:
                decode.fix(state, self.graph.inputs, self.body.run)
            else:
                decode.thaw(state)
        return super().forward(*args, **kwargs)


class _Body(nn.Module):
    """The graph, interpreted on a CPU and compiled on a GPU; or the step of a decoder."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.module: GraphModule = graph.module
        self.inputs = graph.inputs
        self._compiled: Any = None
        self._device: torch.device | None = None

    def forward(self, *values: Any) -> Any:
        decoder = getattr(values[-1], "decoder", None)
        if decoder is not None:
            return decoder.step(dict(zip(self.inputs, values, strict=False)))
        return self.run(*values)

    def run(self, *values: Any) -> Any:
        device = next(v.device for v in values if isinstance(v, Tensor))
        if device.type != "cuda":
            return forms.Interpreted(self.module).run(*values)
        if self._compiled is None or device != self._device:
            self._compiled = torch.compile(self.module, dynamic=True)
            self._device = device
        return self._compiled(*values)
