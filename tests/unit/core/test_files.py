import errno
import json
import os

import pytest

from llamero.core import files
from llamero.core.errors import LlameroError
from llamero.core.files import ContentDigests


def test_what_is_written_atomically_is_whole_and_alone(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"é": [1, None]})
    files.write_json(path, {"é": [2, None]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": [2, None]}
    assert "é" in path.read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "a.txt"
    files.write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        files.write_atomically(path, "new \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_kill_left_half_written_is_gone_with_the_next_writing(tmp_path):
    path = tmp_path / "a.txt"
    (tmp_path / ".a.txt.new").write_text("hal")
    files.write_atomically(path, "whole")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG], ids=errno.errorcode.get)
def test_every_kind_of_full_disk_is_named(tmp_path, number):
    with pytest.raises(LlameroError, match="no room") as told, files.disk_errors_named(tmp_path):
        raise OSError(number, os.strerror(number))
    assert told.value.where == str(tmp_path)


def test_other_disk_errors_pass(tmp_path):
    with pytest.raises(PermissionError), files.disk_errors_named(tmp_path):
        raise PermissionError(errno.EACCES, "no")


def test_a_directory_with_a_dangling_link_can_be_synced(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "file").write_text("x")
    files.sync(tmp_path)


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "model"
    (root / "sub").mkdir(parents=True)
    (root / "a").write_text("one")
    (root / "sub" / "b").write_text("two")
    return root


def digest(tmp_path, path):
    return ContentDigests(tmp_path / "memory.json")(path)


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (lambda root: os.utime(root / "a", (1, 1)), False),
        (lambda root: (root / "README.md").write_text("about"), False),
        (lambda root: (root / ".hidden").write_text("x"), False),
        (lambda root: [(root / ".git").mkdir(), (root / ".git" / "HEAD").write_text("x")], False),
        (lambda root: (root / "a").write_text("uno"), True),
        (lambda root: (root / "a").rename(root / "c"), True),
        (lambda root: (root / "c").write_text(""), True),
        (lambda root: (root / "sub" / "b").unlink(), True),
    ],
    ids=["touched", "readme", "hidden", "hidden folder", "edited", "renamed", "added", "removed"],
)
def test_a_digest_follows_the_content_and_nothing_else(tmp_path, tree, change, differs):
    before = digest(tmp_path, tree)
    change(tree)
    assert (digest(tmp_path, tree) != before) is differs


def test_the_same_content_elsewhere_has_the_same_digest(tmp_path, tree):
    before = digest(tmp_path, tree)
    assert digest(tmp_path, tree.rename(tmp_path / "moved")) == before


def test_a_file_that_did_not_change_is_not_read_again(tmp_path):
    path = tmp_path / "big"
    path.write_text("x")
    digest(tmp_path, path)
    memory = tmp_path / "memory.json"
    known = json.loads(memory.read_text())
    known[str(path)][2] = "remembered"
    memory.write_text(json.dumps(known))
    assert digest(tmp_path, path) == "remembered"


def test_a_broken_memory_is_forgotten(tmp_path):
    path = tmp_path / "a"
    path.write_text("x")
    before = digest(tmp_path, path)
    (tmp_path / "memory.json").write_text('{"half')
    assert digest(tmp_path, path) == before
    assert str(path) in (tmp_path / "memory.json").read_text()


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(LlameroError, match="no such file"):
        digest(tmp_path, tmp_path / "nowhere")
