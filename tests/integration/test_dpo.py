"""The dpo stage on tiny models: its reference, its numbers, and what comes out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from ftpipe import artifacts, cli
from ftpipe.artifacts import Artifact
from ftpipe.choices import Part, PreferenceLoss, Use
from ftpipe.data import table
from ftpipe.stages import dpo
from ftpipe.training_config import REFERENCE_FREE

pytestmark = pytest.mark.usefixtures("in_process", "empty_folder")
slow = pytest.mark.slow

SFT = ("sft.max_steps=6", "sft.samples=0", "sft.learning_rate=1e-2", "sft.eval_every=0")
PAIRS = (
    *("recipe=tiny", "stages=[prepare,sft,dpo]", "launch.threads=1", "data=own", "data.validation=4"),
    "data.sources={p: {format: preference, path: 'sample:preference.jsonl', "
    "use: [preferences, demonstrations]}}",
)
DPO = ("dpo.max_steps=3", "dpo.batch_size=4", "dpo.log_every=1", "dpo.samples=1", "dpo.sample_tokens=4")
SHORT = (*PAIRS, *SFT, *DPO, "dpo.learning_rate=2e-3")
KTO = (
    "data.sources={u: {format: unpaired, path: 'sample:unpaired.jsonl', "
    "use: [unpaired, demonstrations]}}",
    "dpo.loss=kto",
)


def run(*words: str) -> dict[str, Artifact]:
    """Run the pipeline and return its artifacts by stage, the latest of each."""
    assert cli.main(["run", *words]) == 0
    manifests = Path("outputs/artifacts").glob("*/manifest.json")
    folders = [path.parent for path in sorted(manifests, key=lambda path: path.stat().st_mtime_ns)]
    return {found.stage: found for found in map(artifacts.open_artifact, folders)}


def lines(policy: Artifact) -> list[dict[str, float]]:
    read = map(json.loads, (policy.path / "metrics.jsonl").read_text().splitlines())
    return [line for line in read if "dpo/loss" in line]


def whole_model(folder: Path, method: str = "full", dtype: torch.dtype = torch.float32) -> Any:
    """Return a model as plain transformers loads it."""
    options: dict[str, Any] = {}
    if method == "qlora":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, **options).eval()
    for module in model.modules():  # else some processors compute in bfloat16, whatever was asked for
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def loaded(base: Path, adapter: Path, method: str = "lora") -> Any:
    """Return a policy as plain transformers and PEFT load it."""
    return PeftModel.from_pretrained(whole_model(base, method), str(adapter)).eval()


def logps(model: Any, rows: Any) -> list[list[float]]:
    """Return log p of each reply token by token, one row at a time: shares no code with the stage."""
    found = []
    for row in rows:
        values = []
        for ids, start, stop in zip(row["input_ids"], row["starts"], row["stops"], strict=True):
            with torch.no_grad():
                scores = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            values.append(sum(float(scores[at - 1, ids[at]]) for at in range(start, stop)))
        found.append(values)
    return found


NEW_TOKENS = ("data.template=oasst", "model.new_tokens=['<|prompter|>','<|assistant|>']")
CAME_IN_SLOWLY = [
    ("adapter=qlora",),
    ("stages=[prepare,sft,merge,dpo]", "dpo.r=4", "dpo.alpha=8"),
    ("adapter=full",),
    (*NEW_TOKENS, "stages=[prepare,sft,reference,dpo]"),
    NEW_TOKENS,
    (*NEW_TOKENS, "stages=[prepare,sft,merge,reference,dpo]"),
    (*NEW_TOKENS, "stages=[prepare,reference,dpo]", "dpo.start=model"),
    (*NEW_TOKENS, "adapter=full", "stages=[prepare,sft,reference,dpo]"),
    ("stages=[prepare,dpo]", "dpo.start=model"),
    ("stages=[prepare,dpo]", "dpo.start=model", "adapter=full"),
    ("stages=[prepare,sft,reference,dpo]",),
    ("adapter.dropout=0.5",),
    ("dpo.gradient_checkpointing=true",),
    ("launch.precision=bf16",),
    ("model.architecture.attention_dropout=0.5",),
]


@pytest.mark.parametrize(
    "words",
    [(), *(pytest.param(words, marks=slow) for words in CAME_IN_SLOWLY)],
    ids=lambda words: " ".join(words) or "lora",
)
def test_the_first_loss_is_log_2_whatever_came_in(words: tuple[str, ...]) -> None:
    made = run(*SHORT, *words)
    first, *later = lines(made["dpo"])
    exact = "reference" not in made  # its log-probs were computed in other batches
    assert first["dpo/loss"] == pytest.approx(math.log(2), abs=1e-7 if exact else 1e-4)
    assert first["dpo/reward_margin"] == pytest.approx(0, abs=0.0 if exact else 1e-4)
    assert first["dpo/reward_chosen"] == pytest.approx(0, abs=0.0 if exact else 1e-4)
    assert later[-1]["dpo/reward_margin"] != pytest.approx(0, abs=1e-3)  # and then it moves


def test_the_reference_is_the_tuned_policy_and_not_the_base() -> None:
    made = run(*SHORT, "stages=[prepare,sft,reference,dpo]")
    dataset, base = made["prepare"].path, made["model"].path
    rows = table.read(dataset, Use.preferences, Part.train)
    stored = table.read(made["reference"].path, Use.preferences, Part.train)["logps"]
    tuned = logps(loaded(base, made["sft"].path), rows)
    raw = logps(whole_model(base), rows)
    moved = []
    for got, expected, other in zip(stored, tuned, raw, strict=True):
        assert got == pytest.approx(expected, rel=1e-5)
        moved += [abs(a - b) for a, b in zip(expected, other, strict=True)]
    assert sum(moved) / len(moved) > 1  # sft had moved it


@pytest.mark.parametrize(
    "method", ["lora", pytest.param("qlora", marks=slow), pytest.param("full", marks=slow)]
)
def test_the_rewards_are_those_of_the_saved_model_against_the_one_that_came_in(method: str) -> None:
    made = run(*SHORT, f"adapter={method}", "dpo.learning_rate=1e-3")
    rows = table.read(made["prepare"].path, Use.preferences, Part.validation)
    sft, aligned, base = (made[stage].path for stage in ("sft", "dpo", "model"))
    if method == "full":
        models = [whole_model(sft), whole_model(aligned)]
    else:
        models = [loaded(base, adapter, method) for adapter in (sft, aligned)]
    before, after = (logps(model, rows) for model in models)
    beta, margins, preferred = 0.1, [], []
    for row, old, new in zip(rows, before, after, strict=True):
        for better, worse in zip(row["pairs"][::2], row["pairs"][1::2], strict=True):
            margins.append(beta * (new[better] - old[better] - new[worse] + old[worse]))
            preferred.append(new[better] > new[worse])
    metrics = made["dpo"].metrics
    assert metrics["held_out_reward_margin"] == pytest.approx(sum(margins) / len(margins), abs=2e-4)
    assert metrics["held_out_reward_accuracy"] == sum(m > 0 for m in margins) / len(margins)
    assert metrics["held_out_logps_accuracy"] == sum(preferred) / len(preferred)
    expected = sum(math.log1p(math.exp(-margin)) for margin in margins) / len(margins)
    assert metrics["held_out_loss"] == pytest.approx(expected, abs=2e-4)


def test_what_is_saved_is_the_policy_alone() -> None:
    made = run(*SHORT, "dpo.save_every=2")
    folder = made["dpo"].path
    old, new = (load_file(made[stage].path / "adapter_model.safetensors") for stage in ("sft", "dpo"))
    assert old.keys() == new.keys()
    assert all(not torch.equal(old[name], new[name]) for name in old)
    assert not list(folder.rglob("reference"))
    left = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert left <= {".json", ".jsonl", ".safetensors", ".md", ".jinja", ".diff"}
    assert (folder / "samples.md").read_text().count("## Prompt") == 1


def test_the_reference_never_moves_and_takes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    make: Callable[..., Any] = dpo.make_trainer

    def keep(*args: Any) -> Any:
        kept.append(make(*args))
        return kept[-1]

    monkeypatch.setattr(dpo, "make_trainer", keep)
    made = run(*SHORT)
    ((_, model),) = kept
    frozen = {name: weight for name, weight in model.named_parameters() if ".reference." in name}
    learned = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert learned == {name.replace(".reference.", ".default.") for name in frozen}
    came_in = load_file(made["sft"].path / "adapter_model.safetensors")
    assert len(came_in) == len(frozen)
    for name, weight in frozen.items():
        assert torch.equal(weight, came_in[name.replace(".reference.", ".")]), name
        assert weight.grad is None


@slow
def test_computed_before_and_on_the_way_the_reference_is_the_same() -> None:
    online = run(*SHORT, "dpo.max_steps=6")["dpo"]
    known = run(*SHORT, "dpo.max_steps=6", "stages=[prepare,sft,reference,dpo]")["dpo"]
    assert online.fingerprint != known.fingerprint
    for one, other in zip(lines(online), lines(known), strict=True):
        assert one["dpo/loss"] == pytest.approx(other["dpo/loss"], abs=1e-4)
    first, second = (load_file(one.path / "adapter_model.safetensors") for one in (online, known))
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-3


def planned(capfd: pytest.CaptureFixture[str], *words: str) -> list[tuple[str, ...]]:
    """Return what ``plan`` says of each stage of each run."""
    capfd.readouterr()
    assert cli.main(["plan", *words]) == 0
    told = [line.split() for line in capfd.readouterr().out.splitlines() if line.startswith("  r")]
    return [tuple(word[:2]) for word in told if word[0] in ("run", "reuse")]


@pytest.mark.slow
def test_a_sweep_over_beta_computes_the_reference_once(capfd: pytest.CaptureFixture[str]) -> None:
    words = (*SHORT, "stages=[prepare,sft,reference,dpo]", "dpo.max_steps=1")
    sweep = (*words, "-m", "dpo.beta=0.05,0.1,0.2")
    stages = ("model", "prepare", "sft", "reference")
    first, ready = [[(state, stage) for stage in stages] for state in ("run", "reuse")]
    later = [*ready, ("run", "dpo")] * 2
    assert planned(capfd, *sweep) == [*first, ("run", "dpo"), *later]
    run(*words, "dpo.beta=0.05")
    assert planned(capfd, *sweep) == [*ready, ("reuse", "dpo"), *later]


# At the reference every log-ratio is 0; each value follows from the paper's equation by hand.
AT_THE_REFERENCE = {
    PreferenceLoss.sigmoid: math.log(2),
    PreferenceLoss.hinge: 1.0,
    PreferenceLoss.ipo: 25.0,  # (1 / (2 * 0.1))^2
    PreferenceLoss.robust: math.log(2),
    PreferenceLoss.exo_pair: 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1),
    PreferenceLoss.nca_pair: 2 * math.log(2),
    PreferenceLoss.bco_pair: 2 * math.log(2),
    PreferenceLoss.sppo_hard: 50.0,  # 2 (0.5 / 0.1)^2
    PreferenceLoss.apo_zero: 1.0,
    PreferenceLoss.apo_down: 1.0,
    PreferenceLoss.discopop: 0.5 * math.log(2) + 0.5,
    PreferenceLoss.sigmoid_norm: math.log(2),
    PreferenceLoss.kto: 0.5,
}


@slow
@pytest.mark.parametrize("loss", [*PreferenceLoss])
def test_every_loss_is_one_word(loss: PreferenceLoss) -> None:
    words = ["stages=[prepare,dpo]", "dpo.start=model", "dpo.max_steps=2", f"dpo.loss={loss}"]
    words += ["dpo.label_smoothing=0.1"] if loss is PreferenceLoss.exo_pair else []
    words += [*KTO] if loss is PreferenceLoss.kto else []
    first, last = lines(run(*SHORT, *words)["dpo"])
    if loss in REFERENCE_FREE:
        assert loss not in AT_THE_REFERENCE and first["dpo/reward_chosen"] < 0
    else:
        assert first["dpo/loss"] == pytest.approx(AT_THE_REFERENCE[loss], rel=1e-5)
    assert math.isfinite(last["dpo/loss"]) and last["dpo/loss"] != first["dpo/loss"]


@slow
def test_the_sft_term_adds_the_chosen_replys_nats_per_token() -> None:
    words = (*SHORT, "stages=[prepare,dpo]", "dpo.start=model", "dpo.max_steps=1", "dpo.batch_size=20")
    made = run(*words, "dpo.sft_weight=0.5")
    rows = table.read(made["prepare"].path, Use.preferences, Part.train)
    alone = logps(whole_model(made["model"].path), rows)
    chosen = [
        values[better] / (row["stops"][better] - row["starts"][better])
        for row, values in zip(rows, alone, strict=True)
        for better in row["pairs"][::2]
    ]
    assert len(chosen) == 20  # one step holds every pair
    expected = math.log(2) - 0.5 * sum(chosen) / len(chosen)
    assert lines(made["dpo"])[0]["dpo/loss"] == pytest.approx(expected, rel=1e-5)


def losses(*words: str) -> list[tuple[float, float]]:
    """Return loss and gradient norm of each step."""
    return [(line["dpo/loss"], line["dpo/grad_norm"]) for line in lines(run(*words)["dpo"])]


@slow
@pytest.mark.parametrize("extra", [(), ("dpo.loss=ipo", "dpo.sft_weight=1"), ("dpo.loss=orpo",), KTO])
def test_the_micro_batch_changes_nothing(extra: tuple[str, ...]) -> None:
    # 5 pairs a step: the last one of each epoch is filled up with empty ones
    words = (*SHORT, "stages=[prepare,dpo]", "dpo.start=model", "dpo.batch_size=6", "dpo.max_steps=4")
    found = [losses(*words, *extra, f"launch.micro_batch_size={micro}") for micro in (1, 3, 6)]
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert two == pytest.approx(one, rel=2e-4)


@slow
def test_recomputed_activations_give_the_same_gradients() -> None:
    kept, recomputed = (losses(*SHORT, f"dpo.gradient_checkpointing={on}") for on in ("false", "true"))
    for one, other in zip(kept, recomputed, strict=True):
        assert other == pytest.approx(one, rel=1e-5)


@slow
def test_a_line_covers_the_steps_since_the_last_one() -> None:
    words = (*SHORT, "stages=[prepare,dpo]", "dpo.start=model", "dpo.max_steps=5")  # 4 pairs a step
    each = lines(run(*words, "dpo.log_every=1")["dpo"])
    some = lines(run(*words, "dpo.log_every=1000", "dpo.epochs=2")["dpo"])  # the first and the last step
    assert [line["step"] for line in some] == [1, 5]
    for name in ("loss", "reward_margin", "reward_accuracy", "logps_chosen"):
        expected = sum(line[f"dpo/{name}"] for line in each[1:]) / 4
        assert some[1][f"dpo/{name}"] == pytest.approx(expected, rel=1e-5), name


@slow
def test_kto_reads_what_the_reference_stage_wrote() -> None:
    words = (*SHORT, *KTO, "dpo.max_steps=4")
    online = losses(*words)
    known = losses(*words, "stages=[prepare,sft,reference,dpo]")
    for one, other in zip(online, known, strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-5)


@slow
def test_it_learns_which_replies_are_preferred() -> None:
    made = run(*SHORT, "dpo.max_steps=20", "dpo.learning_rate=5e-3")["dpo"]
    shown = lines(made)
    assert shown[-1]["dpo/loss"] < 0.3 and shown[-1]["dpo/reward_accuracy"] == 1
    assert shown[-1]["dpo/reward_margin"] > 1


@pytest.mark.parametrize("method", ["lora", pytest.param("qlora", marks=slow)])
def test_merged_the_policy_says_the_same(method: str) -> None:
    made = run(*SHORT, *NEW_TOKENS, f"adapter={method}", "stages=[prepare,sft,merge]")
    merged = whole_model(made["merge"].path)
    base = whole_model(made["model"].path, method)
    tokenizer = AutoTokenizer.from_pretrained(str(made["merge"].path))
    assert tokenizer.chat_template and "<|prompter|>" in tokenizer.get_vocab()
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)  # the adapter holds the new rows
    policy = PeftModel.from_pretrained(base, str(made["sft"].path)).eval()
    ids = torch.arange(len(tokenizer) - 60, len(tokenizer)).reshape(2, 30)
    with torch.no_grad():
        apart = (merged(input_ids=ids).logits - policy(input_ids=ids).logits).abs().max()
    assert apart < 1e-4


@slow
def test_a_merged_qlora_policy_is_on_the_weights_that_were_quantised_in_training() -> None:
    # the base is stored in float32; training quantised it from bfloat16
    made = run(*SHORT, "adapter=qlora", "launch.precision=bf16", "stages=[prepare,sft,merge]")
    rows = table.read(made["prepare"].path, Use.preferences, Part.train)

    def quantised_from(dtype: torch.dtype) -> list[list[float]]:
        base = whole_model(made["model"].path, "qlora", dtype).dequantize(dtype=torch.float32)
        base = torch.nn.Module.to(base, torch.float32)
        return logps(PeftModel.from_pretrained(base, str(made["sft"].path)).eval(), rows)

    merged = logps(whole_model(made["merge"].path), rows)
    for one, two in zip(quantised_from(torch.bfloat16), merged, strict=True):
        assert two == pytest.approx(one, rel=1e-4)
    finer = zip(quantised_from(torch.float32), merged, strict=True)
    assert max(abs(one[0] - two[0]) for one, two in finer) > 1
    # and once more in 4 bits it is another one, which is said
    assert made["merge"].metrics["apart_in_four_bits"] > 10 * made["merge"].metrics["apart_mean"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("stages=[prepare,dpo]",), "'dpo' needs a policy, but nothing before it makes one."),
        (("stages=[prepare,sft,merge,dpo]", "adapter=full"), "adapter.method=full makes none"),
        (
            ("stages=[prepare,sft,reference,merge,dpo]",),
            "'reference' computes the log-probabilities of the policy of 'sft', but the one that comes "
            "in is that of 'merge'",
        ),
        (("dpo.r=4",), "dpo.r is of a fresh adapter, but the adapter that comes in is trained here"),
        (("dpo.loss=kto",), "'dpo' learns from unpaired, but no source serves them"),
        (("dpo.loss=sigmod",), "Did you mean 'sigmoid'?"),
        (("dpo.loss=hinge", "dpo.label_smoothing=0.1"), "dpo.label_smoothing=0.1 is out of range"),
        (("dpo.loss=exo_pair",), "in (0, 0.5) for exo_pair"),
        (("dpo.beta=0",), "dpo.beta=0.0 is out of range; allowed: above 0."),
        (("dpo.batch_size=6", "launch.micro_batch_size=4"), "dpo.batch_size=6 is not a multiple of"),
    ],
)
def test_bad_input_gets_one_sentence(
    words: tuple[str, ...], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", *SHORT, *words]) == 2
    assert said in capfd.readouterr().err
    assert not list(Path().rglob("dpo-*/manifest.json"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["dpo", "reward"])
def test_an_adapter_without_its_weights_is_refused(
    stage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    made = run(*SHORT, "stages=[prepare,sft]")
    (made["sft"].path / "adapter_model.safetensors").unlink()
    assert cli.main(["run", *SHORT, f"stages=[prepare,sft,{stage}]"]) == 2
    told = capfd.readouterr().err
    assert "is damaged (adapter_model.safetensors is missing); delete the folder" in told


def test_kto_with_one_held_out_prompt_says_what_to_do(capfd: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"{n}+1=", "completion": str(n + 1), "label": n % 2 == 0} for n in range(9)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = (*SHORT, "data.sources={u: {format: unpaired, path: rows.jsonl}}", "dpo.loss=kto")
    one_held_out = ("stages=[prepare,reference,dpo]", "dpo.start=model", "data.validation=1")
    assert cli.main(["run", *words, *one_held_out]) == 2
    assert "hold out more (data.validation)" in capfd.readouterr().err


@pytest.mark.slow
def test_another_policys_log_probs_are_refused(capfd: pytest.CaptureFixture[str]) -> None:
    words = (*SHORT, "stages=[prepare,sft,reference,dpo]", "dpo.max_steps=1")
    made = run(*words)
    stored = table.place(made["reference"].path, Use.preferences, Part.train)
    rows = table.read(made["reference"].path, Use.preferences, Part.train)["logps"][:]
    from ftpipe.preferences import reference

    stored.unlink()
    apart = {"logps": [[value + 5 for value in row] for row in rows]}
    reference.write(made["reference"].path, Use.preferences, Part.train, apart)
    manifest = made["reference"].path / artifacts.MANIFEST  # as if they had been made so
    told = json.loads(manifest.read_text())
    told["files"] = artifacts.digests(made["reference"].path)
    manifest.write_text(json.dumps(told))
    assert cli.main(["run", *words, "dpo.beta=0.3"]) == 2
    assert "the reference is not the policy that comes in" in capfd.readouterr().err


@slow
def test_metrics_are_those_of_the_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    made = run(*SHORT, "dpo.eval_every=2")["dpo"]
    metrics: Mapping[str, float] = made.metrics
    assert metrics["steps"] == 3
    read = [json.loads(line) for line in (made.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in read if "dpo/held_out_loss" in line] == [2]
    assert metrics["loss_last"] == lines(made)[-1]["dpo/loss"]
    assert metrics["held_out_loss_before"] == pytest.approx(math.log(2), abs=1e-6)
