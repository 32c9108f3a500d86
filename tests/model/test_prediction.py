"""Multi-token prediction: against plain loops over the report's equations, transformers' MtpModel, and by hand."""

import pytest
import torch
from plain import further, main_model
from tiny import random_tokens, tiny_model

from abyssal.model.packing import Packing, shift


@pytest.mark.parametrize("compressed", [True, False])
def test_the_main_model_is_the_equations(compressed: bool) -> None:
    model = tiny_model(q_lora_rank=9 if compressed else None)
    tokens = random_tokens(9)
    expected = torch.stack(main_model(model, tokens.tolist()))
    with torch.no_grad():
        states = model.hidden(tokens, Packing.of([9], tokens)).states
    # float32 angles against cmath's: no tighter.
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("depths", [1, 2, 3])
def test_modules_in_sequence_are_equations_21_to_23(depths: int) -> None:
    """Three documents, one of them shorter than the modules reach: live rows are exactly the equations' 1 .. T-k."""
    model = tiny_model(num_nextn_predict_layers=depths, rms_norm_eps=1e-5)
    documents = [random_tokens(n, seed=n).tolist() for n in (7, 2, 5)]
    tokens = torch.tensor([token for document in documents for token in document])
    packing = Packing.of([7, 2, 5], tokens)
    with torch.no_grad():
        states = model.hidden(tokens, packing).states
        predictions = model.predict_states(states, tokens, packing)
        logits = model.predict(tokens, [7, 2, 5])
    assert len(predictions) == len(logits) == depths
    expected = [further(model, document) for document in documents]
    for k in range(depths):
        rows = [row for document in expected for row in document[k]]
        assert predictions[k].live.sum() == len(rows) == sum(max(n - k - 1, 0) for n in (7, 2, 5))
        ours = logits[k].log_softmax(-1)[predictions[k].live]
        torch.testing.assert_close(ours, torch.stack(rows), atol=1e-5, rtol=0)


def test_loss_is_equations_24_and_25_over_documents() -> None:
    """Targets d+1 further on, averaged over those there are."""
    model = tiny_model(num_nextn_predict_layers=2)
    documents = [random_tokens(n, seed=n).tolist() for n in (6, 1, 3)]
    tokens = torch.tensor([token for document in documents for token in document])
    packing = Packing.of([6, 1, 3], tokens)
    logits = model.predict(tokens, packing)
    for k in (1, 2):
        losses = [
            -float(row[document[i + k + 1]])
            for document in documents
            for i, row in enumerate(further(model, document)[k - 1])
            if i + k + 1 < len(document)
        ]
        targets, live = shift(tokens, packing, 1 + k)
        loss = torch.nn.functional.cross_entropy(logits[k - 1][live], targets[live])
        assert live.sum() == len(losses)
        assert loss.item() == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_targets_stop_at_document_boundaries() -> None:
    """By hand, with documents of length 0, 1, 2 and 4."""
    tokens = torch.tensor([10, 20, 21, 30, 31, 32, 33])
    packing = Packing.of([1, 0, 2, 4, 0], tokens)
    by_hand = {
        0: ([10, 20, 21, 30, 31, 32, 33], [1, 1, 1, 1, 1, 1, 1]),
        1: ([0, 21, 0, 31, 32, 33, 0], [0, 1, 0, 1, 1, 1, 0]),
        2: ([0, 0, 0, 32, 33, 0, 0], [0, 0, 0, 1, 1, 0, 0]),
        3: ([0, 0, 0, 33, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0]),
        4: ([0] * 7, [0] * 7),
    }
    for by, (expected, there) in by_hand.items():
        further_on, inside = shift(tokens, packing, by)
        assert further_on.tolist() == expected
        assert inside.tolist() == [bool(t) for t in there]


def test_no_tokens_at_all() -> None:
    model = tiny_model(num_nextn_predict_layers=2)
    none = torch.zeros(0, dtype=torch.int64)
    for lengths in ([], [0], [0, 0]):
        assert model(none, lengths).shape == (0, 61)
        assert [p.shape for p in model.predict(none, lengths)] == [(0, 61)] * 2
        assert shift(none, Packing.of(lengths, none), 1)[0].shape == (0,)


def test_a_document_does_not_see_its_neighbours() -> None:
    """Live rows of every module are the same alone and packed."""
    model = tiny_model(num_nextn_predict_layers=2)
    a, b = random_tokens(6, seed=1), random_tokens(5, seed=2)
    packed = model.predict(torch.cat((a, b)), [6, 5])
    for d, (alone_a, alone_b) in enumerate(zip(model.predict(a, [6]), model.predict(b, [5])), start=1):
        torch.testing.assert_close(packed[d - 1][: 6 - d], alone_a[: 6 - d], atol=1e-10, rtol=0)
        torch.testing.assert_close(packed[d - 1][6 : 11 - d], alone_b[: 5 - d], atol=1e-10, rtol=0)


def test_gradients_reach_every_parameter_through_the_modules() -> None:
    """Embedding, head and trunk learn from the modules' losses too: nothing is detached."""
    model = tiny_model(num_nextn_predict_layers=2)
    tokens = random_tokens(40)
    sum(p.square().mean() for p in model.predict(tokens, [40])).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_a_dense_block_may_stand_in_a_module_of_a_model_with_experts() -> None:
    model = tiny_model(num_nextn_predict_layers=1, mtp_moe=False)
    assert len(model.gates()) == 2
    tokens = random_tokens(5)
    packing = Packing.of([5], tokens)
    (prediction,) = model.predict_states(model.hidden(tokens, packing).states, tokens, packing)
    assert prediction.routing is None
    expected = torch.stack(further(model, tokens.tolist())[0])
    ours = model.logits(prediction.states).log_softmax(-1)[:4]
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_transformers_mtp_model_agrees(tmp_path, monkeypatch) -> None:
    """Two modules saved by us, loaded by them, called one by one. Their positions are d places further on, which
    rotary attention does not see."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_layers import MtpModel
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM

    model = tiny_model(dtype=torch.float32, num_nextn_predict_layers=2)
    model.save(tmp_path)
    # Their loader knows no MTP layer but V3's own, number 61.
    monkeypatch.setattr(DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.[34]\..*"])
    main = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    mtp = MtpModel.from_pretrained(main)
    tokens = random_tokens(14)
    with torch.no_grad():
        logits = model.predict(tokens, [14])
        states = main.model(tokens[None]).last_hidden_state
        for d in (1, 2):
            positions = torch.arange(d, 14)[None]
            ahead = mtp.embed_tokens(tokens[None, d:])
            states = mtp.layers[d - 1](
                ahead,
                states[:, : 14 - d],
                position_embeddings=mtp.rotary_emb(ahead, position_ids=positions),
                attention_mask=None,
                position_ids=positions,
                past_key_values=None,
            )
            expected = mtp.shared_head(states)[0]
            assert expected.std() > 0.5
            torch.testing.assert_close(logits[d - 1][: 14 - d], expected, atol=2e-5, rtol=0)
