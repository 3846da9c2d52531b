"""GGUF variants, read by the `gguf` library: weights bit for bit, metadata, tokenizer."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamero.checkpoint.gguf import open_gguf
from llamero.checkpoint.gguf_names import from_gguf, rows_from_gguf, to_gguf
from llamero.checkpoint.imatrix import Imatrix, read_imatrix, write_imatrix
from llamero.core.errors import LlameroError
from llamero.core.gguf import Value
from llamero.model.config import LlamaConfig
from llamero.model.llama import Llama, initialize
from llamero.model.load import load_model, save_model
from llamero.model.rope import Default, Dynamic, Linear, Llama3, Yarn
from llamero.quantize import gguf_mix, gguf_sizes
from llamero.quantize.config import Calibration, QuantizeConfig
from llamero.quantize.gguf import GgufVariantWriter
from llamero.quantize.gguf_metadata import _sampling, metadata, size_label
from llamero.quantize.gguf_mix import MIXES
from llamero.quantize.run import run
from llamero.text.tokenizer import train_bpe

gguf = pytest.importorskip("gguf")

SHARED = Path(os.environ.get("LLAMERO_SHARED", Path(__file__).parents[4] / "shared")) / "data"
ALL = tuple(f"gguf-{mix}" for mix in MIXES)
TEXTS = ["the cat sat on the mat, 12 times or 345 times", "naïve café: 日本語 👩‍👩‍👧 \n\n  two  spaces\tand a tab"] * 8


def shape(**changes):
    keys = {
        "vocab_size": 320,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_layers": 1,
        "num_heads": 4,
        "num_kv_heads": 1,
        "head_dim": 64,
        "rope": Default(10000.0, 64),
        "max_position_embeddings": 64,
    }
    return LlamaConfig(**{**keys, **changes})


def make_model(directory, config):
    model = Llama(config)
    initialize(model, seed=1, std=0.1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data = torch.linspace(-1, 1, len(parameter))
    directory.mkdir(parents=True)
    save_model(model, directory)
    train_bpe(iter(TEXTS), vocab_size=300, split_digits=False).save(directory, chat_template="{{ messages }}")
    (directory / "generation_config.json").write_text(
        '{"do_sample": true, "temperature": 0.6, "top_k": 40, "top_p": 0.9, "eos_token_id": [2, 7]}'
    )
    return directory


def make(model, out, *variants, imatrix=None, propagation="shared", **options):
    random = torch.Generator().manual_seed(2)
    tokens = [torch.randint(0, 300, (length,), generator=random) for length in (48, 17, 64)]
    config = QuantizeConfig(
        variants=variants,
        calibration=Calibration.model_validate({"mixture": "chat", "propagation": propagation}),
        imatrix=imatrix,
    )
    return run(config, model=model, out=lambda v: out / v.name, tokens=tokens, **options)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "plain", shape())


@pytest.mark.parametrize("propagation", ["reference", "per-bits", "exact"])
def test_a_variant_does_not_depend_on_what_else_is_made(model, tmp_path, propagation):
    first, *_ = make(model, tmp_path / "alone", "gguf-rtn-Q4_0", propagation=propagation)
    others = ("gptq-2bit-32g-actorder_static-ct", "gguf-rtn-Q4_0")
    _, beside = make(model, tmp_path / "beside", *others, propagation=propagation)
    assert [path.read_bytes() for path in files(first)] == [path.read_bytes() for path in files(beside)]


@pytest.fixture(scope="module")
def solved():
    return {}


@pytest.fixture(scope="module")
def reports(model, solved, tmp_path_factory):
    out, write = tmp_path_factory.mktemp("variants"), GgufVariantWriter.add_layer

    def listen(self, number, block, solution):
        for name, codes in solution.codes.items():
            solved[self.directory.name, f"model.layers.{number}.{name}.weight"] = codes.dequantize()
        write(self, number, block, solution)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GgufVariantWriter, "add_layer", listen)
        return {report.variant.name: report for report in make(model, out, *ALL)}


def files(report):
    return sorted(report.path.glob("*.gguf"))


def theirs(path):
    """The tensors of a file as the library dequantizes them, with Hugging Face's names and rows."""
    from gguf.quants import dequantize

    reader, found = gguf.GGUFReader(path), {}
    head_dim = reader.fields["llama.rope.dimension_count"].contents()
    for tensor in reader.tensors:
        values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))
        name = from_gguf(tensor.name)
        if name is not None:
            found[name] = rows_from_gguf(name, values.view(*reversed(tensor.shape.tolist())), head_dim)
    return found


