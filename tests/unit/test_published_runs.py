"""The recipes of systems known by name, against their published numbers; see also test_published.py.

Each number stands here with the file that it was read from. A recipe of a published run may state no
number that is not here, and no recipe may be in none of the tables.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from ftpipe import cli, combinations, compose, resolve, schema

# Hydra composes one recipe after another.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("empty_folder")]

# Tested in test_published.py.
EARLIER = {
    *("alpaca-7b", "qlora-llama7b", "zephyr-7b-dpo", "zephyr-7b-dpo-qlora", "dpo-pythia2.8b-hh"),
    *("oasst-rm-pythia1.4b", "oasst-ppo-pythia1.4b", "instructgpt-tldr-pythia1b", "rlhf-llama7b"),
}
# Not published runs: they say so.
OURS = {
    *("tiny", "tiny-dpo", "tiny-ppo", "tiny-reward", "evolve-smollm2", "smollm2-135m-alpaca"),
    *("smollm2-135m-dpo", "smollm2-135m-ppo", "smollm2-135m-reward", "smollm2-135m-rlhf"),
    *("openllama-7b-qlora", "stablelm-2-1.6b-qlora", "starcoder2-3b-qlora"),
    *("tiny-evaluate", "tiny-export"),
}

# transformers, TrainingArguments, where a script is silent
TRAINER = {
    "sft.adam_beta1": 0.9,
    "sft.adam_beta2": 0.999,
    "sft.adam_epsilon": 1e-8,
    "sft.weight_decay": 0.0,
    "sft.max_grad_norm": 1.0,
}
# lm-sys/FastChat, README.md "Fine-tuning Vicuna-7B with Local GPUs"
VICUNA_7B = {
    **TRAINER,
    "model.path": "huggyllama/llama-7b",  # --model_name_or_path ~/model_weights/llama-7b
    "adapter.method": "full",
    "seed": 42,  # TrainingArguments
    "data.template": "vicuna",  # fastchat/conversation.py: vicuna_v1.1
    "data.learn": ["assistant"],  # fastchat/train/train.py: preprocess masks the user's turns
    "data.max_length": 2048,  # --model_max_length 2048
    "data.over_length": "split",  # README: lengthy conversations are divided into smaller segments
    "data.packing": False,
    "data.validation": 0,  # --evaluation_strategy "no"
    "sft.learning_rate": 2e-5,  # --learning_rate 2e-5
    "sft.epochs": 3,  # --num_train_epochs 3
    "sft.batch_size": 2 * 16 * 4,  # per device 2, accumulation 16, --nproc_per_node=4
    "sft.optimizer": "adamw",  # train.py: adamw_torch
    "sft.scheduler": "cosine",  # --lr_scheduler_type "cosine"
    "sft.warmup_ratio": 0.03,  # --warmup_ratio 0.03
    "sft.gradient_checkpointing": True,  # --gradient_checkpointing True
    "sft.log_every": 1,  # --logging_steps 1
    "sft.save_every": 1200,  # --save_steps 1200
    "sft.keep_checkpoints": 10,  # --save_total_limit 10
    "launch.micro_batch_size": 2,  # --per_device_train_batch_size 2
    "launch.precision": "bf16",  # --bf16 True
    "launch.tf32": True,  # --tf32 True
}
VICUNA_13B = {
    **VICUNA_7B,
    "model.path": "huggyllama/llama-13b",
    "sft.batch_size": 128,  # README.md, table: Vicuna-13B, global batch size 128
    "launch.micro_batch_size": 1,  # scripts/train_vicuna_13b.sh: --per_device_train_batch_size 1
}
# nlpxucan/WizardLM, WizardLM/README.md "Fine-tuning"; src/configs/deepspeed_config.json
WIZARDLM_7B = {
    **TRAINER,
    "model.path": "huggyllama/llama-7b",
    "adapter.method": "full",
    "data.template": "wizardlm",  # train_freeform.py: PROMPT_DICT
    "data.learn": ["assistant"],  # train_freeform.py: IGNORE_INDEX
    "data.max_length": 2048,  # table: Max length 2048
    "data.over_length": "truncate",  # train_freeform.py: truncation=True
    "data.validation": 0,  # --evaluation_strategy "no"
    "seed": 42,  # TrainingArguments
    "sft.learning_rate": 2e-5,  # table: 2e-5
    "sft.epochs": 3,  # table: 3
    "sft.batch_size": 64,  # table: 64
    "sft.scheduler": "cosine",  # table: cosine
    "sft.warmup_steps": 2,  # table: Warmup step 2
    "sft.max_grad_norm": 0,  # deepspeed_config.json: no gradient_clipping
    "sft.gradient_checkpointing": True,  # --gradient_checkpointing True
    "sft.log_every": 2,  # --logging_steps 2
    "sft.save_every": 800,  # --save_steps 800
    "sft.keep_checkpoints": 3,  # --save_total_limit 3
    "launch.micro_batch_size": 8,  # --per_device_train_batch_size 8
    "launch.precision": "bf16",  # --fp16 True, whose loss scale is not shared between ranks here
}
# artidoro/qlora, scripts/finetune_guanaco_13b.sh
GUANACO_13B = {
    "model.path": "huggyllama/llama-13b",
    "adapter.method": "qlora",
    "adapter.r": 64,  # --lora_r 64
    "adapter.alpha": 16,  # --lora_alpha 16
    "adapter.dropout": 0.05,  # --lora_dropout 0.05
    "adapter.targets": ["all-linear"],  # --lora_modules all
    "adapter.quantization": "nf4",  # --quant_type nf4
    "adapter.double_quantization": True,  # --double_quant
    "data.max_length": 1 + 512,  # bos, --target_max_len 512
    "seed": 0,  # --seed 0
    "sft.learning_rate": 2e-4,  # --learning_rate 0.0002
    "sft.max_steps": 1875,  # --max_steps 1875
    "sft.batch_size": 4 * 4,  # per device 4, accumulation 4
    "sft.optimizer": "paged_adamw_32bit",  # qlora.py
    "sft.adam_beta2": 0.999,  # --adam_beta2 0.999
    "sft.weight_decay": 0.0,  # --weight_decay 0.0
    "sft.max_grad_norm": 0.3,  # --max_grad_norm 0.3
    "sft.scheduler": "constant",  # --lr_scheduler_type constant
    "sft.group_by_length": True,  # --group_by_length
    "sft.gradient_checkpointing": True,  # --gradient_checkpointing
    "sft.log_every": 10,  # --logging_steps 10
    "sft.eval_every": 187,  # --eval_steps 187
    "sft.save_every": 500,  # --save_steps 500
    "sft.keep_checkpoints": 40,  # --save_total_limit 40
    "launch.micro_batch_size": 4,  # --per_device_train_batch_size 4
    "launch.precision": "bf16",  # --bf16
}
# scripts/finetune_guanaco_33b.sh and _65b.sh differ in the model alone
GUANACO_33B = {
    **GUANACO_13B,
    "model.path": "huggyllama/llama-30b",
    "sft.learning_rate": 1e-4,  # --learning_rate 0.0001
    "sft.save_every": 200,  # --save_steps 200
}
OASST_LANGUAGES = [
    *("bg", "ca", "cs", "da", "de", "en", "es", "fr", "hr", "hu"),
    *("it", "nl", "pl", "pt", "ro", "ru", "sl", "sr", "sv", "uk"),
]
# LAION-AI/Open-Assistant, model/model_training/configs/config.yaml: defaults
OASST = {
    "seed": 0xA1221F97,  # rng_seed: 0xa1221f97
    "model.new_tokens": ["<|prompter|>", "<|assistant|>", "<|system|>"],  # formatting.py
    "data.template": "oasst",
    "data.learn": ["assistant"],  # label_masking: true
    "data.validation": 0.05,  # val_split: 0.05
    "sft.adam_beta1": 0.9,  # adam_beta1: 0.9
    "sft.adam_beta2": 0.95,  # adam_beta2: 0.95
    "sft.adam_epsilon": 1e-12,  # adam_epsilon: 1e-12
    "sft.weight_decay": 0.0,  # weight_decay: 0.00
    "sft.max_grad_norm": 2.0,  # max_grad_norm: 2.0
    "sft.log_every": 10,  # logging_steps: 10
    "sft.keep_checkpoints": 4,  # save_total_limit: 4
    "sft.optimizer": "adamw",  # zero config: AdamW
    "sft.scheduler": "linear",  # zero config: WarmupDecayLR
    "sft.gradient_checkpointing": True,  # each card: gradient_checkpointing: true
}
# the model card of OpenAssistant/oasst-sft-6-llama-30b-xor, "Configuration"
OASST_LLAMA_30B = {
    **OASST,
    "model.path": "huggyllama/llama-30b",
    "adapter.method": "full",
    "data.max_length": 2048,  # max_length: 2048
    "data.sources.oasst1.languages": OASST_LANGUAGES,  # lang
    "data.sources.sharegpt.weight": 0.8,  # vicuna: fraction: 0.8
    "sft.learning_rate": 1e-5,  # learning_rate: 1e-5
    "sft.epochs": 8,  # num_train_epochs: 8
    "sft.batch_size": 2 * 16,  # per_device_train_batch_size: 2, gradient_accumulation_steps: 16
    "sft.warmup_steps": 20,  # warmup_steps: 20
    "sft.eval_every": 101,  # eval_steps: 101
    "sft.save_every": 292,  # save_steps: 292
    "sft.keep_checkpoints": 3,  # save_total_limit: 3
    "launch.micro_batch_size": 2,  # per_device_train_batch_size: 2
    "launch.precision": "bf16",  # dtype: fp16, as above
}
# Lightning-AI/litgpt, config_hub/finetune/falcon-7b/qlora.yaml
LITGPT_FALCON = {
    "model.path": "tiiuae/falcon-7b",  # checkpoint_dir: checkpoints/tiiuae/falcon-7b
    "adapter.method": "qlora",
    "adapter.r": 32,  # lora_r: 32
    "adapter.alpha": 16,  # lora_alpha: 16
    "adapter.dropout": 0.05,  # lora_dropout: 0.05
    "adapter.targets": ["query_key_value"],  # lora_query, lora_value: true; of a fused layer
    "adapter.dtype": "bfloat16",  # precision: bf16-true
    "adapter.quantization": "nf4",  # quantize: bnb.nf4
    "adapter.double_quantization": False,  # not bnb.nf4-dq
    "data.template": "alpaca",  # prompt_style: alpaca
    "data.max_length": 512,  # max_seq_length: 512
    "data.validation": 0.05,  # val_split_fraction: 0.05
    "seed": 1337,  # seed: 1337
    "sft.learning_rate": 2e-4,  # lr: 0.0002
    "sft.weight_decay": 0.0,  # weight_decay: 0.0
    "sft.adam_beta1": 0.9,  # betas
    "sft.adam_beta2": 0.95,
    "sft.adam_epsilon": 1e-8,  # torch.optim.AdamW
    "sft.epochs": 4,  # epochs: 4
    "sft.batch_size": 8,  # global_batch_size: 8
    "sft.warmup_steps": 10,  # lr_warmup_steps: 10
    "sft.scheduler": "cosine",  # finetune/lora.py, get_lr_scheduler
    "sft.max_grad_norm": 0,  # max_norm is empty
    "sft.log_every": 1,  # log_interval: 1
    "sft.eval_every": 100,  # interval: 100
    "sft.save_every": 200,  # save_interval: 200
    "launch.micro_batch_size": 1,  # micro_batch_size: 1
    "launch.precision": "bf16",  # precision: bf16-true
}
# Lightning-AI/litgpt, config_hub/finetune/llama-2-7b/qlora.yaml
LITGPT_LLAMA = {
    **LITGPT_FALCON,
    "model.path": "meta-llama/Llama-2-7b-hf",
    "adapter.targets": ["q_proj", "v_proj"],  # lora_query, lora_value: true, all others false
    "launch.micro_batch_size": 2,  # micro_batch_size: 2
}

PUBLISHED: dict[str, dict[str, Any]] = {
    # tatsu-lab/stanford_alpaca, README.md "Fine-tuning", column LLaMA-13B
    "alpaca-13b": {
        **TRAINER,
        "model.path": "huggyllama/llama-13b",
        "sft.learning_rate": 1e-5,  # Learning rate 1e-5
        "sft.epochs": 5,  # Epochs 5
        "sft.batch_size": 128,  # Batch size 128
        "data.max_length": 512,  # Max length 512
        "sft.warmup_ratio": 0.03,  # --warmup_ratio 0.03
        "sft.scheduler": "cosine",  # --lr_scheduler_type "cosine"
    },
    "vicuna-7b": VICUNA_7B,
    "vicuna-13b": VICUNA_13B,
    "wizard-vicuna-13b": VICUNA_13B,  # README.md: "trained according to the Vicuna v1.1"
    # lm-sys/FastChat, README.md "Fine-tuning using (Q)LoRA"; fastchat/train/train_lora.py
    "vicuna-7b-qlora": {
        **VICUNA_7B,
        "adapter.method": "qlora",  # --q_lora True
        "adapter.r": 8,  # --lora_r 8
        "adapter.alpha": 16,  # --lora_alpha 16
        "adapter.dropout": 0.05,  # --lora_dropout 0.05
        "adapter.targets": ["q_proj", "v_proj"],  # lora_target_modules
        "adapter.quantization": "nf4",  # bnb_4bit_quant_type
        "adapter.double_quantization": True,  # bnb_4bit_use_double_quant
        "sft.batch_size": 4,  # --per_device_train_batch_size 4, accumulation 1
        "sft.keep_checkpoints": 100,  # --save_total_limit 100
        "launch.micro_batch_size": 4,
    },
    "wizardlm-7b": WIZARDLM_7B,
    "wizardlm-13b": {
        **WIZARDLM_7B,
        "model.path": "huggyllama/llama-13b",
        "data.template": "vicuna",  # README: the prompt format of Vicuna
        "sft.batch_size": 384,  # table: 384
        "sft.warmup_steps": 50,  # table: 50
    },
    # nlpxucan/WizardLM, WizardCoder/README.md "Fine-tuning"
    "wizardcoder-15b": {
        **WIZARDLM_7B,
        "model.path": "bigcode/starcoder",  # --model_name_or_path "bigcode/starcoder"
        "data.template": "alpaca",  # train_wizardcoder.py: PROMPT_DICT
        "sft.batch_size": 512,  # table: 512
        "sft.warmup_steps": 30,  # table: 30
        "sft.save_every": 50,  # --save_steps 50
        "sft.keep_checkpoints": 2,  # --save_total_limit 2
        "launch.micro_batch_size": 16,  # --per_device_train_batch_size 16
    },
    "guanaco-13b": GUANACO_13B,
    "guanaco-33b": GUANACO_33B,
    "guanaco-65b": {**GUANACO_33B, "model.path": "huggyllama/llama-65b"},
    # the model card of OpenAssistant/oasst-sft-4-pythia-12b-epoch-3.5, reference-pythia-12b
    "oasst-sft-pythia12b": {
        **OASST,
        "model.path": "EleutherAI/pythia-12b-deduped",  # model_name
        "adapter.method": "full",
        "data.sources.oasst1.languages": OASST_LANGUAGES,  # lang
        "data.sources.alpaca.path": "tatsu-lab/alpaca",  # alpaca
        "data.max_length": 2048,  # max_length: 2048
        "sft.learning_rate": 6e-6,  # learning_rate: 6e-6
        "sft.epochs": 8,  # num_train_epochs: 8
        "sft.batch_size": 4 * 2,  # per_device_train_batch_size: 4, gradient_accumulation_steps: 2
        "sft.warmup_steps": 100,  # warmup_steps: 100
        "sft.eval_every": 100,  # eval_steps: 100
        "sft.save_every": 1000,  # save_steps: 1000
        "launch.micro_batch_size": 4,
        "launch.precision": "bf16",  # dtype: fp16, as above
    },
    "oasst-sft-llama30b": OASST_LLAMA_30B,
    # the model card of OpenAssistant/stablelm-7b-sft-v7-epoch-3, stablelm-7b and oasst-mix
    "oasst-sft-stablelm7b": {
        **OASST_LLAMA_30B,
        "model.path": "stabilityai/stablelm-base-alpha-7b",  # model_name
        "data.sources.sharegpt.weight": 1.0,  # vicuna: fraction: 1.0
        "data.max_length": 4096,  # max_length: 4096
        "sft.learning_rate": 1e-5,  # defaults: learning_rate: 1e-5
        "sft.epochs": 4,  # num_train_epochs: 4
        "sft.batch_size": 4 * 2,  # per_device_train_batch_size: 4, gradient_accumulation_steps: 2
        "sft.warmup_steps": 100,  # warmup_steps: 100
        "sft.eval_every": 100,  # eval_steps: 100
        "sft.save_every": 500,  # save_steps: 500
        "sft.keep_checkpoints": 4,  # save_total_limit: 4
        "launch.micro_batch_size": 4,
    },
    # peft_modeling.py; config.yaml, llama-13b; learning rate and epochs: secondary
    "oasst-lora-llama13b": {
        **OASST,
        "model.path": "huggyllama/llama-13b",
        "adapter.method": "lora",
        "adapter.r": 16,  # r=16
        "adapter.alpha": 32,  # lora_alpha=32
        "adapter.dropout": 0.05,  # lora_dropout=0.05
        "adapter.targets": ["q_proj", "k_proj", "v_proj", "o_proj"],  # target_modules
        "data.max_length": 2048,
        "sft.learning_rate": 5e-5,  # secondary
        "sft.epochs": 12,  # secondary
        "sft.batch_size": 2 * 4,  # per_device_train_batch_size: 2, gradient_accumulation_steps: 4
        "sft.warmup_steps": 100,  # warmup_steps: 100
        "sft.eval_every": 100,  # eval_steps: 100
        "sft.save_every": 500,  # save_steps: 500
        "launch.micro_batch_size": 2,
        "launch.precision": "bf16",
    },
    # arXiv:2203.02155, secondary; None: the paper is silent, or the value is a departure
    "instructgpt-1.3b": {
        "data.max_length": 1024,  # prompts of up to 1k tokens
        "data.validation": None,
        "sft.learning_rate": 9.65e-6,
        "sft.epochs": 16,
        "sft.batch_size": 32,
        "sft.scheduler": "cosine",
        "sft.warmup_steps": 0,
        "sft.adam_beta1": 0.9,
        "sft.adam_beta2": 0.95,
        "reward.learning_rate": 9e-6,
        "reward.epochs": 1,
        "reward.batch_size": 64,
        "reward.adam_beta1": 0.9,
        "reward.adam_beta2": 0.95,
        "reward.normalize": "demonstrations",
        "ppo.max_steps": 256_000 // 512,  # 256k episodes
        "ppo.batch_size": 512,
        "ppo.minibatches": 512 // 64,
        "ppo.ppo_epochs": 1,
        "ppo.learning_rate": 9e-6,  # of the value function; the policy's is not stated plainly
        "ppo.adam_beta1": 0.9,
        "ppo.adam_beta2": 0.95,
        "ppo.warmup_steps": 10,
        "ppo.max_new_tokens": None,
        "ppo.temperature": 1,
        "ppo.top_p": None,
        "ppo.generation_batch_size": None,
        "ppo.beta": 0.02,
        "ppo.kl_target": None,
        "ppo.gamma": 1,
        "ppo.lam": None,
        "ppo.clip": 0.2,
        "ppo.ptx_weight": 27.8,
        "ppo.value_start": "reward",
        "launch.micro_batch_size": None,
    },
    "falcon-7b-qlora": LITGPT_FALCON,
    "llama-2-7b-qlora": LITGPT_LLAMA,
    # config_hub/finetune/mistral-7b/qlora.yaml
    "mistral-7b-qlora": {**LITGPT_LLAMA, "model.path": "mistralai/Mistral-7B-v0.1"},
    # config_hub/finetune/tiny-llama/qlora.yaml
    "tinyllama-1.1b-qlora": {
        **LITGPT_LLAMA,
        "model.path": "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
        "adapter.targets": ["all-linear"],  # lora_query, _key, _value, _projection, _mlp: true
        "data.validation": 0.03847,  # val_split_fraction: 0.03847
        "sft.epochs": 3,  # epochs: 3
        "sft.save_every": 800,  # save_interval: 800
        "launch.micro_batch_size": 8,  # micro_batch_size: 8
    },
    # config_hub/finetune/stablelm-base-alpha-3b/qlora.yaml
    "stablelm-alpha-3b-qlora": {
        **LITGPT_FALCON,
        "model.path": "stabilityai/stablelm-base-alpha-3b",
    },
    # mosaicml/llm-foundry, scripts/train/yamls/finetune/mpt-7b_dolly_sft.yaml
    "mpt-7b-instruct": {
        "model.path": "mosaicml/mpt-7b",  # pretrained_model_name_or_path
        "adapter.method": "full",
        "data.max_length": 2048,  # max_seq_len: 2048
        "data.validation": 0,
        "data.sources.dolly_hhrlhf.path": "mosaicml/dolly_hhrlhf",  # hf_name
        "seed": 17,  # global_seed: 17
        "sft.learning_rate": 5e-6,  # lr: 5.0e-6
        "sft.epochs": 2,  # max_duration: 2ep
        "sft.batch_size": 48,  # global_train_batch_size: 48
        "sft.adam_beta1": 0.9,  # betas
        "sft.adam_beta2": 0.999,
        "sft.adam_epsilon": 1e-8,  # eps: 1.0e-8
        "sft.weight_decay": 0.0,  # weight_decay: 0
        "sft.scheduler": "linear",  # linear_decay_with_warmup
        "sft.warmup_steps": 50,  # t_warmup: 50ba
        "sft.max_grad_norm": 1.0,  # clipping_threshold: 1.0
        "sft.gradient_checkpointing": True,  # activation_checkpointing: true
        "sft.log_every": 1,  # console_log_interval: 1ba
        "launch.micro_batch_size": 8,  # device_train_microbatch_size: 8
        "launch.precision": "bf16",  # amp_bf16
    },
    # axolotl-ai-cloud/axolotl, examples/openllama-3b/qlora.yml
    "openllama-3b-qlora": {
        "model.path": "openlm-research/open_llama_3b_v2",  # base_model
        "adapter.method": "qlora",  # adapter: qlora
        "adapter.r": 8,  # lora_r: 8
        "adapter.alpha": 32,  # lora_alpha: 32
        "adapter.dropout": 0.05,  # lora_dropout: 0.05
        "adapter.targets": ["all-linear"],  # lora_target_linear: true
        "data.packing": True,  # sample_packing: true
        "data.max_length": 1024,  # sequence_len: 1024
        "data.validation": 0.05,  # val_set_size: 0.05
        "data.learn": ["assistant"],  # train_on_inputs: false
        "seed": 42,
        "sft.learning_rate": 2e-4,  # learning_rate: 0.0002
        "sft.epochs": 4,  # num_epochs: 4
        "sft.batch_size": 2 * 1,  # micro_batch_size: 2, gradient_accumulation_steps: 1
        "sft.optimizer": "paged_adamw_32bit",  # optimizer
        "sft.weight_decay": 0.1,  # weight_decay: 0.1
        "sft.scheduler": "cosine",  # lr_scheduler: cosine
        "sft.warmup_steps": 20,  # warmup_steps: 20
        "sft.max_grad_norm": 1.0,  # TrainingArguments
        "sft.gradient_checkpointing": True,  # gradient_checkpointing: true
        "sft.log_every": 1,  # logging_steps: 1
        "launch.micro_batch_size": 2,
        "launch.precision": "fp16",  # fp16: true
    },
    # bigcode-project/starcoder, finetune/finetune.py
    "starcoder-lora": {
        "model.path": "bigcode/starcoder",
        "adapter.method": "lora",
        "adapter.r": 16,  # --lora_r 16
        "adapter.alpha": 32,  # --lora_alpha 32
        "adapter.dropout": 0.05,  # --lora_dropout 0.05
        "adapter.targets": ["c_proj", "c_attn"],  # target_modules, less q_attn, which there is none of
        "data.max_length": 2048,  # --seq_length 2048
        "data.packing": True,  # ConstantLengthDataset
        "data.validation": 0,
        "data.sources.code_alpaca.path": "HuggingFaceH4/CodeAlpaca_20K",  # --dataset_name
        "seed": 0,  # --seed 0
        "sft.learning_rate": 5e-6,  # --learning_rate 5e-6
        "sft.max_steps": 10_000,  # --max_steps 10000
        "sft.batch_size": 1 * 16,  # --batch_size 1, --gradient_accumulation_steps 16
        "sft.weight_decay": 0.05,  # --weight_decay 0.05
        "sft.scheduler": "cosine",  # --lr_scheduler_type cosine
        "sft.warmup_steps": 100,  # --num_warmup_steps 100
        "sft.max_grad_norm": 1.0,  # TrainingArguments
        "sft.gradient_checkpointing": True,  # no_gradient_checkpointing is False by default
        "sft.log_every": 100,  # --log_freq 100
        "sft.save_every": 1000,  # --save_freq 1000
        "launch.micro_batch_size": 1,
        "launch.precision": "bf16",  # --bf16
    },
    # microsoft/LoRA, examples/NLG/README.md "Replicating Our Result on E2E"
    "gpt2-medium-lora": {
        "model.path": "openai-community/gpt2-medium",  # --model_card gpt2.md
        "adapter.method": "lora",
        "adapter.r": 4,  # --lora_dim 4
        "adapter.alpha": 32,  # --lora_alpha 32
        "adapter.dropout": 0.1,  # --lora_dropout 0.1
        "adapter.targets": ["c_attn"],  # W_q, W_v
        "data.max_length": 512,  # --seq_len 512
        "data.validation": None,
        "seed": 110,  # --random_seed 110
        "sft.learning_rate": 2e-4,  # --lr 0.0002
        "sft.epochs": 5,  # --max_epoch 5
        "sft.batch_size": 8,  # --train_batch_size 8, --grad_acc 1
        "sft.adam_beta2": 0.999,  # --adam_beta2 0.999
        "sft.weight_decay": 0.01,  # --weight_decay 0.01
        "sft.scheduler": "linear",  # --scheduler linear
        "sft.warmup_steps": 500,  # --warmup_step 500
        "sft.max_grad_norm": 0,  # --clip 0.0
        "sft.save_every": 1000,  # --save_interval 1000
        "launch.micro_batch_size": 8,
    },
    # pytorch/torchtune, recipes/configs/llama3_1/8B_qlora_single_device.yaml
    "llama-3.1-8b-qlora": {
        "model.path": "meta-llama/Llama-3.1-8B-Instruct",  # Meta-Llama-3.1-8B-Instruct
        "adapter.method": "qlora",
        "adapter.r": 8,  # lora_rank: 8
        "adapter.alpha": 16,  # lora_alpha: 16
        "adapter.dropout": 0.0,  # lora_dropout: 0.0
        # lora_attn_modules, apply_lora_to_mlp
        "adapter.targets": [
            *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        ],
        "data.max_length": None,
        "data.validation": None,
        "data.sources.alpaca_cleaned.path": "yahma/alpaca-cleaned",  # alpaca_cleaned_dataset
        "seed": None,
        "sft.learning_rate": 3e-4,  # lr: 3e-4
        "sft.epochs": 1,  # epochs: 1
        "sft.batch_size": 2 * 16,  # batch_size: 2, gradient_accumulation_steps: 16
        "sft.weight_decay": 0.01,  # weight_decay: 0.01
        "sft.scheduler": "cosine",  # get_cosine_schedule_with_warmup
        "sft.warmup_steps": 100,  # num_warmup_steps: 100
        "sft.max_grad_norm": 0,
        "sft.gradient_checkpointing": True,  # enable_activation_checkpointing: True
        "sft.log_every": 1,  # log_every_n_steps: 1
        "launch.micro_batch_size": 2,  # batch_size: 2
        "launch.precision": "bf16",  # dtype: bf16
    },
}

# What the sources measured: a recipe says it at its top. WizardLM/README.md, WizardCoder/README.md,
# arXiv:2305.14314 table 5, config_hub/finetune/README.md of litgpt, WizardVicunaLM/README.md, torchtune.
MEASURED = {
    "wizardlm-7b": ("MMLU 42.7", "HumanEval 19.1", "TruthfulQA 44.7", "ARC 51.6", "HellaSwag 77.7"),
    "wizardlm-13b": ("MMLU 52.3", "HumanEval 24.0", "TruthfulQA 50.5", "ARC 57.2", "HellaSwag 81.0"),
    "wizardcoder-15b": ("HumanEval 57.3", "59.8", "MBPP 51.8"),
    "vicuna-13b": ("MMLU 51.3",),
    "wizard-vicuna-13b": ("88 of 100", "35 hours"),
    "guanaco-13b": ("MMLU 46.4", "46.9"),
    "guanaco-33b": ("MMLU 57.0", "57.8"),
    "guanaco-65b": ("MMLU 62.2", "63.4", "99.3%", "24 hours", "48 GB"),
    "falcon-7b-qlora": ("50.85 min", "9.44 GB", "0.993", "26.3", "24.84 min", "16.69 GB", "0.945"),
    "llama-2-7b-qlora": ("45.67 min", "13.68 GB", "0.814", "38.6", "32.82 min", "19.77 GB", "0.802"),
    "mistral-7b-qlora": ("44.75 min", "14.29 GB", "0.803", "57.9", "31.01 min", "20.66 GB", "0.794"),
    "tinyllama-1.1b-qlora": ("8.70 min", "16.24 GB", "1.056", "25.3", "8.09 min", "13.50 GB", "1.039"),
    "stablelm-alpha-3b-qlora": ("25.86 min", "5.24 GB", "1.388", "26.1", "13.07 min", "8.58 GB"),
    "llama-3.1-8b-qlora": ("7.4 GiB", "2,413 tokens/s", "16.2 GiB", "3,083 tokens/s"),
}
# Numbers of no published run: how much may be lost or shown, and in how many steps ours are watched.
OWN_KEYS = ("data.max_lost", "sft.samples", "ppo.samples")


def shipped() -> list[str]:
    return sorted(file.stem for file in compose.shipped("recipes").glob("*.yaml"))


def text_of(recipe: str) -> str:
    return (compose.shipped("recipes") / f"{recipe}.yaml").read_text(encoding="utf-8")


def header(recipe: str) -> str:
    """Return the comment at a recipe's top as one line."""
    lines = []
    for line in text_of(recipe).splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return " ".join(lines)


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, node


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resolve ``auto`` as on a machine with a GPU, which all runs were made on."""
    monkeypatch.setattr("ftpipe.provenance.gpus", lambda: ["A100"])


def test_every_recipe_is_in_one_table() -> None:
    tables = [set(PUBLISHED), EARLIER, OURS]
    assert sorted(name for table in tables for name in table) == shipped()


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_a_recipe_has_its_published_numbers(recipe: str, gpu: None) -> None:
    (cfg,) = cli.configurations([f"recipe={recipe}"])
    found = dict(leaves(schema.plain(cfg)))
    for key, value in PUBLISHED[recipe].items():
        assert key in found, key
        if value is not None:
            assert found[key] == value, key


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_a_recipe_states_no_number_that_is_not_published(recipe: str) -> None:
    stated = yaml.load(text_of(recipe), compose.Loader)
    numbers = {
        key
        for key, value in leaves({key: value for key, value in stated.items() if key != "defaults"})
        if isinstance(value, int | float) and not isinstance(value, bool) and key not in OWN_KEYS
    }
    assert numbers <= set(PUBLISHED[recipe])


@pytest.mark.parametrize("recipe", sorted(PUBLISHED))
def test_each_number_has_its_source_beside_it(recipe: str) -> None:
    for line in text_of(recipe).splitlines():
        key, _, value = line.partition(":")
        if line.startswith("#") or not value.strip()[:1].isdigit():
            continue
        pair = key.strip() == "adam_beta2"  # beside adam_beta1, whose comment has both
        other = ("max_lost", "max_new_tokens", "generation_batch_size", "revision")
        assert pair or key.strip() in other or " # " in line, line


@pytest.mark.parametrize("recipe", sorted(PUBLISHED))
def test_a_recipe_says_what_to_expect(recipe: str) -> None:
    said = header(recipe)
    for result in MEASURED.get(recipe, ()):
        assert result in said
    if recipe != "alpaca-13b":  # whose authors published no number
        assert "Expected" in said


@pytest.mark.parametrize("recipe", sorted(OURS))
def test_a_recipe_of_ours_says_so(recipe: str) -> None:
    assert recipe.startswith("tiny") or "Not a published run" in header(recipe)


def launches(recipe: str) -> set[str]:
    """Return the launch profiles that a recipe's comment names, or that of one it builds on."""
    profiles = {file.stem for file in (compose.shipped("conf") / "launch").glob("*.yaml")}
    said = re.findall(r"launch=([\w-]+)(?: or ([\w-]+))?", header(recipe))
    found = {name for names in said for name in names} & profiles
    if "override /adapter" in text_of(recipe):
        return found
    for other in (yaml.load(text_of(recipe), compose.Loader) or {}).get("defaults", ()):
        found |= launches(other) if other in shipped() else set()
    return found


