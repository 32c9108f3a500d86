"""A tiny model that has learnt some answers by heart, and `abyssal serve` with it."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from abyssal.config import ModelConfig
from abyssal.data import Tokenizer
from abyssal.model.packing import Packing
from abyssal.model.transformer import Transformer

CONTEXT = 1024


def remembering(folder: Path, answers: Mapping[str, str]) -> Path:
    """Trains a model, for some seconds, until each of these answers is what it greedily says to a user who says its
    key. Nothing but weights holds them: whoever asks must send the very prompt, through the template and the tokens."""
    texts = [*answers, *answers.values()]
    tokenizer = Tokenizer.train(texts * 2, 700)
    sequences = []
    for prompt, answer in answers.items():
        asked = tokenizer.encode(tokenizer.chat([{"role": "user", "content": prompt}]), special=True)
        sequences.append((asked, [*tokenizer.encode(answer), tokenizer.eos_id]))
    config = ModelConfig.load("tiny").replace(
        vocab_size=tokenizer.vocab_size, num_hidden_layers=2, num_nextn_predict_layers=0,
        max_position_embeddings=CONTEXT,
    )  # fmt: skip
    model = Transformer(config).init_weights(torch.Generator().manual_seed(1))
    assert max(len(asked) + len(said) for asked, said in sequences) < CONTEXT
    tokens = torch.tensor([id for asked, said in sequences for id in asked + said])
    lengths = [len(asked) + len(said) for asked, said in sequences]
    rows, start = [], 0
    for (asked, _), length in zip(sequences, lengths):
        rows += range(start + len(asked) - 1, start + length - 1)  # what comes after these is learnt
        start += length
    learnt = torch.tensor(rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0)
    for step in range(300):
        logits = model.logits(model.hidden(tokens, Packing.of(lengths, tokens)).states[learnt])
        likely = logits.softmax(-1).gather(1, tokens[learnt + 1][:, None])
        if likely.min() > 0.8:
            break
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1, (step + 1) / 10)
        optimizer.zero_grad()
        cross_entropy(logits, tokens[learnt + 1]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    else:
        raise AssertionError(f"not learnt in 300 steps: {likely.min():.3f}")
    model.save(folder)
    tokenizer.save(folder)
    return folder


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """`abyssal serve` in a process of its own; yields the address, up to and with /v1."""
    command = [sys.executable, "-m", "abyssal", "serve", str(folder), "--port", "0", "--cache-bytes", "4000000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    said: list[str] = []
    address: list[str] = []
    ready = threading.Event()

    def listen() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            found = re.search(r" at (http://\S+)", line)
            if found:
                address.append(found[1])
                ready.set()
        ready.set()

    threading.Thread(target=listen, daemon=True).start()
    try:
        assert ready.wait(60) and address, "".join(said)
        yield f"{address[0].rstrip('/')}/v1"
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
