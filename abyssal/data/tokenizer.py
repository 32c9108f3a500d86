"""Byte-level BPE tokenizers: trained here, or read from the files that public checkpoints carry."""

import base64
import binascii
import codecs
import copy
import datetime
import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import tokenizers
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from abyssal.files import write_file

BOS, EOS, USER, ASSISTANT = "<|begin_of_text|>", "<|end_of_text|>", "<|user|>", "<|assistant|>"

# Where our own BPE never merges across: words with the character before them, numbers of up to three digits,
# punctuation, line ends, spaces.
SPLIT = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

CHAT_TEMPLATE = """{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'system' %}{{ message['content'] }}{% elif message['role'] == 'user' %}
{{ '<|user|>' + message['content'] }}{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>' + message['content'] + eos_token }}{% else %}
{{ raise_exception("role " + message['role'] + ": expected system, user or assistant") }}{% endif %}
{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}""".replace("\n", "")

# Kimi's and Moonlight's, from their public tokenization code: o200k's with runs of Han characters apart.
_UPPER, _LOWER = (rf"[{kinds}\p{{Lm}}\p{{Lo}}\p{{M}}&&[^\p{{Han}}]]" for kinds in (r"\p{Lu}\p{Lt}", r"\p{Ll}"))
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
TIKTOKEN_SPLIT = "|".join(
    [
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
TIKTOKEN_RESERVED = 256  # ids above the ranks, for special tokens

TOKENIZER, TIKTOKEN = "tokenizer.json", "tiktoken.model"
COMPANIONS = ("tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


class Tokenizer:
    """Text to ids and back, exactly: `decode(encode(text)) == text` for every text that UTF-8 can hold.

    `vocab_size` is the highest id + 1 (a model's vocabulary may be wider: DeepSeek-V3's is 129,280 with 128,815
    ids). `bos_id` and `eos_id` are None where `tokenizer_config.json` names none; `adds_bos` says whether its model
    wants the first before a prompt, which `encode` leaves to its caller. `fingerprint` changes with any byte of the
    files. Encoding may be called from several threads.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        """`files`: the contents of `tokenizer.json` or `tiktoken.model`, and of its companions, by name.

        Raises ValueError, naming the file, if they are malformed or not a byte-level BPE.
        """
        self.files = dict(files)
        config = _parse_json(self.files.get("tokenizer_config.json", b"{}"), "tokenizer_config.json")
        if TOKENIZER in self.files:
            definition = _parse_json(self.files[TOKENIZER], TOKENIZER)
        elif TIKTOKEN in self.files:
            definition = _from_tiktoken(self.files[TIKTOKEN], config)
        else:
            raise ValueError(f"tokenizer: expected {TOKENIZER} or {TIKTOKEN} among {sorted(self.files)}")
        kinds = json.dumps(definition.get("decoder"))
        if '"ByteLevel"' not in kinds:
            raise ValueError(f"{TOKENIZER}: field decoder: expected ByteLevel (a byte-level BPE), found {kinds[:80]}")
        # Whole documents go through: nothing is cut, padded, or put in front, whatever the file asks for.
        self._definition = definition | {"truncation": None, "padding": None, "post_processor": None}
        self._added: list[dict[str, Any]] = definition.get("added_tokens", [])
        self._tokenizer = _build(self._definition)
        for token in self._added:
            if self._tokenizer.token_to_id(token["content"]) != token["id"]:
                raise ValueError(f"{TOKENIZER}: added token {token['content']!r} cannot have the id {token['id']}")
        self.vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self._special_ids = frozenset(token["id"] for token in self._added if token["special"])
        # A special token is a string in some configurations and an object with `content` in others.
        named = {
            key: value["content"] if isinstance(value, dict) else value
            for key, value in config.items()
            if key.endswith("_token") and isinstance(value, str | dict)
        }
        self._named: dict[str, str] = {key: text for key, text in named.items() if isinstance(text, str)}
        self.bos_id = self._id_of("bos_token")
        self.eos_id = self._id_of("eos_token")
        self.adds_bos = self.bos_id is not None and config.get("add_bos_token") is True
        self.chat_template = self._find_chat_template(config)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """From a folder with `tokenizer.json` or else `tiktoken.model`, or from one of these files by its path.

        `tokenizer_config.json` and `chat_template.jinja` are read from beside it. Raises FileNotFoundError
        naming what is missing, ValueError naming what is malformed.
        """
        path = Path(path)
        if path.is_dir():
            main = next((path / name for name in (TOKENIZER, TIKTOKEN) if (path / name).is_file()), None)
            if main is None:
                raise FileNotFoundError(f"{path}: has neither {TOKENIZER} nor {TIKTOKEN}")
        elif not path.exists():
            raise FileNotFoundError(f"{path}: no such tokenizer file or folder")
        elif path.name not in (TOKENIZER, TIKTOKEN):
            raise ValueError(f"{path}: expected a file named {TOKENIZER} or {TIKTOKEN}, or a folder with one")
        else:
            main = path
        names = [main.name, *(name for name in COMPANIONS if (main.parent / name).is_file())]
        try:
            return cls({name: (main.parent / name).read_bytes() for name in names})
        except ValueError as error:
            raise ValueError(f"{main.parent}: {error}") from error

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """A byte-level BPE of at most `vocab_size` ids (fewer if the text has no more pairs to merge).

        Deterministic. Ids 0 and 1 begin and end a text, 2 and 3 open a user's and an assistant's turn, and all
        256 bytes are in the alphabet, so that nothing is ever unknown. Raises ValueError below 260.
        """
        special = [BOS, EOS, USER, ASSISTANT]
        if vocab_size < 256 + len(special):
            raise ValueError(f"vocab_size {vocab_size}: expected at least {256 + len(special)} (bytes and special)")
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        }
        return cls(
            {
                TOKENIZER: tokenizer.to_str(pretty=True).encode("utf-8"),
                "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode("utf-8"),
            }
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the names and contents of the files, in hexadecimal."""
        digest = hashlib.sha256()
        for name, data in sorted(self.files.items()):
            digest.update(f"{name} {len(data)}\n".encode())
            digest.update(data)
        return digest.hexdigest()

    def encode(self, text: str, special: bool = False) -> list[int]:
        """The ids of a text; nothing is put before or after it.

        With `special`, `<｜User｜>` and its like written in the text become their ids, as a rendered chat needs;
        without, they are text like any other. Raises ValueError on half a surrogate pair.
        """
        return self.encode_batch([text], special)[0]

    def encode_batch(self, texts: list[str], special: bool = False) -> list[list[int]]:
        """`encode` of each text, over the cores of the machine."""
        tokenizer = self._tokenizer if special else self._ordinary
        try:
            return [e.ids for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        except TypeError as error:
            for number, text in enumerate(texts):
                if not isinstance(text, str):
                    raise TypeError(f"text {number}: expected a str, found {type(text).__name__}") from error
            raise ValueError("text cannot be encoded as UTF-8: it has half a surrogate pair") from error

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """The text of ids, without special tokens unless `special`. Broken UTF-8 becomes U+FFFD.

        Raises ValueError on an id that the tokenizer lacks.
        """
        return b"".join(self._visible_bytes(id, special) for id in ids).decode("utf-8", "replace")

    def token_bytes(self, id: int) -> bytes:
        """The bytes one id stands for, perhaps only a part of a character.

        Raises ValueError if the tokenizer lacks it.
        """
        found = self._bytes[id] if 0 <= id < self.vocab_size else None
        if found is None:
            raise ValueError(f"token id {id}: the tokenizer has no such id among its {self.vocab_size}")
        return found

    def save(self, folder: str | Path) -> None:
        """Writes the files, byte for byte as they were read, in the format that transformers loads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self.files.items():
            write_file(folder / name, data)

    def chat(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = True,
        *,
        tools: list[dict[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        max_chars: int | None = None,
        seconds: float | None = None,
    ) -> str:
        """The text of a conversation, rendered by the chat template in a sandbox as Hugging Face renders it.

        `tools` in OpenAI's form; `variables` are what else the template may ask for, such as `thinking`. Encode the
        text with `special=True`. Raises ValueError if there is no template, it refuses the messages, or it writes more
        than `max_chars` or for longer than `seconds` (looked at whenever it writes).
        """
        if self.chat_template is None:
            raise ValueError("tokenizer_config.json: has no chat_template, so it cannot render a conversation")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _strftime_now
        given = dict(variables or {}) | {
            "messages": copy.deepcopy(messages),
            "tools": copy.deepcopy(tools),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        written: list[str] = []
        chars, started = 0, time.monotonic()
        try:
            for piece in environment.from_string(self.chat_template).generate(self._named | given):
                written.append(piece)
                chars += len(piece)
                if max_chars is not None and chars > max_chars:
                    raise ValueError(f"chat template: wrote more than {max_chars} characters")
                if seconds is not None and time.monotonic() - started > seconds:
                    raise ValueError(f"chat template: took longer than {seconds:g} s")
        except (TemplateError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            raise ValueError(f"chat template: {error}") from error
        return "".join(written)

    @cached_property
    def _ordinary(self) -> tokenizers.Tokenizer:
        """The tokenizer that takes control tokens for text.

        Added tokens of one character are no control tokens: DeepSeek-LLM's `ü` is a letter that its bytes cannot
        spell. Flags like `special` do not tell: DeepSeek-V3's `<｜User｜>` is not special by its file.
        """
        added = [token | {"special": token["special"] or len(token["content"]) > 1} for token in self._added]
        tokenizer = _build(self._definition | {"added_tokens": added})
        tokenizer.encode_special_tokens = True
        return tokenizer

    @cached_property
    def _bytes(self) -> list[bytes | None]:
        byte_of = {letter: byte for byte, letter in enumerate(_byte_letters())}
        table: list[bytes | None] = [None] * self.vocab_size
        for token, id in self._tokenizer.get_vocab(with_added_tokens=True).items():
            spelled = [byte_of.get(letter) for letter in token]
            table[id] = token.encode("utf-8") if None in spelled else bytes(b for b in spelled if b is not None)
        for added in self._added:  # these stand for their own text, whatever letters they have
            table[added["id"]] = added["content"].encode("utf-8")
        return table

    def _visible_bytes(self, id: int, special: bool) -> bytes:
        found = self.token_bytes(id)
        return b"" if id in self._special_ids and not special else found

    def _id_of(self, name: str) -> int | None:
        if name not in self._named:
            return None
        id: int | None = self._tokenizer.token_to_id(self._named[name])
        if id is None:
            raise ValueError(f"tokenizer_config.json: {name} {self._named[name]!r} is not in the vocabulary")
        return id

    def _find_chat_template(self, config: dict[str, Any]) -> str | None:
        if "chat_template.jinja" in self.files:
            return self.files["chat_template.jinja"].decode("utf-8")
        template = config.get("chat_template")
        if isinstance(template, list):  # several by name; `default` is for plain conversations
            template = next((t.get("template") for t in template if t.get("name") == "default"), None)
        if template is not None and not isinstance(template, str):
            raise ValueError(f"tokenizer_config.json: chat_template: expected text, found {type(template).__name__}")
        return template


class Detokenizer:
    """Text as ids arrive: never half a character, and all the pieces together are `Tokenizer.decode` of the ids."""

    def __init__(self, tokenizer: Tokenizer, special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The text that is certain now that `id` has come; "" while a character is unfinished."""
        return self._decoder.decode(self._tokenizer._visible_bytes(id, self._special))

    def flush(self) -> str:
        """What was left unfinished, as U+FFFD; afterwards the detokenizer is as new."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def _from_tiktoken(data: bytes, config: dict[str, Any]) -> dict[str, Any]:
    """The `tokenizer.json` that encodes as tiktoken does with these ranks and Kimi's pattern.

    tiktoken joins the neighbours whose joint has the lowest rank, whichever pair they are, so every way to split
    a token into two tokens becomes a merge with that token's rank. It takes a piece that is a token as it is:
    `ignore_merges`. (Their code also cuts runs of 25,000 letters or spaces; here they stay whole.)
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"{TIKTOKEN}: line {number}: expected base64 and a rank, found {line[:40]!r}") from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{TIKTOKEN}: expected ranks 0 to {len(ranks) - 1}, each once")
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise ValueError(f"{TIKTOKEN}: expected all 256 single bytes among its tokens")
    letters = _byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges: list[list[str]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        halves = [(token[:at], token[at:]) for at in range(1, len(token))]
        pairs = [(left, right) for left, right in halves if left in ranks and right in ranks]
        pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges.extend([spelled[left], spelled[right]] for left, right in pairs)
    named = config.get("added_tokens_decoder", {})
    added = []
    for id in range(len(ranks), len(ranks) + TIKTOKEN_RESERVED):
        entry = named.get(str(id), {"content": f"<|reserved_token_{id}|>"})
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        added.append({"id": id, "content": entry["content"], "special": entry.get("special", True)} | flags)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": TIKTOKEN_SPLIT}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "ignore_merges": True,
            "vocab": {spelled[token]: rank for token, rank in ranks.items()},
            "merges": merges,
        },
    }


def _build(definition: dict[str, Any]) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(definition))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{TOKENIZER}: {error}") from error


def _byte_letters() -> list[str]:
    """The letter that byte-level BPE writes for each byte: printable ones as they are, others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _parse_json(data: bytes, name: str) -> dict[str, Any]:
    try:
        parsed = json.loads(data.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{name}: malformed JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{name}: expected a JSON object, found {type(parsed).__name__}")
    return parsed


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
