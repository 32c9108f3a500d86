"""A training step enqueues its work and goes on: only telling of it waits for the GPU."""

import json
from pathlib import Path

import pytest
import torch

from abyssal.data import Tokenizer, TokenSet, prepare
from abyssal.train import TrainConfig
from abyssal.train.diagnose import NotFinite
from abyssal.train.trainer import Trainer

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> TokenSet:
    folder = tmp_path_factory.mktemp("step")
    texts = [f"the cat sat on mat {i} and saw {i * 7} birds\n" * 5 for i in range(200)]
    file = folder / "text.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts), "utf-8")
    return prepare(file, Tokenizer.train(texts, 300), folder / "tokens", validation=0.1, progress=False)


def made(tokens: TokenSet, out: Path, **changes: object) -> Trainer:
    model = {"vocab_size": 320, "hidden_size": 128, "moe_intermediate_size": 64, "num_nextn_predict_layers": 1}
    settings = {
        "model": "tiny", "model_overrides": model, "data": str(tokens.folder), "out": str(out), "steps": 20,
        "batch_tokens": 1024, "sequence": 128, "device": "cuda", "dtype": "bfloat16",
    }  # fmt: skip
    config = TrainConfig.of(settings | changes)
    return Trainer(config, config.model_settings(), tokens)


@pytest.mark.parametrize("changes", [{}, {"accumulate": 3}, {"clip": None}, {"recompute": "up"}])
def test_a_step_does_not_wait_for_the_gpu(tokens: TokenSet, tmp_path: Path, changes: dict[str, object]) -> None:
    trainer = made(tokens, tmp_path, **changes)
    with trainer.stream() as stream:
        for _ in range(3):  # kernels are compiled, buffers made
            trainer.step(next(stream))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step = trainer.step(next(stream))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert 0 < step.loss < 20
    trainer.check()


def test_a_nan_is_found_when_it_is_asked_for_and_nothing_has_changed_since(tokens: TokenSet, tmp_path: Path) -> None:
    trainer = made(tokens, tmp_path)
    with trainer.stream() as stream:
        trainer.step(next(stream))
        weight = trainer.model.layers[0].attn.wo.weight
        handle = weight.register_hook(lambda g: g * float("nan"))
        before = weight.detach().clone()
        for _ in range(3):
            trainer.step(next(stream))
        assert torch.equal(weight, before)
        with pytest.raises(NotFinite, match=r"step 2: .*the gradient of layers\.0\.attn\.wo\.weight"):
            trainer.check()
        handle.remove()
    assert trainer.done == 1
