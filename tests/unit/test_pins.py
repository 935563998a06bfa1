"""Outside input by content: the digest of a file's bytes, the commit of a hub id."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from ftpipe import artifacts, pins
from ftpipe.artifacts import fingerprint
from ftpipe.choices import EvalFormat, Format, Init
from ftpipe.config import EvalSetConfig, ModelConfig, RunConfig, SourceConfig
from ftpipe.errors import ConfigError, DataError, ModelError
from ftpipe.pins import Digests, data_pins, local_data, local_model, model_pins, tokenizer_pins

COMMIT = "4782ad278652c7c71b72204d462d6d01eaaf7549"
OTHER = "8416d3fefb0cb3ff5775a7b13c1692d10ff1aa16"


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten seconds from now, when a file written now is old enough to be remembered."""
    clock = SimpleNamespace(time_ns=lambda: time.time_ns() + 10_000_000_000)
    monkeypatch.setattr(pins, "time", clock)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """List the files whose bytes were read."""
    listed: list[Path] = []

    def spy(path: Path) -> str:
        listed.append(path)
        return artifacts.digest(path)

    monkeypatch.setattr(pins, "digest", spy)
    return listed


@pytest.fixture
def folder(empty_folder: Path) -> Path:
    """Return a model folder as far as pins look: names and bytes."""
    path = empty_folder / "base"
    path.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (path / name).write_text(f"bytes of {name}", encoding="utf-8")
    return path


# --- the memory of digests ---


def test_a_digest_is_the_sha256_of_the_bytes(empty_folder: Path) -> None:
    file = empty_folder / "x"
    file.write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    assert Digests().of(file) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.usefixtures("later")
def test_a_file_that_did_not_change_is_read_once(empty_folder: Path, read: list[Path]) -> None:
    file, memory = empty_folder / "x", empty_folder / "memory.json"
    file.write_text("one", encoding="utf-8")
    for _ in range(3):
        digests = Digests(memory)
        assert digests.of(Path("x")) == sha256("one")
        assert digests.of(file) == sha256("one")
        digests.save()
    assert read == [Path("x")]


def test_a_file_written_just_now_is_read_every_time(empty_folder: Path, read: list[Path]) -> None:
    # its times could be those of a second write within the same tick of the clock
    file = empty_folder / "x"
    file.write_text("one", encoding="utf-8")
    digests = Digests()
    assert digests.of(file) == digests.of(file) == sha256("one")
    assert read == [file, file]


@pytest.mark.usefixtures("later")
def test_other_bytes_of_the_same_size_and_time_are_noticed(empty_folder: Path) -> None:
    file, memory = empty_folder / "x", empty_folder / "memory.json"
    file.write_text("one", encoding="utf-8")
    before = file.stat()
    digests = Digests(memory)
    assert digests.of(file) == sha256("one")
    digests.save()
    file.write_text("two", encoding="utf-8")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert digests.of(file) == sha256("two")
    assert Digests(memory).of(file) == sha256("two")


@pytest.mark.usefixtures("later")
def test_a_file_put_in_place_of_another_is_noticed(empty_folder: Path) -> None:
    file, other = empty_folder / "x", empty_folder / "y"
    file.write_text("one", encoding="utf-8")
    other.write_text("two", encoding="utf-8")
    digests = Digests()
    assert digests.of(file) == sha256("one")
    other.rename(file)
    assert digests.of(file) == sha256("two")


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"[]",
        b"[1, 2]",
        b"3",
        b"null",
        b'"text"',
        b'{"PATH": 5}',
        b'{"PATH": []}',
        b'{"PATH": ["STATE"]}',
        b'{"PATH": ["STATE", 5]}',
        b'{"PATH": {"STATE": "x"}}',
    ],
)
def test_a_damaged_memory_is_ignored_and_mended(damage: bytes, empty_folder: Path) -> None:
    file, memory = empty_folder / "x", empty_folder / "memory.json"
    file.write_text("one", encoding="utf-8")
    stat = file.stat()
    state = f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"
    place = fingerprint({"path": str(file)})  # the memory names no folder
    memory.write_bytes(damage.replace(b"PATH", place.encode()).replace(b"STATE", state.encode()))
    digests = Digests(memory)
    assert digests.of(file) == sha256("one")
    digests.save()
    assert json.loads(memory.read_text(encoding="utf-8")) == {place: [state, sha256("one")]}


