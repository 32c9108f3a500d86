"""Latent decoding, packed rows and the cache write on a GPU, against float64."""

import pytest
import torch
from torch import Tensor

from abyssal.ops.latent_decode import latent_decode, latent_decode_lse
from abyssal.ops.latent_rows import pack_rows, unpack_rows
from abyssal.ops.latent_write import latent_write
from abyssal.ops.norm import rms_norm
from abyssal.ops.rotary import rotate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
BF16 = torch.bfloat16
SCALE = 0.07


def paged(lens: list[int], page_size: int, C: int, R: int, dtype: torch.dtype, packed: bool):
    """Rows (as cached, and as numbers), page table: pages permuted, rows of nobody NaN, unused entries garbage."""
    need = max(-(-l // page_size) for l in lens)
    order = torch.randperm(len(lens) * need + 3)[: len(lens) * need].view(len(lens), need).int()
    rows = torch.randn((len(lens) * need + 3) * page_size, C + R).to(dtype)
    owned = torch.zeros(rows.shape[0], dtype=torch.bool)
    for s, l in enumerate(lens):
        i = torch.arange(l)
        owned[order[s, i // page_size].long() * page_size + i % page_size] = True
    cached = rows = rows.cuda()
    if packed:
        cached = pack_rows(rows[:, :C], rows[:, C:])
        rows = unpack_rows(cached, C, dtype)
    cached[~owned.cuda()] = 0xFF if packed else float("nan")
    table = order.clone()
    for s, l in enumerate(lens):
        table[s, -(-l // page_size) :] = 10**9
    return cached, rows, table.cuda()


def exact(q: tuple[Tensor, Tensor], rows: Tensor, where: tuple) -> tuple[Tensor, Tensor]:
    return latent_decode_lse(q[0].double(), q[1].double(), rows.double(), *where, SCALE, path="reference")


def check(path, queries, lens, page_size, H, C=512, R=64, dtype=BF16, packed=False, max_q=None) -> None:
    torch.manual_seed(0)
    cached, rows, table = paged(lens, page_size, C, R, dtype, packed)
    q = torch.randn(sum(queries), H, C + R, device="cuda").to(dtype)
    split = (q[..., :C], q[..., C:])
    cu_q = torch.tensor([0, *queries], device="cuda").cumsum(0).int()
    where = (cu_q, table, torch.tensor(lens, device="cuda", dtype=torch.int32), page_size)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, lse = latent_decode_lse(*split, cached, *where, SCALE, path, max_q)
        again = latent_decode_lse(*split, cached, *where, SCALE, path, max_q)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])
    expected, sums = exact(split, rows, where)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    assert out.isfinite().all()
    assert (out - expected).norm() / expected.norm() < tolerance
    assert (lse - sums).abs().max() < 1e-4


CASES = {
    "one token each": ([1, 1, 1], [1000, 1, 333]),
    "a long context": ([1], [20000]),
    "several tokens, uneven": ([4, 0, 1, 8], [4641, 50, 1730, 8]),
    "a prompt": ([130, 1], [200, 64]),
}


@pytest.mark.parametrize("queries, lens", CASES.values(), ids=CASES)
@pytest.mark.parametrize("H", [1, 16, 20, 128])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("path", ["hopper", "triton"])
def test_deepseek_v3_s_widths(path, packed, H, queries, lens) -> None:
    if path == "hopper" and not HOPPER:
        pytest.skip("needs compute capability 9")
    if len(lens) == 2 and H == 128:
        pytest.skip("large")
    check(path, queries, lens, 64, H, packed=packed, max_q=max(queries))


@pytest.mark.parametrize("page_size", [1, 48, 192, 5000])
@pytest.mark.parametrize("packed", [False, True])
def test_page_sizes(page_size, packed) -> None:
    check("triton", [1, 3], [77, 300], page_size, 16, packed=packed)
    if packed and HOPPER and page_size % 64 == 0:
        check("hopper", [1, 3], [77, 300], page_size, 16, packed=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
@pytest.mark.parametrize("C, R, H", [(7, 4, 3), (16, 0, 1), (96, 12, 20), (512, 64, 5)])
def test_other_widths_and_dtypes(dtype, C, R, H) -> None:
    check("triton", [1, 2, 0, 3], [130, 9, 4, 65], 16, H, C, R, dtype)


def test_a_graph_is_replayed_at_other_lengths() -> None:
    """Split, merged and masked by what the lengths are at the replay."""
    torch.manual_seed(0)
    B, H, pages = 5, 16, 40
    rows = torch.randn(B * pages * 64, 576, device="cuda", dtype=BF16)
    packed = pack_rows(rows[:, :512], rows[:, 512:])
    table = torch.randperm(B * pages, device="cuda").view(B, pages).int()
    q = torch.randn(B, H, 576, device="cuda", dtype=BF16)
    lens = torch.ones(B, device="cuda", dtype=torch.int32)
    where = (torch.arange(B + 1, device="cuda").int(), table, lens, 64)
    for path in ["triton", *(["hopper"] if HOPPER else [])]:
        for cached, numbers in ((rows, rows), (packed, unpack_rows(packed, 512))):

            def step(cached=cached, path=path) -> Tensor:
                return latent_decode(q[..., :512], q[..., 512:], cached, *where, SCALE, path, 1)

            step()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = step()
            for lengths in ([1, 1, 1, 1, 1], [2560, 1, 64, 65, 700], [2560] * 5):
                lens.copy_(torch.tensor(lengths))
                out.fill_(float("nan"))
                graph.replay()
                expected, _ = exact((q[..., :512], q[..., 512:]), numbers, where)
                assert (out - expected).norm() / expected.norm() < 5e-3, (path, lengths)


def test_every_e4m3_number_is_read_exactly() -> None:
    """A context of one row is its own average."""
    codes = torch.arange(256, dtype=torch.uint8, device="cuda")
    codes[codes & 0x7F == 0x7F] = 0
    numbers = codes.view(torch.float8_e4m3fn).float().repeat(2)[None]
    one = torch.ones(1, device="cuda", dtype=torch.int32)
    where = (torch.tensor([0, 1], device="cuda", dtype=torch.int32), 0 * one[None], one, 64)
    q = torch.randn(1, 16, 576, device="cuda", dtype=BF16)
    for exponent in (-90, -9, 0, 7):
        latent = numbers * 2.0**exponent
        rows = pack_rows(latent, torch.zeros(1, 64, device="cuda")).repeat(64, 1)
        for path in ["triton", *(["hopper"] if HOPPER else [])]:
            out = latent_decode(q[..., :512] * 0, q[..., 512:], rows, *where, SCALE, path, 1)
            assert torch.equal(out.float(), latent.expand(16, -1)[None]), (path, exponent)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("T, C, R, N, H", [(1, 512, 64, 128, 128), (77, 512, 64, 128, 16), (5, 128, 6, 3, 20)])
def test_the_cache_write(T, C, R, N, H, packed) -> None:
    torch.manual_seed(0)
    kv = torch.randn(T, C + R, device="cuda", dtype=BF16)
    q = torch.randn(T, H, N + R, device="cuda", dtype=BF16)
    weight, angle = torch.rand(C, device="cuda", dtype=BF16), torch.rand(T, R // 2, device="cuda") * 6
    slots = torch.randperm(T + 9, device="cuda")[:T]
    found = []
    for path in ("triton", "reference"):
        rows = torch.zeros(T + 9, C + R, device="cuda", dtype=BF16)
        rows = pack_rows(rows[:, :C], rows[:, C:]) if packed else rows
        turned = q.clone()
        latent_write(kv, weight, 1e-6, angle.cos(), angle.sin(), rows, slots, turned, path=path)
        found.append((unpack_rows(rows, C) if packed else rows, turned))
    # A last bit of the mean may move a rounding here and there.
    for out, expected in zip(*found, strict=True):
        assert (out != expected).float().mean() < 1e-3
        torch.testing.assert_close(out, expected, atol=1e-3, rtol=0.07 if packed else 0.01)
    assert torch.equal(found[1][1][..., N:], rotate(q[..., N:], angle.cos(), angle.sin()))
    assert torch.equal(found[0][1][..., :N], q[..., :N])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float16, 2e-3), (BF16, 1e-2)])
@pytest.mark.parametrize("rows, D", [(1, 7168), (3, 1536), (5000, 512), (7, 100)])
def test_the_norm(rows, D, dtype, tolerance) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(rows, D + 8, device="cuda").to(dtype)[:, :D], torch.rand(D, device="cuda").to(dtype)
    out = rms_norm(x, weight, 1e-6)
    torch.testing.assert_close(
        out.double(), rms_norm(x.double(), weight.double(), 1e-6), atol=tolerance, rtol=tolerance
    )
    asked = weight.clone().requires_grad_()
    assert rms_norm(x, asked, 1e-6).requires_grad
