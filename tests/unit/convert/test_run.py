"""Every conversion and its way back give the same bits; what does not fit is refused by name, and nothing is silent."""

import argparse
import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llamero.cli import main
from llamero.convert import meta
from llamero.convert.config import ConvertConfig
from llamero.convert.run import kind_of, run
from llamero.core.config import parse
from llamero.core.errors import LlameroError
from llamero.model.rope import Default, Linear, Llama3, Yarn

SHARED = Path(os.environ.get("LLAMERO_SHARED", Path(__file__).resolve().parents[4] / "shared"))
LAYOUTS = [(tensor, pipeline) for tensor in (1, 2, 4) for pipeline in (1, 2, 3)]


def convert(source, out, to, **options):
    return run(source, out, ConvertConfig(to=to, **options))


def refusal(source, out, to, **options):
    with pytest.raises(LlameroError) as error:
        convert(source, out, to, **options)
    assert not out.exists()
    return error.value


def real(name):
    source = SHARED / "data/weights" / name
    if not source.exists():
        pytest.skip(f"{source} is not there")
    return source


@pytest.mark.parametrize(("tensor", "pipeline"), LAYOUTS)
@pytest.mark.parametrize("name", ["tinystories-656k-hf", "ref-7m-hf"])
def test_real_weights_return_from_megatron_with_the_same_bits(tmp_path, models, name, tensor, pipeline):
    source = real(name)
    layers = json.loads((source / "config.json").read_text())["num_hidden_layers"]
    if layers % pipeline:
        error = refusal(source, tmp_path / "out", "megatron", tensor=tensor, pipeline=pipeline)
        assert error.problem == f"{pipeline} pipeline ranks do not divide {layers} layers"
        return
    convert(source, tmp_path / "out", "megatron", tensor=tensor, pipeline=pipeline)
    assert len(list((tmp_path / "out/release").iterdir())) == tensor * pipeline
    convert(tmp_path / "out", tmp_path / "back", "hf")
    models.assert_same(source, tmp_path / "back")
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("name", ["tinystories-656k-hf", "ref-7m-hf"])
def test_real_weights_return_from_meta_with_the_same_bits(tmp_path, models, name, shards):
    convert(real(name), tmp_path / "out", "meta", shards=shards)
    convert(tmp_path / "out", tmp_path / "back", "hf")
    models.assert_same(real(name), tmp_path / "back")


def test_every_kind_is_reached_from_every_other(tmp_path, models):
    models.write(tmp_path / "hf", dtype=torch.bfloat16)
    way = [("meta", {"shards": 4}), ("megatron", {"tensor": 2, "pipeline": 2}), ("megatron", {"tensor": 4}),
           ("meta", {"shards": 2}), ("meta", {}), ("megatron", {"pipeline": 4}), ("hf", {})]  # fmt: skip
    here = tmp_path / "hf"
    for number, (to, options) in enumerate(way):
        report = convert(here, tmp_path / str(number), to, verify=True, **options)
        assert report.verified is not None
        assert report.verified.mean < 1e-3  # of logits of 100 and more
        here = tmp_path / str(number)
        assert kind_of(here) == to
    models.assert_same(tmp_path / "hf", here)


@settings(max_examples=15)
@given(data=st.data())
def test_random_models_return_with_the_same_bits(tmp_path_factory, models, data):
    tensor, pipeline = data.draw(st.sampled_from(LAYOUTS))
    kv, per_group = tensor * data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    head_dim = 2 * data.draw(st.integers(1, 4))
    bias = data.draw(st.booleans())
    root = tmp_path_factory.mktemp("random")
    models.write(
        root / "hf",
        seed=data.draw(st.integers(0, 2**31)),
        dtype=data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        vocab_size=data.draw(st.integers(1, 300)),
        hidden_size=2 * data.draw(st.integers(1, 20)),
        intermediate_size=tensor * data.draw(st.integers(1, 20)),
        num_layers=pipeline * data.draw(st.integers(1, 2)),
        num_heads=kv * per_group,
        num_kv_heads=kv,
        head_dim=head_dim,
        rope=Default(1e4, head_dim),
        tie_word_embeddings=data.draw(st.booleans()),
        attention_bias=bias,
        mlp_bias=bias,
    )
    convert(root / "hf", root / "out", "megatron", tensor=tensor, pipeline=pipeline)
    convert(root / "out", root / "back", "hf")
    models.assert_same(root / "hf", root / "back")
    shutil.rmtree(root)


