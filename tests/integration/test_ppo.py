"""The ppo stage on tiny models: its numbers, what comes out, how it ends, and what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ftpipe import artifacts, cli
from ftpipe.artifacts import Artifact
from ftpipe.choices import Part, Use
from ftpipe.data import table
from ftpipe.ppo import functions, trainer
from ftpipe.ppo.layout import Answer, answer_logits, lay
from ftpipe.ppo.roles import Role, Roles, load
from ftpipe.stages import ppo

pytestmark = pytest.mark.usefixtures("in_process")
slow = pytest.mark.slow

SOURCE = (
    "data.sources={p: {format: preference, path: 'sample:preference.jsonl', "
    "use: [preferences, demonstrations, prompts]}}"
)
WORDS = (
    *("recipe=tiny", "stages=[prepare,sft,ppo]", "launch.threads=1", "data=own", "data.validation=4"),
    *(SOURCE, "sft.max_steps=2", "sft.samples=0", "sft.learning_rate=1e-2", "sft.eval_every=0"),
    *("ppo.batch_size=4", "ppo.max_new_tokens=6", "ppo.max_steps=3", "ppo.learning_rate=1e-3"),
    *("ppo.samples=2", "launch.micro_batch_size=4"),
)
BY_LENGTH = (
    *("ppo.reward=function", "ppo.function.name=length", "ppo.function.parameters={target: 5}"),
)
SHORT = (*WORDS, *BY_LENGTH)
LEARNED = (
    *(*WORDS, "stages=[prepare,sft,reward,ppo]", "reward.max_steps=2", "reward.batch_size=4"),
    *("reward.learning_rate=1e-2", "ppo.ignore_gate=true"),
)


@pytest.fixture(autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work where artifacts of the other tests lie, to use them again; ppo's are gone."""
    kept = tmp_path_factory.getbasetemp() / "ppo"
    kept.mkdir(exist_ok=True)
    for old in kept.glob("outputs/artifacts/ppo-*"):
        if old.is_dir():
            old.rename(tmp_path_factory.mktemp("old") / old.name)
    monkeypatch.chdir(kept)
    return kept


def listed() -> dict[str, Artifact]:
    """Return the artifacts of the run made last, by stage."""
    run = max(Path("outputs/runs").glob("*/artifacts.json"), key=lambda path: path.stat().st_mtime_ns)
    names: dict[str, str] = json.loads(run.read_text())
    root = Path("outputs/artifacts").resolve()
    return {stage: artifacts.open_artifact(root / name) for stage, name in names.items()}


def run(*words: str) -> dict[str, Artifact]:
    assert cli.main(["run", *words]) == 0
    return listed()


