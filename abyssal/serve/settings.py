"""From a request to the engine's `Sampling`; every limit of a request is checked here, before any work."""

import json
from collections.abc import Sequence

from abyssal.engine.sampling import Grammar, Sampling
from abyssal.serve.errors import ApiError
from abyssal.serve.limits import Limits
from abyssal.serve.protocol import ChatRequest, Generation, JsonObject, JsonSchema, Lark, PlainText, Regex
from abyssal.serve.service import Service


def check(body: Generation, limits: Limits) -> None:
    """Counts and lengths of whatever kind of completion. Raises ApiError 400 naming the field."""
    _at_most("n", body.n, limits.n)
    _at_most("max_tokens", body.max_tokens, limits.output_tokens)
    stops = _stops(body)
    _at_most("stop", len(stops), limits.stop_count, "strings")
    _at_most("stop", max(map(len, stops), default=0), limits.stop_chars, "characters")
    _at_most("logit_bias", len(body.logit_bias or {}), limits.logit_bias, "entries")
    _at_most("deadline", body.deadline, limits.request_seconds, "seconds")
    if abs(body.priority or 0) > limits.priority:
        said = f"priority: expected an integer from -{limits.priority} to {limits.priority}, got {body.priority}"
        raise ApiError(400, said, param="priority")
    if isinstance(body, ChatRequest):
        _at_most("max_completion_tokens", body.max_completion_tokens, limits.output_tokens)
        _at_most("top_logprobs", body.top_logprobs, limits.logprobs)
        _at_most("messages", len(body.messages), limits.messages)
        _at_most("tools", len(body.tools or []), limits.tools)
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs: expected logprobs to be true with it", param="top_logprobs")


def grammar_of(body: Generation, limits: Limits) -> Grammar | None:
    """What `response_format` asks the text to match. Raises ApiError 400 for too large a grammar."""
    asked = body.response_format
    grammar: Grammar | None
    match asked:
        case None | PlainText():
            return None
        case JsonObject():
            grammar = Grammar("json")
        case JsonSchema():
            grammar = Grammar("json_schema", json.dumps(asked.json_schema.schema_))
        case Regex():
            grammar = Grammar("regex", asked.regex)
        case Lark():
            grammar = Grammar("lark", asked.lark)
    return checked(grammar, "response_format", limits)


def checked(grammar: Grammar, param: str, limits: Limits) -> Grammar:
    size = len(grammar.text.encode("utf-8", "replace"))
    _at_most(param, size, limits.grammar_bytes, "bytes")
    return grammar


def max_tokens_of(body: Generation, prompts: Sequence[Sequence[int]], service: Service, param: str) -> int | None:
    """How many tokens the body lets a sample have; None: as many as fit.

    Raises ApiError 400 if a prompt is empty, has an id that the model lacks, or leaves no room for them.
    """
    asked = body.max_tokens
    if isinstance(body, ChatRequest) and body.max_completion_tokens is not None:
        asked = body.max_completion_tokens
    info = service.engine.info
    for prompt in prompts:
        if not prompt:
            raise ApiError(400, f"{param}: expected at least one token", param=param)
        if len(prompt) > service.limits.prompt_tokens or len(prompt) >= info.max_context:
            raise service.too_long(param)
        if not all(0 <= id < info.vocab_size for id in prompt):
            raise ApiError(400, f"{param}: expected token ids from 0 to {info.vocab_size - 1}", param=param)
        if asked is not None and len(prompt) + asked > info.max_context:
            said = f"max_tokens: {len(prompt)} of the prompt and {asked} more; the context has {info.max_context}"
            raise ApiError(400, said, param="max_tokens", code="context_length_exceeded")
    return asked


def sampling_of(
    body: Generation,
    service: Service,
    *,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
    grammar: Grammar | None,
) -> Sampling:
    """Raises ApiError 400 for a value that the engine refuses."""
    default = Sampling()
    try:
        return Sampling(
            max_tokens=max_tokens,
            temperature=default.temperature if body.temperature is None else body.temperature,
            top_k=max(0, body.top_k or 0),
            top_p=default.top_p if body.top_p is None else body.top_p,
            min_p=body.min_p or 0.0,
            repetition_penalty=default.repetition_penalty
            if body.repetition_penalty is None
            else body.repetition_penalty,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            seed=body.seed,
            stop=tuple(_stops(body)),
            logprobs=logprobs,
            ignore_eos=bool(body.ignore_eos),
            speculate=body.speculate,
            n=body.n or 1,
            logit_bias=_biases(body, service),
            grammar=grammar,
            prompt_logprobs=prompt_logprobs,
        )
    except (ValueError, TypeError) as error:
        raise ApiError(400, str(error), param=str(error).partition(":")[0]) from None


def _stops(body: Generation) -> list[str]:
    return [body.stop] if isinstance(body.stop, str) else body.stop or []


def _biases(body: Generation, service: Service) -> tuple[tuple[int, float], ...]:
    found = []
    for key, value in (body.logit_bias or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < service.engine.info.vocab_size):
            raise ApiError(400, f"logit_bias: expected token ids, got {key[:20]!r}", param="logit_bias")
        found.append((int(key), value))
    return tuple(found)


def _at_most(param: str, value: float | None, most: float, unit: str = "") -> None:
    if value is not None and value > most:
        got = f"{value:g}" if value < 1e18 else "more than 1e18"  # an integer may be more than a float can hold
        raise ApiError(400, f"{param}: expected at most {most:g}{unit and ' ' + unit}, got {got}", param=param)
