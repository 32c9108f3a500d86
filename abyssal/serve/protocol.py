"""What may be asked: OpenAI's requests, and a few fields more. Types are strict; what is unknown is refused by name."""

from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, field_validator, model_validator
from pydantic_core import CoreSchema

from abyssal.engine.client import PRIORITIES
from abyssal.serve.errors import ApiError

Item = TypeVar("Item")


class _FirstError:
    """Has a list of a million wrong items be one error, not a gigabyte of them."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        assert schema["type"] == "list"
        return cast(CoreSchema, {**schema, "fail_fast": True})


Several = Annotated[list[Item], _FirstError()]

# They change nothing of an answer.
_HARMLESS = frozenset(
    {
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    }
)  # fmt: skip
# They would, and are not built; null and false ask for nothing.
_ABSENT = frozenset(
    {
        "audio", "best_of", "chat_template", "chat_template_kwargs", "function_call", "functions", "guided_grammar",
        "guided_json", "guided_regex", "length_penalty", "min_tokens", "modalities", "prediction", "reasoning_effort",
        "suffix", "truncate_prompt_tokens", "use_beam_search", "verbosity", "web_search_options",
    }
)  # fmt: skip


class Asked(BaseModel):
    """Of every request: no field that isn't known. Absent and null are the same."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _drop_harmless(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        refused = sorted(name for name in _ABSENT & data.keys() if data[name] not in (None, False))
        if refused:
            raise ApiError(400, f"{refused[0]}: not supported", param=refused[0], code="unsupported_parameter")
        kept = {key: value for key, value in data.items() if key not in _HARMLESS | _ABSENT}
        unknown = next((str(key) for key in kept if key not in cls.model_fields), None)
        if unknown is not None:
            raise ApiError(400, f"{unknown}: unrecognized request argument", param=unknown, code="unknown_parameter")
        return kept


# ---- what the text must match -------------------------------------------------------------------------------------


class Part(BaseModel):
    """Of what lies within a request: fields beside the known are let be, as clients send back what they were sent."""

    model_config = ConfigDict(strict=True, extra="ignore")


class PlainText(Part):
    type: Literal["text"]


class JsonObject(Part):
    type: Literal["json_object"]


class SchemaSpec(Part):
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class JsonSchema(Part):
    type: Literal["json_schema"]
    json_schema: SchemaSpec


class Regex(Part):
    """Of ours: a regular expression that the whole text matches."""

    type: Literal["regex"]
    regex: str


class Lark(Part):
    """Of ours: a grammar in Lark's language."""

    type: Literal["lark"]
    lark: str


ResponseFormat = Annotated[PlainText | JsonObject | JsonSchema | Regex | Lark, Field(discriminator="type")]


# ---- sampling -----------------------------------------------------------------------------------------------------


class StreamOptions(Part):
    include_usage: bool | None = None


class Generation(Asked):
    """What both kinds of completion may ask. Priority, deadline, inspect and what follows them are ours."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1)
    stop: str | Several[str] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    priority: int | None = Field(None, ge=-PRIORITIES, le=PRIORITIES)  # lower runs earlier
    deadline: float | None = Field(None, gt=0)  # seconds from now
    inspect: bool | None = None  # say what happens inside
    top_k: int | None = Field(None, ge=-1)  # 0 and -1: all
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    ignore_eos: bool | None = None
    speculate: bool | None = None

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _first_wrong_bias(cls, biases: Any) -> Any:
        for id, value in biases.items() if isinstance(biases, dict) else ():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"expected token ids and numbers, got {str(value)[:40]!r} for {id[:40]!r}")
        return biases


class CompletionRequest(Generation):
    """POST /v1/completions."""

    prompt: str | Several[str] | Several[int] | Several[Several[int]]
    logprobs: int | None = Field(None, ge=0)  # of this many likeliest tokens at each place
    echo: bool | None = None  # the prompt before the text, with its log-probabilities where these are asked for


# ---- chat ---------------------------------------------------------------------------------------------------------


class TextPart(Part):
    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _only_text(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("type"), str) and data["type"] != "text":
            raise ValueError(f"a part of type {data['type'][:40]!r}: only text is read; nothing is fetched")
        return data


class FunctionCall(Part):
    name: str
    arguments: str


class ToolCall(Part):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class SystemMessage(Part):
    role: Literal["system", "developer"]
    content: str | Several[TextPart]


class UserMessage(Part):
    role: Literal["user"]
    content: str | Several[TextPart]


class AssistantMessage(Part):
    role: Literal["assistant"]
    content: str | Several[TextPart] | None = None
    reasoning_content: str | None = None
    tool_calls: Several[ToolCall] | None = None


class ToolMessage(Part):
    role: Literal["tool"]
    content: str | Several[TextPart]
    tool_call_id: str | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class Function(Part):
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Part):
    type: Literal["function"]
    function: Function


class FunctionName(Part):
    name: str


class NamedChoice(Part):
    type: Literal["function"]
    function: FunctionName


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    messages: Several[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0)
    tools: Several[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    thinking: bool | None = None  # of ours: given to templates that ask whether the model shall think

    @field_validator("tools")
    @classmethod
    def _names_differ(cls, tools: list[Tool] | None) -> list[Tool] | None:
        names = [tool.function.name for tool in tools or []]
        if len(set(names)) < len(names):
            raise ValueError("two tools have the same name")
        return tools


# ---- tokens -------------------------------------------------------------------------------------------------------


class TokenizeRequest(Asked):
    """POST /v1/tokenize: the tokens of a text, or of the prompt that messages become."""

    model: str | None = None
    text: str | None = None
    messages: Several[Message] | None = Field(None, min_length=1)
    special: bool | None = None  # control tokens written in the text count as such

    @model_validator(mode="after")
    def _one_of(self) -> "TokenizeRequest":
        if (self.text is None) == (self.messages is None):
            raise ValueError("expected either text or messages")
        return self


class DetokenizeRequest(Asked):
    """POST /v1/detokenize."""

    model: str | None = None
    tokens: Several[int]
    special: bool | None = None  # control tokens are written, too
