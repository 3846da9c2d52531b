from llamero.core import results
from llamero.core.results import Result


def test_results_come_back_as_they_were_written(tmp_path):
    written = [
        Result("arc_challenge", "sft", {"acc_norm": 0.5, "stderr": 0.01}, "25-shot", {"seed": 1}, ("3 truncated",)),
        Result("perplexity", "base", {"ppl": 12.25}, "window 1024"),
    ]
    results.write(tmp_path, written)
    assert results.read(tmp_path) == written


def test_a_measurement_names_the_software_that_made_it():
    said = results.software()
    assert {"llamero", "torch", "numpy"} <= said.keys()
    assert said["torch"] != "not installed"
