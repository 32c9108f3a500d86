"""The routed experts: whole batches forward and backward, and a decoding step with its gate and shared experts."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, linear, silu

from abyssal.bench.case import Calls, Case, Output, Prepared, relative_error
from abyssal.bench.cases_between import plain_gate
from abyssal.ops.experts import experts
from abyssal.ops.gate import gate

# SonicMoE 0.1.2 wants torch up to 2.9.1. Its TFLOP/s forward and forward with backward, measured on 2026-11-21 on one
# H100 with the same arithmetic; shown as a note, never as a ratio of this run.
SONIC = {("a", 8192): (368, 420), ("a", 32768): (542, 500)}


@dataclass(frozen=True)
class Config:
    """Width, experts, expert width, choices, and the shared experts' width."""

    name: str
    D: int
    E: int
    F: int
    K: int
    shared: int


A = Config("a", 2048, 64, 1408, 6, 2816)
B = Config("b", 7168, 32, 2048, 8, 2048)
TINY = Config("tiny", 16, 4, 8, 2, 16)


class Inputs:
    """Weights of a layer, `sets` batches of tokens, and a mildly uneven routing."""

    def __init__(self, config: Config, T: int, sets: int, device: torch.device) -> None:
        torch.manual_seed(0)
        c, dtype = config, torch.bfloat16 if device.type == "cuda" else torch.float32

        def weight(*shape: int) -> Tensor:
            return torch.empty(*shape, device=device, dtype=dtype).normal_(0, shape[-1] ** -0.5)

        self.w1, self.w3, self.w2 = weight(c.E, c.F, c.D), weight(c.E, c.F, c.D), weight(c.E, c.D, c.F)
        self.router = weight(c.E, c.D)
        self.bias = 0.1 * torch.randn(c.E, device=device, dtype=torch.float32)
        self.shared = (weight(c.shared, c.D), weight(c.D, c.shared), weight(c.shared, c.D))
        self.x = torch.randn(sets, T, c.D, device=device, dtype=dtype)
        gate, indices = plain_gate(self.x.flatten(0, 1), self.router, self.bias, c.K, 1, 1)
        self.gate, self.indices = gate.view(sets, T, c.K), indices.view(sets, T, c.K)


def cases(cuda: bool) -> list[Case]:
    """Batches of configs a and b, forward, then with backward; then decoding."""
    if not cuda:
        return [_batch(TINY, 12, False), _batch(TINY, 12, True), _decoding(TINY, 3)]
    found = [_batch(c, T, grad) for grad in (False, True) for c in (A, B) for T in (8192, 32768)]
    return found + [_decoding(c, T) for c in (A, B) for T in (1, 2, 4, 16, 64)]


def _batch(c: Config, T: int, grad: bool) -> Case:
    weights = 3 * c.E * c.F * c.D
    sonic = SONIC.get((c.name, T))
    flops = 6.0 * T * c.K * c.D * c.F * (3 if grad else 1)
    return Case(
        group="experts",
        op="experts, forward and backward" if grad else "experts, forward",
        shape=f"{c.name}: T={T} D={c.D} E={c.E} F={c.F} K={c.K}",
        flops=flops,
        bytes=2.0 * (weights + 2 * T * c.D) * (2 if grad else 1),
        prepare=partial(_prepare_batch, c, T, grad),
        limit=2e-2,
        quick=c is A and T == 8192,
        note=f"SonicMoE 0.1.2, not from this run: {flops / sonic[grad] * 1e-9:.2f} ms, {sonic[grad]} TFLOP/s"
        if sonic
        else "",
    )


def _prepare_batch(c: Config, T: int, grad: bool, device: torch.device) -> Prepared:
    inputs = Inputs(c, T, 1, device)
    x, indices, gate = inputs.x[0], inputs.indices[0], inputs.gate[0]
    w13 = torch.cat((inputs.w1, inputs.w3), 1)  # as a plain user stores them; the values are ours
    d_y = torch.randn_like(x)
    for leaf in (x, gate, w13, inputs.w1, inputs.w2, inputs.w3):
        leaf.requires_grad_(grad)

    def ours() -> Output:
        y = experts(x, inputs.w1, inputs.w2, inputs.w3, indices, gate)
        if not grad:
            return y
        return [y.detach(), *torch.autograd.grad(y, (x, inputs.w1, inputs.w3, inputs.w2, gate), d_y)]

    def theirs(forward: Callable[..., Tensor]) -> Output:
        y = forward(x, w13, inputs.w2, indices, gate)
        if not grad:
            return y
        dx, d13, d2, d_gate = torch.autograd.grad(y, (x, w13, inputs.w2, gate), d_y)
        return [y.detach(), dx, *d13.chunk(2, 1), d2, d_gate]

    def compiled() -> Calls:
        torch._dynamo.reset()
        forward = torch.compile(plain_experts, dynamic=False)
        return [lambda: theirs(forward)]

    found: dict[str, Callable[[], Calls]] = {"grouped_mm": lambda: [lambda: theirs(plain_experts)]}
    if device.type == "cuda":
        found["grouped_mm, compiled"] = compiled
    exact = theirs(plain_experts)
    return Prepared(lambda: [ours], found, lambda output: relative_error(output, exact))


