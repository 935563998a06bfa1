"""PPO as a user would have written it with the last TRL that had it (1.12, ``trl.experimental.ppo``).

`benchmarks/ppo.py` runs it in an environment of its own. Reads one JSON object of settings from the
command line and prints one JSON object of measurements. TRL trains no adapter of a value function: the
value model's weights are all trained, and it, the reward model and the policy each have a base.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

settings = json.loads(sys.argv[1])
prompts = Dataset.from_file(settings["prompts"]).select_columns(["input_ids"])
tokenizer = AutoTokenizer.from_pretrained(settings["model"])
tokenizer.padding_side = "left"
# TRL finds the end of an answer by the padding token, so it must be another one than eos
tokenizer.pad_token_id = settings["pad"]
dtype = torch.bfloat16 if settings["bf16"] else torch.float32


def scored() -> Any:
    model = AutoModelForSequenceClassification.from_pretrained(
        settings["reward"], num_labels=1, dtype=dtype
    )
    model.config.pad_token_id = settings["pad"]
    return model


policy = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=dtype)
lines: list[dict[str, float]] = []
marks: list[float] = []


class Record(TrainerCallback):
    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        lines.append({name: value for name, value in logs.items() if isinstance(value, int | float)})
        marks.append(time.monotonic())


trainer = PPOTrainer(
    args=PPOConfig(
        output_dir=settings["out"],
        seed=0,
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="linear",
        adam_epsilon=1e-5,
        per_device_train_batch_size=settings["micro_batch"],
        gradient_accumulation_steps=settings["batch"] // settings["micro_batch"],
        local_rollout_forward_batch_size=settings["micro_batch"],
        total_episodes=settings["batch"] * settings["rollouts"],
        num_ppo_epochs=settings["ppo_epochs"],
        num_mini_batches=1,
        response_length=settings["max_new_tokens"],
        temperature=1.0,
        stop_token="eos",
        missing_eos_penalty=None,
        kl_coef=settings["beta"],
        vf_coef=0.1,
        gradient_checkpointing=False,
        bf16=settings["bf16"],
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        num_sample_generations=0,
        disable_tqdm=True,
    ),
    processing_class=tokenizer,
    model=policy,
    ref_model=None,
    reward_model=scored(),
    value_model=scored(),
    train_dataset=prompts,
    eval_dataset=prompts.select(range(1)),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    callbacks=[Record()],
)
started = time.monotonic()
trainer.train()
print(
    json.dumps(
        {
            "answers_per_second": settings["batch"] * settings["rollouts"] / (marks[-1] - started),
            "peak_memory_gib": (
                torch.cuda.max_memory_allocated() / 2**30
                if torch.cuda.is_available()
                else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            ),
            "scores": [line["objective/scores"] for line in lines],
            "kl": [line["objective/kl"] for line in lines],
        }
    )
)
