"""The portable decoding kernel and its merge, through Triton's interpreter, against products in float64."""

import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from abyssal.kernels.latent_decode import latent_decode
from abyssal.ops.latent_decode import latent_decode_lse
from abyssal.ops.latent_rows import pack_rows, unpack_rows

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


def close(queries, lens, page_size, C, R, H, dtype, packed=False, max_q=None, seed=0, **tiling) -> None:
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
    out, lse = latent_decode(*split, given, *where, max_q or max(queries), SCALE, tiling)
    again = latent_decode(*split, given, *where, max_q or max(queries), SCALE, tiling)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])
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
        fill=data.draw(st.integers(1, 3)),
    )


@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(C=st.sampled_from([128, 256, 384]), R=st.sampled_from([0, 6]), page_size=st.sampled_from([3, 16]))
def test_packed_rows(C: int, R: int, page_size: int) -> None:
    close([2, 1], [37, 16], page_size, C=C, R=R, H=3, dtype=torch.float32, packed=True, BN=16)


def test_many_programs_with_little_to_do() -> None:
    """More programs than tiles, and contexts of a single row."""
    close([1, 1, 1], [1, 1, 1], 4, C=8, R=2, H=1, dtype=torch.float32, BN=16, fill=5)


def test_no_queries_and_no_sequences() -> None:
    none = torch.zeros(0, dtype=torch.int32)
    q, rows = torch.zeros(0, 2, 8), torch.zeros(4, 10)
    out, lse = latent_decode(q, q[..., :2], rows, torch.zeros(1, dtype=torch.int32), none.view(0, 1), none, 4, 0, 1.0)
    assert out.shape == (0, 2, 8) and lse.shape == (0, 2)
