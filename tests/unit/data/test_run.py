import json
import subprocess
import sys
from itertools import chain

import numpy as np
import pytest

from llamero.core.errors import LlameroError
from llamero.corpus import megatron
from llamero.corpus.dataset import Dataset
from llamero.data.config import DataConfig, MixtureConfig, VocabularyConfig
from llamero.data.run import tokenize_mixture
from llamero.data.vocabulary import prepare_tokenizer
from llamero.engine.batches import Batches
from llamero.engine.stage import StageConfig
from llamero.text.messages import SCAFFOLD, Message, Role
from llamero.text.render import render
from llamero.text.templates import TEMPLATES
from llamero.text.tokenizer import load_tokenizer


@pytest.fixture
def make(tmp_path, tokenizer_files):
    """Tokenize rows of sources and return the summary and the documents by split and kind."""

    def run(rows, *, seed=1, template="chatml", out="out", least=0, **keys):
        sources = []
        for name, lines in rows.items():
            text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
            (tmp_path / f"{name}.jsonl").write_text(text)
            sources.append({"source": name, "path": f"{name}.jsonl", **keys})
        mixture = MixtureConfig.model_validate({"sources": sources, "min_assistant_tokens": least})
        directory = tmp_path / out
        directory.mkdir()
        summary = tokenize_mixture(
            "chat", mixture, tokenizer=tokenizer_files, template=template, root=tmp_path, seed=seed, out=directory
        )
        documents = {
            f"{split}-{kind}": [d.tolist() for d in megatron.Reader(directory / f"{split}-{kind}")]
            for split in ("train", "val")
            for kind in ("text", "role")
        }
        return summary, documents

    return run


def pairs(count):
    return [{"instruction": f"the cat {number}", "output": f"the dog {number}"} for number in range(count)]


CHAT = (
    Message("system", "the user"),
    Message("context", "the mat"),
    Message("user", "the cat"),
    Message("assistant", "the dog"),
    Message("user", "the log"),
    Message("assistant", "never", learned=False),
    Message("context", "times"),
    Message("user", "12"),
    Message("assistant", "said\nthe user"),
)


@pytest.mark.parametrize("template", TEMPLATES)
def test_what_a_template_teaches_is_what_training_learns(make, tokenizer, template):
    turns = [{"role": m.role, "content": m.text, "loss_weight": int(m.learned)} for m in CHAT]
    summary, documents = make({"a": [{"messages": turns}]}, template=template)
    said = render(CHAT, template, tokenizer)
    assert documents["train-text"] == [list(said.ids)]
    assert summary["train"]["total"]["supervised_tokens"] == sum(said.learned) > 0
    stage = StageConfig(name="sft", mixture="chat", steps=1, batch=1, sequence=len(said.ids))
    tokens, roles = ([np.asarray(documents[f"train-{kind}"][0])] for kind in ("text", "role"))
    batch = Batches(tokens, roles, stage, seed=0, where="here").assemble([0])
    assert batch.learned.tolist() == [at - 1 for at, learned in enumerate(said.learned) if learned]
    assert "never" not in tokenizer.decode(batch.targets.tolist())
    others = {role for role in documents["train-role"][0] if role < SCAFFOLD} - {Role.ASSISTANT}
    assert others == {Role.SYSTEM, Role.CONTEXT, Role.USER}


def test_a_document_is_learned_whole_with_its_end(make, tokenizer):
    summary, documents = make({"a": [{"text": "the cat sat"}]})
    head = [tokenizer.bos_id] if tokenizer.add_bos else []
    ids = [*head, *tokenizer.encode("the cat sat"), tokenizer.eos_id]
    assert documents["train-text"] == [ids]
    assert documents["train-role"] == [[Role.TEXT + SCAFFOLD] * len(head) + [Role.TEXT] * (len(ids) - len(head))]
    assert summary["train"]["total"]["supervised_tokens"] == len(ids) - 1


def test_a_mixture_without_anything_to_learn_is_refused(make):
    with pytest.raises(
        LlameroError, match=r"`chat` has no token to learn: 1 samples; .* left out: 1 × nothing to learn"
    ):
        make({"a": [{"text": ""}]})


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "the cat"}]},
        {"messages": [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A", "loss_weight": 0}]},
    ],
    ids=["no assistant", "weight 0"],
)
def test_a_row_without_an_answer_to_learn_is_an_error_or_a_counted_skip(make, row):
    good = {"messages": [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]}
    with pytest.raises(LlameroError, match=r"a\.jsonl:2: no assistant turn(?s:.*)on_error: skip"):
        make({"a": [good, row]}, out="strict")
    summary, documents = make({"a": [good, *[row] * 3]}, on_error="skip")
    assert summary["train"]["total"]["left_out"] == {"no assistant turn": 3}
    assert summary["train"]["total"]["rows"] == 4
    assert len(documents["train-text"]) == 1


