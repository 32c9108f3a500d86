"""Which tokens each expert takes, with a place in the text where it takes them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from abyssal.data import Tokenizer
from abyssal.study.experts_alike import picks

TOP, LEAST = 4, 4  # tokens of an expert that are told, each picked so often at least
BEFORE, AFTER = 26, 10  # characters around a token


@dataclass(frozen=True)
class Seen:
    """Held-out tokens and what the gates made of them."""

    tokens: Tensor  # [T] int64
    starts: Tensor  # [T] int64: where the sequence of each begins
    indices: list[Tensor]  # a layer: [T, K] int64 the experts picked
    weights: list[Tensor]  # a layer: [T, K] their gate values
    inputs: list[Tensor]  # a layer: [T, D] what the experts read


class Taken(NamedTuple):
    """A token that an expert takes."""

    text: str
    lift: float  # how many times as often it is picked for it as for any token
    picked: int
    occurs: int
    context: str  # where its gate value was highest


class Taker(NamedTuple):
    """One expert."""

    layer: int
    expert: int
    load: float  # in mean loads
    bits: float  # how far its tokens differ from the text: Kullback-Leibler
    tokens: list[Taken]  # by what they add to the bits, the most first


def takers(seen: Seen, gate: int, layer: int, experts: int, vocab: int, tokenizer: Tokenizer) -> list[Taker]:
    """All experts of a gate; `layer` is its layer's number."""
    indices, weights = seen.indices[gate], seen.weights[gate]
    counts = picks(indices, seen.tokens, experts, vocab)  # [E, vocab]
    occurs = torch.bincount(seen.tokens, minlength=vocab)
    all_of = counts.sum(-1)
    of_expert = counts.double() / all_of.clamp(min=1)[:, None]
    lift = of_expert / (occurs.double() / occurs.sum()).clamp(min=1e-12)
    adds = of_expert * lift.clamp(min=1e-12).log2()
    found = []
    for expert in range(experts):
        ranked = torch.where(counts[expert] >= LEAST, adds[expert], 0.0).topk(min(TOP, vocab))
        ids = [int(i) for i, value in zip(ranked.indices, ranked.values) if value > 0]
        taken = []
        for token in ids:
            gates = torch.where((indices == expert) & (seen.tokens == token)[:, None], weights, -1.0).amax(-1)
            context = context_of(seen, int(gates.argmax()), tokenizer)
            number = int(counts[expert, token])
            taken.append(
                Taken(shown(tokenizer, [token]), float(lift[expert, token]), number, int(occurs[token]), context)
            )
        load = float(all_of[expert] * experts / all_of.sum())
        found.append(Taker(layer, expert, load, float(adds[expert].sum()), taken))
    return found


def context_of(seen: Seen, at: int, tokenizer: Tokenizer) -> str:
    """The text around a token, which stands between « and »."""
    start = int(seen.starts[at])
    same = torch.nonzero(seen.starts == start).flatten()
    before = seen.tokens[start:at].tolist()[-BEFORE:]
    after = seen.tokens[at + 1 : int(same[-1]) + 1].tolist()[:AFTER]
    left, right = shown(tokenizer, before, " ")[-BEFORE:], shown(tokenizer, after, " ")[:AFTER]
    return f"{left}«{shown(tokenizer, [int(seen.tokens[at])])}»{right}"


def shown(tokenizer: Tokenizer, ids: Sequence[int], space: str = "␣") -> str:
    """A text in one line: `space` for a space, ⏎ a line's end, ⇥ a tab, · what can't be seen."""
    text = tokenizer.decode(ids).replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() else "·" for c in text).replace(" ", space)
