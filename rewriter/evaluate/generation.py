"""Generation agreement: how long greedy generation goes the original's way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewriter.evaluate.readout import device, evaluating


@torch.no_grad()
def generate(model: Any, prompt: Tensor, new: int) -> Tensor:
    """`new` greedy tokens after a prompt [T], through the model's cache; an end is no stop."""
    tokens = prompt[None].to(device(model))
    with evaluating(model):
        made = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            num_beams=1,
            pad_token_id=0,
        )
    return made[0, len(prompt) :].cpu()


def agreement(theirs: Tensor, ours: Tensor) -> int:
    """Tokens before the first difference."""
    different = (theirs != ours).nonzero()
    return int(different[0]) if len(different) else len(theirs)
