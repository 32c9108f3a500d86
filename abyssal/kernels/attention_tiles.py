"""The copying half of the attention forward: which tile is next, and the rings of buffers that feed the consumers.

Everything asynchronous has a pair of barriers: "full" completes when the copy engine has written a buffer, "empty"
when those who multiply from it have finished. A ring is walked by all in the same order, so nothing else is said.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.core import _aggregate as aggregate

ROWS = gl.constexpr(64)  # query rows of one consumer: what one wgmma instruction multiplies
TILE = gl.constexpr(128)  # query rows of the two
FAR = gl.constexpr(1 << 30)  # rows that a ragged descriptor claims to have


@aggregate
class Ring:
    """A place in a ring of buffers: the slot, and the parity of the round, by which its barriers are waited for."""

    slot: gl.tensor
    phase: gl.tensor

    @gluon.constexpr_function
    def __init__(self, slot, phase):
        self.slot = slot
        self.phase = phase

    @gluon.jit
    def next(self, STAGES: gl.constexpr):
        wraps = self.slot + 1 == STAGES
        return Ring(gl.where(wraps, 0, self.slot + 1), gl.where(wraps, self.phase ^ 1, self.phase))


@aggregate
class Shared:
    """Shared memory with its barriers, and what producer and consumers must agree on."""

    q: gl.shared_memory_descriptor
    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    tile: gl.shared_memory_descriptor
    q_full: gl.shared_memory_descriptor
    q_empty: gl.shared_memory_descriptor
    k_full: gl.shared_memory_descriptor
    k_empty: gl.shared_memory_descriptor
    v_full: gl.shared_memory_descriptor
    v_empty: gl.shared_memory_descriptor
    NOPE: gl.constexpr  # chunks of 64 columns
    ROPE: gl.constexpr
    CHUNKS: gl.constexpr
    KEYS: gl.constexpr
    WIDTH: gl.constexpr  # V, padded to what a product takes
    K_STAGES: gl.constexpr
    V_STAGES: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, q, k, v, tile, q_bars, k_bars, v_bars, NOPE, ROPE, KEYS, K_STAGES, V_STAGES):
        self.q, self.k, self.v, self.tile = q, k, v, tile
        self.q_full, self.q_empty = q_bars
        self.k_full, self.k_empty = k_bars
        self.v_full, self.v_empty = v_bars
        self.NOPE, self.ROPE, self.CHUNKS = gl.constexpr(NOPE), gl.constexpr(ROPE), gl.constexpr(NOPE + ROPE)
        self.KEYS, self.WIDTH = gl.constexpr(KEYS), gl.constexpr(v.shape[2])
        self.K_STAGES, self.V_STAGES = gl.constexpr(K_STAGES), gl.constexpr(V_STAGES)


@aggregate
class Inputs:
    """What the producer copies from."""

    q_nope: tma.tensor_descriptor
    q_rope: tma.tensor_descriptor
    k_nope: tma.tensor_descriptor
    k_rope: tma.tensor_descriptor
    v: tma.tensor_descriptor
    group: gl.tensor  # query heads to a head of keys

    @gluon.constexpr_function
    def __init__(self, q_nope, q_rope, k_nope, k_rope, v, group):
        self.q_nope, self.q_rope, self.k_nope, self.k_rope, self.v = q_nope, q_rope, k_nope, k_rope, v
        self.group = group


@gluon.jit
def _find(item, cu_q, cu_k, counter, S, H, slots, heads_per_group):
    """The tile `item` names, or the first one after it in the queue that is not empty.

    Sequence s owns the slots from cu_q[s] // TILE + s on: at least as many as it has tiles, known without a sum over
    the sequences. Slots are handed out from the last, so the long tiles of a sequence come before its short ones, and
    within a slot go a group of heads whose keys then stay in the L2 cache.
    """
    head, q0, t, k0, l, first = 0, 0, 0, 0, 0, 0
    searching = item < slots * H
    while searching:
        group = item // (slots * heads_per_group)
        within = item - group * slots * heads_per_group
        heads = gl.minimum(heads_per_group, H - group * heads_per_group)
        slot = slots - 1 - within // heads
        head = group * heads_per_group + within % heads
        s = 0
        end = S
        while end - s > 1:
            middle = (s + end) // 2
            owned = gl.load(cu_q + middle) // TILE + middle <= slot
            s = gl.where(owned, middle, s)
            end = gl.where(owned, end, middle)
        q0 = gl.load(cu_q + s)
        k0 = gl.load(cu_k + s)
        t = gl.load(cu_q + s + 1) - q0
        l = gl.load(cu_k + s + 1) - k0
        first = (slot - q0 // TILE - s) * TILE
        searching = first >= t
        if searching:
            item = gl.atomic_add(counter, 1) + gl.num_programs(0)
            searching = item < slots * H
    return item, head, q0, t, k0, l, first


@gluon.jit
def _tell(sh, WHO: gl.constexpr, head, row, left, limit, blocks):
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [1], [0])
    i = gl.arange(0, 8, layout)
    # The head; the first row among all tokens; rows left in the sequence; the last key row 0 sees; blocks of keys.
    facts = gl.where(i == 0, head, gl.where(i == 1, row, gl.where(i == 2, left, gl.where(i == 3, limit, blocks))))
    sh.tile.index(WHO).store(facts)


@gluon.jit
def _fact(facts, i: gl.constexpr, LAYOUT: gl.constexpr):
    return gl.sum(gl.where(gl.arange(0, 8, LAYOUT) == i, facts, 0), 0)


@gluon.jit
def hear(sh, WHO: gl.constexpr, phase):
    """Wait for the next tile's queries, and read what `_tell` wrote."""
    mbarrier.wait(sh.q_full.index(WHO), phase)
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [4], [0])
    facts = sh.tile.index(WHO).load(layout)
    head, row, left = _fact(facts, 0, layout), _fact(facts, 1, layout), _fact(facts, 2, layout)
    return head, row, left, _fact(facts, 3, layout), _fact(facts, 4, layout)


