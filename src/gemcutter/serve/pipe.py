"""Pipe: whole messages over a stream socket, each behind its length. The ends are the API and the engine process.

A thread that reads and one that writes in either process, as ZeroMQ has them, make each message wait for three of
them to wake: 0.25 to 0.3 ms on the way, after a pause, where a socket took 0.05.
"""

import select
import socket
import struct
import time

_LENGTH = struct.Struct("<Q")
_AT_ONCE = 1 << 20  # bytes to read


class Closed(Exception):
    """The other end is gone."""


def frame(message: bytes) -> bytes:
    """A message as it travels."""
    return _LENGTH.pack(len(message)) + message


class Splitter:
    """Takes what arrives, in any pieces, and gives messages."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def push(self, data: bytes) -> list[bytes]:
        """Messages that are whole now."""
        self._rest += data
        messages, begin = [], 0
        while begin + _LENGTH.size <= len(self._rest):
            (length,) = _LENGTH.unpack_from(self._rest, begin)
            end = begin + _LENGTH.size + length
            if end > len(self._rest):
                break
            messages.append(bytes(self._rest[begin + _LENGTH.size : end]))
            begin = end
        del self._rest[:begin]
        return messages


class Pipe:
    """The engine's end, which waits; the API's end is a transport of its event loop."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._splitter = Splitter()

    def send(self, message: bytes) -> None:
        """Until the other end has taken it, or the system will keep it for that.

        Raises Closed.
        """
        try:
            self._end.sendall(frame(message))
        except OSError as error:
            raise Closed from error

    def receive(self, seconds: float | None) -> list[bytes]:
        """Messages that are there; if there are none, those that come first within so many seconds, None for any.

        Raises Closed.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        while select.select([self._end], [], [], seconds)[0]:
            try:
                data = self._end.recv(_AT_ONCE)
            except OSError as error:
                raise Closed from error
            if not data:
                raise Closed
            if messages := self._splitter.push(data):
                return messages
            if deadline is not None:
                seconds = max(0.0, deadline - time.monotonic())
        return []
