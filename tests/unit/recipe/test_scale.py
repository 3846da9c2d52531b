"""A tiny recipe is the same release: what changes is small, listed, and nothing else changes."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llamero.core.errors import LlameroError
from llamero.recipe.load import load
from llamero.recipe.scale import LLAMA_2_70B, Base, tiny
from llamero.recipe.schema import Recipe, ScratchConfig

RECIPES = Path(__file__).parents[3] / "recipes"
PUBLISHED = ("llama2-70b-oasst-sft-v10", "solar-0-70b")
SMALL = {
    "name": "a",
    "base": "owner/name",
    "data": {"mixtures": {"chat": {"sources": [{"source": "a", "path": "a.json"}]}}},
    "train": [{"name": "sft", "mixture": "chat", "sequence": 4096, "epochs": 2}],
}


def recipe(**parts):
    return Recipe.model_validate(SMALL | parts)


def stage(**said):
    return recipe(train=[{"name": "sft", "mixture": "chat", "epochs": 2} | said])


def shrunk(given, *, present=(), **options):
    return tiny(given, here=lambda path: path in present, **options)


def keys(scaled) -> Any:
    """Return a tiny recipe with its keys as attributes."""
    return json.loads(scaled.recipe.model_dump_json(), object_hook=lambda keys: SimpleNamespace(**keys))


def published():
    return [pytest.param(load(path), id=path.stem) for path in sorted(RECIPES.glob("*.yaml"))]


def leaves(value, place=""):
    """Yield every key of a recipe with its value; items of lists by their names."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{place}.{key}" if place else key)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for number, inner in enumerate(value):
            toy = f"toy_world {inner['toy_world']}" if "toy_world" in inner else None
            yield from leaves(inner, f"{place}.{inner.get('name', inner.get('source', toy)) or number}")
    else:
        yield place, value


def said(given):
    return dict(leaves(given.model_dump(mode="json", exclude_unset=True)))


@pytest.mark.parametrize("given", published())
@pytest.mark.parametrize("here", [True, False])
def test_what_differs_is_listed_and_what_is_listed_differs(given, here):
    scaled = tiny(given, here=lambda _: here)
    before, after = said(given), said(scaled.recipe)
    differ = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    listed = [change.key for change in scaled.changes]
    if not here:  # tasks that are left out move the others up
        differ = {key for key in differ if not key.startswith("evaluate")}
        listed = [key for key in listed if not key.startswith("evaluate")]
    of_a_source = {
        f"{key.removesuffix('path')}{same}" for key in listed for same in ("hub", "data_files", "layout", "split")
    }
    assert {key for key in differ - of_a_source if not any(f"{key}.".startswith(f"{one}.") for one in listed)} == set()
    assert [key for key in listed if not any(f"{one}.".startswith(f"{key}.") for one in differ)] == []
    assert len(set(listed)) == len(listed)
    assert [change for change in scaled.changes if change.before == change.after] == []


@pytest.mark.parametrize("given", published())
def test_the_stages_are_the_same(given):
    scaled = tiny(given, here=lambda _: True).recipe
    assert scaled.name == f"{given.name}-tiny"
    assert list(scaled.data.mixtures) == list(given.data.mixtures)
    for one, other in zip(given.train, scaled.train, strict=True):
        sizes = {"sequence", "batch", "batch_samples", "batch_tokens", "steps", "epochs", "warmup", "eval_every"}
        sizes |= {"save_every", "overlong"}
        assert one.model_dump(exclude=sizes) == other.model_dump(exclude=sizes)
        assert (one.warmup > 0, one.eval_every > 0) == (other.warmup > 0, other.eval_every > 0)
    assert (scaled.quantize and scaled.quantize.variants) == (given.quantize and given.quantize.variants)
    judged = "mt_bench"  # its judge is paid for
    assert [task.tasks for task in scaled.evaluate] == [task.tasks for task in given.evaluate if task.tasks != judged]
    assert (scaled.publish is None) == (given.publish is None)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_ones_keep_their_kind_of_layout_and_of_base(name):
    given = load(RECIPES / f"{name}.yaml")
    parallel = shrunk(given).recipe.parallel
    assert (parallel.tensor, parallel.pipeline, parallel.data, parallel.gpus) == (2, 2, 1, 4)
    same = ("sequence_parallel", "recompute", "schedule")
    assert [getattr(parallel, key) for key in same] == [getattr(given.parallel, key) for key in same]
    base = shrunk(given).recipe.base
    assert isinstance(base, ScratchConfig)
    assert (base.shape.kv_heads, base.shape.heads, base.shape.tied) == (2, 4, False)


