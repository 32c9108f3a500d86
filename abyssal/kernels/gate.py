"""The gate: logits, and the choice of experts, a warp a token (or several, in training).

`_logits_kernel` spreads a router's weight over the chip, since one token's product is nothing but its reading: blocks
of experts times pieces of D, each piece's sum kept apart in float32. `_choose_kernel` adds the pieces in their order
and does the rest: scores, bias, groups, the best K, their weights. A warp exchanges by shuffles alone, so a token
costs no barrier. Both are programmatic dependents (see experts_decode.py).

Of equals the lowest expert is picked.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

STEP = 128  # columns of D a step
ROWS = 16  # experts a program
PROGRAMS = 128  # about one an SM
MANY = 512  # more tokens than this are enough to fill the device with 64 experts a program
LAST = tl.constexpr(-3.4e38)


@triton.jit(do_not_specialize=["T", "E"])
def _logits_kernel(
    x, weight, pieces, T, E,
    D: tl.constexpr, SPAN: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    WIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """pieces[p, t, e] = Σ x[t, d] weight[e, d] over the p-th SPAN of D."""
    e = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    first = tl.program_id(1) * SPAN
    d = first + tl.arange(0, STEP)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    acc = tl.zeros([ROWS, TOKENS], tl.float32)
    for k in tl.range(0, SPAN, STEP, num_stages=4):
        inside = d + k < D
        w_k = tl.load(weight + e[:, None] * D + (d + k)[None, :], mask=(e[:, None] < E) & inside[None, :], other=0.0)
        x_k = tl.load(
            x + t.to(tl.int64)[None, :] * D + (d + k)[:, None], mask=(t[None, :] < T) & inside[:, None], other=0.0
        )
        if WIDE:
            w_k = w_k.to(tl.float32)
            x_k = x_k.to(tl.float32)
        acc = tl.dot(w_k, x_k, acc, input_precision="ieee")
    at = pieces + (tl.program_id(1) * T + t[None, :]).to(tl.int64) * E + e[:, None]
    tl.store(at, acc, mask=(t[None, :] < T) & (e[:, None] < E))


@triton.jit(do_not_specialize=["T"])
def _choose_kernel(
    pieces, bias, weights, indices, scores, T, scaling,
    E: tl.constexpr, K: tl.constexpr, PIECES: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr,
    GROUPS_UP: tl.constexpr, SIZE_UP: tl.constexpr, K_UP: tl.constexpr, SIGMOID: tl.constexpr, BIAS: tl.constexpr,
    BEST_TWO: tl.constexpr, NORM: tl.constexpr, ONLY_INDICES: tl.constexpr, TOKENS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Experts lie in SLOTS by group, groups and their sizes rounded up to powers of two."""
    SLOTS: tl.constexpr = GROUPS_UP * SIZE_UP
    SIZE: tl.constexpr = E // GROUPS
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    there = (token < T)[:, None]
    slot = tl.arange(0, SLOTS)[None, :]
    expert = slot // SIZE_UP * SIZE + slot % SIZE_UP
    real = (slot % SIZE_UP < SIZE) & (slot // SIZE_UP < GROUPS)
    never = float("-inf")
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    logits = tl.zeros([TOKENS, SLOTS], tl.float32)
    for p in tl.static_range(PIECES):
        at = pieces + (p * T + token).to(tl.int64)[:, None] * E + expert
        logits += tl.load(at, mask=there & real, other=0.0)
    if SIGMOID:
        score = 1 / (1 + tl.exp(-logits))
    else:
        power = tl.where(real, tl.exp(logits - tl.max(tl.where(real, logits, never), 1)[:, None]), 0.0)
        score = power / tl.sum(power, 1)[:, None]
    biased = score
    if BIAS:
        biased += tl.load(bias + expert, mask=real, other=0.0)
    # What may not be picked comes last, in this order: scores that are not numbers and experts of other groups, then
    # those picked before and those that do not exist.
    biased = tl.where(biased == biased, biased, LAST)
    biased = tl.where(real, biased, never)
    if GROUPS > 1:
        by_group = tl.reshape(biased, [TOKENS, GROUPS_UP, SIZE_UP])
        worth, best = tl.max(by_group, 2, return_indices=True)
        if BEST_TWO:
            rest = tl.where(tl.arange(0, SIZE_UP)[None, None, :] == best[:, :, None], never, by_group)
            worth += tl.max(rest, 2)
        group = tl.arange(0, GROUPS_UP)[None, :]
        kept = tl.zeros([TOKENS, GROUPS_UP], tl.int32)
        for _ in tl.static_range(KEPT):
            one = group == tl.argmax(worth, 1)[:, None]
            kept = tl.where(one, 1, kept)
            worth = tl.where(one, never, worth)
        by_group = tl.where((kept == 0)[:, :, None], LAST, by_group)
        biased = tl.where(real, tl.reshape(by_group, [TOKENS, SLOTS]), never)
    k = tl.arange(0, K_UP)[None, :]
    picked = tl.zeros([TOKENS, K_UP], tl.int32)
    weight = tl.zeros([TOKENS, K_UP], tl.float32)
    for i in tl.static_range(K):
        one = slot == tl.argmax(biased, 1)[:, None]
        picked = tl.where(k == i, tl.sum(tl.where(one, expert, 0), 1)[:, None], picked)
        if not ONLY_INDICES:
            weight = tl.where(k == i, tl.sum(tl.where(one, score, 0.0), 1)[:, None], weight)
        biased = tl.where(one, never, biased)
    at = token.to(tl.int64)[:, None] * K + k
    tl.store(indices + at, picked.to(tl.int64), mask=there & (k < K))
    if not ONLY_INDICES:
        if NORM:
            weight = weight / (tl.sum(weight, 1)[:, None] + 1e-20)
        tl.store(weights + at, weight * scaling, mask=there & (k < K))
        tl.store(scores + token.to(tl.int64)[:, None] * E + expert, score, mask=there & real)


def logits(x: Tensor, weight: Tensor) -> Tensor:
    """`[P, T, E]` float32, whose sum over P is x weightᵀ: `x [T, D]`, `weight [E, D]`, contiguous, summed in float32
    from exact products where both are bf16, from float32 values otherwise (T <= 64 then). P depends on T alone."""
    (T, D), E = x.shape, weight.shape[0]
    rows = ROWS if T <= MANY else 64
    tokens = min(max(16, triton.next_power_of_2(T)), 64)
    blocks, steps, groups = triton.cdiv(E, rows), triton.cdiv(D, STEP), triton.cdiv(T, tokens)
    span = triton.cdiv(steps, max(1, min(steps, PROGRAMS // (blocks * groups))))
    count = triton.cdiv(steps, span)
    pieces = torch.empty(count, T, E, dtype=torch.float32, device=x.device)
    pdl = dependent(x)
    _logits_kernel[(blocks, count, groups)](
        x, weight, pieces, T, E, D, span * STEP, tokens, rows, STEP,
        WIDE=not x.dtype == weight.dtype == torch.bfloat16, PDL=pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
    return pieces


def choose(
    pieces: Tensor, bias: Tensor | None, scoring: str, n_group: int, topk_group: int, top_k: int,
    norm_topk_prob: bool, scaling: float, group_worth: str, only_indices: bool = False, tokens: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Weights `[T, K]` float32, indices `[T, K]` int64, scores `[T, E]` float32 from `logits`' pieces `[P, T, E]`;
    the arguments are those of `ops.gate.gate`. With `only_indices` the other two are left unwritten. A warp takes
    `tokens` of them, a power of two."""
    P, T, E = pieces.shape
    weights, scores = (torch.empty(T, n, dtype=torch.float32, device=pieces.device) for n in (top_k, E))
    indices = torch.empty(T, top_k, dtype=torch.int64, device=pieces.device)
    if T:
        up = triton.next_power_of_2
        pdl = dependent(pieces)
        _choose_kernel[(triton.cdiv(T, tokens),)](
            pieces, pieces if bias is None else bias, weights, indices, scores, T, scaling,
            E, top_k, P, n_group, topk_group, up(n_group), up(E // n_group), up(top_k), scoring == "sigmoid",
            bias is not None, group_worth == "best two", norm_topk_prob, only_indices, tokens, PDL=pdl,
            num_warps=1, launch_pdl=pdl,
        )  # fmt: skip
    return weights, indices, scores


def dependent(x: Tensor) -> bool:
    """Whether launches on x's device may be programmatic dependents: from Hopper on."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device)[0] >= 9
