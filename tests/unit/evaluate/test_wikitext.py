"""Perplexity per word is what lm-eval's own code makes of the same pages."""

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from llamero.core.errors import LlameroError
from llamero.evaluate import wikitext
from llamero.evaluate.config import PerplexityTask, WikitextTask, named
from llamero.evaluate.run import run
from llamero.infer import texts
from llamero.model.load import load_model
from llamero.text.tokenizer import load_tokenizer, train_bpe

DATA = Path(os.environ.get("LLAMERO_SHARED", Path(__file__).resolve().parents[4] / "shared")) / "data"
PAGE = (
    ' = Tower = \n \n The tower ( 324 m @-@ high ) is " tall " , says the guide \'s book . \n = = Name = = \n N towers'
)


@pytest.fixture(scope="module")
def raw():
    path = DATA / "longtext" / "wikitext2_raw" / "wiki.test.raw"
    if not path.is_file():
        pytest.skip(f"no WikiText at {path} (set LLAMERO_SHARED)")
    return path


@pytest.fixture(scope="module", params=["tinystories-656k-hf", "ref-7m-hf"])
def directory(request):
    path = DATA / "weights" / request.param
    if not path.is_dir():
        pytest.skip(f"no model at {path} (set LLAMERO_SHARED)")
    return path


def test_all_62_pages_are_found_and_detokenized_as_lm_eval_does(raw):
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    pages = wikitext.pages(raw)
    assert len(pages) == 62  # of EleutherAI/wikitext_document_level
    assert [wikitext.detokenized(page) for page in pages] == [wikitext_detokenizer({"page": page}) for page in pages]


def test_a_page_is_detokenized():
    assert wikitext.detokenized(PAGE) == (
        ' = Tower =\n\nThe tower (324 m-high) is "tall", says the guide\'s book.\n== Name ==\nN towers'
    )


def test_pages_begin_with_headings_of_the_first_level(tmp_path):
    (tmp_path / "text").write_text(" \n = A = \n one \n = = a = = \n two \n = B = \n three \n")
    assert [page.split("\n")[0] for page in wikitext.pages(tmp_path / "text")] == [" = A = ", " = B = "]
    (tmp_path / "text.jsonl").write_text('{"page": "x"}\n{"page": "y"}\n')
    assert wikitext.pages(tmp_path / "text.jsonl") == ["x", "y"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [("text", " \n", "no page"), ("a.jsonl", "{}", "not a JSON object"), ("a.jsonl", "[1]", "not a JSON object")],
)
def test_a_file_without_pages_is_refused(name, content, said, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(LlameroError, match=said):
        wikitext.pages(tmp_path / name)
    with pytest.raises(LlameroError, match="is missing"):
        wikitext.pages(tmp_path / "absent")


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 16, 17, 23])
def test_windows_are_those_of_lm_eval(length):
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    ids = list(range(10, 10 + length))
    theirs = get_rolling_token_windows(token_list=ids, prefix_token=3, max_seq_len=8, context_len=1)
    ours = wikitext.rolling(ids, 3, 8)
    assert ours == [make_disjoint_window(pair) for pair in theirs]
    assert [id for _, scored in ours for id in scored] == ids


