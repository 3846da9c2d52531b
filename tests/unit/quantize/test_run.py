import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from llamero.core.errors import LlameroError
from llamero.model import rtn
from llamero.model.config import LlamaConfig
from llamero.model.linear import PackedLinear
from llamero.model.llama import Llama, initialize
from llamero.model.load import load_model, save_model
from llamero.model.rope import Default
from llamero.quantize import awq, calibrate, problem
from llamero.quantize.calibrate import INPUTS
from llamero.quantize.config import Calibration, QuantizeConfig
from llamero.quantize.run import run
from llamero.quantize.write import VariantWriter

SHARED = Path(os.environ.get("LLAMERO_SHARED", Path(__file__).parents[4] / "shared")) / "data"

ALL = (
    "gptq-2bit-32g-actorder_False",
    "gptq-3bit-32g-actorder_True",
    "gptq-3bit--1g-actorder_static",
    "gptq-4bit-32g-actorder_True",
    "gptq-4bit-32g-actorder_static",
    "gptq-4bit-32g-actorder_False",
    "gptq-4bit--1g-actorder_True",
    "gptq-8bit-64g-actorder_True",
    "rtn-4bit-32g",
    "rtn-3bit--1g",
)


def config(**changes):
    keys = {"variants": ("gptq-4bit-32g-actorder_True",), "calibration": Calibration(mixture="chat"), **changes}
    return QuantizeConfig(**keys)


def shape(**changes):
    keys = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "rope": Default(10000.0, 16),
        "max_position_embeddings": 64,
        **changes,
    }
    return LlamaConfig(**keys)


def make_model(directory, **changes):
    model = Llama(shape(**changes))
    initialize(model, seed=1, std=0.3)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data = torch.linspace(-1, 1, len(parameter))
    directory.mkdir()
    save_model(model, directory)
    (directory / "generation_config.json").write_text("{}")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "chat_template.jinja").chmod(0o400)
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture(scope="module")
def tokens():
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, 96, (length,), generator=generator) for length in (48, 48, 17, 64)]


@pytest.fixture(scope="module", params=[True, False], ids=["sym", "asym"])
def reports(request, model, tokens, tmp_path_factory):
    out = tmp_path_factory.mktemp("variants")
    return run(config(variants=ALL, sym=request.param), model=model, out=lambda v: out / v.name, tokens=tokens)


def fields(words, bits):
    """Values of a bit stream along the first axis."""
    as_bytes = np.ascontiguousarray(words.T).view(np.uint8)
    digits = np.unpackbits(as_bytes, axis=1, bitorder="little").reshape(words.shape[1], -1, bits)
    return (digits * (1 << np.arange(bits))).sum(-1).T


def dequantize(tensors, name, bits):
    """The weight (out, d) of a GPTQ v1 layer."""
    q = fields(tensors[f"{name}.qweight"], bits)  # (d, out)
    z = fields(tensors[f"{name}.qzeros"].T, bits).T + 1  # (groups, out)
    s, g = tensors[f"{name}.scales"], tensors[f"{name}.g_idx"]
    assert s.dtype == np.float16
    return (s[g].astype(np.float32) * (q - z[g]).astype(np.float32)).T


def test_an_independent_unpacker_finds_what_was_solved_bit_for_bit(model, tokens, tmp_path, monkeypatch, reports):
    solved = {}
    write = VariantWriter.add_layer

    def listen(self, number, block, solution):
        for name, value in solution.codes.items():
            solved[self.directory.name, f"model.layers.{number}.{name}"] = value.dequantize().numpy()
        write(self, number, block, solution)

    monkeypatch.setattr(VariantWriter, "add_layer", listen)
    sym = reports[0].variant.sym
    run(config(variants=ALL, sym=sym), model=model, out=lambda v: tmp_path / v.name, tokens=tokens)
    assert len(solved) == len(ALL) * 2 * 7
    for report in reports:
        tensors = load_file(report.path / "model.safetensors")
        for (variant, name), expected in solved.items():
            if variant == report.variant.name:
                assert np.array_equal(dequantize(tensors, name, report.variant.bits), expected)
        again = tmp_path / report.variant.name / "model.safetensors"
        assert (report.path / "model.safetensors").read_bytes() == again.read_bytes()


