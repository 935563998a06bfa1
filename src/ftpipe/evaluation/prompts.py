"""What a judge behind a server is asked: which of two answers is better, with the verdict in brackets.

After the pairwise prompts of MT-bench (Zheng et al. 2023, arXiv:2306.05685, appendix A; FastChat's
judge_prompts.jsonl, ``pair-v2`` and its variants for a second turn and for a reference answer): the
judge explains first, is told of the biases that the paper measured, and ends with ``[[A]]``, ``[[B]]``
or, for a tie, ``[[C]]``. The words here are ours, and all is one user turn, which every server takes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

VERSION = 1  # raised whenever a prompt changes; it is in the fingerprint

Verdict = Literal["A", "B", "C"]

_TASK = (
    "You are an impartial judge. Below are {what} by two assistants, A and B. Decide which assistant "
    "follows the user's instructions better and answers better: consider how helpful, relevant, "
    "correct, thorough and clear it is, and whether its level of detail is what was asked for."
    "{of_last}{by_reference} Do not let the order of the two influence you, nor the length of an answer "
    "by itself, nor the names of the assistants. First compare the two in a few sentences. Then end "
    'with your verdict in exactly this form: "[[A]]" if assistant A is better, "[[B]]" if assistant B '
    'is better, "[[C]]" if neither is.'
)
_OF_LAST = (
    " There are several turns; judge the answers to the last question alone, in the light of what was "
    "said before."
)
_BY_REFERENCE = (
    " A reference answer is given; compare both with it, and find and name the mistakes in each."
)
_VERDICT = re.compile(r"\[\[([ABC])\]\]")


def pairwise(
    questions: Sequence[str], a: Sequence[str], b: Sequence[str], reference: Sequence[str] = ()
) -> str:
    """Return the prompt that has two assistants' answers to a conversation's questions compared.

    Args:
        questions: the user's turns up to the one whose answers are judged.
        a, b: each assistant's answers to them.
        reference: known answers to them; none or as many.

    Raises:
        ValueError: if there are not as many answers as questions.
    """
    several = len(questions) > 1
    task = _TASK.format(
        what="two conversations" if several else "two answers to a question",
        of_last=_OF_LAST if several else "",
        by_reference=_BY_REFERENCE if reference else "",
    )
    blocks = [task]
    if reference:
        blocks.append(_block("Reference answer", questions, reference))
    blocks += [_block("Assistant A", questions, a), _block("Assistant B", questions, b)]
    return "\n\n".join(blocks)


def _block(title: str, questions: Sequence[str], answers: Sequence[str]) -> str:
    said = [f"[Begin of {title}]"]
    for question, answer in zip(questions, answers, strict=True):
        said += [f"### User:\n{question}", f"### Answer:\n{answer}"]
    return "\n\n".join([*said, f"[End of {title}]"])


def verdict(text: str) -> Verdict | None:
    """Return the last verdict in what a judge wrote, or None where there is none.

    >>> verdict("B is wrong where A is right, so: [[A]]"), verdict("Both are good.")
    ('A', None)
    """
    found = _VERDICT.findall(text)
    return found[-1] if found else None