@pytest.mark.usefixtures("later")
def test_the_memory_is_no_reason_to_make_a_folder(empty_folder: Path) -> None:
    (empty_folder / "x").write_text("one", encoding="utf-8")
    digests = Digests(empty_folder / "artifacts" / "memory.json")
    digests.of(empty_folder / "x")
    digests.save()
    Digests().save()
    assert [path.name for path in empty_folder.iterdir()] == ["x"]


def test_a_memory_that_cannot_be_written_is_no_error() -> None:
    if not Path("/proc/self").is_dir():
        pytest.skip("no /proc on this system")
    Digests(Path("/proc/self/memory.json")).save()


# --- data ---


def test_a_file_is_pinned_by_its_bytes(cfg: RunConfig, rows: Path) -> None:
    want = hashlib.sha256(rows.read_bytes()).hexdigest()
    assert list(data_pins(cfg, Digests()).values()) == [want]


def test_a_hub_dataset_is_pinned_by_its_commit(cfg: RunConfig) -> None:
    cfg.data.sources = {
        "x": SourceConfig(format=Format.alpaca, path="tatsu-lab/alpaca", revision=COMMIT)
    }
    assert list(data_pins(cfg, Digests()).values()) == [f"hub:tatsu-lab/alpaca@{COMMIT}"]


@pytest.mark.parametrize("path", ["tatsu-lab/alpaca", "alpaca"])
def test_a_hub_dataset_without_a_commit_is_refused(cfg: RunConfig, path: str) -> None:
    cfg.data.sources = {"x": SourceConfig(format=Format.alpaca, path=path)}
    with pytest.raises(ConfigError) as refused:
        data_pins(cfg, Digests())
    assert str(refused.value) == (
        f"data.sources.x.path={path} is no file here; if it is a hub dataset, "
        "pin it with data.sources.x.revision=<commit>."
    )


def test_the_order_of_sources_counts_since_rows_come_in_it(cfg: RunConfig, rows: Path) -> None:
    Path("b.json").write_text("[{}]", encoding="utf-8")
    one = SourceConfig(format=Format.alpaca, path=rows.name)
    two = SourceConfig(format=Format.alpaca, path="b.json")
    cfg.data.sources = {"one": one, "two": two}
    forth = data_pins(cfg, Digests())
    cfg.data.sources = {"two": two, "one": one}
    assert data_pins(cfg, Digests()) != forth
    assert sorted(data_pins(cfg, Digests()).values()) == sorted(forth.values())


def test_evaluation_sets_count_by_content_order_and_kind_of_file(cfg: RunConfig) -> None:
    def pinned(*paths: str) -> dict[str, str]:
        cfg.data.decontaminate = {path: EvalSetConfig(EvalFormat.text, path) for path in paths}
        named = data_pins(cfg, Digests())
        return {key: value for key, value in named.items() if key.startswith("decontaminate")}

    for name, words in {
        "a.txt": "one\ntwo",
        "b.txt": "one\ntwo",
        "a.csv": "one\ntwo",
        "c.txt": "o",
    }.items():
        Path(name).write_text(words, encoding="utf-8")
    (same,), (kind,), (other,), (one,) = (
        pinned(name).values() for name in ("b.txt", "a.csv", "c.txt", "a.txt")
    )
    assert one == same  # a place is none of it
    assert len({one, kind, other}) == 3  # the first line of a .csv is its header
    assert pinned("a.txt", "c.txt") != pinned("c.txt", "a.txt")


@pytest.mark.parametrize(
    "path", ["rows.jsonl", "./rows", "../rows", "/no/rows", "a/b/c", "no.json.gz", "x/no.json"]
)
def test_a_path_that_can_only_be_a_file_must_be_there(path: str, empty_folder: Path) -> None:
    with pytest.raises(DataError) as refused:
        local_data(path)
    assert str(refused.value) == f"no file {path}; it was looked for from {empty_folder}."


def test_a_folder_and_an_empty_file_are_no_data(cfg: RunConfig) -> None:
    Path("folder").mkdir()
    Path("empty.json").touch()
    for path, said in (("folder", "is a folder; give one file"), ("empty.json", "is empty")):
        cfg.data.sources["mine"].path = path
        with pytest.raises(DataError, match=rf"^data\.sources\.mine\.path={path} {said}\.$"):
            data_pins(cfg, Digests())


