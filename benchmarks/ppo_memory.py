"""What PPO with four roles on one 4-bit base needs: peak memory and time by phase.

    make bench-ppo-memory                                  # a 7B shape; needs a GPU
    make bench-ppo-memory args="--layers 2 --hidden 64"    # anywhere, to see that it runs

Random weights in the shape of LLaMA-7B, NF4 with double quantisation, a reward adapter of two steps,
then PPO: policy, reference, value function and reward model are adapters on the base. Prompts are filled
to one length and random weights hardly ever stop, so lengths are as stated. Writes
benchmarks/results/ppo-memory-<cpu|gpu>.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from ftpipe import provenance

HERE = Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--rollouts", type=int, default=3)
    chosen = parser.parse_args()
    architecture = {
        "model_type": "llama",
        "hidden_size": chosen.hidden,
        "intermediate_size": chosen.hidden * 43 // 16,
        "num_hidden_layers": chosen.layers,
        "num_attention_heads": max(chosen.hidden // 128, 4),
        "num_key_value_heads": max(chosen.hidden // 128, 4),
        "max_position_embeddings": 2048,
        "vocab_size": chosen.vocabulary,
    }
    gpu = bool(provenance.gpus())
    with tempfile.TemporaryDirectory() as scratch:
        there = Path(scratch)
        filling = "and so on " * chosen.prompt
        texts = [f"{number}. {filling}"[: chosen.prompt - 20] for number in range(chosen.batch)]
        (there / "prompts.jsonl").write_text("".join(json.dumps({"prompt": t}) + "\n" for t in texts))
        words = [
            *("recipe=tiny", "data=own", "data.template=wizardlm", "data.validation=0", "adapter=qlora"),
            "data.sources={prompts: {format: prompts, path: prompts.jsonl}, "
            "pairs: {format: preference, path: 'sample:preference.jsonl'}}",
            "model.architecture=" + "{" + ", ".join(f"{k}: {v}" for k, v in architecture.items()) + "}",
            *("stages=[prepare,reward,ppo]", "reward.start=model", "ppo.start=model"),
            *("reward.max_steps=2", f"reward.batch_size={chosen.micro_batch}"),
            *("ppo.ignore_gate=true", f"ppo.batch_size={chosen.batch}", "ppo.samples=0"),
            *(f"ppo.max_steps={chosen.rollouts}", f"ppo.max_new_tokens={chosen.max_new_tokens}"),
            *("ppo.gradient_checkpointing=true", "ppo.optimizer=adamw"),
            *(f"launch.micro_batch_size={chosen.micro_batch}", "launch.device=auto"),
            *("launch.precision=auto", "launch.threads=null"),
        ]
        command = [sys.executable, "-m", "ftpipe.cli", "run", *words]
        subprocess.run(command, cwd=there, check=True)
        (made,) = (there / "outputs/artifacts").glob("ppo-*/manifest.json")
        manifest = json.loads(made.read_text())
        lines = [json.loads(line) for line in (made.parent / "metrics.jsonl").read_text().splitlines()]
    record = {
        "date": datetime.date.today().isoformat(),
        "hardware": provenance.hardware(),
        "packages": provenance.packages(),
        "settings": vars(chosen) | {"architecture": architecture},
        "peak_gpu_gib": manifest["metrics"].get("peak_gpu_gib"),
        "peak_memory_gib": manifest["provenance"]["peak_memory_gib"],
        "seconds by phase": [
            {part: line[f"ppo/seconds_{part}"] for part in ("rollout", "scoring", "update")}
            for line in lines
        ],
        "length": [line["ppo/length"] for line in lines],
    }
    name = f"ppo-memory-{'gpu' if gpu else 'cpu'}.json"
    (HERE / "results" / name).write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: benchmarks/results/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
