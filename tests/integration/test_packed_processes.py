"""Packed sequences and new tokens in real processes: two ranks as one, killed in a later epoch."""

from __future__ import annotations

import json
import math
import signal
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ftpipe import artifacts
from ftpipe.choices import Part, Use
from ftpipe.data import table
from tests.integration.test_processes import (
    _wait_for,
    _wait_until_gone,
    command,
    ftpipe,
    policy,
    prepared,
    weights,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("empty_folder")]

STEPS = 12
WORDS = (
    *("sft", "recipe=tiny", "sft.samples=0", f"sft.max_steps={STEPS}", "launch.threads=1"),
    *("data=own", "data.sources={a: {format: alpaca, path: 'sample:alpaca.json'}}"),
    *("data.template=oasst", "model.new_tokens=['<|prompter|>','<|assistant|>']", "data.validation=7"),
    *("data.packing=true", "data.max_length=200", "data.over_length=drop", "data.max_lost=0.5"),
    *("launch.micro_batch_size=2", "sft.log_every=1", "sft.save_every=2", "sft.keep_checkpoints=20"),
)
LATER = "outputs/artifacts/sft-*.partial/checkpoints/checkpoint-10/whole.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Runs that nothing interrupts, by their number of ranks; dropout off: each rank draws its own."""
    folders = {}
    for ranks in (1, 2):
        folders[ranks] = tmp_path_factory.mktemp(f"ranks{ranks}")
        if ranks == 2:
            prepared(folders[1], folders[2])
        words = (*WORDS, "adapter.dropout=0", f"launch.processes={ranks}")
        done = ftpipe(folders[ranks], *words)
        assert done.returncode == 0, done.stderr
    return folders


def logged(folder: Path, name: str) -> list[float]:
    lines = (policy(folder) / "metrics.jsonl").read_text().splitlines()
    return [line[name] for line in map(json.loads, lines) if name in line]


def test_two_ranks_train_on_packed_rows_as_one_does(whole: dict[int, Path]) -> None:
    (manifest,) = whole[1].glob("outputs/artifacts/prepare-*/manifest.json")
    dataset = manifest.parent
    lengths = table.read(dataset, Use.demonstrations, Part.train)["length"]
    ledger = json.loads((dataset / "ledger.json").read_text())
    per_epoch = math.ceil(ledger["packing"]["sequences"] / 8)
    assert per_epoch < 10 and ledger["packing"]["sequences"] % 8  # so that both could go wrong
    one, two = (logged(whole[ranks], "sft/loss") for ranks in (1, 2))
    assert len(one) == STEPS
    assert two == pytest.approx(one, rel=1e-4)
    seen = [logged(whole[ranks], "sft/tokens") for ranks in (1, 2)]
    assert seen[0] == seen[1]
    assert seen[0][per_epoch - 1] == sum(lengths)  # every token once, and no padding
    first, second = (load_file(policy(whole[n]) / "adapter_model.safetensors") for n in (1, 2))
    assert {"token_adapter.trainable_tokens_delta" in name for name in first} == {False, True}
    for name, weight in first.items():
        assert (weight - second[name]).abs().max() < 1e-3, name


def test_two_ranks_killed_in_the_second_epoch_end_with_the_same_bytes(
    whole: dict[int, Path], tmp_path: Path
) -> None:
    words = (*WORDS, "adapter.dropout=0", "launch.processes=2")
    prepared(whole[2], tmp_path)
    process = subprocess.Popen(
        command(*words), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _wait_for(tmp_path, LATER)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _wait_until_gone(tmp_path)
    assert not list(tmp_path.glob("outputs/artifacts/sft-*/manifest.json"))
    again = ftpipe(tmp_path, *words)
    assert again.returncode == 0, again.stderr
    assert "continuing from checkpoint-1" in again.stdout
    assert weights(tmp_path) == weights(whole[2])
    for name in ("held_out_loss", "held_out_loss_before", "loss_last", "tokens"):
        ours, theirs = (artifacts.open_artifact(policy(root)).metrics for root in (tmp_path, whole[2]))
        assert ours[name] == theirs[name]