@settings(max_examples=15)
@given(data=st.data())
def test_random_models_return_from_meta_without_a_config_beside(tmp_path_factory, models, data):
    shards = data.draw(st.sampled_from([1, 2, 4]))
    kv, per_group, half = (
        shards * data.draw(st.integers(1, 2)),
        data.draw(st.integers(1, 3)),
        data.draw(st.integers(1, 4)),
    )
    root = tmp_path_factory.mktemp("random")
    config = models.write(
        root / "hf",
        seed=data.draw(st.integers(0, 2**31)),
        vocab_size=shards * data.draw(st.integers(2, 99)),
        hidden_size=kv * per_group * 2 * half,
        intermediate_size=shards * data.draw(st.integers(1, 70)),
        num_heads=kv * per_group,
        num_kv_heads=kv,
        head_dim=2 * half,
        rope=data.draw(st.sampled_from([Default(54321.0, 2 * half), Llama3(5e5, 2 * half, 8.0, 8192, 1.0, 4.0)])),
        max_position_embeddings=777,
        tie_word_embeddings=data.draw(st.booleans()),
    )
    convert(root / "hf", root / "out", "meta", shards=shards)
    (root / "out/config.json").unlink()
    report = convert(root / "out", root / "back", "hf", context=777)
    assert isinstance(config.rope, Default) or any("--rope-factor 32" in note for note in report.notes)
    models.assert_same(root / "hf", root / "back")
    shutil.rmtree(root)


@pytest.mark.parametrize("rope", [Default(54321.0, 4), Linear(1e4, 4, 2.0), Llama3(5e5, 4, 32.0, 8192, 1.0, 4.0)])
def test_megatron_arguments_alone_say_what_the_model_is(tmp_path, models, rope):
    models.write(tmp_path / "hf", rope=rope, rms_norm_eps=3e-6, vocab_size=97)
    convert(tmp_path / "hf", tmp_path / "out", "megatron", tensor=2)
    (tmp_path / "out/config.json").unlink()
    convert(tmp_path / "out", tmp_path / "back", "hf", true_vocab=97)
    models.assert_same(tmp_path / "hf", tmp_path / "back")


def test_padding_that_nothing_tells_from_tokens_is_kept_and_said(tmp_path, models):
    models.write(tmp_path / "hf", vocab_size=97)
    convert(tmp_path / "hf", tmp_path / "out", "megatron", tensor=2)
    (tmp_path / "out/config.json").unlink()
    report = convert(tmp_path / "out", tmp_path / "back", "hf")
    (note,) = (note for note in report.notes if "--true-vocab N" in note)
    assert "256 rows" in note
    rows = load_file(tmp_path / "back/model.safetensors")["lm_head.weight"]
    assert rows.shape[0] == 256
    assert torch.equal(rows[97:], rows[96:97].expand(256 - 97, -1))
    assert "a true vocabulary of 257" in refusal(tmp_path / "out", tmp_path / "x", "hf", true_vocab=257).problem


def rewrite(path, change):
    """Change what a PyTorch file holds."""
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


