"""Causal attention over packed sequences, keys and values expanded: for training and for prefill.

The score of a query and a key is a sum of two products, q_nope·k_nope + q_rope·k_rope, the second with one rotary
key that all heads share (DeepSeek-V3, equations 7-10). The reference adds them. PyTorch's kernels take one query
and one key, so the paths that call them must concatenate and copy; those of our own, for Hopper, read the five tensors.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from abyssal.ops.device import capability, on_cpu


def attention(
    q_nope: Tensor,
    q_rope: Tensor | None,
    k_nope: Tensor,
    k_rope: Tensor | None,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    path: str | None = None,
) -> Tensor:
    """`[T, H, V]`: softmax(scale · (q_nope k_nopeᵀ + q_rope k_ropeᵀ)) v, each sequence by itself.

    `q_nope [T, H, N]`, `q_rope [T, H, R]`; `k_nope [L, G, N]`, `k_rope [L, R]`, `v [L, G, V]` with G heads of keys
    that divide H. `cu_q`, `cu_k` `[S+1]` int32. A sequence's queries are its last keys: query j of t sees keys
    up to l - t + j. Both rotary arguments are None where nothing is decoupled.

    Paths: "reference" (any dtype and device; memory H·t·l a sequence), "sdpa" (PyTorch's flash attention on a CPU,
    sequence by sequence), "varlen" (PyTorch's flash attention on CUDA, in 16 bits), "hopper" (16 bits, compute
    capability 9; gradients where no sequence sees earlier tokens, which is known of one `cu` for both or of sequences
    all as long as the longest). The last two never wait for the device. None chooses.

    Gradients on "hopper" add up in an order that differs from run to run, unless
    `torch.use_deterministic_algorithms` asks for the same bits (at half the speed, a quarter for heads of 256).
    """
    if path is None:
        narrow = q_nope.dtype in (torch.bfloat16, torch.float16)
        path = "sdpa" if on_cpu(q_nope) else "varlen" if narrow else "reference"
        if path == "varlen" and on_hopper(q_nope, q_rope, k_nope, k_rope, v, cu_q, cu_k, max_q, max_k):
            path = "hopper"
    if path == "reference" or 0 in (q_nope.shape[0], v.shape[0]):
        return _reference(q_nope, q_rope, k_nope, k_rope, v, cu_q, cu_k, scale)
    if path == "hopper":
        out, _ = _hopper(q_nope, q_rope, k_nope, k_rope, v, cu_q, cu_k, max_q, max_k, scale)
        return cast(Tensor, out)
    q, k, v_wide = _joined(q_nope, q_rope, k_nope, k_rope, v)
    if path == "sdpa":
        out = _sdpa(q, k, v_wide, cu_q, cu_k, scale)
    elif path == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        k, v_wide = _for_all_heads(q, k, v_wide)
        out = cast(Tensor, varlen_attn(q, k, v_wide, cu_q, cu_k, max_q, max_k, scale=scale, window_size=(-1, 0)))
    else:
        raise ValueError(f"path: expected 'reference', 'sdpa', 'varlen' or 'hopper', got {path!r}")
    return out[..., : v.shape[-1]]


def causal(queries: int, keys: int, device: torch.device) -> Tensor:
    """[t, l] bool: what each of the last `queries` of `keys` tokens may see."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def _reference(
    q_nope: Tensor, q_rope: Tensor | None, k_nope: Tensor, k_rope: Tensor | None, v: Tensor,
    cu_q: Tensor, cu_k: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    group = q_nope.shape[1] // k_nope.shape[1]
    wide = torch.promote_types(q_nope.dtype, torch.float32)
    starts_q, starts_k = cu_q.tolist(), cu_k.tolist()
    outs = []
    for q0, q1, k0, k1 in zip(starts_q, starts_q[1:], starts_k, starts_k[1:]):
        keys = k_nope[k0:k1].to(wide).repeat_interleave(group, 1)
        values = v[k0:k1].to(wide).repeat_interleave(group, 1)
        scores = torch.einsum("thn,lhn->htl", q_nope[q0:q1].to(wide), keys)
        if q_rope is not None and k_rope is not None:
            scores = scores + torch.einsum("thr,lr->htl", q_rope[q0:q1].to(wide), k_rope[k0:k1].to(wide))
        hidden = ~causal(q1 - q0, k1 - k0, v.device)
        probs = (scores * scale).masked_fill(hidden, float("-inf")).softmax(-1)
        outs.append(torch.einsum("htl,lhv->thv", probs, values))
    return torch.cat(outs).to(v.dtype) if outs else v.new_zeros(0, q_nope.shape[1], v.shape[-1])


