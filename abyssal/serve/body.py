"""A request's body: counted while it comes, parsed strictly, and nothing in it evaluated."""

import asyncio
import json
import math
import re
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from abyssal.serve.errors import ApiError, from_validation
from abyssal.serve.limits import Limits

_LARGE = 1 << 16  # bytes from which parsing leaves the event loop
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

Body = TypeVar("Body", bound=BaseModel)


async def read(request: Request, kind: type[Body], limits: Limits) -> Body:
    """The body as a `kind`. Raises ApiError: 400 (malformed), 408 (slow), 413 (large), 415 (not JSON by its type).

    The type is asked for since a page of another site may send a form here without asking, but not JSON.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "content-type: expected application/json")
    data = await _bytes(request, limits)
    if len(data) < _LARGE:
        return _parsed(data, kind, limits)
    return await asyncio.to_thread(_parsed, data, kind, limits)


async def _bytes(request: Request, limits: Limits) -> bytes:
    too_large = ApiError(413, f"body: expected at most {limits.body_bytes} bytes")
    length = request.headers.get("content-length", "0")
    if length.isascii() and length.isdigit() and (len(length) > 18 or int(length) > limits.body_bytes):
        raise too_large
    data = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                data += chunk
                if len(data) > limits.body_bytes:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"body: did not arrive within {limits.body_seconds:g} s") from None
    except ClientDisconnect:
        raise ApiError(400, "body: the client went away") from None  # nobody reads this
    return bytes(data)


def _parsed(data: bytes, kind: type[Body], limits: Limits) -> Body:
    value = parse_json(data, limits.json_depth)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise from_validation(error) from None


def parse_json(data: bytes, depth: int) -> Any:
    """JSON by its standard alone: no NaN, nothing infinite, no key twice, no half surrogate pair, not too deep.

    Raises ApiError 400.
    """
    try:
        value = json.loads(
            data.decode("utf-8"), parse_float=_finite, parse_constant=_no_constant, object_pairs_hook=_unique
        )
    except RecursionError:
        raise ApiError(400, f"body: nested deeper than {depth}") from None
    except ValueError as error:
        raise ApiError(400, f"body: expected JSON in UTF-8: {error}") from None
    _check_depth(value, depth)
    if _SURROGATE.search(data):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ApiError(400, "body: a string has half a surrogate pair") from None
    return value


def _check_depth(value: Any, depth: int) -> None:
    level = [value]
    for _ in range(depth + 1):
        level = [outer for outer in level if isinstance(outer, dict | list)]
        if not level:
            return
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)]
    raise ApiError(400, f"body: nested deeper than {depth}")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:100]!r} stands twice in one object")
    return found
