"""Published data sets by the names that recipes give them, so that a recipe needs no address.

The names, addresses, columns and filters are those of LAION-AI/Open-Assistant, model/model_training/custom_datasets, as
of August 2023; what was never in there says so.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Known:
    """A published data set.

    Args:
        layout: How its rows are read.
        hub: `owner/name` on the hub; "" where there is none and a path has to be given.
        subset: Configuration, where it has several.
        data_files: File to read, where it has several.
        split: Splits to read, with commas between; of several, each is the language of its rows.
        language: Of all its rows, where they do not say it and it is known.
        refusals: Whether the published loader leaves out samples that speak as a refusing assistant.
        join_chars: Characters to which conversations with the same system message are joined, if they are.
        notes: What one should know of it.
    """

    layout: str
    hub: str = ""
    data_files: str | None = None
    subset: str | None = None
    split: str = "train"
    language: str = ""
    refusals: bool = False
    join_chars: int | None = None
    notes: str = ""


_MEGACODE = "the published loader also leaves out rows with an empty side, as this layout does"

KNOWN: dict[str, Known] = {
    "alpaca": Known("alpaca", "yahma/alpaca-cleaned", refusals=True),
    "code_alpaca": Known("alpaca", "sahil2801/CodeAlpaca-20k", refusals=True, notes="some answers are empty"),
    "alpaca_gpt4": Known(
        "alpaca-gpt4",
        "teknium/GPT4-LLM-Cleaned",
        notes="vicgalle/alpaca-gpt4 holds the same, not cleaned; there how an input is joined was left to chance",
    ),
    "dolly15k": Known("dolly", "OllieStanley/oa_dolly_15k", refusals=True),
    "dolly15k_multilingual": Known(
        "dolly", "argilla/databricks-dolly-15k-curated-multilingual", split="en,de,es,fr", refusals=True
    ),
    "oa_leet10k": Known("instruction-response", "ehartford/oa_leet10k", refusals=True),
    "megacode": Known(
        "pair", "rombodawg/MegaCodeTraining112k", data_files="RombosCodeTraining112k.json", refusals=True
    ),
    "megacode2": Known(
        "instruction-response",
        "rombodawg/LosslessMegaCodeTrainingV2_1m_Evol_Uncensored",
        data_files="DeDuped_LosslessMegaCodeTrainingV2_942k_Evol_Uncensored.json",
        refusals=True,
        notes=_MEGACODE,
    ),
    "megacode3": Known(
        "instruction-response",
        "rombodawg/LosslessMegaCodeTrainingV3_2.2m_Evol",
        data_files="LosslessMegaCodeTrainingV3_2.2m_Evol.json",
        refusals=True,
        notes=_MEGACODE,
    ),
    "evol_codealpaca_v1": Known("alpaca", "theblackcat102/evol-codealpaca-v1", refusals=True),
    "evol_instruct_code": Known("alpaca", "nickrosh/Evol-Instruct-Code-80k-v1", refusals=True),
    "wizardlm_70k": Known("alpaca", "ehartford/WizardLM_alpaca_evol_instruct_70k_unfiltered", refusals=True),
    "wizard_evol_instruct_v2": Known(
        "sharegpt-clean",
        "ehartford/WizardLM_evol_instruct_V2_196k_unfiltered_merged_split",
        data_files="WizardLM_evol_instruct_V2_196k_unfiltered_merged_split.json",
        language="en",
    ),
    "vicuna": Known(
        "sharegpt-clean",
        "Aeala/ShareGPT_Vicuna_unfiltered",
        data_files="ShareGPT_V4.3_unfiltered_cleaned_split.json",
        notes="the published loader cuts turns at 32,768 characters; here `max_tokens` leaves long samples out",
    ),
    "orca_chat": Known("orca-chat", "shahules786/orca-chat", data_files="orca-chat-gpt4.json"),
    "orca_best": Known(
        "orca-chat",
        "shahules786/orca-best",
        notes="named on the cards of the published models, which were trained on orca_chat; never in the loader",
    ),
    "dolphin_mix": Known(
        "dolphin",
        "ehartford/dolphin",
        data_files="flan5m-alpaca-uncensored.jsonl",
        join_chars=8000,
    ),
    "open_orca": Known("orca", "Open-Orca/OpenOrca", notes="never in the loader"),
    "oasst_export": Known("oasst", notes="the export of 2023-07-23 was never published; give the path of one"),
    "oasst1": Known("oasst-flat", "OpenAssistant/oasst1", split="train+validation"),
    "oasst2": Known("oasst-flat", "OpenAssistant/oasst2", split="train+validation"),
    "ultrachat": Known("dialogue", "stingning/ultrachat", language="en", notes="never in the loader"),
    "lima": Known("dialogue", "GAIR/lima", language="en", notes="gated; never in the loader"),
    "slimpajama": Known("text", "cerebras/SlimPajama-627B", notes="never in the loader"),
    "wikitext_2_v1": Known("text", "Salesforce/wikitext", subset="wikitext-2-v1", notes="a row is a line"),
    "wikitext_2_raw_v1": Known("text", "Salesforce/wikitext", subset="wikitext-2-raw-v1", notes="a row is a line"),
}
"""To add one: a line here; `-` and `_` in names are the same."""

_ALSO = {
    "gpt4_alpaca": "alpaca_gpt4",
    "evol_codealpaca": "evol_codealpaca_v1",
    "openorca": "open_orca",
    "orca_chat_gpt4": "orca_chat",
}
"""Other names of the same."""


def lookup(name: str) -> Known | None:
    """Return the published data set of a name, if there is one."""
    plain = name.lower().replace("-", "_")
    return KNOWN.get(_ALSO.get(plain, plain))
