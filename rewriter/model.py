"""The model that comes out: a transformers model around the rewritten graph."""

from __future__ import annotations

import json
import shutil
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from rewriter import serialize
from rewriter.capture import model_output
from rewriter.configuration import RewriterConfig
from rewriter.errors import RewriterError
from rewriter.folders import whole_folder
from rewriter.graph import Graph, follow_device
from rewriter.state import State

WEIGHTS = "model.safetensors"


class RewrittenModel(PreTrainedModel, GenerationMixin):
    """A rewritten model: generates, trains, saves and loads like any other.

    Attributes:
        graph: the graph with its weights and states.
        plan, report, lock: what was asked, what was measured, what was done.
    """

    config_class = RewriterConfig
    base_model_prefix = ""
    _supports_cache_class = True
    main_input_name = "input_ids"

    def __init__(self, config: RewriterConfig, graph: Graph) -> None:
        super().__init__(config)
        self.graph = graph
        self.body = graph.module
        self.plan: Any = None
        self.report: dict[str, Any] = {}
        self.lock: dict[str, Any] = {}
        self.companions: list[Path] = []
        if "input_ids" not in graph.inputs and graph.inputs:
            self.main_input_name = graph.inputs[0]

    @property
    def stateful(self) -> bool:
        return bool(self.graph.states)

    def can_generate(self) -> bool:  # type: ignore[override]
        graph = self.__dict__.get("graph")  # asked for by the base class before it is set
        return graph is None or graph.decodes or "position_ids" in graph.inputs

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """`generate` makes no cache: forward makes a `State`."""
        return False

    def get_input_embeddings(self) -> nn.Module | None:  # type: ignore[override]
        return None

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Ties are one tensor in the graph already."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """`to`, `cuda`, `half` …: what the graph itself makes is made where its tensors are."""
        before = matrix_dtype(self)
        constants = {id(t) for t in self.buffers()}

        def apply(t: Tensor) -> Tensor:
            made = fn(t)
            kept = (t.dim() < 2 or id(t) in constants) and is_narrower(made, t)
            return t.to(made.device) if kept else made

        probe = torch.empty(0, dtype=before, device=self.device)
        after = fn(probe).dtype
        if after == before:
            made = super()._apply(apply, recurse)
        else:  # in new parameters: the original model may hold the same ones
            overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
            torch.__future__.set_overwrite_module_params_on_conversion(True)
            try:
                made = super()._apply(apply, recurse)
            finally:
                torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
            half = after.itemsize < 4
            self.config.autocast = str(after).removeprefix("torch.") if half else None
        self._follow_device()
        return made

    def _follow_device(self) -> bool:
        return follow_device(self.graph.module)

    # ---- forward -------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._autocast():
            return super().__call__(*args, **kwargs)

    def _autocast(self) -> AbstractContextManager[Any]:
        """For matrices narrower than what the graph was captured with; nothing otherwise."""
        if self.config.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, self.config.autocast))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **inputs: Tensor,
    ) -> Any:
        """Run the graph; the output class is that of the original's head.

        Args:
            input_ids: [B, L] new tokens. attention_mask: [B, past + L], 0 at padding.
            position_ids: [B, L]; without it, what the original does.
            past_key_values: the `State` of an earlier call.
            labels: [B, L] for a language model; -100 is ignored. Adds `loss`.

        Raises RewriterError for an input that the graph has not (`output_attentions`, say).
        """
        items = inputs.pop("num_items_in_batch", None)
        self._refuse(inputs)
        state = past_key_values if isinstance(past_key_values, State) else None
        if state is None and self.stateful and use_cache and not self.training:
            state = State(self.graph.states)
        given = dict(
            inputs, input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids
        )
        past = state.seen if state is not None else 0
        values = [self._input(name, given, past) for name in self.graph.inputs]
        states = state.mixers if state is not None else []
        outputs = dict(zip(self.graph.outputs, self.body(*values, *states), strict=True))
        if state is not None and input_ids is not None:
            state.seen += input_ids.shape[1]
        if not self.can_generate():
            return model_output(self.graph.output_class, outputs)
        loss = None
        if labels is not None:
            loss = mean_loss(outputs["logits"][:, :-1], labels[:, 1:], items)
        result = CausalLMOutputWithPast(loss=loss, logits=outputs["logits"], past_key_values=state)
        return result if return_dict in (None, True) else result.to_tuple()

    def _refuse(self, inputs: dict[str, Any]) -> None:
        harmless = {*self.graph.inputs, "cache_position"}
        for name, value in inputs.items():
            if name not in harmless and value is not None and value is not False:
                raise RewriterError(
                    f"{name} is no input of the rewritten model", f"its inputs: {self.graph.inputs}"
                )

    def _input(self, name: str, given: dict[str, Any], past: int) -> Tensor:
        value = given.get(name)
        if value is not None:
            return value
        tokens = given.get("input_ids")
        if tokens is None:
            raise RewriterError(f"the model needs {name}", f"its inputs: {self.graph.inputs}")
        batch, length = tokens.shape
        if name == "attention_mask":
            return torch.ones(batch, past + length, dtype=torch.long, device=tokens.device)
        if name == "token_type_ids":
            return torch.zeros_like(tokens)
        if name == "position_ids":
            mask = given.get("attention_mask")
            if self.graph.default_positions == "mask" and mask is not None:
                return (mask.long().cumsum(-1) - 1).clamp_min(0)[:, -length:]
            columns = torch.arange(past, past + length, device=tokens.device)
            return columns.expand(batch, length)
        raise RewriterError(f"the model needs {name}", f"its inputs: {self.graph.inputs}")

    # ---- generation ----------------------------------------------------------------------

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        known = self.graph.inputs  # forward names the usual ones only
        others = {k: v for k, v in model_kwargs.items() if k not in known}
        super()._validate_model_kwargs(others)  # type: ignore[misc]

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        state = past_key_values if isinstance(past_key_values, State) else None
        past = state.seen if state is not None else 0
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        positions = attention_mask.long().cumsum(-1) - 1
        positions = positions.masked_fill(attention_mask == 0, 1)
        others = {n: kwargs[n] for n in self.graph.inputs if n in kwargs}  # an image, say
        return others | {
            "input_ids": input_ids[:, past:],
            "attention_mask": attention_mask,
            "position_ids": positions[:, past : input_ids.shape[1]],
            "past_key_values": state,
            "use_cache": use_cache,
        }

    def to_triton(self, **options: Any) -> Any:
        """This model on Triton kernels, in memory; see `rewriter.backends.triton.to_triton`."""
        from rewriter.export import convert

        return convert(self, "triton", **options)

    # ---- saving --------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """Write config, weights, graph, plan, lock and report: whole or not at all."""
        with whole_folder(save_directory) as folder:
            self._write(folder)

    def _write(self, folder: Path) -> None:
        self.config.architectures = [type(self).__name__]
        self.config.dtype = self.dtype
        self.config.save_pretrained(folder)
        if self.can_generate():
            self.generation_config.save_pretrained(folder)
        tensors = {n: t.detach().contiguous() for n, t in self.graph.parameters()}
        save_file(tensors, str(folder / WEIGHTS), metadata={"format": "pt"})
        trained = {n: t for n, t in self.graph.parameters() if isinstance(t, nn.Parameter)}
        frozen = [n for n, t in trained.items() if not t.requires_grad]
        data = serialize.dump(self.graph) | {"parameters": list(trained), "frozen": frozen}
        (folder / "graph.json").write_text(json.dumps(data))
        if self.plan is not None:
            (folder / "plan.yaml").write_text(self.plan.to_yaml())
        if self.report:
            from rewriter.report import write_report

            write_report(self.report, folder)
        for path in self.companions:
            shutil.copy(path, folder / path.name)
        from rewriter.inspection import hash_files

        self.lock = {**self.lock, "files": hash_files(folder)}
        (folder / "lock.json").write_text(json.dumps(self.lock, indent=2))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        return load(
            pretrained_model_name_or_path,
            dtype=kwargs.get("dtype") or kwargs.get("torch_dtype"),
            device=kwargs.get("device_map"),
        )


def matrix_dtype(module: nn.Module) -> torch.dtype:
    """Type of the first matrix; float32 without one."""
    found = (p.dtype for p in module.parameters() if p.is_floating_point() and p.dim() > 1)
    return next(found, torch.float32)


def is_narrower(new: Tensor, old: Tensor) -> bool:
    both = new.is_floating_point() and old.is_floating_point()
    return both and new.element_size() < old.element_size() and new.element_size() < 4


def mean_loss(logits: Tensor, labels: Tensor, items: Any = None) -> Tensor:
    """Cross entropy of logits [B, L, V] and labels [B, L], a mean over those that are not -100.

    items: divide by this number instead (the tokens of all accumulated batches).
    """
    how = "mean" if items is None else "sum"
    labels = labels.to(logits.device).flatten()
    loss = cross_entropy(logits.flatten(0, 1).float(), labels, reduction=how)
    return loss if items is None else loss / items


def load(folder: str | Path, dtype: Any = None, device: Any = None) -> RewrittenModel:
    """Load a saved folder; nothing is traced.

    dtype: of its matrices; vectors (norms, biases, decays) and constants never become narrower
    than they were saved, and what is computed between the matrices stays in their type.

    Raises RewriterError: a file is missing or damaged, or an operator has changed.
    """
    folder = Path(folder)
    if not (folder / "graph.json").is_file():
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            try:
                folder = Path(snapshot_download(str(folder)))
            except Exception as error:
                raise RewriterError(f"no such folder or Hub id: {folder}") from error
        if not (folder / "graph.json").is_file():
            raise RewriterError(
                f"{folder} has no graph.json", "give a folder that rewriter has written"
            )
    try:
        data = json.loads((folder / "graph.json").read_text())
        tensors: dict[str, Any] = load_file(
            str(folder / WEIGHTS),
            device=str(device) if isinstance(device, str) and device != "auto" else "cpu",
        )
        config = RewriterConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise RewriterError(f"{folder} is damaged: {error}", "write it again") from error
    except Exception as error:  # safetensors has its own exception type
        raise RewriterError(f"{folder / WEIGHTS} is damaged: {error}", "write it again") from error
    for name in data["parameters"]:
        if name in tensors:
            tensors[name] = nn.Parameter(tensors[name], name not in data["frozen"])
    graph = serialize.load(data, tensors)
    from rewriter.seq2seq import build

    model = build(config, graph).eval()
    if dtype not in (None, "auto"):
        model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    model._follow_device()
    for name in ("lock", "report"):
        if (folder / f"{name}.json").exists():
            setattr(model, name, json.loads((folder / f"{name}.json").read_text()))
    if (folder / "plan.yaml").exists():
        from rewriter.plan import Plan

        model.plan = Plan.from_yaml(folder / "plan.yaml")
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.companions = companions(folder)
    return model


def companions(folder: str | Path | None) -> list[Path]:
    """Tokenizer and processor files that travel with a model."""
    if folder is None or not Path(folder).is_dir():
        return []
    wanted = (
        "tokenizer",
        "vocab",
        "merges",
        "special_tokens",
        "added_tokens",
        "chat_template",
        "preprocessor",
        "processor",
        "spiece",
        "sentencepiece",
    )
    return [p for p in sorted(Path(folder).iterdir()) if p.is_file() and p.name.startswith(wanted)]


for _auto in (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
):
    _auto.register(RewriterConfig, RewrittenModel)
__all__ = ["RewriterConfig", "RewrittenModel", "companions", "load", "mean_loss"]
