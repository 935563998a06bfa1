"""The rewards of answers by a reward model: whole conversations, as it learned to read replies.

Shapes: N conversations, L tokens of the longest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from ftpipe import stopping
from ftpipe.errors import ConfigError, DataError, UserError
from ftpipe.evaluation.answers import Dialogue, Given
from ftpipe.evaluation.questions import Key, Question
from ftpipe.logs import progress, say
from ftpipe.modeling import positions
from ftpipe.reward.batches import pad_right
from ftpipe.sequences import dealt
from ftpipe.stopping import Stopped

if TYPE_CHECKING:
    import torch

    from ftpipe.reward.model import RewardModel


def conversations(
    questions: Sequence[Question], given: Given, dialogue: Dialogue
) -> dict[Key, list[int]]:
    """Return the tokens of each answer with all that came before it, by question and turn.

    A cut answer ends its turn here like any other, so a judgement is one of texts, whoever wrote them.
    A later turn that the template does not hold is left out, and counted in a line.

    Raises:
        DataError, ConfigError: if a first answer does not fit the template.
    """
    unheld: list[UserError] = []
    found: dict[Key, list[int]] = {}
    for question in questions:
        for turn in range(len(question.turns)):
            said = [given.get((question.key, at)) for at in range(turn + 1)]
            texts = [one.text for one in said if one is not None and one.refused is None]
            if len(texts) < turn + 1:
                continue
            try:
                found[question.key, turn] = dialogue.whole(question.turns[: turn + 1], texts)
            except (DataError, ConfigError) as error:
                if not turn:
                    raise
                unheld.append(error)
    if unheld:
        say(f"{len(unheld):,} answers to later turns have no reward: {unheld[0]}")
    return found


def score(
    model: RewardModel,
    wanted: Mapping[Key, Sequence[int]],
    pad: int,
    batch_size: int,
    device: torch.device,
    precision: Callable[[], AbstractContextManager[Any]],
) -> dict[Key, float]:
    """Return the reward of each conversation; one longer than the model's positions has none.

    Raises:
        Stopped: if it was asked to stop.
    """
    most = min(_positions(one) for one in model.models)
    keys = [key for key, ids in wanted.items() if len(ids) <= most]
    rewards: dict[Key, float] = {}
    batches = dealt([len(wanted[key]) for key in keys], 0, 1, batch_size)
    for batch in progress(batches, "batches of answers to score"):
        ids_NL, mask_NL = pad_right([wanted[keys[at]] for at in batch], pad)
        with precision():
            found = model.score(ids_NL.to(device), mask_NL.to(device))
        rewards |= zip((keys[at] for at in batch), found.double().tolist(), strict=True)
        if stopping.asked():
            raise Stopped("while answers were scored, which are scored again")
    return {key: rewards[key] for key in keys}


def _positions(model: torch.nn.Module) -> float:
    config: Any = model.config
    return positions(config.get_text_config()) or math.inf
