"""The sft stage on tiny models: what it learns from, what it saves, and what a second run does."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaForCausalLM

from ftpipe import artifacts, cli, training
from ftpipe.artifacts import Artifact
from ftpipe.choices import Part, Use
from ftpipe.data import table
from ftpipe.stages import sft
from ftpipe.trainer import DemonstrationTrainer

pytestmark = pytest.mark.usefixtures("in_process", "empty_folder")

SHORT = ("recipe=tiny", "sft.max_steps=4", "sft.samples=1", "sft.sample_tokens=4", "launch.threads=1")


def run(*words: str) -> dict[str, Artifact]:
    """Run the pipeline and return its artifacts by kind."""
    assert cli.main(["run", *words]) == 0
    return {found.kind: found for found in map(artifacts.open_artifact, finished())}


def finished() -> list[Path]:
    """Return every finished artifact's folder, the latest made last."""
    manifests = Path("outputs/artifacts").glob("*/manifest.json")
    return [path.parent for path in sorted(manifests, key=lambda path: path.stat().st_mtime_ns)]


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Keep the trainers that the stage makes, to look at the model it trained."""
    kept: list[Any] = []
    make: Callable[..., Any] = sft.make_trainer

    def keep(*args: Any) -> Any:
        kept.append(make(*args))
        return kept[-1]

    monkeypatch.setattr(sft, "make_trainer", keep)
    return kept


def probe(tokenizer: Any) -> torch.Tensor:
    ids: torch.Tensor = tokenizer("What is the capital of Peru?", return_tensors="pt")["input_ids"]
    return ids


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids).logits
    return found


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_adapter_loads_with_plain_peft_and_gives_the_same_logits(
    method: str, trainers: list[Any]
) -> None:
    made = run(*SHORT, f"adapter={method}")
    tokenizer = AutoTokenizer.from_pretrained(made["policy"].path)
    options: dict[str, Any] = {"dtype": torch.float32}
    if method == "qlora":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
    base = AutoModelForCausalLM.from_pretrained(made["base_model"].path, **options)
    for module in base.modules():  # bitsandbytes' inference layout on some CPUs rounds otherwise
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    untrained = logits(base, probe(tokenizer))
    loaded = PeftModel.from_pretrained(base, made["policy"].path)

    trained = logits(trainers[0].model, probe(tokenizer))
    assert torch.equal(logits(loaded, probe(tokenizer)), trained)
    assert not torch.allclose(trained, untrained, atol=1e-3)  # it did learn something


def test_qlora_holds_the_base_in_four_bits(trainers: list[Any]) -> None:
    run(*SHORT, "adapter=qlora")
    layer = trainers[0].model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    assert type(layer).__name__ == "Linear4bit"
    assert layer.weight.dtype == torch.uint8
    assert (layer.weight.quant_state.quant_type, layer.weight.quant_state.nested) == ("nf4", True)


@pytest.mark.slow
def test_looking_at_held_out_rows_leaves_a_qlora_training_as_it_was() -> None:
    # bitsandbytes repacks weights in eval mode on some CPUs, after which lower layers get no gradient
    looked, blind = (
        run(*SHORT, "adapter=qlora", f"sft.eval_every={every}", "adapter.dropout=0")["policy"]
        for every in (1, 0)
    )
    first, second = (load_file(policy.path / "adapter_model.safetensors") for policy in (looked, blind))
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    assert all(weight.abs().max() > 0 for name, weight in first.items() if "lora_B" in name)


def test_full_weights_load_with_plain_transformers(trainers: list[Any]) -> None:
    made = run(*SHORT, "adapter=full")
    tokenizer = AutoTokenizer.from_pretrained(made["policy"].path)
    loaded = AutoModelForCausalLM.from_pretrained(made["policy"].path)
    assert torch.equal(logits(loaded, probe(tokenizer)), logits(trainers[0].model, probe(tokenizer)))


def test_the_loss_is_the_cross_entropy_of_the_answers_alone(trainers: list[Any]) -> None:
    rows = [("2+2=", "4"), ("A longer prompt than the other one", "and its answer, café ☕")]
    lines = [json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in rows]
    Path("rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    made = run(
        *SHORT,
        "data=alpaca",
        "data.sources={own: {format: prompt_completion, path: rows.jsonl}}",
        "data.template=wizardlm",
        "data.validation=0",
        "sft.batch_size=2",
        "launch.micro_batch_size=2",
        "sft.learning_rate=1e-12",  # the weights stay where they are
        "adapter.dropout=0",
    )
    trainer = trainers[0]
    model = trainer.model.eval()
    batch = trainer.data_collator([trainer.train_dataset[at] for at in (0, 1)])
    got = trainer.compute_loss(model, dict(batch)).item()

    # By hand, from the bytes: one token a byte, 256 of them in the byte-level alphabet's order, then
    # pad and eos. The rows in the order of the file.
    tokenizer = AutoTokenizer.from_pretrained(made["dataset"].path / "tokenizer")
    eos = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    nats, count = 0.0, 0
    for prompt, answer in rows:
        before = len(f"{prompt}\n\n### Response:".encode())
        learned = len(answer.encode()) + 1  # and eos
        ids = tokenizer(f"{prompt}\n\n### Response:{answer}")["input_ids"] + [eos]
        assert len(ids) == before + learned
        scores = logits(model, torch.tensor([ids]))[0]
        targets = torch.tensor(ids[before:])
        nats += cross_entropy(scores[before - 1 : -1], targets, reduction="sum").item()
        count += learned
    assert got == pytest.approx(nats / count, rel=1e-5)
    assert made["policy"].metrics["loss_first"] == pytest.approx(nats / count, rel=1e-5)


@pytest.mark.slow
def test_the_held_out_loss_is_per_token_over_all_rows() -> None:
    made = run(*SHORT, "launch.micro_batch_size=1")
    base = AutoModelForCausalLM.from_pretrained(made["base_model"].path)
    model = PeftModel.from_pretrained(base, made["policy"].path)
    nats, count = 0.0, 0
    for row in table.read(made["dataset"].path, Use.demonstrations, Part.validation):
        labels = torch.tensor(row["labels"])[1:]
        scores = logits(model, torch.tensor([row["input_ids"]]))[0, :-1]
        nats += cross_entropy(scores, labels, reduction="sum", ignore_index=-100).item()
        count += int((labels != -100).sum())
    metrics = made["policy"].metrics
    assert metrics["held_out_loss"] == pytest.approx(nats / count, rel=1e-5)
    assert metrics["held_out_perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-5)
    assert metrics["held_out_loss"] < metrics["held_out_loss_before"]


@pytest.mark.parametrize(
    ("method", "attention", "micro"),
    [
        ("full", "sdpa", 2),
        ("lora", "sdpa", 2),
        *(
            pytest.param(method, attention, micro, marks=pytest.mark.slow)
            for method, attention, micro in [
                ("full", "eager", 1),
                ("lora", "sdpa", 1),
                ("lora", "eager", 2),
                ("qlora", "sdpa", 2),
                ("qlora", "eager", 1),
            ]
        ),
    ],
)
def test_packed_rows_have_the_loss_and_gradients_of_rows_alone(
    method: str, attention: str, micro: int, trainers: list[Any]
) -> None:
    made = run(
        *(*SHORT, *ALPACA, *PACKED, f"adapter={method}", "adapter.dropout=0"),
        *(f"model.attention={attention}", f"launch.micro_batch_size={micro}", "sft.max_steps=1"),
        "sft.learning_rate=1e-12",
    )
    trainer = trainers[0]
    model = trainer.model.train()
    fed = trainer.train_dataset
    shared = [at for at in range(len(fed)) if len(fed[at]["rows"]) > 1][:micro]
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}

    model.zero_grad()
    batch = trainer.data_collator([fed[at] for at in shared])
    loss = trainer.compute_loss(model, dict(batch))
    loss.backward()
    together = {name: weight.grad.clone() for name, weight in weights.items()}

    rows = table.read(made["dataset"].path, Use.demonstrations, Part.train)
    alone = [rows[at] for pack in shared for at in fed[pack]["rows"]]
    assert len(alone) > micro
    tokens = sum(label != -100 for row in alone for label in row["labels"][1:])
    model.zero_grad()
    nats = torch.zeros(())
    for row in alone:
        scores = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        targets = torch.tensor(row["labels"][1:])
        nats = nats + cross_entropy(scores, targets, reduction="sum", ignore_index=-100)
    (nats / tokens).backward()

    assert loss.item() == pytest.approx(nats.item() / tokens, rel=1e-5)
    assert int((batch["labels"] != -100).sum()) == tokens
    assert int(batch["tokens"]) == sum(len(row["input_ids"]) for row in alone)
    for name, weight in weights.items():
        limit = 1e-4 * float(weight.grad.abs().max()) + 1e-7
        torch.testing.assert_close(together[name], weight.grad, rtol=1e-3, atol=limit)


@pytest.mark.slow
@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("packing", [True, False])
def test_a_step_is_the_mean_over_all_its_tokens(
    packing: bool, counted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # sequences of a step hold unlike numbers of learned tokens; micro-batches must not be averaged,
    # not even where an architecture says that its own loss does not take their number (Gemma 3n does)
    if not counted:
        monkeypatch.setattr(LlamaForCausalLM, "accepts_loss_kwargs", False, raising=False)
    losses = {}
    for micro in (1, 8):
        words = (*SHORT, *ALPACA, *(PACKED if packing else ()), "adapter.dropout=0", "sft.log_every=1")
        policy = run(*words, f"launch.micro_batch_size={micro}")["policy"]
        lines = (policy.path / "metrics.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        losses[micro] = [line["sft/loss"] for line in found if "sft/loss" in line]
    assert len(losses[1]) == 4
    assert losses[8] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_an_epoch_sees_every_row_once(packing: bool, trainers: list[Any]) -> None:
    made = run(
        *(*SHORT, *ALPACA, "sft.max_steps=null", "sft.epochs=2", "adapter.dropout=0"),
        *(PACKED if packing else ()),
    )
    rows = table.read(made["dataset"].path, Use.demonstrations, Part.train)
    metrics = made["policy"].metrics
    sequences = sum(length > 0 for length in trainers[0].train_dataset["length"])
    assert (sequences < len(rows)) is packing
    assert sequences % 8, "the last step is not full: it is the one that could go wrong"
    assert metrics["steps"] == 2 * math.ceil(sequences / 8)
    assert metrics["tokens"] == 2 * sum(rows["length"])  # without padding


def test_a_model_that_lets_packed_rows_meet_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    bloom = "model.architecture={model_type: bloom, hidden_size: 32, n_layer: 2, n_head: 4}"
    words = [*SHORT, *ALPACA, *PACKED, bloom, "model.attention=eager"]
    assert cli.main(["run", *words]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ftpipe: ")]
    assert "data.packing: BloomForCausalLM with model.attention=eager lets packed rows see" in line
    assert line.endswith("set data.packing=false.")


ALPACA = (
    "data=alpaca",
    "data.sources={a: {format: alpaca, path: 'sample:alpaca.json'}}",
    "data.validation=7",
)
PACKED = ("data.packing=true", "data.max_length=600")
NEW = "model.new_tokens=['<|prompter|>','<|assistant|>','<|endoftext|>']"  # the last is there already


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "tied"),
    [
        ("full", False),
        ("lora", False),
        ("lora", True),
        *(
            pytest.param(method, tied, marks=pytest.mark.slow)
            for method, tied in [("full", True), ("qlora", False), ("qlora", True)]
        ),
    ],
)
def test_new_tokens_are_learned_and_saved(method: str, tied: bool, trainers: list[Any]) -> None:
    made = run(
        *(*SHORT, *MINE, NEW, f"adapter={method}", f"model.architecture.tie_word_embeddings={tied}"),
    )
    trained = trainers[0].model
    path = made["policy"].path
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer("<|prompter|>What?<|endoftext|><|assistant|>That.<|endoftext|>")["input_ids"]
    new = [tokenizer.convert_tokens_to_ids(token) for token in ("<|prompter|>", "<|assistant|>")]
    assert new == [258, 259] and len(tokenizer) == 260
    assert [token for token in ids if token >= 256] == [258, 257, 259, 257]

    if method == "full":
        loaded = AutoModelForCausalLM.from_pretrained(path)
    else:
        options: dict[str, Any] = {"dtype": torch.float32}
        if method == "qlora":
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
            )
        loaded = AutoPeftModelForCausalLM.from_pretrained(path, **options)
    for module in loaded.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    got = logits(loaded, torch.tensor([ids]))
    assert got.shape[-1] == 260
    assert torch.equal(got, logits(trained, torch.tensor([ids])))

    # the rows of what was new have left the mean of the others that they began at
    base = AutoModelForCausalLM.from_pretrained(made["base_model"].path)
    for part in ("get_input_embeddings", "get_output_embeddings"):
        before = getattr(base, part)().weight
        assert len(before) == 258
        after = getattr(loaded, part)().weight
        moved = (after[new] - before.mean(0)).abs().amax(1)
        assert (moved > 1e-3).all(), part
        if method != "full":
            assert torch.equal(after[:258], before)
    if method != "full":  # rows of the new tokens alone, not two matrices
        saved = load_file(path / "adapter_model.safetensors")
        rows = {name: tuple(weight.shape) for name, weight in saved.items() if "lora" not in name}
        assert set(rows.values()) == {(2, 64)} and len(rows) == (1 if tied else 2)


MINE = (
    "data=own",
    "data.sources={mine: {format: alpaca, path: 'sample:alpaca.json'}}",
    "data.template=oasst",
    "data.validation=7",
    "data.over_length=drop",
    "sft.learning_rate=1e-2",
)


@pytest.mark.slow
def test_the_held_out_loss_before_training_is_that_of_the_grown_model() -> None:
    made = run(*SHORT, *MINE, NEW)
    base: Any = AutoModelForCausalLM.from_pretrained(made["base_model"].path)
    nats, count = 0.0, 0
    with torch.no_grad():
        inputs, head = base.get_input_embeddings().weight, base.get_output_embeddings().weight
        grown = [torch.cat([rows, rows.mean(0).expand(2, -1)]) for rows in (inputs, head)]
        for row in table.read(made["dataset"].path, Use.demonstrations, Part.validation):
            vectors = grown[0][torch.tensor([row["input_ids"]])]
            hidden = base.model(inputs_embeds=vectors).last_hidden_state[0, :-1]
            labels = torch.tensor(row["labels"])[1:]
            nats += cross_entropy(hidden @ grown[1].T, labels, reduction="sum", ignore_index=-100).item()
            count += int((labels != -100).sum())
    assert made["policy"].metrics["held_out_loss_before"] == pytest.approx(nats / count, rel=1e-5)


def test_rows_beyond_the_models_positions_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SHORT, "model.architecture.max_position_embeddings=100"]
    assert cli.main(["run", *words]) == 2
    told = capsys.readouterr().err
    assert "the model knows 100 positions; set data.max_length=100 or lower" in told
    assert [path.name.split("-")[0] for path in finished()] == ["model", "prepare"]


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing_but_memory() -> None:
    plain = run(*SHORT, "adapter.dropout=0")["policy"]
    recomputed = run(*SHORT, "adapter.dropout=0", "sft.gradient_checkpointing=true")["policy"]
    assert plain.path != recomputed.path
    first, second = (
        load_file(found.path / "adapter_model.safetensors") for found in (plain, recomputed)
    )
    for name, weight in first.items():
        torch.testing.assert_close(weight, second[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_neftune_adds_noise_to_training_only() -> None:
    plain = run(*SHORT, "adapter.dropout=0")["policy"].metrics
    noisy = run(*SHORT, "adapter.dropout=0", "sft.neftune_alpha=50")["policy"].metrics
    assert noisy["loss_first"] != plain["loss_first"]
    assert noisy["held_out_loss_before"] == plain["held_out_loss_before"]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [*training.OPTIMIZERS])
def test_every_optimizer_takes_steps(optimizer: str) -> None:
    metrics = run(*SHORT, f"sft.optimizer={optimizer}", "sft.weight_decay=0.01")["policy"].metrics
    assert metrics["steps"] == 4
    assert metrics["held_out_loss"] != metrics["held_out_loss_before"]


@pytest.mark.slow
def test_checkpoints_are_kept_to_the_limit_as_safetensors_alone() -> None:
    policy = run(*SHORT, "sft.save_every=1", "sft.keep_checkpoints=2")["policy"].path
    kept = sorted(path.name for path in (policy / "checkpoints").iterdir())
    assert kept == ["checkpoint-3", "checkpoint-4"]
    suffixes = {path.suffix for path in policy.rglob("*") if path.is_file()}
    assert suffixes <= {".safetensors", ".json", ".jsonl", ".md", ".diff", ".jinja"}


def test_a_second_run_does_nothing_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    run(*SHORT)
    before = {path: path.stat().st_mtime_ns for path in Path("outputs/artifacts").rglob("*-*")}
    capsys.readouterr()
    run(*SHORT)
    assert "everything was made already; nothing ran" in capsys.readouterr().out
    after = {path: path.stat().st_mtime_ns for path in Path("outputs/artifacts").rglob("*-*")}
    assert after == before and len(before) > 3


def test_what_changes_decides_what_runs_again() -> None:
    def stages() -> list[str]:
        return sorted(path.name.split("-")[0] for path in finished())

    Path("rows.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{n}+1=", "completion": f"{n + 1}"}) + "\n" for n in range(40))
    )
    own = (
        *SHORT,
        "data.sources={own: {format: prompt_completion, path: rows.jsonl}}",
        "data.validation=4",
    )
    run(*own)
    assert stages() == ["model", "prepare", "sft"]
    run(*own, "sft.learning_rate=4e-3")
    assert stages() == ["model", "prepare", "sft", "sft"]
    text = Path("rows.jsonl").read_text()
    Path("rows.jsonl").write_text(text.replace("7+1=", "7+2=", 1))
    run(*own)
    assert stages() == ["model", "prepare", "prepare", "sft", "sft", "sft"]


def test_the_manifest_tells_what_was_done() -> None:
    policy = run(*SHORT)["policy"]
    record = policy.manifest["provenance"]
    assert record["seed"] == 0
    assert record["world_size"] == 1
    assert record["packages"]["torch"] == torch.__version__
    assert record["wall_seconds"] > 0 and record["peak_memory_gib"] > 0
    assert record["command"].startswith("ftpipe run recipe=tiny")
    assert record["hardware"]["cores"] >= 1
    if record["git"]:
        assert len(record["git"]["commit"]) == 40
        assert (policy.path / "uncommitted.diff").is_file() == record["git"]["dirty"]
    lines = [json.loads(line) for line in (policy.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "sft/loss" in line][:1] == [1]
    assert (policy.path / "samples.md").read_text().count("## Prompt") == 1


class Killed(BaseException):
    """Ends a run as a kill would: nothing handles it."""


def test_killed_when_all_is_trained_it_trains_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*SHORT, "sft.save_every=2", "sft.log_every=1")
    whole = run(*words)["policy"].path.rename(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(DemonstrationTrainer, "save_model", end)
        run(*words)
    again = run(*words)["policy"].path
    names = ("adapter_model.safetensors", "samples.md")
    assert all((whole / name).read_bytes() == (again / name).read_bytes() for name in names)
    lines = [
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (whole, again)
    ]
    losses = [[line["sft/loss"] for line in some if "sft/loss" in line] for some in lines]
    assert len(losses[0]) == 4 and losses[0] == losses[1]


def end(self: DemonstrationTrainer, output_dir: str, _internal_call: bool = False) -> None:
    """Let checkpoints be written, and nothing after them."""
    if not _internal_call:
        raise Killed
    super(DemonstrationTrainer, self).save_model(output_dir, _internal_call)
