"""The reward stage on tiny models: what it learns, what it saves, what its rewards mean."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaForSequenceClassification,
)

from ftpipe import artifacts, cli
from ftpipe.artifacts import Artifact
from ftpipe.choices import Part, Use
from ftpipe.data import table
from ftpipe.errors import ModelError
from ftpipe.reward import model
from ftpipe.stages import reward

pytestmark = pytest.mark.usefixtures("in_process", "empty_folder")

SOURCES = (
    "data.sources={"
    "pairs: {format: ultrafeedback, path: 'sample:ultrafeedback.jsonl', use: [preferences]},"
    "ranked: {format: oasst, path: 'sample:oasst1.jsonl', use: [preferences]}}"
)
SHORT = (
    *("recipe=tiny", "stages=[prepare,reward]", "reward.start=model", "data=own", SOURCES),
    *("data.template=chatml", "data.validation=8", "launch.threads=1", "launch.micro_batch_size=2"),
    *("reward.batch_size=4", "reward.max_steps=2", "reward.learning_rate=5e-3", "reward.log_every=1"),
)
NEW = "model.new_tokens=['<|im_start|>','<|im_end|>']"
BOTH = SOURCES.replace("use: [preferences]}", "use: [preferences, demonstrations]}", 1)
POLICY = (
    *(*SHORT, BOTH, "stages=[prepare,sft,reward]", "reward.start=policy"),
    *("sft.samples=0", "sft.max_steps=3"),
)


def run(*words: str) -> dict[str, Artifact]:
    """Run the pipeline and return its artifacts by kind, the last made of each."""
    assert cli.main(["run", *words]) == 0
    manifests = Path("outputs/artifacts").glob("*/manifest.json")
    made = sorted(manifests, key=lambda path: path.stat().st_mtime_ns)
    return {found.kind: found for found in (artifacts.open_artifact(path.parent) for path in made)}


def groups(dataset: Artifact, part: Part) -> list[dict[str, Any]]:
    """Return rows of preferences as they lie on disk."""
    return [dict(row) for row in table.read(dataset.path, Use.preferences, part)]


def plain(path: Path, **options: Any) -> Any:
    """Load a reward model with the Hugging Face libraries alone."""
    whole = (path / "config.json").is_file()
    kind: Any = AutoModelForSequenceClassification if whole else AutoPeftModelForSequenceClassification
    loaded = kind.from_pretrained(path, **({} if whole else {"num_labels": 1}), **options).eval()
    for module in loaded.modules():  # bitsandbytes' inference layout on some CPUs rounds otherwise
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return loaded


def score(one: Any, ids: list[int]) -> float:
    with torch.no_grad():
        found: float = one(input_ids=torch.tensor([ids])).logits.item()
    return found


def in_four_bits() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Keep the trainers that the stage makes, to look at the model it trained."""
    kept: list[Any] = []
    make: Callable[..., Any] = reward.make_trainer

    def keep(*args: Any) -> Any:
        kept.append(make(*args))
        return kept[-1]

    monkeypatch.setattr(reward, "make_trainer", keep)
    return kept


