"""The rewritten encoder-decoder: encoded once, decoded token by token."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import BaseModelOutput

from rewriter.capture import model_output
from rewriter.configuration import RewriterConfig
from rewriter.encoder_decoder import HIDDEN, Part, hidden_states, split
from rewriter.errors import RewriterError
from rewriter.graph import Graph, argument, aten
from rewriter.model import RewrittenModel, mean_loss
from rewriter.state import State


def build(config: RewriterConfig, graph: Graph) -> RewrittenModel:
    """The model of the class that suits the graph."""
    if hidden_states(graph) is None or "decoder_input_ids" not in graph.inputs:
        return RewrittenModel(config, graph)
    own = _own_generation(graph.model_class)
    if own is None:
        return RewrittenSeq2Seq(config, graph)
    kind = type("RewrittenSeq2Seq", (own, RewrittenSeq2Seq), {"prompts_itself": True})
    return kind(config, graph)


def _own_generation(name: str) -> type | None:
    """The class that gives the original a `generate` of its own (Whisper), where one does."""
    original = getattr(transformers, name, None)
    for parent in original.__mro__ if original is not None else ():
        if "generate" in vars(parent):
            mixin = parent is not GenerationMixin and not issubclass(parent, nn.Module)
            return parent if mixin else None
    return None


class Encoder(nn.Module):
    """The encoder alone, as transformers' generation calls it."""

    def __init__(self, model: RewrittenSeq2Seq) -> None:
        super().__init__()
        self.body, self._model = model.body, (model,)  # in a tuple: not a submodule

    def forward(self, **kwargs: Any) -> BaseModelOutput:  # generate() looks for this very name
        """The encoder's inputs, by their names, to its last hidden states [B, S, D]."""
        return BaseModelOutput(last_hidden_state=self._model[0].encode(kwargs))


