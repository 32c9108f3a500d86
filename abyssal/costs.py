"""What a configuration costs before anything is allocated: parameters, arithmetic, weight bytes, cache bytes.

Shapes are read from the model itself, built on the meta device, where tensors have no storage. A multiplication
and an addition are two FLOPs; a matrix of n parameters costs 2n FLOPs a token forward, and 4n more backward.

Attention's two products, scores and values, at a context of L tokens (H heads, the letters of `model/__init__.py`;
R is 0 where there is no decoupled rotary key):

    training            a layer, forward and backward   3 · 2·H·(N + R + V) · (L + 1)/2     the causal average
    decoding, absorbed  a layer                         2·H·((C + R) + C)·L
    decoding, expanded  a layer                         2·H·(N + R + V)·L + 2·C·H·(N + V)·(L − 1)

Absorbed, W_UK is multiplied into the query and W_UV into the output, which costs what expanding one token does and
is counted with the matrices. Expanded, keys and values are made anew from every earlier latent at each step.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from abyssal.config import ModelConfig
from abyssal.model.attention import GroupedAttention
from abyssal.model.experts import Experts, Gate
from abyssal.model.latent import LatentAttention
from abyssal.model.layers import RMSNorm
from abyssal.model.transformer import Transformer
from abyssal.ops.fp8 import scale_shape
from abyssal.ops.latent_rows import row_bytes

BF16, FLOAT32 = 2, 4  # bytes


@dataclass(frozen=True)
class Parameters:
    """Parameters of the main model by part, which add up to `total`; a matrix that is tied counts once."""

    embedding: int
    head: int  # 0 where it is the embedding
    attention: int
    dense_mlps: int
    routed_experts: int
    shared_experts: int
    routers: int  # their biases included
    norms: int
    total: int  # without the MTP modules
    activated: int  # that a token meets: K routed experts a layer, and all else, embedding and head included
    mtp: int  # as the public checkpoints store it: each module with its copy of embedding and head


@dataclass(frozen=True)
class Flops:
    """FLOPs a token, by the formulas at the head of this file. The main model alone, but for the last two."""

    context: int  # tokens a training sequence has, or a decoded token attends to, itself included
    training: int
    decoding: int  # the cheapest path there is: absorbed where it can be
    decoding_absorbed: int | None  # None on a rung that cannot absorb
    decoding_expanded: int
    training_mtp: int  # all modules
    decoding_mtp: int  # all modules once, by the same path as `decoding`


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of the stored tensors. Router biases are float32. In FP8, attention, MLPs and experts are one byte an
    element and a float32 scale a 128x128 block; embedding, head, norms, routers and `eh_proj` stay bf16."""

    bf16: int
    fp8: int
    bf16_mtp: int  # with the copies of embedding and head, as stored
    fp8_mtp: int


@dataclass(frozen=True)
class Rung:
    """What one kind of attention over the same heads and layers would leave behind for every token."""

    elements_per_token: int
    bytes_per_token: int  # bf16
    ratio: float  # of this to what the configuration holds
    mha_ratio: float  # of MHA of the same shape to this


@dataclass(frozen=True)
class CacheBytes:
    """What a token leaves behind in all layers of the main model, bf16.

    `compared` has `mha`, MHA of the same shape, 2·H·V elements a layer; `expanded`, the keys and values that
    re-expansion makes, H·(N + R + V); `gqa8` and `mqa`, 2·V for each of 8 heads (H if fewer) and of one; and
    `latent`, the latent without a rotary key, C.
    """

    elements_per_token: int
    bytes_per_token: int
    mha_ratio: float  # of MHA of the same shape to what is held
    bytes_per_token_mtp: int  # what the MTP modules hold on top
    compared: dict[str, Rung]


@dataclass(frozen=True)
class Costs:
    """See `inspect`."""

    parameters: Parameters
    flops: Flops
    weights: WeightBytes
    cache: CacheBytes

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dicts under the fields' names, for JSON."""
        return asdict(self)

    def render(self) -> Group:
        """Four tables and what they do not count, for `rich.console.Console.print`."""
        return _render(self)


def inspect(config: ModelConfig, context: int = 4096) -> Costs:
    """The costs of `config`, FLOPs at `context` tokens. Allocates no weights.

    Raises ValueError if the context is not positive.
    """
    if context < 1:
        raise ValueError(f"context: expected 1 token or more, got {context}")
    tensors = list(_tensors(config))
    main = [t for t in tensors if not t.mtp]
    # The shared embedding and head, which the public checkpoints store again in every module.
    copies = [_Tensor(part, (config.vocab_size, config.hidden_size), True) for part in ("embedding", "head")]
    mtp = [t for t in tensors if t.mtp] + copies * config.num_nextn_predict_layers

    return Costs(
        _parameters(config, main, mtp),
        _flops(config, main, mtp, context),
        WeightBytes(
            bf16=sum(t.bf16_bytes for t in main),
            fp8=sum(t.fp8_bytes for t in main),
            bf16_mtp=sum(t.bf16_bytes for t in mtp),
            fp8_mtp=sum(t.fp8_bytes for t in mtp),
        ),
        _cache(config),
    )


