# pyright: reportMissingImports=false
"""llama.cpp quantizes a GGUF file.

Told: imatrix (a safetensors file of importances by tensor, or nothing) and files, a list of: model, out, file_type (a
number of `llama_ftype`; 0 makes float32 of anything).
"""

import ctypes

import llama_cpp
from safetensors.numpy import load_file
from talk import answer, imported, job

told = job()
imported()
llama_cpp.llama_backend_init()
importances = load_file(told["imatrix"]) if told.get("imatrix") else {}
kept = [(name.encode(), values.astype("float32").ravel()) for name, values in importances.items()]
entries = (llama_cpp.llama_model_imatrix_data * (len(kept) + 1))()
for entry, (name, values) in zip(entries, kept, strict=False):
    entry.name = name
    entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    entry.size = values.size
for each in told["files"]:
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = 1
    params.ftype = each["file_type"]
    if kept:
        params.imatrix = ctypes.cast(entries, type(params.imatrix))
    params.allow_requantize = each["file_type"] == 0
    failed = llama_cpp.llama_model_quantize(each["model"].encode(), each["out"].encode(), ctypes.byref(params))
    if failed:
        raise SystemExit(f"llama_model_quantize returned {failed} for {each}")
answer(files=len(told["files"]))
