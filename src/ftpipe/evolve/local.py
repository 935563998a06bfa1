"""A model in memory as an endpoint: batched generation, each row with draws of its own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TopPLogitsWarper,
)

from ftpipe import determinism, modeling
from ftpipe import tokenizer as tokenizers
from ftpipe.choices import Method
from ftpipe.config import AdapterConfig, RunConfig
from ftpipe.data.prompt import Endings
from ftpipe.errors import ConfigError
from ftpipe.evolve.calls import Call, Said

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Shapes: B rows of a batch, T tokens, V vocabulary.

UNMARKED = Endings(frozenset())  # nothing but eos


class OwnDraws(LogitsProcessor):
    """Turn scores into draws: the arg max of what comes out is a sample, by the Gumbel-max trick.

    ``argmax(log p + g)`` with independent standard Gumbel ``g`` has distribution ``p``. Each row draws
    its noise from a generator of its own, so that neither the other rows of the batch nor the order of
    the batches changes what it says.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls = calls
        self._generators = [torch.Generator().manual_seed(call.seed) for call in calls]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores_BV with temperature, nucleus and noise applied row by row."""
        return torch.stack([self._row(input_ids, at, row_V) for at, row_V in enumerate(scores)])

    def _row(self, input_ids: Tensor, at: int, scores_V: Tensor) -> Tensor:
        call = self._calls[at]
        if call.temperature == 0:
            return scores_V
        scores_V = scores_V.float() / call.temperature
        if call.top_p < 1:
            scores_V = TopPLogitsWarper(call.top_p)(input_ids[at : at + 1], scores_V[None])[0]
        uniform_V = torch.rand(len(scores_V), generator=self._generators[at], dtype=torch.float64)
        noise_V = -torch.log(-torch.log(uniform_V.clamp(1e-300, 1 - 1e-16)))
        return scores_V + noise_V.to(scores_V)


class Marked(StoppingCriteria):
    """End a row where one of some texts stands in what was said: not in its prompt.

    Args:
        start: where the answers begin, the same for all rows.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, marks: Sequence[str], start: int) -> None:
        self._tokenizer = tokenizer
        self._marks = marks
        self._start = start
        # a mark has no more tokens than bytes; one more, whose end may be its start
        self._last = max(len(mark.encode()) for mark in marks) + 1

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """Return done_B: the rows that have said a mark."""
        said_BT = input_ids[:, max(self._start, input_ids.shape[1] - self._last) :]
        texts = self._tokenizer.batch_decode(said_BT, skip_special_tokens=True)
        done = [any(mark in text for mark in self._marks) for text in texts]
        return torch.tensor(done, device=input_ids.device)


