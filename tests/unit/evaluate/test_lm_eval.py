"""Through lm-eval: the same requests, the same answers as its own `hf` back end, and its command line."""

import importlib
import json
import random
import sys
from types import SimpleNamespace

import pytest

from llamero.cli import app
from llamero.core.errors import LlameroError
from llamero.evaluate import h4, lm_eval_run, tokens
from llamero.evaluate.config import LmEvalTask, named
from llamero.evaluate.questions import LM_EVAL

LIMIT = 4
SHOTS = {"arc_challenge": 3, "hellaswag": 3, "mmlu_anatomy": 2, "truthfulqa_mc1": 0, "truthfulqa_mc2": 0}


def test_without_lm_eval_the_way_out_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(LlameroError, match=r"pip install 'llamero\[lm-eval\]'"):
        lm_eval_run.adapter()


def test_tasks_of_lm_eval_have_a_name_and_options():
    task = named("lm-eval", {"names": ["gsm8k", "ifeval"], "chat": True})
    assert isinstance(task, LmEvalTask)
    assert task.label == "lm-eval-gsm8k-ifeval"
    with pytest.raises(LlameroError, match="TASK"):
        named("lm-eval", {})


# -- with lm-eval itself, which takes seconds to import


@pytest.fixture(scope="module")
def lm_eval():
    pytest.importorskip("lm_eval")
    return lm_eval_run.adapter()


@pytest.fixture(scope="module")
def ref(real):
    return real.parent / "weights" / "ref-7m-hf"


@pytest.fixture(scope="module")
def ours(lm_eval, ref):
    return lm_eval.LlameroLM(pretrained=str(ref), dtype="float32", device="cpu")


def hugging_face():
    return importlib.import_module("lm_eval.models.huggingface").HFLM


@pytest.fixture(scope="module")
def theirs(lm_eval, ref):
    return hugging_face()(pretrained=str(ref), dtype="float32", device="cpu")


def asked(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, 0) for each in arguments]


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOTS)
def test_log_likelihoods_are_those_of_hf(ours, theirs, real, name):
    (task,) = h4.tasks(real, [name], rules=LM_EVAL, limit=LIMIT)
    pairs = [(request.context, request.continuation) for request in task.requests]
    pairs = random.Random(0).sample(pairs, min(10, len(pairs)))
    own = ours.own  # what H4 asks by itself are the same ids
    assert [tokens.pair(own, *pair, bos=own.add_bos) for pair in pairs] == [
        theirs._encode_pair(*pair) for pair in pairs
    ]
    requests = asked("loglikelihood", *pairs)
    mine, hf = ours.loglikelihood(requests), theirs.loglikelihood(requests)
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in hf]
    assert [ll for ll, _ in mine] == pytest.approx([ll for ll, _ in hf], abs=1e-3, rel=0)


@pytest.mark.slow
def test_odd_requests_are_those_of_hf(ours, theirs):
    requests = asked("loglikelihood", ("", " hello world"), ("a ", " b"), ("x\n", " y"), ("Once</s>", " upon"))
    mine, hf = ours.loglikelihood(requests), theirs.loglikelihood(requests)
    assert [ll for ll, _ in mine] == pytest.approx([ll for ll, _ in hf], abs=1e-3, rel=0)


@pytest.mark.slow
def test_bos_is_added_as_hf_adds_it(lm_eval, ref):
    for given in (True, False):
        mine = lm_eval.LlameroLM(pretrained=str(ref), dtype="float32", device="cpu", add_bos_token=given)
        assert (mine.tok_encode("Once")[0] == mine.own.bos_id) is given
        assert mine.tok_encode("<s>Once") == [mine.own.bos_id, *mine.tok_encode("Once", add_special_tokens=False)]
    assert hugging_face()(pretrained=str(ref), device="cpu").tok_encode("Once") == lm_eval.LlameroLM(
        pretrained=str(ref), device="cpu"
    ).tok_encode("Once")


