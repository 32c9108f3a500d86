"""What every request passes before anything of it is read but its headers: size, name, key, and a place among those
being answered."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from abyssal.serve.auth import Keys, may_be_called
from abyssal.serve.errors import ApiError
from abyssal.serve.metrics import Metrics
from abyssal.serve.service import Service


class Door:
    """ASGI middleware. Leaves the tenant's salt in `scope["state"]["salt"]`."""

    def __init__(self, app: ASGIApp, service: Service, keys: Keys, host: str, metrics: Metrics) -> None:
        self._app, self._service, self._keys, self._host, self._metrics = app, service, keys, host, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "none")
                self._metrics.answered(route, message["status"])
            await send(message)

        try:
            self._check(scope)
        except ApiError as error:
            await error.response()(scope, receive, counted)
            return
        if scope["method"] != "POST":
            await self._app(scope, receive, counted)
            return
        self._service.in_flight += 1
        try:
            await self._app(scope, receive, counted)
        finally:
            self._service.in_flight -= 1

    def _check(self, scope: Scope) -> None:
        limits = self._service.limits
        headers = Headers(scope=scope)
        size = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        size += len(scope.get("raw_path") or b"") + len(scope.get("query_string") or b"")
        if size > limits.header_bytes:
            raise ApiError(431, f"headers: expected at most {limits.header_bytes} bytes")
        if not len(self._keys) and not may_be_called(headers.get("host"), self._host):
            raise ApiError(403, "host: expected this machine's address or localhost, as no API key is set")
        path = scope["path"]
        if path.startswith("/v1/") or path == "/metrics":
            salt = self._keys.salt(headers.get("authorization"))
            if salt is None:
                raise ApiError(401, "authorization: expected Bearer and an API key", code="invalid_api_key")
            scope.setdefault("state", {})["salt"] = salt
        if scope["method"] == "POST":
            self._service.check_ready()
            if self._service.in_flight >= limits.requests:
                raise ApiError(429, f"{limits.requests} requests are being answered", code="busy", retry_after=1)
