"""Files of a checkpoint: where it lies, and which files hold its weights."""

import json
from pathlib import Path

from huggingface_hub import errors, snapshot_download

BUILT_IN = ("carat", "carat-edge")
MODELS = Path(__file__).parent.parent / "models"
INDEX = "model.safetensors.index.json"


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of a kind that we do not run. The message names the culprit."""


def locate(model_path: str, revision: str | None = None, weights: bool = True) -> Path:
    """Folder of a checkpoint: a built-in name first, then a local folder, then a hub id (downloaded if needed).

    From the hub come JSON, safetensors and chat templates only, never pickles; without `weights` no safetensors.

    Raises:
        CheckpointError: there is no such checkpoint, it cannot be fetched, or it has no config.json.
    """
    folder = MODELS / model_path if model_path in BUILT_IN else Path(model_path).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"revision {revision!r} goes with a hub id, but {folder} is a local folder; drop it"
            )
    elif folder.exists():
        raise CheckpointError(f"{folder} is a file; give the folder that holds config.json")
    elif model_path.startswith((".", "/", "~")) or model_path.count("/") != 1:
        raise CheckpointError(
            f"no checkpoint {model_path!r}: it is not a folder, not a hub id (owner/name) and not "
            f"one of {', '.join(BUILT_IN)}"
        )
    else:
        folder = _download(model_path, revision, weights)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no config.json; give the folder of a checkpoint in HF's layout")
    return folder


def _download(repo: str, revision: str | None, weights: bool) -> Path:
    at = f"{repo!r} at revision {revision!r}" if revision else repr(repo)
    try:
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=["*.json", "*.jinja", *["*.safetensors"] * weights],
                ignore_patterns=["*/*"],  # subfolders hold other formats of the same weights
            )
        )
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{at} is gated on the hub: accept its licence on the web page, then run 'hf auth login'"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"the hub has {repo!r}, but no revision {revision!r}; see its branches and tags"
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise CheckpointError(
            f"{at} is neither a local folder nor a checkpoint on the hub; "
            "check the spelling, or run 'hf auth login' if it is private"
        ) from error
    except Exception as error:  # a connection that breaks is no OSError; its class depends on the client's version
        raise CheckpointError(
            f"{at} is not in the local hub cache, and fetching it failed: {error}. "
            "Check the network and the disk, or give a local folder"
        ) from error


def shards(folder: Path) -> list[Path]:
    """Weight files of a checkpoint: those that its index names, or every *.safetensors file if it has none.

    Raises:
        CheckpointError: no weights, or a file that the index names is missing or lies outside the folder.
    """
    if not (folder / INDEX).is_file():
        found = sorted(folder.glob("*.safetensors"))
        if not found:
            pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
            raise CheckpointError(
                f"{folder} holds no .safetensors file"
                + (f"; {pickles[0]} is a pickle, which can run code and is never loaded" if pickles else "")
                + "; save the model with save_pretrained, or make random weights with load_format dummy"
            )
        return found
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{folder / INDEX}: weight_map must be an object that names files, got {weight_map!r:.80}"
        )
    names = set()
    for key, name in weight_map.items():
        # a plain name: "../x", "a/b" and "/x" would read files outside the folder
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{folder / INDEX}: {key} must lie in a .safetensors file of this folder; got {name!r:.80}"
            )
        names.add(name)
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the {len(names)} files that {INDEX} names: "
            f"{', '.join(missing[:20])}; fetch the checkpoint again"
        )
    return [folder / name for name in sorted(names)]


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises CheckpointError where it cannot be read or is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value
