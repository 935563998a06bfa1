"""The keys of the stage evaluate."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ftpipe.benchmark_config import HarnessConfig, MmluConfig
from ftpipe.commits import check_commit
from ftpipe.errors import ConfigError, require
from ftpipe.server_config import check_server

BASE = "base"  # what the base model is called among the policies


@dataclass
class TextsConfig:
    """Rows with questions, or with published answers to them."""

    path: str = ""  # needed: hub id, or a file: .json, .jsonl, .csv (each also .gz), .parquet
    revision: str | None = None  # hub commit (40 hex digits); needed for a hub id
    split: str = "train"  # which split of a hub dataset
    file: str | None = None  # of a hub dataset: this file alone, whatever its splits; null: split
    columns: list[str] = field(default_factory=list)  # of the turns, in order; empty: FastChat's
    rows: int | None = None  # only the first so many rows

    def check(self, key: str) -> None:
        if not self.path:
            raise ConfigError(f"{key}.path is not set.")
        check_commit(f"{key}.revision", self.revision)
        require(self.rows is None or self.rows >= 1, f"{key}.rows", self.rows, "at least 1, or null")


@dataclass
class JudgeConfig:
    """Who says which of two answers is better; either judge, both or none."""

    reward: bool = True  # a reward model, where an earlier stage makes one or reward_model names one
    reward_model: str | None = None  # folder of a reward model to judge by; null: the run's own
    url: str | None = None  # of an OpenAI-compatible server, up to /v1; null: none is asked
    model: str | None = None  # the judge's name at that server; it decides the fingerprint, url does not
    api_key_env: str | None = None  # NAME of the environment variable with the key, never the key
    temperature: float = 0.0  # 0: always the likeliest token, as MT-bench's judge
    max_tokens: int = 2048  # of what the judge writes; as FastChat's judge
    concurrency: int = 8  # requests at once
    timeout: float = 300.0  # seconds for one answer
    retries: int = 8  # more attempts after a timeout, a 429 or a 5xx, each after a longer wait
    pairs: list[str] = field(default_factory=list)  # such as dpo:base; empty: each policy and the one
    # it came from, and the last one and each of evaluate.answers

    def check(self) -> None:
        group = "evaluate.judge"
        check_server(group, self.url, self.model, self.api_key_env)
        folder = self.reward_model
        require(
            self.reward or folder is None,
            f"{group}.reward_model",
            folder,
            f"null with {group}.reward=false, which asks no reward model",
        )
        require(self.temperature >= 0, f"{group}.temperature", self.temperature, "0 or more")
        require(self.timeout > 0, f"{group}.timeout", self.timeout, "above 0")
        require(self.retries >= 0, f"{group}.retries", self.retries, "0 or more")
        for key in ("max_tokens", "concurrency"):
            require(getattr(self, key) >= 1, f"{group}.{key}", getattr(self, key), "at least 1")
        for pair in self.pairs:
            names = pair.split(":")
            fits = len(names) == 2 and all(names) and names[0] != names[1]
            require(fits, f"{group}.pairs", pair, "two names of policies or answers, such as dpo:sft")


@dataclass
class EvaluateConfig:
    """Measures every policy that the run made up to here, and the base, on the same rows."""

    policies: list[str] = field(default_factory=list)  # base and stages; empty: the base and all
    held_out: int | None = None  # held-out rows of each source to measure; null: all; 0: none
    prompts: dict[str, TextsConfig] = field(default_factory=dict)  # questions, by a name
    answers: dict[str, TextsConfig] = field(default_factory=dict)  # published answers, by a name
    turns: int = 2  # of a question that are asked, at most
    max_new_tokens: int = 1024  # of an answer; as FastChat's gen_model_answer.py
    temperature: float = 0.0  # 0: always the likeliest token; else each question has its own draws
    top_p: float = 1.0  # of the likeliest tokens, those that make up this share
    generation_batch_size: int = 8  # answers written at once
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    harness: HarnessConfig = field(default_factory=HarnessConfig)
    mmlu: MmluConfig = field(default_factory=MmluConfig)

    def check(self) -> None:
        for kind in ("prompts", "answers"):
            for name, texts in getattr(self, kind).items():
                key = f"evaluate.{kind}.{name}"
                if not re.fullmatch(r"\w[\w+-]*", name):  # of measures and files
                    raise ConfigError(f"{key} has no name of letters, digits, and _ + -.")
                texts.check(key)
        require(
            len(set(self.policies)) == len(self.policies),
            "evaluate.policies",
            self.policies,
            "names, none twice",
        )
        held = self.held_out
        require(held is None or held >= 0, "evaluate.held_out", held, "0 or more, or null")
        for key in ("turns", "max_new_tokens", "generation_batch_size"):
            require(getattr(self, key) >= 1, f"evaluate.{key}", getattr(self, key), "at least 1")
        require(self.temperature >= 0, "evaluate.temperature", self.temperature, "0 or more")
        require(0 < self.top_p <= 1, "evaluate.top_p", self.top_p, "in (0, 1]")
        if self.answers and not self.prompts:
            raise ConfigError(
                "evaluate.answers are answers to the questions of evaluate.prompts, but there are none; "
                "set evaluate.prompts.NAME.path."
            )
        for key in ("url", "pairs", "reward_model"):
            value = getattr(self.judge, key)
            if value and not self.prompts:
                raise ConfigError(
                    f"evaluate.judge.{key} would be read by nothing: there are no questions, so no "
                    "answers to judge; set evaluate.prompts.NAME.path."
                )
        self.judge.check()
        self.harness.check()
        self.mmlu.check()