def plain_experts(x: Tensor, w13: Tensor, w2: Tensor, indices: Tensor, gate: Tensor) -> Tensor:
    """As a plain user of torch's grouped products writes it, transformers too: sort, two products, unsort, sum."""
    T, K = indices.shape
    chosen, order = indices.flatten().sort(stable=True)
    experts = torch.arange(w13.shape[0], device=x.device)
    ends = torch.searchsorted(chosen, experts, right=True).to(torch.int32)
    hidden = grouped_mm(x[order // K], w13.transpose(1, 2), offs=ends)
    a, b = hidden.chunk(2, -1)
    y = grouped_mm(silu(a) * b, w2.transpose(1, 2), offs=ends)
    y = y * gate.flatten()[order, None].to(y.dtype)
    return torch.zeros_like(y).index_copy(0, order, y).view(T, K, -1).sum(1)


def _decoding(c: Config, T: int) -> Case:
    return Case(
        group="experts-decode",
        op="gate, experts and shared experts, decoding",
        shape=f"{c.name}: T={T}",
        flops=6.0 * T * c.D * (c.K * c.F + c.shared) + 2.0 * T * c.D * c.E,
        bytes=0.0,  # what the routing touches, known once it is drawn
        prepare=partial(_prepare_decoding, c, T),
        limit=2e-2,
        small=True,
        quick=c is A and T in (1, 16),
    )


def _prepare_decoding(c: Config, T: int, device: torch.device) -> Prepared:
    sets = 24 if device.type == "cuda" else 2
    inputs = Inputs(c, T, sets, device)
    touched = sum(int(drawn.unique().numel()) for drawn in inputs.indices) / sets
    least = 2 * c.D * (3 * (touched * c.F + c.shared) + 2 * T + c.E)
    s1, s2, s3 = inputs.shared
    w13, s13 = torch.cat((inputs.w1, inputs.w3), 1), torch.cat((s1, s3))

    def plain(x: Tensor) -> Tensor:
        weights, indices = plain_gate(x, inputs.router, inputs.bias, c.K, 1, 1)
        a, b = linear(x, s13).chunk(2, -1)
        return plain_experts(x, w13, inputs.w2, indices, weights) + linear(silu(a) * b, s2)

    def compiled() -> Calls:
        torch._dynamo.reset()
        forward = torch.compile(plain, dynamic=False)
        return [partial(_no_grad, forward, x) for x in inputs.x]

    found: dict[str, Callable[[], Calls]] = {"grouped_mm": lambda: [partial(_no_grad, plain, x) for x in inputs.x]}
    if device.type == "cuda" and c is A and T in (1, 16):
        found["grouped_mm, compiled"] = compiled
    exact = _no_grad(plain, inputs.x[0])

    def ours() -> Calls:
        return [partial(_step, inputs, c, x) for x in inputs.x]

    return Prepared(ours, found, lambda output: relative_error(output, exact), bytes=float(least))


def _no_grad(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return call(x)


def _step(inputs: Inputs, c: Config, x: Tensor) -> Tensor:
    """Ours: the gate, then the routed and the shared experts, on a GPU in the same launches."""
    with torch.no_grad():
        weights, indices, _ = gate(x, inputs.router, inputs.bias, "sigmoid", 1, 1, c.K, True, 1.0, "best")
        if x.is_cuda:
            from abyssal.kernels.experts_decode import moe_decode

            return moe_decode(x, inputs.w1, inputs.w2, inputs.w3, indices, weights, *inputs.shared)
        s1, s2, s3 = inputs.shared
        routed = experts(x, inputs.w1, inputs.w2, inputs.w3, indices, weights)
        return routed + linear(silu(linear(x, s1)) * linear(x, s3), s2)