@pytest.mark.parametrize("name", ALL)
def test_the_library_finds_what_was_solved_bit_for_bit(reports, solved, name):
    (path,) = files(reports[name])
    read = theirs(path)
    mine = {tensor: weight for (variant, tensor), weight in solved.items() if variant == name}
    assert len(mine) == 7
    for tensor, weight in mine.items():
        assert torch.equal(read[tensor], weight), tensor


@pytest.mark.parametrize("name", ALL)
def test_every_type_is_the_one_of_the_mix_and_near_the_weights(reports, model, name):
    (path,) = files(reports[name])
    plain = dict(load_model(model, dtype=torch.float32).named_parameters())
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    expected = gguf_mix.types(shape(), reports[name].variant.mix)
    assert kinds == {to_gguf(tensor): expected.get(str(to_gguf(tensor)), "F32") for tensor in plain}
    bits = reports[name].variant.bits
    for tensor, weight in theirs(path).items():
        error = (weight - plain[tensor]).norm() / plain[tensor].norm()
        assert error < (0.9 * 2.0 ** (2 - bits) + 2e-3 if plain[tensor].dim() == 2 else 1e-6), tensor
    assert reports[name].size_bytes == path.stat().st_size
    assert path.stat().st_mode & 0o777 == 0o644


def test_sizes_are_known_from_the_shape(reports):
    for report in reports.values():
        (path,) = files(report)
        tensors = gguf.GGUFReader(path).tensors
        head = tensors[0].data_offset
        foretold = gguf_sizes.size(shape(), report.variant.mix)
        assert 0 <= path.stat().st_size - foretold <= head


def test_rounding_by_itself_errs_more_in_a_file_of_the_same_size(reports, model, tmp_path):
    plain, (path,) = make(model, tmp_path, "gguf-rtn-Q3_K_S")[0], files(reports["gguf-Q3_K_S"])
    (other,) = files(plain)
    assert other.name == path.name
    assert other.stat().st_size == path.stat().st_size
    assert reports["gguf-Q3_K_S"].error_per_weight < 0.9 * plain.error_per_weight
    assert (plain.damp, reports["gguf-Q3_K_S"].damp) == (None, 0.01)


def test_more_bits_err_less(reports):
    order = ["F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K"]
    errors = [reports[f"gguf-{mix}"].error_per_weight for mix in order]
    assert errors == sorted(errors)
    assert reports["gguf-Q4_K_M"].error_per_weight < reports["gguf-Q4_0"].error_per_weight