def test_what_a_converter_and_a_trainer_call_differently_is_one(tmp_path, models):
    models.write(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "out", "megatron")

    def as_converters_write(content):
        language = content["model"]["language_model"]
        language["transformer"] = {
            name.replace("self_attention", "attention"): tensor for name, tensor in language.pop("encoder").items()
        }
        language["embedding"] = {"word_embeddings.weight": language["embedding"]["word_embeddings"]["weight"]}
        content["args"] = vars(content["args"])
        content["optimizer"] = {"state": torch.ones(3)}

    rewrite(tmp_path / "out/release/mp_rank_00/model_optim_rng.pt", as_converters_write)
    (tmp_path / "out/release").rename(tmp_path / "out/iter_0000123")
    (tmp_path / "out/latest_checkpointed_iteration.txt").write_text("123")
    report = convert(tmp_path / "out", tmp_path / "back", "hf")
    assert "`optimizer` passed over: only weights are converted" in report.notes
    models.assert_same(tmp_path / "hf", tmp_path / "back")


def test_precision_changes_when_asked(tmp_path, models):
    models.write(tmp_path / "hf", std=0.3)
    report = convert(tmp_path / "hf", tmp_path / "out", "megatron", dtype="bfloat16", verify=True, tensor=2)
    assert report.verified is not None
    assert 0 < report.verified.mean < 0.1
    convert(tmp_path / "out", tmp_path / "back", "hf")
    assert json.loads((tmp_path / "back/config.json").read_text())["torch_dtype"] == "bfloat16"
    was, now = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    assert all(torch.equal(was[name].bfloat16(), now[name]) for name in was)


def test_numbers_that_are_not_finite_are_counted(tmp_path, models):
    models.write(tmp_path / "hf")
    path = tmp_path / "hf/model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3:5] = torch.tensor([torch.nan, torch.inf])
    save_file(tensors, path)
    report = convert(tmp_path / "hf", tmp_path / "out", "meta")
    assert "2 numbers in `model.norm.weight` are not finite (NaN or infinite)" in report.notes


def test_a_wrong_conversion_is_found_out_and_not_named(tmp_path, models, monkeypatch):
    models.write(tmp_path / "hf")
    monkeypatch.setattr(meta, "pairs_from_halves", lambda rows, head_dim: rows)
    error = refusal(tmp_path / "hf", tmp_path / "out", "meta", verify=True)
    assert "the logits of both sides differ" in error.problem
    assert (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("to", "options", "problem", "fix"),
    [
        ("megatron", {"tensor": 8}, "8 tensor ranks do not divide 4 key/value heads", "one of: 1, 2, 4"),
        ("megatron", {"pipeline": 3}, "3 pipeline ranks do not divide 4 layers", "one of: 1, 2, 4"),
        ("meta", {"shards": 3}, "3 shards do not divide 8 heads, 4 key/value heads", "one of: 1, 2, 4"),
    ],
)
def test_ranks_that_do_not_divide_are_refused_with_those_that_would(tmp_path, models, to, options, problem, fix):
    models.write(tmp_path / "hf")
    error = refusal(tmp_path / "hf", tmp_path / "out", to, **options)
    assert error.problem.startswith(problem)
    assert error.fix == fix


@pytest.mark.parametrize(
    ("changes", "to", "problem"),
    [
        ({"attention_bias": True}, "meta", "Meta's code has no biases"),
        ({"head_dim": 8, "rope": Default(1e4, 8)}, "meta", "no heads of 8 channels in a width of 32"),
        ({"rope": Linear(1e4, 4, 2.0)}, "meta", "no RoPE of type `linear`"),
        ({"rope": Llama3(1e4, 4, 8.0, 64, 1.0, 4.0)}, "meta", "`llama3` RoPE with other numbers"),
        ({"rope": Yarn(1e4, 4, 2.0, 32)}, "megatron", "Megatron has no RoPE like"),
        ({"rope": Llama3(1e4, 4, 8.0, 64, 1.0, 4.0)}, "megatron", "Megatron has no RoPE like"),
        ({"attention_bias": True}, "megatron", "biases everywhere or nowhere"),
    ],
)
def test_what_the_other_kind_cannot_compute_is_refused(tmp_path, models, changes, to, problem):
    models.write(tmp_path / "hf", **changes)
    assert problem in refusal(tmp_path / "hf", tmp_path / "out", to).problem


