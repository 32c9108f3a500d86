import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from one_by_one import acceptance, distribution, residual, sample, top_logprobs, verify
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from abyssal.engine.sampling import Sampling

INF = float("inf")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_logits(seed: int, rows: int = 1, vocab: int = 24, dtype=torch.float64) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, generator=generator(seed), dtype=dtype)


# ---- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field, value, error, expected",
    [
        ("max_tokens", 0, ValueError, "an integer 1 or more"),
        ("max_tokens", 1.0, TypeError, "an integer 1 or more"),
        ("max_tokens", True, TypeError, "an integer 1 or more"),
        ("temperature", -0.1, ValueError, "a number 0 (greedy) to a million"),
        ("temperature", math.nan, ValueError, "a number 0 (greedy) to a million"),
        ("temperature", INF, ValueError, "a number 0 (greedy) to a million"),
        ("temperature", 10**400, ValueError, "a number 0 (greedy) to a million"),
        ("temperature", "1", TypeError, "a number 0 (greedy) to a million"),
        ("temperature", None, TypeError, "a number 0 (greedy) to a million"),
        ("top_k", -1, ValueError, "an integer 0 (off) or more"),
        ("top_k", 2.5, TypeError, "an integer 0 (off) or more"),
        ("top_p", 0, ValueError, "a number above 0, at most 1"),
        ("top_p", 1.01, ValueError, "a number above 0, at most 1"),
        ("top_p", math.nan, ValueError, "a number above 0, at most 1"),
        ("min_p", -0.1, ValueError, "a number from 0 to 1"),
        ("min_p", 2, ValueError, "a number from 0 to 1"),
        ("repetition_penalty", 0, ValueError, "a number from 0.01 to 100"),
        ("repetition_penalty", False, TypeError, "a number from 0.01 to 100"),
        ("presence_penalty", 2.5, ValueError, "a number from -2 to 2"),
        ("frequency_penalty", -INF, ValueError, "a number from -2 to 2"),
        ("seed", 2**64, ValueError, "an integer of 64 bits, or None"),
        ("seed", "7", TypeError, "an integer of 64 bits, or None"),
        ("stop", ("a", ""), ValueError, "strings that are not empty"),
        ("stop", "", ValueError, "strings that are not empty"),
        ("stop", (1,), TypeError, "a string or several"),
        ("stop", 1, TypeError, "a string or several"),
        ("logprobs", -1, ValueError, "an integer 0 or more, or None"),
        ("logprobs", True, TypeError, "an integer 0 or more, or None"),
        ("ignore_eos", 1, TypeError, "True or False"),
        ("speculate", "yes", TypeError, "True, False or None"),
    ],
)
def test_bad_settings_are_refused_by_name(field, value, error, expected):
    with pytest.raises(error) as refused:
        Sampling(**{field: value})
    assert str(refused.value) == f"{field}: expected {expected}, got {value!r}"


def test_settings_are_made_uniform():
    assert Sampling(stop="end").stop == ("end",)
    assert Sampling(stop=["a", "b"]).stop == ("a", "b")
    sampling = Sampling(temperature=0, top_p=1)
    assert type(sampling.temperature) is type(sampling.top_p) is float
    assert sampling.greedy and not sampling.penalised
    assert Sampling(presence_penalty=1).penalised and not Sampling().greedy
    assert Sampling(seed=2**64 - 1).seed == 2**64 - 1
    hash(sampling)


# ---- the distribution ---------------------------------------------------------------------------------------------


def by_numpy(logits, s: Sampling, counts, prompt_seen, allowed) -> np.ndarray:
    """One row, written for clarity."""
    x = np.array(logits, dtype=np.float64)
    x[allowed:] = -np.inf
    for i in range(len(x)):
        if counts[i] or prompt_seen[i]:
            x[i] = x[i] / s.repetition_penalty if x[i] > 0 else x[i] * s.repetition_penalty
        x[i] -= s.frequency_penalty * counts[i] + s.presence_penalty * (counts[i] > 0)
    if s.temperature == 0:
        return np.eye(len(x))[int(np.argmax(x))]
    p = np.exp((x - x.max()) / s.temperature)
    p /= p.sum()
    p[p < s.min_p * p.max()] = 0
    order = np.argsort(-p, kind="stable")
    if s.top_k:
        p[order[s.top_k :]] = 0
    p /= p.sum()
    before = 0.0
    for i in order:
        mass, p[i] = p[i], p[i] if before < s.top_p else 0
        before += mass
    return p / p.sum()


