"""Calls of tools in DeepSeek's words: told to the model where its template doesn't, forced, and read from its text.

<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME          V3, R1: "fenced"
```json
{...}
```<｜tool▁call▁end｜> ... <｜tool▁calls▁end｜>

<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{...}<｜tool▁call▁end｜> ...        from V3.1 on
"""

import json
from collections.abc import Sequence
from typing import Literal

from abyssal.data.tokenizer import Tokenizer
from abyssal.engine.sampling import Grammar
from abyssal.serve.protocol import Function
from abyssal.serve.reasoning import Cutter, Segment, held

CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, SEPARATOR, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
FENCE = "```json\n"


def described(functions: Sequence[Function], fenced: bool) -> str:
    """What to add to the system message where the template doesn't write tools: V3.1's own words for it."""
    call = f"function{SEPARATOR}NAME\n{FENCE}ARGUMENTS\n```" if fenced else f"NAME{SEPARATOR}ARGUMENTS"
    parts = ["## Tools\nYou have access to the following tools:\n"]
    for function in functions:
        parameters = json.dumps(function.parameters or {}, ensure_ascii=False)
        parts.append(f"### {function.name}\nDescription: {function.description or ''}\n\nParameters: {parameters}\n")
    parts.append(
        "IMPORTANT: ALWAYS adhere to this exact format for tool use:\n"
        f"{CALLS_BEGIN}{CALL_BEGIN}{call}{CALL_END}{{additional_tool_calls}}{CALLS_END}\n\n"
        "Where NAME is one of the available tools and ARGUMENTS are valid JSON that follow its parameters' schema."
    )
    return "\n".join(parts)


def forced(functions: Sequence[Function], fenced: bool, tokenizer: Tokenizer) -> tuple[str, Grammar]:
    """What to end the prompt with, so that the answer goes on inside a call, and what the rest of that must match:
    one call of one of `functions`, with arguments by its schema."""
    prefix = CALLS_BEGIN + CALL_BEGIN + (f"function{SEPARATOR}" if fenced else "")
    between = json.dumps("\n" + FENCE) if fenced else _token(SEPARATOR, tokenizer)
    names = " | ".join(f"call_{i}" for i in range(len(functions)))
    rules = [f"start: {names}"]
    for i, function in enumerate(functions):
        schema = json.dumps(function.parameters or {"type": "object"})
        rules.append(f"call_{i}: {json.dumps(function.name)} {between} arguments_{i}\narguments_{i}: %json {schema}")
    return prefix, Grammar("lark", "\n".join(rules))


def _token(text: str, tokenizer: Tokenizer) -> str:
    """A control token as Lark's dialect names it; a text, where the vocabulary has no such token."""
    ids = tokenizer.encode(text, special=True)
    return f"<[{ids[0]}]>" if len(ids) == 1 else json.dumps(text, ensure_ascii=False)


class ToolParser(Cutter):
    """Cuts a text into "content", each call's "name" and its "arguments", and "drop".

    `inside`: the prompt ended with the prefix of `forced`. `parallel` False drops every call but the first.
    """

    def __init__(self, fenced: bool, inside: bool = False, parallel: bool = True) -> None:
        super().__init__()
        self._fenced, self._parallel = fenced, parallel
        start: Literal["name", "head"] = "name" if fenced else "head"
        self._state: Literal["text", "gap", "head", "name", "fence", "arguments", "done"] = start if inside else "text"
        self.calls = 0

    def flush(self) -> list[Segment]:
        """What was held back, when no more comes; a call that breaks off keeps what it has."""
        rest, self._held = self._held, ""
        if not rest:
            return []
        if self._state == "text":
            return [Segment("content", rest)]
        if self._state in ("fence", "arguments"):
            body, tail = self._unfenced(rest)
            return [s for s in (Segment("arguments", body), Segment("drop", tail)) if s.text]
        return [Segment("drop", rest)]

    def _step(self, out: list[Segment]) -> bool:
        text = self._held
        match self._state:
            case "text":
                at, mark = min((text.find(m) % (len(text) + 1), m) for m in (CALLS_BEGIN, CALL_BEGIN))
                if at == len(text):
                    self._take("content", at - max(held(text, CALLS_BEGIN), held(text, CALL_BEGIN)), out)
                    return False
                self._take("content", at, out)
                self._state = "head" if mark == CALL_BEGIN else "gap"
                return self._take("drop", len(mark), out)
            case "gap":
                return self._gap(text, out)
            case "head":
                at = text.find(SEPARATOR)
                if at < 0:
                    return False
                if self._fenced:
                    self._state = "name"
                    return self._take("drop", at + len(SEPARATOR), out)
                self._name(at, out)
                self._state = "arguments"
                return self._take("drop", len(SEPARATOR), out)
            case "name":
                at = text.find("\n")
                if at < 0:
                    return False
                self._name(at, out)
                self._state = "fence"
                return self._take("drop", 1, out)
            case "fence":
                if not text.startswith(FENCE) and FENCE.startswith(text):
                    return False
                self._state = "arguments"
                return self._take("drop", len(FENCE) if text.startswith(FENCE) else 0, out) or True
            case "arguments":
                return self._arguments(text, out)
            case "done":
                return self._take("drop", len(text), out)

    def _gap(self, text: str, out: list[Segment]) -> bool:
        at, end = text.find(CALL_BEGIN), text.find(CALLS_END)
        if end >= 0 and not 0 <= at < end:
            self._state = "done"
            return self._take("drop", end + len(CALLS_END), out)
        if at < 0:
            self._take("drop", len(text) - max(held(text, CALL_BEGIN), held(text, CALLS_END)), out)
            return False
        self._state = "head" if self._parallel or not self.calls else "done"
        return self._take("drop", at + len(CALL_BEGIN), out)

    def _arguments(self, text: str, out: list[Segment]) -> bool:
        at = text.find(CALL_END)
        if at < 0:
            certain, _ = self._unfenced(text[: len(text) - held(text, CALL_END)])
            self._take("arguments", len(certain), out)
            return False
        body, _ = self._unfenced(text[:at])
        self._take("arguments", len(body), out)
        self._state = "gap"
        return self._take("drop", at - len(body) + len(CALL_END), out)

    def _unfenced(self, text: str) -> tuple[str, str]:
        """The arguments, and what of white space and backquotes stands behind them."""
        body = text.rstrip()
        if self._fenced:
            body = body[: len(body) - min(3, len(body) - len(body.rstrip("`")))].rstrip()
        return body, text[len(body) :]

    def _name(self, size: int, out: list[Segment]) -> None:
        self.calls += 1
        out.append(Segment("name", self._held[:size]))
        self._held = self._held[size:]

    def _take(self, kind: Literal["content", "arguments", "drop"], size: int, out: list[Segment]) -> bool:
        if size > 0:
            out.append(Segment(kind, self._held[:size]))
            self._held = self._held[size:]
        return size > 0
