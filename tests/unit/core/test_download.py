import errno
from fnmatch import fnmatch
from importlib import import_module
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors as hub

from llamero.core.download import resolve_model
from llamero.core.errors import LlameroError


def response(status):
    """Return a reply of whatever network library the hub's uses."""
    library = import_module(vars(hub)["Response"].__module__.split(".")[0])
    return library.Response(status, request=library.Request("GET", "https://huggingface.co"))


def refuse(monkeypatch, error):
    def snapshot_download(*_: Any, **__: Any):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


def test_a_directory_is_itself(tmp_path):
    assert resolve_model(tmp_path) == tmp_path
    assert resolve_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "nowhere", "a/b/c", "~/no-such-model"])
def test_what_cannot_be_a_hub_name_is_a_missing_directory(name):
    with pytest.raises(LlameroError, match=r"(?s)no such model directory.*owner/name"):
        resolve_model(name)


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "model.bin").write_text("")
    with pytest.raises(LlameroError, match="neither a directory nor a GGUF file"):
        resolve_model(tmp_path / "model.bin")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (hub.GatedRepoError("gated", response=response(403)), r"grant you access(?s:.)*hf auth login"),
        (hub.RepositoryNotFoundError("none", response=response(404)), "nor a model on the hub"),
        (hub.RevisionNotFoundError("none", response=response(404)), "owner/name has no revision `v2`"),
        (hub.HfHubHTTPError("down", response=response(503)), "neither the hub nor its cache"),
        (hub.LocalEntryNotFoundError("offline"), "neither the hub nor its cache"),
        (hub.OfflineModeIsEnabled("offline"), "neither the hub nor its cache"),
        (ConnectionError("cut"), "neither the hub nor its cache"),
        (vars(hub)["HTTPError"]("read timed out"), "neither the hub nor its cache"),
        (hub.HFValidationError("a -- is not allowed"), "nor a possible name"),
        (OSError(errno.ENOSPC, "No space left on device"), "no room to write"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_what_the_hub_refuses_is_said_with_a_way_out(monkeypatch, error, says):
    refuse(monkeypatch, error)
    with pytest.raises(LlameroError, match=says) as told:
        resolve_model("owner/name:v2")
    assert told.value.where == "owner/name:v2"


def test_weights_in_pickles_are_only_fetched_where_there_are_no_safetensors(monkeypatch, tmp_path):
    asked = []

    def snapshot_download(repo, *, revision, allow_patterns):
        older = {"pytorch_model.bin", "original/consolidated.00.pth"}
        asked.append((repo, revision, {name for name in older if any(fnmatch(name, each) for each in allow_patterns)}))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_model("owner/name") == tmp_path
    all_older = {"pytorch_model.bin", "original/consolidated.00.pth"}
    assert asked == [("owner/name", None, set()), ("owner/name", None, all_older)]
    asked.clear()
    (tmp_path / "model.safetensors").write_text("")
    resolve_model("owner/name:main")
    assert asked == [("owner/name", "main", set())]


def test_of_a_repository_of_gguf_files_one_is_fetched_with_all_its_parts(monkeypatch, tmp_path):
    asked = []

    def snapshot_download(repo, *, revision, allow_patterns):
        asked.append((repo, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    (tmp_path / "q4").mkdir()
    for name in ("one.gguf", "q4/two-00001-of-00002.gguf", "q4/two-00002-of-00002.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    assert resolve_model("owner/name/one.gguf:v2") == tmp_path / "one.gguf"
    assert resolve_model("owner/name/q4/two-00002-of-00002.gguf") == tmp_path / "q4/two-00001-of-00002.gguf"
    assert asked == [("owner/name", "v2", ["one.gguf"]), ("owner/name", None, ["q4/two-*-of-00002.gguf"])]
    with pytest.raises(LlameroError, match=r"there is no file `three\.gguf`"):
        resolve_model("owner/name/three.gguf")
