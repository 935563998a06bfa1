"""How much memory a training needs, measured, beside what `ftpipe plan` says of it.

    make bench-memory                        # every setting, on this machine's GPU or its processors
    make bench-memory args="--only sft-lora"

Each setting trains three steps (PPO: two rollouts) of a model with random weights in a process of its
own, through the stage itself, on rows of nearly one length. Measured in the last of them: bytes that
PyTorch holds, counted as tensors alive when the step begins and every allocation after it (PyTorch's
own profiler of memory; on a GPU ``torch.cuda.max_memory_allocated``). In the step before it, with no
profiler: what the process needs beyond its imports (peak resident memory; freed memory goes back to the
system at once, see ``SETTLED``).

Writes benchmarks/results/memory-<cpu|gpu>.json.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from ftpipe import provenance

HERE = Path(__file__).resolve().parent
# Large blocks are mapped one by one, so that what is freed is gone; nothing is fetched; no thread is
# forked.
SETTLED = {
    "MALLOC_MMAP_THRESHOLD_": "1048576",
    "MALLOC_TRIM_THRESHOLD_": "1048576",
    "MALLOC_ARENA_MAX": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
SMOL = {  # SmolLM2-135M in every width, with fewer layers and words
    "model_type": "llama",
    "vocab_size": 16384,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 10,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
NEOX = {  # Pythia-160M likewise; its head is its own
    "model_type": "gpt_neox",
    "vocab_size": 16384,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
GPT2 = {  # the small GPT-2 likewise
    "model_type": "gpt2",
    "vocab_size": 16384,
    "n_embd": 768,
    "n_layer": 6,
    "n_head": 12,
    "n_positions": 1024,
    "tie_word_embeddings": True,
    "activation_function": "gelu_new",
}
PRECISION = "launch.precision=bf16"
CHECKPOINTED = "sft.gradient_checkpointing=true"


def sft(architecture: dict[str, Any], rows: int, length: int, *words: str) -> dict[str, Any]:
    """Return a setting of sft: its model, rows of a micro-batch, their length, and more words."""
    return {
        "stage": "sft",
        "architecture": architecture,
        "rows": rows,
        "length": length,
        "words": [
            "stages=[prepare,sft]",
            "sft.max_steps=3",
            "sft.samples=0",
            f"sft.batch_size={rows}",
            *words,
        ],
    }


def paired(
    stage: str, architecture: dict[str, Any], rows: int, length: int, *words: str
) -> dict[str, Any]:
    """Return a setting of dpo or reward, as ``sft`` does."""
    steps = [f"{stage}.max_steps=3", f"{stage}.batch_size={rows}"]
    steps += ["dpo.samples=0"] if stage == "dpo" else []
    return {
        "stage": stage,
        "architecture": architecture,
        "rows": rows,
        "length": length,
        "words": steps + list(words),
    }


SETTINGS: dict[str, dict[str, Any]] = {
    "sft-full": sft(SMOL, 2, 256, "adapter=full"),
    "sft-full-fp32": sft(SMOL, 2, 128, "adapter=full", "launch.precision=fp32"),
    "sft-full-checkpointing": sft(SMOL, 4, 256, "adapter=full", CHECKPOINTED),
    "sft-full-accumulated": sft(SMOL, 1, 256, "adapter=full", "sft.batch_size=2"),
    "sft-full-8bit": sft(SMOL, 2, 128, "adapter=full", "sft.optimizer=adamw_8bit"),
    "sft-full-adafactor": sft(SMOL, 2, 128, "adapter=full", "sft.optimizer=adafactor"),
    "sft-lora": sft(SMOL, 2, 512, "adapter=lora", "adapter.dropout=0"),
    "sft-lora-dropout": sft(SMOL, 4, 256, "adapter=lora", "adapter.dropout=0.05"),
    "sft-lora-checkpointing": sft(SMOL, 4, 512, "adapter=lora", CHECKPOINTED),
    "sft-qlora": sft(SMOL, 2, 256, "adapter=qlora"),
    "sft-qlora-checkpointing": sft(SMOL, 4, 256, "adapter=qlora", CHECKPOINTED),
    "sft-full-pythia": sft(NEOX, 2, 128, "adapter=full"),
    "sft-lora-pythia": sft(NEOX, 4, 256, "adapter=lora"),
    "sft-full-gpt2": sft(GPT2, 2, 128, "adapter=full"),
    "sft-lora-gpt2": sft(GPT2, 4, 256, "adapter=lora"),
    "dpo-one-adapter": paired(
        "dpo", SMOL, 1, 256, "stages=[prepare,dpo]", "adapter=lora", "dpo.start=model"
    ),
    "dpo-two-adapters": paired(
        "dpo",
        *(NEOX, 2, 128, "stages=[prepare,sft,dpo]", "adapter=lora"),
        *("sft.max_steps=1", "sft.batch_size=2", "sft.samples=0"),
    ),
    "dpo-full": paired("dpo", GPT2, 1, 128, "stages=[prepare,dpo]", "adapter=full", "dpo.start=model"),
    "reward-lora": paired(
        "reward", SMOL, 2, 256, "stages=[prepare,reward]", "adapter=lora", "reward.start=model"
    ),
    "reward-full": paired(
        "reward", NEOX, 2, 128, "stages=[prepare,reward]", "adapter=full", "reward.start=model"
    ),
}
for name, method, architecture in (
    ("ppo-lora", "lora", SMOL),
    ("ppo-qlora", "qlora", SMOL),
    ("ppo-full", "full", GPT2),
):
    SETTINGS[name] = {
        "stage": "ppo",
        "architecture": architecture,
        "rows": 2,
        "length": 64,
        "words": [
            *("stages=[prepare,ppo]", f"adapter={method}", "ppo.start=model", "ppo.reward=function"),
            *("ppo.function.name=length", "ppo.function.parameters={target: 20}", "ppo.samples=0"),
            *("ppo.max_steps=2", "ppo.batch_size=4", "ppo.max_new_tokens=32", "ppo.ppo_epochs=1"),
        ],
    }


def words_of(setting: dict[str, Any], rows: Path, gpu: bool) -> list[str]:
    """Return the words of a setting's command line."""
    use = {"sft": "demonstrations", "ppo": "prompts"}.get(setting["stage"], "preferences")
    tuned = any("prepare,sft,dpo" in word for word in setting["words"])
    uses = [use, "demonstrations"] if tuned else [use]
    architecture = ", ".join(f"{key}: {value}" for key, value in setting["architecture"].items())
    precision = [] if any("precision" in word for word in setting["words"]) else [PRECISION]
    return [
        *("recipe=tiny", "data=own", "data.template=plain", "data.validation=0", "data.duplicates=keep"),
        f"data.sources={{rows: {{format: preference, path: {rows}, use: [{','.join(uses)}]}}}}",
        *(f"data.max_length={setting['length']}", "data.over_length=truncate", "data.max_lost=1"),
        f"model.architecture={{{architecture}}}",
        f"launch.micro_batch_size={setting['rows']}",
        *("launch.workers=1", f"launch.device={'cuda' if gpu else 'cpu'}"),
        *(["launch.threads=null"] if gpu else ["launch.threads=1"]),
        *precision,
        *setting["words"],
    ]


