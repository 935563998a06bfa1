"""Updates against a loss written out for one answer at a time, and cut into pieces in every way."""

from __future__ import annotations

import copy
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ftpipe.choices import Algorithm, Precision, Weighting
from ftpipe.errors import HealthError
from ftpipe.ppo import update
from ftpipe.ppo.experience import Experience, Judged, experience
from ftpipe.ppo.layout import Answer, Batch, lay
from ftpipe.ppo.roles import Role, Roles, body_of
from ftpipe.ppo.update import Ranks, Updater
from ftpipe.ppo_config import PpoConfig
from tests.unit.ppo.tiny import PAD, answers, plain_logits, plain_values, roles

SIZES = ((3, 5), (7, 1), (1, 4), (5, 6), (2, 2), (4, 3), (6, 2), (3, 3))
TEMPERATURE = 1.3


def config(**keys: Any) -> PpoConfig:
    given = {
        "temperature": TEMPERATURE,
        "ppo_epochs": 1,
        "minibatches": 1,
        "batch_size": len(SIZES),
        "max_grad_norm": 0.0,
        "value_weight": 0.4,
        "value_clip": 0.3,
    }
    return PpoConfig(**{**given, **keys})


def rollout(held: Roles, ppo: PpoConfig) -> Experience:
    """Return a rollout whose log-probs and values are those of one row at a time."""
    generator = torch.Generator().manual_seed(0)
    judged = []
    for place, one in enumerate(answers(0, *SIZES)):
        with torch.no_grad():
            logps = {
                role: chosen(plain_logits(held.models[role], one) / TEMPERATURE, one)
                for role in (Role.policy, Role.reference)
            }
            values_T = plain_values(body_of(held.models[Role.value]), held.value_head, one)
        judged.append(
            Judged(
                place,
                one,
                logps[Role.policy],
                logps[Role.reference],
                torch.zeros_like(values_T),
                values_T,
                torch.randn(1, generator=generator),
            )
        )
    return experience(judged, None, None, 0.1, ppo)


def chosen(logits_TV: Tensor, one: Answer) -> Tensor:
    return torch.stack([row.log_softmax(-1)[t] for row, t in zip(logits_TV, one.tokens, strict=True)])


def trained(held: Roles) -> dict[str, Tensor]:
    return {
        f"{role}/{name}": weight
        for role in (Role.policy, Role.value)
        for name, weight in held.trained(role).items()
    }


@dataclass
class Seen:
    """What an optimiser was given: weights before each step, and their gradients."""

    weights: list[dict[str, Tensor]] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)


def updater(held: Roles, ppo: PpoConfig, rate: float = 0.0, **keys: Any) -> tuple[Updater, Seen]:
    weights, seen = trained(held), Seen()
    optimizer = torch.optim.SGD(list(weights.values()), lr=rate)

    def look(*_: Any) -> None:
        seen.weights.append({name: w.detach().clone() for name, w in weights.items()})
        seen.gradients.append({n: w.grad.clone() for n, w in weights.items() if w.grad is not None})

    optimizer.register_step_pre_hook(look)
    given: dict[str, Any] = {
        "seed": 5,
        "micro_batch": 3,
        "precision": Precision.fp32,
        "autocast": nullcontext,
        "ranks": Ranks(),
        "pad": PAD,
        **keys,
    }
    return Updater(held, optimizer, ppo, **given), seen


def mean(rows: Sequence[Tensor], how: Weighting) -> Tensor:
    """Return the mean over tokens, or over answers of the mean over their tokens."""
    counted = [row for row in rows if len(row)]
    if how is Weighting.tokens:
        return torch.cat(counted).mean()
    return torch.stack([row.mean() for row in counted]).mean()


