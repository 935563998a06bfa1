"""Predicted peaks beside those that PyTorch's profiler of memory sees in real stages."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
RESULT = BENCHMARKS / "results" / "memory-cpu.json"
BOUND = 0.1
# Those that take a minute where products in bf16 are emulated; the record has all 23.
SMALL = ("sft-full-8bit", "sft-full-fp32")


@pytest.fixture(scope="module")
def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("memory", BENCHMARKS / "memory.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.mark.slow
def test_the_record_holds_what_the_formulas_say_now(benchmark: Any) -> None:
    record = json.loads(RESULT.read_text())
    rows = {row["setting"]: row for row in record["settings"]}
    assert set(rows) == set(benchmark.SETTINGS)
    for name, row in rows.items():
        told = benchmark.predicted(name, gpu=False)["predicted"]
        assert told == pytest.approx(row["predicted"])
        assert abs(told / row["peak"] - 1) <= BOUND, name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft-lora", "dpo-one-adapter", "dpo-two-adapters", "ppo-lora"])
def test_a_setting_has_rows_for_each_of_its_stages(name: str, benchmark: Any) -> None:
    from ftpipe.data.uses import uses
    from ftpipe.fit.extent import use_of
    from ftpipe.resolve import resolved

    (run,) = resolved(benchmark.words_of(benchmark.SETTINGS[name], Path("rows.jsonl"), False))
    (source,) = run.cfg.data.sources.values()
    needed = {use_of(run.cfg, stage) for stage in run.cfg.stages if stage != "prepare"}
    assert set(uses(source)) == needed


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_peak_is_as_predicted(name: str, benchmark: Any) -> None:
    before = RESULT.read_bytes()
    command = [sys.executable, str(BENCHMARKS / "memory.py"), "--dry", "--only", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert RESULT.read_bytes() == before
    (line,) = [line for line in done.stdout.splitlines() if " predicted " in line]
    error = float(line.split("error")[1].split("%")[0]) / 100
    assert abs(error) <= BOUND, line
