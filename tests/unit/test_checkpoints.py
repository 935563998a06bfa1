"""Which checkpoint is whole, who can go on from it, and what is left of them at the end."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftpipe import checkpoints
from ftpipe.choices import Strategy
from ftpipe.errors import ConfigError

DDP, ZERO, FSDP = Strategy.ddp, Strategy.zero2, Strategy.fsdp


def write(
    folder: Path, step: int, strategy: Strategy = DDP, ranks: int = 1, names: tuple[str, ...] = ()
) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    for name in names or ("model.safetensors", "optimizer.pt", "trainer_state.json"):
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).write_text("abc")
    checkpoints.seal(checkpoint, tokens=10 * step, strategy=strategy, ranks=ranks)
    return checkpoint


def test_the_newest_whole_one_is_found_with_its_tokens(tmp_path: Path) -> None:
    write(tmp_path, 9)
    newest = write(tmp_path, 10)  # not by the order of the alphabet
    assert checkpoints.last_checkpoint(tmp_path, DDP, 1) == newest
    assert checkpoints.tokens_seen(newest) == 100
    assert checkpoints.last_checkpoint(tmp_path / "none", DDP, 1) is None


def test_one_that_was_killed_while_it_was_written_is_passed_over_without_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older, newer = write(tmp_path, 2), write(tmp_path, 4)
    (newer / checkpoints.SEAL).unlink()
    assert checkpoints.last_checkpoint(tmp_path, DDP, 1) == older
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("hurt", "says"),
    [
        ("missing", "optimizer.pt is missing"),
        ("shorter", "model.safetensors is not as it was written"),
        ("a flipped bit", "model.safetensors is not as it was written"),
        ("seal", "whole.json cannot be read"),
        ("seal of another kind", "whole.json cannot be read"),
    ],
)
def test_a_damaged_one_is_passed_over_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], hurt: str, says: str
) -> None:
    oldest, older, newer = (write(tmp_path, step) for step in (2, 10, 11))
    weights = newer / "model.safetensors"
    match hurt:
        case "missing":
            (newer / "optimizer.pt").unlink()
        case "shorter":
            weights.write_bytes(weights.read_bytes()[:-1])
        case "a flipped bit":
            whole = weights.read_bytes()
            weights.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
        case "seal":  # a power cut may leave a file of zeros
            (newer / checkpoints.SEAL).write_bytes(bytes(100))
        case "seal of another kind":
            (newer / checkpoints.SEAL).write_text("[]")
    assert checkpoints.last_checkpoint(tmp_path, DDP, 1) == older
    told = capsys.readouterr().out
    assert "checkpoint-11 is damaged" in told and says in told
    checkpoints.drop_torn(tmp_path, older)
    assert sorted(tmp_path.iterdir()) == sorted([oldest, older])


def test_what_is_half_removed_is_no_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, 2)
    with monkeypatch.context() as killed:
        killed.setattr("ftpipe.checkpoints.shutil.rmtree", lambda path: None)
        write(tmp_path, 4)
        checkpoints.keep_newest(tmp_path, 1)
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    assert checkpoints.last_checkpoint(tmp_path, DDP, 1) is None
    told = capsys.readouterr().out
    assert "checkpoint-4 is damaged" in told and "checkpoint-2" not in told


def test_the_newest_are_kept_by_their_numbers(tmp_path: Path) -> None:
    made = [write(tmp_path, step) for step in (10, 9, 100, 2)]  # neither by time nor by the alphabet
    checkpoints.keep_newest(tmp_path, 2)
    assert sorted(tmp_path.iterdir()) == sorted([made[0], made[2]])


@pytest.mark.parametrize(
    ("wrote", "writers", "strategy", "ranks", "goes_on"),
    [
        (DDP, 1, DDP, 1, True),
        (DDP, 1, DDP, 8, True),
        (DDP, 8, DDP, 1, True),
        (FSDP, 2, FSDP, 2, True),
        (FSDP, 2, FSDP, 4, True),
        (ZERO, 2, ZERO, 2, True),
        (ZERO, 2, ZERO, 4, False),
        (ZERO, 2, Strategy.zero3, 2, False),
        (ZERO, 2, DDP, 1, False),
        (DDP, 2, FSDP, 2, False),
        (DDP, 1, ZERO, 2, False),
        (FSDP, 2, DDP, 1, False),
    ],
)
def test_who_can_go_on_from_what(
    tmp_path: Path, wrote: Strategy, writers: int, strategy: Strategy, ranks: int, goes_on: bool
) -> None:
    checkpoint = write(tmp_path, 4, wrote, writers)
    if goes_on:
        assert checkpoints.last_checkpoint(tmp_path, strategy, ranks) == checkpoint
        return
    with pytest.raises(ConfigError) as said:
        checkpoints.last_checkpoint(tmp_path, strategy, ranks)
    sentence = str(said.value)
    assert f"written with launch.strategy={wrote} by {writers} rank" in sentence
    assert f"launch.strategy={strategy} by {ranks};" in sentence and f"delete {tmp_path}" in sentence
    assert (checkpoint / checkpoints.SEAL).is_file()  # nothing is lost


def test_the_way_back_is_said(tmp_path: Path) -> None:
    write(tmp_path, 4, ZERO, 2)
    with pytest.raises(ConfigError, match=r"set launch\.strategy=zero2, with 2 ranks in all, or delete"):
        checkpoints.last_checkpoint(tmp_path, ZERO, 4)


def test_what_served_a_resume_alone_is_gone_at_the_end(tmp_path: Path) -> None:
    folder = tmp_path / checkpoints.CHECKPOINTS
    plain = write(folder, 2)
    shards = ("shards/.metadata", "shards/__0_0.distcp", "schedule.json", "rng_state_0.pth")
    write(folder, 4, FSDP, 2, shards)
    write(folder, 6, ZERO, 2, ("global_step6/zero_pp_rank_0_optim_states.pt", "latest"))
    checkpoints.write_before(tmp_path, {"loss": 1.0})
    checkpoints.tidy(tmp_path)
    left = sorted(
        path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()
    )
    at = plain.relative_to(tmp_path).as_posix()
    assert left == [f"{at}/model.safetensors", f"{at}/trainer_state.json"]
