"""Word problems of one to three steps, assembled from small sentences.

Three kinds of story: a *stock* that one person gains and loses, *people*
compared with one another, and a *shop* with prices. Every story is built
forwards, so its question, its steps and its answer agree by construction.
"""

from random import Random

from exercise import Exercise, worked
from working import add, divide, multiply, subtract

PEOPLE = (
    ("Mia", "she", "her"), ("Tom", "he", "him"), ("Ana", "she", "her"), ("Ben", "he", "him"),
    ("Lily", "she", "her"), ("Omar", "he", "him"), ("Zoe", "she", "her"), ("Leo", "he", "him"),
    ("Ruth", "she", "her"), ("Sam", "he", "him"), ("Nina", "she", "her"), ("Max", "he", "him"),
    ("Priya", "she", "her"), ("Ivan", "he", "him"), ("Emma", "she", "her"), ("Kofi", "he", "him"),
    ("Sara", "she", "her"), ("Jack", "he", "him"), ("Yuki", "she", "her"), ("Paul", "he", "him"),
)  # fmt: skip
THINGS = (
    "apples", "marbles", "stickers", "cards", "shells", "pencils", "cookies", "coins", "stamps", "buttons",
    "beads", "eggs", "books", "flowers", "oranges", "balloons", "pears", "stones", "cups", "toys",
)  # fmt: skip
GOODS = ("book", "pen", "ticket", "cake", "toy", "lamp", "hat", "shirt", "plant", "ball", "mug", "kite")
BOXES = ("boxes", "bags", "baskets", "jars", "packs", "crates")
TIMES = {2: "twice", 3: "three times", 4: "four times", 5: "five times"}
MOST = 999


class Story:
    """Sentences and steps gathered so far, and the number they lead to."""

    def __init__(self, rng: Random):
        self.rng = rng
        self.names = rng.sample(PEOPLE, 3)
        self.thing = rng.choice(THINGS)
        self.sentences: list[str] = []
        self.steps = []
        self.value = 0

    def tell(self, *phrases: str, **values) -> None:
        """Add one of the phrases, with the first person's words filled in."""
        name, she, her = self.names[0]
        words = {"name": name, "she": she, "She": she.capitalize(), "her": her, "friend": self.names[1][0]}
        self.sentences.append(self.rng.choice(phrases).format(**words, things=self.thing, **values))

    def find(self, reason: str, step) -> None:
        self.steps.append((reason, step))
        self.value = step.result

    def exercise(self) -> Exercise:
        return worked(" ".join(self.sentences), self.steps)


def story(rng: Random, steps: int) -> Exercise:
    """A word problem that takes exactly this many steps (1 to 3)."""
    while True:
        told = rng.choice((stock, stock, people, shop))(rng, steps)
        if len(told.steps) == steps and all(0 < step.result <= MOST for _, step in told.steps):
            return told.exercise()


def stock(rng: Random, steps: int) -> Story:
    """Somebody has things, gets some, loses some, and counts what is left."""
    tale = Story(rng)
    OPENINGS[0 if rng.random() < 0.5 else rng.randrange(1, len(OPENINGS))](tale)
    while len(tale.steps) < steps:
        last = len(tale.steps) == steps - 1
        divisors = [k for k in range(2, 10) if tale.value % k == 0 and tale.value > k]
        if last and divisors and rng.random() < 0.3:
            return _share(tale, rng.choice(divisors))
        rng.choice(EVENTS)(tale)
        if not 1 < tale.value <= MOST:
            break
    tale.tell(
        "How many {things} does {name} have now?",
        "How many {things} does {name} have in the end?",
        "How many {things} are there now?",
        "How many {things} are left with {name}?",
        "What is the number of {things} that {name} has now?",
    )
    return tale


