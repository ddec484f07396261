"""The stages of a recovery as a plan declares them. Data only: nothing heavy is imported."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Logits = Literal["kl", "rkl", "jsd", "ce", "l2"]


class _Stage(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Fit(_Stage):
    """Ridge regression of every region's last linear on the original's activations.

    tokens: text to fit on. ridge: penalty in units of the mean squared feature. A region whose
    error on held-out text does not fall keeps its weights.
    """

    stage: Literal["fit"] = "fit"
    tokens: int = Field(default=16384, ge=1)
    length: int = Field(default=1024, ge=2)
    ridge: float = Field(default=1e-4, ge=0)


class _Trained(_Stage):
    """What every stage that takes gradient steps has.

    tokens, minutes: when it ends, whichever comes first; without either, its share of the
    run's budget, in proportion to `share`. length: tokens of a sequence; rows: sequences of a
    step and process; long: sequences of this length take the share `long_share` of the tokens.
    accumulate: steps whose gradients are added up. learning_rate: of new, copied and gate
    parameters; a name that is left out is as the pass says. ema: decay of the average
    of the weights that is kept if it is the better one (0: none). warmup, decay: shares of the
    budget in which the rate rises and falls (to a tenth).
    """

    tokens: int | None = Field(default=None, ge=1)
    minutes: float | None = Field(default=None, gt=0)
    share: float = Field(default=1.0, gt=0)
    length: int = Field(default=1024, ge=2)
    rows: int = Field(default=1, ge=1)
    long: int = Field(default=4096, ge=2)
    long_share: float = Field(default=0.0, ge=0, le=1)
    accumulate: int = Field(default=1, ge=1)
    learning_rate: dict[Literal["new", "copied", "gate"], float] = Field(default_factory=dict)
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, gt=0)
    ema: float = Field(default=0.9, ge=0, lt=1)
    warmup: float = Field(default=0.02, ge=0, le=1)
    decay: float = Field(default=0.3, ge=0, le=1)


class Transfer(_Trained):
    """Every region alone, on the original's inputs, to the original's outputs.

    loss: relative squared error of the region's output. target: the site's own output, or that
    of the whole decoder layer around it.
    """

    stage: Literal["transfer"] = "transfer"
    target: Literal["mixer_out", "block_out"] = "mixer_out"
    share: float = Field(default=3.0, gt=0)


class Distil(_Trained):
    """The whole model against the original: logits, and every region as in transfer.

    logits: forward KL, reverse KL, Jensen-Shannon, cross-entropy with the original's first
    choice, or squared distance; per token, at `temperature`. ce: weight of the next token's
    cross-entropy. checkpointing: recompute every layer in backward, for less memory.
    """

    stage: Literal["distil"] = "distil"
    logits: Logits = "kl"
    temperature: float = Field(default=1.0, gt=0)
    logits_weight: float = Field(default=1.0, ge=0)
    layer_weight: float = Field(default=1.0, ge=0)
    ce_weight: float = Field(default=0.0, ge=0)
    target: Literal["mixer_out", "block_out"] = "mixer_out"
    checkpointing: bool = False
    length: int = Field(default=768, ge=2)


class Lora(Distil):
    """As `distil`, but only low-rank additions to linears train; they are folded in at the end.

    targets: module paths of linears, exact or `re:` and an expression that matches fully.
    """

    stage: Literal["lora"] = "lora"  # type: ignore[assignment]
    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0)
    targets: list[str] = Field(default_factory=lambda: [r"re:.*\.[qkvo]_proj"])
    layer_weight: float = Field(default=0.0, ge=0)


Stage = Annotated[Fit | Transfer | Distil | Lora, Field(discriminator="stage")]

#: What a run does when neither the plan nor the caller says.
DEFAULT: tuple[Any, ...] = (Transfer(), Distil())

#: Learning rates of a pass that declares none, by stage.
RATES = {
    "transfer": {"new": 1e-2, "copied": 5e-4, "gate": 3e-2},
    "distil": {"new": 1e-3, "copied": 4e-4, "gate": 3e-3},
    "lora": {"new": 1e-3, "copied": 1e-3, "gate": 1e-3},
}


def named(name: str) -> Any:
    """A stage of this name with its defaults."""
    known = {"fit": Fit, "transfer": Transfer, "distil": Distil, "lora": Lora}
    if name not in known:
        from rewriter.errors import PlanError

        raise PlanError(f"unknown stage '{name}'", f"use one of: {', '.join(known)}")
    return known[name]()
