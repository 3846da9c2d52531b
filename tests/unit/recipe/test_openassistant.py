"""Published mixtures become recipes: every key is mapped, or named with a reason and the way out."""

import os
from pathlib import Path

import pytest
import yaml

from llamero.core.errors import LlameroError
from llamero.recipe.load import load
from llamero.recipe.openassistant import convert

ROOT = Path(__file__).parents[3]
SHARED = Path(os.environ.get("LLAMERO_SHARED", ROOT.parent / "shared"))

FILE = """\
defaults:
  rng_seed: 42
  cache_dir: .cache
  use_system_prefix: false
  datasets_extra: []
  eval_size:
  tokenizer_type:
  vocab_extra_ids_list: "<|im_start|>,<|im_end|>"
  dataset_impl: mmap
  min_assistant_tokens:
  output_dir_suffix: ""

llama2:
  vocab_file: llama2/tokenizer.model
  tokenizer_type: SentencePieceTokenizer
  output_dir_suffix: _llama2

code:
  datasets:
    - megacode2:
        val_split: 0.01
        max_val_set: 1000
    - alpaca_gpt4
  output_dir: output/code
  filename_prefix: code
  min_assistant_tokens: 50

chats:
  datasets:
    - oasst_export:
        top_k: 1
        val_split: 0.05
  filename_prefix: chats
"""


@pytest.fixture
def recipe(tmp_path):
    """Load what was converted as the data of a recipe."""

    def loaded(converted):
        (tmp_path / "recipe.yaml").write_text(f"name: small\nbase: owner/model\n{converted.yaml}")
        return load(tmp_path / "recipe.yaml").data

    return loaded


def one(keys, name="megacode2", rest=""):
    """Return a section of one dataset, converted."""
    text = f"s:\n  datasets:\n    - {name}: {keys}\n{rest}"
    return convert(text, "s", where="file.yaml")


def source(converted):
    (mixture,) = yaml.safe_load(converted.yaml)["data"]["mixtures"].values()
    return mixture["sources"][0]


@pytest.mark.parametrize("name", ["oasst_pre10_min25", "oasst_top1"])
def test_the_published_mixtures_are_those_of_the_recipe(recipe, name):
    card = SHARED / "cards" / "llama2-70b-oasst-sft-v10-gptq.md"
    if not card.is_file():
        pytest.skip(f"no cards at {card.parent} (set LLAMERO_SHARED)")
    ours = load(ROOT / "recipes" / "llama2-70b-oasst-sft-v10.yaml").data
    found = convert(card.read_text(), name, where=str(card))
    assert recipe(found).mixtures == {name: ours.mixtures[name]}
    assert recipe(found).extra_tokens == ours.extra_tokens
    assert [line.partition(":")[0] for line in found.unmapped] == ["output_dir"]


def test_sections_are_laid_over_the_defaults_from_left_to_right(recipe):
    found = convert(FILE, "code, llama2", where="file.yaml")
    (name,) = recipe(found).mixtures
    assert name == "code"
    assert "min_assistant_tokens: 50" in found.yaml
    assert {line.partition(":")[0] for line in found.unmapped} == {
        "rng_seed", "cache_dir", "use_system_prefix", "dataset_impl", "vocab_file", "tokenizer_type",
        "output_dir", "output_dir_suffix",
    }  # fmt: skip
    assert any("seed: 42" in line for line in found.unmapped)
    both = convert(FILE, "code,chats", where="file.yaml")
    assert "chats:" in both.yaml
    assert "min_assistant_tokens: 50" in both.yaml


def test_every_key_is_mapped_or_named():
    values = yaml.safe_load(FILE)
    for name in ("code", "chats"):
        found = convert(FILE, f"{name},llama2", where="file.yaml")
        said = found.yaml + "\n".join([*found.notes, *found.unmapped])
        for key, value in (values["defaults"] | values["llama2"] | values[name]).items():
            named = {"datasets": "sources", "vocab_extra_ids_list": "extra_tokens"}.get(key, key)
            assert str(named) in said or value in (None, "", []), key


