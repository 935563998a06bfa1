"""The curves of a run: what is drawn is what its metrics say, and the same give the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from ftpipe.ppo import plots

METRICS = ("score", "kl", "length", "eos_rate", "entropy", "repeated", "clip_fraction")


def lines() -> list[dict[str, float]]:
    """Return what the tracker writes: held-out measures, four rollouts, held-out measures."""
    found: list[dict[str, float]] = [{"step": 0, "ppo/held_out_score": 0.25, "ppo/held_out_kl": 0.0}]
    for step in range(1, 5):
        values = {f"ppo/{name}": step * (at + 1) / 10 for at, name in enumerate(METRICS)}
        found.append({"step": step, **values, "ppo/seconds_rollout": 3.0})
    found[2]["ppo/explained_variance"] = 0.5  # not finite in the others, so left out of them
    found.append({"step": 4, "ppo/held_out_score": 0.75, "ppo/held_out_kl": 2.0})
    return found


def written(folder: Path, found: list[dict[str, float]]) -> Path:
    folder.mkdir(exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in found)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    plots.write(folder)
    return folder / "curves.png"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Return a list to which each figure is added that is saved."""
    saved: list[Figure] = []
    plain = Figure.savefig

    def watched(self: Figure, *args: Any, **rest: Any) -> None:
        saved.append(self)
        plain(self, *args, **rest)

    monkeypatch.setattr(Figure, "savefig", watched)
    return saved


def points(axes: Axes, label: str) -> list[tuple[float, float]]:
    return [
        (x, y)
        for line in axes.lines
        if line.get_label() == label
        for x, y in np.asarray(line.get_xydata()).tolist()
    ]


def test_every_metric_is_a_curve_and_held_out_ones_are_dots(tmp_path: Path, drawn: list[Figure]) -> None:
    written(tmp_path, lines())
    (figure,) = drawn
    by_label = {axes.get_ylabel(): axes for axes in figure.axes}
    shown = [*METRICS, "explained_variance"]
    assert list(by_label) == [plots.SHOWN[name] for name in plots.SHOWN if name in shown]
    for at, name in enumerate(METRICS):
        axes = by_label[plots.SHOWN[name]]
        want = [(step, step * (at + 1) / 10) for step in range(1, 5)]
        assert points(axes, "rollouts") == want
        assert axes.get_xlabel() == "rollouts"
    assert points(by_label["explained variance"], "rollouts") == [(2, 0.5)]
    score = by_label["score"]
    assert points(score, "held-out prompts") == [(0, 0.25), (4, 0.75)]
    assert points(by_label[plots.SHOWN["kl"]], "held-out prompts") == [(0, 0.0), (4, 2.0)]
    legend = score.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["rollouts", "held-out prompts"]
    assert by_label[plots.SHOWN["entropy"]].get_legend() is None


def test_a_run_of_one_metric_and_one_rollout_has_a_curve(tmp_path: Path, drawn: list[Figure]) -> None:
    path = written(tmp_path, [{"step": 1, "ppo/score": 2.0}])
    assert [axes.get_ylabel() for axes in drawn[0].axes] == ["score"]
    assert path.is_file()


def test_the_same_metrics_give_the_same_bytes(tmp_path: Path) -> None:
    first = written(tmp_path / "one", lines())
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black", "savefig.dpi": 30}):
        second = written(tmp_path / "two", lines())  # whatever the user's own style is
        assert matplotlib.rcParams["font.size"] == 30  # and stays
    assert first.read_bytes() == second.read_bytes()
    with Image.open(first) as image:
        assert "Software" not in image.info


def test_nothing_is_cut_off_at_the_border(tmp_path: Path) -> None:
    with Image.open(written(tmp_path, lines())) as image:
        pixels = np.asarray(image.convert("L"))
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert (border == 255).all()
    assert (pixels < 128).sum() > 1000
