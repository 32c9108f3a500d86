"""The tokens that a run reads: an existing set, or one made in the run's folder."""

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from abyssal.config import ConfigError, ModelConfig
from abyssal.data import Tokenizer, TokenSet, documents, prepare
from abyssal.data.shards import INDEX, TOKENIZER_FOLDER
from abyssal.train.config import TrainConfig

TOKENS = "tokens"  # in the run's folder


def open_corpus(config: TrainConfig, model: ModelConfig, console: Console, made: bool) -> TokenSet:
    """The token set of a run. Raises ConfigError if the model's vocabulary is too small for it.

    `made`: the run made it before, of what the configuration still names, so it need not be compared with its
    source again.
    """
    token_set = _existing(config, made) or _prepare(config, model, console)
    if token_set.vocab_size > model.vocab_size:
        raise ConfigError(
            f"model.vocab_size: the tokenizer has {token_set.vocab_size} ids, the model {model.vocab_size}"
        )
    return token_set


def _existing(config: TrainConfig, made: bool) -> TokenSet | None:
    data = config.data
    if data is not None and (data / INDEX).is_file() and (data / TOKENIZER_FOLDER).is_dir():
        token_set = TokenSet.open(data)
        if config.tokenizer is not None:
            given = Tokenizer.load(config.tokenizer).fingerprint
            if given != token_set.index["tokenizer_sha256"]:
                raise ConfigError(f"tokenizer: {config.tokenizer} is not the one that made the tokens in {data}")
        return token_set
    return TokenSet.open(config.out / TOKENS) if made else None


def _prepare(config: TrainConfig, model: ModelConfig, console: Console) -> TokenSet:
    if config.tokenizer is not None:
        tokenizer = Tokenizer.load(config.tokenizer)
    else:
        console.print(f"training a byte-level BPE of {model.vocab_size:,} tokens on the data", highlight=False)
        tokenizer = Tokenizer.train(_texts(config.data, config.data_max_bytes), model.vocab_size)
    limit = config.data_max_bytes
    most = "" if limit is None else f" of {limit:,} bytes of text at most (data_max_bytes)"
    console.print(f"making token shards in {config.out / TOKENS}{most}", highlight=False, soft_wrap=True)
    return prepare(  # with the id before each document that the tokenizer puts before every prompt
        config.data, tokenizer, config.out / TOKENS, max_bytes=limit, add_bos=tokenizer.adds_bos,
        progress=console.is_terminal,
    )  # fmt: skip


def _texts(data: Path | None, most: int | None) -> Iterator[str]:
    """The documents that `prepare` will take."""
    total = 0
    for document in documents(data, lambda name, reason: None):
        total += len(document.text.encode("utf-8"))
        if most is not None and total > most:
            return
        yield document.text
