"""The published sets in conf/data: pinned, of a known format, their test splits kept apart.

Ids, files and splits as the sets' own pages on the hub have them.
"""

from __future__ import annotations

import re

import pytest

from ftpipe import cli, compose
from ftpipe.choices import SERVES, Format, Part, Use
from ftpipe.config import SourceConfig
from ftpipe.errors import ConfigError
from ftpipe.pins import Digests, data_pins

HERE = {"own", "sample"}  # no hub
SETS = sorted(file.stem for file in (compose.shipped("conf") / "data").glob("*.yaml"))

TLDR_SFT = "trl-internal-testing/tldr-preference-sft-trl-style"
TLDR_PAIRS = "trl-internal-testing/tldr-preference-trl-style"

# name: format, hub id, split or file of what is learned, of what is tested on
PUBLISHED: dict[str, list[tuple[Format, str, str, str]]] = {
    "alpaca": [(Format.alpaca, "tatsu-lab/alpaca", "train", "")],
    "alpaca-2k": [(Format.alpaca, "mhenrichsen/alpaca_2k_test", "train", "")],
    "alpaca-cleaned": [(Format.alpaca, "yahma/alpaca-cleaned", "train", "")],
    "alpaca-gpt4": [(Format.alpaca, "vicgalle/alpaca-gpt4", "train", "")],
    "code-alpaca": [(Format.prompt_completion, "HuggingFaceH4/CodeAlpaca_20K", "train", "test")],
    "dolly": [(Format.dolly, "databricks/databricks-dolly-15k", "train", "")],
    "dolly-hhrlhf": [(Format.prompt_completion, "mosaicml/dolly_hhrlhf", "train", "test")],
    "evol-instruct-code-80k": [
        (Format.evol_instruct, "nickrosh/Evol-Instruct-Code-80k-v1", "train", "")
    ],
    "evol-instruct-70k": [
        (Format.evol_instruct, "WizardLMTeam/WizardLM_evol_instruct_70k", "train", "")
    ],
    "evol-instruct-v2": [
        (Format.evol_instruct, "WizardLMTeam/WizardLM_evol_instruct_V2_196k", "train", "")
    ],
    "gpt4-llm-cleaned": [(Format.alpaca, "teknium/GPT4-LLM-Cleaned", "train", "")],
    "gsm8k": [
        (
            Format.prompts,
            "openai/gsm8k",
            "main/train-00000-of-00001.parquet",
            "main/test-00000-of-00001.parquet",
        )
    ],
    "guanaco": [(Format.guanaco, "timdettmers/openassistant-guanaco", "train", "")],
    "hh-rlhf": [
        (
            Format.hh_rlhf,
            "Anthropic/hh-rlhf",
            f"{half}-base/train.jsonl.gz",
            f"{half}-base/test.jsonl.gz",
        )
        for half in ("helpful", "harmless")
    ],
    "oasst1": [(Format.oasst, "OpenAssistant/oasst1", "train", "")],
    "oasst2": [(Format.oasst, "OpenAssistant/oasst2", "train", "")],
    "sharegpt": [
        (
            Format.sharegpt,
            "anon8231489123/ShareGPT_Vicuna_unfiltered",
            "ShareGPT_V3_unfiltered_cleaned_split.json",
            "",
        )
    ],
    "tldr": [
        (Format.messages, TLDR_SFT, "train", "test"),
        (Format.preference, TLDR_PAIRS, "train", ""),
    ],
    "ultrachat": [(Format.messages, "HuggingFaceH4/ultrachat_200k", "train_sft", "test_sft")],
    "wizard-vicuna-70k": [(Format.sharegpt, "junelee/wizard_vicuna_70k", "train", "")],
    "ultrafeedback-binarized": [
        (Format.ultrafeedback, "HuggingFaceH4/ultrafeedback_binarized", "train_prefs", "test_prefs")
    ],
}
# name: format, hub id and split of what is held out by its publishers
VALIDATED: dict[str, list[tuple[Format, str, str]]] = {
    "tldr": [
        (Format.messages, TLDR_SFT, "validation"),
        (Format.preference, TLDR_PAIRS, "validation"),
    ],
}
# No commit is known for certain of these: which source is asked for one.
UNPINNED = {
    "alpaca-gpt4": "alpaca_gpt4",
    "code-alpaca": "code_alpaca",
    "dolly-hhrlhf": "dolly_hhrlhf",
    "evol-instruct-code-80k": "evol_instruct_code",
    "gpt4-llm-cleaned": "gpt4_llm_cleaned",
    "wizard-vicuna-70k": "wizard_vicuna",
}


def sources(name: str) -> dict[str, SourceConfig]:
    (cfg,) = cli.configurations(["recipe=tiny", f"data={name}"])
    return cfg.data.sources


def test_every_set_is_listed_here() -> None:
    assert set(SETS) == set(PUBLISHED) | HERE


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_set_is_the_published_one(name: str, empty_folder: object) -> None:
    found = [
        (source.format, source.path, source.file or source.split, source.part)
        for source in sources(name).values()
    ]
    expected = [(format, id_, train, Part.auto) for format, id_, train, _ in PUBLISHED[name]]
    expected += [(format, id_, test, Part.test) for format, id_, _, test in PUBLISHED[name] if test]
    expected += [(*held, Part.validation) for held in VALIDATED.get(name, [])]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_set_is_pinned_or_refused(name: str, empty_folder: object) -> None:
    (cfg,) = cli.configurations(["recipe=tiny", f"data={name}"])
    if name in UNPINNED:
        asked = rf"data\.sources\.{UNPINNED[name]}\.revision=<commit>"
        with pytest.raises(ConfigError, match=asked):
            data_pins(cfg, Digests())
        return
    for pin in data_pins(cfg, Digests()).values():
        assert re.fullmatch(r"hub:[\w./-]+@[0-9a-f]{40}", pin)


def test_the_sets_serve_every_use() -> None:
    served = {SERVES[row[0]][0] for rows in PUBLISHED.values() for row in rows}
    assert served == set(Use) - {Use.unpaired}  # of which none is published that all may take
