# pyright: reportMissingImports=false
"""Transformers loads directories, quantized or not, and answers with logits and weights.

Told: tokens (a safetensors file with `ids`) and models, a list of: model, out (a safetensors file that gets `logits`
and, by name, what every linear layer of the blocks multiplies with, float32: found by giving it the identity), dtype,
backend (GPTQModel's kernel, `auto` or not given: its own choice). Where one fails, its `problem` is in the answer.
"""

import gc
import os
import traceback
from pathlib import Path
from typing import Any

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # or GPTQModel compiles every layer for a minute

import torch
from safetensors.torch import load_file, save_file
from talk import answer, imported, job
from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

told = job()
imported()
torch.set_num_threads(1)
ids = load_file(told["tokens"])["ids"].long()


def _load(each: dict[str, Any]) -> Any:
    keys = {"device_map": "cpu", "dtype": getattr(torch, each["dtype"])}
    if each.get("backend"):
        kind = AwqConfig if "awq" in Path(each["model"]).name else GPTQConfig
        keys["quantization_config"] = kind(bits=each["bits"], backend=each["backend"])
    return AutoModelForCausalLM.from_pretrained(each["model"], **keys).eval()


@torch.inference_mode()
def _look(each: dict[str, Any]) -> dict[str, Any]:
    model = _load(each)
    layers = {name: layer for name, layer in model.model.layers.named_modules() if name.endswith("_proj")}
    found = {"logits": torch.stack([model(row[None]).logits[0].float() for row in ids])}
    for name, layer in layers.items():
        eye = torch.eye(layer.in_features, dtype=model.dtype)
        found[f"model.layers.{name}"] = layer(eye[None])[0].T.float().contiguous()
    save_file(found, each["out"])
    kinds = sorted({type(layer).__name__ for layer in layers.values()})
    return {"layers": kinds, "dtype": str(model.dtype), "problem": ""}


def _tried(each: dict[str, Any]) -> dict[str, Any]:
    try:
        return _look(each)
    except Exception as error:  # whatever it is: the test says it
        traceback.print_exc()
        return {"layers": [], "dtype": "", "problem": f"{type(error).__name__}: {error}"}
    finally:
        gc.collect()


answer(models=[_tried(each) for each in told["models"]])
