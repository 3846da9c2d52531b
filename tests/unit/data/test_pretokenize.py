"""Tokenizing a mixture: the same bytes for any number of workers, after any kill, and by an independent writer."""

import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llamero.core.files import sha256
from llamero.data.config import MixtureConfig
from llamero.data.run import tokenize_mixture
from llamero.text.messages import SCAFFOLD, Message, Role
from llamero.text.render import render
from llamero.text.tokenizer import load_tokenizer

SHARED = Path(os.environ.get("LLAMERO_SHARED", Path(__file__).parents[4] / "shared"))
ROWS = 2_000
IDS = [32005, 1404, 13, 18567, 32006, 29871, 13, 32005, 20255, 13, 10994, 727, 32006, 29871, 13]
"""`<|im_start|>user⏎Hi<|im_end|>⏎<|im_start|>assistant⏎Hello there<|im_end|>⏎`, its dummy spaces included."""


def corpus(directory):
    """A mixture of chats and documents that uses everything that is drawn."""
    chats = [{"instruction": f"the cat {n}", "output": f"the dog sat on the log {n * n}"} for n in range(ROWS)]
    texts = [{"text": f"the user {n} sat on the mat\n" * (n % 5 + 1)} for n in range(ROWS)]
    (directory / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    (directory / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    return MixtureConfig.model_validate(
        {
            "sources": [
                {"source": "chats", "path": "chats.jsonl", "val_split": 0.1, "max_val_set": 50, "weight": 1.5},
                {"source": "texts", "path": "texts.jsonl", "fraction": 0.3, "val_split": 0.05},
            ],
            "min_assistant_tokens": 20,
            "jsonl": True,
            "filename_prefix": "mix",
        }
    )


def tokenized(mixture, out, tokenizer, *, team=1):
    out.mkdir(exist_ok=True)
    summary = tokenize_mixture(
        "chat", mixture, tokenizer=tokenizer, template="chatml", root=out.parent, seed=3, out=out, team=team
    )
    return summary, digests(out)


def digests(out):
    return {path.name: sha256(path) for path in sorted(out.iterdir())}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tokenizer_files):
    """A mixture, and what one process makes of it."""
    root = tmp_path_factory.mktemp("alone")
    mixture = corpus(root)
    return mixture, root, *tokenized(mixture, root / "out", tokenizer_files)


@pytest.mark.parametrize("team", [2, 3])
def test_any_number_of_workers_makes_the_same_bytes(alone, tokenizer_files, team):
    mixture, root, summary, files = alone
    assert tokenized(mixture, root / f"by {team}", tokenizer_files, team=team) == (summary, files)


def test_the_files_have_their_published_names(alone):
    _, _, _, files = alone
    pairs = {f"mix-{s}-{k}.{end}" for s in ("train", "val") for k in ("text", "role") for end in ("bin", "idx")}
    others = {"stats.json", "special_tokens.json", "train_stats.txt", "val_stats.txt", "index.html", "lengths.png"}
    assert set(files) == pairs | others | {"mix-train.jsonl", "mix-val.jsonl"}


def test_an_independent_writer_makes_the_same_bytes(tmp_path, tokenizer_files):
    """Everything that the published pretokenizer does for a chat, by hand: rows in order, ids and roles, the index."""
    rows = [{"instruction": f"the cat {n}", "output": f"the dog {n}"} for n in range(300)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    mixture = MixtureConfig.model_validate({"sources": [{"source": "a", "path": "a.jsonl"}]})
    tokenized(mixture, tmp_path / "out", tokenizer_files, team=2)
    tokenizer = load_tokenizer(tokenizer_files)
    said = [
        render([Message("user", row["instruction"]), Message("assistant", row["output"])], "chatml", tokenizer)
        for row in rows
    ]
    for kind, documents in (("text", [each.ids for each in said]), ("role", [each.roles for each in said])):
        flat = [number for document in documents for number in document]
        assert (tmp_path / f"out/train-{kind}.bin").read_bytes() == struct.pack(f"<{len(flat)}H", *flat)
        offsets, offset = [], 0
        for document in documents:
            offsets.append(offset)
            offset += 2 * len(document)
        index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, len(documents), len(documents) + 1)
        index += struct.pack(f"<{len(documents)}i", *map(len, documents))
        index += struct.pack(f"<{len(documents)}q", *offsets)
        index += struct.pack(f"<{len(documents) + 1}q", *range(len(documents) + 1))
        assert (tmp_path / f"out/train-{kind}.idx").read_bytes() == index


def test_shares_are_exact_and_nothing_is_lost(alone):
    _, _, summary, _ = alone
    chats, texts = ({split: summary[split]["sources"][number] for split in ("train", "val")} for number in range(2))
    assert chats["val"]["samples"] == 50  # a tenth would be 200, the rest goes back to training
    assert chats["train"]["samples"] == ROWS - 50
    assert texts["val"]["samples"] == round(ROWS * 0.05)
    assert texts["train"]["samples"] == int((ROWS - 100) * 0.3)
    assert texts["train"]["left_out"] == {"not drawn": ROWS - 100 - int((ROWS - 100) * 0.3)}
    assert texts["train"]["fraction"] == 0.3


KILLED = """
import json, os, signal, sys
from pathlib import Path
from llamero.data import write
from llamero.data.config import MixtureConfig
from llamero.data.run import tokenize_mixture
write.SECONDS = 0.0
out, tokenizer, chunks = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[4])
checkpoint = write.DatasetWriter.checkpoint
def killed(self):
    checkpoint(self)
    if json.loads((out / write.CHECKPOINT).read_text())["chunks"] >= chunks:
        os.kill(os.getpid(), signal.SIGKILL)
write.DatasetWriter.checkpoint = killed
mixture = MixtureConfig.model_validate_json(sys.argv[3])
tokenize_mixture("chat", mixture, tokenizer=tokenizer, template="chatml", root=out.parent, seed=3, out=out, team=2)
"""


@pytest.mark.parametrize("chunks", [1, 5, 12])
def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(alone, tokenizer_files, chunks):
    mixture, root, summary, files = alone
    out = root / f"killed after {chunks}"
    out.mkdir()
    command = [sys.executable, "-c", KILLED, str(out), str(tokenizer_files), mixture.model_dump_json(), str(chunks)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert not (out / "stats.json").exists()
    assert tokenized(mixture, out, tokenizer_files, team=2) == (summary, files)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no folder of real data")
def test_the_published_vocabulary_gives_the_published_ids(tmp_path):
    added = ["<CLS>", "<SEP>", "<EOD>", "<MASK>", "<PAD>", "<|im_start|>", "<|im_end|>"]
    load_tokenizer(SHARED / "data/tokenizers/llama2").with_tokens(added).save(tmp_path / "tokenizer")
    (tmp_path / "a.jsonl").write_text(json.dumps({"instruction": "Hi", "output": "Hello there"}))
    mixture = MixtureConfig.model_validate({"sources": [{"source": "a", "path": "a.jsonl"}], "jsonl": True})
    tokenized(mixture, tmp_path / "out", tmp_path / "tokenizer")
    special = json.loads((tmp_path / "out/special_tokens.json").read_text())
    assert (special["<|im_start|>"], special["<|im_end|>"], special["<CLS>"]) == (32005, 32006, 32000)
    ids = np.fromfile(tmp_path / "out/train-text.bin", "<u2").tolist()
    assert ids == IDS
    assert json.loads((tmp_path / "out/train.jsonl").read_text()) == {
        "text": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello there<|im_end|>\n"
    }
    roles = np.fromfile(tmp_path / "out/train-role.bin", "<u2") % SCAFFOLD
    half = ids.index(32005, 1)
    assert roles.tolist() == [Role.USER] * half + [Role.ASSISTANT] * (len(ids) - half)
