"""A tiny random model in the public format, with a small tokenizer of its own: a real checkpoint in miniature."""

import json
from pathlib import Path

import torch

from abyssal.config import ModelConfig
from abyssal.data import Tokenizer
from abyssal.model.experts import Gate
from abyssal.model.transformer import Transformer

TEXTS = [
    "The cat sat on the mat and looked at the dog. The dog looked back.\n",
    "Question: what is 3 + 4?\nAnswer: 3 + 4 = 7. The answer is 7.\n",
    "def add(a, b):\n    return a + b\n\n\nassert add(1, 2) == 3\n",
    "A slow brown fox, 12 lazy dogs and 345 quick hens went to market; nobody came home before nightfall.\n",
]


def checkpoint(folder: Path, add_bos: bool = False, **changes: object) -> Path:
    """Random weights, large enough that every token depends on those before it, in float32."""
    tokenizer = Tokenizer.train(TEXTS, 320)
    if add_bos:
        config = json.loads(tokenizer.files["tokenizer_config.json"]) | {"add_bos_token": True}
        tokenizer = Tokenizer(tokenizer.files | {"tokenizer_config.json": json.dumps(config).encode()})
    config = ModelConfig.load("tiny").replace(
        vocab_size=tokenizer.vocab_size + 3, max_position_embeddings=64, **changes
    )
    model = Transformer(config).init_weights(torch.Generator().manual_seed(7))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(4)
        model.head.weight[-3:] = 0  # ids that the tokenizer lacks: they have a share of every softmax and never win
        for module in model.modules():
            if isinstance(module, Gate) and module.bias is not None:
                module.bias.copy_(0.1 * torch.randn(module.bias.shape, generator=torch.Generator().manual_seed(1)))
    model.save(folder)
    tokenizer.save(folder)
    return folder
