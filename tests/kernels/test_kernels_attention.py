"""The Triton kernels around attention's backward, in the interpreter, against the reference's own gradients."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from abyssal.kernels.attention_backward import KEYS, Buffers, attention_backward, narrow_kernel, plan_kernel
from abyssal.kernels.attention_join import beside, join, sum_heads
from abyssal.ops.attention import attention
from abyssal.ops.paged import cumulative
from abyssal.ops.rotary import rotate


def gradients(lens: list[int], H: int, N: int, R: int, V: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    T, cu, scale = sum(lens), cumulative(lens), 0.3
    wide_q, wide_kv = (torch.randn(T, H, w, generator=g) for w in (N + R, N + V))
    q_nope, q_rope = wide_q.split((N, R), -1)
    k_nope, v = wide_kv.split((N, V), -1)
    k_rope = torch.randn(T, R, generator=g)
    d_out = torch.randn(T, H, V, generator=g)
    leaves = [t.detach().requires_grad_() for t in ((q_nope, q_rope, k_nope, k_rope, v) if R else (q_nope, k_nope, v))]
    qn, qr, kn, kr, vs = leaves if R else (leaves[0], None, leaves[1], None, leaves[2])
    out = attention(qn, qr, kn, kr, vs, cu, cu, max(lens), max(lens), scale, path="reference")
    expected = torch.autograd.grad(out, leaves, d_out)
    lse = torch.full((H, T), float("nan"))
    for a, b in zip(cu.tolist(), cu[1:].tolist()):
        scores = torch.einsum("thn,shn->hts", wide_q[a:b, :, :N], k_nope[a:b])
        scores = scale * (scores + torch.einsum("thr,sr->hts", wide_q[a:b, :, N:], k_rope[a:b]))
        lse[:, a:b] = scores.masked_fill(torch.ones(b - a, b - a).triu(1).bool(), float("-inf")).logsumexp(-1)
    tensors = (d_out, q_nope, q_rope if R else None, k_nope, k_rope if R else None, v, out.detach(), lse, cu, scale)
    buffers = Buffers(q_nope, T, H, N, R, V, len(lens), once=False).poison()
    dq, dkv, dk_rope = attention_backward(*tensors, buffers=buffers)
    dk, dv = dkv.split((N, V), -1)
    found = [dq[..., :N], dq[..., N:], dk, dk_rope, dv] if R else [dq, dk, dv]
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    if R:
        angles = torch.randn(T, R // 2, generator=g)
        before = attention_backward(*tensors, angles=(angles.cos(), angles.sin()))[0]
        torch.testing.assert_close(before[..., :N], expected[0], atol=2e-5, rtol=1e-4)
        turned = rotate(expected[1], angles.cos(), -angles.sin(), path="reference")
        torch.testing.assert_close(before[..., N:], turned, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("lens", [[5], [1, 0, 70], [0, 0, 3, 131, 0]])
@pytest.mark.parametrize("widths", [(16, 16, 16), (12, 8, 20), (24, 0, 16)])
def test_two_passes_give_the_gradients_of_the_reference(lens: list[int], widths: tuple[int, int, int]) -> None:
    gradients(lens, 2, *widths, seed=len(lens))


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lens=st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(any), H=st.integers(1, 3))
def test_any_packing(lens: list[int], H: int) -> None:
    gradients(lens, H, 16, 8, 12, seed=sum(lens))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lens=st.lists(st.integers(0, 700), min_size=1, max_size=9))
def test_the_plan_has_every_tile_once_and_long_ones_first(lens: list[int]) -> None:
    tiles = sum(lens) // KEYS + len(lens)
    plan, cu = torch.full((4, tiles), 77, dtype=torch.int32), cumulative(lens)
    plan_kernel[(len(lens),)](cu, plan, len(lens), tiles, KEYS, 4)
    expected = [
        (int(cu[s]) + n, length - n, int(cu[s])) for s, length in enumerate(lens) for n in range(0, length, KEYS)
    ]
    used = plan[:, : len(expected)]
    assert [tuple(c[1:]) for c in sorted(used.T.tolist())] == expected
    assert sorted(used[0].tolist()) == list(range(len(expected)))
    work = (used[2] + KEYS - 1) // KEYS
    assert (work.diff() <= 0).all()
    assert (plan[2, len(expected) :] == 0).all()


@pytest.mark.parametrize("N, R, halves", [(128, 64, 2), (192, 64, 1)])
@pytest.mark.parametrize("turned", [False, True])
def test_sums_in_the_order_of_registers_are_put_right_and_turned_back(
    N: int, R: int, halves: int, turned: bool
) -> None:
    """What `add_queries` adds up: blocks of 64 rows, 128 columns and then the others."""
    lens, H, width, g = [70, 0, 130], 2, N + R, torch.Generator().manual_seed(0)
    T, tiles, cu = sum(lens), sum(lens) // KEYS + len(lens), cumulative(lens)
    plan = torch.empty(4, tiles, dtype=torch.int32)
    plan_kernel[(len(lens),)](cu, plan, len(lens), tiles, KEYS, 4)
    exact = torch.randn(T, H, width, generator=g)
    wide = torch.full((H, tiles, KEYS // 64, 64 * width), float("nan"))
    for place, first, left, _ in plan.T.tolist():
        for low in range(0, min(left, KEYS), 64):
            rows = torch.zeros(64, H, width)
            rows[: min(64, left - low)] = exact[first + low : first + min(low + 64, left)]
            for start, columns in ((0, 128), (128, width - 128)):
                part = rows[:, :, start : start + columns].movedim(1, 0)
                part = part.reshape(H, 4, 2, 8, halves, columns // halves // 8, 4, 2)  # rows, then columns
                part = part.permute(0, 5, 4, 1, 3, 6, 2, 7).reshape(H, -1)
                wide[:, place, low // 64, start * 64 : (start + columns) * 64] = part
    angles, dq = torch.randn(T, R // 2, generator=g), torch.full((T, H, width), float("nan"))
    grid = (tiles * (KEYS // 64), H)
    more = (tiles, H, 0.5, width, 128, halves, KEYS, R if turned else 0)
    narrow_kernel[grid](wide, dq, angles.cos(), angles.sin(), plan, *more)
    expected = 0.5 * exact
    if turned:
        expected[..., N:] = rotate(expected[..., N:], angles.cos(), -angles.sin(), path="reference")
    torch.testing.assert_close(dq, expected)


@pytest.mark.parametrize("H", [1, 3])
@pytest.mark.parametrize("apart", [False, True])
def test_join_and_its_sum(H: int, apart: bool) -> None:
    T, N, R = 11, 12, 8
    whole = torch.randn(T, H, N + R)
    q_nope, q_rope = whole.split((N, R), -1)
    if apart:
        q_rope = q_rope.clone()
    k_nope, k_rope = torch.randn(T, H, 40)[..., 7 : 7 + N], torch.randn(T, 30)[:, :R]
    q, k = join(q_nope, q_rope, k_nope, k_rope)
    assert torch.equal(q, whole)
    assert (q.data_ptr() == whole.data_ptr()) is not apart
    assert torch.equal(k, torch.cat((k_nope, k_rope[:, None].expand(-1, H, -1)), -1))
    torch.testing.assert_close(sum_heads(k[..., N:]), k_rope * H)


def test_beside_is_only_for_neighbours() -> None:
    whole = torch.randn(4, 2, 24)
    a, b = whole[..., :16], whole[..., 16:]
    found = beside(a, b)
    assert found is not None and torch.equal(found, whole)
    assert beside(b, a) is None
    assert beside(a, b.clone()) is None
    assert beside(a, whole[..., 8:16]) is None
