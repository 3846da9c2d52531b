"""A finished release in miniature: two training stages, three variants, measurements."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llamero.checkpoint import hf
from llamero.core import artifact, files
from llamero.core.artifact import Artifact, Identity
from llamero.core.results import Result
from llamero.data import stats
from llamero.engine.stage import StageConfig
from llamero.publish.config import PublishConfig
from llamero.publish.run import ReleaseInputs
from llamero.text.render import chat_template, generation_config
from llamero.text.tokenizer import train_bpe

STAGES = (
    StageConfig(
        name="pretrain", mixture="world", objective="lm", sequence=128, batch=16, steps=200, lr=3e-3, warmup=20
    ),
    StageConfig(name="chat", mixture="talk", sequence=256, batch=32, steps=60, lr=3e-4, min_lr=3e-5),
)
PACKING = {
    "documents": 5000, "tokens": 9000, "supervised_tokens": 4000, "dropped": 0, "nothing_to_learn": 0,
    "pieces_without_target": 0,
    "truncated": 0, "truncated_tokens": 0, "split": 0, "too_short": 0, "rows": 320, "fill": 0.973,
}  # fmt: skip
VARIANTS = {
    "gptq-4bit-128g-actorder_True": {"bits": 4, "group_size": 128, "actorder": "desc"},
    "gptq-4bit-32g-actorder_static": {"bits": 4, "group_size": 32, "actorder": "static"},
    "gptq-3bit--1g-actorder_True": {"bits": 3, "group_size": -1, "actorder": "desc"},
    "rtn-4bit-32g": {"bits": 4, "group_size": 32, "actorder": "none"},
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 300, "hidden_size": 8,
    "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 256, "eos_token_id": 7, "bos_token_id": 1,
}  # fmt: skip


@pytest.fixture(scope="session")
def model_files(tmp_path_factory) -> Path:
    """What a model directory holds, tokenizer and all."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = train_bpe(iter(["the cat sat on the mat, said the user\n"] * 3), vocab_size=270)
    tokenizer = tokenizer.with_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(directory, chat_template=chat_template("chatml", tokenizer))
    files.write_json(directory / "generation_config.json", generation_config("chatml", tokenizer))
    files.write_json(directory / "config.json", CONFIG)
    weight = torch.arange(2400, dtype=torch.float32).view(300, 8)
    specs = {"model.embed_tokens.weight": hf.Spec((300, 8), torch.float32)}
    hf.write_tensors(directory, specs, [("model.embed_tokens.weight", weight)])
    return directory


@pytest.fixture(scope="session")
def make(tmp_path_factory, model_files):
    """Make an artifact with the files of a model (or none) and some more."""
    root = tmp_path_factory.mktemp("runs")

    def made(kind, stage, config, summary, *, parents=None, model=True, texts=None) -> Artifact:
        identity = Identity(kind, stage, config, parents or {})
        with artifact.build(root, identity) as build:
            for source in model_files.iterdir() if model else ():
                (build.path / source.name).write_bytes(source.read_bytes())
            for name, text in (texts or {}).items():
                (build.path / name).write_text(text)
            build.summary = summary
        return artifact.read(identity.path(root))

    return made


def metrics(steps: int, lr: float) -> str:
    lines = []
    for step in range(1, steps + 1):
        line = {"step": step, "loss": 6 * math.exp(-step / 40) + 0.8 + 0.1 * math.sin(7.3 * step * step)}
        line |= {"lr": lr * (1 - step / steps), "grad_norm": 1.0, "tokens": 2048, "supervised_tokens": 900}
        line |= {"tokens_per_second": 1.0}
        if step % 50 == 0 or step == steps:
            line["validation_loss"] = 6 * math.exp(-step / 40) + 0.9
        lines.append(json.dumps(line) + "\n")
    return "".join(lines)


def mixture(name: str) -> dict[str, object]:
    part = stats.SourceStats("facts", samples=4)
    part.add(120, 60, turns=2, language="en")
    for _ in range(3):
        part.skip("malformed row")
    part.leave_out("duplicate")
    whole = stats.total([part])
    train = {"sources": [part.to_json()], "total": whole.to_json()}
    val = {"sources": [], "total": stats.total([]).to_json()}
    said = stats.Stats(f"{name}-train*", (part.block(), whole.block()))
    return {"summary": {"mixture": name, "train": train, "val": val}, "text": stats.text(said)}


