"""What outside input a run depends on, by content: files by digest, hub ids by commit.

Answers without loading anything, so that `plan` can tell at once whether a file has changed.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ftpipe.artifacts import digest, fingerprint, write_atomic
from ftpipe.choices import EvalFormat, Init
from ftpipe.config import EvalSetConfig, ModelConfig, RunConfig, SourceConfig
from ftpipe.errors import ConfigError, DataError, ModelError
from ftpipe.evaluation.prompts import VERSION as JUDGED
from ftpipe.evolve.prompts import VERSION as PROMPTS
from ftpipe.samples import PREFIX, sample_path

MEMORY = ".digests.json"  # beside the artifacts: digests of files, by their state
BYTES = "bytes"  # model.tokenizer of this name is made by code
WEIGHTS = ("*.safetensors",)
TEXT_SUFFIXES = (".json", ".jsonl", ".csv")  # of data files
SUFFIXES = (*TEXT_SUFFIXES, *(f"{suffix}.gz" for suffix in TEXT_SUFFIXES), ".parquet")
QUANTIZING = ("llmcompressor", "compressed-tensors", "transformers", "torch")  # what decides the 4 bits
WHOLE = {"sft", "merge", "reward", "reference", "dpo", "ppo", "export"}  # stages that need whole weights
ANSWERS = 60  # seconds that a Python may take to say its versions
TEXT_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.py")  # all that is not weights
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


class Digests:
    """SHA-256 of files, remembered by size and times as git remembers its index.

    A file touched in the last two seconds is always read again: its times could repeat.
    """

    def __init__(self, memory: Path | None = None) -> None:
        self._memory = memory
        self._known: dict[str, Any] = {}
        if memory is not None and memory.is_file():
            try:
                self._known = dict(json.loads(memory.read_text()))
            except (ValueError, TypeError):  # damaged: every file is read again
                self._known = {}

    def of(self, path: Path) -> str:
        stat = path.stat()
        place = fingerprint({"path": str(path.resolve())})  # a file that names nobody's folders
        state = f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"
        match self._known.get(place):
            case [seen, str(known)] if seen == state:
                return known
        value = digest(path)
        if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > 2_000_000_000:
            self._known[place] = [state, value]
        return value

    def save(self) -> None:
        """Write the memory beside the artifacts, where there is such a folder to write to."""
        if self._memory is not None:
            try:
                write_atomic(self._memory, json.dumps(self._known))
            except OSError:
                return  # the next plan reads the files again


def data_pins(cfg: RunConfig, digests: Digests) -> dict[str, str]:
    """Return, for each source, the digest of its file or ``hub:id@commit``.

    Their order counts: rows are prepared in the order of their sources. So do the evaluation sets that
    rows are searched for, by content, order and kind of file: the first that a row holds is named.

    Raises:
        DataError: if a file is missing or empty.
        ConfigError: if a hub dataset has no pinned revision.
    """
    pins = {}
    for at, (name, source) in enumerate(cfg.data.sources.items()):
        pins[f"{at}/{name}"] = _rows_pin(f"data.sources.{name}", source, digests)
    for at, (name, questions) in enumerate(cfg.data.decontaminate.items()):
        key = f"data.decontaminate.{name}"
        folder = local_data(questions.path)
        if folder is not None and folder.is_dir() and questions.format is EvalFormat.mmlu:
            value = _tables_pin(f"{key}.path", folder, digests)
        else:
            # .txt, .csv and .jsonl are read differently, whatever they hold
            value = _file_pin(key, questions, digests) + (folder.suffix if folder else "")
        pins[f"decontaminate/{at}/{name}"] = value
    return pins


def benchmark_pins(cfg: RunConfig, digests: Digests) -> dict[str, str]:
    """Return what decides the questions of the benchmarks: digests of files, or ``hub:task@commit``.

    Raises:
        DataError: if a file is missing or empty.
    """
    pins = {}
    mmlu, harness = cfg.evaluate.mmlu, cfg.evaluate.harness
    if mmlu.path is not None:
        pins["mmlu"] = _questions_pin("evaluate.mmlu.path", mmlu.path, digests)
    for name, task in harness.tasks.items():
        for split, file in task.files.items():
            key = f"evaluate.harness.tasks.{name}.files.{split}"
            pins[f"harness/{name}/{split}"] = _questions_pin(key, file, digests)
        if not task.files:
            pins[f"harness/{name}"] = f"hub:{name}@{task.revision}"
    return pins


def _questions_pin(key: str, where: str, digests: Digests) -> str:
    """Return the digest of a file, or of all tables in a folder; a hub id is neither."""
    path = Path(where)
    if not exists(path):
        raise DataError(f"{key}: no file {where}; it was looked for from {Path.cwd()}.")
    if path.is_dir():
        return _tables_pin(key, path, digests)
    if path.stat().st_size == 0:
        raise DataError(f"{key}={where} is empty.")
    return digests.of(path) + path.suffix  # a .zip and rows are read differently


def _tables_pin(key: str, folder: Path, digests: Digests) -> str:
    files = sorted(folder.rglob("*.csv"))
    if not files:
        raise DataError(f"{key}={folder} holds no .csv file.")
    return fingerprint({str(file.relative_to(folder)): digests.of(file) for file in files})


def seeds_pins(cfg: RunConfig, digests: Digests) -> dict[str, str]:
    """Return the digest or the commit of the seed instructions, and the version of the prompts.

    Raises:
        DataError, ConfigError: as for data.
    """
    seeds = cfg.evolve.seeds
    if seeds.path is None:
        raise ConfigError(
            "evolve.seeds.path is not set; give a file of instructions, or take a set with evolve=NAME."
        )
    source = SourceConfig(format=seeds.format, path=seeds.path, revision=seeds.revision, file=seeds.file)
    return {"rows": _rows_pin("evolve.seeds", source, digests), "prompts": str(PROMPTS)}


def evaluation_pins(cfg: RunConfig, digests: Digests) -> dict[str, str]:
    """Return what decides the questions of an evaluation and the answers it compares with.

    A reward model that is named by its folder counts by its files, as a model does. So do the prompts
    of the judge, by their version.

    Raises:
        DataError, ConfigError: as for data.
        ModelError: if a folder holds no reward model.
    """
    evaluate = cfg.evaluate
    pins = {"prompts": str(JUDGED)}
    for kind in ("prompts", "answers"):
        for name, texts in getattr(evaluate, kind).items():
            key = f"evaluate.{kind}.{name}"
            source = SourceConfig(path=texts.path, revision=texts.revision, file=texts.file)
            pins[f"{kind}/{name}"] = _rows_pin(key, source, digests)
    folder = evaluate.judge.reward_model
    if folder is not None:
        weights = sorted(Path(folder).rglob("*.safetensors"))
        if not weights or not (Path(folder) / "reward.json").is_file():
            raise ModelError(
                f"evaluate.judge.reward_model={folder} holds no reward model (reward.json and "
                "*.safetensors); give the folder of an artifact of the stage 'reward'."
            )
        decide = (*weights, *sorted(Path(folder).rglob("*config.json")))  # the base, an adapter's alpha
        files = {file.relative_to(folder).as_posix(): digests.of(file) for file in decide}
        pins["reward_model"] = fingerprint(files | {"stated": digests.of(Path(folder) / "reward.json")})
    return pins


def _rows_pin(key: str, source: SourceConfig, digests: Digests) -> str:
    if source.file is not None and local_data(source.path) is not None:
        raise ConfigError(
            f"{key}.file={source.file} is one of a hub dataset; {key}.path={source.path} is a file "
            f"itself. Leave {key}.file out."
        )
    return _file_pin(key, source, digests)


def _file_pin(key: str, source: SourceConfig | EvalSetConfig, digests: Digests) -> str:
    path = local_data(source.path)
    if path is None:
        if source.revision is None:
            raise ConfigError(
                f"{key}.path={source.path} is no file here; if it is a hub dataset, "
                f"pin it with {key}.revision=<commit>."
            )
        return f"hub:{source.path}@{source.revision}"
    if path.is_dir():
        raise DataError(f"{key}.path={source.path} is a folder; give one file.")
    if path.stat().st_size == 0:
        raise DataError(f"{key}.path={source.path} is empty.")
    return digests.of(path)


def local_data(path: str) -> Path | None:
    """Return the file a source names, or None for a hub id.

    Raises:
        DataError: if the path can only be a file and is not there.
    """
    if path.startswith(PREFIX):
        return sample_path(path)
    file = Path(path)
    if exists(file):
        return file
    is_hub_id = path.count("/") <= 1 and not path.startswith((".", "/")) and not path.endswith(SUFFIXES)
    if not is_hub_id:
        raise DataError(f"no file {path}; it was looked for from {Path.cwd()}.")
    return None


def exists(path: Path) -> bool:
    """Whether there is such a file or folder, where even to ask may fail.

    Raises:
        DataError: if the path cannot be looked at.
    """
    try:
        return path.exists()
    except OSError as error:
        raise DataError(f"{str(path)[:80]} cannot be looked at ({error.strerror}).") from None


def _packed(config: Path) -> bool:
    """Whether a model's weights are packed as `export.quantize` leaves them."""
    try:
        told = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # said where it is loaded
        return False
    how = told.get("quantization_config") if isinstance(told, dict) else None
    return isinstance(how, dict) and how.get("quant_method") == "compressed-tensors"


