"""Messages over a socket: whole, in order, whatever pieces they come in."""

import random
import socket
import threading
import time

import pytest

from gemcutter.serve.pipe import Closed, Pipe, Splitter, frame


def test_any_pieces_give_the_messages():
    rng = random.Random(0)
    for _ in range(200):
        messages = [rng.randbytes(rng.choice([0, 1, 7, 8, 9, 300])) for _ in range(rng.randrange(6))]
        stream, splitter, got = b"".join(map(frame, messages)), Splitter(), []
        while stream:
            size = rng.choice([1, 2, 8, 50, 1000])
            got += splitter.push(stream[:size])
            stream = stream[size:]
        assert got == messages


@pytest.fixture
def ends():
    pair = socket.socketpair()
    yield pair
    for end in pair:
        end.close()


def test_receives_what_is_there_and_waits_as_long_as_told(ends):
    there, here = Pipe(ends[0]), Pipe(ends[1])
    assert here.receive(0) == []
    begin = time.monotonic()
    assert here.receive(0.05) == [] and 0.05 <= time.monotonic() - begin < 5
    there.send(b"a")
    there.send(b"")
    assert here.receive(0) == [b"a", b""]
    threading.Timer(0.05, there.send, [b"b"]).start()
    assert here.receive(None) == [b"b"]
    ends[0].sendall(frame(b"cut")[:9])
    begin = time.monotonic()
    assert here.receive(0.05) == [] and time.monotonic() - begin < 5
    ends[0].sendall(frame(b"cut")[9:])
    assert here.receive(30) == [b"cut"]


def test_a_message_that_trickles_in_prolongs_no_wait(ends):
    there, here = ends[0], Pipe(ends[1])
    pieces = iter(frame(bytes(200)))

    def trickle() -> None:
        for piece in pieces:
            there.sendall(bytes([piece]))
            time.sleep(0.01)

    thread = threading.Thread(target=trickle)
    thread.start()
    begin = time.monotonic()
    assert here.receive(0.1) == [] and time.monotonic() - begin < 1
    assert here.receive(30) == [bytes(200)]
    thread.join()


def test_large_messages_cross_in_both_directions_at_once(ends):
    sides = [Pipe(end) for end in ends]
    sent = [random.Random(i).randbytes(3_000_000) for i in range(2)]
    threads = [
        threading.Thread(target=side.send, args=[message]) for side, message in zip(sides, sent, strict=True)
    ]
    for thread in threads:
        thread.start()
    assert sides[0].receive(30) == [sent[1]] and sides[1].receive(30) == [sent[0]]
    for thread in threads:
        thread.join()


def test_the_end_of_the_other_side_is_told(ends):
    there, here = Pipe(ends[0]), Pipe(ends[1])
    there.send(b"last word")
    ends[0].close()
    assert here.receive(None) == [b"last word"]
    with pytest.raises(Closed):
        here.receive(None)
    with pytest.raises(Closed):
        here.send(b"x" * 10_000_000)