def test_keys_keep_their_order_and_their_values():
    found = convert(FILE, "code", where="file.yaml")
    assert found.yaml == (
        "data:\n"
        "  extra_tokens: [<CLS>, <SEP>, <EOD>, <MASK>, <PAD>, <|im_start|>, <|im_end|>]\n"
        "  mixtures:\n"
        "    code:\n"
        "      min_assistant_tokens: 50\n"
        "      sources:\n"
        "        - {source: megacode2, val_split: 0.01, max_val_set: 1000, refusals: true}\n"
        "        - {source: alpaca_gpt4, val_split: 0.2}\n"
        "      filename_prefix: code\n"
    )
    assert "alpaca_gpt4: val_split is not stated, the published default 0.2 is written out" in found.notes


def test_what_the_published_loader_does_unasked_is_written_out(recipe):
    found = convert(FILE, "chats", where="file.yaml")
    assert source(found) == {
        "source": "oasst_export",
        "top_k": 1,
        "val_split": 0.05,
        "lang": "en",
        "hub": "OpenAssistant/oasst1",
    }
    assert sum("is written out" in note for note in found.notes) == 2
    assert recipe(found).mixtures["chats"].sources[0].hub == "OpenAssistant/oasst1"
    assert source(one("{}", name="dolphin-mix"))["join_chars"] == 8000


KEYS = [
    ("{fraction: 0.5}", {"fraction": 0.5}),
    ("{fraction: 3}", {"fraction": 1}),
    ("{size: 12}", {"size": 12}),
    ("{lang: [en, de]}", {"lang": "en,de"}),
    ("{input_file_path: a.jsonl}", {"path": "a.jsonl"}),
    ("{hf_dataset_name: o/d, data_files: a.json}", {"hub": "o/d", "data_files": "a.json"}),
    ("{max_char_len: 8000}", {"join_chars": 8000}),
    ("{fill_min_length: 99}", {"join_chars": 100}),
    ("{num_samples: 9}", {"limit": 9}),
    ("{top_k: null}", {}),
    ("{max_val_set: 7}", {"max_val_set": 7}),
]


@pytest.mark.parametrize(("keys", "ours"), KEYS, ids=[case[0] for case in KEYS])
def test_a_key_of_a_dataset_has_its_counterpart(recipe, keys, ours):
    found = one(keys, name="orca-chat")
    assert source(found) == {"source": "orca_chat", "val_split": 0.2, **ours}
    assert found.unmapped == []
    assert recipe(found).mixtures["s"].sources[0].source == "orca_chat"


UNMAPPED = [
    ("{fraction: 0.5, size: 3}", "orca_chat.size: fraction stands beside it"),
    ("{input_file_path: a, hf_dataset_name: b/c}", "orca_chat.hf_dataset_name: input_file_path stands beside it"),
    ("{data_files: [a, b]}", "orca_chat.data_files: one file to a source"),
    ("{max_val_set: 0}", "orca_chat.max_val_set: 0 caps nothing"),
    ("{mode: sft}", "orca_chat.mode: chats are learned as `sft`"),
    ("{manual_seed: 7}", "orca_chat.manual_seed: write `seed: 7` at the top of the recipe"),
    ("{frobnicate: 7}", "orca_chat.frobnicate: no such key is known here"),
]


@pytest.mark.parametrize(("keys", "said"), UNMAPPED, ids=[case[0] for case in UNMAPPED])
def test_a_key_without_a_counterpart_is_named_with_the_way_out(recipe, keys, said):
    found = one(keys, name="orca-chat")
    assert len(found.unmapped) == 1
    assert found.unmapped[0].startswith(said)
    recipe(found)


def test_an_unknown_key_of_a_section_is_named():
    assert one("{}", rest="  frobnicate: 7\n").unmapped == [
        "frobnicate: the published pretokenizer has no such key; leave it out"
    ]


def test_a_dataset_that_is_none_of_ours_stays_as_a_comment(recipe):
    text = "s:\n  datasets:\n    - webgpt\n    - megacode2\n    - mine: {input_file_path: a.jsonl}\n"
    found = convert(text, "s", where="file.yaml")
    assert "        # - {source: webgpt, val_split: 0.2}\n" in found.yaml
    assert found.unmapped == ["webgpt: no source of that name is known here; give it a `path` or a `hub`"]
    assert [source.source for source in recipe(found).mixtures["s"].sources] == ["megacode2", "mine"]


