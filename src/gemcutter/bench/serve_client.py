"""An HTTP client that only watches the clock while it measures, and reads what came afterwards.

A client that parses as it goes is late: httpx took 93 µs of CPU for each streamed chunk, so of a hundred streams
that get a token in the same step the last is stamped 9 ms after it came. Here every piece that a socket delivers is
stamped and put aside, 8 µs on the same machine with the sending included; h11 and the JSON decoder see it when the
last request is done. Each request has a connection of its own, as in SGLang's client, and the server closes it.
"""

import asyncio
import ssl
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import h11
import msgspec

SECONDS_ALLOWED = 3600  # for one request


@dataclass(frozen=True)
class Endpoint:
    """Where an OpenAI API is."""

    host: str
    port: int
    tls: bool
    path: str
    api_key: str | None

    @classmethod
    def of(cls, base_url: str, api_key: str | None) -> "Endpoint":
        """
        Raises:
            ValueError: it is no http or https URL of a host.
        """
        url = urlsplit(base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError(f"base URL must look like http://HOST:PORT, got {base_url!r}")
        path = url.path.rstrip("/").removesuffix("/v1")
        return cls(
            url.hostname, url.port or (443 if url.scheme == "https" else 80), url.scheme == "https", path, api_key
        )

    def request(self, method: str, route: str, body: dict | None = None) -> bytes:
        """The bytes of a request, made before the clock runs."""
        content = b"" if body is None else msgspec.json.encode(body)
        host = f"[{self.host}]" if ":" in self.host else self.host
        headers = [("Host", f"{host}:{self.port}"), ("Connection", "close"), ("Content-Length", str(len(content)))]
        if body is not None:
            headers.append(("Content-Type", "application/json"))
        if self.api_key is not None:
            headers.append(("Authorization", f"Bearer {self.api_key}"))
        wire = h11.Connection(h11.CLIENT)
        head = wire.send(h11.Request(method=method, target=self.path + route, headers=headers))
        return head + wire.send(h11.Data(data=content)) + wire.send(h11.EndOfMessage())


@dataclass
class Exchange:
    """What went over one connection, unread."""

    start: float = 0.0
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    error: str | None = None


@dataclass
class Answer:
    """One streamed completion. Times are of time.perf_counter."""

    start: float
    end: float = 0.0  # of the last event
    stamps: list[float] = field(default_factory=list)  # of the chunks that carry text, or token ids in its place
    output_len: int = 0
    error: str | None = None


async def exchange(endpoint: Endpoint, request: bytes) -> Exchange:
    """Send, and keep all that comes until the server closes."""
    loop = asyncio.get_running_loop()
    done, result = loop.create_future(), Exchange(time.perf_counter())
    transport = None
    try:
        async with asyncio.timeout(SECONDS_ALLOWED):
            transport, _ = await loop.create_connection(
                lambda: _Recorder(request, result.pieces, done),
                endpoint.host,
                endpoint.port,
                ssl=ssl.create_default_context() if endpoint.tls else None,
            )
            await done
    except TimeoutError:
        result.error = f"no end after {SECONDS_ALLOWED} s"
    except OSError as error:
        result.error = f"{type(error).__name__}: {error}"
    finally:
        if transport is not None:
            transport.abort()
    return result


class _Recorder(asyncio.Protocol):
    """Stamps what arrives."""

    def __init__(self, request: bytes, pieces: list[tuple[float, bytes]], done: asyncio.Future) -> None:
        self._request = request
        self._pieces = pieces
        self._done = done

    def connection_made(self, transport: asyncio.Transport) -> None:
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._pieces.append((time.perf_counter(), data))

    def connection_lost(self, error: Exception | None) -> None:
        if not self._done.done():
            self._done.set_exception(error) if error is not None else self._done.set_result(None)


def unwrap(result: Exchange) -> tuple[int, list[tuple[float, bytes]]]:
    """Status and stamped body of a response.

    Raises:
        ValueError: there is no whole response.
    """
    if result.error is not None:
        raise ValueError(result.error)
    if not result.pieces:
        raise ValueError("the server closed the connection without an answer")
    wire = h11.Connection(h11.CLIENT)
    wire.send(h11.Request(method="GET", target="/", headers=[("Host", "any")]))
    wire.send(h11.EndOfMessage())
    status, body = 0, []
    try:
        for stamp, piece in [*result.pieces, (0.0, b"")]:  # the empty piece is the end of the connection
            wire.receive_data(piece)
            while (event := wire.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
                if isinstance(event, h11.Response):
                    status = event.status_code
                elif isinstance(event, h11.Data):
                    body.append((stamp, bytes(event.data)))
                elif isinstance(event, h11.EndOfMessage):
                    return status, body
    except h11.RemoteProtocolError as error:
        raise ValueError(f"the response is broken or cut short: {error}") from error
    raise AssertionError("h11 ends a closed connection with an event or an error")


def read_completion(result: Exchange, asked: int) -> Answer:
    """The answer in a recorded stream; `asked` tokens are counted where the server reports no usage."""
    answer = Answer(result.start)
    try:
        status, body = unwrap(result)
        if status != 200:
            raise ValueError(f"HTTP {status}: {b''.join(data for _, data in body).decode(errors='replace')[:300]}")
        answer.output_len = asked
        for stamp, data in _events(body):
            answer.end = stamp
            if data != b"[DONE]":
                _add(answer, stamp, msgspec.json.decode(data))
        if not answer.stamps:
            raise ValueError("the stream carried no text")
    except ValueError as error:  # msgspec's DecodeError is one
        answer.error = str(error)
    return answer


def _events(body: list[tuple[float, bytes]]) -> list[tuple[float, bytes]]:
    """Data of server-sent events, each with the stamp of the piece that completed its line."""
    found, rest = [], b""
    for stamp, piece in body:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                found.append((stamp, line[5:].strip()))
    return found


def _add(answer: Answer, stamp: float, event: dict) -> None:
    if event.get("error"):
        raise ValueError(f"error in the stream: {event['error']}"[:300])
    answer.output_len = (event.get("usage") or {}).get("completion_tokens", answer.output_len)
    if any(choice.get("text") or choice.get("token_ids") for choice in event.get("choices") or ()):
        answer.stamps.append(stamp)
