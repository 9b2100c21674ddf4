"""What stands around the app: the key, the limit on bodies, and the counts."""

import hmac
import time
from collections.abc import Collection

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from icrouting.serving.messages import failure
from icrouting.serving.metrics import Metrics

# Whoever watches a server has no key.
OPEN_PATHS = ("/healthz",)


class BodyLimit:
    """Refuses bodies of more than so many bytes with status 413, whatever their header says."""

    def __init__(self, app: ASGIApp, max_body: int):
        self.app = app
        self.max_body = max_body
        self._sentence = f"a request may have {max_body:,} bytes: send fewer rows"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hands a request on, and counts the bytes of its body."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value) > self.max_body:
                await self._refuse(scope, receive, send)
                return
        n_read = 0

        async def counted() -> Message:
            nonlocal n_read
            message = await receive()
            n_read += len(message.get("body", b""))
            if n_read > self.max_body:
                # The one kind of exception that the app's own reading of a body lets through.
                raise HTTPException(413, self._sentence)
            return message

        await self.app(scope, counted, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = JSONResponse(failure(self._sentence, 413, "body_too_large"), 413)
        await response(scope, receive, send)


class Doorman:
    """Lets in who names the key, and counts every request once it is answered.

    Args:
        app: what is behind it.
        metrics: counts.
        api_key: what requests have to name as a bearer token; None asks for nothing.
        paths: those that are counted by their names.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, api_key: str | None, paths: Collection[str]):
        self.app = app
        self._metrics = metrics
        self._api_key = api_key
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hands a request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.monotonic()
        # Where the app notes which model was asked.
        state = scope.setdefault("state", {})
        status = 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if scope["path"] in OPEN_PATHS or self._knows(scope):
                await self.app(scope, receive, noted)
            else:
                body = failure("give the server's key as a bearer token", 401, "invalid_api_key")
                await JSONResponse(body, 401)(scope, receive, noted)
        finally:
            # Paths that are not there would each be a series of its own.
            path = scope["path"] if scope["path"] in self._paths else "other"
            seconds = time.monotonic() - started
            self._metrics.request(path, state.get("model", ""), status, seconds)

    def _knows(self, scope: Scope) -> bool:
        """Returns whether a request names the key, in a time that says nothing of how nearly."""
        if self._api_key is None:
            return True
        named = b""
        for name, value in scope["headers"]:
            if name == b"authorization":
                named = value.removeprefix(b"Bearer ")
        return hmac.compare_digest(named, self._api_key.encode())
