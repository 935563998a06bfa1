"""The loss on demonstrations against a plain cross entropy, row by row and token by token."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from ftpipe.choices import Part, Precision, Use
from ftpipe.data.table import SCHEMAS, Writer, place
from ftpipe.errors import DataError
from ftpipe.ppo.ptx import Demonstrations
from ftpipe.ppo.roles import Role
from ftpipe.ppo.update import Ranks, Updater
from ftpipe.ppo_config import PpoConfig
from ftpipe.sequences import Order
from tests.unit.ppo.tiny import PAD, WORDS, roles

COUNT, SIZE, WEIGHT = 11, 4, 2.5  # rows; those of an update; ppo.ptx_weight


def rows() -> list[tuple[list[int], list[int]]]:
    """Return token ids and labels; the prompt is not learned, and one row teaches nothing."""
    generator = np.random.default_rng(0)
    made = []
    for number in range(COUNT):
        ids = generator.integers(WORDS, size=4 + number).tolist()
        asked = len(ids) if number == 3 else 2 + number % 2
        made.append((ids, [-100] * asked + ids[asked:]))
    return made


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    write(tmp_path, rows())
    return tmp_path


def write(folder: Path, made: list[tuple[list[int], list[int]]]) -> None:
    writer = Writer(place(folder, Use.demonstrations, Part.train), schema := SCHEMAS[Use.demonstrations])
    listed = [
        {
            "input_ids": ids,
            "labels": labels,
            "length": len(ids),
            "prompt": 2,
            "source": "mine",
            "row": row,
        }
        for row, (ids, labels) in enumerate(made)
    ]
    writer.write(pa.RecordBatch.from_pylist(listed, schema))
    writer.close()


def demonstrations(dataset: Path, **keys: Any) -> Demonstrations:
    held = roles()
    ppo = PpoConfig(ptx_weight=WEIGHT, batch_size=2 * SIZE, minibatches=2)
    optimizer = torch.optim.SGD(list(held.trained(Role.policy).values()), lr=0.1)
    given: dict[str, Any] = {
        "seed": 7,
        "micro_batch": 3,
        "precision": Precision.fp32,
        "autocast": nullcontext,
        "ranks": Ranks(),
        "pad": PAD,
        **keys,
    }
    return Demonstrations.of(dataset, Updater(held, optimizer, ppo, **given))


def drawn(update: int, seed: int = 7) -> list[int]:
    """Return the rows of an update, found by walking through all epochs from the first."""
    # a stream of its own: seeds are below 2^32
    order, walked = Order([len(ids) for ids, _ in rows()], seed + 2**32), []
    for epoch in range(update + 2):
        order.set_epoch(epoch)
        walked += list(order)
    return walked[update * SIZE : (update + 1) * SIZE]


def gradients(found: Demonstrations) -> dict[str, Tensor]:
    held = found.updater.roles.trained(Role.policy)
    return {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad
        for name, weight in held.items()
    }


def plainly(found: Demonstrations, chosen: list[int]) -> tuple[float, dict[str, Tensor]]:
    """Return the mean over all learned tokens of -log p, and its gradient."""
    model, made, nats = found.updater.roles.models[Role.policy], rows(), []
    for row in chosen:
        ids, labels = made[row]
        logps_LV = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        nats += [-logps_LV[t - 1, ids[t]] for t in range(1, len(ids)) if labels[t] != -100]
    loss = torch.stack(nats).mean()
    weights = found.updater.roles.trained(Role.policy)
    return loss.item(), dict(
        zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True)
    )


def close(found: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert found.keys() == want.keys()
    assert max(each.abs().max().item() for each in want.values()) > 1e-2
    for name, each in want.items():
        torch.testing.assert_close(found[name], each, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("update", [0, 1, 2, 6])
def test_the_loss_is_the_cross_entropy_of_the_updates_rows(
    dataset: Path, update: int, micro_batch: int
) -> None:
    found = demonstrations(dataset, micro_batch=micro_batch)
    whole = found.gradients(update)
    loss, want = plainly(found, drawn(update))
    assert whole.item() == pytest.approx(loss, rel=1e-5)
    assert not whole.requires_grad
    close(gradients(found), {name: WEIGHT * each for name, each in want.items()})


def test_the_row_that_teaches_nothing_was_among_them() -> None:
    assert any(3 in drawn(update) for update in (0, 1, 2, 6))


def test_gradients_are_added_to_what_is_there(dataset: Path) -> None:
    found = demonstrations(dataset)
    found.gradients(0)
    once = {name: each.clone() for name, each in gradients(found).items()}
    found.gradients(0)
    close(gradients(found), {name: 2 * each for name, each in once.items()})


def test_which_rows_come_is_by_the_seed_and_the_updates_number(dataset: Path) -> None:
    found = demonstrations(dataset)
    losses = [found.gradients(update).item() for update in (0, 1, 5, 1)]
    assert losses[1] == losses[3]  # whatever came between
    assert len(set(losses)) == 3
    assert demonstrations(dataset, seed=8).gradients(0).item() != losses[0]
    assert drawn(0, seed=8) != drawn(0)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 5])
def test_the_parts_of_all_ranks_add_up(dataset: Path, world: int) -> None:
    whole = demonstrations(dataset)
    want = whole.gradients(1).item()
    total = {name: torch.zeros_like(each) for name, each in gradients(whole).items()}
    parts = []
    for rank in range(world):
        found = demonstrations(dataset, ranks=Ranks(rank, world), micro_batch=1)
        parts.append(found.gradients(1).item())
        for name, each in gradients(found).items():
            total[name] += each
    assert sum(parts) == pytest.approx(want, rel=1e-5)
    assert world < 5 or parts[4] == 0  # an update has four rows
    close(total, gradients(whole))


def test_only_the_policy_learns_from_demonstrations(dataset: Path) -> None:
    found = demonstrations(dataset)
    found.gradients(0)
    held = found.updater.roles
    assert all(weight.grad is None for weight in held.trained(Role.value).values())
    assert all(weight.grad is None for weight in held.models[Role.reference].parameters())


def test_rows_that_teach_nothing_have_no_loss(tmp_path: Path) -> None:
    write(tmp_path, [(ids, [-100] * len(ids)) for ids, _ in rows()])
    found = demonstrations(tmp_path)
    assert found.gradients(0).item() == 0
    assert not any(each.any() for each in gradients(found).values())


def test_so_is_one_whose_demonstrations_are_all_held_out(tmp_path: Path) -> None:
    write(tmp_path, [])
    with pytest.raises(DataError, match=r"no demonstrations are left.*data\.validation"):
        demonstrations(tmp_path)
