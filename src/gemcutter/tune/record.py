"""A tuning that is under way, on disk after each number of tokens, so that it goes on where it was broken off."""

import json
from collections.abc import Mapping
from pathlib import Path

from gemcutter.ops.moe.experts_table import Tile, write_whole
from gemcutter.tune.search import Found


def part_path(out: Path) -> Path:
    return out.with_name(out.name + ".part")


def read_part(path: Path, head: Mapping) -> dict[int, Found]:
    """What an earlier run measured; head: what of (device, dtype, shape, versions), which must be the same.

    Raises:
        ValueError: the file is another tuning's, or broken.
        OSError: it cannot be read.
    """
    if not path.exists():
        return {}
    try:
        kept = json.loads(path.read_text())
        of = kept["of"]
        found = {
            int(tokens): Found(*({Tile(*tile): seconds for *tile, seconds in one[name]} for name in Found._fields))
            for tokens, one in kept["found"].items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no tuning broken off ({type(error).__name__}: {error}); delete it") from None
    if of != head:
        raise ValueError(
            f"{path} is a tuning of {of}, this one of {dict(head)}; finish it, delete it, or name --out"
        )
    return found


def write_part(path: Path, head: Mapping, found: Mapping[int, Found]) -> None:
    kept = {
        tokens: {name: [[*tile, s] for tile, s in times.items()] for name, times in one._asdict().items()}
        for tokens, one in found.items()
    }
    write_whole(path, json.dumps({"of": dict(head), "found": kept}))