OUT_OF_TURN = {"conversations": [{"from": "gpt", "value": "A"}, {"from": "human", "value": "U"}]}
IN_TURN = {"conversations": [{"from": "human", "value": "U"}, {"from": "gpt", "value": "A"}]}


def test_roles_out_of_order_are_an_error_with_line_and_message(make):
    with pytest.raises(LlameroError, match=r"a\.jsonl:2: assistant speaks after nobody \(in `conversations\.0`\)"):
        make({"a": [IN_TURN, OUT_OF_TURN]})


def test_or_a_counted_skip(make):
    summary, documents = make({"a": [IN_TURN, OUT_OF_TURN, "{"]}, on_error="skip")
    assert summary["train"]["total"]["left_out"] == {"assistant speaks after nobody": 1, "not JSON": 1}
    assert summary["train"]["total"]["rows"] == 3
    assert summary["train"]["total"]["processed"] == 1
    assert len(documents["train-text"]) == 1


def test_short_answers_are_skipped_by_all_tokens_of_their_turns(make, tokenizer):
    """The published pretokenizer counts the markup of assistant turns too."""
    rows = [{"instruction": "the cat", "output": answer} for answer in ("12", "the dog sat on the log")]
    said = [
        render([Message("user", "the cat"), Message("assistant", row["output"])], "chatml", tokenizer) for row in rows
    ]
    lengths = [sum(role % SCAFFOLD == Role.ASSISTANT for role in each.roles) for each in said]
    assert lengths[0] < lengths[1]
    for least, taken in ((lengths[0], 2), (lengths[0] + 1, 1), (lengths[1], 1)):
        summary, _ = make({"a": rows}, least=least, out=str(least) + str(taken))
        total = summary["train"]["total"]
        assert total["accepted"] == taken
        assert total["skipped"] == ({f"fewer than {least} assistant tokens": 1} if taken == 1 else {})


def numbers(documents, tokenizer):
    return [int(tokenizer.decode(ids).split("the dog ")[1].split("<|")[0]) for ids in documents]


def test_validation_takes_its_share_and_gives_the_surplus_back(make, tokenizer):
    summary, documents = make({"a": pairs(400)}, val_split=0.25, out="all")
    train, val = (numbers(documents[f"{split}-text"], tokenizer) for split in ("train", "val"))
    assert sorted(train + val) == list(range(400))
    assert len(val) == 100
    capped, documents = make({"a": pairs(400)}, val_split=0.25, max_val_set=10, out="capped")
    few = numbers(documents["val-text"], tokenizer)
    assert len(few) == 10
    assert set(few) < set(val)
    assert sorted(numbers(documents["train-text"], tokenizer) + few) == list(range(400))
    for made, kept in ((summary, 100), (capped, 10)):
        assert made["val"]["total"]["processed"] == made["val"]["total"]["accepted"] == kept
        assert made["train"]["total"]["processed"] == made["train"]["total"]["accepted"] == 400 - kept


@pytest.mark.parametrize(
    ("weight", "low", "high"), [(1.0, 300, 300), (3.0, 900, 900), (2.5, 720, 780), (0.25, 50, 100)]
)
def test_a_weight_repeats_or_leaves_out(make, tokenizer, weight, low, high):
    summary, documents = make({"a": pairs(300)}, weight=weight)
    written = numbers(documents["train-text"], tokenizer)
    assert low <= len(written) <= high
    copies = {written.count(number) for number in range(300)}
    assert copies <= {int(weight), int(weight) + (weight % 1 > 0)}
    total = summary["train"]["total"]
    assert total["processed"] == 300  # samples read, however often each is taken
    assert total["accepted"] == len(set(written))
    assert total["accepted"] + total["repeated"] == len(written)
    assert total["skipped"] == ({"left out by weight": 300 - len(set(written))} if weight < 1 else {})
    assert total["tokens"] == sum(map(len, documents["train-text"]))


def test_validation_is_never_repeated(make, tokenizer):
    _, documents = make({"a": pairs(100)}, weight=3, val_split=0.3)
    val = numbers(documents["val-text"], tokenizer)
    assert len(val) == len(set(val)) > 10
    assert not set(val) & set(numbers(documents["train-text"], tokenizer))


