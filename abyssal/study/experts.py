"""Study 4, experts: few large ones or many small ones, with and without a shared one, at equal parameters.

DeepSeekMoE (Dai et al. 2024), sections 3 and 4.2 to 4.5; DeepSeek-V3, section 2.1.2.
"""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console

from abyssal.config import ModelConfig
from abyssal.study.balance_tables import texts_of
from abyssal.study.claim import claim_by_claim
from abyssal.study.experts_claims import claims
from abyssal.study.experts_measure import Found, Measurer
from abyssal.study.experts_pictures import heat, outcome
from abyssal.study.experts_shapes import Shape, check_equal, counted, shapes
from abyssal.study.experts_tables import (
    alikeness,
    by_kind,
    disabled,
    of_taken,
    papers,
    sizes,
    table,
    tokens,
)
from abyssal.study.experts_tokens import Taker
from abyssal.study.result import Result, machine
from abyssal.study.small import Small, spent, unlearnt
from abyssal.study.texts import source_of
from abyssal.study.trained import Trained, Variant

CLAIM = (
    "Cutting experts finer, of which more are combined, and isolating shared ones lets experts specialise: at equal "
    "parameters and equal activated parameters the model predicts better (DeepSeekMoE, sections 3, 4.2 and 4.4), and "
    "its experts are less redundant (4.5). DeepSeek-V3 is built so (section 2.1.2)."
)
TOLD = ("few", "fine_shared")  # whose tokens are told