def write_rows(path: Path, length: int, prompts: bool) -> None:
    """Write pairs of which every other one is cut at the length, and the others end shortly before
    it.
    """
    lines = []
    for number in range(6):
        short = 5 * (number % 2)
        prompt = "ask " * (length if prompts else 3)
        words = "and so on " * length
        reply = words[: length - len(prompt) - 3 - short] if not prompts and short else words
        lines.append({"prompt": prompt[: length - 4 - short], "chosen": reply, "rejected": f"x{reply}"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


class Meter:
    """Bytes alive, by PyTorch's count and the system's."""

    def __init__(self) -> None:
        import torch

        self.torch, self.gpu = torch, torch.cuda.is_available()
        self.found: dict[str, float] = {}
        self._profile: Any = None

    def alive(self) -> dict[str, float]:
        """Return bytes of all tensors that are alive, each storage once."""
        gc.collect()
        storages = {}
        for one in gc.get_objects():
            if isinstance(one, self.torch.Tensor):
                storage = one.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        return {"alive": float(sum(storages.values()))}

    def begin_resident(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak starts anew

    def end_resident(self) -> None:
        self.found["resident"] = _status("VmHWM")

    def begin(self) -> None:
        self.found |= self.alive()
        if self.gpu:
            self.torch.cuda.synchronize()
            self.torch.cuda.reset_peak_memory_stats()
            return
        activity = self.torch.profiler.ProfilerActivity.CPU
        self._profile = self.torch.profiler.profile(activities=[activity], profile_memory=True)
        self._profile.__enter__()

    def end(self) -> None:
        if self.gpu:
            self.found["peak"] = float(self.torch.cuda.max_memory_allocated())
            return
        self._profile.__exit__(None, None, None)
        events = self._profile.profiler.kineto_results.events()
        moves = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        now = most = 0
        for _, size in moves:
            now += size
            most = max(most, now)
        self.found["peak"] = self.found["alive"] + most


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Make a setting's inputs, run its stage here, and return what was measured and predicted."""
    from ftpipe import artifacts
    from ftpipe.resolve import resolved

    setting = SETTINGS[name]
    rows = folder / "rows.jsonl"
    write_rows(rows, setting["length"], setting["stage"] == "ppo")
    os.chdir(folder)
    (run,) = resolved(words_of(setting, rows, bool(provenance.gpus())))
    *before, last = run.plan()
    made: dict[str, artifacts.Artifact] = {}
    meter = Meter()
    for step in (*before, last):
        inputs = {kind: made[maker] for kind, maker in step.inputs.items()}
        out = folder / step.stage.name
        out.mkdir()
        stage = importlib.import_module(f"ftpipe.stages.{step.stage.name}")
        if step is last:
            gc.collect()
            _watched(step.stage.name, meter)
            base = _status("VmRSS")
        stage.run(run.cfg, inputs, out)
        made[step.stage.name] = artifacts.Artifact(
            step.stage.makes, step.stage.name, step.fingerprint, out, {}
        )
    meter.found["resident"] -= base
    return {"setting": name, "words": setting["words"], **meter.found}


def predicted(name: str, gpu: bool) -> dict[str, Any]:
    """Return what the formulas say of a setting on a GPU, or on a processor."""
    from ftpipe.fit.memory import peak
    from ftpipe.fit.model import model_of
    from ftpipe.fit.training import training_of
    from ftpipe.resolve import resolved

    setting = SETTINGS[name]
    (run,) = resolved(words_of(setting, Path("rows.jsonl"), gpu), elsewhere=True)
    found = peak(training_of(run.cfg, setting["stage"], model_of(run.cfg.model), gpu))
    return {
        "predicted": found.total,
        "moment": found.moment,
        "parts": vars(found.parts),
        "moments": found.moments,
    }


def _watched(stage: str, meter: Meter) -> None:
    """Let the meter look at the second and the third step of the stage, or at rollouts."""
    if stage == "ppo":
        from ftpipe.ppo.trainer import PpoTrainer

        rollout = PpoTrainer._rollout

        def watched(self: PpoTrainer, number: int) -> dict[str, float]:
            (meter.begin if number else meter.begin_resident)()
            shown = rollout(self, number)
            (meter.end if number else meter.end_resident)()
            return shown

        PpoTrainer._rollout = watched  # type: ignore[method-assign]
        return
    from transformers import TrainerCallback

    from ftpipe import training

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            {1: meter.begin_resident, 2: meter.begin}.get(state.global_step, lambda: None)()

        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            {2: meter.end_resident, 3: meter.end}.get(state.global_step, lambda: None)()

    train = training.train

    def with_watch(trainer: Any, *given: Any) -> Any:
        trainer.add_callback(Watch())
        return train(trainer, *given)

    training.train = with_watch


def in_a_process(name: str) -> dict[str, Any]:
    """Return what a setting shows in a child of this process, which has imported everything."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with tempfile.TemporaryDirectory() as folder:
                told = json.dumps(measure(name, Path(folder)))
                os.chdir("/")
            os.write(theirs, told.encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(theirs)
    with os.fdopen(ours) as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    if not told:
        raise SystemExit(f"{name} failed")
    found: dict[str, Any] = json.loads(told)
    return found


def shown(row: dict[str, Any]) -> None:
    """Add the error to a row, and print it."""
    row["error"] = row["predicted"] / row["peak"] - 1
    print(
        f"{row['setting']:26} predicted {row['predicted'] / 2**20:7.0f} MiB  "
        f"measured {row['peak'] / 2**20:7.0f}  error {row['error']:+.1%}  "
        f"resident {row['resident'] / 2**20:7.0f}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--only", default="", help="measure those whose names begin so; others stay in the record"
    )
    parser.add_argument("--dry", action="store_true", help="write nothing")
    parser.add_argument("--again", action="store_true", help="predict anew beside what was measured")
    chosen = parser.parse_args()
    gpu = bool(provenance.gpus())
    file = HERE / "results" / f"memory-{'gpu' if gpu else 'cpu'}.json"
    if chosen.again:
        if not file.is_file():
            parser.error(f"--again needs what was measured before, but there is no {file.name}")
        record = json.loads(file.read_text(encoding="utf-8"))
        for row in record["settings"]:
            row |= predicted(row["setting"], gpu)
            shown(row)
        file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        return 0
    if any(os.environ.get(key) != value for key, value in SETTLED.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **SETTLED})
    for name in ("model", "prepare", "sft", "dpo", "reward", "ppo"):
        importlib.import_module(f"ftpipe.stages.{name}")
    record = json.loads(file.read_text(encoding="utf-8")) if chosen.only and file.is_file() else {}
    rows = {row["setting"]: row for row in record.get("settings", [])}
    for name in SETTINGS:
        if name.startswith(chosen.only):
            rows[name] = in_a_process(name) | predicted(name, gpu)
            shown(rows[name])
    if chosen.dry:
        return 0
    record = {
        "date": datetime.date.today().isoformat(),
        "hardware": provenance.hardware(),
        "packages": provenance.packages(),
        "settings": [rows[name] for name in SETTINGS if name in rows],
    }
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written: {file.relative_to(HERE.parent)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
