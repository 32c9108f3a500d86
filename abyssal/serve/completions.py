"""POST /v1/completions."""

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import cast

from starlette.requests import Request
from starlette.responses import Response

from abyssal.engine.request import Output, Piece
from abyssal.serve.answers import Completion, InsideView, TextChoice, TextLogprobs, View
from abyssal.serve.errors import ApiError
from abyssal.serve.generate import Job, Tally, finish_reason, pieces, unless_gone, view
from abyssal.serve.limits import Limits
from abyssal.serve.logprobs import TextLogprobWriter
from abyssal.serve.protocol import CompletionRequest
from abyssal.serve.service import Service
from abyssal.serve.settings import check, grammar_of, max_tokens_of, sampling_of
from abyssal.serve.stream import EventStream, event

_MAX_TOKENS = 16  # OpenAI's, where a request names none


async def complete(service: Service, body: CompletionRequest, salt: str, request: Request) -> Response:
    """Raises ApiError."""
    service.check_model(body.model)
    prompts = _checked_prompts(body, service)
    encoded = await service.aside(lambda: [_encoded(prompt, service) for prompt in prompts])
    asked = max_tokens_of(body, encoded, service, "prompt")
    _check_echo(body, encoded, service.tokenizer.vocab_size, service.limits)
    grammar = grammar_of(body, service.limits)
    jobs = []
    for prompt in encoded:
        room = min(service.engine.info.max_context - len(prompt), service.limits.output_tokens)
        sampling = sampling_of(
            body,
            service,
            max_tokens=min(asked or _MAX_TOKENS, room),
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
            grammar=grammar,
        )
        deadline = body.deadline or service.limits.request_seconds
        jobs.append(Job(prompt, sampling, body.priority or 0, deadline, salt, bool(body.inspect)))
    answer = _Answer(service, body, f"cmpl-{secrets.token_hex(12)}", int(time.time()))
    if body.stream:
        return EventStream(answer.events(jobs), service)
    found: list[str] = []

    async def collect() -> None:
        found.append(await answer.whole(jobs))

    if not await unless_gone(request.receive, collect()):
        return Response(status_code=400)  # nobody reads this
    return Response(found[0], media_type="application/json")


def _checked_prompts(body: CompletionRequest, service: Service) -> Sequence[str | list[int]]:
    """One prompt or several, texts or tokens: as several. Raises ApiError 400."""
    check(body, service.limits)
    if body.logprobs is not None and body.logprobs > service.limits.logprobs:
        raise ApiError(400, f"logprobs: expected at most {service.limits.logprobs}", param="logprobs")
    if body.echo and body.stream:
        raise ApiError(400, "echo: expected stream to be false with it", param="echo")
    given = body.prompt
    prompts: Sequence[str | list[int]]
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        prompts = [given]
    else:
        prompts = cast(list[str] | list[list[int]], given)
    limits = service.limits
    if not 1 <= len(prompts) <= limits.prompts:
        raise ApiError(400, f"prompt: expected 1 to {limits.prompts} prompts, got {len(prompts)}", param="prompt")
    if len(prompts) * (body.n or 1) > limits.samples:
        raise ApiError(400, f"n: expected at most {limits.samples} samples, prompts times n", param="n")
    return prompts


def _check_echo(body: CompletionRequest, prompts: Sequence[Sequence[int]], known: int, limits: Limits) -> None:
    """Raises ApiError 400 where a prompt has no text, or its log-probabilities would be too many to hold and to
    send."""
    if not body.echo:
        return
    beyond = next((id for ids in prompts for id in ids if id >= known), None)
    if beyond is not None:
        raise ApiError(400, f"prompt: token {beyond} has no text, which echo would say", param="prompt")
    if body.logprobs is None:
        return
    count, each = (body.n or 1) * sum(map(len, prompts)), 1 + body.logprobs
    if count * each > limits.echo_logprobs:
        said = f"echo: {count} tokens of prompts, times n, with {each} log-probabilities each"
        raise ApiError(400, f"{said}; expected at most {limits.echo_logprobs} in all", param="echo")


def _encoded(prompt: str | list[int], service: Service) -> list[int]:
    if not isinstance(prompt, str):
        return prompt
    tokenizer = service.tokenizer
    ids = service.encoded(prompt, False, "prompt")
    return [tokenizer.bos_id, *ids] if tokenizer.adds_bos and tokenizer.bos_id is not None else ids


