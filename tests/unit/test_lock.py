"""A locked recipe: equal inputs run, and whatever moved is named."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from ftpipe import cli, compose, provenance, resolve
from ftpipe.errors import LockError
from ftpipe.lock import hold, record
from ftpipe.lock.record import Lock

pytestmark = pytest.mark.slow  # each composes recipes, plans and reads them many times

RECIPE = """\
# Mine.
defaults: [tiny, {override /data: own}]
model: {init: pretrained, path: base, tokenizer: words}
data:
  sources: {rows: {format: alpaca, path: rows.json}}
  decontaminate: {asked: {format: text, path: asked.txt}}
"""
FILES = {
    "rows.json": '[{"instruction": "Say hello.", "output": "Hello!"}]',
    "asked.txt": "What is the capital of France?",
    "base/config.json": '{"model_type": "llama"}',
    "base/model.safetensors": "weights",
    "words/tokenizer.json": "{}",
    "recipes/mine.yaml": RECIPE,
}
LOCK = Path("recipes/mine.lock")
# a commit that is none of ours
COMMIT, OTHER = "0123456789abcdef0123456789abcdef01234567", "fedcba9876543210fedcba9876543210fedcba98"


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def lay_out(folder: Path) -> None:
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


@pytest.fixture
def mine(empty_folder: Path) -> Path:
    """Return a folder with a recipe of one's own and all that it reads."""
    lay_out(empty_folder)
    return empty_folder


