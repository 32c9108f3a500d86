"""Load balancing: the update's sign and counts, under accumulation, recomputation and casts; the losses by hand."""

import copy
import math

import pytest
import torch
from tiny import random_tokens, tiny_config, tiny_model
from torch.utils.checkpoint import checkpoint

from abyssal.model.balance import Balance, auxiliary_loss, expert_counts, max_violation, sequence_balance_loss
from abyssal.model.experts import Gate, Routing
from abyssal.model.packing import Packing
from abyssal.model.positions import rotary


def routing_of(indices: list[list[int]], scores: torch.Tensor | None = None, experts: int = 4) -> Routing:
    picked = torch.tensor(indices)
    if scores is None:
        scores = torch.ones(len(indices), experts, dtype=torch.float64)
    return Routing(torch.ones(picked.shape), picked, scores)


def gates(n: int = 1, experts: int = 4) -> list[Gate]:
    return [Gate(tiny_config(n_routed_experts=experts, n_group=1, topk_group=1)) for _ in range(n)]


def test_the_update_by_hand() -> None:
    """Loads 3, 1, 2, 2 of mean 2: the busy expert goes down, the idle one up, those at the mean stay."""
    (gate,) = gates()
    gate.bias.copy_(torch.tensor([0.5, 0.5, -0.5, 0.0]))
    balance = Balance([gate])
    balance.observe([routing_of([[0, 1], [0, 2], [0, 3], [2, 3]])])
    violation = balance.update(speed=0.25)
    assert gate.bias.tolist() == [0.25, 0.75, -0.5, 0.0]
    assert violation.tolist() == [0.5]
    assert balance.counts.sum() == 0  # the next step starts afresh


def test_one_token_in_sixteen_million_is_not_lost() -> None:
    """2^24 + 1 is no float32: in floats or means, experts that differ by one token would tie."""
    many = 2**24
    (gate,) = gates()
    balance = Balance([gate])
    balance.counts[0] = torch.tensor([many + 1, many, many, many - 1])
    balance.update(1.0)
    assert gate.bias.tolist() == [-1.0, 0.0, 0.0, 1.0]
    # A mean that is no integer: everyone at 2^24 is below (4 · 2^24 + 1) / 4.
    balance.counts[0] = torch.tensor([many + 1, many, many, many])
    balance.update(1.0)
    assert gate.bias.tolist() == [-2.0, 1.0, 1.0, 2.0]


def test_counts_stay_integers_across_huge_batches() -> None:
    (gate,) = gates()
    balance = Balance([gate])
    balance.counts[0] = 2**24
    balance.observe([routing_of([[0]])])
    assert balance.counts[0].tolist() == [2**24 + 1, 2**24, 2**24, 2**24]


def test_every_gate_has_its_own_update() -> None:
    first, second = gates(2)
    balance = Balance([first, second])
    balance.observe([routing_of([[0], [0], [1], [2]]), routing_of([[3], [3], [2], [1]])])
    balance.update(0.5)
    assert first.bias.tolist() == [-0.5, 0.0, 0.0, 0.5]
    assert second.bias.tolist() == [0.5, 0.0, 0.0, -0.5]
    with pytest.raises(ValueError, match="expected one for each of 2 gates, got 1"):
        balance.observe([routing_of([[0]])])


def test_an_empty_batch_and_a_dense_model_change_nothing() -> None:
    (gate,) = gates()
    balance = Balance([gate])
    balance.observe([Routing(torch.ones(0, 2), torch.zeros(0, 2, dtype=torch.int64), torch.ones(0, 4))])
    balance.update(1.0)
    assert gate.bias.tolist() == [0.0] * 4
    dense = Balance(tiny_model(n_routed_experts=None).gates())
    dense.observe([])
    assert dense.update(1.0).tolist() == []