def by_paper(held: Roles, found: Experience, ppo: PpoConfig, at: Sequence[int]) -> dict[str, Tensor]:
    """Return the parts of the loss of some answers, one answer and one token after the other."""
    rows: dict[str, list[Tensor]] = {}
    for b in at:
        one = found.answers[b]
        if not found.learned_BT[b].any():
            continue
        logits_TV = plain_logits(held.models[Role.policy], one) / ppo.temperature
        logps_T = chosen(logits_TV, one)
        values_T = plain_values(body_of(held.models[Role.value]), held.value_head, one)
        tokens: dict[str, list[Tensor]] = {}
        for t in range(len(one.tokens)):
            old, advantage = found.logps_BT[b, t].item(), found.advantages_BT[b, t].item()
            ratio = torch.exp(logps_T[t] - old)
            within = torch.clamp(ratio, 1 - ppo.clip, 1 + ppo.clip)
            surrogate = torch.min(ratio * advantage, within * advantage)
            p_V = logits_TV[t].softmax(-1)
            before, target = found.values_BT[b, t].item(), found.returns_BT[b, t].item()
            error = (values_T[t] - target) ** 2
            held_back = values_T[t] < before - (ppo.value_clip or math.inf)
            if ppo.value_clip is not None:
                near = torch.clamp(values_T[t], before - ppo.value_clip, before + ppo.value_clip)
                held_back = (near - target) ** 2 > error
                error = torch.max(error, (near - target) ** 2)
            for name, value in {
                "policy_loss": -surrogate,
                "value_loss": error / 2,
                "entropy_now": -(p_V * p_V.log()).sum(),
                "ratio": ratio.detach(),
                "approx_kl": (ratio - 1 - ratio.log()).detach(),
                "ratio_off": (logps_T[t] - old).abs().detach(),
                "clip_fraction": (
                    (ratio > 1 + ppo.clip) if advantage > 0 else (ratio < 1 - ppo.clip)
                ).double(),
                "value_clip_fraction": held_back.double(),
            }.items():
                tokens.setdefault(name, []).append(value)
        for name, values in tokens.items():
            rows.setdefault(name, []).append(torch.stack(values))
    return {name: mean(each, ppo.weighting) for name, each in rows.items()}


def from_reference(held: Roles, found: Experience, ppo: PpoConfig) -> Tensor:
    """Return GRPO's divergence, rho / pi - log(rho / pi) - 1 (arXiv:2402.03300, eq. 4)."""
    rows = []
    for b, one in enumerate(found.answers):
        logps_T = chosen(plain_logits(held.models[Role.policy], one) / ppo.temperature, one)
        times_T = torch.exp(found.ref_logps_BT[b, : len(one.tokens)] - logps_T)
        rows.append(times_T - torch.log(times_T) - 1)
    return mean(rows, ppo.weighting)


