"""The sampling kernels through Triton's interpreter, against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from abyssal.ops import sample
from abyssal.ops.sample import Adjust, Settings, draw, verify

INF = float("inf")


def some_logits(g: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A third of them from a handful of values, and a number in every row."""
    logits = 3 * torch.randn(shape, generator=g)
    hard = torch.tensor([-INF, -3.0, -1.0, 0.0, 0.5, 0.5, 2.0])[torch.randint(7, shape, generator=g)]
    logits = logits.where(torch.rand(shape, generator=g) > 0.33, hard)
    logits[..., 0] = logits[..., 0].where(logits[..., 0].isfinite(), 0.25)
    return logits.to(dtype)


@st.composite
def batches(draw_: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Settings, int | None, Adjust]:
    """Logits, drafts, positions, settings, allowed, adjust."""
    S, W = draw_(st.integers(1, 3)), draw_(st.integers(1, 4))
    V = draw_(st.sampled_from([1, 2, 7, 32, 33, 100]))
    g = torch.Generator().manual_seed(draw_(st.integers(0, 10**6)))
    dtype = draw_(st.sampled_from([torch.float32, torch.bfloat16]))

    def pick(values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor([draw_(st.sampled_from(values)) for _ in range(S)], dtype=dtype)

    chosen = Settings(
        pick([0.0, 1e-6, 0.25, 1.0, 2.0]), pick([0, 0, 1, 2, 3, 50], torch.int32), pick([1.0, 1.0, 0.9, 0.5, 1e-9]),
        pick([0.0, 0.0, 0.1, 1.0]), torch.randint(-(2**62), 2**62, (S,), generator=g),
    )  # fmt: skip
    adjust = Adjust()
    if draw_(st.booleans()):
        adjust = adjust._replace(bias=torch.randn(S, V, generator=g))
    if draw_(st.booleans()):
        mask = torch.randint(-(2**31), 2**31, (S, W, -(-V // 32)), generator=g).to(torch.int32)
        mask[..., 0] |= 1
        adjust = adjust._replace(mask=mask)
    if draw_(st.booleans()):
        adjust = adjust._replace(
            counts=torch.randint(0, 3, (S, V), generator=g, dtype=torch.int32), presence=pick([0.0, 0.5, -0.25]),
            frequency=pick([0.0, 0.5, -0.25]),
        )  # fmt: skip
    if draw_(st.booleans()):
        adjust = adjust._replace(repetition=pick([1.0, 1.5, 0.5]), seen=torch.rand(S, V, generator=g) < 0.3)
    drafts = torch.randint(-1 if draw_(st.booleans()) else 0, V, (S, W - 1), generator=g)
    positions = torch.randint(0, 10**6, (S,), generator=g)
    return (
        some_logits(g, (S, W, V), dtype),
        drafts,
        positions,
        chosen,
        draw_(st.sampled_from([None, V - V // 4])),
        adjust,
    )


@settings(max_examples=60, deadline=None)
@given(batch=batches())
def test_drafts_and_their_probabilities_are_the_reference_s(
    batch: tuple[Tensor, Tensor, Tensor, Settings, int | None, Adjust],
) -> None:
    logits, _, positions, chosen, allowed, adjust = batch
    if adjust.mask is not None:
        adjust = adjust._replace(mask=adjust.mask[:, :1])
    rest = (logits[:, 0], positions, chosen, allowed, adjust, True)
    expected, p = draw(*rest, path="reference")
    token, probs = draw(*rest, path="triton")
    torch.testing.assert_close(probs, p, atol=1e-6, rtol=1e-5)
    assert torch.equal(token, expected)
    greedy = [draw(*rest, greedy=True, path=path) for path in ("reference", "triton")]
    assert torch.equal(greedy[1][0], greedy[0][0]) and torch.equal(greedy[1][1], greedy[0][1])  # type: ignore[arg-type]


@settings(max_examples=80, deadline=None)
@given(batch=batches(), drafter=st.sampled_from(["chosen", "own", "other"]))
def test_what_is_kept_and_what_follows_are_the_reference_s(
    batch: tuple[Tensor, Tensor, Tensor, Settings, int | None, Adjust], drafter: str
) -> None:
    """Random numbers are never within rounding of a border at these sizes."""
    logits, drafts, positions, chosen, allowed, adjust = batch
    S, W, V = logits.shape
    q = None
    if drafter == "own":  # about the model's own; of exactly that, a residual is nothing but rounding
        scores = sample._adjusted(logits, drafts, allowed, adjust)
        q = 0.5 * sample._distributions(scores, chosen)[0][:, :-1] + 0.5 / V
    elif drafter == "other":
        q = torch.rand(S, W - 1, V, generator=torch.Generator().manual_seed(V)).softmax(-1)
    rest = (logits, drafts, q, positions, chosen, allowed, adjust)
    for greedy in (False, True):
        expected = verify(*rest, greedy=greedy, path="reference")
        found = verify(*rest, greedy=greedy, path="triton")
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def plain(S: int, temperature: float = 1.0) -> Settings:
    one = torch.ones(S)
    return Settings(one * temperature, torch.zeros(S).int(), one, 0 * one, torch.arange(S))


@pytest.mark.parametrize("V", [4097, 9000])
@pytest.mark.parametrize("few", [16, 1024, 4096])
@pytest.mark.parametrize("k, p, floor", [(0, 1.0, 0.0), (37, 1.0, 0.0), (0, 0.9, 0.0), (500, 0.8, 0.0), (0, 1.0, 0.02),
                                         (20, 0.5, 1e-3), (1, 0.1, 0.0), (0, 1e-9, 0.0)])  # fmt: skip
def test_rows_of_several_blocks_with_ties(
    V: int, few: int, k: int, p: float, floor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores in steps of an eighth: every cut falls among equals, of which the first ids are kept. A search ends among
    few scores, or before that where there are more equal ones than few."""
    monkeypatch.setattr("abyssal.kernels.sample.FEW", few)
    logits = torch.randn(2, V, generator=torch.Generator().manual_seed(V)).mul(8).round() / 8
    one = torch.ones(2)
    chosen = Settings(one, torch.full((2,), k).int(), one * p, one * floor, torch.arange(2))
    positions = torch.arange(2)
    expected, probs = draw(logits, positions, chosen, want_probs=True, path="reference")
    token, found = draw(logits, positions, chosen, want_probs=True, path="triton")
    assert probs is not None and found is not None
    assert int((probs > 0).sum(-1).min()) >= (k if p == 1 else 1)
    # At the last place of a nucleus, rounding decides.
    assert ((found > 0) != (probs > 0)).sum(-1).max() <= (1 if p < 1 else 0)
    torch.testing.assert_close(found.sum(-1), one)
    if torch.equal(found > 0, probs > 0):
        torch.testing.assert_close(found, probs, atol=1e-7, rtol=1e-5)
        assert torch.equal(token, expected)


def test_uniform_numbers_are_the_reference_s() -> None:
    """Of 1000 equal tokens the one that is drawn tells the number."""
    S = 12
    seeds = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 12345] * 2)
    positions = torch.tensor([0, 1, 5, 2**31, 2**40, 77] + [9] * 6)
    chosen = plain(S)._replace(seed=seeds)
    token, _ = draw(torch.zeros(S, 1000), positions, chosen, path="triton")
    assert torch.equal(token, (sample.uniform(seeds, positions, sample.DRAFT) * 1000).long())
    none = torch.zeros(S, 0).long()
    token = verify(torch.zeros(S, 1, 1000), none, None, positions, chosen, path="triton")[1]
    assert torch.equal(token, (sample.uniform(seeds, positions, sample.TAKE) * 1000).long())


@pytest.mark.parametrize("bad", [float("nan"), INF, "all"])
@pytest.mark.parametrize("chosen", [True, False])
@pytest.mark.parametrize("greedy", [True, False])
def test_a_row_without_numbers_costs_its_own_sequence_alone(bad: float | str, chosen: bool, greedy: bool) -> None:
    S, W, V = 3, 3, 5
    logits = torch.zeros(S, W, V)
    logits[..., 1] = 40.0  # certain
    drafts = torch.ones(S, W - 1, dtype=torch.int64)
    drafts[2, 0] = 0  # rejected before the bad row
    q = None if chosen else torch.full((S, W - 1, V), 1 / V)
    logits[1:, 1] = -INF if bad == "all" else logits[1:, 1]
    if bad != "all":
        logits[1:, 1, 3] = float(bad)
    rest = (logits, drafts, q, torch.zeros(S).long(), plain(S))
    accepted, token = verify(*rest, greedy=greedy, path="triton")
    assert accepted.tolist() == [2, 0, 0] and token.tolist() == [1, -1, 1]
    drafted, probs = draw(logits[:, 1], rest[3], rest[4], want_probs=True, greedy=greedy, path="triton")
    assert drafted.tolist() == [1, -1, -1] and probs is not None and probs.sum(-1).tolist() == [1, 0, 0]


def test_logits_need_not_be_contiguous() -> None:
    wide = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0))
    drafts, positions = torch.zeros(3, 1).long(), torch.arange(3)
    for logits in (wide[:, 1:3, :33], wide[:, :, :2].transpose(1, 2), wide[:, :2, ::2]):
        S, W, V = logits.shape
        q = torch.full((S, W, V), 1 / V)[:, :-1]
        for probs in (None, q):
            rest = (logits, drafts, probs, positions, plain(S))
            expected, found = verify(*rest, path="reference"), verify(*rest, path="triton")
            assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_values_far_apart_and_close_together_are_told_apart() -> None:
    logits = torch.tensor([[0.0, 1e-38, 2e-38, 3e-38, -1e-38, -3e38, 0.0]])
    one = torch.ones(1)
    for k, ids in ((1, [3]), (2, [2, 3]), (4, [0, 1, 2, 3]), (5, [0, 1, 2, 3, 6])):
        chosen = Settings(one, torch.tensor([k]).int(), one, 0 * one, torch.arange(1))
        # By the scores themselves: exponentials of these are equal, and the reference keeps the first ids of equals.
        _, probs = draw(logits, torch.zeros(1).long(), chosen, want_probs=True, path="triton")
        assert probs is not None and (probs[0] > 0).nonzero().flatten().tolist() == ids


def test_nothing_in_nothing_out() -> None:
    none = torch.zeros(0).long()
    accepted, token = verify(torch.zeros(0, 2, 9), torch.zeros(0, 1).long(), None, none, plain(0), path="triton")
    assert accepted.shape == token.shape == (0,)
    assert draw(torch.zeros(0, 9), none, plain(0), path="triton")[0].shape == (0,)
