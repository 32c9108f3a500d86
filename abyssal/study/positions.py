"""Study 3, positions: how a token learns its place, what each way costs or gains, and how far past the trained length
it goes.

Vaswani et al. 2017, section 3.5; Su et al. 2021 (RoFormer); Kazemnejad et al. 2023 (NoPE); Peng et al. 2023 (YaRN);
DeepSeek-V2, section 2.1.3.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import Console
from torch import Tensor

from abyssal.config import ModelConfig, Position
from abyssal.model.positions import inverse_frequencies
from abyssal.study import positions_pictures as pictures
from abyssal.study import positions_tables as tables
from abyssal.study.balance_tables import texts_of
from abyssal.study.claim import claim_by_claim
from abyssal.study.positions_claims import NOTE, claims
from abyssal.study.positions_encodings import Products, encoding, placed_scores, products
from abyssal.study.positions_measure import ROTARY, Found, factors, measured, with_yarn
from abyssal.study.result import Result, machine
from abyssal.study.small import Small, losses, spent
from abyssal.study.spread import Spread
from abyssal.study.texts import Texts
from abyssal.study.trained import Trained, Variant

CLAIM = (
    "Sinusoids may let a model extrapolate (Vaswani et al. 2017, section 3.5). Rotated queries and keys give products "
    "that depend on the distance alone (Su et al. 2021, section 3.2), and predict better. Without any encoding a "
    "decoder extrapolates better (Kazemnejad et al. 2023); YaRN stretches rotations past the trained length and, "
    "where its factor follows the length, more than twice as far without training further (Peng et al. "
    "2023). A rotary key of its own beside the latent leaves keys that can be absorbed (DeepSeek-V2, section 2.1.3)."
)
LABELS: dict[Position, str] = {
    "none": "none", "integer": "integer", "binary": "binary", "sinusoidal": "sinusoidal", "rope": "RoPE",
    "decoupled": "decoupled RoPE",
}  # fmt: skip
HEAD = 32  # width of a head's queries, keys and values, and of the latent: D/H
LEARNT = 1.0  # nats below an even guess that the loss of a run ends at least that says anything


@dataclass(frozen=True)
class Settings(Small):
    """The `held_out` texts are `reach` times as long as a training sequence. Of a head's 32 dimensions `rotary` are
    rotated where the rotary key is decoupled.

    Raises ValueError naming the setting.

    The default is 18 runs of 350 steps. A step took 0.07 s of a core's time, and to measure a run 1.5 s (process time
    of runs of 300 and 400 steps, one thread, a busy machine): 470 s of one core, and less of the clock on two.
    """

    steps: int = 350
    batch: int = 1024
    sequence: int = 64
    reach: int = 4
    text: int = 500_000
    layers: int = 2
    rotary: int = 12
    vocab: int = 1024
    lr: float = 6e-3

    LEAST: ClassVar = {**Small.LEAST, "sequence": 16}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sequence % 8:
            raise ValueError(f"sequence: expected a multiple of 8, got {self.sequence}")
        if self.reach < 2 or self.reach & (self.reach - 1):
            raise ValueError(f"reach: expected 2, 4, 8 ..., got {self.reach}")
        if self.width < HEAD or self.width % HEAD:
            raise ValueError(f"width: expected a multiple of {HEAD}, got {self.width}")
        if not 0 < self.rotary < HEAD or self.rotary % 2:
            raise ValueError(f"rotary: expected an even number below {HEAD}, got {self.rotary}")

    @staticmethod
    def quick() -> "Settings":
        """The smallest that goes all the way: seconds."""
        return Settings(seeds=2, steps=8, batch=256, sequence=16, text=8_000, held_out=3, layers=2, width=64, vocab=300)

    @property
    def longest(self) -> int:
        """Tokens of a text that is measured."""
        return self.sequence * self.reach

    def model(self, position: Position) -> ModelConfig:
        """Latent attention and dense layers, DeepSeek-V3's in small. All kinds have as many parameters, and scores of
        equally wide queries and keys: a decoupled key's D·R weights are what the others' W_UK has more, C·H·R, as the
        latent is D/H wide. Every kind is told of the longest text: binary digits are made for it."""
        rotary, heads = self.rotary if position == "decoupled" else 0, self.width // HEAD
        return ModelConfig.load("tiny").replace(
            model_type="abyssal", position=position, vocab_size=self.vocab, hidden_size=self.width,
            intermediate_size=self.width * 5 // 2, num_hidden_layers=self.layers, num_attention_heads=heads,
            num_key_value_heads=heads, q_lora_rank=None, kv_lora_rank=self.width // heads,
            qk_nope_head_dim=HEAD - rotary, qk_rope_head_dim=rotary, v_head_dim=HEAD, n_routed_experts=None,
            n_shared_experts=None, first_k_dense_replace=0, num_nextn_predict_layers=0,
            initializer_range=self.width**-0.5, max_position_embeddings=self.longest,
        )  # fmt: skip

    def variants(self) -> list[Variant]:
        """Embeddings are drawn √D times as large as the weights, so that an encoding of numbers up to 1 does not drown
        them (Vaswani et al. 2017, section 3.4); of all alike."""
        return [Variant(x, LABELS[x], self.model(x), embeddings=self.width**0.5) for x in LABELS]


def study_positions(settings: Settings, folder: Path, command: str = "", console: Console | None = None) -> Result:
    """Trains what isn't in `folder` yet, on sequences of one length, and measures all of it on longer ones.

    Raises ValueError before anything is trained for settings that cannot be, NotFinite for a loss that isn't.
    """
    console = console or Console(quiet=True)
    variants, length = settings.variants(), settings.sequence
    device = settings.trains_on()
    texts, longer = (settings.read_texts(folder, console, tokens) for tokens in (length, settings.longest))
    runs = settings.train(variants, texts, folder, console)
    began = time.perf_counter()
    pieces, sizes = _pieces(longer)
    found = {name: [_measured(run, pieces, length, device) for run in runs[name]] for name in runs}
    scores = {x: placed_scores(runs[x][0].model().float(), pieces, settings.longest) for x in ROTARY}
    rows = _encodings(settings)
    alike = {name: products(x) for name, x in rows.items()}
    labels = {variant.name: variant.label for variant in variants}
    said = claims(found, length)
    parameters = {name: of_seeds[0].parameters for name, of_seeds in runs.items()}
    added, rotated = ({n: p for n, p in alike.items() if ("RoPE" in n) == turned} for turned in (False, True))
    grids = (
        *tables.within(found, sizes, labels, length),
        tables.beyond(found, sizes, labels, length),
        claim_by_claim(said, NOTE),
        tables.norms(found, labels, length),
        tables.distances(rows, alike, (1, length // 8, length // 2, length, 2 * length - 2)),
        tables.moved(found, labels, length),
        tables.models(variants, parameters),
        texts_of(longer, f"Held-out texts of {settings.longest} tokens; none stands in what is trained on."),
    )
    drawn = (
        pictures.losses(found, labels, length),
        pictures.encodings(rows, length),
        pictures.norms(found, labels, length),
        pictures.dots(added, rotated, scores, length, labels),
    )
    seconds = spent(runs, began)
    return Result(
        name="positions",
        title="Positions: how a token learns its place, and how far that reaches",
        claim=CLAIM,
        shown=(*_facts(found, alike, parameters, length), *(claim.sentence() for claim in said if claim.holds)),
        not_shown=(*(claim.sentence() for claim in said if not claim.holds), *_limits(settings, runs, pieces)),
        command=command,
        grids=grids,
        pictures=drawn,
        numbers={
            "settings": settings.plain(),
            "parameters": parameters,
            "tokens": runs["none"][0].tokens,
            "texts": {**longer.about, "sha256": texts.fingerprint, "longer_sha256": longer.fingerprint},
            "bytes_by_position": sizes,
            "claims": [claim.plain() for claim in said],
            "encodings": {name: p._asdict() for name, p in alike.items()},
            "scores_by_distance": {name: x.tolist() for name, x in scores.items()},
            "variants": {
                v.name: {"label": v.label, "runs": [_numbers(*both) for both in zip(runs[v.name], found[v.name])]}
                for v in variants
            },
        },
        seeds=tuple(range(settings.seeds)),
        seconds=seconds,
        machine=machine(str(device)),
    )


def _pieces(texts: Texts) -> tuple[Tensor, list[float]]:
    """`[n, P]` of all kinds, and how many bytes the token at each position but the first stands for, a mean."""
    pieces = torch.stack([batch.tokens for of_kind in texts.held_out.values() for batch in of_kind])
    tokens, where = pieces[:, 1:].unique(return_inverse=True)
    sizes = torch.tensor([float(len(texts.tokenizer.token_bytes(t))) for t in tokens.tolist()], dtype=torch.float64)
    return pieces, sizes[where].mean(0).tolist()


def _measured(run: Trained, pieces: Tensor, length: int, device: torch.device) -> Found:
    return measured(run.model().float().to(device), pieces.to(device), length)


def _encodings(settings: Settings) -> dict[str, Tensor]:
    """A name, and its numbers along the longest text."""
    found: dict[str, Tensor] = {}
    for position, label in LABELS.items():
        config = settings.model(position)
        own = {label: config}
        if position in ROTARY:
            most = factors(settings.sequence, settings.longest)[-1]
            own[f"{label}, YaRN ×{most}"] = with_yarn(config, most, settings.sequence)
        for name, config in own.items():
            rows = encoding(config, settings.longest)
            if rows is not None:
                found[name] = rows
    return found


def _facts(
    found: Mapping[str, list[Found]], encodings: Mapping[str, Products], parameters: Mapping[str, int], length: int
) -> tuple[str, ...]:
    """What is counted or computed, with no chance in it."""
    last = length - 1

    def mean(name: str, what: str, place: int) -> str:
        return f"{Spread.of([getattr(x.embedded, what)[place] for x in found[name]]).mean:.2f}"

    told = "; ".join(
        f"{name} {mean(name, 'before', last)} to {mean(name, 'after', last)}, cosine {mean(name, 'cosine', last)}"
        for name in ("integer", "binary", "sinusoidal")
    )
    loosest = ", ".join(f"{name} {max(x.moved_most for x in found[name]):.0e}" for name in ("none", *ROTARY))
    rotary = max(p.spread for name, p in encodings.items() if "RoPE" in name)
    equal = len(set(parameters.values())) == 1
    return (
        *([f"All six have {parameters['none']:,} parameters."] if equal else []),
        f"Norms of embeddings before and after the position is added, at position {last}, and the cosine between "
        f"the two: {told}. As integers they have a norm of {mean('integer', 'after', 1)} at position 1.",
        f"How far apart the cosines of two encodings at one distance are, at most: rotated keys {rotary:.0e}, "
        f"sinusoids {encodings['sinusoidal'].spread:.0e}, binary digits {encodings['binary'].spread:.2f}.",
        f"With all positions {length} larger no token's loss changes by more than: {loosest} nats.",
    )


def _limits(settings: Settings, runs: Mapping[str, list[Trained]], pieces: Tensor) -> tuple[str, ...]:
    first = runs["none"][0]
    ended, evenly = losses(first)[1], math.log(settings.vocab)
    early = (
        f"Anything of a trained model: the loss of {first.variant} ended at {ended:.2f} nats, where an even guess has "
        f"{evenly:.2f}, and what is alike so early may yet part.",
    )
    frequencies = inverse_frequencies(settings.model("rope"))
    turns = [float(f) * settings.sequence / (2 * math.pi) for f in frequencies]
    return (
        *(early if evenly - ended < LEARNT else ()),
        f"What happens at the papers' size: here {first.parameters / 1e6:.1f}M parameters see {first.tokens:,} tokens "
        f"in sequences of {settings.sequence}, in which {sum(t < 1 for t in turns)} of {len(turns)} RoPE pairs do not "
        "turn once.",
        "That it is the growing norm that makes integers what they are: the cause is not isolated.",
        "Kazemnejad et al.'s tasks, which ask for exact answers: here it is the loss of running text. "
        f"{len(pieces)} texts are measured, and another choice of them is not in the spreads.",
        "YaRN after training further, which is what Peng et al. recommend, or with a factor that follows the length "
        "(here it is fixed, which costs near positions more), or with other betas: of so short a sequence "
        f"{sum(t > 32 for t in turns)} pairs turn 32 times and are surely kept, so that near places, too, come to lie "
        "closer than was learnt.",
    )


def _numbers(run: Trained, found: Found) -> dict[str, Any]:
    """A run's."""
    checks = [check._asdict() for check in run.checks]
    plain = {**found._asdict(), "embedded": found.embedded._asdict()}
    return {"seed": run.seed, "seconds": run.seconds, "loss": run.loss, "checks": checks, **plain}
