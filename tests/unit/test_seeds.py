"""Several seeds as one thing: each a run of its own, their metrics with mean and deviation."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from ftpipe import cli, seeds
from ftpipe.config import RunConfig

pytestmark = pytest.mark.usefixtures("empty_folder")


def test_each_seed_is_a_run_like_any_other(cfg: RunConfig) -> None:
    cfg.seed, cfg.seeds = 5, 3
    found = seeds.each(cfg)
    assert [(one.seed, one.seeds) for one in found] == [(5, 1), (6, 1), (7, 1)]
    assert cfg.seeds == 3
    cfg.seeds = 1
    assert seeds.each(cfg) == [cfg]


@pytest.mark.parametrize("value", [0, -1, 1001])
def test_a_number_of_seeds_that_cannot_be_is_refused(
    value: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", "recipe=tiny", f"seeds={value}"]) == 2
    assert f"seeds={value}" in capsys.readouterr().err


def test_the_deviation_is_that_of_a_sample() -> None:
    values = [1.0, 2.0, 4.0, 8.0]
    assert seeds.deviation(values) == pytest.approx(np.std(values, ddof=1))
    assert math.isnan(seeds.deviation([1.0, math.inf]))


@pytest.mark.usefixtures("in_process")
def test_all_seeds_run_and_are_reported_as_one(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["prepare", "recipe=tiny", "seeds=2", "seed=3"]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert "== run 2 of 2" in shown and "2 seeds (3 to 4): mean ± standard deviation" in shown
    (path,) = Path("outputs/runs").glob(f"*/{seeds.SPREAD}")
    told = json.loads(path.read_text())
    assert told["seeds"] == [3, 4] and len(told["runs"]) == 2
    each = [
        json.loads(manifest.read_text())["metrics"]
        for manifest in Path("outputs/artifacts").glob("prepare-*/manifest.json")
    ]
    assert len(each) == 2  # each with data of its own: what is held out is drawn by the seed
    for name, value in told["metrics"].items():
        stage, _, metric = name.partition("/")
        if stage == "prepare":
            of = [one[metric] for one in each]
            assert sorted(value["values"]) == sorted(of)
            assert value["mean"] == pytest.approx(np.mean(of))
            assert value["sd"] == pytest.approx(np.std(of, ddof=1))
    # again: nothing runs, and the table is the same
    assert cli.main(words) == 0
    again = capsys.readouterr().out
    assert "nothing ran" in again
    assert again[again.index("2 seeds (") :] == shown[shown.index("2 seeds (") :]


def test_inspect_shows_one_dataset(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "recipe=tiny", "seeds=2"]) == 2
    assert "inspect shows one dataset" in capsys.readouterr().err