@pytest.mark.parametrize("name", PUBLISHED)
def test_nothing_is_fetched(name):
    scaled = shrunk(load(RECIPES / f"{name}.yaml"))
    sources = [source for mixture in vars(keys(scaled).data.mixtures).values() for source in mixture.sources]
    assert [source.hub for source in sources] == [None] * len(sources)
    assert sorted(source.path for source in sources) == sorted(file.path for file in scaled.files)
    assert [task.tasks for task in scaled.recipe.evaluate] in ([], ["samples"])


@pytest.mark.parametrize(
    ("given", "axes"),
    [
        ({"gpus": 8}, {"shard": 2}),
        ({"gpus": 512, "tensor": 8, "pipeline": 4}, {"tensor": 2, "pipeline": 2}),
        ({"gpus": 64, "replicate": 8, "tensor": 2}, {"tensor": 2, "shard": 2}),
        ({"gpus": 16, "replicate": 16}, {"replicate": 2}),
        ({"gpus": 16, "replicate": 4, "offload": True}, {"replicate": 2, "shard": 2, "offload": True}),
        ({"gpus": 16, "tensor": 4, "pipeline": 2, "offload": True}, {"tensor": 2, "pipeline": 2}),
        ({"gpus": 1}, {}),
    ],
)
def test_of_every_axis_that_has_several_two_are_kept(given, axes):
    found = shrunk(recipe(parallel=given)).recipe.parallel
    kept = {"replicate": 1, "shard": 1, "tensor": 1, "pipeline": 1, "offload": False} | axes
    assert {key: found.sharded if key == "shard" else getattr(found, key) for key in kept} == kept
    assert found.gpus == found.replicate * found.sharded * found.tensor * found.pipeline <= 4


def test_one_process_takes_a_layout_of_one():
    scaled = shrunk(load(RECIPES / "solar-0-70b.yaml"), processes=1)
    assert scaled.recipe.parallel.gpus == 1
    four = shrunk(load(RECIPES / "solar-0-70b.yaml"))
    assert scaled.recipe.model_copy(update={"parallel": None}) == four.recipe.model_copy(update={"parallel": None})


def test_sources_that_are_here_are_kept_and_cut():
    scaled = shrunk(recipe(), present={"a.json"})
    (source,) = keys(scaled).data.mixtures.chat.sources
    assert (source.path, source.limit, scaled.files) == ("a.json", 400, ())


def test_a_toy_source_has_the_layout_and_the_languages_of_the_real_one():
    sources = [{"source": "oasst_export", "path": "trees.gz", "lang": "bg, de", "top_k": 1, "val_split": 0.2}]
    scaled = shrunk(recipe(data={"mixtures": {"chat": {"sources": sources}}}), toys="runs/toy")
    (file,) = scaled.files
    assert (file.path, file.layout, file.languages) == ("runs/toy/chat-oasst_export.jsonl", "oasst", ("bg", "de"))
    (source,) = keys(scaled).data.mixtures.chat.sources
    assert (source.path, source.lang, source.top_k, source.val_split) == (file.path, "bg, de", 1, 0.2)


@pytest.mark.parametrize(
    ("given", "small"),
    [
        ({"sequence": 4096, "batch": 64}, {"sequence": 128, "batch": 8, "steps": 12, "overlong": "truncate"}),
        ({"sequence": 64, "batch": 2}, {"sequence": 64, "batch": 2}),
        ({"batch_tokens": 4_194_304}, {"batch_tokens": 1024, "batch": 8}),
        ({"batch_tokens": 8192, "batch": 2}, {"batch_tokens": 1024}),
        ({"batch_samples": 64, "overlong": "split"}, {"batch_samples": 8, "overlong": "split"}),
        ({"epochs": None, "steps": 5, "warmup": 5}, {"steps": 5, "warmup": 1}),
        ({"epochs": None, "steps": 1000, "warmup": 100, "schedule": "wsd", "decay": 0.9}, {"warmup": 1, "decay": 0.9}),
        ({"epochs": None, "steps": 1000, "warmup": 9, "schedule": "wsd", "decay": 500}, {"warmup": 3, "decay": 3}),
    ],
)
def test_a_stage_becomes_short(given, small):
    scaled = shrunk(stage(**given)).recipe.train[0]
    assert {key: getattr(scaled, key) for key in small} == small


def test_lengths_keep_their_proportion():
    stages = [
        {"name": f"s{length}", "mixture": "chat", "steps": 9, "sequence": length} for length in (65536, 262144, 4096)
    ]
    assert [stage.sequence for stage in shrunk(recipe(train=stages)).recipe.train] == [32, 128, 32]


def test_a_base_of_another_kind_makes_another_tiny_model():
    shape = keys(shrunk(recipe(), base=Base(grouped=False, tied=True, theta=5e5, width=4096))).base.shape
    assert (shape.kv_heads, shape.heads, shape.tied, shape.theta) == (4, 4, True, 5e5)


