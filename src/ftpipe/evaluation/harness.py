"""Benchmarks of lm-evaluation-harness (EleutherAI), on a model in memory and without the hub.

The figures are those of its command line on the saved model: ``lm_eval.evaluate`` is called as
``simple_evaluate`` calls it, with the same seeds, but without looking up machine, hub and time.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ftpipe import stopping
from ftpipe.artifacts import fingerprint, write_atomic
from ftpipe.benchmark_config import HarnessConfig, HarnessTaskConfig
from ftpipe.config import RunConfig
from ftpipe.errors import ConfigError, DataError, ModelError
from ftpipe.evaluation import continuations, harness_tasks, scores
from ftpipe.evaluation.harness_tasks import shots_of
from ftpipe.evaluation.scores import Interval, Score
from ftpipe.logs import on_terminal, progress, say
from ftpipe.printing import as_json
from ftpipe.stopping import Stopped
from ftpipe.tokenizer import first_line

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FOLDER = "harness"  # of the results, in the output folder
SEEDS = {
    "random": 0,
    "numpy": 1234,
    "torch": 1234,
    "fewshot": 1234,
}  # lm-eval's own, of its command line
BOOTSTRAP = 100_000  # draws for errors that have no formula; lm-eval's own number


def run(
    cfg: RunConfig,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
) -> dict[str, Score]:
    """Measure each task of ``evaluate.harness.tasks``.

    Writes ``harness/<task>.json`` (figures, versions, digests of prompts) and ``harness/<task>.jsonl``
    (each question) to ``out``. A task whose figures an interrupted call has written is not run again.

    Args:
        model: in eval mode, on its device.

    Returns:
        The figures of each task asked for, as ``harness/<task>/<metric>``, with the filter behind it
        where lm-eval has several (``harness/gsm8k/exact_match/strict-match``); of a group such as
        ``mmlu`` those of the groups in it. Nothing without tasks.

    Raises:
        ConfigError: if lm-eval is not installed, or for a task that it does not have.
        DataError: if questions cannot be read.
        ModelError: if the tokenizer has no chat template where one is asked for, or the model takes too
            few tokens.
        Stopped: after a task, if it was asked to stop.
    """
    harness = cfg.evaluate.harness
    if not harness.tasks:
        return {}
    folder = out / FOLDER
    records = {name: folder / f"{name.replace('/', '_')}.json" for name in harness.tasks}
    todo = {name: task for name, task in harness.tasks.items() if not records[name].is_file()}
    if todo:
        harness_tasks.packaged()  # or no lm-eval
        folder.mkdir(exist_ok=True)
        lm = _wrapped(harness, model, tokenizer)
        for name, task in todo.items():
            with tempfile.TemporaryDirectory(prefix="ftpipe-") as scratch, _seeded(model.device):
                manager = harness_tasks.written(name, task, Path(scratch))
                results = _measured(harness, name, task, manager, lm)
                _write(records[name], harness, name, results, lm)
            if stopping.asked():
                raise Stopped(f"with the task {name} measured")
    found = [score for file in records.values() for score in _recorded(file)]
    return {score.name: score for score in found}


@contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """Give lm-eval its seeds, and the rest of the program its random numbers back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        random.seed(SEEDS["random"])
        np.random.seed(SEEDS["numpy"])
        torch.manual_seed(SEEDS["torch"])
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _wrapped(
    harness: HarnessConfig, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase
) -> Any:
    """Return the model as lm-eval takes it; it gets a tokenizer of its own, which it changes."""
    from lm_eval.models.huggingface import HFLM

    if harness.chat_template and not tokenizer.chat_template:
        raise ModelError(
            "evaluate.harness.chat_template=true, but the tokenizer has no chat template; set it to "
            "false."
        )
    most, asked = continuations.longest(model), harness.max_length
    if asked is not None and asked > most:
        raise ConfigError(
            f"evaluate.harness.max_length={asked} is more than the {most} tokens that the model takes."
        )
    with _never_tied_again(model):
        lm = HFLM(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),
            backend="causal",
            batch_size=harness.batch_size,
            max_length=harness.max_length,
        )
    _show_progress(lm)
    return lm


