"""Evaluation in a plan: which policies it is given, what decides it, what is refused, its smoke form."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftpipe import home, origins, pipeline, provenance, schema, smoke
from ftpipe.artifacts import Artifact
from ftpipe.choices import Determinism, Start, Use
from ftpipe.config import RunConfig
from ftpipe.errors import ConfigError, DataError, LockError, ModelError
from ftpipe.evaluate_config import JudgeConfig, TextsConfig
from ftpipe.evaluation import policies
from ftpipe.lock import hold, hub, record
from ftpipe.pins import PINS, Digests
from ftpipe.pipeline import STAGES, plan
from ftpipe.policy import Incoming
from ftpipe.runs import lineage
from ftpipe.runs.archive import outside_files

from ..test_config import COMMIT, put

QUESTION = {"question_id": 1, "turns": ["Why?"]}


@pytest.fixture
def evaluated(cfg: RunConfig, empty_folder: Path) -> RunConfig:
    """Return a run of sft, a reward model and dpo, evaluated on questions of its own."""
    Path("asked.jsonl").write_text(json.dumps(QUESTION) + "\n", encoding="utf-8")
    Path("said.jsonl").write_text(json.dumps(QUESTION) + "\n", encoding="utf-8")
    cfg.stages = ["prepare", "sft", "reward", "dpo", "evaluate"]
    cfg.data.sources["mine"].format = schema.field_type("data.sources.x.format").preference
    cfg.data.sources["mine"].use = [Use.demonstrations, Use.preferences]
    for stage in (cfg.sft, cfg.reward, cfg.dpo):
        stage.batch_size = cfg.launch.micro_batch_size
    cfg.evaluate.prompts = {"mine": TextsConfig(path="asked.jsonl")}
    cfg.evaluate.answers = {"theirs": TextsConfig(path="said.jsonl", columns=["turns"])}
    cfg.evaluate.judge = JudgeConfig(url="http://localhost/v1", model="judge")
    return cfg


def prints(cfg: RunConfig) -> dict[str, str]:
    return {step.stage.name: step.fingerprint for step in plan(cfg)}


def changed(cfg: RunConfig, change: Callable[[RunConfig], object]) -> set[str]:
    other = copy.deepcopy(cfg)
    change(other)
    before, after = prints(cfg), prints(other)
    return {name for name in before if before[name] != after.get(name)}


# --- what it is given ---


def test_it_is_given_every_policy_before_it_and_the_rest_once(evaluated: RunConfig) -> None:
    *_, last = plan(evaluated)
    assert dict(last.inputs) == {
        "dataset": "prepare",
        "base_model": "model",
        "reward_model": "reward",
        "policy/sft": "sft",
        "policy/dpo": "dpo",
    }
    by_name = {step.stage.name: step.fingerprint for step in plan(evaluated)}
    assert last.facts["inputs"]["policy/sft"] == by_name["sft"]
    evaluated.stages = ["prepare", "sft", "evaluate", "dpo"]
    steps = {step.stage.name: dict(step.inputs) for step in plan(evaluated)}
    assert set(steps["evaluate"]) == {"dataset", "base_model", "policy/sft"}
    assert steps["dpo"]["policy"] == "sft"  # a report is no policy


def test_the_base_alone_can_be_evaluated(evaluated: RunConfig) -> None:
    evaluated.evaluate.answers = {}
    evaluated.stages = ["prepare", "evaluate"]
    assert set(plan(evaluated)[-1].inputs) == {"dataset", "base_model"}
    evaluated.stages = ["evaluate"]
    assert set(plan(evaluated)[-1].inputs) == {"base_model"}


def test_only_the_policies_that_are_asked_for_decide_it(evaluated: RunConfig) -> None:
    evaluated.evaluate.policies = ["base", "sft"]
    assert "policy/dpo" not in plan(evaluated)[-1].inputs
    assert "evaluate" not in changed(evaluated, lambda cfg: put(cfg, "dpo.beta", 0.7))
    evaluated.evaluate.policies = []
    assert {"dpo", "evaluate"} == changed(evaluated, lambda cfg: put(cfg, "dpo.beta", 0.7))


def test_a_reward_model_that_does_not_judge_does_not_decide_it(evaluated: RunConfig) -> None:
    evaluated.evaluate.judge.reward = False
    assert "reward_model" not in plan(evaluated)[-1].inputs


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        (
            "policies",
            ["stf"],
            "evaluate.policies: no policy 'stf'. Did you mean 'sft'? Known: base, sft",
        ),
        ("policies", ["ppo"], "evaluate.policies: no policy 'ppo'."),  # not made before it
        (
            "judge.pairs",
            ["dpo:theirz"],
            "evaluate.judge.pairs: no policy 'theirz'. Did you mean 'theirs'",
        ),
        (
            "answers",
            {"sft": TextsConfig(path="said.jsonl")},
            "evaluate.answers.sft has the name of a pol",
        ),
    ],
)
def test_names_that_there_are_not_are_refused(
    evaluated: RunConfig, key: str, value: Any, said: str
) -> None:
    put(evaluated, f"evaluate.{key}", value)
    with pytest.raises(ConfigError) as refused:
        plan(evaluated)
    assert str(refused.value).startswith(said)


def test_a_pair_of_what_is_not_measured_is_refused(evaluated: RunConfig) -> None:
    evaluated.evaluate.policies, evaluated.evaluate.judge.pairs = ["sft", "dpo"], ["dpo:base"]
    with pytest.raises(ConfigError, match=r"^evaluate\.judge\.pairs: no policy 'base'"):
        plan(evaluated)


# --- what decides it ---

DECIDES = [
    ("evaluate.held_out", 7),
    ("evaluate.turns", 1),
    ("evaluate.max_new_tokens", 7),
    ("evaluate.temperature", 0.7),
    ("evaluate.top_p", 0.7),
    ("evaluate.prompts.mine.columns", ["turns"]),
    ("evaluate.prompts.mine.rows", 1),
    ("evaluate.prompts.mine.split", "test"),
    ("evaluate.answers.theirs.rows", 1),
    ("evaluate.judge.reward", False),
    ("evaluate.judge.model", "other"),
    ("evaluate.judge.temperature", 0.7),
    ("evaluate.judge.max_tokens", 7),
    ("evaluate.judge.pairs", ["dpo:base"]),
    ("evaluate.harness.chat_template", True),
    ("evaluate.mmlu.limit", 7),
    ("launch.tf32", True),
]
DECIDES_NOT = [
    ("evaluate.generation_batch_size", 7),
    ("evaluate.harness.batch_size", 7),
    ("evaluate.mmlu.batch_size", 7),
    ("evaluate.judge.url", "http://elsewhere/v1"),
    ("evaluate.judge.api_key_env", "KEY"),
    ("evaluate.judge.concurrency", 7),
    ("evaluate.judge.timeout", 7.0),
    ("evaluate.judge.retries", 7),
    ("evaluate.prompts.mine.revision", COMMIT),  # of a file, which has no commit
]


@pytest.mark.parametrize(("key", "value"), DECIDES)
def test_what_decides_the_report_makes_it_anew(evaluated: RunConfig, key: str, value: Any) -> None:
    assert "evaluate" in changed(evaluated, lambda cfg: put(cfg, key, value))


@pytest.mark.parametrize(("key", "value"), DECIDES_NOT)
def test_what_decides_nothing_changes_nothing(evaluated: RunConfig, key: str, value: Any) -> None:
    assert changed(evaluated, lambda cfg: put(cfg, key, value)) == set()


def test_no_other_stage_reads_its_keys(evaluated: RunConfig) -> None:
    def change(cfg: RunConfig) -> None:
        for key, value in DECIDES:
            if key.startswith("evaluate."):
                put(cfg, key, value)

    assert changed(evaluated, change) == {"evaluate"}


def test_the_questions_count_by_their_bytes_not_by_their_place(evaluated: RunConfig) -> None:
    shutil.copy("asked.jsonl", "moved.jsonl")
    assert changed(evaluated, lambda cfg: put(cfg, "evaluate.prompts.mine.path", "moved.jsonl")) == set()
    before = prints(evaluated)
    for name in ("asked.jsonl", "said.jsonl"):
        with Path(name).open("a", encoding="utf-8") as file:
            file.write("\n")
        after = prints(evaluated)
        assert {one for one in before if before[one] != after[one]} == {"evaluate"}
        before = after


def test_the_prompts_of_the_judge_have_a_version(
    evaluated: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = prints(evaluated)
    monkeypatch.setattr("ftpipe.pins.JUDGED", 99)
    assert prints(evaluated)["evaluate"] != before["evaluate"]


def test_a_reward_model_by_its_folder_counts_by_its_files(evaluated: RunConfig) -> None:
    evaluated.evaluate.judge.reward_model = "rm"
    with pytest.raises(ModelError, match=r"^evaluate\.judge\.reward_model=rm holds no reward model"):
        plan(evaluated)
    Path("rm").mkdir()
    for name in ("model.safetensors", "reward.json"):
        (Path("rm") / name).write_text(f"bytes of {name}", encoding="utf-8")
    assert "reward_model" not in plan(evaluated)[-1].inputs  # it stands in place of the run's own
    before = prints(evaluated)
    shutil.copytree("rm", "moved")
    put(evaluated, "evaluate.judge.reward_model", "moved")
    assert prints(evaluated) == before
    for name in ("model.safetensors", "reward.json"):
        (Path("moved") / name).write_text("others", encoding="utf-8")
        after = prints(evaluated)
        assert after["evaluate"] != before["evaluate"]
        before = after


# --- where it is recorded ---


def test_its_inputs_are_named_by_their_keys(evaluated: RunConfig) -> None:
    evaluated.evaluate.judge.reward_model = "rm"
    Path("rm").mkdir()
    for name in ("model.safetensors", "reward.json"):
        (Path("rm") / name).write_text("bytes", encoding="utf-8")
    *_, last = plan(evaluated)
    pins = [name for name in last.facts["pins"] if name.startswith("evaluation/")]
    assert [lineage.key_of(pin) for pin in pins] == [
        "evaluate.judge",
        "evaluate.prompts.mine",
        "evaluate.answers.theirs",
        "evaluate.judge.reward_model",
    ]
    locked = record.inputs_of(plan(evaluated))
    assert {key for key in locked if key.startswith("evaluate.")} == {
        "evaluate.prompts.mine",
        "evaluate.answers.theirs",
        "evaluate.judge.reward_model",
    }

    class Piece:
        def facts(self, name: str) -> dict[str, Any]:
            return dict(last.facts[name])

    files = outside_files(evaluated, {"x": Piece()})  # type: ignore[dict-item]
    assert {key: str(path) for key, path in files.items() if key.startswith("evaluate.")} == {
        "evaluate.prompts.mine.path": "asked.jsonl",
        "evaluate.answers.theirs.path": "said.jsonl",
        "evaluate.judge.reward_model": "rm",
    }


def test_a_hub_set_needs_a_commit(evaluated: RunConfig) -> None:
    evaluated.evaluate.prompts["mine"].path = "hub/questions"
    with pytest.raises(ConfigError, match=r"pin it with evaluate\.prompts\.mine\.revision=<commit>\.$"):
        plan(evaluated)
    open_ = [input_ for input_ in hub.unpinned(evaluated) if input_.owner.startswith("evaluate.")]
    assert [(one.key, one.id) for one in open_] == [("evaluate.prompts.mine.revision", "hub/questions")]
    evaluated.evaluate.prompts["mine"].revision = COMMIT
    pins = PINS["evaluation"](evaluated, Digests())
    assert pins["prompts/mine"] == f"hub:hub/questions@{COMMIT}"


def test_paths_below_the_home_are_recorded_without_it(
    evaluated: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv(home.HOME, "/home/ada")
    evaluated.evaluate.prompts["mine"].path = "~/asked.jsonl"
    evaluated.evaluate.judge.reward_model = "~/rm"
    home.expand(evaluated)
    assert evaluated.evaluate.prompts["mine"].path == "/home/ada/asked.jsonl"
    assert evaluated.evaluate.judge.reward_model == "/home/ada/rm"
    text = schema.dump(evaluated)
    assert "/home/ada" not in text and "~/rm" in text


# --- values that cannot work ---

BAD = [
    ("held_out", -1),
    ("turns", 0),
    ("max_new_tokens", 0),
    ("generation_batch_size", 0),
    ("temperature", -0.1),
    ("temperature", float("nan")),
    ("top_p", 0.0),
    ("top_p", 1.1),
    ("policies", ["sft", "sft"]),
    ("prompts.mine.rows", 0),
    ("prompts.mine.revision", "main"),
    ("judge.temperature", -0.1),
    ("judge.timeout", 0.0),
    ("judge.retries", -1),
    ("judge.max_tokens", 0),
    ("judge.concurrency", 0),
    ("judge.model", None),
]


@pytest.mark.parametrize(("key", "value"), BAD)
def test_a_value_that_cannot_work_is_refused_by_its_key(
    evaluated: RunConfig, key: str, value: Any
) -> None:
    evaluated.check()
    put(evaluated, f"evaluate.{key}", value)
    with pytest.raises(ConfigError) as refused:
        evaluated.check()
    assert str(refused.value).startswith(f"evaluate.{key}={value} ")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda one: put(one, "prompts", {}), "evaluate.answers are answers to the questions of"),
        (lambda one: put(one, "prompts.mine.path", ""), "evaluate.prompts.mine.path is not set."),
        (
            lambda one: one.prompts.update({"a/b": TextsConfig(path="x")}),
            "evaluate.prompts.a/b has no name",
        ),
        (lambda one: put(one, "judge.pairs", ["dpo"]), "evaluate.judge.pairs=dpo is out of range"),
        (lambda one: put(one, "judge.pairs", ["dpo:dpo"]), "evaluate.judge.pairs=dpo:dpo is out"),
        (lambda one: put(one, "judge.pairs", ["a:b:c"]), "evaluate.judge.pairs=a:b:c is out"),
        (lambda one: put(one, "judge.url", None), "evaluate.judge.model=judge is out of range"),
        (lambda one: put(one, "judge.url", "localhost"), "evaluate.judge.url is no plain address"),
        (
            lambda one: put(one, "judge.api_key_env", "sk-1"),
            "evaluate.judge.api_key_env is not the name",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(
    evaluated: RunConfig, change: Callable[[Any], object], said: str
) -> None:
    change(evaluated.evaluate)
    with pytest.raises(ConfigError) as refused:
        evaluated.check()
    assert str(refused.value).startswith(said)


def test_a_reward_model_that_nobody_asks_is_refused(evaluated: RunConfig) -> None:
    evaluated.evaluate.judge.reward, evaluated.evaluate.judge.reward_model = False, "rm"
    with pytest.raises(ConfigError, match=r"^evaluate\.judge\.reward_model=rm is out of range"):
        evaluated.check()


def test_a_missing_file_is_refused(evaluated: RunConfig) -> None:
    Path("asked.jsonl").unlink()
    with pytest.raises(DataError, match=r"^no file asked\.jsonl"):
        plan(evaluated)


def test_a_servers_verdicts_are_not_strict(evaluated: RunConfig) -> None:
    evaluated.determinism, evaluated.launch.threads = Determinism.strict, 1
    said = r"^determinism=strict, evaluate\.judge\.url=.* in the stage 'evaluate': "
    with pytest.raises(ConfigError, match=said):
        plan(evaluated)
    evaluated.evaluate.judge = JudgeConfig()
    assert plan(evaluated)


# --- the smoke form ---


def test_the_smoke_form_asks_sample_questions_and_no_server(evaluated: RunConfig) -> None:
    evaluated.evaluate.judge.pairs = ["dpo:base", "dpo:theirs"]
    evaluated.evaluate.mmlu.path = "mmlu.zip"
    before = copy.deepcopy(evaluated)
    small = smoke.smoke_form(evaluated).evaluate
    assert evaluated == before
    assert small.prompts == {"mine": TextsConfig(path="sample:questions.jsonl", rows=2)}
    assert (small.answers, small.max_new_tokens, small.mmlu.path) == ({}, 8, None)
    assert small.judge == JudgeConfig(pairs=["dpo:base"])
    assert small.harness.tasks == {}
    kept = ("policies", "turns", "temperature", "top_p", "generation_batch_size", "held_out")
    for key in kept:
        assert getattr(small, key) == getattr(before.evaluate, key)
    put(evaluated, "evaluate.max_new_tokens", 3)
    assert smoke.smoke_form(evaluated).evaluate.max_new_tokens == 3


# --- the policies themselves ---


def artifact(name: str, **inputs: str) -> Artifact:
    folder = Path("artifacts") / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "max_position_embeddings": 64})
    )
    return Artifact("policy", name.split("-")[0], "1", folder, {"inputs": inputs})


@pytest.mark.usefixtures("empty_folder")
def test_each_policy_knows_which_one_it_came_from() -> None:
    cfg = RunConfig(stages=["prepare", "sft", "merge", "dpo", "ppo", "evaluate"])
    inputs = {
        "base_model": artifact("model-1"),
        "policy/ppo": artifact("ppo-1", policy="sft-1", reward_model="reward-1"),
        "policy/sft": artifact("sft-1", dataset="prepare-1"),
        "policy/merge": artifact("merge-1", policy="sft-1"),
        "policy/dpo": artifact("dpo-1", base_model="model-1"),  # dpo.start=model
    }
    found = policies.found(cfg, inputs)
    assert [(one.name, one.before) for one in found] == [
        ("base", None),
        ("sft", "base"),
        ("merge", "sft"),
        ("dpo", "base"),
        ("ppo", "sft"),
    ]
    assert {one.positions for one in found} == {64}
    assert found[1].start == Incoming("artifacts/sft-1")
    assert found[0].start.weights == "artifacts/model-1"
    cfg.evaluate.policies = ["sft", "ppo"]
    del inputs["policy/merge"], inputs["policy/dpo"]
    assert [(one.name, one.before) for one in policies.found(cfg, inputs)] == [
        ("sft", None),
        ("ppo", "sft"),
    ]
    cfg.evaluate.policies = ["base", "ppo"]
    del inputs["policy/sft"]  # not asked for, so not among its inputs
    assert [(one.name, one.before) for one in policies.found(cfg, inputs)] == [
        ("base", None),
        ("ppo", "base"),
    ]


def test_the_stage_starts_from_every_policy_whatever_others_start_from(evaluated: RunConfig) -> None:
    evaluated.dpo.start = Start.model
    assert set(plan(evaluated)[-1].inputs) >= {"policy/sft", "policy/dpo"}
    assert STAGES["evaluate"].every == ("policy",) and not STAGES["evaluate"].needs
    assert pipeline.STAGES["evaluate"].makes == "report"


@pytest.mark.parametrize(
    ("key", "pinned"),
    [
        ("evaluate.harness.tasks.gsm8k.files.test", True),
        ("evaluate.harness.tasks.files.shots", False),
        ("evaluate.prompts.files.columns", False),
        ("evaluate.prompts.files.path", True),
        ("evaluate.judge.reward_model", True),
        ("data.sources.files.format", False),
        ("data.decontaminate.files.columns", False),
    ],
)
def test_what_is_named_files_is_no_file(key: str, pinned: bool) -> None:
    assert pipeline.is_pinned(key) is pinned


def test_a_set_named_files_decides_by_its_columns(evaluated: RunConfig) -> None:
    evaluated.evaluate.prompts = {"files": TextsConfig(path="asked.jsonl")}
    rows = changed(evaluated, lambda cfg: put(cfg, "evaluate.prompts.files.columns", ["turns"]))
    assert rows == {"evaluate"}


@pytest.mark.parametrize(
    ("owner", "key", "lifted"),
    [
        ("evaluate.mmlu.path", "evaluate.mmlu.path", True),
        ("evaluate.judge.reward_model", "evaluate.judge.reward_model", True),
        ("evaluate.harness.tasks.gsm8k", "evaluate.harness.tasks.gsm8k.files.test", True),
        ("evaluate.harness.tasks.gsm8k", "evaluate.harness.tasks.gsm8k.revision", True),
        ("evaluate.harness.tasks.gsm8k", "evaluate.harness.tasks.gsm8k.shots", False),
        ("evaluate.prompts.mine", "evaluate.prompts.mine.path", True),
        ("evaluate.prompts.mine", "evaluate.prompts.mine.columns", False),
        ("model.path", "model.tokenizer", False),
    ],
)
def test_another_input_on_the_command_line_lifts_its_pin(
    owner: str, key: str, lifted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hold, "inputs_of", lambda steps: {owner: {"": "b" * 64}})
    lock = record.Lock("mine", {}, {owner: {"": "a" * 64}}, record.python(), {})
    if lifted:
        (line,) = hold.check(lock, (), (), {key: origins.COMMAND}, frozenset())
        assert (
            line == f"{owner}: chosen on the command line; the lock of recipe=mine does not hold for it."
        )
    else:
        with pytest.raises(LockError, match=f"{re.escape(owner)} moved"):
            hold.check(lock, (), (), {key: origins.COMMAND}, frozenset())
    with pytest.raises(LockError, match=f"{re.escape(owner)} moved"):
        hold.check(lock, (), (), {key: "recipe"}, frozenset())


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json", "0/adapter_config.json"])
def test_a_reward_model_counts_by_how_its_weights_are_used(evaluated: RunConfig, name: str) -> None:
    evaluated.evaluate.judge.reward_model = "rm"
    (Path("rm") / name).parent.mkdir(parents=True)
    for file in ("model.safetensors", "reward.json", name):
        (Path("rm") / file).write_text("bytes", encoding="utf-8")
    before = prints(evaluated)["evaluate"]
    (Path("rm") / name).write_text("another alpha", encoding="utf-8")
    assert prints(evaluated)["evaluate"] != before


@pytest.mark.parametrize(
    ("key", "value"),
    [("url", "http://localhost/v1"), ("pairs", ["sft:base"]), ("reward_model", "rm")],
)
def test_a_judge_without_questions_is_refused(evaluated: RunConfig, key: str, value: object) -> None:
    evaluated.evaluate.prompts, evaluated.evaluate.answers = {}, {}
    evaluated.evaluate.judge = JudgeConfig()
    evaluated.evaluate.check()
    setattr(evaluated.evaluate.judge, key, value)
    with pytest.raises(ConfigError, match=rf"^evaluate\.judge\.{key} would be read by nothing"):
        evaluated.evaluate.check()


def test_what_measures_benchmarks_is_among_the_packages_that_decide() -> None:
    assert "lm-eval" in provenance.PACKAGES
