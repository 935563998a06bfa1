"""What a plan says of memory, time and cost."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ftpipe import cli, provenance
from ftpipe.choices import Device, Gpu, Method, Precision
from ftpipe.errors import ConfigError
from ftpipe.fit import show
from ftpipe.fit.gpus import CARDS, seen
from tests.unit.fit.made import run

H100 = "NVIDIA H100 80GB HBM3, 570.00, 81559 MiB"


def test_every_gpu_has_a_card_and_its_name_its_memory() -> None:
    assert set(CARDS) == set(Gpu)
    for gpu, card in CARDS.items():
        named = re.search(r"-(\d+)g$", gpu)
        if named:
            assert 0.9 * int(named[1]) < card.memory <= int(named[1])
        assert 0 < card.usable < card.memory * 2**30


@pytest.mark.parametrize(
    ("line", "name"),
    [
        (H100, "h100"),
        ("NVIDIA H100 PCIe, 570.00, 81559 MiB", "h100-pcie"),
        ("NVIDIA H200, 570.00, 143771 MiB", "h200"),
        ("NVIDIA GeForce RTX 4090, 1, 24564 MiB", "rtx-4090"),
        ("NVIDIA GeForce RTX 3090, 1, 24576 MiB", "rtx-3090"),
        ("NVIDIA A10G, 1, 23028 MiB", "a10g"),
        ("NVIDIA A100-SXM4-80GB, 1, 81920 MiB", "a100-80g"),
        ("NVIDIA A100-SXM4-40GB, 1, 40960 MiB", "a100-40g"),
        ("NVIDIA L40S, 1, 46068 MiB", "l40s"),
        ("NVIDIA L4, 1, 23034 MiB", "l4"),
        ("Tesla V100-SXM2-16GB, 1, 16384 MiB", "v100-16g"),
        ("Tesla T4, 1, 15360 MiB", "t4"),
    ],
)
def test_a_gpu_is_known_by_what_nvidia_smi_says(line: str, name: str) -> None:
    found = seen(line)
    assert found is not None
    assert found[0] == name
    memory = line.rsplit(",", 1)[1].strip().removesuffix(" MiB")
    assert found[1].memory == pytest.approx(int(memory) / 1024)
    assert found[1].memory == pytest.approx(CARDS[Gpu(name)].memory, abs=0.05)


def test_an_unknown_gpu_has_its_memory_and_no_speed() -> None:
    found = seen("NVIDIA Something 9000, 1, 10240 MiB")
    assert found is not None and found[1].memory == 10 and found[1].half == 0
    assert seen("GPU-1234") is None


@pytest.mark.parametrize(
    "name",
    [
        *("NVIDIA H100 NVL", "NVIDIA H200 NVL", "Tesla V100-PCIE-16GB", "NVIDIA GeForce RTX 3090 Ti"),
        *("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D"),
    ],
)
def test_one_of_another_speed_is_not_taken_for_the_one_it_is_named_after(name: str) -> None:
    found = seen(f"{name}, 1, 16384 MiB")
    assert found is not None
    assert (found[0], found[1].memory, found[1].half, found[1].single) == (name, 16, 0, 0)
    assert found[1].bf16 is ("V100" not in name)


@pytest.mark.parametrize(
    ("gpu", "precision", "tf32", "speed"),
    [  # data sheets of A100 (312 in bf16, 156 in TF32, 19.5 in FP32) and T4 (65 in FP16, 8.1 in FP32)
        (Gpu.a100_80g, Precision.bf16, True, 312.0),
        (Gpu.a100_80g, Precision.fp16, False, 312.0),
        (Gpu.a100_80g, Precision.fp32, True, 156.0),
        (Gpu.a100_80g, Precision.fp32, False, 19.5),
        (Gpu.t4, Precision.fp16, True, 65.0),
        (Gpu.t4, Precision.fp32, True, 8.1),
        (Gpu.t4, Precision.bf16, True, 0.0),
        (Gpu.t4, Precision.auto, True, 0.0),
    ],
)
def test_a_speed_is_that_of_the_precision(
    gpu: Gpu, precision: Precision, tf32: bool, speed: float
) -> None:
    assert CARDS[gpu].speed(precision, tf32) == speed


def test_a_plan_in_bf16_on_a_gpu_without_it_says_so() -> None:
    cfg = run(Method.qlora, launch__gpu="t4", sft__max_steps=3)
    said = "\n".join(show.lines(cfg, ["sft"], None))
    assert "; it has no bf16: set launch.precision=fp16" in said and "time" not in said
    cfg.launch.precision = Precision.fp16
    said = "\n".join(show.lines(cfg, ["sft"], None))
    assert "no bf16" not in said and "; time at 35% of its peak speed" in said


def test_what_dora_needs_is_said_to_be_left_out() -> None:
    assert show.DORA in show.lines(run(Method.lora, adapter__dora=True), ["sft"], None)
    assert show.DORA not in show.lines(run(Method.lora), ["sft"], None)
    assert show.DORA not in show.lines(run(Method.full, adapter__dora=True), ["sft"], None)


def test_a_run_is_judged_on_the_gpu_that_is_named_or_else_on_the_machine_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(provenance, "gpus", lambda: [H100])
    cfg = run()
    found = show.card_of(cfg)
    assert found is not None and found[0] == "h100"
    cfg.launch.gpu = "t4"
    found = show.card_of(cfg)
    assert found is not None and found == ("t4", CARDS[Gpu.t4])
    cfg.launch.gpu, cfg.launch.device = None, Device.cpu
    assert show.card_of(cfg) is None


def test_a_stage_that_fits_and_one_that_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["recipe=qlora-llama7b", "launch.gpu=rtx-4090", "launch.gpu_price=2"]
    assert cli.main(["plan", *words]) == 0
    said = capsys.readouterr().out
    assert "sft    6,898,323,456  159,907,840  2.32%" in said  # PEFT's count of Guanaco's adapter
    assert "sft fits, with" in said
    # 1,875 steps of 16 rows of 513 tokens
    assert re.search(r"sft    1,875  <= 15\.4 M .* h  +\d+\.\d\d", said)
    assert cli.main(["plan", *words, "adapter=full", "launch.gpu=t4"]) == 0
    assert re.search(r"sft: [\d.]+ GiB do not fit; [\d.]+ do with \S+=", capsys.readouterr().out)


def test_without_a_gpu_numbers_are_shown_and_nothing_is_judged(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["plan", "recipe=tiny"]) == 0
    said = capsys.readouterr().out
    assert "139,840" in said and "at the peak" in said
    assert "fits" not in said and "do not fit" not in said


def test_an_architecture_that_is_not_in_the_table_ends_no_plan() -> None:
    cfg = run()
    cfg.model.architecture = {"model_type": "rwkv"}
    (line,) = show.lines(cfg, ["prepare", "sft"], None)
    assert line.startswith("sizes: not known: the architecture 'rwkv' is not in the table")
    assert show.lines(cfg, ["prepare"], None) == []


def test_a_target_that_names_no_module_is_refused_in_the_plan() -> None:
    cfg = run(Method.lora, adapter__targets=["q_prj"])
    with pytest.raises(ConfigError, match=r"adapter.targets: llama has no module 'q_prj'"):
        show.lines(cfg, ["sft"], None)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("launch.gpu=h10", "launch.gpu: no GPU 'h10'. Did you mean 'h100'?"),
        ("launch.gpu_price=-1", "launch.gpu_price=-1.0 is out of range"),
        ("launch.utilization=0", "launch.utilization=0.0 is out of range"),
    ],
)
def test_what_makes_no_sense_is_refused(
    word: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", "recipe=tiny", word]) == 2
    assert said in capsys.readouterr().err


def test_a_local_model_is_read_by_its_own_configuration(tmp_path: Path) -> None:
    from ftpipe.fit.model import model_of

    cfg = run()
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    cfg.model.path = str(tmp_path)
    assert model_of(cfg.model).shape.total == 124_439_808
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        model_of(cfg.model)


def test_a_hub_model_that_nobody_described_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    from ftpipe.fit.model import model_of

    monkeypatch.setenv("HF_HUB_CACHE", "/nowhere")
    cfg = run()
    cfg.model.architecture = {}
    with pytest.raises(ConfigError, match="nothing here says how large someone/llama is"):
        model_of(cfg.model)


def test_the_hub_s_copy_of_a_configuration_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ftpipe.fit.model import model_of

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    cfg = run()
    folder = tmp_path / "models--someone--llama" / "snapshots" / str(cfg.model.revision)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    assert model_of(cfg.model).shape.kind == "gpt2"


@pytest.mark.slow
def test_a_recipe_s_own_gpu_is_as_good_as_one_on_the_command_line(
    empty_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "gpus", list)
    recipe = empty_folder / "recipes" / "own.yaml"
    recipe.parent.mkdir()
    recipe.write_text("defaults:\n  - tiny\n\nlaunch:\n  gpu: h100\n  processes: 2\n")
    assert cli.main(["plan", "recipe=own"]) == 0
    said = capsys.readouterr().out
    assert "on h100: " in said and "device: cuda" in said
    assert cli.main(["plan", "recipe=own", "launch.gpu=null", "launch.processes=1"]) == 0
    said = capsys.readouterr().out
    assert "on h100: " not in said and "device: cpu" in said
    assert cli.main(["plan", "recipe=own", "launch.device=cpu"]) == 0
    assert "device: cpu" in capsys.readouterr().out
