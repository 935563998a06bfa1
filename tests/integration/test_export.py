"""The export stage on tiny models: what comes out is the policy, and loads without ftpipe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ftpipe import artifacts, cli, launch, worker
from ftpipe.artifacts import Artifact
from ftpipe.choices import Part, Use
from ftpipe.data import table
from ftpipe.export import merging
from tests.conftest import InProcess
from tests.unit.export.test_chat import trained

pytestmark = pytest.mark.slow

SFT = ("sft.max_steps=4", "sft.samples=0", "sft.learning_rate=1e-2", "sft.eval_every=0")
SHORT = ("recipe=tiny-export", *SFT, "launch.threads=1", "data.validation=4", "export.rows=3")
NEW = ("data.template=oasst", "model.new_tokens=['<|prompter|>','<|assistant|>']")
# made by: make quantizer
QUANTIZER = Path(__file__).parents[2] / ".venv-quantizer" / "bin" / "python"
FOUR_BITS = ("export.quantize=[gptq,awq]", "export.group_size=32", f"export.quantizer={QUANTIZER}")
ROWS = [
    {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n}!"}]}
    for n in range(24)
]


def run(*words: str) -> dict[str, Artifact]:
    """Run the pipeline and return its artifacts by stage, the latest of each."""
    assert cli.main(["run", *words]) == 0
    manifests = Path("outputs/artifacts").glob("*/manifest.json")
    folders = [path.parent for path in sorted(manifests, key=lambda path: path.stat().st_mtime_ns)]
    return {found.stage: found for found in map(artifacts.open_artifact, folders)}


def logits(model: Any, tokens: int) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(
            input_ids=torch.arange(tokens - 60, tokens).reshape(2, 30)
        ).logits
    return found.float()


@pytest.mark.usefixtures("in_process", "empty_folder")
@pytest.mark.parametrize(
    "words",
    [
        (*NEW, "adapter.rslora=true"),
        (*NEW, "adapter.dora=true", "model.architecture.tie_word_embeddings=true"),
        ("adapter=full",),
        ("adapter=qlora", "adapter.dora=true"),
    ],
    ids=lambda words: " ".join(words),
)
def test_the_folder_says_what_the_policy_says(words: tuple[str, ...]) -> None:
    made = run(*SHORT, *words)
    bundle, sft = made["export"], made["sft"]
    assert bundle.kind == "bundle"
    assert abs(bundle.metrics["kl_mean"]) < 1e-9 and bundle.metrics["agreement"] == 1
    assert abs(bundle.metrics["loss_delta"]) < 1e-5
    exported = AutoModelForCausalLM.from_pretrained(str(bundle.path))
    tokens = len(AutoTokenizer.from_pretrained(str(bundle.path)))
    if "adapter=full" in words:
        policy: Any = AutoModelForCausalLM.from_pretrained(str(sft.path))
    elif "adapter=qlora" in words:
        return  # the unit tests have its weights
    else:
        base = AutoModelForCausalLM.from_pretrained(str(made["model"].path))
        base.resize_token_embeddings(tokens, mean_resizing=False)
        policy = PeftModel.from_pretrained(base, str(sft.path))
        told = json.loads((sft.path / "adapter_config.json").read_text())
        assert told["use_rslora"] is ("adapter.rslora=true" in words)
        assert told["use_dora"] is ("adapter.dora=true" in words)
    torch.testing.assert_close(logits(exported, tokens), logits(policy, tokens), rtol=1e-4, atol=1e-4)
    plain = logits(AutoModelForCausalLM.from_pretrained(str(made["model"].path)), 60)
    assert (plain[..., :60] - logits(exported, 60)[..., :60]).abs().max() > 0.01  # sft moved it


@pytest.mark.usefixtures("in_process", "empty_folder")
def test_nothing_wrong_is_published(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run(*SHORT, "stages=[prepare,sft]")
    added = merging.added
    monkeypatch.setattr(merging, "added", lambda weight, parts, scale: added(weight, parts, 3 * scale))
    assert cli.main(["export", *SHORT]) == 2
    told = capfd.readouterr().err
    assert "what was exported is not the policy: KL " in told and "nothing is published" in told
    assert "export.max_kl=0.01" in told and told.count("\n") == 1
    left = [path.name for path in Path("outputs/artifacts").glob("export-*")]
    assert all(name.endswith(".lock") for name in left), left
    # by the user's word it is; and then what is right is another artifact, since thresholds count
    assert cli.main(["export", *SHORT, "export.max_kl=99", "export.min_agreement=0"]) == 0
    monkeypatch.setattr(merging, "added", added)
    assert run(*SHORT)["export"].metrics["agreement"] == 1


@pytest.mark.usefixtures("in_process", "empty_folder")
def test_the_base_model_alone_is_exported_in_sixteen_bits() -> None:
    words = ("export.start=model", "stages=[export]", "export.dtype=bfloat16", "adapter=qlora")
    made = run(
        *SHORT, *words, "data.template=tokenizer", "export.min_agreement=0.8", "export.max_kl=0.1"
    )
    assert set(made) == {"model", "export"}
    exported = AutoModelForCausalLM.from_pretrained(str(made["export"].path), dtype="auto").state_dict()
    for name, weight in AutoModelForCausalLM.from_pretrained(str(made["model"].path)).named_parameters():
        assert torch.equal(exported[name], weight.to(torch.bfloat16)), name
    told = json.loads((made["export"].path / "parity.json").read_text())
    assert told["folder"]["on"] == "probes" and 0 < told["folder"]["kl_mean"] < 0.1


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Artifact]]:
    """A base of its own with a BPE tokenizer, tuned and exported, with files for llama.cpp."""
    where = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    tokenizer = trained(bos=True)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(str(where / "base"))
    tokenizer.save_pretrained(str(where / "base"))
    # as of Llama 2: transformers refuses to save it
    published = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "bos_token_id": 0}
    (where / "base" / "generation_config.json").write_text(json.dumps(published))
    (where / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        patch.setattr(launch, "Popen", InProcess)
        patch.setattr(worker, "die_with_parent", lambda: None)
        patch.setattr(worker, "quiet_libraries", lambda: None)
        made = run(
            *SHORT,
            *("model.init=pretrained", "model.path=base", "model.tokenizer=null"),
            *("data=own", "data.sources.mine={format: messages, path: rows.jsonl}"),
            *("data.template=llama2", "export.max_shard_size=50KB", "export.gguf=[f16,q8_0,q4_0]"),
            *(FOUR_BITS if QUANTIZER.exists() else ()),
        )
        yield made


def test_each_gguf_file_was_loaded_again_and_compared(world: dict[str, Artifact]) -> None:
    bundle = world["export"]
    told = json.loads((bundle.path / "parity.json").read_text())
    assert list(told)[:4] == ["folder", "f16", "q8_0", "q4_0"]
    apart = [told[kind]["kl_mean"] for kind in list(told)[:4]]
    assert apart == sorted(apart) and apart[1] > 1e-9 and apart[3] > 1e-4
    for kind in ("f16", "q8_0", "q4_0"):
        assert (bundle.path / f"tiny-export-{kind}.gguf").is_file()
        assert bundle.metrics[f"{kind}_kl_mean"] == told[kind]["kl_mean"]
    assert "FROM ./tiny-export-f16.gguf" in (bundle.path / "Modelfile").read_text()
    assert not list(bundle.path.glob(".*")) and not list(bundle.path.glob("*policy*"))


def unpacked(file: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Return a matrix of a file in 4 bits: 8 of them in an int32, the lowest first, 8 standing for 0.

    compressed-tensors, compressors/pack_quantized (pack_to_int32).
    """
    packed, scale = file[f"{name}.weight_packed"], file[f"{name}.weight_scale"]
    nibbles = (packed.unsqueeze(-1) >> torch.arange(0, 32, 4)) & 15
    grouped = (nibbles.flatten(1) - 8).reshape(*scale.shape, -1)
    return (grouped * scale.unsqueeze(-1)).flatten(1)


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """Return a matrix rounded to the nearest of 16 steps for each 32 inputs, calibrated by nothing."""
    groups = weight.reshape(len(weight), -1, 32)
    scale = groups.abs().amax(-1, keepdim=True) / 7.5
    return ((groups / scale).round().clamp(-8, 7) * scale).reshape_as(weight)


