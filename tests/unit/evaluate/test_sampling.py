"""Sampling reports: published ones are read and written back byte for byte, and replayed with another model."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from llamero.core.errors import LlameroError
from llamero.corpus import sampling_reports
from llamero.corpus.sampling_reports import Asked, Configuration, Outputs, Report
from llamero.evaluate import sampling
from llamero.evaluate.config import SamplingTask
from llamero.evaluate.run import run
from llamero.evaluate.sampling import WRITTEN, Writer, way

DATA = Path(os.environ.get("LLAMERO_SHARED", Path(__file__).resolve().parents[4] / "shared")) / "data"
PUBLISHED = DATA / "published" / "oasst_model_eval"
CONFIGS = PUBLISHED / "model_eval" / "manual" / "config"
REPORTS = {
    "llama2": "llama2/2023-07-18_meta-llama_Llama-2-7b-hf_sampling_llama2_prompt.json",
    "v2_5": "oasst-pretrained/2023-07-24_OpenAssistant_llama2-13b-orca-8k-3319_sampling_no_sys_prompt.json",
    "v3": "oasst-pretrained/2023-07-25_OpenAssistant_llama2-13b-orca-8k-3319_sampling_llama2_prompt.json",
    "1k": "oasst-sft/1k-prompts/result_00_en_100_seed_2637670843.json",
    "lottery": "oasst-sft/2023-04-03_andreaskoepf_oasst-sft-4-pythia-12b-epoch-3_5_sampling_noprefix_lottery.json",
}


@pytest.fixture(scope="module")
def published():
    if not PUBLISHED.is_dir():
        pytest.skip(f"no published reports at {PUBLISHED} (set LLAMERO_SHARED)")
    return lambda name: PUBLISHED / "sampling_reports" / REPORTS[name]


@pytest.fixture(scope="module")
def directory():
    path = DATA / "weights" / "tinystories-656k-hf"
    if not path.is_dir():
        pytest.skip(f"no model at {path} (set LLAMERO_SHARED)")
    return path


def shortened(path, to, *, prompts, tokens):
    """Write a published report with fewer prompts and shorter answers, as its program would have written it."""
    report = sampling_reports.read_report(path)
    asked = tuple(
        replace(
            each,
            results=tuple(
                replace(r, sampling_params={**r.sampling_params, "max_new_tokens": tokens}) for r in each.results
            ),
        )
        for each in report.prompts[:prompts]
    )
    to.write_bytes(sampling_reports.written(replace(report, prompts=asked)))
    return to


def masked(text, model):
    """A report's text without outputs, model and date."""
    text = re.sub(r'"outputs": \[(?:\n +"(?:[^"\\]|\\.)*",?)*\n? *\]', lambda m: f"<{m[0].count(chr(10))}>", text)
    return re.sub(r'"date": "[-0-9T:.]+"', "<date>", text).replace(json.dumps(model), "<model>")


def replay(directory, report, work, **keys):
    task = SamplingTask.model_validate({"tasks": "sampling", "replay": str(report), **keys})
    (result,) = run(task, model=directory, name="small", template="auto", root=Path("/"), work=work)
    return result, work / result.inputs["report"]


@pytest.mark.parametrize("name", REPORTS)
def test_a_published_report_is_written_back_byte_for_byte(published, name):
    data = published(name).read_bytes()
    assert sampling_reports.written(sampling_reports.read_report(published(name))) == data


@pytest.mark.parametrize(("name", "config"), [("llama2", "llama2_prompt"), ("v3", "llama2_prompt"), ("v2_5", None)])
def test_a_replay_differs_in_outputs_model_and_date_only(published, directory, tmp_path, name, config):
    report = shortened(published(name), tmp_path / "published.json", prompts=3, tokens=6)
    around = {} if config is None else {"config": str(CONFIGS / f"{config}.json")}
    result, made = replay(directory, report, tmp_path, **around)
    theirs = sampling_reports.read_report(report)
    assert masked(made.read_text(), "small") == masked(report.read_text(), theirs.model_name)
    ours = sampling_reports.read_report(made)
    assert list(sampling_reports.outputs_of(ours)) != list(sampling_reports.outputs_of(theirs))
    assert all(sampling_reports.outputs_of(ours))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_small_sampling_\w+\.json", made.name)
    assert ("penalty_alpha" in str(result.notes)) == (name == "llama2")
    said = {
        "llama2": "llama2_prompt.json, in which typical2, typical3, contrastive are missing: theirs is as in the",
        "v3": "what stands around prompts is that of llama2_prompt.json",
        "v2_5": "no configuration file was given",
    }
    assert said[name] in result.notes[0]
    assert not (tmp_path / sampling.JOURNAL).exists()


