"""Fields: typed reading of a JSON object, with errors that name the file and the field."""

from dataclasses import dataclass
from typing import Any, NoReturn

from gemcutter.checkpoint.files import CheckpointError

MAX_SIZE = 2**31 - 1  # of any width or count; more overflows the kernels' int32 indices
MAX_NUMBER = 1e300
MAX_LAYERS = 1024
MAX_EXPERTS = 4096  # of a layer; each has a name of its own in a quantised checkpoint
HEAD_DIMS = (32, 64, 128, 256, 512)  # the kernels' tiles
REQUIRED = object()


@dataclass(frozen=True)
class Fields:
    """One JSON object. `where` names it in messages: the file, then the path of the object inside it.

    A missing field takes its default, or is an error where the default is REQUIRED. Each reader raises
    CheckpointError for a value of another type or out of range.
    """

    data: dict[str, Any]
    where: str

    def fail(self, name: str, remedy: str) -> NoReturn:
        got = f"got {self.data[name]!r:.80}" if name in self.data else "it is missing"
        raise CheckpointError(f"{self.where}: {name} {remedy}; {got}")

    def get(self, name: str, default: Any = None) -> Any:
        if name not in self.data and default is REQUIRED:
            self.fail(name, "is required")
        return self.data.get(name, default)

    def size(self, name: str, default: Any = REQUIRED, low: int = 1, high: int = MAX_SIZE) -> int:
        value = self.get(name, default)
        if type(value) is not int or not low <= value <= high:
            self.fail(name, f"must be an integer from {low} to {high}")
        return value

    def number(self, name: str, default: Any = REQUIRED, high: float = MAX_NUMBER, zero: bool = False) -> float:
        value = self.get(name, default)
        # NaN fails every comparison, and infinity the one with high
        if type(value) not in (int, float) or not 0 <= value <= high or (value == 0 and not zero):
            bound = f" and at most {high:g}" if high < MAX_NUMBER else ""
            self.fail(name, f"must be a number {'not below' if zero else 'above'} 0{bound}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if type(value) is not bool:
            self.fail(name, "must be true or false")
        return value

    def object(self, name: str) -> "Fields":
        value = self.get(name, REQUIRED)
        if type(value) is not dict:
            self.fail(name, "must be an object")
        return Fields(value, f"{self.where}: {name}")

    def token_ids(self, name: str) -> list[int] | None:
        """One id or a list of ids, as a list; None where the field is missing or null."""
        value = self.get(name)
        if value is None:
            return None
        ids = [value] if type(value) is int else value
        if type(ids) is not list or any(type(id) is not int or not 0 <= id <= MAX_SIZE for id in ids):
            self.fail(name, "must be a token id or a list of token ids")
        return ids
