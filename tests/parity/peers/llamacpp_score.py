# pyright: reportMissingImports=false
"""llama.cpp reads text with GGUF files.

Told: tokens (a safetensors file with `ids`), models (files), text (to tokenize, or nothing). Answers with the sum of
negative log-likelihoods of every token but the first of each row, and with the tokens of the text.
"""

import llama_cpp
import numpy as np
from safetensors.numpy import load_file
from talk import answer, imported, job

told = job()
imported()
ids = load_file(told["tokens"])["ids"].astype(int)
seen = []
for path in told["models"]:
    model = llama_cpp.Llama(
        path,
        n_ctx=ids.shape[1],
        n_batch=ids.shape[1],
        n_ubatch=ids.shape[1],
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        verbose=False,
    )
    nll, favourites = 0.0, []
    for row in ids:
        model.reset()
        model.eval(row.tolist())
        logits = model.scores[: len(row)].astype(np.float64)
        largest = logits.max(1, keepdims=True)
        log_probs = logits - largest - np.log(np.exp(logits - largest).sum(1, keepdims=True))
        nll -= float(log_probs[np.arange(len(row) - 1), row[1:]].sum())
        favourites += logits[:-1].argmax(1).tolist()
    text = told.get("text")
    said = [] if text is None else model.tokenize(text.encode(), add_bos=False, special=False)
    metadata = {key: str(value)[:200] for key, value in model.metadata.items()}
    seen.append({"nll": nll, "favourites": favourites, "tokens": said, "metadata": metadata})
    model.close()
answer(models=seen)