def refused(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    """Run a command that is refused; return its sentence."""
    capfd.readouterr()
    assert cli.main(["run", *words]) == 2
    said = capfd.readouterr().err.strip()
    assert "Traceback" not in said and len(said.splitlines()) == 1, said
    assert not list(Path("outputs/artifacts").glob("ppo-*/manifest.json"))
    return said


def rollouts(made: Artifact | Path) -> list[dict[str, float]]:
    """Return the lines of rollouts, their prefix off."""
    path = made if isinstance(made, Path) else made.path
    read = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    return [
        {name.removeprefix("ppo/"): value for name, value in line.items()}
        for line in read
        if "ppo/score" in line
    ]


def held_out(made: Artifact) -> dict[int, dict[str, Any]]:
    """Return the files of held-out answers by how many rollouts came before."""
    files = (made.path / "held_out").glob("rollout-*.json")
    return {int(file.stem.rsplit("-", 1)[1]): json.loads(file.read_text()) for file in files}


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[Roles]:
    """Return a list that gets the roles of each run."""
    found: list[Roles] = []

    def keep(*given: Any) -> Roles:
        found.append(load(*given))
        return found[-1]

    monkeypatch.setattr(ppo, "load", keep)
    return found


@pytest.fixture
def reward(monkeypatch: pytest.MonkeyPatch) -> Callable[[functions.RewardFunction], tuple[str, ...]]:
    """Put a reward function in the table, and return the words that choose it."""

    def put(function: functions.RewardFunction) -> tuple[str, ...]:
        monkeypatch.setattr(functions, "FUNCTIONS", {"mine": lambda: function})
        return (*WORDS, "ppo.reward=function", "ppo.function.name=mine")

    return put


NAMES = {
    *("step", "time", "score", "score_std", "kl", "kl_k2", "kl_k3", "entropy", "length", "eos_rate"),
    *("repeated", "approx_kl", "clip_fraction", "entropy_now", "policy_loss", "ratio", "ratio_off"),
    *("value_clip_fraction", "value_loss", "policy_grad_norm", "value_grad_norm", "updates", "beta"),
    *("learning_rate", "tokens", "seconds_rollout", "seconds_scoring", "seconds_update"),
}


def check_lines(lines: list[dict[str, float]]) -> None:
    """See that every rollout is there, whole, and that each one's updates began at its policy."""
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    for line in lines:
        assert set(line) >= NAMES and all(math.isfinite(value) for value in line.values())
        assert line["ratio_off"] < (0.05 if line.get("half") else 1e-5)
    assert lines[0]["kl"] == 0 and lines[0]["kl_k2"] == 0 and lines[0]["kl_k3"] == 0
    assert all(line["kl_k3"] > 0 for line in lines[1:])


def policy_alone(made: dict[str, Artifact], out: Path) -> Any:
    """Return a saved policy as plain transformers and PEFT load it."""
    if (out / "config.json").is_file():
        model = AutoModelForCausalLM.from_pretrained(str(out), dtype=torch.float32)
    else:
        model = AutoPeftModelForCausalLM.from_pretrained(str(out), dtype=torch.float32)
    return model.eval()


@pytest.mark.parametrize(
    "words",
    [
        (),
        *(
            pytest.param(words, marks=slow)
            for words in [
                ("adapter=full",),
                ("stages=[prepare,sft,merge,ppo]",),
                ("stages=[prepare,ppo]", "ppo.start=model"),
                ("stages=[prepare,sft,merge,ppo]", "adapter.targets=[q_proj]"),
                ("ppo.top_p=0.5", "ppo.temperature=0.7"),
            ]
        ),
    ],
    ids=lambda words: " ".join(words) or "lora",
)
def test_the_saved_policy_is_the_one_that_was_trained(words: tuple[str, ...], kept: list[Roles]) -> None:
    made = run(*SHORT, *words)
    check_lines(rollouts(made["ppo"]))
    (roles,) = kept
    alone = policy_alone(made, made["ppo"].path)
    tokenizer = AutoTokenizer.from_pretrained(str(made["ppo"].path))
    assert tokenizer.get_vocab() == (
        AutoTokenizer.from_pretrained(str(made["prepare"].path / "tokenizer")).get_vocab()
    )
    one = Answer((60, 61, 62), (63, 64, 65), False)
    with torch.no_grad(), roles.acting(Role.policy) as model:
        got_TV = answer_logits(model, lay([one], 0), 1.0)[0]
        right_TV = alone(input_ids=torch.tensor([[60, 61, 62, 63, 64, 65]])).logits[0, 2:-1]
    torch.testing.assert_close(got_TV, right_TV, atol=1e-5, rtol=1e-5)
    with torch.no_grad(), roles.acting(Role.reference) as model:
        before_TV = answer_logits(model, lay([one], 0), 1.0)[0]
    assert (before_TV - got_TV).abs().max() > 1e-3  # it was trained
    left = {path.suffix for path in made["ppo"].path.rglob("*") if path.is_file()}
    assert left <= {".json", ".jsonl", ".safetensors", ".md", ".jinja", ".png", ".diff"}
    assert not list(made["ppo"].path.rglob("checkpoint*"))


@pytest.mark.slow
def test_what_is_saved_is_the_policys_adapter_alone() -> None:
    made = run(*SHORT, "ppo.save_every=1")
    old, new = (load_file(made[stage].path / "adapter_model.safetensors") for stage in ("sft", "ppo"))
    assert old.keys() == new.keys()
    assert all(not torch.equal(old[name], new[name]) for name in old)
    assert [path.name for path in made["ppo"].path.rglob("adapter_model*")] == [
        "adapter_model.safetensors"
    ]


@pytest.mark.parametrize(
    "words",
    [
        (),
        *(
            pytest.param(words, marks=slow)
            for words in [
                ("stages=[prepare,sft,reward,ppo]", "adapter=qlora"),
                ("adapter=full",),
                ("stages=[prepare,sft,merge,reward,ppo]",),
                ("stages=[prepare,sft,reward,merge,ppo]",),
                ("reward.ensemble=2",),
                ("reward.ensemble=2", "adapter=full"),
                ("launch.precision=bf16",),
                ("launch.precision=bf16", "adapter=qlora"),
                ("ppo.gradient_checkpointing=true",),
                (
                    "data.template=oasst",
                    "model.new_tokens=['<|prompter|>','<|assistant|>']",
                    "adapter=qlora",
                ),
            ]
        ),
    ],
    ids=lambda words: " ".join(words) or "lora",
)
def test_it_learns_from_a_reward_model(words: tuple[str, ...]) -> None:
    made = run(*LEARNED, *words)
    lines = rollouts(made["ppo"])
    if "launch.precision=bf16" in words:
        lines = [{**line, "half": 1.0} for line in lines]
        assert abs(lines[0]["kl"]) < 1e-6
        lines[0] |= {"kl": 0, "kl_k2": 0, "kl_k3": 0}
    check_lines(lines)
    assert all(line["score_std"] > 0 for line in lines)
    ensemble = "reward.ensemble=2" in words
    assert all(("disagreement" in line) is ensemble for line in lines)
    if ensemble:
        assert all(line["disagreement"] > 0 for line in lines)


@pytest.mark.slow
def test_held_out_answers_samples_and_curves_agree_with_the_metrics() -> None:
    made = run(*SHORT, "ppo.eval_every=1", "ppo.watch.name=words", "ppo.watch.parameters={wanted: [a]}")
    found = held_out(made["ppo"])
    lines = [json.loads(line) for line in (made["ppo"].path / "metrics.jsonl").read_text().splitlines()]
    told = {line["step"]: line for line in lines if "ppo/held_out_score" in line}
    assert set(found) == set(told) == {0, 1, 2, 3}
    rows = table.read(made["prepare"].path, Use.prompts, Part.validation)
    tokenizer = AutoTokenizer.from_pretrained(str(made["prepare"].path / "tokenizer"))
    for number, one in found.items():
        assert [each["prompt"] for each in one["answers"]] == tokenizer.batch_decode(
            rows["input_ids"][:]
        )
        scores = [each["score"] for each in one["answers"]]
        measures = one["measures"]
        assert measures["held_out_score"] == pytest.approx(sum(scores) / len(scores))
        right = [1 - abs(len(each["answer"].split()) - 5) / 5 for each in one["answers"]]
        assert len(right) == len(scores) == 4
        for name, value in measures.items():
            assert told[number][f"ppo/{name}"] == value
        assert "held_out_watched" in measures
    metrics = made["ppo"].metrics
    for name, value in found[3]["measures"].items():
        assert metrics[name] == value
    for name, value in found[0]["measures"].items():
        assert metrics[f"{name}_before"] == value
    samples = (made["ppo"].path / "samples.md").read_text()
    assert samples.count("## Prompt") == 2
    for number, title in ((0, "Before"), (3, "After")):
        for each in found[number]["answers"][:2]:
            assert f"## {title} (score {each['score']:.3f})" in samples
    assert (made["ppo"].path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    first, *_, last = rollouts(made["ppo"])
    for name in ("score", "kl", "length", "entropy"):
        assert metrics[f"{name}_first"] == first[name]
        assert metrics[name] == last[name]
    assert metrics["rollouts"] == 3 and "watched" in first


@slow
def test_a_dataset_without_held_out_prompts_has_no_samples() -> None:
    made = run(*SHORT, "data.validation=0")
    assert not held_out(made["ppo"]) and not (made["ppo"].path / "samples.md").exists()
    assert (made["ppo"].path / "curves.png").is_file()
    check_lines(rollouts(made["ppo"]))


def weights(made: Artifact) -> dict[str, torch.Tensor]:
    return load_file(made.path / "adapter_model.safetensors")


@slow
@pytest.mark.parametrize(
    "words",
    [
        ("ppo.minibatches=2", "ppo.ppo_epochs=2"),
        ("ppo.weighting=sequences", "ppo.stop=['a','e','o']"),
        ("ppo.whiten_rewards=true", "ppo.entropy_weight=0.01"),
        ("ppo.ptx_weight=0.5",),
        ("ppo.mask_truncated=true", "ppo.stop=['a','e','o','s','t']"),
    ],
    ids=lambda words: words[0],
)
def test_neither_the_micro_batch_nor_the_generation_batch_changes_the_result(
    words: tuple[str, ...], folder: Path
) -> None:
    words = (*SHORT, *words, "ppo.batch_size=6", "sft.batch_size=12")
    found = []
    for micro, at_once in ((6, "null"), (1, 1), (4, 4)):
        made = run(*words, f"launch.micro_batch_size={micro}", f"ppo.generation_batch_size={at_once}")[
            "ppo"
        ]
        lines = [
            {name: value for name, value in line.items() if "seconds" not in name and name != "time"}
            for line in rollouts(made)
        ]
        found.append((lines, weights(made), held_out(made)))
        made.path.rename(folder / f"moved-{len(list(folder.glob('moved-*')))}")
    for lines, tuned, answers in found[1:]:
        for ours, theirs in zip(lines, found[0][0], strict=True):
            assert ours == pytest.approx(theirs, rel=2e-3, abs=1e-4)
        for name, weight in tuned.items():
            torch.testing.assert_close(weight, found[0][1][name], atol=5e-4, rtol=0, msg=name)
        texts = [[one["answer"] for one in told["answers"]] for told in answers.values()]
        assert texts == [[one["answer"] for one in told["answers"]] for told in found[0][2].values()]


@pytest.mark.slow
def test_the_number_of_updates_is_epochs_times_minibatches() -> None:
    made = run(*SHORT, "ppo.minibatches=2", "ppo.ppo_epochs=3", "ppo.max_steps=2")["ppo"]
    assert [line["updates"] for line in rollouts(made)] == [6, 6]
    early = run(*SHORT, "ppo.target_kl=1e-6", "ppo.minibatches=2", "ppo.max_steps=2")["ppo"]
    for line in rollouts(early):
        assert 1 <= line["updates"] < 8
    assert early.metrics["tokens"] == sum(4 * line["length"] for line in rollouts(early))


@pytest.mark.slow
def test_beta_follows_zieglers_rule() -> None:
    target, horizon, size = 0.05, 40, 4
    made = run(
        *SHORT, f"ppo.kl_target={target}", f"ppo.kl_horizon={horizon}", "ppo.max_steps=6", "ppo.beta=0.1"
    )["ppo"]
    lines = rollouts(made)
    beta = 0.1
    for line in lines:
        assert line["beta"] == pytest.approx(beta, rel=1e-12)
        error = max(-0.2, min(0.2, line["kl"] / target - 1))  # Ziegler et al. 2019, section 2.2
        beta *= 1 + error * size / horizon
    moves = [after["beta"] / before["beta"] for before, after in pairwise(lines)]
    assert min(moves) < 1 < max(moves)


@slow
def test_it_raises_what_is_rewarded(reward: Callable[..., tuple[str, ...]]) -> None:
    # every token by itself is right or wrong: learned in a few updates
    words = reward(lambda prompt, answer, reference: float(sum(map(str.isalpha, answer))))
    words = (*words, "ppo.beta=0", "ppo.health.min_eos_rate=null", "ppo.batch_size=32")
    made = run(*words, "ppo.max_steps=12", "ppo.learning_rate=5e-3", "ppo.ppo_epochs=2")
    lines = rollouts(made["ppo"])
    first, last = (sum(line["score"] for line in some) / 2 for some in (lines[:2], lines[-2:]))
    assert last > first + 0.3


@pytest.mark.slow
def test_answers_of_one_token_reach_the_known_optimum(
    folder: Path, reward: Callable[..., tuple[str, ...]]
) -> None:
    """The objective with its KL term is greatest at rho(a) exp(r(a) / beta) / Z (arXiv:1909.08593)."""
    prompts = folder / "bandit.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": word}) + "\n" for word in ("one", "3")))
    words = reward(lambda prompt, answer, reference: float(any(a in answer for a in "abcdefghijklm")))
    made = run(
        *(*words, "stages=[prepare,ppo]", "ppo.start=model", "adapter=full", "data.validation=0"),
        f"data.sources={{p: {{format: prompts, path: {prompts}}}}}",
        *("ppo.max_new_tokens=1", "ppo.missing_eos_penalty=0", "ppo.beta=0.5", "ppo.samples=0"),
        *("ppo.batch_size=128", "launch.micro_batch_size=128", "ppo.max_steps=80", "ppo.ppo_epochs=2"),
        *("ppo.learning_rate=3e-3", "ppo.value_clip=null"),
    )
    tokenizer = AutoTokenizer.from_pretrained(str(made["prepare"].path / "tokenizer"))
    said = [tokenizer.decode([token], skip_special_tokens=True) for token in range(len(tokenizer))]
    rewards_V = torch.tensor([float(any(a in one for a in "abcdefghijklm")) for one in said])
    base, policy = (
        AutoModelForCausalLM.from_pretrained(str(made[stage].path)).eval() for stage in ("model", "ppo")
    )
    for row in table.read(made["prepare"].path, Use.prompts, Part.train):
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            rho_V, pi_V = (
                model(input_ids=ids).logits[0, -1].double().softmax(-1) for model in (base, policy)
            )
        best_V = rho_V * torch.exp(rewards_V / 0.5)
        best_V /= best_V.sum()
        before, after = (float((one - best_V).abs().sum() / 2) for one in (rho_V, pi_V))
        assert before > 0.1
        assert after < 0.04  # total variation: half of the sum over all words


