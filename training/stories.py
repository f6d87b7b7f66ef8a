"""Word problems of one to three steps, assembled from small sentences.

Three kinds of story: a *stock* that one person gains and loses, *people*
compared with one another, and a *shop* with prices. Every story is built
forwards, so its question, its steps and its answer agree by construction.
"""

from random import Random

import words
from exercise import Exercise, worked
from working import add, divide, multiply, subtract

MOST = 999


class Story:
    """Sentences and steps gathered so far, and the number they lead to."""

    def __init__(self, rng: Random):
        self.rng = rng
        self.past = rng.random() < 0.4
        self.names = words.cast(rng)
        self.thing = rng.choice(words.THINGS)
        self.sentences: list[str] = []
        self.steps = []
        self.value = 0

    def verb(self, verbs: tuple) -> str:
        """A verb in the story's tense, from one (present, past) pair or several."""
        pair = verbs if isinstance(verbs[0], str) else self.rng.choice(verbs)
        return pair[self.past]

    def tell(self, *phrases: str, **values) -> None:
        """Add one of the phrases, with the first person's words filled in."""
        name, she, her = self.names[0]
        who = {"name": name, "she": she, "She": she.capitalize(), "her": her, "friend": self.names[1][0]}
        tense = {"has": self.verb(words.HAS), "are": self.verb(words.ARE)}
        self.sentences.append(self.rng.choice(phrases).format(**who, **tense, things=self.thing, **values))

    def join(self) -> None:
        """Now and then make one sentence of the last two, when the second is about the first person."""
        name, she, _ = self.names[0]
        opening = she.capitalize() + " "
        if len(self.sentences) > 1 and self.sentences[-1].startswith(opening) and self.rng.random() < 0.3:
            second, first = self.sentences.pop(), self.sentences.pop()
            same = first.startswith((name + " ", opening)) and " and " not in first
            link = " and " if same else f", and {she} "
            self.sentences.append(first.rstrip(".") + link + second.removeprefix(opening))

    def find(self, reason: str, step) -> None:
        self.steps.append((reason, step))
        self.value = step.result

    def exercise(self) -> Exercise:
        return worked(" ".join(self.sentences), self.steps)


def story(rng: Random, steps: int) -> Exercise:
    """A word problem that takes exactly this many steps (1 to 3)."""
    while True:
        told = rng.choice((stock, stock, people, shop))(Story(rng), steps)
        if len(told.steps) == steps and all(0 < step.result <= MOST for _, step in told.steps):
            return told.exercise()


def stock(tale: Story, steps: int) -> Story:
    """Somebody has things, gets some, loses some, and counts what is left."""
    tale.rng.choice((_have, _have, _boxed, _two_parts))(tale)
    while len(tale.steps) < steps:
        last = len(tale.steps) == steps - 1
        divisors = [k for k in range(2, 10) if tale.value % k == 0 and tale.value > k]
        if last and divisors and tale.rng.random() < 0.25:
            return _share(tale, tale.rng.choice(divisors))
        tale.rng.choice((_gain, _gain, _lose, _lose, _grow))(tale)
        tale.join()
        if not 1 < tale.value <= MOST:
            break
    tale.tell(
        "How many {things} does {name} have now?",
        "How many {things} does {name} have in the end?",
        "How many {things} are there now?",
        "How many {things} does {she} have left?",
        "How many {things} are left?",
        "How many does {name} have now?",
        "How many are left?",
    )
    return tale


def people(tale: Story, steps: int) -> Story:
    """Each person has more, fewer or several times as many as the one before."""
    names = [name for name, _, _ in tale.names]
    tale.value = first = tale.rng.randint(3, 60)
    tale.tell("{name} {have} {a} {things}.", have=tale.verb(words.HAVE), a=first)
    together = tale.rng.random() < 0.5
    held = [first]
    while len(tale.steps) < steps - together and len(held) < 3:
        _compare(tale, names[len(held)], names[len(held) - 1])
        held.append(tale.value)
    last = len(held) - 1
    if not together:
        tale.tell("How many {things} does {other} have?", "How many does {other} have?", other=names[last])
    elif last == 0:
        second = tale.rng.randint(3, 90)
        tale.tell("{other} {has} {b} {things}.", "{other} {has} {b}.", other=names[1], b=second)
        _together(tale, names[0], names[1], first, second)
    else:
        _together(tale, names[last - 1], names[last], held[-2], held[-1])
    return tale


