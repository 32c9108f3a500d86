"""Study 1, the cache: what a token leaves behind under each kind of attention, counted and measured.

DeepSeek-V2, section 2.1.4 and appendix D.2; DeepSeek-V3, section 2.1.1.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from abyssal.config import ModelConfig
from abyssal.files import model_folder
from abyssal.study.cache_claims import claims
from abyssal.study.cache_fit import Fit, Weights, fit, size, weights
from abyssal.study.cache_kinds import Kind, equal_groups, kinds, packs
from abyssal.study.cache_measure import Measured, measure, measure_engine
from abyssal.study.cache_papers import Row, rows
from abyssal.study.cache_pictures import picture, short
from abyssal.study.result import Grid, Picture, Result

MODELS, QUICK_MODELS = ("deepseek-v3", "deepseek-v2-lite"), ("deepseek-v2-lite",)
TOKENS, QUICK_TOKENS, MOST_TOKENS = 64, 16, 1024
SEED = 0
CLAIM = (
    "MLA's cache is that of GQA with 2.25 groups, and its models are stronger than MHA's (DeepSeek-V2, section 2.1.4); "
    "with it DeepSeek-V2 keeps 93.3% less than DeepSeek 67B (abstract)."
)


@dataclass(frozen=True)
class Settings:
    """`memory` as `80GB`; `groups` of GQA (None: 8, or the most that divide the heads); `contexts` and `batches` that
    the memory is divided into; `tokens` of the caches that are allocated; `weights` that lie beside them, bf16 or fp8
    (None: as the configuration says).

    Raises ValueError naming the setting.
    """

    models: tuple[str, ...] = MODELS
    groups: tuple[int, ...] | None = None
    memory: str = "80GB"
    contexts: tuple[int, ...] = (4096, 32768, 131072)
    batches: tuple[int, ...] = (1, 32)
    tokens: int = TOKENS
    weights: str | None = None

    def __post_init__(self) -> None:
        size(self.memory)
        for name in ("models", "contexts", "batches"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected one or more")
        for name in ("contexts", "batches"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name}: expected positive numbers, got {min(getattr(self, name))}")
        if not 2 <= self.tokens <= MOST_TOKENS:
            raise ValueError(f"tokens: expected 2 to {MOST_TOKENS}, got {self.tokens}")
        if self.weights not in (None, "bf16", "fp8"):
            raise ValueError(f"weights: expected bf16 or fp8, got {self.weights!r}")


@dataclass(frozen=True)
class _Model:
    name: str
    kinds: list[Kind]
    weights: Weights
    alone: list[Fit]
    beside: list[Fit] | None  # None: the weights alone are more
    measured: list[Measured]


def study_cache(settings: Settings, command: str = "", say: Callable[[str], None] = lambda text: None) -> Result:
    """Counts, then allocates and writes.

    Raises FileNotFoundError or ValueError for what is not a model, before anything is counted.
    """
    began = time.perf_counter()
    configs = {name: ModelConfig.load(model_folder(name)) for name in settings.models}
    found = {name: _kinds(name, config, settings) for name, config in configs.items()}
    said = rows()
    models = []
    for name, config in configs.items():
        say(f"{name}: allocating caches")
        models.append(_study(name, config, found[name], settings))
    grids = [_papers(said)]
    pictures: list[Picture] = []
    for m in models:
        grids += [_counts(m), *_fits(m, settings), _measurements(m)]
        pictures.append(picture(m.name, m.kinds, size(settings.memory), m.weights.bytes))
    told = claims(said, [x for m in models for x in m.measured])
    return Result(
        name="cache",
        title="The cache: what a token leaves behind",
        claim=CLAIM,
        shown=(*(claim.sentence() for claim in told if claim.holds), *_keeps(models)),
        not_shown=(*(claim.sentence() for claim in told if not claim.holds), *_limits(models)),
        command=command,
        grids=tuple(grids),
        pictures=tuple(pictures),
        numbers={
            "memory": size(settings.memory),
            "claims": [claim.plain() for claim in told],
            "papers": [{**row._asdict(), "agrees": row.agrees} for row in said],
            "models": {m.name: _numbers(m) for m in models},
        },
        seeds=(SEED,),
        seconds=time.perf_counter() - began,
    )


def _kinds(name: str, config: ModelConfig, settings: Settings) -> list[Kind]:
    if config.max_position_embeddings < settings.tokens:
        raise ValueError(f"tokens: expected at most the {config.max_position_embeddings} of {name}")
    try:
        return kinds(config, settings.groups)
    except ValueError as error:
        raise ValueError(f"{error} ({name})") from None


def _study(name: str, config: ModelConfig, own: list[Kind], settings: Settings) -> _Model:
    memory, stored = size(settings.memory), weights(config, settings.weights)
    divided = settings.contexts, settings.batches

    def room(kind: Kind) -> int:  # who drafts holds the modules' weights, too
        return memory - stored.bytes - (stored.mtp_bytes if kind.mtp else 0)

    measured = [measure(kind, settings.tokens, SEED) for kind in own if not kind.mtp]
    measured.append(measure_engine(config, settings.tokens, seed=SEED))
    if config.attention == "mla" and packs(config):
        measured.append(measure_engine(config, settings.tokens, packed=True, seed=SEED))
    return _Model(
        name,
        own,
        stored,
        alone=[fit(kind, memory, *divided) for kind in own],
        beside=[fit(kind, room(kind), *divided) for kind in own] if stored.bytes < memory else None,
        measured=measured,
    )


# ---- tables -------------------------------------------------------------------------------------------------------


def _papers(said: Sequence[Row]) -> Grid:
    cells = [(r.where, r.what, r.said, r.counted, "yes" if r.agrees else "NO") for r in said]
    head = ("paper", "what", "it says", "counted", "agrees")
    return Grid("What the papers print or imply, and what is counted", head, tuple(cells), labels=2)


def _counts(m: _Model) -> Grid:
    mha = next(kind for kind in m.kinds if kind.label == "MHA").bytes()
    cells = []
    for kind in m.kinds:
        n = kind.bytes()
        ratio, groups = f"{mha / n:.2f}", f"{equal_groups(kind):.2f}"
        cells.append((kind.label, kind.formula, f"{kind.elements:,}", f"{n:,}", ratio, groups))
    c = m.kinds[0].config
    note = f"n_h {c.num_attention_heads}, d_h {c.v_head_dim}, l {c.num_hidden_layers}, d_c {c.kv_lora_rank}, "
    note += f"d_h^R {c.qk_rope_head_dim}. Bytes are bf16's, but for FP8 rows. The ratios are of bytes."
    if c.attention == "mla" and not packs(c):
        note += f" FP8 rows are of latents in groups of 128: {c.kv_lora_rank} has none."
    head = ("attention", "in the papers' letters", "elements", "bytes", "MHA is ×", "GQA groups")
    return Grid(f"{m.name}: what a token leaves behind", head, tuple(cells), note, labels=2)


def _fits(m: _Model, settings: Settings) -> list[Grid]:
    head = ("attention", "tokens", *(f"batch at {n:,}" for n in settings.contexts))
    head += tuple(f"context of {n:,}" for n in settings.batches)

    def cells(fits: Sequence[Fit]) -> tuple[tuple[str, ...], ...]:
        return tuple(
            (kind.label, *(f"{n:,}" for n in (f.tokens, *f.batches.values(), *f.contexts.values())))
            for kind, f in zip(m.kinds, fits)
        )

    own = f"{short(m.weights.bytes)} of {m.weights.stored} weights"
    limit = f"The model's own limit is {m.kinds[0].config.max_position_embeddings:,} tokens a sequence. "
    limit += "Activations and the rest of a server's memory are not counted."
    if m.beside is None:
        limit += f" Beside {own} nothing fits: they are more than the memory."
    grids = [Grid(f"{m.name}: what {settings.memory} hold of the cache alone", head, cells(m.alone), limit)]
    if m.beside is not None:
        grids.append(Grid(f"{m.name}: what {settings.memory} hold beside {own}", head, cells(m.beside)))
    return grids


def _measurements(m: _Model) -> Grid:
    cells = [
        (x.label, f"{x.tokens:,}", f"{x.written:,}", f"{x.predicted:,}", f"{x.found:,}", "yes" if x.exact else "NO")
        for x in m.measured
    ]
    note = "Allocated on the CPU, written by a forward pass, and measured by the size of its storages. "
    if all(x.whole for x in m.measured):
        note += "The model is the whole one, with random weights."
    else:
        note += "Where the model has too many weights a narrow layer stands in, with the same rows in as many layers."
    note += " The engine's pool is whole pages of 64 tokens, and one for idle rows."
    head = ("cache", "rows a layer", "written", "predicted bytes", "measured bytes", "equal")
    return Grid(f"{m.name}: predicted and measured", head, tuple(cells), note)


# ---- what it shows ------------------------------------------------------------------------------------------------


def _keeps(models: Sequence[_Model]) -> tuple[str, ...]:
    lines = []
    for m in models:
        ratio = m.kinds[1].bytes() / m.kinds[0].bytes()
        lines.append(f"{m.name} keeps {m.kinds[0].bytes():,} bytes a token; MHA would keep {ratio:.1f} times as much.")
    return tuple(lines)


def _limits(models: Sequence[_Model]) -> tuple[str, ...]:
    lines = [
        "That attention is as good with the smaller cache: that takes training. No figure here is a quality or a speed."
    ]
    stood_in = [m.name for m in models if not all(x.whole for x in m.measured)]
    if stood_in:
        lines.append(f"The whole of {', '.join(stood_in)} at work: the caches are as theirs, the weights are not.")
    return tuple(lines)


def _numbers(m: _Model) -> dict[str, Any]:
    beside: list[Fit | None] = [*m.beside] if m.beside is not None else [None] * len(m.kinds)
    plain = [
        {
            "attention": kind.label,
            "formula": kind.formula,
            "elements_per_token": kind.elements,
            "bytes_per_token": kind.bytes(),
            "equal_gqa_groups": equal_groups(kind),
            "fits": alone._asdict(),
            "fits_beside_weights": with_weights._asdict() if with_weights else None,
        }
        for kind, alone, with_weights in zip(m.kinds, m.alone, beside)
    ]
    measured = [{**x._asdict(), "exact": x.exact} for x in m.measured]
    return {"weights": m.weights._asdict(), "kinds": plain, "measured": measured}
