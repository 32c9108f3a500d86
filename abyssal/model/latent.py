"""Multi-head latent attention (DeepSeek-V2 section 2.1, DeepSeek-V3 section 2.1.1): project, attend, output.

A token leaves behind its latent c = norm(W_DKV x) and one rotary key for all heads, C + R numbers. Attention has
two orders of multiplication over the same weights. Expanded, for training and prefill: keys and values of every
head are made from the latents. Absorbed, for decoding: W_UK is multiplied into the query and W_UV into the output,
and the cached rows are read as they lie. W_UK and W_UV stay two factors of `wkv_b`.
"""

import torch
from torch import Tensor, nn

from abyssal.config import ModelConfig
from abyssal.model.cache import Leaves
from abyssal.model.layers import Linear, RMSNorm, beside, join
from abyssal.model.packing import Packing
from abyssal.model.positions import Rotary, rotary
from abyssal.ops.attention import attention
from abyssal.ops.latent_attention import latent_attention
from abyssal.ops.latent_decode import latent_decode
from abyssal.ops.latent_rows import pack_rows, unpack_rows
from abyssal.ops.latent_write import absorb, latent_write
from abyssal.ops.paged import gather_pages
from abyssal.ops.rotary import norm_rotate, rotate

LATENT_EPS = 1e-6  # of the latents' two norms, whatever rms_norm_eps says of the others


