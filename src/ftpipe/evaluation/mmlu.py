"""MMLU: which of four letters a model finds likeliest after ``Answer:``.

Two ways of asking, by ``evaluate.mmlu.method``:

- ``hendrycks``: log p(" A" | prompt), all tokens of it, the prompt cut into tokens as the tokenizer does
  it. So hendrycks/test (evaluate.py) asks an API, and lm-evaluation-harness a model.
- ``qlora``: the logit of the first token of "A" alone, after bos and the prompt, as artidoro/qlora's
  MMLUEvalCallback (qlora.py) does. With LLaMA's tokenizer it is the same token as that of " A"; with
  GPT-2's and its like it is another one, which text never has there.

Prompts too long for the model lose examples, the last ones first, as in evaluate.py; one that is too
long without any is cut at its start. Both are counted. (QLoRA's collator cuts the end, and ``Answer:``
with it.)
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ftpipe import stopping
from ftpipe.artifacts import fingerprint, write_atomic
from ftpipe.benchmark_config import MMLU_SHOTS, MMLU_SPLIT, MmluConfig
from ftpipe.choices import MmluMethod
from ftpipe.config import RunConfig
from ftpipe.errors import ConfigError, ModelError
from ftpipe.evaluation import continuations, scores
from ftpipe.evaluation.continuations import Asked
from ftpipe.evaluation.mmlu_prompts import LETTERS, Question, known_categories, questions
from ftpipe.evaluation.scores import Interval, Score
from ftpipe.logs import progress, say
from ftpipe.printing import as_json
from ftpipe.stopping import Stopped

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RECORD, ANSWERS = "mmlu.json", "mmlu-answers.jsonl"
NAME, MACRO = "mmlu", "mmlu/macro"
END = "\nAnswer:"  # of every prompt


@dataclass(frozen=True)
class Fitted:
    """A question as the model is asked it.

    Attributes:
        shots: examples that are left before it.
        cut: whether the start of the prompt is missing.
    """

    asked: Asked
    shots: int
    cut: bool

    def key(self) -> str:
        """Return what its answer depends on besides the model."""
        return fingerprint({"prompt": self.asked.prompt, "letters": self.asked.continuations})


def run(
    cfg: RunConfig,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
) -> dict[str, Score]:
    """Measure MMLU; write ``mmlu.json``, all scores, and ``mmlu-answers.jsonl``, each question.

    What an interrupted call has written there is not asked again.

    Args:
        model: in eval mode, on its device.

    Returns:
        The share of right answers over all questions (``mmlu``: hendrycks' average, weighted by the size
        of the subjects), the mean over subjects (``mmlu/macro``: QLoRA's) and over each category
        (``mmlu/stem``, ...); nothing without ``evaluate.mmlu.path``. Subjects are in ``mmlu.json``.

    Raises:
        DataError, ConfigError: for questions that cannot be used.
        ModelError: if the tokenizer does not tell the letters apart.
        Stopped: if it was asked to stop.
    """
    mmlu = cfg.evaluate.mmlu
    if mmlu.path is None:
        return {}
    asked = questions(mmlu)
    room = _room(mmlu, model)
    letters = letter_tokens(tokenizer, mmlu.method)
    fitted = [
        fit(one, tokenizer, mmlu.method, letters, room) for one in progress(asked, "prompts of MMLU")
    ]
    logps = _answers(model, tokenizer, fitted, mmlu.batch_size, out / ANSWERS)
    _write_answers(out / ANSWERS, asked, fitted, logps)
    right_N = np.array(
        [_chosen(one) == question.answer for one, question in zip(logps, asked, strict=True)]
    )
    found = {score.name: score for score in _scores(asked, right_N)}
    record = _record(mmlu, room, asked, fitted, logps)
    subjects = {score.name: score for score in _subject_scores(asked, right_N)}
    listed = {name: asdict(score) for name, score in (found | subjects).items()}
    write_atomic(out / RECORD, as_json({**record, "scores": listed}) + "\n")
    _tell(record, found[NAME])
    return found


def _room(mmlu: MmluConfig, model: PreTrainedModel | PeftModel) -> int:
    most = continuations.longest(model)
    if mmlu.max_length is not None and mmlu.max_length > most:
        raise ConfigError(
            f"evaluate.mmlu.max_length={mmlu.max_length} is more than the {most} tokens that the model "
            "takes."
        )
    return mmlu.max_length or most


def letter_tokens(tokenizer: PreTrainedTokenizerBase, method: MmluMethod) -> tuple[tuple[int, ...], ...]:
    """Return the tokens of each answer, by the method (see the module's docstring).

    Raises:
        ModelError: if two answers have the same, or the tokenizer ends every text with a token.
    """
    if method is MmluMethod.qlora:
        found = tuple(
            tuple(tokenizer(letter, add_special_tokens=False)["input_ids"][:1]) for letter in LETTERS
        )
    else:
        end = tokenizer(END)["input_ids"]
        wholes = [tokenizer(f"{END} {letter}")["input_ids"] for letter in LETTERS]
        if any(whole[: len(end)] != end for whole in wholes):
            raise ModelError("MMLU cannot be asked: the tokenizer puts tokens after the end of a text.")
        found = tuple(tuple(whole[len(end) :]) for whole in wholes)
    if len(set(found)) < len(LETTERS) or not all(found):
        raise ModelError("MMLU cannot be asked: the tokenizer has the same tokens for several letters.")
    return found


def fit(
    question: Question,
    tokenizer: PreTrainedTokenizerBase,
    method: MmluMethod,
    letters: tuple[tuple[int, ...], ...],
    room: int,
) -> Fitted:
    """Return the question with as many of its examples as fit.

    Args:
        letters: the tokens of each answer.
        room: tokens of a prompt and an answer, of which the last is not read.
    """
    room -= max(map(len, letters)) - 1
    for shots in range(len(question.examples), -1, -1):
        ids = _encoded(question.prompt(shots), tokenizer, method)
        if len(ids) <= room:
            return Fitted(Asked(ids, letters), shots, cut=False)
    return Fitted(Asked(ids[-room:], letters), 0, cut=True)


def _encoded(text: str, tokenizer: PreTrainedTokenizerBase, method: MmluMethod) -> list[int]:
    if method is MmluMethod.qlora:
        ids = tokenizer(f"{tokenizer.bos_token or ''}{text}", add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(text)["input_ids"]
    return list(ids)


def _answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    fitted: Sequence[Fitted],
    size: int,
    file: Path,
) -> list[list[float]]:
    """Return the log-probabilities of the letters, from the file where they are in it already.

    A batch is asked whole or not at all, so that an interrupted run computes what another would have.
    """
    keys = [one.key() for one in fitted]
    text = file.read_bytes() if file.is_file() else b""
    text = text[: text.rfind(b"\n") + 1]  # a kill may have torn the last line
    known = dict(_lines(text))
    pad = tokenizer.pad_token_id or 0
    todo = [
        batch
        for batch in continuations.batches([one.asked for one in fitted], size)
        if any(keys[at] not in known for at in batch)
    ]
    with file.open("ab") as journal:
        journal.truncate(len(text))
        for batch in progress(todo, "batches of MMLU"):
            found = continuations.logps(model, [fitted[at].asked for at in batch], pad)
            for at, values in zip(batch, found, strict=True):
                known[keys[at]] = values
                journal.write((json.dumps({"key": keys[at], "logps": values}) + "\n").encode())
            journal.flush()
            if stopping.asked():
                raise Stopped(f"with {len(known):,} questions of MMLU answered")
    return [known[key] for key in keys]


def _lines(text: bytes) -> list[tuple[str, list[float]]]:
    found = []
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # damaged: its question is asked again
            continue
        match entry:
            case {"key": str(key), "logps": list(values)}:
                found.append((key, [float(value) for value in values]))
    return found


def _chosen(logps: Sequence[float]) -> int:
    """Return the index of the likeliest letter; of equals the first, as numpy's argmax."""
    return int(np.argmax(logps))


def _write_answers(
    file: Path, asked: Sequence[Question], fitted: Sequence[Fitted], logps: Sequence[Sequence[float]]
) -> None:
    lines = []
    for question, one, values in zip(asked, fitted, logps, strict=True):
        line = {
            "where": question.where,
            "subject": question.subject,
            "answer": LETTERS[question.answer],
            "chosen": LETTERS[_chosen(values)],
            "shots": one.shots,
            "cut": one.cut,
            "logps": list(values),
            "key": one.key(),
        }
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_atomic(file, "".join(lines))


def _scores(asked: Sequence[Question], right_N: Any) -> list[Score]:
    subject_N = np.array([question.subject for question in asked])
    shares = [right_N[subject_N == subject] for subject in np.unique(subject_N)]
    found = [scores.share(NAME, right_N), macro(shares)]
    for name, subjects in known_categories(np.unique(subject_N).tolist()).items():
        found.append(scores.share(f"{NAME}/{name}", right_N[np.isin(subject_N, subjects)]))
    return found


def _subject_scores(asked: Sequence[Question], right_N: Any) -> list[Score]:
    subject_N = np.array([question.subject for question in asked])
    return [
        scores.share(f"{NAME}/subject/{subject}", right_N[subject_N == subject])
        for subject in np.unique(subject_N)
    ]


def macro(right: Sequence[Any]) -> Score:
    """Return the mean over subjects of the share of right answers.

    The subjects are fixed, their questions are a sample, so the standard error is that of a stratified
    mean, sqrt(sum_s p_s (1 - p_s) / (n_s - 1)) / S (Cochran 1977, Sampling Techniques, eq. 5.7, 3.8).

    Args:
        right: of each subject, which of its answers are right.
    """
    means = [float(np.mean(one)) for one in right]
    error: float | None = None
    if all(len(one) > 1 for one in right):
        variances = [p * (1 - p) / (len(one) - 1) for p, one in zip(means, right, strict=True)]
        error = float(np.sqrt(sum(variances))) / len(right)
    n = sum(map(len, right))
    return scores.from_error(MACRO, float(np.mean(means)), error, n, "share", True, Interval.stratified)


def _record(
    mmlu: MmluConfig,
    room: int,
    asked: Sequence[Question],
    fitted: Sequence[Fitted],
    logps: Sequence[Sequence[float]],
) -> Mapping[str, Any]:
    ready = mmlu.ready_prompts()
    chosen = Counter(LETTERS[_chosen(one)] for one in logps)
    return {
        "method": str(mmlu.method),
        "split": None if ready else mmlu.split or MMLU_SPLIT,
        "shots": None if ready else MMLU_SHOTS if mmlu.shots is None else mmlu.shots,
        "max_length": room,
        "questions": len(asked),
        "subjects": len({question.subject for question in asked}),
        # examples left out, and prompts cut at their start, for want of room
        "fewer_shots": sum(
            one.shots < len(question.examples) for one, question in zip(fitted, asked, strict=True)
        ),
        "cut": sum(one.cut for one in fitted),
        "chosen": {letter: chosen[letter] for letter in LETTERS},
        "prompts": fingerprint({"keys": [one.key() for one in fitted]}),  # the same for all policies
    }


def _tell(record: Mapping[str, Any], score: Score) -> None:
    say(f"MMLU: {score.shown()}")
    if record["fewer_shots"] or record["cut"]:
        say(
            f"MMLU: of {record['questions']:,} prompts {record['fewer_shots']:,} lost examples and "
            f"{record['cut']:,} their start: the model takes {record['max_length']:,} tokens."
        )
