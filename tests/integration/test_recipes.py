"""Every recipe file composes, plans and runs in its smoke form; a recipe nobody tests is impossible."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftpipe import artifacts, cli, compose
from ftpipe.artifacts import Artifact
from ftpipe.choices import RewardKind, Start
from ftpipe.config import RunConfig
from ftpipe.pipeline import STAGES

RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.yaml"))
TRAINED = {"sft": "steps", "reward": "steps", "dpo": "steps", "ppo": "rollouts"}  # what counts
FAST = ("tiny",)  # the others take much longer
SMOKE = [
    pytest.param(path.stem, marks=() if path.stem in FAST else pytest.mark.slow) for path in RECIPES
]


@pytest.mark.usefixtures("in_process", "empty_folder")
@pytest.mark.parametrize("recipe", SMOKE)
def test_recipe_runs_in_its_smoke_form(recipe: str, capfd: pytest.CaptureFixture[str]) -> None:
    words = [f"recipe={recipe}", "smoke=true"]
    assert cli.main(["plan", *words]) == 0
    assert "run" in capfd.readouterr().out
    assert cli.main(["run", *words]) == 0
    found = [artifacts.open_artifact(path.parent) for path in Path("outputs").rglob("manifest.json")]
    cfg = cli.configurations(words)[0]
    made = {artifact.stage: artifact for artifact in found}
    assert len(made) == len(found)
    assert set(made) == {"model", *cfg.stages}
    for stage, artifact in made.items():
        assert artifact.kind == STAGES[stage].makes
    check_training(cfg, made)
    check_inputs(cfg, made)
    full = compose.runs([f"recipe={recipe}"])[0]
    assert cfg.adapter == full.adapter and cfg.data.template == full.data.template
    assert cfg.model.architecture["model_type"] == full.model.architecture["model_type"]


def check_training(cfg: RunConfig, made: dict[str, Artifact]) -> None:
    """Each stage that trains took all its steps, and what it made can be loaded as safetensors."""
    trained = [stage for stage in TRAINED if stage in cfg.stages]
    assert trained
    for stage in trained:
        assert made[stage].metrics[TRAINED[stage]] == getattr(cfg, stage).max_steps
        assert list(made[stage].path.rglob("*.safetensors"))


def check_inputs(cfg: RunConfig, made: dict[str, Artifact]) -> None:
    """Each stage was given what the latest stage before it made."""
    dpo = cfg.dpo.start
    starts = {"reward": cfg.reward.start, "dpo": dpo, "reference": dpo, "ppo": cfg.ppo.start}
    for stage, start in starts.items():
        if stage not in cfg.stages:
            continue
        before = cfg.stages[: cfg.stages.index(stage)]
        makers = [name for name in before if STAGES[name].makes == "policy"]
        came = "model" if start is Start.model else makers[-1]
        inputs = made[stage].manifest["inputs"]
        kind = STAGES[came].makes
        assert inputs[kind] == made[came].path.name
        assert ("reference_logps" in inputs) == (stage == "dpo" and "reference" in before)
        by_model = stage == "ppo" and cfg.ppo.reward is RewardKind.model
        assert ("reward_model" in inputs) == by_model


def test_every_recipe_says_what_it_is() -> None:
    assert len(RECIPES) >= 4
    for path in RECIPES:
        assert compose.describe(path).endswith("."), path
