"""Absorbed latent attention for decoding on Hopper: one persistent launch, TMA, wgmma and four roles a block.

Rows of work are a sequence's (query token, head) pairs in tiles of 64, the M of a wgmma. The output of a tile,
[64, 512] in float32, fills the registers of two warpgroups, so the roles are split:

    loads    one warp: TMA of each page's two latent halves and its rotary part into rings of shared memory
    scores   a warpgroup: S = Q Kᵀ, the running maximum and sum; P and the rescaling factor go to shared memory
    values   two warpgroups: each holds half of the output's columns, rescales them and adds P V

A cached row serves as key and as value: a page is read once, and stays until both products are done with it. The
scores of a page overlap the values of the page before. Half of Q lives in the registers of the scores' warpgroup:
shared memory then holds two and a half pages, and reading Q from it no longer takes half of its bandwidth.

Rows are independent in both products, so what lies in rows past a tile's last does no harm. Tokens past the context
do: their scores are masked, and their values set to zero, for 0 · NaN is NaN.

The roles are in `latent_roles.py`; how contexts are split over the blocks, and how the parts are merged, in
`latent_split.py`.
"""

import itertools
from functools import cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from abyssal.kernels.latent_roles import HALF, TILE, loads, scores, values
from abyssal.kernels.latent_split import share