def test_more_datasets_and_the_size_of_every_validation_set(recipe):
    found = one("{max_val_set: 9}", rest="  eval_size: 20\n  datasets_extra: [orca-chat]\n  write_json: true\n")
    mixture = recipe(found).mixtures["s"]
    assert [(source.source, source.max_val_set) for source in mixture.sources] == [("megacode2", 9), ("orca_chat", 20)]
    assert mixture.jsonl


def test_special_tokens_are_those_of_the_published_tokenizer():
    def tokens(rest):
        return yaml.safe_load(one("{}", rest=rest).yaml)["data"]["extra_tokens"]

    five = ["<CLS>", "<SEP>", "<EOD>", "<MASK>", "<PAD>"]
    assert tokens("") == [*five, "<|im_start|>", "<|im_end|>"]
    assert tokens("  vocab_extra_ids_list: '<SEP>,<x>'\n") == [*five, "<x>"]
    assert tokens("  vocab_extra_ids_list:\n") == five
    assert tokens("  tokenizer_type: FalconTokenizer\n") == ["<|im_start|>", "<|im_end|>"]


CARD = """\
---
license: llama2
---
# A model

```
"<|im_start|>system: {x}<|im_end|>"
```

```python
x = f"{y}"
```

```
one:
  datasets:
    - oa_leet10k:
        val_split: 0.05
```

Text between.

```yaml
two:
  datasets: [orca-chat]
```
"""


def test_a_card_is_read_by_its_blocks():
    assert source(convert(CARD, "one", where="card.md")) == {
        "source": "oa_leet10k",
        "val_split": 0.05,
        "refusals": True,
    }
    assert source(convert(CARD, "two", where="card.md"))["source"] == "orca_chat"


WRONG = [
    (CARD, "tow", "card.md", "there is no section `tow`", "one of: two, one"),
    (FILE, "code,lama2", "card.md", "there is no section `lama2`", "one of: llama2, "),
    (FILE, "llama2", "card.md", "section `llama2` names no datasets", "add a section that has some"),
    ("# nothing\n```\nhello\n```\n", "x", "card.md", "there is no section `x`", "a card that prints some"),
    (CARD.replace("0.05", "[0.05"), "one", "card.md:19", "not valid YAML", None),
    (CARD.replace("two:", "one:"), "one", "card.md:24", "section `one` stands here twice", None),
    ("hello", "x", "card.md", "a mapping of keys is wanted here", None),
    ("s:\n  datasets:\n    - a: {}\n      b: {}\n", "s", "card.md:3", "a name with keys", None),
    ("s:\n  datasets:\n    - [a]\n", "s", "card.md:3", "a name with keys", None),
    (
        "s:\n  datasets:\n    - megacode\n    - megacode\n",
        "s",
        "card.md:4",
        "`megacode` is named twice",
        "name it once",
    ),
    ("s:\n  datasets:\n    - megacode: {fraction: 0}\n", "s", "card.md:3", "`fraction: 0` takes nothing", None),
    ("s:\n  datasets:\n    - megacode: {size: few}\n", "s", "card.md:3", "`size: few` takes nothing", None),
    ("s:\n  datasets:\n    - megacode: 3\n", "s", "card.md:3", "a name with keys", None),
    ("s:\n  datasets:\n", "s", "card.md:2", "known here: it lists none", None),
    ("s:\n  datasets:\n    - webgpt\n", "s", "card.md:3", "no dataset of section `s` is known here: webgpt", "by hand"),
]


@pytest.mark.parametrize(("text", "section", "where", "problem", "fix"), WRONG, ids=[case[3] for case in WRONG])
def test_what_is_no_configuration_is_refused_at_its_line(text, section, where, problem, fix):
    with pytest.raises(LlameroError) as caught:
        convert(text, section, where="card.md")
    assert problem in caught.value.problem
    assert caught.value.where == where
    assert fix is None or fix in str(caught.value.fix)
