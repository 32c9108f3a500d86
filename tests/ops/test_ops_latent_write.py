"""Packed FP8 rows, and the cache write as one operation."""

import pytest
import torch
import torch._dynamo.testing

from abyssal.ops.latent_decode import latent_decode, latent_decode_lse
from abyssal.ops.latent_rows import pack_rows, row_bytes, unpack_rows
from abyssal.ops.latent_write import latent_write
from abyssal.ops.norm import rms_norm
from abyssal.ops.rotary import rotate


def test_a_row_of_deepseek_v3_is_656_bytes() -> None:
    assert row_bytes(512, 64) == 656
    assert pack_rows(torch.randn(3, 512), torch.randn(3, 64)).shape == (3, 656)
    assert pack_rows(torch.randn(3, 128)).shape == (3, 132)


@pytest.mark.parametrize("C, R", [(0, 4), (100, 4), (128, 3)])
def test_other_widths_are_refused(C, R) -> None:
    with pytest.raises(ValueError, match="packed rows"):
        pack_rows(torch.zeros(1, C), torch.zeros(1, R))


def test_rows_of_another_width_are_refused() -> None:
    q = torch.zeros(1, 1, 128)
    one = torch.ones(1, dtype=torch.int32)
    where = (torch.tensor([0, 1], dtype=torch.int32), one[None], one, 4)
    with pytest.raises(ValueError, match="rows of 131 bytes: expected 132"):
        latent_decode(q, None, torch.zeros(4, 131, dtype=torch.uint8), *where, 1.0)
    with pytest.raises(ValueError, match="packed rows"):
        unpack_rows(torch.zeros(4, 131, dtype=torch.uint8), 128)


def test_packing_is_near_and_its_numbers_are_exact_in_bf16() -> None:
    latent = torch.randn(50, 256) * torch.logspace(-6, 4, 50)[:, None]
    k_rope = torch.randn(50, 6)
    rows = pack_rows(latent, k_rope)
    wide = unpack_rows(rows, 256, torch.float64)
    # Three bits of mantissa: half a sixteenth, or half the smallest step where the group's largest is 448.
    step = latent.unflatten(1, (-1, 128)).abs().amax(-1, keepdim=True) / 224 * 2**-10
    bound = torch.maximum(latent.abs() / 16, step.expand(-1, -1, 128).flatten(1))
    assert ((wide[:, :256] - latent).abs() <= bound * (1 + 1e-6)).all()
    assert torch.equal(wide, unpack_rows(rows, 256, torch.bfloat16).double())
    assert torch.equal(wide[:, 256:], k_rope.bfloat16().double())
    assert torch.equal(unpack_rows(pack_rows(wide[:, :256], wide[:, 256:]), 256, torch.float64), wide)
    assert unpack_rows(pack_rows(torch.full((1, 128), float("nan"))), 128).isnan().all()


@pytest.mark.parametrize(
    "largest, scale", [(448.0, 1.0), (448.1, 2.0), (224.0, 0.5), (224.1, 1.0), (0.0, 2.0**-100), (1e30, 128.0)]
)
def test_scales_are_powers_of_two(largest, scale) -> None:
    rows = pack_rows(torch.full((1, 128), largest))
    assert rows[:, 128:].contiguous().view(torch.float32).item() == scale
    assert unpack_rows(rows, 128, torch.float32).max() <= 57344


def packed_case(dtype):
    lens, size = [9, 30], 16
    rows = pack_rows(torch.randn(5 * size, 128), torch.randn(5 * size, 4))
    q = torch.randn(3, 2, 132, dtype=dtype)
    tables = torch.tensor([[3, 0], [4, 1]], dtype=torch.int32)
    where = (torch.tensor([0, 2, 3], dtype=torch.int32), tables, torch.tensor(lens, dtype=torch.int32), size, 0.2)
    return (q[..., :128], q[..., 128:]), rows, where


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 0.05)])
def test_attention_over_packed_rows_is_that_over_their_numbers(dtype, tolerance) -> None:
    q, rows, where = packed_case(dtype)
    out, lse = latent_decode_lse(*q, rows, *where)
    wide = [t.double() for t in q]
    expected, sums = latent_decode_lse(*wide, unpack_rows(rows, 128, torch.float64), *where)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=0)
    torch.testing.assert_close(lse.double(), sums, atol=tolerance, rtol=0)


@pytest.mark.parametrize("R", [0, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_write_is_norm_and_rotation(R, dtype) -> None:
    T, C, N, H = 3, 7, 5, 2
    kv, q, weight = torch.randn(T, C + R, dtype=dtype), torch.randn(T, H, N + R, dtype=dtype), torch.randn(C)
    angle = torch.rand(T, R // 2)
    cos, sin = (angle.cos(), angle.sin()) if R else (None, None)
    rows, slots = torch.full((6, C + R), 7.0, dtype=dtype), torch.tensor([4, 0, 3])
    before = q.clone()
    latent_write(kv, weight, 1e-6, cos, sin, rows, slots, q)
    assert torch.equal(rows[slots, :C], rms_norm(kv[:, :C], weight, 1e-6))
    assert (rows[[1, 2, 5]] == 7).all()
    assert torch.equal(q[..., :N], before[..., :N])
    if cos is not None:
        assert torch.equal(rows[slots, C:], rotate(kv[:, C:], cos, sin))
        assert torch.equal(q[..., N:], rotate(before[..., N:], cos, sin))


def test_the_write_packs() -> None:
    kv, weight, angle = torch.randn(3, 132), torch.randn(128), torch.rand(3, 2)
    rows, slots = torch.zeros(5, row_bytes(128, 4), dtype=torch.uint8), torch.tensor([4, 0, 3])
    latent_write(kv, weight, 1e-6, angle.cos(), angle.sin(), rows, slots)
    expected = pack_rows(rms_norm(kv[:, :128], weight, 1e-6), rotate(kv[:, 128:], angle.cos(), angle.sin()))
    assert torch.equal(rows[slots], expected)


def test_torch_compile_knows_what_the_write_changes() -> None:
    torch._dynamo.reset()

    def step(kv, q, rows, slots, cos, sin, weight):
        latent_write(kv * 2, weight, 1e-6, cos, sin, rows, slots, q)
        return rows.sum() + q.sum()

    kv, q, weight, angle = torch.randn(3, 9), torch.randn(3, 2, 5), torch.randn(7), torch.rand(3, 1)
    args = (torch.tensor([4, 0, 3]), angle.cos(), angle.sin(), weight)
    results = []
    for f in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        rows, turned = torch.zeros(6, 9), q.clone()
        results.append((f(kv, turned, rows, *args), rows, turned))
    torch.testing.assert_close(*results)


def test_unknown_paths_are_refused() -> None:
    with pytest.raises(ValueError, match="path: expected"):
        latent_write(torch.zeros(1, 4), torch.ones(4), 1e-6, None, None, torch.zeros(1, 4), torch.zeros(1).long(),
                     path="fast")  # fmt: skip
    with pytest.raises(ValueError, match="path: expected"):
        rms_norm(torch.zeros(1, 4), torch.ones(4), 1e-6, path="fast")
