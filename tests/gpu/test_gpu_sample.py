"""The sampling kernels on a GPU against the reference in float64: distributions, tokens, what CUDA graphs ask for."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from abyssal.ops import sample
from abyssal.ops.sample import Adjust, Settings, draw, likeliest, uniform, verify

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

INF = float("inf")
# temperature, top-k, top-p, min-p: every sequence of a batch has the next of these
WISHES = [(1.0, 0, 1.0, 0.0), (0.0, 0, 1.0, 0.0), (0.6, 0, 0.95, 0.0), (1.0, 50, 1.0, 0.0), (0.8, 40, 0.9, 0.0),
          (1.5, 0, 1.0, 0.02), (1.0, 1, 1.0, 0.0), (1.0, 0, 1e-9, 0.0), (0.7, 1000, 0.8, 1e-4),
          (2.0, 200000, 0.999, 0.0), (1e-4, 0, 0.9, 0.0), (1e-6, 3, 0.5, 0.5)]  # fmt: skip
VOCABULARIES = [129280, 102401, 32000, 8193, 33, 1]


def wishes(S: int, seed: int = 0) -> Settings:
    rows = [WISHES[s % len(WISHES)] for s in range(S)]
    g = torch.Generator().manual_seed(seed)
    temperature, top_k, top_p, min_p = (torch.tensor(column) for column in zip(*rows))
    seeds = torch.randint(-(2**62), 2**62, (S,), generator=g)
    floats = [x.float().cuda() for x in (temperature, top_p, min_p)]
    return Settings(floats[0], top_k.int().cuda(), floats[1], floats[2], seeds.cuda())


def some_logits(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, peaked: bool = False) -> Tensor:
    """With a number in every row; `peaked` as a trained model's: a few tokens far above the others."""
    g = torch.Generator("cuda").manual_seed(seed)
    logits = 3 * torch.randn(shape, generator=g, device="cuda")
    if peaked:
        logits += 12 * (torch.rand(shape, generator=g, device="cuda") < 2e-4)
    logits = logits.masked_fill(torch.rand(shape, generator=g, device="cuda") < 0.02, -INF)
    logits[..., 0] = 0.0
    return logits.to(dtype)


