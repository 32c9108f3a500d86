"""What lies between the large products: the gate, the norm with rotation and cache write, and the head's loss."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, rms_norm

from abyssal.bench import peers
from abyssal.bench.case import Call, Calls, Case, Output, Prepared, relative_error
from abyssal.bench.measure import rotations
from abyssal.ops.cross_entropy import linear_cross_entropy
from abyssal.ops.gate import gate
from abyssal.ops.latent_write import latent_write

EPS = 1e-6


def cases(cuda: bool) -> list[Case]:
    """Gate, write and loss; on a CPU tiny ones."""
    if not cuda:
        return [_gate(3, 16, 8, 2, 4, 2), _write(3, 2, 128, 8), _loss(6, 8, 32)]
    found = [_gate(T, 7168, 256, 8, 8, 4, quick=T == 64) for T in (1, 16, 64, 4096)]
    found += [_gate(T, 2048, 64, 6, 1, 1) for T in (1, 64)]
    found += [_write(T, H, 512, 64, quick=T == 64) for H in (16, 128) for T in (1, 16, 64)]
    return found + [_loss(4096, D, 129280, quick=D == 2048) for D in (2048, 7168)]


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@cache
def _compiled(plain: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(plain, dynamic=True)


def _gate(T: int, D: int, E: int, K: int, groups: int, kept: int, quick: bool = False) -> Case:
    return Case(
        group="gate", op="gate", shape=f"T={T} D={D} E={E} K={K}, {kept} of {groups} groups", flops=2.0 * T * D * E,
        bytes=float(2 * T * D + 2 * E * D + T * K * 12), prepare=partial(_prepare_gate, T, D, E, K, groups, kept),
        limit=2e-2, small=True, quick=quick,
    )  # fmt: skip


def _prepare_gate(T: int, D: int, E: int, K: int, groups: int, kept: int, device: torch.device) -> Prepared:
    torch.manual_seed(0)
    sets = rotations(2 * (T + E) * D, device)
    x = torch.randn(sets, T, D, device=device, dtype=_dtype(device))
    router = (torch.randn(sets, E, D, device=device) * D**-0.5).to(x.dtype)
    bias = 0.1 * torch.randn(E, device=device)

    def ours() -> Calls:
        def call(i: int) -> Output:
            return gate(x[i], router[i], bias, "sigmoid", groups, kept, K, True, 1.0, "best two")

        return [partial(call, i) for i in range(sets)]

    def dense(output: Output) -> Tensor:
        """The gate's values by expert: the order of a token's choices is free."""
        weights, indices = output[0], output[1]
        return torch.zeros(T, E, device=device).scatter(1, indices.long(), weights.float())

    each = [(x[i], router[i], bias, K, groups, kept) for i in range(sets)]
    exact = dense(plain_gate(*each[0]))
    found: dict[str, Callable[[], Calls]] = {"PyTorch": lambda: [partial(plain_gate, *one) for one in each]}
    if device.type == "cuda":
        found["PyTorch, compiled"] = lambda: [partial(_compiled(plain_gate), *one) for one in each]
    return Prepared(ours, found, lambda output: relative_error(dense(output), exact))


def plain_gate(x: Tensor, router: Tensor, bias: Tensor, K: int, groups: int, kept: int) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3's gate (equations 13-16) as a plain user writes it: weights and indices `[T, K]`."""
    scores = linear(x.float(), router.float()).sigmoid()
    biased = scores + bias
    if groups > 1:
        by_group = biased.unflatten(-1, (groups, -1))
        best = by_group.topk(2).values.sum(-1).topk(kept).indices
        out = torch.ones_like(by_group[..., 0], dtype=torch.bool).scatter(1, best, False)
        biased = by_group.masked_fill(out[..., None], float("-inf")).flatten(1)
    indices = biased.topk(K).indices
    weights = scores.gather(1, indices)
    return weights / weights.sum(-1, keepdim=True), indices


def _write(T: int, H: int, C: int, R: int, quick: bool = False) -> Case:
    return Case(
        group="write", op="norm, rotation and cache write", shape=f"T={T} H={H}", flops=0.0,
        bytes=float(2 * T * (2 * (C + R) + 2 * H * R)), prepare=partial(_prepare_write, T, H, C, R), limit=1e-2,
        small=True, quick=quick,
    )  # fmt: skip