@pytest.mark.parametrize(
    "words",
    [
        (*SHORT, "adapter=full"),
        pytest.param((*SHORT, "adapter=lora", NEW), marks=pytest.mark.slow),
        pytest.param((*SHORT, "adapter=qlora"), marks=pytest.mark.slow),
        pytest.param((*POLICY, "adapter=lora", NEW), marks=pytest.mark.slow),
        pytest.param((*SHORT, "adapter=full", NEW), marks=pytest.mark.slow),
        pytest.param((*POLICY, "adapter=full", NEW), marks=pytest.mark.slow),
        pytest.param((*POLICY, "adapter=qlora", NEW), marks=pytest.mark.slow),
    ],
    ids=lambda words: "-".join(word.rsplit("=")[-1][:14] for word in words[12:]),
)
def test_normalised_replies_have_mean_zero_and_deviation_one_for_plain_libraries_too(
    words: tuple[str, ...], trainers: list[Any]
) -> None:
    made = run(*words)
    path = made["reward_model"].path
    options: dict[str, Any] = {"dtype": torch.float32}
    quantization = in_four_bits() if "adapter=qlora" in words else None
    theirs = plain(path, **options, **({"quantization_config": quantization} if quantization else {}))
    tokenizer = AutoTokenizer.from_pretrained(path)
    held_out = groups(made["dataset"], Part.validation)
    # pad is no token of a row here, so transformers pools at its last one
    best = [row["input_ids"][0][: row["stops"][0]] for row in held_out]
    assert all(tokenizer.pad_token_id not in ids for ids in best) and len(best) >= 8
    raw = [score(theirs, ids) for ids in best]
    assert raw == pytest.approx([score(trainers[-1].model.eval(), ids) for ids in best], abs=1e-5)

    stated = json.loads((path / "reward.json").read_text())["members"]["."]
    normalised = [(value - stated["mean"]) / stated["deviation"] for value in raw]
    assert sum(normalised) == pytest.approx(0, abs=1e-4)
    assert sum(value**2 for value in normalised) / len(best) == pytest.approx(1, abs=1e-4)
    assert (stated["rows"], stated["of"]) == (len(best), "chosen, validation")

    loaded = model.load(path, tokenizer)  # held as it was trained
    longest = max(map(len, best))
    gaps = [longest - len(ids) for ids in best]
    ids_NL = torch.tensor([[7] * gap + ids for gap, ids in zip(gaps, best, strict=True)])
    mask_NL = torch.tensor([[0] * gap + [1] * len(ids) for gap, ids in zip(gaps, best, strict=True)])
    assert loaded.score(ids_NL, mask_NL).tolist() == pytest.approx(normalised, abs=1e-4)
    told = model.load(path, tokenizer, torch.float32, quantization)
    assert told.score(ids_NL, mask_NL).tolist() == pytest.approx(normalised, abs=1e-4)
    if quantization:
        whole = model.load(path, tokenizer, quantization=False).score(ids_NL, mask_NL)
        assert (whole - Tensor(normalised)).abs().max() > 1e-2
    assert loaded.disagreement(ids_NL, mask_NL).tolist() == [0.0] * len(best)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_halves_keep_the_head_whole(method: str) -> None:
    made = run(*SHORT, f"adapter={method}")
    path = made["reward_model"].path
    tokenizer = AutoTokenizer.from_pretrained(path)
    single, half = (model.load(path, tokenizer, dtype) for dtype in (torch.float32, torch.bfloat16))
    (file,) = path.glob("*model.safetensors")
    (stored,) = (weight for name, weight in load_file(file).items() if name.endswith("score.weight"))
    opened: Any = half.models[0]
    if method == "lora":
        opened = opened.base_model.model
        head = opened.score.modules_to_save["default"].weight
    else:
        head = opened.score.weight
    assert head.dtype == torch.float32 and torch.equal(head, stored)
    assert opened.model.embed_tokens.weight.dtype == torch.bfloat16
    ids_NL = torch.tensor([groups(made["dataset"], Part.train)[0]["input_ids"][0]])
    both = [one.score(ids_NL, torch.ones_like(ids_NL)).item() for one in (single, half)]
    assert both[0] == pytest.approx(both[1], abs=0.2) and both[0] != both[1]


