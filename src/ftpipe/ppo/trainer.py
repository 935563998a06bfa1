"""Proximal policy optimisation of a language model, step by step.

Schulman et al. 2017 (arXiv:1707.06347) for the objective, 2016 (arXiv:1506.02438) for the advantages;
Ziegler et al. 2019 (arXiv:1909.08593), Stiennon et al. 2020 (arXiv:2009.01325) and InstructGPT
(arXiv:2203.02155) for language models; Huang et al., "The N Implementation Details of RLHF with PPO",
for what the papers leave out. It departs from them in these points:

1. Each answer is drawn by random numbers of its own, so neither ranks nor an interruption change it.
2. The value function is a model of its own on the shared base, not a second head on the policy, so its
   gradients are clipped apart from the policy's.
3. An answer's end is its stop token or the greatest length; a missing end costs a fixed amount
   (``ppo.missing_eos_penalty``) where Ziegler et al. sample again until there is a full stop.
4. The learning rate changes once a rollout, and updates end early at ``ppo.target_kl`` if it is set.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list, gather_object

from ftpipe import checkpoints, sharding, stopping, trace
from ftpipe.errors import HealthError
from ftpipe.logs import say
from ftpipe.ppo import functions, generation, health, state
from ftpipe.ppo.experience import Judged, experience
from ftpipe.ppo.kl import AdaptiveController, FixedController
from ftpipe.ppo.layout import (
    Answer,
    Batch,
    answer_logits,
    chosen_logps,
    lay,
    measured_entropies,
    state_values,
)
from ftpipe.ppo.roles import Role, Roles, body_of
from ftpipe.ppo.update import Ranks, Updater
from ftpipe.sequences import Order, dealt, upcoming
from ftpipe.stopping import Stopped

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from ftpipe.ppo_config import PpoConfig
    from ftpipe.trace import Trace

# What a line of the trace says of a rollout, besides the digest of its prompts and answers.
TRACED = (
    *("score", "kl", "entropy", "length", "policy_loss", "value_loss", "approx_kl"),
    *("policy_grad_norm", "value_grad_norm"),
)


@dataclass
class PpoTrainer:
    """Trains a policy on answers of its own.

    Attributes:
        prompts: rows of ``Use.prompts``.
        order: of the prompts, epoch after epoch.
        stops: ids of tokens that end an answer.
        rollouts: how many there are in all.
        schedule: of the learning rate, a step for each rollout.
        checkpoints: their folder.
        trace: takes what each rollout did.
        progress: how far the run is; ``resume`` puts that of the last checkpoint in its place.
    """

    updater: Updater
    tokenizer: PreTrainedTokenizerBase
    prompts: Dataset
    order: Order
    stops: frozenset[int]
    rollouts: int
    schedule: Any
    checkpoints: Path
    trace: Trace
    progress: state.Progress = field(default_factory=state.Progress)
    controller: FixedController | AdaptiveController = field(init=False)
    watch: health.Watch = field(init=False)

    @property
    def ppo(self) -> PpoConfig:
        return self.updater.ppo

    @property
    def roles(self) -> Roles:
        return self.updater.roles

    @property
    def ranks(self) -> Ranks:
        return self.updater.ranks

    def __post_init__(self) -> None:
        ppo = self.ppo
        self.controller = (
            FixedController(ppo.beta)
            if ppo.kl_target is None
            else AdaptiveController(ppo.beta, ppo.kl_target, ppo.kl_horizon)
        )
        self.watch = health.Watch(ppo.health)

    def resume(self) -> None:
        """Go on from the last checkpoint, if there is one, as if nothing had happened."""
        found = [state.last(self.checkpoints) if self.ranks.rank == 0 else None]
        if self.ranks.world > 1:
            broadcast_object_list(found)
        (checkpoint,) = found
        if self.ranks.rank == 0:
            checkpoints.drop_torn(self.checkpoints, checkpoint)
        self.trace.begin(checkpoints.step_of(checkpoint) if checkpoint else 0)
        if checkpoint is None:
            self.trace.initial(self._initial())
            return
        say(f"continuing from {checkpoint.name}")
        self.progress = state.restore(checkpoint, self.weights(), self.updater.optimizer, self.schedule)
        self.controller = self.controller.restored(self.progress.kl)
        self.watch.restore(self.progress.health)

    def train(
        self, log: Callable[[int, dict[str, float]], None], measure: Callable[[int], object]
    ) -> dict[str, float]:
        """Go on to the last rollout; return measures of the first and the last one.

        Args:
            log: takes the measures of each rollout.
            measure: measures held-out prompts, given how many rollouts are done.

        Raises:
            HealthError: if the run is not healthy; its state is saved.
            DataError: if the reward function fails.
            Stopped: if it was asked to stop; its state is saved.
        """
        for rollout in range(self.progress.rollouts, self.rollouts):
            try:
                shown = self._rollout(rollout)
            except HealthError as error:
                where = self._save("ended")
                raise HealthError(
                    f"ppo was ended in rollout {rollout + 1} of {self.rollouts}: {error} "
                    f"Its state is in {where}."
                ) from None
            log(rollout + 1, shown)
            self.progress.first = self.progress.first or shown
            self.progress.last = shown
            done = self.progress.rollouts
            if self.ppo.eval_every and done % self.ppo.eval_every == 0:
                measure(done)  # before the checkpoint, which nothing would measure any more
            if done == stopping.limit():
                raise Stopped(f"after rollout {done} of {self.rollouts}, with nothing saved")
            due = self.ppo.save_every and (done % self.ppo.save_every == 0 or done == self.rollouts)
            stop = self._all_asked() and done < self.rollouts
            if due or stop:
                self._save()
            if stop:
                raise Stopped(f"after rollout {done} of {self.rollouts}")
        first, last = self.progress.first, self.progress.last
        named = {f"{name}_first": first[name] for name in ("score", "kl", "length", "entropy")}
        return {"rollouts": float(self.progress.rollouts), **named, **last}

    def _all_asked(self) -> bool:
        """Say whether any rank was asked to stop."""
        asked = torch.tensor(float(stopping.asked()), device=self.roles.device)
        self.ranks.sum([asked])
        return bool(asked > 0)

    def _rollout(self, rollout: int) -> dict[str, float]:
        """Draw answers, judge them, learn from them."""
        started = time.monotonic()
        # 1. The next prompts, each as often as it is answered.
        size, times = self.ppo.batch_size, self.ppo.answers_per_prompt
        chosen = upcoming(self.order, rollout * (size // times), size // times)
        rows = self.prompts.select([row for row in chosen for _ in range(times)])
        # 2. Answers drawn from the policy, on every rank its share.
        places = range(self.ranks.rank, size, self.ranks.world)
        own = rows.select(places)["input_ids"][:]
        keys = [(self.updater.seed, rollout, place, generation.ANSWERS) for place in places]
        answers = self.draw(own, keys)
        drawn = time.monotonic()
        # 3. Log-probs under policy and reference, values, scores; then every rank gets all of them.
        judged = self.judge(answers, places)
        # 4. Rewards, advantages, returns: of the whole rollout at once.
        beta = self.controller.beta
        given, watched = self.scores(judged, rows["reference"][:])
        found = experience(judged, given, watched, beta, self.ppo)
        shown = health.measures(found)
        self.watch.look(shown)
        if shown["score_std"] == 0:
            say(
                f"rollout {rollout + 1}: all {size:,} answers have the score {shown['score']:g}; "
                "they teach nothing but to stay near the reference"
            )
        scored = time.monotonic()
        # 5. PPO epochs over minibatches.
        shown |= self.updater.update(found, rollout, self.progress.updates)
        updated = time.monotonic()
        if self.trace.has(rollout + 1) or rollout + 1 == self.rollouts:
            drawn_rows = [[*one.prompt, *one.tokens] for one in found.answers]
            measured = {name: value for name, value in shown.items() if name in TRACED}
            rate = self.schedule.get_last_lr()[0]
            rows = trace.of_rows(drawn_rows)
            self.trace.step(rollout + 1, **measured, learning_rate=rate, data=rows)
        # 6. The KL controller and the learning rate, for the next rollout.
        shown |= {"beta": beta, "learning_rate": self.schedule.get_last_lr()[0]}
        self.controller = self.controller.update(shown["kl"], size)
        self.schedule.step()
        self.progress.rollouts = rollout + 1
        self.progress.tokens += int(found.mask_BT.sum())
        self.progress.updates += int(shown["updates"])
        self.progress.kl, self.progress.health = self.controller.state(), self.watch.state()
        shown |= {
            "tokens": float(self.progress.tokens),
            "seconds_rollout": drawn - started,
            "seconds_scoring": scored - drawn,
            "seconds_update": updated - scored,
        }
        return {name: value for name, value in shown.items() if math.isfinite(value)}

    def draw(self, prompts: Sequence[Sequence[int]], keys: Sequence[Sequence[int]]) -> list[Answer]:
        """Return answers of the policy, drawn by the random numbers of their keys."""
        rounds = self.ranks.most(generation.rounds(len(prompts), self.ppo))
        if not rounds:
            return []
        with self.roles.acting(Role.policy) as model, self.updater.autocast():
            return generation.answers(
                model, prompts, keys, self.ppo, self.stops, self.updater.pad, rounds
            )

    def judge(self, answers: Sequence[Answer], places: Sequence[int]) -> list[Judged]:
        """Return all ranks' answers with what every role says of them, in the order of their places."""
        lengths = [len(one.prompt) + len(one.tokens) for one in answers]
        pieces = dealt(lengths, 0, 1, self.updater.micro_batch)
        batches = [
            lay([answers[at] for at in piece], self.updater.pad, self.roles.device) for piece in pieces
        ]
        if idle := self.ranks.most(len(batches)) - len(batches):  # passes that others make
            pad = self.updater.pad
            spare = lay([Answer((pad,), (pad,), ended=True)], pad, self.roles.device)
            batches += idle * [spare]
        with torch.no_grad():
            found = self._logps(batches) | {"values": self._values(batches)}
            if self.roles.rewards is not None:
                with self.updater.autocast():
                    found["members"] = [
                        self.roles.rewards.members(batch.ids_BL, batch.attended_BL).T
                        for batch in batches
                    ]
        judged = []
        for number, piece in enumerate(pieces):
            for row, at in enumerate(piece):
                length = len(answers[at].tokens)
                tokens = {  # copies: a view would be sent to other ranks with its whole batch
                    f"{name}_T": found[name][number][row, :length].float().cpu().clone()
                    for name in ("logps", "ref_logps", "entropies", "values")
                }
                members = (
                    found["members"][number][row].float().cpu().clone() if "members" in found else None
                )
                judged.append(Judged(places[at], answers[at], **tokens, members_M=members))
        everyone: list[Judged] = gather_object(judged)
        return sorted(everyone, key=lambda one: one.place)

    def _logps(self, batches: Sequence[Batch]) -> dict[str, list[torch.Tensor]]:
        """Return log-probs under policy and reference, and the policy's entropies."""
        found: dict[str, list[torch.Tensor]] = {"logps": [], "ref_logps": [], "entropies": []}
        for role, name in ((Role.policy, "logps"), (Role.reference, "ref_logps")):
            with self.roles.acting(role) as model, self.updater.autocast():
                for batch in batches:
                    logits_BTV = answer_logits(model, batch, self.ppo.temperature)
                    found[name].append(chosen_logps(logits_BTV, batch))
                    if role is Role.policy:
                        found["entropies"].append(measured_entropies(logits_BTV))
        return found

    def _values(self, batches: Sequence[Batch]) -> list[torch.Tensor]:
        """Return V before each token; 0 where there is no value function."""
        if self.roles.head is None:
            return [torch.zeros(batch.mask_BT.shape) for batch in batches]
        with self.roles.acting(Role.value) as model, self.updater.autocast():
            return [state_values(body_of(model), self.roles.value_head, batch) for batch in batches]

    def scores(
        self, judged: Sequence[Judged], references: Sequence[str]
    ) -> tuple[list[float] | None, list[float] | None]:
        """Return what the reward function says, and the one that is only watched; None without one.

        Args:
            references: of the prompts; empty where a row has none.
        """
        known = [reference or None for reference in references]
        decode = partial(self.tokenizer.decode, skip_special_tokens=True)
        prompts = [str(decode(list(one.answer.prompt))) for one in judged]
        texts = [str(decode(list(one.answer.tokens))) for one in judged]

        def by(name: str | None, parameters: Mapping[str, Any]) -> list[float] | None:
            if name is None:
                return None
            function = functions.named(name, parameters)
            return functions.scores(name, function, prompts, texts, known)

        function, watch = self.ppo.function, self.ppo.watch
        return by(function.name, function.parameters), by(watch.name, watch.parameters)

    def _initial(self) -> dict[str, str]:
        """Return digests of what is trained and of what it stands on, as the first rank holds it."""
        trained = self.weights()
        names = {id(weight): name for name, weight in trained.items()}
        models = dict.fromkeys(self.roles.models.values())  # one, where the base is shared
        base = [
            (f"{at}/{name}", weight)
            for at, model in enumerate(models)
            for name, weight in model.named_parameters()
            if id(weight) not in names
        ]
        return trace.of_weights([*trained.items(), *base], trained.values())

    def weights(self) -> dict[str, torch.Tensor]:
        """Return all that is trained, by name."""
        return {
            f"{role}/{name}": weight
            for role in (Role.policy, Role.value)
            for name, weight in self.roles.trained(role).items()
        }

    def _save(self, name: str = state.CHECKPOINT) -> Path:
        folder = self.checkpoints / f"{name}-{self.progress.rollouts}"
        weights, held = self.weights(), self.updater.optimizer.state_dict()
        if self.ranks.shards:
            weights = {name: sharding.full(weight) for name, weight in weights.items()}
            held["state"] = {
                number: {name: sharding.full(value) for name, value in one.items()}
                for number, one in held["state"].items()
            }
        if self.ranks.rank == 0:
            keep = self.ppo.keep_checkpoints
            self.trace.keep()
            state.save(folder, self.progress, weights, held, self.schedule, keep)
        return folder