def _prepare_write(T: int, H: int, C: int, R: int, device: torch.device) -> Prepared:
    torch.manual_seed(0)
    dtype, sets = _dtype(device), 32 if device.type == "cuda" else 2
    kv = torch.randn(sets, T, C + R, device=device, dtype=dtype)
    q = torch.randn(sets, T, H, 2 * R + R, device=device, dtype=dtype)  # rotated in place, after its other part
    weight = torch.rand(C, device=device, dtype=dtype) + 0.5
    angles = torch.rand(T, R // 2, device=device) * 6
    cos, sin = angles.cos(), angles.sin()
    rows = torch.full((sets, 4 * T, C + R), float("nan"), device=device, dtype=dtype)
    slots = torch.randperm(4 * T, device=device)[:T]
    source = q.clone()

    def ours() -> Calls:
        q.copy_(source)

        def call(i: int) -> list[Tensor]:
            latent_write(kv[i], weight, EPS, cos, sin, rows[i], slots, q[i])
            return [rows[i], q[i]]

        return [partial(call, i) for i in range(sets)]

    def theirs(plain: Callable[..., list[Tensor]]) -> Calls:
        q.copy_(source)
        return [partial(plain, kv[i], rows[i], q[i], slots, weight, cos, sin) for i in range(sets)]

    exact_rows, exact_q = _plain_write(kv[0], rows[0].clone(), source[0].clone(), slots, weight, cos, sin)

    def check(output: Output) -> float:
        return relative_error([output[0][slots], output[1]], [exact_rows[slots], exact_q])

    found: dict[str, Callable[[], Calls]] = {"PyTorch": partial(theirs, _plain_write)}
    if device.type == "cuda":
        found["PyTorch, compiled"] = lambda: theirs(_compiled(_plain_write))
    return Prepared(ours, found, check)


def _plain_write(
    kv: Tensor, rows: Tensor, q: Tensor, slots: Tensor, weight: Tensor, cos: Tensor, sin: Tensor
) -> list[Tensor]:
    C, R = weight.shape[0], 2 * cos.shape[1]
    rows[slots] = torch.cat((rms_norm(kv[:, :C], (C,), weight, EPS), _rotated(kv[:, C:], cos, sin)), -1)
    q[..., -R:] = _rotated(q[..., -R:], cos[:, None], sin[:, None])
    return [rows, q]


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


def _loss(T: int, D: int, vocab: int, quick: bool = False) -> Case:
    return Case(
        group="loss", op="head and cross-entropy, forward and backward", shape=f"T={T} D={D} vocabulary {vocab}",
        flops=6.0 * T * D * vocab, bytes=4.0 * (T + vocab) * D, prepare=partial(_prepare_loss, T, D, vocab), limit=5e-2,
        quick=quick,
    )  # fmt: skip


def _prepare_loss(T: int, D: int, vocab: int, device: torch.device) -> Prepared:
    torch.manual_seed(0)
    hidden = torch.randn(T, D, device=device, dtype=_dtype(device)).requires_grad_()
    head = torch.empty(vocab, D, device=device, dtype=hidden.dtype).normal_(0, D**-0.5).requires_grad_()
    targets = torch.randint(vocab, (T,), device=device)
    weights = torch.ones(T, device=device)

    def with_gradients(loss: Callable[[], Tensor]) -> Call:
        def call() -> Output:
            value = loss()
            return [value.detach(), *torch.autograd.grad(value, (hidden, head))]

        return call

    def plain() -> Tensor:
        return cross_entropy(linear(hidden, head).float(), targets, reduction="sum")

    def liger() -> Calls:
        made = peers.module("liger-kernel", "liger_kernel.transformers")
        loss = made.LigerFusedLinearCrossEntropyLoss(reduction="sum")
        return [with_gradients(lambda: loss(head, hidden, targets))]

    def compiled() -> Calls:
        torch._dynamo.reset()
        return [with_gradients(torch.compile(plain, dynamic=False))]

    found: dict[str, Callable[[], Calls]] = {"PyTorch, all logits": lambda: [with_gradients(plain)]}
    if device.type == "cuda":
        found["PyTorch, all logits, compiled"] = compiled
        found["liger-kernel"] = liger
    exact = with_gradients(plain)()
    return Prepared(
        lambda: [with_gradients(lambda: linear_cross_entropy(hidden, head, targets, weights))],
        found,
        lambda output: relative_error(output, exact),
    )
