"""Study 2, attention: the ladder from MHA to latent attention, what each rung costs, and the algebra at work.

DeepSeek-V2, sections 2.1.2 to 2.1.4 and appendix D.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import Console

from abyssal.data import Batch
from abyssal.model.transformer import Transformer
from abyssal.study.attention_algebra import Shape, Way, algebra
from abyssal.study.attention_claims import NOTE, Claim, Heads, of_algebra, of_cache, of_decoding, of_training
from abyssal.study.attention_decode import Again, Point, absorbed_apart, decoding
from abyssal.study.attention_heads import EVERY, Alike, alike
from abyssal.study.attention_ladder import Rung, ladder
from abyssal.study.attention_pictures import algebra_picture, heads_picture, ladder_picture
from abyssal.study.attention_tables import algebra as algebra_grid
from abyssal.study.attention_tables import decoding as decoding_grid
from abyssal.study.attention_tables import heads_by_layer, papers, parameters, quality, recomputed
from abyssal.study.balance_tables import texts_of
from abyssal.study.claim import claim_by_claim
from abyssal.study.result import Result, machine
from abyssal.study.small import Small, spent, unlearnt
from abyssal.study.texts import Texts
from abyssal.study.trained import Trained, Variant

CLAIM = (
    "MHA is stronger than GQA and MQA (DeepSeek-V2, table 8), MLA stronger than MHA with a cache as small as that of "
    "GQA with 2.25 groups (tables 1 and 9). Its keys and values need not be computed at all (section 2.1.2), unless "
    "RoPE is applied to them: then all must be computed again for each token, which is why it is decoupled (2.1.3)."
)
EXPANDED = "mla expanded"  # a line of decoding that is no rung
HEADS_ON = 4  # held-out sequences of each kind whose attention is compared
SEED = 0  # of what is drawn for measurements
APART = 64  # tokens of context at which the paths' logits are compared


@dataclass(frozen=True)
class Settings(Small):
    """A token is decoded at each of `contexts`, `rounds` times; the algebra is of
    `algebra_heads` of DeepSeek-V3's heads, at `algebra_context`, and of a prompt of an eighth of that.

    `device` trains; times are taken on the CPU. Raises ValueError naming the setting.

    The default is 18 runs of 140 steps. A step took 0.2 s of a core's time and the held-out texts 0.5 s, four times a
    run (process time over six steps, one thread, a busy machine): 540 s of one core, 50 s more for heads, decoding and
    algebra, and less of the clock on two.
    """

    steps: int = 140
    batch: int = 1024
    heads: int = 8
    groups: int = 2
    contexts: tuple[int, ...] = (256, 1024, 4096, 16384)
    rounds: int = 15
    algebra_heads: int = 16
    algebra_context: int = 2048

    LEAST: ClassVar = {
        **Small.LEAST, "sequence": EVERY, "width": 4, "heads": 2, "groups": 1, "rounds": 2, "algebra_heads": 1,
        "algebra_context": 8,
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        rising = sorted(set(self.contexts)) == list(self.contexts)
        if len(self.contexts) < 2 or not rising or self.contexts[0] < 2:
            raise ValueError(f"contexts: expected two or more, rising from 2 or more, got {self.contexts}")

    @staticmethod
    def quick() -> "Settings":
        """The smallest that goes all the way: seconds."""
        return Settings(
            seeds=2, steps=6, batch=256, sequence=32, text=8_000, held_out=3, layers=2, width=32, heads=4, groups=2,
            vocab=300, contexts=(16, 256), rounds=3, algebra_heads=2, algebra_context=64,
        )  # fmt: skip

    def ladder(self) -> list[Rung]:
        """The rungs. Raises ValueError."""
        longest = max(self.sequence, *self.contexts)
        return ladder(self.width, self.heads, self.groups, self.layers, self.vocab, longest)

    def training(self) -> dict[str, Any]:
        """Settings of TrainConfig that all rungs share."""
        return {**super().training(), "bias_speed": 0.0, "sequence_balance": 0.0, "auxiliary_balance": 0.0}


@dataclass(frozen=True)
class _Measured:
    """What is measured of the trained models and beside them."""

    heads: Heads
    untrained: dict[str, Alike]
    points: dict[str, list[Point]]
    again: list[Again]
    ways: list[Way]
    model_apart: float
    seconds: float


def study_attention(settings: Settings, folder: Path, command: str = "", console: Console | None = None) -> Result:
    """Trains what isn't in `folder` yet, and measures all of it.

    Raises ValueError before anything is trained for settings that cannot be, NotFinite for a loss that isn't.
    """
    console = console or Console(quiet=True)
    rungs = settings.ladder()
    device = str(settings.trains_on())
    texts = settings.read_texts(folder, console)
    variants = [Variant(rung.name, rung.label, rung.model) for rung in rungs]
    runs = settings.train(variants, texts, folder, console)
    began = time.perf_counter()
    labels = {rung.name: rung.label for rung in rungs} | {EXPANDED: "MLA, decoupled RoPE, expanded anew"}
    console.print("measuring heads, decoding and algebra")
    m = _measure(settings, rungs, runs, texts)
    said = [
        *of_training(rungs, runs, m.heads), *of_cache(rungs), *of_decoding(m.points),
        *of_algebra(m.ways, m.model_apart),
    ]  # fmt: skip
    shape, prompt = Shape(settings.algebra_heads), settings.algebra_context // 8
    first = runs[rungs[0].name][0]
    grids = (
        papers(),
        quality(rungs, runs, m.heads, m.points),
        claim_by_claim(said, NOTE),
        parameters(rungs),
        decoding_grid(m.points, labels),
        recomputed(m.again, m.points["coupled"], m.points["mla"]),
        algebra_grid(m.ways, shape, settings.algebra_context, prompt, m.model_apart),
        heads_by_layer(rungs, m.heads, m.untrained),
        texts_of(texts, _source(settings)),
    )
    drawn = (
        ladder_picture(rungs, runs, m.points, labels),
        algebra_picture(m.again, m.points["coupled"], m.ways),
        heads_picture(rungs, m.heads),
    )
    seconds = spent(runs, began)
    return Result(
        name="attention",
        title="Attention: the ladder from MHA to MLA, and its algebra",
        claim=CLAIM,
        shown=tuple(claim.sentence() for claim in said if claim.holds),
        not_shown=(*(claim.sentence() for claim in said if not claim.holds), *_limits(settings, first)),
        command=command,
        grids=grids,
        pictures=drawn,
        numbers=_numbers(settings, rungs, runs, texts, m, said),
        seeds=tuple(range(settings.seeds)),
        seconds=seconds,
        machine=machine(device),
    )


def _measure(settings: Settings, rungs: Sequence[Rung], runs: dict[str, list[Trained]], texts: Texts) -> _Measured:
    """Heads of every run; decoding by the models of the first seed; the algebra by itself."""
    begun = time.perf_counter()
    read: list[Batch] = [b for of_kind in texts.held_out.values() for b in of_kind[:HEADS_ON]]
    heads = {name: [alike(_ready(run.model()), read) for run in of_seeds] for name, of_seeds in runs.items()}
    fresh = {rung.name: Transformer(rung.model).init_weights(torch.Generator().manual_seed(SEED)) for rung in rungs}
    untrained = {name: alike(_ready(model), read) for name, model in fresh.items()}
    models = {name: _ready(of_seeds[0].model()) for name, of_seeds in runs.items()}
    lines: list[tuple[str, Transformer, str | None]] = [(name, model, None) for name, model in models.items()]
    lines.append((EXPANDED, models["mla"], "expanded"))
    text = torch.cat([batch.tokens for batch in chain(*texts.held_out.values())])
    names = [name for name, _, _ in lines]
    found, again = decoding(
        [line[1:] for line in lines], names.index("coupled"), text, settings.contexts, settings.rounds
    )
    ways = algebra(
        Shape(settings.algebra_heads), settings.algebra_context, settings.algebra_context // 8, settings.rounds, SEED
    )
    apart = absorbed_apart(models["mla"], text, APART)
    return _Measured(
        heads, untrained, dict(zip(names, found)), again, ways, apart, time.perf_counter() - begun
    )  # fmt: skip


def _ready(model: Transformer) -> Transformer:
    """As it is measured: on the CPU, in float32."""
    return model.to("cpu").float().eval().requires_grad_(False)


def _limits(settings: Settings, first: Trained) -> tuple[str, ...]:
    return (
        *unlearnt(first),
        f"What happens at the papers' size: here {first.parameters / 1e6:.1f}M parameters see {first.tokens:,} tokens "
        "and are judged by bits a byte, there 7B and more see over a trillion, judged by benchmarks.",
        f"Each rung at its best: one learning rate, {settings.lr:g}, serves all and was not searched for; what "
        f"attention saves in parameters goes to the MLPs, and {settings.heads} heads have less to share than 128.",
        "Decoding on a GPU, in batches or in 16 bits: times are of one sequence on a CPU, eagerly, in float32.",
    )


def _source(settings: Settings) -> str:
    whence = "the Python standard library's sources" if settings.data is None else str(settings.data)
    return f"Of {whence}, every 8th document of a kind held out; bits a byte are of all kinds together."


def _numbers(
    settings: Settings, rungs: Sequence[Rung], runs: dict[str, list[Trained]], texts: Texts, m: _Measured,
    said: Sequence[Claim],
) -> dict[str, Any]:  # fmt: skip
    return {
        "settings": settings.plain(),
        "tokens": runs[rungs[0].name][0].tokens,
        "texts": {**texts.about, "sha256": texts.fingerprint},
        "claims": [claim.plain() for claim in said],
        "rungs": {rung.name: _of_rung(rung, runs[rung.name], m) for rung in rungs},
        "decoding": {name: [_point(p) for p in of_line] for name, of_line in m.points.items()},
        "keys_anew": [_point(a) for a in m.again],
        "algebra": [_point(way) for way in m.ways],
        "model_apart": m.model_apart,
        "seconds_measuring": m.seconds,
    }


def _of_rung(rung: Rung, runs: Sequence[Trained], m: _Measured) -> dict[str, Any]:
    return {
        "label": rung.label,
        "intermediate_size": rung.model.intermediate_size,
        "attention_parameters": rung.attention,
        "parameters": rung.parameters,
        "elements_per_token": rung.elements,
        "bytes_per_token": rung.bytes,
        "untrained_divergence": m.untrained[rung.name].divergence,
        "runs": [
            {
                "seed": run.seed,
                "seconds": run.seconds,
                "parameters": run.parameters,
                "bits_per_byte": run.bits_per_byte,
                "checks": [check._asdict() for check in run.checks],
                "heads": found._asdict(),
            }
            for run, found in zip(runs, m.heads[rung.name])
        ],
    }


def _point(of: Point | Again | Way) -> dict[str, Any]:
    return {**of._asdict(), "time": of.time._asdict()}
