"""The loss on held-out rows: nats per learned token, over all of them, on every number of ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ftpipe.sequences import dealt
from ftpipe.sharding import in_step

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import SFTTrainer


class HeldOut:
    """Measures a trainer's model on rows it does not train on.

    The mean is over tokens, not over batches of different sizes, so neither the batch size nor the
    number of ranks changes it. Nothing random is drawn: the training goes on as if it had not run.
    """

    def __init__(
        self, trainer: SFTTrainer, model: torch.nn.Module, rows: Dataset, pad: int, batch_size: int
    ) -> None:
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        self._trainer = trainer
        self._model = model
        self._rows = rows
        self._collate = DataCollatorForLanguageModeling(pad_token_id=pad)
        accelerator = trainer.accelerator
        rank, world = accelerator.process_index, accelerator.num_processes
        self._batches = dealt(rows["length"][:], rank, world, batch_size)
        self._most = len(dealt(rows["length"][:], 0, world, batch_size))

    def measure(self) -> dict[str, float]:
        return {"held_out_loss": self.loss()}

    def loss(self) -> float:
        """Return the mean negative log-likelihood of the learned tokens."""
        trainer, model = self._trainer, self._model
        device = trainer.accelerator.device
        was_training = model.training
        model.eval()
        total = torch.zeros(2, dtype=torch.float64, device=device)  # nats, tokens
        with torch.no_grad(), trainer.compute_loss_context_manager():
            for batch, counts in in_step(self._batches, self._most):
                columns = [
                    {"input_ids": row["input_ids"], "labels": row["labels"]}
                    for row in self._rows.select(batch)
                ]
                inputs = {key: value.to(device) for key, value in self._collate(columns).items()}
                # TRL's fused head scores only learned positions, without building all logits
                output = model(**inputs, use_cache=False, fused_lm_head=True)
                if counts:
                    total[0] -= output.log_probs.double().sum()
                    total[1] += output.label_mask.sum()
        model.train(was_training)
        nats, tokens = trainer.accelerator.reduce(total, reduction="sum").tolist()
        return float(nats / tokens)