@given(
    seed=st.integers(0, 10**6), temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]), top_k=st.integers(0, 30),
    top_p=st.floats(0.01, 1.0), min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    repetition=st.sampled_from([1.0, 0.7, 1.8]), presence=st.sampled_from([0.0, 0.6, -1.1]),
    frequency=st.sampled_from([0.0, 0.4, -0.3]), allowed=st.integers(1, 24),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_distribution_against_numpy(seed, temperature, top_k, top_p, min_p, repetition, presence, frequency, allowed):
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition,
        presence_penalty=presence, frequency_penalty=frequency,
    )  # fmt: skip
    logits = some_logits(seed, rows=3)
    before = logits.clone()
    counts = torch.randint(0, 3, (3, 24), generator=generator(seed))
    seen = torch.rand(24, generator=generator(seed)) < 0.3
    probs = distribution(logits, sampling, counts, seen, allowed)
    expected = np.stack([by_numpy(row, sampling, n, seen, allowed) for row, n in zip(logits.numpy(), counts.numpy())])
    assert torch.equal(logits, before)
    assert probs.dtype == torch.float64
    np.testing.assert_allclose(probs, expected, rtol=1e-6, atol=1e-12)  # penalties act on float32 logits
    np.testing.assert_allclose(probs.sum(-1), 1.0, atol=1e-12)


@given(seed=st.integers(0, 10**6), k=st.integers(1, 24), p=st.floats(0.01, 0.999), m=st.floats(0.001, 1.0))
@settings(max_examples=60, deadline=None)
def test_filters_against_transformers(seed, k, p, m):
    logits = some_logits(seed, rows=2)
    none = torch.zeros(2, 0, dtype=torch.int64)
    sorted_mass = logits.softmax(-1).sort(descending=True).values.cumsum(-1)
    assume(((sorted_mass - p).abs() > 1e-4).all())
    for ours, theirs in [
        (Sampling(top_k=k), TopKLogitsWarper(k)),
        (Sampling(top_p=p), TopPLogitsWarper(p)),
        (Sampling(min_p=m), MinPLogitsWarper(m)),
        (Sampling(temperature=m), TemperatureLogitsWarper(m)),
    ]:
        expected = theirs(none, logits.clone()).softmax(-1)
        torch.testing.assert_close(distribution(logits, ours), expected, atol=1e-10, rtol=1e-9)


@given(seed=st.integers(0, 10**6), k=st.integers(1, 24), p=st.floats(0.01, 0.999), m=st.floats(0.001, 1.0))
@settings(max_examples=60, deadline=None)
def test_the_support_obeys_all_filters_at_once(seed, k, p, m):
    logits = some_logits(seed)
    plain, probs = logits.softmax(-1)[0], distribution(logits, Sampling(top_k=k, top_p=p, min_p=m))[0]
    kept = probs > 0
    assert 1 <= kept.sum() <= k
    assert (plain[kept] >= m * plain.max() * (1 - 1e-12)).all()
    assert kept.all() or plain[kept].min() >= plain[~kept].max()
    ratio = probs[kept] / plain[kept]
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
    # One token fewer would not have reached p, of what the other two filters leave.
    left = distribution(logits, Sampling(top_k=k, min_p=m))[0]
    assert left[kept].sum() >= p - 1e-12 and left[kept].sum() - left[kept].min() < p + 1e-12


def test_repetition_against_transformers():
    logits = some_logits(3, rows=2, dtype=torch.float32)
    prompt, output = torch.tensor([1, 5, 5, 9]), torch.tensor([2, 9, 2])
    theirs = RepetitionPenaltyLogitsProcessor(1.7)(torch.cat((prompt, output)).expand(2, -1), logits.clone())
    counts = torch.bincount(output, minlength=24).expand(2, -1)
    seen = torch.bincount(prompt, minlength=24) > 0
    ours = distribution(logits, Sampling(repetition_penalty=1.7), counts, seen)
    torch.testing.assert_close(ours, theirs.softmax(-1))
    alone = distribution(logits, Sampling(repetition_penalty=1.7), None, seen)
    theirs = RepetitionPenaltyLogitsProcessor(1.7)(prompt.expand(2, -1), logits.clone())
    torch.testing.assert_close(alone, theirs.softmax(-1))


def test_rows_have_counts_of_their_own():
    """Of one request in speculation, each row sees the drafts before it in the output."""
    logits = torch.zeros(3, 4, dtype=torch.float64)
    counts = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0], [0, 2, 1, 0]])
    probs = distribution(logits, Sampling(frequency_penalty=1.0, presence_penalty=0.5), counts)
    penalties = torch.tensor([[0, 0, 0, 0], [0, 1.5, 0, 0], [0, 2.5, 1.5, 0]], dtype=torch.float64)
    torch.testing.assert_close(probs, (-penalties).softmax(-1))


