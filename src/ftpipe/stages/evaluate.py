"""Evaluation: every policy that the run has made, and the base, on the same rows and questions.

Held-out loss, benchmarks and answers of each policy; the answers judged in pairs by a reward model or by
a model behind a server; what changed from one policy to the next, with intervals paired by row. Writes
``report.md`` (the table first), ``report.json``, ``report.png``, ``generations-<policy>.jsonl``,
``judgements.jsonl``, and ``kept``, from which an interrupted run goes on: losses row by row, and all
calls with their answers.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils.import_utils import enable_tf32

from ftpipe import determinism, modeling, training
from ftpipe.artifacts import Artifact, write_atomic
from ftpipe.choices import Device, Part
from ftpipe.config import RunConfig
from ftpipe.errors import ConfigError
from ftpipe.evaluation import (
    answers,
    harness,
    harness_tasks,
    heldout,
    judge,
    mmlu,
    mmlu_prompts,
    policies,
    questions,
    report,
    rewards,
    table,
)
from ftpipe.evaluation.answers import Dialogue
from ftpipe.evaluation.heldout import Losses
from ftpipe.evaluation.judge import Judgement
from ftpipe.evaluation.policies import Loaded, Policy
from ftpipe.evaluation.questions import Key, Question
from ftpipe.evaluation.scores import Interval, Score
from ftpipe.evaluation.table import Observed
from ftpipe.evolve.calls import JOURNAL, Journal, Said
from ftpipe.evolve.local import InMemory
from ftpipe.evolve.server import Server
from ftpipe.logs import say
from ftpipe.reward import model as reward_model
from ftpipe.tracking import Tracker

if TYPE_CHECKING:
    from datasets import Dataset

KEPT = "kept"  # the folder of what is finished
BENCHMARKS = "benchmarks"  # the folder of what benchmarks write, one for each policy


def run(cfg: RunConfig, inputs: Mapping[str, Artifact], out: Path) -> dict[str, float]:
    """Measure the policies among ``inputs``, write the report to ``out``, return its numbers.

    Killed at any instant and started again, it asks a judge nothing that it has answered, writes no
    answer twice but those of an unfinished batch, and measures no policy's loss or benchmark twice.

    Raises:
        ConfigError: if there is nothing to measure, or the server refuses the key, the address or the
            model.
        DataError: if a question or a published answer cannot be used.
        ModelError: if weights cannot be loaded, or the server does not answer.
        Stopped: if it was asked to stop; what has finished is kept.
    """
    determinism.begin(cfg)
    if cfg.launch.device is Device.cuda:
        enable_tf32(cfg.launch.tf32)  # as a Trainer does
    work = Work(cfg, inputs, out)
    work.check()
    for policy in work.policies:
        work.measure(policy)
    judgements = work.judge()
    return work.conclude(judgements)


@dataclass
class Work:
    """An evaluation on its way.

    Attributes:
        observed: of each policy, what is known row by row.
        stated: of each policy, the scores of benchmarks.
        given: answers by who gave them, policies and published ones.
        unrewarded: of each of them, how many answers have no reward.
    """

    cfg: RunConfig
    inputs: Mapping[str, Artifact]
    out: Path
    observed: dict[str, list[Observed]] = field(default_factory=dict)
    stated: dict[str, dict[str, Score]] = field(default_factory=dict)
    given: dict[str, dict[Key, Said]] = field(default_factory=dict)
    unrewarded: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        evaluate = self.cfg.evaluate
        self.kept = self.out / KEPT
        self.kept.mkdir(exist_ok=True)
        self.tokenizer = policies.tokenizer(self.cfg, self.inputs)
        self.dialogue = Dialogue(self.cfg.data.template, self.tokenizer)
        self.policies = policies.found(self.cfg, self.inputs)
        self.questions: list[Question] = questions.read(evaluate)
        for name, texts in evaluate.answers.items():
            found = questions.published(name, texts, self.questions)
            self.given[name] = {key: Said(text) for key, text in found.items()}

    @cached_property
    def rows(self) -> tuple[Part, Dataset] | None:
        """Return the held-out rows, and which part they are; None where there are none to measure."""
        most = self.cfg.evaluate.held_out
        if "dataset" not in self.inputs or most == 0:
            return None
        return heldout.rows_of(self.inputs["dataset"].path, most)

    @cached_property
    def reward_folder(self) -> Path | None:
        """Return where the reward model that judges lies; None where none does."""
        asked = self.cfg.evaluate.judge
        if not asked.reward:
            return None
        if asked.reward_model is not None:
            return Path(asked.reward_model)
        made = self.inputs.get("reward_model")
        return made.path if made else None

    @cached_property
    def server(self) -> Server | None:
        asked = self.cfg.evaluate.judge
        return None if asked.url is None else judge.server(asked)

    @cached_property
    def pairs(self) -> list[tuple[str, str]]:
        """Return whose answers are compared."""
        stated = self.cfg.evaluate.judge.pairs
        if stated:
            return [(one, other) for one, other in (pair.split(":") for pair in stated)]
        found = [(one.name, one.before) for one in self.policies if one.before is not None]
        return [*found, *((self.policies[-1].name, name) for name in self.cfg.evaluate.answers)]

    def check(self) -> None:
        """Refuse what would fail after hours, or measure nothing.

        Raises:
            ConfigError, DataError, ModelError: as ``run``.
        """
        evaluate = self.cfg.evaluate
        benchmarks = evaluate.mmlu.path is not None or bool(evaluate.harness.tasks)
        if self.rows is None and not self.questions and not benchmarks:
            raise ConfigError(
                "evaluate has nothing to measure: the run has no held-out demonstrations, and there are "
                "no questions (evaluate.prompts), no evaluate.mmlu.path and no evaluate.harness.tasks; "
                "take a set with evaluate=NAME."
            )
        judged = self.server is not None or self.reward_folder is not None
        for key in ("answers", "judge.pairs"):
            given = evaluate.answers if key == "answers" else evaluate.judge.pairs
            if given and not judged:
                raise ConfigError(
                    f"evaluate.{key} would be read by nothing: nobody judges. Set evaluate.judge.url "
                    "and evaluate.judge.model, or let a reward model judge "
                    "(evaluate.judge.reward_model, or the stage 'reward' before this one)."
                )
        if self.questions:
            answers.check(self.questions, self.dialogue)
        for policy in self.policies:
            self._check_room(policy)
        if evaluate.mmlu.path is not None:
            mmlu_prompts.questions(evaluate.mmlu)
        for name, task in evaluate.harness.tasks.items():
            with tempfile.TemporaryDirectory(prefix="ftpipe-") as scratch:
                harness_tasks.written(name, task, Path(scratch))
        if self.reward_folder is not None:
            reward_model.stated(self.reward_folder, self.tokenizer)

    def _check_room(self, policy: Policy) -> None:
        """Refuse lengths that leave a policy no room.

        Raises:
            ConfigError: naming the key.
        """
        evaluate, most = self.cfg.evaluate, policy.positions
        if most is None:
            return
        if self.questions and evaluate.max_new_tokens >= most:
            raise ConfigError(
                f"evaluate.max_new_tokens={evaluate.max_new_tokens} leaves no room for a question: "
                f"{policy.name} knows {most:,} positions. Set evaluate.max_new_tokens to fewer, "
                f"such as {most // 2}."
            )
        asked = {"mmlu": evaluate.mmlu.path, "harness": evaluate.harness.tasks}
        for key, benchmark in (("mmlu", evaluate.mmlu), ("harness", evaluate.harness)):
            length = benchmark.max_length
            if asked[key] and length is not None and length > most:
                raise ConfigError(
                    f"evaluate.{key}.max_length={length} is more than the {most:,} positions of "
                    f"{policy.name}; set evaluate.{key}.max_length=null."
                )

    def measure(self, policy: Policy) -> None:
        """Measure one policy by itself, and write its answers."""
        say(f"{policy.name}: {policy.start.adapter or policy.start.weights}")
        loaded = Loaded(self.cfg, policy.start, self.tokenizer)
        observed: list[Observed] = []
        losses = self._losses(policy, loaded)
        if losses is not None:
            observed += table.of_losses(losses)
        if self.questions:
            given = self._answers(policy, loaded)
            self.given[policy.name] = given
            lines = answers.lines(policy.name, self.questions, given, self.dialogue)
            write_lines(self.out / f"generations-{policy.name}.jsonl", lines)
            observed += table.of_answers(self.questions, given, self.dialogue)
        self.observed[policy.name] = observed
        self.stated[policy.name] = self._benchmarks(policy, loaded)
        loaded.release()

    def _losses(self, policy: Policy, loaded: Loaded) -> Losses | None:
        if self.rows is None:
            return None
        path = self.kept / f"losses-{policy.name}.json"
        losses = Losses.read(path)
        if losses is None:
            _, rows = self.rows
            model = loaded()
            training.check_positions(model, max(rows["length"][:]))
            pad, size = int(self.tokenizer.pad_token_id), self.cfg.launch.micro_batch_size
            losses = heldout.measure(model, rows, pad, size, policies.autocast(self.cfg))
            write_atomic(path, losses.text())
        return losses

    def _answers(self, policy: Policy, loaded: Loaded) -> dict[Key, Said]:
        evaluate = self.cfg.evaluate
        endpoint = InMemory(
            policy.name,
            loaded,
            self.tokenizer,
            policy.positions,
            evaluate.generation_batch_size,
            policies.autocast(self.cfg),
            self.dialogue.endings,
        )
        with closing(Journal(self.kept / f"answers-{policy.name}.jsonl")) as journal:
            known(journal, f"answers of {policy.name}")
            found = answers.give(
                self.questions, self.dialogue, endpoint, journal, evaluate, self.cfg.seed
            )
            journal.settle()
            return found

    def _benchmarks(self, policy: Policy, loaded: Loaded) -> dict[str, Score]:
        path = self.kept / f"benchmarks-{policy.name}.json"
        if path.is_file():
            stated = json.loads(path.read_text(encoding="utf-8"))
            return {
                name: Score(**{**one, "interval": Interval(one["interval"])})
                for name, one in stated.items()
            }
        evaluate, found = self.cfg.evaluate, dict[str, Score]()
        if evaluate.mmlu.path is None and not evaluate.harness.tasks:
            return found
        folder = self.out / BENCHMARKS / policy.name
        folder.mkdir(parents=True, exist_ok=True)
        for benchmark in (mmlu, harness):
            found |= benchmark.run(self.cfg, loaded(), self.tokenizer, folder)
        text = json.dumps({name: asdict(one) for name, one in found.items()})
        write_atomic(path, text + "\n")
        return found

    def judge(self) -> list[Judgement]:
        """Return what each judge says of each pair of answers."""
        found = list(judge.matches(self.pairs, self.questions, self.given))
        judgements: list[Judgement] = []
        if not found:
            return judgements
        if self.reward_folder is not None:
            judgements += judge.by_rewards(found, self._rewards(self.reward_folder))
        if self.server is not None:
            with closing(Journal(self.kept / JOURNAL)) as journal:
                known(journal, "judgements")
                asked = self.cfg.evaluate.judge
                judgements += judge.by_server(found, asked, self.server, journal)
                journal.settle()
        return judgements

    def _rewards(self, folder: Path) -> dict[str, dict[Key, float]]:
        """Return the reward of each answer, by who gave it, and note those of the policies."""
        cfg = self.cfg
        device = modeling.device(cfg)
        model = reward_model.load(
            folder,
            self.tokenizer,
            attention=str(cfg.model.attention),
            trust_remote_code=cfg.model.trust_remote_code,
            device=device,
        )
        pad, size = int(self.tokenizer.pad_token_id), cfg.launch.micro_batch_size
        scored = {}
        for name, given in self.given.items():
            wanted = rewards.conversations(self.questions, given, self.dialogue)
            scored[name] = rewards.score(model, wanted, pad, size, device, policies.autocast(cfg))
            told = sum(said.refused is None for said in given.values())
            self.unrewarded[name] = told - len(scored[name])
            if name in self.observed:
                self.observed[name] += table.of_rewards(self.questions, scored[name])
        return scored

    def conclude(self, judgements: list[Judgement]) -> dict[str, float]:
        """Write the report, leave the artifact as it stays, and return its numbers."""
        before = {one.name: one.before for one in self.policies}
        rows = table.rows(before, self.observed, self.stated)
        tallies = table.tallies(judgements)
        numbers = table.metrics(rows, tallies, self.policies[-1].name)
        with Tracker(self.cfg, "evaluate", self.out, done=-1) as tracker:
            pictures = report.write(self.out, before, rows, tallies, self._notes())
            if judgements:
                write_lines(self.out / "judgements.jsonl", (one.line() for one in judgements))
            tracker.log(0, numbers)
            tracker.summary(numbers)
            tracker.images(pictures)
        return numbers | training.peak_gpu_memory()

    def _notes(self) -> list[str]:
        """Return sentences about what was measured and how."""
        evaluate, notes = self.cfg.evaluate, list[str]()
        if self.rows is not None:
            part, rows = self.rows
            notes.append(
                f"loss: nats per learned token of {len(rows):,} held-out rows ({part}); n counts "
                "conversations, where rows of one conversation or one first prompt are one. Perplexity "
                "is e to the power of it."
            )
        if self.questions:
            how = "greedy" if not evaluate.temperature else f"drawn at {evaluate.temperature:g}"
            notes.append(
                f"answers: {how}, at most {evaluate.max_new_tokens:,} tokens, by the template "
                f"{self.cfg.data.template}; ended: those that were not cut there; repeated: "
                "stretches of four tokens that an answer had before."
            )
        if self.given:
            asked = sum(len(question.turns) for question in self.questions)
            for name, given in self.given.items():
                told = sum(said.refused is None for said in given.values())
                if told < asked:
                    notes.append(f"{name} answers {told:,} of {asked:,} turns.")
        if self.reward_folder is not None and self.questions:
            notes.append(f"reward model: {self.reward_folder.name}; a higher reward wins.")
        notes += [
            f"{name}: {count:,} answers have no reward (their conversations exceed the reward model's "
            "positions, or the template), and the comparisons with them are left out."
            for name, count in self.unrewarded.items()
            if count
        ]
        if self.server is not None and self.questions:
            notes.append(
                f"{self.server.model} judges each pair in both orders; a verdict that changes with the "
                "order is a tie, one that cannot be read counts for neither."
            )
        return notes


def known(journal: Journal, what: str) -> None:
    """Say what an interrupted run has left."""
    if len(journal):
        say(f"{len(journal):,} {what} are in the journal and are not repeated")


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
