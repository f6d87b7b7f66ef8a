"""Chats of several turns, in which later questions build on earlier answers."""

from random import Random

from exercise import Exercise, calculation
from smalltalk import exchange
from stories import story
from sums import comparison, difference, product, quotient, remainder, total
from working import add, divide, multiply, subtract

BARE = (total, total, difference, product, quotient, remainder, comparison)
MOST = 999

MORE = ("Now add {n}.", "Add {n} to that.", "And {n} more?", "What if you add {n}?")
LESS = ("Now subtract {n}.", "Take away {n} from that.", "And {n} less?", "What if you take away {n}?")
DOUBLE = ("Now double it.", "Double that.", "And twice that?")
HALVE = ("Now halve it.", "What is half of that?", "And half of it?")


def question(rng: Random) -> Exercise:
    """Any exercise that stands on its own."""
    if rng.random() < 0.5:
        return rng.choice(BARE)(rng)
    return story(rng, rng.randint(1, 3))


def follow_up(rng: Random, value: int) -> Exercise:
    """A question about the previous answer."""
    n = rng.randint(2, 99)
    roll = rng.random()
    if roll < 0.15 and value * 2 <= MOST:
        return calculation(rng.choice(DOUBLE), multiply(value, 2))
    if roll < 0.3 and value % 2 == 0:
        return calculation(rng.choice(HALVE), divide(value, 2))
    if roll < 0.6 and value > 2:
        n = rng.randint(2, min(99, value))
        return calculation(rng.choice(LESS).format(n=n), subtract(value, n))
    return calculation(rng.choice(MORE).format(n=n), add(value, n))


def turns(rng: Random, count: int) -> list[Exercise | tuple[str, str]]:
    """This many turns, the last an exercise, small talk among the others."""
    said: list[Exercise | tuple[str, str]] = []
    value = None
    for turn in range(count):
        if turn < count - 1 and rng.random() < 0.12:
            said.append(exchange(rng))
            continue
        goes_on = value is not None and rng.random() < 0.5
        asked = follow_up(rng, value) if goes_on else question(rng)
        said.append(asked)
        value = asked.answer
    return said
