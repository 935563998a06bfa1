"""The same learning from preferences as a user would write it with TRL alone.

`benchmarks/preferences.py` runs it. Reads one JSON object of settings from the command line and prints
one JSON object of measurements.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

settings = json.loads(sys.argv[1])
rows = [json.loads(line) for line in Path(settings["rows"]).read_text("utf-8").splitlines()]
# WizardLM's prompt, as `data.template=wizardlm` renders it; TRL appends the eos itself.
data = Dataset.from_list(
    [
        {
            "prompt": f"{row['prompt']}\n\n### Response:",
            "chosen": row["chosen"],
            "rejected": row["rejected"],
        }
        for row in rows
    ]
)
tokenizer = AutoTokenizer.from_pretrained(settings["model"])
shared = dict(
    output_dir=settings["out"],
    seed=0,
    learning_rate=1e-4,
    num_train_epochs=1,
    per_device_train_batch_size=settings["micro_batch"],
    gradient_accumulation_steps=settings["batch"] // settings["micro_batch"],
    lr_scheduler_type="cosine",
    max_length=None,
    gradient_checkpointing=False,
    bf16=False,
    use_cpu=not torch.cuda.is_available(),
    logging_steps=10,
    logging_first_step=True,
    report_to="none",
    save_strategy="no",
    disable_tqdm=True,
)
if settings["stage"] == "reward":
    model = AutoModelForSequenceClassification.from_pretrained(
        settings["model"], num_labels=1, dtype=torch.float32
    )
    peft = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS")
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(**shared),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=peft,
    )
else:
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    peft, copy = None, None
    if settings["adapter"] is None:
        peft = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    else:  # after LoRA fine-tuning: a second model is the reference
        second = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
        copy = PeftModel.from_pretrained(second, settings["adapter"]).merge_and_unload()
        model = PeftModel.from_pretrained(model, settings["adapter"], is_trainable=True)
    trainer = DPOTrainer(
        model=model,
        ref_model=copy,
        args=DPOConfig(**shared, beta=0.1),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=peft,
    )
trainer.train()
print(
    json.dumps(
        {
            "tokens": trainer._total_train_tokens,
            "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "loss": trainer.state.log_history[0]["loss"],
        }
    )
)