@contextmanager
def _never_tied_again(model: Any) -> Iterator[None]:
    """Keep lm-eval from tying weights that are tied: where an adapter trains rows of them, it fails."""
    model.tie_weights = lambda: None
    try:
        yield
    finally:
        del model.tie_weights


def _show_progress(lm: Any) -> None:
    """Leave lm-eval's bars to terminals; a log gets a line now and then."""
    if on_terminal():
        return
    for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        setattr(lm, name, functools.partial(getattr(lm, name), disable_tqdm=True))
    passes = progress(itertools.count(), "batches of lm-eval")

    def counted(compute: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            next(passes)
            return compute(*given, **named)

        return call

    for name in ("_model_call", "_model_generate"):
        setattr(lm, name, counted(getattr(lm, name)))


def _measured(
    harness: HarnessConfig, name: str, task: HarnessTaskConfig, manager: Any, lm: Any
) -> dict[str, Any]:
    """Return lm-eval's results, with each question's."""
    from lm_eval import evaluate

    key = f"evaluate.harness.tasks.{name}"
    try:
        loaded = manager.load([name])
    except Exception as error:  # whatever datasets and the task's own code say to rows that do not fit
        raise DataError(
            f"{key}: its questions cannot be read ({first_line(error)}); local ones are given by "
            f"{key}.files."
        ) from None
    shots = shots_of(name, task)
    for one in loaded["tasks"].values():
        _prepare(key, one, shots, task.shots is not None)
        _check_room(one, lm)
    found: dict[str, Any] = evaluate(
        lm=lm,
        task_dict=loaded,
        limit=task.limit,
        bootstrap_iters=BOOTSTRAP,
        apply_chat_template=harness.chat_template,
        fewshot_as_multiturn=harness.chat_template,
    )
    return found


def _prepare(key: str, task: Any, shots: int | None, asked: bool) -> None:
    """Set the number of examples as ``simple_evaluate`` does.

    Args:
        asked: whether the number is the user's own.
    """
    own = task.get_config("num_fewshot")
    if own == 0 and shots and asked:
        raise ConfigError(
            f"{key}.shots={shots}: {task.config.task} is asked without examples, or with some in its "
            "text (lm-eval leaves its 0 as it is); leave it out."
        )
    if shots is not None and own != 0:
        task.set_config(key="num_fewshot", value=shots)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=SEEDS["fewshot"])


def _check_room(task: Any, lm: Any) -> None:
    if task.OUTPUT_TYPE == "generate_until" and _answer_room(task, lm) >= lm.max_length:
        raise ModelError(
            f"the model takes {lm.max_length} tokens, which leaves no room for a prompt before the "
            f"{_answer_room(task, lm)} that {task.config.task} lets it write; leave the task out."
        )


def _answer_room(task: Any, lm: Any) -> int:
    return int((task.config.generation_kwargs or {}).get("max_gen_toks", lm.max_gen_toks))


# --- what lm-eval found ---


def _write(file: Path, harness: HarnessConfig, name: str, results: Mapping[str, Any], lm: Any) -> None:
    """Write a task's questions, and then its figures: what is there is whole."""
    import lm_eval

    samples: Mapping[str, Sequence[Any]] = results["samples"]
    lines = [_line(task, at, one) for task, found in samples.items() for at, one in enumerate(found)]
    write_atomic(file.with_suffix(".jsonl"), "".join(lines))
    found = _scores(name, results)
    cut = {task: _cut(one, lm) for task, one in samples.items()}
    record = {
        "task": name,
        "lm_eval": lm_eval.__version__,
        "versions": results["versions"],
        "shots": results["n-shot"],
        "questions": {task: count["effective"] for task, count in results["n-samples"].items()},
        "of": {task: count["original"] for task, count in results["n-samples"].items()},
        "cut": cut,  # prompts that lost their start for want of room
        "max_length": lm.max_length,
        "chat_template": harness.chat_template,
        "batch_size": harness.batch_size,
        "seeds": SEEDS,
        # of what the model was asked, the same for all policies
        "prompts": {
            task: fingerprint({"prompts": [one["prompt_hash"] for one in found]})
            for task, found in samples.items()
        },
        "results": {task: _plain(figures) for task, figures in results["results"].items()},
        "scores": [asdict(score) for score in found],
    }
    write_atomic(file, as_json(record) + "\n")
    for score in found:
        say(f"{score.name}: {score.shown()}")
    if sum(cut.values()):
        say(f"{name}: {sum(cut.values()):,} prompts lost their start: {lm.max_length:,} tokens fit.")


