"""One model, one thread that generates, and a queue before it.

Answers are made one after another, first come, first served. So no answer depends on what else is asked
at the time: padding and the shape of a batch change the last bits of its numbers, and now and then a
token.
"""

from __future__ import annotations

import copy
import queue
import secrets
import threading
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from ftpipe import modeling
from ftpipe.choices import Ended
from ftpipe.serving.job import Done, Event, Failed, Job, Said
from ftpipe.serving.text import Answer, Decoder
from ftpipe.tokenizer import first_line

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Shapes: B rows of a batch (one), T tokens.


class Watch(StoppingCriteria):
    """Reads each token as it is drawn, tells what it says, and knows when the answer ends."""

    def __init__(self, job: Job, tokenizer: PreTrainedTokenizerBase) -> None:
        self._job = job
        self._decoder = Decoder(tokenizer, job.prompt.ids)
        own = job.endings
        self._ends = {*own.tokens, *_single_tokens(job.sampling.stops, tokenizer)}
        self._answer = Answer([*own.texts, *job.sampling.stops], lead=job.prompt.lead, trail=own.trail)
        self._turn_ended = False
        self.tokens = 0

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        """Return for ids_BT of one row whether it ends here."""
        token = int(input_ids[0, -1])
        self.tokens += 1
        if token in self._ends:
            self._turn_ended = True
        else:
            self._tell(self._answer.add(self._decoder.add(token)))
        ends = self._turn_ended or self._answer.stopped or self._job.cancelled
        return torch.full((len(input_ids),), ends, dtype=torch.bool, device=input_ids.device)

    def finish(self) -> Ended:
        """Tell what was held back; return why the answer ended."""
        self._tell(self._answer.add(self._decoder.rest()))
        self._tell(self._answer.end(self._turn_ended))
        if self._job.cancelled:
            return Ended.cancelled
        return Ended.stop if self._turn_ended or self._answer.stopped else Ended.length

    def _tell(self, text: str) -> None:
        if text:
            self._job.tell(Said(text))


def _single_tokens(stops: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the special tokens among stop strings: they are no part of the text that is read."""
    special = {str(token): at for at, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {special[stop] for stop in stops if stop in special}


class Engine:
    """Answers jobs one after another until it is closed.

    Args:
        context: tokens that a prompt and its answer may have together; None: any number.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: int | None
    ) -> None:
        self.context = context
        self.vocabulary = len(modeling.weight_of(model.get_input_embeddings()))
        self.tokenizer = tokenizer
        # of its own: a tokenizer that another thread uses at the time may say "Already borrowed"
        self._reader = copy.deepcopy(tokenizer)
        self._model = model
        model.generation_config = GenerationConfig()  # its own penalties and lengths were not asked for
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._open: set[Job] = set()
        self._thread = threading.Thread(target=self._work, name="generation", daemon=True)
        self._thread.start()

    @property
    def under_way(self) -> int:
        """How many answers are being made or wait for their turn."""
        return len(self._open)

    def ask(self, job: Job) -> None:
        """Put a job at the end of the queue; it is told of its end, whatever happens."""
        with self._lock:
            if not self._closed.is_set():
                self._open.add(job)
                self._jobs.put(job)
                return
        job.tell(Done(Ended.cancelled, 0))

    def close(self) -> None:
        """End all jobs, with what they have said by now, and take no more."""
        with self._lock:
            self._closed.set()
            for job in self._open:
                job.cancel()
        self._jobs.put(None)

    def join(self) -> None:
        """Wait for the thread to end after ``close``."""
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            event: Event
            try:
                event = Done(Ended.cancelled, 0) if job.cancelled else self._answer(job)
            except Exception as error:  # one answer that fails is not to take the others with it
                event = Failed(first_line(error))
            with self._lock:
                self._open.discard(job)
            job.tell(event)

    def _answer(self, job: Job) -> Done:
        room = None if self.context is None else self.context - len(job.prompt.ids)
        limits = [limit for limit in (job.sampling.max_tokens, room) if limit is not None]
        watch = Watch(job, self._reader)
        torch.manual_seed(secrets.randbits(63) if job.sampling.seed is None else job.sampling.seed)
        ids_BT = torch.tensor([job.prompt.ids], device=self._model.device)
        with torch.inference_mode():
            self._model.generate(  # type: ignore[operator]
                input_ids=ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                generation_config=self._settings(job, min(limits, default=None)),
                stopping_criteria=StoppingCriteriaList([watch]),
            )
        return Done(watch.finish(), watch.tokens)

    def _settings(self, job: Job, most: int | None) -> GenerationConfig:
        drawn = job.sampling.temperature > 0
        return GenerationConfig(
            max_new_tokens=UNBOUNDED if most is None else most,
            do_sample=drawn,
            temperature=job.sampling.temperature if drawn else None,
            top_p=job.sampling.top_p if drawn else None,
            top_k=0 if drawn else None,  # transformers' own default is 50
            use_cache=True,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=sorted(job.endings.tokens) or None,
        )


UNBOUNDED = 1_000_000  # tokens of an answer, where neither the model nor the asker knows a limit
