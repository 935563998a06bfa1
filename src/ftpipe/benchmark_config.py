"""The keys of the benchmarks that the stage evaluate runs: lm-evaluation-harness, and MMLU by itself."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ftpipe.choices import MmluMethod
from ftpipe.errors import ConfigError, require

# Examples before each question, as the Open LLM Leaderboard counted them in its first version:
# https://huggingface.co/docs/leaderboards/en/open_llm_leaderboard/archive ("Tasks")
LEADERBOARD = {
    "arc_challenge": 25,
    "hellaswag": 10,
    "mmlu": 5,
    "truthfulqa_mc2": 0,
    "winogrande": 5,
    "gsm8k": 5,
}
ROWS = (".json", ".jsonl")  # ends of files of rows, in MmluConfig.path
MMLU_SHOTS, MMLU_SPLIT = 5, "test"  # of hendrycks/test, evaluate.py: --ntrain's default, test_df


@dataclass
class HarnessTaskConfig:
    """One task or group of lm-evaluation-harness; its name there is the key."""

    shots: int | None = None  # examples before each question; null: the Open LLM Leaderboard's number
    # where it has one (LEADERBOARD in benchmark_config.py), else the task's own
    limit: int | None = None  # only the first so many questions; of a group: of each of its tasks
    files: dict[str, str] = field(default_factory=dict)  # split -> file with rows in the task's schema
    # (.jsonl, .json, .parquet), in place of the hub's; of mmlu: hendrycks' .zip or folder, by each split
    revision: str | None = None  # hub commit of the task's dataset; needed where files is empty

    def check(self, key: str) -> None:
        shots, limit, commit = self.shots, self.limit, self.revision
        require(shots is None or shots >= 0, f"{key}.shots", shots, "0 or more, or null")
        require(limit is None or limit >= 1, f"{key}.limit", limit, "at least 1, or null")
        whole = commit is None or re.fullmatch("[0-9a-f]{40}", commit) is not None
        require(whole, f"{key}.revision", commit, "a commit (40 hex digits), as branches move, or null")
        if not self.files and commit is None:
            raise ConfigError(
                f"{key} says not where its questions come from; give files by {key}.files, "
                f"or pin the task's hub dataset with {key}.revision=<commit>."
            )
        if self.files and commit is not None:
            raise ConfigError(f"{key}.revision={commit} would be read by nothing beside {key}.files.")


@dataclass
class HarnessConfig:
    """Tasks of lm-evaluation-harness (the extra ``eval``), on each policy as it is in memory."""

    tasks: dict[str, HarnessTaskConfig] = field(default_factory=dict)  # by lm-eval's name; empty: none
    batch_size: int = 8  # prompts at once
    chat_template: bool = False  # prompts go through the tokenizer's chat template, shots as turns
    max_length: int | None = None  # tokens of a prompt and its answer; null: as many as the model takes

    def check(self) -> None:
        for name, task in self.tasks.items():
            task.check(f"evaluate.harness.tasks.{name}")
        batch, length = self.batch_size, self.max_length
        require(batch >= 1, "evaluate.harness.batch_size", batch, "at least 1")
        allowed = "at least 8, or null"
        require(length is None or length >= 8, "evaluate.harness.max_length", length, allowed)


@dataclass
class MmluConfig:
    """MMLU (arXiv:2009.03300) from its own files, without lm-evaluation-harness."""

    path: str | None = None  # hendrycks' .zip or folder of CSV, or ready prompts (.json, .jsonl: rows of
    # subject, input, output, as QLoRA's zero_shot_mmlu_val.json); null: not measured
    split: str | None = None  # of the CSV files, such as val; null: test
    shots: int | None = None  # examples of the split dev before each question; null: 5
    method: MmluMethod = MmluMethod.hendrycks  # hendrycks: log-probability of " A", as the tokenizer
    # cuts it; qlora: of the letter's own token, after a prompt that begins with bos
    subjects: list[str] = field(default_factory=list)  # such as anatomy; empty: all
    limit: int | None = None  # only the first so many questions of each subject
    batch_size: int = 8  # questions at once
    max_length: int | None = None  # tokens of a prompt and its answer; null: as many as the model takes

    def ready_prompts(self) -> bool:
        """Return whether the file's rows are whole prompts, shots and all."""
        return self.path is not None and self.path.endswith(ROWS)

    def check(self) -> None:
        shots, limit, length = self.shots, self.limit, self.max_length
        require(shots is None or shots >= 0, "evaluate.mmlu.shots", shots, "0 or more, or null")
        require(limit is None or limit >= 1, "evaluate.mmlu.limit", limit, "at least 1, or null")
        require(self.batch_size >= 1, "evaluate.mmlu.batch_size", self.batch_size, "at least 1")
        allowed = "at least 8, or null"
        require(length is None or length >= 8, "evaluate.mmlu.max_length", length, allowed)
        for key in ("split", "shots"):
            value = getattr(self, key)
            if self.ready_prompts() and value is not None:
                raise ConfigError(
                    f"evaluate.mmlu.{key}={value} would be read by nothing: the rows of {self.path} are "
                    "whole prompts."
                )
