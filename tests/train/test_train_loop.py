"""Whole runs: the loss falls, the files are there, a NaN is found."""

import io
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from abyssal.checkpoint import CheckpointError
from abyssal.config import ConfigError
from abyssal.data import Tokenizer, TokenSet
from abyssal.model.objective import Objective
from abyssal.model.transformer import Transformer
from abyssal.train import NotFinite, TrainConfig, read_metrics, train
from abyssal.train.export import tokenizer_of
from abyssal.train.state import newest_state, read_trainer
from abyssal.train.trainer import Trainer
from abyssal.train.validation import Validator


@pytest.fixture
def quiet():
    return Console(file=io.StringIO(), width=200)


def test_a_run_from_text_to_a_model(make_config, quiet, text, tmp_path):
    config = make_config(data=str(text), steps=40, batch_tokens=256, validate_every=20, save_every=20, log_every=5)
    result = train(config, console=quiet)
    records = read_metrics(result.metrics)
    assert [r["step"] for r in records] == list(range(5, 41, 5))
    assert records[-1]["main_loss"] < 0.6 * records[0]["main_loss"]
    assert records[-1]["mtp_losses"][0] < 0.8 * records[0]["mtp_losses"][0]
    first, last = (r["validation"] for r in records if r["validation"])
    assert last["bits_per_byte"] < first["bits_per_byte"]
    assert [len(layer) for layer in last["expert_load"]] == [8]
    assert last["mtp_accuracy"][0] > first["mtp_accuracy"][0] > 0 and 0 < last["mtp_accepted"][0] < 1
    assert result.steps == 40 and result.interrupted is None and result.last == records[-1]
    assert {p.name for p in result.out.iterdir()} == {
        "train.json", "tokens", "metrics.jsonl", "state", "model", "curves.png"}  # fmt: skip
    assert result.curves.read_bytes().startswith(b"\x89PNG")
    assert (result.model / "config.json").is_file() and list(result.model.glob("*.safetensors"))
    assert (
        Tokenizer.load(result.model).decode(Tokenizer.load(result.model).encode("the cat größer")) == "the cat größer"
    )
    told = quiet.file.getvalue()
    for line in ("batch_tokens          256", "step 40/40  loss", "bits/B  mtp ", "left 0:00", str(result.model)):
        assert line in told
    assert TrainConfig.read(result.out) == config


def test_the_saved_model_is_the_trained_one(make_config, quiet):
    import abyssal

    config = make_config(dtype="float32")
    result = train(config, console=quiet)
    model = abyssal.load(result.model)
    trainer = Trainer(config, config.model_settings(), _tokens_of(config))
    trainer.restore(newest_state(result.out / "state"))
    tokens = torch.arange(20)
    assert torch.equal(model(tokens, [20]), trainer.model(tokens, [20]))
    for ours, theirs in zip(model.gates(), trainer.model.gates(), strict=True):
        assert torch.equal(ours.bias, theirs.bias) and ours.bias.abs().max() > 0


def _tokens_of(config):
    from abyssal.data import TokenSet

    return TokenSet.open(config.data)


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "bfloat16", "accumulate": 2, "recompute": "block"},
        {"optimizer": "muon"},
        {"dtype": "bfloat16", "optimizer": "muon"},
        {"model": {"n_routed_experts": None, "num_nextn_predict_layers": 0}},
        {"model": {"tie_word_embeddings": True}},
        {"model": {"topk_method": "greedy", "scoring_func": "softmax", "n_group": 1}, "auxiliary_balance": 0.01},
    ],
    ids=["bf16", "muon", "bf16-muon", "dense", "tied", "v2"],
)
def test_other_runs_end_and_are_saved(make_config, quiet, changes):
    result = train(make_config(steps=4, **changes), console=quiet)
    assert all(math.isfinite(r["loss"]) for r in read_metrics(result.metrics))
    assert (result.model / "config.json").is_file()


@pytest.mark.parametrize(
    ("poisoned", "where"),
    [
        ("layers.1.attn.wkv_b.weight", "the output of layers.1.attn.wkv_b"),
        ("layers.1.ffn.experts.w2", "the output of layers.1.ffn.experts"),
        ("mtp.0.eh_proj.weight", "the output of mtp.0.eh_proj"),
        ("head.weight", "the output of head"),
    ],
)
def test_a_nan_names_step_and_layer(make_config, quiet, monkeypatch, poisoned, where):
    config = make_config(accumulate=2, save_every=2)
    step = Trainer.step

    def poison(trainer, micros):
        if trainer.done == 2:
            with torch.no_grad():
                trainer.model.get_parameter(poisoned)[..., :1] = math.nan
        return step(trainer, micros)

    monkeypatch.setattr(Trainer, "step", poison)
    with pytest.raises(NotFinite, match=f"step 3: the loss is nan .*first: {where}.*state-nan"):
        train(config, console=quiet)
    saved = read_trainer(config.out / "state-nan")
    assert saved["step"] == 2
    assert [r["step"] for r in read_metrics(config.out / "metrics.jsonl")] == [1, 2]
    assert newest_state(config.out / "state").name == "step-00000002"