def cache_bytes(config: ModelConfig, tokens: int, itemsize: int, *, mtp: bool = False) -> int:
    """Bytes that `tokens` tokens leave behind in every layer, elements of `itemsize` bytes; with `mtp`, in the MTP
    modules too."""
    with torch.device("meta"):
        attention = LatentAttention(config) if config.attention == "mla" else GroupedAttention(config)
    layer = sum(width * (own.itemsize if own else itemsize) for width, own in attention.leaves().values())
    return tokens * layer * _layers(config, mtp)


def fp8_cache_bytes(config: ModelConfig, tokens: int, *, mtp: bool = False) -> int:
    """The same with every latent in FP8 (`ops/latent_rows.py`): 656 bytes a token and layer of DeepSeek-V3. Raises
    ValueError where there is no latent, or none that goes into such rows."""
    if config.attention != "mla":
        raise ValueError(f"FP8 rows are of latents, and attention is {config.attention!r}")
    return tokens * row_bytes(config.kv_lora_rank, config.qk_rope_head_dim) * _layers(config, mtp)


def mha_cache_bytes(config: ModelConfig, tokens: int, itemsize: int, *, mtp: bool = False) -> int:
    """What MHA of the same shape would hold instead: 2·H·V elements a token and layer."""
    return tokens * itemsize * 2 * config.num_attention_heads * config.v_head_dim * _layers(config, mtp)


def _layers(config: ModelConfig, mtp: bool) -> int:
    return config.num_hidden_layers + (config.num_nextn_predict_layers if mtp else 0)


# ---- the model's tensors ------------------------------------------------------------------------------------------

_QUANTISED = ("attention", "dense_mlps", "routed_experts", "shared_experts")


@dataclass(frozen=True)
class _Tensor:
    part: str  # a field of Parameters, or "eh_proj"
    shape: tuple[int, ...]
    mtp: bool

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def activated(self, chosen: int) -> int:
        """Elements that one token meets, `chosen` of a layer's routed experts."""
        return self.elements * chosen // self.shape[0] if self.part == "routed_experts" else self.elements

    @property
    def multiplies(self) -> bool:
        return len(self.shape) > 1 and self.part != "embedding"

    @property
    def bf16_bytes(self) -> int:
        bias = self.part == "routers" and len(self.shape) == 1
        return self.elements * (FLOAT32 if bias else BF16)

    @property
    def fp8_bytes(self) -> int:
        if self.part not in _QUANTISED:
            return self.bf16_bytes
        *stack, rows, cols = self.shape
        blocks = math.prod((*stack, *scale_shape(rows, cols)))
        return self.elements + FLOAT32 * blocks


def _tensors(config: ModelConfig) -> Iterator[_Tensor]:
    """Every parameter and router bias of the model, once."""
    with torch.device("meta"):
        model = Transformer(config)
    seen: set[Tensor] = set()
    for path, owner in model.named_modules():
        for tensor in (*owner.parameters(recurse=False), *owner.buffers(recurse=False)):
            if tensor not in seen:
                yield _Tensor(_part(path, owner), tuple(tensor.shape), path.startswith("mtp."))
                seen.add(tensor)


def _part(path: str, owner: nn.Module) -> str:
    if isinstance(owner, RMSNorm):
        return "norms"
    if isinstance(owner, Gate):
        return "routers"
    if isinstance(owner, Experts):
        return "routed_experts"
    names = {"embed": "embedding", "head": "head", "eh_proj": "eh_proj", "attn": "attention",
             "shared_experts": "shared_experts", "ffn": "dense_mlps"}  # fmt: skip
    within = path.split(".")
    return next(part for name, part in names.items() if name in within)


# ---- the four sums ------------------------------------------------------------------------------------------------


def _parameters(config: ModelConfig, main: list[_Tensor], mtp: list[_Tensor]) -> Parameters:
    def of(part: str) -> int:
        return sum(t.elements for t in main if t.part == part)

    return Parameters(
        embedding=of("embedding"),
        head=of("head"),
        attention=of("attention"),
        dense_mlps=of("dense_mlps"),
        routed_experts=of("routed_experts"),
        shared_experts=of("shared_experts"),
        routers=of("routers"),
        norms=of("norms"),
        total=sum(t.elements for t in main),
        activated=sum(t.activated(config.num_experts_per_tok) for t in main),
        mtp=sum(t.elements for t in mtp),
    )