def model_pins(cfg: RunConfig, digests: Digests) -> dict[str, str]:
    """Return what decides the base model: a commit, file digests, or the random architecture.

    Raises:
        ModelError: if a local folder holds no safetensors weights or no config, or is in 4 bits.
        ConfigError: if a hub id has no pinned revision.
    """
    model = cfg.model
    if model.init is Init.random:
        return {"random": fingerprint(model.architecture)}
    path = local_model(model)
    if path is None:
        if model.revision is None:
            raise ConfigError(
                f"model.path={model.path} is no folder or file here; if it is a hub model, "
                "pin it with model.revision=<commit>."
            )
        return {"hub": f"{model.path}@{model.revision}"}
    if path.is_file():
        return {"gguf": digests.of(path)}
    if not (path / "config.json").is_file():
        raise ModelError(f"model.path={model.path} holds no config.json; it is no model folder.")
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        other = sorted(file.name for file in (*path.glob("*.bin"), *path.glob("*.pt*")))
        raise ModelError(
            f"model.path={model.path} holds no *.safetensors weights"
            + (f" (only {other[0]}, which is not loaded: it can run code)." if other else ".")
        )
    if _packed(path / "config.json") and WHOLE & set(cfg.stages):
        raise ModelError(
            f"model.path={model.path} is in 4 bits of compressed-tensors, on which nothing is trained; "
            "give the folder that it was made from."
        )
    others = [path / "config.json", *path.glob("generation_config.json"), *sorted(path.glob("*.py"))]
    return {file.name: digests.of(file) for file in (*others, *weights)}


