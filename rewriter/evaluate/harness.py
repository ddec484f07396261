"""lm_eval (EleutherAI's evaluation harness) on a saved rewritten model.

    python -m rewriter.evaluate.harness run --model rewriter \\
        --model_args pretrained=OUT --tasks TASK --include_path FOLDER

takes lm_eval's own command line, which knows the model type `rewriter` then; or, in Python,

    from rewriter.evaluate.harness import RewriterLM
    lm_eval.simple_evaluate(RewriterLM(pretrained="OUT", batch_size=4), tasks=[...])

Needs `pip install rewriter[evaluate]`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rewriter.errors import RewriterError

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise RewriterError(
        f"lm_eval cannot be imported: {error}", "pip install 'rewriter[evaluate]'"
    ) from error


@register_model("rewriter")
class RewriterLM(HFLM):
    """A rewritten folder as a model of lm_eval: log-likelihoods and generation.

    Args:
        pretrained: folder or Hub id of the rewritten model, with its tokenizer in it.
        device, dtype: where to and as what it is loaded; by default the CPU, as saved. The
            command line asks for `cuda` by itself, which is the CPU where there is no GPU.
        tokenizer: another one, as lm_eval takes it.

    Other arguments are those of lm_eval's `HFLM`: batch_size, max_length, add_bos_token, ...
    """

    def __init__(
        self,
        pretrained: str | Path,
        device: str | None = None,
        dtype: Any = None,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> None:
        import torch

        from rewriter import load

        if device and device.startswith("cuda") and not torch.cuda.is_available():
            device = None
        if isinstance(dtype, str) and dtype != "auto":
            dtype = getattr(torch, dtype)
        model = load(pretrained, dtype=dtype, device=device)
        if not model.can_generate():
            raise RewriterError(
                f"{pretrained} is no causal language model", "lm_eval needs one to score text"
            )
        kwargs.setdefault("backend", "causal")
        super().__init__(pretrained=model, tokenizer=tokenizer or str(pretrained), **kwargs)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
