"""The table of before and after, the tallies of judges, and the report that is made of them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from ftpipe.choices import TemplateName
from ftpipe.evaluation import report, scores, table
from ftpipe.evaluation.answers import Dialogue
from ftpipe.evaluation.heldout import Losses
from ftpipe.evaluation.judge import Judgement, Why
from ftpipe.evaluation.questions import Question
from ftpipe.evaluation.scores import Interval, Score
from ftpipe.evaluation.table import Observed, Row, Tally
from ftpipe.evolve.calls import Said
from ftpipe.tokenizer import byte_level

BEFORE = {"base": None, "sft": "base", "dpo": "sft", "ppo": "sft"}


def observed(values: dict[str, float], name: str = "loss", weight: float = 2.0) -> Observed:
    """Return a measure of rows that are a cluster each."""
    weights = [weight] * len(values)
    return Observed(
        name, "nats", False, list(values), [weight * one for one in values.values()], weights
    )


def lines(found: list[Row], name: str = "loss") -> dict[str, Row]:
    return {line.policy: line for line in found if line.score.name == name}


def test_each_policy_is_compared_with_the_one_it_came_from() -> None:
    values = {"base": 5.0, "sft": 3.0, "dpo": 2.5, "ppo": 4.0}
    rows = ("r1", "r2", "r3")
    hard = {"r1": 0.0, "r2": 1.0, "r3": 7.0}
    of = {
        policy: [observed({row: value + hard[row] for row in rows})] for policy, value in values.items()
    }
    found = lines(table.rows(BEFORE, of, {}))
    assert list(found) == ["base", "sft", "dpo", "ppo"]
    assert found["base"].change is None and found["base"].before is None
    for policy, change in (("sft", -2.0), ("dpo", -0.5), ("ppo", 1.0)):
        moved = found[policy].change
        assert moved is not None and found[policy].before == BEFORE[policy]
        # all rows moved alike, so the paired interval is a point, however different the rows are
        assert (moved.value, moved.low, moved.high) == pytest.approx((change, change, change))
        assert (moved.n, moved.interval) == (3, Interval.t_paired)
        own = found[policy].score
        assert own.low is not None and own.low < own.value - 3


def test_only_rows_that_both_have_are_compared() -> None:
    before, after = {"r1": 1.0, "r2": 2.0, "r3": 3.0}, {"r3": 1.5, "r2": 2.5, "r9": 100.0}
    change = table.difference(observed(before), observed(after))
    assert change is not None and change.n == 2
    ends = stats.ttest_rel([2.5, 1.5], [2.0, 3.0]).confidence_interval(0.95)
    assert (change.value, change.low, change.high) == pytest.approx((-0.5, ends.low, ends.high))
    assert table.difference(observed(before), observed({"r9": 1.0})) is None


def test_perplexity_follows_each_loss() -> None:
    of = {"base": [observed({"r1": 1.0, "r2": 2.0}), observed({"r1": 1.0}, "loss/mine")]}
    found = table.rows({"base": None}, of, {})
    assert [line.score.name for line in found] == ["loss", "perplexity", "loss/mine", "perplexity/mine"]
    assert found[1].score.value == pytest.approx(math.e**1.5)


def test_scores_of_benchmarks_are_compared_without_pairs() -> None:
    stated = {
        "base": {"mmlu": scores.share("mmlu", np.array([1.0] * 48 + [0.0] * 32))},
        "sft": {"mmlu": scores.share("mmlu", np.array([1.0] * 56 + [0.0] * 14))},
    }
    found = lines(table.rows(BEFORE, {}, stated), "mmlu")
    change = found["sft"].change
    assert change is not None and change.interval is Interval.unpaired
    assert (change.low, change.high) == pytest.approx((0.0524, 0.3339), abs=5e-5)  # Newcombe 1998


def test_losses_are_told_for_all_rows_and_for_each_source() -> None:
    losses = Losses(["a", "b", "a"], [0, 0, 1], [6.0, 1.0, 2.0], [3, 1, 1])
    found = {one.name: one.score() for one in table.of_losses(losses)}
    assert {name: one.value for name, one in found.items()} == {
        "loss": pytest.approx(9 / 5),
        "loss/a": pytest.approx(8 / 4),
        "loss/b": 1.0,
    }
    assert {name: one.n for name, one in found.items()} == {"loss": 2, "loss/a": 2, "loss/b": 1}
    alone = table.of_losses(Losses(["a"] * 2, [0, 1], [1.0, 2.0], [1, 1]))
    assert [one.name for one in alone] == ["loss"]


def test_answers_are_measured_by_set() -> None:
    asked = [
        Question("a", "1", "x", ("q", "r")),
        Question("a", "2", "x", ("q",)),
        Question("b", "1", "x", ("q",)),
    ]
    given = {
        ("a/1", 0): Said("abcdabcd"),  # five 4-grams of bytes, one of them twice
        ("a/1", 1): Said("xy", cut=True),
        ("a/2", 0): Said("", refused="too long"),
        ("b/1", 0): Said("z"),
    }
    dialogue = Dialogue(TemplateName.tokenizer, byte_level())
    found = {one.name: one.score() for one in table.of_answers(asked, given, dialogue)}
    assert {name: (one.value, one.n) for name, one in found.items()} == {
        "length/a": (5.0, 1),
        "ended/a": (0.5, 1),
        "repeated/a": (pytest.approx(0.1), 1),
        "length/b": (1.0, 1),
        "ended/b": (1.0, 1),
        "repeated/b": (0.0, 1),
    }


def judgement(question: str, outcome: float | None, why: Why = Why.decided, turn: int = 1) -> Judgement:
    category = "even" if int(question) % 2 == 0 else "odd"
    return Judgement("judge", "dpo", "sft", "mine", question, category, turn, outcome, why)


GROUP = [
    *(judgement(str(at), 1.0) for at in range(6)),
    *(judgement(str(at), 0.0) for at in range(6, 8)),
    judgement("8", 0.5, Why.flipped),
    judgement("9", 0.5, Why.equal),
    judgement("10", None, Why.unparsable),
]


def test_a_tally_adds_up() -> None:
    (found,) = table.tallies(GROUP)
    counts = (found.wins, found.ties, found.losses, found.unparsable, found.flipped, found.equal)
    assert counts == (6, 2, 2, 1, 1, 1)
    assert found.wins + found.ties + found.losses + found.unparsable == len(GROUP)
    assert found.score is not None and found.score.value == 0.7
    ends = stats.binomtest(7, 10).proportion_ci(0.95, method="wilson")
    assert (found.score.low, found.score.high) == pytest.approx((ends.low, ends.high))
    assert found.agreed == 8 / 9  # of those asked both ways and read
    assert {name: one.n for name, one in found.categories.items()} == {"even": 5, "odd": 5}
    assert found.categories["even"].value == pytest.approx((3 + 0 + 0.5) / 5)


def test_two_turns_of_one_question_are_one_cluster() -> None:
    both = [one for one in GROUP if one.outcome is not None]
    both += [replace(one, turn=2) for one in both]
    (found,) = table.tallies(both)
    (single,) = table.tallies(GROUP)
    assert found.score is not None and single.score is not None
    assert found.score.n == 10 and found.score.value == single.score.value
    assert found.score.interval is Interval.wilson_clustered
    # no more is known than from one turn; Student's t with 9 degrees is a little wider still
    assert found.score.low is not None and single.score.low is not None
    assert found.score.low <= single.score.low


def test_judgements_of_which_none_can_be_read_have_no_rate() -> None:
    (found,) = table.tallies([judgement("1", None, Why.unparsable)])
    assert (found.score, found.agreed, found.unparsable, found.categories) == (None, None, 1, {})
    assert table.metrics([], [found], "dpo") == {"dpo_over_sft/unparsable/judge": 1.0}


def test_pairs_and_judges_are_told_apart() -> None:
    group = [*GROUP, *(replace(one, judge="other") for one in GROUP), replace(GROUP[0], other="base")]
    found = table.tallies(group)
    assert [(one.judge, one.one, one.other) for one in found] == [
        ("judge", "dpo", "sft"),
        ("other", "dpo", "sft"),
        ("judge", "dpo", "base"),
    ]


def test_metrics_are_flat_and_finite() -> None:
    of = {"base": [observed({"r1": 800.0, "r2": 900.0})], "dpo": [observed({"r1": 1.0, "r2": 2.0})]}
    rows = table.rows({"base": None, "dpo": "base"}, of, {})
    found = table.metrics(rows, table.tallies(GROUP), "dpo")
    assert found["base/loss"] == 850.0 and "base/perplexity" not in found  # e to the 850th
    assert found["dpo/loss_change"] == pytest.approx(-848.5)
    assert found["loss"] == found["dpo/loss"] == 1.5
    assert found["win_rate"] == found["dpo_over_sft/win_rate/judge"] == 0.7
    assert found["dpo_over_sft/win_rate/judge_low"] < 0.7
    assert all(type(value) is float and math.isfinite(value) for value in found.values())
    assert json.loads(json.dumps(found, allow_nan=False)) == found


# --- the report ---


def made() -> tuple[list[Row], list[Tally]]:
    of = {"base": [observed({"r1": 800.0, "r2": 900.0})], "dpo": [observed({"r1": 1.0, "r2": 2.5})]}
    return table.rows({"base": None, "dpo": "base"}, of, {}), table.tallies(GROUP)


def test_the_table_comes_first_and_says_what_changed() -> None:
    rows, tallies = made()
    text = report.markdown(rows, tallies, ["a note"])
    head, body = text.split("\n\n", 1)
    assert head == "# Evaluation" and body.startswith("| measure | policy | value |")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in body.splitlines()[:6]]
    assert {len(line) for line in cells} == {7}
    loss = cells[3]
    assert loss[:3] == ["loss (nats)", "dpo", "1.7500"] and loss[4] == "2"
    assert loss[5] == "-848.2 over base"
    assert cells[4][2] == "inf"
    assert "- a note" in text and "t, paired:" in text and "lm-evaluation-harness" not in text
    assert "| dpo over sft | judge | 6 | 2 | 2 | 0.7000 |" in text and "| 10 | 89% | 1 |" in text
    assert "| dpo over sft | judge | even | 0.7000 |" in text


def test_a_category_of_few_questions_is_not_shown() -> None:
    few = [one for one in GROUP if one.question_id not in ("0", "2")]
    text = report.markdown([], table.tallies(few), [])
    assert "| odd |" in text and "| even |" not in text
    stored = report.plain({}, [], table.tallies(few), [])
    assert set(stored["judgements"][0]["categories"]) == {"even", "odd"}


def test_the_json_holds_every_number_and_none_that_is_not_one(empty_folder: Path) -> None:
    rows, tallies = made()
    pictures = report.write(empty_folder, {"base": None, "dpo": "base"}, rows, tallies, ["a note"])

    def refuse(word: str) -> float:
        raise AssertionError(word)

    stored = json.loads((empty_folder / report.JSON).read_text(), parse_constant=refuse)
    assert stored["policies"] == {"base": None, "dpo": "base"}
    assert stored["measures"]["perplexity"]["base"]["value"] is None
    loss = stored["measures"]["loss"]["dpo"]
    assert (loss["value"], loss["before"], loss["n"], loss["unit"]) == (1.75, "base", 2, "nats")
    assert loss["change"]["value"] == pytest.approx(-848.25)
    assert stored["judgements"][0]["score"]["value"] == 0.7
    assert pictures["report"].read_bytes().startswith(b"\x89PNG")
    before = pictures["report"].read_bytes()
    report.write(empty_folder, {"base": None, "dpo": "base"}, rows, tallies, [])
    assert pictures["report"].read_bytes() == before


def test_a_report_without_anything_to_compare_has_no_picture(empty_folder: Path) -> None:
    of = {"base": [observed({"r1": 1.0, "r2": 2.0})]}
    assert report.write(empty_folder, {"base": None}, table.rows({"base": None}, of, {}), [], []) == {}
    assert (empty_folder / report.MARKDOWN).is_file()


def test_words_that_would_break_the_table_do_not() -> None:
    score = Score("x|y", 1.0, None, None, 1, "a\nb", None)
    line = report.markdown([Row("base", score)], [], []).splitlines()[4]
    assert line == "| x\\|y (a b) | base | 1.0000 | - | 1 | - | - |"
