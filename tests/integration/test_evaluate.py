"""The stage evaluate on tiny models: real commands, a real server as the judge, killed and resumed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ftpipe import artifacts, cli
from ftpipe.artifacts import Artifact
from tests.chat_server import ChatServer, Reply, prompt
from tests.processes import kill_workers, wait_until
from tests.unit.evaluation.benchmarks import write_tables

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_proxy")]

SOURCE = (
    "data.sources={p: {format: preference, path: 'sample:preference.jsonl', "
    "use: [preferences, demonstrations]}}"
)
WORDS = (
    *("recipe=tiny", "launch.threads=1", "data=own", SOURCE, "data.validation=6", "sft.max_steps=3"),
    *("sft.samples=0", "sft.learning_rate=1e-2", "sft.eval_every=0", "dpo.max_steps=2"),
    *("dpo.batch_size=4", "dpo.learning_rate=1e-2", "dpo.samples=0", "dpo.eval_every=0"),
    *("reward.max_steps=2", "reward.batch_size=4", "reward.learning_rate=1e-2"),
    *("evaluate.prompts.ours.rows=4", "evaluate.max_new_tokens=6", "evaluate.generation_batch_size=4"),
)
WHOLE = (*WORDS, "stages=[prepare,sft,reward,dpo,evaluate]")
JUDGED = ("evaluate.judge.model=judge", "evaluate.judge.concurrency=2", "evaluate.judge.reward=false")
PAIRS = [("sft", "base"), ("dpo", "sft")]


@pytest.fixture
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work where the other tests have trained the policies already."""
    kept = tmp_path_factory.getbasetemp() / "evaluate"
    kept.mkdir(exist_ok=True)
    monkeypatch.chdir(kept)
    return kept


def run(*words: str, folder: str = "outputs") -> dict[str, Artifact]:
    """Run a command; return the artifacts of its run by stage."""
    assert cli.main(["run", *words]) == 0
    listed = Path(folder).glob("runs/*/artifacts.json")
    last = max(listed, key=lambda path: path.stat().st_mtime_ns)
    names: dict[str, str] = json.loads(last.read_text())
    root = Path(folder).resolve() / "artifacts"
    return {stage: artifacts.open_artifact(root / name) for stage, name in names.items()}