def test_what_a_file_says_of_the_model(reports):
    (path,) = files(reports["gguf-Q4_K_M"])
    fields = {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_K_M
    assert fields["general.quantization_version"] == gguf.GGML_QUANT_VERSION
    said = {key.removeprefix("llama."): value for key, value in fields.items() if key.startswith("llama.")}
    assert said == {
        "vocab_size": 320, "context_length": 64, "embedding_length": 256, "block_count": 1, "feed_forward_length": 256,
        "attention.head_count": 4, "attention.head_count_kv": 1, "attention.key_length": 64,
        "attention.value_length": 64, "rope.dimension_count": 64, "rope.freq_base": 10000.0,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
    }  # fmt: skip
    sampling = {key: value for key, value in fields.items() if key.startswith("general.sampling")}
    assert sampling == {
        "general.sampling.temp": pytest.approx(0.6), "general.sampling.top_k": 40,
        "general.sampling.top_p": pytest.approx(0.9),
    }  # fmt: skip
    assert fields["tokenizer.chat_template"] == "{{ messages }}"
    assert fields["tokenizer.ggml.eos_token_id"] == 2
    assert fields["tokenizer.ggml.eot_token_id"] == 7
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert len(fields["tokenizer.ggml.tokens"]) == 320
    assert fields["tokenizer.ggml.token_type"][300:] == [gguf.TokenType.UNUSED] * 20
    assert fields["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 1]


def test_file_types_are_those_of_the_library():
    ours = {f"MOSTLY_{name}": mix.file_type for name, mix in MIXES.items()}
    assert ours == {name: getattr(gguf.LlamaFileType, name).value for name in ours}


def test_the_model_is_not_named_by_a_path(reports, model):
    for report in reports.values():
        assert all(str(model).encode() not in path.read_bytes() for path in report.path.iterdir())


def test_the_same_run_gives_the_same_bytes(reports, model, tmp_path):
    (again,) = make(model, tmp_path, "gguf-Q3_K_M")
    (first,), (second,) = files(reports["gguf-Q3_K_M"]), files(again)
    assert first.read_bytes() == second.read_bytes()


def test_large_files_are_split(model, tmp_path):
    (report,) = make(model, tmp_path, "gguf-Q8_0", shard_bytes=150_000)
    paths = files(report)
    assert len(paths) > 2
    assert max(path.stat().st_size for path in paths) < 180_000
    assert sum(path.stat().st_size for path in paths) == report.size_bytes
    assert len(open_gguf(paths[0]).specs) == len(gguf_sizes.specs(shape(), "Q8_0"))


def test_together_with_other_layouts(model, tmp_path):
    one, two = make(model, tmp_path, "gptq-4bit-32g-actorder_True", "gguf-Q5_K_S")
    assert (one.path / "model.safetensors").exists()
    assert files(two)
    assert (two.path / "tokenizer.json").exists()
    assert one.notes == two.notes == ()


@settings(max_examples=6)
@given(
    hidden=st.sampled_from([8, 32, 96, 256]),
    inner=st.sampled_from([12, 64, 256]),
    mix=st.sampled_from(["Q2_K", "Q4_K_M", "Q5_K_M", "Q4_0"]),
    tied=st.booleans(),
    biased=st.booleans(),
)
def test_any_shape_becomes_a_file_that_says_what_fell_back(tmp_path_factory, hidden, inner, mix, tied, biased):
    config = shape(
        hidden_size=hidden, intermediate_size=inner, num_layers=1, head_dim=16, rope=Llama3(1e4, 16, 8.0, 32, 1.0, 4.0),
        tie_word_embeddings=tied, attention_bias=biased, mlp_bias=biased,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("shapes")
    source = make_model(directory / "source", config)
    (report,) = make(source, directory, f"gguf-{mix}")
    (path,) = files(report)
    plain = dict(load_model(source, dtype=torch.float32).named_parameters())
    read = theirs(path)
    assert read.keys() == plain.keys()
    assert ("lm_head.weight" in read) != tied
    for name, weight in read.items():
        error = (weight - plain[name]).norm() / plain[name].norm()
        assert error < (0.7 if weight.dim() == 2 else 1e-6), name
    choices = gguf_mix.choices(config, mix)
    fallen = sum(choice.type != choice.wanted for choice in choices.values())
    assert sum(int(note.split()[0]) for note in report.notes) == fallen


def test_stretched_contexts(model):
    def keys(rope):
        found = metadata(model, shape(rope=rope), "Q8_0")
        return {k.removeprefix("llama.rope.scaling."): v.value for k, v in found.values.items() if "scaling" in k}, [
            note for note in found.notes if "context" in note or "ramp" in note
        ]

    assert keys(Default(1e4, 64)) == keys(Llama3(1e4, 64, 8.0, 32, 1.0, 4.0)) == ({}, [])
    assert keys(Linear(1e4, 64, 4.0)) == ({"type": "linear", "factor": 4.0}, [])
    yarn = {"type": "yarn", "factor": 4.0, "original_context_length": 32, "yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0}
    assert keys(Yarn(1e4, 64, 4.0, 32)) == (yarn, [])
    said, notes = keys(Yarn(1e4, 64, 4.0, 32, attention_factor=1.0, truncate=False))
    assert said["attn_factor"] * (0.1 * math.log(4.0) + 1) == pytest.approx(1.0)
    assert len(notes) == 1
    assert keys(Dynamic(1e4, 64, 2.0, 32)) == (
        {}, ["readers of GGUF do not stretch the context dynamically: not beyond 32 tokens"],
    )  # fmt: skip


def test_divisors_of_llama_3_make_its_frequencies():
    rope = Llama3(500000.0, 128, 8.0, 8192, 1.0, 4.0)
    plain = Default(500000.0, 128).frequencies(1)
    torch.testing.assert_close(plain / rope.divisors(), rope.frequencies(1), rtol=1e-6, atol=0)
    assert rope.divisors()[0] == 1
    assert rope.divisors()[-1] == 8


def test_size_labels():
    assert size_label(shape(vocab_size=1000)) == "873K"
    assert size_label(shape(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32)) == "6.8B"
    assert size_label(shape(vocab_size=32000, hidden_size=4096, intermediate_size=11008)) == "400M"


def test_broken_weights_are_named(tmp_path):
    source = make_model(tmp_path / "broken", shape())
    broken = load_model(source)
    broken.lm_head.weight.data[3, 5] = float("nan")
    save_model(broken, source)
    with pytest.raises(LlameroError, match="not finite") as caught:
        make(source, tmp_path, "gguf-Q4_K_M")
    assert caught.value.where == "lm_head.weight"
    assert not list((tmp_path / "gguf-Q4_K_M").glob("*.gguf"))


def test_importances_are_written_and_heeded_instead_of_our_own(reports, model, tmp_path):
    first = reports["gguf-Q4_0"]
    ours = read_imatrix(first.path / "imatrix.dat")
    kinds = gguf_mix.types(shape(), "Q4_0")
    assert ours.mean_square.keys() == {*kinds} - {"token_embd.weight"}
    assert ours.chunks == 3
    write_imatrix(tmp_path / "same.gguf", ours)
    other = Imatrix({name: values.flip(0) for name, values in ours.mean_square.items()}, 1, 1)
    write_imatrix(tmp_path / "other.dat", other)
    (same,) = make(model, tmp_path / "same", "gguf-Q4_0", imatrix=tmp_path / "same.gguf")
    (differs,) = make(model, tmp_path / "differs", "gguf-Q4_0", imatrix=tmp_path / "other.dat")
    assert same.error_per_weight == pytest.approx(first.error_per_weight, rel=1e-3)
    assert differs.error_per_weight > first.error_per_weight
    read = read_imatrix(differs.path / "imatrix.dat").mean_square
    assert all(torch.allclose(values, other.mean_square[name]) for name, values in read.items())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"blk.0.attn_q.weight": torch.ones(255)}, "has 255 channels, this model has 256"),
        ({"blk.7.attn_q.weight": torch.ones(256)}, "this model has no such tensor"),
        ({"blk.0.ffn_up.weight": None}, r"lacks 1 layers of the model, such as `blk\.0\.ffn_up"),
    ],
)
def test_importances_of_another_model_are_refused(reports, model, tmp_path, change, said):
    ours = read_imatrix(reports["gguf-Q4_0"].path / "imatrix.dat")
    changed = {name: values for name, values in {**ours.mean_square, **change}.items() if values is not None}
    write_imatrix(tmp_path / "imatrix.dat", Imatrix(changed, 1, 1))
    with pytest.raises(LlameroError, match=said) as caught:
        make(model, tmp_path, "gguf-Q4_0", imatrix=tmp_path / "imatrix.dat")
    assert "imatrix.dat" in str(caught.value)


