"""From a conversation to a prompt, by the model's own template, and how to read what the model answers."""

from dataclasses import dataclass
from typing import Any

from abyssal.data.tokenizer import Tokenizer
from abyssal.engine.sampling import Grammar
from abyssal.serve.errors import ApiError
from abyssal.serve.limits import Limits
from abyssal.serve.protocol import AssistantMessage, ChatRequest, Function, Message, NamedChoice, TextPart, ToolMessage
from abyssal.serve.reasoning import CLOSE, OPEN, ReasoningSplitter
from abyssal.serve.settings import checked, grammar_of
from abyssal.serve.tools import ToolParser, described, forced


@dataclass(frozen=True)
class ChatPrompt:
    """A rendered conversation. `opened`: the prompt ends inside the thinking; `inside`: in a tool call."""

    text: str
    grammar: Grammar | None
    opened: bool
    inside: bool


@dataclass(frozen=True)
class ChatFormat:
    """What a chat template can do, as far as its text tells."""

    available: bool
    writes_tools: bool  # it shows the model which tools there are
    fenced: bool  # it writes a call's arguments between ```json and ```
    thinks: bool

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "ChatFormat":
        template = tokenizer.chat_template or ""
        thinks = "think>" in template or len(tokenizer.encode(OPEN, special=True)) == 1
        return cls(tokenizer.chat_template is not None, "tools" in template, "```json" in template, thinks)


def render(body: ChatRequest, tokenizer: Tokenizer, format: ChatFormat, limits: Limits) -> ChatPrompt:
    """Raises ApiError 400: no template, one that refuses the messages, or tools that don't go together."""
    functions, must_call = _chosen(body)
    grammar = grammar_of(body, limits)
    if functions and grammar is not None:
        said = "response_format: expected none with tools; tool_choice none lets them be"
        raise ApiError(400, said, param="response_format")
    shown = [tool.function for tool in body.tools or []] if functions else []
    messages = [_plain(message) for message in body.messages]
    if shown and not format.writes_tools:
        messages = _told(messages, described(shown, format.fenced))
    text = template(messages, shown, body.thinking, tokenizer, limits)
    opened = format.thinks and text.rstrip("\n").endswith(OPEN)
    prefix = ""
    if must_call:
        prefix, grammar = forced(functions, format.fenced, tokenizer)
        checked(grammar, "tools", limits)
    if opened and grammar is not None:  # the grammar is the answer's: there is no thinking before it
        prefix, opened = f"\n{CLOSE}\n\n{prefix}", False
    return ChatPrompt(text + prefix, grammar, opened, must_call)


def template(
    messages: list[dict[str, Any]],
    functions: list[Function],
    thinking: bool | None,
    tokenizer: Tokenizer,
    limits: Limits,
) -> str:
    """Raises ApiError 400 with the template's words."""
    tools = [{"type": "function", "function": f.model_dump(exclude_none=True)} for f in functions]
    variables = {} if thinking is None else {"thinking": thinking, "enable_thinking": thinking}
    try:
        return tokenizer.chat(
            messages,
            tools=tools or None,
            variables=variables,
            max_chars=limits.template_chars,
            seconds=limits.template_seconds,
        )
    except ValueError as error:
        raise ApiError(400, f"messages: {error}", param="messages") from None


def splitter(prompt: ChatPrompt, format: ChatFormat) -> ReasoningSplitter | None:
    return ReasoningSplitter(prompt.opened) if format.thinks and prompt.grammar is None else None


def parser(prompt: ChatPrompt, body: ChatRequest, format: ChatFormat) -> ToolParser | None:
    if not body.tools or body.tool_choice == "none":
        return None
    return ToolParser(format.fenced, inside=prompt.inside, parallel=body.parallel_tool_calls is not False)


def plain(messages: list[Message]) -> list[dict[str, Any]]:
    return [_plain(message) for message in messages]


def _chosen(body: ChatRequest) -> tuple[list[Function], bool]:
    """Which tools may be called, and whether one must be."""
    functions = [tool.function for tool in body.tools or []]
    choice = body.tool_choice or "auto"
    if isinstance(choice, NamedChoice):
        named = [f for f in functions if f.name == choice.function.name]
        if not named:
            said = f"tool_choice: no tool has the name {choice.function.name!r}"
            raise ApiError(400, said, param="tool_choice")
        return named, True
    if choice == "required" and not functions:
        raise ApiError(400, "tool_choice: required, but there are no tools", param="tool_choice")
    return ([], False) if choice == "none" else (functions, choice == "required")


def _plain(message: Message) -> dict[str, Any]:
    """As templates expect it: content as one text, and no key that says nothing."""
    role = "system" if message.role == "developer" else message.role
    content = _joined(message.content)
    plain: dict[str, Any] = {"role": role, "content": content}
    if isinstance(message, AssistantMessage):
        if message.tool_calls:
            plain["content"] = content or None
            plain["tool_calls"] = [call.model_dump(exclude_none=True) for call in message.tool_calls]
        if message.reasoning_content is not None:
            plain["reasoning_content"] = message.reasoning_content
    if isinstance(message, ToolMessage) and message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    return plain


def _joined(content: str | list[TextPart] | None) -> str:
    if isinstance(content, list):
        return "".join(part.text for part in content)
    return content or ""


def _told(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    if messages[0]["role"] == "system":
        first = messages[0] | {"content": f"{messages[0]['content']}\n\n{text}"}
        return [first, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]
