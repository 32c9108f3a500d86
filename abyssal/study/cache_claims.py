"""What is claimed of the cache, and whether counting and measuring bear it out."""

from collections.abc import Sequence

from abyssal.study.cache_measure import Measured
from abyssal.study.cache_papers import Row
from abyssal.study.claim import REFUTED, SHOWN, Claim

HERE = "asked here"


def claims(said: Sequence[Row], measured: Sequence[Measured]) -> list[Claim]:
    """One for each paper, and one of all caches that were allocated. Nothing is drawn at random that a count would hang
    on: one that is wrong is enough."""
    wheres = list(dict.fromkeys(row.where for row in said))
    papers = [_of_paper(where, [row for row in said if row.where == where]) for where in wheres]
    return [*papers, _of_caches(measured)]


def _of_paper(where: str, said: Sequence[Row]) -> Claim:
    wrong = [f"{row.what}: it says {row.said}, counted {row.counted}" for row in said if not row.agrees]
    return _all(
        where, "What a token leaves behind is as it is printed, or as that implies", "figures, to the digit",
        len(said), wrong,
    )  # fmt: skip


def _of_caches(measured: Sequence[Measured]) -> Claim:
    wrong = [f"{x.label}: predicted {x.predicted:,}, measured {x.found:,}" for x in measured if not x.exact]
    return _all(
        HERE, "A cache that is allocated and written has the bytes predicted", "caches, to the byte",
        len(measured), wrong,
    )  # fmt: skip


def _all(where: str, says: str, compared: str, count: int, wrong: Sequence[str]) -> Claim:
    agree = count - len(wrong)
    found = "; ".join([f"{agree} of {count} agree", *wrong])
    return Claim(where, says, compared, found, REFUTED if wrong else SHOWN, {"agree": agree, "of": count})