def test_options_that_would_be_ignored_are_refused(tmp_path, models):
    for keys in ({"to": "hf", "tensor": 2}, {"to": "meta", "pipeline": 2}, {"to": "megatron", "shards": 2}):
        with pytest.raises(LlameroError, match=" are of Me"):
            parse(ConvertConfig, keys)
    models.write(tmp_path / "hf")
    assert refusal(tmp_path / "hf", tmp_path / "out", "meta", context=9).where == "--context"
    assert refusal(tmp_path / "hf", tmp_path / "out", "meta", rope_factor=9).where == "--rope-factor"


def test_an_output_that_is_there_is_not_touched(tmp_path, models):
    models.write(tmp_path / "hf")
    (tmp_path / "out").mkdir()
    with pytest.raises(LlameroError, match="is there already"):
        convert(tmp_path / "hf", tmp_path / "out", "meta")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_directory_of_no_kind_or_of_two_is_refused(tmp_path, models):
    (tmp_path / "empty").mkdir()
    assert "no weights that are known" in refusal(tmp_path / "empty", tmp_path / "out", "hf").problem
    models.write(tmp_path / "hf")
    (tmp_path / "hf/consolidated.00.pth").touch()
    assert "several kinds of weights: hf, meta" in refusal(tmp_path / "hf", tmp_path / "out", "hf").problem


