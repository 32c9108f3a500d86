"""Attention for training and prefill, from five tensors as the projections leave them; joining is the peer's to pay."""

import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from abyssal.bench import peers
from abyssal.bench.case import Calls, Case, Output, Prepared, relative_error
from abyssal.ops.attention import attention

SHAPES = [  # sequences, heads, length; widths of the nope, rotary and value parts
    (1, 128, 4096, 128, 64, 128),
    (4, 16, 4096, 128, 64, 128),
    (1, 16, 16384, 128, 64, 128),
    (1, 16, 8192, 192, 64, 256),
    (1, 20, 8192, 192, 64, 256),
]
QUICK = SHAPES[1]
# Eight documents whose squares sum to that of one of LONG tokens: the same arithmetic, packed.
DOCUMENTS = (517, 1033, 1911, 2300, 2741, 3109, 3730, 4660)
LONG = round(sum(n * n for n in DOCUMENTS) ** 0.5)


class Inputs:
    """q_nope and the keys and values are views of what their projections made; the rotated parts are tensors."""

    def __init__(self, lens: list[int], H: int, N: int, R: int, V: int, device: torch.device, grad: bool) -> None:
        torch.manual_seed(0)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        T = sum(lens)
        q = torch.randn(T, H, N + R, device=device, dtype=dtype)
        kv = torch.randn(T, H, N + V, device=device, dtype=dtype)
        q_rope, k_rope = (torch.randn(*shape, R, device=device, dtype=dtype) for shape in ((T, H), (T,)))
        self.lens, self.scale, self.grad = lens, (N + R) ** -0.5, grad
        self.cu = torch.tensor([0, *lens]).cumsum(0).to(torch.int32).to(device)
        self.d_out = torch.randn(T, H, V, device=device, dtype=dtype)
        self.leaves = [t.detach() for t in (q[..., :N], q_rope, kv[..., :N], k_rope, kv[..., N:])]
        for leaf in self.leaves:
            leaf.requires_grad_(grad)

    def call(self, forward: Callable[..., Tensor]) -> Output:
        """`forward` of the five tensors, `[T, H, V]`; with its gradients where they are asked for."""
        if not self.grad:
            with torch.no_grad():
                return forward(*self.leaves)
        out = forward(*self.leaves)
        return [out.detach(), *torch.autograd.grad(out, self.leaves, self.d_out)]


def cases(cuda: bool) -> list[Case]:
    """Each shape forward, and forward with backward; then the packed documents."""
    if not cuda:
        tiny = (1, 2, 24, 8, 4, 8)
        return [_case(*tiny, grad) for grad in (False, True)] + [_packed((5, 9, 16), 2, 8, 4, 8, True)]
    found = [_case(*shape, grad) for grad in (False, True) for shape in SHAPES]
    return found + [_packed(DOCUMENTS, 16, 128, 64, 128, grad) for grad in (False, True)]


def _op(grad: bool) -> str:
    return "attention, forward and backward" if grad else "attention, forward"


def _work(lens: list[int], H: int, N: int, R: int, V: int, grad: bool) -> tuple[float, float]:
    """FLOPs of the causal half, the backward pass 2.5 times the forward; bytes of inputs, outputs, gradients."""
    flops = sum(n * n for n in lens) * H * (N + R + V) * (3.5 if grad else 1.0)
    numbers = sum(lens) * (H * (2 * N + R + 2 * V) + R)
    return flops, 2.0 * numbers * (2 if grad else 1)


def _case(S: int, H: int, length: int, N: int, R: int, V: int, grad: bool) -> Case:
    lens = [length] * S
    flops, least = _work(lens, H, N, R, V, grad)
    return Case(
        group="attention", op=_op(grad), shape=f"{S}x{H}x{length} {N + R}/{V}", flops=flops, bytes=least,
        prepare=partial(_prepare, lens, H, N, R, V, grad), limit=2e-2, quick=(S, H, length, N, R, V) == QUICK,
    )  # fmt: skip


def _packed(documents: tuple[int, ...], H: int, N: int, R: int, V: int, grad: bool) -> Case:
    lens = list(documents)
    flops, least = _work(lens, H, N, R, V, grad)
    return Case(
        group="packing", op=_op(grad).replace(",", ", packed documents,"),
        shape=f"{len(lens)} documents, H={H} {N + R}/{V}", flops=flops, bytes=least,
        prepare=partial(_prepare_packed, lens, H, N, R, V, grad), limit=2e-2,
        note="the peer is our own kernel on one document of the same arithmetic",
    )  # fmt: skip


