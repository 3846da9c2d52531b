"""A mixture that extends another has the other's sources and keys, and every error says where its key stands."""

import pytest

from llamero.core.errors import LlameroError
from llamero.recipe.load import load

HEAD = "name: small\nbase: owner/model\ndata:\n  mixtures:\n"
BASE = """\
    base:
      min_assistant_tokens: 25
      max_tokens: 4096
      sources:
        - {source: code, path: code.jsonl, fraction: 0.5, val_split: 0.01}
        - {source: chats, hub: owner/chats, weight: 2}
"""


@pytest.fixture
def mixture(tmp_path):
    """Write the mixtures of a recipe, and return one of them as it is after all."""

    def loaded(text, *overrides, name="mine", also=()):
        for path, content in dict(also).items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(content)
        (tmp_path / "recipe.yaml").write_text(HEAD + text)
        return load(tmp_path / "recipe.yaml", overrides).data.mixtures[name]

    return loaded


def said(mixture):
    return mixture.model_dump(exclude_defaults=True)


def test_a_mixture_alone_is_what_it_says(mixture):
    assert said(mixture(BASE, name="base"))["min_assistant_tokens"] == 25


def test_sources_of_the_base_come_first_and_own_keys_win(mixture):
    own = BASE + "    mine: {extends: base, max_tokens: 99, sources: [{source: more, path: more.jsonl}]}\n"
    found = mixture(own)
    assert [source.source for source in found.sources] == ["code", "chats", "more"]
    assert (found.min_assistant_tokens, found.max_tokens) == (25, 99)
    assert said(found.sources[0]) == said(mixture(own, name="base").sources[0])


def test_a_source_of_the_base_is_changed_in_place_key_by_key(mixture):
    found = mixture(BASE + "    mine: {extends: base, sources: [{source: chats, hub: null, path: local.json}]}\n")
    assert [said(source) for source in found.sources] == [
        {"source": "code", "path": "code.jsonl", "fraction": 0.5, "val_split": 0.01},
        {"source": "chats", "path": "local.json", "weight": 2.0},
    ]


def test_null_takes_a_key_away_and_extends_nothing(mixture):
    assert mixture(BASE + "    mine: {extends: base, max_tokens: null}\n").max_tokens is None
    found = mixture(BASE + "    mine: {extends: null, sources: [{source: a, path: a}]}\n")
    assert said(found) == {"sources": [{"source": "a", "path": "a"}]}


def test_the_order_of_mixtures_does_not_matter(mixture):
    own = "    mine: {extends: base, max_tokens: 99}\n"
    assert mixture(own + BASE) == mixture(BASE + own)


def test_of_several_bases_the_later_wins(mixture):
    other = "    other: {max_tokens: 7, sources: [{source: code, path: new.jsonl}, {toy_world: documents, count: 3}]}\n"
    found = mixture(BASE + other + "    mine: {extends: [base, other]}\n")
    assert [source.source for source in found.sources] == ["code", "chats", "toy_world documents"]
    assert said(found.sources[0])["path"] == "new.jsonl"
    assert (found.sources[0].fraction, found.max_tokens, found.min_assistant_tokens) == (0.5, 7, 25)


def test_a_base_may_extend_a_base(mixture):
    chain = "    middle: {extends: base, max_tokens: 7}\n    mine: {extends: middle, min_assistant_tokens: 1}\n"
    found = mixture(BASE + chain)
    assert (found.max_tokens, found.min_assistant_tokens, len(found.sources)) == (7, 1, 2)


def test_toy_worlds_are_known_by_their_kind(mixture):
    base = "    base: {sources: [{toy_world: documents, count: 3}, {toy_world: conversations, count: 4}]}\n"
    found = mixture(base + "    mine: {extends: base, sources: [{toy_world: conversations, seed: 9}]}\n")
    assert [(source.count, source.seed) for source in found.sources] == [(3, 1), (4, 9)]


OTHER = """\
data:
  mixtures:
    theirs:
      extends: deeper
      decontaminate: {against: {gsm8k: tests/gsm8k, mmlu: /data/mmlu}}
      sources:
        - {source: code, path: rows/code.jsonl, refusals: phrases.txt}
        - {source: chats, hub: owner/chats, refusals: true}
        - {source: there, path: /data/there.jsonl}
    deeper:
      extends: ../shelf/third.yaml#third
      max_tokens: 12
"""
THIRD = "data: {mixtures: {third: {sources: [{source: books, path: books.txt}]}}}\n"


def test_a_mixture_of_another_file_still_points_at_its_files(mixture):
    also = {"../other/recipe.yaml": OTHER, "../shelf/third.yaml": THIRD}
    found = mixture("    mine: {extends: ../other/recipe.yaml#theirs}\n", also=also)
    assert [said(source) for source in found.sources] == [
        {"source": "books", "path": "../shelf/books.txt"},
        {"source": "code", "path": "../other/rows/code.jsonl", "refusals": "../other/phrases.txt"},
        {"source": "chats", "hub": "owner/chats", "refusals": True},
        {"source": "there", "path": "/data/there.jsonl"},
    ]
    assert found.decontaminate.against == {"gsm8k": "../other/tests/gsm8k", "mmlu": "/data/mmlu"}
    assert found.max_tokens == 12


