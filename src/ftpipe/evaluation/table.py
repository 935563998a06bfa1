"""Before and after: what was observed of each policy, as scores, and how they changed on the same rows.

Shapes: N observations, G clusters of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ftpipe.evaluation import scores
from ftpipe.evaluation.answers import Dialogue, Given
from ftpipe.evaluation.heldout import Losses
from ftpipe.evaluation.judge import Judgement, Why
from ftpipe.evaluation.questions import Key, Question
from ftpipe.evaluation.scores import Floats, Score
from ftpipe.ppo.health import repeated

PERPLEXITY = "perplexity"


@dataclass(frozen=True)
class Observed:
    """One measure of one policy, observation by observation.

    Attributes:
        clusters: which cluster each belongs to; the same name means the same rows for every policy.
        values, weights: the score is the sum of the values over that of the weights.
        is_share: values are shares of 1, so Wilson's interval fits.
    """

    name: str
    unit: str
    higher_is_better: bool | None
    clusters: Sequence[str]
    values: Sequence[float]
    weights: Sequence[float]
    is_share: bool = False

    def score(self) -> Score:
        cluster_N = np.unique(np.array(self.clusters), return_inverse=True)[1]
        if self.is_share:
            return scores.share(self.name, np.array(self.values), cluster_N, self.higher_is_better)
        return scores.ratio(
            self.name,
            np.array(self.values, np.float64),
            np.array(self.weights, np.float64),
            cluster_N,
            self.unit,
            self.higher_is_better,
        )

    def sums(self, wanted: Sequence[str]) -> tuple[Floats, Floats]:
        """Return the sums of values and of weights of each of these clusters."""
        place = {name: at for at, name in enumerate(wanted)}
        totals, weights = np.zeros(len(wanted)), np.zeros(len(wanted))
        for cluster, value, weight in zip(self.clusters, self.values, self.weights, strict=True):
            if cluster in place:
                totals[place[cluster]] += value
                weights[place[cluster]] += weight
        return totals, weights


@dataclass(frozen=True)
class Row:
    """A line of the table: a measure of a policy, and how it differs from the one that it came from.

    Attributes:
        change: of what both have; None where there is nothing to compare with.
    """

    policy: str
    score: Score
    before: str | None = None
    change: Score | None = None


def of_losses(losses: Losses) -> list[Observed]:
    """Return the held-out loss, of all rows and, where there are several, of each source."""
    sources = list(dict.fromkeys(losses.source))
    named: dict[str, list[int]] = {"loss": list(range(len(losses.source)))}
    if len(sources) > 1:
        named |= {
            f"loss/{source}": [at for at, of in enumerate(losses.source) if of == source]
            for source in sources
        }
    return [
        Observed(
            name=name,
            unit="nats",
            higher_is_better=False,
            clusters=[str(losses.cluster[at]) for at in rows],
            values=[losses.nats[at] for at in rows],
            weights=[float(losses.tokens[at]) for at in rows],
        )
        for name, rows in named.items()
    ]


def of_answers(questions: Sequence[Question], given: Given, dialogue: Dialogue) -> list[Observed]:
    """Return how long answers are, how many end by themselves, and how much they repeat, of each set."""
    found = []
    for name in dict.fromkeys(question.set for question in questions):
        keys = [
            (question.key, turn)
            for question in questions
            for turn in range(len(question.turns))
            if question.set == name
        ]
        told = {key: given[key] for key in keys if key in given and given[key].refused is None}
        if not told:
            continue
        tokens = {
            key: dialogue.tokenizer(said.text, add_special_tokens=False)["input_ids"]
            for key, said in told.items()
        }
        clusters, ones = [question for question, _ in told], [1.0] * len(told)
        lengths = [float(len(ids)) for ids in tokens.values()]
        ended = [float(not said.cut) for said in told.values()]
        again = [repeated(ids) for ids in tokens.values()]
        found += [
            Observed(f"length/{name}", "tokens", None, clusters, lengths, ones),
            Observed(f"ended/{name}", "share", None, clusters, ended, ones, is_share=True),
            Observed(f"repeated/{name}", "share of 4-grams", False, clusters, again, ones),
        ]
    return found


def of_rewards(questions: Sequence[Question], rewards: Mapping[Key, float]) -> list[Observed]:
    """Return the mean reward of a policy's answers, of each set."""
    sets = {question.key: question.set for question in questions}
    found = []
    for name in dict.fromkeys(sets.values()):
        own = {key: reward for key, reward in rewards.items() if sets[key[0]] == name}
        if own:
            clusters, ones = [question for question, _ in own], [1.0] * len(own)
            values = list(own.values())
            found.append(Observed(f"reward/{name}", "standard deviations", True, clusters, values, ones))
    return found