@pytest.mark.slow
def test_rolling_log_likelihoods_are_those_of_hf(ours, theirs):
    requests = asked("loglikelihood_rolling", ("Once upon a time there was a cat. " * 150,), ("hello",))
    assert ours.loglikelihood_rolling(requests) == pytest.approx(
        theirs.loglikelihood_rolling(requests), abs=2e-2, rel=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize("until", [[], ["."], ["\n\n"], [" the", "was"], "girl"])
def test_answers_are_those_of_hf(ours, theirs, until):
    prompts = ("Once upon a time", "Question: What is a cat?\nAnswer:", "Long ago " * 600)
    requests = asked("generate_until", *((prompt, {"until": until, "max_gen_toks": 24}) for prompt in prompts))
    assert ours.generate_until(requests) == theirs.generate_until(requests)


@pytest.mark.slow
def test_generation_options_are_heeded_or_refused(ours):
    def answer(**options):
        return ours.generate_until(asked("generate_until", ("Once upon a time", {"max_gen_toks": 16, **options})))

    assert answer(do_sample=True, temperature=1.5, seed=1) != answer(do_sample=True, temperature=1.5, seed=2)
    assert answer(do_sample=False, temperature=0.7) == answer()
    with pytest.raises(LlameroError, match="`num_beams` is no generation option"):
        answer(num_beams=4)
    with pytest.raises(LlameroError, match="leave no room for a prompt"):
        answer(max_gen_toks=5000)


@pytest.mark.slow
def test_conversations_are_written_as_hf_writes_them(lm_eval, ours, theirs, monkeypatch):
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hi "}]
    open_end = [*said, {"role": "assistant", "content": "The answer is "}]
    with pytest.raises(LlameroError, match="no chat template"):
        ours.chat_template(True)
    jinja = ours.chat_template("vicuna")
    monkeypatch.setattr(theirs.tokenizer, "chat_template", jinja)
    assert ours.apply_chat_template(said) == theirs.apply_chat_template(said)
    assert ours.apply_chat_template(open_end, False) == theirs.apply_chat_template(open_end, False)
    with pytest.raises(LlameroError, match="did you mean `vicuna`"):
        ours.chat_template("vicun")


@pytest.mark.slow
def test_arguments_that_are_none_are_refused(lm_eval, ref):
    with pytest.raises(LlameroError, match="pretained"):
        lm_eval.LlameroLM(pretrained=str(ref), pretained="x")
    with pytest.raises(LlameroError, match="dtype"):
        lm_eval.LlameroLM(pretrained=str(ref), dtype="int3")


@pytest.fixture
def own_task(tmp_path, real):
    config = {
        "task": "few_arc",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(real / "arc_challenge" / "test.jsonl")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{choices.label.index(answerKey)}}",
        "doc_to_choice": "{{choices.text}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "few_arc.yaml").write_text(json.dumps(config))
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of other people's packages
def test_the_two_command_lines_give_the_same(lm_eval, ref, own_task, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    out = tmp_path / "out"
    given = [
        "--tasks",
        "lm-eval:few_arc",
        "--include",
        str(own_task),
        "--limit",
        "4",
        "--json",
        str(tmp_path / "r.json"),
    ]
    app(["evaluate", str(ref), *given, "--out", str(out)], result_action="return_value")
    (result,) = json.loads((tmp_path / "r.json").read_text())["results"]
    capsys.readouterr()
    model = f"pretrained={ref},dtype=float32,device=cpu"
    given = [
        "--tasks",
        "few_arc",
        "--include_path",
        str(own_task),
        "--limit",
        "4",
        "--output_path",
        str(tmp_path / "h"),
    ]
    app(["lm-eval", "run", "--model", "llamero", "--model_args", model, *given], result_action="return_value")
    (file,) = (tmp_path / "h").rglob("results_*.json")
    found = json.loads(file.read_text())["results"]["few_arc"]
    assert result["metrics"]["acc"] == found["acc,none"]
    assert result["metrics"]["acc_norm"] == found["acc_norm,none"]
    assert (result["task"], result["inputs"]["text"], result["metrics"]["questions"]) == ("lm-eval", "few_arc", 4)
    about, *rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert about["lm_eval"] == importlib.import_module("lm_eval").__version__
    assert [(row["doc"], row["choice"]) for row in rows] == [(i, j) for i in range(4) for j in range(4)]
    assert len({row["prompt"] for row in rows}) == 16
    assert "acc" in capsys.readouterr().out


@pytest.mark.slow
def test_an_unknown_task_names_the_nearest(lm_eval):  # what lm-eval reads of its tasks takes a while
    subject = SimpleNamespace(root=None, template="auto")
    with pytest.raises(LlameroError, match="did you mean `arc_challenge`"):
        lm_eval_run._evaluated(named("lm-eval", {"names": ["arc_chalenge"]}), subject, None)  # pyright: ignore
