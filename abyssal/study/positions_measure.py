"""How well a trained model predicts each place of long texts: as they are, in windows of the trained length, with its
places moved, and with its rotations stretched by YaRN."""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from abyssal.config import ModelConfig, Yarn
from abyssal.model.packing import Packing
from abyssal.model.transformer import Transformer

ROTARY = ("rope", "decoupled")
TOKENS = 4096  # of a forward pass, or a sequence if that is longer


class Embedded(NamedTuple):
    """What the first block reads, a position, means over the texts."""

    before: list[float]  # norm of the token's embedding
    after: list[float]  # norm once its position has been added
    cosine: list[float]  # between the two


class Found(NamedTuple):
    """Of one run: nats a token, a predicted position, means over the texts. The first is that of position 1, the
    second token."""

    whole: list[float]  # each token from all before it: P - 1 numbers for texts of P tokens
    sliding: list[float]  # from no more than the trained length, in windows that begin at position 0
    yarn: dict[int, list[float]]  # by YaRN's factor s: s·L - 1 numbers, each token from all before it
    moved: float  # how much the loss within the trained length L rises if all positions are L larger
    moved_most: float  # and how much any token's loss changes, in float64
    embedded: Embedded


def measured(model: Transformer, texts: Tensor, length: int) -> Found:
    """`texts [n, P]` int64; `length` is the trained one, P a power of two times it."""
    longest, inside = texts.shape[1], texts[:, :length]
    yarn = {}
    if model.config.position in ROTARY:
        for factor in factors(length, longest):
            yarn[factor] = means(nats(stretched(model, factor, length), texts[:, : factor * length]))
    exact = stretched(model, 1, length).double()
    apart = nats(exact, inside, length) - nats(exact, inside)
    return Found(
        means(nats(model, texts)),
        means(nats_sliding(model, texts, length)),
        yarn,
        float(apart.mean()),
        float(apart.abs().max()),
        embedded(model, texts),
    )


def factors(length: int, longest: int) -> list[int]:
    """2, 4 ... up to the longest text in trained lengths."""
    return [2**i for i in range(1, (longest // length).bit_length())]


def means(values: Tensor) -> list[float]:
    """`[n, ...]` -> over the texts."""
    found: list[float] = values.mean(0).tolist()
    return found


@torch.no_grad()
def nats(model: Transformer, texts: Tensor, moved: int = 0) -> Tensor:
    """`[n, P]` -> `[n, P-1]` float64: column t-1 is the loss of token t, predicted from those before it. `moved` is
    added to every position."""
    P = texts.shape[1]
    found = []
    for part in texts.split(max(TOKENS // P, 1)):
        tokens = part.flatten()
        packing = Packing.of([P] * len(part), tokens)
        packing = dataclasses.replace(packing, positions=packing.positions + moved)
        logits = model.logits(model.hidden(tokens, packing).states).unflatten(0, (-1, P))[:, :-1]
        found.append(cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none").double())
    return torch.cat(found).view(len(texts), P - 1)


def nats_sliding(model: Transformer, texts: Tensor, length: int) -> Tensor:
    """Like `nats`, but in windows of `length` that begin every `length/2` tokens, each at position 0: past the first
    window a token is predicted from the `length/2` tokens before it or more, never from `length` (the sliding window
    of Press et al. 2022)."""
    half = length // 2
    windows = texts.unfold(1, length, half)  # [n, W, L]
    found = nats(model, windows.flatten(0, 1)).unflatten(0, windows.shape[:2])
    return torch.cat((found[:, 0], found[:, 1:, half - 1 :].flatten(1)), 1)


def stretched(model: Transformer, factor: int, length: int) -> Transformer:
    """A copy of the model whose rotations are YaRN's, with no further training; for a factor of 1, as it was."""
    copy = Transformer(model.config if factor == 1 else with_yarn(model.config, factor, length)).to(model.embed.weight)
    copy.load_state_dict(model.state_dict())
    return copy


def with_yarn(config: ModelConfig, factor: int, length: int) -> ModelConfig:
    """DeepSeek-V3's YaRN (section 4.3): betas 32 and 1, and both mscales 1, which sharpens the softmax."""
    return config.replace(rope_scaling=Yarn(float(factor), length, mscale=1.0, mscale_all_dim=1.0))


@torch.no_grad()
def embedded(model: Transformer, texts: Tensor) -> Embedded:
    tokens = texts.flatten()
    before = model.embed(tokens).double().view(*texts.shape, -1)
    after = model.enter(tokens, Packing.of([texts.shape[1]] * len(texts), tokens)).double().view_as(before)
    sizes = [means(x.norm(dim=-1)) for x in (before, after)]
    return Embedded(sizes[0], sizes[1], means(cosine_similarity(before, after, dim=-1)))


class Band(NamedTuple):
    """Predicted positions from `start` to before `stop`, the first predicted one being 1."""

    start: int
    stop: int

    def of(self, values: list[float]) -> float:
        """The mean of what is given a predicted position."""
        own = values[self.start - 1 : self.stop - 1]
        return sum(own) / len(own)

    @property
    def text(self) -> str:
        return f"{self.start}–{self.stop - 1}"


def bands(length: int, longest: int) -> list[Band]:
    """Within the trained length, then up to twice that, and so on."""
    return [Band(1, length), *(Band(length * f // 2, length * f) for f in factors(length, longest))]


def bands_within(length: int) -> list[Band]:
    """An eighth of the trained length, the next one, the next quarter, and the second half."""
    edges = [1, *(length // part for part in (8, 4, 2, 1))]
    return [Band(*edge) for edge in zip(edges, edges[1:])]


def bits(values: list[float], sizes: list[float], band: Band) -> float:
    """Bits a byte of a band: nats and bytes a predicted position."""
    return band.of(values) / band.of(sizes) / math.log(2)


def penalty(found: Found, band: Band, factor: int | None = None) -> float:
    """Nats a token that all of a long text before it costs (or, below 0, gains) over a window of the trained length:
    the same tokens."""
    return band.of(found.whole if factor is None else found.yarn[factor]) - band.of(found.sliding)


def of_all(found: Mapping[str, list[Found]], name: str, band: Band, factor: int | None = None) -> list[float]:
    """The penalty of every seed."""
    return [penalty(x, band, factor) for x in found[name]]
