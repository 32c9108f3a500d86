"""What a plan says a step holds, against what one did."""

import gc

import pytest
import torch

from abyssal.data import Batch
from abyssal.model.balance import Balance
from abyssal.model.objective import LossScales, Microbatch
from abyssal.model.transformer import Transformer
from abyssal.plan import plan
from abyssal.plan.setup import settings_of
from abyssal.train.alone import Alone
from abyssal.train.optimizer import Optimizer

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "settings",
    [
        ["model.num_hidden_layers=4", "batch_tokens=16384", "sequence=2048"],
        ["model.num_hidden_layers=4", "batch_tokens=16384", "sequence=2048", "recompute=up"],
        ["model.num_hidden_layers=3", "batch_tokens=8192", "sequence=1024", "model.num_nextn_predict_layers=1"],
    ],
)
def test_the_peak_of_one_gpu_is_within_five_percent(settings):
    config = settings_of("reference-961m", settings, 1, None)
    expected = plan(config).walks[0].peak
    gc.collect()
    torch.cuda.empty_cache()
    device = torch.device("cuda")
    before = torch.cuda.memory_allocated()
    model = Transformer(config.model_settings()).init_weights(torch.Generator().manual_seed(0))
    alone = Alone(model, config, device, torch.bfloat16)
    optimizer, balance = Optimizer(alone.parameters(), config), Balance(model.gates())
    lengths = [config.sequence] * (config.batch_tokens // config.sequence)
    tokens = torch.randint(0, 32768, (config.batch_tokens,))
    modules = len(model.mtp)
    micro = Microbatch.of(Batch(tokens, lengths, torch.ones(config.batch_tokens)), modules)
    scales = LossScales(config.mtp_weight, config.sequence_balance)
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        alone.run([micro], scales, optimizer.collect, balance)
        norms = alone.norms(optimizer.squares())
        optimizer.update(1e-4, norms[-1], torch.zeros((), device=device))
    measured = torch.cuda.max_memory_allocated() - before
    print(f"plan {expected / 2**30:.2f} GiB, measured {measured / 2**30:.2f}")
    assert expected == pytest.approx(measured, rel=0.05)
