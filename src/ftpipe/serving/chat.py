"""A conversation with a policy: on a terminal, or line by line through a pipe."""

from __future__ import annotations

import json
import queue
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from ftpipe.artifacts import write_atomic
from ftpipe.choices import Ended, Role
from ftpipe.data.example import UNSHOWN, Turn
from ftpipe.errors import ConfigError, DataError, UserError, unknown
from ftpipe.runs.command import expanded
from ftpipe.serving.history import fitting
from ftpipe.serving.job import Done, Event, Failed, Job
from ftpipe.serving.options import ChatOptions
from ftpipe.serving.sampling import Sampling

if TYPE_CHECKING:
    from ftpipe.serving.load import Voice

MOST = 512  # tokens of an answer, unless told otherwise or the context is small
COMMANDS = {
    "/reset": "forget what was said; the system prompt stays",
    "/undo": "take back the last question and its answer",
    "/save": "FILE: write the conversation as a row of the format `messages`",
    "/help": "show these",
    "/quit": "end, as Ctrl-D does",
}


class Failure(UserError):
    """An answer cannot be given."""


class Chat:
    """What was said, and the policy that goes on.

    Attributes:
        turns: the conversation, with the system prompt first if there is one.
        dropped: how many turns the last question left out, as the context had no room for them.
        ended: why the last answer ended.
        unkept: why the last answer is not remembered, though there was one; else None.

    Raises:
        ConfigError: if the template has no place for a system prompt, or no room is left for questions.
    """

    def __init__(self, voice: Voice, sampling: Sampling, system: str | None = None) -> None:
        self._voice = voice
        context = voice.engine.context
        most = MOST if context is None else min(MOST, context // 2)
        self._most = sampling.max_tokens or most
        if context is not None and self._most >= context:
            raise ConfigError(
                f"--max-tokens={self._most} leaves no room for a question: the model knows {context:,} "
                "positions, for the prompt and the answer together."
            )
        self._room = None if context is None else context - self._most
        self._sampling = Sampling(
            sampling.temperature, sampling.top_p, self._most, sampling.seed, sampling.stops
        )
        self.turns: list[Turn] = [] if system is None else [Turn(Role.system, system)]
        self.dropped = 0
        self.ended = Ended.stop
        self.unkept: str | None = None
        if self.turns:
            why = voice.template.accepts([*self.turns, Turn(Role.user, "?")])
            if why is not None:
                raise ConfigError(f"--system: {why}.")

    def ask(self, text: str) -> Generator[str, None, None]:
        """Yield the answer to a question as it is made; both are remembered when it has ended.

        Closing the iterator stops the answer; what was said by then is remembered.

        Raises:
            DataError: if the question cannot be written, or does not fit.
            Failure: if the policy fails.
        """
        before = self.turns if self._voice.template.remembers else self._system()
        asked = Turn(Role.user, text)
        why = self._voice.template.accepts([*self._system(), asked])
        if why is not None:
            raise DataError(why)
        turns, self.dropped = fitting([*before, asked], self._tokens, self._room)
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        prompt = self._voice.template.prompt(turns)
        job = Job(prompt, self._sampling, self._voice.template.endings, events.put)
        self._voice.engine.ask(job)
        said: list[str] = []
        self.ended, self.unkept = Ended.cancelled, None
        try:
            while not isinstance(event := events.get(), Done):
                if isinstance(event, Failed):
                    raise Failure(f"no answer: {event.why}")
                said.append(event.text)
                yield event.text
            self.ended = event.why
        finally:
            job.cancel()
            self._remember(asked, "".join(said))

    def reset(self) -> None:
        self.turns = self._system()

    def undo(self) -> bool:
        """Take back the last exchange; say whether there was one."""
        if len(self.turns) <= len(self._system()):
            return False
        self.turns = self.turns[:-2]
        return True

    def save(self, path: Path) -> None:
        """Write the conversation as a line of JSON that the format ``messages`` reads.

        Raises:
            DataError: if nothing was said, the file is there already or cannot be written.
        """
        if len(self.turns) <= len(self._system()):
            raise DataError("nothing was said yet")
        if path.exists():
            raise DataError(f"{path} is there already; give another name")
        messages = [{"role": str(turn.role), "content": turn.content} for turn in self.turns]
        try:
            write_atomic(path, json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise DataError(f"{path} cannot be written ({error.strerror})") from None

    def _remember(self, asked: Turn, answer: str) -> None:
        """Keep an exchange, unless no template could write its answer in a later prompt.

        There may be none, or it may spell a special token in ordinary ones.
        """
        if not answer.strip():
            return
        self.unkept = self._voice.template.accepts([*self._system(), Turn(Role.user, answer)])
        if self.unkept is None:
            self.turns = [*self.turns, asked, Turn(Role.assistant, answer)]

    def _system(self) -> list[Turn]:
        return [turn for turn in self.turns[:1] if turn.role is Role.system]

    def _tokens(self, turns: Sequence[Turn]) -> int:
        return len(self._voice.template.prompt(turns).ids)


class Screen:
    """Where a chat is shown: answers on standard output, all else beside them.

    Args:
        live: a person types and reads; else lines come through a pipe.
    """

    def __init__(self, chat: Chat, live: bool, as_json: bool = False) -> None:
        self._chat = chat
        self._live = live
        self._as_json = as_json

    def run(self, lines: Iterator[str | None]) -> None:
        """Answer each line; None stands for one that was taken back with Ctrl-C.

        Raises:
            UserError: through a pipe, for a line that cannot be answered.
        """
        for number, line in enumerate(lines, start=1):
            text = (line or "").strip("\r\n")
            if not text.strip():
                continue
            try:
                if text.startswith("/"):
                    if not self._command(*text.partition(" ")[::2]):
                        return
                else:
                    self._answer(text)
            except (DataError, Failure) as error:
                if not self._live:
                    raise type(error)(f"line {number}: {error}.") from None
                self._note(str(error))

    def _answer(self, text: str) -> None:
        answer = self._chat.ask(text)
        said: list[str] = []
        try:
            for part in answer:
                if not said and self._chat.dropped:
                    self._note(f"the first {self._chat.dropped} turns are left out: no room is left")
                said.append(part)
                if not self._as_json:
                    self._show(part)
        except KeyboardInterrupt:
            answer.close()
            if not self._live:
                raise
            self._note("\nstopped")
            return
        if self._as_json:
            whole = {"content": "".join(said), "finish_reason": str(self._chat.ended)}
            self._show(json.dumps(whole, ensure_ascii=False))
        self._show("\n")
        if not "".join(said).strip():
            self._note("the policy said nothing; the question is not remembered")
        elif self._chat.unkept is not None:
            self._note(f"the question and its answer are not remembered: {self._chat.unkept}")
        elif self._chat.ended is Ended.length:
            self._note("cut; --max-tokens sets how long an answer may be")

    def _command(self, name: str, rest: str) -> bool:
        """Do what a line that begins with ``/`` asks for; return False at the end."""
        name, rest = name.strip(), rest.strip()
        if name not in COMMANDS:
            raise DataError(unknown("command", name, COMMANDS).rstrip("."))
        if bool(rest) != (name == "/save"):
            raise DataError(f"{name} takes " + ("a FILE" if name == "/save" else "nothing"))
        if name == "/reset":
            self._chat.reset()
        elif name == "/undo":
            self._note("taken back" if self._chat.undo() else "nothing was said yet")
        elif name == "/save":
            self._chat.save(expanded(rest))
            self._note(f"written: {rest}")
        elif name == "/help":
            self._note("\n".join(f"{name:7} {does}" for name, does in COMMANDS.items()))
        return name != "/quit"

    def _show(self, text: str) -> None:
        sys.stdout.write(_harmless(text) if self._live else text)
        sys.stdout.flush()

    def _note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def _harmless(text: str) -> str:
    """Return text in which nothing can steer a terminal."""
    return UNSHOWN.sub(
        lambda found: found.group() if found.group() in "\n\t" else f"<U+{ord(found.group()):04X}>", text
    )


def typed(prompt: str) -> Iterator[str | None]:
    """Yield lines that a person types; None where Ctrl-C took one back. Ctrl-D ends."""
    with suppress(ImportError):  # arrows and history, where the system has them
        import readline  # noqa: F401
    while True:
        try:
            yield input(prompt)
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print("\nCtrl-D or /quit ends", file=sys.stderr)
            yield None


def piped(stream: IO[str]) -> Iterator[str | None]:
    """Yield the lines of a stream."""
    yield from stream


def talk(voice: Voice, options: ChatOptions) -> None:
    """Chat until the other side is done.

    Raises:
        UserError: through a pipe, for a line that cannot be answered.
    """
    chat = Chat(voice, options.sampling, options.system)
    live = sys.stdin.isatty()
    if live:
        template, context = voice.template, voice.engine.context
        positions = f"{context:,} tokens" if context else "no limit of tokens"
        print(f"{voice.source.name}: template {template.name}, {positions}; /help", file=sys.stderr)
        if not template.remembers:
            print(
                f"the {template.name} template holds one question: each is asked by itself",
                file=sys.stderr,
            )
    else:
        for stream in (sys.stdin, sys.stdout):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    try:
        Screen(chat, live, options.as_json).run(typed("> ") if live else piped(sys.stdin))
    finally:
        voice.engine.close()
        voice.engine.join()
