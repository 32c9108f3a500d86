"""Causal attention forward on Hopper: packed sequences, the five tensors of latent attention read as they lie.

A block of threads keeps one processor for the whole launch and takes tiles of 128 queries of one head. One warp copies
(TMA). Two warpgroups of 64 queries each multiply, taking turns: while one is at the tensor cores the other is at its
softmax (FlashAttention-3, Shah et al. 2024, section 3.1). The product of a block's probabilities and values is issued
behind the scores of the next block, so that a turn is one long stretch of products (section 3.2). The score is a sum
over chunks of 64 columns; which were q_nope's and which q_rope's matters only to the copies, and nothing is
concatenated. Why the sizes are what they are: `docs/kernels.md`.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from abyssal.kernels.attention_tiles import FAR, ROWS, TILE, Inputs, Ring, Shared, hear, producer

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
TOGETHER = 16  # heads whose tiles are handed out together: more thrash the L2 cache, fewer leave the rest a short tail


@gluon.jit
def _turn(number: gl.constexpr, wait: gl.constexpr):
    """A named barrier of the two consumers: one waits at it, the other only passes."""
    barrier: gl.constexpr = "bar.sync $1, 256; mov.b32 $0, 0;" if wait else "bar.arrive $1, 256; mov.b32 $0, 0;"
    gl.inline_asm_elementwise(barrier, "=r,r", [gl.to_tensor(number)], gl.int32, False, 1)


@gluon.jit
def _pack(s, BF16: gl.constexpr):
    """Two 16-bit numbers a register: carried around the loop so, they are not taken apart and put together again."""
    even, odd = s.reshape([s.shape[0], s.shape[1] // 2, 2]).split()
    convert: gl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;" if BF16 else "cvt.rn.f16x2.f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(convert, "=r,f,f", [even, odd], gl.int32, True, 1)


@gluon.jit
def _unpack(p, BF16: gl.constexpr, LAYOUT: gl.constexpr):
    take: gl.constexpr = "mov.b32 {$0, $1}, $2;"
    if BF16:
        even, odd = gl.inline_asm_elementwise(take, "=h,=h,r", [p], (gl.bfloat16, gl.bfloat16), True, 1)
    else:
        even, odd = gl.inline_asm_elementwise(take, "=h,=h,r", [p], (gl.float16, gl.float16), True, 1)
    return gl.convert_layout(gl.join(even, odd).reshape([p.shape[0], p.shape[1] * 2]), LAYOUT)


@gluon.jit
def _scores(sh, slot, WHO: gl.constexpr, LAYOUT: gl.constexpr):
    """Issue the product of the queries and one block of keys, without waiting for it."""
    s = gl.zeros([ROWS, sh.KEYS], gl.float32, LAYOUT)
    for c in gl.static_range(sh.CHUNKS):
        s = warpgroup_mma(
            sh.q.index(WHO * sh.CHUNKS + c), sh.k.index(slot * sh.CHUNKS + c).permute((1, 0)), s, use_acc=c > 0,
            is_async=True)  # fmt: skip
    return s


@gluon.jit
def _weighted(sh, slot, p, o):
    """Issue the product of probabilities and one block of values, without waiting for it."""
    layout: gl.constexpr = gl.DotOperandLayout(
        0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, sh.WIDTH, 16]), 2)  # fmt: skip
    return warpgroup_mma(_unpack(p, sh.v.dtype == gl.bfloat16, layout), sh.v.index(slot), o, is_async=True)


@gluon.jit
def _masked(s, limit, block, LAYOUT: gl.constexpr):
    """Row i sees keys up to limit + i."""
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    keys = gl.arange(0, s.shape[1], gl.SliceLayout(0, LAYOUT))
    return gl.where((keys[None, :] - rows[:, None]) <= limit - block * s.shape[1], s, -float("inf"))


@gluon.jit
def _step(
    sh, k_ring, v_ring, o, p, m, total, c, limit, block, MASK: gl.constexpr, WHO: gl.constexpr,
    S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Scores and softmax of one block of keys, beside the values of the block before."""
    mbarrier.wait(sh.k_full.index(k_ring.slot), k_ring.phase)
    _turn(10 + WHO, True)
    s = _scores(sh, k_ring.slot, WHO, S_LAYOUT)
    mbarrier.wait(sh.v_full.index(v_ring.slot), v_ring.phase)
    o = _weighted(sh, v_ring.slot, p, o)
    _turn(11 - WHO, False)
    s = warpgroup_mma_wait(1, deps=[s])
    mbarrier.arrive(sh.k_empty.index(k_ring.slot), count=1)
    mbarrier.arrive(sh.q_empty.index(WHO), count=1, pred=block == 0)  # the next tile's queries may come
    if MASK:
        s = _masked(s, limit, block, S_LAYOUT)
    m_new = gl.maximum(m, gl.max(s, 1))
    scale = gl.exp2((m - m_new) * c)
    s = gl.exp2(s * c - (m_new * c)[:, None])
    total = total * scale + gl.sum(s, 1)
    o = warpgroup_mma_wait(0, deps=[o])
    mbarrier.arrive(sh.v_empty.index(v_ring.slot), count=1)
    p = _pack(s, sh.v.dtype == gl.bfloat16)
    o = o * gl.convert_layout(scale, gl.SliceLayout(1, O_LAYOUT))[:, None]
    return k_ring.next(sh.K_STAGES), v_ring.next(sh.V_STAGES), o, p, m_new, total