def _plain(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {name: one for name, one in figures.items() if name not in ("name", "alias", "sample_count")}


def _line(task: str, at: int, sample: Mapping[str, Any]) -> str:
    """Return a question's line: lm-eval's record; only the first one's prompts, the others' digests."""
    kept = {name: one for name, one in sample.items() if name != "arguments" or at == 0}
    return json.dumps({"task": task, **kept}, ensure_ascii=False, default=str) + "\n"


def _cut(samples: Sequence[Mapping[str, Any]], lm: Any) -> int:
    """Return how many questions had a prompt longer than the model takes."""
    cut: set[int] = set()
    for sample in samples:
        first = sample["arguments"][0]
        if len(first) > 1 and isinstance(first[1], dict):  # to be continued freely
            room = lm.max_length - int(first[1].get("max_gen_toks", lm.max_gen_toks))
            text = first[0]
        else:  # the last token is not read
            room = lm.max_length + 1
            text = max(("".join(map(str, pair)) for pair in sample["arguments"]), key=len)
        if len(lm.tok_encode(text)) > room:
            cut.add(sample["doc_id"])
    return len(cut)


def _scores(name: str, results: Mapping[str, Any]) -> list[Score]:
    """Return the figures of a task; of a group those of its groups, or of its tasks if it has no own."""
    groups = list(results.get("groups", {}))
    wanted = groups or list(results["samples"])
    found = []
    for task in sorted(wanted, key=lambda one: one != name):
        for figure, value in results["results"][task].items():
            metric, _, filtered = figure.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, float | int):
                continue
            found.append(_score(task, metric, filtered, float(value), results))
    return found


def _score(task: str, metric: str, filtered: str, value: float, results: Mapping[str, Any]) -> Score:
    name = f"{FOLDER}/{task}/{metric}" + ("" if filtered == "none" else f"/{filtered}")
    better: bool | None = results["higher_is_better"].get(task, {}).get(metric)
    values = np.array(
        [
            sample[metric]
            for leaf in _leaves(task, results)
            for sample in results["samples"][leaf]
            if sample["filter"] == filtered and isinstance(sample.get(metric), float | int)
        ],
        dtype=np.float64,
    )
    shares = bool(len(values)) and bool(np.isin(values, (0, 1)).all())
    if shares and math.isclose(values.mean(), value, abs_tol=1e-12):
        return replace(scores.share(name, values, better=better), value=value)
    error = results["results"][task].get(f"{metric}_stderr,{filtered}")
    unit = "share" if len(values) and values.min() >= 0 and values.max() <= 1 else metric
    given = float(error) if isinstance(error, float | int) else None
    score = scores.from_error(name, value, given, len(values), unit, better=bool(better))
    return replace(score, higher_is_better=better)


def _leaves(task: str, results: Mapping[str, Any]) -> Iterator[str]:
    below = results["group_subtasks"].get(task)
    if below is None:
        yield task
    for one in below or ():
        yield from _leaves(one, results)


def _recorded(file: Path) -> list[Score]:
    listed = json.loads(file.read_text(encoding="utf-8"))["scores"]
    return [Score(**{**one, "interval": Interval(one["interval"])}) for one in listed]
