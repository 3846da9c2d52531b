import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from llamero.core import artifact
from llamero.core.artifact import MANIFEST, Identity
from llamero.core.errors import LlameroError

IDENTITY = Identity("model", "train-sft", {"lr": 1e-5, "steps": 3}, {"data": "abc"})


def make(root, identity=IDENTITY, text="weights"):
    with artifact.build(root, identity) as build:
        (build.path / "model.bin").write_text(text)
        build.summary = {"tokens": 7}
    return artifact.read(identity.path(root))


@pytest.mark.parametrize(
    "changed",
    [{"kind": "data"}, {"config": {"lr": 2e-5, "steps": 3}}, {"parents": {"data": "abd"}}, {"version": 2}],
    ids=lambda change: next(iter(change)),
)
def test_whatever_decides_the_content_changes_the_digest(changed):
    assert replace(IDENTITY, **changed).digest != IDENTITY.digest


def test_the_order_of_keys_and_the_name_of_the_stage_do_not_change_the_digest():
    other = Identity("model", "another", {"steps": 3, "lr": 1e-5}, {"data": "abc"})
    assert other.digest == IDENTITY.digest


def test_a_finished_artifact_is_found_and_says_what_made_it(tmp_path):
    assert artifact.find(tmp_path, IDENTITY) is None
    made = make(tmp_path)
    found = artifact.find(tmp_path, IDENTITY)
    assert found == made
    assert found is not None
    assert (found.kind, found.stage, found.digest) == ("model", "train-sft", IDENTITY.digest)
    assert found.config == IDENTITY.config
    assert found.parents == {"data": "abc"}
    assert found.summary == {"tokens": 7}
    assert [path.name for path in tmp_path.iterdir()] == [f"train-sft-{IDENTITY.digest[:12]}"]


def test_an_exception_leaves_the_partial_which_the_next_build_continues(tmp_path):
    def cut_off():
        with artifact.build(tmp_path, IDENTITY) as build:
            (build.path / "half").write_text("done before")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        cut_off()
    assert artifact.find(tmp_path, IDENTITY) is None
    assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]
    with artifact.build(tmp_path, IDENTITY) as build:
        assert (build.path / "half").read_text() == "done before"
    assert artifact.find(tmp_path, IDENTITY) is not None


def test_the_manifest_is_the_last_thing_written(tmp_path):
    with artifact.build(tmp_path, IDENTITY) as build:
        assert not (build.path / MANIFEST).exists()
        partial = build.path
    assert not partial.exists()
    assert (IDENTITY.path(tmp_path) / MANIFEST).exists()


def test_a_directory_in_the_way_is_named_before_the_work_begins(tmp_path):
    make(tmp_path)
    (IDENTITY.path(tmp_path) / MANIFEST).unlink()
    with pytest.raises(LlameroError, match=r"(?s)place is taken.*remove it"), artifact.build(tmp_path, IDENTITY):
        pytest.fail("nothing should be built")


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"kind": "model"}', "\udcff"], ids=["half", "list", "empty", "key missing", "not UTF-8"]
)
def test_a_broken_manifest_is_named(tmp_path, text):
    (tmp_path / MANIFEST).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(LlameroError, match=MANIFEST):
        artifact.read(tmp_path)


HOLD = """
import sys, time
from pathlib import Path
from llamero.core.artifact import alone_in
with alone_in(Path(sys.argv[1])):
    sys.stdout.write("held\\n")
    sys.stdout.flush()
    time.sleep(60)
"""


def test_a_second_process_is_told_who_is_at_work_and_a_killed_one_lets_go(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LlameroError, match=f"process {holder.pid}") as told, artifact.alone_in(tmp_path):
            pytest.fail("two at work")
        assert "--out" in str(told.value)
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        with artifact.alone_in(tmp_path):
            assert (tmp_path / ".lock").read_text() == str(os.getpid())
    finally:
        holder.kill()
        holder.communicate()


def test_the_lock_is_free_after_the_block(tmp_path):
    for _ in range(2):
        with artifact.alone_in(tmp_path / "new"):
            pass


FULL = """
import json, resource, sys
from pathlib import Path
from llamero.core import artifact
from llamero.core.errors import LlameroError
root = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    with artifact.build(root, artifact.Identity("model", "big", {}, {})) as build:
        (build.path / "weights").write_bytes(bytes(1 << 20))
except LlameroError as error:
    sys.stdout.write(json.dumps([error.problem, error.where, error.fix]))
"""


def test_a_full_disk_names_the_place_and_the_way_out_and_spares_what_is_finished(tmp_path):
    done = make(tmp_path)
    before = {path.name: path.read_bytes() for path in done.path.iterdir()}
    run = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=True)
    problem, where, fix = json.loads(run.stdout)
    assert "no room" in problem
    assert where.startswith(str(tmp_path / "big-"))
    assert "free some space" in fix
    assert {path.name: path.read_bytes() for path in done.path.iterdir()} == before
    assert artifact.find(tmp_path, IDENTITY) == done
