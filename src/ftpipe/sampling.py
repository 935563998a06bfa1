"""Answers to the same held-out prompts before and after training, for a person to read."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ftpipe.choices import Use
from ftpipe.data.encode import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Asked:
    """A held-out prompt, and the answer that its row holds."""

    prompt: Sequence[int]
    answer: Sequence[int]


def asked(rows: Dataset, use: Use, count: int) -> list[Asked]:
    """Return the first prompts of a table, each with its answer: of several the first or the best."""
    return [_ASKED[use](row) for row in rows.select(range(min(count, len(rows))))]


def _demonstrated(row: Mapping[str, Any]) -> Asked:
    """Return a conversation's prompt, and the tokens learned from its end on."""
    at = row["prompt"]
    learned = zip(row["input_ids"][at:], row["labels"][at:], strict=True)
    answer = itertools.takewhile(lambda pair: pair[1] != IGNORED, learned)
    return Asked(row["input_ids"][:at], [token for token, _ in answer])


def _preferred(row: Mapping[str, Any]) -> Asked:
    ids, start, stop = row["input_ids"][0], row["starts"][0], row["stops"][0]
    return Asked(ids[:start], ids[start:stop])


def _single(row: Mapping[str, Any]) -> Asked:
    ids = row["input_ids"]
    return Asked(ids[: row["start"]], ids[row["start"] : row["stop"]])


_ASKED = {
    Use.demonstrations: _demonstrated,
    Use.preferences: _preferred,
    Use.unpaired: _single,
}


class Answers:
    """Greedy answers of a model to held-out prompts."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Asked],
        tokens: int,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._tokens = tokens
        self._prompts = prompts

    def give(self) -> list[str]:
        """Return an answer to each prompt."""
        from transformers import GenerationConfig

        greedy = GenerationConfig(
            max_new_tokens=self._tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=self._tokenizer.pad_token_id,
            eos_token_id=self._tokenizer.eos_token_id,
        )
        was_training = self._model.training
        self._model.eval()
        answers = []
        for one in self._prompts:
            ids = torch.tensor([one.prompt], device=self._model.device)
            with torch.no_grad():
                output = self._model.generate(  # type: ignore[operator]
                    input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=greedy
                )
            answers.append(self._text(output[0, len(one.prompt) :].tolist()))
        self._model.train(was_training)
        return answers

    def _text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def write(self, path: Path, before: list[str], after: list[str]) -> None:
        """Write prompts, the answers before and after, and the held-out answers, as Markdown."""
        if not self._prompts:
            return
        shown = [
            {
                "Prompt": str(self._tokenizer.decode(list(one.prompt))),
                "Before": old,
                "After": new,
                "Held-out answer": self._text(list(one.answer)),
            }
            for one, old, new in zip(self._prompts, before, after, strict=True)
        ]
        path.write_text(markdown(shown), encoding="utf-8")


def markdown(shown: Iterable[Mapping[str, str]]) -> str:
    """Return texts by their titles, those of one held-out prompt after the other."""
    parts = ["# Answers to held-out prompts\n"]
    for texts in shown:
        parts += [f"## {title}\n\n{_quote(text)}\n" for title, text in texts.items()]
    return "\n".join(parts)


def _quote(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.splitlines()) or "> (nothing)"
