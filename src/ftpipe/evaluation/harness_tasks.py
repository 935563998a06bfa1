"""Tasks of lm-evaluation-harness whose questions lie in local files, or at one commit of the hub.

lm-eval finds tasks by name in its YAML files. For each task asked for, a file of the same name is
written that includes lm-eval's own and changes nothing but where the questions come from. lm-eval's
command line reads the same files with ``--include_path``.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ftpipe.benchmark_config import LEADERBOARD, HarnessTaskConfig
from ftpipe.data.evalsets import mmlu_tables
from ftpipe.errors import ConfigError, DataError, nearest, unknown
from ftpipe.evaluation.mmlu_prompts import LETTERS
from ftpipe.pins import exists

KINDS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}  # of files: their reader in datasets
MMLU_SETS = ("cais/mmlu", "hails/mmlu_no_train")  # whose rows hold what hendrycks' tables do
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


@functools.cache
def packaged() -> Any:
    """Return lm-eval's manager of all its own tasks; it reads 14,000 files once.

    Raises:
        ConfigError: if lm-eval is not installed.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ConfigError(
            "evaluate.harness.tasks needs lm-evaluation-harness: pip install 'ftpipe[eval]'."
        ) from None
    return TaskManager()


def written(name: str, task: HarnessTaskConfig, folder: Path) -> Any:
    """Return a manager of a task, or a group and what is in it, whose files are written to a folder.

    Raises:
        ConfigError: for a task that lm-eval does not have, or that cannot be given such files.
        DataError: if a file cannot be used.
    """
    index = packaged().task_index
    key = f"evaluate.harness.tasks.{name}"
    if name not in index:
        raise ConfigError(
            f"evaluate.harness.tasks: lm-eval has no task '{name}'.{nearest(name, list(index))}"
        )
    members = list(dict.fromkeys(_members(key, name, index)))
    leaves = [one for one in members if _kind(index[one]) == "TASK"]
    for one in members:
        if _kind(index[one]) == "GROUP":
            _write(folder / f"{one}.yaml", {"include": str(index[one].yaml_path), "group": one})
    for one, source in _sources(key, shots_of(name, task), task, leaves, index, folder):
        _write(folder / f"{one}.yaml", {"include": str(index[one].yaml_path), "task": one, **source})
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=False, include_path=str(folder))


def shots_of(name: str, task: HarnessTaskConfig) -> int | None:
    """Return the examples before each question; None: the task's own number."""
    return LEADERBOARD.get(name) if task.shots is None else task.shots


def _kind(entry: Any) -> str:
    return str(entry.kind.name)


def _members(key: str, name: str, index: Mapping[str, Any]) -> Iterator[str]:
    """Yield a task's name, or a group's and those of all in it."""
    entry = index[name]
    yield name
    if _kind(entry) == "PY_TASK":
        raise ConfigError(
            f"{key}: '{name}' is Python code of lm-eval that fetches its own questions; they cannot be "
            "held to a file or a commit. Choose another task."
        )
    if (entry.cfg or {}).get("unsafe_code"):
        raise ConfigError(f"{key}: {name} runs code that the model writes, which ftpipe does not.")
    below: Sequence[Any] = ()
    if _kind(entry) == "TAG":
        below = sorted(entry.tags)
    elif _kind(entry) == "GROUP":
        listed = entry.cfg["task"]
        below = listed if isinstance(listed, list) else [listed]
    for one in below:
        member: Any = one if isinstance(one, str) else one.get("group") or one["task"]
        if not isinstance(member, str) or member not in index:
            raise ConfigError(
                f"{key}: the group '{name}' of lm-eval makes tasks of its own ({member}), whose "
                "questions cannot be held to a file or a commit. Choose another task."
            )
        yield from _members(key, member, index)


