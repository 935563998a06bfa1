"""What keeps ranks in step, without ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ftpipe import sharding
from ftpipe.choices import Strategy


def test_every_rank_makes_as_many_passes_and_counts_its_own_alone() -> None:
    assert list(sharding.in_step([[5, 3], [1]], 3)) == [([5, 3], True), ([1], True), ([0], False)]
    assert list(sharding.in_step([], 1)) == [([0], False)]  # a rank without a row
    assert list(sharding.in_step([[2]], 1)) == [([2], True)]


def test_the_repeated_layers_are_those_that_a_model_names() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "vocab_size": 16,
    }
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **shape))
    assert sharding.layers(model) == list(model.model.layers)
    assert sharding.layers(nn.Linear(2, 2)) == []


def test_what_is_not_prepared_for_several_ranks_shows() -> None:
    assert sharding.found(nn.Linear(2, 2)) is None

    class Engine(nn.Module):
        def zero_optimization_stage(self) -> int:
            return 2

    assert sharding.found(Engine()) is Strategy.zero2


def test_weights_that_are_whole_are_one_group_of_an_optimiser() -> None:
    weights = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    assert sharding.alike(weights) == [weights]
    assert sharding.alike([]) == []


def test_a_whole_weight_is_put_and_gathered_as_it_is() -> None:
    weight = nn.Parameter(torch.zeros(3))
    with torch.no_grad():
        sharding.put(torch.arange(3.0), weight)
    with sharding.gathered(weight) as full:
        assert full.tolist() == [0, 1, 2]
