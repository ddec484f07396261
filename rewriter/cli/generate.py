"""`rewriter generate`: go on from a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rewriter.cli.shared import check_folder, command, quiet_stdout
from rewriter.errors import RewriterError


@command()
def generate(
    output: Annotated[Path, typer.Argument(help="Folder that 'apply' made.")],
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add at most.")] = 64,
) -> None:
    """Go on from a prompt with a rewritten model, greedily."""
    check_folder(output)
    if not prompt.strip():
        raise RewriterError("the prompt is empty", "give some text")
    with quiet_stdout(True):
        import torch
        from transformers import AutoTokenizer

        from rewriter import load

        model: Any = load(output)
        tokenizer = AutoTokenizer.from_pretrained(output)
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            tokens = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=max_new_tokens,
                do_sample=False,
            )
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))
