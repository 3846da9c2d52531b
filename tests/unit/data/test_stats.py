import json
import math
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamero.core.errors import LlameroError
from llamero.data import stats
from llamero.data.stats import Block, Lengths, SourceStats, Stats

CARD = Path(os.environ.get("LLAMERO_SHARED", Path(__file__).parents[4] / "shared")) / (
    "cards/llama2-70b-oasst-sft-v10-gptq.md"
)
PUBLISHED = """
# Stats for output/oasst_top1_2023-07-23_llama2/oasst_top1-train*

## Stats for 'ListDataset' (11441 samples (100.0%))
-----------------
  Accepted: 11441/11441 (100.0%)
  Accepted tokens: 5315368
  Skipped: 0 (0.0%)
  Min tokens per sample: 20
  Max tokens per sample: 5407
  Avg tokens per sample: 464.58945896337735
-----------------

## Stats for 'Subset of InstructionDataset (megacode2)' (466364 samples (50.0%))
-----------------
  Accepted: 398223/466364 (85.4%)
  Accepted tokens: 167676873
  Skipped: 68141 (14.6%)
  Min tokens per sample: 36
  Max tokens per sample: 11810
  Avg tokens per sample: 421.063
-----------------

"""


def sample_stats():
    part = SourceStats("alpaca", "alpaca", samples=4, rows=7, fraction=0.5)
    part.add(10, 4, turns=1, language="en")
    part.add(30, 6, copies=3, unknown=1, turns=2, language="de")
    part.skip("nothing to learn", 5)
    part.skip("nothing to learn", 6)
    part.leave_out("refusal")
    part.leave_out("duplicate", 2)
    return part


def test_the_published_layout_is_read_and_written_character_for_character():
    read = stats.parse(PUBLISHED)
    assert read.title == "output/oasst_top1_2023-07-23_llama2/oasst_top1-train*"
    assert read.blocks[1] == Block(
        name="Subset of InstructionDataset (megacode2)",
        samples=466364,
        fraction=0.5,
        accepted=398223,
        processed=466364,
        accepted_tokens=167676873,
        skipped=68141,
        shortest=36,
        longest=11810,
        average=421.063,
    )
    assert stats.text(read) == PUBLISHED


def test_the_seven_blocks_of_the_card_come_back_character_for_character():
    if not CARD.exists():
        pytest.skip(f"no card at {CARD} (set LLAMERO_SHARED)")
    parts = [part for part in CARD.read_text().split("```") if part.startswith("\n# Stats for")]
    blocks = [block for part in parts for block in stats.parse(part).blocks]
    assert len(parts) == 2
    assert len(blocks) == 7
    assert {421.063, 464.58945896337735} <= {block.average for block in blocks}
    for part in parts:
        assert stats.text(stats.parse(part)) == f"{part}\n"  # the card leaves out the empty line at the end


def test_a_sample_is_counted_once_and_its_tokens_with_every_copy():
    part = sample_stats()
    assert (part.accepted, part.repeated, part.documents, part.processed) == (2, 2, 4, 4)
    assert (part.tokens, part.supervised_tokens, part.unknown_tokens) == (10 + 3 * 30, 4 + 3 * 6, 3)
    assert (part.turns, part.languages) == (1 + 3 * 2, Counter(en=1, de=1))
    assert (part.shortest, part.longest) == (10, 30)


def test_tokens_of_skipped_samples_are_added_up():
    assert sample_stats().skipped_tokens == 11


def test_the_text_says_what_the_counts_say():
    assert stats.text(Stats("chat-train*", (sample_stats().block(),))) == (
        "\n# Stats for chat-train*\n\n"
        "## Stats for 'alpaca' (4 samples (50.0%))\n"
        "-----------------\n"
        "  Accepted: 2/4 (50.0%)\n"
        "  Accepted tokens: 100\n"
        "  Skipped: 2 (50.0%)\n"
        "  Min tokens per sample: 10\n"
        "  Max tokens per sample: 30\n"
        "  Avg tokens per sample: 25.0\n"
        "-----------------\n\n"
    )


