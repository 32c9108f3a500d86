"""What `cpu.py` measures, in which modes of each engine, and what the project asks of each ratio."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

ENGINES = ("abyssal", "transformers", "llama.cpp")
OURS, TRANSFORMERS, LLAMA = ENGINES

Variant = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """What our speed over a peer's must be: at least, or above, so much."""

    ratio: float
    above: bool = False

    def met(self, ratio: float) -> bool:
        return ratio > self.ratio if self.above else ratio >= self.ratio

    def __str__(self) -> str:
        return f"{'>' if self.above else '≥'} {self.ratio:g}"


@dataclass(frozen=True)
class Cell:
    """One line of the table: tokens a second of an engine at one thing."""

    kind: str  # prefill, decode or train
    dtype: str
    batch: int
    context: int
    targets: dict[str, Target] = field(default_factory=dict)  # by peer

    @property
    def title(self) -> str:
        if self.kind == "train":
            return f"training, {self.batch} × {self.context}"
        return f"{self.kind}, batch {self.batch}, {'prompt' if self.kind == 'prefill' else 'context'} {self.context}"

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.batch}x{self.context}-{self.dtype}"

    @property
    def engines(self) -> tuple[str, ...]:
        return ENGINES[:2] if self.kind == "train" else ENGINES


def cells(short: int, long: int, trained: int) -> Iterator[Cell]:
    """All of them: prompts and contexts of `short` and `long` tokens, training on 4 sequences of `trained`."""
    for dtype in ("float32", "bfloat16"):
        yield Cell("decode", dtype, 1, short, {TRANSFORMERS: Target(3.0), LLAMA: Target(0.8)})
        yield Cell("decode", dtype, 1, long, {TRANSFORMERS: Target(8.0), LLAMA: Target(0.8)})
        yield Cell("decode", dtype, 8, short)
        yield Cell("decode", dtype, 8, long, {TRANSFORMERS: Target(30.0), LLAMA: Target(1.0, above=True)})
        yield Cell("prefill", dtype, 1, short, {TRANSFORMERS: Target(1.0)})
        yield Cell("prefill", dtype, 1, long, {LLAMA: Target(1.0, above=True)})
        if dtype == "float32":
            yield Cell("train", dtype, 4, trained, {TRANSFORMERS: Target(1.25)})


MEMORY_TARGET = 1.3  # resident bytes over weights and latents, below


def variants(engine: str, cell: Cell, every: bool) -> list[Variant]:
    """The modes among which an engine's best is taken; with `every` those, too, that have not been the best in any
    cell, or that compile for minutes. Ours is measured as it comes."""
    if engine == TRANSFORMERS:
        # batched_mm gathers the experts of every token: tens of gigabytes in a prompt.
        experts = ("eager", "batched_mm", "grouped_mm") if cell.kind == "decode" else ("eager", "grouped_mm")
        modes: list[Variant] = [
            {"experts": e, "attention": a} for a, e in product(("sdpa", "eager") if every else ("sdpa",), experts)
        ]
        if every and cell.kind == "decode":
            modes += [{"experts": e, "static": True} for e in ("batched_mm", "grouped_mm")]
        return modes
    if engine == LLAMA:
        if cell.kind == "prefill":
            return [{"flash": f, "ubatch": u} for f, u in product((False, True), (512, 2048) if every else (512,))]
        own = "f32" if cell.dtype == "float32" else "bf16"
        return [{"flash": f, "cache": c} for f, c in product((False, True), ("f16", own) if every else ("f16",))]
    return [{}]


def told(variant: Variant) -> str:
    """A mode in words."""
    words = []
    for key, value in variant.items():
        if isinstance(value, bool):
            words.append({"static": "static cache, compiled"}.get(key, key) if value else f"no {key}")
        else:
            words.append(f"{key} {value}")
    return ", ".join(words)
