"""The one exception type a user sees: what is wrong, and what to do about it."""

from __future__ import annotations


class RewriterError(Exception):
    """A mistake in the input, with its cause and the fix in one message.

    The command line prints it without a traceback and exits with `exit_code`.
    """

    exit_code = 2

    def __init__(self, cause: str, fix: str = "") -> None:
        super().__init__(f"{cause}\n  fix: {fix}" if fix else cause)
        self.cause, self.fix = cause, fix


class PlanError(RewriterError):
    """The plan is not valid, or names something that the model does not have."""


class CaptureError(RewriterError):
    """The model cannot be captured as one graph."""


class GateError(RewriterError):
    """A rewrite is numerically wrong; nothing was saved."""

    exit_code = 3


class VerifyError(RewriterError):
    """The graph breaks an invariant after a pass: a bug in the pass."""

    exit_code = 4
