"""What a trained run says of its balance, and of how far its experts specialise."""

from typing import NamedTuple

import torch

from abyssal.model.balance import max_violation
from abyssal.study.specialise import by_chance, loads, mutual_information, stacked
from abyssal.study.trained import Trained

LAST = 10  # the last tenth of a run


class Found(NamedTuple):
    """Of one run. Where it does not say "by layer", a mean over the layers with experts."""

    bits_per_byte: float
    violation: float  # MaxVio over all held-out tokens: Wang et al.'s MaxVio_global
    violation_by_layer: list[float]
    violation_of_batch: float  # of the steps' batches, a mean over the last tenth of them
    violation_of_sequence: float  # within a held-out sequence, a mean over them
    information: float  # bits that an expert tells of the kind of text
    information_by_layer: list[float]
    information_by_chance: float  # where the kinds are dealt out at random
    loads: list[list[list[float]]]  # a kind, a layer: each expert's, in mean loads


def measured(run: Trained) -> Found:
    """From the run's counts of the held-out texts after its last step."""
    counts = stacked(run.counts)  # [kinds, sequences, gates, E]
    of_kind = counts.sum(1)
    violation = max_violation(of_kind.sum(0))
    information = mutual_information(of_kind)
    tail = torch.tensor(run.violation[-max(len(run.violation) // LAST, 1) :], dtype=torch.float64)
    return Found(
        bits_per_byte=run.bits_per_byte,
        violation=float(violation.mean()),
        violation_by_layer=violation.tolist(),
        violation_of_batch=float(tail.mean()),
        violation_of_sequence=float(max_violation(counts).mean()),
        information=float(information.mean()),
        information_by_layer=information.tolist(),
        information_by_chance=float(by_chance(counts).mean()),
        loads=loads(of_kind).tolist(),
    )
