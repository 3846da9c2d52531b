"""The comparison of quantizers makes nothing twice, asks peers only for what they can do, and hears them."""

import importlib.util
import sys
from pathlib import Path

import pytest

from parity.peers import Peer, PeerError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("quantize_vs_peers", BENCHMARKS / "quantize_vs_peers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["quantize_vs_peers"] = module
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(BENCHMARKS))


def test_what_was_made_is_not_made_again(benchmark, tmp_path):
    runs = []

    def make():
        runs.append(1)
        return benchmark.Cost(2.0, 1.0, 3)

    found = [benchmark.kept(tmp_path / "gptqmodel-0", make) for _ in range(2)]
    assert found == [benchmark.Cost(2.0, 1.0, 3)] * 2
    assert len(runs) == 1


def test_what_failed_is_remembered_as_that(benchmark, tmp_path):
    def make():
        raise PeerError("a long story\nno such kernel")

    assert [benchmark.kept(tmp_path / "x", make) for _ in range(2)] == ["no such kernel"] * 2


def test_peers_are_asked_for_what_they_can_do(benchmark):
    row, whole = benchmark.Case(4, 128), benchmark.Case(4, -1)
    assert row.ours == "gptq-4bit-128g-actorder_True"
    assert row.job("gptqmodel")[2]["desc_act"]
    assert row.job("llmcompressor")[2]["actorder"] == "static"
    assert row.job("auto-round") is not None
    assert whole.job("auto-round") is None


@pytest.mark.slow
def test_a_script_that_fails_is_quoted(tmp_path):
    with pytest.raises(PeerError, match="KeyError: 'tokens'"):
        Peer("llamero").run("llamero_quantize", model=tmp_path, out=tmp_path)


def test_an_environment_that_is_not_built_says_how_to_build_it(monkeypatch, tmp_path):
    monkeypatch.setattr("parity.peers.ENVIRONMENTS", tmp_path)
    assert "make peers" in Peer("gptqmodel").absent
    assert not Peer("llamero").absent
