"""The peers at the same shape, each mode in a process of its own: forward, loss, backward and fused AdamW, in bfloat16
on a GPU. They neither clip the gradient nor update the router's bias, and keep no float32 masters.

    python -m abyssal.bench.train_peer PEER MODE SHAPE
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from abyssal.bench.train_rows import Later, Measured, Row, Shape, attempt, timed

MODES = {
    "transformers": ("compiled", "compiled with the loss", "eager"),
    "torchtitan": ("compiled", "eager"),
}
# Compiling for a CPU takes minutes, and its loss is a small part there; torchtitan's experts need a GPU, and say so.
CPU = {"transformers": ("eager", "compiled"), "torchtitan": ("eager",)}
QUICK = {"transformers": ("eager",)}


def version(peer: str) -> str | None:
    """A peer's, None where it isn't installed."""
    try:
        return metadata.version(peer)
    except metadata.PackageNotFoundError:
        return None


def run(shape: Shape, peer: str, mode: str) -> Row:
    """Says the row of a peer in a mode."""
    measure = {"transformers": _transformers, "torchtitan": _torchtitan}[peer]
    row = Row(peer, mode, shape.tokens, shape.steps)
    return attempt(row, lambda row: measure(shape, mode, row))


def _transformers(shape: Shape, mode: str, row: Row) -> Measured:
    """DeepseekV3ForCausalLM, its experts by grouped products, its attention by the fastest backend of SDPA."""
    from transformers import AutoConfig, AutoModelForCausalLM

    cuda = shape.device.startswith("cuda")
    public = {k: v for k, v in shape.config().to_dict().items() if k not in ("auto_map", "quantization_config")}
    config = AutoConfig.for_model(public.pop("model_type"), **public)
    dtype = torch.bfloat16 if cuda else torch.float32
    with torch.device(shape.device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").train()
    model.set_experts_implementation("grouped_mm")
    row.note = f"grouped_mm, {_fastest_attention(shape) if cuda else 'sdpa'}"
    loss_of: Callable[[Tensor, Tensor], Tensor] = _loss
    if mode.startswith("compiled"):
        torch._dynamo.config.recompile_limit = 64  # one piece of code, many layers
        for layer in model.model.layers:
            layer.forward = torch.compile(layer.forward, dynamic=False)
    if mode == "compiled with the loss":
        loss_of = torch.compile(_loss, dynamic=False)

    def forward(tokens: Tensor) -> Tensor:
        if mode == "compiled with the loss":
            return loss_of(model(input_ids=tokens, use_cache=False).logits, tokens)
        loss: Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        return loss

    return _train(shape, model, forward)


def _torchtitan(shape: Shape, mode: str, row: Row) -> Measured:
    """Its DeepSeek-V3, compiled piece by piece and the loss too, as its own training does; nothing is recomputed."""
    if not shape.device.startswith("cuda"):
        raise ValueError("its experts need a GPU")
    from torchtitan.components.loss import cross_entropy_loss
    from torchtitan.config.job_config import Compile
    from torchtitan.models.deepseek_v3 import DeepSeekV3Model
    from torchtitan.models.llama4.infra.parallelize import apply_compile

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(shape.device), torch.no_grad():
            model = DeepSeekV3Model(_titan_arguments(shape))
            model.init_weights(torch.device(shape.device))
    finally:
        torch.set_default_dtype(before)
    loss_of: Callable[[Tensor, Tensor], Tensor] = cross_entropy_loss
    if mode == "compiled":
        apply_compile(model, Compile(enable=True), False)
        loss_of = torch.compile(cross_entropy_loss)
    row.note = "grouped_mm, SDPA with cuDNN first, no recomputing"

    def forward(tokens: Tensor) -> Tensor:
        return loss_of(model(tokens), tokens.roll(-1, 1)) / tokens.numel()

    return _train(shape, model.train(), forward)


def _titan_arguments(shape: Shape) -> Any:
    from torchtitan.models.deepseek_v3 import DeepSeekV3ModelArgs
    from torchtitan.models.moe import MoEArgs

    c = shape.config()
    experts = MoEArgs(
        num_experts=c.n_routed_experts or 0,
        num_shared_experts=c.n_shared_experts or 0,
        score_func=c.scoring_func,
        route_norm=c.norm_topk_prob,
        route_scale=c.routed_scaling_factor,
        score_before_experts=False,
        top_k=c.num_experts_per_tok,
        num_expert_groups=c.n_group if c.n_group > 1 else None,
        num_limited_groups=c.topk_group if c.n_group > 1 else None,
    )
    made = DeepSeekV3ModelArgs(
        max_seq_len=shape.sequence,
        original_seq_len=max(shape.sequence, 4096),  # no stretching of the rotary frequencies
        vocab_size=c.vocab_size,
        dim=c.hidden_size,
        inter_dim=c.intermediate_size,
        moe_inter_dim=c.moe_intermediate_size,
        n_layers=c.num_hidden_layers,
        n_dense_layers=c.first_k_dense_replace,
        n_heads=c.num_attention_heads,
        norm_eps=c.rms_norm_eps,
        moe_args=experts,
        q_lora_rank=c.q_lora_rank or 0,
        kv_lora_rank=c.kv_lora_rank,
        qk_nope_head_dim=c.qk_nope_head_dim,
        qk_rope_head_dim=c.qk_rope_head_dim,
        v_head_dim=c.v_head_dim,
        rope_theta=c.rope_theta,
    )
    made.moe_impl = "standard"  # which its own settings would say
    return made


def _loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Of the next tokens; the last place of each sequence has none."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def _train(shape: Shape, model: nn.Module, forward: Callable[[Tensor], Tensor]) -> Measured:
    fused = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    generator = torch.Generator(shape.device).manual_seed(0)
    size = (8, shape.batch, shape.sequence)
    batches = torch.randint(0, shape.config().vocab_size, size, device=shape.device, generator=generator)

    def step(i: int) -> Later:
        loss = forward(batches[i % len(batches)])
        loss.backward()
        fused.step()
        fused.zero_grad(set_to_none=True)
        return partial(float, loss.detach())

    return timed(step, shape.warm, shape.steps, shape.device)


def _fastest_attention(shape: Shape) -> str:
    """Of SDPA's backends, forward and backward at the shape; from here on the only one that SDPA may take."""
    c = shape.config()
    took = {}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION):
        with contextlib.suppress(RuntimeError), sdpa_kernel(backend):  # flash refuses values narrower than keys
            took[backend] = min(_attend(shape, c.num_attention_heads, c.qk_nope_head_dim + c.qk_rope_head_dim,
                                        c.v_head_dim))  # fmt: skip
    best = min(took, key=lambda backend: took[backend], default=SDPBackend.MATH)
    torch.backends.cuda.enable_cudnn_sdp(best == SDPBackend.CUDNN_ATTENTION)
    torch.backends.cuda.enable_mem_efficient_sdp(best == SDPBackend.EFFICIENT_ATTENTION)
    torch.backends.cuda.enable_flash_sdp(best == SDPBackend.FLASH_ATTENTION)
    torch.backends.cuda.enable_math_sdp(best == SDPBackend.MATH)
    torch.cuda.empty_cache()
    return f"SDPA {best.name.removesuffix('_ATTENTION').lower()}"


def _attend(shape: Shape, heads: int, width: int, value: int) -> Iterator[float]:
    """Seconds, of five times."""
    sizes = [(shape.batch, heads, shape.sequence, n) for n in (width, width, value)]
    q, k, v = (torch.randn(s, device=shape.device, dtype=torch.bfloat16, requires_grad=True) for s in sizes)
    for i in range(7):
        torch.cuda.synchronize()
        began = time.perf_counter()
        F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
        torch.cuda.synchronize()
        if i > 1:
            yield time.perf_counter() - began


if __name__ == "__main__":
    run(Shape.parse(sys.argv[3]), sys.argv[1], sys.argv[2])
