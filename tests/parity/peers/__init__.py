"""Other programs that quantize or run models, each in an environment of its own.

Their dependencies contradict each other and ours, so nothing of them is imported here: a script of this folder is run
by the Python of the peer's environment, with JSON and safetensors files between. `make peers` builds the environments
from the lists of exact versions beside the scripts.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
ENVIRONMENTS = Path(os.environ.get("LLAMERO_PEERS", ROOT / ".venv-peers"))
"""Where `make peers` puts the environments."""

SINGLE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "GPTQMODEL_CPU_WORKERS": "2",  # GPTQModel 7.7 fails to load on two cores without it
}


class PeerError(RuntimeError):
    """A peer's process failed."""


@dataclass(frozen=True)
class Done:
    """What a peer answered, and what it took."""

    answer: dict[str, Any]
    cpu_seconds: float
    """Of the process and all of its children, from start to end."""
    wall_seconds: float
    peak_bytes: int
    """Largest resident memory of the process, or of one of its children."""


@dataclass(frozen=True)
class Peer:
    """A program in an environment of its own."""

    name: str

    @property
    def python(self) -> Path:
        """Return the interpreter of the environment; `llamero` is a peer like any other, in this one."""
        return Path(sys.executable) if self.name == "llamero" else ENVIRONMENTS / self.name / "bin/python"

    @property
    def absent(self) -> str:
        """Return what to say where the environment was not built, or nothing."""
        built = self.name == "llamero" or (ENVIRONMENTS / self.name / ".installed").exists()
        return "" if built else f"no environment for {self.name}: `make peers` builds it (.venv-peers/{self.name})"

    def run(self, script: str, *, timeout: float = 1800, **job: Any) -> Done:
        """Run a script of this folder in the environment and return what it answered.

        Args:
            script: Name of the file, without its ending.
            timeout: Seconds after which it is given up.
            **job: What it is told; paths may be given as such.

        Raises:
            PeerError: It failed; the end of what it said is in the message.
        """
        with tempfile.TemporaryDirectory() as place:
            told, answer, said = (Path(place) / name for name in ("job.json", "answer.json", "log.txt"))
            told.write_text(json.dumps(job, default=str))
            command = [str(self.python), str(HERE / f"{script}.py"), str(told), str(answer)]
            environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
            started = time.perf_counter()
            with said.open("wb") as log:
                child = subprocess.Popen(
                    command, cwd=place, env={**environment, **SETTINGS, **SINGLE_THREAD}, stdout=log, stderr=log
                )
                status, usage = _wait(child, started + timeout)
            if status or not answer.exists():
                tail = said.read_text(errors="replace")[-4000:]
                raise PeerError(f"{self.name}: {script}.py ended with {status}\n{tail}")
            return Done(
                json.loads(answer.read_text()),
                usage.ru_utime + usage.ru_stime,
                time.perf_counter() - started,
                usage.ru_maxrss * 1024,
            )


def _wait(child: subprocess.Popen[bytes], until: float) -> tuple[int, Any]:
    """Return exit status and resources of a child; `wait4` is what knows those of its children too."""
    while True:
        pid, status, usage = os.wait4(child.pid, os.WNOHANG)
        if pid:
            child.returncode = os.waitstatus_to_exitcode(status)
            return child.returncode, usage
        if time.perf_counter() > until:
            child.kill()
        time.sleep(0.05)
