"""Memory by part, against closed forms, published figures and identities."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch

from ftpipe.choices import Dtype, Method, Offload, Optimizer, RewardKind, Start, Strategy
from ftpipe.config import RunConfig
from ftpipe.fit import memory
from ftpipe.fit.extent import disk_of
from ftpipe.fit.model import model_of
from ftpipe.fit.training import Training, four_bit, optimizer_bytes, training_of
from tests.unit.fit.made import run

WEIGHTS = 6_738_415_616  # of LLaMA-7B
LINEAR = 32 * (4 * 4096**2 + 3 * 4096 * 11008)  # of them, in the linear layers
GB, GIB = 1e9, 2**30


def of(cfg: RunConfig, stage: str = "sft") -> Training:
    return training_of(cfg, stage, model_of(cfg.model))


def peak(stage: str = "sft", method: Method = Method.full, **changed: Any) -> memory.Peak:
    return memory.peak(of(run(method, **changed), stage))


def test_weights_gradients_and_adam_take_16_bytes_a_weight() -> None:
    parts = peak(sft__batch_size=16, launch__micro_batch_size=1).parts  # accumulated: all at once
    assert parts.weights == 4 * WEIGHTS
    assert parts.gradients == 4 * WEIGHTS
    assert parts.optimizer == 8 * WEIGHTS


def test_qlora_of_7_billion_takes_what_its_authors_say() -> None:
    # arXiv:2305.14314, figure 6 (Guanaco 7B): about 5 GB; 0.127 bits a weight for scales, section 3
    assert (four_bit(double=True) - 0.5) * 8 == pytest.approx(0.127, abs=5e-4)
    assert (four_bit(double=False) - 0.5) * 8 == 0.5
    told = peak(
        method=Method.qlora,
        adapter__r=64,
        adapter__dtype=Dtype.bfloat16,
        launch__micro_batch_size=1,
        data__max_length=512,
        sft__gradient_checkpointing=True,
        sft__optimizer=Optimizer.paged_adamw_32bit,
    )
    assert told.total / GB == pytest.approx(5, rel=0.1)


def test_a_base_in_4_bits_leaves_the_rest_in_16() -> None:
    parts = peak(method=Method.qlora).parts
    assert parts.weights == pytest.approx(LINEAR * four_bit(True) + 2 * (WEIGHTS - LINEAR))


def test_an_adapter_is_its_own_weights_gradients_and_moments() -> None:
    adapter = 32 * 16 * (4 * 2 * 4096 + 3 * (4096 + 11008))  # r (ins + outs), r = 16
    told = of(run(Method.lora))
    assert told.trained == adapter
    parts = peak(method=Method.lora).parts
    assert parts.weights == 2 * WEIGHTS
    assert parts.adapters == 4 * adapter
    assert parts.optimizer == 8 * adapter


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (Optimizer.adamw, 8.0),
        (Optimizer.paged_adamw_32bit, 0.0),  # in host memory
        (Optimizer.adamw_8bit, 2 + 8 / 256),
        (Optimizer.rmsprop, 4.0),
        (Optimizer.sgd, 0.0),
    ],
)
def test_what_an_optimiser_keeps_of_a_weight(optimizer: Optimizer, expected: float) -> None:
    assert optimizer_bytes(optimizer, gpu=True) == expected


def test_torch_keeps_moments_as_wide_as_the_weight_and_bitsandbytes_in_float32() -> None:
    weight = torch.nn.Parameter(torch.zeros(64, dtype=torch.bfloat16))
    for name, kind in ((Optimizer.adamw, torch.optim.AdamW), (Optimizer.rmsprop, torch.optim.RMSprop)):
        made = kind([weight], lr=0.1)
        weight.grad = torch.ones_like(weight)
        made.step()
        moments = [one for one in made.state[weight].values() if one.numel() == 64]
        held = sum(one.numel() * one.element_size() for one in moments) / 64
        assert held == optimizer_bytes(name, gpu=True, width=2)
    assert optimizer_bytes(Optimizer.paged_adamw_32bit, gpu=False, width=2) == 8


def test_an_adapter_in_16_bits_has_the_same_moments_in_memory_and_on_the_disk() -> None:
    cfg = run(Method.lora, adapter__dtype=Dtype.bfloat16, sft__save_every=1, sft__keep_checkpoints=1)
    told = of(cfg)
    assert memory.peak(told).parts.optimizer == 4 * told.trained
    assert disk_of(cfg, told) == 2 * told.trained + (2 + 4) * told.trained
    cfg.sft.optimizer = Optimizer.paged_adamw_32bit
    assert disk_of(cfg, of(cfg)) == 2 * told.trained + (2 + 8) * told.trained


def test_a_processor_has_no_pages_of_host_memory() -> None:
    assert optimizer_bytes(Optimizer.paged_adamw_32bit, gpu=False) == 8


def test_embeddings_keep_float32_moments_under_8_bits() -> None:
    parts = peak(sft__optimizer=Optimizer.adamw_8bit).parts
    table = 32000 * 4096
    assert parts.optimizer == pytest.approx(8 * table + (2 + 8 / 256) * (WEIGHTS - table))


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [  # arXiv:2104.07857 and 1910.02054, table 1: what 8 ranks share of 16 bytes; ZeRO's copy besides
        (Strategy.zero1, (4, 4, 12 / 8)),
        (Strategy.zero2, (4, 4 / 8, 12 / 8)),
        (Strategy.zero3, (4 / 8, 4 / 8, 12 / 8)),
        (Strategy.fsdp, (4 / 8, 4 / 8, 8 / 8)),
    ],
)
def test_ranks_share_out_what_their_strategy_says(
    strategy: Strategy, expected: tuple[float, float, float]
) -> None:
    told = of(run(launch__processes=8, launch__strategy=strategy, sft__batch_size=64))
    parts = memory.peak(told).parts
    found = (parts.weights, parts.gradients, parts.optimizer)
    assert found == pytest.approx(tuple(WEIGHTS * one for one in expected))


def test_ddp_copies_gradients_into_its_messages() -> None:
    assert peak(launch__processes=2, sft__batch_size=32).parts.buffers == 4 * WEIGHTS
    assert peak().parts.buffers == 0


def test_what_is_offloaded_is_not_on_the_gpu() -> None:
    ranks: dict[str, Any] = {"launch__processes": 2, "launch__strategy": Strategy.zero3}
    there = peak(**ranks, launch__sharding__offload_optimizer=Offload.cpu).parts
    assert there.optimizer == 0 and there.weights > 0
    gone = peak(**ranks, launch__sharding__offload_parameters=Offload.cpu).parts
    assert gone.weights == gone.gradients == gone.optimizer == 0


def test_one_moment_is_the_peak_and_its_parts_add_up() -> None:
    told = peak()
    parts = [getattr(told.parts, one.name) for one in fields(memory.Parts)]
    assert told.total == sum(parts) == told.moments[told.moment] == max(told.moments.values())


def test_more_rows_or_longer_ones_need_more_and_checkpointing_less() -> None:
    plain = peak(method=Method.lora).total
    assert peak(method=Method.lora, launch__micro_batch_size=8).total > plain
    assert peak(method=Method.lora, data__max_length=2048).total > plain
    assert peak(method=Method.lora, sft__gradient_checkpointing=True).total < plain / 2


def test_checkpointing_keeps_the_input_of_each_layer() -> None:
    # the stream between 32 layers of 4 x 1024 tokens, 4096 wide, in 16 bits; and one layer's own
    def resting(length: int) -> float:
        method = Method.lora
        told = peak(method=method, data__max_length=length, sft__gradient_checkpointing=True)
        return told.moments["layer last"] - told.moments["layer first"]

    assert resting(1024) - resting(512) == pytest.approx(31 * 4 * 512 * 4096 * 2)


def test_rows_beyond_the_positions_of_a_model_are_not_reckoned_with() -> None:
    assert of(run(data__max_length=5000)).length == 2048


def test_dpo_takes_both_replies_of_a_pair_and_holds_a_reference() -> None:
    full = of(run(dpo__start=Start.model, stages=["prepare", "dpo"]), "dpo")
    assert (full.rows, full.frozen) == (8, 1)
    known = of(run(dpo__start=Start.model, stages=["prepare", "reference", "dpo"]), "dpo")
    assert known.frozen == 0
    two = of(run(Method.lora, stages=["prepare", "sft", "dpo"]), "dpo")
    assert (two.frozen, two.copies) == (0, 2)
    one = of(run(Method.lora, dpo__start=Start.model, stages=["prepare", "dpo"]), "dpo")
    assert one.copies == 1


def test_an_adapter_that_dpo_begins_has_its_own_rank() -> None:
    def rank(*stages: str, start: Start = Start.policy) -> int:
        cfg = run(Method.lora, stages=[*stages, "dpo"], dpo__r=128, dpo__start=start)
        return of(cfg, "dpo").numbers.r

    assert rank("prepare", "sft", "merge") == rank("prepare") == 128
    assert rank("prepare", "sft", start=Start.model) == 128
    assert rank("prepare", "sft") == rank("prepare", "merge", "sft") == 16
    after = run(Method.lora, stages=["prepare", "sft", "dpo", "merge"])
    assert of(after, "dpo").copies == 2  # what is merged later came as an adapter
    assert of(run(stages=["prepare", "reference", "dpo"]), "reference").rows == 2 * 4


def test_a_reward_model_has_a_score_in_place_of_its_head() -> None:
    assert of(run(), "reward").body == WEIGHTS - 32000 * 4096 + 4096
    adapter = of(run(Method.lora))
    assert of(run(Method.lora), "reward").trained == adapter.trained + 4096


def test_roles_of_ppo_share_a_base_under_an_adapter_and_are_models_without() -> None:
    stages = ["prepare", "sft", "reward", "ppo"]
    shared = of(run(Method.lora, stages=stages), "ppo")
    assert (shared.frozen, shared.copies, shared.learned) == (0, 4, 2)  # the four roles
    apart = of(run(stages=stages), "ppo")
    assert (apart.frozen, apart.learned) == (2, 2)  # reference and reward model
    assert apart.trained == apart.whole == 2 * WEIGHTS - 32000 * 4096 + 4097  # a value has no words
    assert shared.trained == 2 * of(run(Method.lora)).trained + 4097
    by_function = of(run(stages=stages, ppo__reward=RewardKind.function), "ppo")
    assert by_function.frozen == 1


def test_the_cache_of_keys_and_values_has_its_closed_form() -> None:
    told = peak(
        "ppo",
        Method.lora,
        stages=["prepare", "ppo"],
        ppo__start=Start.model,
        ppo__reward=RewardKind.function,
        ppo__batch_size=16,
        ppo__max_new_tokens=256,
        data__max_length=256,
    )
    # two of 32 layers, 4096 wide, in 16 bits, for 512 tokens of 16 answers
    assert told.moments["rollout"] - told.moments["step"] > 2 * 32 * 4096 * 2 * 512 * 16 / 2
    rollouts = memory._rollout(
        of(
            run(
                Method.lora,
                stages=["prepare", "ppo"],
                ppo__batch_size=16,
                ppo__max_new_tokens=256,
                data__max_length=256,
            ),
            "ppo",
        )
    )
    assert rollouts == 2 * 32 * 4096 * 2 * 512 * 16


def test_gathered_weights_are_in_the_dtype_of_products_already() -> None:
    # under autocast alone a forward pass holds a 16-bit copy of every linear layer's weights
    ranks: dict[str, Any] = {"launch__processes": 2, "sft__gradient_checkpointing": True}
    alone = peak(**ranks, launch__strategy=Strategy.zero2).moments
    shared = peak(**ranks, launch__strategy=Strategy.fsdp).moments
    assert alone["loss"] - alone["layer last"] > 0.8 * 2 * LINEAR
    assert shared["loss"] - shared["layer last"] < 0.1 * 2 * LINEAR


def test_the_reference_is_not_trained() -> None:
    told = peak("reference", stages=["prepare", "sft", "reference", "dpo"])
    assert told.parts.gradients == told.parts.optimizer == 0
    assert told.parts.weights == 4 * WEIGHTS


def test_new_tokens_have_rows() -> None:
    plain, more = of(run(Method.lora)), of(run(Method.lora, model__new_tokens=["<a>", "<b>"]))
    assert more.trained - plain.trained == 2 * 2 * 4096
    assert more.body - plain.body == 2 * 2 * 4096
