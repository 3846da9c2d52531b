import errno
import json
import os
import re
import subprocess
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from llamero.core import files
from llamero.core.artifact import Artifact
from llamero.core.errors import LlameroError
from llamero.core.results import Result
from llamero.publish import place
from llamero.publish.card import Cards, read_prompt, read_shape
from llamero.publish.config import PublishConfig, Sampling
from llamero.publish.release import Gate, Withheld
from llamero.publish.run import run

VARIANT = "gptq-4bit-128g-actorder_True"


@pytest.fixture(scope="module")
def release(inputs, config, tmp_path_factory):
    out = tmp_path_factory.mktemp("release")
    run(config, inputs, out)
    return out


def cards(config, inputs) -> Cards:
    """The cards alone, without files and pictures."""
    path = inputs.model.path
    curves = {stage.name: "loss.png" for stage in inputs.trained}
    return Cards(config, inputs, read_shape(path), read_prompt(path, inputs.template), curves)


@pytest.fixture
def model_card(release):
    return (release / "tiny/README.md").read_text()


@pytest.fixture
def quantized_card(release):
    return (release / "tiny-GPTQ/README.md").read_text()


def row(card: str, start: str) -> list[str]:
    """Cells of the first row of a card whose first cell begins so."""
    line = next(line for line in card.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_summary_says_what_is_there(inputs, config, tmp_path):
    summary = run(config, inputs, tmp_path / "release")
    assert summary["repositories"] == ["tiny", "tiny-GPTQ"]
    assert summary["cards"] == ["tiny/README.md", "tiny-GPTQ/README.md"]
    on_disk = [path for path in (tmp_path / "release").rglob("*") if path.is_file()]
    assert summary["files"] == len(on_disk) - 1  # but checksums.txt
    json.dumps(summary)


def test_a_model_is_what_loaders_read_and_nothing_else(release):
    assert sorted(path.name for path in (release / "tiny").iterdir()) == [
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "loss-chat.png",
        "loss-pretrain.png", "model.safetensors", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    branches = sorted(path.name for path in (release / "tiny-GPTQ").iterdir() if path.is_dir())
    assert len(branches) == 4
    assert VARIANT in branches


def test_weights_are_linked_not_copied(release, inputs):
    assert (release / "tiny/model.safetensors").samefile(inputs.model.path / "model.safetensors")


def test_another_file_system_gets_copies(inputs, config, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    run(config, inputs, tmp_path / "release")
    copy, source = tmp_path / "release/tiny/model.safetensors", inputs.model.path / "model.safetensors"
    assert copy.read_bytes() == source.read_bytes()
    assert not copy.samefile(source)


def test_checksums_verify(release):
    told = dict(line.split("  ")[::-1] for line in (release / "checksums.txt").read_text().splitlines())
    on_disk = {str(p.relative_to(release)) for p in release.rglob("*") if p.is_file()} - {"checksums.txt"}
    assert set(told) == on_disk
    subprocess.run(["sha256sum", "--check", "--quiet", "checksums.txt"], cwd=release, check=True)
    assert told["tiny/README.md"] == files.sha256(release / "tiny/README.md")


def test_the_same_inputs_give_the_same_bytes(release, inputs, config, tmp_path):
    run(config, inputs, tmp_path / "again")
    first = (release / "checksums.txt").read_bytes()
    assert (tmp_path / "again/checksums.txt").read_bytes() == first
    (tmp_path / "again/tiny/left-by-a-killed-run").touch()
    run(config, inputs, tmp_path / "again")
    assert (tmp_path / "again/checksums.txt").read_bytes() == first


def test_metadata_are_read_as_they_were_meant(model_card):
    data = ModelCard(model_card).data.to_dict()
    assert data["license"] == "apache-2.0"
    assert data["language"] == ["en"]
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert data["prompt_template"].endswith("<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n")
    assert data["tags"] == ["llamero", "lm", "sft"]
    assert not {"base_model", "base_model_relation", "datasets", "quantized_by"} & set(data)
    (index,) = data["model-index"]
    assert index["name"] == "tiny"
    measured = {r["dataset"]["name"]: r["metrics"] for r in index["results"]}
    assert measured["Toy world"] == [{"type": "accuracy", "value": 59.0, "name": "Toy world"}]
    assert measured["Perplexity (wiki)"][0]["value"] == 9.8765
    assert "Agreement (wiki)" not in measured  # measured of variants only


def test_quantized_files_name_the_model_that_they_were_made_from(quantized_card):
    data = ModelCard(quantized_card).data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("someone/tiny", "quantized")
    assert data["tags"] == ["llamero", "gptq", "4-bit", "3-bit"]
    assert "quantized_by" not in data


def test_the_prompt_is_the_rendered_template(model_card):
    block = re.search(r"## Prompt template: chatml\n\n```\n(.*?)\n```\n", model_card, re.DOTALL)
    assert block is not None
    assert block[1] == (
        "<|im_start|>system\n{system_message}<|im_end|>\n<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_stages_are_told_as_they_ran(model_card):
    assert row(model_card, "pretrain | lm") == [
        "pretrain", "lm", "world", "200", "409,600", "180,000", "128", "16 rows",
        "0.003 → 0, cosine, warm-up 20 steps", "AdamW, β 0.9/0.95, ε 1e-08, weight decay 0, clip 1", "0.8432", "0.9123",
    ]  # fmt: skip
    assert row(model_card, "chat | sft")[-2:] == ["0.8432", "–"]
    assert "![Loss of stage chat](loss-chat.png)" in model_card


def test_what_was_lost_is_said(model_card):
    assert "97.3% of them filled; none was dropped, cut or split." in model_card
    assert "1 dropped (too long), 4 cut, which lost 77 tokens" in model_card
    assert "  Skipped: 3 (75.0%)\n" in model_card
    assert "| Skipped: malformed row | 3 |\n| Left out: duplicate | 1 |\n" in model_card


def test_what_the_published_statistics_leave_out_stands_below_them(model_card):
    assert "| Supervised tokens | 60 (50.0%) |\n| Tokens per document, 50/90/99 % | 120 / 120 / 120 |\n" in model_card
    assert "| Samples by language | en 1 |\n| Turns of the assistant | 2 |\n" in model_card
    assert "Copies of samples" not in model_card
    assert "no sample of validation" not in model_card


def test_the_recipe_and_the_ancestry_are_in_the_card(model_card, inputs):
    assert "````yaml\nname: tiny\ntrain:\n- name: pretrain\nnote: '```'\n````" in model_card
    assert row(model_card, "train-chat") == [
        "train-chat", f"`{inputs.model.digest[:12]}`", "data: data-talk, start: train-pretrain",
    ]  # fmt: skip


def test_variants_are_told_as_they_were_made_and_measured(quantized_card):
    link = "https://huggingface.co/someone/tiny-GPTQ/tree"
    assert row(quantized_card, f"[{VARIANT}]") == [
        f"[{VARIANT}]({link}/{VARIANT})", "4", "128", "Yes", "0.01", "talk, 65,536 tokens", "512", "35.33 GB",
        "4.25", "10.877", "0.0123", "95.10", "llamero, Transformers, ExLlamaV2, TGI",
    ]  # fmt: skip
    assert row(quantized_card, "[gptq-3bit")[1:4] == ["3", "row", "Yes"]
    assert row(quantized_card, "[gptq-4bit-32g")[3] == "Static"
    assert row(quantized_card, "unquantized")[7:] == ["0.01 MB", "–", "9.877", "–", "–", "–"]


def test_rounding_has_no_calibration_and_what_was_not_measured_is_not_there(quantized_card):
    assert row(quantized_card, "[rtn-4bit-32g]")[1:] == [
        "4", "32", "–", "–", "none: rounded to nearest", "–", "35.33 GB", "4.25", "–", "–", "–",
        "llamero, vLLM, Transformers, ExLlamaV2, TGI",
    ]  # fmt: skip


def test_what_did_not_go_as_asked_for_is_said(quantized_card):
    assert (
        "\n- **gptq-3bit--1g-actorder_True**: 1 layer needed more damping, up to 0.04; "
        "2 input channels of 1 layer had only zeros as calibration input\n\n![KL against size]"
    ) in quantized_card
    assert f"- **{VARIANT}**" not in quantized_card


def of_layout(artifact, name, **how):
    return replace(artifact, stage=name, summary={**artifact.summary, "name": name, **how})


def test_a_card_speaks_of_the_formats_that_are_there(inputs, config):
    said = ["4 tensors have rows that are no multiple of 256 and became Q5_0, not Q4_K"]
    gguf = of_layout(
        inputs.variants[0], "gguf-Q4_K_M", method="gguf", layout="gguf", group_size=-1, actorder="none", notes=said
    )
    nf4 = of_layout(inputs.variants[1], "nf4", method="bitsandbytes", layout="bitsandbytes", damp=None, group_size=64)
    kept = [result for result in inputs.results if result.model in ("pretrain", "chat")]
    made = cards(config, replace(inputs, variants=[gguf, nf4], results=kept))
    quantized = made.quantized()
    assert "quantized variants in files of GGUF, bitsandbytes" in made.model()
    assert "\nGGUF, bitsandbytes files of " in quantized
    assert ModelCard(quantized).data.to_dict()["tags"] == ["llamero", "gguf", "bitsandbytes", "4-bit"]
    assert row(quantized, "[nf4]")[5:7] == ["none: rounded to nearest", "–"]
    assert f"- **gguf-Q4_K_M**: {said[0]}\n" in quantized
    assert "pip install transformers bitsandbytes" in quantized
    assert "llama-cli -m gguf-Q4_K_M/model-Q4_K_M.gguf" in quantized
    for word in ("gptqmodel", "Grids are", "vllm serve", "Act Order**"):
        assert word not in quantized
    alone = cards(config, replace(inputs, variants=[gguf], results=kept)).quantized()
    assert "AutoModelForCausalLM" not in alone


def test_nothing_unmeasured_appears(inputs, config):
    made = cards(config, replace(inputs, results=[]))
    model, quantized = made.model(), made.quantized()
    for word in ("Evaluation", "Perplexity", "Toy world", "KL", "agreement", "± ", "model-index", "measured:"):
        assert word not in model + quantized
    assert "| Size | BPW | Loads in |" in quantized
    assert "was not measured before they were published" in quantized
    assert ModelCard(model).data.to_dict()["model_name"] == "tiny"


def test_mt_bench_is_printed_and_drawn_by_category(inputs, config, tmp_path):
    scores = {"score": 1190.5 / 160, "turn_1": 7.5, "turn_2": 7.25, "score/math": 4.35, "score/writing": 9.0}
    judged = Result("mt_bench", inputs.final, scores, "MT-Bench (FastChat); judge gpt-4")
    run(config, replace(inputs, results=[*inputs.results, judged]), tmp_path)
    card = (tmp_path / "tiny" / "README.md").read_text()
    assert "| 7.44063 | 7.50000 | 7.25000 |" in card
    assert "![MT-Bench by category](mt-bench.png)" in card
    assert (tmp_path / "tiny" / "mt-bench.png").read_bytes().startswith(b"\x89PNG")
    assert "mt-bench" not in cards(config, inputs).model()


def test_what_is_held_back_is_said_and_drawn(inputs, config, tmp_path):
    gate = Gate(
        0.5,
        (Withheld("gptq-2bit-128g", 20_000_000, "KL 2.1 on wiki, more than 0.5", {"wiki": 2.1}),),
        {VARIANT: "KL 3"},
    )
    run(config, replace(inputs, gate=gate), tmp_path)
    quantized = (tmp_path / "tiny-GPTQ/README.md").read_text()
    assert "- **gptq-2bit-128g** (20.00 MB): KL 2.1 on wiki, more than 0.5\n" in quantized
    assert f"published all the same:\n\n- **{VARIANT}**: KL 3\n" in quantized
    assert (tmp_path / "tiny-GPTQ/kl-against-size.png").stat().st_size > 5000
    points = cards(config, replace(inputs, gate=gate)).points["wiki"]
    assert [(point.name, point.published) for point in points][-1] == ("gptq-2bit-128g", False)
    assert len(points) == 4
    nothing = [result for result in inputs.results if result.model in ("pretrain", "chat")]
    alone = replace(inputs, gate=gate, variants=[], results=nothing)
    assert "- **gptq-2bit-128g** (20.00 MB)" in cards(config, alone).model()


def test_a_release_without_variants_has_one_repository(inputs, config, tmp_path):
    kept = [result for result in inputs.results if result.model in ("pretrain", "chat")]
    summary = run(config, replace(inputs, variants=[], results=kept), tmp_path / "release")
    assert summary["repositories"] == ["tiny"]
    assert "GPTQ" not in (tmp_path / "release/tiny/README.md").read_text()


def test_without_a_repository_cards_point_to_directories(inputs):
    quantized = cards(PublishConfig(license="mit"), inputs).quantized()
    assert f"[{VARIANT}]({VARIANT})" in quantized
    assert f"llamero chat ./tiny-GPTQ/{VARIANT}" in quantized
    assert "huggingface.co" not in quantized
    assert "base_model" not in quantized


def test_a_quantizer_names_the_base_and_claims_no_training(from_base):
    config = PublishConfig(license="llama2", creator="Somebody", datasets=["a/b"])
    model, quantized = cards(config, from_base).model(), cards(config, from_base).quantized()
    link = "[meta-llama/Llama-2-7b-hf](https://huggingface.co/meta-llama/Llama-2-7b-hf) (revision `main`)"
    assert f"These are the weights of {link}, unchanged" in model
    assert "## Training" not in model
    assert f"whose weights are those of {link}" in quantized
    data = ModelCard(quantized).data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("meta-llama/Llama-2-7b-hf", "quantized")
    assert data["quantized_by"] == "Somebody"
    assert "base_model" not in ModelCard(model).data.to_dict()


def test_a_fine_tune_names_its_base(inputs, config):
    inputs = replace(inputs, base="meta-llama/Llama-2-7b-hf", base_on_hub=True)
    data = ModelCard(cards(config, inputs).model()).data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("meta-llama/Llama-2-7b-hf", "finetune")


def test_a_directory_of_the_user_is_no_hub_name_and_its_path_stays_private(inputs, config):
    inputs = replace(inputs, base="/home/me/secret/llama")
    card = cards(config, inputs).model()
    assert "made from `llama` in 2 stages of training" in card
    assert "secret" not in card
    named = config.model_copy(update={"base_model": "meta-llama/Llama-2-7b-hf"})
    assert ModelCard(cards(named, inputs).model()).data.to_dict()["base_model"] == "meta-llama/Llama-2-7b-hf"


def test_a_base_model_without_a_template_has_no_prompt(from_base, config):
    directory = from_base.model.path
    (directory / "chat_template.jinja").unlink()
    said = json.loads((directory / "tokenizer_config.json").read_text())
    del said["chat_template"]
    files.write_json(directory / "tokenizer_config.json", said)
    card = cards(config, replace(from_base, template="auto")).model()
    assert "Prompt template" not in card
    assert "prompt_template" not in card
    assert 'tokenizer("Once upon a time"' in card


def test_a_template_without_system_messages_says_so(from_base, config):
    source = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (from_base.model.path / "chat_template.jinja").write_text(source)
    card = cards(config, replace(from_base, template="auto")).model()
    assert "This template has no place for a system message." in card
    assert "<|im_start|>user\n{prompt}<|im_end|><|im_start|>assistant\n" in card


def test_sampling_goes_to_the_release_and_leaves_the_artifact_alone(inputs, config, tmp_path):
    source = inputs.model.path / "generation_config.json"
    before = source.read_bytes()
    config = config.model_copy(update={"sampling": Sampling(temperature=0.7, top_p=0.9)})
    run(config, inputs, tmp_path / "release")
    for place_ in ("tiny", f"tiny-GPTQ/{VARIANT}"):
        said = json.loads((tmp_path / "release" / place_ / "generation_config.json").read_text())
        assert said == {**json.loads(before), "do_sample": True, "temperature": 0.7, "top_p": 0.9}
    assert source.read_bytes() == before
    assert "proposes temperature 0.7, top_p 0.9." in (tmp_path / "release/tiny/README.md").read_text()


def test_a_new_generation_config_keeps_the_token_ids(model_files, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("config.json", "model.safetensors"):
        (source / name).write_bytes((model_files / name).read_bytes())
    place.place_model(source, tmp_path / "target", sampling=Sampling(top_k=5))
    said = json.loads((tmp_path / "target/generation_config.json").read_text())
    assert said == {"bos_token_id": 1, "eos_token_id": 7, "do_sample": True, "top_k": 5}


def test_pickles_are_published_only_where_there_is_nothing_else(model_files, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_bytes((model_files / "config.json").read_bytes())
    (source / "pytorch_model.bin").write_bytes(b"old")
    (source / "optimizer.pt").write_bytes(b"private")
    place.place_model(source, tmp_path / "old", sampling=Sampling())
    assert sorted(p.name for p in (tmp_path / "old").iterdir()) == ["config.json", "pytorch_model.bin"]
    (source / "model.safetensors").write_bytes((model_files / "model.safetensors").read_bytes())
    place.place_model(source, tmp_path / "new", sampling=Sampling())
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["config.json", "model.safetensors"]


def test_two_variants_of_one_name_are_refused(inputs):
    with pytest.raises(LlameroError, match=f"two variants are called `{VARIANT}`") as caught:
        replace(inputs, variants=[*inputs.variants, inputs.variants[0]])
    assert caught.value.fix is not None


def test_results_of_a_model_that_is_not_there_are_a_mistake(inputs):
    with pytest.raises(ValueError, match="no models of this release"):
        replace(inputs, variants=[])


def test_what_is_no_model_is_named(inputs, config, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(LlameroError) as caught:
        run(config, replace(inputs, model=Artifact(empty, "model", "base", "d", {}, {}, {})), tmp_path / "release")
    assert caught.value.where == str(empty)
    assert not (tmp_path / "release").exists()
