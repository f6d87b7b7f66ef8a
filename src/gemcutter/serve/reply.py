"""Reply: the HTTP response that carries an Answer, whole or as server-sent events."""

import asyncio
import traceback

import msgspec
from starlette.responses import Response

from gemcutter.serve.answer import Answer, Part
from gemcutter.serve.errors import ApiError, ClientGone
from gemcutter.serve.shapes import Shape

MOST = 256  # tokens of an answer that is written at once; of more, 50 µs each with 20 logprobs, a thread does it
_encode = msgspec.json.Encoder().encode
_DONE = b"data: [DONE]\n\n"


class Reply(Response):
    """The status line waits for the engine's first news, so that a refused request gets its own status."""

    def __init__(self, answer: Answer, shape: Shape, stream: bool, include_usage: bool) -> None:
        super().__init__()
        self._answer = answer
        self._shape = shape
        self._stream = stream
        self._include_usage = include_usage

    async def __call__(self, scope, receive, send) -> None:
        watch = asyncio.create_task(self._watch(receive))
        begun = False

        async def write(data: bytes, more: bool) -> None:
            nonlocal begun
            if not begun:
                begun = True
                kind = b"text/event-stream" if self._stream else b"application/json"
                headers = [(b"content-type", kind), (b"cache-control", b"no-store")]
                if not self._stream:
                    headers.append((b"content-length", str(len(data)).encode()))
                await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": data, "more_body": more})

        try:
            await (self._send_events(write) if self._stream else self._send_whole(write))
        except ClientGone:
            pass
        except Exception as trouble:
            error = trouble
            if not isinstance(error, ApiError):
                traceback.print_exc()
                error = ApiError(500, "internal error; the server's log has the details")
            if begun:
                await write(b"data: " + error.body() + b"\n\n" + _DONE, more=False)
            else:
                await error.response()(scope, receive, send)
        finally:
            watch.cancel()
            self._answer.close()

    async def _send_events(self, write) -> None:
        """One chunk per engine step and choice. Chunks that are late go out together, in one write."""
        async for parts in self._answer.parts():
            frames = []
            for part in parts:
                opening = self._shape.opening(part.choice)
                if opening is not None:
                    frames.append(self._frame(opening))
                frames.append(self._frame(self._shape.chunk(part)))
            await write(b"".join(frames), more=True)
        end = self._frame(self._shape.usage_chunk(self._answer.usage())) if self._include_usage else b""
        await write(end + _DONE, more=False)

    async def _send_whole(self, write) -> None:
        by_choice: dict[int, list[Part]] = {}
        async for parts in self._answer.parts():
            for part in parts:
                by_choice.setdefault(part.choice.index, []).append(part)
        usage = self._answer.usage()
        if usage["completion_tokens"] <= MOST:
            body = self._body(by_choice, usage)
        else:
            body = await asyncio.to_thread(self._body, by_choice, usage)
        await write(body, more=False)

    def _body(self, by_choice: dict[int, list[Part]], usage: dict) -> bytes:
        whole = self._shape.whole(by_choice, usage)
        # One by one: nothing else runs while msgspec encodes.
        whole["choices"] = [msgspec.Raw(_encode(choice)) for choice in whole["choices"]]
        return _encode(whole)

    async def _watch(self, receive) -> None:
        """The body has been read, so the next thing that the client can say is that it is gone."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self._answer.fail(ClientGone())

    @staticmethod
    def _frame(chunk: dict) -> bytes:
        return b"data: " + _encode(chunk) + b"\n\n"
