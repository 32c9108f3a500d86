"""Sampling a batch: each row against the one-request functions of `one_by_one`, distributions by enumeration over
a grid of uniform numbers, and what a seed promises."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from one_by_one import distribution, top_logprobs
from torch import Tensor

from abyssal.engine.sampling import Sampling
from abyssal.ops import sample
from abyssal.ops.sample import Adjust, Settings, draw, likeliest, uniform, verify

INF = float("inf")
HARD = [-INF, -3.0, -1.0, 0.0, 0.0, 0.5, 0.5, 2.0]  # ties, and tokens without probability


def some_logits(g: torch.Generator, *shape: int) -> Tensor:
    """Float64, a third of them from a handful of values, and a number in every row."""
    logits = 3 * torch.randn(*shape, generator=g, dtype=torch.float64)
    hard = torch.tensor(HARD, dtype=torch.float64)[torch.randint(len(HARD), shape, generator=g)]
    logits = logits.where(torch.rand(*shape, generator=g) > 0.33, hard)
    logits[..., 0] = logits[..., 0].where(logits[..., 0].isfinite(), 0.25)
    return logits


@dataclass
class Batch:
    """The same wishes twice: as tensors of the batch and as each request's own."""

    logits: Tensor
    drafts: Tensor
    settings: Settings
    adjust: Adjust
    allowed: int | None
    samplings: list[Sampling]

    def distribution(self, s: int) -> Tensor:
        """`[W, V]` of sequence s, by the functions for one request."""
        W = self.logits.shape[1]
        scores = self.logits[s].clone()
        if self.adjust.bias is not None:
            scores += self.adjust.bias[s]
        if self.adjust.mask is not None:
            for w, i in itertools.product(range(W), range(scores.shape[-1])):
                if not int(self.adjust.mask[s, w, i // 32]) >> (i % 32) & 1:
                    scores[w, i] = -INF
        counts = seen = None
        if self.adjust.counts is not None:
            counts = self.adjust.counts[s].repeat(W, 1).long()
            for row, draft in enumerate(self.drafts[s].tolist(), start=1):
                counts[row:, draft] += 1
        if self.adjust.seen is not None:
            seen = self.adjust.seen[s]
        return distribution(scores, self.samplings[s], counts, seen, self.allowed)


@st.composite
def batches(draw_: st.DrawFn) -> Batch:
    S, W, V = draw_(st.integers(1, 3)), draw_(st.integers(1, 5)), draw_(st.sampled_from([1, 2, 5, 31, 32, 33, 70]))
    g = torch.Generator().manual_seed(draw_(st.integers(0, 10**6)))
    logits = some_logits(g, S, W, V)
    penalised, with_bias, with_mask = (draw_(st.booleans()) for _ in range(3))
    samplings = [
        Sampling(
            temperature=draw_(st.sampled_from([0.0, 1e-6, 0.25, 1.0, 2.0])),
            top_k=draw_(st.sampled_from([0, 0, 1, 2, 3, 50])),
            top_p=draw_(st.sampled_from([1.0, 1.0, 0.9, 0.5, 1e-9])),
            min_p=draw_(st.sampled_from([0.0, 0.0, 0.1, 1.0])),
            repetition_penalty=draw_(st.sampled_from([1.0, 1.5, 0.5])) if penalised else 1.0,
            presence_penalty=draw_(st.sampled_from([0.0, 0.5, -0.25])) if penalised else 0.0,
            frequency_penalty=draw_(st.sampled_from([0.0, 0.5, -0.25])) if penalised else 0.0,
        )
        for _ in range(S)
    ]

    def column(name: str, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.tensor([getattr(one, name) for one in samplings], dtype=dtype)

    seeds = torch.randint(-(2**62), 2**62, (S,), generator=g)
    chosen = Settings(column("temperature"), column("top_k", torch.int32), column("top_p"), column("min_p"), seeds)
    adjust = Adjust()
    if with_bias:
        adjust = adjust._replace(bias=torch.randn(S, V, generator=g, dtype=torch.float64))
    if with_mask:
        mask = torch.randint(-(2**31), 2**31, (S, W, -(-V // 32)), generator=g).to(torch.int32)
        mask[..., 0] |= 1  # the first token has a finite logit
        adjust = adjust._replace(mask=mask)
    if penalised:
        adjust = adjust._replace(
            counts=torch.randint(0, 3, (S, V), generator=g, dtype=torch.int32),
            seen=torch.rand(S, V, generator=g) < 0.3,
            repetition=column("repetition_penalty"),
            presence=column("presence_penalty"),
            frequency=column("frequency_penalty"),
        )
    drafts = torch.randint(V, (S, W - 1), generator=g)
    return Batch(logits, drafts, chosen, adjust, draw_(st.sampled_from([None, max(1, V - 3)])), samplings)


def grid(monkeypatch: pytest.MonkeyPatch, n: int, axes: list[tuple[int, int | None]]) -> None:
    """Uniform numbers that, over seeds 0 to n ** len(axes) - 1, are the midpoints of a grid: the number of axis i, a
    stream at a position (None: at all of them alike), in the seed's i-th digit in base n. Any other number is 0.5."""

    def on_grid(seed: Tensor, position: Tensor, stream: int) -> Tensor:
        digit = torch.full(torch.broadcast_shapes(seed.shape, position.shape), (n - 1) / 2, dtype=torch.float64)
        for i, (of, at) in enumerate(axes):
            if of == stream:
                here = torch.full_like(position, True, dtype=torch.bool) if at is None else position == at
                digit = (seed // n**i % n).double().where(here, digit)
        return (digit + 0.5) / n

    monkeypatch.setattr(sample, "uniform", on_grid)


# ---- uniform numbers ----------------------------------------------------------------------------------------------


def test_uniform_numbers_are_splitmix64_s() -> None:
    """The published sequence from state 0, which a stream's start takes the place of."""
    z = torch.tensor([sample.GOLDEN], dtype=torch.int64)
    assert int(sample._mix(z)) % 2**64 == 0xE220A8397B1DCDAF
    wrapped = (2 * sample.GOLDEN + 2**63) % 2**64 - 2**63
    assert int(sample._mix(torch.tensor([wrapped]))) % 2**64 == 0x6E789E6AA1B965F4


def test_uniform_numbers_are_in_range_even_and_independent_of_shape() -> None:
    seeds = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63)])
    u = torch.stack([uniform(seeds[:, None], torch.arange(4000), stream) for stream in (0, 1, 2)])
    assert u.dtype == torch.float64 and ((u >= 0) & (u < 1)).all()
    counts = torch.histc(u.flatten(), 50, 0, 1)
    assert float(((counts - 1200) ** 2 / 1200).sum()) < 49 + 5 * math.sqrt(2 * 49)
    flat = u.reshape(-1, 4000)
    correlation = torch.corrcoef(flat) - torch.eye(len(flat), dtype=torch.float64)
    assert correlation.abs().max() < 5 / math.sqrt(4000)
    shifted = torch.corrcoef(torch.cat((flat[:, 1:], flat[:, :-1])))[len(flat) :, : len(flat)]
    assert shifted.abs().max() < 5 / math.sqrt(4000)
    assert uniform(seeds[3:4], torch.tensor([77]), 2) == u[2, 3, 77]


# ---- distributions ------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(batch=batches())
def test_each_row_has_the_distribution_that_its_request_would_have_alone(batch: Batch) -> None:
    scores = sample._adjusted(batch.logits, batch.drafts, batch.allowed, batch.adjust)
    probs, fine = sample._distributions(scores, batch.settings)
    for s in range(len(batch.samplings)):
        torch.testing.assert_close(probs[s], batch.distribution(s), atol=1e-15, rtol=1e-12)
    assert fine.all() and probs.dtype == torch.float64


@settings(max_examples=100, deadline=None)
@given(batch=batches())
def test_drafts_are_drawn_from_the_probabilities_that_are_given(batch: Batch) -> None:
    adjust = batch.adjust._replace(mask=None if batch.adjust.mask is None else batch.adjust.mask[:, :1])
    positions = torch.arange(len(batch.samplings)) + 7
    rest = (batch.logits[:, 0], positions, batch.settings, batch.allowed, adjust)
    token, probs = draw(*rest, want_probs=True)
    assert probs is not None and (probs.gather(1, token[:, None]) > 0).all()
    for s, sampling in enumerate(batch.samplings):
        torch.testing.assert_close(probs[s], batch.distribution(s)[0], atol=1e-15, rtol=1e-12)
        if sampling.greedy:
            assert int(token[s]) == int(probs[s].argmax()) and float(probs[s].max()) == 1
    again, nothing = draw(*rest)
    assert nothing is None and torch.equal(again, token)


@settings(max_examples=100, deadline=None)
@given(batch=batches(), chosen=st.booleans())
def test_no_token_is_taken_that_has_no_probability(batch: Batch, chosen: bool) -> None:
    S, W, V = batch.logits.shape
    q = None if chosen else torch.full((S, W - 1, V), 1 / V, dtype=torch.float64)
    accepted, token = verify(
        batch.logits, batch.drafts, q, torch.zeros(S, dtype=torch.int64), batch.settings, batch.allowed, batch.adjust
    )
    for s in range(S):
        p = batch.distribution(s)
        tokens = [*batch.drafts[s, : int(accepted[s])].tolist(), int(token[s])]
        assert all(p[j, one] > 0 for j, one in enumerate(tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_logits_are_sampled_in_float32(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    logits = some_logits(g, 2, 40).to(dtype)
    one = torch.ones(2)
    chosen = Settings(one * 0.7, torch.tensor([0, 5]).int(), one, 0 * one, torch.arange(2))
    _, probs = draw(logits, torch.zeros(2).long(), chosen, want_probs=True)
    assert probs is not None and probs.dtype == torch.float32
    _, wide = draw(logits.float(), torch.zeros(2).long(), chosen, want_probs=True)
    assert wide is not None and torch.equal(probs, wide)


def plain(S: int, seed: Tensor | None = None, temperature: float = 1.0) -> Settings:
    one = torch.ones(S)
    return Settings(one * temperature, torch.zeros(S).int(), one, 0 * one, torch.arange(S) if seed is None else seed)


def test_logits_are_left_as_they_are() -> None:
    logits = torch.randn(2, 3, 9)
    before = logits.clone()
    drafts = torch.zeros(2, 2).long()
    adjust = Adjust(bias=torch.ones(2, 9), repetition=torch.ones(2) * 2, presence=torch.ones(2))
    verify(logits, drafts, torch.full((2, 2, 9), 1 / 9), torch.zeros(2).long(), plain(2), 8, adjust)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("u, token", [(0.0, 1), (0.25 - 2**-53, 1), (0.25, 3), (1 - 2**-53, 3)])
def test_no_draw_falls_on_a_token_without_probability(u: float, token: int) -> None:
    weights = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0])
    assert sample._invert(weights, torch.tensor(u, dtype=torch.float64)) == token
    tiny = weights.double() * 3e-310  # u · sum rounds up
    assert sample._invert(tiny, torch.tensor(u, dtype=torch.float64)) in (1, 3)


# ---- greedy -------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), W=st.integers(1, 5), agree=st.booleans(), q=st.sampled_from(["none", "flat", "one"]))
def test_greedy_is_plain_greedy_whatever_is_drafted(seed: int, W: int, agree: bool, q: str) -> None:
    S, V = 4, 6
    g = torch.Generator().manual_seed(seed)
    logits = torch.tensor(HARD)[torch.randint(len(HARD), (S, W, V), generator=g)].float()
    logits[..., 2] = 0.5
    best = torch.tensor([[row.index(max(row)) for row in rows] for rows in logits.tolist()])
    drafts = best[:, :-1] if agree else torch.randint(V, (S, W - 1), generator=g)
    probs = None if q == "none" else torch.full((S, W - 1, V), 1 / V)
    if q == "one" and probs is not None:
        probs = torch.zeros_like(probs).scatter_(2, drafts[..., None], 1.0)
    positions = torch.arange(S)
    right = (drafts == best[:, :-1]).long().cumprod(1).sum(1)
    expected = best.gather(1, right[:, None]).squeeze(1)
    for static in (True, False):
        accepted, token = verify(logits, drafts, probs, positions, plain(S, temperature=0.0), greedy=static)
        assert torch.equal(accepted, right) and torch.equal(token, expected)
        drafted, one_hot = draw(logits[:, 0], positions, plain(S, temperature=0.0), want_probs=True, greedy=static)
        assert torch.equal(drafted, best[:, 0]) and one_hot is not None
        assert torch.equal(one_hot, torch.eye(V)[best[:, 0]])


# ---- speculation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("W, n", [(1, 300), (2, 60), (3, 12)])
@pytest.mark.parametrize("filtered", [False, True])
def test_drawn_drafts_leave_the_models_distribution(
    W: int, n: int, filtered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every draft, with its probability, verified under every outcome of a grid of uniform numbers. What comes after a
    call's token is drawn from the further rows, which do not depend on what came before."""
    V, calls = 3, n**W
    g = torch.Generator().manual_seed(W)
    logits, drafter = (torch.randn(W, V, generator=g, dtype=torch.float64) for _ in range(2))
    grid(monkeypatch, n, [(sample.TAKE, None), *((sample.ACCEPT, j) for j in range(W - 1))])
    chosen = plain(calls)._replace(top_k=torch.full((calls,), 2 if filtered else 0).int())
    p = sample._distributions(logits[None], plain(1)._replace(top_k=chosen.top_k[:1]))[0][0]
    q = drafter[:-1].softmax(-1)
    out = torch.zeros((V,) * W, dtype=torch.float64)
    for drafts in itertools.product(range(V), repeat=W - 1):
        ids = torch.tensor(drafts, dtype=torch.int64).expand(calls, W - 1)
        many = (logits.expand(calls, W, V), ids, q.expand(calls, W - 1, V))
        accepted, token = verify(*many, torch.zeros(calls).long(), chosen)
        ends, counts = (accepted * V + token).unique(return_counts=True)
        for end, count in zip(ends.tolist(), counts.tolist(), strict=True):
            kept = end // V
            later = torch.ones((), dtype=torch.float64)
            for j in range(kept + 1, W):
                later = later[..., None] * p[j]
            weight = math.prod(float(q[j, x]) for j, x in enumerate(drafts)) * count / calls
            out[(*drafts[:kept], end % V)] += weight * later
    expected = p[0]
    for j in range(1, W):
        expected = expected[..., None] * p[j]
    torch.testing.assert_close(out, expected, atol=1.5 / n, rtol=0)  # an interval's ends are off by half a step each


@pytest.mark.parametrize("drafter", ["drawn", "chosen", "none"])
@pytest.mark.parametrize("W", [2, 3, 4])
def test_sequences_are_drawn_as_the_model_draws_them(W: int, drafter: str) -> None:
    """By seeds, with the real uniform numbers: chi-square of W tokens, over calls until there are W."""
    S, V = 20_000, 3
    g = torch.Generator().manual_seed(10 + W)
    logits, hints = (torch.randn(W, V, generator=g) * 1.5 for _ in range(2))
    p = logits.double().softmax(-1)
    chosen, start = plain(S, torch.arange(S) * 7919), 100
    q = hints[:-1].softmax(-1).expand(S, W - 1, V)
    if drafter == "drawn":
        columns = [draw(hints[j].expand(S, V), torch.full((S,), start + j), chosen)[0] for j in range(W - 1)]
        drafts = torch.stack(columns, 1)
    else:
        drafts = hints[:-1].argmax(-1).expand(S, W - 1) if drafter == "chosen" else torch.full((S, W - 1), -1)
    probs = q if drafter == "drawn" else None
    accepted, token = verify(logits.expand(S, W, V), drafts, probs, torch.full((S,), start), chosen)
    tokens = torch.cat((drafts, torch.zeros(S, 1).long()), 1).scatter_(1, accepted[:, None], token[:, None])
    for j in range(1, W):  # the rest is drawn without drafts, at its own position
        later = draw(logits[j].expand(S, V), torch.full((S,), start + j), chosen._replace(seed=chosen.seed + 1))[0]
        tokens[:, j] = torch.where(j > accepted, later, tokens[:, j])
    code = (tokens * V ** torch.arange(W)).sum(1)
    counts = torch.bincount(code, minlength=V**W).double()
    grids = torch.tensor(list(itertools.product(range(V), repeat=W)))  # the first changes slowest
    expected = S * torch.stack([p[j, grids[:, j]] for j in range(W)]).prod(0)
    counts = counts[(grids * V ** torch.arange(W)).sum(1)]
    statistic, freedom = float(((counts - expected) ** 2 / expected).sum()), V**W - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)
    # No more rejections than there need be: min(p, q) of drawn drafts, p of chosen ones.
    if drafter == "none":
        assert (accepted == 0).all()
        return
    keep = torch.minimum(p[:-1], hints[:-1].double().softmax(-1)).sum(-1)
    if drafter == "chosen":
        keep = p[:-1].gather(1, drafts[:1].T).squeeze(1)
    share = torch.cat((1 - keep, torch.ones(1))) * torch.cat((torch.ones(1), keep.cumprod(0)))
    lengths = torch.bincount(accepted, minlength=W).double()
    assert float(((lengths - S * share) ** 2 / (S * share)).sum()) < W - 1 + 5 * math.sqrt(2 * W)


@settings(max_examples=60, deadline=None)
@given(batch=batches())
def test_chosen_drafts_change_no_token(batch: Batch) -> None:
    """With the logits of each place given, a text is the same with good drafts, bad drafts and none."""
    S, W, _ = batch.logits.shape
    batch.adjust = batch.adjust._replace(counts=None, repetition=None, presence=None, frequency=None)
    rest = (batch.settings, batch.allowed)

    def text(s: int, drafts: list[int]) -> list[int]:
        tokens: list[int] = []
        while len(tokens) < W:
            here = [*drafts[len(tokens) : W - 1]]
            part = slice(len(tokens), len(tokens) + len(here) + 1)
            mask = None if batch.adjust.mask is None else batch.adjust.mask[s : s + 1, part]
            bias = None if batch.adjust.bias is None else batch.adjust.bias[s : s + 1]
            one = Settings(*(x[s : s + 1] for x in rest[0]))
            ids = torch.tensor([here], dtype=torch.int64)
            at = torch.tensor([len(tokens)])
            n, t = verify(batch.logits[s : s + 1, part], ids, None, at, one, rest[1], Adjust(bias, mask))
            tokens += [*here[: int(n)], int(t)]
        return tokens

    for s in range(S):
        without = text(s, [-1] * (W - 1))
        assert text(s, without[:-1]) == without == text(s, batch.drafts[s].tolist())


def test_a_draft_from_the_models_own_distribution_is_always_kept() -> None:
    S, W, V = 200, 3, 6
    logits = torch.randn(W, V, generator=torch.Generator().manual_seed(7))
    columns = [draw(logits[j].expand(S, V), torch.full((S,), j), plain(S), want_probs=True) for j in range(W - 1)]
    drafts, q = torch.stack([c[0] for c in columns], 1), torch.stack([c[1] for c in columns if c[1] is not None], 1)
    assert (verify(logits.expand(S, W, V), drafts, q, torch.zeros(S).long(), plain(S))[0] == W - 1).all()


def test_a_missing_draft_ends_the_drafts() -> None:
    """-1 is never kept, what follows it is not looked at, and the token comes from the model's own distribution."""
    S, V = 500, 4
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(3))
    drafts = torch.tensor([[-1, 2]]).expand(S, 2)
    q = torch.full((S, 2, V), float("nan"))
    q[:, 1] = 1 / V
    alone = verify(logits[:1].expand(S, 1, V), drafts[:, :0], None, torch.zeros(S).long(), plain(S))
    for probs in (q, None):
        accepted, token = verify(logits.expand(S, 3, V), drafts, probs, torch.zeros(S).long(), plain(S))
        assert (accepted == 0).all() and torch.equal(token, alone[1])


def test_an_empty_residual_falls_back_on_the_model() -> None:
    logits = torch.tensor([[[0.0, -INF], [0.0, 0.0]]])
    q = torch.tensor([[[1.0, 0.0]]])  # a certainty for another token than the draft
    accepted, token = verify(logits, torch.tensor([[1]]), q, torch.tensor([0]), plain(1))
    assert (int(accepted), int(token)) == (0, 0)


# ---- one sequence and its batch -----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(batch=batches(), chosen=st.booleans())
def test_a_sequence_gets_the_same_tokens_alone(batch: Batch, chosen: bool) -> None:
    S, W, V = batch.logits.shape
    g = torch.Generator().manual_seed(0)
    q = None if chosen else torch.rand(S, W - 1, V, generator=g, dtype=torch.float64).softmax(-1)
    positions = torch.arange(S) * 11
    together = verify(batch.logits, batch.drafts, q, positions, batch.settings, batch.allowed, batch.adjust)
    for s in range(S):
        part = slice(s, s + 1)
        alone = verify(
            batch.logits[part], batch.drafts[part], None if q is None else q[part], positions[part],
            Settings(*(x[part] for x in batch.settings)), batch.allowed,
            Adjust(*(None if x is None else x[part] for x in batch.adjust)),
        )  # fmt: skip
        assert alone[0] == together[0][s] and alone[1] == together[1][s]


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
    accepted, token = verify(logits, drafts, q, torch.zeros(S).long(), plain(S), greedy=greedy)
    assert accepted.tolist() == [2, 0, 0] and token.tolist() == [1, -1, 1]
    drafted, probs = draw(logits[:, 1], torch.zeros(S).long(), plain(S), want_probs=True, greedy=greedy)
    assert drafted.tolist() == [1, -1, -1] and probs is not None and probs.sum(-1).tolist() == [1, 0, 0]


def test_what_is_not_a_number_at_an_id_that_is_not_allowed_does_no_harm() -> None:
    logits = torch.tensor([[[0.0, 1.0, float("nan"), INF]]])
    none = torch.zeros(1, 0).long()
    assert verify(logits, none, None, torch.tensor([0]), plain(1), allowed=2)[1] >= 0
    mask = Adjust(mask=torch.tensor([[[3]]], dtype=torch.int32))
    assert verify(logits, none, None, torch.tensor([0]), plain(1), adjust=mask, greedy=True)[1] == 1


# ---- reporting ----------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(V=st.integers(1, 40), n=st.integers(0, 50), narrow=st.booleans(), seed=st.integers(0, 1000))
def test_likeliest_is_top_logprobs_of_each_row(V: int, n: int, narrow: bool, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 3, V, generator=g)
    tokens = torch.randint(V, (2, 3), generator=g)
    allowed = None if narrow else V - V // 3
    if allowed is not None:
        tokens %= allowed
    own, ids, values = likeliest(logits, tokens, n, allowed)
    for s, w in itertools.product(range(2), range(3)):
        expected, top = top_logprobs(logits[s, w, :allowed], int(tokens[s, w]), n)
        assert float(own[s, w]) == pytest.approx(expected, abs=1e-5)
        assert ids[s, w].tolist() == [i for i, _ in top]
        assert values[s, w].tolist() == pytest.approx([v for _, v in top], abs=1e-5)


def test_a_prompts_id_that_does_not_count_has_no_probability() -> None:
    """As of a vocabulary that is wider than the tokenizer's, whose ids a prompt may hold."""
    own, ids, _ = likeliest(torch.zeros(1, 3, 8), torch.tensor([[5, 6, 7]]), 2, allowed=6)
    assert own[0].tolist() == [pytest.approx(-math.log(6)), -math.inf, -math.inf] and int(ids.max()) < 6


def test_an_unknown_path_is_refused() -> None:
    with pytest.raises(ValueError, match="path: expected 'reference' or 'triton', got 'fast'"):
        draw(torch.zeros(1, 2), torch.zeros(1).long(), plain(1), path="fast")