@pytest.mark.parametrize("config", ["default", "llama2_prompt", "noprefix", "noprefix2", "synth", "synth2"])
def test_published_configurations_are_read_as_published(published, config):
    raw = json.loads((CONFIGS / f"{config}.json").read_text())
    found = sampling_reports.read_configurations(CONFIGS / f"{config}.json")
    assert [each.name for each in found] == [each["name"] for each in raw["configurations"]]
    for each, said in zip(found, raw["configurations"], strict=True):
        assert each.generate_args == {**raw["default"]["generate_args"], **said["generate_args"]}
        assert each.pre_text == raw["default"].get("pre_text")
        assert way(each, frozenset([2])).sampling.max_new_tokens == each.generate_args["max_new_tokens"]
    of_report = {"noprefix2": "v2_5", "noprefix": "lottery"}
    if config in of_report:  # keys in the order of the report that was made with it
        report = published(of_report[config])
        published_ways = sampling_reports.configurations(sampling_reports.read_report(report), report)
        assert [list(each.generate_args) for each in found] == [list(each.generate_args) for each in published_ways]


def test_what_a_configuration_asks_for():
    args = {"max_new_tokens": 9, "do_sample": True, "temperature": 0.8, "top_p": 0.9}
    found = way(Configuration("a", args), frozenset([2]))
    assert (found.samples, found.beams, found.note) == (True, 1, None)
    assert (found.sampling.temperature, found.sampling.top_p, found.sampling.top_k) == (0.8, 0.9, 50)
    assert found.sampling.stop_ids == {2}
    assert way(Configuration("a", {**args, "top_k": 0, "typical_p": 0.2}), frozenset()).sampling.top_k == 0
    greedy = way(Configuration("a", {**args, "do_sample": False, "num_beams": 5}), frozenset())
    assert (greedy.samples, greedy.beams, greedy.sampling.temperature) == (False, 5, 0)
    assert (greedy.sampling.top_k, greedy.sampling.top_p) == (0, 1.0)
    assert "no effect" in str(way(Configuration("a", {**args, "penalty_alpha": 0.6}), frozenset()).note)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"max_new_tokens": 9, "penalty_alpha": 0.6, "top_k": 5}, "contrastive search is not offered"),
        ({"max_new_tokens": 9, "no_repeat_ngram_size": 3}, "`no_repeat_ngram_size` is not understood"),
        ({"max_new_tokens": 9, "do_sample": True, "temprature": 1}, "did you mean `temperature`"),
        ({}, "no `max_new_tokens`"),
    ],
)
def test_what_is_not_offered_is_named(args, said):
    with pytest.raises(LlameroError, match=said):
        way(Configuration("a", args), frozenset())