@pytest.mark.skipif(not QUANTIZER.exists(), reason="no environment with llmcompressor: make quantizer")
def test_four_bits_are_calibrated_and_compared(world: dict[str, Artifact]) -> None:
    bundle = world["export"]
    told = json.loads((bundle.path / "parity.json").read_text())
    assert list(told)[4:] == ["gptq", "awq"]
    whole = AutoModelForCausalLM.from_pretrained(str(bundle.path))
    weights = whole.state_dict()
    ids = [row["input_ids"] for row in table.read(world["prepare"].path, Use.demonstrations, Part.train)]

    def apart(model: Any) -> float:
        """Return the KL divergence of a model from the whole one on the rows trained on, nats."""
        with torch.no_grad():
            pairs = [
                [one(input_ids=torch.tensor([row])).logits[0].log_softmax(-1) for one in (whole, model)]
                for row in ids
            ]
        return float(torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in pairs]).mean())

    plain = AutoModelForCausalLM.from_pretrained(str(bundle.path))
    names = [name for name in weights if name.endswith("_proj.weight")]
    assert len(names) == 14  # seven in each of two layers
    plain.load_state_dict(weights | {name: rounded(weights[name]) for name in names})
    for kind in ("gptq", "awq"):
        assert bundle.metrics[f"{kind}_kl_mean"] == told[kind]["kl_mean"] > 1e-4
        folder = bundle.path / kind
        shards = sorted(folder.glob("*.safetensors"))
        assert len(shards) > 1  # of export.max_shard_size
        file = {name: one for shard in shards for name, one in load_file(shard).items()}
        model = AutoModelForCausalLM.from_pretrained(str(folder))
        again = {
            name: unpacked(file, name.removesuffix(".weight")) if name in names else file[name]
            for name in weights
        }
        written = AutoModelForCausalLM.from_pretrained(str(bundle.path))
        written.load_state_dict(again)
        torch.testing.assert_close(logits(model, 60), logits(written, 60), rtol=1e-4, atol=1e-4)
        assert apart(model) < apart(plain), kind  # what calibration is for
        for beside in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
            assert (folder / beside).read_bytes() == (bundle.path / beside).read_bytes()
        assert not (folder / "recipe.yaml").exists()
        modes = {file.stat().st_mode for file in (*folder.iterdir(), bundle.path / "config.json")}
        assert len(modes) == 1  # others may read them, too
        below = AutoModelForCausalLM.from_pretrained(str(bundle.path), subfolder=kind)
        assert torch.equal(logits(below, 60), logits(model, 60))
    card = (bundle.path / "README.md").read_text()
    assert "`gptq/` is the same in 4 bits by GPTQ, a scale for 32 inputs" in card
    assert "| awq/ |" in card
    pins = bundle.manifest["decided_by"]["pins"]
    assert pins["quantizer/llmcompressor"].startswith("0.14")


