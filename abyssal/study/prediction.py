"""Study 6, prediction: what multi-token prediction does to the main model, and what its drafts are good for.

DeepSeek-V3, sections 2.2, 4.5.1 and 5.4.3.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console

from abyssal.config import ModelConfig
from abyssal.study.claim import claim_by_claim
from abyssal.study.prediction_claims import NOTE, Numbers, claims
from abyssal.study.prediction_found import DRAFTS, Found, find, plain_of, ratio
from abyssal.study.prediction_measure import GRAM, Drafted, together
from abyssal.study.prediction_pictures import acceptance, gains
from abyssal.study.prediction_speed import cost, module_share
from abyssal.study.prediction_tables import arithmetic, by_kind, drafts, papers, speed, table
from abyssal.study.result import Result, machine
from abyssal.study.small import Small, spent, unlearnt
from abyssal.study.trained import Trained, Variant

CLAIM = (
    "Predicting a second token at every position densifies the training signal (DeepSeek-V3, section 2.2): with it "
    "models score better on most benchmarks (4.5.1). Afterwards 85 to 90% of its second tokens are accepted as drafts, "
    "whatever the text is of, and decoding is 1.8 times as fast (5.4.3)."
)
LEARNT = 1.0  # nats that a loss falls at least in a run that says anything


@dataclass(frozen=True)
class Settings(Small):
    """The engine goes on from the first `prompt` tokens of `texts` held-out sequences of each kind with `generate`
    tokens each; speed is measured with `timed` tokens of each text, `batches` texts at once.

    `weight` is the MTP loss's, a third of it in the last third of a run. Raises ValueError naming the setting.

    The default is 9 runs of 120 steps. A step took 0.17, 0.26 and 0.31 s of a core's time without MTP, with one module
    and with two, the held-out texts 0.5 s, four times a run, and what the engine makes 24 s a seed (process time over
    five steps, one thread, a busy machine): 360 s of one core, and less of the clock on two.
    """

    steps: int = 120
    batch: int = 1024
    layers: int = 4  # the first is dense
    experts: int = 16
    chosen: int = 4
    weight: float = 0.3  # DeepSeek-V3 (section 4.2)
    texts: int = 8
    prompt: int = 32
    generate: int = 64
    timed: int = 48
    batches: tuple[int, ...] = (1, 8)

    LEAST: ClassVar = {**Small.LEAST, "sequence": 8, "layers": 2, "texts": 1, "prompt": 1, "generate": 5, "timed": 4}
    POSITIVE = ("weight", "lr")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.batches or min(self.batches) < 1:
            raise ValueError(f"batches: expected positive numbers, got {self.batches}")
        longest = self.sequence - self.prompt
        for name in ("generate", "timed"):
            if getattr(self, name) > longest:
                raise ValueError(
                    f"{name}: expected {longest} or less, which a prompt of {self.prompt} leaves of {self.sequence}, "
                    f"got {getattr(self, name)}"
                )

    @staticmethod
    def quick() -> "Settings":
        """The smallest that goes all the way: seconds."""
        return Settings(
            seeds=2, steps=8, batch=256, sequence=32, text=8_000, held_out=4, layers=2, width=32, experts=8, chosen=2,
            vocab=300, texts=2, prompt=8, generate=12, timed=4, batches=(1,),
        )  # fmt: skip

    def model(self, modules: int) -> ModelConfig:
        """DeepSeek-V3 in small, with so many MTP modules."""
        return self.in_small().replace(
            intermediate_size=self.width * 5 // 2, moe_intermediate_size=max(self.width // 2, 1),
            n_routed_experts=self.experts, num_experts_per_tok=self.chosen, num_nextn_predict_layers=modules,
        )  # fmt: skip

    def training(self) -> dict[str, Any]:
        """Settings of TrainConfig that all variants share."""
        mtp = {"mtp_weight": self.weight, "mtp_weight_late": self.weight / 3}
        return {**super().training(), "bias_speed": 0.01, **mtp}

    def variants(self) -> list[Variant]:
        """A seed gives their main models the same first weights and the same texts in the same order."""
        labels = {"none": "no MTP", "one": "one module", "two": "two modules"}
        return [Variant(name, label, self.model(modules)) for modules, (name, label) in enumerate(labels.items())]


def study_prediction(settings: Settings, folder: Path, command: str = "", console: Console | None = None) -> Result:
    """Trains what isn't in `folder` yet, and measures all of it.

    Raises ValueError before anything is trained for settings that cannot be, NotFinite for a loss that isn't.
    """
    console = console or Console(quiet=True)
    variants = settings.variants()
    device = settings.trains_on()
    texts = settings.read_texts(folder, console)
    runs = settings.train(variants, texts, folder, console)
    began = time.perf_counter()
    found = []
    for seed in range(settings.seeds):
        console.print(f"drafting with the models of seed {seed}")
        found.append(find(settings, {name: of_seeds[seed] for name, of_seeds in runs.items()}, texts, device))
    labels = {variant.name: variant.label for variant in variants}
    said = claims(_numbers_of(runs, found))
    context = settings.prompt + settings.timed // 2
    grids = (
        papers(),
        table(runs, found, labels),
        claim_by_claim(said, NOTE),
        drafts(found, labels),
        by_kind(found, texts.kinds),
        speed([f.timed for f in found]),
        arithmetic([f.timed for f in found], variants[1].model, context),
    )
    drawn = (
        acceptance(runs, found, labels, settings.prompt),
        gains([f.timed for f in found], variants[1].model, context),
    )
    seconds = spent(runs, began)
    return Result(
        name="prediction",
        title="Prediction: what a second token is good for",
        claim=CLAIM,
        shown=(*(claim.sentence() for claim in said if claim.holds), *_observed(found)),
        not_shown=(
            *(claim.sentence() for claim in said if not claim.holds),
            *_slower(found), *_limits(settings, runs["none"][0], found),
        ),
        command=command,
        grids=grids,
        pictures=drawn,
        numbers={
            "settings": settings.plain(),
            "tokens": runs["none"][0].tokens,
            "parameters": {name: of_seeds[0].parameters for name, of_seeds in runs.items()},
            "texts": {**texts.about, "sha256": texts.fingerprint},
            "claims": [claim.plain() for claim in said],
            "module_share": module_share(variants[1].model, context),
            "costs": {str(k): cost(variants[1].model, k, context)._asdict() for k in DRAFTS["one"]},
            "runs": [plain_of(seed, runs, f) for seed, f in enumerate(found)],
        },
        seeds=tuple(range(settings.seeds)),
        seconds=seconds,
        machine=machine(str(device)),
    )  # fmt: skip


def _numbers_of(runs: Mapping[str, Sequence[Trained]], found: Sequence[Found]) -> Numbers:
    def first(of: Mapping[str, Drafted]) -> float:
        return together(list(of.values())).rate(0)

    def second(of: Mapping[str, Drafted]) -> float:
        return together(list(of.values())).following(1)

    return Numbers(
        bits={name: [run.bits_per_byte for run in of_seeds] for name, of_seeds in runs.items()},
        accepted=[first(f.greedy["one", 1]) for f in found],
        sampled=[first(f.sampled["one", 1]) for f in found],
        of_kind=[{kind: d.rate(0) for kind, d in f.greedy["one", 1].items()} for f in found],
        second_chained=[second(f.greedy["one", 2]) for f in found],
        second_own=[second(f.greedy["two", 2]) for f in found],
        faster=[ratio(f.timed, min(t.batch for t in f.timed), 1) for f in found],
    )


def _observed(found: Sequence[Found]) -> tuple[str, ...]:
    alike, count = sum(f.alike for f in found), sum(f.texts for f in found)
    if alike < count:
        return ()
    return (f"Drafts change no greedy text: all {count:,} are, token for token, those that are made without.",)


def _slower(found: Sequence[Found]) -> tuple[str, ...]:
    """Where drafts lose on this machine, and greedy texts that drafts changed."""
    lines = []
    for batch, k in sorted({(t.batch, t.drafts) for t in found[0].timed if t.drafts}):
        ratios = [ratio(f.timed, batch, k) for f in found]
        mean = sum(ratios) / len(ratios)
        if mean < 1:
            steps = [t.tokens_a_step for f in found for t in f.timed if (t.batch, t.drafts) == (batch, k)]
            made = sum(steps) / len(steps)
            lines.append(
                f"A gain from {k} draft{'s' * (k > 1)} with {batch} text{'s' * (batch > 1)} at once: this machine "
                f"LOSES. A step makes {made:.2f} tokens and takes {made / mean:.2f} times as long as a plain one: "
                f"{mean:.2f} times the tokens a second."
            )
    alike, count = sum(f.alike for f in found), sum(f.texts for f in found)
    if alike < count:
        lines.append(
            f"That drafts change no greedy text: {count - alike} of {count:,} differ from those made without. "
            "Where two are equally likely to the last bits, a pass over several tokens may round otherwise."
        )
    return tuple(lines)


def _limits(settings: Settings, first: Trained, found: Sequence[Found]) -> tuple[str, ...]:
    repeats = [together(list(f.greedy["one", 1].values())).repeated for f in found]
    return (
        *unlearnt(first),
        f"What happens at the papers' size: there 15.7B and 228.7B parameters see 1.33T and 540B tokens, here "
        f"{first.parameters / 1e6:.1f}M see {first.tokens:,}. What a model gains by looking ahead it may gain late.",
        "Benchmarks, where the paper sees most of what MTP gives: so small a model answers nothing. Bits a byte, which "
        "it can be measured by, hardly move in the paper either.",
        "Equal cost: steps and tokens of the main model are equal, and MTP's own work comes on top (see the seconds).",
        f"Acceptance on good text: of the greedy texts {sum(repeats) / len(repeats):.0%} of the tokens end a run of "
        f"{GRAM} that stood there before. So small a model repeats itself, and what is repeated is easy to draft.",
        "That a draft accepted at temperature 1 was a good one: two distributions that know little more than how "
        "frequent tokens are have much in common, too. Drafts of held-out text are the harder measure.",
        f"The best MTP weight: {settings.weight:g}, and a third of it at the end, was not searched for.",
        "A compiled step, or a model whose weights do not fit the CPU's caches: both change what a step costs.",
    )