def test_gates_without_a_bias_are_counted_and_left_alone() -> None:
    model = tiny_model(scoring_func="softmax", topk_method="greedy", n_group=1, topk_group=1)
    balance = Balance(model.gates())
    tokens = random_tokens(30)
    balance.observe(model.hidden(tokens, Packing.of([30], tokens)).routings)
    assert balance.counts.sum(-1).tolist() == [90, 90]
    assert (balance.update(1.0) > 0).all()


def all_routings(model, tokens, lengths):
    """What a training step observes: the layers' routings, then the modules', with their live masks."""
    packing = Packing.of(lengths, tokens)
    hidden = model.hidden(tokens, packing)
    predictions = model.predict_states(hidden.states, tokens, packing)
    routings = [*hidden.routings, *(p.routing for p in predictions)]
    return routings, [None] * len(hidden.routings) + [p.live for p in predictions]


def test_accumulation_is_one_large_batch() -> None:
    """Two microbatches and one update are the whole batch and one update; an update a microbatch is not."""
    tokens = random_tokens(60)
    lengths = [13, 17, 30]
    whole, parts, wrong = (tiny_model(num_nextn_predict_layers=1) for _ in range(3))
    balance = Balance(whole.gates())
    balance.observe(*all_routings(whole, tokens, lengths))
    total = balance.counts.clone()
    balance.update(0.01)

    balance, hasty = Balance(parts.gates()), Balance(wrong.gates())
    for part, sizes in ((tokens[:30], lengths[:2]), (tokens[30:], lengths[2:])):
        balance.observe(*all_routings(parts, part, sizes))
        hasty.observe(*all_routings(wrong, part, sizes))
        hasty.update(0.01)
    assert torch.equal(balance.counts, total)
    balance.update(0.01)
    assert all(torch.equal(a.bias, b.bias) for a, b in zip(whole.gates(), parts.gates()))
    assert any(not torch.equal(a.bias, b.bias) for a, b in zip(whole.gates(), wrong.gates()))


def test_recomputation_counts_a_token_once() -> None:
    """The gate runs again in the backward pass; what it decides then is returned nowhere."""
    model = tiny_model()
    tokens = random_tokens(20)
    packing = Packing.of([20], tokens)
    runs = [0]
    for gate in model.gates():
        gate.register_forward_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
    angles, x, routings = rotary(model.config, packing.positions), model.embed(tokens), []
    for layer in model.layers:
        x, routing = checkpoint(layer, x, angles, packing, use_reentrant=False)
        routings += [routing] if routing is not None else []
    balance = Balance(model.gates())
    balance.observe(routings)
    before = balance.counts.clone()
    model.logits(model.norm(x)).square().mean().backward()
    assert runs[0] == 2 * len(model.gates())
    assert torch.equal(balance.counts, before)
    assert balance.counts.sum(-1).tolist() == [20 * 3] * 2


def test_the_modules_routers_count_and_learn_from_live_tokens_alone() -> None:
    """A document's last d rows have no token ahead: they would push the bias by what is undefined."""
    model = tiny_model(num_nextn_predict_layers=2)
    assert len(model.gates()) == 2 + 2
    tokens, lengths = random_tokens(16), [9, 1, 0, 6]
    routings, live = all_routings(model, tokens, lengths)
    balance = Balance(model.gates())
    balance.observe(routings, live)
    K = 3
    assert balance.counts.sum(-1).tolist() == [16 * K, 16 * K, (8 + 5) * K, (7 + 4) * K]
    by_hand = torch.zeros(8, dtype=torch.int64)
    for t in (*range(8), *range(10, 15)):
        for e in routings[2].indices[t]:
            by_hand[e] += 1
    assert torch.equal(balance.counts[2], by_hand)
    before = [g.bias.clone() for g in model.gates()]
    balance.update(0.01)
    assert all(not torch.equal(g.bias, b) for g, b in zip(model.gates(), before))


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.bfloat16().float(),
        lambda m: m.to("cpu", torch.bfloat16),
        copy.deepcopy,
        lambda m: copy.deepcopy(m.bfloat16()),
    ],
    ids=["to-bfloat16", "half", "double", "there-and-back", "to-device-and-dtype", "deepcopy", "deepcopy-bfloat16"],
)
def test_the_bias_is_float32_bit_for_bit_through_every_cast(cast) -> None:
    model = tiny_model(dtype=torch.float32, num_nextn_predict_layers=1)
    exact = [torch.randn(8) * 1e-3 + 1 for _ in model.gates()]  # bfloat16 would round every one
    for gate, bias in zip(model.gates(), exact):
        gate.bias.copy_(bias)
    after = cast(model)
    for gate, bias in zip(after.gates(), exact):
        assert gate.bias.dtype == torch.float32
        assert torch.equal(gate.bias, bias)
        assert "bias" in dict(gate.named_buffers()) and not gate.bias.requires_grad


