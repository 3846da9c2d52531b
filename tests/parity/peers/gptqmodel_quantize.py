# pyright: reportMissingImports=false
"""GPTQModel quantizes a model: GPTQ in layouts v1 and v2, or AWQ.

Told: model, out, tokens (a safetensors file with `ids`), method, bits, group_size, sym, desc_act, format, dtype, mse.
"""

import time

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from safetensors.torch import load_file
from talk import answer, imported, job

told = job()
imported()
torch.set_num_threads(1)
ids = load_file(told["tokens"])["ids"].long()
rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in ids]
keys = {"method": told.get("method", "gptq"), "bits": told["bits"], "group_size": told["group_size"]}
keys |= {"sym": told["sym"], "format": told.get("format", "gptq")}
if keys["method"] == "gptq":
    keys |= {"desc_act": told["desc_act"], "damp_percent": told.get("damp", 0.01), "mse": told.get("mse", 0.0)}
    if told["desc_act"]:
        keys["act_group_aware"] = False
model = GPTQModel.load(
    told["model"],
    QuantizeConfig(**keys),
    device="cpu",
    dtype=getattr(torch, told.get("dtype", "float32")),
)
model.quantize(rows, batch_size=told.get("batch", 4))
model.save(told["out"])
answer(cpu_seconds=time.process_time())
