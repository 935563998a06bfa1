"""The judge asked both ways: a real server on the loopback, whose verdicts a test decides."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from ftpipe.errors import ConfigError
from ftpipe.evaluate_config import JudgeConfig
from ftpipe.evaluation import judge, prompts
from ftpipe.evaluation.judge import Judgement, Match, Why, settle
from ftpipe.evaluation.questions import Question
from ftpipe.evolve.calls import Journal, Said
from tests.chat_server import Answer, ChatServer, Reply, prompt

ASKED = [Question("mine", str(at), "math", (f"What is {at}?", "And twice that?")) for at in range(4)]


def given(mark: str) -> dict[tuple[str, int], Said]:
    return {(one.key, turn): Said(f"{mark} {one.id}.{turn}") for one in ASKED for turn in range(2)}


FOUND = list(judge.matches([("new", "old")], ASKED, {"new": given("good"), "old": given("bad")}))


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def ask(answer: Answer, found: list[Match] = FOUND, journal: str = "journal.jsonl") -> list[Judgement]:
    with ChatServer(answer) as chat, closing(Journal(Path(journal))) as kept:
        settings = JudgeConfig(url=chat.url, model="judge", concurrency=3, timeout=5.0, retries=1)
        return judge.by_server(found, settings, judge.server(settings), kept)


def shown(body: Mapping[str, Any]) -> tuple[str, str]:
    """Return what the judge is shown as the answers of A and of B, with all before."""
    text = prompt(dict(body))
    a = text.split("[Begin of Assistant A]")[1].split("[End of Assistant A]")[0]
    b = text.split("[Begin of Assistant B]")[1].split("[End of Assistant B]")[0]
    return a, b


def reader(body: dict[str, Any], before: int) -> Reply:
    """Judge by the answers, as a good judge would: what says good wins."""
    a, _ = shown(body)
    return Reply("Because. [[A]]" if "good" in a else "Because. [[B]]")


def test_a_judge_that_always_prefers_the_first_decides_nothing(empty_folder: Path) -> None:
    judged = ask(lambda body, before: Reply("The first is better: [[A]]"))
    assert len(judged) == 8
    assert {(one.outcome, one.why) for one in judged} == {(0.5, Why.flipped)}


def test_a_judge_that_reads_is_believed(empty_folder: Path) -> None:
    judged = ask(reader)
    assert {(one.outcome, one.why) for one in judged} == {(1.0, Why.decided)}
    turned = list(judge.matches([("old", "new")], ASKED, {"new": given("good"), "old": given("bad")}))
    assert {one.outcome for one in ask(reader, turned, "other.jsonl")} == {0.0}
    first = judged[0]
    assert (first.one, first.other, first.judge, first.turn) == ("new", "old", "judge", 1)
    assert (first.question, first.category) == ("mine/0", "math")
    assert first.told == ("Because. [[A]]", "Because. [[B]]")


def test_each_pair_is_shown_in_both_orders_with_all_that_was_said(empty_folder: Path) -> None:
    bodies: list[dict[str, Any]] = []

    def listen(body: dict[str, Any], before: int) -> Reply:
        bodies.append(body)
        return Reply("[[C]]")

    assert {(one.outcome, one.why) for one in ask(listen)} == {(0.5, Why.decided)}
    pairs = [shown(body) for body in bodies]
    assert len(pairs) == len(set(pairs)) == 16
    assert {(b, a) for a, b in pairs} == set(pairs)
    second = next(a for a, _ in pairs if "bad 2.1" in a)
    order = [second.index(text) for text in ("What is 2?", "bad 2.0", "And twice that?", "bad 2.1")]
    assert order == sorted(order)
    first = next(a for a, _ in pairs if "bad 2.0" in a and "bad 2.1" not in a)
    assert "twice" not in first
    assert {(body["temperature"], body["max_tokens"]) for body in bodies} == {(0.0, 2048)}


def test_what_cannot_be_read_counts_for_neither(empty_folder: Path) -> None:
    def moody(body: dict[str, Any], before: int) -> Reply:
        a, b = shown(body)
        if "0.0" in a + b:
            return Reply("Both have their merits.")
        if "1.0" in a and "good" in a:
            return Reply(status=400, body=b'{"error": {"message": "too long"}}')
        if "2.0" in a and "bad" in a:
            return Reply("I think [[A", finish="length")
        return reader(body, before)

    judged = {(one.question, one.turn): one for one in ask(moody)}
    unknown = {key for key, one in judged.items() if one.outcome is None}
    assert unknown == {(f"mine/{at}", turn) for at in range(3) for turn in (1, 2)}
    assert {one.why for one in judged.values() if one.outcome is None} == {Why.unparsable}
    assert "too long" in judged["mine/1", 1].told[0]
    assert judged["mine/3", 1].outcome == 1.0


def test_equal_answers_are_a_tie_that_nobody_is_asked_about(empty_folder: Path) -> None:
    same = list(judge.matches([("new", "old")], ASKED, {"new": given("x"), "old": given("x")}))
    with ChatServer(reader) as chat, closing(Journal(Path("journal.jsonl"))) as kept:
        settings = JudgeConfig(url=chat.url, model="judge")
        judged = judge.by_server(same, settings, judge.server(settings), kept)
        assert chat.total == 0
    assert {(one.outcome, one.why) for one in judged} == {(0.5, Why.equal)}


def test_a_finished_call_is_never_repeated(empty_folder: Path) -> None:
    first = ask(reader, FOUND[:3])
    asked: list[str] = []

    def rest(body: dict[str, Any], before: int) -> Reply:
        asked.append(json.dumps(shown(body)))
        return reader(body, before)

    everything = ask(rest)
    assert everything[:3] == first
    assert len(asked) == 2 * (len(FOUND) - 3)


def test_a_wrong_server_is_told_by_the_keys_of_the_judge(
    empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError) as refused:
        ask(lambda body, before: Reply(status=404, body=b'{"error": "no model judge"}'))
    assert str(refused.value).startswith("evaluate.judge.url=http://127.0.0.1")
    assert "evaluate.judge.model=judge" in str(refused.value)
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    settings = JudgeConfig(url="http://localhost/v1", model="judge", api_key_env="JUDGE_KEY")
    with pytest.raises(ConfigError, match=r"^evaluate\.judge\.api_key_env=JUDGE_KEY"):
        judge.server(settings)


@pytest.mark.parametrize(
    ("straight", "turned", "outcome", "why"),
    [
        ("[[A]]", "[[B]]", 1.0, Why.decided),
        ("[[B]]", "[[A]]", 0.0, Why.decided),
        ("[[C]]", "[[C]]", 0.5, Why.decided),
        ("[[A]]", "[[A]]", 0.5, Why.flipped),
        ("[[B]]", "[[B]]", 0.5, Why.flipped),
        ("[[A]]", "[[C]]", 0.5, Why.flipped),
        ("[[C]]", "[[A]]", 0.5, Why.flipped),
        ("[[A]]", "A", None, Why.unparsable),
        ("[[D]]", "[[B]]", None, Why.unparsable),
    ],
)
def test_both_orders_settle_it(straight: str, turned: str, outcome: float | None, why: Why) -> None:
    # arXiv:2306.05685, section 3.4: a win only where it holds in both orders
    assert settle(Said(straight), Said(turned)) == (outcome, why)


def test_a_refused_prompt_has_no_verdict_whatever_its_words() -> None:
    assert settle(Said("[[A]]", refused="filter"), Said("[[B]]")) == (None, Why.unparsable)


def test_the_last_verdict_counts() -> None:
    assert prompts.verdict("Say [[A]] or [[B]]: [[B]], as [[b]] is none") == "B"
    assert prompts.verdict("[A]") is None


def test_a_reference_is_shown_where_there_is_one() -> None:
    text = prompts.pairwise(["1 + 1?"], ["2"], ["3"], ["deux"])
    assert text.index("[Begin of Reference answer]") < text.index("deux") < text.index("[Begin of Ass")
    assert "Reference answer" not in prompts.pairwise(["1 + 1?"], ["2"], ["3"])
    with pytest.raises(ValueError):
        prompts.pairwise(["1 + 1?"], ["2", "4"], ["3"])


def test_only_turns_that_both_have_answered_are_compared() -> None:
    short = {key: said for key, said in given("bad").items() if key != ("mine/1", 0)}
    short["mine/2", 1] = Said("", refused="too long")
    found = list(judge.matches([("new", "old")], ASKED, {"new": given("good"), "old": short}))
    keys = [(one.question.id, one.turn) for one in found]
    assert keys == [("0", 0), ("0", 1), ("2", 0), ("3", 0), ("3", 1)]
    assert found[1].first == ("good 0.0", "good 0.1")


def test_rewards_judge_by_which_is_higher() -> None:
    rewards = {
        "new": {("mine/0", 0): 1.0, ("mine/0", 1): -1.0, ("mine/1", 0): 2.0, ("mine/2", 0): 1.0},
        "old": {("mine/0", 0): 0.5, ("mine/0", 1): 0.5, ("mine/1", 0): 2.0},
    }
    judged = judge.by_rewards(FOUND, rewards)
    assert [(one.question, one.turn, one.outcome) for one in judged] == [
        ("mine/0", 1, 1.0),
        ("mine/0", 2, 0.0),
        ("mine/1", 1, 0.5),
    ]
    assert judged[0].told == (1.0, 0.5)


def test_rewards_of_equal_answers_are_a_tie_however_they_round() -> None:
    (same, *_) = judge.matches([("new", "old")], ASKED, {"new": given("x"), "old": given("x")})
    rewards = {"new": {("mine/0", 0): 1.0000001}, "old": {("mine/0", 0): 1.0}}
    (judged,) = judge.by_rewards([same], rewards)
    assert (judged.outcome, judged.why) == (0.5, Why.equal)
    (differ,) = judge.by_rewards(FOUND[:1], rewards)
    assert (differ.outcome, differ.why) == (1.0, Why.decided)


def test_a_judge_that_refuses_everything_is_asked_again_once_it_is_mended(empty_folder: Path) -> None:
    error = Reply(status=400, body=b'{"error": {"message": "longer than the context"}}')
    with pytest.raises(ConfigError) as refused:
        ask(lambda body, before: error, FOUND[:3])
    assert "refused each of the 6 prompts: longer than the context." in str(refused.value)
    assert {one.outcome for one in ask(reader, FOUND[:3])} == {1.0}