def rows(
    before: Mapping[str, str | None],
    observed: Mapping[str, Sequence[Observed]],
    stated: Mapping[str, Mapping[str, Score]],
) -> list[Row]:
    """Return the table: measures one after the other, each for every policy that has it.

    Args:
        before: policies in their order, with the one that each came from.
        observed: of each policy, what is known row by row; its changes are paired.
        stated: of each policy, scores that other programs give; their changes are not.
    """
    table: list[Row] = []
    by_name = {policy: {one.name: one for one in found} for policy, found in observed.items()}
    for name in _names(by_name.values()):
        lines: list[Row] = []
        for policy, came in before.items():
            own = by_name.get(policy, {}).get(name)
            if own is None:
                continue
            earlier = by_name.get(came, {}).get(name) if came is not None else None
            change = None if earlier is None else difference(earlier, own)
            lines.append(Row(policy, own.score(), came if change else None, change))
        table += lines
        if name.split("/")[0] == "loss":
            table += [_perplexity(line) for line in lines]
    for name in _names(stated.values()):
        for policy, came in before.items():
            score = stated.get(policy, {}).get(name)
            if score is None:
                continue
            earlier_score = stated.get(came, {}).get(name) if came is not None else None
            moved = None if earlier_score is None else scores.apart(name, earlier_score, score)
            table.append(Row(policy, score, came if moved else None, moved))
    return table


def _names(found: Iterable[Mapping[str, object]]) -> list[str]:
    return list(dict.fromkeys(name for of in found for name in of))


def _perplexity(line: Row) -> Row:
    """Return the perplexity of a loss; its change is told by the loss, whose interval is paired."""
    name = line.score.name.replace("loss", PERPLEXITY, 1)
    return Row(line.policy, scores.exponential(line.score, name, "tokens"))


def difference(before: Observed, after: Observed) -> Score | None:
    """Return how a measure changed on the clusters that both have; None where they have none."""
    both = [name for name in dict.fromkeys(after.clusters) if name in set(before.clusters)]
    if not both:
        return None
    return scores.paired(after.name, before.sums(both), after.sums(both), after.score())


@dataclass(frozen=True)
class Tally:
    """What a judge said of a pair.

    Attributes:
        score: share of comparisons won, ties counting half, clustered by question; None of none.
        agreed: share of comparisons with the same verdict in both orders, of those asked both ways; None
            where there are none.
    """

    judge: str
    one: str
    other: str
    wins: int
    ties: int
    losses: int
    unparsable: int
    flipped: int
    equal: int
    score: Score | None
    agreed: float | None
    categories: Mapping[str, Score]


def tallies(judgements: Sequence[Judgement]) -> list[Tally]:
    """Return a tally for each judge and pair, in the order in which they come."""
    groups: dict[tuple[str, str, str], list[Judgement]] = {}
    for one in judgements:
        groups.setdefault((one.judge, one.one, one.other), []).append(one)
    return [_tally(*names, group) for names, group in groups.items()]


def _tally(judge: str, one: str, other: str, group: Sequence[Judgement]) -> Tally:
    outcomes = [judged.outcome for judged in group]
    counted = {why: sum(judged.why is why for judged in group) for why in Why}
    both_ways = counted[Why.decided] + counted[Why.flipped]
    categories = dict.fromkeys(judged.category for judged in group)
    by_category = {name: _rate([of for of in group if of.category == name]) for name in categories}
    return Tally(
        judge=judge,
        one=one,
        other=other,
        wins=outcomes.count(1.0),
        ties=outcomes.count(0.5),
        losses=outcomes.count(0.0),
        unparsable=counted[Why.unparsable],
        flipped=counted[Why.flipped],
        equal=counted[Why.equal],
        score=_rate(group),
        agreed=counted[Why.decided] / both_ways if both_ways else None,
        categories={name: score for name, score in by_category.items() if score is not None},
    )


def _rate(group: Sequence[Judgement]) -> Score | None:
    """Return the share of comparisons that were won, with its interval, if any was decided."""
    known = [(one.outcome, one.question) for one in group if one.outcome is not None]
    if not known:
        return None
    outcome_N = np.array([outcome for outcome, _ in known])
    cluster_N = np.unique(np.array([question for _, question in known]), return_inverse=True)[1]
    return scores.share("win_rate", outcome_N, cluster_N)


def metrics(table: Sequence[Row], found: Sequence[Tally], last: str) -> dict[str, float]:
    """Return flat numbers: ``dpo/loss``, its ends and its change; ``dpo_over_sft/win_rate/<judge>``.

    What is not finite is left out.

    Args:
        last: the policy whose numbers are there by their bare names as well, with its first win rate.
    """
    numbers: dict[str, float] = {}
    for line in table:
        name = f"{line.policy}/{line.score.name}"
        numbers |= _ends(name, line.score)
        if line.change is not None:
            numbers |= _ends(f"{name}_change", line.change)
        if line.policy == last:
            numbers[line.score.name] = line.score.value
    for tally in found:
        judge = tally.judge.replace(" ", "_")
        name = f"{tally.one}_over_{tally.other}"
        numbers[f"{name}/unparsable/{judge}"] = float(tally.unparsable)
        if tally.score is not None:
            numbers |= _ends(f"{name}/win_rate/{judge}", tally.score)
            if tally.one == last:
                numbers.setdefault("win_rate", tally.score.value)
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def _ends(name: str, score: Score) -> dict[str, float]:
    ends = {f"{name}_low": score.low, f"{name}_high": score.high}
    return {name: score.value} | {key: end for key, end in ends.items() if end is not None}
