"""The vocabulary of the stories: people, things, and verbs in two tenses."""

from random import Random

SHE, HE = ("she", "her"), ("he", "him")
WOMEN = (
    "Mia", "Ana", "Lily", "Zoe", "Ruth", "Nina", "Priya", "Emma", "Sara", "Yuki", "Alice", "Maria", "Olga",
    "Fatima", "Grace", "Julia", "Chloe", "Amara", "Ella", "Rosa", "Anna", "Sofia", "Lena", "Kate", "Jane", "Mary",
)  # fmt: skip
MEN = (
    "Tom", "Ben", "Omar", "Leo", "Sam", "Max", "Ivan", "Kofi", "Jack", "Paul", "Bob", "David", "Luca", "Hiro",
    "Ali", "Peter", "Noah", "Carlos", "Finn", "Raj", "John", "Tim", "Adam", "Mark", "Hugo", "James",
)  # fmt: skip
SYLLABLES = ("da", "ri", "mo", "ka", "le", "no", "ta", "vi", "su", "be", "jo", "ha", "lin", "ron", "mar", "nel")

FOOD = ("apples", "cookies", "eggs", "oranges", "pears", "plums", "sweets", "carrots", "grapes", "muffins")
OBJECTS = (
    "marbles", "stickers", "cards", "shells", "pencils", "coins", "stamps", "buttons", "beads", "books", "flowers",
    "balloons", "stones", "cups", "toys", "pens", "balls", "keys", "candles", "photos", "ribbons", "plates",
    "crayons", "leaves", "boats", "blocks", "notebooks", "spoons", "bottles", "seeds",
)  # fmt: skip
THINGS = FOOD + OBJECTS
GOODS = (
    "book", "pen", "ticket", "cake", "toy", "lamp", "hat", "shirt", "plant", "ball", "mug", "kite", "game", "bag",
    "map", "pencil", "notebook", "chair", "scarf", "puzzle",
)  # fmt: skip
BOXES = (
    ("box", "boxes"), ("bag", "bags"), ("basket", "baskets"), ("jar", "jars"), ("pack", "packs"),
    ("crate", "crates"), ("tray", "trays"), ("drawer", "drawers"), ("shelf", "shelves"), ("bucket", "buckets"),
)  # fmt: skip
TIMES = {2: "twice", 3: "three times", 4: "four times", 5: "five times"}

# Each verb as (present, past).
GAIN = (
    ("buys", "bought"), ("finds", "found"), ("gets", "got"), ("wins", "won"), ("collects", "collected"),
    ("receives", "received"), ("picks up", "picked up"), ("makes", "made"), ("earns", "earned"), ("adds", "added"),
)  # fmt: skip
LOSE = (
    ("sells", "sold"), ("loses", "lost"), ("gives away", "gave away"), ("uses", "used"),
    ("throws away", "threw away"), ("drops", "dropped"), ("breaks", "broke"), ("donates", "donated"),
    ("hands out", "handed out"),
)  # fmt: skip
EAT = (("eats", "ate"), ("cooks", "cooked"), ("shares", "shared"))
GIVE = (("gives", "gave"), ("sells", "sold"), ("lends", "lent"), ("sends", "sent"), ("hands", "handed"))
TAKE = (("takes", "took"), ("borrows", "borrowed"), ("steals", "stole"))
HAVE = (
    ("has", "had"),
    ("owns", "owned"),
    ("keeps", "kept"),
    ("starts with", "started with"),
    ("counts", "counted"),
)
ARE, HAS = ("are", "were"), ("has", "had")
BUY = (("buys", "bought"), ("orders", "ordered"), ("chooses", "chose"), ("gets", "got"))
COST, PAY = ("costs", "cost"), ("pays", "paid")


def cast(rng: Random) -> list[tuple[str, str, str]]:
    """Three different people as (name, she or he, her or him); now and then with invented names."""
    people: dict[str, tuple[str, str, str]] = {}
    while len(people) < 3:
        pronouns = rng.choice((SHE, HE))
        name = rng.choice(WOMEN if pronouns is SHE else MEN)
        if rng.random() < 0.1:
            name = "".join(rng.choices(SYLLABLES, k=rng.randint(2, 3))).capitalize()
        people[name] = (name, *pronouns)
    return list(people.values())
