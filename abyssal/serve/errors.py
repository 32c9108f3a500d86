"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`, whatever went wrong and wherever."""

import logging
import math
from http import HTTPStatus

from fastapi import FastAPI, Request
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

LOGGER = logging.getLogger("abyssal.serve")


class ErrorBody(BaseModel):
    """What went wrong; `param` is the field of the request that is to blame, dotted."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorBody


class ApiError(Exception):
    """An answer other than 200. `retry_after` is in seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    def body(self) -> ErrorResponse:
        return ErrorResponse(
            error=ErrorBody(
                message=_sendable(self.message),
                type=_type_of(self.status),
                param=None if self.param is None else _sendable(self.param),
                code=self.code,
            )
        )

    def response(self) -> Response:
        headers: dict[str, str] = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body().model_dump(), self.status, headers)


def dead() -> ApiError:
    return ApiError(503, "the engine has ended, and the server is about to", code="engine_dead")


def silent(seconds: float) -> ApiError:
    return ApiError(503, f"the engine has said nothing for {seconds:.0f} s", code="engine_silent")


def draining() -> ApiError:
    return ApiError(503, "the server is shutting down", code="shutting_down", retry_after=5)


def from_validation(error: ValidationError) -> ApiError:
    """The one of pydantic's errors that lies deepest: of a union's many, that of the branch that fitted longest."""
    worst = max(error.errors(include_url=False, include_input=False), key=lambda e: len(e["loc"]))
    param = ".".join(_places(worst["loc"])) or None
    said = worst["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{param}: {said}" if param else said, param=param)


def _places(loc: tuple[int | str, ...]) -> list[str]:
    """Without the names of a union's branches, which stand among them and say nothing to a client."""
    tags = {"text", "json_object", "json_schema", "regex", "lark", "system", "developer", "user", "assistant", "tool"}
    found: list[str] = []
    for at, place in enumerate(loc):
        branch = place in tags and at + 1 < len(loc) and at > 0 and loc[at - 1] != "json_schema"
        if isinstance(place, int) or not (branch or place in ("str", "int", "NamedChoice") or "[" in place):
            found.append(str(place))
    return found


def install(app: FastAPI) -> None:
    """Has every error of the app answered in this shape."""

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.response()

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        found = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        response = found.response()
        response.headers.update(error.headers or {})
        return response

    async def failed(request: Request, error: Exception) -> Response:
        LOGGER.error("%s %s", request.method, request.url.path, exc_info=error)
        return ApiError(500, "an error of the server's own; its log has more").response()

    app.add_exception_handler(ApiError, refused)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, failed)


def _type_of(status: int) -> str:
    named = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    return named.get(status, "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error")


def _sendable(text: str) -> str:
    """Half a surrogate pair, quoted back from a request, cannot be sent as UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")[:1000]