@pytest.mark.slow
@pytest.mark.parametrize("value", [0.1, pytest.param(-3.0, marks=slow)])
def test_equal_rewards_are_said_and_spoil_nothing(
    value: float, reward: Callable[..., tuple[str, ...]], capfd: pytest.CaptureFixture[str]
) -> None:
    words = (*reward(lambda prompt, answer, reference: value), "ppo.batch_size=7")
    made = run(*words)["ppo"]
    out = capfd.readouterr().out
    for number in (1, 2, 3):
        assert f"rollout {number}: all 7 answers have the score {value:g}; they teach nothing" in out
    lines = rollouts(made)
    check_lines(lines)
    assert all(weight.isfinite().all() for weight in weights(made).values())


@pytest.mark.slow
def test_where_no_answer_ends_masked_ones_teach_nothing() -> None:
    made = run(*SHORT, "ppo.mask_truncated=true", "ppo.max_new_tokens=2", "ppo.minibatches=2")
    lines = rollouts(made["ppo"])
    silent = [line for line in lines if line["eos_rate"] == 0]
    assert silent
    for line in silent:
        assert line["policy_loss"] == line["value_loss"] == 0
        assert all(math.isfinite(value) for value in line.values())


@pytest.mark.slow
def test_ended_for_its_health_it_says_why_and_goes_on_when_the_limit_is_raised(
    capfd: pytest.CaptureFixture[str], folder: Path
) -> None:
    words = (*SHORT, "ppo.save_every=1", "ppo.max_steps=4", "ppo.eval_every=2")
    unhurt = run(*words)["ppo"]
    lines = [line for line in untimed(unhurt) if "ppo/score" in line]
    right = (weights(unhurt), lines, held_out(unhurt), unhurt.metrics)
    unhurt.path.rename(folder / "unhurt")
    furthest = max(line["ppo/kl"] for line in lines)
    assert furthest > 0
    limits = (f"ppo.health.max_kl={furthest * 0.99}", "ppo.health.patience=1")
    said = refused(capfd, *words, *limits)
    assert "ppo was ended in rollout" in said and "ppo.health.max_kl=" in said
    (partial,) = Path("outputs/artifacts").glob("ppo-*.partial")
    (ended,) = partial.glob("checkpoints/ended-*")
    assert str(ended) in said or ended.name in said
    assert {path.name for path in ended.iterdir()} == {
        *("trained.safetensors", "optimizer.safetensors", "state.json", "whole.json"),
    }
    done = int(ended.name.rsplit("-", 1)[1])
    assert 1 <= done < 4 and len(rollouts(partial)) == done
    capfd.readouterr()
    again = run(*words)["ppo"]
    assert f"continuing from checkpoint-{done}" in capfd.readouterr().out
    for name, weight in weights(again).items():
        assert torch.equal(weight, right[0][name]), name
    assert [line for line in untimed(again) if "ppo/score" in line] == right[1]
    assert held_out(again) == right[2]
    assert {k for k in again.metrics if again.metrics[k] != right[3][k]} <= {
        *("seconds_rollout", "seconds_scoring", "seconds_update"),
    }
    (again.path).rename(folder / "again")