def shop(tale: Story, steps: int) -> Story:
    """Buying several of one or two goods, perhaps with change from a note."""
    rng = tale.rng
    one, two = rng.sample(words.GOODS, 2)
    n, price = rng.randint(2, 9), rng.randint(2, 25)
    buys, pays = tale.verb(words.BUY), tale.verb(words.PAY)
    tale.tell(
        "{name} {buys} {n} {good}s for {p} dollars each.",
        "{name} {buys} {n} {good}s at {p} dollars each.",
        "A {good} {costs} {p} dollars. {name} {buys} {n} {good}s.",
        "A {good} {costs} {p} dollars and {name} {buys} {n} of them.",
        "At the market {name} {buys} {n} {good}s that cost {p} dollars each.",
        n=n, p=price, good=one, buys=buys, costs=tale.verb(words.COST),
    )  # fmt: skip
    tale.find(f"find the cost of the {one}s", multiply(n, price))
    cost = tale.value
    if steps == 3:
        m, second = rng.randint(2, 9), rng.randint(2, 15)
        tale.tell("{She} also {buys} {m} {good}s at {q} dollars each.", m=m, q=second, good=two, buys=buys)
        tale.find(f"find the cost of the {two}s", multiply(m, second))
        tale.find("add the two costs", add(cost, tale.value))
    elif steps == 2 and rng.random() < 0.3:
        extra = rng.randint(2, 60)
        tale.tell("{She} also {buys} a {good} for {q} dollars.", q=extra, good=two, buys=buys)
        tale.find(f"add the price of the {two}", add(cost, extra))
    elif steps == 2:
        note = rng.choice([note for note in (20, 50, 100, 200, 300, 500) if note > cost])
        tale.tell("{She} {pays} with {note} dollars.", "{She} {has} {note} dollars.", note=note, pays=pays)
        tale.find("take the cost from the money", subtract(note, cost))
        tale.tell("How many dollars are left?", "How many dollars does {she} have left?", "How much money is left?")
        return tale
    tale.tell(
        "How many dollars does {she} pay?",
        "How much does {she} pay in all?",
        "What is the total cost?",
        "How much does {name} spend?",
    )
    return tale


def _have(tale: Story) -> None:
    tale.value = tale.rng.randint(3, 99)
    tale.tell(
        "{name} {has} {a} {things}.",
        "{name} {have} {a} {things}.",
        "There {are} {a} {things} on {name}'s table.",
        "In a box {name} {has} {a} {things}.",
        a=tale.value, have=tale.verb(words.HAVE),
    )  # fmt: skip


def _boxed(tale: Story) -> None:
    n, each, (box, boxes) = tale.rng.randint(2, 9), tale.rng.randint(2, 24), tale.rng.choice(words.BOXES)
    tale.tell(
        "{name} {has} {n} {boxes} with {each} {things} in each.",
        "{name} {gets} {n} {boxes} of {each} {things}.",
        "There {are} {n} {boxes} in {name}'s room, and every one of them holds {each} {things}.",
        "{name} {gets} {n} {boxes}. Each {box} holds {each} {things}.",
        "A {box} holds {each} {things}. {name} {gets} {n} {boxes}.",
        "Every week for {n} weeks {name} {gets} {each} {things}.",
        n=n, each=each, box=box, boxes=boxes, gets=tale.verb(words.GAIN),
    )  # fmt: skip
    tale.find(f"count all the {tale.thing}", multiply(n, each))


