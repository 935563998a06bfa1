"""PPO-ptx: the loss on demonstrations mixed into PPO's updates, so that the policy forgets less.

Ouyang et al. 2022 (arXiv:2203.02155), eq. 2: + gamma E[log pi(x)].
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ftpipe.choices import Part, Use
from ftpipe.data import table
from ftpipe.data.encode import IGNORED
from ftpipe.errors import DataError
from ftpipe.ppo.roles import Role
from ftpipe.sequences import Collate, Layout, Order, upcoming

if TYPE_CHECKING:
    from ftpipe.ppo.update import Updater


@dataclass(frozen=True)
class Demonstrations:
    """Rows of demonstrations, as many for each update as it has answers."""

    updater: Updater
    collate: Collate
    order: Order
    size: int

    @classmethod
    def of(cls, dataset: Path, updater: Updater) -> Demonstrations:
        """Return the rows of a dataset's train part.

        Raises:
            DataError: if all of them are held out.
        """
        rows = table.read(dataset, Use.demonstrations, Part.train)
        if not len(rows):
            raise DataError(
                "no demonstrations are left to train on; hold out fewer rows (data.validation), or set "
                "ppo.ptx_weight=0."
            )
        order = Order(rows["length"][:], updater.seed + 2**32)  # another order than that of prompts
        size = updater.ppo.batch_size // updater.ppo.minibatches
        return cls(updater, Collate(rows, updater.pad, Layout.padded), order, size)

    def gradients(self, update: int) -> Tensor:
        """Add the gradients of one update; return this rank's part of its loss, nats per learned token.

        Args:
            update: its number, from 0: it decides the rows.
        """
        ranks, micro = self.updater.ranks, self.updater.micro_batch
        rows = upcoming(self.order, update * self.size, self.size)
        batches = [
            self.collate([{"rows": [row]} for row in rows[at : at + micro]])
            for at in range(0, len(rows), micro)
        ]
        total = sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
        device = self.updater.roles.device
        whole = torch.zeros((), device=device)
        with self.updater.roles.acting(Role.policy) as model:
            mine = batches[ranks.rank :: ranks.world]
            for batch in mine + (ranks.most(len(mine)) - len(mine)) * [_unlearned(batches[0])]:
                given = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
                with self.updater.autocast():
                    logits_BLV = model(**given, use_cache=False).logits
                loss = torch.nn.functional.cross_entropy(
                    logits_BLV[:, :-1].flatten(0, 1).float(),
                    batch["labels"][:, 1:].flatten().to(device),
                    ignore_index=IGNORED,
                    reduction="sum",
                )
                loss = loss / max(total, 1)
                (self.updater.ppo.ptx_weight * loss).backward()
                whole += loss.detach()
        return whole


def _unlearned(batch: dict[str, Any]) -> dict[str, Any]:
    """Return a batch that teaches nothing, for the passes that other ranks make."""
    return batch | {"labels": torch.full_like(batch["labels"], IGNORED)}