class Killed(BaseException):
    """Ends a run as a kill would: nothing handles it."""


def untimed(made: Artifact) -> list[dict[str, float]]:
    """Return all lines of metrics without what a clock says."""
    read = map(json.loads, (made.path / "metrics.jsonl").read_text().splitlines())
    return [
        {name: value for name, value in line.items() if "seconds" not in name and name != "time"}
        for line in read
    ]


KILLS = [  # an odd call is for held-out answers, an even one for those of a rollout
    ("_save", 2),
    ("_save", 3),
    ("draw", 2),
    ("judge", 5),
    ("scores", 4),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "times"), [KILLS[0], *(pytest.param(*kill, marks=slow) for kill in KILLS[1:])]
)
@pytest.mark.parametrize("after", [False, pytest.param(True, marks=slow)])
def test_interrupted_anywhere_it_ends_as_if_it_had_not_been(
    place: str, times: int, after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (
        *(*SHORT, "ppo.save_every=1", "ppo.eval_every=1", "ppo.kl_target=0.05", "ppo.kl_horizon=40"),
        *("ppo.minibatches=2", "ppo.ptx_weight=0.1", "ppo.max_steps=4"),
    )
    unhurt = run(*words)["ppo"]
    moved = tmp_path / "unhurt"
    unhurt.path.rename(moved)
    whole = artifacts.open_artifact(moved)
    calls = 0
    original = getattr(trainer.PpoTrainer, place)

    def killed(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == times and not after:
            raise Killed
        found = original(*given, **named)
        if calls == times:
            raise Killed
        return found

    with monkeypatch.context() as patch:
        patch.setattr(trainer.PpoTrainer, place, killed)
        with pytest.raises(Killed):
            cli.main(["run", *words])
    again = run(*words)["ppo"]
    names = {path.name for path in moved.iterdir() if path.is_file()}
    assert names == {path.name for path in again.path.iterdir() if path.is_file()}
    assert names >= {"adapter_model.safetensors", "samples.md", "metrics.jsonl"}
    for name in names - {"metrics.jsonl", "manifest.json", "uncommitted.diff"}:
        assert (again.path / name).read_bytes() == (moved / name).read_bytes(), name
    assert held_out(again) == held_out(whole)
    assert untimed(again) == untimed(whole)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("ppo.function.name=lenght",),
            "no reward function 'lenght'. Did you mean 'length'?",
        ),
        (("ppo.function.parameters={goal: 5}",), "reward function 'length': "),
        (("ppo.function.parameters={target: 0}",), "target=0 is out of range; allowed: 1 word or more"),
        (("ppo.function.name=null",), "ppo.function.name is not set; ppo.reward=function needs one"),
        (("ppo.reward=model",), "ppo.function.name=length would be read by nothing"),
        (("ppo.watch.name=wrods",), "no reward function 'wrods'. Did you mean 'words'?"),
        (("ppo.stop=['nothing']",), "ppo.stop: 'nothing' is no token of the tokenizer"),
        (("ppo.value_start=reward",), "ppo.value_start=reward is out of range"),
        (("ppo.minibatches=3",), "ppo.minibatches=3 is out of range; allowed: a divisor of"),
        (("ppo.kl_target=1", "ppo.kl_horizon=0"), "ppo.kl_horizon=0 is out of range"),
        (("ppo.max_new_tokens=2040",), "its answer would run past the 2,048 positions of the model"),
        (
            (
                "ppo.ptx_weight=1",
                "stages=[prepare,ppo]",
                "ppo.start=model",
                SOURCE.replace("preferences, demonstrations, prompts", "prompts"),
            ),
            "'ppo' learns from demonstrations, but no source serves them",
        ),
        (
            (SOURCE.replace("preferences, demonstrations, prompts", "demonstrations"),),
            "'ppo' learns from prompts, but no source serves them",
        ),
        (("stages=[prepare,ppo]",), "'ppo' needs a policy, but nothing before it makes one"),
        (("data.validation=24", "stages=[prepare,ppo]", "ppo.start=model"), "data.validation"),
        (("adapter=full", "stages=[prepare,ppo]", "ppo.batch_size=0", "ppo.start=model"), "batch_size"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_bad_input_gets_one_sentence(
    words: tuple[str, ...], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capfd, *SHORT, *words)


def test_a_function_that_fails_is_named_with_its_answer(
    reward: Callable[..., tuple[str, ...]], capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(prompt: str, answer: str, reference: str | None) -> float:
        raise KeyError("no such word")

    said = refused(capfd, *reward(broken))
    assert "reward function 'mine', answer 1 (" in said
    assert "it raised KeyError: 'no such word'" in said
    said = refused(capfd, *reward(lambda prompt, answer, reference: math.nan))
    assert "it returned nan; a reward is a finite number" in said


def test_a_reward_model_that_fails_its_gate_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    said = refused(capfd, *LEARNED, "ppo.ignore_gate=false", "reward.gate.min_accuracy=0.999")
    assert "fails its gate: " in said and "set ppo.ignore_gate=true to use it all the same" in said


@slow
def test_a_function_gets_prompts_answers_and_references(
    reward: Callable[..., tuple[str, ...]],
) -> None:
    seen: list[tuple[str, str, str | None]] = []

    def look(prompt: str, answer: str, reference: str | None) -> float:
        seen.append((prompt, answer, reference))
        return float(len(seen) % 2)

    words = reward(look)
    source = "data.sources={p: {format: prompts, path: 'sample:prompts.jsonl', use: [prompts]}}"
    run(*words, source, "stages=[prepare,ppo]", "ppo.start=model", "ppo.max_steps=1", "ppo.epochs=1")
    assert len(seen) == 4 + 4 + 4  # before, a rollout, after
    from ftpipe import samples

    known = {}
    for line in (Path(samples.__file__).parent / "prompts.jsonl").read_text().splitlines():
        row = json.loads(line)
        text = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        known[text] = row.get("reference")
    for prompt, _, reference in seen:
        (text,) = [text for text in known if text in prompt]
        assert reference == known[text]


@pytest.mark.parametrize("algorithm", ["rloo", pytest.param("grpo", marks=slow)])
def test_answers_to_one_prompt_are_compared(
    algorithm: str, kept: list[Roles], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[list[Answer]] = []

    def watched(self: Any, *given: Any) -> list[Answer]:
        rows.append(draw(self, *given))
        return rows[-1]

    draw = trainer.PpoTrainer.draw
    monkeypatch.setattr(trainer.PpoTrainer, "draw", watched)
    # three held-out prompts: no whole groups
    words = (f"ppo.algorithm={algorithm}", "ppo.answers_per_prompt=2", "data.validation=3")
    made = run(*SHORT, *words, "ppo.max_steps=2", "ppo.beta=0.1")["ppo"]
    lines = rollouts(made)
    assert all(line["ratio_off"] < 1e-4 for line in lines)
    assert not [name for line in lines for name in line if "value" in name]
    (roles,) = kept
    assert not roles.trained(Role.value) and roles.trained(Role.policy)
    drawn = [batch for batch in rows if len({one.prompt for one in batch}) < len(batch)]
    assert len(drawn) == 2  # rollouts; held-out prompts are all different
    for batch in drawn:
        for one, other in zip(batch[::2], batch[1::2], strict=True):
            assert one.prompt == other.prompt
            assert one.tokens != other.tokens  # each has random numbers of its own


@pytest.mark.slow
def test_a_warm_up_wastes_no_rollout() -> None:
    # begun at 0, as a Trainer's is, the first one would teach nothing
    words = ("ppo.scheduler=constant_with_warmup", "ppo.warmup_steps=2")
    rates = [line["learning_rate"] for line in rollouts(run(*SHORT, *words)["ppo"])]
    assert rates == pytest.approx([0.5e-3, 1e-3, 1e-3])