@pytest.mark.parametrize("path", ["hub/rows-v1.5", "hub/rows"])
def test_a_hub_id_may_hold_a_dot(path: str, empty_folder: Path) -> None:
    assert local_data(path) is None


def test_a_path_that_no_system_takes_is_a_sentence(empty_folder: Path) -> None:
    with pytest.raises(DataError, match=r"^x+ cannot be looked at \(File name too long\)\.$"):
        local_data("x" * 5000)


def test_an_unknown_sample_is_met_by_the_nearest(empty_folder: Path) -> None:
    assert local_data("sample:alpaca.json") is not None
    with pytest.raises(DataError, match=r"^no sample 'alpca\.json'\. Did you mean 'alpaca\.json'\?"):
        local_data("sample:alpca.json")


# --- models ---


def test_a_model_folder_is_pinned_by_its_configuration_and_weights(cfg: RunConfig, folder: Path) -> None:
    cfg.model = ModelConfig(path="base")
    assert model_pins(cfg, Digests()) == {
        name: sha256(f"bytes of {name}") for name in ("config.json", "model.safetensors")
    }


def test_every_shard_counts(cfg: RunConfig, folder: Path) -> None:
    cfg.model = ModelConfig(path=str(folder))
    names = {f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)}
    for name in names:
        (folder / name).write_text(name, encoding="utf-8")
    found = model_pins(cfg, Digests())
    assert set(found) == {"config.json", "model.safetensors", *names}
    assert all(found[name] == sha256(name) for name in names)


@pytest.mark.parametrize("name", ["generation_config.json", "modeling_mine.py"])
def test_what_decides_answers_and_code_counts(cfg: RunConfig, folder: Path, name: str) -> None:
    cfg.model = ModelConfig(path="base")
    before = model_pins(cfg, Digests())
    (folder / name).write_text("one", encoding="utf-8")
    assert model_pins(cfg, Digests()) == {**before, name: sha256("one")}


def test_a_gguf_file_is_pinned_by_its_bytes_also_as_the_tokenizer(cfg: RunConfig) -> None:
    Path("base.gguf").write_text("weights", encoding="utf-8")
    cfg.model = ModelConfig(path="base.gguf")
    assert model_pins(cfg, Digests()) == {"gguf": sha256("weights")}
    assert tokenizer_pins(cfg, Digests()) == {"tokenizer": sha256("weights")}


def test_a_hub_model_is_pinned_by_its_commit(cfg: RunConfig) -> None:
    cfg.model = ModelConfig(path="huggyllama/llama-7b", revision=COMMIT)
    assert model_pins(cfg, Digests()) == {"hub": f"huggyllama/llama-7b@{COMMIT}"}
    assert tokenizer_pins(cfg, Digests()) == {"tokenizer": f"hub:huggyllama/llama-7b@{COMMIT}"}


@pytest.mark.parametrize("path", ["gpt2", "huggyllama/llama-7b"])
def test_a_hub_model_without_a_commit_is_refused(cfg: RunConfig, path: str) -> None:
    cfg.model = ModelConfig(path=path)
    with pytest.raises(ConfigError) as refused:
        model_pins(cfg, Digests())
    assert str(refused.value) == (
        f"model.path={path} is no folder or file here; if it is a hub model, "
        "pin it with model.revision=<commit>."
    )


def test_a_random_model_is_pinned_by_its_architecture(cfg: RunConfig) -> None:
    before = model_pins(cfg, Digests())
    assert model_pins(cfg, Digests()) == before
    cfg.model.architecture["hidden_size"] = 64
    assert model_pins(cfg, Digests()) != before


@pytest.mark.parametrize("path", ["/no/model", "./model", "a/b/c", "model.gguf"])
def test_a_model_that_can_only_be_local_must_be_there(path: str, empty_folder: Path) -> None:
    with pytest.raises(ModelError) as refused:
        local_model(ModelConfig(path=path))
    assert str(refused.value) == f"model.path={path}: there is no such folder or file."