NAMED = [(recipe, launch) for recipe in shipped() for launch in sorted(launches(recipe))]


def test_launch_profiles_are_found_in_comments() -> None:
    assert {
        ("oasst-sft-pythia12b", "zero3"),
        ("alpaca-13b", "fsdp"),
        ("wizardlm-13b", "zero3-offload"),
    } < {*NAMED}


@pytest.mark.parametrize(("recipe", "launch"), NAMED)
def test_a_recipe_can_be_launched_as_its_comment_says(recipe: str, launch: str) -> None:
    (run,) = resolve.resolved([f"recipe={recipe}", f"launch={launch}", "launch.device=cuda"], True)
    combinations.check(run.cfg, run.cfg.stages, elsewhere=True)


# As the files' own comments name them, in the hub's words.
LICENSES = {
    "Apache-2.0": "apache-2.0",
    "MIT": "mit",
    "CC BY 4.0": "cc-by-4.0",
    "CC BY-NC 4.0": "cc-by-nc-4.0",
    "CC BY-NC-SA 4.0": "cc-by-nc-sa-4.0",
    "CC BY-SA 3.0": "cc-by-sa-3.0",
    "CC BY-SA 4.0": "cc-by-sa-4.0",
    "BigCode OpenRAIL-M": "bigcode-openrail-m",
    "Llama 2 Community License": "llama2",
    "Llama 3.1 Community License": "llama3.1",
    "LLaMA non-commercial": "other",
    "Stability AI Community License": "other",
}


@pytest.mark.parametrize("group", ["model", "data"])
def test_a_licence_that_a_comment_names_is_stated(group: str) -> None:
    read = 0
    for file in sorted((compose.shipped("conf") / group).glob("*.yaml")):
        text = file.read_text(encoding="utf-8")
        lines = [line for line in text.splitlines() if line.startswith("#")]
        said = " ".join(line.removeprefix("#").strip() for line in lines)
        named = {word for name, word in LICENSES.items() if re.search(rf"{name}(?![\w-])", said)}
        if not named:
            continue
        found = yaml.load(text, compose.Loader)
        sources = [found] if group == "model" else list(found["sources"].values())
        read += 1
        assert [{source.get("license")} for source in sources] == [named] * len(sources), file.name
    assert read >= 17
