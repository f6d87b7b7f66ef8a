"""Schoolbook arithmetic, written out digit by digit.

Every calculation becomes a `Step`: operands, result, the text that works it
out, and the *fact* it rests on. Small facts (7 + 8, 6 × 7) are known by heart;
everything larger is worked column by column from small ones, so a model that
has learned the method can do sums it has never seen.
"""

from dataclasses import dataclass

PLUS, MINUS, TIMES, OVER = "+", "-", "×", "÷"

# Sums too large to know by heart that short multiplication writes all the same, as it adds its carries.
CARRIES = frozenset(
    f"{carry}+{factor * digit}" for factor in range(2, 11) for digit in range(10) for carry in range(1, factor)
)


@dataclass(frozen=True)
class Step:
    """One calculation: `a op b = result`, with its written working."""

    op: str
    a: int
    b: int
    result: int
    text: str
    by_heart: bool

    @property
    def expression(self) -> str:
        return f"{self.a} {self.op} {self.b}"

    @property
    def fact(self) -> str:
        """The calculation's identity; `a + b` and `b + a` are the same fact."""
        a, b = self.a, self.b
        if self.op in (PLUS, TIMES) and a > b:
            a, b = b, a
        return f"{a}{self.op}{b}"


def add(a: int, b: int) -> Step:
    """Column addition from the ones upwards."""
    by_heart = a < 10 and b < 10
    return _step(PLUS, a, b, a + b, by_heart, lambda: _columns(a, b, PLUS))


def subtract(a: int, b: int) -> Step:
    """Column subtraction with borrowing; needs a >= b."""
    if a < b:
        raise ValueError(f"subtract works with a >= b, got {a} - {b}")
    by_heart = a < 20 and b < 10 and a - b < 10
    return _step(MINUS, a, b, a - b, by_heart, lambda: _columns(a, b, MINUS))


def multiply(a: int, b: int) -> Step:
    """Short multiplication; one of the factors must be at most 10."""
    if min(a, b) > 10:
        raise ValueError(f"multiply needs a factor of at most 10, got {a} × {b}")
    by_heart = a <= 10 and b <= 10
    return _step(TIMES, a, b, a * b, by_heart, lambda: _short_multiplication(a, b))


def divide(a: int, b: int) -> Step:
    """Exact division by a single digit."""
    if not 1 <= b <= 10 or a % b:
        raise ValueError(f"divide needs an exact quotient by 1 to 10, got {a} ÷ {b}")
    by_heart = a // b <= 10
    # Whether 40 ÷ 2 is in the table shows only in its result, so tens are always divided digit by digit.
    return _step(OVER, a, b, a // b, by_heart, lambda: _long_division(a, b), short=a < 10)


def _step(op, a, b, result, by_heart, columns, short=None) -> Step:
    expression = f"{a} {op} {b}"
    if by_heart if short is None else short:
        text = f"{expression} = {result}."
    else:
        text = f"{expression}: {columns()} So {expression} = {result}."
    return Step(op, a, b, result, text, by_heart)


def _columns(a: int, b: int, op: str) -> str:
    lines, carry, places = [], 0, len(str(a if a > b else b))
    for place in range(places):
        x, y = a // 10**place % 10, b // 10**place % 10
        carried = f" {op} {carry}" if carry else ""
        last = place == places - 1
        if op == PLUS:
            value = x + y + carry
            carry = 0 if last else value // 10
            line = f"{x} + {y}{carried} = {value}, write {value - 10 * carry}"
            lines.append(line + (f", carry {carry}." if carry else "."))
        else:
            borrow = x < y + carry
            x += 10 * borrow
            value = x - y - carry
            carry = int(borrow)
            line = f"{x} - {y}{carried} = {value}, write {value}"
            lines.append(line + (", borrow 1." if borrow else "."))
    return " ".join(lines)


def _short_multiplication(a: int, b: int) -> str:
    factor, number = min(a, b), max(a, b)
    lines, carry, digits = [], 0, str(number)[::-1]
    for place, digit in enumerate(digits):
        value = factor * int(digit)
        line = f"{factor} × {digit} = {value}, "
        if carry:
            line += f"{value} + {carry} = {value + carry}, "
            value += carry
        carry = value // 10 if place < len(digits) - 1 else 0
        line += f"write {value - 10 * carry}"
        lines.append(line + (f", carry {carry}." if carry else "."))
    return " ".join(lines)


def _long_division(a: int, b: int) -> str:
    lines, rest = [], 0
    for digit in str(a):
        part = 10 * rest + int(digit)
        quotient, rest = divmod(part, b)
        lines.append(f"{part} ÷ {b} = {quotient}, remainder {rest}.")
    return " ".join(lines)
