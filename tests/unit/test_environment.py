"""What a stage computed with: what torch says itself, and the hub's own names for what was read."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

from ftpipe import environment
from ftpipe.choices import Strategy
from ftpipe.config import RunConfig

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_it_is_what_torch_says(cfg: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        told = environment.of_rank(cfg)
    finally:
        torch.set_num_threads(before)
    assert (told["threads"], told["blas_threads"], told["device"]) == (2, 3, "cpu")
    # as torch's own report of its build has them
    shown = torch.__config__.show()
    assert f"CPU capability usage: {told['cpu_capability']}" in shown
    assert (told["cuda"] is None) is ("CUDA Runtime" not in shown)
    assert told["strategy"] is None
    assert "gpu" not in told


def test_several_ranks_have_a_strategy(cfg: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    cfg.launch.strategy = Strategy.zero2
    assert environment.of_rank(cfg)["strategy"] == "zero2"
    monkeypatch.setenv("OMP_NUM_THREADS", "4,2")  # as OpenMP allows
    assert environment.of_rank(cfg)["blas_threads"] is None


def test_what_was_not_loaded_is_not_asked(cfg: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch", "huggingface_hub"):
        monkeypatch.delitem(sys.modules, name)
    told = environment.of_rank(cfg)
    assert "cuda" not in told and told["hub"] == {}
    assert not {"torch", "huggingface_hub"} & set(sys.modules)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a cache as huggingface_hub lays it out: a dataset of a file in LFS and one in git."""
    root = tmp_path / "hub"
    repository = root / "datasets--maker--rows"
    snapshot = repository / "snapshots" / COMMIT
    (repository / "blobs").mkdir(parents=True)
    (snapshot / "data").mkdir(parents=True)
    for name, digest in (("data/rows.parquet", hashlib.sha256(b"x")), ("README.md", hashlib.sha1(b"x"))):
        blob = repository / "blobs" / digest.hexdigest()
        blob.write_bytes(b"x")
        (snapshot / name).symlink_to(blob)
    (snapshot / "copied").write_bytes(b"x")  # where there are no links, a name says nothing
    (snapshot / "strange").symlink_to(repository / "blobs" / "half.incomplete")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))
    return root


@pytest.mark.usefixtures("cache")
def test_the_hubs_files_are_recorded_by_the_names_of_their_blobs(cfg: RunConfig) -> None:
    assert environment.hub_files(cfg) == {}
    source = cfg.data.sources["mine"]
    source.path, source.revision = "maker/rows", COMMIT
    # sha256("x") and sha1("x"), by coreutils
    assert environment.hub_files(cfg) == {
        f"maker/rows@{COMMIT}": {
            "README.md": "git:11f6ad8ec52a2984abaafd7c3b516503785c2072",
            "data/rows.parquet": (
                "sha256:2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
            ),
        }
    }
    source.revision = COMMIT[::-1]
    assert environment.hub_files(cfg) == {}


def test_models_tokenizers_seeds_and_questions_are_looked_for_too(cfg: RunConfig, cache: Path) -> None:
    from ftpipe.choices import EvalFormat
    from ftpipe.config import EvalSetConfig

    (cache / "datasets--maker--rows").rename(cache / "datasets--maker--seeds")
    for kind, name in (("model", "base"), ("model", "words"), ("dataset", "asked")):
        snapshot = cache / f"{kind}s--maker--{name}" / "snapshots" / COMMIT
        snapshot.mkdir(parents=True)
        (snapshot / name).symlink_to(snapshot / ("a" * 64))
    cfg.model.path, cfg.model.revision = "maker/base", COMMIT
    cfg.model.tokenizer, cfg.model.tokenizer_revision = "maker/words", COMMIT
    cfg.evolve.seeds.path, cfg.evolve.seeds.revision = "maker/seeds", COMMIT
    asked = EvalSetConfig(format=EvalFormat.text, path="maker/asked", revision=COMMIT)
    cfg.data.decontaminate["asked"] = asked
    names = {f"maker/{name}@{COMMIT}" for name in ("base", "words", "seeds", "asked")}
    assert set(environment.hub_files(cfg)) == names