def test_the_bias_survives_the_state_dict_of_a_bfloat16_model() -> None:
    model = tiny_model(dtype=torch.bfloat16)
    model.gates()[0].bias.fill_(1.00001)
    state = model.state_dict()
    assert state["layers.1.ffn.gate.bias"].dtype == torch.float32
    again = tiny_model(seed=1, dtype=torch.bfloat16)
    again.load_state_dict(state)
    assert torch.equal(again.gates()[0].bias, model.gates()[0].bias)
    assert again.gates()[0].bias.dtype == torch.float32


def test_small_updates_are_not_rounded_away_in_a_bfloat16_model() -> None:
    """At 1.0 a bfloat16 bias would never move by the report's 0.001."""
    model = tiny_model(dtype=torch.bfloat16)
    gate = model.gates()[0]
    gate.bias.fill_(1.0)
    balance = Balance([gate])
    for _ in range(10):
        balance.counts[0] = torch.arange(8)
        balance.update(0.001)
    torch.testing.assert_close(gate.bias[0].item(), 1.01, atol=1e-5, rtol=0)


def test_counts_and_max_violation_by_hand() -> None:
    routing = routing_of([[0, 1], [0, 2], [0, 3]])
    assert expert_counts(routing).tolist() == [3, 1, 1, 1]
    assert expert_counts(routing, torch.tensor([True, False, True])).tolist() == [2, 1, 0, 1]
    assert expert_counts(routing).dtype == torch.int64
    counts = torch.tensor([[3, 1, 1, 1], [2, 2, 2, 2], [8, 0, 0, 0]])
    assert max_violation(counts).tolist() == [1.0, 0.0, 3.0]


def plain_sequence_loss(routing: Routing, lengths: list[int], live: list[bool] | None = None) -> float:
    """V3's equations 17-20, in loops, averaged over sequences that have tokens."""
    E, K = routing.scores.shape[1], routing.indices.shape[1]
    losses, start = [], 0
    for n in lengths:
        rows = [t for t in range(start, start + n) if live is None or live[t]]
        start += n
        if not rows:
            continue
        total = 0.0
        for i in range(E):
            f = E / (K * len(rows)) * sum(int(i in routing.indices[t].tolist()) for t in rows)
            P = sum(float(routing.scores[t, i] / routing.scores[t].sum()) for t in rows) / len(rows)
            total += f * P
        losses.append(total)
    return sum(losses) / len(losses) if losses else 0.0


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("lengths", [[7], [1, 6], [0, 3, 0, 2, 2], [1] * 7])
def test_the_sequence_loss_is_the_reports(lengths: list[int], masked: bool) -> None:
    g = torch.Generator().manual_seed(0)
    scores = torch.rand(7, 6, dtype=torch.float64, generator=g, requires_grad=True)
    routing = Routing(torch.ones(7, 2), scores.topk(2).indices, scores)
    packing = Packing.of(lengths, torch.zeros(7, dtype=torch.int64))
    live = torch.tensor([True, False, True, True, True, False, False]) if masked else None
    loss = sequence_balance_loss(routing, packing, live)
    with torch.no_grad():
        assert loss.item() == pytest.approx(plain_sequence_loss(routing, lengths, live.tolist() if masked else None))
    loss.backward()
    assert scores.grad is not None and scores.grad.abs().sum() > 0
    if masked:
        assert (scores.grad[~live] == 0).all() and (scores.grad[live] != 0).any()