def _sources(
    key: str,
    shots: int | None,
    task: HarnessTaskConfig,
    leaves: Sequence[str],
    index: Mapping[str, Any],
    folder: Path,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what changes in each single task."""
    if not task.files:
        for one in leaves:
            own = index[one].cfg.get("dataset_kwargs") or {}
            yield one, {"dataset_kwargs": {**own, "revision": task.revision}}
        return
    for split, file in task.files.items():
        if not exists(Path(file)):
            raise DataError(f"{key}.files.{split}: no file {file}; it was looked for from {Path.cwd()}.")
    is_table = {split: _is_table(Path(file)) for split, file in task.files.items()}
    if not any(is_table.values()) and len(leaves) > 1:
        raise ConfigError(
            f"{key}.files: it is a group of {len(leaves)} tasks, and a file serves one; name single "
            f"tasks such as {leaves[0]}."
        )
    for one in leaves:
        examples = _examples(key, shots, task, index[one].cfg)
        files: dict[str, Path] = {}
        for split, file in task.files.items():
            if is_table[split]:
                files[split] = _subject(key, Path(file), split, index[one].cfg, folder)
            else:
                files[split] = Path(file).resolve()
        yield one, {**_local(key, files, folder), **examples}


def _is_table(file: Path) -> bool:
    return file.is_dir() or file.suffix == ".zip"


def _examples(
    key: str, shots: int | None, task: HarnessTaskConfig, cfg: Mapping[str, Any]
) -> dict[str, Any]:
    """Refuse files of splits that the task does not read, and the lack of one that it needs.

    Returns:
        what changes in the task's YAML: lm-eval reads the split of the examples even where it shows
        none, so that it is then given that of the questions.
    """
    known = [str(cfg[one]) for one in SPLITS if cfg.get(one)]
    for split in task.files:
        if split not in known:
            raise ConfigError(f"{key}.files: {unknown('split', split, dict.fromkeys(known))}")
    asked = cfg.get("test_split") or cfg.get("validation_split")
    own = cfg.get("num_fewshot")
    given = own if own == 0 or shots is None else shots
    shown = (cfg.get("fewshot_split") or cfg.get("training_split")) if given else asked
    for needed in (asked, shown):
        if needed and needed not in task.files:
            raise ConfigError(
                f"{key}.files lacks the split '{needed}', which {cfg['task']} takes its "
                f"{'questions' if needed == asked else 'examples'} from; add it"
                + ("." if needed == asked else f", or set {key}.shots=0.")
            )
    return {} if given else {"fewshot_split": asked}


def _local(key: str, files: Mapping[str, Path], folder: Path) -> dict[str, Any]:
    """Return the keys of a task's YAML that make it read files."""
    kinds = set()
    for split, file in files.items():
        if file.suffix not in KINDS:
            raise ConfigError(
                f"{key}.files.{split}={file.name} is none of {', '.join(KINDS)}; MMLU's tables are a "
                ".zip or a folder."
            )
        kinds.add(KINDS[file.suffix])
    if len(kinds) > 1:
        raise ConfigError(
            f"{key}.files: they are of several kinds ({', '.join(sorted(kinds))}); give one."
        )
    named = {split: str(file) for split, file in files.items()}
    return {
        "dataset_path": kinds.pop(),
        "dataset_name": None,
        # a cache of its own, which goes with the folder
        "dataset_kwargs": {"data_files": named, "cache_dir": str(folder / "cache")},
    }


def _subject(key: str, file: Path, split: str, cfg: Mapping[str, Any], folder: Path) -> Path:
    """Write a split of one subject in the schema of MMLU on the hub, and return the file."""
    if cfg.get("dataset_path") not in MMLU_SETS:
        raise ConfigError(
            f"{key}.files.{split}={file}: {cfg['task']} does not ask MMLU's questions; give rows in its "
            f"schema ({', '.join(KINDS)})."
        )
    subject = str(cfg["dataset_name"])
    tables = _tables(key, file, split)
    if subject not in tables:
        raise DataError(f"{key}.files.{split}: {file} has no table {subject}_{split}.csv.")
    out = folder / "rows" / f"{subject}_{split}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(row) + "\n" for row in tables[subject]), encoding="utf-8")
    return out


@functools.lru_cache(maxsize=2)  # of a test and a dev split
def _tables(key: str, file: Path, split: str) -> Mapping[str, Sequence[Mapping[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for where, row in mmlu_tables(f"{key}.files.{split}", file, split):
        if row["answer"] not in LETTERS:
            raise DataError(
                f"{where}: the answer is '{row['answer']}', not one of {', '.join(LETTERS)}."
            )
        found.setdefault(row["subject"], []).append(
            {
                "question": row["question"],
                "subject": row["subject"],
                "choices": [row[letter] for letter in LETTERS],
                "answer": LETTERS.index(row["answer"]),
            }
        )
    return found


def _write(file: Path, content: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(dict(content), sort_keys=False), encoding="utf-8")
