"""Small example inputs for a transformers model, from its config and its signature."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rewriter.errors import CaptureError

BATCH, LENGTH = 2, 12
PREFIX = 4  # tokens before the image


def generates(model: PreTrainedModel) -> bool:
    """A decoder-only model that generates text and so gets state."""
    return model.can_generate() and not model.config.is_encoder_decoder


def example_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Small inputs for a model, by the names of its forward; the mask is padded."""
    config, names = model.config, inspect.signature(model.forward).parameters
    device = model.device
    text = config.get_text_config(decoder=True) if config.is_encoder_decoder else config
    text = getattr(text, "text_config", None) or text
    vocabulary = min(getattr(text, "vocab_size", None) or 16, 200)
    generator = torch.Generator().manual_seed(0)
    found = (getattr(text, "pad_token_id", None) or 0, image_token(model))
    special = {token for token in found if token is not None}
    usual = next(t for t in range(2, vocabulary) if t not in special)

    def tokens(length: int = LENGTH) -> Tensor:
        ids = torch.randint(3, max(vocabulary, 5), (BATCH, length), generator=generator)
        for token in special:
            ids = ids.masked_fill(ids == token, usual)
        return ids.to(device)

    inputs: dict[str, Tensor] = {}
    if "pixel_values" in names:
        vision = getattr(config, "vision_config", None) or config
        size = vision.image_size
        height, width = (size, size) if isinstance(size, int) else size
        channels = getattr(vision, "num_channels", 3)
        shape = (BATCH, channels, height, width)
        inputs["pixel_values"] = torch.randn(shape, generator=generator).to(device)
    if "input_features" in names:  # audio: [B, mel bins, frames], two frames a position
        if not hasattr(config, "num_mel_bins"):
            raise CaptureError(f"{type(model).__name__} takes audio of an unknown layout")
        frames = 2 * config.max_source_positions
        audio = (BATCH, config.num_mel_bins, frames)
        inputs["input_features"] = torch.randn(audio, generator=generator).to(device)
    if "input_ids" in names and "input_features" not in inputs:
        inputs["input_ids"] = tokens()
        mask = torch.ones_like(inputs["input_ids"])
        mask[0, : LENGTH // 3] = 0
        inputs["attention_mask"] = mask
    if "decoder_input_ids" in names:
        inputs["decoder_input_ids"] = tokens(LENGTH - 3)
    if "decoder_attention_mask" in names and "decoder_input_ids" in inputs:
        mask = torch.ones_like(inputs["decoder_input_ids"])
        mask[0, :2] = 0
        inputs["decoder_attention_mask"] = mask
        if "decoder_position_ids" in names:
            inputs["decoder_position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    token = image_token(model)
    if token is not None and "pixel_values" in inputs:
        _place_images(model, inputs, token)
    if generates(model) and "position_ids" in names:
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    elif "token_type_ids" in names and getattr(config, "type_vocab_size", None):
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    if not inputs:
        raise CaptureError(f"no input of {type(model).__name__} is known", "pass an nn.Module")
    return inputs


def image_token(model: PreTrainedModel) -> int | None:
    """The token that stands for one piece of an image, of a model that has one."""
    for name in ("image_token_id", "image_token_index"):
        if (token := getattr(model.config, name, None)) is not None:
            return int(token)
    return None


def _place_images(model: Any, inputs: dict[str, Tensor], token: int) -> None:
    """Put one image into each row: as many image tokens as the model makes of it."""
    count = None
    for pixels in (inputs["pixel_values"], inputs["pixel_values"][:, None]):  # [B, images, ..]
        try:
            with torch.no_grad():
                features = model.get_image_features(pixels, return_dict=True).pooler_output
        except (ValueError, RuntimeError):  # of the other rank
            continue
        inputs["pixel_values"] = pixels
        count = sum(f.shape[:-1].numel() for f in features) // BATCH
        break
    if count is None:
        raise CaptureError(f"{type(model).__name__} takes images of an unknown layout")
    for name, value in (("input_ids", token), ("attention_mask", 1)):
        images = torch.full((BATCH, count), value, device=model.device)
        before, after = inputs[name].split([PREFIX, LENGTH - PREFIX], 1)
        inputs[name] = torch.cat([before, images, after], 1)