@gluon.jit
def _pass_by(sh, k_ring, v_ring, WHO: gl.constexpr):
    """A block of keys that only the other consumer's rows see."""
    mbarrier.wait(sh.k_full.index(k_ring.slot), k_ring.phase)
    _turn(10 + WHO, True)
    _turn(11 - WHO, False)
    mbarrier.arrive(sh.k_empty.index(k_ring.slot), count=1)
    mbarrier.wait(sh.v_full.index(v_ring.slot), v_ring.phase)
    mbarrier.arrive(sh.v_empty.index(v_ring.slot), count=1)
    return k_ring.next(sh.K_STAGES), v_ring.next(sh.V_STAGES)


@gluon.jit
def _consumer(sh, out, lse, T, H, scale, V: gl.constexpr, WHO: gl.constexpr):
    """64 rows of every tile of this processor: online softmax in base 2, from the diagonal to the first key."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, sh.KEYS, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, sh.WIDTH, 16])
    c = scale * LOG2E
    k_ring, v_ring, phase = Ring(gl.to_tensor(0), gl.to_tensor(0)), Ring(gl.to_tensor(0), gl.to_tensor(0)), 0
    if WHO == 1:
        _turn(10, False)  # the first turn is the other's
    head, row, left, limit, blocks = hear(sh, WHO, phase)
    while blocks > 0:
        mine = gl.minimum(blocks, gl.cdiv(limit + gl.minimum(left, ROWS), sh.KEYS))
        for _ in range(blocks - mine):
            k_ring, v_ring = _pass_by(sh, k_ring, v_ring, WHO)
        mbarrier.wait(sh.k_full.index(k_ring.slot), k_ring.phase)
        s = _scores(sh, k_ring.slot, WHO, S_LAYOUT)
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(sh.k_empty.index(k_ring.slot), count=1)
        mbarrier.arrive(sh.q_empty.index(WHO), count=1, pred=mine == 1)
        k_ring = k_ring.next(sh.K_STAGES)
        s = _masked(s, limit, mine - 1, S_LAYOUT)
        m = gl.maximum(gl.max(s, 1), -1e30)  # a row that sees nothing in this block must not subtract infinities
        s = gl.exp2(s * c - (m * c)[:, None])
        total = gl.sum(s, 1)
        p = _pack(s, sh.v.dtype == gl.bfloat16)
        o = gl.zeros([ROWS, sh.WIDTH], gl.float32, O_LAYOUT)
        whole = gl.minimum((limit + 1) // sh.KEYS, mine - 1)  # blocks that all rows see whole
        for block in range(mine - 2, whole - 1, -1):
            k_ring, v_ring, o, p, m, total = _step(
                sh, k_ring, v_ring, o, p, m, total, c, limit, block, True, WHO, S_LAYOUT, O_LAYOUT
            )
        for block in range(whole - 1, -1, -1):
            k_ring, v_ring, o, p, m, total = _step(
                sh, k_ring, v_ring, o, p, m, total, c, limit, block, False, WHO, S_LAYOUT, O_LAYOUT
            )
        mbarrier.wait(sh.v_full.index(v_ring.slot), v_ring.phase)
        o = _weighted(sh, v_ring.slot, p, o)
        o = warpgroup_mma_wait(0, deps=[o])
        mbarrier.arrive(sh.v_empty.index(v_ring.slot), count=1)
        v_ring = v_ring.next(sh.V_STAGES)

        rows = gl.arange(0, ROWS, gl.SliceLayout(1, S_LAYOUT))
        gl.store(lse + head.to(gl.int64) * T + row + rows, (m * c + gl.log2(total)) * LN2, rows < left)
        o = o * gl.convert_layout(1.0 / total, gl.SliceLayout(1, O_LAYOUT))[:, None]
        rows = gl.arange(0, ROWS, gl.SliceLayout(1, O_LAYOUT))
        columns = gl.arange(0, sh.WIDTH, gl.SliceLayout(0, O_LAYOUT))
        to = out + (row.to(gl.int64) * H + head) * V + (rows * (H * V))[:, None] + columns[None, :]
        gl.store(to, o.to(sh.v.dtype), (rows < left)[:, None] & (columns < V)[None, :])
        phase ^= 1
        head, row, left, limit, blocks = hear(sh, WHO, phase)


@gluon.jit
def _barriers(STAGES: gl.constexpr, consumers: gl.constexpr):
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=consumers)
    return full, empty


@gluon.jit(do_not_specialize=["T", "S", "H", "slots", "heads_per_group", "group"])
def _kernel(
    qn, qr, kn, kr, v, out, lse, cu_q, cu_k, counter, T, S, H, slots, heads_per_group, group, scale,
    NOPE: gl.constexpr, ROPE: gl.constexpr, V: gl.constexpr,
    KEYS: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
):  # fmt: skip
    CHUNKS: gl.constexpr = NOPE + ROPE
    WIDTH: gl.constexpr = v.block_type.shape[4]
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    sh = Shared(
        gl.allocate_shared_memory(v.dtype, [2 * CHUNKS, ROWS, 64], swizzled),
        gl.allocate_shared_memory(v.dtype, [K_STAGES * CHUNKS, KEYS, 64], swizzled),
        gl.allocate_shared_memory(v.dtype, [V_STAGES, KEYS, WIDTH], swizzled),
        gl.allocate_shared_memory(gl.int32, [2, 8], gl.SwizzledSharedLayout(1, 1, 1, [0])),
        _barriers(2, 1), _barriers(K_STAGES, 2), _barriers(V_STAGES, 2), NOPE, ROPE, KEYS, K_STAGES, V_STAGES,
    )  # fmt: skip
    x = Inputs(qn, qr, kn, kr, v, group)
    gl.warp_specialize(
        [
            (_consumer, (sh, out, lse, T, H, scale, V, 0)),
            (_consumer, (sh, out, lse, T, H, scale, V, 1)),
            (producer, (sh, x, cu_q, cu_k, counter, S, H, slots, heads_per_group)),
        ],
        [4, 1],
        [240, 24],
    )


def supports(q_nope: Tensor, q_rope: Tensor | None, k_nope: Tensor, k_rope: Tensor | None, v: Tensor) -> bool:
    """Whether the kernel takes these, on Hopper.

    One 16-bit dtype; both rotary tensors or neither; H a multiple of G; widths that are multiples of 8, V at
    most 256, and N and R, each rounded up to a multiple of 64, at most 256 together.
    """
    present = [t for t in (q_nope, q_rope, k_nope, k_rope, v) if t is not None]
    N, R, V = q_nope.shape[-1], 0 if q_rope is None else q_rope.shape[-1], v.shape[-1]
    return (
        v.dtype in (torch.bfloat16, torch.float16)
        and all(t.dtype == v.dtype for t in present)
        and (q_rope is None) == (k_rope is None)
        and q_nope.shape[1] % k_nope.shape[1] == 0
        and all(width % 8 == 0 for width in (N, R, V))
        and 0 < V <= 256
        and N > 0
        and -(-N // 64) + -(-R // 64) <= 4
    )


def attention_forward(
    q_nope: Tensor, q_rope: Tensor | None, k_nope: Tensor, k_rope: Tensor | None, v: Tensor,
    cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`out [T, H, V]` and `lse [H, T]`: causal attention of each packed sequence by itself, and its normaliser.

    out = softmax(scale · (q_nope k_nopeᵀ + q_rope k_ropeᵀ)) v in the dtype of v, contiguous (DeepSeek-V3, equations 7
    to 10); lse = the natural logarithm of the sum of exp(scale · scores), float32. `q_nope [T, H, N]`, `q_rope
    [T, H, R]`; `k_nope [L, G, N]`, `k_rope [L, R]`, `v [L, G, V]`; both rotary tensors may be None. `cu_q`, `cu_k`
    `[S+1]` int32 on the same device, from 0 to T and to L. A sequence's t queries are the last of its l keys: query j
    sees keys up to l - t + j, so t <= l; either may be 0. What `supports` refuses must not come here.

    Strides are free. Every tensor is read where it lies if its last stride is 1 and its address and other strides are
    multiples of 16 bytes, as parts of wider rows are; one that is not is copied first. Nothing of a neighbouring
    sequence, or past the ends, is multiplied: NaN there stays there. Lengths are read on the device only (`max_q` and
    `max_k` are not needed), the launch may be captured in a CUDA graph, and results repeat bit by bit.
    """
    T, H, N = q_nope.shape
    L, G, V = v.shape
    out = q_nope.new_empty(T, H, V)
    lse = q_nope.new_empty(H, T, dtype=torch.float32)
    if T == 0 or L == 0:
        return out, lse
    NOPE, ROPE = -(-N // 64), 0
    if q_rope is None or k_rope is None:
        q_rope, k_rope = q_nope, k_nope[:, 0]  # named in the launch, never read
    else:
        ROPE = -(-q_rope.shape[-1] // 64)
    width = 64 if V <= 64 else 128 if V <= 128 else 256
    keys = 64 if width == 256 or NOPE + ROPE > 3 else 128  # 213 or 229 KB of shared memory, of 232
    slots = T // TILE.value + cu_q.numel() - 1
    groups = -(-H // TOGETHER)
    processors = torch.cuda.get_device_properties(v.device).multi_processor_count
    counter = torch.zeros(1, dtype=torch.int32, device=v.device)
    _kernel[(min(processors, slots * H),)](
        _ragged(q_nope, 64, 64), _ragged(q_rope, 64, 64), _ragged(k_nope, keys, 64),
        _ragged(k_rope[:, None], keys, 64), _ragged(v, keys, width), out, lse, cu_q, cu_k, counter,
        T, cu_q.numel() - 1, H, slots, -(-H // groups), H // G, scale,
        NOPE=NOPE, ROPE=ROPE, V=V, KEYS=keys, K_STAGES=3 if width == 256 else 2, V_STAGES=2, num_warps=4,
    )  # fmt: skip
    return out, lse


def _ragged(t: Tensor, rows: int, width: int) -> TensorDescriptor:
    """Tiles `[rows, width]` of one head of `t [L, H, D]`, cut by the copy engine at a sequence's end.

    The two dimensions in front are the trick of `triton.tools.ragged_tma`: addresses wrap at 64 bits, so that the
    coordinates (FAR, end, FAR - length + row) name row `row` of the sequence that ends before token `end`. Rows past
    its end are past the FAR rows declared here, and read as zeros; so do columns past D.
    """
    if t.stride(2) != 1 or t.stride(0) % 8 or t.stride(1) % 8 or t.data_ptr() % 16 or 0 in t.stride():
        t = t.contiguous()
    shape = [0x7FFF0000, 0x7FFF0000, FAR.value, t.shape[1], t.shape[2]]
    strides = [2**34 - t.stride(0), t.stride(0), t.stride(0), t.stride(1), 1]
    return TensorDescriptor(t, shape, strides, [1, 1, rows, 1, width], gl.NVMMASharedLayout(128, 16, rank=5))
