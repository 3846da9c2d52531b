"""Where a model is asked for, a GGUF file will do: from the command line and from Python."""

import json

import pytest
import torch

import llamero
from llamero.checkpoint import hf
from llamero.cli import app, main
from llamero.core.errors import LlameroError
from llamero.infer.chat import sampling_of
from llamero.model.config import LlamaConfig
from llamero.model.llama import Llama, initialize
from llamero.model.load import save_model
from llamero.model.rope import Default
from llamero.text.tokenizer import train_bpe

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def same(gguf_of, tmp_path):
    """The same model and tokenizer as a Hugging Face directory and in GGUF."""
    texts = ["the cat sat on the mat 12 times, said the user to the assistant\n"] * 3
    tokenizer = train_bpe(iter(texts), vocab_size=290).with_tokens(["<|im_start|>", "<|im_end|>"])
    rope = Default(10000.0, 16)
    model = Llama(LlamaConfig(292, 64, 96, 1, 4, 2, 16, rope, 256)).eval()
    initialize(model, seed=0, std=0.3)
    spec = json.loads(tokenizer.backend.to_str())
    texts = {id: text for text, id in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
    said = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [texts[id] for id in range(292)],
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * 287 + [3, 3],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in spec["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": CHATML,
        "general.sampling.temp": 0.5,
        "general.sampling.top_k": 7,
    }
    (tmp_path / "gguf").mkdir()
    (tmp_path / "hf").mkdir()
    path = gguf_of(model, tmp_path / "gguf" / "model.gguf", kind="Q8_0", change=said)
    save_model(model, tmp_path / "hf")
    tokenizer.save(tmp_path / "hf", chat_template=CHATML)
    generation = {"do_sample": True, "temperature": 0.5, "top_k": 7}
    (tmp_path / "hf/generation_config.json").write_text(json.dumps(generation))
    return path, tmp_path / "hf"


def said_by(command, capsys):
    app([str(part) for part in command], result_action="return_value")
    return capsys.readouterr().out


@pytest.mark.parametrize("way", [["--raw"], []])
def test_generate_says_what_the_dequantized_model_says(same, capsys, way):
    in_gguf, directory = same
    options = ["the cat sat", *way, "--max-new-tokens", 12, "--seed", 3]
    said = [said_by(["generate", model, *options], capsys) for model in (in_gguf, in_gguf.parent, directory)]
    assert said[0] == said[1] == said[2]
    assert said[0].strip()


def test_evaluate_measures_what_the_dequantized_model_is(same, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("the cat sat on the mat 12 times, said the user\n" * 8)
    measured = []
    for number, model in enumerate(same):
        out = tmp_path / f"{number}.json"
        app(
            ["evaluate", str(model), "--tasks", "perplexity", "--text", str(tmp_path / "text.txt"), "--json", str(out)],
            result_action="return_value",
        )
        measured.append(json.loads(out.read_text()))
    values = [found["results"][0]["metrics"]["perplexity"] for found in measured]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_the_library_takes_a_file(same):
    in_gguf, directory = same
    model, tokenizer = llamero.load_model(in_gguf), llamero.load_tokenizer(in_gguf)
    assert tokenizer.digest == llamero.load_tokenizer(directory).digest
    ids = torch.tensor([tokenizer.encode("the cat sat on the mat")])
    torch.testing.assert_close(model(ids), llamero.load_model(directory)(ids), rtol=1e-4, atol=1e-4)


def test_a_file_says_how_it_is_sampled(same):
    one, other = (sampling_of(model, {"top_p": 0.9}, max_new_tokens=5, seed=0) for model in same)
    assert one == other
    assert (one.temperature, one.top_k) == (0.5, 7)


def test_what_needs_a_directory_says_how_to_get_one(same, tmp_path, capsys):
    with pytest.raises(LlameroError, match="a model in GGUF, where a Hugging Face directory is needed") as caught:
        hf.read_config(same[0])
    assert caught.value.fix == f"llamero convert {same[0]} DIRECTORY --to hf"
    with pytest.raises(LlameroError, match="where a Hugging Face directory is needed"):
        hf.open_tensors(same[0].parent)


def test_a_broken_file_is_one_message(same, tmp_path, capsys):
    path = tmp_path / "broken.gguf"
    path.write_bytes(same[0].read_bytes()[:5000])
    with pytest.raises(SystemExit) as stopped:
        main(["generate", str(path), "hi"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "broken.gguf" in said.replace("\n", "")
    assert "truncated" in said