def local_model(model: ModelConfig) -> Path | None:
    """Return the folder or GGUF file of the model, or None for a hub id.

    Raises:
        ModelError: if the path can only be local and is not there, or is a file of another kind.
    """
    assert model.path is not None
    path = Path(model.path)
    if exists(path) and path.is_file() and path.suffix != ".gguf":
        raise ModelError(f"model.path={model.path} is a file; give a folder or a .gguf file.")
    if exists(path):
        return path
    if model.path.count("/") > 1 or model.path.startswith((".", "/")) or path.suffix == ".gguf":
        raise ModelError(f"model.path={model.path}: there is no such folder or file.")
    return None


def tokenizer_pins(cfg: RunConfig, digests: Digests) -> dict[str, str]:
    """Return what decides the tokenizer: ``bytes``, a commit, or digests of its files."""
    model = cfg.model
    if model.tokenizer == BYTES:
        return {"tokenizer": BYTES}
    if model.tokenizer is None:
        if model.init is Init.random:
            raise ConfigError(
                "model.init=random has no tokenizer of its own; set model.tokenizer to "
                "'bytes', a folder or a hub id."
            )
        path = local_model(model)
        if path is not None and path.is_file():
            return {"tokenizer": digests.of(path)}
        hub = f"{model.path}@{model.revision}"
    else:
        path = Path(model.tokenizer)
        path = path if exists(path) and path.is_dir() else None
        if path is None and model.tokenizer_revision is None:
            raise ConfigError(
                f"model.tokenizer={model.tokenizer} is no folder here; if it is a hub id, "
                "pin it with model.tokenizer_revision=<commit>."
            )
        hub = f"{model.tokenizer}@{model.tokenizer_revision}"
    if path is None:
        return {"tokenizer": f"hub:{hub}"}
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(f"{path} holds no tokenizer files; set model.tokenizer.")
    # whatever lies there may decide: a vocabulary, a template, a configuration, code
    found = sorted(file for pattern in TEXT_FILES for file in path.rglob(pattern))
    return {f"tokenizer/{file.relative_to(path).as_posix()}": digests.of(file) for file in found}


