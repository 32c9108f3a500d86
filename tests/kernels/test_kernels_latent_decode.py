"""The portable decoding kernel and its merge, through Triton's interpreter, against products in float64."""

import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from abyssal.kernels.latent_decode import latent_decode
from abyssal.ops.latent_decode import latent_decode_lse
from abyssal.ops.latent_rows import pack_rows, unpack_rows
from abyssal.ops.linear import per_head

SCALE = 0.37


def paged(lens: list[int], page_size: int, W: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pages in a random order; rows that no sequence owns are NaN, table entries past a sequence's pages garbage."""
    need = max(1, *(-(-l // page_size) for l in lens))
    order = torch.randperm(len(lens) * need + 2, generator=g)
    table = order[: len(lens) * need].view(len(lens), need).to(torch.int32)
    rows = torch.full((len(order) * page_size, W), float("nan"), dtype=torch.float64)
    for s, l in enumerate(lens):
        for i in range(l):
            rows[table[s, i // page_size] * page_size + i % page_size] = torch.randn(
                W, generator=g, dtype=torch.float64
            )
        table[s, -(-l // page_size) :] = 2**30
    return rows, table


def close(queries, lens, page_size, C, R, H, dtype, packed=False, max_q=None, seed=0, alone=False, **tiling) -> None:
    g = torch.Generator().manual_seed(seed)
    T = sum(queries)
    rows, table = paged(lens, page_size, C + R, g)
    rows = rows.to(dtype)
    given = rows
    if packed:
        owned = rows.isfinite().all(1)
        given = pack_rows(rows[:, :C].nan_to_num(), rows[:, C:].nan_to_num())
        rows = unpack_rows(given, C, torch.float32)
        given[~owned] = 0xFF
    q = torch.randn(T, H, C + R, generator=g, dtype=torch.float64).to(dtype)
    cu_q = torch.tensor([0, *queries]).cumsum(0).int()
    where = (cu_q, table, torch.tensor(lens, dtype=torch.int32), page_size)
    split = (q[..., :C], q[..., C:])  # views: the rotary part is never contiguous
    out, lse = latent_decode(*split, given, *where, max_q or max(queries), SCALE, tiling, alone)
    again = latent_decode(*split, given, *where, max_q or max(queries), SCALE, tiling, alone)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])
    w_uv = torch.randn(H, 5 + C, 3, generator=g).to(dtype)[:, :C].transpose(1, 2)  # values of width 3, any strides
    taken, _ = latent_decode(*split, given, *where, max_q or max(queries), SCALE, tiling, alone, w_uv)
    torch.testing.assert_close(taken.double(), per_head(out.double(), w_uv.double()), atol=1e-3 * C, rtol=1e-3)
    wide = [t.double() for t in split]
    expected, sums = latent_decode_lse(*wide, rows.double(), *where, SCALE, path="reference")
    tolerance = 4e-3 if dtype == torch.float16 else 2e-5
    assert out.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), sums, atol=tolerance, rtol=1e-5)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
@example(data=None)
def test_any_shape(data: st.DataObject | None) -> None:
    if data is None:  # splits over all programs, a sequence without queries, heads that are no power of two
        close([1], [17], 1, C=1, R=0, H=1, dtype=torch.float32, BN=16, fill=1)
        return close([1, 0, 3], [70, 40, 33], 7, C=20, R=6, H=20, dtype=torch.float32, BN=16)
    queries = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=3).filter(any))
    lens = [q + data.draw(st.integers(0, 40)) for q in queries]
    close(
        queries,
        lens,
        page_size=data.draw(st.sampled_from([1, 5, 16, 64, 100])),
        C=data.draw(st.sampled_from([1, 7, 16, 40])),
        R=data.draw(st.sampled_from([0, 2, 4, 18])),
        H=data.draw(st.sampled_from([1, 2, 3, 17])),
        dtype=data.draw(st.sampled_from([torch.float32, torch.float16])),
        max_q=data.draw(st.sampled_from([None, sum(queries)])),
        seed=data.draw(st.integers(0, 99)),
        BN=data.draw(st.sampled_from([16, 32])),
        alone=data.draw(st.booleans()),
        fill=data.draw(st.integers(1, 3)),
    )


@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(C=st.sampled_from([128, 256, 384]), R=st.sampled_from([0, 6]), page_size=st.sampled_from([3, 16]))
def test_packed_rows(C: int, R: int, page_size: int) -> None:
    close([2, 1], [37, 16], page_size, C=C, R=R, H=3, dtype=torch.float32, packed=True, BN=16)


def test_many_programs_with_little_to_do() -> None:
    """More programs than tiles, and contexts of a single row."""
    close([1, 1, 1], [1, 1, 1], 4, C=8, R=2, H=1, dtype=torch.float32, BN=16, fill=5)


def test_alone_a_sequence_is_the_same_bits_beside_any_others() -> None:
    """Contexts of one range, of several, and of a single row; two orders, and each by itself."""
    g = torch.Generator().manual_seed(0)
    lens, size, H = [700, 1, 130, 129, 16], 16, 2
    rows, table = paged(lens, size, 12, g)
    rows, q = rows.float(), torch.randn(5, H, 12, generator=g)

    def run(some: list[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.tensor([lens[s] for s in some], dtype=torch.int32)
        cu_q = torch.arange(len(some) + 1, dtype=torch.int32)
        where = (rows, cu_q, table[some].contiguous(), chosen, size, 1, SCALE, {"BN": 16})
        return latent_decode(q[some][..., :8], q[some][..., 8:], *where, alone=True)

    out, lse = run([0, 1, 2, 3, 4])
    for some in ([4, 2, 0, 1, 3], *([s] for s in range(5))):
        again, sums = run(some)
        assert torch.equal(again, out[some]) and torch.equal(sums, lse[some])


def test_few_queries_and_many_are_taken_out_of_the_latent_space() -> None:
    """At once with merging, and by a launch of their own."""
    close([1, 1], [70, 9], 8, C=20, R=6, H=4, dtype=torch.float32, BN=16)
    close([3, 9], [70, 40], 8, C=20, R=6, H=6, dtype=torch.float32, BN=16)


def test_no_queries_and_no_sequences() -> None:
    none = torch.zeros(0, dtype=torch.int32)
    q, rows = torch.zeros(0, 2, 8), torch.zeros(4, 10)
    out, lse = latent_decode(q, q[..., :2], rows, torch.zeros(1, dtype=torch.int32), none.view(0, 1), none, 4, 0, 1.0)
    assert out.shape == (0, 2, 8) and lse.shape == (0, 2)
