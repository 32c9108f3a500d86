"""A claim's verdict follows its numbers, and its sentence has them."""

import pytest

from abyssal.study.claim import Claim, claim_by_claim, judged, paired
from abyssal.study.spread import Difference, Spread


def test_differences_are_paired_and_their_interval_is_students():
    clear = Difference.of([1.0, 2.0, 3.0], [0.5, 1.6, 2.4])
    assert clear.mean == pytest.approx(0.5) and clear.margin == pytest.approx(4.303 * 0.1 / 3**0.5)
    assert clear.sign == 1 and Difference.of([0.5, 1.6, 2.4], [1.0, 2.0, 3.0]).sign == -1
    assert Difference.of([1.0, 2.0, 3.0], [0.0, 2.5, 2.9]).sign == 0
    assert Spread.of([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))
    with pytest.raises(ValueError, match="seeds: expected two or more, got 1"):
        Difference.of([1.0], [2.0])


def test_a_difference_is_no_verdict_within_its_interval():
    below, open_, above = Difference(-0.5, 0.25), Difference(-0.5, 0.75), Difference(0.5, 0.25)
    assert [judged(d, -1) for d in (below, open_, above)] == ["shown", "not resolved", "NOT SO: the reverse"]
    assert [judged(d, 1) for d in (below, open_, above)] == ["NOT SO: the reverse", "not resolved", "shown"]
    near, over = Difference(0.005, 0.004), Difference(0.005, 0.006)
    assert [judged(d, 0, 0.01) for d in (near, over, below, above)] == ["shown", "not resolved", "shown", "NOT SO"]
    assert [judged(d, 0, 0.01, True) for d in (near, below, above)] == ["shown", "NOT SO", "NOT SO"]


def test_a_claims_sentence_has_its_numbers():
    where, says = "Paper, section 1", "It holds"
    shown = paired(where, says, "bits: A less B", -1, Difference(-0.5, 0.25))
    assert shown.holds and shown.sentence() == "It holds (Paper, section 1). Bits: A less B: -0.500 ± 0.250."
    assert shown.plain() == {
        "where": where, "says": says, "compared": "bits: A less B", "found": "-0.500 ± 0.250", "verdict": "shown",
        "numbers": {"expected": -1, "difference": -0.5, "margin": 0.25, "alike": 0.0},
    }  # fmt: skip
    open_ = paired(where, says, "here", 0, Difference(0.0, 0.1), alike=0.01, unit=" nats")
    told = "It holds (Paper, section 1), not resolved. Here: +0.000 ± 0.100 nats (no worse: 0.010 at most)."
    assert not open_.holds and open_.sentence() == told
    both = paired(where, says, "here", 0, Difference(0.0, 0.001), alike=0.01, either_way=True)
    assert both.holds and both.found.endswith("(alike: within 0.010)")


def test_short_of_a_papers_figure_is_no_reverse():
    apart = Difference(-0.5, 0.25)
    assert paired("", "", "x", 1, apart).verdict == "NOT SO: the reverse"
    assert paired("", "", "x", 1, apart, level=True).verdict == "NOT SO"
    assert paired("", "", "x", 1, Difference(-0.5, 0.75), level=True).verdict == "not resolved"


def test_the_table_has_a_row_a_claim_and_says_what_an_interval_is():
    grid = claim_by_claim([Claim("W", "S", "C", "F", "shown", {})], "And more.")
    assert grid.rows == (("S", "W", "C", "F", "shown"),) and grid.note.endswith("of such claims. And more.")
    assert (
        "that there is none. Where there is nothing to find, chance alone would still resolve about one in" in grid.note
    )