def _joined(
    q_nope: Tensor, q_rope: Tensor | None, k_nope: Tensor, k_rope: Tensor | None, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One query, one key and a value of one width, as PyTorch's kernels want them."""
    q, k = q_nope, k_nope
    if q_rope is not None and k_rope is not None:
        q = torch.cat((q_nope, q_rope), -1)
        k = torch.cat((k_nope, k_rope[:, None].expand(-1, k_nope.shape[1], -1)), -1)
    width = max(q.shape[-1], v.shape[-1])
    q, k, v = (pad(t, (0, width - t.shape[-1])) if t.shape[-1] < width else t for t in (q, k, v))
    return q, k, v


def _for_all_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values `[L, G, width]` copied to the heads of `q [T, H, width]`."""
    group = q.shape[1] // k.shape[1]
    return (k, v) if group == 1 else (k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))


def on_hopper(
    q_nope: Tensor, q_rope: Tensor | None, k_nope: Tensor, k_rope: Tensor | None, v: Tensor,
    cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
) -> bool:  # fmt: skip
    """Whether "hopper" takes these tensors, with their gradients where any is asked for."""
    if capability(v)[0] != 9:
        return False
    from abyssal.kernels.attention_forward import supports

    tensors = (q_nope, q_rope, k_nope, k_rope, v)
    if not supports(*tensors):
        return False
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
        return True
    alone = cu_q is cu_k or (q_nope.shape[0] == v.shape[0] == (cu_q.shape[0] - 1) * max_q and max_q == max_k)
    return alone and q_nope.shape[1] == k_nope.shape[1]


@torch.library.custom_op(
    "abyssal::attention_hopper",
    mutates_args=(),
    schema="(Tensor q_nope, Tensor? q_rope, Tensor k_nope, Tensor? k_rope, Tensor v, Tensor cu_q, Tensor cu_k, "
    "SymInt max_q, SymInt max_k, float scale) -> (Tensor, Tensor)",
)
def _hopper(
    q_nope: Tensor, q_rope: Tensor | None, k_nope: Tensor, k_rope: Tensor | None, v: Tensor,
    cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`out [T, H, V]` and the logarithm of the softmax's denominator, `[H, T]` float32."""
    from abyssal.kernels.attention_forward import attention_forward

    return attention_forward(q_nope, q_rope, k_nope, k_rope, v, cu_q, cu_k, max_q, max_k, scale)


@_hopper.register_fake
def _(
    q_nope: Tensor, q_rope: Tensor | None, k_nope: Tensor, k_rope: Tensor | None, v: Tensor,
    cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    T, H, _ = q_nope.shape
    return v.new_empty(T, H, v.shape[-1]), v.new_empty(H, T, dtype=torch.float32)


@torch.library.custom_op(
    "abyssal::attention_hopper_backward",
    mutates_args=(),
    schema="(Tensor d_out, Tensor q_nope, Tensor? q_rope, Tensor k_nope, Tensor? k_rope, Tensor v, Tensor out, "
    "Tensor lse, Tensor cu, SymInt longest, float scale, Tensor? cos, Tensor? sin) -> (Tensor, Tensor, Tensor)",
)
def hopper_backward(
    d_out: Tensor, q_nope: Tensor, q_rope: Tensor | None, k_nope: Tensor, k_rope: Tensor | None, v: Tensor,
    out: Tensor, lse: Tensor, cu: Tensor, longest: int, scale: float, cos: Tensor | None, sin: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`dq [T, H, N + R]`, `dkv [T, H, N + V]`, `dk_rope [T, R]`. With `cos` and `sin` `[T, R/2]`, by which q_rope was
    rotated, dq is the gradient of what it was before.

    Sequences of one length (which the host sees where S times the longest is T) go to cuDNN where it is faster.
    """
    from abyssal.kernels.attention_backward import attention_backward
    from abyssal.kernels.attention_join import cudnn_backward, cudnn_takes

    tensors = (d_out, q_nope, q_rope, k_nope, k_rope, v, out, lse)
    deterministic, sequences = torch.are_deterministic_algorithms_enabled(), cu.shape[0] - 1
    widths = (q_nope.shape[-1], 0 if q_rope is None else q_rope.shape[-1], v.shape[-1])
    angles = None if cos is None or sin is None else (cos, sin)
    if not deterministic and cudnn_takes(*widths, sequences, longest, v.shape[0]):
        return cudnn_backward(*tensors, sequences, scale, angles)
    return attention_backward(*tensors, cu, scale, deterministic, angles)


@hopper_backward.register_fake
def _(
    d_out: Tensor, q_nope: Tensor, q_rope: Tensor | None, k_nope: Tensor, k_rope: Tensor | None, v: Tensor,
    out: Tensor, lse: Tensor, cu: Tensor, longest: int, scale: float, cos: Tensor | None, sin: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    T, H, N = q_nope.shape
    R = 0 if q_rope is None else q_rope.shape[-1]
    new = v.new_empty
    return new(T, H, N + R), new(T, H, N + v.shape[-1]), new(T, R)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q_nope, q_rope, k_nope, k_rope, v, cu_q, _, ctx.longest, _, ctx.scale = inputs
    ctx.save_for_backward(q_nope, q_rope, k_nope, k_rope, v, *output, cu_q)


def _gradients(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q_nope, q_rope, k_nope, k_rope, v, out, lse, cu = ctx.saved_tensors
    saved = (q_nope, q_rope, k_nope, k_rope, v, out, lse, cu)
    dq, dkv, dk_rope = hopper_backward(d_out, *saved, ctx.longest, ctx.scale, None, None)
    N = q_nope.shape[-1]
    dq_rope, dk_rope = (None, None) if q_rope is None else (dq[..., N:], dk_rope)
    return dq[..., :N], dq_rope, dkv[..., :N], dk_rope, dkv[..., N:], None, None, None, None, None


_hopper.register_autograd(_gradients, setup_context=_keep)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, scale: float) -> Tensor:
    lens_q, lens_k = cu_q.diff().tolist(), cu_k.diff().tolist()
    if lens_q and min(lens_q) == max(lens_q) > 0 and lens_q == lens_k:  # all alike: one call
        k, v = _for_all_heads(q, k, v)
        q, k, v = (t.unflatten(0, (len(lens_q), lens_q[0])).transpose(1, 2) for t in (q, k, v))
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return out.transpose(1, 2).flatten(0, 1)
    outs = []
    for q_s, k_s, v_s in zip(q.split(lens_q), k.split(lens_k), v.split(lens_k)):
        t, l = q_s.shape[0], k_s.shape[0]
        if t == 0:
            continue
        if t == 1:  # the heads of a group are that many queries of one head of keys, which need not be copied
            q_s = q_s.reshape(k.shape[1], -1, q.shape[-1])[None]
            k_s, v_s = (x.transpose(0, 1)[None] for x in (k_s, v_s))
            outs.append(scaled_dot_product_attention(q_s, k_s, v_s, scale=scale).flatten(1, 2))
            continue
        k_s, v_s = _for_all_heads(q_s, k_s, v_s)
        q_s, k_s, v_s = (x.transpose(0, 1)[None] for x in (q_s, k_s, v_s))
        mask = None if t == l else causal(t, l, q.device)
        out = scaled_dot_product_attention(q_s, k_s, v_s, attn_mask=mask, is_causal=t == l, scale=scale)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs) if outs else q.new_zeros(q.shape)