def test_greedy_is_the_limit_of_temperature_to_zero():
    logits = some_logits(11, rows=50)
    greedy = distribution(logits, Sampling(temperature=0))
    assert torch.equal(greedy.argmax(-1), logits.argmax(-1))
    assert torch.equal(greedy.sum(-1), torch.ones(50, dtype=torch.float64)) and greedy.max() == 1
    torch.testing.assert_close(distribution(logits, Sampling(temperature=2e-5)), greedy)
    for least in (1e-6, 5e-324):
        assert torch.equal(distribution(logits, Sampling(temperature=least)), greedy)
    assert torch.equal(distribution(logits, Sampling(top_k=1)), greedy)
    assert torch.equal(distribution(logits, Sampling(top_p=1e-9)), greedy)


def test_of_equals_the_first_is_kept():
    """bfloat16 rounds many logits to the same number."""
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0, 2.0]])
    for first in (Sampling(temperature=0), Sampling(top_k=1), Sampling(top_p=0.1)):
        assert distribution(logits, first).tolist() == [[0, 1, 0, 0, 0]]
    # A share so small that it underflows still leaves one token.
    least = Sampling(top_p=5e-324, min_p=0.9)
    assert distribution(torch.zeros(1, 8), least).tolist() == [[1, 0, 0, 0, 0, 0, 0, 0]]
    assert distribution(torch.tensor([[0.1, *[0.0] * 9]]), Sampling(top_p=5e-324, min_p=1.0))[0, 0] == 1
    assert distribution(logits, Sampling(top_k=2)).tolist() == [[0, 0.5, 0.5, 0, 0]]
    wide = torch.zeros(1, 50_000, dtype=torch.bfloat16)
    assert distribution(wide, Sampling(top_k=100))[0].nonzero().flatten().tolist() == list(range(100))


@pytest.mark.parametrize("extreme", [Sampling(temperature=1e6), Sampling(temperature=2e-5, top_p=0.5)])
def test_extreme_temperatures_stay_finite(extreme):
    probs = distribution(1e4 * some_logits(5, rows=4, dtype=torch.float32), extreme)
    assert probs.isfinite().all()
    torch.testing.assert_close(probs.sum(-1), torch.ones(4))


@pytest.mark.parametrize("dtype, wide", [
    (torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)
])  # fmt: skip
def test_float32_or_wider(dtype, wide):
    logits = some_logits(0, dtype=torch.float64).to(dtype)
    for sampling in (Sampling(), Sampling(temperature=0), Sampling(top_k=3, top_p=0.9, min_p=0.01)):
        assert distribution(logits, sampling).dtype == wide


def test_ids_beyond_the_tokenizer_are_never_sampled():
    logits = torch.arange(8.0)[None]
    for sampling in (Sampling(), Sampling(temperature=0), Sampling(top_k=8), Sampling(top_p=0.99)):
        probs = distribution(logits, sampling, allowed=5)
        assert not probs[:, 5:].any() and probs[0].argmax() == 4
    counts = torch.ones(1, 8, dtype=torch.int64)
    probs = distribution(logits, Sampling(repetition_penalty=0.1, frequency_penalty=-2.0), counts, None, 5)
    assert not probs[:, 5:].any()


@pytest.mark.parametrize("bad", [math.nan, INF])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0)])
def test_logits_that_are_not_numbers_are_refused(bad, sampling):
    logits = some_logits(0, rows=2)
    logits[1, 7] = bad
    with pytest.raises(ValueError, match="logits: expected numbers, got NaN or infinity"):
        distribution(logits, sampling)
    with pytest.raises(ValueError, match="logits"):
        distribution(torch.full((1, 5), -INF), sampling)
    ruled_out = distribution(torch.tensor([[-INF, 1.0]]), sampling)
    assert ruled_out.tolist() == [[0, 1]]


def test_a_large_vocabulary_is_not_sorted_whole_and_the_answer_is_the_same():
    logits = some_logits(2, vocab=50_000)
    for p in (0.5, 0.95, 0.9999999):
        ordered, ids = logits.softmax(-1)[0].sort(descending=True)
        kept = ids[: int((ordered.cumsum(0) < p).sum()) + 1]
        probs = distribution(logits, Sampling(top_p=p))[0]
        assert set(probs.nonzero().flatten().tolist()) == set(kept.tolist())


# ---- drawing ------------------------------------------------------------------------------------------------------


