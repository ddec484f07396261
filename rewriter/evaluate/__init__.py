"""How good a model is, measured beside its original: losses, retrieval, agreement.

    perplexity(model, tokens)                       # [N, T] windows
    excess_by_block(model, original, tokens)        # nats per token, by position
    passkey(model, tokenizer, 430, prompts=20)      # fraction of keys found

Works on any transformers causal language model and on any `RewrittenModel`.
"""

from rewriter.evaluate.passkey import passkey, passkey_examples
from rewriter.evaluate.perplexity import (
    Divergence,
    by_block,
    compare,
    excess_by_block,
    perplexity,
    token_nll,
)
from rewriter.evaluate.prompts import Example, Score, score
from rewriter.evaluate.readout import Readout, read
from rewriter.evaluate.suite import SUITES, TASKS, Evaluation, Row, Suite, evaluate
from rewriter.evaluate.task import Source, Task
from rewriter.evaluate.text import held_out_texts, split, windows

__all__ = [
    "SUITES",
    "TASKS",
    "Divergence",
    "Evaluation",
    "Example",
    "Readout",
    "Row",
    "Score",
    "Source",
    "Suite",
    "Task",
    "by_block",
    "compare",
    "evaluate",
    "excess_by_block",
    "held_out_texts",
    "passkey",
    "passkey_examples",
    "perplexity",
    "read",
    "score",
    "split",
    "token_nll",
    "windows",
]
