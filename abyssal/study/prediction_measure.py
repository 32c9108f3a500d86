"""How well MTP modules predict: on held-out text position by position, and as drafts in the engine."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from abyssal.data import Batch
from abyssal.engine import LLM, Sampling
from abyssal.model.objective import Microbatch, greedy
from abyssal.model.transformer import Transformer

GRAM = 4  # tokens that stood together before


class Read(NamedTuple):
    """Of held-out sequences of T tokens; at each position t in how many of them ..."""

    inside: list[int]  # there is a target for the module
    right: list[int]  # the module's likeliest token is it
    before: list[int]  # the main model and the modules before are right about theirs
    kept: list[int]  # and so is this one, too
    agrees: list[int]  # the module's likeliest token is the main model's own, once it comes there

    @property
    def accuracy(self) -> float:
        return sum(self.right) / max(sum(self.inside), 1)

    @property
    def accepted(self) -> float:
        """Of the drafts that follow what is right."""
        return sum(self.kept) / max(sum(self.before), 1)

    @property
    def agreement(self) -> float:
        return sum(self.agrees) / max(sum(self.inside), 1)


class Drafted(NamedTuple):
    """Of texts that the engine made; `[i]`: of the steps that verified drafts where i tokens stood already."""

    steps: list[int]
    accepted: list[list[int]]  # a place in the draft: in how many it was accepted, and all before it
    repeated: float  # share of the tokens that end a run of GRAM which stood in the same text before
    tokens: list[list[int]]  # what was generated, a text

    def rate(self, place: int) -> float:
        return sum(self.accepted[place]) / max(sum(self.steps), 1)

    def following(self, place: int) -> float:
        """The share accepted at `place` of those whose draft before was; 0 where none was."""
        return sum(self.accepted[place]) / max(sum(self.accepted[place - 1]), 1)

    @property
    def tokens_a_step(self) -> float:
        return 1 + sum(self.rate(place) for place in range(len(self.accepted)))


def read(model: Transformer, batches: Iterable[Batch]) -> list[Read]:
    """A module each; every batch is one sequence, all of them equally long."""
    found: list[Tensor] = []
    device = model.embed.weight.device
    for batch in batches:
        micro = Microbatch.of(batch, len(model.mtp)).to(device)
        rows = []
        with torch.no_grad():
            states, _ = model.hidden(micro.tokens, micro.packing)
            main = greedy(model, states)
            kept = main == micro.targets[0]
            ahead = list(zip(micro.targets, micro.live))
            for d, module in enumerate(model.predict_states(states, micro.tokens, micro.packing, ahead), start=1):
                own, inside = greedy(model, module.states), micro.weights[d] > 0
                right, before = own == micro.targets[d], kept
                kept = kept & right
                agrees = own == main.roll(-d)
                rows.append(torch.stack([m & inside for m in (inside, right, before, kept, agrees)]))
        found.append(torch.stack(rows).long().cpu())
    return [Read(*module) for module in torch.stack(found).sum(0).tolist()]


def together(parts: Sequence[Drafted]) -> Drafted:
    """Kinds of text, each with as much of it, as one."""
    steps = [sum(at) for at in zip(*(part.steps for part in parts))]
    places = zip(*(part.accepted for part in parts))
    accepted = [[sum(at) for at in zip(*of_place)] for of_place in places]
    repeated = sum(part.repeated for part in parts) / len(parts)
    return Drafted(steps, accepted, repeated, [text for part in parts for text in part.tokens])


def generate(
    llm: LLM, prompts: Mapping[str, Sequence[list[int]]], tokens: int, temperature: float, seed: int
) -> dict[str, Drafted]:
    """Goes on from the prompts of each kind with as many `tokens`. Counts the steps after which, had all their drafts
    been accepted, the text would have gone on: which steps count must not hang on what became of their drafts."""
    kinds = [kind for kind, own in prompts.items() for _ in own]
    every = [prompt for own in prompts.values() for prompt in own]
    speculate = llm.drafts > 0  # left to it, the engine does not draft where a text is drawn with a seed
    settings = [
        Sampling(
            max_tokens=tokens, temperature=temperature, seed=seed * len(every) + i, ignore_eos=True,
            speculate=speculate,
        )
        for i in range(len(every))
    ]  # fmt: skip
    steps = {kind: [0] * tokens for kind in prompts}
    accepted = {kind: [[0] * tokens for _ in range(llm.drafts)] for kind in prompts}
    so_far = [0] * len(every)
    texts: dict[str, list[list[int]]] = {kind: [] for kind in prompts}
    repeats: dict[str, list[float]] = {kind: [] for kind in prompts}
    ended: dict[int, list[int]] = {}
    for piece in llm.stream(every, settings):
        at, kind = so_far[piece.index], kinds[piece.index]
        so_far[piece.index] += len(piece.tokens)
        if piece.output is not None:
            ended[piece.index] = piece.output.tokens
        # All drafts accepted, and a token of the model's own after them, make at + drafts + 1; a text that has `tokens`
        # ends (`engine/sequence.py`, push). The first step has nothing to verify.
        if at > 0 and at + llm.drafts + 1 < tokens:
            steps[kind][at] += 1
            for place in range(len(piece.tokens) - 1):
                accepted[kind][place][at] += 1
    for i, kind in enumerate(kinds):
        texts[kind].append(ended[i])
        repeats[kind].append(repeated(every[i], ended[i]))
    return {
        kind: Drafted(steps[kind], accepted[kind], sum(repeats[kind]) / max(len(repeats[kind]), 1), texts[kind])
        for kind in prompts
    }


def repeated(prompt: Sequence[int], text: Sequence[int]) -> float:
    """The share of `text` that ends GRAM tokens which stood together before, in it or in its prompt."""
    whole, seen, count = [*prompt, *text], set(), 0
    for end in range(GRAM, len(whole) + 1):
        gram = tuple(whole[end - GRAM : end])
        count += gram in seen and end > len(prompt)
        seen.add(gram)
    return count / max(len(text), 1)