def chi_square(counts, expected) -> float:
    """Pearson's statistic in standard deviations above its mean."""
    kept = expected > 0
    assert not counts[~kept].any()
    statistic = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    freedom = kept.sum() - 1
    return float((statistic - freedom) / np.sqrt(2 * freedom))


def test_draws_follow_the_distribution():
    probs = torch.tensor([0.0, 0.1, 0.35, 0.0, 0.05, 0.5, 0.0])
    rng, draws = generator(0), 20_000
    counts = np.bincount([sample(probs, rng) for _ in range(draws)], minlength=7)
    assert chi_square(counts, draws * probs.numpy()) < 4


def test_a_seed_gives_the_same_draws_and_one_uniform_number_each():
    probs = distribution(some_logits(4), Sampling())[0]
    first, second = generator(9), generator(9)
    draws = [sample(probs, first) for _ in range(50)]
    assert draws == [sample(probs, second) for _ in range(50)]
    assert draws != [sample(probs, generator(10)) for _ in range(50)]
    third = generator(9)
    torch.rand(50, dtype=torch.float64, generator=third)
    assert torch.equal(first.get_state(), third.get_state())


@pytest.mark.parametrize("u, token", [(0.0, 1), (0.25 - 2**-53, 1), (0.25, 3), (1 - 2**-53, 3)])
def test_no_draw_falls_on_a_token_without_probability(monkeypatch, u, token):
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([u], dtype=torch.float64))
    assert sample(torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0]), generator(0)) == token
    tiny = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0], dtype=torch.float64) * 3e-310  # u · total rounds up
    assert sample(tiny, generator(0)) in (1, 3)


# ---- speculation --------------------------------------------------------------------------------------------------


def random_rows(seed: int, rows: int, vocab: int, zeros: bool) -> torch.Tensor:
    return distribution(some_logits(seed, rows, vocab), Sampling(top_k=vocab - 2 if zeros else 0))


@given(seed=st.integers(0, 10**6), zeros=st.booleans(), vocab=st.integers(3, 6))
@settings(max_examples=100, deadline=None)
def test_kept_or_replaced_a_token_is_distributed_as_the_models(seed, zeros, vocab):
    """Σ over drafts x: q(x)·accept(x)·[y = x] + q(x)·(1 − accept(x))·residual(y) = p(y), in float64."""
    p, q = random_rows(seed, 1, vocab, zeros)[0], random_rows(seed + 1, 1, vocab, zeros)[0]
    kept = acceptance(p, q)
    assert ((kept >= 0) & (kept <= 1)).all()
    output = q * kept + (q * (1 - kept)).sum() * residual(p, q)
    torch.testing.assert_close(output, p, atol=1e-14, rtol=0)
    torch.testing.assert_close(residual(p, q).sum(), torch.tensor(1.0, dtype=torch.float64))


def emitted(p: torch.Tensor, q: torch.Tensor, length: int) -> dict[tuple[int, ...], float]:
    """Exact probabilities of the first `length` tokens, over every draft and every outcome of its verification.

    `p [k+1, vocab]` and `q [k, vocab]` depend on the place alone, so that what follows a rejection is drawn from
    p's further rows.
    """
    k, vocab = q.shape
    out: dict[tuple[int, ...], float] = {}
    for drafts in itertools.product(range(vocab), repeat=k):
        chance = math.prod(float(q[i, x]) for i, x in enumerate(drafts))
        for accepted in range(k + 1):
            here = chance
            for i in range(accepted):
                here *= float(acceptance(p[i], q[i])[drafts[i]])
            if accepted < k:
                here *= 1 - float(acceptance(p[accepted], q[accepted])[drafts[accepted]])
                follow = residual(p[accepted], q[accepted])
            else:
                follow = p[k]
            for token in range(vocab):
                rest = itertools.product(range(vocab), repeat=length - accepted - 1)
                for tail in rest:
                    later = math.prod(float(p[accepted + 1 + j, t]) for j, t in enumerate(tail))
                    tokens = (*drafts[:accepted], token, *tail)
                    out[tokens] = out.get(tokens, 0.0) + here * float(follow[token]) * later
    return out


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("zeros", [False, True])
def test_sequences_are_distributed_exactly_as_the_models(k, zeros):
    vocab = 4 if k < 3 else 3
    p, q = random_rows(20 + k, k + 1, vocab, zeros), random_rows(30 + k, k, vocab, zeros)
    output = emitted(p, q, k + 1)
    for tokens in itertools.product(range(vocab), repeat=k + 1):
        expected = math.prod(float(p[i, t]) for i, t in enumerate(tokens))
        assert output.get(tokens, 0.0) == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("zeros", [False, True])