@pytest.mark.slow
def test_the_first_loss_is_that_of_the_paper_by_hand() -> None:
    made = run(
        *SHORT,
        *("adapter.dropout=0", "reward.learning_rate=1e-12", "reward.max_steps=1"),
        *("reward.batch_size=64", "reward.l2=0.1", "reward.center=0.05", "reward.margin=0.3"),
    )
    theirs = plain(made["reward_model"].path)
    losses = []
    for row in groups(made["dataset"], Part.train):
        rewards = [
            score(theirs, ids[:stop]) for ids, stop in zip(row["input_ids"], row["stops"], strict=True)
        ]
        costs = []
        for better, worse in zip(row["pairs"][::2], row["pairs"][1::2], strict=True):
            w, l = rewards[better], rewards[worse]  # noqa: E741
            given = [row["scores"][at] for at in (better, worse)]
            margin = 0.0 if None in given else 0.3 * (given[0] - given[1])
            cost = math.log1p(math.exp(-(w - l - margin)))
            costs.append(cost + 0.1 * (w * w + l * l) / 2 + 0.05 * (w + l) ** 2)
        losses.append(sum(costs) / len(costs))
    assert {len(row["pairs"]) // 2 for row in groups(made["dataset"], Part.train)} >= {1, 3}
    assert len(losses) < 64  # empty groups fill the step and weigh nothing
    metrics = made["reward_model"].metrics
    assert metrics["loss_first"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def logged(made: dict[str, Artifact]) -> list[dict[str, float]]:
    lines = (made["reward_model"].path / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    names = ("loss", "accuracy", "margin", "reward")
    return [{n: line[f"reward/{n}"] for n in names} for line in found if "reward/loss" in line]


@pytest.mark.slow
def test_the_micro_batch_changes_neither_losses_nor_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    # not even where an architecture says that its own loss takes no count
    monkeypatch.setattr(LlamaForSequenceClassification, "accepts_loss_kwargs", False, raising=False)
    words = (
        *SHORT,
        "adapter.dropout=0",
        "reward.max_steps=null",
        "reward.epochs=1",
        "reward.batch_size=8",
    )
    losses, weights, tokens = {}, {}, {}
    for micro in (1, 2, 8):
        made = run(*words, f"launch.micro_batch_size={micro}")
        losses[micro] = logged(made)
        weights[micro] = load_file(made["reward_model"].path / "adapter_model.safetensors")
        tokens[micro] = made["reward_model"].metrics["tokens"]
    rows = groups(made["dataset"], Part.train)
    assert len(rows) % 8 and len(losses[1]) == math.ceil(len(rows) / 8)  # the last step is not full
    assert set(tokens.values()) == {sum(sum(row["stops"]) for row in rows)}
    for micro in (2, 8):
        for ours, theirs in zip(losses[micro], losses[1], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
        for name, weight in weights[1].items():
            assert (weight - weights[micro][name]).abs().max() < 1e-3, name


@pytest.mark.slow
def test_a_line_covers_the_steps_since_the_last_one() -> None:
    pairs = "data.sources={p: {format: preference, path: 'sample:preference.jsonl'}}"
    words = (*SHORT, pairs, "reward.max_steps=4")  # 4 prompts a step, each with one pair

    def logged(*more: str) -> list[dict[str, float]]:
        path = run(*words, *more)["reward_model"].path / "metrics.jsonl"
        read = [json.loads(line) for line in path.read_text().splitlines()]
        return [line for line in read if "reward/loss" in line]

    each = logged()
    some = logged("reward.log_every=1000", "reward.epochs=2")  # the first step and the last
    assert [line["step"] for line in some] == [1, 4]
    for name in ("loss", "accuracy", "margin", "reward"):
        expected = sum(line[f"reward/{name}"] for line in each[1:]) / 3
        assert some[1][f"reward/{name}"] == pytest.approx(expected, rel=1e-5), name


@pytest.mark.slow
def test_it_learns_its_own_pairs() -> None:
    made = run(*SHORT, "reward.max_steps=null", "reward.epochs=5", "reward.log_every=10")
    theirs = plain(made["reward_model"].path)
    untrained = run(*SHORT, "reward.max_steps=1", "reward.learning_rate=1e-12")
    before = plain(untrained["reward_model"].path)
    right: dict[str, list[bool]] = {"before": [], "after": []}
    for row in groups(made["dataset"], Part.train):
        for name, one in (("before", before), ("after", theirs)):
            rewards = [
                score(one, ids[:stop]) for ids, stop in zip(row["input_ids"], row["stops"], strict=True)
            ]
            for better, worse in zip(row["pairs"][::2], row["pairs"][1::2], strict=True):
                right[name].append(rewards[better] > rewards[worse])
    shares = {name: sum(found) / len(found) for name, found in right.items()}
    assert shares["after"] > 0.9 > shares["before"] + 0.1
    metrics = made["reward_model"].metrics
    assert metrics["loss_last"] < 0.4 < metrics["loss_first"]


@pytest.mark.slow
def test_the_held_out_accuracy_is_that_of_all_pairs() -> None:
    made = run(*SHORT, "reward.max_steps=8", "launch.micro_batch_size=4")
    theirs = plain(made["reward_model"].path)
    right = []
    for row in groups(made["dataset"], Part.validation):
        rewards = [
            score(theirs, ids[:stop]) for ids, stop in zip(row["input_ids"], row["stops"], strict=True)
        ]
        pairs = zip(row["pairs"][::2], row["pairs"][1::2], strict=True)
        right += [rewards[better] > rewards[worse] for better, worse in pairs]
    metrics = made["reward_model"].metrics
    assert metrics["held_out_accuracy"] == pytest.approx(sum(right) / len(right))
    assert metrics["accuracy_low"] < metrics["held_out_accuracy"] < metrics["accuracy_high"]


def labelled(file: str, coin: Callable[[int], bool]) -> None:
    """Write pairs whose reply that ends with a is the better one, unless a coin says otherwise."""
    draw = torch.Generator().manual_seed(0)
    lines = []
    for n in range(160):
        sizes = torch.randint(1, 6, (2,), generator=draw).tolist()
        true, false = ("-" * size + end for size, end in zip(sizes, "ab", strict=True))
        chosen, rejected = (true, false) if coin(n) else (false, true)
        lines.append(json.dumps({"prompt": f"Row {n}", "chosen": chosen, "rejected": rejected}))
    Path(file).write_text("\n".join(lines))


@pytest.mark.slow
def test_shuffled_labels_fail_the_gate_and_true_ones_pass(capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        *(*SHORT, "data.sources={own: {format: preference, path: rows.jsonl}}", "data.validation=40"),
        *(
            "reward.max_steps=null",
            "reward.epochs=2",
            "reward.batch_size=8",
            "launch.micro_batch_size=8",
        ),
    )
    coins = torch.randint(0, 2, (160,), generator=torch.Generator().manual_seed(1)).tolist()
    told = {}
    for name, coin in (("true", lambda n: True), ("shuffled", lambda n: bool(coins[n]))):
        labelled("rows.jsonl", coin)
        told[name] = run(*words)["reward_model"].metrics
        shown = capsys.readouterr().out
        assert ("gate:          passed" in shown) is (name == "true")
    assert told["true"]["gate_passed"] == 1.0 and told["true"]["accuracy_low"] > 0.5
    assert told["shuffled"]["gate_passed"] == 0.0 and told["shuffled"]["accuracy_low"] <= 0.5


@pytest.mark.slow
def test_the_gate_is_judged_anew_when_a_run_is_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    lax = ("reward.gate.min_accuracy=0", "reward.gate.max_length_correlation=1")
    made = run(*SHORT, *lax)
    assert made["reward_model"].metrics["gate_passed"] == 1.0
    assert "gate:          passed" in capsys.readouterr().out
    assert run(*SHORT, "reward.gate.min_accuracy=1")["reward_model"].path == made["reward_model"].path
    out = capsys.readouterr().out
    assert "nothing ran" in out and "not above reward.gate.min_accuracy=1" in out
    # so is the interval: at less confidence it lies within the one that was stored
    metrics = made["reward_model"].metrics
    low, high = metrics["accuracy_low"], metrics["accuracy_high"]
    assert f"its 95% interval from {low:.2%} to {high:.2%}" in out
    run(*SHORT, *lax, "reward.gate.confidence=0.6")
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if "its 60% interval from" in line]
    narrow = [float(word.rstrip("%")) / 100 for word in line.split() if "." in word]
    assert "95%" not in out and low < narrow[0] < metrics["held_out_accuracy"] < narrow[1] < high


@pytest.mark.slow
def test_members_are_trained_from_seeds_of_their_own_and_recognised_when_they_are_finished(
    monkeypatch: pytest.MonkeyPatch, trainers: list[Any]
) -> None:
    words = (*SHORT, "reward.ensemble=2")

    def fails(*_: Any) -> Any:
        raise RuntimeError("no power")

    with monkeypatch.context() as broken:
        broken.setattr(reward, "_conclude", fails)
        with pytest.raises(RuntimeError, match="no power"):
            cli.main(["run", *words])
    assert len(trainers) == 2
    made = run(*words)
    assert len(trainers) == 2  # nobody trained again
    path = made["reward_model"].path
    alone = run(*SHORT)["reward_model"].path
    first = load_file(path / "member-0/adapter_model.safetensors")
    same = load_file(alone / "adapter_model.safetensors")
    assert all(torch.equal(weight, same[key]) for key, weight in first.items())

    tokenizer = AutoTokenizer.from_pretrained(path / "member-0")
    ids = groups(made["dataset"], Part.validation)[0]["input_ids"][0]
    stated = json.loads((path / "reward.json").read_text())["members"]
    each = [
        (score(plain(path / name), ids) - one["mean"]) / one["deviation"] for name, one in stated.items()
    ]
    assert list(stated) == ["member-0", "member-1"] and abs(each[0] - each[1]) > 1e-3
    loaded = model.load(path, tokenizer)
    ids_NL = torch.tensor([ids])
    mask_NL = torch.ones_like(ids_NL)
    assert loaded.score(ids_NL, mask_NL).item() == pytest.approx(sum(each) / 2, abs=1e-4)
    apart = loaded.disagreement(ids_NL, mask_NL).item()
    assert apart == pytest.approx(abs(each[0] - each[1]) / 2, abs=1e-4)


@pytest.mark.slow
def test_a_policys_adapter_goes_on_as_the_rewards() -> None:
    made = run(*POLICY, NEW, "adapter.r=4", "adapter.alpha=12", "reward.learning_rate=1e-12")
    ours, theirs = (
        load_file(made[kind].path / "adapter_model.safetensors") for kind in ("reward_model", "policy")
    )
    gone = {name for name in theirs if "lm_head" in name}
    assert set(ours) == set(theirs) - gone | {"base_model.model.score.weight"} and gone
    for name in set(ours) & set(theirs):
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=0)
    assert any("token_adapter" in name for name in ours)
    stated = json.loads((made["reward_model"].path / "adapter_config.json").read_text())
    assert (stated["r"], stated["lora_alpha"], stated["task_type"]) == (4, 12, "SEQ_CLS")


@pytest.mark.slow
def test_rows_of_new_tokens_are_trained_and_saved_alone() -> None:
    made = run(*SHORT, NEW)
    saved = load_file(made["reward_model"].path / "adapter_model.safetensors")
    rows = {name: weight for name, weight in saved.items() if "lora" not in name and "score" not in name}
    assert [tuple(weight.shape) for weight in rows.values()] == [(2, 64)]
    base = load_file(made["base_model"].path / "model.safetensors")["model.embed_tokens.weight"]
    (delta,) = rows.values()
    assert ((delta - base.mean(0)).abs().amax(1) > 1e-3).all()  # they left the mean they began at


@pytest.mark.slow
def test_nothing_but_weights_numbers_words_and_plots_is_left() -> None:
    made = run(*SHORT, "reward.ensemble=2", "reward.save_every=1", "reward.keep_checkpoints=1")
    path = made["reward_model"].path
    left = {file.suffix for file in path.rglob("*") if file.is_file()}
    assert left <= {".safetensors", ".json", ".jsonl", ".md", ".diff", ".jinja", ".png"}
    assert not list(path.rglob("trained.json")) and not list(path.rglob("before.json"))
    assert len(list(path.glob("member-*/checkpoints/checkpoint-2"))) == 2


@pytest.mark.slow
def test_a_test_part_has_a_report_of_its_own() -> None:
    sources = SOURCES.replace(
        "data.sources={",
        "data.sources={test: {format: hh_rlhf, path: 'sample:hh_rlhf.jsonl', part: test},",
    )
    made = run(*SHORT, sources)
    path, metrics = made["reward_model"].path, made["reward_model"].metrics
    rows = groups(made["dataset"], Part.test)
    measured = json.loads((path / "test/report.json").read_text())["measures"]
    assert measured["prompts"] == len(rows) == 24
    assert metrics["test_held_out_accuracy"] == measured["accuracy"]["value"]
    assert json.loads((path / "report.json").read_text())["measures"]["prompts"] == 8


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "part"), [("replies", "validation"), ("demonstrations", "train")])
def test_what_is_normalised_is_chosen(kind: str, part: str) -> None:
    words = (*SHORT, BOTH, f"reward.normalize={kind}")
    made = run(*words, *(("data.validation=0",) if part == "train" else ()))
    theirs = plain(made["reward_model"].path)
    if kind == "replies":
        found = [
            ids[:stop]
            for row in groups(made["dataset"], Part.validation)
            for ids, stop in zip(row["input_ids"], row["stops"], strict=True)
        ]
    else:
        found = []
        for row in table.read(made["dataset"].path, Use.demonstrations, Part.train):
            end = max(at for at, label in enumerate(row["labels"]) if label != -100)
            found.append(row["input_ids"][: end + 1])
    raw = Tensor([score(theirs, ids) for ids in found])
    stated = json.loads((made["reward_model"].path / "reward.json").read_text())["members"]["."]
    assert (stated["rows"], stated["of"]) == (len(found), f"{kind}, {part}")
    assert stated["mean"] == pytest.approx(raw.mean().item(), abs=1e-4)
    assert stated["deviation"] == pytest.approx(raw.std(correction=0).item(), abs=1e-4)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("reward.normalize=demonstrations",), "but the dataset has none; let a source serve them"),
        (
            (
                "reward.margin=1",
                "data.sources={p: {format: preference, path: 'sample:preference.jsonl'}}",
            ),
            "reward.margin=1 asks for differences of the replies' scores, but no row has any",
        ),
        (
            ("model.architecture.max_position_embeddings=100",),
            "the model knows 100 positions; set data.max_length=100 or lower",
        ),
        (
            (
                "data.sources={p: {format: preference, path: 'sample:preference.jsonl', "
                "part: validation}, a: {format: alpaca, path: 'sample:alpaca.json'}}",
                "data.validation=0",
            ),
            "no prompt of the dataset's train part has replies of different rank",
        ),
        (
            ("data.validation=1",),
            "reward.normalize=chosen finds 1 reply (validation), and a deviation needs two; "
            "hold out more (data.validation)",
        ),
        (("adapter.targets=[score]",), "adapter.targets: score is the score, which is trained whole"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    words: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", *SHORT, *words]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.slow
def test_missing_scores_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    made = run(*SHORT, "reward.margin=0.1")
    rows = groups(made["dataset"], Part.train)
    without = sum(None in row["scores"] for row in rows)
    assert 0 < without < len(rows)
    said = f"{without} of {len(rows)} prompts have replies without scores: no margin there"
    assert said in capsys.readouterr().out


@pytest.mark.slow
def test_a_reward_model_of_another_dataset_is_refused() -> None:
    path = run(*SHORT)["reward_model"].path
    other = AutoTokenizer.from_pretrained(path)
    other.add_tokens(["<|im_start|>"])
    with pytest.raises(ModelError, match="trained with another vocabulary"):
        model.load(path, other)
