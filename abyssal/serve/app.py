"""The routes, and their description by OpenAPI."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.responses import Response

from abyssal import __version__
from abyssal.serve.answers import (
    ChatChunk,
    ChatCompletion,
    Completion,
    Health,
    ModelCard,
    ModelList,
    Text,
    Tokens,
)
from abyssal.serve.auth import Keys
from abyssal.serve.body import read
from abyssal.serve.chat import ChatFormat, plain, template
from abyssal.serve.chat_completions import chat
from abyssal.serve.completions import complete
from abyssal.serve.door import Door
from abyssal.serve.errors import ApiError, ErrorResponse, dead, draining, install, silent
from abyssal.serve.metrics import Metrics
from abyssal.serve.page import page
from abyssal.serve.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from abyssal.serve.service import Service

_ASKED = (CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest)
_GET = (401, 403, 431)
_POST = (400, 401, 403, 404, 408, 413, 415, 429, 431, 500, 503)


def create_app(service: Service, keys: Keys, host: str = "127.0.0.1") -> FastAPI:
    """`host` is what the server is bound to: the one name, beside addresses and localhost, that it answers to
    without keys."""
    app = FastAPI(title="abyssal", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    metrics, format, front = Metrics(service), ChatFormat.of(service.tokenizer), page()
    install(app)
    app.add_middleware(Door, service=service, keys=keys, host=host, metrics=metrics)
    card = ModelCard(
        id=service.name,
        object="model",
        created=service.created,
        owned_by="abyssal",
        abyssal={"chat": format.available} | asdict(service.engine.info),
    )
    limits = service.limits

    @app.post("/v1/completions", **_described(Completion, CompletionRequest, event=Completion))
    async def completions(request: Request) -> Response:
        body = await read(request, CompletionRequest, limits)
        return await complete(service, body, request.state.salt, request)

    @app.post("/v1/chat/completions", **_described(ChatCompletion, ChatRequest, event=ChatChunk))
    async def chat_completions(request: Request) -> Response:
        body = await read(request, ChatRequest, limits)
        return await chat(service, format, body, request.state.salt, request)

    @app.post("/v1/tokenize", **_described(Tokens, TokenizeRequest))
    async def tokenize(request: Request) -> Tokens:
        body = await read(request, TokenizeRequest, limits)
        service.check_model(body.model)
        ids = await service.aside(lambda: _tokens(body, service))
        return Tokens(tokens=ids, count=len(ids), max_context=service.engine.info.max_context)

    @app.post("/v1/detokenize", **_described(Text, DetokenizeRequest))
    async def detokenize(request: Request) -> Text:
        body = await read(request, DetokenizeRequest, limits)
        service.check_model(body.model)
        try:
            text = await service.aside(lambda: service.tokenizer.decode(body.tokens, special=bool(body.special)))
        except ValueError as error:
            raise ApiError(400, f"tokens: {error}", param="tokens") from None
        return Text(text=text)

    @app.get("/v1/models", **_described(ModelList))
    async def models() -> ModelList:
        return ModelList(object="list", data=[card])

    @app.get("/v1/models/{model:path}", **_described(ModelCard, errors=(404,)))
    async def model(model: str) -> ModelCard:
        service.check_model(model)
        return card

    @app.get("/v1/stats", **_described(None))
    async def stats() -> dict[str, Any]:
        return service.engine.stats()

    @app.get("/health", **_described(Health, errors=(503,)))
    async def health() -> Health:
        if service.engine.dead.is_set():
            raise dead()
        if service.draining:
            raise draining()
        if service.streams and service.engine.silent > limits.silent_seconds:
            raise silent(service.engine.silent)
        return Health(status="ok")

    @app.get("/metrics", response_class=Response, responses=_responses(_GET) | _as("text/plain", "Prometheus' text."))
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        if front is None:
            raise ApiError(404, "the page is not part of this installation")
        return front

    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _tokens(body: TokenizeRequest, service: Service) -> list[int]:
    if body.text is not None:
        return service.encoded(body.text, bool(body.special), "text")
    text = template(plain(body.messages or []), [], None, service.tokenizer, service.limits)
    return service.encoded(text, True, "messages")


# ---- the description ----------------------------------------------------------------------------------------------


def _described(
    answer: type[BaseModel] | None,
    asked: type[BaseModel] | None = None,
    event: type[BaseModel] | None = None,
    errors: Sequence[int] = (),
) -> dict[str, Any]:
    """What FastAPI is told of a route. Bodies are read by `body.read`, so that their schemas are named here."""
    told: dict[str, Any] = {"responses": _responses((*(_GET if asked is None else _POST), *errors))}
    if answer is not None:
        told["responses"][200] = {"model": answer}
    if event is not None:  # as OpenAPI 3.2 describes streams
        content = {"anyOf": [{"$ref": f"#/components/schemas/{name}"} for name in (event.__name__, "ErrorResponse")]}
        chunk = {"type": "string", "contentMediaType": "application/json", "contentSchema": content}
        data = {"anyOf": [{"const": "[DONE]"}, chunk]}
        item = {"type": "object", "properties": {"data": data}, "required": ["data"]}
        told["responses"][200]["content"] = {"text/event-stream": {"itemSchema": item}}
    if asked is not None:
        schema = {"$ref": f"#/components/schemas/{asked.__name__}"}
        told["openapi_extra"] = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
    return told


def _responses(statuses: Sequence[int]) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorResponse} for status in sorted(statuses)}


def _as(media_type: str, description: str) -> dict[int | str, dict[str, Any]]:
    return {200: {"description": description, "content": {media_type: {"schema": {"type": "string"}}}}}


def _openapi(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version=app.version, routes=app.routes)
        template = "#/components/schemas/{model}"
        _, asked = models_json_schema([(model, "validation") for model in _ASKED], ref_template=template)
        _, chunks = models_json_schema([(ChatChunk, "serialization")], ref_template=template)
        schemas = found.setdefault("components", {}).setdefault("schemas", {})
        for name, schema in chunks["$defs"].items():
            schemas.setdefault(name, schema)  # the parts that it shares with whole answers are there
        for name, schema in asked["$defs"].items():
            if schemas.setdefault(name, schema) != schema:
                raise AssertionError(f"{name}: two schemas of one name")
        app.openapi_schema = found
    return app.openapi_schema