def test_weights_are_in_shards_under_the_names_of_the_base(world: dict[str, Artifact]) -> None:
    folder = world["export"].path
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(str(folder.parents[2] / "base"))
    assert set(index["weight_map"]) == set(base.state_dict())
    assert len(set(index["weight_map"].values())) > 2


# A process to which only transformers and what it needs can be imported.
ALONE = """
import json, sys

# what Python does not find (docs.python.org/3/reference/import.html, "The module cache")
sys.modules.update(dict.fromkeys(("ftpipe", "peft", "trl", "bitsandbytes", "gguf", "datasets")))
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, turns = sys.argv[1], json.loads(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer.apply_chat_template(turns, return_dict=False)
asked = tokenizer.apply_chat_template(
    turns[:-1], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
said = model.generate(**asked, max_new_tokens=5)[0].tolist()
ends = model.generation_config.eos_token_id
print(json.dumps({"ids": ids, "asked": asked["input_ids"][0].tolist(), "said": said, "ends": ends}))
"""


def test_it_loads_where_only_transformers_is(world: dict[str, Artifact], tmp_path: Path) -> None:
    bundle, dataset = world["export"].path.absolute(), world["prepare"].path
    rows = table.read(dataset, Use.demonstrations, Part.train)
    row = rows[0]
    turns = ROWS[row["row"] - 1]["messages"]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(bundle), json.dumps(turns)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["ids"] == row["input_ids"]  # the ids that were trained on
    assert told["asked"] == row["input_ids"][: row["prompt"]]
    assert told["ends"] == [1]
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(str(bundle.parents[2] / "base")), str(world["sft"].path)
    )
    ids = torch.tensor([told["asked"]])
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 1}
    assert told["said"] == model.generate(input_ids=ids, **options)[0].tolist()


def test_the_record_leads_back_to_data_and_base(world: dict[str, Artifact]) -> None:
    bundle = world["export"]
    assert set(bundle.manifest["inputs"]) == {"policy", "dataset"}
    card = (bundle.path / "README.md").read_text()
    for stage in ("sft", "prepare"):
        assert world[stage].path.name in card
    assert "not stated" in (bundle.path / "LICENSE-NOTES.md").read_text()
    decided = bundle.manifest["decided_by"]["config"]
    assert decided["export.max_kl"] == 0.01 and "export.push" not in decided
    assert not any(key.endswith("license") for key in world["sft"].manifest["decided_by"]["config"])
    assert decided["model.license"] is None