def test_a_state_finds_its_tokenizer_wherever_it_lies_in_the_run(make_config, quiet, text, monkeypatch):
    config = make_config(data=str(text), steps=1)
    train(config, console=quiet)
    made = Tokenizer.load(config.out / "tokens" / "tokenizer").fingerprint
    state = newest_state(config.out / "state")
    shutil.copytree(state, config.out / "state-nan")
    text.rename(text.with_suffix(".gone"))
    try:
        for folder in (state, config.out / "state-nan"):
            assert tokenizer_of(folder).fingerprint == made
        monkeypatch.chdir(config.out)
        assert tokenizer_of(Path("state-nan")).fingerprint == made
    finally:
        text.with_suffix(".gone").rename(text)


def test_documents_begin_with_what_every_prompt_begins_with(make_config, quiet, text, tmp_path):
    """Where the tokenizer is told to begin a text with an id, the model is trained to see it there."""
    Tokenizer.train(["the cat sat on a mat and saw 1234 birds"], 320).save(tmp_path / "given")
    file = tmp_path / "given" / "tokenizer_config.json"
    for adds in (False, True):
        told = json.loads(file.read_text())
        file.write_text(json.dumps(told | {"add_bos_token": adds}))
        config = make_config(
            data=str(text), tokenizer=str(tmp_path / "given"), out=str(tmp_path / f"run-{adds}"), steps=1
        )
        train(config, console=quiet)
        tokenizer = Tokenizer.load(config.out / "model")
        assert tokenizer.bos_id is not None and tokenizer.adds_bos == adds
        first = TokenSet.open(config.out / "tokens").split("train").document(0)[0]
        assert (first == tokenizer.bos_id) == adds


def test_a_nan_is_told_where_the_state_before_it_cannot_be_kept(make_config, quiet, monkeypatch):
    config = make_config()
    step, saved = Trainer.step, Trainer.saved
    earlier = ["step-00000001: a state was not written"]

    def poison(trainer, micros):
        (config.out / ".state-nan.tmp").touch()
        with torch.no_grad():
            trainer.model.head.weight[0] = math.nan
        return step(trainer, micros)

    def fail_first(trainer):
        saved(trainer)
        if earlier:
            raise CheckpointError(earlier.pop())

    monkeypatch.setattr(Trainer, "step", poison)
    with pytest.raises(NotFinite, match=r"first: the output of head. The state before this step could not be kept: \S"):
        train(config, console=quiet)
    monkeypatch.setattr(Trainer, "saved", fail_first)
    with pytest.raises(
        NotFinite, match=r"of head. An earlier state could not be kept: step-00000001: .* not be kept: "
    ):
        train(config, console=quiet)


def test_a_gradient_that_is_not_finite_is_named_too(make_config, token_set, monkeypatch):
    trainer = Trainer(make_config(), make_config().model_settings(), token_set)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.model.layers[0].attn.wo.weight.register_hook(lambda g: g * math.inf)
    with trainer.stream() as stream, pytest.raises(NotFinite, match=r"the gradient of layers.0.attn.wo.weight"):
        trainer.step(next(stream))
    assert trainer.done == 0
    assert all(torch.equal(before[name], p) for name, p in trainer.model.named_parameters())
    assert int(trainer.balance.counts.sum()) == 0


def test_bits_a_byte_of_a_model_that_knows_nothing(make_config, token_set):
    """A head of zeros gives every token ln(vocab) nats; the bytes are those of the documents, counted from text."""
    model = Transformer(make_config().model_settings()).init_weights()
    torch.nn.init.zeros_(model.head.weight)
    split = token_set.split("validation")
    measured = Validator(token_set, 10**9, 64, 10**6).measure(Objective(model).measure)
    assert measured.loss == pytest.approx(math.log(320), rel=1e-6)
    # The batches of 64 cut documents: a token that begins a piece is not predicted, nor are its bytes counted.
    tokenizer = Tokenizer.load(token_set.tokenizer)
    stream = [(int(t), first) for i in range(split.documents) for first, t in _firsts(split.document(i))]
    predicted = [t for place, (t, first) in enumerate(stream) if not first and place % 64]
    size = sum(len(tokenizer.token_bytes(t)) for t in predicted if t != tokenizer.eos_id)
    assert (measured.tokens, measured.bytes) == (len(predicted), size)
    assert measured.bits_per_byte == pytest.approx(math.log2(320) * len(predicted) / size, rel=1e-6)
    whole = Validator(token_set, 10**9, 10**6, 10**6).measure(Objective(model).measure)
    firsts = sum(len(tokenizer.token_bytes(int(split.document(i)[0]))) for i in range(split.documents))
    assert whole.bytes + firsts == split.text_bytes
    part = Validator(token_set, 200, 64, 10**6)
    assert sum(len(b.tokens) for b in part.batches) == 192


def _firsts(document):
    return [(i == 0, t) for i, t in enumerate(document)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence": 1000}, "sequence: 1000, the model's max_position_embeddings is 512"),
        ({"model": {"vocab_size": 270}}, r"model.vocab_size: the tokenizer has \d+ ids, the model 270"),
        ({"compile": True}, "compile: on a CPU the experts' product cannot be compiled for training"),
        ({"device": "cuda:77"}, "device: 'cuda:77' cannot be used"),
    ],
)
def test_what_does_not_fit_is_refused(make_config, quiet, changes, message):
    with pytest.raises(ConfigError, match=message):
        train(make_config(**changes), console=quiet)


def test_another_tokenizer_than_the_token_sets_is_refused(make_config, quiet, tmp_path):
    Tokenizer.train(["other"], 300).save(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"tokenizer: .*other is not the one that made the tokens"):
        train(make_config(tokenizer=str(tmp_path / "other")), console=quiet)
