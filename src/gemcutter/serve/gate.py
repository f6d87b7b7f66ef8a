"""Gate: what every HTTP request passes before a route sees it: the key, and a bounded reading of its body."""

import asyncio
import hmac

from starlette.requests import ClientDisconnect, Request

from gemcutter.serve.errors import ApiError, bad_request

BODY_SECONDS = 60  # to send a body in; a client that dawdles holds memory
DISCARD_SECONDS = 5  # a refused body is read on, unstored: a client that still sends would miss the answer


class KeyGate:
    """ASGI middleware. With a key, every path but /health wants `Authorization: Bearer KEY`."""

    def __init__(self, app, api_key: str | None) -> None:
        self._app = app
        self._wanted = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http" and self._wanted is not None and scope["path"] != "/health":
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            if not hmac.compare_digest(given, self._wanted):
                error = ApiError(
                    401, "missing or wrong API key: send 'Authorization: Bearer KEY'", code="invalid_api_key"
                )
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


async def read_json(request: Request, limit: int) -> bytes:
    """The body of a JSON request, at most `limit` bytes.

    Raises ApiError: 400 for another content type, 408 for a body that takes too long, 413 for one too large,
    whether or not its length was announced.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise bad_request(f"send Content-Type: application/json, got {content_type[:100] or 'none'}")
    announced = request.headers.get("content-length", "")
    body, more = None, True
    if not (announced.isdigit() and int(announced) > limit):
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body, more = await _collect(request, limit)
        except TimeoutError as error:
            raise ApiError(408, f"the body did not arrive within {BODY_SECONDS} s") from error
    if body is not None:
        return body
    if more:
        await _discard(request, limit)
    raise ApiError(413, f"the body is larger than {limit} bytes", code="body_too_large")


async def _collect(request: Request, limit: int) -> tuple[bytes | None, bool]:
    """The body, or None as soon as it is too large; and whether more of it is to come."""
    body, more = bytearray(), True
    while more:
        piece, more = await _receive(request)
        if len(body) + len(piece) > limit:
            return None, more
        body += piece
    return bytes(body), False


async def _discard(request: Request, limit: int) -> None:
    """Read what a client still sends, up to 4 times the limit, and keep nothing."""
    if request.headers.get("expect", "").lower() == "100-continue":
        return  # it waits for leave to send
    left, more = 4 * limit, True
    try:
        async with asyncio.timeout(DISCARD_SECONDS):
            while more and left > 0:
                piece, more = await _receive(request)
                left -= len(piece)
    except TimeoutError:
        pass


async def _receive(request: Request) -> tuple[bytes, bool]:
    """The next piece of the body, and whether there are more. Raises ClientDisconnect."""
    message = await request.receive()
    if message["type"] == "http.disconnect":
        raise ClientDisconnect
    return message.get("body", b""), message.get("more_body", False)
