"""What is answered: OpenAI's objects, with `reasoning_content`, and `abyssal` where a request asked to `inspect`."""

from typing import Any, Literal

from pydantic import BaseModel

FinishReason = Literal["stop", "length", "tool_calls", "deadline"]


class PromptDetails(BaseModel):
    cached_tokens: int  # found in the prefix cache


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class InsideView(BaseModel):
    """As `abyssal.engine.request.Inside`."""

    latent_bytes: int
    mha_bytes: int
    pages: int
    shared_pages: int
    cached_tokens: int
    tokens_per_second: float
    drafted: int
    accepted: int
    expert_load: list[list[int]]


class View(BaseModel):
    """The text again, cut by where it came from (True: an MTP module drafted it), and the engine's insides."""

    spans: list[tuple[str, bool]]
    inside: InsideView | None


# ---- completions --------------------------------------------------------------------------------------------------


class TextLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None
    abyssal: View | None = None


class Completion(BaseModel):
    """Whole, and as a chunk of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None
    abyssal: View | None = None


# ---- chat ---------------------------------------------------------------------------------------------------------


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatLogprob] | None
    refusal: None = None


class CalledFunction(BaseModel):
    name: str
    arguments: str


class Call(BaseModel):
    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[Call] | None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    abyssal: View | None = None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class FunctionDelta(BaseModel):
    name: str | None = None
    arguments: str


class CallDelta(BaseModel):
    """The first of a call has its id, type and name; all have a part of the arguments."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class ChatDelta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[CallDelta] | None = None


class ChatChunkChoice(BaseModel):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    abyssal: View | None = None


# ---- the rest -----------------------------------------------------------------------------------------------------


class ModelCard(BaseModel):
    """`abyssal`: what `EngineInfo` says, and whether the model has a chat template (`chat`)."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    abyssal: dict[str, Any]


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class Tokens(BaseModel):
    tokens: list[int]
    count: int
    max_context: int


class Text(BaseModel):
    text: str


class Health(BaseModel):
    status: Literal["ok"]
