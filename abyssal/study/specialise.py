"""How far experts specialise by kind of text, from counts of who was picked for what."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

SHUFFLES = 50

Counts = Mapping[str, Sequence[Sequence[Sequence[int]]]]
"""A kind, a sequence, a gate: how often each expert was picked. As many sequences of one length in every kind."""


def stacked(counts: Counts) -> Tensor:
    """`[kinds, sequences, gates, E]` int64."""
    return torch.stack([torch.tensor(of_kind) for of_kind in counts.values()])


def loads(counts: Tensor) -> Tensor:
    """`[..., E]` -> the same in mean loads, float64: what each expert has, times the mean of its gate."""
    return counts.double() / counts.double().mean(-1, keepdim=True).clamp(min=1e-9)


def mutual_information(counts: Tensor) -> Tensor:
    """`[kinds, ..., E]` -> `[...]`, bits, float64: what a picked expert tells of the kind of the text, where all kinds
    are equally frequent. 0: every expert has the same share of each kind; log2 of the kinds: each has one kind only.
    """
    share = counts.double() / counts.double().sum(-1, keepdim=True).clamp(min=1e-9)
    return _entropy(share.mean(0)) - _entropy(share).mean(0)


def by_chance(counts: Tensor, seed: int = 0) -> Tensor:
    """`[kinds, sequences, gates, E]` -> `[gates]`: the mutual information that is left when the sequences are dealt to
    the kinds at random, a mean over shuffles: what a finite sample makes of nothing."""
    kinds, sequences = counts.shape[:2]
    generator = torch.Generator().manual_seed(seed)
    flat = counts.flatten(0, 1)
    found = []
    for _ in range(SHUFFLES):
        order = torch.randperm(kinds * sequences, generator=generator)
        found.append(mutual_information(flat[order].unflatten(0, (kinds, sequences)).sum(1)))
    return torch.stack(found).mean(0)


def _entropy(share: Tensor) -> Tensor:
    return -(share * share.clamp(min=1e-300).log2()).sum(-1)