class LatentAttention(nn.Module):
    """Attribute names are those of DeepSeek's inference code."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        D, H = config.hidden_size, config.num_attention_heads
        N, R, V, C = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim, config.kv_lora_rank
        self.compressed = config.q_lora_rank is not None
        if config.q_lora_rank is not None:
            self.wq_a = Linear(D, config.q_lora_rank)
            self.q_norm = RMSNorm(config.q_lora_rank, LATENT_EPS)
            self.wq_b = Linear(config.q_lora_rank, H * (N + R))
        else:
            self.wq = Linear(D, H * (N + R))
        self.wkv_a = Linear(D, C + R)
        self.kv_norm = RMSNorm(C, LATENT_EPS)
        self.wkv_b = Linear(C, H * (N + V))
        self.wo = Linear(H * V, D)

    def leaves(self) -> Leaves:
        """One contiguous row a token: the latent, then the rotary key."""
        return {"latent": (self.config.kv_lora_rank + self.config.qk_rope_head_dim, None)}

    def forward(
        self,
        x: Tensor,
        angles: Rotary | None,
        packing: Packing,
        cache: dict[str, Tensor] | None = None,
        path: str | None = None,
    ) -> Tensor:
        """`x [T, D]` -> `[T, D]`. With a cache, writes each token's row and attends to all that stands there.

        `path` is "expanded", "absorbed" or None, which chooses the one with less arithmetic. Raises ValueError
        where absorption cannot be: without a cache, or where RoPE stands between W_UQ and W_UK.
        """
        c = self.config
        path = path or self.cheaper(packing, cached=cache is not None)
        if path == "absorbed":
            if cache is None:
                raise ValueError("path 'absorbed' reads the cached rows: expected a cache")
            if c.position == "rope":
                raise ValueError("path 'absorbed': with coupled RoPE a rotation stands between W_UQ and W_UK")
            out = self.absorbed(x, angles, packing, cache["latent"])
        elif path == "expanded":
            if cache is None and c.position == "decoupled" and angles is not None:
                return self.wo(self.whole(x, angles, packing).flatten(1))
            if cache is None or c.position == "rope" or torch.is_grad_enabled():
                q_nope, q_rope = self.queries(x, angles)
                latent, k_rope = self.leave(x, angles)
                if cache is not None:
                    assert packing.slots is not None
                    cache["latent"].index_copy_(0, packing.slots, row(latent, k_rope, cache["latent"].dtype))
            else:
                q_nope, q_rope, latent, k_rope = self.written(x, angles, packing, cache["latent"])
            out = self.expanded(q_nope, q_rope, latent, k_rope, packing, None if packing.fresh else cache)
        else:
            raise ValueError(f"path: expected 'expanded' or 'absorbed', got {path!r}")
        return self.wo(out.flatten(1))

    def cheaper(self, packing: Packing, cached: bool) -> str:
        """Expanding costs C(N + V) a head and context token once; absorbing makes every query's product with it
        wider by 2C − N − V."""
        c = self.config
        if not cached or (packing.fresh and packing.max_len > 1) or c.position == "rope":
            return "expanded"
        wider = 2 * c.kv_lora_rank - c.qk_nope_head_dim - c.v_head_dim
        expansion = c.kv_lora_rank * (c.qk_nope_head_dim + c.v_head_dim)
        return "absorbed" if packing.max_len * wider <= expansion else "expanded"

    def queries(self, x: Tensor, angles: Rotary | None) -> tuple[Tensor, Tensor | None]:
        """q_nope `[T, H, N]` and q_rope `[T, H, R]` (equations 6-8). Coupled RoPE rotates all of q_nope."""
        c = self.config
        q = self.project_queries(x)
        if c.position == "rope" and angles is not None:
            return rotate(q, *angles), None
        if not c.qk_rope_head_dim:
            return q, None
        assert angles is not None
        q_nope, q_rope = q.split((c.qk_nope_head_dim, c.qk_rope_head_dim), -1)
        return q_nope, rotate(q_rope, *angles)

    def project_queries(self, x: Tensor) -> Tensor:
        """`[T, H, N + R]`, nothing rotated."""
        q = self.wq_b(self.q_norm(self.wq_a(x))) if self.compressed else self.wq(x)
        return q.unflatten(-1, (self.config.num_attention_heads, -1))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`project_queries`, and `[T, C + R]`: latent and rotary key, nothing normalised or rotated."""
        if self.compressed:
            q, kv = beside(x, self.wq_a, self.wkv_a)
            q = self.wq_b(self.q_norm(q))
        else:
            q, kv = beside(x, self.wq, self.wkv_a)
        return q.unflatten(-1, (self.config.num_attention_heads, -1)), kv

    def join(self) -> None:
        """See `Transformer.join`."""
        join(self.wq_a if self.compressed else self.wq, self.wkv_a)

    def leave(self, x: Tensor, angles: Rotary | None) -> tuple[Tensor, Tensor | None]:
        """The latent `[T, C]`, normalised, and the rotary key `[T, R]`, rotated (equations 1 and 3)."""
        c = self.config
        if not c.qk_rope_head_dim:
            return self.kv_norm(self.wkv_a(x)), None
        assert angles is not None
        latent, k_rope = self.wkv_a(x).split((c.kv_lora_rank, c.qk_rope_head_dim), -1)
        return self.kv_norm(latent), rotate(k_rope, *angles)

    def written(
        self, x: Tensor, angles: Rotary | None, packing: Packing, rows: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """`queries` and `leave` for inference, and the rows of the cache written: two passes over memory. Latents
        and rotary keys are not rounded to the cache's dtype."""
        c = self.config
        q, kv = self.project(x)
        cos, sin = angles if c.qk_rope_head_dim and angles is not None else (None, None)
        own = torch.empty_like(kv, memory_format=torch.contiguous_format)
        latent_write(kv, self.kv_norm.weight, LATENT_EPS, cos, sin, own, None, q)
        latent_write(kv, self.kv_norm.weight, LATENT_EPS, cos, sin, rows, packing.slots)
        latent, k_rope = own.split((c.kv_lora_rank, c.qk_rope_head_dim), -1)
        q_nope, q_rope = q.split((c.qk_nope_head_dim, c.qk_rope_head_dim), -1)
        return (q_nope, q_rope, latent, k_rope) if c.qk_rope_head_dim else (q_nope, None, latent, None)

    def up_projections(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """W_UK `[H, N, C]` and W_UV `[H, V, C]`, views of `wkv_b`."""
        c = self.config
        heads = self.wkv_b.dense(dtype).unflatten(0, (c.num_attention_heads, -1))
        w_uk, w_uv = heads.split((c.qk_nope_head_dim, c.v_head_dim), 1)
        return w_uk, w_uv

    def whole(self, x: Tensor, angles: Rotary, packing: Packing) -> Tensor:
        """`[T, H, V]`: `expanded` over whole sequences without a cache. Each product goes on in one piece, and so does
        its gradient on the way back."""
        q, rows = self.project(x)
        latent, k_rope = norm_rotate(rows, self.kv_norm.weight, LATENT_EPS, *angles)
        kv = self.wkv_b(latent).unflatten(-1, (self.config.num_attention_heads, -1))
        return latent_attention(q, kv, k_rope, *angles, packing.cu_seqlens, packing.max_len, self.config.softmax_scale)

    def expanded(
        self,
        q_nope: Tensor,
        q_rope: Tensor | None,
        latent: Tensor,
        k_rope: Tensor | None,
        packing: Packing,
        cache: dict[str, Tensor] | None,
    ) -> Tensor:
        """[T, H, V], from keys and values of every head (equations 2, 4, 5, 10). With a cache they are made
        anew from every row of the context, and coupled RoPE rotates them anew."""
        c = self.config
        cu_k, longest = packing.cu_seqlens, packing.max_len
        positions = packing.positions
        if cache is not None:
            rows, cu_k, longest = packed_context(cache["latent"], packing)
            if rows.dtype == torch.uint8:
                rows = unpack_rows(rows, c.kv_lora_rank, q_nope.dtype)
            latent = rows[:, : c.kv_lora_rank]
            k_rope = rows[:, c.kv_lora_rank :] if c.qk_rope_head_dim else None
            if c.position == "rope":
                places = torch.arange(rows.shape[0], device=rows.device)
                positions = places - cu_k[:-1].repeat_interleave(cu_k.diff(), output_size=rows.shape[0])
        kv = self.wkv_b(latent).unflatten(-1, (c.num_attention_heads, -1))
        k_nope, v = kv.split((c.qk_nope_head_dim, c.v_head_dim), -1)
        if c.position == "rope":
            angles = rotary(c, positions)
            assert angles is not None
            k_nope = rotate(k_nope, *angles)
        return attention(
            q_nope, q_rope, k_nope, k_rope, v, packing.cu_seqlens, cu_k, packing.max_len, longest, c.softmax_scale
        )  # fmt: skip

    def absorbed(self, x: Tensor, angles: Rotary | None, packing: Packing, rows: Tensor) -> Tensor:
        """[T, H, V], W_UK multiplied into the query and W_UV into what comes out, for inference. The latent is
        normalised, rotary key and queries are rotated, the row is written and W_UK applied by one operation."""
        c = self.config
        assert packing.block_table is not None and packing.context_lens is not None and packing.slots is not None
        w_uk, w_uv = self.up_projections(x.dtype)  # first: `absorb` reads it while the projections end
        q, kv = self.project(x)
        cos, sin = angles if c.qk_rope_head_dim and angles is not None else (None, None)
        q_latent = absorb(q, w_uk, kv, self.kv_norm.weight, LATENT_EPS, cos, sin, rows, packing.slots)
        return latent_decode(
            q_latent, q[..., c.qk_nope_head_dim :] if c.qk_rope_head_dim else None, rows, packing.cu_seqlens,
            packing.block_table, packing.context_lens, packing.page_size, c.softmax_scale, max_q=packing.max_len,
            alone=packing.alone, w_uv=w_uv,
        )  # fmt: skip


def packed_context(rows: Tensor, packing: Packing) -> tuple[Tensor, Tensor, int]:
    """The cached rows of every sequence's context, one behind the other: `[L, W]`, their boundaries, the longest.
    Waits for the device only where the host does not know the lengths."""
    if packing.context_rows is not None and packing.cu_context is not None:
        return rows.index_select(0, packing.context_rows), packing.cu_context, packing.max_context
    assert packing.block_table is not None and packing.context_lens is not None
    return gather_pages(rows, packing.block_table, packing.context_lens, packing.page_size)


def row(latent: Tensor, k_rope: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What a token leaves behind, as a cache of `dtype` keeps it: `[T, C + R]`, or packed into bytes."""
    if dtype == torch.uint8:
        return pack_rows(latent, k_rope)
    return latent if k_rope is None else torch.cat((latent, k_rope), -1)
