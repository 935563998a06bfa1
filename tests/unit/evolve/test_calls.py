"""The journal: no finished call is asked twice, whatever a kill leaves of its last line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from ftpipe.errors import ModelError
from ftpipe.evolve.calls import Call, Journal, Said

CALL = Call("Say é.", temperature=1.0, top_p=0.9, max_tokens=8, seed=3)


class Model:
    """Says the prompt back, last call first, and notes what it was asked; may fail after some calls."""

    model = "m"

    def __init__(self, together: int = 1, fail_after: int | None = None) -> None:
        self.together = together
        self.asked: list[list[str]] = []
        self._left = fail_after

    def complete(self, calls: Sequence[Call]) -> Iterator[tuple[Call, Said]]:
        self.asked.append([call.prompt for call in calls])
        for call in reversed(calls):
            if self._left == 0:
                raise ModelError("gone")
            self._left = None if self._left is None else self._left - 1
            yield call, Said(f"{call.prompt}!")


def calls(*prompts: str) -> list[Call]:
    return [replace(CALL, prompt=prompt) for prompt in prompts]


def ask(path: Path, model: Model, *prompts: str) -> list[str]:
    journal = Journal(path)
    try:
        return [said.text for said in journal.ask(model, calls(*prompts), "x")]
    finally:
        journal.close()


def test_answers_come_in_the_order_of_the_calls_and_each_is_asked_once(tmp_path: Path) -> None:
    path, model = tmp_path / "j", Model()
    assert ask(path, model, "a", "b", "a") == ["a!", "b!", "a!"]
    assert ask(path, model, "b", "c") == ["b!", "c!"]
    assert model.asked == [["a", "b"], ["c"]]


@pytest.mark.parametrize("change", ["prompt", "temperature", "top_p", "max_tokens", "seed"])
def test_another_setting_is_another_call(change: str) -> None:
    other = Call(**{**vars(CALL), change: "x" if change == "prompt" else 0})
    assert other.key("m") != CALL.key("m")
    assert CALL.key("other") != CALL.key("m") == replace(CALL).key("m")


def test_what_was_said_comes_back_whole(tmp_path: Path) -> None:
    said = Said("zeile\nzwei \u2028 😀 \ud83d", cut=True, refused="too long")
    journal = Journal(tmp_path / "j")

    class Odd(Model):
        def complete(self, calls: Sequence[Call]) -> Iterator[tuple[Call, Said]]:
            yield from ((call, said if call is CALL else Said("So.")) for call in calls)

    both = [CALL, replace(CALL, seed=4)]
    assert journal.ask(Odd(), both, "x") == [said, Said("So.")]
    journal.close()
    again = Journal(tmp_path / "j")
    assert again.ask(Model(), both, "x") == [said, Said("So.")]
    again.close()


class Moody(Model):
    """Refuses the prompts that it is told to."""

    def __init__(self, refuses: str) -> None:
        super().__init__()
        self.refuses = refuses

    def complete(self, calls: Sequence[Call]) -> Iterator[tuple[Call, Said]]:
        self.asked.append([call.prompt for call in calls])
        for call in calls:
            no = call.prompt in self.refuses
            yield call, Said("", refused="too long") if no else Said(f"{call.prompt}!")


def test_where_all_was_refused_all_is_asked_again(tmp_path: Path) -> None:
    path, model = tmp_path / "j", Model()
    assert ask(path, Moody("abc"), "a", "b", "c") == ["", "", ""]
    assert ask(path, model, "a", "b", "c") == ["a!", "b!", "c!"]
    assert model.asked == [["a", "b", "c"]]


def test_a_journal_of_refusals_alone_is_none(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal = Journal(path)
    journal.ask(Moody("ab"), calls("a", "b"), "x")
    journal.settle()  # writes all that was said
    assert len(path.read_bytes().splitlines()) == 2
    assert ask(path, Model(), "a", "b") == ["a!", "b!"]
    assert len(path.read_bytes().splitlines()) == 2


def test_refusals_before_the_first_answer_are_kept_with_it(tmp_path: Path) -> None:
    path, model = tmp_path / "j", Model()
    assert ask(path, Moody("abd"), "a", "b", "c", "d") == ["", "", "c!", ""]
    assert ask(path, model, "a", "b", "c", "d") == ["", "", "c!", ""]
    assert model.asked == [[]]
    assert len(path.read_bytes().splitlines()) == 4


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_torn_last_line_is_dropped_and_asked_again(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "j"
    ask(path, Model(), "a", "b")  # written b, a
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    model = Model()
    assert ask(path, model, "a", "b") == ["a!", "b!"]
    assert [prompt for asked in model.asked for prompt in asked] == ["a"]
    assert path.read_bytes() == whole


def test_a_damaged_line_in_the_middle_costs_its_call_alone(tmp_path: Path) -> None:
    path = tmp_path / "j"
    ask(path, Model(), "a", "b", "c")  # written c, b, a
    lines = path.read_bytes().splitlines(keepends=True)
    for damage in (b"{]\n", b"[]\n", b'{"key": 1}\n', b"\xff\n", b"\n"):
        path.write_bytes(lines[0] + damage + lines[2])
        model = Model()
        assert ask(path, model, "a", "b", "c") == ["a!", "b!", "c!"]
        assert [prompt for asked in model.asked for prompt in asked] == ["b"]


def test_what_finished_before_a_failure_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with pytest.raises(ModelError, match="gone"):
        ask(path, Model(fail_after=2), "a", "b", "c", "d")
    model = Model()
    assert ask(path, model, "a", "b", "c", "d") == ["a!", "b!", "c!", "d!"]
    assert model.asked == [["a", "b"]]  # d and c had finished


def test_a_batch_is_repeated_whole_and_as_it_was(tmp_path: Path) -> None:
    # who shares a batch decides how its numbers are rounded
    path = tmp_path / "j"
    prompts = "abcdefg"  # batches abc, def, g
    with pytest.raises(ModelError):
        ask(path, Model(together=3, fail_after=2), *prompts)  # g and f are done, of def not d, e
    model = Model(together=3)
    assert ask(path, model, *prompts) == [f"{prompt}!" for prompt in prompts]
    assert model.asked == [list("abcdef")]
    assert len(path.read_bytes().splitlines()) == len(prompts)  # what was known is not written again


def test_a_finished_call_is_on_disk_before_the_next_one_finishes(tmp_path: Path) -> None:
    path = tmp_path / "j"
    written: list[int] = []

    class Watching(Model):
        def complete(self, calls: Sequence[Call]) -> Iterator[tuple[Call, Said]]:
            for finished in super().complete(calls):
                written.append(len(path.read_bytes().splitlines()))
                yield finished

    ask(path, Watching(), "a", "b", "c")
    assert written == [0, 1, 2]


def test_a_settled_journal_forgets_when_its_calls_finished(tmp_path: Path) -> None:
    texts = []
    for name, parts in {"one": ["abcd"], "two": ["ab", "abcd"], "three": ["abc", "x", "abcd"]}.items():
        for part in parts[:-1]:
            ask(tmp_path / name, Model(), *part)
        journal = Journal(tmp_path / name)
        journal.ask(Model(), calls(*parts[-1]), "x")
        journal.settle()
        texts.append((tmp_path / name).read_text())
    assert texts[0] == texts[1] == texts[2]
    assert [json.loads(line)["text"] for line in texts[0].splitlines()] == ["a!", "b!", "c!", "d!"]
