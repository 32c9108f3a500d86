"""How many tokens a memory holds, and what batch and context that makes."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from abyssal.config import ModelConfig
from abyssal.costs import BF16, inspect
from abyssal.study.cache_kinds import Kind

_UNITS = {"": 1} | {
    prefix + unit: base**power
    for power, prefix in enumerate("KMGTP", 1)
    for unit, base in (("B", 1000), ("IB", 1024))
}  # fmt: skip


class Weights(NamedTuple):
    """A model's weights in memory, and what the MTP modules add: there they share embedding and head."""

    stored: str
    bytes: int
    mtp_bytes: int


class Fit(NamedTuple):
    """What goes into a memory: sequences of each context, and the longest context at each batch."""

    tokens: int
    batches: dict[int, int]
    contexts: dict[int, int]


def size(text: str) -> int:
    """`80GB` (decimal), `80GiB` (binary), or bytes. Raises ValueError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGTP]i?B|B)?\s*", text, re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise ValueError(f"memory: expected a size such as 80GB, 141GiB or 1.5TB, got {text!r}")
    unit = (found[2] or "").upper()
    return int(float(found[1]) * _UNITS["" if unit == "B" else unit])


def weights(config: ModelConfig, stored: str | None = None) -> Weights:
    """`stored` as bf16 or FP8; None: as the configuration says."""
    found = inspect(config).weights
    copies = 2 * config.vocab_size * config.hidden_size * BF16 * config.num_nextn_predict_layers
    if stored == "fp8" or (stored is None and config.fp8):
        return Weights("FP8", found.fp8, found.fp8_mtp - copies)
    return Weights("bf16", found.bf16, found.bf16_mtp - copies)


def fit(kind: Kind, memory: int, contexts: Sequence[int], batches: Sequence[int]) -> Fit:
    """The most that `memory` bytes hold of this kind's cache; nothing else is in them."""
    tokens = max(memory, 0) // kind.bytes()
    return Fit(tokens, {n: tokens // n for n in contexts}, {n: tokens // n for n in batches})