@pytest.mark.parametrize(
    ("mode", "text"),
    [
        ("legacy", "Be.\nUser: Hi\n\nJoi: "),
        ("v2", "Be.<human>Hi<bot>"),
        ("v2_5", "Be.<|prompter|>Hi</s><|assistant|>"),
        ("v3", "<|system|>Be.</s><|prompter|>Hi</s><|assistant|>"),
        ("chatml", "<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
    ],
)
def test_prompts_are_written_as_each_mode_wrote_them(mode, text):
    how = Configuration("a", {}, "Be.", "User", "Joi")
    assert WRITTEN[mode]("Hi", how, "</s>") == text
    tokens = {"v2": "<prefix>Be.</prefix>", "v2_5": "<|prefix_begin|>Be.<|prefix_end|>"}
    if mode in tokens:
        assert WRITTEN[mode]("Hi", replace(how, add_prefix_tokens=True), "</s>").startswith(tokens[mode])


def test_legacy_needs_names():
    with pytest.raises(LlameroError, match="--config"):
        WRITTEN["legacy"]("Hi", Configuration("a"), "</s>")


@pytest.fixture
def files(tmp_path):
    """Two prompts and two configurations, of which one draws."""
    (tmp_path / "p.jsonl").write_text('"Once"\n"The dog <b>\\u00e9"\n')
    args = {"max_new_tokens": 8, "do_sample": True}
    ways = {
        "default": {"generate_args": args, "human_name": "A", "bot_name": "B"},
        "configurations": [
            {"name": "draw", "generate_args": {"top_p": 0.9}},
            {"name": "greedy", "generate_args": {"do_sample": False}},
        ],
    }
    (tmp_path / "c.json").write_text(json.dumps(ways))
    return {"tasks": "sampling", "prompts": "p.jsonl", "config": "c.json"}


def made(directory, root, keys, **more):
    (result,) = run(
        SamplingTask.model_validate({**keys, **more}), model=directory, name="m", template="auto", root=root, work=root
    )
    return result, sampling_reports.read_report(root / result.inputs["report"])


def test_a_report_of_ones_own(files, directory, tmp_path):
    result, report = made(directory, tmp_path, files)
    assert [asked.prompt for asked in report.prompts] == ["Once", "The dog <b>é"]
    assert [[len(each.outputs) for each in asked.results] for asked in report.prompts] == [[2, 1], [2, 1]]
    assert report.args["mode"] == "legacy"
    assert report.args["config"] == "c.json"
    assert list(report.args)[:4] == ["device", "device_index", "model_name", "mode"]
    first, second = report.prompts[0].results[0].outputs
    assert first != second
    assert result.protocol.startswith("2 prompts, mode legacy, draw, greedy; 2 samples")


def test_a_text_does_not_depend_on_what_else_is_asked(files, directory, tmp_path):
    _, both = made(directory, tmp_path, files)
    _, one = made(directory, tmp_path, files, limit=1)
    assert both.prompts[:1] == one.prompts
    _, three = made(directory, tmp_path, files, num_samples=3)
    assert three.prompts[0].results[0].outputs[:2] == both.prompts[0].results[0].outputs


def test_a_report_that_was_cut_off_goes_on(files, directory, tmp_path, monkeypatch):
    _, whole = made(directory, tmp_path, files)
    answers, computed = sampling._answers, []

    def cut_off(model, todo):
        for number, answer in enumerate(answers(model, todo)):
            if number == 3:
                raise KeyboardInterrupt
            yield answer

    monkeypatch.setattr(sampling, "_answers", cut_off)
    with pytest.raises(KeyboardInterrupt):
        made(directory, tmp_path, files)
    assert len((tmp_path / sampling.JOURNAL).read_text().splitlines()) == 4
    monkeypatch.setattr(sampling, "_answers", lambda model, todo: answers(model, (computed.append(len(todo)), todo)[1]))
    _, again = made(directory, tmp_path, files)
    assert computed == [3]
    assert again.prompts == whole.prompts
    (tmp_path / sampling.JOURNAL).write_text('{"model": "another", "asked": "another"}\n{"of": "it"}\n')
    _, anew = made(directory, tmp_path, files)
    assert computed == [3, 6]
    assert anew.prompts == whole.prompts


def test_what_cannot_be_sampled_is_counted_and_the_rest_is_made(files, directory, tmp_path):
    ways = json.loads((tmp_path / "c.json").read_text())
    ways["configurations"].append({"name": "x", "generate_args": {"do_sample": False, "penalty_alpha": 0.6}})
    (tmp_path / "c.json").write_text(json.dumps(ways))
    result, report = made(directory, tmp_path, files)
    assert [len(each.outputs) for each in report.prompts[0].results] == [2, 1, 0]
    assert result.notes == ("configuration `x`: contrastive search is not offered: its 2 prompts have no outputs",)


def test_a_prompt_longer_than_the_context_is_counted(files, directory, tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps("long " * 600) + '\n"Once"\n')
    result, report = made(directory, tmp_path, files)
    assert [[len(each.outputs) for each in asked.results] for asked in report.prompts] == [[0, 0], [2, 1]]
    assert "1 prompts are as long as the context" in str(result.notes)
    (tmp_path / "p.jsonl").write_text(json.dumps("long " * 600))
    with pytest.raises(LlameroError, match="no prompt leaves room"):
        made(directory, tmp_path, files)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"prompts": "p"}, "give `prompts` and `config`"),
        ({"replay": "r", "num_samples": 3}, "takes `num_samples` from its report"),
    ],
)
def test_a_task_that_makes_no_sense_is_refused(keys, said):
    with pytest.raises(ValueError, match=said):
        SamplingTask.model_validate({"tasks": "sampling", **keys})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "no prompt"),
        ("{", ":1: not JSON"),
        ('"a"\n{"a": 1}', ":2: not a JSON string"),
    ],
)
def test_prompts_that_are_none_are_refused(content, said, tmp_path):
    (tmp_path / "p").write_text(content)
    with pytest.raises(LlameroError, match=said):
        sampling_reports.read_prompts(tmp_path / "p")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "not a JSON object"),
        ("{}", "no `configurations`"),
        ('{"configurations": [{"generate_args": {}}]}', "no `name`"),
        ('{"configurations": [{"name": "a", "generate_arg": {}}]}', "did you mean `generate_args`"),
        ('{"configurations": [{"name": "a"}, {"name": "a"}]}', "the same name"),
    ],
)
def test_configurations_that_are_none_are_refused(content, said, tmp_path):
    (tmp_path / "c").write_text(content)
    with pytest.raises(LlameroError, match=said):
        sampling_reports.read_configurations(tmp_path / "c")


