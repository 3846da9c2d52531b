import pytest

from llamero.core.results import Result
from llamero.publish.measurements import category_tables, score_table, series

LABELS = {"base": "base", "sft": "**mine**", "gptq": "gptq"}


def arc(model, value, **inputs):
    return Result("arc_challenge", model, {"acc_norm": value, "acc_norm_stderr": 0.013, "acc": 0.1}, "25-shot", inputs)


def test_shares_are_percent_with_their_standard_error():
    table = score_table(series([arc("sft", 0.7108), arc("base", 0.5)]), LABELS)
    assert table is not None
    assert table.splitlines() == [
        "| Model | ARC |",
        "| --- | ---: |",
        "| base | 50.00 ± 1.30 |",
        "| **mine** | 71.08 ± 1.30 |",
    ]


def test_columns_stand_in_the_order_of_the_leaderboard():
    results = [Result("mmlu", "sft", {"acc": 0.7}, "5-shot"), arc("sft", 0.7)]
    results += [Result("h4", "sft", {"average": 0.73}, "mean of the four")]
    table = score_table(series(results), LABELS)
    assert table is not None
    assert table.startswith("| Model | H4 average | ARC | MMLU |")


def test_a_model_that_was_not_measured_has_no_row():
    assert "gptq" not in str(score_table(series([arc("sft", 0.7)]), LABELS))
    assert score_table([], LABELS) is None


def test_what_was_measured_differently_is_no_column_of_its_neighbour():
    parts = series([arc("base", 0.5, limit=10), arc("sft", 0.7, limit=20), arc("gptq", 0.6, limit=20, tokenizer="t")])
    assert [(part.title, sorted(part.results)) for part in parts] == [("ARC 1", ["base"]), ("ARC 2", ["gptq", "sft"])]
    assert [part.protocol for part in parts] == ["25-shot; limit 10", "25-shot; limit 20"]


def test_each_text_has_its_perplexity():
    results = [Result("perplexity", "sft", {"perplexity": 5.68}, "w", {"text": text}) for text in ("wiki", "c4")]
    table = score_table(series(results), LABELS)
    assert table is not None
    assert table.splitlines()[0] == "| Model | Perplexity (wiki) | Perplexity (c4) |"
    assert table.splitlines()[2] == "| **mine** | 5.680 | 5.680 |"


def test_categories_get_a_table_of_their_own():
    metrics = {"accuracy": 0.9, "accuracy/facts": 1.0, "accuracy/sums": 0.8, "accuracy/sums_stderr": 0.01}
    results = [Result("toy_world", "sft", metrics, "p"), Result("toy_world", "base", {"accuracy": 0.2}, "p")]
    tables = category_tables(series(results), LABELS)
    assert list(tables) == ["Toy world"]
    assert tables["Toy world"].splitlines() == [
        "| Model | facts | sums |",
        "| --- | ---: | ---: |",
        "| base | – | – |",
        "| **mine** | 100.00 | 80.00 ± 1.00 |",
    ]


def test_notes_are_said_once():
    results = [Result("mmlu", model, {"acc": 0.5}, "5-shot", {}, ("3 subjects missing",)) for model in ("base", "sft")]
    assert series(results)[0].notes == ["3 subjects missing"]


def test_two_different_results_of_one_thing_are_a_mistake():
    with pytest.raises(ValueError, match="two different results of arc_challenge of sft"):
        series([arc("sft", 0.7), arc("sft", 0.8)])
    assert len(series([arc("sft", 0.7), arc("sft", 0.7)])) == 1


def test_a_task_that_cards_do_not_know_is_a_mistake():
    with pytest.raises(ValueError, match="no_such_task"):
        series([Result("no_such_task", "sft", {"score": 7.4}, "judge")])


def test_mt_bench_is_printed_as_the_published_cards_print_it():
    metrics = {"score": 1190.5 / 160, "turn_1": 1159 / 160, "turn_2": 7.1, "mean_of_turns": 7.2, "score/math": 4.35}
    parts = series([Result("mt_bench", "sft", metrics, "judge gpt-4")])
    assert str(score_table(parts, LABELS)).splitlines() == [
        "| Model | MT-Bench | MT-Bench, turn 1 | MT-Bench, turn 2 |",
        "| --- | ---: | ---: | ---: |",
        "| **mine** | 7.44063 | 7.24375 | 7.10000 |",
    ]
    assert list(category_tables(parts, LABELS)) == ["MT-Bench"]
    assert parts[0].columns[0][1].value(metrics) == 7.44063