def test_every_file_that_a_source_reads_is_moved_with_it(mixture):
    """A new key for a file has to be named in compose.py: this is what would notice."""
    keys = "source: code, path: a.jsonl, refusals: phrases.txt"
    also = {"../other/recipe.yaml": f"data: {{mixtures: {{theirs: {{sources: [{{{keys}}}]}}}}}}"}
    (source,) = mixture("    mine: {extends: ../other/recipe.yaml#theirs}\n", also=also).sources
    assert all(path.startswith("../other/") for path in source.files.values())


def test_a_file_beside_it_changes_no_path(mixture):
    also = {"third.yaml": THIRD}
    (source,) = mixture("    mine: {extends: third.yaml#third}\n", also=also).sources
    assert said(source) == {"source": "books", "path": "books.txt"}


def test_an_override_reaches_an_inherited_source(mixture):
    found = mixture(BASE + "    mine: {extends: base}\n", "data.mixtures.mine.sources.code.path=here.jsonl")
    assert found.sources[0].path == "here.jsonl"
    assert found.sources[0].fraction == 0.5


def test_what_a_mixture_extends_cannot_be_overridden(mixture):
    with pytest.raises(LlameroError, match="stands in its recipe"):
        mixture(BASE, "data.mixtures.base.extends=other")


def test_yaml_anchors_go_on_working(mixture):
    base = "    base: &base {max_tokens: 5, sources: [{source: a, path: a}]}\n"
    found = mixture(base + "    mine: {<<: *base, max_tokens: 6}\n")
    assert (found.max_tokens, found.sources[0].source) == (6, "a")
    assert mixture(base + "    middle: {extends: base}\n    mine: {<<: *base, extends: middle}\n").max_tokens == 5


WRONG = [
    ("    mine: {extends: bas}\n", 11, "there is no mixture `bas` to extend", "did you mean `base`?"),
    ("    mine:\n      extends: [base,\n        gone.yaml#x]\n", 13, "there is no recipe", "relative to the recipe"),
    ("    mine: {extends: third.yaml#tird}\n", 11, "no mixture `tird` in third.yaml", "did you mean `third`?"),
    ("    mine: {extends: third.yaml}\n", 11, "which mixture of third.yaml?", "`extends: third.yaml#name`"),
    ("    mine: {extends: 3}\n", 11, "`extends` names a mixture", "write `extends: name`"),
    ("    mine: {extends: [[base]]}\n", 11, "`extends` names a mixture", "write `extends: name`"),
    ("    mine: {extends: mine}\n", 11, "extend each other: mine → mine", "take one `extends` away"),
    ("    mine: {extends: b}\n    b: {extends: mine}\n", 12, "each other: mine → b → mine", "take one `extends` away"),
    ("    mine: {extends: nothing}\n    nothing:\n", 12, "mixture `nothing` holds nothing", None),
    ("    mine: {extend: base}\n", 11, "mine.extend: unknown key", "did you mean `extends`?"),
    ("    mine: {extends: base, sources: null}\n", 11, "mine.sources: field required", "add `sources`"),
    ("    mine: {extends: base, sources: [{source: a, path: a}, {source: a, path: b}]}\n", 11, "two sources are", None),
    ("    mine: {extends: base, sources: [{source: code}, {source: code, path: b}]}\n", 11, "two sources are", None),
    ("    mine:\n      extends: base\n      max_tokens: -1\n", 13, "mine.max_tokens: input should be greater", None),
    ("    mine:\n      extends: base\n      sources:\n        - {source: code, fraction: 2}\n", 14, "fraction: ", None),
]


@pytest.mark.parametrize(("text", "line", "problem", "fix"), WRONG, ids=[case[2] for case in WRONG])
def test_a_mistake_is_named_with_its_line_and_the_way_out(mixture, tmp_path, text, line, problem, fix):
    with pytest.raises(LlameroError) as caught:
        mixture(BASE + text, also={"third.yaml": THIRD})
    assert problem in caught.value.problem
    assert caught.value.where == f"{tmp_path / 'recipe.yaml'}:{line}"
    assert fix is None or fix in str(caught.value.fix)


def test_a_mistake_in_an_inherited_key_is_named_in_the_file_where_it_stands(mixture, tmp_path):
    third = (
        "data:\n  mixtures:\n    third:\n      max_tokens: 5\n      sources:\n        - source: x\n          path: 7\n"
    )
    with pytest.raises(LlameroError, match=r"mine.sources.0.path: input should be a valid string") as caught:
        mixture("    mine: {extends: third.yaml#third}\n", also={"third.yaml": third})
    assert caught.value.where == f"{tmp_path / 'third.yaml'}:7"


def test_files_that_extend_each_other_are_refused(mixture, tmp_path):
    also = {"a.yaml": "data: {mixtures: {a: {extends: recipe.yaml#mine}}}\n"}
    with pytest.raises(LlameroError, match="mine → a → mine") as caught:
        mixture("    mine: {extends: a.yaml#a}\n", also=also)
    assert caught.value.where == f"{tmp_path / 'a.yaml'}:1"
