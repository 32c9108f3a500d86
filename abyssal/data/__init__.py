"""Text to tokens to packed, document-aware batches.

`documents` reads text, `Tokenizer` makes tokens of it, `prepare` writes them to shards that can be memory-mapped,
and `Batches` packs them: one flat row of tokens with the lengths of its sequences, nothing padded.
"""

from abyssal.data.loader import Batch, Batches, validation_batches
from abyssal.data.shards import Split, TokenSet, prepare
from abyssal.data.sources import Document, documents
from abyssal.data.tokenizer import Detokenizer, Tokenizer

__all__ = [
    "Batch",
    "Batches",
    "Detokenizer",
    "Document",
    "Split",
    "TokenSet",
    "Tokenizer",
    "documents",
    "prepare",
    "validation_batches",
]