def test_the_sequence_loss_is_1_when_balanced_and_more_when_one_expert_has_all() -> None:
    """Each sequence by itself: two that are lopsided in opposite ways balance the batch, and are not balanced."""
    even = routing_of([[0, 1], [2, 3], [0, 1], [2, 3]])
    packing = Packing.of([2, 2], torch.zeros(4, dtype=torch.int64))
    assert sequence_balance_loss(even, packing).item() == pytest.approx(1.0)

    sure = torch.full((4, 4), 1e-9, dtype=torch.float64)
    sure[:2, 0] = sure[2:, 1] = 1.0
    lopsided = routing_of([[0], [0], [1], [1]], sure)
    assert sequence_balance_loss(lopsided, packing).item() == pytest.approx(4.0)
    assert auxiliary_loss(lopsided).item() == pytest.approx(2.0)


@pytest.mark.parametrize("masked", [False, True])
def test_the_classic_loss_is_the_sequence_loss_of_one_long_sequence(masked: bool) -> None:
    g = torch.Generator().manual_seed(1)
    scores = torch.rand(9, 5, dtype=torch.float64, generator=g)
    routing = Routing(torch.ones(9, 3), scores.topk(3).indices, scores)
    live = [t % 3 > 0 for t in range(9)] if masked else None
    loss = auxiliary_loss(routing, None if live is None else torch.tensor(live))
    assert loss.item() == pytest.approx(plain_sequence_loss(routing, [9], live))


def test_losses_of_nothing_are_zero() -> None:
    nothing = Routing(torch.ones(0, 2), torch.zeros(0, 2, dtype=torch.int64), torch.ones(0, 4))
    packing = Packing.of([0], torch.zeros(0, dtype=torch.int64))
    assert sequence_balance_loss(nothing, packing).item() == 0
    assert auxiliary_loss(nothing).item() == 0
    dead = torch.zeros(2, dtype=torch.bool)
    two = Packing.of([2], torch.zeros(2, dtype=torch.int64))
    assert sequence_balance_loss(routing_of([[0], [1]]), two, dead).item() == 0


def test_the_gradient_evens_the_scores_out() -> None:
    """Descending the sequence loss lowers the busiest expert's score, and raises an idle one's."""
    scores = torch.full((4, 4), 0.5, dtype=torch.float64, requires_grad=True)
    routing = routing_of([[0], [0], [0], [1]], scores)
    sequence_balance_loss(routing, Packing.of([4], torch.zeros(4, dtype=torch.int64))).backward()
    assert (scores.grad[:, 0] > 0).all() and (scores.grad[:, 2] < 0).all()
    assert math.isclose(scores.grad.sum().item(), 0, abs_tol=1e-12)  # scores are normalised


def test_updates_balance_a_lopsided_router() -> None:
    """The whole mechanism: a router that sends everything to two groups is evened out by the bias alone."""
    model = tiny_model(num_hidden_layers=2)
    (gate,) = model.gates()
    gate.bias.copy_(torch.tensor([2.0, 2.0, 2.0, 2.0, -2.0, -2.0, -2.0, -2.0]))
    tokens = random_tokens(256)
    packing = Packing.of([256], tokens)
    balance = Balance([gate])
    history = []
    with torch.no_grad():
        for _ in range(150):
            balance.observe(model.hidden(tokens, packing).routings)
            history.append(balance.update(0.05).item())
    assert history[0] > 0.9
    assert max(history[-5:]) < 0.35
