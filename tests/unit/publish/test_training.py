"""What cards say of a stage beyond the table."""

from types import SimpleNamespace
from typing import Any

from llamero.engine.stage import StageConfig
from llamero.publish.training import training_notes

SUMMARY = {"steps": 4, "tokens": 4000, "supervised_tokens": 1000}


def notes(summary, **keys):
    config = StageConfig.model_validate({"name": "chat", "mixture": "m", "steps": 4, **keys})
    stage: Any = SimpleNamespace(name="chat", config=config, artifact=SimpleNamespace(summary=SUMMARY | summary))
    (said,) = training_notes([stage])
    return said


def test_a_plain_stage_says_its_batch_in_tokens():
    assert notes({}) == "**chat**: 1,000 tokens a step, 25.0% of them supervised."
    assert notes({"tokens": 4001}).startswith("**chat**: 1,000 tokens a step on average, ")


def test_what_a_stage_leaves_out_adds_or_trains_is_said():
    said = notes(
        {"trained_parameters": 1234, "parameters": 56789, "validation_accuracy": 0.512},
        dropout={"hidden": 0.25, "lima": True, "attention": 0.1},
        neftune=5,
        z_loss=1e-4,
        learn={"user": 0.5},
        adapter={"lora": 8, "dropout": 0.05, "base": "nf4", "targets": "all-linear"},
    )
    for part in (
        "dropout 0.25 on the residual branches rising linearly with depth (LIMA); dropout 0.1 on attention",
        "(NEFTune), α 5; z-loss 0.0001; weights of the loss: assistant 1, text 1, user 0.5;",
        "LoRA of rank 8, α 16 on all-linear, dropout 0.05, on a base in nf4 (1,234 of 56,789 parameters trained)",
        "51.2% of the supervised validation tokens are the likeliest.",
    ):
        assert part in said
    assert "embeddings;" not in said


def test_plain_dropout_is_on_embeddings_too():
    assert "dropout 0.1 on the residual branches; dropout 0.1 on embeddings" in notes({}, dropout={"hidden": 0.1})