def twin(source, report):
    """The plain model with the weights that our files hold, read without our code."""
    tensors = load_file(report.path / "model.safetensors")
    plain = load_model(source, dtype=torch.float32)
    for name, module in plain.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            weight = dequantize(tensors, f"model.layers.{name}", report.variant.bits)
            module.weight.data = torch.from_numpy(weight).contiguous()
    for name, parameter in plain.named_parameters():
        if name in tensors:
            parameter.data = torch.from_numpy(tensors[name]).float()
    return plain


@torch.no_grad()
def test_our_loader_runs_every_variant(model, reports, tokens):
    ids = torch.stack(tokens[:2])
    for report in reports:
        packed = load_model(report.path, dtype=torch.float32)
        assert isinstance(packed.get_submodule("model.layers.0.mlp.up_proj"), PackedLinear)
        torch.testing.assert_close(packed(ids), twin(model, report)(ids), atol=1e-4, rtol=1e-4)


def test_gptq_errs_less_than_rounding(reports):
    error = {report.variant.name: report.error_per_weight for report in reports}
    for order in ("True", "static", "False"):
        assert error[f"gptq-4bit-32g-actorder_{order}"] < error["rtn-4bit-32g"]
    assert error["gptq-8bit-64g-actorder_True"] < 0.1 * error["gptq-4bit-32g-actorder_True"]


def test_a_report_says_what_was_done(reports, tokens):
    for report in reports:
        assert len(report.modules) == 14
        assert report.modules[0].name == "model.layers.0.self_attn.q_proj"
        assert report.damp == (None if report.variant.method == "rtn" else 0.01)
        assert not report.escalated
        assert report.size_bytes == (report.path / "model.safetensors").stat().st_size
        assert report.variant.bits < report.bits_per_weight < report.variant.bits + 2
        assert (report.tokens, report.sequences) == (sum(map(len, tokens)), 4)


def test_a_quantized_directory_is_whole_and_readable(model, reports):
    for report in reports:
        files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in report.path.iterdir()}
        assert files == dict.fromkeys(
            [
                "chat_template.jinja",
                "config.json",
                "generation_config.json",
                "model.safetensors",
                "quantize_config.json",
            ],
            0o644,
        )
        keys = json.loads((report.path / "config.json").read_text())
        assert keys["quantization_config"] == json.loads((report.path / "quantize_config.json").read_text())
        assert keys["torch_dtype"] == "float16"
        assert keys["quantization_config"]["desc_act"] is (report.variant.actorder == "desc")
        assert str(report.path.parent) not in json.dumps(keys)