class InMemory:
    """A model in memory as an endpoint, batch by batch.

    Args:
        name: of the model, in the journal.
        model: returns it, ready for generation; asked for when there is something to be answered.
        positions: that it knows; None: as many as one likes.
        together: rows of a batch.
        precision: within which it computes; None: its own.
        endings: of an answer, beside the tokenizer's eos and those that the model itself lists.
    """

    def __init__(
        self,
        name: str,
        model: Callable[[], PreTrainedModel],
        tokenizer: PreTrainedTokenizerBase,
        positions: int | None,
        together: int,
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
        endings: Endings = UNMARKED,
    ) -> None:
        self.model = name
        self.together = together
        self._of = model
        self._tokenizer = tokenizer
        self._positions = positions
        self._precision = precision
        self._endings = endings

    def complete(self, calls: Sequence[Call]) -> Iterator[tuple[Call, Said]]:
        """Yield each call with what the model says, batch by batch."""
        for start in range(0, len(calls), self.together):
            batch = calls[start : start + self.together]
            prompts = [self._prompt(call) for call in batch]
            fits = [self._fits(ids, call) for ids, call in zip(prompts, batch, strict=True)]
            asked = [at for at in range(len(batch)) if fits[at]]
            said = self._generate([batch[at] for at in asked], [prompts[at] for at in asked])
            for at, call in enumerate(batch):
                if fits[at]:
                    yield call, next(said)
                else:
                    tokens = len(prompts[at])
                    yield call, Said("", refused=f"{tokens} tokens and the answer exceed its positions")

    def _prompt(self, call: Call) -> list[int]:
        """Return the tokens of a prompt that is rendered already."""
        ids: list[int] = self._tokenizer(call.prompt, add_special_tokens=False)["input_ids"]
        return ids

    def _fits(self, ids: list[int], call: Call) -> bool:
        return self._positions is None or len(ids) + call.max_tokens <= self._positions

    def _generate(self, calls: Sequence[Call], prompts: Sequence[list[int]]) -> Iterator[Said]:
        """Yield what the model says to each prompt; rows are padded on the left to one length."""
        if not calls:
            return
        model = self._of()
        longest = max(map(len, prompts))
        pad = self._tokenizer.pad_token_id
        ids_BT = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in prompts])
        mask_BT = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
        settings = GenerationConfig(
            max_new_tokens=max(call.max_tokens for call in calls),
            do_sample=False,  # OwnDraws draws
            use_cache=True,
            pad_token_id=pad,
            eos_token_id=self._ends(model),
        )
        marks = self._endings.texts
        stops = [Marked(self._tokenizer, marks, longest)] if marks else []
        with torch.inference_mode(), self._precision():
            whole_BT = model.generate(  # type: ignore[operator]
                input_ids=ids_BT.to(model.device),
                attention_mask=mask_BT.to(model.device),
                generation_config=settings,
                logits_processor=LogitsProcessorList([OwnDraws(calls)]),
                stopping_criteria=StoppingCriteriaList(stops),
            )
        for call, row_T in zip(calls, whole_BT[:, longest:].tolist(), strict=True):
            yield self._said(call, row_T, set(self._ends(model)))

    def _ends(self, model: PreTrainedModel) -> list[int]:
        """Return the tokens that end an answer: the model's own list may hold more than eos."""
        own = model.generation_config.eos_token_id
        listed = own if isinstance(own, list) else [own]
        known = {token for token in listed if token is not None}
        return sorted(known | self._endings.tokens | {self._tokenizer.eos_token_id})

    def _said(self, call: Call, ids: list[int], ends: Collection[int]) -> Said:
        end = next((at for at, token in enumerate(ids) if token in ends), None)
        kept = ids[: min(call.max_tokens, len(ids) if end is None else end)]
        text = str(self._tokenizer.decode(kept, skip_special_tokens=True))
        starts = [text.find(mark) for mark in self._endings.texts if mark in text]
        ended = bool(starts) or (end is not None and end < call.max_tokens)
        return Said(text[: min(starts, default=None)].strip(), cut=not ended)


class LocalModel(InMemory):
    """The base model of the run, unquantised, in the run's precision.

    Raises:
        ModelError: if it cannot be loaded.
        ConfigError: if its tokenizer has no chat template, so that it cannot be asked anything.
    """

    def __init__(self, cfg: RunConfig, base: Path | None) -> None:
        determinism.begin(cfg)
        tokenizer = tokenizers.load(cfg.model, base)
        if tokenizer.chat_template is None:
            raise ConfigError(
                f"evolve asks the run's own model, but the tokenizer of "
                f"{modeling.base_path(cfg.model, base)} has no chat template; choose a model that "
                "follows instructions, or set evolve.url and evolve.model to one behind a server."
            )
        model = load(cfg, base)
        positions = modeling.positions(model.config.get_text_config())
        # "own": the artifact's fingerprint says which
        super().__init__("own", lambda: model, tokenizer, positions, cfg.evolve.concurrency)

    def _prompt(self, call: Call) -> list[int]:
        """Return the tokens of a prompt as the only turn of a chat."""
        turn = [{"role": "user", "content": call.prompt}]
        text = self._tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def load(cfg: RunConfig, base: Path | None) -> PreTrainedModel:
    """Return the base model for generation, in the dtype of frozen weights and without an adapter."""
    model = modeling.load_base(replace(cfg, adapter=AdapterConfig(method=Method.lora)), base)
    model.to(modeling.device(cfg))  # type: ignore[arg-type]
    model.eval()
    model.config.use_cache = True
    return model