WORDS = ("recipe=mine",)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the lock of the recipe, as the command writes it."""
    folder = tmp_path_factory.mktemp("locked")
    lay_out(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(["lock", *WORDS]) == 0
        return LOCK.read_text(encoding="utf-8")


@pytest.fixture
def locked(mine: Path, written: str) -> Path:
    """Return the folder of the recipe, which is locked to what lies there."""
    LOCK.write_text(written, encoding="utf-8")
    return mine


def refusal(capsys: pytest.CaptureFixture[str], *words: str, verb: str = "plan") -> str:
    """Return the sentence that a command is refused with, which must write nothing."""
    before = sorted(Path.cwd().rglob("*"))
    assert cli.main([verb, *(words or WORDS)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert sorted(Path.cwd().rglob("*")) == before
    return said.err.removeprefix("ftpipe: ").rstrip("\n")


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert cli.main(["plan", *WORDS, *words]) == 0
    return capsys.readouterr().out.splitlines()


def moved(*what: str) -> str:
    return f"recipe=mine is locked, and {'; '.join(what)}; `ftpipe lock recipe=mine` pins it anew."


# --- the file ---


def test_a_lock_holds_digests_of_all_that_decides(locked: Path) -> None:
    held = yaml.safe_load(LOCK.read_text(encoding="utf-8"))
    assert held["recipe"] == "mine"
    assert held["inputs"] == {
        "data.sources.rows": sha256(FILES["rows.json"]),
        "data.decontaminate.asked": sha256(FILES["asked.txt"]) + ".txt",
        "model.path": {
            name: sha256(FILES[f"base/{name}"]) for name in ("config.json", "model.safetensors")
        },
        "model.tokenizer": {"tokenizer.json": sha256("{}")},
    }
    tiny = (compose.shipped("recipes") / "tiny.yaml").read_text(encoding="utf-8")
    assert held["files"]["recipes/mine.yaml"] == sha256(RECIPE)
    assert held["files"]["recipes/tiny.yaml"] == sha256(tiny)
    groups = {Path(name).parts[1] for name in held["files"] if name.startswith("conf/")}
    # launch and tracking change no result
    assert groups == {"model", "adapter", "data", "evolve", "evaluate"}
    assert held["packages"]["torch"] == provenance.packages()["torch"].split("+")[0]
    assert {"ftpipe", "transformers", "trl"} <= set(held["packages"])
    assert held["python"] == f"{os.sys.version_info.major}.{os.sys.version_info.minor}"  # type: ignore[attr-defined]
    for part in ("inputs", "files", "packages"):
        assert list(held[part]) == sorted(held[part])


def test_a_lock_is_no_recipe(mine: Path) -> None:
    before = list(compose.recipes())
    assert cli.main(["lock", *WORDS]) == 0
    assert LOCK.is_file()
    assert list(compose.recipes()) == before


def test_a_lock_names_no_home_and_no_secret(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(mine))
    path = f"data.sources.rows.path={mine}/rows.json"
    assert cli.main(["lock", *WORDS, path, "tracking.tags=['password=hunter2 and more']"]) == 0
    text = LOCK.read_text(encoding="utf-8")
    assert str(mine) not in text and "hunter2" not in text and "and more" not in text
    assert "data.sources.rows.path=~/rows.json" in text.splitlines()[0]
    assert cli.main(["lock", *WORDS, "data.sources.rows.path='~/rows.json'"]) == 0
    assert LOCK.read_text(encoding="utf-8").splitlines()[2:] == text.splitlines()[2:]


def test_the_lock_is_beside_the_recipe_or_in_the_users_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "checkout" / "recipes" / "tiny.yaml"
    file.parent.mkdir(parents=True)
    assert record.place("tiny", file, shipped=False) == file.with_name("tiny.lock")
    assert record.place("tiny", file, shipped=True) == tmp_path / "recipes" / "tiny.lock"
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert record.place("tiny", file, shipped=False) == tmp_path / "recipes" / "tiny.lock"


def test_a_recipe_of_an_installed_package_is_locked_in_the_users_own_folder(
    mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = mine / "site-packages" / "ftpipe"
    for name in ("conf", "recipes"):
        shutil.copytree(compose.shipped(name), inside / name)
    monkeypatch.setattr(compose, "HERE", inside)
    assert cli.main(["lock", "recipe=tiny"]) == 0
    assert Path("recipes/tiny.lock").is_file()
    assert not list(inside.rglob("*.lock"))
    (run,) = resolve.resolved(["recipe=tiny"])
    assert run.lock is not None and run.lock.recipe == "tiny"
    # its weights are drawn and its tokenizer is made by code: nothing that could move
    assert {owner.rpartition(".")[0] for owner in run.lock.inputs} == {"data.sources"}


# --- equal, and moved ---


def test_equal_inputs_run(locked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_lock = plan(capsys)
    LOCK.unlink()
    assert with_lock == plan(capsys)


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("rows.json", "[3]", f"data.sources.rows moved: {{}} {sha256('[3]')[:12]}…"),
        ("asked.txt", "x", f"data.decontaminate.asked moved: {{}} {sha256('x')[:12]}…"),
        (
            "base/model.safetensors",
            "x",
            f"model.path (model.safetensors) moved: {{}} {sha256('x')[:12]}…",
        ),
        (
            "words/tokenizer.json",
            "x",
            f"model.tokenizer (tokenizer.json) moved: {{}} {sha256('x')[:12]}…",
        ),
        (
            "base/second.safetensors",
            "x",
            "model.path (second.safetensors) moved: locked none, now sha256 ",
        ),
        ("recipes/mine.yaml", f"{RECIPE}seed: 3\n", "recipes/mine.yaml moved: {} "),
    ],
)
def test_what_moved_is_named(
    name: str, text: str, what: str, locked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(name).write_text(text, encoding="utf-8")
    was = f"locked sha256 {sha256(FILES.get(name, ''))[:12]}…, now"
    sentence = refusal(capsys)
    assert what.format(was) in sentence
    assert sentence.startswith("recipe=mine is locked, and ")
    assert sentence.endswith("; `ftpipe lock recipe=mine` pins it anew.")
    assert sentence.count(" moved: ") == 1


def test_locking_again_takes_what_moved(locked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = LOCK.read_text(encoding="utf-8")
    Path("rows.json").write_text("[3]", encoding="utf-8")
    assert cli.main(["lock", *WORDS]) == 0
    rows = (sha256(FILES["rows.json"]), sha256("[3]"))
    assert LOCK.read_text(encoding="utf-8") == before.replace(*rows)
    capsys.readouterr()
    plan(capsys)


def test_all_that_moved_is_named_at_once(
    locked: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("rows.json").write_text("[3]", encoding="utf-8")
    now = provenance.packages() | {"trl": "0.0.1"}
    was = provenance.packages()["trl"]
    monkeypatch.setattr(provenance, "packages", lambda: now)
    rows = f"locked sha256 {sha256(FILES['rows.json'])[:12]}…, now {sha256('[3]')[:12]}…"
    assert refusal(capsys) == moved(
        f"trl {was} is locked, 0.0.1 is installed", f"data.sources.rows moved: {rows}"
    )


@pytest.mark.parametrize("verb", ["run", "prepare", "plan", "inspect"])
def test_every_verb_that_runs_is_held_to_it(
    verb: str, locked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("rows.json").write_text("[3]", encoding="utf-8")
    assert refusal(capsys, verb=verb).startswith("recipe=mine is locked, and data.sources.rows moved: ")


def test_jobs_are_held_to_it(locked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("rows.json").write_text("[3]", encoding="utf-8")
    words = (*WORDS, "launch=slurm-cpu", "--dry-run")
    assert refusal(capsys, *words, verb="submit").startswith("recipe=mine is locked, and data.sources")


def of(**differs: object) -> Lock:
    held = {"recipe": "mine", "files": {}, "inputs": {}, "python": record.python()}
    return Lock(**{**held, "packages": record.packages(), **differs})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("lock", "what"),
    [
        (
            of(packages={"transformers": "5.0.0"}),
            "transformers 5.0.0 is locked, {transformers} is installed",
        ),
        (of(packages={"flash-attn": "2.8"}), "flash-attn 2.8 is locked, none is installed"),
        (of(python="2.7"), f"Python 2.7 is locked, {record.python()} runs"),
    ],
)
def test_a_package_of_another_version_is_named(lock: Lock, what: str) -> None:
    with pytest.raises(ValueError) as refused:
        hold.check(lock, [], [], {}, frozenset())
    assert str(refused.value) == moved(what.format(**provenance.packages()))


def test_a_build_for_another_device_is_the_same_version(monkeypatch: pytest.MonkeyPatch) -> None:
    for here, there in (("2.13.0+cpu", "2.13.0"), ("2.13.0+cu130", "2.13.0"), ("2.13.0", "2.13.0+cpu")):
        monkeypatch.setattr(provenance, "packages", lambda here=here: {"torch": here})
        assert hold.check(of(packages={"torch": there}), [], [], {}, frozenset()) == []


def test_what_changes_no_result_is_not_locked() -> None:
    assert "wandb" in provenance.packages()
    assert "wandb" not in record.packages()


# --- the user's own word ---

LIFTED = "chosen on the command line; the lock of recipe=mine does not hold for it."


def test_another_file_on_the_command_line_lifts_that_pin(
    locked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("other.json").write_text("[3]", encoding="utf-8")
    lines = plan(capsys, "data.sources.rows.path=other.json")
    assert lines[0] == f"data.sources.rows: {LIFTED}"
    assert lines[1].startswith("mine: ")
    Path("asked.txt").write_text("x", encoding="utf-8")  # of which nothing was said
    said = refusal(capsys, *WORDS, "data.sources.rows.path=other.json")
    assert said.startswith("recipe=mine is locked, and data.decontaminate.asked moved: ")


def test_the_same_file_by_another_way_lifts_nothing(
    locked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy("rows.json", "copy.json")
    assert plan(capsys, "data.sources.rows.path=copy.json")[0].startswith("mine: ")


def test_another_value_of_a_source_is_no_word_about_its_rows(
    locked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(capsys, "data.sources.rows.weight=2", "sft.epochs=1")[0].startswith("mine: ")
    Path("rows.json").write_text("[3]", encoding="utf-8")
    said = refusal(capsys, *WORDS, "data.sources.rows.weight=2")
    assert said.startswith("recipe=mine is locked, and data.sources.rows moved: ")


def test_another_tokenizer_is_no_word_about_the_model(
    locked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree("words", "others")
    Path("others/tokenizer.json").write_text("{ }", encoding="utf-8")
    assert plan(capsys, "model.tokenizer=others")[0] == f"model.tokenizer: {LIFTED}"
    Path("base/config.json").write_text("{}", encoding="utf-8")
    said = refusal(capsys, *WORDS, "model.tokenizer=others")
    assert said.startswith("recipe=mine is locked, and model.path (config.json) moved: ")


def test_another_option_of_a_group_lifts_its_pins(
    locked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("rows.json").write_text("[3]", encoding="utf-8")
    assert cli.main(["plan", "recipe=mine", "data=dolly"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"data: {LIFTED}"
    assert lines[1].startswith("mine: ")
    # the option that the recipe has anyway
    said = refusal(capsys, *WORDS, "data=own")
    assert said.startswith("recipe=mine is locked, and data.sources.rows moved: ")


def test_a_source_that_was_not_there_is_said_to_be_free(
    locked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = "data.sources.new={format: alpaca, path: 'sample:alpaca.json'}"
    assert plan(capsys, new)[0] == "data.sources.new is not in the lock of recipe=mine."


def test_a_smoke_form_and_a_recipe_that_extends_it_are_not_held(
    locked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("rows.json").write_text("[3]", encoding="utf-8")
    Path("recipes/longer.yaml").write_text("defaults: [mine]\n", encoding="utf-8")
    (run,) = resolve.resolved(["recipe=longer"])
    assert run.lock is None
    (run,) = resolve.resolved([*WORDS, "smoke=true", "model.architecture={model_type: llama}"])
    assert run.lock is None
    (run,) = resolve.resolved(WORDS)
    assert run.lock is not None


# --- the hub ---

Answers = Callable[..., None]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Stand in for the hub: every repository's default branch is at COMMIT. Return who was asked for."""
    import huggingface_hub

    asked: list[tuple[str, str]] = []

    class Info:
        sha = COMMIT

    class Api:
        def repo_info(self, id_: str, repo_type: str) -> Info:
            asked.append((repo_type, id_))
            return Info()

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return asked


