"""Our own BPE: exact round trips, determinism, streaming, chat, and the files."""

import json

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.data import Detokenizer, Tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and it's 12345 o'clock.\n\n\tdef f(x):\n        return x ** 2\n",
    "深海魚は暗い海に住む。深海的鱼住在黑暗的海里。 Ωμέγα ёжик עברית हिन्दी 👩‍👩‍👧‍👦 naïve café",
] * 20
unicode = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def ours():
    return Tokenizer.train(TEXTS, 400)


@settings(deadline=None, max_examples=200)
@given(unicode)
def test_round_trip_is_exact(ours, text):
    ids = ours.encode(text)
    assert ours.decode(ids) == text
    assert b"".join(ours.token_bytes(id) for id in ids) == text.encode()
    assert all(0 <= id < ours.vocab_size for id in ids)


@settings(deadline=None, max_examples=200)
@given(unicode, st.lists(st.integers(0, 399)), st.booleans())
def test_streaming_gives_the_same_text_and_never_half_a_character(ours, text, noise, special):
    ids = [id for id in [*ours.encode(text), *noise] if id < ours.vocab_size]
    stream = Detokenizer(ours, special)
    pieces = [stream.push(id) for id in ids]
    assert "".join(pieces) + stream.flush() == ours.decode(ids, special)
    fresh = Detokenizer(ours)
    assert "\ufffd" not in "".join(fresh.push(id) for id in ours.encode(text.replace("\ufffd", "")))
    assert fresh.flush() == ""


def test_streaming_waits_for_the_rest_of_a_character(ours):
    ids = ours.encode("🐙")
    assert len(ids) > 1  # or the test shows nothing
    stream = Detokenizer(ours)
    assert [stream.push(id) for id in ids] == [""] * (len(ids) - 1) + ["🐙"]
    stream.push(ids[0])
    assert stream.flush() == "\ufffd"
    assert [stream.push(id) for id in ids][-1] == "🐙"  # usable again after a flush


def test_training_is_deterministic_and_merges(ours):
    again = Tokenizer.train(iter(TEXTS), 400)
    assert again.files == ours.files
    assert again.fingerprint == ours.fingerprint
    assert (ours.vocab_size, ours.bos_id, ours.eos_id) == (400, 0, 1)
    assert len(ours.encode(TEXTS[0])) < len(TEXTS[0].encode()) * 0.7
    assert Tokenizer.train(["other text"], 400).fingerprint != ours.fingerprint
    assert Tokenizer.train(["ab"], 1000).vocab_size == 261  # 4 special, 256 bytes, one merge
    with pytest.raises(ValueError, match="vocab_size 259: expected at least 260"):
        Tokenizer.train(TEXTS, 259)


def test_special_tokens_in_text_are_text_unless_asked(ours):
    text = "a<|end_of_text|>b<|user|>"
    assert not {0, 1, 2, 3} & set(ours.encode(text))
    assert ours.decode(ours.encode(text)) == text
    ids = ours.encode(text, special=True)
    assert [id for id in ids if id < 4] == [1, 2]
    assert ours.decode(ids) == "ab"
    assert ours.decode(ids, special=True) == text


def test_batch_is_each_alone(ours):
    assert ours.encode_batch([]) == []
    assert ours.encode_batch(["", *TEXTS[:2]]) == [[], ours.encode(TEXTS[0]), ours.encode(TEXTS[1])]


def test_bad_arguments_by_message(ours):
    with pytest.raises(ValueError, match="half a surrogate pair"):
        ours.encode("\ud800")
    with pytest.raises(TypeError, match="text 1: expected a str, found int"):
        ours.encode_batch(["a", 5])
    for id in (-1, 400):
        with pytest.raises(ValueError, match=f"token id {id}: .* no such id"):
            ours.token_bytes(id)
        with pytest.raises(ValueError, match="no such id"):
            ours.decode([id])


def test_saved_files_load_here_and_in_transformers(ours, tmp_path):
    ours.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.files == ours.files
    assert loaded.encode(TEXTS[1]) == ours.encode(TEXTS[1])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(TEXTS[1], add_special_tokens=False).input_ids == ours.encode(TEXTS[1])
    assert (theirs.bos_token_id, theirs.eos_token_id) == (0, 1)
    messages = [{"role": r, "content": f" {r} says\n"} for r in ("system", "user", "assistant", "user")]
    for generation in (True, False):
        rendered = ours.chat(messages, generation)
        assert rendered == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
    assert ours.chat(messages[1:]) == (
        "<|begin_of_text|><|user|> user says\n<|assistant|> assistant says\n<|end_of_text|>"
        "<|user|> user says\n<|assistant|>"
    )


