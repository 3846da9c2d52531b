"""Job files: what they say, that a shell checker finds nothing, and that they run with a stand-in for Slurm."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llamero.core.errors import LlameroError
from llamero.plan.jobs import Job, slurm, spread, torchrun

RUN = ("run", "my recipes/it's.yaml", "--set", "train.sft.lr=1e-5")


def job(**how):
    return Job(**{"name": "my-release", "command": RUN, "nodes": 4, "devices": 8} | how)


FILES = {
    "one machine": torchrun(job(nodes=1)),
    "several": torchrun(job()),
    "Slurm": slurm(job()),
    "Slurm with everything": slurm(
        job(hours=1.5, directives=["--account=llamas", "--partition=gpu"], setup=["module load cuda"], port=1234)
    ),
}


@pytest.mark.parametrize("text", FILES.values(), ids=FILES)
def test_a_shell_checker_finds_nothing(text, tmp_path):
    checker = Path(sys.executable).with_name("shellcheck")
    assert checker.exists(), "pip install -e '.[dev]' brings shellcheck"
    path = tmp_path / "job.sh"
    path.write_text(text)
    found = subprocess.run([checker, path], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_slurm_is_asked_for_what_the_recipe_needs():
    lines = FILES["Slurm with everything"].splitlines()
    assert {"#SBATCH --nodes=4", "#SBATCH --gpus-per-node=8", "#SBATCH --time=1:30:00", "#SBATCH --requeue"} <= {*lines}
    assert {"#SBATCH --account=llamas", "#SBATCH --partition=gpu", "module load cuda"} <= {*lines}
    assert any("$HEAD_NODE:1234" in line for line in lines)


def test_devices_that_do_not_spread_are_refused_with_the_numbers_that_would():
    assert spread(32, 4) == 8
    with pytest.raises(LlameroError, match=r"12 devices do not spread over 5 nodes(?s:.*)1, 2, 3, 4, 6, 12 nodes"):
        spread(12, 5)


@pytest.mark.parametrize("how", [{"nodes": 0}, {"devices": -1}, {"hours": 0.0}])
def test_nothing_of_something_is_refused(how):
    with pytest.raises(LlameroError, match="is "):
        job(**how)


STAND_INS = {
    "srun": 'shift; exec "$@"',
    "scontrol": 'echo "scontrol $*" >> "$LOG"; if [ "$1" = show ]; then echo node0; echo node1; fi',
    "torchrun": "trap 'echo saved >> \"$LOG\"; exit 130' TERM\n"
    'printf "%s|" "$@" >> "$LOG"; echo >> "$LOG"; echo ready > "$LOG.ready"\n'
    'while [ -n "${WAIT:-}" ]; do sleep 0.05; done',
}


@pytest.fixture
def cluster(tmp_path):
    """Start a job file with stand-ins for the programs of Slurm; what they were told goes to `log`."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, body in STAND_INS.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    log = tmp_path / "log"
    log.touch()

    def start(text, **environment):
        path = tmp_path / "job.sh"
        path.write_text(text)
        known = {"PATH": f"{programs}:{os.environ['PATH']}", "LOG": str(log), "SLURM_JOB_ID": "7"}
        bash = shutil.which("bash")
        assert bash
        return subprocess.Popen([bash, path], env=known | {"SLURM_JOB_NODELIST": "node[0-1]"} | environment)

    return start, log


def test_a_job_that_ends_by_itself_is_not_queued_again(cluster):
    start, log = cluster
    with start(FILES["Slurm"]) as process:
        assert process.wait(timeout=30) == 0
    hosts, told = log.read_text().splitlines()
    assert hosts == "scontrol show hostnames node[0-1]"
    arguments = told.rstrip("|").split("|")
    assert arguments[-6:] == ["-m", "llamero.cli", *RUN]
    assert arguments[arguments.index("--rdzv-endpoint") + 1] == "node0:29500"


def test_a_preempted_job_saves_and_is_queued_again(cluster):
    start, log = cluster
    with start(FILES["Slurm"], WAIT="yes") as process:
        deadline = time.monotonic() + 30
        while not log.with_name("log.ready").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 130
    assert log.read_text().splitlines()[-2:] == ["saved", "scontrol requeue 7"]


def test_a_node_without_the_name_of_the_first_says_so(cluster):
    start, _ = cluster
    with start(FILES["several"]) as process:
        assert process.wait(timeout=30) != 0


def test_one_machine_needs_no_name(cluster):
    start, log = cluster
    with start(FILES["one machine"]) as process:
        assert process.wait(timeout=30) == 0
    assert "--standalone" in log.read_text()
