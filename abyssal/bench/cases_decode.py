"""Latent decoding: one query token a sequence at even lengths, four at uneven ones, and a cache in FP8."""

import math
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from abyssal.bench import peers
from abyssal.bench.case import Calls, Case, Output, Prepared, relative_error
from abyssal.bench.measure import rotations
from abyssal.ops.latent_decode import latent_decode
from abyssal.ops.latent_rows import pack_rows, row_bytes, unpack_rows

C, R, PAGE = 512, 64, 64
SCALE = 192**-0.5  # of heads of 128 + 64, whose queries were absorbed
EVEN = {  # heads: (sequences, context)
    16: [(1, 1024), (1, 4096), (1, 16384), (1, 65536), (16, 1024), (16, 4096), (16, 16384), (64, 1024), (64, 4096),
         (64, 16384), (128, 4096), (128, 65536)],
    128: [(1, 1024), (1, 4096), (1, 16384), (1, 65536), (16, 1024), (16, 4096), (16, 16384), (16, 65536), (64, 4096),
          (64, 16384), (128, 16384), (128, 65536)],
}  # fmt: skip
QUICK = {(16, 1, 4096), (16, 16, 4096), (128, 16, 4096), (16, 64, 4096)}
FP8 = [(16, 16, 4096), (16, 64, 16384), (128, 64, 4096), (128, 64, 16384)]


def cases(cuda: bool) -> list[Case]:
    """All of them; on a CPU tiny ones."""
    if not cuda:
        return [
            _case(4, [70, 70], 1, "2x70"),
            _case(4, [5, 130], 2, "uneven, 2 queries"),
            _case(4, [70], 1, "1x70", True),
        ]
    found = [
        _case(H, [length] * S, 1, f"{S}x{length}", quick=(H, S, length) in QUICK)
        for H, shapes in EVEN.items()
        for S, length in shapes
    ]
    found.append(_case(16, [4641, 45118, 1730, 1696], 4, "4 uneven, 4 queries each", quick=True))
    found.append(_case(16, _log_uniform(64, 64, 65536), 1, "64 log-uniform in 64..65536", quick=True))
    found += [_case(H, [length] * S, 1, f"{S}x{length}", fp8=True, quick=S == 16) for H, S, length in FP8]
    return found