def refused(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    capfd.readouterr()
    assert cli.main(["run", *words]) == 2
    said = capfd.readouterr().err.strip()
    assert "Traceback" not in said and len(said.splitlines()) == 1, said
    return said


def report(made: Artifact) -> dict[str, Any]:
    stored: dict[str, Any] = json.loads((made.path / "report.json").read_text(encoding="utf-8"))
    return stored


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def by_length(body: dict[str, Any], before: int) -> Reply:
    """Judge by the number of characters that each assistant's part has."""
    text = prompt(body)
    a, b = (
        text.split(f"[Begin of Assistant {name}]")[1].split(f"[End of Assistant {name}]")[0]
        for name in "AB"
    )
    return Reply(f"[[{'C' if len(a) == len(b) else 'A' if len(a) > len(b) else 'B'}]]")


# --- one run ---


@pytest.mark.usefixtures("in_process")
def test_the_table_has_every_policy_before_and_after(capfd: pytest.CaptureFixture[str]) -> None:
    made = run(*WHOLE)
    evaluated = made["evaluate"]
    assert evaluated.kind == "report"
    stored, sft = report(evaluated), made["sft"].metrics
    assert stored["policies"] == {"base": None, "sft": "base", "dpo": "sft"}
    loss = stored["measures"]["loss"]
    # what the training itself measured on the same rows, by other code
    assert loss["base"]["value"] == pytest.approx(sft["held_out_loss_before"], rel=1e-5)
    assert loss["sft"]["value"] == pytest.approx(sft["held_out_loss"], rel=1e-5)
    perplexity = stored["measures"]["perplexity"]["sft"]["value"]
    assert perplexity == pytest.approx(sft["held_out_perplexity"], rel=1e-4)
    for policy, before in (("sft", "base"), ("dpo", "sft")):
        change = loss[policy]["change"]
        assert loss[policy]["before"] == before
        assert change["value"] == pytest.approx(loss[policy]["value"] - loss[before]["value"])
        assert change["low"] < change["value"] < change["high"]
        assert change["interval"] == "t, paired" and change["n"] == loss[policy]["n"]
    assert loss["dpo"]["value"] != loss["sft"]["value"]
    for name in ("length/ours", "ended/ours", "repeated/ours", "reward/ours"):
        assert set(stored["measures"][name]) == {"base", "sft", "dpo"}
        assert stored["measures"][name]["dpo"]["n"] == 4  # questions, not their two turns
    assert [(one["one"], one["other"], one["judge"]) for one in stored["judgements"]] == [
        (*pair, "reward model") for pair in PAIRS
    ]
    for tally in stored["judgements"]:
        assert tally["wins"] + tally["ties"] + tally["losses"] == 8 and tally["unparsable"] == 0
    text = (evaluated.path / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# Evaluation\n\n| measure | policy | value |")
    for policy in ("base", "sft", "dpo"):
        answers = lines(evaluated.path / f"generations-{policy}.jsonl")
        assert [one["question_id"] for one in answers] == ["1", "2", "3", "4"]
        assert all(len(one["choices"][0]["turns"]) == 2 for one in answers)
    assert (evaluated.path / "report.png").is_file()
    assert evaluated.metrics["dpo/loss"] == evaluated.metrics["loss"] == loss["dpo"]["value"]
    said = capfd.readouterr().out
    assert "over sft" in said and "dpo over sft: win rate " in said and "report.md" in said
    inputs = evaluated.manifest["inputs"]
    assert inputs["policy/sft"] == made["sft"].path.name and "policy" not in inputs
    # the same command again asks and measures nothing
    assert cli.main(["run", *WHOLE]) == 0
    assert "evaluate: nothing to do, made already" in capfd.readouterr().out


@pytest.mark.usefixtures("in_process")
def test_rewards_are_those_that_the_reward_model_gives_by_itself() -> None:
    import torch
    from transformers import AutoTokenizer

    from ftpipe.reward import model as reward_model

    made = run(*WHOLE)
    tokenizer = AutoTokenizer.from_pretrained(str(made["prepare"].path / "tokenizer"))
    judge = reward_model.load(made["reward"].path, tokenizer)
    eos = tokenizer.eos_token
    answers = {
        name: lines(made["evaluate"].path / f"generations-{name}.jsonl") for name in ("sft", "dpo")
    }
    asked = lines(Path(cli.__file__).parent / "samples" / "questions.jsonl")

    def reward(name: str, at: int) -> float:
        text = f"<|user|>\n{asked[at]['turns'][0]}{eos}\n<|assistant|>\n"
        text += f"{answers[name][at]['choices'][0]['turns'][0]}{eos}"
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        return float(judge.score(ids, torch.ones_like(ids)))

    found = [
        one
        for one in lines(made["evaluate"].path / "judgements.jsonl")
        if one["one"] == "dpo" and one["turn"] == 1
    ]
    for at, one in enumerate(found):
        assert one["told"] == pytest.approx([reward("dpo", at), reward("sft", at)], rel=1e-4)
        assert one["outcome"] == (1.0 if one["told"][0] > one["told"][1] else 0.0)


@pytest.mark.usefixtures("in_process")
def test_a_server_judges_and_its_report_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-PLANTED-for-the-judge")
    with ChatServer(by_length) as chat:
        words = (*WHOLE, *JUDGED, f"evaluate.judge.url={chat.url}")
        evaluated = run(*words, "evaluate.judge.api_key_env=JUDGE_KEY")["evaluate"]
        assert set(chat.asked.values()) == {1}
        once = chat.total
        # where the server is, and how patient one is with it, decides nothing
        run(*words, "evaluate.judge.timeout=7")
        assert chat.total == once
    judged = lines(evaluated.path / "judgements.jsonl")
    asked = [one for one in judged if one["why"] != "equal"]
    assert once == 2 * len(asked) and len(judged) == 16
    answers = {
        (name, one["question_id"]): one["choices"][0]["turns"]
        for name in ("base", "sft", "dpo")
        for one in lines(evaluated.path / f"generations-{name}.jsonl")
    }
    for one in judged:
        lengths = [
            sum(map(len, answers[one[side], one["question_id"]][: one["turn"]]))
            for side in ("one", "other")
        ]
        assert one["outcome"] == (0.5 if lengths[0] == lengths[1] else float(lengths[0] > lengths[1]))
    for tally, pair in zip(report(evaluated)["judgements"], PAIRS, strict=True):
        outcomes = [one["outcome"] for one in judged if (one["one"], one["other"]) == pair]
        assert tally["score"]["value"] == sum(outcomes) / 8 and tally["score"]["n"] == 4
        assert (tally["judge"], tally["flipped"]) == ("judge", 0)
    for path in evaluated.path.rglob("*"):
        assert not path.is_file() or b"sk-PLANTED" not in path.read_bytes()


@pytest.mark.usefixtures("in_process")
def test_published_answers_are_judged_against_the_last_policy() -> None:
    made = run(*WHOLE)
    theirs = Path("theirs.jsonl")
    # answers that one run wrote are published answers to the next
    theirs.write_bytes((made["evaluate"].path / "generations-sft.jsonl").read_bytes())
    answers = f"evaluate.answers={{theirs: {{path: {theirs}}}}}"
    with ChatServer(by_length) as chat:
        url = f"evaluate.judge.url={chat.url}"
        evaluated = run(*WHOLE, *JUDGED, url, answers, "evaluate.policies=[dpo]")["evaluate"]
        own = run(*WHOLE, *JUDGED, url, "evaluate.judge.pairs=['dpo:sft']")["evaluate"]
    stored = report(evaluated)
    assert set(stored["policies"]) == {"dpo"}
    assert "policy/sft" not in evaluated.manifest["inputs"]
    (tally,), (same,) = stored["judgements"], report(own)["judgements"]
    assert (tally["one"], tally["other"]) == ("dpo", "theirs")
    assert tally["score"]["value"] == same["score"]["value"]


@pytest.mark.usefixtures("in_process")
def test_the_base_alone_is_evaluated() -> None:
    words = (*WORDS, "evaluate.turns=1")
    evaluated = run(*words, "stages=[prepare,evaluate]")["evaluate"]
    stored = report(evaluated)
    assert stored["policies"] == {"base": None} and stored["judgements"] == []
    assert stored["measures"]["loss"]["base"]["before"] is None
    assert not (evaluated.path / "judgements.jsonl").exists()
    without_data = run(*words, "stages=[evaluate]")["evaluate"]
    told = report(without_data)["measures"]
    assert "loss" not in told
    # the same model, template and questions, whoever prepared them
    assert told["length/ours"] == stored["measures"]["length/ours"]


@pytest.mark.usefixtures("in_process")
def test_benchmarks_stand_in_the_same_table() -> None:
    pytest.importorskip("lm_eval")
    write_tables(Path("mmlu"))
    tasks = "{mmlu_anatomy: {files: {test: mmlu, dev: mmlu}, shots: 1}}"
    words = ("evaluate.prompts={}", "evaluate.mmlu.path=mmlu", "evaluate.mmlu.shots=1")
    more = (f"evaluate.harness.tasks={tasks}", "stages=[prepare,sft,evaluate]", "evaluate.held_out=0")
    evaluated = run(*WORDS, *words, *more)["evaluate"]
    measures = report(evaluated)["measures"]
    assert set(measures["mmlu"]) == {"base", "sft"} and "loss" not in measures
    assert measures["mmlu"]["sft"]["n"] == 5
    assert measures["mmlu"]["sft"]["change"]["interval"] == "unpaired"
    name = "harness/mmlu_anatomy/acc"
    assert measures[name]["sft"]["n"] == 3
    for policy in ("base", "sft"):
        own = evaluated.path / "benchmarks" / policy
        answers = lines(own / "mmlu-answers.jsonl")
        # by hand from each question's record
        right = sum(one["chosen"] == one["answer"] for one in answers)
        assert measures["mmlu"][policy]["value"] == right / 5
        assert list((own / "harness").glob("*.jsonl"))


# --- what is refused ---


@pytest.mark.usefixtures("in_process")
def test_what_cannot_be_evaluated_is_one_sentence(capfd: pytest.CaptureFixture[str]) -> None:
    nothing = refused(capfd, *WORDS, "stages=[evaluate]", "evaluate.prompts={}")
    assert nothing.startswith("ftpipe: evaluate has nothing to measure: ")
    Path("bad.jsonl").write_text('{"question_id": 1, "turns": ["Why?"]}\n{"turns": []}\n')
    bad = refused(capfd, *WORDS, "stages=[evaluate]", "evaluate.prompts={bad: {path: bad.jsonl}}")
    assert bad == "ftpipe: bad.jsonl, line 2: a question without a turn."
    Path("said.jsonl").write_text('{"question_id": 1, "choices": [{"turns": ["So."]}]}\n')
    answers = "evaluate.answers={theirs: {path: said.jsonl}}"
    unread = refused(capfd, *WORDS, "stages=[evaluate]", answers)
    assert unread.startswith("ftpipe: evaluate.answers would be read by nothing: nobody judges.")
    wrong = Path("wrong")
    wrong.mkdir(exist_ok=True)
    (wrong / "reward.json").write_text("{}")
    (wrong / "model.safetensors").write_bytes(b"x")
    said = refused(capfd, *WORDS, "stages=[evaluate]", "evaluate.judge.reward_model=wrong")
    assert said.startswith("ftpipe: wrong/reward.json cannot be read: KeyError")
    # nothing was begun that would be left lying about
    assert not list(Path("outputs/artifacts").glob("evaluate-*.partial"))


@pytest.mark.usefixtures("in_process")
def test_a_server_that_fails_late_costs_no_answer(capfd: pytest.CaptureFixture[str]) -> None:
    down = True

    def failing(body: dict[str, Any], before: int) -> Reply:
        if down and len(chat.asked) > 5:
            return Reply(status=401, body=b'{"error": {"message": "the quota is used up"}}')
        return by_length(body, before)

    words = (*WHOLE, *JUDGED, "evaluate.judge.concurrency=1", "evaluate.max_new_tokens=5")
    with ChatServer(failing) as chat:
        url = f"evaluate.judge.url={chat.url}"
        said = refused(capfd, *words, url)
        assert said.startswith("ftpipe: evaluate.judge.url=") and "refuses the key" in said
        first, down = Counter(chat.asked), False
        run(*words, url)
        out = capfd.readouterr().out
        assert "5 judgements are in the journal and are not repeated" in out
        assert out.count("answers of dpo are in the journal and are not repeated") == 1
        again = chat.asked - first
        finished = list(first)[:5]
        assert not set(finished) & set(again)


# --- real processes ---


def command(*given: str) -> list[str]:
    return [sys.executable, "-m", "ftpipe.cli", "run", *given]


def test_a_killed_run_repeats_no_call_and_ends_with_the_same_bytes(
    request: pytest.FixtureRequest,
) -> None:
    def slow(body: dict[str, Any], before: int) -> Reply:
        reply = by_length(body, before)
        reply.delay = 0.05
        return reply

    def journal(name: str) -> int:
        (*found,) = Path("killed/artifacts").glob(f"evaluate-*/kept/{name}")
        return found[0].read_bytes().count(b"\n") if found else 0

    rows = [
        {"question_id": at, "choices": [{"turns": [f"The answer {'x' * at}.", "And so on."]}]}
        for at in range(1, 9)
    ]
    Path("others.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    answers = "evaluate.answers={others: {path: others.jsonl}}"
    with ChatServer(slow) as chat:
        one = (*WORDS, *JUDGED, "stages=[evaluate]", "evaluate.prompts.ours.rows=8", answers)
        given = (*one, f"evaluate.judge.url={chat.url}", "output=killed")
        # in the answers, and in the judgements
        for name, enough in (("answers-base.jsonl", 4), ("journal.jsonl", 3)):
            process = subprocess.Popen(command(*given), stdout=subprocess.DEVNULL)
            wait_until(lambda name=name, enough=enough: journal(name) >= enough, process)  # type: ignore[misc]
            kill_workers()
            process.send_signal(signal.SIGKILL)
            process.wait()
        finished, sent = journal("journal.jsonl"), Counter(chat.asked)
        done = subprocess.run(command(*given), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert f"{finished} judgements are in the journal and are not repeated" in done.stdout
        # of the calls under way at the kill, at most as many as ran at once came again
        assert len(chat.asked) == 2 * 16
        assert sum(count - 1 for count in chat.asked.values()) <= 2
        assert (chat.asked - sent).total() == len(chat.asked) - finished
        request.getfixturevalue("in_process")
        run(*one, f"evaluate.judge.url={chat.url}", "output=calm", folder="calm")
    (killed,), (whole,) = (
        [path.parent for path in Path(output).glob("artifacts/evaluate-*/manifest.json")]
        for output in ("killed", "calm")
    )
    passing = {"manifest.json", "metrics.jsonl", "uncommitted.diff"}  # times, and the checkout
    names, others = (
        {path.relative_to(one).as_posix() for path in one.rglob("*") if path.is_file()} - passing
        for one in (whole, killed)
    )
    assert names == others and len(names) > 6
    for name in sorted(names):
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name
