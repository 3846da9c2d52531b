# pyright: reportMissingImports=false
"""auto-round tunes the rounding of a model by signed gradients, into GPTQ's layout.

Told: model, out, tokens (a safetensors file with `ids`), bits, group_size, sym, iterations, format.
"""

import time
from pathlib import Path
from typing import cast

import torch
from auto_round import AutoRound
from safetensors.torch import load_file
from talk import answer, imported, job
from transformers import AutoModelForCausalLM, AutoTokenizer

told = job()
imported()
torch.set_num_threads(1)
ids = load_file(told["tokens"])["ids"].long()
model = AutoModelForCausalLM.from_pretrained(told["model"], dtype=getattr(torch, told.get("dtype", "float32")))
tuner = AutoRound(
    model,
    AutoTokenizer.from_pretrained(told["model"]),
    bits=told["bits"],
    group_size=told["group_size"],
    sym=told["sym"],
    iters=told.get("iterations", 200),
    nsamples=len(ids),
    seqlen=ids.shape[1],
    batch_size=told.get("batch", 8),
    dataset=torch.utils.data.DataLoader(cast("torch.utils.data.Dataset[torch.Tensor]", list(ids)), batch_size=1),
    device_map="cpu",
    enable_torch_compile=False,
)
tuner.quantize_and_save(told["out"], format=told.get("format", "auto_gptq"))
for inner in [path for path in Path(told["out"]).iterdir() if path.is_dir()]:  # it names a folder of its own
    for file in inner.iterdir():
        file.rename(Path(told["out"]) / file.name)
    inner.rmdir()
answer(cpu_seconds=time.process_time())
