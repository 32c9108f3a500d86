"""How well a model predicts any text: bits a byte, and how often the MTP modules' drafts would be accepted in it."""

from collections.abc import Callable
from pathlib import Path

import torch

from abyssal.data import Batch, Tokenizer, documents
from abyssal.model.objective import Measured, Microbatch
from abyssal.model.transformer import Transformer
from abyssal.train.validation import Validation, Validator


def measure_text(
    model: Transformer,
    tokenizer: Tokenizer,
    path: Path,
    sequence: int,
    batch_tokens: int = 4096,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Validation:
    """Of the documents of a file or a folder, each cut into sequences of `sequence` tokens, as a run's validation cuts
    them: a document's first token is what begins a text where the checkpoint asks for one, its last the end of text.
    Every token but the first of a sequence is predicted. `advance` is told of batches. Raises ValueError if there is
    nothing to predict, or a sequence is not of 2 tokens to the model's context."""
    longest = model.config.max_position_embeddings
    if not 2 <= sequence <= longest:
        raise ValueError(f"sequence: expected 2 to the model's {longest}, got {sequence}")
    batches = _batches(tokenizer, path, sequence, max(batch_tokens, sequence))
    if not any(length > 1 for batch in batches for length in batch.lengths):
        raise ValueError(f"{path}: has no text of two tokens or more")
    device, done = model.embed.weight.device, 0

    def measured(micro: Microbatch) -> Measured:
        nonlocal done
        with torch.no_grad():
            found = Measured.of(model, micro.to(device))
        done += 1
        advance(done, len(batches))
        return Measured(*(part.cpu() for part in found))

    return Validator.of(batches, tokenizer, len(model.mtp)).measure(measured)


def _batches(tokenizer: Tokenizer, path: Path, sequence: int, most: int) -> list[Batch]:
    front = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    back = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    pieces: list[list[int]] = []
    for document in documents(path, lambda name, reason: None):
        ids = [*front, *tokenizer.encode(document.text), *back]
        pieces += [ids[at : at + sequence] for at in range(0, len(ids), sequence)]
    batches: list[Batch] = []
    row: list[list[int]] = []
    for piece in [*pieces, None]:
        if row and (piece is None or sum(map(len, row)) + len(piece) > most):
            tokens = torch.tensor([id for own in row for id in own], dtype=torch.int64)
            batches.append(Batch(tokens, [len(own) for own in row], torch.ones(len(tokens))))
            row = []
        if piece is not None:
            row.append(piece)
    return batches