def by_lm_eval(directory, pages, **options):
    """Return what lm-eval's own model, windows, word counts and means say of some pages."""
    from lm_eval.api.instance import Instance
    from lm_eval.api.metrics import bits_per_byte, weighted_perplexity
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)  # LlamaTokenizer 5 leaves unknown letters out
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    theirs: Any = HFLM  # its decorators hide its parameters
    lm = theirs(pretrained=model, tokenizer=tokenizer, batch_size=1, **options)
    docs = [{"page": page} for page in pages]
    asked = [
        Instance(request_type="loglikelihood_rolling", doc=doc, arguments=(wikitext_detokenizer(doc),), idx=0)
        for doc in docs
    ]
    said = lm.loglikelihood_rolling(asked, disable_tqdm=True)
    rows = [process_results(doc, (each,)) for doc, each in zip(docs, said, strict=True)]
    means = {"word_perplexity": weighted_perplexity, "byte_perplexity": weighted_perplexity}
    return {name: mean([row[name] for row in rows]) for name, mean in {**means, "bits_per_byte": bits_per_byte}.items()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_numbers_are_those_of_lm_eval(raw, directory, tmp_path):
    pages = [page[:2500] for page in wikitext.pages(raw)[:2]]
    path = tmp_path / "pages.txt"
    path.write_text("\n".join(pages))
    assert wikitext.pages(path) == pages
    task = WikitextTask.model_validate({"tasks": "wikitext", "texts": {"pages": str(path)}})
    (found,) = run(task, model=directory, name="m", template="auto", root=tmp_path)
    theirs = by_lm_eval(directory, pages)
    for name, value in theirs.items():
        assert math.isclose(found.metrics[name], value, rel_tol=1e-5), name
    begins = wikitext.beginning(load_tokenizer(directory), "lm-eval")
    assert found.protocol.startswith("lm-eval's wikitext (lm-eval): 2 pages")
    assert found.protocol.endswith(begins.words)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_numbers_of_2023_are_those_of_lm_eval_with_its_prefix(raw, directory, tmp_path):
    pages = [page[:2500] for page in wikitext.pages(raw)[:1]]
    path = tmp_path / "pages.txt"
    path.write_text("\n".join(pages))
    keys = {"tasks": "wikitext", "texts": {"pages": str(path)}, "compat": "leaderboard-2023"}
    (found,) = run(WikitextTask.model_validate(keys), model=directory, name="m", template="auto", root=tmp_path)
    eos = load_tokenizer(directory).eos_id
    theirs = by_lm_eval(directory, pages, prefix_token_id=eos, add_bos_token=False)
    for name, value in theirs.items():
        assert math.isclose(found.metrics[name], value, rel_tol=1e-5), name
    assert found.protocol.endswith("EOS before each page, no BOS")


@torch.inference_mode()
def brute_force(model, ids, *, bos, window):
    """llama.cpp's loop: BOS over each chunk's first token, tokens after the first half scored."""
    total, count = 0.0, 0
    for chunk in range(len(ids) // window):
        taken = ids[chunk * window : (chunk + 1) * window]
        taken = [bos, *taken[1:]] if bos is not None else taken
        logits = model(torch.tensor([taken]))[0].double().log_softmax(-1)
        for at in range(window // 2, window - 1):
            total -= float(logits[at, taken[at + 1]])
            count += 1
    return math.exp(total / count), count


def test_llama_cpps_chunks(directory, tmp_path):
    words = "Once upon a time there was a little girl. She had a red ball, and a dog. " * 12
    (tmp_path / "a.txt").write_text(words)
    keys = {"tasks": "perplexity", "texts": {"a": str(tmp_path / "a.txt")}, "protocol": "llama.cpp", "window": 64}
    (found,) = run(PerplexityTask.model_validate(keys), model=directory, name="m", template="auto", root=tmp_path)
    tokenizer = load_tokenizer(directory)
    bos = tokenizer.bos_id if tokenizer.add_bos else None
    ids = [*([] if bos is None else [bos]), *tokenizer.encode(words)]
    value, count = brute_force(load_model(directory, dtype=torch.float32), ids, bos=bos, window=64)
    assert found.metrics["tokens"] == count
    assert math.isclose(found.metrics["perplexity"], value, rel_tol=1e-5)
    assert found.protocol.startswith("llama.cpp's protocol: chunks of 64")
    assert found.notes == (f"a: the last {len(ids) % 64} tokens fill no chunk and are dropped",)


def test_a_text_of_one_chunk_is_refused(directory, tmp_path):
    (tmp_path / "a.txt").write_text("Once upon a time")
    with pytest.raises(LlameroError, match="asks for two chunks of 64"):
        texts.of_chunks("a", tmp_path / "a.txt", load_tokenizer(directory), window=64)


def test_chunks_have_no_stride():
    with pytest.raises(LlameroError, match="no `stride`"):
        named("perplexity", {"texts": {"a": "a"}, "protocol": "llama.cpp", "stride": 8})


def test_wikitext_needs_a_text():
    with pytest.raises(LlameroError, match="`wikitext` of what"):
        named("wikitext", {})


@pytest.mark.parametrize("read", [texts.of_file, texts.of_chunks])
def test_an_empty_text_is_named(tmp_path, read):
    how = {"window": 8, "stride": 4} if read is texts.of_file else {"window": 8}
    (tmp_path / "empty.txt").touch()
    with pytest.raises(LlameroError, match=r"empty\.txt: the text is empty"):
        read("empty", tmp_path / "empty.txt", train_bpe(iter(["a b"]), vocab_size=260), **how)
