"""Latent attention's expanded form over whole sequences, for training: from the products as they leave the matrices.

The same as splitting q and kv, rotating q's tail and calling `attention`. But then each slice's gradient would come
back by itself, to be put together in memory; here those of q and of kv arrive whole, and a kernel that writes q's
gradient turns it back on the way.
"""

from typing import Any

import torch
from torch import Tensor

from abyssal.ops.attention import attention, hopper_backward, on_hopper
from abyssal.ops.rotary import rotate


def latent_attention(
    q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, cu: Tensor, longest: int, scale: float,
    path: str | None = None,
) -> Tensor:  # fmt: skip
    """`[T, H, V]`: causal attention of each sequence to itself.

    `q [T, H, N + R]`, whose last R columns are yet to be rotated; `kv [T, H, N + V]`: a head's key and value;
    `k_rope [T, R]`, rotated; `cos`, `sin` `[T, R/2]`; `cu [S+1]` int32; no sequence is longer than `longest`.

    Paths: "split" (`rotate` and `attention`, whose own paths are chosen as always), "hopper" (with gradients, where
    `attention` would choose "hopper"). None chooses.
    """
    N = q.shape[-1] - k_rope.shape[-1]
    q_nope, q_rope, k_nope, v = q[..., :N], q[..., N:], kv[..., :N], kv[..., N:]
    if path is None:
        learns = torch.is_grad_enabled() and (q.requires_grad or kv.requires_grad or k_rope.requires_grad)
        ours = learns and q.shape[0] and on_hopper(q_nope, q_rope, k_nope, k_rope, v, cu, cu, longest, longest)
        path = "hopper" if ours else "split"
    if path == "hopper":
        return _hopper(q, kv, k_rope, cos, sin, cu, longest, scale)[0]
    if path != "split":
        raise ValueError(f"path: expected 'split' or 'hopper', got {path!r}")
    return attention(q_nope, rotate(q_rope, cos, sin), k_nope, k_rope, v, cu, cu, longest, longest, scale)


@torch.library.custom_op(
    "abyssal::latent_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor kv, Tensor k_rope, Tensor cos, Tensor sin, Tensor cu, SymInt longest, float scale) "
    "-> (Tensor, Tensor, Tensor)",
)
def _hopper(
    q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, cu: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`out [T, H, V]`, the logarithm of the softmax's denominator `[H, T]` float32, q's rotary part rotated."""
    from abyssal.kernels.attention_forward import attention_forward

    N = q.shape[-1] - k_rope.shape[-1]
    q_rope = rotate(q[..., N:], cos, sin)
    parts = (q[..., :N], q_rope, kv[..., :N], k_rope, kv[..., N:])
    return *attention_forward(*parts, cu, cu, longest, longest, scale), q_rope


@_hopper.register_fake
def _(
    q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, cu: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    (T, H, width), R = q.shape, k_rope.shape[-1]
    out = kv.new_empty(T, H, kv.shape[-1] - width + R)
    return out, kv.new_empty(H, T, dtype=torch.float32), q.new_empty(T, H, R)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, kv, k_rope, cos, sin, cu, ctx.longest, ctx.scale = inputs
    out, lse, q_rope = output
    ctx.save_for_backward(q, q_rope, kv, k_rope, out, lse, cu, cos, sin)
    ctx.mark_non_differentiable(lse, q_rope)
    ctx.set_materialize_grads(False)  # zeros for q_rope would be a pass over memory


def _gradients(ctx: Any, d_out: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_out is None:
        return (None,) * 8
    q, q_rope, kv, k_rope, out, lse, cu, cos, sin = ctx.saved_tensors
    N = q.shape[-1] - k_rope.shape[-1]
    parts = (q[..., :N], q_rope, kv[..., :N], k_rope, kv[..., N:])
    dq, dkv, dk_rope = hopper_backward(d_out, *parts, out, lse, cu, ctx.longest, ctx.scale, cos, sin)
    return dq, dkv, dk_rope, None, None, None, None, None


_hopper.register_autograd(_gradients, setup_context=_keep)
