"""Study 5, balance: what keeps the experts busy, what it costs, and whether they still specialise.

DeepSeek-V3, sections 2.1.2, 4.5.2 and 4.5.3; Wang et al. 2024.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from rich.console import Console

from abyssal.config import ModelConfig
from abyssal.study.balance_claims import NOTE, claims
from abyssal.study.balance_measure import Found, measured
from abyssal.study.balance_pictures import curves, heat, smoothed
from abyssal.study.balance_tables import by_kind, by_layer, papers, table, texts_of
from abyssal.study.claim import claim_by_claim
from abyssal.study.result import Result, machine
from abyssal.study.small import Small, spent, unlearnt
from abyssal.study.texts import source_of
from abyssal.study.trained import Trained, Variant

CLAIM = (
    "Too large an auxiliary loss impairs the model; a bias that only steers who is picked balances without one "
    "(DeepSeek-V3, section 2.1.2), predicts better (4.5.2; Wang et al. 2024, table 2), and lets experts specialise by "
    "domain, which a loss that balances every sequence does not (4.5.3)."
)


@dataclass(frozen=True)
class Settings(Small):
    """`alpha` weighs the auxiliary loss and, where it balances alone, the sequence-wise one; `small_alpha` the
    sequence-wise one beside the biases; `speed` moves the biases. Raises ValueError naming the setting.

    The default is 15 runs of 100 steps. A step took 0.33 s of a core's time and the held-out texts 1.1 s, four times a
    run (process time over six steps, one thread, a busy machine): 570 s of one core, and less of the clock on two.
    """

    layers: int = 4  # the first is dense
    experts: int = 16
    chosen: int = 4
    alpha: float = 0.01  # DeepSeekMoE's 2B (section 4.1.2)
    small_alpha: float = 0.0001  # DeepSeek-V3 (section 4.2)
    speed: float = 0.01  # V3's 0.001 moves a bias by a tenth in 100 steps

    LEAST: ClassVar = {**Small.LEAST, "layers": 2}
    POSITIVE = ("alpha", "small_alpha", "speed", "lr")

    @staticmethod
    def quick() -> "Settings":
        """The smallest that goes all the way: seconds."""
        return Settings(
            seeds=2, steps=8, batch=256, sequence=32, text=8_000, held_out=6, layers=3, width=32, experts=8, chosen=2,
            vocab=300,
        )  # fmt: skip

    def model(self) -> ModelConfig:
        """DeepSeek-V3 in small."""
        return self.in_small().replace(
            intermediate_size=self.width * 5 // 2, moe_intermediate_size=max(self.width // 2, 1),
            n_routed_experts=self.experts, num_experts_per_tok=self.chosen,
        )  # fmt: skip

    def training(self) -> dict[str, Any]:
        """Settings of TrainConfig that all variants share: nothing balances."""
        return {**super().training(), "bias_speed": 0.0, "sequence_balance": 0.0, "auxiliary_balance": 0.0}

    def variants(self) -> list[Variant]:
        """All have biases, which stay 0 where nothing moves them."""
        model = self.model()
        return [
            Variant("none", "none", model),
            Variant("auxiliary", "auxiliary loss", model, {"auxiliary_balance": self.alpha}),
            Variant("sequence", "sequence-wise loss", model, {"sequence_balance": self.alpha}),
            Variant("free", "auxiliary-loss-free", model, {"bias_speed": self.speed}),
            Variant(
                "both", "loss-free, sequence-wise", model,
                {"bias_speed": self.speed, "sequence_balance": self.small_alpha},
            ),
        ]  # fmt: skip


def study_balance(settings: Settings, folder: Path, command: str = "", console: Console | None = None) -> Result:
    """Trains what isn't in `folder` yet, and measures all of it.

    Raises ValueError before anything is trained for settings that cannot be, NotFinite for a loss that isn't.
    """
    console = console or Console(quiet=True)
    variants = settings.variants()
    device = str(settings.trains_on())
    texts = settings.read_texts(folder, console)
    runs = settings.train(variants, texts, folder, console)
    began = time.perf_counter()
    found = {name: [measured(run) for run in of_seeds] for name, of_seeds in runs.items()}
    labels = {variant.name: variant.label for variant in variants}
    said, first = claims(found, labels), runs["none"][0]
    dense = variants[0].model.first_k_dense_replace
    grids = (
        papers(),
        table(runs, found, labels),
        claim_by_claim(said, NOTE),
        by_layer(found, labels, dense),
        by_kind(runs, labels, texts.kinds),
        texts_of(texts, source_of(settings.data)),
    )
    drawn = (curves(runs, labels), heat(found, labels, texts.kinds, dense))
    seconds = spent(runs, began)
    return Result(
        name="balance",
        title="Balance: what keeps the experts busy, and what it costs",
        claim=CLAIM,
        shown=tuple(claim.sentence() for claim in said if claim.holds),
        not_shown=(*(claim.sentence() for claim in said if not claim.holds), *_limits(settings, first)),
        command=command,
        grids=grids,
        pictures=drawn,
        numbers={
            "settings": settings.plain(),
            "parameters": first.parameters,
            "tokens": first.tokens,
            "texts": {**texts.about, "sha256": texts.fingerprint},
            "claims": [claim.plain() for claim in said],
            "variants": {
                v.name: {
                    "label": v.label,
                    "settings": v.settings,
                    "runs": [_numbers(*both) for both in zip(runs[v.name], found[v.name])],
                }
                for v in variants
            },
        },
        seeds=tuple(range(settings.seeds)),
        seconds=seconds,
        machine=machine(device),
    )


def _limits(settings: Settings, first: Trained) -> tuple[str, ...]:
    kinds, gates = len(first.counts), len(first.violation[0])
    return (
        *unlearnt(first),
        f"What happens at the papers' size: here {first.parameters / 1e6:.1f}M parameters see {first.tokens:,} tokens, "
        "there 1B parameters see 100B tokens and more.",
        f"Which strength is best: alpha {settings.alpha:g} and speed {settings.speed:g} were not searched for. Another "
        "alpha trades balance for loss otherwise.",
        f"Domains like the papers' (Wikipedia, GitHub, DM Mathematics): {kinds} kinds of text stand in for them, and "
        f"{gates} layers of {settings.experts} experts for theirs.",
    )


def _numbers(run: Trained, found: Found) -> dict[str, Any]:
    """A run's, and the means of 24 stretches of its curves."""
    width = max(len(run.loss) // 24, 1)
    at, loss = smoothed(np.array([run.loss]), width)
    gates = [smoothed(np.array([gate]), width)[1][0].tolist() for gate in zip(*run.violation)]
    curve = {"steps": at.tolist(), "loss": loss[0].tolist(), "violation_by_layer": gates}
    checks = [check._asdict() for check in run.checks]
    return {"seed": run.seed, "seconds": run.seconds, **found._asdict(), "checks": checks, "curve": curve}
