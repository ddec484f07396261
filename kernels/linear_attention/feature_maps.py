"""Feature maps of linear attention: applied to q and k before the op, along the last dimension.

Every map takes [..., D] and gives [..., F] in the dtype of its input.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def identity(x: Tensor) -> Tensor:
    """x: linear attention without a map, unnormalised (arXiv 2307.08621)."""
    return x


def elu1(x: Tensor) -> Tensor:
    """elu(x) + 1, positive; Katharopoulos et al., arXiv 2006.16236."""
    return F.elu(x) + 1


def relu(x: Tensor) -> Tensor:
    """max(x, 0); Kasai et al. (T2R), arXiv 2103.13076, whose map is relu(x W + b)."""
    return F.relu(x)


def exp(x: Tensor) -> Tensor:
    """exp(x), one element at a time; Zhang et al., arXiv 2402.04347."""
    return torch.exp(x)


def softmax(x: Tensor) -> Tensor:
    """softmax over the channels; LIGER, specs/mixers.md section 1.5."""
    return torch.softmax(x, -1)


def hedgehog(x: Tensor, weight: Tensor, joint: bool = False, floor: float = 1e-12) -> Tensor:
    """Learned map of width 2F: softmax of x W and of -x W; arXiv 2402.04347, 2410.10254.

    Args:
        x: [B, T, H, D].
        weight: [H, D, F], a matrix for every head.
        joint: one softmax over both halves (flash-linear-attention) instead of one for each
            (LoLCATs). The two are different functions.
        floor: the least value, so that the normaliser is not 0.

    Returns:
        [B, T, H, 2F]
    """
    y = torch.einsum("bthd,hdf->bthf", x, weight)
    if joint:
        return torch.softmax(torch.cat([y, -y], -1), -1).clamp(min=floor)
    return torch.cat([torch.softmax(y, -1), torch.softmax(-y, -1)], -1).clamp(min=floor)


#: The maps without parameters, by the name they have in a plan.
FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    f.__name__: f for f in (identity, elu1, relu, exp, softmax)
}