def converter_pins(cfg: RunConfig, digests: Digests) -> dict[str, str]:
    """Return the digest of llama.cpp's script, where it is to write GGUF files.

    Raises:
        ConfigError: if there is no such file.
    """
    if cfg.export.converter is None:
        return {}
    script = Path(cfg.export.converter)
    if not (exists(script) and script.is_file()):
        raise ConfigError(
            f"export.converter={script} is no file; give llama.cpp's convert_hf_to_gguf.py, or null."
        )
    return {"script": digests.of(script)}


def quantizer_pins(cfg: RunConfig, digests: Digests) -> dict[str, str]:
    """Return the versions of what is to quantise, as its own environment has them.

    Raises:
        ConfigError: if there is no such Python, or it has no llmcompressor.
    """
    if not cfg.export.quantize:
        return {}
    if importlib.util.find_spec("compressed_tensors") is None:
        raise ConfigError(
            "export.quantize needs compressed-tensors, which loads the files again: "
            "pip install 'ftpipe[quantize]'."
        )
    python = cfg.export.quantizer or sys.executable
    asked = (
        "import json, importlib.metadata as m; "
        f"print(json.dumps({{name: m.version(name) for name in {QUANTIZING!r}}}))"
    )
    try:
        done = subprocess.run(
            [python, "-I", "-c", asked],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ANSWERS,
            check=False,
        )
        told = json.loads((done.stdout.strip().splitlines() or ["{}"])[-1])
    except (OSError, ValueError, subprocess.TimeoutExpired):
        raise ConfigError(
            f"export.quantizer={python} is no Python; give that of an environment with llmcompressor."
        ) from None
    if done.returncode or not isinstance(told, dict) or set(told) != set(QUANTIZING):
        raise ConfigError(
            f"export.quantize needs llmcompressor, which {python} does not have; make an environment "
            "for it (make quantizer) and give its Python: export.quantizer=.venv-quantizer/bin/python."
        )
    return told


def hub_inputs(cfg: RunConfig) -> set[tuple[str, str, str]]:
    """Return kind (model or dataset), id and commit of each input that a commit is given for."""
    model, seeds, evaluate = cfg.model, cfg.evolve.seeds, cfg.evaluate
    given = [
        ("model", model.path, model.revision),
        ("model", model.tokenizer, model.tokenizer_revision),
        ("dataset", seeds.path, seeds.revision),
        *(("dataset", source.path, source.revision) for source in cfg.data.sources.values()),
        *(("dataset", asked.path, asked.revision) for asked in cfg.data.decontaminate.values()),
        *(("dataset", texts.path, texts.revision) for texts in evaluate.prompts.values()),
        *(("dataset", texts.path, texts.revision) for texts in evaluate.answers.values()),
    ]
    return {(kind, id_, commit) for kind, id_, commit in given if id_ and commit}


Pin = Callable[[RunConfig, Digests], Mapping[str, str]]

PINS: Mapping[str, Pin] = {
    "data": data_pins,
    "model": model_pins,
    "tokenizer": tokenizer_pins,
    "seeds": seeds_pins,
    "evaluation": evaluation_pins,
    "benchmarks": benchmark_pins,
    "converter": converter_pins,
    "quantizer": quantizer_pins,
}
