"""Bare questions: sums, differences, products, quotients, remainders and comparisons."""

from random import Random

from exercise import Exercise, calculation
from working import add, divide, multiply, subtract

ASK = {
    "+": (
        "What is {a} + {b}?",
        "{a} + {b} = ?",
        "{a} + {b}",
        "{a}+{b}",
        "Calculate {a} + {b}.",
        "Add {a} and {b}.",
        "What is the sum of {a} and {b}?",
        "How much is {a} plus {b}?",
        "Please work out {a} + {b}.",
        "Can you add {b} to {a}?",
        "What do {a} and {b} make?",
        "{a} plus {b}",
        "What's {a} + {b}?",
        "Find the sum of {a} and {b}.",
    ),
    "-": (
        "What is {a} - {b}?",
        "{a} - {b} = ?",
        "{a} - {b}",
        "{a}-{b}",
        "Calculate {a} - {b}.",
        "Subtract {b} from {a}.",
        "What is the difference between {a} and {b}?",
        "How much is {a} minus {b}?",
        "Please work out {a} - {b}.",
        "Take {b} away from {a}.",
        "{a} minus {b}",
        "What's {a} - {b}?",
        "What is left when you take {b} from {a}?",
        "How much more is {a} than {b}?",
    ),
    "×": (
        "What is {a} × {b}?",
        "{a} × {b} = ?",
        "{a} × {b}",
        "{a}*{b}",
        "What is {a} * {b}?",
        "Calculate {a} × {b}.",
        "Multiply {a} by {b}.",
        "What is the product of {a} and {b}?",
        "How much is {a} times {b}?",
        "Please work out {a} × {b}.",
        "{a} times {b}",
        "{a} x {b}",
        "What's {a} × {b}?",
        "What do you get when you multiply {a} by {b}?",
    ),
    "÷": (
        "What is {a} ÷ {b}?",
        "{a} ÷ {b} = ?",
        "{a} ÷ {b}",
        "{a}/{b}",
        "What is {a} / {b}?",
        "Calculate {a} ÷ {b}.",
        "Divide {a} by {b}.",
        "How much is {a} divided by {b}?",
        "How many times does {b} go into {a}?",
        "Please work out {a} ÷ {b}.",
        "{a} divided by {b}",
        "What's {a} ÷ {b}?",
        "What do you get when you divide {a} by {b}?",
    ),
}

REMAINDER = (
    "What is the remainder of {a} ÷ {b}?",
    "What remains when you divide {a} by {b}?",
    "{a} mod {b}",
    "Divide {a} by {b}. What is the remainder?",
)
LARGER = (
    "Which is larger, {a} or {b}?",
    "Which number is bigger: {a} or {b}?",
    "What is the larger of {a} and {b}?",
    "Which is more, {a} or {b}?",
    "Is {a} or {b} the bigger number?",
)
SMALLER = (
    "Which is smaller, {a} or {b}?",
    "Which number is less: {a} or {b}?",
    "What is the smaller of {a} and {b}?",
    "Which is less, {a} or {b}?",
    "Is {a} or {b} the smaller number?",
)
PLACES = ("ones", "tens", "hundreds")


def plain_sum(rng: Random) -> Exercise:
    """A sum of two numbers below 100, always asked as "What is 47 + 38?"."""
    return _ask(add(rng.randrange(100), rng.randrange(100)), ASK["+"][0])


def total(rng: Random) -> Exercise:
    """A sum of two numbers below 100, sometimes below 1000, in many words."""
    top = 1000 if rng.random() < 0.2 else 100
    return _ask(add(rng.randrange(top), rng.randrange(top)), rng.choice(ASK["+"]))


def difference(rng: Random) -> Exercise:
    top = 1000 if rng.random() < 0.2 else 100
    b, a = sorted((rng.randrange(top), rng.randrange(top)))
    return _ask(subtract(a, b), rng.choice(ASK["-"]))


def product(rng: Random) -> Exercise:
    a, b = rng.randint(0, 10), rng.randint(0, 10)
    if rng.random() < 0.5:
        b = rng.randint(11, 99)
    if rng.random() < 0.5:
        a, b = b, a
    return _ask(multiply(a, b), rng.choice(ASK["×"]))


def quotient(rng: Random) -> Exercise:
    b = rng.randint(1, 10)
    a = b * rng.randint(0, 10)
    if rng.random() < 0.5:
        b = rng.randint(2, 9)
        a = b * rng.randint(11, 99)
    return _ask(divide(a, b), rng.choice(ASK["÷"]))


def remainder(rng: Random) -> Exercise:
    """The remainder of a division whose quotient is one digit: the table behind long division."""
    b = rng.randint(2, 10)
    a = rng.randrange(10 * b)
    question = rng.choice(REMAINDER).format(a=a, b=b)
    return Exercise(question, f"{a} ÷ {b} = {a // b}, remainder {a % b}.", a % b)


def comparison(rng: Random) -> Exercise:
    """The larger or the smaller of two different numbers."""
    a, b = rng.sample(range(1000 if rng.random() < 0.3 else 100), 2)
    wants_larger = rng.random() < 0.5
    question = rng.choice(LARGER if wants_larger else SMALLER).format(a=a, b=b)
    answer = max(a, b) if wants_larger else min(a, b)
    word = "larger" if wants_larger else "smaller"
    reason = f"{_place_that_decides(min(a, b), max(a, b))} So {answer} is {word}."
    fact = f"{min(a, b)}<{max(a, b)}"
    return Exercise(question, reason, answer, extra_fact=fact)


def _ask(step, phrase: str) -> Exercise:
    return calculation(phrase.format(a=step.a, b=step.b), step)


def _place_that_decides(low: int, high: int) -> str:
    if len(str(low)) != len(str(high)):
        return f"{low} has {_digits(low)} and {high} has {_digits(high)}."
    for place in reversed(range(len(str(high)))):
        x, y = low // 10**place % 10, high // 10**place % 10
        if x != y:
            return f"Compare the {PLACES[place]}: {low} has {x}, {high} has {y}, and {x} is less than {y}."
    raise ValueError(f"the numbers must differ, got {low} twice")


def _digits(number: int) -> str:
    count = len(str(number))
    return "1 digit" if count == 1 else f"{count} digits"
