"""Recovery: the training that makes a lossy rewrite a good model again.

What trains is imported when a function is called: a plan that names stages loads none of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rewriter.model import RewrittenModel
    from rewriter.recover.layers import Scan

__all__ = ["recover", "scan"]


def recover(
    model: RewrittenModel | str | Path,
    original: PreTrainedModel | str | Path | None = None,
    stages: list[Any] | None = None,
    data: Any = None,
    **options: Any,
) -> RewrittenModel:
    """Train a rewritten model against its original; `rewriter.recover.run.recover` says how.

    options: tokens or minutes (one of them), seed, work, resume, precision …
    """
    from rewriter.recover.run import recover as run

    return run(model, original, stages, data, **options)


def scan(model: PreTrainedModel | str | Path, name: str, data: Any = None, **options: Any) -> Scan:
    """Cost of replacing each layer by the pass `name`; see `rewriter.recover.layers.scan`."""
    from rewriter.recover.layers import scan as run

    return run(model, name, data, **options)
