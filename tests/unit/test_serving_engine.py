"""The thread that generates: one answer after another, each as if it were alone."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator

import pytest
import torch

from ftpipe.choices import Ended
from ftpipe.data.prompt import Endings, Prompt
from ftpipe.serving.engine import Engine
from ftpipe.serving.job import Done, Event, Failed, Job, Said
from ftpipe.serving.sampling import Sampling
from ftpipe.tokenizer import EOS, byte_level
from tests import parrot

BYTES = byte_level()
EOS_ID = int(BYTES.eos_token_id or 0)
GREEDY = Sampling(temperature=0, max_tokens=30)
ENDS = Endings(frozenset({EOS_ID}))


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine(parrot.model(positions=64), byte_level(), 64)
    yield made
    made.close()
    made.join()


def asked(
    text: str,
    sampling: Sampling = GREEDY,
    endings: Endings = ENDS,
    lead: str = "",
) -> tuple[Job, queue.SimpleQueue[Event]]:
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    prompt = Prompt(text, tuple(parrot.ids(BYTES, text)), lead)
    return Job(prompt, sampling, endings, events.put), events


def heard(events: queue.SimpleQueue[Event]) -> tuple[str, Event]:
    """Return an answer's text and its end."""
    said = []
    while isinstance(event := events.get(timeout=30), Said):
        said.append(event.text)
    return "".join(said), event


def answer(engine: Engine, text: str, **more: object) -> tuple[str, Event]:
    job, events = asked(text, **more)  # type: ignore[arg-type]
    engine.ask(job)
    return heard(events)


def test_an_answer_ends_with_its_turn_at_a_limit_or_at_the_context(engine: Engine) -> None:
    whole = len(parrot.ANSWER.encode()) + 1  # with eos
    assert answer(engine, "\n") == (parrot.ANSWER, Done(Ended.stop, whole))
    assert answer(engine, "z") == ("z" * 30, Done(Ended.length, 30))
    unlimited = Sampling(temperature=0)
    assert answer(engine, "zz", sampling=unlimited) == ("z" * 62, Done(Ended.length, 62))
    # cut within é: what it would have been is shown as half a character
    assert answer(engine, "\n", sampling=Sampling(0, max_tokens=4)) == (
        "Blu\ufffd",
        Done(Ended.length, 4),
    )


def test_marks_and_stop_strings_end_it_and_are_no_part_of_it(engine: Engine) -> None:
    marked = Endings(frozenset({EOS_ID}), (", k",))
    assert answer(engine, "\n", endings=marked) == ("Blué", Done(Ended.stop, 8))
    assert answer(engine, "\n", sampling=Sampling(0, stops=("u", "k!"))) == ("Bl", Done(Ended.stop, 3))
    assert answer(engine, "\n", lead="B", endings=Endings(frozenset({EOS_ID}), (), "!")) == (
        *("lué, k", Done(Ended.stop, 10)),
    )
    # a stop string that is a special token is no text, and ends it all the same
    loose = Endings(frozenset())
    assert answer(engine, "\n", endings=loose, sampling=Sampling(0, max_tokens=30, stops=(EOS,))) == (
        *(parrot.ANSWER, Done(Ended.stop, 10)),
    )
    said, end = answer(engine, "\n", endings=loose)
    assert said.startswith(parrot.ANSWER) and end == Done(Ended.length, 30)


def test_answers_come_in_the_order_they_were_asked_for(engine: Engine) -> None:
    order: list[str] = []
    jobs = []
    for digit in "0123456789":
        job, events = asked(digit)
        tell = job.tell

        def note(event: Event, tell: Callable[[Event], None] = tell, digit: str = digit) -> None:
            order.append(digit)
            tell(event)

        job.tell = note
        jobs.append((job, events, digit))
    for job, _, _ in jobs:
        engine.ask(job)
    for _, events, digit in jobs:
        assert heard(events) == (digit * 30, Done(Ended.length, 30))
    assert order == sorted(order)
    assert engine.under_way == 0


def test_what_is_cancelled_ends_soon_and_what_waits_is_not_begun(engine: Engine) -> None:
    long, events = asked("z", Sampling(temperature=0))
    waiting, later = asked("y", Sampling(temperature=0))
    told = long.tell

    def cancel_both(event: Event) -> None:
        told(event)
        long.cancel()
        waiting.cancel()

    long.tell = cancel_both
    engine.ask(long)
    engine.ask(waiting)
    said, end = heard(events)
    assert isinstance(end, Done) and end.why is Ended.cancelled and len(said) <= 3
    assert heard(later) == ("", Done(Ended.cancelled, 0))


def test_a_closed_engine_ends_all_and_takes_no_more() -> None:
    engine = Engine(parrot.model(), byte_level(), None)
    (one, first), (two, second) = asked("z", Sampling(temperature=0)), asked("y")
    engine.ask(one)
    engine.ask(two)
    assert isinstance(first.get(timeout=30), Said)
    engine.close()
    ends = [heard(first)[1], heard(second)[1]]
    assert all(isinstance(end, Done) and end.why is Ended.cancelled for end in ends)
    engine.join()
    late, events = asked("x")
    engine.ask(late)
    assert events.get(timeout=1) == Done(Ended.cancelled, 0)


def test_an_answer_that_fails_takes_no_other_with_it(engine: Engine) -> None:
    bad, events = asked("z")
    bad.prompt = Prompt("", (99_999,))  # no such token
    engine.ask(bad)
    failed = events.get(timeout=30)
    assert isinstance(failed, Failed) and "\n" not in failed.why and failed.why
    assert answer(engine, "z") == ("z" * 30, Done(Ended.length, 30))


def test_chance_is_decided_by_the_seed_alone(engine: Engine) -> None:
    def drawn(seed: int | None) -> str:
        return answer(engine, "x", sampling=Sampling(1.5, 1.0, 30, seed))[0]

    first = drawn(1)
    assert drawn(2) != first
    torch.rand(5)
    assert drawn(1) == first
    assert drawn(None) != drawn(None)


def test_draws_have_the_distribution_of_the_temperature_over_all_tokens(engine: Engine) -> None:
    """Of 258 tokens one has the logit 8 and the others 0: softmax(logits / T), with no top-k."""
    temperature = 2.0
    e = torch.tensor(parrot.CONFIDENCE / temperature).exp().item()
    likely = e / (e + len(BYTES) - 1)  # 0.175
    seen, others = 0, set()
    draws = 170
    for seed in range(draws):
        text, _ = answer(engine, "x", sampling=Sampling(temperature, 1.0, 1, seed))
        seen += text == "x"
        others.add(text)
    deviation = (draws * likely * (1 - likely)) ** 0.5
    assert abs(seen - draws * likely) < 4 * deviation
    assert len(others) > 52  # transformers' own default draws from the likeliest 50
    for seed in range(5):  # a nucleus that the likeliest token fills
        nucleus = Sampling(temperature, likely / 2, 5, seed)
        assert answer(engine, "x", sampling=nucleus)[0] == "xxxxx"


def test_the_models_own_penalties_are_not_applied() -> None:
    model = parrot.model(positions=64)
    model.generation_config.repetition_penalty = 50.0
    model.generation_config.max_length = 7
    model.generation_config.suppress_tokens = parrot.ids(BYTES, "z")
    engine = Engine(model, byte_level(), 64)
    assert answer(engine, "z") == ("z" * 30, Done(Ended.length, 30))
    engine.close()
    engine.join()