def people(rng: Random, steps: int) -> Story:
    """Each person has more, fewer or several times as many as the one before."""
    tale = Story(rng)
    names = [name for name, _, _ in tale.names]
    tale.value = first = rng.randint(3, 60)
    tale.tell("{name} has {a} {things}.", "{name} owns {a} {things}.", "{name} counts {a} {things}.", a=first)
    together = rng.random() < 0.5
    held = [first]
    for who in range(1, 3 if steps - together >= 2 else 2):
        if len(tale.steps) == steps - together:
            break
        _compare(tale, names[who], names[who - 1])
        held.append(tale.value)
        if tale.value <= 0:
            return tale
    last = len(held) - 1
    if not together:
        tale.tell("How many {things} does {other} have?", "How many does {other} have?", other=names[last])
    elif last == 0:
        second = rng.randint(3, 90)
        tale.tell("{other} has {b} {things}.", other=names[1], b=second)
        _together(tale, names[0], names[1], first, second)
    else:
        _together(tale, names[last - 1], names[last], held[-2], held[-1])
    return tale


def shop(rng: Random, steps: int) -> Story:
    """Buying several of one or two goods, perhaps with change from a note."""
    tale = Story(rng)
    one, two = rng.sample(GOODS, 2)
    n, price = rng.randint(2, 9), rng.randint(2, 25)
    tale.tell(
        "{name} buys {n} {good}s that cost {p} dollars each.",
        "A {good} costs {p} dollars. {name} buys {n} {good}s.",
        "{name} wants {n} {good}s at {p} dollars each.",
        "At the market {name} picks {n} {good}s for {p} dollars each.",
        "One {good} is {p} dollars, and {name} needs {n} of them.",
        n=n, p=price, good=one,
    )  # fmt: skip
    tale.find(f"find the cost of the {one}s", multiply(n, price))
    cost = tale.value
    two_goods = steps == 3 or (steps == 2 and rng.random() < 0.3)
    if two_goods and steps == 3:
        m, second = rng.randint(2, 9), rng.randint(2, 15)
        tale.tell("{She} also buys {m} {good}s at {q} dollars each.", m=m, q=second, good=two)
        tale.find(f"find the cost of the {two}s", multiply(m, second))
        tale.find("add the two costs", add(cost, tale.value))
    elif two_goods:
        extra = rng.randint(2, 60)
        tale.tell("{She} also buys a {good} for {q} dollars.", q=extra, good=two)
        tale.find(f"add the price of the {two}", add(cost, extra))
    elif steps == 2:
        note = rng.choice([note for note in (20, 50, 100, 200, 300, 500) if note > cost])
        tale.tell("{She} pays with {note} dollars.", "{She} has {note} dollars.", note=note)
        tale.find("take the cost from the money", subtract(note, cost))
        tale.tell("How many dollars are left?", "How many dollars does {she} have left?")
        return tale
    tale.tell("How many dollars does {she} pay?", "How much does {she} pay in all?", "What is the total cost?")
    return tale


def _have(tale: Story) -> None:
    tale.value = tale.rng.randint(3, 99)
    tale.tell(
        "{name} has {a} {things}.",
        "{name} starts with {a} {things}.",
        "There are {a} {things} on {name}'s table.",
        "This morning {name} had {a} {things}.",
        "{name} keeps {a} {things} in a drawer.",
        "In a box {name} finds {a} {things}.",
        a=tale.value,
    )


def _boxed(tale: Story) -> None:
    n, each, box = tale.rng.randint(2, 9), tale.rng.randint(2, 24), tale.rng.choice(BOXES)
    tale.tell(
        "{name} has {n} {box} with {each} {things} in each.",
        "{name} fills {n} {box} with {each} {things} each.",
        "There are {n} {box} in {name}'s room, and every one of them holds {each} {things}.",
        "{name} carries {n} {box} home. Each holds {each} {things}.",
        "Every week for {n} weeks {name} saves {each} {things}.",
        n=n, each=each, box=box,
    )  # fmt: skip
    tale.find(f"count all the {tale.thing}", multiply(n, each))