def test_verify_draws_sequences_as_the_model_does(k, zeros):
    vocab, draws, rng = 4, 8_000, generator(k)
    p, q = random_rows(40 + k, k + 1, vocab, zeros).float(), random_rows(50 + k, k, vocab, zeros).float()
    counts = np.zeros((vocab,) * (k + 1))
    lengths = np.zeros(k + 1)
    for _ in range(draws):
        drafts = torch.tensor([sample(row, rng) for row in q])
        accepted, token = verify(drafts, q, p, rng)
        tokens = [*drafts[:accepted].tolist(), token]
        lengths[accepted] += 1
        tokens += [sample(row, rng) for row in p[len(tokens) :]]
        counts[tuple(tokens)] += 1
    expected = p[0].double().numpy()
    for row in p[1:].double().numpy():
        expected = np.multiply.outer(expected, row)
    assert chi_square(counts.flatten(), draws * expected.flatten()) < 4
    # The share kept at each place is Σ min(p, q): there are no more rejections than there need be.
    keep = torch.minimum(p[:k], q).double().sum(-1).numpy()
    stops = np.append(1 - keep, 1.0) * np.append(1.0, np.cumprod(keep))
    assert chi_square(lengths, draws * stops) < 4


@given(seed=st.integers(0, 10**6), k=st.integers(0, 3), sharp=st.booleans(), agree=st.booleans())
@settings(max_examples=100, deadline=None)
def test_greedy_is_plain_greedy_whatever_is_drafted(seed, k, sharp, agree):
    rng = generator(seed)
    logits = some_logits(seed, k + 1, 5, torch.float32)
    p = distribution(logits, Sampling(temperature=0))
    q = distribution(some_logits(seed + 1, k, 5, torch.float32), Sampling(temperature=0)) if sharp and k else (
        torch.full((k, 5), 0.2)
    )  # fmt: skip
    best = logits.argmax(-1).tolist()
    drafts = torch.tensor(best[:k], dtype=torch.int64) if agree else torch.randint(0, 5, (k,), generator=rng)
    accepted, token = verify(drafts, q, p, rng)
    right = next((i for i in range(k) if drafts[i] != best[i]), k)
    assert (accepted, token) == (right, best[right])


def test_a_draft_from_the_models_own_distribution_is_always_kept():
    p = random_rows(7, 3, 6, zeros=False)
    for seed in range(50):
        rng = generator(seed)
        drafts = torch.tensor([sample(row, rng) for row in p[:2]])
        assert verify(drafts, p[:2], p, rng)[0] == 2


def test_an_empty_residual_falls_back_on_the_model():
    p = torch.tensor([0.25, 0.75, 0.0], dtype=torch.float64)
    above = p * (1 + 1e-12)
    assert torch.equal(residual(p, p), p) and torch.equal(residual(p, above), p)
    greedy = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    # A draft that claims a certainty for another token than the one it gives.
    assert verify(torch.tensor([0]), greedy[:1], greedy, generator(0)) == (0, 1)


def test_a_draft_that_its_own_distribution_rules_out():
    p = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
    q = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    assert acceptance(p, q).tolist() == [0.5, 1.0, 0.0]


def test_without_drafts_verify_is_sample():
    probs = distribution(some_logits(6), Sampling())
    none = torch.zeros(0, dtype=torch.int64)
    for seed in range(20):
        verified = verify(none, probs[:0], probs, generator(seed))
        assert verified == (0, sample(probs[0], generator(seed)))


def test_verify_takes_the_same_random_numbers_whatever_is_kept():
    p, q = random_rows(1, 3, 5, zeros=False), random_rows(2, 2, 5, zeros=False)
    states = set()
    for drafts in itertools.product(range(5), repeat=2):
        rng = generator(0)
        first = verify(torch.tensor(drafts), q, p, rng)
        states.add(bytes(rng.get_state().tolist()))
        assert first == verify(torch.tensor(drafts), q, p, generator(0))
    assert len(states) == 1


# ---- reporting ----------------------------------------------------------------------------------------------------


def test_top_logprobs():
    logits = torch.tensor([1.0, 3.0, 2.0, -INF]).bfloat16()
    expected = torch.tensor([1.0, 3.0, 2.0, -INF]).log_softmax(-1).tolist()
    own, best = top_logprobs(logits, 0, 2)
    assert own == pytest.approx(expected[0])
    assert [i for i, _ in best] == [1, 2]
    assert [v for _, v in best] == pytest.approx([expected[1], expected[2]])
    assert top_logprobs(logits, 3, 0) == (-INF, [])
    assert len(top_logprobs(logits, 0, 100)[1]) == 4
