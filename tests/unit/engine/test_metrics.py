import json

from llamero.engine.metrics import Metrics, read_lines


def test_every_line_is_there_as_soon_as_it_is_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with Metrics(path, step=0) as metrics:
        metrics.write({"step": 1, "loss": 0.1})
        assert read_lines(path) == [{"step": 1, "loss": 0.1}]
        metrics.write({"step": 2, "loss": 0.2})
        metrics.sync()
    assert [line["step"] for line in read_lines(path)] == [1, 2]


def test_what_a_killed_run_wrote_beyond_its_checkpoint_is_taken_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "run": 1}) + "\n" for step in range(1, 6)) + '{"step": 6, "ru')
    with Metrics(path, step=3) as metrics:
        metrics.write({"step": 4, "run": 2})
    assert [(line["step"], line["run"]) for line in read_lines(path)] == [(1, 1), (2, 1), (3, 1), (4, 2)]
    assert list(tmp_path.iterdir()) == [path]


def test_a_number_comes_back_exactly(tmp_path):
    with Metrics(tmp_path / "m", step=0) as metrics:
        metrics.write({"step": 1, "loss": 0.1 + 0.2})
    assert read_lines(tmp_path / "m")[0]["loss"] == 0.1 + 0.2


def test_no_file_has_no_lines(tmp_path):
    assert read_lines(tmp_path / "none") == []
