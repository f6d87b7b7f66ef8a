"""An engine without a model, for server tests: its tokens are a function of prompt, seed and place."""

import time
from types import SimpleNamespace

from gemcutter.config import EngineConfig
from gemcutter.schedule.request import Request, Stats, Update

CONTEXT, VOCAB, PAGE = 1024, 1024, 16
REFUSE, BREAK_SUBMIT, BREAK_STEP = 20, 21, 22  # prompt tokens that make trouble
STEP_SECONDS = 0.002


def token(request: Request, place: int) -> int:
    """The answer's token at `place`: an ordinary piece of carat's vocabulary."""
    return 500 + (sum(request.prompt_ids) * 31 + request.seed * 7 + place * 13) % 500


class FakeEngine:
    patience = 0.0

    def __init__(self, config: EngineConfig) -> None:
        self.context_length = config.context_length or CONTEXT
        self.spec = SimpleNamespace(vocab=VOCAB)
        self._room = config.max_running_requests or 64
        self._waiting: list[Request] = []
        self._running: dict[str, tuple[Request, list[int]]] = {}
        self._seen: set[tuple[int, ...]] = set()
        self._steps = 0

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def submit(self, request: Request) -> None:
        if REFUSE in request.prompt_ids:
            raise ValueError("the prompt needs more pages than there are")
        if BREAK_SUBMIT in request.prompt_ids:
            raise RuntimeError("submit broke")
        self._waiting.append(request)

    def abort(self, id: str) -> None:
        self._waiting = [request for request in self._waiting if request.id != id]
        self._running.pop(id, None)

    def step(self) -> list[Update]:
        time.sleep(STEP_SECONDS)
        self._steps += 1
        updates = []
        while self._waiting and len(self._running) < self._room:
            request = self._waiting.pop(0)
            if BREAK_STEP in request.prompt_ids:
                raise RuntimeError("step broke")
            self._running[request.id] = (request, [])
        for request, out in list(self._running.values()):
            place = len(out)
            out.append(token(request, place))
            room = self.context_length - len(request.prompt_ids)
            done = len(out) >= min(request.params.max_tokens or room, room)
            key = tuple(request.prompt_ids)
            updates.append(
                Update(
                    id=request.id,
                    token_ids=out[-1:],
                    logprobs=self._logprobs(request, place),
                    finish_reason="length" if done else None,
                    cached_tokens=(len(key) - 1) // PAGE * PAGE if key in self._seen else 0,
                )
            )
            if done:
                self._seen.add(key)
                del self._running[request.id]
        return updates

    def stats(self) -> Stats:
        pages = sum((len(r.prompt_ids) + len(out)) // PAGE + 1 for r, out in self._running.values())
        return Stats(
            waiting=len(self._waiting),
            running=len(self._running),
            pages_used={"full": pages, "sliding": 2 * len(self._running)},
            pages_cached={"full": 3, "sliding": 0},
            pages_total={"full": 1000, "sliding": 500},
            preemptions=0,
            steps=self._steps,
        )

    @staticmethod
    def _logprobs(request: Request, place: int) -> list[dict[int, float]] | None:
        count = request.params.logprobs
        if count is None:
            return None
        chosen = token(request, place)
        return [{chosen: -0.25} | {(chosen + i) % VOCAB: -0.5 - i for i in range(1, count)}]


def start(config: EngineConfig) -> FakeEngine:
    return FakeEngine(config)


def start_broken(config: EngineConfig) -> FakeEngine:
    raise ValueError("there is\nno memory for this model")


def start_buggy(config: EngineConfig) -> FakeEngine:
    raise RuntimeError("our bug")


def start_slowly(config: EngineConfig) -> FakeEngine:
    time.sleep(60)
    return FakeEngine(config)
