"""POST /v1/chat/completions."""

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.responses import Response

from abyssal.engine.request import Output, TokenLogprob
from abyssal.serve.answers import (
    Call,
    CalledFunction,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    InsideView,
    View,
)
from abyssal.serve.chat import ChatFormat, ChatPrompt, parser, render, splitter
from abyssal.serve.errors import ApiError
from abyssal.serve.generate import Job, Tally, finish_reason, pieces, unless_gone, view
from abyssal.serve.logprobs import chat_logprobs
from abyssal.serve.protocol import ChatRequest
from abyssal.serve.reader import Delta, Reader
from abyssal.serve.service import Service
from abyssal.serve.settings import check, max_tokens_of, sampling_of
from abyssal.serve.stream import EventStream, event


async def chat(service: Service, format: ChatFormat, body: ChatRequest, salt: str, request: Request) -> Response:
    """Raises ApiError."""
    service.check_model(body.model)
    check(body, service.limits)
    if (body.n or 1) > service.limits.samples:
        raise ApiError(400, f"n: expected at most {service.limits.samples} samples", param="n")
    prompt, ids = await service.aside(lambda: _prepared(service, format, body))
    asked = max_tokens_of(body, [ids], service, "messages")
    room = min(service.engine.info.max_context - len(ids), service.limits.output_tokens)
    sampling = sampling_of(
        body,
        service,
        max_tokens=min(asked or room, room),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=None,
        grammar=prompt.grammar,
    )
    deadline = body.deadline or service.limits.request_seconds
    job = Job(ids, sampling, body.priority or 0, deadline, salt, bool(body.inspect))
    answer = _Answer(service, format, body, prompt)
    if body.stream:
        return EventStream(answer.events(job), service)
    found: list[str] = []

    async def collect() -> None:
        found.append(await answer.whole(job))

    if not await unless_gone(request.receive, collect()):
        return Response(status_code=400)  # nobody reads this
    return Response(found[0], media_type="application/json")


def _prepared(service: Service, format: ChatFormat, body: ChatRequest) -> tuple[ChatPrompt, list[int]]:
    prompt = render(body, service.tokenizer, format, service.limits)
    return prompt, service.encoded(prompt.text, True, "messages")


@dataclass
class _Sample:
    """What has come of one sample so far."""

    reader: Reader
    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    spans: list[tuple[str, bool]] = field(default_factory=list)
    inside: InsideView | None = None
    output: Output | None = None

    def add(self, delta: Delta) -> None:
        self.content += delta.content
        self.reasoning += delta.reasoning
        self.spans += delta.spans
        for call in delta.calls:
            if call.id is not None:
                function = CalledFunction(name=call.function.name or "", arguments="")
                self.calls.append(Call(id=call.id, type="function", function=function))
            self.calls[call.index].function.arguments += call.function.arguments


class _Answer:
    """How a request's pieces become one ChatCompletion, or a chunk each."""

    def __init__(self, service: Service, format: ChatFormat, body: ChatRequest, prompt: ChatPrompt) -> None:
        self._service, self._body = service, body
        self._id, self._created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        self._readers = [Reader(splitter(prompt, format), parser(prompt, body, format)) for _ in range(body.n or 1)]

    async def events(self, job: Job) -> AsyncGenerator[bytes, None]:
        tally = Tally()
        begun: set[int] = set()
        with_usage = self._body.stream_options is not None and bool(self._body.stream_options.include_usage)
        async with aclosing(pieces(self._service, [job])) as found:
            async for _, piece in found:
                reader = self._readers[piece.sample]
                delta = reader.push(piece)
                chunk = self._chunk(piece.sample, _said(delta, first=piece.sample not in begun), piece.logprobs)
                begun.add(piece.sample)
                if piece.output is not None:
                    tally.add(0, piece.output)
                    chunk.choices[0].finish_reason = finish_reason(piece.output, reader.calls)
                if self._body.inspect:
                    chunk.abyssal = view(delta.spans, piece)
                if with_usage:
                    chunk.usage = None
                if delta or chunk.choices[0].delta.role or piece.logprobs or piece.output or piece.inside:
                    yield event(chunk)
        if with_usage:
            last = self._chunk(0, ChatDelta(), ())
            last.choices, last.usage = [], tally.usage()
            yield event(last)

    async def whole(self, job: Job) -> str:
        """The answer in JSON."""
        tally = Tally()
        samples = [_Sample(reader) for reader in self._readers]
        async with aclosing(pieces(self._service, [job])) as found:
            async for _, piece in found:
                sample = samples[piece.sample]
                sample.add(sample.reader.push(piece))
                if piece.inside is not None:
                    sample.inside = view((), piece).inside
                if piece.output is not None:
                    tally.add(0, piece.output)
                    sample.output = piece.output

        def written() -> str:
            answer = ChatCompletion(
                id=self._id,
                object="chat.completion",
                created=self._created,
                model=self._service.name,
                choices=[self._choice(index, sample) for index, sample in enumerate(samples)],
                usage=tally.usage(),
            )
            return answer.model_dump_json(exclude_unset=True)

        return await self._service.aside(written) if self._body.logprobs else written()

    def _choice(self, index: int, sample: _Sample) -> ChatChoice:
        output = sample.output
        assert output is not None
        message = ChatMessage(role="assistant", content=sample.content or (None if sample.calls else ""))
        if sample.reasoning:
            message.reasoning_content = sample.reasoning
        if sample.calls:
            message.tool_calls = sample.calls
        choice = ChatChoice(
            index=index,
            message=message,
            logprobs=self._logprobs(output.logprobs or ()),
            finish_reason=finish_reason(output, len(sample.calls)),
        )
        if self._body.inspect:
            choice.abyssal = View(spans=sample.spans, inside=sample.inside)
        return choice

    def _chunk(self, index: int, delta: ChatDelta, logprobs: tuple[TokenLogprob, ...]) -> ChatChunk:
        found = self._logprobs(logprobs) if logprobs else None
        choice = ChatChunkChoice(index=index, delta=delta, logprobs=found, finish_reason=None)
        return ChatChunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._service.name,
            choices=[choice],
        )

    def _logprobs(self, found: "tuple[TokenLogprob, ...] | list[TokenLogprob]") -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        return chat_logprobs(found, self._body.top_logprobs or 0, self._service.tokenizer)


def _said(delta: Delta, first: bool) -> ChatDelta:
    """Only what there is is set, and so sent."""
    said = ChatDelta()
    if first:
        said.role = "assistant"
    if delta.content or (first and not delta):
        said.content = delta.content
    if delta.reasoning:
        said.reasoning_content = delta.reasoning
    if delta.calls:
        said.tool_calls = delta.calls
    return said