def some_adjust(S: int, W: int, V: int, which: str) -> Adjust:
    g = torch.Generator("cuda").manual_seed(S)
    none = Adjust()
    if which in ("bias", "all"):
        none = none._replace(bias=torch.randn(S, V, generator=g, device="cuda"))
    if which in ("mask", "all"):
        mask = torch.randint(-(2**31), 2**31, (S, W, -(-V // 32)), generator=g, device="cuda").int()
        mask[..., 0] |= 1
        none = none._replace(mask=mask)
    if which in ("penalties", "all"):
        none = none._replace(
            counts=torch.randint(0, 3, (S, V), generator=g, device="cuda").int(),
            seen=torch.rand(S, V, generator=g, device="cuda") < 0.3,
            repetition=0.5 + torch.rand(S, generator=g, device="cuda"),
            presence=torch.rand(S, generator=g, device="cuda"),
            frequency=torch.rand(S, generator=g, device="cuda") - 0.5,
        )
    return none


def check_probabilities(found: Tensor, exact: Tensor, chosen: Settings) -> None:
    """Equal to rounding, but that at the end of a nucleus rounding may decide on a token or several equal ones."""
    torch.testing.assert_close(found.double().sum(-1), torch.ones_like(exact[:, 0]), atol=1e-5, rtol=0)
    apart = (found.double() - exact).abs().sum(-1)
    kept = ((found > 0) != (exact > 0)).sum(-1)
    whole = chosen.top_p == 1
    smallest = exact.where(exact > 0, INF).amin(-1)
    # The last token's weight and the share of what is renormalised.
    assert (apart[whole] < 1e-4).all() and (apart <= 1e-4 + 2 * kept * smallest * (~whole)).all()
    counted = whole & (chosen.min_p == 0) & (chosen.top_k > 0)
    assert torch.equal((found > 0).sum(-1)[counted], (exact > 0).sum(-1)[counted])


def check_draw(token: Tensor, probs: Tensor, u: Tensor) -> None:
    """The token is the one at which the running sum of `probs [S, V]` passes `u [S]`, to rounding."""
    running = probs.double().cumsum(-1)
    target = u * running[:, -1]
    after = running.gather(1, token[:, None]).squeeze(1)
    before = after - probs.double().gather(1, token[:, None]).squeeze(1)
    assert (probs.gather(1, token[:, None]) > 0).all()
    assert (before <= target + 1e-5).all() and (after >= target - 1e-5).all()


def exact_probabilities(
    logits: Tensor, drafts: Tensor, chosen: Settings, allowed: int | None, adjust: Adjust
) -> Tensor:
    scores = sample._adjusted(logits.double(), drafts, allowed, adjust)
    return sample._distributions(scores, chosen)[0]


@contextmanager
def no_waiting() -> Iterator[None]:
    """An error where the host would wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("V", VOCABULARIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_drafts_are_drawn_from_the_reference_s_distribution(V: int, dtype: torch.dtype) -> None:
    S = 24
    chosen = wishes(S)
    positions = torch.arange(S, device="cuda") * 1001
    for peaked in (False, True):
        logits = some_logits((S, V), dtype, seed=V, peaked=peaked)
        token, probs = draw(logits, positions, chosen, want_probs=True)
        assert probs is not None and probs.dtype == torch.float32
        exact = exact_probabilities(logits[:, None], positions[:0], chosen, None, Adjust())[:, 0]
        check_probabilities(probs, exact, chosen)
        check_draw(token, probs, uniform(chosen.seed, positions, sample.DRAFT))
        greedy = chosen.temperature < sample.GREEDY
        assert torch.equal(token[greedy], logits.float().argmax(-1)[greedy])
        alone = draw(logits, positions, chosen)
        assert alone[1] is None and torch.equal(alone[0], token)


@pytest.mark.parametrize("V", [129280, 5001])
@pytest.mark.parametrize("which", ["none", "bias", "mask", "penalties", "all"])
@pytest.mark.parametrize("narrow", [False, True])
def test_rows_adjusted_beforehand_are_the_reference_s(V: int, which: str, narrow: bool) -> None:
    S, W = 12, 3
    chosen, adjust, allowed = wishes(S), some_adjust(S, W, V, which), V - 1000 if narrow else None
    logits = some_logits((S, W, V), torch.bfloat16, seed=V)
    drafts = torch.randint(V, (S, W - 1), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    drafts[::4, 0] = -1
    positions = torch.arange(S, device="cuda")
    exact = exact_probabilities(logits, drafts, chosen, allowed, adjust)
    from abyssal.kernels.sample_rows import TAKE
    from abyssal.kernels.sample import _described  # isort: skip

    rows = _described(logits, drafts, positions, chosen, allowed, adjust, False, TAKE)
    at = positions[:, None] + torch.arange(W, device="cuda")
    u = uniform(chosen.seed[:, None], at, sample.TAKE)
    for j in range(W):
        some = draw(
            logits[:, j], at[:, j], chosen, allowed,
            adjust._replace(mask=adjust.mask[:, j : j + 1] if adjust.mask is not None else None), want_probs=True,
        )  # fmt: skip
        if j == 0 and some[1] is not None:
            check_probabilities(some[1], exact[:, 0], chosen)
        check_draw_of(rows.tokens.view(S, W)[:, j], exact[:, j], u[:, j], chosen)


def check_draw_of(token: Tensor, exact: Tensor, u: Tensor, chosen: Settings) -> None:
    """As `check_draw`, from exact probabilities: a nucleus that ends a token off moves all by that one's share."""
    smallest = exact.where(exact > 0, INF).amin(-1)
    slack = 1e-4 + 2 * smallest * (chosen.top_p < 1)
    running = exact.cumsum(-1)
    after = running.gather(1, token[:, None]).squeeze(1)
    before = after - exact.gather(1, token[:, None]).squeeze(1)
    assert (before <= u + slack).all() and (after >= u - slack).all()


@pytest.mark.parametrize("S", [1, 7, 128])
@pytest.mark.parametrize("W", [1, 2, 5])
@pytest.mark.parametrize("V", [129280, 10007])
@pytest.mark.parametrize("drafter", ["chosen", "drawn"])
def test_verification_is_the_reference_s(S: int, W: int, V: int, drafter: str) -> None:
    """A draft is kept and a token taken as by the reference, where no random number is within rounding of a border:
    of some hundreds of sequences at most a few are."""
    chosen = wishes(S, seed=W)
    positions = torch.arange(S, device="cuda") * 17
    logits = some_logits((S, W, V), torch.float32, seed=S + W, peaked=True)
    hints = logits[:, :-1] + torch.randn(S, W - 1, V, device="cuda", generator=torch.Generator("cuda").manual_seed(2))
    drafts, q = torch.empty(S, W - 1, dtype=torch.int64, device="cuda"), torch.empty(S, W - 1, V, device="cuda")
    for j in range(W - 1):
        drafts[:, j], probs = draw(hints[:, j], positions + j, chosen, want_probs=True)
        assert probs is not None
        q[:, j] = probs
    drafts[3::5] = -1
    rest = (logits, drafts, q if drafter == "drawn" else None, positions, chosen, V - 7)
    expected, found = verify(*rest, path="reference"), verify(*rest)
    different = (found[0] != expected[0]) | (found[1] != expected[1])
    assert int(different.sum()) <= S // 40 + (1 if S > 1 else 0)
    greedy = chosen.temperature < sample.GREEDY
    assert not bool((different & greedy).any())
    if W > 1 and S == 128:
        assert 0 < int(found[0].sum()) < S * (W - 1)


@pytest.mark.parametrize("S, W, V", [(1, 1, 129280), (1, 3, 129280), (128, 2, 129280), (5, 5, 257), (3, 2, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_greedy_batch_is_the_reference_s_token_by_token(S: int, W: int, V: int, dtype: torch.dtype) -> None:
    """bf16 at a large vocabulary has ties at the top: the first is taken."""
    logits = some_logits((S, W, V), dtype)
    logits[..., V // 2] = logits[..., -1] = 50.0
    logits[0, 0, V // 3 :] = 50.0
    chosen, positions = wishes(S), torch.zeros(S, dtype=torch.int64, device="cuda")
    first = torch.full((S, W), V // 2, device="cuda")
    first[0, 0] = V // 3
    drafts = first[:, :-1].clone()
    drafts[1::3] = 0
    for adjust in (Adjust(), some_adjust(S, W, V, "penalties")):
        expected = verify(logits, drafts, None, positions, chosen, None, adjust, greedy=True, path="reference")
        found = verify(logits, drafts, None, positions, chosen, None, adjust, greedy=True)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    if V > 2:
        assert torch.equal(draw(logits[:, 0], positions, chosen, greedy=True)[0], first[:, 0])


@pytest.mark.parametrize("W", [2, 3])
@pytest.mark.parametrize("drafter", ["chosen", "drawn"])
def test_sequences_are_drawn_as_the_model_draws_them(W: int, drafter: str) -> None:
    """Chi-square of W tokens over many seeds."""
    S, V, start = 100_000, 4, 50
    g = torch.Generator().manual_seed(10 + W)
    logits, hints = (torch.randn(W, V, generator=g).mul(1.5).cuda() for _ in range(2))
    one = torch.ones(S, device="cuda")
    chosen = Settings(one, torch.zeros_like(one).int(), one, 0 * one, torch.arange(S, device="cuda") * 7919)
    at = [torch.full((S,), start + j, device="cuda") for j in range(W)]
    if drafter == "drawn":
        drawn = [draw(hints[j].expand(S, V), at[j], chosen, want_probs=True) for j in range(W - 1)]
        drafts, q = torch.stack([d[0] for d in drawn], 1), torch.stack([d[1] for d in drawn if d[1] is not None], 1)
    else:
        drafts, q = hints[:-1].argmax(-1).expand(S, W - 1), None
    accepted, token = verify(logits.expand(S, W, V), drafts, q, at[0], chosen)
    tokens = torch.cat((drafts, torch.zeros_like(drafts[:, :1])), 1).scatter_(1, accepted[:, None], token[:, None])
    for j in range(1, W):
        later = draw(logits[j].expand(S, V), at[j], chosen._replace(seed=chosen.seed + 1))[0]
        tokens[:, j] = torch.where(j > accepted, later, tokens[:, j])
    places = V ** torch.arange(W, device="cuda")
    counts = torch.bincount((tokens * places).sum(1), minlength=V**W).double()
    digits = torch.arange(V**W, device="cuda")[:, None] // places % V
    p = logits.double().softmax(-1)
    expected = S * torch.stack([p[j, digits[:, j]] for j in range(W)]).prod(0)
    freedom = V**W - 1
    assert float(((counts - expected) ** 2 / expected).sum()) < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    "k, p, floor", [(37, 1.0, 0.0), (0, 0.9, 0.0), (5000, 0.8, 0.0), (20, 0.5, 1e-3), (1, 0.1, 0.0)]
)
def test_of_equals_the_first_ids_are_kept(k: int, p: float, floor: float) -> None:
    S, V = 5, 129280
    logits = some_logits((S, V), torch.float32).mul(2).round().div(2)
    one = torch.ones(S, device="cuda")
    chosen = Settings(one, torch.full_like(one, k).int(), one * p, one * floor, torch.arange(S, device="cuda"))
    _, probs = draw(logits, torch.arange(S, device="cuda"), chosen, want_probs=True)
    assert probs is not None
    check_probabilities(
        probs, exact_probabilities(logits[:, None], one[:0].long(), chosen, None, Adjust())[:, 0], chosen
    )
    for row, kept in zip(logits, probs > 0, strict=True):
        last = row[kept].min()
        equal = kept[row == last]
        assert bool(equal[: int(equal.sum())].all()) and bool(kept[row > last].all())


@pytest.mark.parametrize("bad", [float("nan"), INF, "all"])
@pytest.mark.parametrize("drafter", ["chosen", "drawn"])
@pytest.mark.parametrize("greedy", [True, False])
def test_a_row_without_numbers_costs_its_own_sequence_alone(bad: float | str, drafter: str, greedy: bool) -> None:
    S, W, V = 3, 3, 129280
    logits = torch.zeros(S, W, V, device="cuda")
    logits[..., 1] = 60.0  # certain
    drafts = torch.ones(S, W - 1, dtype=torch.int64, device="cuda")
    drafts[2, 0] = 0  # rejected before the bad row
    q = None if drafter == "chosen" else torch.full((S, W - 1, V), 1 / V, device="cuda")
    if bad == "all":
        logits[1:, 1] = -INF
    else:
        logits[1:, 1, 99_999] = float(bad)
    positions = torch.zeros(S, dtype=torch.int64, device="cuda")
    chosen = wishes(S)
    accepted, token = verify(logits, drafts, q, positions, chosen, greedy=greedy)
    assert accepted.tolist() == [2, 0, 0] and token.tolist() == [1, -1, 1]
    drafted, probs = draw(logits[:, 1], positions, chosen, want_probs=True, greedy=greedy)
    assert drafted.tolist() == [1, -1, -1] and probs is not None
    assert probs.sum(-1).tolist() == pytest.approx([1, 0, 0])


def test_a_sequence_gets_the_same_tokens_in_any_batch() -> None:
    S, W, V = 16, 3, 129280
    chosen, adjust = wishes(S), some_adjust(S, W, V, "all")
    logits = some_logits((S, W, V), torch.bfloat16, peaked=True)
    positions = torch.arange(S, device="cuda")
    drafts = logits[:, :-1].float().argmax(-1)
    q = torch.softmax(logits[:, :-1].float().nan_to_num(neginf=-1e4), -1)
    for probs in (None, q):
        together = verify(logits, drafts, probs, positions, chosen, V - 9, adjust)
        for s in (0, 2, 5, 9, 15):
            part = slice(s, s + 1)
            alone = verify(
                logits[part], drafts[part], None if probs is None else probs[part], positions[part],
                Settings(*(x[part] for x in chosen)), V - 9, Adjust(*(None if x is None else x[part] for x in adjust)),
            )  # fmt: skip
            assert alone[0] == together[0][s] and alone[1] == together[1][s]


@pytest.mark.parametrize("S", [1, 32])
@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("drafter", ["chosen", "drawn"])
def test_a_step_is_captured_in_a_graph_without_waiting(S: int, greedy: bool, drafter: str) -> None:
    """Drafts, their verification, and log-probabilities; replayed over other logits, positions and settings."""
    W, V = 3, 129280
    logits = some_logits((S, W, V), torch.bfloat16, peaked=True)
    chosen, positions = wishes(S), torch.arange(S, device="cuda")
    adjust = some_adjust(S, W, V, "all")

    def step() -> tuple[Tensor, ...]:
        drawn = [
            draw(logits[:, j], positions + j, chosen, V - 3, Adjust(), drafter == "drawn", greedy) for j in range(W - 1)
        ]
        drafts = torch.stack([d[0] for d in drawn], 1)
        q = torch.stack([d[1] for d in drawn if d[1] is not None], 1) if drafter == "drawn" else None
        accepted, token = verify(logits, drafts, q, positions, chosen, V - 3, adjust, greedy)
        rows = torch.cat((drafts, token[:, None]), 1)
        return (drafts, accepted, token, *likeliest(logits, rows, 5, V - 3))

    step()  # compiles
    with no_waiting():
        step()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    for seed in (5, 6):
        logits.copy_(some_logits((S, W, V), torch.bfloat16, seed=seed, peaked=True))
        positions += 100
        for old, new in zip(chosen, wishes(S, seed=seed), strict=True):
            old.copy_(new.roll(seed))
        graph.replay()
        torch.cuda.synchronize()
        for found, expected in zip(outputs, step(), strict=True):
            assert torch.equal(found, expected)


def test_log_probabilities_are_the_reference_s() -> None:
    logits = some_logits((4, 2, 129280), torch.bfloat16)
    tokens = torch.randint(129000, (4, 2), device="cuda")
    own, ids, values = likeliest(logits, tokens, 20, 129000)
    exact = logits[..., :129000].double().log_softmax(-1)
    torch.testing.assert_close(own.double(), exact.gather(2, tokens[..., None]).squeeze(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(values.double(), exact.topk(20).values, atol=1e-4, rtol=0)
    torch.testing.assert_close(values.double(), exact.gather(2, ids), atol=1e-4, rtol=0)


def test_nothing_in_nothing_out_and_logits_that_are_not_contiguous() -> None:
    none = torch.zeros(0, dtype=torch.int64, device="cuda")
    empty = wishes(1)._make(x[:0] for x in wishes(1))
    found = verify(torch.zeros(0, 2, 9, device="cuda"), none.view(0, 1), None, none, empty)
    assert found[0].shape == found[1].shape == (0,)
    wide = some_logits((6, 4, 3000), torch.float32)
    positions, drafts = torch.arange(6, device="cuda"), torch.zeros(6, 1, dtype=torch.int64, device="cuda")
    for logits in (wide[:, 1:3, :2999], wide[:, :2, ::2], wide[:, :, :2].transpose(1, 2)):
        a, b = (verify(x, drafts, None, positions, wishes(6)) for x in (logits, logits.contiguous()))
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