@gluon.jit(do_not_specialize=["S", "P", "TH"])
def _decode(
    q_latent_ptr, q_rope_ptr, st, sh, rt, rh, pages_lo, pages_rope, cu_q, table, lens, out, lse, part, part_lse,
    flags, scale, S, P, TH, H: gl.constexpr, BLOCK_S: gl.constexpr, NH: gl.constexpr, NR: gl.constexpr, F: gl.constexpr,
    G: gl.constexpr, LEAST: gl.constexpr, Q_REGS: gl.constexpr, PACE: gl.constexpr,
    num_warps: gl.constexpr
):  # fmt: skip
    bf16 = gl.bfloat16
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    latent = gl.allocate_shared_memory(bf16, [NH, TILE, HALF], pages_lo.layout)
    rope = gl.allocate_shared_memory(bf16, [NR, TILE, TILE], pages_rope.layout)
    q_latent = gl.allocate_shared_memory(bf16, [1 if Q_REGS else 2, TILE, HALF], swizzled)
    q_rope = gl.allocate_shared_memory(bf16, [TILE, TILE], swizzled)
    p = gl.allocate_shared_memory(bf16, [TILE, TILE], swizzled)
    factor = gl.allocate_shared_memory(gl.float32, [TILE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    inverse = gl.allocate_shared_memory(gl.float32, [2, TILE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [NH, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [NH, 1], mbarrier.MBarrierLayout())
    rope_full = gl.allocate_shared_memory(gl.int64, [NR, 1], mbarrier.MBarrierLayout())
    rope_empty = gl.allocate_shared_memory(gl.int64, [NR, 1], mbarrier.MBarrierLayout())
    p_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    p_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_issued = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NH):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(NR):
        mbarrier.init(rope_full.index(i), count=1)
        mbarrier.init(rope_empty.index(i), count=1)
    mbarrier.init(p_ready, count=1)
    mbarrier.init(p_free, count=2)
    mbarrier.init(q_issued, count=1)
    fence_async_shared()

    block = gl.program_id(0)
    base_flag = gl.load(flags + block)
    s, start, width = share(cu_q, lens, S, H, block // G, gl.num_programs(0) // G, BLOCK_S, F, G, LEAST)
    lo = (block // G) * width
    split = (s, start, lo, lo + width, block, block % G)
    share_args = (cu_q, lens, S, H)
    rings = (latent, rope, q_latent, q_rope, p, factor, inverse)
    bars = (full, empty, rope_full, rope_empty, p_ready, p_free, q_issued)
    parts = (part, part_lse)
    gl.warp_specialize(
        [
            (values, (share_args, split, out, lse, parts, flags, base_flag, rings, bars, width, NH, F, G, 0)),
            (values, (share_args, split, out, lse, parts, flags, base_flag, rings, bars, width, NH, F, G, 1)),
            (
                scores,
                (
                    share_args, split, (q_latent_ptr, q_rope_ptr), (st, sh, rt, rh), TH, lse, parts, flags, rings, bars,
                    scale, NH, NR, F, G, Q_REGS,
                ),
            ),
            (loads, (share_args, split, table, P, pages_lo, pages_rope, rings, bars, NH, NR, F, G, PACE)),
        ],
        [4, 4, 1],
        [160, 168, 24],
    )  # fmt: skip


# Measured on an H100: slots for half pages and for rotary parts (all that fit), and how many requests for halves are
# under way at once.
SETTINGS = {"NH": 5, "NR": 2, "PACE": 2, "Q_REGS": True}
# A unit's own cost in quarters of a page, by the tiles that share it, and the fewest pages a block takes of a unit.
UNIT_COST, LEAST_PAGES = {1: 10, 2: 4}, 1


@cache
def _blocks(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


# Flags only ever count up. A set for each stream, whose launches run one after the other; all of a device's are made
# at the first launch, so that a graph captured later on a stream of its own has nothing to allocate or to clear.
STREAMS = 64
_arenas: dict[int, Tensor] = {}
_turns = itertools.count()


@cache
def _turn(device: int, stream: int) -> int:
    return next(_turns) % STREAMS


def _flags(device: int, G: int) -> Tensor:
    if device not in _arenas:
        arena = torch.zeros(STREAMS, 2, _blocks(device), dtype=torch.int32, device=torch.device("cuda", device))
        if torch.cuda.is_current_stream_capturing():
            return arena[0, G - 1]  # the graph's own, cleared by each replay
        torch.cuda.current_stream(device).synchronize()  # once: other streams will read it
        _arenas[device] = arena
    return _arenas[device][_turn(device, torch.cuda.current_stream(device).cuda_stream), G - 1]


def latent_decode_hopper(
    q_latent: Tensor,
    q_rope: Tensor,
    rows: Tensor,
    cu_q: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    page_size: int,
    max_q: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`[T, H, 512]` bf16 and its natural log-sum-exp `[T, H]` float32: `ops.latent_decode` for bf16 rows on Hopper.

    `q_latent [T, H, 512]`, `q_rope [T, H, 64]` (any strides but the last), `rows [pages * 64, 576]` contiguous, all
    bf16; `cu_q [S+1]`, `block_table [S, P]`, `context_lens [S]` int32; `max_q` at least the queries of any sequence;
    `scale` positive. Nothing is read past ceil(length / 64) pages of a sequence, and nothing depends on the host's
    knowledge of lengths: a CUDA graph can be replayed at others, with as many sequences and queries.

    Blocks wait for each other while they merge, and count launches in flags that a stream owns: no two launches that
    were issued or captured on one stream may run at the same time.
    """
    if page_size % 64 or q_latent.shape[2] != 512 or q_rope.shape[2] != 64 or not rows.is_contiguous():
        raise ValueError(
            f"expected pages of a multiple of 64 contiguous rows of 512 + 64, got pages of {page_size}, "
            f"rows {tuple(rows.shape)}, queries {tuple(q_latent.shape)} and {tuple(q_rope.shape)}"
        )
    if page_size > 64:
        pieces = torch.arange(page_size // 64, dtype=torch.int32, device=rows.device)
        block_table = (block_table[..., None] * len(pieces) + pieces).flatten(1)
    T, H, _ = q_latent.shape
    S = len(context_lens)
    G = 1 if max_q * H <= 64 else 2
    out = torch.empty(T, H, 512, dtype=torch.bfloat16, device=rows.device)
    lse = torch.empty(T, H, dtype=torch.float32, device=rows.device)
    if not T:
        return out, lse
    if q_latent.stride(2) != 1:
        q_latent = q_latent.contiguous()
    if q_rope.stride(2) != 1:
        q_rope = q_rope.contiguous()
    device = rows.device.index
    blocks = _blocks(device) // G * G
    flags = _flags(device, G)
    part = torch.empty(blocks * 2, 64, 512, dtype=torch.bfloat16, device=rows.device)
    part_lse = torch.empty(blocks * 2, 64, dtype=torch.float32, device=rows.device)
    layout = gl.NVMMASharedLayout(128, 16, 2)
    _decode[(blocks,)](
        q_latent, q_rope, q_latent.stride(0), q_latent.stride(1), q_rope.stride(0), q_rope.stride(1),
        TensorDescriptor.from_tensor(rows, [64, 256], layout), TensorDescriptor.from_tensor(rows, [64, 64], layout),
        cu_q, block_table, context_lens, out, lse, part, part_lse, flags, scale, S, block_table.stride(0), T * H, H,
        BLOCK_S=max(128, 1 << (S - 1).bit_length()), G=G, F=UNIT_COST[G], LEAST=LEAST_PAGES,
        num_warps=4, maxnreg=128, **SETTINGS
    )  # fmt: skip
    return out, lse
