"""Which of two answers is better: by a reward model, or by a model behind a server asked both ways.

The pairwise judge of MT-bench (Zheng et al. 2023, arXiv:2306.05685, section 3.4): each pair of answers
is shown in both orders, and a verdict that follows the order rather than the answer is a tie. A verdict
that cannot be read decides nothing; it is counted and shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from ftpipe.config import EvolveConfig
from ftpipe.errors import ConfigError
from ftpipe.evaluate_config import JudgeConfig
from ftpipe.evaluation.answers import Given
from ftpipe.evaluation.prompts import pairwise, verdict
from ftpipe.evaluation.questions import Key, Question
from ftpipe.evolve.calls import Call, Endpoint, Journal, Said
from ftpipe.evolve.server import Server

REWARD = "reward model"  # what the judge of that kind is called
WIN, TIE, LOSS = 1.0, 0.5, 0.0


class Why(StrEnum):
    """How a judgement came about."""

    decided = "decided"  # the better answer, or a tie, in both orders
    flipped = "flipped"  # another winner, or a tie, in the other order: a tie
    equal = "equal"  # the answers are the same text: a tie, nobody was asked
    unparsable = "unparsable"  # no verdict in what the judge wrote, or the server refused: nothing


@dataclass(frozen=True)
class Judgement:
    """One comparison of two answers to one turn of a question.

    Attributes:
        outcome: of ``one`` against ``other``: 1 won, 0.5 tied, 0 lost; None: the verdict is not known.
        told: what it rests on: the two rewards, or what the judge wrote in either order.
    """

    judge: str
    one: str
    other: str
    set: str
    question_id: str
    category: str
    turn: int  # from 1 on
    outcome: float | None
    why: Why
    told: tuple[Any, ...] = ()

    @property
    def question(self) -> str:
        return f"{self.set}/{self.question_id}"

    def line(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Match:
    """Two answers to compare: to turn ``turn`` (from 0 on) of a question, with all before it."""

    one: str
    other: str
    question: Question
    turn: int
    first: tuple[str, ...]  # of ``one``, up to that turn
    second: tuple[str, ...]

    def judged(
        self, judge: str, outcome: float | None, why: Why, told: tuple[Any, ...] = ()
    ) -> Judgement:
        question = self.question
        return Judgement(
            judge=judge,
            one=self.one,
            other=self.other,
            set=question.set,
            question_id=question.id,
            category=question.category,
            turn=self.turn + 1,
            outcome=outcome,
            why=why,
            told=told,
        )

    @property
    def same(self) -> bool:
        """Whether the two conversations are the same text."""
        return self.first == self.second


def matches(
    pairs: Sequence[tuple[str, str]], questions: Sequence[Question], answers: Mapping[str, Given]
) -> Iterator[Match]:
    """Yield the comparisons of all pairs, wherever both have answered a turn and those before it."""
    for one, other in pairs:
        for question in questions:
            for turn in range(len(question.turns)):
                said = [
                    [answers[name].get((question.key, at)) for at in range(turn + 1)]
                    for name in (one, other)
                ]
                texts = [
                    tuple(told.text for told in of if told is not None and told.refused is None)
                    for of in said
                ]
                if all(len(of) == turn + 1 for of in texts):
                    yield Match(one, other, question, turn, texts[0], texts[1])


def by_rewards(found: Sequence[Match], rewards: Mapping[str, Mapping[Key, float]]) -> list[Judgement]:
    """Return which answer has the higher reward; a comparison that lacks one is left out.

    Args:
        rewards: by policy, question and turn.
    """
    judged = []
    for match in found:
        key = (match.question.key, match.turn)
        one, other = rewards[match.one].get(key), rewards[match.other].get(key)
        if one is None or other is None:
            continue
        if match.same:  # rewards of one text may differ by rounding: each policy has batches of its own
            outcome, why = TIE, Why.equal
        else:
            outcome, why = WIN if one > other else LOSS if one < other else TIE, Why.decided
        judged.append(match.judged(REWARD, outcome, why, (one, other)))
    return judged


def server(judge: JudgeConfig) -> Server:
    """Return the judge behind ``evaluate.judge.url``.

    Raises:
        ConfigError: if the environment variable of its key is not set, or holds no key.
    """
    where = EvolveConfig(
        url=judge.url,
        model=judge.model,
        api_key_env=judge.api_key_env,
        concurrency=judge.concurrency,
        timeout=judge.timeout,
        retries=judge.retries,
    )
    return Server(where, "evaluate.judge")


def by_server(
    found: Sequence[Match], judge: JudgeConfig, endpoint: Endpoint, journal: Journal
) -> list[Judgement]:
    """Return what a model behind a server says of each comparison, asked in both orders.

    Raises:
        UserError: if the server cannot be used, or refuses all; finished calls are in the journal.
        Stopped: if it was asked to stop; as above.
    """

    def call(match: Match, turned: bool) -> Call:
        a, b = (match.second, match.first) if turned else (match.first, match.second)
        questions = match.question.turns[: match.turn + 1]
        text = pairwise(questions, a, b, match.question.reference[: match.turn + 1])
        return Call(text, judge.temperature, 1.0, judge.max_tokens, seed=0)

    asked = [match for match in found if not match.same]
    calls = [call(match, turned) for match in asked for turned in (False, True)]
    told = journal.ask(endpoint, calls, "judgements")
    if calls and all(one.refused is not None for one in told):
        raise ConfigError(
            f"evaluate.judge.url={judge.url} refused each of the {len(calls):,} prompts: "
            f"{told[-1].refused}. Correct evaluate.judge.model={judge.model}, "
            "evaluate.judge.max_tokens or what else it complains of."
        )
    said = iter(told)
    judged = []
    for match in found:
        if match.same:
            judged.append(match.judged(endpoint.model, TIE, Why.equal))
        else:
            both = (next(said), next(said))
            outcome, why = settle(*both)
            words = tuple(one.text if one.refused is None else one.refused for one in both)
            judged.append(match.judged(endpoint.model, outcome, why, words))
    return judged


def settle(straight: Said, turned: Said) -> tuple[float | None, Why]:
    """Return the outcome of a comparison that was asked in both orders, and how it came about.

    Args:
        straight: what was said with the first of the two as A.
        turned: with the first as B.
    """
    winner: Mapping[str, float] = {"A": WIN, "B": LOSS, "C": TIE}
    verdicts = [verdict(one.text) if one.refused is None else None for one in (straight, turned)]
    if verdicts[0] is None or verdicts[1] is None:
        return None, Why.unparsable
    here, there = winner[verdicts[0]], 1 - winner[verdicts[1]]
    return (here, Why.decided) if here == there else (TIE, Why.flipped)