HUB = """\
defaults: [tiny, {override /data: own}]
model: {init: pretrained, path: maker/base, tokenizer: null, tokenizer_revision: null}
data: {sources: {rows: {format: alpaca, path: maker/rows}}}
"""
FREE = ("recipe=free",)


def test_the_newest_commit_is_pinned_and_used(
    mine: Path, hub: list[tuple[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("recipes/free.yaml").write_text(HUB, encoding="utf-8")
    assert refusal(capsys, *FREE).endswith("pin it with data.sources.rows.revision=<commit>.")
    assert cli.main(["lock", *FREE]) == 0
    assert sorted(hub) == [("dataset", "maker/rows"), ("model", "maker/base")]
    hub.clear()
    held = yaml.safe_load(Path("recipes/free.lock").read_text(encoding="utf-8"))
    assert held["inputs"] == {
        "data.sources.rows": f"hub:maker/rows@{COMMIT}",
        "model.path": f"maker/base@{COMMIT}",
        "model.tokenizer": f"hub:maker/base@{COMMIT}",
    }
    (run,) = resolve.resolved(FREE)
    assert run.cfg.model.revision == run.cfg.data.sources["rows"].revision == COMMIT
    assert run.told["model.revision"] == run.told["data.sources.rows.revision"] == "lock"
    steps = run.plan()
    assert f"hub:maker/rows@{COMMIT}" in str([step.facts["pins"] for step in steps])
    assert hub == []  # a run asks nobody


def test_a_commit_of_ones_own_lifts_the_locked_one(
    mine: Path, hub: list[tuple[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("recipes/free.yaml").write_text(HUB, encoding="utf-8")
    assert cli.main(["lock", *FREE]) == 0
    capsys.readouterr()
    assert cli.main(["plan", *FREE, f"data.sources.rows.revision={OTHER}"]) == 0
    assert capsys.readouterr().out.startswith(
        "data.sources.rows: chosen on the command line; the lock of recipe=free does not hold for it.\n"
    )
    # the commit of one repository says nothing of another
    assert refusal(capsys, *FREE, "data.sources.rows.path=maker/others").endswith(
        "pin it with data.sources.rows.revision=<commit>."
    )


def test_a_folder_of_the_name_of_a_locked_hub_id_is_noticed(
    mine: Path, hub: list[tuple[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("recipes/free.yaml").write_text(HUB, encoding="utf-8")
    assert cli.main(["lock", *FREE]) == 0
    capsys.readouterr()
    Path("maker").mkdir()
    Path("maker/rows").write_text("[3]", encoding="utf-8")
    assert f"data.sources.rows moved: locked maker/rows@{COMMIT}, now sha256 " in refusal(capsys, *FREE)


def test_a_seed_set_and_a_tokenizer_of_their_own_are_pinned(
    mine: Path, hub: list[tuple[str, str]]
) -> None:
    text = HUB.replace("tokenizer: null", "tokenizer: maker/words") + (
        "stages: [evolve, prepare]\nevolve: {seeds: {path: maker/seeds}}\n"
    )
    Path("recipes/free.yaml").write_text(text, encoding="utf-8")
    assert cli.main(["lock", *FREE]) == 0
    held = yaml.safe_load(Path("recipes/free.lock").read_text(encoding="utf-8"))["inputs"]
    assert held["evolve.seeds"] == f"hub:maker/seeds@{COMMIT}"
    assert held["model.tokenizer"] == f"hub:maker/words@{COMMIT}"
    (run,) = resolve.resolved(FREE)
    assert run.cfg.evolve.seeds.revision == run.cfg.model.tokenizer_revision == COMMIT


def test_what_no_stage_reads_is_not_asked_for(mine: Path, hub: list[tuple[str, str]]) -> None:
    text = HUB + "stages: [prepare]\nevolve: {seeds: {path: maker/seeds}}\n"
    Path("recipes/free.yaml").write_text(text, encoding="utf-8")
    assert cli.main(["lock", *FREE]) == 0
    # the model for its tokenizer
    assert sorted(hub) == [("dataset", "maker/rows"), ("model", "maker/base")]
    (run,) = resolve.resolved(FREE)
    assert run.cfg.model.revision == COMMIT


def test_a_model_that_a_server_stands_in_for_is_not_asked_for(
    mine: Path, hub: list[tuple[str, str]]
) -> None:
    server = "url: http://localhost:1/v1, model: x, seeds: {path: maker/seeds}"
    text = HUB + f"stages: [evolve]\nevolve: {{{server}}}\n"
    Path("recipes/free.yaml").write_text(text, encoding="utf-8")
    assert cli.main(["lock", *FREE]) == 0
    assert hub == [("dataset", "maker/seeds")]


@pytest.mark.parametrize(
    ("offline", "why"), [(True, "HF_HUB_OFFLINE is set"), (False, "[Errno 111] Connection refused")]
)
def test_without_a_network_it_is_a_sentence(
    offline: bool,
    why: str,
    mine: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    Path("recipes/free.yaml").write_text(HUB.replace("path: maker/base", "path: base"), encoding="utf-8")
    assert refusal(capsys, *FREE, "model.tokenizer=words", verb="lock") == (
        "data.sources.rows.revision is not set, and the hub cannot be asked for the newest commit of "
        f"maker/rows ({why}); give data.sources.rows.revision=<commit>."
    )


# --- bad input ---


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "choose a recipe with recipe=NAME:"),
        (["recipe=mine", "-m"], "lock takes recipe=NAME and overrides, but got '-m'."),
        (["recipe=mine", "smoke=true"], "smoke=true has other inputs than the recipe; "),
        (["recipe=mien"], "no recipe 'mien'. Did you mean 'mine'? "),
        (["recipe=mine", "data.sources.rows.path=no.json"], "no file no.json; "),
    ],
)
def test_what_cannot_be_locked_is_refused(
    words: list[str], said: str, mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(mine.rglob("*"))
    assert cli.main(["lock", *words]) == 2
    assert capsys.readouterr().err.startswith(f"ftpipe: {said}")
    assert sorted(mine.rglob("*")) == before


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"\xff\xfe", b"[]", b"recipe: mine\n", b"3", b"recipe: mine\ninputs: 3\n"]
)
def test_a_damaged_lock_is_a_sentence(damage: bytes, tmp_path: Path) -> None:
    (tmp_path / "mine.lock").write_bytes(damage)
    with pytest.raises(LockError) as refused:
        record.find("mine", tmp_path / "mine.yaml")
    place = tmp_path / "mine.lock"
    assert str(refused.value) == f"{place} is damaged; `ftpipe lock recipe=mine` writes it anew."


def test_a_damaged_lock_can_be_written_anew(
    locked: Path, written: str, capsys: pytest.CaptureFixture[str]
) -> None:
    LOCK.write_bytes(b"{")
    assert refusal(capsys).endswith("is damaged; `ftpipe lock recipe=mine` writes it anew.")
    assert cli.main(["lock", *WORDS]) == 0
    assert LOCK.read_text(encoding="utf-8") == written


def test_a_folder_that_cannot_be_written_is_named(mine: Path) -> None:
    with pytest.raises(ValueError, match=r"rows\.json/mine\.lock cannot be written \(.*\)\.$"):
        record.write(mine / "rows.json" / "mine.lock", of(), "ftpipe lock")