def test_a_source_of_which_nothing_is_accepted_divides_by_nothing():
    part = SourceStats("a")
    assert "  Accepted: 0/0 (0.0%)\n" in part.block().to_text()
    assert "  Avg tokens per sample: 0.0\n" in part.block().to_text()
    assert (part.to_json()["avg_tokens"], part.to_json()["p50"]) == (None, None)


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        ("no statistics at all", "no statistics"),
        (PUBLISHED.replace("Skipped: 68141 (14.6%)", "Skipped: many"), "'Subset of InstructionDataset (megacode2)'"),
    ],
)
def test_what_is_not_in_the_layout_is_refused(broken, problem):
    with pytest.raises(LlameroError) as error:
        stats.parse(broken)
    assert problem in str(error.value)


NUMBERS = st.integers(0, 10**12)
COUNTERS = st.dictionaries(st.text(max_size=5), st.integers(1, 10**9)).map(Counter)
SHARES = st.integers(0, 1000).map(lambda tenths: tenths / 1000)


@st.composite
def some_stats(draw):
    part = SourceStats(draw(st.text(max_size=9)), draw(st.text(max_size=9)), draw(SHARES), draw(NUMBERS))
    for tokens, copies, language in draw(
        st.lists(st.tuples(st.integers(1, 10**7), st.integers(1, 3), st.sampled_from(["", "en", "ru"])))
    ):
        part.add(tokens, tokens // 2, copies=copies, turns=2, language=language)
    for reason, count in draw(COUNTERS).items():
        part.leave_out(reason, count)
    for reason in draw(st.lists(st.text(max_size=5), max_size=4)):
        part.skip(reason, draw(NUMBERS))
    part.samples = part.processed
    return part


@given(some_stats())
def test_counts_survive_json(part):
    assert SourceStats.from_json(json.loads(json.dumps(part.to_json(), sort_keys=True))) == part


@given(st.lists(some_stats().filter(lambda part: part.name.isprintable()), min_size=1))
def test_every_text_is_read_back(parts):
    said = stats.published("title*", parts)
    back = stats.parse(stats.text(said))
    assert [(b.name, b.accepted, b.average) for b in back.blocks] == [
        (b.name, b.accepted, b.average) for b in said.blocks
    ]
    assert stats.text(back) == stats.text(said)


@given(st.integers(0, 2**40))
def test_every_length_lies_in_its_step_which_is_at_most_a_quarter_wide(tokens):
    lengths = Lengths()
    lengths.add(tokens)
    (bar,) = lengths.bars()
    assert bar.start <= tokens < bar.stop
    assert bar.stop - bar.start <= max(1, bar.start / 4)


@given(st.lists(st.integers(1, 10**5), min_size=1), st.floats(0, 1))
def test_a_quantile_lies_in_the_step_of_the_true_one(lengths, share):
    part = SourceStats("a")
    for tokens in lengths:
        part.add(tokens, 0)
    true = sorted(lengths)[max(1, math.ceil(share * len(lengths))) - 1]
    (bar,) = [bar for bar in part.lengths.bars() if bar.start <= true < bar.stop]
    assert bar.start <= part.quantile(share) < bar.stop
    assert part.shortest <= part.quantile(share) <= part.longest


def test_bars_cover_the_gap_between_short_and_long():
    lengths = Lengths()
    lengths.add(3, 2)
    lengths.add(8)
    assert [tuple(bar) for bar in lengths.bars()] == [(3, 4, 2), (4, 5, 0), (5, 6, 0), (6, 7, 0), (7, 8, 0), (8, 10, 1)]
    assert Lengths.from_json(lengths.to_json()) == lengths
    assert Lengths().bars() == []


def test_the_total_is_the_sum_of_its_parts():
    other = SourceStats("lima", samples=3, rows=3)
    other.add(5, 5, language="en")
    other.skip("nothing to learn")
    other.skip("`output` is missing")
    whole = stats.total([sample_stats(), other, SourceStats("empty")])
    assert (whole.accepted, whole.repeated, whole.tokens, whole.supervised_tokens) == (3, 2, 105, 27)
    assert whole.skipped == Counter({"nothing to learn": 3, "`output` is missing": 1})
    assert whole.left_out == Counter(refusal=1, duplicate=2)
    assert whole.languages == Counter(en=2, de=1)
    assert (whole.shortest, whole.longest, whole.processed, whole.samples, whole.rows) == (5, 30, 7, 7, 10)
    assert whole.fraction == 1.0
    assert sum(bar.documents for bar in whole.lengths.bars()) == whole.documents == 5
