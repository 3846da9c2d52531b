"""Our own side, run as the others are: every variant from one look at the tokens.

Told: model, out (a directory that gets one per variant), tokens (a safetensors file with `ids`), variants.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "src"))

import torch
from safetensors.torch import load_file
from talk import answer, imported, job

from llamero.quantize.config import QuantizeConfig
from llamero.quantize.run import run

told = job()
imported()
torch.set_num_threads(1)
rows = list(load_file(told["tokens"])["ids"].long())
config = QuantizeConfig.model_validate({"variants": told["variants"], "calibration": {"text": "given.txt"}})
reports = run(config, model=Path(told["model"]), out=lambda variant: Path(told["out"]) / variant.name, tokens=rows)
answer(cpu_seconds=time.process_time(), seconds={report.variant.name: report.seconds for report in reports})
