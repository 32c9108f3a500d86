"""Every limit of the server, with its default; `abyssal serve --limit NAME=VALUE` sets one."""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace


@dataclass(frozen=True)
class Limits:
    """All are checked before a request reaches the engine, but for those that say how long something may take.

    Raises ValueError naming a limit that is not above 0.
    """

    # of a request
    body_bytes: int = 2 << 20  # counted as it comes, before it is parsed
    header_bytes: int = 32768  # of the request line and all headers
    json_depth: int = 64  # objects and lists within each other
    prompt_tokens: int = 1 << 20  # and never more than the model's context
    output_tokens: int = 65536  # of one sample; and never more than the model's context
    prompts: int = 64  # in one request to /v1/completions
    n: int = 16  # samples of one prompt
    samples: int = 128  # prompts times n
    logprobs: int = 20  # likeliest tokens reported at each place
    echo_logprobs: int = 1 << 18  # with `echo`: tokens of all prompts, times n, times logprobs + 1
    stop_count: int = 16
    stop_chars: int = 256  # of each stop string
    logit_bias: int = 1024  # entries
    priority: int = 10  # how far from 0 it may be, either way; ten seconds of waiting are worth 1
    messages: int = 2048
    tools: int = 128
    grammar_bytes: int = 65536  # of a JSON schema, a regular expression or a grammar
    grammar_seconds: float = 2.0  # to compile one
    template_chars: int = 8 << 20  # that a chat template may write
    template_seconds: float = 2.0  # that it may take
    # of what runs at once
    connections: int = 2048  # open; a further one is closed at once
    requests: int = 512  # being answered, bodies read included; a further one is answered 429
    waiting: int = 256  # in the engine's queue; a further one is answered 429
    # of time
    head_seconds: float = 10.0  # for a request's line and headers to arrive
    body_seconds: float = 30.0  # for its body
    idle_seconds: float = 60.0  # that a connection may stay open between two requests
    request_seconds: float = 600.0  # from a request's arrival at the engine to its last token; `deadline` asks for less
    send_seconds: float = 30.0  # that a client may leave the socket full
    unsent_bytes: int = 1 << 20  # that may wait for a client to read them, a stream
    silent_seconds: float = 120.0  # that the engine may say nothing while it has work, until /health is red

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(f"limit {field.name}: expected more than 0, got {getattr(self, field.name)!r}")

    def changed(self, settings: Iterable[str]) -> "Limits":
        """With settings of the form NAME=VALUE. Raises ValueError naming one that is unknown or not a number."""
        kinds = {field.name: type(field.default) for field in fields(self)}
        changes: dict[str, int | float] = {}
        for setting in settings:
            name, _, value = setting.partition("=")
            if name not in kinds:
                raise ValueError(f"limit {name!r}: expected NAME=VALUE, where NAME is one of {', '.join(kinds)}")
            try:
                changes[name] = int(value) if kinds[name] is int else float(value)
            except ValueError:
                raise ValueError(f"limit {name}: expected {kinds[name].__name__}, got {value!r}") from None
        return replace(self, **changes)  # type: ignore[arg-type]
