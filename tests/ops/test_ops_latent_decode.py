"""Absorbed attention against an explicit loop over queries, heads and cached rows."""

import math

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.ops.latent_decode import latent_decode, latent_decode_lse
from abyssal.ops.paged import cumulative, gather_pages


def case(queries, contexts, page_size, C=7, R=4, H=3, dtype=torch.float64, seed=0):
    """Pages are dealt in a random order, and what no sequence owns holds large numbers."""
    g = torch.Generator().manual_seed(seed)
    need = max([1, *(-(-l // page_size) for l in contexts)])
    spare = 2
    order = torch.randperm(len(contexts) * need + spare, generator=g)
    tables = order[: len(contexts) * need].view(len(contexts), need)
    rows = 50 * torch.randn(len(order) * page_size, C + R, dtype=torch.float64, generator=g)
    for table, l in zip(tables.tolist(), contexts):
        for i in range(l):
            row = table[i // page_size] * page_size + i % page_size
            rows[row] = torch.randn(C + R, dtype=torch.float64, generator=g)
    T = sum(queries)
    q_latent = torch.randn(T, H, C, dtype=torch.float64, generator=g).to(dtype)
    q_rope = torch.randn(T, H, R, dtype=torch.float64, generator=g).to(dtype) if R else None
    where = (tables.to(torch.int32), torch.tensor(contexts, dtype=torch.int32), page_size)
    return q_latent, q_rope, rows.to(dtype), cumulative(queries), *where, 0.41


def by_loop(q_latent, q_rope, rows, cu_q, tables, lens, page_size, scale):
    T, H, C = q_latent.shape
    out = torch.zeros(T, H, C, dtype=torch.float64)
    for s, l in enumerate(lens.tolist()):
        first, last = cu_q[s].item(), cu_q[s + 1].item()
        places = [tables[s, i // page_size].item() * page_size + i % page_size for i in range(l)]
        for t in range(first, last):
            seen = places[: l - (last - 1 - t)]
            for h in range(H):
                scores = []
                for p in seen:
                    score = q_latent[t, h].double() @ rows[p, :C].double()
                    if q_rope is not None:
                        score = score + q_rope[t, h].double() @ rows[p, C:].double()
                    scores.append(scale * score.item())
                weights = [math.exp(x - max(scores)) for x in scores]
                out[t, h] = sum(w / sum(weights) * rows[p, :C].double() for w, p in zip(weights, seen))
    return out


CASES = {
    "one token each": ([1, 1, 1], [5, 1, 9]),
    "several tokens": ([3, 1, 4], [7, 4, 4]),
    "whole prompts": ([6, 2], [6, 2]),
    "some without queries": ([0, 2, 0, 1], [3, 5, 0, 2]),
    "nothing": ([0, 0], [0, 4]),
    "past a rounding": ([2, 1], [64, 65]),
}


@pytest.mark.parametrize("queries, contexts", CASES.values(), ids=CASES)
@pytest.mark.parametrize("page_size", [1, 3, 70, 200])
@pytest.mark.parametrize("R, H", [(4, 3), (0, 2), (2, 1)])
def test_it_is_the_loop(queries, contexts, page_size, R, H) -> None:
    args = case(queries, contexts, page_size, R=R, H=H)
    torch.testing.assert_close(latent_decode(*args), by_loop(*args), atol=1e-12, rtol=0)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(
    "queries, contexts",
    [([1], [700]), ([3], [700]), ([1], [257]), ([2, 2], [700, 300]), ([1] * 4, [700, 1, 640, 699]), ([2, 2], [700, 2])],
)
def test_flash_attention_is_the_reference(threads, queries, contexts) -> None:
    """Split among threads or not, sequences together (pages in a row, lengths alike) or one by one."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        q, k, rows, cu_q, tables, lens, size, scale = case(queries, contexts, 704)
        for order in (tables, torch.arange(len(queries), dtype=torch.int32)[:, None]):
            args = (q, k, rows, cu_q, order, lens, size, scale)
            torch.testing.assert_close(latent_decode(*args, "flash"), latent_decode(*args, "reference"))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("path", ["reference", "flash"])
@pytest.mark.parametrize("queries, contexts", [([1], [700]), ([2, 0, 1], [700, 3, 9]), ([2, 2], [700, 690])])
def test_the_log_sum_exp_is_the_loop_s(path, queries, contexts) -> None:
    """Its exponential times the output, added over two halves of a context, is what the whole would give."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        q, k, rows, cu_q, tables, lens, size, scale = case(queries, contexts, 704)
        tables = torch.arange(len(queries), dtype=torch.int32)[:, None]
        out, lse = latent_decode_lse(q, k, rows, cu_q, tables, lens, size, scale, path)
        assert torch.equal(out, latent_decode(q, k, rows, cu_q, tables, lens, size, scale, path))
        assert lse.shape == q.shape[:2] and lse.dtype == torch.float64
        for s, l in enumerate(contexts):
            for j, t in enumerate(range(cu_q[s], cu_q[s + 1])):
                seen = rows[s * size : s * size + l - (queries[s] - 1 - j)]
                scores = torch.cat((q, k), -1)[t] @ seen.T * scale
                torch.testing.assert_close(lse[t], scores.logsumexp(-1), atol=1e-9, rtol=0)
    finally:
        torch.set_num_threads(before)


def dealt(order: str, contexts: list[int], page_size: int, g: torch.Generator) -> tuple[torch.Tensor, int]:
    """`[S, P]` pages and how many there are: of each sequence in a row, in a row but unevenly apart, in two runs,
    all over the place, or shared from the first page on."""
    counts = [max(-(-length // page_size), 1) for length in contexts]
    S, P = len(contexts), max(counts)
    if order == "shuffled":
        return torch.randperm(S * P, generator=g).view(S, P).int(), S * P
    row = torch.arange(P)
    if order == "apart":
        starts = torch.tensor([s * P + s % 2 for s in range(S)])
        return (starts[:, None] + row).int(), S * P + 1
    tables = torch.arange(S)[:, None] * P + row
    if order == "two runs":
        tables[:, P // 2 :] += S * P
    if order == "shared":  # the first half of every table is the first sequence's
        tables[:, : P // 2 + 1] = tables[0, : P // 2 + 1].clone()
    if order == "last":  # in a row, the other way round: the first sequence lies at the end of the rows
        tables = tables.flip(0)
    return tables.int(), int(tables.max()) + 1


ORDERS = ["in a row", "apart", "two runs", "shuffled", "shared", "last"]


def paged(order: str, sequences: list[tuple[int, int]], page_size: int, C=8, R=4, H=2, seed=0, dtype=torch.float64):
    """Sequences of (queries, context), whose pages are dealt as `order` says."""
    g = torch.Generator().manual_seed(seed)
    contexts = [length for _, length in sequences]
    tables, pages = dealt(order, contexts, page_size, g)
    rows = torch.randn(pages * page_size, C + R, dtype=torch.float64, generator=g).to(dtype)
    T = sum(t for t, _ in sequences)
    q_latent, q_rope = (torch.randn(T, H, w, dtype=torch.float64, generator=g).to(dtype) for w in (C, R))
    lens = torch.tensor(contexts, dtype=torch.int32)
    return q_latent, q_rope, rows, cumulative([t for t, _ in sequences]), tables, lens, page_size, 0.3


lengths = st.sampled_from([0, 1, 2, 63, 64, 65, 127, 128, 129, 200, 511, 513, 700])
sequence = lengths.flatmap(lambda length: st.tuples(st.integers(0, min(4, length)), st.just(length)))


@settings(deadline=None, max_examples=200)
@given(
    st.one_of(
        st.lists(sequence, min_size=1, max_size=6),
        st.tuples(lengths.filter(bool), st.integers(1, 6)).map(lambda x: [(1, x[0])] * x[1]),  # one call serves all
        st.tuples(lengths.filter(lambda x: x > 2), st.integers(2, 4)).map(
            lambda x: [(3, x[0] + i) for i in range(x[1])]
        ),
    ),
    st.sampled_from(ORDERS),
    st.sampled_from([64, 128, 3, 16]),
    st.sampled_from([1, 2, 5]),
    st.integers(0, 99),
)
def test_flash_attention_is_the_reference_over_any_pages(sequences, order, page_size, threads, seed) -> None:
    args = paged(order, sequences, page_size, seed=seed)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for found, expected in zip(latent_decode_lse(*args, "flash"), latent_decode_lse(*args, "reference")):
            torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
        assert torch.equal(latent_decode(*args, "flash"), latent_decode_lse(*args, "flash")[0])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("sequences", [[(1, 70)] * 3, [(1, 700)] * 3, [(2, 130), (1, 700)], [(1, 640), (1, 700)]])
def test_what_others_hold_is_never_seen(order, threads, sequences) -> None:
    """Not even where it is no number: a failing request's rows must not spread."""
    args = paged(order, sequences, 64)
    rows, tables, lens = args[2], args[4], args[5].tolist()
    own = {int(p) for s, l in enumerate(lens) for p in tables[s, : -(-l // 64)]}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        expected = latent_decode(*args, "reference")
        for page in set(range(rows.shape[0] // 64)) - own:
            rows[page * 64 : page * 64 + 64] = float("nan")
        torch.testing.assert_close(latent_decode(*args, "flash"), expected)
        for s in range(len(lens)):  # each in turn alone among rows that are no numbers
            mine = {int(p) for p in tables[s, : -(-lens[s] // 64)]}
            poisoned = rows.clone()
            for page in own - mine:
                poisoned[page * 64 : page * 64 + 64] = float("nan")
            found = latent_decode(*args[:2], poisoned, *args[3:], "flash")
            q0, q1 = args[3][s], args[3][s + 1]
            torch.testing.assert_close(found[q0:q1], expected[q0:q1])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("length", [1, 64, 100, 700])
def test_where_the_pages_lie_is_no_part_of_the_arithmetic(dtype, threads, length) -> None:
    """Bit for bit: so a prefix hit or a preemption changes no token."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        q, k, rows, cu, tables, lens, size, scale = paged("in a row", [(1, length)], 64, C=16, R=16, dtype=dtype)
        expected, P = latent_decode(q, k, rows, cu, tables, lens, size, scale, "flash"), tables.shape[1]
        for seed in range(4):
            places = torch.randperm(P + 3, generator=torch.Generator().manual_seed(seed))[None, :P].int()
            if seed == 3:
                places = torch.arange(3, P + 3)[None].int()  # up to the end of the rows
            elsewhere = torch.zeros((P + 3) * size, rows.shape[1], dtype=dtype)
            elsewhere.view(P + 3, size, -1)[places[0].long()] = rows.view(P, size, -1)[tables[0].long()]
            assert torch.equal(latent_decode(q, k, elsewhere, cu, places, lens, size, scale, "flash"), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("path", ["flash", "reference"])
def test_a_query_without_a_context_is_nothing(path) -> None:
    out, lse = latent_decode_lse(*paged("in a row", [(1, 0), (0, 0), (1, 5)], 64), path)
    assert torch.equal(out[0], torch.zeros_like(out[0])) and (lse[0] == float("-inf")).all()
    assert out[1].abs().sum() > 0 and lse[1].isfinite().all()


def test_flash_attention_is_refused_over_rows_of_another_dtype() -> None:
    args = case([1], [9], 4)
    with pytest.raises(ValueError, match="'flash' for rows of the queries' dtype on a CPU, got 'flash'"):
        latent_decode(*args[:2], args[2].float(), *args[3:], "flash")


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_narrow_dtypes_are_near(dtype, tolerance) -> None:
    args = case([2, 1, 1], [90, 40, 3], 128, dtype=dtype)
    out = latent_decode(*args)
    assert out.dtype == dtype and out.is_contiguous()
    torch.testing.assert_close(out.double(), by_loop(*args), atol=tolerance, rtol=0)


def test_a_sequence_is_the_same_in_any_batch() -> None:
    """Bit for bit, on one thread: batch mates and the order of pages are no part of the arithmetic."""
    q, k, rows, cu_q, tables, lens, size, scale = case([1, 2, 1], [9, 30, 17], 32, dtype=torch.float32)
    together = latent_decode(q, k, rows, cu_q, tables, lens, size, scale)
    for s, (a, b) in enumerate(zip(cu_q.tolist(), cu_q.tolist()[1:])):
        alone = latent_decode(
            q[a:b], k[a:b], rows, cumulative([b - a]), tables[s : s + 1], lens[s : s + 1], size, scale
        )
        assert torch.equal(alone, together[a:b])


def test_the_cache_is_read_and_not_changed() -> None:
    args = case([2], [5], 8)
    before = [a.clone() for a in args if isinstance(a, torch.Tensor)]
    latent_decode(*args)
    assert all(torch.equal(a, b) for a, b in zip([a for a in args if isinstance(a, torch.Tensor)], before))


def test_torch_compile_sees_one_opaque_operation() -> None:
    """Contexts grow at every step: a graph must not depend on them."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    step = torch.compile(latent_decode, backend=counter, fullgraph=True)
    for length in (3, 9, 31):
        args = case([1], [length], 64, seed=length)
        torch.testing.assert_close(step(*args), latent_decode(*args))
    assert counter.frame_count == 1


@pytest.mark.parametrize("page_size", [1, 2, 5, 16])
def test_gather_pages_by_hand(page_size: int) -> None:
    lens = [0, 5, 1, 10, 0]
    need = -(-10 // page_size)
    order = torch.randperm(5 * need, generator=torch.Generator().manual_seed(0))
    tables = order.view(5, need).to(torch.int32)
    rows = torch.arange(5 * need * page_size).view(-1, 1)
    expected = [
        [tables[s, i // page_size].item() * page_size + i % page_size] for s, l in enumerate(lens) for i in range(l)
    ]
    found, cu, longest = gather_pages(rows, tables, torch.tensor(lens, dtype=torch.int32), page_size)
    assert found.tolist() == expected
    assert cu.tolist() == [0, 0, 5, 6, 16, 16] and cu.dtype == torch.int32
    assert longest == 10


def test_gather_pages_of_nothing() -> None:
    none = torch.zeros(0, dtype=torch.int32)
    found, cu, longest = gather_pages(torch.ones(4, 3), none.view(0, 1), none, 4)
    assert found.shape == (0, 3) and cu.tolist() == [0] and longest == 0
