"""Caches really allocated, and written by a model's forward pass.

What a token leaves behind hangs on the attention's shape and the number of layers alone. A model whose weights would
not fit is stood in for by one with the same rows in as many layers: one narrow layer without experts, run as often as
the model has layers, each time with a cache of its own.
"""

from typing import NamedTuple

import torch
from torch import nn

from abyssal.config import ModelConfig
from abyssal.costs import BF16, cache_bytes, fp8_cache_bytes, inspect
from abyssal.engine import LLM, Sampling
from abyssal.engine.runner import PAGE, leaves
from abyssal.model.cache import Cache
from abyssal.model.transformer import Transformer
from abyssal.study.cache_kinds import Kind, packs

WHOLE = 64_000_000  # bytes of weights up to which the model itself is run
ROOM = 300_000_000  # bytes of a cache that is allocated
NARROW = 64
GENERATED = 4  # tokens of a text in the engine's pool


class Measured(NamedTuple):
    """A cache of `tokens` rows a layer, as it was predicted and as it was found."""

    label: str
    tokens: int
    predicted: int  # bytes
    found: int  # bytes of the storages that hold it
    written: int  # rows that are not zero, in every layer alike
    whole: bool  # the model itself, not a stand-in

    @property
    def exact(self) -> bool:
        return self.predicted == self.found


def measure(kind: Kind, tokens: int, seed: int = 0) -> Measured:
    """Allocates the cache of `tokens` tokens (fewer where they take more than `ROOM` bytes) and writes all of them.

    Raises ValueError where the MTP modules' rows are asked for: they are written by drafting, see `measure_engine`.
    """
    if kind.mtp:
        raise ValueError(f"{kind.label}: expected a kind without the MTP modules' rows")
    tokens = max(1, min(tokens, ROOM // kind.bytes()))
    model, whole = model_of(kind.config, seed)
    cache_dtype = torch.uint8 if kind.packed else None
    cache = Cache.allocate(leaves(model, 0, cache_dtype), 1, tokens, torch.bfloat16)
    drawn = torch.randint(model.config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        model.hidden(drawn, cache.contiguous_packing([tokens], [0], [0]), cache)
    return Measured(kind.label, tokens, kind.bytes(tokens), resident(cache), rows_written(cache), whole)


def measure_engine(config: ModelConfig, tokens: int, packed: bool = False, seed: int = 0) -> Measured:
    """The engine's page pool after a text of `tokens` tokens, the last of them generated, with drafts where the model
    has MTP modules. A pool is whole pages, and one page of it is for idle rows.

    Raises ValueError if `packed` rows cannot be, or the text is shorter than two tokens.
    """
    if packed and not packs(config):
        raise ValueError(f"FP8 rows: expected latents in groups of 128, got {config.kv_lora_rank}")
    if tokens < 2:
        raise ValueError(f"tokens: expected 2 or more, a prompt and what follows it, got {tokens}")
    model, whole = model_of(config, seed)
    llm = LLM(
        model, max_batch=1, max_context=tokens, cache_dtype=torch.uint8 if packed else None, adapt=False,
        compiled=False, say=lambda text: None,
    )  # fmt: skip
    vocab = model.config.vocab_size
    prompt = torch.randint(vocab, (max(tokens - GENERATED, 1),), generator=torch.Generator().manual_seed(seed)).tolist()
    llm.generate([prompt], Sampling(max_tokens=tokens - len(prompt), temperature=0, ignore_eos=True))
    assert llm.engine is not None
    cache, mtp = llm.engine.runner.cache, llm.engine.runner.modules > 0
    rows = llm.engine.options.pages * PAGE
    predicted = (
        fp8_cache_bytes(model.config, rows, mtp=mtp) if packed else cache_bytes(model.config, rows, BF16, mtp=mtp)
    )
    label = "the engine's pool" + (", FP8 rows" if packed else "") + (", with the MTP modules'" if mtp else "")
    return Measured(label, rows, predicted, resident(cache), rows_written(cache, skip=PAGE), whole)


def model_of(config: ModelConfig, seed: int) -> tuple[Transformer, bool]:
    """A bf16 model that leaves behind what `config`'s does, and whether it is that model itself."""
    generator = torch.Generator().manual_seed(seed)
    if inspect(config, 1).weights.bf16 <= WHOLE:
        return _ready(Transformer(config), generator), True
    narrow = config.replace(
        hidden_size=NARROW, vocab_size=NARROW, intermediate_size=NARROW, n_routed_experts=None, q_lora_rank=None,
        num_nextn_predict_layers=0, num_hidden_layers=1, fp8=False,
    )  # fmt: skip
    if config.attention == "mla":  # a latent is as wide whatever its heads are
        narrow = narrow.replace(num_attention_heads=2, qk_nope_head_dim=8, v_head_dim=8)
    model = _ready(Transformer(narrow), generator)
    model.layers = nn.ModuleList([model.layers[0]] * config.num_hidden_layers)
    model.config = narrow.replace(num_hidden_layers=config.num_hidden_layers)
    return model, False


def _ready(model: Transformer, generator: torch.Generator) -> Transformer:
    return model.init_weights(generator).to(torch.bfloat16).eval().requires_grad_(False)


def resident(cache: Cache) -> int:
    """Bytes of the storages beneath the cache's tensors, each counted once."""
    storages = [t.untyped_storage() for layer in cache.layers for t in layer.values()]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def rows_written(cache: Cache, skip: int = 0) -> int:
    """Rows past the first `skip` that are not all zero, in the layer that has the fewest."""
    return min(
        int((t[skip:].view(torch.uint8) != 0).any(1).sum()) for layer in cache.layers for t in layer.values()
    )  # fmt: skip
