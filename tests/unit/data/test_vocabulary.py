"""Ids are given once, by the tokenizer; the true size is recorded, and no parallel layout changes it."""

import json
import os
from pathlib import Path

import pytest
from tokenizers import AddedToken

from llamero.core.errors import LlameroError
from llamero.data.config import DataConfig, VocabularyConfig
from llamero.data.vocabulary import prepare_tokenizer, refuse_unfit_tokens
from llamero.pipeline import Plan, run
from llamero.recipe.load import load
from llamero.text.tokenizer import Tokenizer, load_tokenizer, train_bpe

SHARED = Path(os.environ.get("LLAMERO_SHARED", Path(__file__).parents[4] / "shared"))
MEGATRON = ["<CLS>", "<SEP>", "<EOD>", "<MASK>", "<PAD>"]
CHATML = ["<|im_start|>", "<|im_end|>"]


@pytest.fixture
def prepare(tmp_path):
    """Prepare a tokenizer for some extra tokens; return what is said of it, and the tokenizer."""

    def made(start, extra, *, template="chatml", mixtures=None):
        data = DataConfig.model_validate({"extra_tokens": extra, "mixtures": mixtures or {}})
        out = tmp_path / "prepared"
        out.mkdir()
        said = prepare_tokenizer(data, start, template=template, root=tmp_path, out=out)
        return said, load_tokenizer(out)

    return made


def test_the_published_plan_gives_the_published_ids(prepare):
    llama2 = SHARED / "data" / "tokenizers" / "llama2"
    if not llama2.is_dir():
        pytest.skip(f"no tokenizers at {llama2.parent} (set LLAMERO_SHARED)")
    said, tokenizer = prepare(llama2, MEGATRON + CHATML)
    assert (said["base_size"], said["size"], said["kept"], said["base_rows"]) == (32000, 32007, [], None)
    assert list(said["extra_tokens"].values()) == list(range(32000, 32007))
    assert (tokenizer.id("<|im_start|>"), tokenizer.id("<|im_end|>")) == (32005, 32006)
    assert tokenizer.encode("<|im_start|>", special=True) == [32005]


def test_a_token_that_the_base_has_keeps_its_id_and_is_reported(prepare, tokenizer_files, tokenizer):
    said, prepared = prepare(tokenizer_files, ["<new>", *CHATML])
    assert said["kept"] == CHATML
    assert [prepared.id(token) for token in CHATML] == [tokenizer.id(token) for token in CHATML]
    assert said["extra_tokens"]["<new>"] == said["base_size"] == len(tokenizer)
    assert said["size"] == len(prepared) == len(tokenizer) + 1


def test_an_added_token_that_was_not_special_becomes_so_at_its_id(prepare, tmp_path):
    base = train_bpe(iter(["the cat"] * 9), vocab_size=262)
    base.backend.add_tokens([AddedToken("<x>", normalized=False, special=False)])
    Tokenizer(base.backend, bos="<s>", eos="</s>", unk="<unk>").save(tmp_path / "base")
    said, prepared = prepare(tmp_path / "base", [*CHATML, "<x>"])
    assert (said["kept"], prepared.id("<x>")) == (["<x>"], 262)
    assert "<x>" in prepared.special_tokens


def test_ordinary_text_cannot_become_a_special_token(tokenizer):
    assert tokenizer.id("the") is not None
    with pytest.raises(LlameroError, match=r"'the' is ordinary text of the base's vocabulary \(id \d+\)") as caught:
        refuse_unfit_tokens([*CHATML, "the"], tokenizer)
    assert caught.value.where == "data.extra_tokens"
    assert caught.value.fix == "choose a spelling that no text has, such as <|the|>"
    assert refuse_unfit_tokens(["<the>", *CHATML], tokenizer) == CHATML


def test_the_rows_of_a_padded_base_are_reported(prepare, tokenizer_files, tmp_path):
    base = tmp_path / "base"
    load_tokenizer(tokenizer_files).save(base)
    (base / "config.json").write_text(json.dumps({"vocab_size": 320}))
    said, _ = prepare(base, CHATML)
    assert (said["base_rows"], said["size"]) == (320, 296)


def test_a_tokenizer_can_be_trained_on_a_mixture(prepare, tmp_path):
    rows = [{"instruction": f"the cat {n}", "output": f"the dog {n}"} for n in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    mixtures = {"chat": {"sources": [{"source": "a", "path": "a.jsonl"}]}}
    start = VocabularyConfig(size=265, mixture="chat")
    said, tokenizer = prepare(start, [*CHATML, "<PAD>"], mixtures=mixtures)
    assert said["size"] == len(tokenizer) == said["base_size"] + 3
    assert list(said["extra_tokens"].values()) == list(range(said["base_size"], said["size"]))
    out = tmp_path / "prepared"
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == tokenizer.id("<|im_end|>")
    assert "im_start" in (out / "chat_template.jinja").read_text()
    assert json.loads((out / "special_tokens.json").read_text())["<PAD>"] == tokenizer.id("<PAD>")


RECIPE = """\
name: small
base:
  shape: {hidden: 16, layers: 1, heads: 2, mlp: 24, context: 128}
  vocabulary: {size: 300, mixture: world}
template: chatml
data:
  extra_tokens: [<CLS>, <SEP>, <EOD>, <MASK>, <PAD>, <|im_start|>, <|im_end|>]
  mixtures:
    world: {sources: [{toy_world: conversations, count: 40}]}
train: [{name: sft, mixture: world, sequence: 128, batch: 2, steps: 1}]
parallel: {device: cpu}
"""


@pytest.fixture
def made(tmp_path):
    """Make the recipe with some overrides; return the plan, and the bytes of tokenizer and data."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)

    def make(name, *overrides):
        recipe, out = load(tmp_path / "recipe.yaml", overrides), tmp_path / name
        run(recipe, root=tmp_path, out=out)
        plan = Plan(recipe, tmp_path, out)
        folders = [plan.tokenizer.path(out), plan.data["world"].path(out)]
        files = {path.name: path.read_bytes() for folder in folders for path in folder.glob("*") if path.is_file()}
        del files["artifact.json"]  # it says when it was made
        return plan, files

    return make


def test_neither_data_nor_an_export_depends_on_the_parallel_layout(made, tmp_path):
    plan, files = made("one", "parallel.workers=1")
    other, same = made("other", "parallel.workers=2", "parallel.micro_batch=1")
    assert other.data["world"].digest == plan.data["world"].digest
    assert {name for name in files if name.endswith((".bin", ".idx"))}
    assert same == files
    for planned in (plan, other):
        assert json.loads((planned.path("final") / "config.json").read_text())["vocab_size"] == 307
        assert load_tokenizer(planned.path("final")).id("<|im_end|>") == 306
