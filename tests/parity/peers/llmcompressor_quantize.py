# pyright: reportMissingImports=false
"""llm-compressor quantizes a model with GPTQ or by rounding, into compressed-tensors.

Told: model, out, tokens (a safetensors file with `ids`), method (gptq, rtn), bits, group_size, sym, actorder, damp.
"""

import time

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file
from talk import answer, imported, job
from transformers import AutoModelForCausalLM, AutoTokenizer

told = job()
imported()
torch.set_num_threads(1)
ids = load_file(told["tokens"])["ids"].long()
data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
grouped = told["group_size"] != -1
weights = QuantizationArgs(
    num_bits=told["bits"],
    type="int",
    symmetric=told["sym"],
    strategy="group" if grouped else "channel",
    group_size=told["group_size"] if grouped else None,
    actorder=told.get("actorder") if grouped else None,
)
groups = {"all": QuantizationScheme(targets=["Linear"], weights=weights)}
if told.get("method", "gptq") == "gptq":
    how = GPTQModifier(config_groups=groups, ignore=["lm_head"], dampening_frac=told.get("damp", 0.01))
else:
    how = QuantizationModifier(config_groups=groups, ignore=["lm_head"])
model = AutoModelForCausalLM.from_pretrained(told["model"], dtype=getattr(torch, told.get("dtype", "float32")))
oneshot(
    model=model,
    tokenizer=AutoTokenizer.from_pretrained(told["model"]),
    dataset=data,
    recipe=how,
    max_seq_length=ids.shape[1],
    num_calibration_samples=len(ids),
    batch_size=told.get("batch", 4),
)
model.save_pretrained(told["out"], save_compressed=True)
answer(cpu_seconds=time.process_time())