def test_statistics_are_those_of_the_whole_model(model, tokens):
    plain = load_model(model, dtype=torch.float32)
    seen = {}
    for name, module in plain.model.layers.named_modules():
        if name.partition(".")[2] in INPUTS:
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.setdefault(name, []).append(args[0].double())
            )
    with torch.no_grad():
        for ids in tokens:
            plain(ids[None])
    for layer in calibrate.Walk(model, plain.config, tokens):
        for name, statistics in layer.statistics.items():
            x = torch.cat(seen[f"{layer.number}.{name}"])
            assert statistics.tokens == len(x)
            torch.testing.assert_close(statistics.second_moment.double(), x.T @ x, rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(statistics.mean_abs.double(), x.abs().mean(0), rtol=1e-4, atol=1e-5)


def test_variants_may_be_written_in_several_files(model, tokens, tmp_path):
    (report,) = run(config(), model=model, out=lambda _: tmp_path / "q", tokens=tokens, shard_bytes=40_000)
    assert len(list(report.path.glob("model-*.safetensors"))) > 1
    assert load_model(report.path)(tokens[0][None]).isfinite().all()


@torch.no_grad()
def test_biases_and_tied_heads_are_kept(tokens, tmp_path):
    source = make_model(tmp_path / "m", tie_word_embeddings=True, attention_bias=True)
    (report,) = run(
        config(variants=("gptq-8bit-32g-actorder_True",)), model=source, out=lambda _: tmp_path / "q", tokens=tokens
    )
    tensors = load_file(report.path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    assert np.array_equal(tensors["model.layers.1.self_attn.k_proj.bias"], np.linspace(-1, 1, 32, dtype=np.float16))
    torch.testing.assert_close(
        load_model(report.path, dtype=torch.float32)(tokens[0][None]),
        twin(source, report)(tokens[0][None]),
        atol=1e-4,
        rtol=1e-4,
    )


def test_a_model_is_not_quantized_twice(reports, tokens, tmp_path):
    with pytest.raises(LlameroError, match="quantized already"):
        run(config(), model=reports[0].path, out=lambda _: tmp_path / "q", tokens=tokens)


def test_a_variant_needs_a_place_of_its_own(model, tokens, tmp_path):
    with pytest.raises(LlameroError, match="directory of its own"):
        run(config(), model=model, out=lambda _: model, tokens=tokens)
    with pytest.raises(LlameroError, match="directory of its own"):
        run(config(variants=ALL[:2]), model=model, out=lambda _: tmp_path / "q", tokens=tokens)


def test_a_group_that_does_not_divide_names_variants_and_sizes(model, tokens, tmp_path):
    names = ("rtn-4bit-96g", "rtn-4bit-32g", "rtn-4bit-128g")
    with pytest.raises(LlameroError, match=r"`rtn-4bit-96g`: groups of 96 .* 64 input .*`rtn-4bit-128g`") as caught:
        run(config(variants=names), model=model, out=lambda v: tmp_path / v.name, tokens=tokens)
    assert caught.value.where == str(model)
    assert (
        caught.value.fix
        == "leave them out: rtn-4bit-32g can be made; group sizes that divide every layer: 16, 32, 64, -1"
    )
    assert list(tmp_path.iterdir()) == []


def test_widths_that_no_reader_takes_are_refused(tokens, tmp_path):
    source = make_model(tmp_path / "m", intermediate_size=144)
    with pytest.raises(LlameroError, match=r"144 channels; .* multiple of 32"):
        run(config(), model=source, out=lambda _: tmp_path / "q", tokens=tokens)


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        ([], "no calibration tokens"),
        ([[]], "no calibration tokens"),
        ([[1] * 65], "sequences of 65 tokens, the model reads 64"),
        ([[1, 96]], "tokens 1 to 96, the model's vocabulary has 96"),
    ],
)
def test_tokens_that_the_model_cannot_read_are_refused(model, tmp_path, ids, says):
    with pytest.raises(LlameroError, match=says):
        run(
            config(), model=model, out=lambda _: tmp_path / "q", tokens=[torch.tensor(i, dtype=torch.long) for i in ids]
        )


