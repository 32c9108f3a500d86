"""What one seed's models with MTP come to: read on held-out text, drafting in the engine, timed."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

import abyssal
from abyssal.engine import LLM
from abyssal.study.prediction_measure import Drafted, Read, generate, read
from abyssal.study.prediction_speed import Timed, timed
from abyssal.study.texts import Texts
from abyssal.study.trained import MODEL, Trained

if TYPE_CHECKING:
    from abyssal.study.prediction import Settings

SAMPLED = 1.0  # temperature, beside greedy
DRAFTS = {"one": (1, 2), "two": (2,)}  # a variant: tokens drafted a step


class Found(NamedTuple):
    """Of one seed. A key is a variant and how many tokens it drafts."""

    held_out: dict[str, dict[str, list[Read]]]  # a variant, a kind, a module
    greedy: dict[tuple[str, int], dict[str, Drafted]]  # by kind
    sampled: dict[tuple[str, int], dict[str, Drafted]]
    alike: int  # greedy texts with drafts that are those without
    texts: int  # of so many
    timed: list[Timed]  # of the variant with one module


def find(settings: "Settings", runs: Mapping[str, Trained], texts: Texts, device: torch.device) -> Found:
    """Of one seed's runs, by variant."""
    prompts = {
        kind: [batch.tokens[: settings.prompt].tolist() for batch in batches[: settings.texts]]
        for kind, batches in texts.held_out.items()
    }
    seed = runs["one"].seed
    held_out: dict[str, dict[str, list[Read]]] = {}
    greedy: dict[tuple[str, int], dict[str, Drafted]] = {}
    sampled: dict[tuple[str, int], dict[str, Drafted]] = {}
    measured: list[Timed] = []
    alike = count = 0
    for name, several in DRAFTS.items():
        model = abyssal.load(runs[name].folder / MODEL, device=device)
        held_out[name] = {kind: read(model, batches) for kind, batches in texts.held_out.items()}
        engine = partial(
            LLM, model, tokenizer=texts.tokenizer, max_batch=sum(map(len, prompts.values())), adapt=False,
            compiled=False, prefix_cache=False, max_context=settings.prompt + settings.generate,
        )  # fmt: skip
        plain = generate(engine(drafts=0), prompts, settings.generate, 0.0, seed)
        for k in several:
            llm = engine(drafts=k)
            greedy[name, k] = generate(llm, prompts, settings.generate, 0.0, seed)
            sampled[name, k] = generate(llm, prompts, settings.generate, SAMPLED, seed)
            pairs = [(a, b) for kind in prompts for a, b in zip(plain[kind].tokens, greedy[name, k][kind].tokens)]
            alike, count = alike + sum(a == b for a, b in pairs), count + len(pairs)
        if name == "one":
            mixed = [prompt for turn in zip(*prompts.values()) for prompt in turn]  # of every kind in turn
            for batch in settings.batches:
                own = mixed[: max(batch, len(prompts))]
                measured += timed(model, texts.tokenizer, own, batch, (0, *several), settings.timed)
    return Found(held_out, greedy, sampled, alike, count, measured)


def ratio(of_seed: Sequence[Timed], batch: int, drafts: int) -> float:
    """Tokens a second over those without drafts."""
    rates = {t.drafts: t.tokens_per_second for t in of_seed if t.batch == batch}
    return rates[drafts] / rates[0]


def plain_of(seed: int, runs: Mapping[str, Sequence[Trained]], f: Found) -> dict[str, Any]:
    """One seed's numbers, as JSON has them."""

    def of(found: Mapping[tuple[str, int], Mapping[str, Drafted]]) -> dict[str, Any]:
        return {
            f"{name}, {k}": {
                kind: {"steps": d.steps, "accepted": d.accepted, "repeated": d.repeated} for kind, d in kinds.items()
            }
            for (name, k), kinds in found.items()
        }

    trained = {
        name: {
            "bits_per_byte": of_seeds[seed].bits_per_byte,
            "checks": [check._asdict() for check in of_seeds[seed].checks],
            "seconds": of_seeds[seed].seconds,
            "loss": of_seeds[seed].loss,
        }
        for name, of_seeds in runs.items()
    }
    held_out = {
        name: {kind: [r._asdict() for r in reads] for kind, reads in kinds.items()}
        for name, kinds in f.held_out.items()
    }
    return {
        "seed": seed, "trained": trained, "held_out": held_out, "greedy": of(f.greedy), "sampled": of(f.sampled),
        "texts": f.texts, "texts_unchanged_by_drafts": f.alike, "timed": [t._asdict() for t in f.timed],
    }  # fmt: skip
