"""The stage that evolves: real commands against a real server, killed, failed and resumed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ftpipe import artifacts, cli
from ftpipe.choices import Device, Init, Precision
from ftpipe.config import LaunchConfig, ModelConfig, RunConfig
from tests.chat_server import ChatServer, Reply, evolver, prompt
from tests.processes import kill_workers, wait_until

KEY = "sk-PLANTED0planted1PLANTED2planted3"
SEEDS = [
    {"instruction": f"Name {thing}.", "input": "", "output": f"Here: {thing}."}
    for thing in ("a colour", "a river", "two birds", "an old tool", "a metal", "some fruit")
]
WORDS = ("recipe=tiny", "stages=[evolve]", "evolve.model=teacher", "evolve.rounds=2", "evolve.retries=2")
SET = ("rows.jsonl", "lineage.jsonl", "journal.jsonl")


@pytest.fixture(autouse=True)
def seed_file(empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in a folder with six seeds; no proxy stands between it and the loopback."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    file = empty_folder / "seeds.json"
    file.write_text(json.dumps(SEEDS), encoding="utf-8")
    return file


def words(chat: ChatServer, *more: str) -> list[str]:
    return ["evolve", *WORDS, "evolve.seeds.path=seeds.json", f"evolve.url={chat.url}", *more]


def artifact(folder: Path = Path()) -> Path:
    (found,) = (folder / "outputs/artifacts").glob("evolve-*/manifest.json")
    return found.parent


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


# --- one run ---


@pytest.mark.usefixtures("in_process")
def test_a_set_is_made_and_everything_in_it_is_accounted_for(capfd: pytest.CaptureFixture[str]) -> None:
    with ChatServer(evolver) as chat:
        assert cli.main(words(chat)) == 0
        # six seeds: each round evolves, judges and answers each of them once
        assert set(chat.asked.values()) == {1} and chat.total == 2 * 3 * 6
    rows, lineage = lines(artifact() / "rows.jsonl"), lines(artifact() / "lineage.jsonl")
    asked = [r["instruction"] for r in SEEDS]
    assert [(row["instruction"], row["output"]) for row in rows[:6]] == [
        (r["instruction"], r["output"]) for r in SEEDS
    ]
    assert all(set(row) == {"instruction", "output", "evolved_from"} for row in rows)
    # what the server makes of a seed starts with it
    assert [row["evolved_from"] for row in rows] == asked * 3
    assert all(row["instruction"].startswith(row["evolved_from"]) for row in rows)
    assert len(rows) == 18 and len({row["instruction"] for row in rows}) == 18
    for row in rows[6:]:
        assert row["output"].startswith(f"Answer number {len(row['instruction'])}, with seed ")
    assert [line["instruction"] for line in lineage] == [row["instruction"] for row in rows]
    by_id = {line["id"]: line for line in lineage}
    for line in lineage[6:]:
        parent = by_id[line["parent"]]
        assert parent["seed"] == line["seed"] and parent["round"] == line["round"] - 1
        # what the server makes of its parent
        assert line["instruction"].startswith(parent["instruction"])
    metrics = artifacts.open_artifact(artifact()).metrics
    assert (metrics["seeds"], metrics["tried"], metrics["kept"], metrics["rows"]) == (6, 12, 12, 18)
    tried = {key: count for key, count in metrics.items() if key.startswith("tried_")}
    assert Counter(line["operation"] for line in lineage[6:]) == {
        key.removeprefix("tried_"): count for key, count in tried.items() if count
    }
    assert "round 2: 6 of 6 evolutions kept" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_the_bytes_do_not_depend_on_how_many_calls_run_at_once() -> None:
    def jittery(body: dict[str, Any], before: int) -> Reply:
        reply = evolver(body)
        reply.delay = (len(prompt(body)) * 7 + body["seed"]) % 5 * 0.004
        return reply

    made = []
    for concurrency in (1, 2, 9):
        folder = Path(f"run{concurrency}")
        with ChatServer(jittery) as chat:
            options = (f"evolve.concurrency={concurrency}", f"output={folder}")
            assert cli.main(words(chat, *options)) == 0
        (found,) = folder.glob("artifacts/evolve-*/manifest.json")
        made.append((found.parent.name, [(found.parent / name).read_bytes() for name in SET]))
    assert made[0] == made[1] == made[2]


@pytest.mark.usefixtures("in_process")
def test_a_second_command_asks_nothing_wherever_the_server_is() -> None:
    with ChatServer(evolver) as chat:
        assert cli.main(words(chat)) == 0
    with ChatServer(evolver) as other:
        assert cli.main(words(other)) == 0
        assert other.total == 0
        # a model of another name is another model
        assert cli.main(words(other, "evolve.model=other")) == 0
        assert other.total == 36


@pytest.mark.usefixtures("in_process")
def test_eliminated_evolutions_are_no_rows_but_are_in_the_lineage() -> None:
    def moody(body: dict[str, Any], before: int) -> Reply:
        text = prompt(body)
        if text.startswith("Here are two") and "Name a river" in text:
            return Reply("Equal")
        if text.startswith("Name two birds"):
            return Reply("I'm sorry, I cannot do that.")
        if text.startswith("Name a metal"):
            return Reply(status=400, body=b'{"error": {"message": "against the rules"}}')
        return evolver(body)

    with ChatServer(moody) as chat:
        assert cli.main(words(chat)) == 0
    why = {line["id"]: line["why"] for line in lines(artifact() / "lineage.jsonl")}
    expected = {2: "equal", 3: "sorry", 5: "refused"}
    assert why == {
        f"{seed}.{at}": expected.get(seed) if at else None for at in range(3) for seed in range(1, 7)
    }
    metrics = artifacts.open_artifact(artifact()).metrics
    assert (metrics["kept"], metrics["rows"]) == (6, 12)
    assert {name: metrics[f"eliminated_{name}"] for name in ("equal", "sorry", "refused", "cut")} == {
        "equal": 2,
        "sorry": 2,
        "refused": 2,
        "cut": 0,
    }


@pytest.mark.usefixtures("in_process")
def test_what_was_evolved_becomes_the_data_of_the_next_stage() -> None:
    with ChatServer(evolver) as chat:
        given = [word for word in words(chat)[1:] if not word.startswith("stages")]
        more = ("stages=[evolve,prepare]", "data.template=chatml", "data.validation=3")
        assert cli.main(["prepare", *given, *more, "data=own"]) == 0
        assert _read() == {"evolved": 18}
        # beside sources of one's own
        mine = "data.sources={mine: {format: alpaca, path: seeds.json}}"
        assert cli.main(["prepare", *given, *more, mine]) == 0
        assert chat.total == 36
    # the seeds, which are in both, are counted as repeated, not lost
    assert _read() == {"mine": 6, "evolved": 18}


def _read() -> dict[str, int]:
    """Return how many rows the newest preparation read from each source."""
    files = Path("outputs/artifacts").glob("prepare-*/ledger.json")
    newest = max(files, key=lambda file: file.stat().st_mtime_ns)
    found = json.loads(newest.read_text())["sources"]
    return {name: account["demonstrations"]["read"] for name, account in found.items()}


# --- what goes wrong ---


@pytest.mark.usefixtures("in_process")
def test_a_model_that_evolves_nothing_is_refused_with_the_reasons(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def parrot(body: dict[str, Any], before: int) -> Reply:
        cut = "#Created Prompt#" in prompt(body)
        return Reply("half of a", finish="length") if cut else Reply("#Rewritten Prompt#: harder")

    with ChatServer(parrot) as chat:
        assert cli.main(words(chat)) == 2
        said = capfd.readouterr().err.strip()
        found = re.fullmatch(
            r"ftpipe: evolve kept 0 of 12 evolutions, less than evolve\.min_kept=10% "
            r"\(eliminated: (\d+) copied, (\d+) cut\)\. Choose a model .*; finished calls are kept\.",
            said,
        )
        assert found and int(found[1]) + int(found[2]) == 12, said
        before = chat.total
        # whoever wants the seeds alone says so, and pays for no call again
        assert cli.main(words(chat, "evolve.min_kept=0")) == 0
        assert chat.total == before
        assert len(lines(artifact() / "rows.jsonl")) == 6
        assert cli.main(words(chat, "evolve.min_kept=0", "evolve.keep_seeds=false")) == 2
    assert "evolve is left with no row" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_calls_that_finished_before_a_failure_are_not_repeated(
    capfd: pytest.CaptureFixture[str],
) -> None:
    down = False

    def failing(body: dict[str, Any], before: int) -> Reply:
        if down and len(chat.asked) > 10:
            return Reply(status=500, headers={"Retry-After": "0"})
        return evolver(body)

    with ChatServer(failing) as chat:
        down = True
        assert cli.main(words(chat, "evolve.concurrency=1")) == 2
        assert "gave no answer after 3 attempts (the last: HTTP 500)" in capfd.readouterr().err
        first, down = Counter(chat.asked), False
        assert cli.main(words(chat, "evolve.concurrency=1")) == 0
        assert "10 calls are in the journal and are not repeated" in capfd.readouterr().out
    again = chat.asked - first
    finished = [body for body, count in first.items() if count == 1]
    assert len(finished) == 10 and not set(finished) & set(again)
    assert set(again.values()) == {1} and len(again) == 26
    with ChatServer(evolver) as calm:
        assert cli.main(words(calm, "output=undisturbed")) == 0
    (whole,) = Path("undisturbed").glob("artifacts/evolve-*/rows.jsonl")
    for name in SET:
        assert (whole.parent / name).read_bytes() == (artifact() / name).read_bytes()


@pytest.mark.usefixtures("in_process")
def test_a_key_reaches_the_server_and_no_file_and_no_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    open_door = False

    def doorman(body: dict[str, Any], before: int) -> Reply:
        if not open_door and chat.total > 4:
            error = {"error": {"message": f"{KEY} is used up"}}
            return Reply(status=401, body=json.dumps(error).encode())
        if chat.total == 2:
            return Reply(status=422, body=json.dumps({"error": f"bad words, {KEY}"}).encode())
        return evolver(body)

    with ChatServer(doorman) as chat:
        more = ("evolve.api_key_env=TEACHER_KEY", "evolve.concurrency=1")
        assert cli.main(words(chat, *more)) == 2
        open_door = True
        assert cli.main(words(chat, *more)) == 0
    assert {headers["Authorization"] for headers in chat.headers} == {f"Bearer {KEY}"}
    assert "TEACHER_KEY" in (artifact() / "manifest.json").read_text()
    printed = "".join(capfd.readouterr())
    assert "refuses the key" in printed and KEY not in printed
    files = [path for path in Path.cwd().rglob("*") if path.is_file()]
    assert {"manifest.json", "run.yaml", "metrics.jsonl", *SET} <= {path.name for path in files}
    for path in files:
        assert KEY.encode() not in path.read_bytes(), f"{path} holds the key"


@pytest.mark.parametrize("name", [KEY, KEY.lower(), "two words", "", "1KEY", "K" * 65])
def test_a_key_in_place_of_its_variable_is_refused_unseen(
    name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with ChatServer(evolver) as chat:
        assert cli.main(words(chat, f"evolve.api_key_env='{name}'")) == 2
    said = capfd.readouterr().err
    assert said.startswith("ftpipe: evolve.api_key_env is not the name of an environment variable")
    assert not name or name not in said
    assert not Path("outputs").exists()


@pytest.mark.parametrize(
    "url",
    [
        f"http://user:{KEY}@localhost/v1",
        f"http://{KEY}@localhost/v1",
        f"http://localhost/v1?key={KEY}",
        f"http://localhost/v1#{KEY}",
        "localhost:8000/v1",
        "ftp://localhost/v1",
        "http://",
        "",
    ],
)
def test_an_address_that_would_carry_a_key_is_refused_unseen(
    url: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evolve", *WORDS, f"evolve.url='{url}'"]) == 2
    said = capfd.readouterr().err
    assert said.startswith("ftpipe: evolve.url is no plain address such as http://localhost:8000/v1")
    assert KEY not in said
    assert not Path("outputs").exists()


# --- the run's own model ---


@pytest.fixture
def own() -> Iterator[RunConfig]:
    architecture = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.2,
    }
    yield RunConfig(
        model=ModelConfig(init=Init.random, tokenizer="bytes", architecture=architecture),
        launch=LaunchConfig(device=Device.cpu, precision=Precision.fp32),
    )


def test_the_same_model_behind_a_server_says_the_same(own: RunConfig) -> None:
    from ftpipe.evolve.calls import Call
    from ftpipe.evolve.local import LocalModel
    from ftpipe.evolve.server import Server
    from ftpipe.modeling import random_model
    from ftpipe.tokenizer import byte_level

    random_model(own.model, byte_level(), seed=0).save_pretrained("base")
    byte_level().save_pretrained("base")
    model = LocalModel(own, Path("base"))

    def serve(body: dict[str, Any], before: int) -> Reply:
        asked = Call(prompt(body), body["temperature"], body["top_p"], body["max_tokens"], body["seed"])
        ((_, said),) = model.complete([asked])
        return Reply(said.text, finish="length" if said.cut else "stop")

    calls = [Call(f"Name {at} colours.", 1.0, 0.9, 10, at) for at in range(5)]
    with ChatServer(serve) as chat:
        own.evolve.url, own.evolve.model, own.evolve.concurrency = chat.url, "tiny", 1
        through_http = dict(Server(own.evolve).complete(calls))
    assert through_http == dict(model.complete(calls))
    assert len({said.text for said in through_http.values()}) == 5


@pytest.mark.usefixtures("in_process")
def test_the_smoke_form_evolves_with_a_tiny_model_and_keeps_the_seeds() -> None:
    made = []
    for folder in ("one", "two"):
        more = ("stages=[evolve]", "smoke=true", f"output={folder}", "evolve.url=http://nowhere/v1")
        assert cli.main(["evolve", "recipe=tiny", "evolve.model=x", *more]) == 0
        (found,) = Path(folder).glob("artifacts/evolve-*/manifest.json")
        made.append([(found.parent / name).read_bytes() for name in SET])
    assert made[0] == made[1]
    metrics = artifacts.open_artifact(found.parent).metrics
    assert metrics["seeds"] == metrics["tried"] == 12
    assert metrics["rows"] == 12 + metrics["kept"]


# --- real processes ---


def command(*given: str) -> list[str]:
    return [sys.executable, "-m", "ftpipe.cli", *given]


@pytest.mark.slow
def test_killed_in_the_middle_it_repeats_no_finished_call_and_ends_with_the_same_bytes() -> None:
    concurrency = 4

    def slow(body: dict[str, Any], before: int) -> Reply:
        reply = evolver(body)
        reply.delay = 0.05
        return reply

    def journal() -> list[dict[str, Any]]:
        found = list(Path("outputs/artifacts").glob("evolve-*.partial/journal.jsonl"))
        text = found[0].read_bytes() if found else b""
        return [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]

    with ChatServer(slow) as chat:
        given = words(chat, f"evolve.concurrency={concurrency}")
        for enough in (5, 17):  # killed twice, in the first round and in the next
            process = subprocess.Popen(command(*given), stdout=subprocess.DEVNULL)
            wait_until(lambda enough=enough: len(journal()) >= enough, process)  # type: ignore[misc]
            kill_workers()
            process.send_signal(signal.SIGKILL)
            process.wait()
            _wait_until_gone()
        finished, sent = len(journal()), Counter(chat.asked)
        done = subprocess.run(command(*given), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert f"{finished} calls are in the journal and are not repeated" in done.stdout
        # every call that had finished was asked once; of those under way at a kill, at most as many
        # as ran at once came again
        assert len(chat.asked) == 36
        assert sum(count - 1 for count in chat.asked.values()) <= 2 * concurrency
        assert (chat.asked - sent).total() == 36 - finished
        calm = [*words(chat, "evolve.concurrency=3"), "output=undisturbed"]
        assert subprocess.run(command(*calm), capture_output=True, timeout=300).returncode == 0
    (whole,) = Path("undisturbed").glob("artifacts/evolve-*/rows.jsonl")
    for name in SET:
        assert (whole.parent / name).read_bytes() == (artifact() / name).read_bytes()


@pytest.mark.slow
def test_a_server_that_is_not_there_is_one_sentence_and_leaves_nothing() -> None:
    with ChatServer(evolver) as chat:
        given = words(chat)
    done = subprocess.run(command(*given), capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"ftpipe: evolve.url={chat.url}: nothing answers there (ConnectError")
    assert not list(Path("outputs/artifacts").glob("evolve-*/"))


def _wait_until_gone() -> None:
    for _ in range(200):
        others = [entry for entry in Path("/proc").glob("[0-9]*") if int(entry.name) != os.getpid()]
        if not any(_cwd(entry) == Path.cwd().resolve() for entry in others):
            return
        time.sleep(0.05)
    raise AssertionError("a process outlived its driver by ten seconds")


def _cwd(entry: Path) -> Path | None:
    try:
        return (entry / "cwd").resolve(strict=True)
    except OSError:
        return None
