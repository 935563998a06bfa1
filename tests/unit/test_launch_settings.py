"""What accelerate and DeepSpeed are told of each strategy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from ftpipe import launch_settings
from ftpipe.choices import Device, Method, Offload, Precision, Strategy
from ftpipe.config import RunConfig
from ftpipe.launch import environment, launch_command

ZERO = (Strategy.zero1, Strategy.zero2, Strategy.zero3)


def told(cfg: RunConfig, folder: Path, processes: int = 2) -> dict[str, object]:
    file = folder / "accelerate.yaml"
    launch_command(cfg, processes, file, folder / "job.json")
    found: dict[str, object] = yaml.safe_load(file.read_text())
    return found


@pytest.mark.parametrize(("strategy", "stage"), [*zip(ZERO, (1, 2, 3), strict=True)])
def test_deepspeed_is_told_its_stage_in_a_file_beside(
    cfg: RunConfig, tmp_path: Path, strategy: Strategy, stage: int
) -> None:
    cfg.launch.strategy = strategy
    said = told(cfg, tmp_path)
    assert said["distributed_type"] == "DEEPSPEED" and "mixed_precision" not in said
    settings = said["deepspeed_config"]
    assert isinstance(settings, dict)
    assert settings["deepspeed_config_file"] == str(tmp_path / "deepspeed.json")
    found = json.loads((tmp_path / "deepspeed.json").read_text())
    assert found["zero_optimization"]["stage"] == stage
    # DeepSpeed's own 16 bits would be another training than without it
    assert not {"bf16", "fp16", "torch_autocast"} & found.keys()


@pytest.mark.parametrize("strategy", ZERO)
def test_the_settings_are_ones_that_deepspeed_takes(cfg: RunConfig, strategy: Strategy) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    cfg.launch.strategy, cfg.launch.device = strategy, Device.cuda
    cfg.launch.sharding.offload_optimizer = Offload.cpu
    zero = launch_settings.deepspeed(cfg)["zero_optimization"]
    read = DeepSpeedZeroConfig(**zero)
    assert read.stage == launch_settings.STAGES[strategy]
    assert read.reduce_bucket_size == cfg.launch.sharding.bucket
    assert read.offload_optimizer.device == "cpu" and read.offload_optimizer.pin_memory
    assert read.overlap_comm


def test_what_is_offloaded_to_a_disk_has_its_folder(cfg: RunConfig) -> None:
    cfg.launch.strategy = Strategy.zero3
    sharding = cfg.launch.sharding
    sharding.offload_parameters, sharding.nvme = Offload.nvme, "/scratch"
    found = launch_settings.deepspeed(cfg)
    assert found["zero_optimization"]["offload_param"] == {
        "device": "nvme",
        "pin_memory": False,
        "nvme_path": "/scratch",
    }
    assert "offload_optimizer" not in found["zero_optimization"] and found["aio"]["block_size"] == 2**20


def test_products_are_rounded_by_autocast(cfg: RunConfig) -> None:
    cfg.launch.strategy, cfg.launch.precision = Strategy.zero2, Precision.bf16
    assert launch_settings.deepspeed(cfg)["torch_autocast"] == {
        "enabled": True,
        "dtype": "bfloat16",
        "lower_precision_safe_modules": [],
    }


@pytest.mark.parametrize(("method", "whole"), [(Method.full, True), (Method.lora, False)])
def test_small_weights_stay_whole_where_all_are_of_one_dtype(
    cfg: RunConfig, method: Method, whole: bool
) -> None:
    cfg.launch.strategy, cfg.adapter.method = Strategy.zero3, method
    zero = launch_settings.deepspeed(cfg)["zero_optimization"]
    assert (zero["stage3_param_persistence_threshold"] > 0) is whole


@pytest.mark.parametrize("strategy", Strategy)
def test_one_process_shares_nothing(cfg: RunConfig, tmp_path: Path, strategy: Strategy) -> None:
    cfg.launch.strategy = strategy
    assert launch_settings.shared_out(cfg, 1, tmp_path) == {}
    assert not (tmp_path / "deepspeed.json").exists()


@pytest.mark.parametrize("strategy", [Strategy.ddp, Strategy.fsdp])
def test_fsdp_starts_plain_ranks(cfg: RunConfig, tmp_path: Path, strategy: Strategy) -> None:
    cfg.launch.strategy = strategy
    assert told(cfg, tmp_path)["distributed_type"] == "MULTI_GPU"


@pytest.mark.parametrize("strategy", Strategy)
@pytest.mark.parametrize("processes", [1, 2])
def test_accelerate_is_not_told_of_a_cpu_where_it_would_leave_deepspeed_out(
    cfg: RunConfig, strategy: Strategy, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    cfg.launch.strategy = strategy
    found = environment(cfg, processes)
    assert ("ACCELERATE_USE_CPU" in found) is (processes == 1 or strategy not in ZERO)
    assert found["DS_ACCELERATOR"] == "cpu"


@pytest.mark.parametrize(
    ("world", "strategy", "expected"),
    [
        ("1", Strategy.zero3, (Strategy.ddp, 1)),
        ("2", Strategy.zero3, (Strategy.zero3, 2)),
        ("8", Strategy.ddp, (Strategy.ddp, 8)),
        (None, Strategy.fsdp, (Strategy.ddp, 1)),
    ],
)
def test_a_rank_alone_shares_nothing(
    cfg: RunConfig,
    monkeypatch: pytest.MonkeyPatch,
    world: str | None,
    strategy: Strategy,
    expected: tuple[Strategy, int],
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world is not None:
        monkeypatch.setenv("WORLD_SIZE", world)
    cfg.launch.strategy = strategy
    assert launch_settings.in_force(cfg.launch) == expected
