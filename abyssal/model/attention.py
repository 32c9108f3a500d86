"""The ladder that latent attention replaces: multi-head, grouped-query and multi-query attention.

Every head of keys and values that a token has stays in the cache: 2·G·width numbers a token with G of them
(Shazeer 2019; Ainslie et al. 2023). MHA has one for each query head, MQA one for all.
"""

from torch import Tensor, nn

from abyssal.config import ModelConfig
from abyssal.model.cache import Leaves
from abyssal.model.layers import Linear
from abyssal.model.packing import Packing
from abyssal.model.positions import Rotary
from abyssal.ops.attention import attention
from abyssal.ops.paged import gather_pages
from abyssal.ops.rotary import rotate


class GroupedAttention(nn.Module):
    """H query heads over G heads of keys (width N) and values (width V)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        D, H, G = config.hidden_size, config.num_attention_heads, config.key_value_heads
        N, V = config.qk_nope_head_dim, config.v_head_dim
        self.wq = Linear(D, H * N)
        self.wk = Linear(D, G * N)
        self.wv = Linear(D, G * V)
        self.wo = Linear(H * V, D)

    def leaves(self) -> Leaves:
        """Every head's key, rotated, and value."""
        c = self.config
        G = c.key_value_heads
        return {"key": (G * c.qk_nope_head_dim, None), "value": (G * c.v_head_dim, None)}

    def forward(
        self,
        x: Tensor,
        angles: Rotary | None,
        packing: Packing,
        cache: dict[str, Tensor] | None = None,
        path: str | None = None,
    ) -> Tensor:
        """`x [T, D]` -> `[T, D]`. With a cache, writes each token's keys and values and attends to all there.

        There is nothing to absorb: `path` "absorbed" raises ValueError.
        """
        if path == "absorbed":
            raise ValueError(f"path 'absorbed': {self.config.attention} has no latent to absorb into")
        c = self.config
        q = self.wq(x).unflatten(-1, (c.num_attention_heads, -1))
        k = self.wk(x).unflatten(-1, (c.key_value_heads, -1))
        v = self.wv(x)
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        k = k.flatten(1)
        cu_k, longest = packing.cu_seqlens, packing.max_len
        if cache is not None:
            assert packing.slots is not None
            cache["key"].index_copy_(0, packing.slots, k)
            cache["value"].index_copy_(0, packing.slots, v)
            if not packing.fresh:
                assert packing.block_table is not None and packing.context_lens is not None
                where = (packing.block_table, packing.context_lens, packing.page_size)
                k, cu_k, longest = gather_pages(cache["key"], *where)
                v, _, _ = gather_pages(cache["value"], *where)
        k, v = (t.unflatten(-1, (c.key_value_heads, -1)) for t in (k, v))
        out = attention(
            q, None, k, None, v, packing.cu_seqlens, cu_k, packing.max_len, longest, c.softmax_scale
        )  # fmt: skip
        return self.wo(out.flatten(1))