def test_a_base_is_read_from_its_config():
    config = {"num_attention_heads": 64, "num_key_value_heads": 8, "hidden_size": 8192, "vocab_size": 32000}
    assert Base.of(config) == LLAMA_2_70B
    new = config | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3"}, "tie_word_embeddings": True}
    assert Base.of(new) == Base(grouped=True, tied=True, theta=5e5, width=8192)
    assert not Base.of({"num_attention_heads": 32, "hidden_size": 4096}).grouped


def test_a_small_base_that_is_here_is_kept():
    small = Base(grouped=False, tied=True, theta=1e4, width=128)
    scaled = shrunk(recipe(base="models/small"), present={"models/small"}, base=small)
    assert scaled.recipe.base == "models/small"


@pytest.mark.parametrize(("template", "tokens"), [("llama-3", 4), ("chatml", 2), ("auto", 2), ("plain", 0)])
def test_a_fresh_vocabulary_gets_the_tokens_of_its_template(template, tokens):
    scaled = shrunk(recipe(template=template)).recipe
    assert len(scaled.data.extra_tokens) == tokens
    assert scaled.template == ("chatml" if template == "auto" else template)


def test_what_is_not_here_is_left_out_or_replaced():
    given = recipe(
        quantize={"calibration": {"text": "wiki.txt", "sequence": 2048}, "variants": ["rtn-4bit-128g"]},
        evaluate=[
            {"tasks": "h4", "data": "benchmarks"},
            {"tasks": "perplexity", "texts": {"a": "a.txt", "b": "b.txt"}},
        ],
    )
    scaled = shrunk(given, present={"b.txt"})
    assert keys(scaled).quantize.calibration.mixture == "chat"
    (task,) = keys(scaled).evaluate
    assert vars(task.texts) == {"b": "b.txt"}
    assert ("evaluate.0", "h4", "-") in [(change.key, change.before, change.after) for change in scaled.changes]


def test_of_calibration_sources_those_that_are_here_stay():
    sources = [{"path": "a.txt"}, {"path": "b.txt"}, {"mixture": "chat"}, {"source": "wikitext-2-v1"}]
    given = recipe(quantize={"calibration": {"sources": sources}, "variants": ["rtn-4bit-128g"]})
    scaled = keys(shrunk(given, present={"b.txt"})).quantize.calibration
    assert [(source.path, source.mixture) for source in scaled.sources] == [("b.txt", None), (None, "chat")]
    none = keys(shrunk(recipe(quantize={"calibration": {"sources": sources[:1]}}))).quantize.calibration
    assert (none.mixture, none.sources) == ("chat", [])
    assert keys(shrunk(recipe(quantize={}))).quantize.calibration.mixture == "chat"


def test_an_adapter_of_a_later_stage_fits_the_tiny_layers():
    stages = [{"name": name, "mixture": "chat", "epochs": 1} for name in ("plain", "adapted")]
    stages[1]["adapter"] = {"lora": 128, "base": "nf4"}
    _, adapted = shrunk(recipe(train=stages)).recipe.train
    assert adapted.adapter is not None
    assert (adapted.adapter.lora, adapted.adapter.base) == (32, "nf4")


def test_probes_ask_little_and_only_what_is_here():
    asks = {"every": 200, "task": "arc_challenge", "data": "benchmarks"}
    (there,) = shrunk(stage(probe=asks), present={"benchmarks"}).recipe.train
    assert there.probe is not None
    assert (there.probe.every, there.probe.questions, there.probe.task) == (6, 2, "arc_challenge")
    (gone,) = shrunk(stage(probe=asks)).recipe.train
    assert gone.probe is None
    (said,) = shrunk(stage(probe=asks | {"prompts": ["a", "b", "c"]})).recipe.train
    assert said.probe is not None
    assert (said.probe.task, said.probe.prompts, said.probe.max_new_tokens) == (None, ("a", "b"), 16)


def test_the_card_does_not_claim_to_be_the_real_one():
    publish = {"license": "mit", "repository": "me/a", "base_model": "x/y", "datasets": ["x/y"], "description": "Best."}
    small = keys(shrunk(recipe(publish=publish))).publish
    assert (small.repository, small.base_model, small.datasets) == ("me/a-tiny", None, [])
    assert "rehearsal" in small.description


@pytest.mark.parametrize("parts", [{"train": []}, {"train": [SMALL["train"][0] | {"adapter": {"lora": 4}}]}])
def test_what_needs_trained_weights_is_refused_with_the_way_out(parts):
    with pytest.raises(LlameroError, match="owner/name") as refused:
        shrunk(recipe(**parts))
    assert "--set base=" in str(refused.value.fix)
