"""Generators are seeded and kernels chosen in one place, for all stages alike."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from ftpipe import determinism
from ftpipe.choices import Determinism
from ftpipe.config import RunConfig


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_every_generator_starts_from_the_seed(cfg: RunConfig) -> None:
    cfg.seed = 7
    determinism.begin(cfg)
    first = drawn()
    assert len(set(first)) == 3
    determinism.begin(cfg)
    assert drawn() == first
    determinism.begin(cfg, seed=8)  # of the second member of an ensemble
    others = drawn()
    assert all(one != other for one, other in zip(first, others, strict=True))


@pytest.mark.parametrize(
    ("how", "algorithms", "cudnn", "by_trial"),
    [
        (Determinism.off, False, False, True),
        (Determinism.seeded, False, True, False),
        (Determinism.strict, True, True, False),
    ],
)
def test_each_word_chooses_its_kernels(
    cfg: RunConfig, how: Determinism, algorithms: bool, cudnn: bool, by_trial: bool
) -> None:
    cfg.determinism = how
    determinism.begin(cfg)
    assert torch.are_deterministic_algorithms_enabled() is algorithms
    assert torch.backends.cudnn.deterministic is cudnn
    assert torch.backends.cudnn.benchmark is by_trial


def test_the_environment_is_as_strict_as_it_is_asked_to_be() -> None:
    off, seeded, strict = map(determinism.environment, Determinism)
    assert off == {"PYTHONHASHSEED": "0"}
    assert seeded == off | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    assert strict.items() > seeded.items()
    assert strict["FLASH_ATTENTION_DETERMINISTIC"] == "1" and strict["NCCL_ALGO"] == "Ring"


def test_an_operation_without_such_a_kernel_is_named_in_a_sentence(cfg: RunConfig) -> None:
    cfg.determinism = Determinism.strict
    determinism.begin(cfg)
    with pytest.raises(RuntimeError) as torch_says:  # one that has none, on a CPU either
        torch.empty(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
    sentence = determinism.refusal(torch_says.value)
    assert sentence is not None
    assert sentence.startswith("determinism=strict: put_ ") and "determinism=seeded" in sentence
    assert determinism.refusal(RuntimeError("CUDA out of memory")) is None
