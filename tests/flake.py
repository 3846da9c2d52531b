"""Runs tests again and again and says which of them failed, how often: `python tests/flake.py 50 [pytest's arguments]`.

Without arguments it takes the tests that start several processes. A test that fails once in many runs is a bug.
"""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

SEVERAL = ["tests/unit/parallel", "tests/e2e/test_interruption.py", "tests/e2e/test_torchrun.py"]


def main(times: int, arguments: list[str]) -> int:
    """Return 1 if anything failed, and print what."""
    failed: Counter[str] = Counter()
    broken = 0
    for number in range(1, times + 1):
        command = [sys.executable, "-m", "pytest", "-q", "-m", "", "--tb=short", *(arguments or SEVERAL)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        names = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, flags=re.MULTILINE)
        failed.update(names)
        broken += done.returncode != 0
        said = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr.strip()
        sys.stdout.write(f"{number} of {times}: {said}\n")
        if done.returncode:
            Path(f"flake-{number}.txt").write_text(done.stdout + done.stderr)
        sys.stdout.flush()
    sys.stdout.write(f"{times} runs, {broken} with a failure\n")
    sys.stdout.writelines(f"  {count} × {name}\n" for name, count in failed.most_common())
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
