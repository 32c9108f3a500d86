"""A tiny model of random weights with opinions, and prompts whose greedy answers are known beforehand."""

import itertools
import random
from dataclasses import dataclass
from pathlib import Path

import torch

from abyssal import LLM, ModelConfig, Sampling
from abyssal.data import Tokenizer
from abyssal.model.transformer import Transformer

TEXT = "the sea keeps one small vector for a token and reads it again def return import class self value"
WORDS = TEXT.split()


@dataclass(frozen=True)
class Case:
    """A prompt, and the text that a greedy model alone in the engine goes on with, in float32."""

    prompt: str
    max_tokens: int
    text: str


def save_model(folder: Path, seed: int = 0) -> Path:
    """A checkpoint in float32. Its weights are scaled up: at their usual size every prompt goes on alike."""
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(ModelConfig.load("tiny")).init_weights(generator)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(5)
    for gate in model.gates():
        assert gate.bias is not None
        gate.bias.normal_(std=0.1, generator=generator)
    model.save(folder)
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=60)) + "\n" for _ in range(50)]
    Tokenizer.train(texts, 500).save(folder)
    return folder


def make_cases(folder: Path, count: int, seed: int = 0) -> list[Case]:
    """About half begin with one of three long texts, so that they share pages. Answers are computed one at a time; no
    two are alike, for mixing these up would pass unseen."""
    rng = random.Random(seed)
    shared = [" ".join(rng.choices(WORDS, k=150)) for _ in range(3)]
    llm, cases = LLM(folder, compiled=False), dict[str, Case]()
    for i in itertools.count():
        prompt = f"{i}: " + " ".join(rng.choices(WORDS, k=rng.choice([1, 5, 40, 120])))
        if i % 2:
            prompt = f"{rng.choice(shared)} {prompt}"
        max_tokens = rng.choice([8, 16, 32, 64])
        [output] = llm.generate([prompt], Sampling(max_tokens=max_tokens, temperature=0, ignore_eos=True))
        if len(output.text) > 4:  # random tokens may all be special
            cases.setdefault(output.text, Case(prompt, max_tokens, output.text))
        if len(cases) == count:
            break
    return list(cases.values())
