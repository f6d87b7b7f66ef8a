"""The problems carat is trained and tested on, split so that they never meet.

The split is a property of a problem, not of a seed. A calculation too large
to know by heart (`Step.by_heart`) is *held out* when its hash says so, and
training leaves out every problem that contains one, under any wording. The
held-out problems are those whose last question needs such a calculation, so
that it can only be got right by working it out. Problems that rest entirely on
facts known by heart are split on the hash of their wording instead.

    from problems import held_out, extract_answer
    for problem in held_out(500):
        reply = generate(problem.messages)
        right = extract_answer(reply) == problem.answer
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import smalltalk
from chats import turns
from exercise import Exercise, extract_answer
from stories import story
from sums import comparison, difference, plain_sum, product, quotient, remainder, total
from working import CARRIES

__all__ = ["KINDS", "Problem", "extract_answer", "held_out", "is_held_out", "problem", "training", "unseen"]

ONE_IN = 8
HELD_OUT_SEED = 4_000_000_007
EXHAUSTED = 200_000  # draws without a new problem

_BARE = {
    "plain": plain_sum,
    "sum": total,
    "difference": difference,
    "product": product,
    "quotient": quotient,
    "remainder": remainder,
    "comparison": comparison,
}
_STORIES = {"story1": 1, "story2": 2, "story3": 3}
KINDS = (*_BARE, *_STORIES, "chat")
_WEIGHTS = (1, 1, 1, 1, 1, 0.5, 1, 1.5, 2, 2.5, 2)


@dataclass(frozen=True)
class Problem:
    """A chat that ends in a user's question, with the reply it should get."""

    kind: str
    messages: list[dict[str, str]]
    solution: str
    answer: str
    exercises: tuple[Exercise, ...]

    @property
    def text(self) -> str:
        """Everything the user says, normalised: what identifies the problem."""
        said = (m["content"] for m in self.messages if m["role"] == "user")
        return " | ".join(" ".join(s.lower().split()) for s in said)


def problem(rng: Random, kind: str | None = None) -> Problem:
    """Draw a problem of the given kind (one of KINDS), from either side of the split."""
    if kind is None:
        kind = rng.choices(KINDS, _WEIGHTS)[0]
    if kind in _BARE:
        said = [_BARE[kind](rng)]
    elif kind in _STORIES:
        said = [story(rng, _STORIES[kind])]
    elif kind == "chat":
        said = turns(rng, rng.choice((2, 2, 3, 3, 4, 5, 6)))
    else:
        raise ValueError(f"unknown kind {kind!r}; choose one of {', '.join(KINDS)}")
    return _as_chat(rng, kind, said)


def is_held_out(problem: Problem) -> bool:
    """Whether training leaves the problem out."""
    facts = [fact for exercise in problem.exercises for fact in exercise.facts]
    return any(map(_chosen, facts or [problem.text]))


def unseen(problem: Problem) -> list[str]:
    """Calculations that the last question needs and that no training text writes."""
    return [fact for fact in problem.exercises[-1].facts if _chosen(fact) and fact not in CARRIES]


def held_out(n: int, kind: str | None = None, seed: int = HELD_OUT_SEED) -> list[Problem]:
    """The first n different held-out problems, of one kind or of all in proportion.

    Raises:
        ValueError: there are fewer; of plain sums, for one, there are 1274.
    """
    found: dict[str, Problem] = {}
    idle = 0
    for drawn in _stream(seed, kind):
        known_by_heart = not any(exercise.facts for exercise in drawn.exercises)
        idle += 1
        if (unseen(drawn) or (known_by_heart and is_held_out(drawn))) and drawn.text not in found:
            found[drawn.text] = drawn
            idle = 0
        if len(found) == n:
            return list(found.values())
        if idle == EXHAUSTED:
            raise ValueError(f"{kind} has only {len(found)} held-out problems, asked for {n}; ask for fewer")


def training(seed: int) -> Iterator[Problem]:
    """An endless stream of problems that are not held out."""
    return (drawn for drawn in _stream(seed, None) if not is_held_out(drawn))


def _stream(seed: int, kind: str | None) -> Iterator[Problem]:
    rng = Random(seed)
    while True:
        yield problem(rng, kind)


def _as_chat(rng: Random, kind: str, said: list[Exercise | tuple[str, str]]) -> Problem:
    messages = []
    if kind != "plain" and rng.random() < 0.1:
        messages.append({"role": "system", "content": rng.choice(smalltalk.SYSTEM)})
    for turn in said:
        remark, reply = turn if isinstance(turn, tuple) else (turn.question, turn.solution)
        messages += [{"role": "user", "content": remark}, {"role": "assistant", "content": reply}]
    exercises = tuple(turn for turn in said if isinstance(turn, Exercise))
    last = exercises[-1]
    return Problem(kind, messages[:-1], last.solution, str(last.answer), exercises)


def _chosen(key: str) -> bool:
    return hashlib.blake2b(key.encode(), digest_size=8).digest()[0] % ONE_IN == 0
