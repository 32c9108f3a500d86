"""Context parallel: each rank has some of the tokens of the packed documents, and attention sees keys of all.

`cut` says which rank has which tokens. Every rank makes the queries of its own; of the keys and values, what a token
leaves behind is gathered over `cp`: for latent attention the latent and the rotary key, C + R numbers for all heads.
Each piece of a document that a rank has then picks the rows of the document from its start to the piece's end, and
expands them as attention over a cache would: a piece's queries are the last of its keys.
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from abyssal.model.attention import GroupedAttention
from abyssal.model.latent import LatentAttention, row
from abyssal.model.packing import Packing
from abyssal.model.positions import Rotary
from abyssal.model.transformer import Transformer
from abyssal.ops.attention import attention
from abyssal.ops.rotary import rotate
from abyssal.parallel.mesh import Mesh
from abyssal.parallel.rows import gathered


def spread_context(model: Transformer, mesh: Mesh) -> None:
    """Lets every attention of the model see the tokens that other ranks of `cp` have."""
    group = mesh.group("cp")
    for module in model.modules():
        if isinstance(module, LatentAttention):
            module.__dict__["forward"] = partial(_latent, module, group)
        elif isinstance(module, GroupedAttention):
            module.__dict__["forward"] = partial(_grouped, module, group)


def _latent(
    attn: LatentAttention, group: dist.ProcessGroup, x: Tensor, angles: Rotary | None, packing: Packing,
    cache: None = None, path: str | None = None,
) -> Tensor:  # fmt: skip
    """`LatentAttention.forward` over this rank's pieces, `x [T, D]`; `packing` as `cut` makes it."""
    q_nope, q_rope = attn.queries(x, angles)
    latent, k_rope = attn.leave(x, angles)
    rows = gathered(row(latent, k_rope, latent.dtype), group)
    return attn.wo(attn.expanded(q_nope, q_rope, latent, k_rope, packing, {"latent": rows}).flatten(1))


def _grouped(
    attn: GroupedAttention, group: dist.ProcessGroup, x: Tensor, angles: Rotary | None, packing: Packing,
    cache: None = None, path: str | None = None,
) -> Tensor:  # fmt: skip
    """`GroupedAttention.forward` likewise."""
    assert packing.context_rows is not None and packing.cu_context is not None
    c = attn.config
    q = attn.wq(x).unflatten(-1, (c.num_attention_heads, -1))
    k = attn.wk(x).unflatten(-1, (c.key_value_heads, -1))
    v = attn.wv(x).unflatten(-1, (c.key_value_heads, -1))
    if angles is not None:
        q, k = rotate(q, *angles), rotate(k, *angles)
    rows = gathered(torch.cat((k, v), -1), group).index_select(0, packing.context_rows)
    k, v = rows.split((c.qk_nope_head_dim, c.v_head_dim), -1)
    out = attention(
        q, None, k, None, v, packing.cu_seqlens, packing.cu_context, packing.max_len, packing.max_context,
        c.softmax_scale,
    )  # fmt: skip
    return attn.wo(out.flatten(1))
