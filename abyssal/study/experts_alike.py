"""How alike experts are, how they are combined, and what their choice tells of the token."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize, silu

from abyssal.model.experts import Experts

SHUFFLES = 10


class Alike(NamedTuple):
    """Mean cosines of two experts' outputs for the same token."""

    all: float  # over all pairs
    together: float | None  # over those that the token picked together; None where it picks one


def alike(experts: Experts, x: Tensor, indices: Tensor) -> Alike:
    """Of the tokens `x [T, D]` that the layer's experts read, of which each picked `indices [T, K]`."""
    x, w1, w2, w3 = (t.float() for t in (x, experts.w1, experts.w2, experts.w3))
    hidden = silu(torch.einsum("td,efd->tef", x, w1)) * torch.einsum("td,efd->tef", x, w3)
    unit = normalize(torch.einsum("tef,edf->ted", hidden, w2).double(), dim=-1)
    picked = unit.gather(1, indices[..., None].expand(-1, -1, unit.shape[-1]))
    return Alike(_mean_of_pairs(unit), _mean_of_pairs(picked) if indices.shape[1] > 1 else None)


def _mean_of_pairs(unit: Tensor) -> float:
    """`[T, n, D]` unit vectors (or zeros): |Σ u|² is the sum of all their products, each with itself included."""
    n = unit.shape[1]
    products = unit.sum(1).square().sum(-1) - unit.square().sum((1, 2))
    return float((products / (n * (n - 1))).mean())


class Combined(NamedTuple):
    """The sets of experts that tokens picked."""

    met: int  # different ones
    effective: float  # 2 to their entropy: as many, were all equally frequent


def combined(indices: Tensor) -> Combined:
    """Of `indices [T, K]`."""
    counts = indices.sort(-1).values.unique(dim=0, return_counts=True)[1].double()
    share = counts / counts.sum()
    return Combined(len(counts), float(torch.exp2(-(share * share.log2()).sum())))


def picks(indices: Tensor, tokens: Tensor, experts: int, vocab: int) -> Tensor:
    """`[E, vocab]` int64: how often each expert was picked for each token id; `indices [T, K]`, `tokens [T]`."""
    cells = (indices * vocab + tokens[:, None]).flatten()
    return torch.bincount(cells, minlength=experts * vocab).view(experts, vocab)


def tells_of_token(indices: Tensor, tokens: Tensor, experts: int, vocab: int) -> tuple[float, float]:
    """What a picked expert tells of the token's id, in bits; and what is left of it where the ids are dealt to the
    places at random, a mean over shuffles: what a finite sample makes of nothing."""
    generator = torch.Generator().manual_seed(0)
    shuffled = [tokens[torch.randperm(len(tokens), generator=generator)] for _ in range(SHUFFLES)]
    found, *chance = (_information(picks(indices, ids, experts, vocab)) for ids in (tokens, *shuffled))
    return found, sum(chance) / len(chance)


def _information(counts: Tensor) -> float:
    joint = counts.double() / counts.sum()
    apart = joint.sum(0, keepdim=True) * joint.sum(1, keepdim=True)
    inside = joint > 0
    return float((joint[inside] * (joint[inside] / apart[inside]).log2()).sum())
