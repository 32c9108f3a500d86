"""What CUDA graphs are of, as far as it can be seen without a GPU: batches filled up are the same batches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.config import ModelConfig
from abyssal.data import Batch
from abyssal.model.objective import LossScales, Microbatch, Objective, Totals
from abyssal.model.transformer import Transformer
from abyssal.parallel.replay import counted, filled_up, tensors_of


@pytest.fixture(scope="module")
def model() -> Transformer:
    config = ModelConfig.load("tiny").replace(vocab_size=64, num_nextn_predict_layers=2)
    return Transformer(config).double().init_weights(torch.Generator().manual_seed(0))


def batch(lengths: list[int]) -> Microbatch:
    g = torch.Generator().manual_seed(len(lengths))
    total = sum(lengths)
    return Microbatch.of(Batch(torch.randint(64, (total,), generator=g), lengths, torch.ones(total)), 2)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.sampled_from([(0, 0), (11, 3), (2, 40)]))
def test_a_batch_filled_up_has_the_loss_and_the_gradient_that_it_had(
    lengths: list[int], given_sizes: tuple[int, int]
) -> None:
    own = Transformer(ModelConfig.load("tiny").replace(vocab_size=64, num_nextn_predict_layers=2)).double()
    own.init_weights(torch.Generator().manual_seed(0))
    objective, micro = Objective(own), batch(lengths)
    totals = Totals.of([micro])
    found = []
    full = filled_up(micro, *given_sizes)
    for each in (micro, full):
        own.zero_grad()
        losses = objective(each, totals, LossScales(0.3, 0.01, 0.01))
        losses.total.backward()
        gradients = [p.grad.clone() for p in own.parameters() if p.grad is not None]
        found.append([losses.total.detach(), losses.balance, *losses.mtp, *gradients])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    sequences = full.packing.sequences
    assert sequences & (sequences - 1) == 0 and sequences < 2 * max(len(lengths), given_sizes[0])
    assert max(lengths) <= full.packing.max_len <= sum(lengths)


def test_batches_of_one_kind_differ_in_values_alone(model: Transformer) -> None:
    first, second = (filled_up(batch(lengths)) for lengths in ([5, 3, 8], [6, 8, 1, 1]))
    totals = Totals.of([first])
    for a, b in zip(tensors_of(first, totals), tensors_of(second, totals), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
    wide = torch.float64
    assert counted(first, wide).tolist() == [3, 3, 3] and counted(second, wide).tolist() == [4, 2, 2]
