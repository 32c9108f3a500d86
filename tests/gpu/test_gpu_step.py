"""A training step enqueues its work and goes on: only telling of it waits for the GPU."""

import json
from pathlib import Path

import pytest
import torch

from abyssal.data import Tokenizer, TokenSet, prepare
from abyssal.parallel.replay import WARM
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


def made(tokens: TokenSet, out: Path, modules: object = 1, **changes: object) -> Trainer:
    model = {"vocab_size": 320, "hidden_size": 128, "moe_intermediate_size": 64, "num_nextn_predict_layers": modules}
    settings = {
        "model": "tiny", "model_overrides": model, "data": str(tokens.folder), "out": str(out), "steps": 20,
        "batch_tokens": 1024, "sequence": 128, "device": "cuda", "dtype": "bfloat16",
    }  # fmt: skip
    config = TrainConfig.of(settings | changes)
    return Trainer(config, config.model_settings(), tokens)


CHANGES: list[dict[str, object]] = [{}, {"accumulate": 3}, {"clip": None}, {"recompute": "up"}, {"graphs": False}]


@pytest.mark.parametrize("changes", CHANGES)
def test_a_step_does_not_wait_for_the_gpu(tokens: TokenSet, tmp_path: Path, changes: dict[str, object]) -> None:
    trainer = made(tokens, tmp_path, **changes)
    with trainer.stream() as stream:
        batches = next(stream)
        for _ in range(WARM + 2):  # kernels are compiled, buffers made, passes captured
            trainer.step(batches)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step = trainer.step(batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert 0 < step.loss < 20
    trainer.check()


EAGER: dict[str, dict[str, object]] = {
    "one microbatch": {},
    "three": {"accumulate": 3},
    "two modules, no clipping": {"clip": None, "model.num_nextn_predict_layers": 2},
    "recomputed": {"recompute": "block"},
    "float32": {"dtype": "float32", "accumulate": 2},
    "another weight of MTP": {"mtp_late_fraction": 0.4},
    "muon": {"optimizer": "muon"},
}


@pytest.mark.parametrize("name", EAGER)
def test_captured_passes_take_the_steps_of_launched_ones(tokens: TokenSet, tmp_path: Path, name: str) -> None:
    """Other documents, and so other kinds of batches, in each step; validation between them."""
    changes = dict(EAGER[name])
    modules = changes.pop("model.num_nextn_predict_layers", 1)
    found: list[list[float]] = []
    for graphs in (True, False):
        trainer = made(tokens, tmp_path, graphs=graphs, modules=modules, **changes)
        losses = []
        with trainer.stream() as stream:
            for number, batches in zip(range(20), stream):
                step = trainer.step(batches)
                losses += [step.loss, step.main_loss, *step.mtp_losses, step.grad_norm, *step.max_violation]
                if number % 7 == 6:
                    losses.append(float(trainer.spread.measure(batches[0]).nats))
        trainer.check()
        found.append(losses)
        replay = trainer.spread.replay
        assert (replay is not None) == graphs
        if replay is not None:  # in float32 attention's plain path asks the device where sequences begin
            assert bool(replay.kinds) == ("dtype" not in changes)
    replayed, launched = (torch.tensor(losses, dtype=torch.float64) for losses in found)
    torch.testing.assert_close(replayed, launched, rtol=2e-4 if changes.get("dtype") else 2e-2, atol=2e-3)


def test_a_nan_is_found_when_it_is_asked_for_and_nothing_has_changed_since(tokens: TokenSet, tmp_path: Path) -> None:
    trainer = made(tokens, tmp_path)
    with trainer.stream() as stream:
        trainer.step(next(stream))
        weight = trainer.model.get_parameter("layers.0.attn.wo.weight")
        handle = weight.register_hook(lambda g: g * float("nan"))
        before = weight.detach().clone()
        for _ in range(3):
            trainer.step(next(stream))
        assert torch.equal(weight, before)
        with pytest.raises(NotFinite, match=r"step 2: .*the gradient of layers\.0\.attn\.wo\.weight"):
            trainer.check()
        handle.remove()
    assert trainer.done == 1