def held_out(trainer: PpoTrainer, rows: Dataset) -> dict[str, Any]:
    """Return what held-out prompts show, always drawn by the same random numbers: on every rank at once.

    Args:
        rows: of ``Use.prompts``.

    Returns:
        ``measures``, and ``answers``: a prompt, its answer and their score each.
    """
    places = range(trainer.ranks.rank, len(rows), trainer.ranks.world)
    own = rows.select(places)["input_ids"][:]
    keys = [(trainer.updater.seed, 0, place, generation.HELD_OUT) for place in places]
    answers = trainer.draw(own, keys)
    judged = trainer.judge(answers, places)
    given, watched = trainer.scores(judged, rows["reference"][:])
    beta = trainer.controller.beta
    found = experience(judged, given, watched, beta, trainer.ppo, learned=False)
    shown = health.measures(found)
    names = ("score", "watched", "kl", "length", "eos_rate", "entropy")
    decode = trainer.tokenizer.decode
    return {
        "measures": {f"held_out_{name}": shown[name] for name in names if name in shown},
        "answers": [
            {
                "prompt": decode(list(one.prompt)),
                "answer": decode(list(one.tokens)),
                "ended": one.ended,
                "score": score,
            }
            for one, score in zip(found.answers, found.scores_B.tolist(), strict=True)
        ],
    }
