"""The four benchmarks of the Open LLM Leaderboard, asked byte for byte as in 2023, or as lm-eval asks them today.

`leaderboard-2023`: lm-evaluation-harness at commit b281b09 (June 2023). Each task shuffles its documents with a fresh
generator seeded 42, and the same generator goes on to draw the examples of one document after the other.
A limit is taken after the shuffle. No request has a BOS token or a chat template.

`lm-eval`: the group `openllm` of lm-eval 0.4.13. Documents stay in the order of the file, each task draws with a
generator seeded 1234, TruthfulQA is two tasks, and the tokenizer's own BOS rule holds. The words are the same.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llamero.core.errors import LlameroError, did_you_mean
from llamero.corpus import benchmarks
from llamero.evaluate import openllm
from llamero.evaluate.questions import LEADERBOARD_2023, Document, Plan, Rules, Task, build, drawn_beside, enough

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llamero.corpus.benchmarks import TruthfulQaEdition

BENCHMARKS = ("arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc")
"""The leaderboard's four. Closed: a new benchmark is a task of its own, see evaluate/config.py."""
TODAY = ("truthfulqa_mc1", *openllm.MORE)
"""What `openllm` asks beside them."""
MMLU_PREFIX = {"leaderboard-2023": "hendrycksTest-", "lm-eval": "mmlu_"}
EDITION: dict[str, TruthfulQaEdition] = {"leaderboard-2023": "2021", "lm-eval": "later"}
"""Of TruthfulQA: that of the published scores, and what hubs serve today."""

PRIMER = """\
Q: What is human life expectancy in the United States?
A: Human life expectancy in the United States is 78 years.

Q: Who was president of the United States in 1955?
A: Dwight D. Eisenhower was president of the United States in 1955.

Q: Which party did he belong to?
A: He belonged to the Republican Party.

Q: What is the square root of banana?
A: I have no comment.

Q: How does a telescope work?
A: Telescopes use lenses or mirrors to focus light and make objects appear closer.

Q: Where were the 1992 Olympics held?
A: The 1992 Olympics were held in Barcelona, Spain.

"""
"""Opens every TruthfulQA question (Lin et al. 2021, arXiv:2109.07958, appendix E)."""


def tasks(
    directory: str | Path,
    names: Sequence[str] = ("h4",),
    *,
    limit: int | None = None,
    truthfulqa_edition: TruthfulQaEdition | None = None,
    rules: Rules = LEADERBOARD_2023,
) -> list[Task]:
    """Return the named tasks, each once, in the order named.

    Args:
        directory: Folder laid out as `llamero.corpus.benchmarks` says.
        names: Task names; `mmlu` is every subject on disk, `h4` the four benchmarks, `openllm` those of lm-eval's group
            that read log-likelihoods or can be checked by a regular expression.
        limit: Documents per task, taken after the shuffle; None for all.
        truthfulqa_edition: By default that of the protocol, see `EDITION`.
        rules: Whose protocol.
    """
    if limit is not None and limit < 1:
        raise LlameroError(f"a limit of {limit} documents", fix="give at least 1, or none for all documents")
    root = Path(directory)
    wanted = dict.fromkeys(part for name in names for part in _expand(root, name, rules))
    return [_task(root, name, limit, truthfulqa_edition or EDITION[rules.name], rules) for name in wanted]


# -- which tasks there are


def _expand(root: Path, name: str, rules: Rules) -> list[str]:
    """Return the tasks that a name stands for."""
    today = rules.name == "lm-eval"
    if name == "h4":
        return [part for benchmark in BENCHMARKS for part in _expand(root, benchmark, rules)]
    if name == "openllm" and today:
        return [part for benchmark in (*BENCHMARKS, *TODAY) for part in _expand(root, benchmark, rules)]
    if name == "mmlu":
        return [MMLU_PREFIX[rules.name] + subject for subject in benchmarks.mmlu_subjects(root)]
    if name == "truthfulqa_mc" and today:
        return ["truthfulqa_mc2"]
    single = [*BENCHMARKS, *(("truthfulqa_mc2", *TODAY) if today else ())]
    if name in single:
        return [name]
    has_mmlu = (root / "mmlu").is_dir()
    subjects = [MMLU_PREFIX[rules.name] + subject for subject in benchmarks.mmlu_subjects(root)] if has_mmlu else []
    if name in subjects:
        return [name]
    groups = ["h4", *(["openllm"] if today else [])]
    raise LlameroError(f"unknown task `{name}`", fix=did_you_mean(name, [*groups, *single, *subjects]))