def test_files_come_back_byte_for_byte(ours, tmp_path):
    odd = json.dumps(json.loads(ours.files["tokenizer.json"]), indent=7).encode() + b"\n\n"
    files = {"tokenizer.json": odd, "tokenizer_config.json": b' { "eos_token" : {"content": "<|user|>"}}'}
    files["chat_template.jinja"] = "{{ eos_token }}ü{{ messages | tojson }}".encode()
    (tmp_path / "in").mkdir()
    for name, data in files.items():
        (tmp_path / "in" / name).write_bytes(data)
    tokenizer = Tokenizer.load(tmp_path / "in" / "tokenizer.json")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 2)
    assert tokenizer.chat([{"x": "<é>"}]) == '<|user|>ü[{"x": "<é>"}]'
    tokenizer.save(tmp_path / "out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == files


def test_a_chat_template_is_sandboxed_and_its_errors_told(ours):
    def chat(template, messages=()):
        config = json.dumps({"chat_template": template}).encode()
        return Tokenizer(ours.files | {"tokenizer_config.json": config}).chat(list(messages))

    for attack in ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}"):
        with pytest.raises(ValueError, match=r"chat template: .*(unsafe|not safe)"):
            chat(attack)
    with pytest.raises(ValueError, match="chat template: roles must alternate"):
        chat("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="chat template: "):
        chat("{{ 'a' + messages[0]['content'] }}", [{"content": None}])
    with pytest.raises(ValueError, match="chat template: "):
        chat("{% for %}")
    with pytest.raises(ValueError, match="role tool: expected system, user or assistant"):
        ours.chat([{"role": "tool", "content": ""}])
    with pytest.raises(ValueError, match="has no chat_template"):
        Tokenizer({"tokenizer.json": ours.files["tokenizer.json"]}).chat([])
    assert len(chat("{{ strftime_now('%Y') }}")) == 4
    assert chat([{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]) == "yes"
    assert chat("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"


def test_malformed_files_by_message(ours, tmp_path):
    good = ours.files["tokenizer.json"]
    with pytest.raises(FileNotFoundError, match=r"has neither tokenizer.json nor tiktoken.model"):
        Tokenizer.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such tokenizer"):
        Tokenizer.load(tmp_path / "absent")
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ValueError, match=r"tokenizer.model: expected a file named tokenizer.json or tiktoken.model"):
        Tokenizer.load(tmp_path / "tokenizer.model")

    def broken(**changes):
        return {"tokenizer.json": json.dumps(json.loads(good) | changes).encode()}

    moved = json.loads(good)["added_tokens"]
    moved[0] = moved[0] | {"content": "<other>", "id": 7}
    for files, message in (
        ({"tokenizer.json": b"{"}, "tokenizer.json: malformed JSON"),
        ({"tokenizer.json": b"[]"}, "tokenizer.json: expected a JSON object, found list"),
        ({"tokenizer.json": good, "tokenizer_config.json": b"\xff"}, "tokenizer_config.json: malformed JSON"),
        (broken(decoder={"type": "Metaspace"}), "field decoder: expected ByteLevel"),
        (broken(model={"type": "BPE"}), "tokenizer.json: "),
        (broken(added_tokens=moved), "added token '<other>' cannot have the id 7"),
        (
            {"tokenizer.json": good, "tokenizer_config.json": b'{"eos_token": "</s>"}'},
            "tokenizer_config.json: eos_token '</s>' is not in the vocabulary",
        ),
        (
            {"tokenizer.json": good, "tokenizer_config.json": b'{"chat_template": 5}'},
            "chat_template: expected text",
        ),
        ({}, "expected tokenizer.json or tiktoken.model"),
    ):
        with pytest.raises(ValueError, match=message):
            Tokenizer(files)
        if files:
            for name, data in files.items():
                (tmp_path / name).write_bytes(data)
            with pytest.raises(ValueError, match=f"{tmp_path}: .*{message}"):
                Tokenizer.load(tmp_path)
            for name in files:
                (tmp_path / name).unlink()