@dataclass
class _Sample:
    """What has come of one sample so far."""

    text: str = ""
    spans: list[tuple[str, bool]] = field(default_factory=list)
    inside: InsideView | None = None
    output: Output | None = None


class _Answer:
    """How a request's pieces become one Completion, or one a piece."""

    def __init__(self, service: Service, body: CompletionRequest, id: str, created: int) -> None:
        self._service, self._body, self._id, self._created = service, body, id, created
        self._n = body.n or 1

    async def events(self, jobs: list[Job]) -> AsyncGenerator[bytes, None]:
        writers: dict[int, TextLogprobWriter] = {}
        tally = Tally()
        with_usage = self._body.stream_options is not None and bool(self._body.stream_options.include_usage)
        async with aclosing(pieces(self._service, jobs)) as found:
            async for number, piece in found:
                if not (piece.text or piece.logprobs or piece.output is not None or piece.inside is not None):
                    continue
                index = number * self._n + piece.sample
                reason = None
                if piece.output is not None:
                    tally.add(number, piece.output)
                    reason = finish_reason(piece.output)
                writer = writers.setdefault(index, self._writer(0))
                logprobs = self._logprobs(writer, piece)
                chunk = self._completion(
                    [TextChoice(index=index, text=piece.text, logprobs=logprobs, finish_reason=reason)]
                )
                if with_usage:
                    chunk.usage = None
                if self._body.inspect:
                    chunk.abyssal = view(_spans(piece), piece)
                yield event(chunk)
        if with_usage:
            last = self._completion([])
            last.usage = tally.usage()
            yield event(last)

    async def whole(self, jobs: list[Job]) -> str:
        """The answer in JSON."""
        tally = Tally()
        samples = [_Sample() for _ in range(len(jobs) * self._n)]
        async with aclosing(pieces(self._service, jobs)) as found:
            async for number, piece in found:
                sample = samples[number * self._n + piece.sample]
                sample.text += piece.text
                if piece.inside is not None:
                    sample.inside = view((), piece).inside
                if self._body.inspect:
                    sample.spans += _spans(piece)
                if piece.output is not None:
                    tally.add(number, piece.output)
                    sample.output = piece.output

        def written() -> str:
            answer = self._completion([self._choice(index, sample) for index, sample in enumerate(samples)])
            answer.usage = tally.usage()
            return answer.model_dump_json(exclude_unset=True)

        return written() if self._body.logprobs is None else await self._service.aside(written)

    def _choice(self, index: int, sample: _Sample) -> TextChoice:
        output = sample.output
        assert output is not None
        tokens, logprobs, text = list(output.tokens), list(output.logprobs or ()), sample.text
        before = self._service.tokenizer.decode(output.prompt_tokens, special=True) if self._body.echo else ""
        written = None
        if self._body.logprobs is not None:
            written = self._writer(len(before)).write(logprobs, tokens)
            if self._body.echo:
                found = output.prompt_logprobs or [None] * len(output.prompt_tokens)
                own = self._writer(0, special=True).write(found, output.prompt_tokens)
                written = TextLogprobs(**{key: value + getattr(written, key) for key, value in own})
        choice = TextChoice(index=index, text=before + text, logprobs=written, finish_reason=finish_reason(output))
        if self._body.inspect:
            choice.abyssal = View(spans=sample.spans, inside=sample.inside)
        return choice

    def _writer(self, offset: int, special: bool = False) -> TextLogprobWriter:
        return TextLogprobWriter(self._body.logprobs or 0, self._service.tokenizer, offset, special)

    def _logprobs(self, writer: TextLogprobWriter, piece: Piece) -> TextLogprobs | None:
        if self._body.logprobs is None:
            return None
        return writer.write(piece.logprobs, [logprob.token for logprob in piece.logprobs])

    def _completion(self, choices: list[TextChoice]) -> Completion:
        name = self._service.name
        return Completion(id=self._id, object="text_completion", created=self._created, model=name, choices=choices)


def _spans(piece: Piece) -> list[tuple[str, bool]]:
    covered = sum(len(text) for text, _ in piece.spans)
    rest = [(piece.text[covered:], False)] if covered < len(piece.text) else []
    return [*piece.spans, *rest]