def _case(H: int, lens: list[int], queries: int, said: str, fp8: bool = False, quick: bool = False) -> Case:
    width = row_bytes(C, R) if fp8 else 2 * (C + R)
    pairs = sum(queries * l - queries * (queries - 1) // 2 for l in lens)
    return Case(
        group="decode-fp8" if fp8 else "decode",
        op="latent decoding, FP8 cache" if fp8 else "latent decoding",
        shape=f"H={H} {said}",
        flops=2.0 * H * pairs * (C + R + C),
        bytes=float(sum(lens) * width + len(lens) * queries * H * 2 * (C + R + C)),
        prepare=partial(_prepare, H, lens, queries, fp8),
        limit=1e-2,
        small=True,
        quick=quick,
        note="the peers read the same numbers from a cache in bf16, 1.76 times the bytes" if fp8 else "",
    )


def _log_uniform(count: int, least: int, most: int) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    return (least * (most / least) ** torch.rand(count, generator=generator)).long().tolist()


def _prepare(H: int, lens: list[int], queries: int, fp8: bool, device: torch.device) -> Prepared:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    S, most = len(lens), -(-max(lens) // PAGE)
    pages_each = [-(-l // PAGE) for l in lens]
    total = sum(pages_each)
    sets = rotations(sum(lens) * (656 if fp8 else 1152), device)
    rows = torch.empty(sets, total * PAGE, C + R, device=device, dtype=dtype).normal_()
    packed = rows
    if fp8:
        packed = torch.empty(sets, total * PAGE, row_bytes(C, R), device=device, dtype=torch.uint8)
        for stored, part in zip(packed.flatten(0, 1).split(1 << 20), rows.flatten(0, 1).split(1 << 20)):
            stored.copy_(pack_rows(part[:, :C], part[:, C:]))
            part.copy_(unpack_rows(stored, C, dtype))  # the peers see the same numbers
    # Each sequence's pages are scattered over a cache; the sets differ in the cache.
    order = torch.randperm(total, device=device).to(torch.int32)
    table = torch.zeros(S, most, dtype=torch.int32, device=device)
    for s, part in enumerate(order.split(pages_each)):
        table[s, : part.numel()] = part
    q = torch.randn(sets, S * queries, H, C + R, device=device, dtype=dtype)
    cu_q = torch.arange(0, S * queries + 1, queries, device=device, dtype=torch.int32)
    lens_d = torch.tensor(lens, device=device, dtype=torch.int32)

    def call(cache: Tensor, i: int) -> Tensor:
        return latent_decode(q[i, ..., :C], q[i, ..., C:], cache[i], cu_q, table, lens_d, PAGE, SCALE, max_q=queries)

    def ours(cache: Tensor = packed) -> Calls:
        return [partial(call, cache, i) for i in range(sets)]

    checked = sorted({0, S - 1, max(range(S), key=lens.__getitem__)})

    def check(output: Output) -> float:
        assert isinstance(output, Tensor)
        got, want = [], []
        for s in checked:
            context = _context(rows[0], table[s], lens[s])
            want.append(_exact(q[0, s * queries : (s + 1) * queries], context))
            got.append(output.reshape(S, queries, H, C)[s])
        return relative_error(got, want)

    found: dict[str, Callable[[], Calls]] = {}
    if device.type == "cuda":
        found["FlashMLA"] = partial(_flash_mla, q, rows, table, lens_d, queries)
        found["FlashInfer"] = partial(_flashinfer, q, rows, order, cu_q, lens)
    if fp8:
        found["ours, bf16 cache"] = partial(ours, rows)
    return Prepared(ours, found, check)


def _context(rows: Tensor, table: Tensor, length: int) -> Tensor:
    pages = table[: -(-length // PAGE)].long()
    return rows.view(-1, PAGE, rows.shape[1])[pages].flatten(0, 1)[:length]


def _exact(q: Tensor, context: Tensor) -> Tensor:
    """In float32, some heads at a time: `[t, H, C + R]`, `[l, C + R]` -> `[t, H, C]`."""
    t, l = q.shape[0], context.shape[0]
    keys = context.float()
    hidden = ~torch.ones(t, l, dtype=torch.bool, device=q.device).tril(l - t)
    outs = []
    for part in q.float().split(16, 1):
        scores = torch.einsum("thw,lw->htl", part, keys) * SCALE
        probs = scores.masked_fill(hidden, -math.inf).softmax(-1)
        outs.append(torch.einsum("htl,lc->thc", probs, keys[:, :C]))
    return torch.cat(outs, 1)


def _flash_mla(q: Tensor, rows: Tensor, table: Tensor, lens: Tensor, queries: int) -> Calls:
    flash_mla = peers.module("FlashMLA")
    meta, _ = flash_mla.get_mla_metadata()  # planned in the first call, then reused
    caches = rows.view(len(rows), -1, PAGE, 1, C + R)

    def call(i: int) -> Tensor:
        out, _ = flash_mla.flash_mla_with_kvcache(
            q[i].unflatten(0, (-1, queries)), caches[i], table, lens, C, meta, None, softmax_scale=SCALE, causal=True
        )
        return out.flatten(0, 1)

    return [partial(call, i) for i in range(len(q))]


def _flashinfer(q: Tensor, rows: Tensor, order: Tensor, cu_q: Tensor, lens: list[int]) -> Calls:
    mla = peers.module("FlashInfer", "flashinfer.mla")
    pages = [-(-l // PAGE) for l in lens]
    starts = torch.tensor([0, *pages]).cumsum(0).to(cu_q)
    lens_d = torch.tensor(lens).to(cu_q)
    caches = rows.view(len(rows), -1, PAGE, C + R)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapper = mla.BatchMLAPagedAttentionWrapper(
            torch.empty(128 << 20, dtype=torch.uint8, device=q.device), use_cuda_graph=True, backend="fa3",
            qo_indptr=cu_q.clone(), kv_indptr=starts.clone(), kv_indices=order.clone(), kv_len_arr=lens_d.clone(),
        )  # fmt: skip
        wrapper.plan(
            qo_indptr=cu_q, kv_indptr=starts, kv_indices=order, kv_len_arr=lens_d, num_heads=q.shape[2],
            head_dim_ckv=C, head_dim_kpe=R, page_size=PAGE, causal=True, sm_scale=SCALE,
            q_data_type=q.dtype, kv_data_type=rows.dtype,
        )  # fmt: skip

    def call(i: int) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return wrapper.run(
                q_nope=q[i, ..., :C], q_pe=q[i, ..., C:], ckv_cache=caches[i, ..., :C], kpe_cache=caches[i, ..., C:]
            )

    return [partial(call, i) for i in range(len(q))]