@pytest.fixture(scope="session")
def inputs(make) -> ReleaseInputs:
    """A release from scratch."""
    data = []
    for name in ("world", "talk"):
        said = mixture(name)
        texts = {"train_stats.txt": said["text"], "val_stats.txt": "no sample of validation"}
        data.append(make("data", f"data-{name}", {"name": name}, said["summary"], model=False, texts=texts))
    stages = []
    for stage, source in zip(STAGES, data, strict=True):
        parents = {"data": source.digest} | ({"start": stages[-1].digest} if stages else {})
        summary = {"steps": stage.steps, "tokens": 409_600, "supervised_tokens": 180_000, "loss": 0.84321}
        summary |= {"validation_loss": None if stages else 0.91234, "parameters": 2400, "packing": PACKING}
        if stages:
            summary["packing"] = PACKING | {"truncated": 4, "truncated_tokens": 77, "dropped": 1}
        texts = {"metrics.jsonl": metrics(stage.steps or 0, stage.lr)}
        config = {"stage": stage.decides(), "seed": 1}
        stages.append(make("model", f"train-{stage.name}", config, summary, parents=parents, texts=texts))
    variants = []
    for name, how in VARIANTS.items():
        rtn = name.startswith("rtn")
        summary = {
            "name": name,
            "method": "rtn" if rtn else "gptq",
            "layout": "gptq",
            **how,
            "sym": True,
            "size_bytes": 35_330_000_000,
            "bits_per_weight": 4.25,
            "notes": [],
        }
        summary |= {"damp": None if rtn else 0.01}
        summary |= {"calibration": {"source": "talk", "sequence": 512}, "tokens": 65_536}
        layers = [{"name": f"layer {n}", "damp": summary["damp"], "dead_channels": 0} for n in range(3)]
        if name.startswith("gptq-3bit"):
            layers[1] |= {"damp": 0.04, "dead_channels": 2}
        summary["modules"] = layers
        variants.append(make("variant", name, {"variant": name}, summary, parents={"model": stages[-1].digest}))
    return ReleaseInputs(
        name="tiny",
        recipe={"name": "tiny", "train": [{"name": "pretrain"}], "note": "```"},
        base="trained from scratch",
        template="chatml",
        model=stages[-1],
        stages=stages,
        data=data,
        variants=variants,
        results=results(),
    )


def results() -> list[Result]:
    """Measurements of stages and some of the variants."""
    about = {"dtype": "float32", "seed": 1}
    toy = "600 held-out questions"
    found = []
    for number, model in enumerate(("pretrain", "chat", "gptq-4bit-128g-actorder_True")):
        share = {"accuracy": 0.22 + 0.37 * number, "accuracy_stderr": 0.0077}
        share |= {"accuracy/facts": 0.9, "accuracy/arithmetic": 0.5 + 0.1 * number}
        notes = ("2 questions were cut",) if number else ()
        found.append(Result("toy_world", model, share, toy, {**about, "tokenizer": f"t{number}"}, notes))
    for number, model in enumerate(("chat", *list(VARIANTS)[:3])):
        text = {**about, "text": "wiki"}
        found.append(
            Result(
                "perplexity", model, {"perplexity": 9.87654 + number, "tokens": 1000}, "window 512, stride 256", text
            )
        )
        if number:
            metrics = {"kl": 0.0123456 * number, "top1": 0.951, "tokens": 1000}
            found.append(Result("agreement", model, metrics, "KL(original ‖ this), windows of 512", text))
    return found


@pytest.fixture(scope="session")
def config() -> PublishConfig:
    """What a recipe says of its publication."""
    return PublishConfig(license="apache-2.0", languages=["en"], repository="someone/tiny")


@pytest.fixture
def from_base(inputs, model_files, tmp_path):
    """A release of quantized files of somebody else's model."""
    directory = shutil.copytree(model_files, tmp_path / "base")
    base = Artifact(directory, "model", "base", "b" * 64, {}, {}, {})
    kept = [replace(r, model="base") if r.model == "chat" else r for r in inputs.results if r.model != "pretrain"]
    return replace(
        inputs, base="meta-llama/Llama-2-7b-hf:main", base_on_hub=True, model=base, stages=[], data=[], results=kept
    )
