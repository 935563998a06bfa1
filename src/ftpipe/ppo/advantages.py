"""Advantages of the tokens of answers, what the value function learns from, and whitening.

Shapes: B answers, T positions of the longest one. A mask is True on counted tokens, a prefix of each
row; what lies outside is never read, NaN included.

Sums of moments over ranks are left to who trains, so that a batch is whitened as one whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

DAMPED = 1e-4  # added to a group's deviation: TRL, trainer/grpo_trainer.py
EPSILON = 1e-8  # added to a variance: lm-human-preferences, utils/core.py, whiten


def gae(rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float, lam: float) -> Tensor:
    """Return generalised advantage estimates, ending each row at its last counted token.

    Schulman et al. 2016 (arXiv:1506.02438), eqs. 10 and 16: delta_t = r_t + gamma V_{t+1} - V_t,
    A_t = delta_t + gamma lam A_{t+1}. After the last token there is no state: V and A are 0 there.

    Args:
        rewards_BT: reward received after token t, reward-model units.
        values_BT: V(s_t) before token t, same units, detached.
        gamma, lam: discount and trace decay per token, in [0, 1].

    Returns:
        advantages_BT, not whitened, zero where the mask is False.

    Raises:
        ValueError: if the shapes differ.
    """
    if not rewards_BT.shape == values_BT.shape == mask_BT.shape:
        shapes = ", ".join(str(tuple(each.shape)) for each in (rewards_BT, values_BT, mask_BT))
        raise ValueError(f"rewards, values and mask differ in shape: {shapes}.")
    # zeros behind the last token are its V_{t+1} and A_{t+1}: an answer ends, nothing is bootstrapped
    rewards_BT = torch.where(mask_BT, rewards_BT, 0.0)
    values_BT = torch.where(mask_BT, values_BT, 0.0)
    advantages_BT = torch.zeros_like(rewards_BT + values_BT)
    next_value_B = next_advantage_B = advantages_BT.new_zeros(len(advantages_BT))
    for t in reversed(range(values_BT.shape[1])):
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        next_advantage_B = delta_B + gamma * lam * next_advantage_B
        next_value_B = values_BT[:, t]
        advantages_BT[:, t] = next_advantage_B
    return advantages_BT


def returns(advantages_BT: Tensor, values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return what the value function is to learn: A_t + V_t, the TD(lam) return.

    lm-human-preferences, train_policy.py (``returns = advantages + values``).

    Args:
        advantages_BT: of ``gae``, before they are whitened.
        values_BT: the values that ``gae`` had.

    Returns:
        returns_BT, reward-model units, zero where the mask is False.
    """
    return torch.where(mask_BT, advantages_BT + values_BT, 0.0)


def leave_one_out(rewards_B: Tensor, group: int) -> Tensor:
    """Return each answer's reward less the mean of the others to its prompt: RLOO.

    Ahmadian et al. 2024 (arXiv:2402.14740), eq. 6; Kool et al. 2019. The others' mean is a baseline that
    does not depend on the answer, so nothing is biased and no value function is needed.

    Args:
        rewards_B: of whole answers, their KL penalty taken off; those to one prompt side by side.
        group: answers to each prompt, 2 or more.

    Returns:
        advantages_B; a group adds up to 0.

    Raises:
        ValueError: if the group is too small, or does not divide the answers.
    """
    rewards_GK = _grouped(rewards_B, group)
    others_GK = (rewards_GK.sum(1, keepdim=True) - rewards_GK) / (group - 1)
    return (rewards_GK - others_GK).flatten()


def group_relative(scores_B: Tensor, group: int) -> Tensor:
    """Return each answer's score less its group's mean, over the group's standard deviation: GRPO.

    Shao et al. 2024 (arXiv:2402.03300), section 4.1.2. The deviation is of the sample (divided by one
    less), as in TRL, and damped as there, so that equal scores give 0.

    Args:
        scores_B: of whole answers; those to one prompt side by side.
        group: answers to each prompt, 2 or more.

    Raises:
        ValueError: if the group is too small, or does not divide the answers.
    """
    scores_GK = _grouped(scores_B, group)
    apart_GK = scores_GK - scores_GK.mean(1, keepdim=True)
    return (apart_GK / (scores_GK.std(1, keepdim=True) + DAMPED)).flatten()


def _grouped(values_B: Tensor, group: int) -> Tensor:
    if group < 2 or len(values_B) % group:
        raise ValueError(
            f"{len(values_B)} answers do not make groups of {group}; a group has 2 answers or more."
        )
    return values_B.view(-1, group)


def moments(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return how many tokens count, their sum and their sum of squares, as one tensor of three.

    Those of parts of a batch add up to those of the whole: all-reduce the tensor with a sum. It is
    float64, as a variance is the small difference of large sums.
    """
    counted_BT = torch.where(mask_BT, values_BT, 0.0).double()
    return torch.stack([mask_BT.sum().double(), counted_BT.sum(), (counted_BT**2).sum()])


def whiten(values_BT: Tensor, mask_BT: Tensor, moments_3: Tensor) -> Tensor:
    """Return values with mean 0 and variance 1 over the counted tokens: (x - mean) / std.

    For advantages: lm-human-preferences, train_policy.py; Huang et al., "The N Implementation Details of
    RLHF with PPO". The variance divides by the count, not by one less, as there.

    Args:
        moments_3: of ``moments``, summed over all parts of the batch.

    Returns:
        whitened_BT; zero where the mask is False, and everywhere if the values are all the same.
    """
    mean, std = _mean_and_std(moments_3)
    white_BT = (values_BT.double() - mean) / std
    return torch.where(mask_BT, white_BT, 0.0).to(values_BT.dtype)


def whiten_around_mean(values_BT: Tensor, mask_BT: Tensor, moments_3: Tensor) -> Tensor:
    """Return values with variance 1 and the mean they had: (x - mean) / std + mean.

    For rewards, whose sign and level matter: lm-human-preferences, train_policy.py
    (``whiten(rewards, shift_mean=False)``).
    Equal values stay as they are. All else as in ``whiten``.
    """
    mean, std = _mean_and_std(moments_3)
    white_BT = (values_BT.double() - mean) / std + mean
    return torch.where(mask_BT, white_BT, 0.0).to(values_BT.dtype)


def _mean_and_std(moments_3: Tensor) -> tuple[Tensor, Tensor]:
    count, total, squares = moments_3.unbind()
    mean = total / count  # NaN without a token, but then no token reads it
    variance = (squares / count - mean**2).clamp(min=0)  # rounding can leave it below 0
    return mean, torch.sqrt(variance + EPSILON)
