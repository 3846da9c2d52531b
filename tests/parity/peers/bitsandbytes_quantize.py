# pyright: reportMissingImports=false
"""bitsandbytes, through Transformers, rounds a model to int8 or NF4 and saves it.

Told: model, out, method (int8, nf4), double (whether the scales of nf4 are rounded too).
"""

import torch
from talk import answer, imported, job
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

told = job()
imported()
torch.set_num_threads(1)
if told["method"] == "int8":
    how = BitsAndBytesConfig(load_in_8bit=True)
else:
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=told["double"],
        bnb_4bit_compute_dtype=torch.float32,
    )
model = AutoModelForCausalLM.from_pretrained(
    told["model"], quantization_config=how, dtype=torch.float32, device_map="cpu"
)
model.save_pretrained(told["out"])
answer()
