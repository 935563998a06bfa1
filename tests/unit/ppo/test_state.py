"""A training that is interrupted and one that is not end in the same bits; half a checkpoint is none."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments, get_scheduler

from ftpipe.choices import Optimizer, Scheduler
from ftpipe.errors import ConfigError
from ftpipe.ppo import state
from ftpipe.ppo.state import Progress
from ftpipe.training import OPTIMIZERS

STEPS = 6
# one that bitsandbytes holds in 8 bits (4,096 numbers or more), and a vector, which it does not
SHAPES = {"policy/matrix": (64, 80), "policy/vector": (5,), "value/half": (3, 2)}


class Training:
    """Weights with an optimiser and a schedule as the stage makes them, and noise for gradients."""

    def __init__(
        self, folder: Path, kind: Optimizer = Optimizer.adamw, scheduler: Scheduler = Scheduler.cosine
    ) -> None:
        torch.manual_seed(0)
        self.weights = {
            name: torch.nn.Parameter(
                torch.randn(shape, dtype=torch.bfloat16 if "half" in name else torch.float32)
            )
            for name, shape in SHAPES.items()
        }
        given: dict[str, Any] = {
            "output_dir": str(folder),
            "optim": OPTIMIZERS[kind],
            "adam_beta1": 0.8,
            "use_cpu": True,
            "report_to": "none",
        }
        made, options = Trainer.get_optimizer_cls_and_kwargs(TrainingArguments(**given))
        groups = [
            {"params": [w for name, w in self.weights.items() if name.startswith(role)], "lr": rate}
            for role, rate in (("policy", 0.1), ("value", 0.3))
        ]
        self.optimizer: torch.optim.Optimizer = made(groups, **options)
        warm = 0 if scheduler is Scheduler.constant else 2
        self.schedule = get_scheduler(str(scheduler), self.optimizer, warm, num_training_steps=STEPS)

    def steps(self, *numbers: int) -> Training:
        for number in numbers:
            generator = torch.Generator().manual_seed(number)
            for weight in self.weights.values():
                noise = torch.randn(weight.shape, generator=generator)
                weight.grad = noise.to(weight.dtype)
            self.optimizer.step()
            self.schedule.step()
        return self

    def save(self, folder: Path, progress: Progress | None = None, keep: int = 2) -> None:
        shown = progress or Progress()
        state.save(folder, shown, self.weights, self.optimizer.state_dict(), self.schedule, keep)

    def restore(self, folder: Path) -> Progress:
        return state.restore(folder, self.weights, self.optimizer, self.schedule)


def every_tensor(held: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(held, dict | list | tuple):
        pairs = held.items() if isinstance(held, dict) else enumerate(held)
        for name, value in pairs:
            yield from every_tensor(value, f"{path}/{name}")
    else:
        yield path, held


def same(one: Training, other: Training) -> None:
    for (name, a), b in zip(one.weights.items(), other.weights.values(), strict=True):
        assert torch.equal(a, b), name
    ours, theirs = (dict(every_tensor(each.optimizer.state_dict())) for each in (one, other))
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, theirs[path]) and value.dtype == theirs[path].dtype, path
        else:
            assert value == theirs[path], path
    assert one.schedule.state_dict() == other.schedule.state_dict()


@pytest.mark.parametrize("kind", Optimizer)
def test_an_interrupted_training_ends_in_the_same_bits(kind: Optimizer, tmp_path: Path) -> None:
    whole = Training(tmp_path, kind).steps(*range(STEPS))
    for done in (1, 3):
        checkpoint = tmp_path / f"checkpoint-{done}"
        Training(tmp_path, kind).steps(*range(done)).save(checkpoint)
        again = Training(tmp_path, kind)
        with torch.no_grad():
            for weight in again.weights.values():
                weight.fill_(9)
        again.restore(checkpoint)
        same(again, Training(tmp_path, kind).steps(*range(done)))
        same(again.steps(*range(done, STEPS)), whole)


@pytest.mark.parametrize("scheduler", Scheduler)
def test_the_learning_rate_goes_on_where_it_was(scheduler: Scheduler, tmp_path: Path) -> None:
    def rates(training: Training) -> list[list[float]]:
        return [training.steps(0).schedule.get_last_lr() for _ in range(3)]

    uninterrupted = Training(tmp_path, scheduler=scheduler).steps(0, 0)
    uninterrupted.save(tmp_path / "checkpoint-2")
    again = Training(tmp_path, scheduler=scheduler)
    again.restore(tmp_path / "checkpoint-2")
    assert again.optimizer.param_groups[0]["lr"] == uninterrupted.optimizer.param_groups[0]["lr"]
    assert rates(again) == rates(uninterrupted)


def test_a_checkpoint_before_the_first_step_is_one_too(tmp_path: Path) -> None:
    fresh = Training(tmp_path)
    fresh.save(tmp_path / "checkpoint-0")
    again = Training(tmp_path).steps(4, 5)
    again.restore(tmp_path / "checkpoint-0")
    same(again, fresh)
    same(again.steps(*range(STEPS)), Training(tmp_path).steps(*range(STEPS)))


def test_a_checkpoint_with_other_groups_of_weights_is_refused(tmp_path: Path) -> None:
    Training(tmp_path).steps(1).save(tmp_path / "checkpoint-1")
    other = Training(tmp_path)
    other.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
    before = {name: weight.clone() for name, weight in other.weights.items()}
    with pytest.raises(ConfigError, match=r"written under another launch\.strategy; set the one"):
        other.restore(tmp_path / "checkpoint-1")
    assert all(torch.equal(weight, before[name]) for name, weight in other.weights.items())


def test_how_far_a_run_is_comes_back_whole(tmp_path: Path) -> None:
    progress = Progress(
        rollouts=7,
        tokens=12_345_678_901,
        updates=56,
        kl={"beta": 0.1 + 0.2},
        health={"first": {"entropy": 1 / 3, "eos_rate": 0.0}, "bad": {"kl": 2, "entropy": 0}},
        first={"score": -1e-17},
        last={"score": math.pi, "kl": 2.0},
    )
    training = Training(tmp_path).steps(1)
    training.save(tmp_path / "checkpoint-7", progress)
    assert Training(tmp_path).restore(tmp_path / "checkpoint-7") == progress


def test_a_checkpoint_holds_safetensors_and_json(tmp_path: Path) -> None:
    Training(tmp_path, Optimizer.adamw_8bit).steps(1).save(tmp_path / "checkpoint-1")
    found = sorted(path.name for path in (tmp_path / "checkpoint-1").iterdir())
    assert found == ["optimizer.safetensors", "state.json", "trained.safetensors", "whole.json"]
    for name in (found[0], found[2]):
        with open(tmp_path / "checkpoint-1" / name, "rb") as file:
            size = int.from_bytes(file.read(8), "little")  # safetensors: a header of JSON
            assert json.loads(file.read(size))
    json.loads((tmp_path / "checkpoint-1" / "state.json").read_text())


def test_the_newest_checkpoint_is_the_one_of_the_highest_number(tmp_path: Path) -> None:
    assert state.last(tmp_path) is None
    assert state.last(tmp_path / "none") is None
    training = Training(tmp_path)
    for number in (10, 9, 2):
        training.save(tmp_path / f"checkpoint-{number}", keep=5)
    assert state.last(tmp_path) == tmp_path / "checkpoint-10"


def test_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    training = Training(tmp_path)
    for number in range(8, 13):
        training.save(tmp_path / f"checkpoint-{number}", keep=3)
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{n}" for n in (10, 11, 12)}
    training.save(tmp_path / "ended-12", keep=1)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-12", "ended-12"}


def test_the_state_of_a_run_that_was_ended_is_not_resumed_but_can_be_read(tmp_path: Path) -> None:
    training = Training(tmp_path).steps(1, 2)
    training.save(tmp_path / "ended-5")
    assert state.last(tmp_path) is None
    again = Training(tmp_path)
    again.restore(tmp_path / "ended-5")
    same(again, training)


def test_half_a_checkpoint_is_never_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(tmp_path).steps(1)
    training.save(tmp_path / "checkpoint-1")
    before = {path.name: path.read_bytes() for path in (tmp_path / "checkpoint-1").iterdir()}
    training.steps(2)
    # killed at each of the writes, the last one with all files there but under another name
    for name in ("save_file", "write_atomic"):
        with monkeypatch.context() as patched:
            patched.setattr(state, name, killed)
            with pytest.raises(KeyboardInterrupt):
                training.save(tmp_path / "checkpoint-2")
        assert state.last(tmp_path) == tmp_path / "checkpoint-1"
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            training.save(tmp_path / "checkpoint-2")
    assert state.last(tmp_path) == tmp_path / "checkpoint-1"
    assert {path.name: path.read_bytes() for path in (tmp_path / "checkpoint-1").iterdir()} == before
    # the next attempt clears up
    training.save(tmp_path / "checkpoint-2")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-2"}
    again = Training(tmp_path)
    again.restore(tmp_path / "checkpoint-2")
    same(again, training)


def killed(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_folder_that_lost_its_last_file_is_none(tmp_path: Path) -> None:
    training = Training(tmp_path).steps(1)
    training.save(tmp_path / "checkpoint-1")
    shutil.copytree(tmp_path / "checkpoint-1", tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / "state.json").unlink()
    assert state.last(tmp_path) == tmp_path / "checkpoint-1"


def test_a_flipped_bit_sends_the_run_back_to_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = Training(tmp_path).steps(1)
    for number in (1, 2):
        training.save(tmp_path / f"checkpoint-{number}")
    flip(tmp_path / "checkpoint-2" / "optimizer.safetensors")
    assert state.last(tmp_path) == tmp_path / "checkpoint-1"
    assert "checkpoint-2 is damaged (optimizer.safetensors is not as" in capsys.readouterr().out


def flip(path: Path) -> None:
    """Change one bit in the middle, and nothing else."""
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)


def test_what_is_left_of_a_killed_write_is_not_in_the_next_one(tmp_path: Path) -> None:
    (tmp_path / "partial-checkpoint-3").mkdir()
    (tmp_path / "partial-checkpoint-3" / "junk").write_text("")
    Training(tmp_path).save(tmp_path / "checkpoint-3")
    assert not (tmp_path / "checkpoint-3" / "junk").exists()


def test_a_checkpoint_of_the_same_number_is_replaced(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.save(tmp_path / "checkpoint-3")
    training.steps(1).save(tmp_path / "checkpoint-3")
    again = Training(tmp_path)
    again.restore(tmp_path / "checkpoint-3")
    same(again, training)


def test_other_weights_are_not_taken(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.save(tmp_path / "checkpoint-1")
    training.weights["value/more"] = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(AssertionError, match="no other model"):
        training.restore(tmp_path / "checkpoint-1")


def test_weights_that_share_memory_are_written_each(tmp_path: Path) -> None:
    # safetensors refuses tensors that share memory, as tied embeddings do
    training, whole = Training(tmp_path), torch.arange(6.0)
    tied = {"policy/in": whole, "policy/out": whole.view(2, 3).T}
    state.save(
        tmp_path / "checkpoint-1",
        Progress(),
        tied,
        training.optimizer.state_dict(),
        training.schedule,
        1,
    )
    held = {"policy/in": torch.zeros(6), "policy/out": torch.zeros(3, 2)}
    state.restore(tmp_path / "checkpoint-1", held, training.optimizer, training.schedule)
    assert held["policy/in"].tolist() == [0, 1, 2, 3, 4, 5]
    assert list(itertools.chain(*held["policy/out"].tolist())) == [0, 3, 1, 4, 2, 5]