def _flops(config: ModelConfig, main: list[_Tensor], mtp: list[_Tensor], context: int) -> Flops:
    c, L = config, context
    H, N, R, V, C = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.kv_lora_rank
    latent = c.attention == "mla"
    absorbs = latent and c.position != "rope"  # coupled RoPE puts a rotation between W_UQ and W_UK

    def matrices(tensors: list[_Tensor]) -> int:
        """Parameters that multiply a token."""
        return sum(t.activated(c.num_experts_per_tok) for t in tensors if t.multiplies)

    heads = matrices(main) + (c.vocab_size * c.hidden_size if c.tie_word_embeddings else 0)
    sides = [(heads, c.num_hidden_layers), (matrices(mtp), c.num_nextn_predict_layers)]

    training = [6 * n + layers * 3 * H * (N + R + V) * (L + 1) for n, layers in sides]
    absorbed = [2 * n + layers * 2 * H * ((C + R) + C) * L for n, layers in sides]
    again = 2 * C * H * (N + V) * (L - 1) if latent else 0
    expanded = [2 * n + layers * (2 * H * (N + R + V) * L + again) for n, layers in sides]
    decoding = [min(a, e) for a, e in zip(absorbed, expanded)] if absorbs else expanded
    return Flops(
        context=context,
        training=training[0],
        decoding=decoding[0],
        decoding_absorbed=absorbed[0] if absorbs else None,
        decoding_expanded=expanded[0],
        training_mtp=training[1],
        decoding_mtp=decoding[1],
    )


def _cache(config: ModelConfig) -> CacheBytes:
    H, V, layers = config.num_attention_heads, config.v_head_dim, config.num_hidden_layers
    N, R, C = config.qk_nope_head_dim, config.qk_rope_head_dim, config.kv_lora_rank
    elements, mha = cache_bytes(config, 1, 1), mha_cache_bytes(config, 1, 1)
    others = {
        "mha": mha,
        "expanded": layers * H * (N + R + V),
        "gqa8": layers * 2 * min(8, H) * V,
        "mqa": layers * 2 * V,
        "latent": layers * C,
    }
    held = cache_bytes(config, 1, BF16)
    return CacheBytes(
        elements_per_token=elements,
        bytes_per_token=held,
        mha_ratio=mha / elements,
        bytes_per_token_mtp=cache_bytes(config, 1, BF16, mtp=True) - held,
        compared={name: Rung(n, n * BF16, n / elements, mha / n) for name, n in others.items()},
    )


# ---- for people ---------------------------------------------------------------------------------------------------

_LABELS = {"dense_mlps": "dense MLPs", "activated": "activated a token", "mtp": "MTP modules, as stored"}
_RUNGS = {
    "mha": "MHA of the same shape",
    "expanded": "keys and values, re-expanded",
    "gqa8": "GQA, 8 heads",
    "mqa": "MQA",
    "latent": "the latent, no rotary key",
}


def _short(n: float, unit: str = "") -> str:
    """Three digits and a decimal prefix: 671.0 B, 70.27 kB."""
    prefixes = ("", "k", "M", "G", "T", "P") if unit else ("", "K", "M", "B", "T", "Q")
    power = 0
    while abs(n) >= 1000 and power < len(prefixes) - 1:
        n, power = n / 1000, power + 1
    return f"{n:.4g} {prefixes[power]}{unit}".strip()


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    return table


def _render(costs: Costs) -> Group:
    p, f, w, cache = costs.parameters, costs.flops, costs.weights, costs.cache

    parameters = _table("Parameters", "part", "exactly", "about")
    for name, n in asdict(p).items():
        if name == "total":
            parameters.add_section()
        label = _LABELS.get(name, name.replace("_", " "))
        if n or name == "total":
            parameters.add_row(label, f"{n:,}", _short(n))

    flops = _table(f"FLOPs a token, context {f.context:,}", "work", "main model", "MTP modules")
    mtp = f.training_mtp > 0
    flops.add_row("training", _short(f.training, "FLOP"), _short(f.training_mtp, "FLOP") if mtp else "")
    flops.add_row("decoding", _short(f.decoding, "FLOP"), _short(f.decoding_mtp, "FLOP") if mtp else "")
    if f.decoding_absorbed is not None:
        flops.add_row("decoding, re-expanding the context", _short(f.decoding_expanded, "FLOP"), "")

    weights = _table("Weight bytes", "stored as", "main model", "MTP modules")
    for label, main, extra in (("bf16", w.bf16, w.bf16_mtp), ("FP8, 128x128 blocks", w.fp8, w.fp8_mtp)):
        weights.add_row(label, _short(main, "B"), _short(extra, "B") if extra else "")

    held = _table("Cache a token, bf16", "attention", "elements", "bytes", "× this", "MHA is ×")
    this = Rung(cache.elements_per_token, cache.bytes_per_token, 1.0, cache.mha_ratio)
    for label, rung, style in [("this configuration", this, "bold")] + [
        (_RUNGS[name], rung, "") for name, rung in cache.compared.items()
    ]:
        numbers = f"{rung.elements_per_token:,}", f"{rung.bytes_per_token:,}"
        held.add_row(label, *numbers, f"{rung.ratio:.2f}", f"{rung.mha_ratio:.1f}", style=style)

    note = (
        "A token's FLOPs: training 6 for each activated parameter that multiplies and 3·H·(N+R+V)·(L+1) a layer for "
        "attention; decoding 2 and, absorbed, 2·H·(2C+R)·L. Prefixes are decimal."
    )
    gap = Text("")
    return Group(parameters, gap, flops, gap, weights, gap, held, gap, Text(note, style="dim"))
