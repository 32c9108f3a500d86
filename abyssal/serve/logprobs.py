"""Log-probabilities as OpenAI writes them: two shapes, of chats and of completions."""

from collections.abc import Sequence

from abyssal.data.tokenizer import Detokenizer, Tokenizer
from abyssal.engine.request import TokenLogprob
from abyssal.serve.answers import ChatLogprob, ChatLogprobs, TextLogprobs, TopLogprob

_LEAST = -9999.0  # what stands for -inf, which JSON lacks


def chat_logprobs(found: Sequence[TokenLogprob], top: int, tokenizer: Tokenizer) -> ChatLogprobs:
    def one(id: int, logprob: float) -> TopLogprob:
        token, data = _spelled(id, tokenizer)
        return TopLogprob(token=token, logprob=max(logprob, _LEAST), bytes=list(data))

    content = [
        ChatLogprob(**one(t.token, t.logprob).model_dump(), top_logprobs=[one(*pair) for pair in t.top[:top]])
        for t in found
    ]
    return ChatLogprobs(content=content)


class TextLogprobWriter:
    """Of one sample, piece by piece; `offset` is where in the text the next token begins, `special` whether the text
    has control tokens written in it."""

    def __init__(self, top: int, tokenizer: Tokenizer, offset: int = 0, special: bool = False) -> None:
        self._top, self._tokenizer, self._offset = top, tokenizer, offset
        self._text = Detokenizer(tokenizer, special)

    def write(self, found: Sequence[TokenLogprob | None], tokens: Sequence[int]) -> TextLogprobs:
        """`found[i]` is of `tokens[i]`, None where there is none: of a prompt's first token."""
        written = TextLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for id, logprob in zip(tokens, found):
            text, _ = _spelled(id, self._tokenizer)
            written.tokens.append(text)
            said = self._said(id)
            # More than its own: a character before it that never ended, which only now stands there as U+FFFD.
            written.text_offset.append(self._offset + max(0, len(said) - len(text)))
            self._offset += len(said)
            if logprob is None:
                written.token_logprobs.append(None)
                written.top_logprobs.append(None)
                continue
            written.token_logprobs.append(max(logprob.logprob, _LEAST))
            top = [(_spelled(other, self._tokenizer)[0], value) for other, value in logprob.top[: self._top]]
            written.top_logprobs.append({name: max(value, _LEAST) for name, value in reversed(top)})
        return written

    def _said(self, id: int) -> str:
        """What the text grows by with this token: nothing while a character is unfinished."""
        try:
            return self._text.push(id)
        except ValueError:  # beyond the tokenizer's ids
            return ""


def _spelled(id: int, tokenizer: Tokenizer) -> tuple[str, bytes]:
    """A token that is a part of a character is written as its bytes, as OpenAI does. Ids beyond the tokenizer's
    have a probability but no text."""
    try:
        data = tokenizer.token_bytes(id)
    except ValueError:
        return f"<{id}>", b""
    try:
        return data.decode("utf-8"), data
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data