class RewrittenSeq2Seq(RewrittenModel):
    """An encoder-decoder. Its graph is whole; `parts` are what runs when a state is carried.

    prompts_itself: a `generate` of its own gives whole prompts, start token included.
    """

    prompts_itself = False

    def __init__(self, config: RewriterConfig, graph: Graph) -> None:
        super().__init__(config, graph)
        self.parts = split(graph)
        self.main_input_name = self.parts.encoder.inputs[0]
        for node in graph.nodes:  # Whisper's `generate` counts frames by them
            if node.target in (aten.conv1d.default, aten.conv1d.padding):
                owner = str(argument(node, "weight").target).rpartition(".")[0]
                stride = tuple(argument(node, "stride"))
                setattr(self.body.get_submodule(owner), "stride", stride)  # noqa: B010

    def _follow_device(self) -> bool:
        changed = super()._follow_device()
        if changed:
            self.parts = split(self.graph)
        return changed

    def can_generate(self) -> bool:  # type: ignore[override]
        graph = self.__dict__.get("graph")
        return graph is None or graph.output_class.endswith("Seq2SeqLMOutput")

    @property
    def model(self) -> nn.Module:
        """The modules under `model.`, which hold the weights."""
        return self.body.get_submodule("model")

    def get_encoder(self, *args: Any, **kwargs: Any) -> Encoder:
        return Encoder(self)

    def _prepare_decoder_input_ids_for_generation(self, **kwargs: Any) -> Any:  # type: ignore[override]
        given = kwargs["model_kwargs"]
        if self.prompts_itself and given.get("decoder_input_ids") is not None:
            return given.pop("decoder_input_ids"), given
        return super()._prepare_decoder_input_ids_for_generation(**kwargs)  # type: ignore[misc]

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **inputs: Any,
    ) -> Any:
        """Run the graph; the output class is that of the original's head.

        Args:
            input_ids: [B, S], or the model's other main input by its name (`input_features`).
            attention_mask: [B, S], 0 at padding. decoder_input_ids: [B, L] new tokens; without
            them `labels`, shifted. decoder_attention_mask: [B, past + L].
            encoder_outputs: hidden states [B, S, D] first; the encoder does not run then.
            past_key_values: the `State` of an earlier call.
            labels: [B, L], what the decoder should say; -100 is ignored. Adds `loss`.
        """
        items = inputs.pop("num_items_in_batch", None)
        self._refuse(inputs)
        state = past_key_values if isinstance(past_key_values, State) else None
        if state is None and self.stateful and use_cache and not self.training:
            state = State(self.graph.states)
        if decoder_input_ids is None and labels is not None:
            decoder_input_ids = self._shifted(labels)
        given = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
        own = {
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
            **inputs,
        }
        if state is None and encoder_outputs is None:
            values = self._encoder_values(given) | self._decoder_values(own, 0)
            results = self.body(*(values[name] for name in self.graph.inputs))
            outputs = dict(zip(self.graph.outputs, results, strict=True))
        else:
            hidden = None if encoder_outputs is None else encoder_outputs[0]
            outputs = self._decode(state, given, own, hidden)
        extra: dict[str, Any] = {}
        if labels is not None:
            if "logits" not in outputs:
                raise RewriterError("this model has no head, so no loss", "leave out `labels`")
            extra["loss"] = mean_loss(outputs["logits"], labels, items)
        if state is not None:
            extra["past_key_values"] = state
        result = model_output(self.graph.output_class, extra | outputs)
        return result if return_dict in (None, True) else result.to_tuple()  # type: ignore[union-attr]

    def encode(self, given: dict[str, Any]) -> Tensor:
        """The encoder's inputs, by their names, to its last hidden states [B, S, D]."""
        with self._autocast():  # generation calls it by itself
            return self._run(self.parts.encoder, self._encoder_values(given))[0]

    def _decode(
        self, state: State | None, given: dict[str, Any], own: dict[str, Any], hidden: Any
    ) -> dict[str, Any]:
        """Memory (kept in the state) and decoder; `hidden` is what the caller has of it."""
        memory = state.memory if state is not None else None
        if memory is None:
            hidden = self.encode(given) if hidden is None else hidden
            values = self._encoder_values(given, hidden) | {self.parts.memory.inputs[0]: hidden}
            memory = list(self._run(self.parts.memory, values))
        values = self._decoder_values(own, state.seen if state is not None else 0)
        results = self.parts.decoder.run(
            self.body, *values.values(), *memory, *(state.mixers if state is not None else ())
        )
        if state is not None:
            state.memory = memory
            state.seen += values["decoder_input_ids"].shape[1]
        outputs = dict(zip((n for n in self.graph.outputs if n != HIDDEN), results, strict=True))
        return outputs | ({} if hidden is None else {HIDDEN: hidden})

    def _run(self, part: Part, values: dict[str, Any]) -> tuple[Any, ...]:
        return part.run(self.body, *(values.get(name) for name in part.inputs))

    def _encoder_values(self, given: dict[str, Any], hidden: Any = None) -> dict[str, Any]:
        """The encoder's inputs; with its result at hand only those that are given, and the mask."""
        names = self.parts.encoder.inputs
        if hidden is None:
            return {n: self._input(n, given, 0) for n in names}
        values = {n: given.get(n) for n in names}
        if "attention_mask" in names and values["attention_mask"] is None:
            shape, device = hidden.shape[:2], hidden.device
            values["attention_mask"] = torch.ones(shape, dtype=torch.long, device=device)
        return values

    def _decoder_values(self, own: dict[str, Any], past: int) -> dict[str, Any]:
        if own.get("decoder_input_ids") is None:
            raise RewriterError(
                "the model needs decoder_input_ids", "give them or `labels`, or call generate()"
            )
        names = [n for n in self.graph.inputs if n not in self.parts.encoder.inputs]
        short = {k.removeprefix("decoder_"): v for k, v in own.items() if k.startswith("decoder_")}
        return {n: self._input(n.removeprefix("decoder_"), short, past) for n in names}

    def _shifted(self, labels: Tensor) -> Tensor:
        """Labels one to the right, behind the start token; what is ignored becomes padding."""
        start = self.config.decoder_start_token_id
        if start is None:
            start = self.generation_config.decoder_start_token_id
        pad = self.config.pad_token_id
        shifted = labels.new_full(labels.shape, start)
        shifted[:, 1:] = labels[:, :-1]
        return shifted.masked_fill(shifted == -100, start if pad is None else pad)

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        state = past_key_values if isinstance(past_key_values, State) else None
        past = state.seen if state is not None else 0
        made = {
            "decoder_input_ids": input_ids[:, past:],
            "decoder_attention_mask": decoder_attention_mask,
            "attention_mask": attention_mask,
            "encoder_outputs": encoder_outputs,
            "past_key_values": state,
            "use_cache": use_cache,
        }
        if decoder_attention_mask is not None and "decoder_position_ids" in self.graph.inputs:
            positions = (decoder_attention_mask.long().cumsum(-1) - 1).clamp_min(0)
            made["decoder_position_ids"] = positions[:, past : input_ids.shape[1]]
        return made


__all__ = ["RewrittenSeq2Seq", "build"]