def test_a_config_of_another_model_beside_the_weights_is_refused(tmp_path, models):
    models.write(tmp_path / "hf")
    for to in ("meta", "megatron"):
        convert(tmp_path / "hf", tmp_path / to, to)
        path = tmp_path / to / "config.json"
        stated = json.loads(path.read_text())
        path.write_text(json.dumps({**stated, "rope_theta": 1e4, "rope_parameters": None}))
        problem = refusal(tmp_path / to, tmp_path / "out", "hf").problem
        assert problem == "config.json says theta 10000.0, the weights beside it 12345.0"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda c: c["args"].__setattr__("glu_activation", "geglu"), "`glu_activation: geglu` is not a Llama's"),
        (lambda c: c["args"].__setattr__("position_embedding_type", "absolute"), "is not rotary"),
        (lambda c: c["args"].__setattr__("tensor_model_parallel_size", 2), "but there are files for 1"),
        (lambda c: c["args"].__setattr__("hidden_size", None), "`hidden_size` must be a number"),
        (lambda c: c["args"].__setattr__("ffn_hidden_size", 47), "intermediate_size 48, the weights beside it 47"),
        (lambda c: c.update(checkpoint_version=1.0), "before 2.0 the rows of query_key_value had another order"),
        (lambda c: c.update(model0=c.pop("model")), "it has a virtual pipeline"),
        (lambda c: c.update(extra=1), "unknown content: extra"),
        (lambda c: c["model"]["language_model"].update(pooler={"weight": torch.ones(1)}), "pooler.weight` is not a"),
        (lambda c: c["model"]["language_model"].pop("lm_head"), "config.json says tie_word_embeddings False"),
        (lambda c: c["model"]["language_model"]["encoder"].pop("layers.1.mlp.dense_4h_to_h.weight"), "is missing"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_megatron_file_that_is_not_understood_is_refused(tmp_path, models, change, problem):
    models.write(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "out", "megatron")
    rewrite(tmp_path / "out/release/mp_rank_00/model_optim_rng.pt", change)
    assert problem in refusal(tmp_path / "out", tmp_path / "back", "hf").problem


@pytest.mark.parametrize(
    ("params", "problem"),
    [
        ({"lora_args": {}}, "unknown keys: lora_args"),
        ({"vocab_size": 95}, "`vocab_size` is 95, the embedding has 96 rows"),
        ({"multiple_of": 32}, "make a feed-forward layer of"),
        ({"n_heads": 4}, "config.json says num_heads 8, the weights beside it 4"),
        ({"n_layers": None}, "config.json says num_layers 4"),
    ],
)
def test_a_params_json_that_does_not_fit_is_refused(tmp_path, models, params, problem):
    models.write(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "out", "meta")
    path = tmp_path / "out/params.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **params}))
    assert problem in refusal(tmp_path / "out", tmp_path / "back", "hf").problem


def test_a_meta_directory_that_lacks_its_last_shard_is_refused(tmp_path, models):
    models.write(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "out", "meta", shards=4)
    (tmp_path / "out/consolidated.03.pth").unlink()
    error = refusal(tmp_path / "out", tmp_path / "back", "hf")
    assert error.problem == "3 shards have 24 columns of wo together, `dim` is 32"


def test_params_json_makes_any_feed_forward_width():
    for dim, width in itertools.product((4, 32, 4096), range(1, 700)):
        params = meta.feed_forward_params(dim, width)
        multiplier = params.get("ffn_dim_multiplier")
        assert meta.feed_forward(dim, multiple_of=params["multiple_of"], multiplier=multiplier) == width


@pytest.mark.parametrize(
    ("dim", "width", "multiplier"),
    [(4096, 11008, None), (5120, 13824, None), (8192, 22016, None), (8192, 28672, 1.3), (4096, 14336, 1.3),
     (2048, 8192, 1.5), (16384, 53248, 1.2)],
)  # fmt: skip
def test_params_json_of_published_sizes_has_published_numbers(dim, width, multiplier):
    assert meta.feed_forward_params(dim, width).get("ffn_dim_multiplier") == multiplier


def test_the_frequencies_that_meta_files_carry_are_said_to_be_passed_over(tmp_path, models):
    models.write(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "out", "meta")
    rewrite(tmp_path / "out/consolidated.00.pth", lambda content: content.update({"rope.freqs": torch.ones(2)}))
    report = convert(tmp_path / "out", tmp_path / "back", "hf")
    assert "`rope.freqs` passed over: it is computed" in report.notes
    models.assert_same(tmp_path / "hf", tmp_path / "back")


def test_a_fixture_of_meta_is_read(tmp_path, models):
    source = SHARED / "data/weights/random-fixtures/tiny_fair_checkpoint.pt"
    if not source.exists():
        pytest.skip(f"{source} is not there")
    (tmp_path / "meta").mkdir()
    shutil.copyfile(source, tmp_path / "meta/consolidated.00.pth")
    params = {"dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": -1, "multiple_of": 256, "norm_eps": 1e-5}
    (tmp_path / "meta/params.json").write_text(json.dumps(params))
    report = convert(tmp_path / "meta", tmp_path / "hf", "hf", verify=True)
    assert report.verified is not None
    convert(tmp_path / "hf", tmp_path / "again", "meta")
    was, now = (torch.load(tmp_path / name / "consolidated.00.pth") for name in ("meta", "again"))
    assert was.keys() == now.keys()
    assert all(torch.equal(was[name], now[name]) for name in was)


def test_the_command_says_what_was_done_and_what_it_took(tmp_path, models, capsys):
    models.write(tmp_path / "hf")
    with pytest.raises(SystemExit) as stopped:
        main(["convert", str(tmp_path / "hf"), str(tmp_path / "out"), "--to", "megatron", "--tensor", "2", "--verify"])
    assert stopped.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "logits of both sides differ by at most" in said
    assert "37,152 parameters, hf to megatron" in said
    assert "largest layer 0.03 MB, peak memory of the process" in said
    with pytest.raises(SystemExit) as stopped:
        main(["convert", str(tmp_path / "hf"), str(tmp_path / "out"), "--to", "meta", "--tensor", "2"])
    assert stopped.value.code == 2
    assert "`tensor` and `pipeline` are of Megatron checkpoints" in capsys.readouterr().err


def test_arguments_are_saved_as_a_namespace(tmp_path, models):
    config = models.write(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "out", "megatron", tensor=2, pipeline=2)
    file = tmp_path / "out/release/mp_rank_01_001/model_optim_rng.pt"
    args = torch.load(file, weights_only=False)["args"]
    assert isinstance(args, argparse.Namespace)
    assert args.rope_theta == config.rope.theta
    assert args.padded_vocab_size == 256
    assert args.params_dtype == torch.float32