def _two_parts(tale: Story) -> None:
    a, b = tale.rng.randint(3, 80), tale.rng.randint(3, 80)
    tale.tell(
        "{name} finds {a} {things} in the morning and {b} in the afternoon.",
        "{name} has {a} red {things} and {b} blue {things}.",
        "{name} got {a} {things} on Monday and {b} on Tuesday.",
        "{name} makes {a} {things} and then {b} more.",
        "{name} has {a} old {things} and {b} new ones.",
        a=a, b=b,
    )  # fmt: skip
    tale.find("add the two parts", add(a, b))


def _gain(tale: Story) -> None:
    more = tale.rng.randint(2, 99)
    tale.tell(
        "{She} buys {b} more {things}.",
        "{friend} gives {her} {b} more.",
        "Then {she} finds {b} more {things}.",
        "The next day {she} gets another {b}.",
        "Later {friend} brings {b} more {things}.",
        "As a present {she} gets {b} more.",
        "{She} wins {b} {things} in a game.",
        b=more,
    )
    tale.find(f"add the {more} new {tale.thing}", add(tale.value, more))


def _lose(tale: Story) -> None:
    fewer = tale.rng.randint(2, max(2, min(99, tale.value - 1)))
    tale.tell(
        "{She} gives {b} {things} to {friend}.",
        "Then {she} loses {b} of them.",
        "{She} sells {b} {things}.",
        "{friend} takes {b} of the {things}.",
        "{b} of the {things} are sold.",
        "After that, {she} uses up {b} {things}.",
        "{friend} borrows {b} of them.",
        b=fewer,
    )
    tale.find(f"take away the {fewer} {tale.thing}", subtract(max(tale.value, fewer), fewer))


def _grow(tale: Story) -> None:
    k = tale.rng.choice(tuple(TIMES))
    tale.tell(
        "By the end of the week {she} has {times} as many.",
        "After a month {she} has {times} as many {things}.",
        "Soon there are {times} as many {things}.",
        "A year later {name} has {times} as many.",
        times=TIMES[k],
    )
    tale.find(f"there are {TIMES[k]} as many", multiply(tale.value, k))


def _share(tale: Story, k: int) -> Story:
    tale.tell(
        "{She} shares all of them equally among {k} friends. How many {things} does each friend get?",
        "{She} puts them into {k} equal piles. How many {things} are in each pile?",
        "The {things} go into {k} bags, the same number in each. How many {things} are in one bag?",
        "{k} children share them fairly. How many {things} does each child get?",
        k=k,
    )
    tale.find(f"share them among {k}", divide(tale.value, k))
    return tale


def _compare(tale: Story, who: str, than: str) -> None:
    relation, amount = tale.rng.choice(("more", "fewer", "times")), tale.rng.randint(2, 40)
    if relation == "times":
        k = tale.rng.choice(tuple(TIMES))
        tale.tell("{who} has {times} as many {things} as {than}.", who=who, than=than, times=TIMES[k])
        tale.find(f"find what {who} has", multiply(tale.value, k))
    elif relation == "more" or amount >= tale.value:
        tale.tell("{who} has {b} more {things} than {than}.", "{who} has {b} more than {than}.", who=who, than=than, b=amount)
        tale.find(f"find what {who} has", add(tale.value, amount))
    else:
        tale.tell("{who} has {b} fewer {things} than {than}.", "{who} has {b} fewer than {than}.", who=who, than=than, b=amount)
        tale.find(f"find what {who} has", subtract(tale.value, amount))


def _together(tale: Story, one: str, other: str, a: int, b: int) -> None:
    if a != b and tale.rng.random() < 0.3:
        more, less = (one, other) if a > b else (other, one)
        tale.tell("How many more {things} does {more} have than {less}?", more=more, less=less)
        tale.find(f"compare {more} with {less}", subtract(max(a, b), min(a, b)))
        return
    tale.tell(
        "How many {things} do {one} and {other} have together?",
        "How many {things} do {one} and {other} have in all?",
        one=one, other=other,
    )  # fmt: skip
    tale.find(f"add what {one} and {other} have", add(a, b))


OPENINGS = (_have, _boxed, _two_parts)
EVENTS = (_gain, _gain, _lose, _lose, _grow)