def broken(tmp_path, name, value):
    plain = Llama(shape())
    initialize(plain, seed=1)
    plain.get_parameter(name).data[0] = value
    save_model(plain, tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "value", "where", "says"),
    [
        ("model.layers.1.input_layernorm.weight", float("nan"), "model.layers.1.self_attn.q_proj", "not all finite"),
        ("model.layers.1.mlp.down_proj.weight", float("inf"), "model.layers.1.mlp.down_proj.weight", "not finite"),
        ("model.layers.1.mlp.down_proj.weight", 1e6, "model.layers.1.mlp.down_proj.weight", "a scale beyond float16"),
        ("lm_head.weight", 1e6, "lm_head.weight", "up to 1e+06) do not fit into float16"),
    ],
)
def test_numbers_that_break_quantization_name_their_tensor(tokens, tmp_path, name, value, where, says):
    source = broken(tmp_path, name, value)
    with pytest.raises(LlameroError) as caught:
        run(config(sensitivity=0), model=source, out=lambda _: tmp_path / "q", tokens=tokens)
    assert says in caught.value.problem
    assert caught.value.where == where
    assert not (tmp_path / "q" / "config.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(
    not (SHARED / "weights/ref-7m-hf").is_dir() or not (SHARED / "longtext/wikitext2").is_dir(),
    reason="needs the real model and text of the shared folder",
)
def test_on_a_real_model_gptq_is_nearer_than_rounding_and_nearer_still_by_how_the_loss_feels_it(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    source, text = SHARED / "weights/ref-7m-hf", SHARED / "longtext/wikitext2"
    encode = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json")).encode

    def read(name, count):
        ids = encode((text / name).read_text(encoding="utf-8")[:60_000], add_special_tokens=False).ids
        return torch.tensor(ids[: count * 512]).view(count, 512)

    names, tokens = ("rtn-4bit-128g", "gptq-4bit-128g-actorder_True"), list(read("valid.txt", 8))
    reports = []
    for wanted, made in ((0, names), (4096, names[1:])):
        place = tmp_path / str(wanted)
        asked = config(variants=made, sensitivity=wanted)
        reports += run(asked, model=source, out=lambda v, at=place: at / v.name, tokens=tokens)
    test = read("test.txt", 2)
    with torch.no_grad():
        whole = load_model(source, dtype=torch.float32)(test).log_softmax(-1)
        rounded, solved, coupled = (
            float(
                (whole.exp() * (whole - load_model(r.path, dtype=torch.float32)(test).log_softmax(-1))).sum(-1).mean()
            )
            for r in reports
        )
    assert coupled < 0.6 * solved < 0.3 * rounded < 0.01


OTHERS = (
    "gptq-4bit-32g-actorder_True-v2",
    "gptq-5bit-32g-actorder_static-ct",
    "gptq-3bit--1g-actorder_False-asym-ct",
    "awq-4bit-32g",
    "awq-3bit-32g-ct",
    "int8",
    "nf4",
)


def test_every_layout_is_read_as_it_was_solved(model, tokens, tmp_path, monkeypatch):
    solved = {}
    write = VariantWriter.add_layer

    def listen(self, number, block, solution):
        prefix = f"model.layers.{number}."
        weights = {f"{prefix}{name}.weight": codes.dequantize() for name, codes in solution.codes.items()}
        changed = {prefix + name: value.half().float() for name, value in solution.changed.items()}
        solved.setdefault(self.directory.name, {}).update(weights | changed)
        write(self, number, block, solution)

    monkeypatch.setattr(VariantWriter, "add_layer", listen)
    run(config(variants=OTHERS), model=model, out=lambda v: tmp_path / v.name, tokens=tokens)
    ids = torch.arange(30)[None]
    for name in OTHERS:
        plain = load_model(model, dtype=torch.float32)
        packed = load_model(tmp_path / name, dtype=torch.float32, products="plain")
        stored = dict(load_model(tmp_path / name).named_parameters())
        with torch.no_grad():
            for key, parameter in plain.named_parameters():
                parameter.copy_(solved[name][key] if key in solved[name] else stored[key].float())
            assert sum(isinstance(module, PackedLinear) for module in packed.modules()) == 14
            assert torch.equal(packed(ids), plain(ids)), name


def test_outputs_answer_to_one_another_where_it_is_asked_for_and_leave_nothing_beside_the_variant(
    model, tokens, tmp_path
):
    found = {}
    for wanted in (0, 64, 65):  # sequences are taken whole
        place = tmp_path / str(wanted)
        asked = config(variants=("gptq-4bit-32g-actorder_static",), sensitivity=wanted)
        (report,) = run(asked, model=model, out=lambda v, at=place: at / v.name, tokens=tokens)
        assert [path.name for path in place.iterdir()] == ["gptq-4bit-32g-actorder_static"]
        found[wanted] = load_file(report.path / "model.safetensors")["model.layers.0.mlp.down_proj.qweight"]
    assert not np.array_equal(found[0], found[64])
    assert np.array_equal(found[64], found[65])


def test_refinement_takes_each_output_for_itself():
    with pytest.raises(ValueError, match="set `sensitivity: 0`"):
        config(refine=1)


def test_what_is_held_at_a_time_changes_no_byte(model, tokens, tmp_path, monkeypatch):
    names = (
        "gptq-4bit-32g-actorder_True",
        "gptq-3bit-32g-actorder_False",
        "rtn-4bit-32g",
        "awq-4bit-32g",
        "int8",
        "nf4",
    )

    def files(out):
        run(config(variants=names, sensitivity=0), model=model, out=lambda v: out / v.name, tokens=tokens)
        return {path.relative_to(out): path.read_bytes() for path in sorted(out.rglob("*.safetensors"))}

    whole = files(tmp_path / "whole")
    monkeypatch.setattr(problem, "HELD", 1)  # each variant by itself
    for module, name in ((problem, "AT_ONCE"), (awq, "AT_ONCE"), (rtn, "_AT_ONCE")):
        monkeypatch.setattr(module, name, 1000)  # a few rows
    assert files(tmp_path / "parts") == whole
