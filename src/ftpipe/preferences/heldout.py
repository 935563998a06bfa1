"""What the policy prefers on held-out rows: the same on every number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import starmap
from typing import TYPE_CHECKING, Any

import torch

from ftpipe.choices import PreferenceLoss
from ftpipe.preferences.logps import reply_logps
from ftpipe.preferences.trainer import weighed
from ftpipe.sequences import dealt
from ftpipe.sharding import in_step

if TYPE_CHECKING:
    from datasets import Dataset

    from ftpipe.preferences.trainer import PreferenceTrainer


class HeldOutPreferences:
    """Measures a trainer's policy on pairs, or single replies, that it does not train on.

    Means are over rows, not over batches of different sizes. Nothing random is drawn.

    Args:
        units: pairs or singles of ``preferences.batches``, none of them empty.
        collate: makes a batch of some of them.
    """

    def __init__(
        self,
        trainer: PreferenceTrainer,
        units: Dataset,
        collate: Callable[[Sequence[Any]], dict[str, Any]],
        batch_size: int,
    ) -> None:
        self._trainer = trainer
        self._collate = collate
        self._units = units
        accelerator = trainer.accelerator
        rank, world = accelerator.process_index, accelerator.num_processes
        mine = dealt(units["length"][:], rank, world, batch_size)
        self._batches = list(in_step(mine, len(dealt(units["length"][:], 0, world, batch_size))))

    def measure(self) -> dict[str, float]:
        """Return the loss and the measures of held-out rows, each named ``held_out_...``."""
        trainer = self._trainer
        policy = trainer.accelerator.unwrap_model(trainer.model)
        was_training = policy.training
        policy.eval()
        try:
            sums = self._sums(policy)
        finally:
            policy.train(was_training)
        names = [*sums]
        stacked = torch.stack([sums[name] for name in names])
        stacked = trainer.accelerator.reduce(stacked, reduction="sum")
        return {
            f"held_out_{name}": float(s / n) for name, (s, n) in zip(names, stacked, strict=True) if n
        }

    def _sums(self, policy: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Return sum and rows of each measure over this rank's rows."""
        trainer = self._trainer
        device = trainer.args.device
        # every rank lists the same names, also one without rows: a reduction needs them to agree
        names = trainer.measured()
        sums = {name: torch.zeros(2, dtype=torch.float64, device=device) for name in ("loss", *names)}
        if trainer.dpo.loss is PreferenceLoss.kto:  # its reference point is that of all held-out rows
            kept, trainer.kl = trainer.kl, trainer.reference_point(starmap(self._batch, self._batches))
        for inputs in starmap(self._batch, self._batches):
            ref_N = trainer.reference_logps(inputs)
            with torch.no_grad(), trainer.compute_loss_context_manager():
                logps_N = reply_logps(policy, inputs)
            losses_B, measures = trainer.losses(inputs, logps_N, ref_N)
            real_B = inputs["real"].double()
            found = weighed({"loss": (losses_B, torch.ones_like(losses_B)), **measures}, real_B)
            for name, (sum_, rows) in found.items():
                sums[name] += torch.stack([sum_, rows])
        if trainer.dpo.loss is PreferenceLoss.kto:
            trainer.kl = kept
        return sums

    def _batch(self, chosen: Sequence[int], counts: bool) -> dict[str, Any]:
        batch = self._collate(list(self._units.select(chosen)))
        batch["real"] = batch["real"] * counts
        return {key: value.to(self._trainer.args.device) for key, value in batch.items()}
