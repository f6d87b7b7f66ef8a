"""locate and shards: every way not to find a checkpoint, and what is fetched from the hub."""

import json

import httpx
import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

from gemcutter.checkpoint import files
from gemcutter.checkpoint.files import BUILT_IN, CheckpointError, locate, shards


@pytest.fixture
def no_hub(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(files, "snapshot_download", refuse)


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_names_need_no_hub(name, no_hub):
    folder = locate(name)
    assert (folder / "config.json").is_file() and shards(folder)


def test_existing_folder(tmp_path, no_hub, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    assert locate(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path.parent)
    assert locate(tmp_path.name).resolve() == tmp_path.resolve()


def test_folder_without_config(tmp_path, no_hub):
    with pytest.raises(CheckpointError, match="no config.json"):
        locate(str(tmp_path))


def test_file_instead_of_folder(tmp_path, no_hub):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        locate(str(tmp_path / "model.safetensors"))


def test_revision_of_a_folder_is_not_ignored(tmp_path, no_hub):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="revision 'v2'"):
        locate(str(tmp_path), "v2")


@pytest.mark.parametrize("name", ["", "gemma", "/nowhere/gemma", "./gemma", "../a/b", "~/nowhere", "a/b/c"])
def test_what_cannot_be_a_hub_id_is_not_asked_for(name, no_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="config.json" if name == "" else "no checkpoint"):
        locate(name)


def test_hub_download_takes_no_pickles_and_no_subfolders(tmp_path, monkeypatch):
    seen = {}

    def download(repo, **kwargs):
        seen.update(kwargs, repo=repo)
        (tmp_path / "config.json").write_text("{}")
        return str(tmp_path)

    monkeypatch.setattr(files, "snapshot_download", download)
    assert locate("google/gemma-4-E2B-it", "main") == tmp_path
    assert (seen["repo"], seen["revision"]) == ("google/gemma-4-E2B-it", "main")
    wanted = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "chat_template.jinja",
    ]
    unwanted = ["pytorch_model.bin", "model.pt", "x.py", "README.md", "gguf/a.safetensors", "original/params.json"]
    kept = filter_repo_objects(
        wanted + unwanted, allow_patterns=seen["allow_patterns"], ignore_patterns=seen["ignore_patterns"]
    )
    assert list(kept) == wanted
    locate("google/gemma-4-E2B-it", weights=False)
    kept = filter_repo_objects(
        wanted + unwanted, allow_patterns=seen["allow_patterns"], ignore_patterns=seen["ignore_patterns"]
    )
    assert list(kept) == [name for name in wanted if not name.endswith(".safetensors")]


RESPONSE = httpx.Response(404, request=httpx.Request("GET", "https://hub"))


@pytest.mark.parametrize(
    "error, named",
    [
        (errors.GatedRepoError("no", response=RESPONSE), "gated"),
        (errors.RepositoryNotFoundError("no", response=RESPONSE), "check the spelling"),
        (errors.RevisionNotFoundError("no", response=RESPONSE), "no revision 'v9'"),
        (errors.HFValidationError("no"), "neither a local folder nor"),
        (errors.LocalEntryNotFoundError("offline"), "not in the local hub cache"),
        (errors.OfflineModeIsEnabled("offline"), "not in the local hub cache"),
        (errors.HfHubHTTPError("500", response=RESPONSE), "fetching it failed: 500"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (httpx.RemoteProtocolError("peer closed connection"), "failed: peer closed connection"),  # no OSError
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_hub_errors_say_what_to_do(error, named, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(files, "snapshot_download", fail)
    with pytest.raises(CheckpointError) as caught:
        locate("google/gemma-4-E2B-it", "v9")
    assert named in str(caught.value) and "gemma-4-E2B-it" in str(caught.value)


def test_only_pickles(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match="pytorch_model.bin is a pickle.*save_pretrained"):
        shards(tmp_path)


def test_no_weights_at_all(tmp_path):
    with pytest.raises(CheckpointError, match="no .safetensors file; save"):
        shards(tmp_path)


def indexed(folder, weight_map, present=()):
    (folder / files.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    for name in present:
        (folder / name).touch()
    return folder


def test_index_decides_which_files_count(tmp_path):
    names = ["b.safetensors", "a.safetensors", "stray.safetensors"]
    folder = indexed(tmp_path, {"x": names[0], "y": names[1], "z": names[0]}, names)
    assert shards(folder) == [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    (tmp_path / files.INDEX).unlink()
    assert shards(folder) == [tmp_path / name for name in sorted(names)]


def test_missing_shards_are_named(tmp_path):
    weight_map = {str(i): f"{i}.safetensors" for i in range(4)}
    with pytest.raises(CheckpointError, match="lacks 2 of the 4 files .*: 1.safetensors, 3.safetensors"):
        shards(indexed(tmp_path, weight_map, ["0.safetensors", "2.safetensors"]))


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..", "", "x.bin", None, 3]
)
def test_index_cannot_name_files_outside_the_folder(name, tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "secret.safetensors").touch()
    with pytest.raises(CheckpointError, match="layer.weight must lie in"):
        shards(indexed(tmp_path / "inside", {"layer.weight": name}))


@pytest.mark.parametrize("text", ["{}", '{"weight_map": {}}', '{"weight_map": []}', "[]", "{"])
def test_broken_index(text, tmp_path):
    (tmp_path / files.INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=files.INDEX):
        shards(tmp_path)