def test_a_file_of_another_kind_is_no_model(empty_folder: Path) -> None:
    Path("pytorch_model.bin").touch()
    with pytest.raises(ModelError, match=r"^model\.path=pytorch_model\.bin is a file; give a folder"):
        local_model(ModelConfig(path="pytorch_model.bin"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth", "consolidated.00.pt"])
def test_pickled_weights_are_refused_by_name(cfg: RunConfig, folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).touch()
    cfg.model = ModelConfig(path="base")
    with pytest.raises(ModelError) as refused:
        model_pins(cfg, Digests())
    assert str(refused.value) == (
        "model.path=base holds no *.safetensors weights "
        f"(only {name}, which is not loaded: it can run code)."
    )


def test_four_bits_are_measured_and_nothing_is_trained_on_them(cfg: RunConfig, folder: Path) -> None:
    cfg.model = ModelConfig(path="base")
    packed = {"quantization_config": {"quant_method": "compressed-tensors"}}
    (folder / "config.json").write_text(json.dumps(packed), encoding="utf-8")
    cfg.stages = ["evaluate"]
    assert set(model_pins(cfg, Digests())) == {"config.json", "model.safetensors"}
    cfg.stages = ["prepare", "sft"]
    with pytest.raises(ModelError, match=r"^model\.path=base is in 4 bits of compressed-tensors, on wh"):
        model_pins(cfg, Digests())


def test_a_folder_without_weights_or_configuration_is_no_model(cfg: RunConfig, folder: Path) -> None:
    cfg.model = ModelConfig(path="base")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"^model\.path=base holds no \*\.safetensors weights\.$"):
        model_pins(cfg, Digests())
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"^model\.path=base holds no config\.json; it is no model"):
        model_pins(cfg, Digests())


# --- tokenizers ---


def test_the_tokenizer_made_by_code_is_pinned_by_its_name(cfg: RunConfig) -> None:
    assert tokenizer_pins(cfg, Digests()) == {"tokenizer": "bytes"}


@pytest.mark.parametrize("own", [None, "base"])
def test_a_tokenizer_folder_is_pinned_by_its_files(
    cfg: RunConfig, folder: Path, own: str | None
) -> None:
    cfg.model = ModelConfig(path="base" if own is None else "hub/model", tokenizer=own)
    # all that is no weights: transformers may read a tokenizer's class from config.json
    assert tokenizer_pins(cfg, Digests()) == {
        f"tokenizer/{name}": sha256(f"bytes of {name}")
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json")
    }


# transformers 5, tokenization_utils_base.py: the names it reads a tokenizer from
@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "tokenizer.model",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
        "vocab.txt",
        "tokenization_mine.py",
    ],
)
def test_every_file_that_a_tokenizer_is_read_from_counts(
    cfg: RunConfig, folder: Path, name: str
) -> None:
    cfg.model = ModelConfig(path="base")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("one", encoding="utf-8")
    before = tokenizer_pins(cfg, Digests())
    (folder / name).write_text("two", encoding="utf-8")
    assert tokenizer_pins(cfg, Digests()) != before


def test_a_tokenizer_of_its_own_hub_id_needs_its_own_commit(cfg: RunConfig) -> None:
    cfg.model = ModelConfig(path="hub/model", revision=COMMIT, tokenizer="hub/tokenizer")
    with pytest.raises(ConfigError, match=r"^model\.tokenizer=hub/tokenizer is no folder here; "):
        tokenizer_pins(cfg, Digests())
    cfg.model.tokenizer_revision = OTHER
    assert tokenizer_pins(cfg, Digests()) == {"tokenizer": f"hub:hub/tokenizer@{OTHER}"}


def test_a_random_model_has_no_tokenizer_of_its_own(cfg: RunConfig) -> None:
    cfg.model.tokenizer = None
    assert cfg.model.init is Init.random
    with pytest.raises(ConfigError, match=r"^model\.init=random has no tokenizer of its own; "):
        tokenizer_pins(cfg, Digests())


def test_a_folder_without_tokenizer_files_is_refused(cfg: RunConfig, empty_folder: Path) -> None:
    (empty_folder / "bare").mkdir()
    cfg.model = ModelConfig(path="bare")
    with pytest.raises(ModelError, match=r"^bare holds no tokenizer files; set model\.tokenizer\.$"):
        tokenizer_pins(cfg, Digests())
