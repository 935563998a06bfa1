"""A run as one file: what goes in comes out, and nothing else comes out."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ftpipe import __version__, artifacts, cli, pipeline, schema
from ftpipe.choices import EvalFormat, Init
from ftpipe.config import EvalSetConfig, ModelConfig, RunConfig
from ftpipe.errors import ConfigError, DataError, UserError
from ftpipe.runs import archive, find, unpack
from tests.unit.runs import made

pytestmark = pytest.mark.slow  # each composes recipes, plans and reads them many times

OUTPUT = Path("outputs")
TAR = Path("run.tar")


def exported(folder: Path, to: Path = TAR, with_inputs: bool = True) -> Path:
    archive.export(find.run(str(folder), OUTPUT), to, with_inputs)
    return to


def members(path: Path) -> dict[str, bytes]:
    """Return the files of an archive, read by tar(1)."""
    listed = subprocess.run(["tar", "-tf", path], capture_output=True, text=True, check=True)
    inside = Path(f"{path}.inside")
    inside.mkdir()
    subprocess.run(["tar", "-xf", path, "-C", inside], check=True)
    found = made.bytes_of(inside)
    assert sorted(found) == sorted(listed.stdout.splitlines())
    return found


def inputs(path: Path) -> dict[str, str]:
    with tarfile.open(path) as tar:
        file = tar.extractfile("inputs.json")
        assert file is not None
        table: dict[str, str] = json.loads(file.read())
    return table


def states(run: Path) -> list[bool]:
    """Return which stages a plan of an unpacked run would reuse."""
    return [step.artifact is not None for step in pipeline.plan(schema.load(run / "run.yaml"))]


@pytest.fixture
def whole(cfg: RunConfig) -> RunConfig:
    """A configuration that reads all kinds of local input."""
    for folder in ("base/code", "tok", "questions/test"):
        Path(folder).mkdir(parents=True)
    for name in (
        *("config.json", "model-1.safetensors", "model.safetensors.index.json", "tokenizer.json"),
        *("modeling_own.py", "code/deep.py", "optimizer.bin", "README.md"),
    ):
        Path("base", name).write_text(f"bytes of {name}", encoding="utf-8")
    Path("tok/tokenizer.json").write_text("a tokenizer", encoding="utf-8")
    Path("questions/test/law.csv").write_text("a,b\n", encoding="utf-8")
    Path("asked.txt").write_text("What is law?\n", encoding="utf-8")
    cfg.model = ModelConfig(path="base", tokenizer="tok")
    cfg.data.decontaminate = {
        "mmlu": EvalSetConfig(format=EvalFormat.mmlu, path="questions"),
        "own": EvalSetConfig(format=EvalFormat.text, path="asked.txt"),
        "shipped": EvalSetConfig(format=EvalFormat.text, path="hub/set", revision=made.COMMIT),
    }
    return cfg


def test_an_archive_holds_the_record_the_artifacts_and_the_inputs(cfg: RunConfig) -> None:
    folder = made.run(cfg)
    (folder / "origins.json").write_text("{}", encoding="utf-8")
    for other in ("sft.job.json", "slurm.json", "logs/x.log"):  # paths, and what was printed
        (folder / other).parent.mkdir(exist_ok=True)
        (folder / other).write_text("secret", encoding="utf-8")
    inside = members(exported(folder))
    digest = hashlib.sha256(Path("rows.json").read_bytes()).hexdigest()
    want = {f"runs/{folder.name}/{name}" for name in ("run.yaml", "artifacts.json", "origins.json")}
    want |= {"archive.json", "inputs.json", f"inputs/{digest}/rows.json"}
    for stage, name in made.names(folder).items():
        want |= {f"artifacts/{name}/{file}" for file in made.bytes_of(made.place(folder, stage))}
    assert set(inside) == want
    assert inside[f"inputs/{digest}/rows.json"] == Path("rows.json").read_bytes()
    assert json.loads(inside["inputs.json"]) == {"data.sources.mine.path": f"inputs/{digest}/rows.json"}
    index = json.loads(inside.pop("archive.json"))
    assert (index["format"], index["ftpipe"], index["run"]) == (1, __version__, folder.name)
    assert index["sha256"] == {
        name: hashlib.sha256(content).hexdigest() for name, content in inside.items()
    }


def test_the_same_run_gives_the_same_bytes(cfg: RunConfig) -> None:
    folder = made.run(cfg)
    first = exported(folder).read_bytes()
    for path in Path("outputs").rglob("*"):
        os.utime(path, (1, 1))
    (folder / "run.yaml").chmod(0o600)
    assert exported(folder, Path("again.tar")).read_bytes() == first
    with tarfile.open(TAR) as tar:
        names = []
        for member in tar:
            names.append(member.name)
            said = (member.mtime, member.uid, member.gid, member.uname, member.gname, member.mode)
            assert said == (0, 0, 0, "", "", 0o644)
    assert names == [*sorted(names[:-1]), "archive.json"]


def test_an_unpacked_run_is_whole_and_nothing_of_it_would_run_again(
    cfg: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made.run(cfg)
    path = exported(folder).absolute()
    kept = made.bytes_of(OUTPUT / "artifacts")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # nothing of the first folder is in reach by name
    run = unpack.unpack(path, Path("mine"))
    assert run == Path("mine/runs") / folder.name
    assert states(run) == [True, True, True]
    got = made.bytes_of(Path("mine/artifacts"))
    want = {name: content for name, content in kept.items() if not name.endswith((".lock", ".json"))}
    want |= {name: content for name, content in kept.items() if name.endswith("manifest.json")}
    got.pop(".digests.json", None)
    assert got == want
    again = schema.load(run / "run.yaml")
    assert again.output == str(Path("mine").absolute())
    assert Path(again.data.sources["mine"].path).is_relative_to(Path("mine/inputs").absolute())
    # what it says besides is what it said
    again.output, again.data.sources["mine"].path = cfg.output, cfg.data.sources["mine"].path
    assert again == cfg


def test_every_kind_of_local_input_travels(whole: RunConfig) -> None:
    folder = made.run(whole)
    table = inputs(exported(folder))
    assert set(table) == {
        *("data.sources.mine.path", "model.path", "model.tokenizer"),
        *("data.decontaminate.mmlu.path", "data.decontaminate.own.path"),
    }
    run = unpack.unpack(TAR, Path("away/mine"))
    for name in ("base", "tok", "questions", "rows.json", "asked.txt"):
        Path(name).rename(f"gone-{name}")
    assert states(run) == [True, True]
    base = Path("away/mine") / table["model.path"]
    assert set(made.bytes_of(base)) == {
        *("config.json", "model-1.safetensors", "model.safetensors.index.json", "tokenizer.json"),
        *("modeling_own.py", "code/deep.py"),
    }
    assert made.bytes_of(Path("away/mine") / table["data.decontaminate.mmlu.path"]) == {
        "test/law.csv": b"a,b\n"
    }
    cfg = schema.load(run / "run.yaml")
    assert cfg.data.decontaminate["shipped"].path == "hub/set"


def test_a_gguf_file_travels(cfg: RunConfig) -> None:
    Path("base.gguf").write_bytes(b"weights")
    cfg.model = ModelConfig(path="base.gguf")
    folder = made.run(cfg)
    assert inputs(exported(folder))["model.path"].endswith("/base.gguf")
    run = unpack.unpack(TAR, Path("mine"))
    Path("base.gguf").unlink()
    assert states(run) == [True, True, True]


def test_seed_instructions_travel(cfg: RunConfig) -> None:
    cfg.stages, cfg.data.sources = ["evolve", "prepare"], {}
    cfg.evolve.seeds.path = "rows.json"
    cfg.evolve.url, cfg.evolve.model = "http://localhost:1/v1", "a-model"
    folder = made.run(cfg)
    assert list(inputs(exported(folder))) == ["evolve.seeds.path"]
    run = unpack.unpack(TAR, Path("mine"))
    Path("rows.json").unlink()
    assert states(run) == [True, True, True]


def test_samples_and_random_models_need_no_input(cfg: RunConfig) -> None:
    cfg.data.sources["mine"].path = "sample:alpaca.json"
    assert cfg.model.init is Init.random
    Path("bytes").mkdir()  # not the tokenizer of that name
    Path("bytes/tokenizer.json").touch()
    folder = made.run(cfg)
    assert inputs(exported(folder)) == {}
    run = unpack.unpack(TAR, Path("mine"))
    assert states(run) == [True, True, True]
    assert schema.load(run / "run.yaml").data.sources["mine"].path == "sample:alpaca.json"


def test_without_inputs_their_paths_stay_as_they_are(cfg: RunConfig) -> None:
    folder = made.run(cfg)
    assert inputs(exported(folder, with_inputs=False)) == {}
    run = unpack.unpack(TAR, Path("mine"))
    assert schema.load(run / "run.yaml").data.sources["mine"].path == "rows.json"
    assert not Path("mine/inputs").exists()


def test_a_run_that_ended_early_is_archived_as_far_as_it_came(cfg: RunConfig) -> None:
    folder = made.run(cfg, "prepare")
    run = unpack.unpack(exported(folder), Path("mine"))
    assert states(run) == [True, True, False]


@pytest.mark.slow
@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    files=st.dictionaries(
        st.lists(
            st.text("ab é.ü\u4e00-_ 'x", min_size=1, max_size=40).filter(
                lambda part: part.strip(".") and not part.startswith(".")
            ),
            min_size=1,
            max_size=3,
        ).map(lambda parts: "folder/" + "/".join(parts) + "/file"),
        st.text(max_size=50),
        max_size=4,
    )
)
def test_unpacking_gives_back_what_was_packed(
    cfg: RunConfig, files: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    output = tmp_path_factory.mktemp("any") / "outputs"
    cfg = made.changed(cfg, "output", str(output))
    folder = made.run(cfg, "model", files=files)
    path = output / "run.tar"
    archive.export(find.run(str(folder), output), path)
    run = unpack.unpack(path, output / "new")
    for stage, name in made.names(run).items():
        assert made.bytes_of(output / "new" / "artifacts" / name) == made.bytes_of(
            made.place(folder, stage)
        )


# --- what cannot be archived ---


def refused(folder: Path, with_inputs: bool = True) -> str:
    with pytest.raises(UserError) as error:
        exported(folder, with_inputs=with_inputs)
    assert not TAR.exists()
    assert [path for path in Path().iterdir() if path.name.endswith(".tmp")] == []
    return str(error.value)


def test_an_archive_that_is_there_stays(cfg: RunConfig) -> None:
    folder = made.run(cfg, "model")
    TAR.write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=r"^run\.tar is there already; choose another name with --to "):
        exported(folder)
    assert TAR.read_text(encoding="utf-8") == "mine"


def test_a_run_that_lacks_an_artifact_is_not_archived(cfg: RunConfig) -> None:
    folder = made.run(cfg)
    name = made.names(folder)["model"]
    made.place(folder, "model").rename("away")
    assert refused(folder) == f"{folder.name} is not whole: there is no {name}; make it first."


def test_a_run_without_artifacts_is_not_archived(cfg: RunConfig) -> None:
    folder = pipeline.write_run(cfg, schema.dump(cfg))
    assert refused(folder) == f"{folder.name} is not whole: none of its stages is made; make it first."


@pytest.mark.parametrize("with_inputs", [True, False])
def test_a_damaged_artifact_is_not_archived(cfg: RunConfig, with_inputs: bool) -> None:
    folder = made.run(cfg)
    weights = made.place(folder, "sft") / "weights.bin"
    weights.write_bytes(weights.read_bytes()[::-1])
    said = refused(folder, with_inputs)
    assert said == f"{weights} is not what its digest says; it was changed or is damaged."


def test_a_file_that_grows_while_it_is_read_is_not_archived(
    cfg: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made.run(cfg)
    digest = archive.Digesting.digest

    def written_to_meanwhile(read: archive.Digesting) -> str:
        with (folder / "run.yaml").open("a", encoding="utf-8") as file:
            file.write("#")
        return digest(read)

    monkeypatch.setattr(archive.Digesting, "digest", written_to_meanwhile)
    assert refused(folder).startswith(f"{folder}/run.yaml is not what its digest says; ")


def test_an_artifact_with_a_file_too_many_or_too_few_is_not_archived(cfg: RunConfig) -> None:
    folder = made.run(cfg)
    place = made.place(folder, "sft")
    (place / "extra").touch()
    assert refused(folder) == (f"{place}/extra is not listed in its manifest; the artifact is damaged.")
    (place / "extra").unlink()
    (place / "weights.bin").unlink()
    assert refused(folder) == (
        f"{place}/weights.bin is missing, but listed in its manifest; the artifact is damaged."
    )


def test_a_manifest_that_says_something_else_is_not_archived(cfg: RunConfig) -> None:
    folder = made.run(cfg)
    file = made.place(folder, "sft") / "manifest.json"
    manifest = json.loads(file.read_text(encoding="utf-8"))
    manifest["decided_by"]["seed"] = 99
    file.write_text(json.dumps(manifest), encoding="utf-8")
    assert refused(folder).startswith(f"{file.parent} is not what its manifest says; ")


def test_data_that_changed_since_is_not_archived(cfg: RunConfig) -> None:
    folder = made.run(cfg)
    name = made.names(folder)["prepare"]
    with Path("rows.json").open("a", encoding="utf-8") as file:
        file.write(" ")
    assert refused(folder) == (
        f"data.sources.mine is not what {name} was made from. Bring the input back, or leave inputs out "
        "with --without-inputs."
    )
    Path("rows.json").unlink()
    assert refused(folder).startswith("no file rows.json; ")
    assert exported(folder, with_inputs=False).is_file()


def test_a_disk_that_is_too_small_is_told_before(
    cfg: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made.run(cfg, "model")
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("ftpipe.runs.archive.shutil.disk_usage", lambda _: usage)
    assert refused(folder).endswith("but there are 10 bytes left; choose another place with --to FILE.")


def test_a_folder_that_is_not_there_is_told(cfg: RunConfig) -> None:
    folder = made.run(cfg, "model")
    with pytest.raises(UserError, match=r"^there is no folder .*/no/such; make it first\.$"):
        exported(folder, Path("no/such/run.tar"))


# --- what cannot be unpacked ---

Members = dict[str, tuple[tarfile.TarInfo, bytes]]


def rewritten(change: Callable[[Members], object]) -> Path:
    """Return the archive with its members changed; the index is as it was unless it is changed too."""
    found: Members = {}
    with tarfile.open(TAR) as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            found[member.name] = (member, file.read())
    change(found)
    to = Path("odd.tar")
    with tarfile.open(to, "w") as tar:
        for info, content in found.values():
            info.size = len(content) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(content))
    return to


def unpacking(path: Path) -> str:
    with pytest.raises(DataError) as error:
        unpack.unpack(path, Path("new"))
    assert not Path("new").exists()
    return str(error.value)


def add(found: Members, name: str, kind: bytes = tarfile.REGTYPE, to: str = "") -> None:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    found[name] = (info, b"odd")


def edit(name: str, change: Callable[[Any], object]) -> Callable[[Members], object]:
    def edited(found: Members) -> None:
        (whole,) = [member for member in found if member.endswith(name)]
        info, content = found[whole]
        table = json.loads(content)
        change(table)
        found[whole] = (info, json.dumps(table).encode())

    return edited


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda found: add(found, "/etc/passwd"), "holds '/etc/passwd', which has no place in "),
        (lambda found: add(found, "../up"), "holds '../up', which has no place in the archive of a run"),
        (lambda found: add(found, "inputs/../../up"), "holds 'inputs/../../up', which has no place"),
        (lambda found: add(found, "artifacts/./x/y"), "holds 'artifacts/./x/y', which has no place"),
        (lambda found: add(found, "inputs/é/a\0b"), "which has no place in the archive of a run"),
        (lambda found: add(found, "note.txt"), "holds 'note.txt', which has no place"),
        (lambda found: add(found, "secrets/a/b"), "holds 'secrets/a/b', which has no place"),
        (lambda found: add(found, "artifacts/x"), "holds 'artifacts/x', which has no place"),
        (
            lambda found: add(found, "artifacts/a/b", tarfile.SYMTYPE, "/etc/passwd"),
            "holds 'artifacts/a/b', which is a link; it is not used.",
        ),
        (
            lambda found: add(found, "artifacts/a/b", tarfile.LNKTYPE, "inputs.json"),
            "holds 'artifacts/a/b', which is a link",
        ),
        (lambda found: add(found, "artifacts/a/b", tarfile.CHRTYPE), "which is a device"),
        (lambda found: add(found, "artifacts/a/b", tarfile.FIFOTYPE), "which is a device"),
        (lambda found: add(found, "artifacts/a/b", tarfile.DIRTYPE), "which is a folder"),
        (lambda found: add(found, "artifacts/a/b", tarfile.GNUTYPE_SPARSE), "which is sparse"),
        (lambda found: add(found, "inputs/a/b"), "holds, besides what its index lists, inputs/a/b"),
        (lambda found: found.pop("inputs.json"), "lacks inputs.json; it is not used."),
        (lambda found: found.pop("archive.json"), "has no archive.json: it is cut off, or "),
        (edit("archive.json", lambda index: index.update(format=2)), "is of format 2, but this ftpipe "),
        (edit("archive.json", lambda index: index.pop("format")), "is of format None, but "),
        (edit("archive.json", lambda index: index.update(run="../x")), "lacks the run or the digests"),
        (edit("archive.json", lambda index: index.update(run="..")), "lacks the run or the digests"),
        (edit("archive.json", lambda index: index.update(run="other-1")), "lacks runs/other-1/run.yaml"),
        (edit("archive.json", lambda index: index.update(sha256=[])), "lacks the run or the digests"),
        (
            edit("archive.json", lambda index: index["sha256"].update({"inputs.json": "ab"})),
            "lacks the run or the digests",
        ),
        (
            edit("archive.json", lambda index: index["sha256"].update({"inputs.json": "ab" * 32})),
            "is damaged: inputs.json is not what the index says.",
        ),
        (edit("archive.json", lambda index: index["sha256"].pop("inputs.json")), "besides what its "),
        (edit("inputs.json", lambda table: table.clear()), "inputs.json is not what the index says"),
    ],
)
def test_what_is_odd_is_refused_and_leaves_nothing(
    cfg: RunConfig, change: Callable[[Members], object], said: str
) -> None:
    exported(made.run(cfg))
    sentence = unpacking(rewritten(change))
    assert sentence.startswith("odd.tar") and said in sentence and "\n" not in sentence
    assert not Path("up").exists()


def test_a_member_that_is_there_twice_is_refused(cfg: RunConfig) -> None:
    exported(made.run(cfg, "model"))
    again = json.dumps(inputs(TAR)).encode()
    with tarfile.open(TAR, "a") as tar:
        member = tarfile.TarInfo("inputs.json")
        member.size = len(again)
        tar.addfile(member, io.BytesIO(again))
    assert unpacking(TAR) == "run.tar holds inputs.json twice; it is not used."


def forged(name: str, change: Callable[[bytes], bytes]) -> Path:
    """Return the archive with a member changed, and an index that says so."""

    def both(found: Members) -> None:
        (whole,) = [member for member in found if member.endswith(name)]
        info, content = found[whole]
        found[whole] = (info, change(content))
        digest = hashlib.sha256(change(content)).hexdigest()
        edit("archive.json", lambda index: index["sha256"].update({whole: digest}))(found)

    return rewritten(both)


def test_a_changed_file_of_an_artifact_is_seen_though_the_index_agrees(cfg: RunConfig) -> None:
    folder = made.run(cfg)
    exported(folder)
    name = made.names(folder)["sft"]
    assert unpacking(forged(f"{name}/weights.bin", lambda _: b"others")) == (
        f"odd.tar: the files of {name} are not those of its manifest."
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(b'"seed": 0', b'"seed": 1'),
        lambda text: text.replace(b'"stage": "sft"', b'"stage": "dpo"'),
    ],
)
def test_a_changed_manifest_is_seen_though_the_index_agrees(
    cfg: RunConfig, change: Callable[[bytes], bytes]
) -> None:
    folder = made.run(cfg)
    exported(folder)
    name = made.names(folder)["sft"]
    assert unpacking(forged(f"{name}/manifest.json", change)) == (
        f"odd.tar: {name} is not what its manifest says; it is not used."
    )


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"seed": "inputs/x"}, "seed is at inputs/x, which did not come with it."),
        ({"data.sources.mine.path": "../../etc"}, "is at ../../etc, which did not come with it."),
        (
            {"data.sources.mine.path": "inputs/../runs"},
            "is at inputs/../runs, which did not come with it.",
        ),
        ({"data.sources.mine.path": 3}, "is at 3, which did not come with it."),
        ({"data.sources.no.path": "OWN"}, "has no key 'data.sources.no.path' that names a file."),
        ({"nobody": "OWN"}, "has no key 'nobody' that names a file."),
        ({"seed": "OWN"}, "has no key 'seed' that names a file."),
        ({"output.x": "OWN"}, "has no key 'output.x' that names a file."),
    ],
)
def test_a_table_of_inputs_that_leads_elsewhere_is_refused(
    cfg: RunConfig, table: dict[str, Any], said: str
) -> None:
    exported(made.run(cfg))
    (own,) = inputs(TAR).values()
    text = json.dumps(table).replace("OWN", own).encode()
    assert said in unpacking(forged("inputs.json", lambda _: text))


def test_a_run_of_another_schema_is_one_sentence(cfg: RunConfig) -> None:
    folder = made.run(cfg)
    exported(folder)
    path = forged("run.yaml", lambda text: text + b"unheard_of: 1\n")
    with pytest.raises(ConfigError, match=r"^unknown key 'unheard_of'"):
        unpack.unpack(path, Path("new"))
    assert not Path("new").exists()


def test_an_archive_that_is_cut_off_is_refused(cfg: RunConfig) -> None:
    content = exported(made.run(cfg)).read_bytes()
    with tarfile.open(TAR) as tar:
        index = tar.getmember("archive.json")
        spots = [index.offset, index.offset_data, index.offset_data + index.size - 1]
        spots += [member.offset_data + 1 for member in tar if member.size]
    for size in [0, 3, 511, 512, 513, *spots]:
        Path("odd.tar").write_bytes(content[:size])
        assert unpacking(Path("odd.tar")).startswith("odd.tar ")


def test_any_damaged_byte_is_noticed(cfg: RunConfig) -> None:
    content = bytearray(exported(made.run(cfg, "model")).read_bytes())
    with tarfile.open(TAR) as tar:
        spots = [member.offset_data for member in tar if member.size]
        spots += [member.offset for member in tar]
    for spot in spots:
        damaged = bytearray(content)
        damaged[spot] ^= 1
        Path("odd.tar").write_bytes(damaged)
        assert unpacking(Path("odd.tar")).startswith("odd.tar")


@pytest.mark.parametrize("text", [b"", b"no tar at all", b"\x1f\x8b\x08"])
def test_what_is_no_archive_is_one_sentence(empty_folder: Path, text: bytes) -> None:
    Path("odd.tar").write_bytes(text)
    assert unpacking(Path("odd.tar")).startswith("odd.tar ")
    assert unpacking(Path("no.tar")) == "no.tar cannot be read (No such file or directory)."


def test_it_is_unpacked_into_an_empty_folder_alone(cfg: RunConfig) -> None:
    exported(made.run(cfg, "model"))
    Path("new").mkdir()
    Path("new/mine").touch()
    with pytest.raises(UserError) as error:
        unpack.unpack(TAR, Path("new"))
    assert str(error.value) == "new is not empty; give a new folder."
    assert Path("new/mine").is_file()
    Path("new/mine").unlink()
    assert unpack.unpack(TAR, Path("new")).is_dir()
    with pytest.raises(UserError, match=r"^rows\.json/new cannot be written "):
        unpack.unpack(TAR, Path("rows.json/new"))


def test_a_folder_that_was_there_stays_after_an_error(cfg: RunConfig) -> None:
    exported(made.run(cfg, "model"))
    Path("new").mkdir()
    with pytest.raises(DataError):
        unpack.unpack(rewritten(lambda found: found.pop("inputs.json")), Path("new"))
    assert list(Path("new").iterdir()) == []


# --- the verbs ---


def test_export_and_import_by_command(cfg: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made.run(cfg)
    name = folder.name
    assert cli.main(["runs", "export", "mine"]) == 0
    size = Path(f"{name}.tar").stat().st_size
    assert capsys.readouterr().out == f"{name}.tar ({size / 1024:.1f} KiB)\n"
    assert cli.main(["runs", "import", f"{name}.tar", "output=theirs"]) == 0
    assert capsys.readouterr().out == f"theirs/runs/{name}\n"
    assert states(Path("theirs/runs") / name) == [True, True, True]
    # what is not the record, an artifact, a lock or an input is gone again
    kinds = {path.name.split("-")[0] for path in Path("theirs/artifacts").iterdir()}
    assert kinds - {".digests.json"} == {"model", "prepare", "sft"}
    cfg_ = schema.load(Path("theirs/runs") / name / "run.yaml")
    assert cfg_.output == str(Path("theirs").absolute())
    assert Path(cfg_.data.sources["mine"].path).is_relative_to(Path("theirs/inputs").absolute())
    assert cli.main(["runs", "import", f"{name}.tar", "output=theirs"]) == 2
    assert capsys.readouterr().err == (
        f"ftpipe: theirs/runs/{name} is there already; remove it first with "
        f"`ftpipe runs remove {name}`.\n"
    )
    assert cli.main(["runs", "gc", "output=theirs"]) == 0  # the inputs are in use
    assert cli.main(["runs", "remove", name, "--yes", "output=theirs"]) == 0
    assert cli.main(["runs", "gc", "--yes", "output=theirs"]) == 0
    left = [path for path in Path("theirs").rglob("*") if path.is_file()]
    assert [path.name for path in left if path.name != ".digests.json"] == []


def test_an_import_keeps_what_is_made_already(cfg: RunConfig) -> None:
    folder = made.run(cfg)
    exported(folder)
    mark = made.place(folder, "sft") / "mark"
    mark.touch()
    folder.rename("away")
    run = unpack.bring_in(TAR, OUTPUT)
    assert run == folder
    assert mark.is_file()
    assert artifacts.find(OUTPUT, *made.names(run)["sft"].rsplit("-", 1)) is not None


def test_a_damaged_archive_brings_nothing_in(cfg: RunConfig) -> None:
    exported(made.run(cfg))
    with pytest.raises(DataError):
        unpack.bring_in(rewritten(lambda found: found.pop("inputs.json")), Path("theirs"))
    assert list(Path("theirs").rglob("*")) == [Path("theirs/artifacts")]
