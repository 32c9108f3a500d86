"""Causal attention over packed sequences, keys and values expanded: for training and for prefill.

The score of a query and a key is a sum of two products, q_nope·k_nope + q_rope·k_rope, the second with one rotary
key that all heads share (DeepSeek-V3, equations 7-10). The reference adds them. PyTorch's kernels take one query
and one key, so the paths that call them must concatenate and copy, which is what a kernel of our own would save.
"""

from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention


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
    sequence by sequence), "varlen" (PyTorch's flash attention on CUDA, in 16 bits, without a host
    synchronisation). None chooses.
    """
    if path is None:
        narrow = q_nope.dtype in (torch.bfloat16, torch.float16)
        path = "sdpa" if q_nope.device.type == "cpu" else "varlen" if narrow else "reference"
    if path == "reference":
        return _reference(q_nope, q_rope, k_nope, k_rope, v, cu_q, cu_k, scale)
    q, k, v_wide = _joined(q_nope, q_rope, k_nope, k_rope, v)
    if path == "sdpa":
        out = _sdpa(q, k, v_wide, cu_q, cu_k, scale)
    elif path == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        out = cast(Tensor, varlen_attn(q, k, v_wide, cu_q, cu_k, max_q, max_k, scale=scale, window_size=(-1, 0)))
    else:
        raise ValueError(f"path: expected 'reference', 'sdpa' or 'varlen', got {path!r}")
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
    """One query, one key and a value of one width and one number of heads, as PyTorch's kernels want them."""
    q, k, group = q_nope, k_nope, q_nope.shape[1] // k_nope.shape[1]
    if q_rope is not None and k_rope is not None:
        q = torch.cat((q_nope, q_rope), -1)
        k = torch.cat((k_nope, k_rope[:, None].expand(-1, k_nope.shape[1], -1)), -1)
    width = max(q.shape[-1], v.shape[-1])
    q, k, v = (pad(t, (0, width - t.shape[-1])) if t.shape[-1] < width else t for t in (q, k, v))
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return q, k, v


def _sdpa(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, scale: float) -> Tensor:
    lens_q, lens_k = cu_q.diff().tolist(), cu_k.diff().tolist()
    if lens_q and min(lens_q) == max(lens_q) > 0 and lens_q == lens_k:  # all alike: one call
        q, k, v = (t.unflatten(0, (len(lens_q), lens_q[0])).transpose(1, 2) for t in (q, k, v))
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return out.transpose(1, 2).flatten(0, 1)
    outs = []
    for q_s, k_s, v_s in zip(q.split(lens_q), k.split(lens_k), v.split(lens_k)):
        t, l = q_s.shape[0], k_s.shape[0]
        if t == 0:
            continue
        q_s, k_s, v_s = (x.transpose(0, 1)[None] for x in (q_s, k_s, v_s))
        mask = None if t in (1, l) else causal(t, l, q.device)
        out = scaled_dot_product_attention(q_s, k_s, v_s, attn_mask=mask, is_causal=t == l > 1, scale=scale)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs) if outs else q.new_zeros(q.shape)
