from collections import Counter

from llamero.data import stats
from llamero.data.stats import SourceStats


def sample_stats():
    part = SourceStats("alpaca", "alpaca")
    part.add(10, 4)
    part.add(30, 6, copies=3)
    part.skipped["nothing to learn"] += 2
    return part


def test_copies_count_as_tokens_but_not_as_samples_read():
    part = sample_stats()
    assert (part.accepted, part.repeated, part.documents, part.processed) == (2, 2, 4, 4)
    assert (part.tokens, part.supervised_tokens) == (10 + 3 * 30, 4 + 3 * 6)
    assert (part.shortest, part.longest) == (10, 30)


def test_the_text_is_laid_out_like_the_open_assistant_pretokenizers():
    text = stats.text("chat-train", [sample_stats()])
    block = (
        "-----------------\n"
        "  Accepted: 2/4 (50.0%)\n"
        "  Repeated: 2\n"
        "  Accepted tokens: 100\n"
        "  Supervised tokens: 22\n"
        "  Skipped: 2 (50.0%)\n"
        "    nothing to learn: 2\n"
        "  Min tokens per sample: 10\n"
        "  Max tokens per sample: 30\n"
        "  Avg tokens per sample: 25.0\n"
        "-----------------\n"
    )
    assert text == (
        f"\n# Stats for chat-train*\n\n## Stats for 'alpaca' (4 samples)\n{block}"
        f"\n## Stats for 'total' (4 samples)\n{block}"
    )


def test_nothing_at_all_can_be_printed():
    assert "Accepted: 0/0 (0.0%)" in stats.text("chat-val", [SourceStats("a")])
    assert SourceStats("a").to_json()["avg_tokens"] is None


def test_the_total_is_the_sum_of_its_parts():
    other = SourceStats("lima")
    other.add(5, 5)
    other.skipped["nothing to learn"] += 1
    other.skipped["`output` is missing"] += 1
    whole = stats.total([sample_stats(), other, SourceStats("empty")])
    assert (whole.accepted, whole.repeated, whole.tokens, whole.supervised_tokens) == (3, 2, 105, 27)
    assert whole.skipped == Counter({"nothing to learn": 3, "`output` is missing": 1})
    assert (whole.shortest, whole.longest, whole.processed) == (5, 30, 7)