def gradients(held: Roles, found: Experience, ppo: PpoConfig, at: Sequence[int]) -> dict[str, Tensor]:
    parts = by_paper(held, found, ppo, at)
    loss = (
        parts["policy_loss"]
        + ppo.value_weight * parts["value_loss"]
        - ppo.entropy_weight * parts["entropy_now"]
    )
    if found.kl_weight:
        loss = loss + found.kl_weight * from_reference(held, found, ppo)
    weights = trained(held)
    got = torch.autograd.grad(loss, list(weights.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(weights, got, strict=True))


def close(found: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert found.keys() == want.keys()
    scale = max(each.abs().max().item() for each in want.values())
    assert scale > 1e-3
    for name, each in want.items():
        torch.testing.assert_close(found[name], each, rtol=2e-3, atol=2e-5 * scale, msg=name)


def steps_and_batches(
    monkeypatch: pytest.MonkeyPatch, made: Updater, seen: Seen
) -> list[tuple[int, list[Answer]]]:
    """Return a list to which each micro-batch is added, with the number of the step that it is of."""
    laid: list[tuple[int, list[Answer]]] = []

    def watched(some: list[Answer], *rest: Any) -> Batch:
        laid.append((len(seen.gradients), some))
        return lay(some, *rest)

    monkeypatch.setattr(update, "lay", watched)
    return laid


@pytest.mark.parametrize("how", Weighting)
@pytest.mark.parametrize("micro_batch", [1, 2, 3, 8])
def test_gradients_are_those_of_the_papers_loss_however_a_minibatch_is_cut(
    how: Weighting, micro_batch: int
) -> None:
    held, ppo = roles(), config(weighting=how, entropy_weight=0.07)
    found = rollout(held, ppo)
    made, seen = updater(held, ppo, micro_batch=micro_batch)
    shown = made.update(found, 0, 0)
    close(seen.gradients[0], gradients(held, found, ppo, range(len(SIZES))))
    for name, part in by_paper(held, found, ppo, range(len(SIZES))).items():
        assert shown[name] == pytest.approx(part.item(), rel=1e-4, abs=2e-6), name
    assert shown["updates"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("how", Weighting)
@pytest.mark.parametrize("micro_batch", [2, 8])
def test_grpos_loss_has_the_divergence_from_the_reference(how: Weighting, micro_batch: int) -> None:
    keys = {"algorithm": Algorithm.grpo, "answers_per_prompt": len(SIZES), "weighting": how}
    held, ppo = roles(), config(**keys, value_weight=0.0)
    found = rollout(held, ppo)
    assert found.kl_weight == 0.1
    assert from_reference(held, found, ppo) > 0.01  # another reference than the policy
    made, seen = updater(held, ppo, micro_batch=micro_batch)
    made.update(found, 0, 0)
    close(seen.gradients[0], gradients(held, found, ppo, range(len(SIZES))))


def test_without_a_value_function_the_policy_alone_is_updated() -> None:
    held, ppo = roles(), config(algorithm=Algorithm.rloo, answers_per_prompt=len(SIZES))
    found = rollout(held, ppo)
    held.head = None
    weights = held.trained(Role.policy)
    assert not held.trained(Role.value)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    made, _ = updater(held, ppo, rate=0.1)
    shown = made.update(found, 0, 0)
    assert "policy_grad_norm" in shown
    assert not [name for name in shown if "value" in name]
    assert any(not torch.equal(before[name], weight) for name, weight in weights.items())


KEYS: list[dict[str, Any]] = [
    {},
    {"weighting": Weighting.sequences},
    {"value_clip": None, "entropy_weight": 0.5},
    {"mask_truncated": True},
    {"mask_truncated": True, "weighting": Weighting.sequences},
    {"clip": 0.6, "value_clip": 0.1},
]


@pytest.mark.parametrize("keys", KEYS, ids=str)
def test_later_steps_are_those_of_the_papers_loss_too(
    keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # steps so long that ratios and values leave what is clipped
    held, ppo = roles(), config(ppo_epochs=2, minibatches=2, **keys)
    found = rollout(held, ppo)
    made, seen = updater(held, ppo, rate=0.05)
    laid = steps_and_batches(monkeypatch, made, seen)
    made.update(found, 0, 0)
    assert len(seen.gradients) == 4
    every: list[dict[str, Tensor]] = []
    for step, weights in enumerate(seen.weights):
        then = copy.deepcopy(held)
        with torch.no_grad():
            for name, weight in trained(then).items():
                weight.copy_(weights[name])
        at = sorted(
            {found.answers.index(one) for number, some in laid if number == step for one in some}
        )
        assert len(at) == 4
        every.append(by_paper(then, found, ppo, at))
        close(seen.gradients[step], gradients(then, found, ppo, at))
    # or nothing of it was seen
    assert any(0 < parts["clip_fraction"].item() < 1 for parts in every)
    if ppo.value_clip is not None:
        assert any(0 < parts["value_clip_fraction"].item() < 1 for parts in every)


def test_what_is_shown_is_the_mean_over_minibatches_but_for_the_first_ratio() -> None:
    held, ppo = roles(), config(ppo_epochs=3, clip=0.35)
    found = rollout(held, ppo)
    made, seen = updater(held, ppo, rate=0.05)
    shown = made.update(found, 0, 0)
    every = []
    for weights in seen.weights:
        then = copy.deepcopy(held)
        with torch.no_grad():
            for name, weight in trained(then).items():
                weight.copy_(weights[name])
        every.append(by_paper(then, found, ppo, range(len(SIZES))))
    for name in ("policy_loss", "value_loss", "entropy_now", "approx_kl", "ratio", "clip_fraction"):
        want = sum(one[name].item() for one in every) / 3
        assert shown[name] == pytest.approx(want, rel=1e-3, abs=1e-5), name
    assert shown["value_clip_fraction"] > 0 and shown["clip_fraction"] > 0
    assert every[2]["ratio_off"].item() > 0.01
    assert shown["ratio_off"] == pytest.approx(0.0, abs=1e-5)
    assert shown["updates"] == 3


@pytest.mark.parametrize("how", Weighting)
def test_the_first_minibatch_is_a_plain_policy_gradient(how: Weighting) -> None:
    # ratio 1: the loss is -mean(A), whatever the clip; V is V_old, so the value's is mean((R - V)^2) / 2
    held, ppo = roles(), config(weighting=how, clip=0.01, value_clip=0.01)
    found = rollout(held, ppo)
    shown = updater(held, ppo)[0].update(found, 0, 0)
    lengths = [len(one.tokens) for one in found.answers]
    advantages = [found.advantages_BT[b, :n].double() for b, n in enumerate(lengths)]
    errors = [
        (found.returns_BT - found.values_BT)[b, :n].double().square() / 2 for b, n in enumerate(lengths)
    ]
    assert shown["ratio"] == pytest.approx(1.0, abs=1e-5)
    assert shown["ratio_off"] == pytest.approx(0.0, abs=1e-5)
    assert shown["policy_loss"] == pytest.approx(-mean(advantages, how).item(), abs=1e-5)
    assert shown["value_loss"] == pytest.approx(mean(errors, how).item(), rel=1e-4)
    assert shown["clip_fraction"] == shown["value_clip_fraction"] == 0
    assert shown["approx_kl"] == pytest.approx(0.0, abs=1e-6)


def test_every_epoch_has_each_answer_once_in_an_order_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held, ppo = roles(), config(ppo_epochs=3, minibatches=4)
    found = rollout(held, ppo)
    made, seen = updater(held, ppo)
    orders = []
    for number in (0, 1, 0):
        seen.gradients.clear()
        laid = steps_and_batches(monkeypatch, made, seen)
        made.update(found, number, 0)
        assert len(seen.gradients) == 12
        per_step = [
            frozenset(one for number, some in laid if number == step for one in some)
            for step in range(12)
        ]
        assert [len(each) for each in per_step] == [2] * 12
        for epoch in range(3):
            assert Counter(itertools.chain(*per_step[4 * epoch : 4 * epoch + 4])) == Counter(
                found.answers
            )
        orders.append(per_step)
    epochs = [tuple(order[at : at + 4]) for order in orders[:2] for at in (0, 4, 8)]
    assert len(set(epochs)) == 6
    assert orders[0] == orders[2]  # the rollout's number and the seed decide it
    made.seed = 6
    laid = steps_and_batches(monkeypatch, made, seen)
    seen.gradients.clear()
    made.update(found, 0, 0)
    assert {one for number, some in laid if number == 0 for one in some} != orders[0][0]


def test_answers_of_similar_length_share_a_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    held, ppo = roles(), config()
    made, seen = updater(held, ppo)
    laid = steps_and_batches(monkeypatch, made, seen)
    made.update(rollout(held, ppo), 0, 0)
    lengths = [len(one.prompt) + len(one.tokens) for _, some in laid for one in some]
    assert [len(some) for _, some in laid] == [3, 3, 2]  # once, for policy and value function
    assert lengths == sorted(lengths, reverse=True)


def test_an_entropy_bonus_makes_the_policy_less_sure() -> None:
    after = []
    for bonus in (0.0, 0.5):
        held, ppo = roles(), config(ppo_epochs=4, entropy_weight=bonus)
        found = rollout(held, ppo)
        updater(held, ppo, rate=0.02)[0].update(found, 0, 0)
        after.append(by_paper(held, found, ppo, range(len(SIZES)))["entropy_now"].item())
    assert after[1] > after[0] + 0.02


def test_updates_end_where_the_policy_is_too_far_from_the_rollout() -> None:
    held, ppo = roles(), config(ppo_epochs=6)
    found = rollout(held, ppo)
    kls, weights = [], []
    made, seen = updater(held, ppo, rate=0.01)
    made.update(found, 0, 0)
    for then in seen.weights:
        other = copy.deepcopy(held)
        with torch.no_grad():
            for name, weight in trained(other).items():
                weight.copy_(then[name])
        kls.append(by_paper(other, found, ppo, range(len(SIZES)))["approx_kl"].item())
        weights.append(then)
    assert kls[0] < kls[1] < kls[2] < kls[3]
    held = roles()
    made, seen = updater(held, replace(ppo, target_kl=(kls[2] + kls[3]) / 2), rate=0.01)
    shown = made.update(found, 0, 0)
    # three steps are taken; the fourth is too far away and leaves weights and gradients as they are
    assert shown["updates"] == len(seen.gradients) == 3
    for name, weight in trained(held).items():
        torch.testing.assert_close(weight.detach(), weights[3][name])
        assert weight.grad is None or not weight.grad.any()
    assert shown["approx_kl"] == pytest.approx(sum(kls[:3]) / 3, rel=1e-3)
    assert not any(model.training for model in held.models.values())
    within = updater(roles(), replace(ppo, target_kl=2 * max(kls)), rate=0.01)[0].update(found, 0, 0)
    assert within["updates"] == 6


def test_they_may_end_before_the_first_step() -> None:
    # rounding in 16 bits alone can be more than is asked for
    held, ppo = roles(), config(target_kl=1e-6)
    found = rollout(held, ppo)
    made, seen = updater(held, ppo, rate=0.05, precision=Precision.bf16)
    shown = made.update(replace(found, logps_BT=found.logps_BT + 0.01), 0, 0)
    assert shown["updates"] == 0 and not seen.gradients
    assert shown["approx_kl"] == pytest.approx(0.01**2 / 2, rel=0.01)
    assert shown["ratio_off"] == pytest.approx(0.01, rel=1e-3)


def test_a_policy_that_did_not_draw_the_answers_is_refused() -> None:
    held, ppo = roles(), config()
    found = rollout(held, ppo)
    made, seen = updater(held, ppo)
    with torch.no_grad():
        next(iter(held.trained(Role.policy).values())).mul_(1.1)
    with pytest.raises(
        HealthError, match=r"the ratio of the first minibatch is not 1.*weights are spoilt"
    ):
        made.update(found, 0, 0)
    assert not seen.gradients
    # rounding in 16 bits is let pass, another policy is not
    off = replace(found, logps_BT=found.logps_BT + 0.01)
    for precision, passes in ((Precision.fp32, False), (Precision.bf16, True)):
        made, seen = updater(roles(), ppo, precision=precision)
        if passes:
            made.update(off, 0, 0)
        else:
            with pytest.raises(HealthError, match=r"0\.01 nats a token"):
                made.update(off, 0, 0)
        with pytest.raises(HealthError, match="ratio"):
            made.update(replace(found, logps_BT=found.logps_BT - 0.1), 0, 0)
    with pytest.raises(HealthError, match="nan nats"):
        made.update(replace(found, logps_BT=found.logps_BT + math.nan), 0, 0)


@pytest.mark.parametrize(("name", "role"), [("advantages_BT", "policy"), ("returns_BT", "value")])
@pytest.mark.parametrize("wild", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_refused_before_the_step(
    name: str, role: str, wild: float
) -> None:
    held, ppo = roles(), config(max_grad_norm=1.0)
    found = rollout(held, ppo)
    whole_BT = getattr(found, name).clone()
    whole_BT[2, 1] = wild
    before = {n: w.detach().clone() for n, w in trained(held).items()}
    made, seen = updater(held, ppo, rate=0.1)
    message = rf"the gradient of the {role} is (nan|inf) in rollout 4; lower ppo.learning_rate"
    with pytest.raises(HealthError, match=message):
        made.update(replace(found, **{name: whole_BT}), 3, 0)
    assert not seen.gradients
    for n, weight in trained(held).items():
        assert torch.equal(weight, before[n])


def test_gradients_of_each_role_are_clipped_by_themselves() -> None:
    held, ppo = roles(), config(max_grad_norm=0.5)
    found = rollout(held, ppo)
    want = gradients(held, found, ppo, range(len(SIZES)))
    made, seen = updater(held, ppo)
    shown = made.update(found, 0, 0)
    clipped: dict[str, Tensor] = {}
    for role in (Role.policy, Role.value):
        norm = math.sqrt(
            sum(g.double().square().sum().item() for n, g in want.items() if n.startswith(role))
        )
        assert norm > 0.5
        assert shown[f"{role}_grad_norm"] == pytest.approx(norm, rel=1e-3)
        clipped |= {n: g * 0.5 / norm for n, g in want.items() if n.startswith(role)}
    close(seen.gradients[0], clipped)
    unclipped, seen = updater(held, config(max_grad_norm=0.0))
    unclipped.update(found, 0, 0)
    close(seen.gradients[0], want)


def test_no_gradient_is_left_over_for_the_next_step() -> None:
    held, ppo = roles(), config(ppo_epochs=2)
    found = rollout(held, ppo)
    made, seen = updater(held, ppo)  # of rate 0: both steps have the same gradient
    made.update(found, 0, 0)
    close(seen.gradients[1], seen.gradients[0])
    made.update(found, 1, 2)
    close(seen.gradients[2], seen.gradients[0])


def test_models_train_while_they_are_updated_and_not_after() -> None:
    held, ppo = roles(), config()
    found = rollout(held, ppo)
    made, _ = updater(held, ppo)
    modes = []
    made.optimizer.register_step_pre_hook(
        lambda *_: modes.append([model.training for model in held.models.values()])
    )
    made.update(found, 0, 0)
    assert modes == [[True] * 3]
    assert not any(model.training for model in held.models.values())


def test_the_loss_on_demonstrations_joins_each_step() -> None:
    held, ppo = roles(), config(ppo_epochs=2, minibatches=2)
    found = rollout(held, ppo)
    made, seen = updater(held, ppo)
    made.update(found, 0, 0)
    numbers: list[int] = []
    weight = held.trained(Role.policy)["lm_head.weight"]

    def ptx(number: int) -> Tensor:
        numbers.append(number)
        (3.0 * weight.sum()).backward()
        return torch.tensor(number / 2)

    made, with_it = updater(held, ppo, ptx=ptx)
    shown = made.update(found, 0, 10)
    assert numbers == [10, 11, 12, 13]
    assert shown["ptx_loss"] == pytest.approx((5 + 5.5 + 6 + 6.5) / 4)
    for plain, mixed in zip(seen.gradients, with_it.gradients, strict=True):
        plain["policy/lm_head.weight"] += 3.0
        close(mixed, plain)


class Alone(Ranks):
    """One of several ranks that hears nothing of the others."""

    def sum(self, values: Sequence[Tensor]) -> None:
        pass


@pytest.mark.parametrize("how", Weighting)
@pytest.mark.parametrize("world", [2, 3, 5])
def test_the_gradients_of_all_ranks_add_up_to_those_of_one(how: Weighting, world: int) -> None:
    # minibatches of four on five ranks: one of them has no answer, and zeros for gradients
    held, ppo = roles(), config(minibatches=2, weighting=how, entropy_weight=0.1)
    found = rollout(held, ppo)
    made, whole = updater(held, ppo)
    want = made.update(found, 0, 0)
    total: list[dict[str, Tensor]] = [{}, {}]
    shown: Counter[str] = Counter()
    for rank in range(world):
        made, seen = updater(held, ppo, ranks=Alone(rank, world), micro_batch=2)
        shown.update(made.update(found, 0, 0))
        for step, each in enumerate(seen.gradients):
            assert each.keys() == whole.gradients[0].keys()
            for name, gradient in each.items():
                total[step][name] = total[step].get(name, torch.zeros(())) + gradient
                if rank >= 4:
                    assert not gradient.any()
    for step in range(2):
        close(total[step], whole.gradients[step])
    for name in update.MEASURES:
        assert shown[name] == pytest.approx(want[name], rel=1e-4, abs=1e-5), name


def test_a_rank_without_answers_does_not_stop_at_its_own_measures() -> None:
    # what it judges by is the sum over ranks: here another rank is far away
    class Far(Ranks):
        def sum(self, values: Sequence[Tensor]) -> None:
            for value in values:
                value += 1.0

    held, ppo = roles(), config()
    made, _ = updater(held, ppo, ranks=Far(1, 2))
    with pytest.raises(HealthError, match="the ratio of the first minibatch is not 1"):
        made.update(rollout(held, ppo), 0, 0)


def test_gradients_measures_and_the_loss_on_demonstrations_are_summed_over_ranks() -> None:
    class Twice(Ranks):  # as if another rank had the same
        def sum(self, values: Sequence[Tensor]) -> None:
            for value in values:
                value *= 2

    held, ppo = roles(), config()
    found = rollout(held, ppo)
    made, alone = updater(held, ppo, ptx=lambda _: torch.tensor(0.75))
    want = made.update(found, 0, 0)
    made, seen = updater(held, ppo, ranks=Twice(), ptx=lambda _: torch.tensor(0.75))
    shown = made.update(found, 0, 0)
    close(seen.gradients[0], {name: 2 * each for name, each in alone.gradients[0].items()})
    assert want["ptx_loss"] == 0.75
    for name in (*update.MEASURES, "ptx_loss", "policy_grad_norm", "value_grad_norm"):
        assert shown[name] == pytest.approx(2 * want[name], rel=1e-5), name


def test_tensors_of_all_shapes_and_types_are_summed_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[torch.dtype] = []

    def twice(flat: Tensor) -> None:  # as if another rank had the same
        messages.append(flat.dtype)
        flat.mul_(2)

    monkeypatch.setattr(dist, "all_reduce", twice)
    wide = torch.arange(6.0).reshape(2, 3)
    values = [torch.tensor(1.5), wide.T, torch.ones(2, dtype=torch.float64), torch.full((2, 2), 3.0)]
    Ranks(0, 2).sum(values)
    assert sorted(map(str, messages)) == ["torch.float32", "torch.float64"]
    assert [value.tolist() for value in values] == [
        3.0,
        [[0, 6], [2, 8], [4, 10]],
        [2, 2],
        [[6, 6], [6, 6]],
    ]
    assert wide.tolist() == [[0, 2, 4], [6, 8, 10]]
    Ranks().sum(values)
    assert values[0].item() == 3.0 and len(messages) == 2


def test_every_rank_sends_its_sums_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    # a set of dtypes has another order in each process
    sent: list[torch.dtype] = []
    monkeypatch.setattr(dist, "all_reduce", lambda flat: sent.append(flat.dtype))
    dtypes = [torch.bfloat16, torch.float64, torch.float32, torch.bfloat16, torch.float16]
    for order in (dtypes, dtypes[::-1]):
        sent.clear()
        Ranks(0, 2).sum([torch.ones(2, dtype=dtype) for dtype in order])
        assert sent == list(dict.fromkeys(order))