def test_the_head_heeds_importances_too(reports, model, tmp_path):
    ours = read_imatrix(reports["gguf-Q4_0"].path / "imatrix.dat")
    head = torch.full((256,), 1e-6)
    head[::2] = 1.0
    write_imatrix(tmp_path / "imatrix.dat", Imatrix({**ours.mean_square, "output.weight": head}, 1, 1))
    (report,) = make(model, tmp_path, "gguf-Q4_0", imatrix=tmp_path / "imatrix.dat")
    plain = load_model(model, dtype=torch.float32).lm_head.weight.detach()
    errors = [
        (theirs(files(each)[0])["lm_head.weight"] - plain)[:, ::2].norm() for each in (report, reports["gguf-Q4_0"])
    ]
    assert errors[0] < 0.98 * errors[1]


def test_numbers_of_generation_config_are_stored_as_their_kind_or_refused():
    said = _sampling({"do_sample": True, "top_k": 50.0, "temperature": 1})
    assert said["general.sampling.top_k"] == Value("int32", 50)
    assert said["general.sampling.temp"] == Value("float32", 1)
    for wrong in (50.5, "50", True):
        with pytest.raises(LlameroError, match=f"top_k: {wrong}` is not a whole number"):
            _sampling({"do_sample": True, "top_k": wrong})
