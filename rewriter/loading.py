"""A Hub id, a local folder or a GGUF file to a transformers model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from rewriter.errors import CaptureError

AUTO = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModel")


def load_model(
    source: str | Path,
    *,
    meta: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    dtype: Any = "auto",
) -> PreTrainedModel:
    """Load the original with its own head class, from safetensors or GGUF.

    Args:
        source: Hub id, local folder or `.gguf` file.
        meta: build the model on the meta device without reading weights.
        allow_pickle: also read `.bin` checkpoints, which can execute code.
        trust_remote_code: run code that comes with the model.

    Raises:
        CaptureError: nothing there, no readable weights, or an unknown architecture.
    """
    path = Path(source)
    if path.suffix == ".gguf":
        return _load_gguf(path)
    looks_local = path.exists() or str(source).startswith((".", "/", "~"))
    if looks_local:
        if not path.is_dir():
            raise CaptureError(
                f"no such folder: {source}", "give a folder, a .gguf file or a Hub id"
            )
        if not (path / "config.json").exists():
            raise CaptureError(f"{source} has no config.json", "give the folder of a saved model")
        safe = any(path.glob("*.safetensors"))
        pickles = sorted(p.name for p in [*path.glob("*.bin"), *path.glob("*.pt")])
        if not safe and not meta:
            if pickles and not allow_pickle:
                raise CaptureError(
                    f"{source} has only pickled weights ({pickles[0]}), which can execute code",
                    "convert them to safetensors, or pass allow_pickle",
                )
            if not pickles:
                raise CaptureError(f"{source} has no weights", "expected *.safetensors")
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise CaptureError(f"cannot read the configuration of {source}: {_line(error)}") from error
    cls = _model_class(config)
    try:
        if meta:
            with torch.device("meta"):
                return cls._from_config(config)
        return cls.from_pretrained(
            source,
            dtype=dtype,
            use_safetensors=None if allow_pickle else True,
            trust_remote_code=trust_remote_code,
        ).eval()
    except Exception as error:
        raise CaptureError(
            f"cannot load the weights of {source}: {_line(error)}",
            "check that the files are complete",
        ) from error


def _model_class(config: Any) -> Any:
    for name in config.architectures or []:
        if hasattr(transformers, name):
            return getattr(transformers, name)
    for auto in AUTO:
        mapping = getattr(transformers, auto)._model_mapping
        if type(config) in mapping:
            return mapping[type(config)]
    raise CaptureError(f"transformers has no model for '{config.model_type}'")


def _load_gguf(path: Path) -> PreTrainedModel:
    if not path.is_file():
        raise CaptureError(f"no such file: {path}")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CaptureError(f"{path} is not a GGUF file", "check that the download is complete")
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        ).eval()
    except Exception as error:
        raise CaptureError(f"cannot read {path}: {_line(error)}") from error
    # The weights are plain fp32 now; the marker would refuse to save them.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    return model


def _line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