@dataclass(frozen=True)
class Settings(Small):
    """Few large: `chosen` of `experts`, each `expert_width` wide. Many small: each of these cut into `parts`.
    `speed` moves the biases that balance all of them. Raises ValueError naming the setting.

    The default is 15 runs of 80 steps, in DeepSeekMoE's numbers of experts. A step took 0.21 s (dense) to 0.33 s (fine)
    of a core's time, the held-out texts 0.6 to 1.4 s, four times a run and up to eight times after it (process time
    over four steps, one thread, a busy machine): 450 s of one core, and less of the clock on two.
    """

    steps: int = 80
    sequence: int = 128
    text: int = 600_000
    held_out: int = 24
    layers: int = 3  # all have experts, as in DeepSeekMoE's 2B (section 4.1.3)
    experts: int = 16
    chosen: int = 2
    expert_width: int = 128
    parts: int = 4
    vocab: int = 1024
    speed: float = 0.01

    LEAST: ClassVar = {**Small.LEAST, "parts": 2, "chosen": 2, "experts": 4}
    POSITIVE = ("speed", "lr")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.expert_width < 1 or self.expert_width % self.parts:
            raise ValueError(f"expert_width: expected a multiple of the {self.parts} parts, got {self.expert_width}")
        most = self.experts - self.levels()[-1]
        if self.chosen > most:
            raise ValueError(
                f"chosen: expected at most {most}, the experts that are left when a quarter of {self.experts} is "
                f"masked, got {self.chosen}"
            )

    @staticmethod
    def quick() -> "Settings":
        """The smallest that goes all the way: seconds."""
        return Settings(
            seeds=2, steps=8, batch=256, sequence=32, text=8_000, held_out=4, layers=2, width=32, experts=4, chosen=2,
            expert_width=16, parts=2, vocab=300,
        )  # fmt: skip

    def levels(self) -> list[int]:
        """How many large experts are masked: none, and up to a quarter, as in DeepSeekMoE's figure 4."""
        return sorted({self.experts * i // 16 for i in range(5)})

    def shapes(self) -> list[Shape]:
        return shapes(self.experts, self.chosen, self.expert_width, self.parts)

    def model(self) -> ModelConfig:
        """DeepSeek-V3 in small; a shape is yet to be put in.

        A gate value is an expert's own affinity, not normalised over those chosen: of one expert that would be 1
        whatever the gate thinks of the token, and a gate with one to choose would not be learnt. Experts that are cut
        into parts with the same affinity compute what they did.
        """
        return self.in_small().replace(norm_topk_prob=False)

    def training(self) -> dict[str, Any]:
        """Settings of TrainConfig that all variants share."""
        balance = {"bias_speed": self.speed, "sequence_balance": 0.0, "auxiliary_balance": 0.0}
        return {**super().training(), **balance}

    def variants(self) -> list[Variant]:
        """A shape each."""
        model = self.model()
        return [Variant(shape.name, shape.label, shape.of(model)) for shape in self.shapes()]


def study_experts(settings: Settings, folder: Path, command: str = "", console: Console | None = None) -> Result:
    """Trains what isn't in `folder` yet, and measures all of it.

    Raises ValueError before anything is trained for settings that cannot be, NotFinite for a loss that isn't.
    """
    console = console or Console(quiet=True)
    all_shapes, variants = settings.shapes(), settings.variants()
    counts = [counted(shape, settings.model()) for shape in all_shapes]
    check_equal(counts)
    device = str(settings.trains_on())
    texts = settings.read_texts(folder, console)
    runs = settings.train(variants, texts, folder, console)
    began = time.perf_counter()
    measurer = Measurer(texts, settings.levels(), settings.parts, settings.vocab, device)
    found: dict[str, list[Found]] = {}
    for shape in all_shapes:
        if shape.routed is not None:
            console.print(f"measuring {shape.label}", highlight=False)
            found[shape.name] = [measurer.found(run, shape) for run in runs[shape.name]]
    told = {name: measurer.takers(runs[name][0]) for name in TOLD}
    labels = {shape.name: shape.label for shape in all_shapes}
    bits = {name: [run.bits_per_byte for run in of_seeds] for name, of_seeds in runs.items()}
    said, first = claims(bits, found, labels), runs["few"][0]
    masked = {shape.name: measurer.masked(shape) for shape in all_shapes if shape.name in found}
    held_out = sum(len(batch.tokens) for batch in measurer.batches)
    grids = (
        papers(),
        sizes(all_shapes, counts),
        table(all_shapes, runs, found),
        claim_by_claim(said),
        by_kind(all_shapes, runs, texts.kinds),
        disabled(all_shapes, found, masked, settings.experts),
        alikeness(all_shapes, found, 0, held_out),
        *(tokens(shape, told[shape.name]) for shape in all_shapes if shape.name in told),
        texts_of(texts, source_of(settings.data)),
    )
    drawn = (
        outcome(all_shapes, runs, found, settings.levels(), settings.experts),
        heat(all_shapes, found, texts.kinds, 0),
    )
    seconds = spent(runs, began)
    return Result(
        name="experts",
        title="Experts: few large ones or many small ones, and a shared one",
        claim=CLAIM,
        shown=tuple(claim.sentence() for claim in said if claim.holds),
        not_shown=(*(claim.sentence() for claim in said if not claim.holds), *_limits(settings, first)),
        command=command,
        grids=grids,
        pictures=drawn,
        numbers={
            "settings": settings.plain(),
            "tokens": first.tokens,
            "texts": {**texts.about, "sha256": texts.fingerprint},
            "claims": [claim.plain() for claim in said],
            "shapes": {
                shape.name: {
                    **dataclasses.asdict(shape),
                    "parameters": dataclasses.asdict(size),
                    "masked": masked.get(shape.name),
                    "runs": [
                        _numbers(run, found[shape.name][i] if shape.name in found else None)
                        for i, run in enumerate(runs[shape.name])
                    ],
                }
                for shape, size in zip(all_shapes, counts)
            },
            "takers": {name: [_takers(of_layer) for of_layer in layers] for name, layers in told.items()},
        },
        seeds=tuple(range(settings.seeds)),
        seconds=seconds,
        machine=machine(device),
    )


def _limits(settings: Settings, first: Trained) -> tuple[str, ...]:
    return (
        *unlearnt(first),
        f"What happens at the paper's size: here {first.parameters / 1e6:.1f}M parameters see {first.tokens:,} tokens, "
        "there 2B parameters see 100B tokens. What an expert knows takes many tokens, and a small one here is "
        f"{settings.expert_width // settings.parts} wide.",
        "Redundancy at equal loss: section 4.5 holds DeepSeekMoE against GShard with experts 1.5 times as large, which "
        "predicts as well as it; here shapes have equal parameters, and what disabling costs is held against each "
        "shape's own loss.",
        "The paper's gates and balance: they are softmax with an auxiliary loss of 0.01; here they are sigmoid with "
        f"biases, as DeepSeek-V3's, of a speed of {settings.speed:g} that was not searched for, and not normalised "
        "over the chosen, as DeepSeek-V3's are: of one chosen expert the value would always be 1.",
        "That an expert knows what its tokens suggest: tables of tokens say what experts are picked for, not why.",
    )


def _numbers(run: Trained, found: Found | None) -> dict[str, Any]:
    checks = [check._asdict() for check in run.checks]
    own = {"seed": run.seed, "seconds": run.seconds, "bits_per_byte": run.bits_per_byte, "checks": checks}
    own["loss"] = [round(loss, 4) for loss in run.loss]
    if found is None:
        return own
    return {**own, **found._asdict(), "balance": found.balance._asdict(), "rise": found.rise}


def _takers(of_layer: list[Taker]) -> list[dict[str, Any]]:
    return [{**taker._asdict(), "tokens": [of_taken(taken) for taken in taker.tokens]} for taker in of_layer]