def _ours(inputs: Inputs) -> Calls:
    most = max(inputs.lens)

    def forward(q_nope: Tensor, q_rope: Tensor, k_nope: Tensor, k_rope: Tensor, v: Tensor) -> Tensor:
        return attention(q_nope, q_rope, k_nope, k_rope, v, inputs.cu, inputs.cu, most, most, inputs.scale)

    return [lambda: inputs.call(forward)]


def _prepare(lens: list[int], H: int, N: int, R: int, V: int, grad: bool, device: torch.device) -> Prepared:
    inputs = Inputs(lens, H, N, R, V, device, grad)
    name = "cuDNN" if device.type == "cuda" else "SDPA"
    found: dict[str, Callable[[], Calls]] = {name: partial(_sdpa, inputs)}
    if device.type == "cuda":
        found["flash varlen, padded"] = partial(_varlen, inputs)
        if not grad:
            found["FlashInfer"] = partial(_flashinfer, inputs)
    exact = _sdpa(inputs)[0]()
    return Prepared(partial(_ours, inputs), found, lambda output: relative_error(output, exact))


def _prepare_packed(lens: list[int], H: int, N: int, R: int, V: int, grad: bool, device: torch.device) -> Prepared:
    inputs = Inputs(lens, H, N, R, V, device, grad)
    long = Inputs([round(sum(n * n for n in lens) ** 0.5)], H, N, R, V, device, grad)
    exact = inputs.call(partial(_by_document, lens, inputs.scale))
    exact_long = _sdpa(long)[0]()

    def check(output: Output) -> float:
        first = output if isinstance(output, Tensor) else output[0]
        return relative_error(output, exact if first.shape[0] == sum(lens) else exact_long)

    return Prepared(partial(_ours, inputs), {"ours, one document": partial(_ours, long)}, check)


def _joined(q_nope: Tensor, q_rope: Tensor, k_nope: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
    k_rope = k_rope[:, None].expand(-1, k_nope.shape[1], -1)
    return torch.cat((q_nope, q_rope), -1), torch.cat((k_nope, k_rope), -1)


def _dense(S: int, scale: float, q_nope: Tensor, q_rope: Tensor, k_nope: Tensor, k_rope: Tensor, v: Tensor) -> Tensor:
    """PyTorch's attention, cuDNN's kernel on CUDA, on S sequences of one length."""
    q, k, v = (
        t.unflatten(0, (S, -1)).transpose(1, 2) for t in (*_joined(q_nope, q_rope, k_nope, k_rope), v)
    )  # fmt: skip
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION if q.is_cuda else SDPBackend.MATH):
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return out.transpose(1, 2).flatten(0, 1)


def _by_document(lens: list[int], scale: float, *five: Tensor) -> Tensor:
    return torch.cat([_dense(1, scale, *parts) for parts in zip(*(t.split(lens) for t in five))])


def _sdpa(inputs: Inputs) -> Calls:
    return [lambda: inputs.call(partial(_dense, len(inputs.lens), inputs.scale))]


def _varlen(inputs: Inputs) -> Calls:
    from torch.nn.attention.varlen import varlen_attn

    most = max(inputs.lens)

    def forward(q_nope: Tensor, q_rope: Tensor, k_nope: Tensor, k_rope: Tensor, v: Tensor) -> Tensor:
        q, k = _joined(q_nope, q_rope, k_nope, k_rope)
        wide = pad(v, (0, q.shape[-1] - v.shape[-1]))
        out = varlen_attn(q, k, wide, inputs.cu, inputs.cu, most, most, scale=inputs.scale, window_size=(-1, 0))
        assert isinstance(out, Tensor)
        return out[..., : v.shape[-1]]

    return [lambda: inputs.call(forward)]


def _flashinfer(inputs: Inputs) -> Calls:
    prefill = peers.module("FlashInfer", "flashinfer.prefill")
    q_nope, q_rope, _, _, v = inputs.leaves
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapper = prefill.BatchPrefillWithRaggedKVCacheWrapper(
            torch.empty(256 << 20, dtype=torch.uint8, device=v.device), backend="fa3"
        )
        wrapper.plan(
            inputs.cu, inputs.cu, v.shape[1], v.shape[1], q_nope.shape[-1] + q_rope.shape[-1],
            head_dim_vo=v.shape[-1], causal=True, sm_scale=inputs.scale, q_data_type=v.dtype, kv_data_type=v.dtype,
        )  # fmt: skip

    def forward(q_nope: Tensor, q_rope: Tensor, k_nope: Tensor, k_rope: Tensor, v: Tensor) -> Tensor:
        out = wrapper.run(*_joined(q_nope, q_rope, k_nope, k_rope), v)
        assert isinstance(out, Tensor)
        return out

    return [lambda: inputs.call(forward)]
