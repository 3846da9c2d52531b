"""The probes of a stage in a run: real questions in the stage's words, prompts answered as the model answers."""

import pytest
import torch

from llamero.core.errors import LlameroError
from llamero.corpus import toy_world
from llamero.engine.metrics import read_lines, read_probes
from llamero.engine.stage import StageConfig
from llamero.infer import choices
from llamero.infer.chat import Chat, continue_text
from llamero.infer.likelihood import log_likelihoods
from llamero.infer.sampler import Sampling
from llamero.model.llama import Llama
from llamero.model.load import load_model
from llamero.parallel.config import ParallelConfig
from llamero.text.tokenizer import load_tokenizer
from llamero.train.config import ShapeConfig
from llamero.train.probe import probe_of
from llamero.train.run import fresh_config, run

PROMPTS = ("the cat", "sat")
SHAPE = ShapeConfig(hidden=32, layers=2, heads=4, kv_heads=2, mlp=48, context=256)


@pytest.mark.parametrize("objective", ["sft", "lm"])
def test_a_stage_asks_and_answers_as_its_model_does_afterwards(tmp_path, data, tokenizer_files, objective):
    probe = {"every": 1, "task": "toy_world", "questions": 5, "prompts": PROMPTS, "max_new_tokens": 6}
    about = {"name": "tiny", "mixture": "chat", "sequence": 256, "batch": 4, "steps": 2, "lr": 1e-2, "min_lr": 1e-3}
    stage = StageConfig.model_validate(about | {"probe": probe, "objective": objective})
    parallel = ParallelConfig(device="cpu")
    run(stage, start=SHAPE, data=data, tokenizer=tokenizer_files, parallel=parallel, seed=1, out=tmp_path)
    first, last = read_probes(tmp_path / "probes.jsonl")
    assert (first["step"], last["step"]) == (1, 2)

    model, tokenizer = load_model(tmp_path, dtype=torch.float32), load_tokenizer(tokenizer_files)
    sampling = Sampling(temperature=0, max_new_tokens=6)
    for prompt, sample in zip(PROMPTS, last["samples"], strict=True):
        chat = Chat(model, tokenizer, template="auto")
        said = (
            chat.answer(prompt, sampling) if objective == "sft" else continue_text(model, tokenizer, prompt, sampling)
        )
        assert sample == {"prompt": prompt, "text": "".join(said)}
    questions = toy_world.questions(toy_world.world(1), per_category=2)
    mixed = [questions[at] for at in (0, 2, 4, 1, 3)]
    right = 0
    for question in mixed:
        if objective == "sft":
            pairs = [choices.chat_answer(question.question, option, "auto", tokenizer) for option in question.options]
        else:
            head = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
            asked = f"Question: {question.question}\nAnswer:"
            plain = [choices.plain_answer(asked, option, tokenizer) for option in question.options]
            pairs = [([*head, *context], answer) for context, answer in plain]
        found = [each.log_likelihood for each in log_likelihoods(model, pairs)]
        right += found.index(max(found)) == question.answer
    assert last["probe_accuracy"] == right / 5 == read_lines(tmp_path / "metrics.jsonl")[-1]["probe_accuracy"]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_questions_that_are_not_there_are_named_before_anything_is_trained(tmp_path, tokenizer_files):
    probe = {"every": 1, "task": "arc_challenge", "data": "benchmarks"}
    stage = StageConfig.model_validate({"name": "a", "mixture": "m", "steps": 1, "probe": probe}).rooted(tmp_path)
    tokenizer = load_tokenizer(tokenizer_files)
    model = Llama(fresh_config(SHAPE, tokenizer))
    with pytest.raises(LlameroError) as caught:
        probe_of(stage, model, tokenizer)
    assert str(tmp_path / "benchmarks") in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({}, "give `task` or `prompts`"),
        ({"task": "arc_challenge"}, "`data`"),
        ({"prompts": ["a"], "data": "b"}, "`data`"),
    ],
)
def test_a_probe_that_asks_nothing_is_refused(keys, problem):
    with pytest.raises(ValueError, match=problem):
        StageConfig.model_validate({"name": "a", "mixture": "m", "steps": 1, "probe": {"every": 1} | keys})


def test_probes_decide_nothing():
    stage = {"name": "a", "mixture": "m", "steps": 1}
    probed = stage | {"probe": {"every": 1, "prompts": ["a"]}}
    assert StageConfig.model_validate(stage).decides() == StageConfig.model_validate(probed).decides()


def test_a_prompt_that_leaves_no_room_is_refused_before_anything_is_trained(tokenizer_files):
    probe = {"every": 1, "prompts": ["the cat " * 200]}
    stage = StageConfig.model_validate({"name": "a", "mixture": "m", "steps": 1, "probe": probe})
    tokenizer = load_tokenizer(tokenizer_files)
    with pytest.raises(LlameroError, match="context of 256 tokens: 'the cat"):
        probe_of(stage, Llama(fresh_config(SHAPE, tokenizer)), tokenizer)