def _two_parts(tale: Story) -> None:
    a, b = tale.rng.randint(3, 80), tale.rng.randint(3, 80)
    tale.tell(
        "{name} {gets} {a} {things} in the morning and {b} in the afternoon.",
        "{name} {has} {a} red {things} and {b} blue {things}.",
        "{name} {gets} {a} {things} on Monday and {b} on Tuesday.",
        "{name} {gets} {a} {things} and then {b} more.",
        "{name} {has} {a} old {things} and {b} new ones.",
        a=a, b=b, gets=tale.verb(words.GAIN),
    )  # fmt: skip
    tale.find("add the two parts", add(a, b))


def _gain(tale: Story) -> None:
    more = tale.rng.randint(2, 99)
    tale.tell(
        "{She} {gets} {b} more {things}.",
        "{She} {gets} {b} more.",
        "{friend} {gives} {her} {b} more.",
        "{friend} {gives} {her} {b} {things}.",
        "Then {she} {gets} {b} more {things}.",
        "The next day {she} {gets} another {b}.",
        "As a present {she} {gets} {b} {things}.",
        b=more, gets=tale.verb(words.GAIN), gives=tale.verb(words.GIVE[0]),
    )  # fmt: skip
    tale.find(f"add the {more} new {tale.thing}", add(tale.value, more))


def _lose(tale: Story) -> None:
    fewer = tale.rng.randint(2, max(2, min(99, tale.value - 1)))
    verbs = words.LOSE + words.EAT if tale.thing in words.FOOD else words.LOSE
    tale.tell(
        "{She} {loses} {b} {things}.",
        "{She} {loses} {b} of them.",
        "{She} {loses} {b}.",
        "{She} {gives} {b} {things} to {friend}.",
        "{She} {gives} {friend} {b} {things}.",
        "{She} {gives} {friend} {b} of them.",
        "{friend} {takes} {b} of the {things}.",
        "Then {she} {loses} {b} {things}.",
        b=fewer, loses=tale.verb(verbs), gives=tale.verb(words.GIVE), takes=tale.verb(words.TAKE),
    )  # fmt: skip
    tale.find(f"take away the {fewer} {tale.thing}", subtract(max(tale.value, fewer), fewer))


def _grow(tale: Story) -> None:
    k = tale.rng.choice(tuple(words.TIMES))
    tale.tell(
        "By the end of the week {she} {has} {times} as many.",
        "After a month {she} {has} {times} as many {things}.",
        "Soon there {are} {times} as many {things}.",
        "A year later {name} {has} {times} as many.",
        times=words.TIMES[k],
    )
    tale.find(f"there are {words.TIMES[k]} as many", multiply(tale.value, k))


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
    if relation == "fewer" and amount >= tale.value:
        relation = "more"
    if relation == "times":
        k = tale.rng.choice(tuple(words.TIMES))
        count, step = f"{words.TIMES[k]} as many", multiply(tale.value, k)
        link = "as"
    else:
        count, link = f"{amount} {relation}", "than"
        step = add(tale.value, amount) if relation == "more" else subtract(tale.value, amount)
    tale.tell(
        "{who} {has} {count} {things} {link} {than}.", "{who} {has} {count} {link} {than}.",
        who=who, than=than, count=count, link=link,
    )  # fmt: skip
    tale.find(f"find what {who} has", step)


def _together(tale: Story, one: str, other: str, a: int, b: int) -> None:
    if a != b and tale.rng.random() < 0.3:
        more, less = (one, other) if a > b else (other, one)
        tale.tell("How many more {things} does {more} have than {less}?", more=more, less=less)
        tale.find(f"compare {more} with {less}", subtract(max(a, b), min(a, b)))
        return
    tale.tell(
        "How many {things} do {one} and {other} have together?",
        "How many {things} do {one} and {other} have in all?",
        "How many do {one} and {other} have altogether?",
        one=one, other=other,
    )  # fmt: skip
    tale.find(f"add what {one} and {other} have", add(a, b))