def test_the_statistics_add_up_and_are_written(make, tmp_path):
    rows = {"a": [*pairs(20), "{", {"instruction": "I"}], "b": [*pairs(9), {"instruction": "I", "output": " "}]}
    summary, documents = make(rows, on_error="skip", val_split=0.2, weight=1.5)
    assert json.loads((tmp_path / "out/stats.json").read_text()) == summary
    for split in ("train", "val"):
        parts, total = summary[split]["sources"], summary[split]["total"]
        assert [part["layout"] for part in parts] == ["alpaca", "alpaca"]
        for key in ("processed", "accepted", "repeated", "tokens", "supervised_tokens"):
            assert total[key] == sum(part[key] for part in parts)
        for part in [*parts, total]:
            assert part["processed"] == part["accepted"] + sum(part["skipped"].values())
        lengths = [len(ids) for ids in documents[f"{split}-text"]]
        assert total["tokens"] == sum(lengths)
        assert (total["min_tokens"], total["max_tokens"]) == (min(lengths), max(lengths))
        roles = chain.from_iterable(documents[f"{split}-role"])
        assert total["supervised_tokens"] == sum(role == Role.ASSISTANT for role in roles)
        text = (tmp_path / f"out/{split}_stats.txt").read_text()
        assert f"Accepted: {total['accepted']}/{total['processed']} (" in text
    processed = sum(summary[split]["total"]["processed"] for split in ("train", "val"))
    left_out = sum(summary["train"]["total"]["left_out"].values())
    assert processed + left_out == summary["train"]["total"]["rows"] == sum(map(len, rows.values()))


def test_the_same_seed_gives_the_same_bytes_and_another_another_split(make, tmp_path):
    for out, seed in (("first", 1), ("again", 1), ("other", 2)):
        make({"a": pairs(60)}, seed=seed, val_split=0.3, weight=1.5, out=out)
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    first, again, other = (
        {name: (tmp_path / out / name).read_bytes() for name in names} for out in ("first", "again", "other")
    )
    assert first == again
    assert first["train-text.bin"] != other["train-text.bin"]


FULL = """
import json, resource, sys
from pathlib import Path
from llamero.core import artifact
from llamero.core.errors import LlameroError
from llamero.data.config import DataConfig, MixtureConfig
from llamero.data.run import tokenize_mixture
from llamero.data.vocabulary import prepare_tokenizer
tokenizer, root = Path(sys.argv[1]), Path(sys.argv[2])
mixture = MixtureConfig.model_validate({"sources": [{"source": "a", "path": "a.jsonl"}]})
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
for name in ("tokenizer", "data"):
    try:
        with artifact.build(root / "runs", artifact.Identity(name, name, {}, {})) as build:
            if name == "tokenizer":
                prepare_tokenizer(DataConfig(), tokenizer, template="chatml", root=root, out=build.path)
            else:
                tokenize_mixture(
                    "chat", mixture, tokenizer=tokenizer, template="chatml", root=root, seed=1, out=build.path
                )
    except LlameroError as error:
        sys.stdout.write(str(error) + "|")
"""


def test_a_full_disk_is_named_and_nothing_half_done_looks_finished(tmp_path, tokenizer_files):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in pairs(1000)))
    command = [sys.executable, "-c", FULL, str(tokenizer_files), str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("|")
    assert [f"{tmp_path}/runs/{name}-" in text for name, text in zip(("tokenizer", "data"), said, strict=False)] == [
        True
    ] * 2
    assert all("no room to write" in text and "free some space" in text for text in said[:2])
    assert all(path.suffix == ".partial" for path in (tmp_path / "runs").iterdir())


def test_a_tokenizer_can_be_trained_on_a_mixture(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in pairs(30)))
    mixture = {"sources": [{"source": "a", "path": "a.jsonl"}]}
    data = DataConfig.model_validate(
        {"mixtures": {"chat": mixture}, "extra_tokens": ["<|im_start|>", "<|im_end|>", "<PAD>"]}
    )
    start, out = VocabularyConfig(size=265, mixture="chat"), tmp_path / "tokenizer"
    out.mkdir()
    said = prepare_tokenizer(data, start, template="chatml", root=tmp_path, out=out)
    tokenizer = load_tokenizer(out)
    assert said["size"] == len(tokenizer) == said["base_size"] + 3
    assert list(said["extra_tokens"].values()) == list(range(said["base_size"], said["size"]))
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == tokenizer.id("<|im_end|>")
    assert "im_start" in (out / "chat_template.jinja").read_text()
    special = json.loads((out / "special_tokens.json").read_text())
    assert special["<PAD>"] == tokenizer.id("<PAD>")


def test_the_source_of_every_document_is_known_afterwards(make, tmp_path, tokenizer):
    rows = {
        "cats": [{"instruction": f"the cat {number}", "output": "the dog"} for number in range(7)],
        "logs": [{"instruction": f"the log {number}", "output": "the mat"} for number in range(5)],
    }
    make(rows, val_split=0.3, fraction=1.0)
    dataset = Dataset(tmp_path / "out")
    for split in ("train", "val"):
        sources, tokens = dataset.sources(split), dataset.tokens(split)
        assert sources is not None
        assert sources.names == ("cats", "logs")
        said = [tokenizer.decode(document.tolist()) for document in tokens]
        assert [int("the log" in text) for text in said] == sources.of(np.arange(len(said))).tolist()
        assert {"the cat" in text for text in said} == {True, False}