def report_of(**keys):
    ways = (Outputs("a", {"max_new_tokens": 3}, ("x",)),)
    args = {"mode": "legacy", "seed": 1, "num_samples": 2, "config": "config/a.json", **keys}
    return Report("m", "2023-01-01T00:00:00", args, (Asked("p", ways),))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"mode": "v9"}, "mode 'v9' is not known"),
        ({"model_type": "T5Conditional"}, "`model_type` 'T5Conditional' cannot be replayed"),
        ({"max_input_len": 7}, "`max_input_len` 7 cannot be replayed"),
    ],
)
def test_a_report_that_cannot_be_replayed_says_why(keys, said, tmp_path):
    (tmp_path / "r").write_bytes(sampling_reports.written(report_of(**keys)))
    with pytest.raises(LlameroError, match=said):
        sampling.replayed(tmp_path / "r", config=None, limit=None)
    (tmp_path / "r").write_text('{"prompts": []}')
    with pytest.raises(LlameroError, match="not a sampling report"):
        sampling.replayed(tmp_path / "r", config=None, limit=None)


def test_the_configuration_of_a_published_report_is_found_beside_it(published):
    plan = sampling.replayed(published("v2_5"), config=None, limit=1)
    assert plan.notes == ("what stands around prompts is that of noprefix2.json",)
    assert {each.human_name for each in plan.configurations} == {"User"}


def test_what_stands_around_a_prompt_is_not_guessed(tmp_path):
    (tmp_path / "r").write_bytes(sampling_reports.written(report_of()))
    ways = [{"name": "b", "pre_text": "x"}, {"name": "c", "pre_text": "y"}]
    (tmp_path / "c").write_text(json.dumps({"configurations": ways}))
    with pytest.raises(LlameroError, match="no configuration `a`, which the report has"):
        sampling.replayed(tmp_path / "r", config=tmp_path / "c", limit=None)


def test_a_chat_template_writes_what_it_always_writes(directory):
    from llamero.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(directory).with_tokens(["<|im_start|>", "<|im_end|>"])
    writer = Writer("template", tokenizer, "chatml")
    ids = writer.ids("Hi <|im_end|>", Configuration("a", {}, "Be."))
    end = tokenizer.id("<|im_end|>")
    assert end is not None
    assert ids.count(end) == 2  # what the user spells out stays text
    assert end in writer.stop_ids
    assert Writer("chatml", tokenizer, "").ids("Hi <|im_end|>", Configuration("a")).count(end) == 2
