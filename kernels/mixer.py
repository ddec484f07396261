"""What an op of the dialect carries along the sequence: the part of a mixer that others must know.

The state pass, the state sizes and the backends read it; a new op registers itself and none of
them changes. Words as in specs/mixers.md, sections 5 and 6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Transition = Literal[
    "kv_append",  # softmax attention: the state grows by every token
    "identity",  # linear attention
    "head_scalar",  # one decay a head: Mamba-2, RetNet
    "key_diagonal",  # one decay a key channel: GLA
    "full_diagonal",  # one decay a channel and state: Mamba-1
    "delta",  # diagonal minus rank one: DeltaNet
    "time_invariant",  # constant matrices: S4, S4D
    "shift",  # a short convolution: the last inputs
]


@dataclass(frozen=True)
class StateTensor:
    """One tensor of fixed size, batch first, that goes into the next call.

    name: unique among the mixers of one layer. argument: of the op, that takes the tensor before
    the first token (None: zeros). output: number of the op's result that is the tensor after the
    last token.
    """

    name: str
    argument: str
    output: int


@dataclass(frozen=True)
class MixerSpec:
    """How an op mixes positions, and what it carries."""

    transition: Transition
    state: tuple[StateTensor, ...] = ()
    normalised: bool = False


#: Every op that mixes positions, by its overload.
MIXERS: dict[Any, MixerSpec] = {}


def register_mixer(op: Any, spec: MixerSpec) -> None:
    """Declare the mixer behind a custom op (the object that `torch.library.custom_op` made)."""
    MIXERS[op._opoverload] = spec
