"""The step's loss does not depend on how the step is cut, repeated or packed."""

import math

import pytest
import torch

from abyssal.data import Batch
from abyssal.model.objective import LossScales, Microbatch, Objective, Totals
from abyssal.model.packing import Packing
from abyssal.model.transformer import Transformer
from abyssal.train.trainer import Trainer

PARTS = [[5, 1, 20], [40], [3, 2, 2, 30], [17, 9]]
WIDE = {"dtype": "float64", "sequence_balance": 0.1, "bias_speed": 0.25, "bias_freeze_fraction": 0.0, "clip": None}


def joined(batches):
    return Batch(
        torch.cat([b.tokens for b in batches]), [n for b in batches for n in b.lengths],
        torch.cat([b.weights for b in batches]),
    )  # fmt: skip


def observe_step(config, token_set, batches):
    """A trainer after one step, and what went through it: gradients, counts."""
    trainer = Trainer(config, config.model_settings(), token_set)
    seen = {}
    update, balance = trainer.optimizer.update, trainer.balance.update

    def spy_update(lr, norm, stopped):
        seen["gradients"] = {name: g.clone() for name, g in trainer.optimizer.gradients()}
        update(lr, norm, stopped)

    def spy_balance(speed):
        seen["counts"] = trainer.balance.counts.clone()
        return balance(speed)

    trainer.optimizer.update, trainer.balance.update = spy_update, spy_balance
    seen["step"] = trainer.step([Microbatch.of(b, len(trainer.model.mtp)) for b in batches])
    seen["biases"] = [gate.bias.clone() for gate in trainer.model.gates()]
    seen["weights"] = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    return seen


@pytest.fixture
def batches(make_batch):
    return [make_batch(lengths, seed) for seed, lengths in enumerate(PARTS)]


@pytest.mark.parametrize("modules", [0, 2])
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_cutting_and_recomputing_change_nothing(make_config, token_set, batches, recompute, modules):
    model = {"num_nextn_predict_layers": modules}
    whole = observe_step(make_config(model, **WIDE), token_set, [joined(batches)])
    cut = observe_step(make_config(model, recompute=recompute, **WIDE), token_set, batches)
    assert whole["gradients"].keys() == cut["gradients"].keys()
    for name, gradient in whole["gradients"].items():
        torch.testing.assert_close(cut["gradients"][name], gradient, rtol=1e-9, atol=1e-12, msg=name)
    assert torch.equal(whole["counts"], cut["counts"])
    for a, b in zip(whole["biases"], cut["biases"], strict=True):
        assert a.dtype == torch.float32
        assert a.abs().max() == 0.25
        assert torch.equal(a, b)
    for key in ("loss", "main_loss", "balance_loss", "grad_norm"):
        assert getattr(cut["step"], key) == pytest.approx(getattr(whole["step"], key), rel=1e-12)
    assert cut["step"].mtp_losses == pytest.approx(whole["step"].mtp_losses, rel=1e-12)


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_every_token_is_counted_once_by_every_router(make_config, token_set, batches, recompute):
    config = make_config({"num_nextn_predict_layers": 2}, recompute=recompute, **WIDE)
    counts = observe_step(config, token_set, batches)["counts"]
    lengths = [n for part in PARTS for n in part]
    chosen = config.model_settings().num_experts_per_tok
    # The second layer has experts; module d routes the tokens that have a token d places on.
    expected = [chosen * sum(max(n - d, 0) for n in lengths) for d in (0, 1, 2)]
    assert counts.sum(-1).tolist() == expected


def test_loss_is_the_mean_over_positions_that_have_a_target(make_config, batches):
    """Against log-softmax by hand, document by document."""
    config = make_config({"num_nextn_predict_layers": 2}, sequence_balance=0.0)
    model = Transformer(config.model_settings()).init_weights(torch.Generator().manual_seed(1)).double()
    batch = joined(batches)
    micro = Microbatch.of(batch, 2)
    got = Objective(model)(micro, Totals.of([micro]), LossScales(mtp=0.5))
    sums, weights, start = [0.0] * 3, [0.0] * 3, 0
    for n in batch.lengths:
        tokens, weight = batch.tokens[start : start + n], batch.weights[start : start + n]
        all_logits = [model(tokens, [n]), *model.predict(tokens, [n])]
        for d, logits in enumerate(all_logits):
            for t in range(n - 1 - d):
                sums[d] -= float(weight[t + 1 + d] * logits[t].detach().log_softmax(-1)[tokens[t + 1 + d]])
                weights[d] += float(weight[t + 1 + d])
        start += n
    means = [s / w for s, w in zip(sums, weights, strict=True)]
    assert float(got.main) == pytest.approx(means[0], rel=1e-6)
    assert [float(x) for x in got.mtp] == pytest.approx(means[1:], rel=1e-6)
    assert float(got.total.detach()) == pytest.approx(means[0] + 0.5 / 2 * sum(means[1:]), rel=1e-6)


def test_a_packed_batch_has_the_weighted_gradient_of_its_documents(make_config, make_batch):
    config = make_config(sequence_balance=0.0)
    model = Transformer(config.model_settings()).init_weights(torch.Generator().manual_seed(1)).double()
    lengths = [11, 30, 4]
    batch = make_batch(lengths)

    def gradient(micro):
        model.zero_grad(set_to_none=True)
        Objective(model)(micro, Totals.of([micro]), LossScales(mtp=0.0)).total.backward()
        return [p.grad.clone() for p in (model.embed.weight, model.layers[1].ffn.experts.w1, model.head.weight)]

    packed = gradient(Microbatch.of(batch, 1))
    pieces = zip(batch.tokens.split(lengths), lengths, batch.weights.split(lengths))
    micros = [Microbatch.of(Batch(tokens, [n], weights), 1) for tokens, n, weights in pieces]
    total = sum(m.totals[0] for m in micros)
    parts = [[m.totals[0] / total * g for g in gradient(m)] for m in micros]
    for whole, *rest in zip(packed, *parts, strict=True):
        torch.testing.assert_close(whole, sum(rest), rtol=1e-9, atol=1e-12)


def test_nothing_to_predict_is_no_division_by_zero(make_config, token_set, make_batch):
    step = observe_step(make_config(**WIDE), token_set, [make_batch([1, 1])])["step"]
    assert step.main_loss == 0
    assert math.isfinite(step.loss)


def test_classic_loss_reaches_the_router(make_config, token_set, batches):
    settings = WIDE | {"sequence_balance": 0.0}
    without = observe_step(make_config(**settings), token_set, batches)
    with_it = observe_step(make_config(auxiliary_balance=1.0, **settings), token_set, batches)
    assert with_it["step"].balance_loss > 0.9  # two routers; each 1 when balanced, over the microbatches' shares
    router = "layers.1.ffn.gate.weight"
    assert not torch.allclose(without["gradients"][router], with_it["gradients"][router])


def test_microbatch_moves_whole(make_batch):
    micro = Microbatch.of(make_batch([3, 4]), 1)
    there = micro.to(torch.device("meta"))
    assert there.tokens.device.type == "meta"
    assert isinstance(there.packing, Packing)
    assert there.packing.positions.device.type == there.weights[1].device.type == "meta"