@gluon.jit
def _send_queries(sh, x, WHO: gl.constexpr, phase, head, q0, t, l, first, blocks):
    """A consumer's 64 queries, and what it must know of them."""
    row = first + WHO * ROWS
    mbarrier.wait(sh.q_empty.index(WHO), phase)
    _tell(sh, WHO, head, q0 + row, t - row, l - t + row, blocks)
    bar = sh.q_full.index(WHO)
    mbarrier.expect(bar, sh.CHUNKS * ROWS * 128)
    for c in gl.static_range(sh.CHUNKS):
        if c < sh.NOPE:
            tma.async_copy_global_to_shared(
                x.q_nope, [FAR, q0 + t, FAR - t + row, head, c * 64], bar, sh.q.index(WHO * sh.CHUNKS + c)
            )
        else:
            tma.async_copy_global_to_shared(
                x.q_rope, [FAR, q0 + t, FAR - t + row, head, (c - sh.NOPE) * 64], bar,
                sh.q.index(WHO * sh.CHUNKS + c))  # fmt: skip


@gluon.jit
def _send_keys(sh, x, ring, head, end, row):
    bar = sh.k_full.index(ring.slot)
    mbarrier.wait(sh.k_empty.index(ring.slot), ring.phase)
    mbarrier.expect(bar, sh.CHUNKS * sh.KEYS * 128)
    for c in gl.static_range(sh.CHUNKS):
        if c < sh.NOPE:
            tma.async_copy_global_to_shared(
                x.k_nope, [FAR, end, row, head // x.group, c * 64], bar, sh.k.index(ring.slot * sh.CHUNKS + c)
            )
        else:
            tma.async_copy_global_to_shared(
                x.k_rope, [FAR, end, row, 0, (c - sh.NOPE) * 64], bar, sh.k.index(ring.slot * sh.CHUNKS + c)
            )
    return ring.next(sh.K_STAGES)


@gluon.jit
def _send_values(sh, x, ring, head, end, row):
    bar = sh.v_full.index(ring.slot)
    mbarrier.wait(sh.v_empty.index(ring.slot), ring.phase)
    mbarrier.expect(bar, x.v.block_type.nbytes)
    tma.async_copy_global_to_shared(x.v, [FAR, end, row, head // x.group, 0], bar, sh.v.index(ring.slot))
    return ring.next(sh.V_STAGES)


@gluon.jit
def producer(sh, x, cu_q, cu_k, counter, S, H, slots, heads_per_group):
    """Draw tiles until there are none, and copy in the order in which the consumers will ask."""
    k_ring, v_ring, phase = Ring(gl.to_tensor(0), gl.to_tensor(1)), Ring(gl.to_tensor(0), gl.to_tensor(1)), 1
    item, head, q0, t, k0, l, first = _find(gl.program_id(0), cu_q, cu_k, counter, S, H, slots, heads_per_group)
    while item < slots * H:
        blocks = gl.cdiv(gl.minimum(l, l - t + first + TILE), sh.KEYS)
        here, end = head, k0 + l
        row = FAR - l + (blocks - 1) * sh.KEYS  # from the diagonal to the first key
        k_ring = _send_keys(sh, x, k_ring, here, end, row)  # before the queries, whose buffers free up later
        _send_queries(sh, x, 0, phase, head, q0, t, l, first, blocks)
        _send_queries(sh, x, 1, phase, head, q0, t, l, first, blocks)
        phase ^= 1
        v_ring = _send_values(sh, x, v_ring, here, end, row)
        if blocks > 1:
            k_ring = _send_keys(sh, x, k_ring, here, end, row - sh.KEYS)
        # The rings are full, so now is the time to look for the next tile.
        item, head, q0, t, k0, l, first = _find(
            gl.atomic_add(counter, 1) + gl.num_programs(0), cu_q, cu_k, counter, S, H, slots, heads_per_group
        )
        for _ in range(blocks - 2):
            row -= sh.KEYS
            v_ring = _send_values(sh, x, v_ring, here, end, row)
            k_ring = _send_keys(sh, x, k_ring, here, end, row - sh.KEYS)
        if blocks > 1:
            v_ring = _send_values(sh, x, v_ring, here, end, row - sh.KEYS)
    for who in gl.static_range(2):
        mbarrier.wait(sh.q_empty.index(who), phase)
        _tell(sh, who, 0, 0, 0, 0, 0)  # no blocks: the end
        mbarrier.arrive(sh.q_full.index(who), count=1)