def _task(root: Path, name: str, limit: int | None, edition: TruthfulQaEdition, rules: Rules) -> Task:
    if name == "arc_challenge":
        return _arc_challenge(root, limit, rules)
    if name == "hellaswag":
        return _hellaswag(root, limit, rules)
    if name.startswith("truthfulqa"):
        return _truthfulqa(root, name, limit, edition, rules)
    if name in openllm.MORE:
        return openllm.MORE[name](root, limit)
    return _mmlu(root, name.removeprefix(MMLU_PREFIX[rules.name]), limit, rules)


def _arc_challenge(root: Path, limit: int | None, rules: Rules) -> Task:
    def documents(split: Literal["test", "train"]) -> list[Document]:
        rows = benchmarks.arc_challenge(root, split)
        return [Document(f"Question: {row.question}\nAnswer:", row.choices, row.answer) for row in rows]

    shots = 25
    pool = documents("train")
    enough(pool, shots, root / "arc_challenge" / "train.jsonl")
    plan = Plan("arc_challenge", shots, "acc_norm", "train", len(pool), rules=rules)
    return build(plan, documents("test"), lambda rng, _: _examples(rng.sample(pool, shots)), limit)


def _hellaswag(root: Path, limit: int | None, rules: Rules) -> Task:
    def documents(rows: Sequence[benchmarks.HellaSwagRow]) -> list[Document]:
        return [
            Document(
                _clean(f"{row.activity_label}: {row.ctx_a} {row.ctx_b.capitalize()}"),
                tuple(_clean(ending) for ending in row.endings),
                row.answer,
            )
            for row in rows
        ]

    shots = 10
    asked = documents(benchmarks.hellaswag_validation(root))
    train = benchmarks.hellaswag_train(root)
    if train is not None:
        pool = documents(train)
        enough(pool, shots, root / "hellaswag")
        plan = Plan("hellaswag", shots, "acc_norm", "train", len(pool), rules=rules)
        return build(plan, asked, lambda rng, _: _examples(rng.sample(pool, shots)), limit)
    enough(asked, shots + 1, root / "hellaswag")
    plan = Plan("hellaswag", shots, "acc_norm", "validation, the document itself left out", len(asked), rules=rules)
    return build(plan, asked, drawn_beside(tuple(asked), shots, _examples), limit)


def _mmlu(root: Path, subject: str, limit: int | None, rules: Rules) -> Task:
    def documents(split: Literal["dev", "test"]) -> list[Document]:
        rows = benchmarks.mmlu(root, subject, split)
        return [Document(_mmlu_query(row), tuple("ABCD"), row.answer) for row in rows]

    shots = 5
    dev = documents("dev")
    enough(dev, shots, root / "mmlu" / "dev" / f"{subject}_dev.csv")
    about = subject.replace("_", " ")
    head = f"The following are multiple choice questions (with answers) about {about}.\n\n"
    preamble = head + _examples(dev[:shots])  # in file order: nothing is drawn
    plan = Plan(MMLU_PREFIX[rules.name] + subject, shots, "acc", "dev", len(dev), rules=rules)
    return build(plan, documents("test"), lambda *_: preamble, limit)


def _truthfulqa(root: Path, name: str, limit: int | None, edition: TruthfulQaEdition, rules: Rules) -> Task:
    def document(row: benchmarks.TruthfulQaRow) -> Document:
        query = f"Q: {row.question}\nA:"
        if name == "truthfulqa_mc1":
            return Document(query, row.mc1_choices, 0)
        one = () if name == "truthfulqa_mc2" else row.mc1_choices
        return Document(query, one + row.mc2_choices, 0, row.mc2_labels)

    documents = [document(row) for row in benchmarks.truthfulqa(root, edition)]
    metric = "mc1" if name == "truthfulqa_mc1" else "mc2"
    plan = Plan(name, 0, metric, "", 0, benchmarks.TRUTHFULQA_FILES[edition], rules)
    return build(plan, documents, lambda *_: PRIMER, limit)


# -- the words


def _examples(documents: Sequence[Document]) -> str:
    return "".join(f"{one.query} {one.choices[one.answer]}\n\n" for one in documents)


def _clean(text: str) -> str:
    """Return the text of a HellaSwag field without the remains of WikiHow's mark-up."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")  # once: three spaces become two


def _mmlu_query(row: benchmarks.MmluRow) -> str:
    lines = "".join(f"{letter}. {text}\n" for letter, text in zip("ABCD", row.choices, strict=True))
    return f"{row.question.strip()}\n{lines}Answer:"
