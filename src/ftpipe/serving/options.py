"""The words of ``ftpipe chat`` and ``ftpipe serve``: which policy, and how it is to answer."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from ftpipe.choices import Device, ServeEngine, TemplateName
from ftpipe.config import RunConfig
from ftpipe.errors import ConfigError, unknown
from ftpipe.runs.command import expanded
from ftpipe.serving.sampling import MOST_STOPS, Sampling, flaw

RECIPE, OUTPUT = "recipe=", "output="
OVERRIDE = re.compile(r"[+~]*[A-Za-z_][\w.@/]*(=.*)?", re.DOTALL)  # not ./a=b
NAME = re.compile(r"[\w.:/-]{1,200}")
HOST, PORT = "127.0.0.1", 8000
# The defaults of a chat: nucleus sampling as QLoRA's authors drew their answers (arXiv:2305.14314, 5.2).
TEMPERATURE, TOP_P = 0.7, 0.9

EXAMPLES = {
    "--stage": "--stage sft",
    "--template": "--template chatml",
    "--device": "--device cpu",
    "--system": "--system 'Answer in French.'",
    "--temperature": "--temperature 0.7",
    "--top-p": "--top-p 0.9",
    "--max-tokens": "--max-tokens 256",
    "--seed": "--seed 1",
    "--stop": "--stop '###'",
    "--host": "--host 127.0.0.1",
    "--port": "--port 8000",
    "--name": "--name my-model",
    "--api-key-env": "--api-key-env MY_KEY",
    "--engine": "--engine vllm",
}
ANY = ("--stage", "--template", "--device")
CHAT = (*ANY, "--system", "--temperature", "--top-p", "--max-tokens", "--seed", "--stop")
SERVE = (*ANY, "--host", "--port", "--name", "--api-key-env", "--engine")

Name = TypeVar("Name", bound=StrEnum)


@dataclass(frozen=True)
class Wanted:
    """Which policy is to answer.

    Attributes:
        what: a run, an artifact or a folder; None where a recipe is named.
        recipe: ``recipe=NAME`` and its overrides.
        output: the folder that holds runs and artifacts.
        stage: of the run; None: the latest that made a policy.
        template: in place of the one that the policy was trained with.
    """

    what: str | None
    recipe: tuple[str, ...] = ()
    output: Path = Path(RunConfig.output)
    stage: str | None = None
    template: TemplateName | None = None
    device: Device = Device.auto

    @property
    def said(self) -> str:
        return self.what if self.what is not None else " ".join(self.recipe)


@dataclass(frozen=True)
class ChatOptions:
    """A chat: with whom, how, and whether each answer is to be a line of JSON."""

    wanted: Wanted
    sampling: Sampling
    system: str | None = None
    as_json: bool = False


@dataclass(frozen=True)
class ServeOptions:
    """An endpoint.

    Attributes:
        name: what clients call the model; None: the name of the run or the folder.
        key: what clients must present; None: nothing. It is in no message, log or command line.
    """

    wanted: Wanted
    host: str = HOST
    port: int = PORT
    name: str | None = None
    key: str | None = field(default=None, repr=False)
    engine: ServeEngine = ServeEngine.transformers


def chat(words: Sequence[str]) -> ChatOptions:
    """Read the words after ``chat``.

    Raises:
        ConfigError: for an unknown option, a value that cannot be, or no policy.
    """
    plain, values, flags = _sorted("chat", words, CHAT, ("--json",))
    stops = values.get("--stop", [])
    if len(stops) > MOST_STOPS:
        raise ConfigError(f"--stop is given {len(stops)} times; {MOST_STOPS} are allowed.")
    sampling = Sampling(
        temperature=_number("--temperature", values, TEMPERATURE),
        top_p=_number("--top-p", values, TOP_P),
        max_tokens=_whole("--max-tokens", values),
        seed=_whole("--seed", values),
        stops=tuple(stops),
    )
    return ChatOptions(
        _wanted("chat", plain, values), sampling, _one("--system", values), "--json" in flags
    )


def serve(words: Sequence[str]) -> ServeOptions:
    """Read the words after ``serve``.

    Raises:
        ConfigError: for an unknown option, a value that cannot be, or no policy.
    """
    plain, values, _ = _sorted("serve", words, SERVE, ())
    port = _one("--port", values)
    if port is not None and not (port.isascii() and port.isdigit() and int(port) < 65536):
        raise ConfigError(f"--port={port} is no port; allowed: 0 (any that is free) to 65535.")
    name = _one("--name", values)
    if name is not None and not NAME.fullmatch(name):
        raise ConfigError(f"--name={name} is no name; allowed: letters, digits and any of . : / - _")
    return ServeOptions(
        _wanted("serve", plain, values),
        host=_one("--host", values) or HOST,
        port=PORT if port is None else int(port),
        name=name,
        key=_key(_one("--api-key-env", values)),
        engine=_named("--engine", values, ServeEngine) or ServeEngine.transformers,
    )


def _sorted(
    verb: str, words: Sequence[str], known: Collection[str], flags: Collection[str]
) -> tuple[list[str], dict[str, list[str]], set[str]]:
    """Return the words that are no options, the values of each option, and the flags."""
    plain: list[str] = []
    values: dict[str, list[str]] = {}
    given: set[str] = set()
    left = list(words)
    while left:
        word = left.pop(0)
        name, equals, value = word.partition("=")
        if not word.startswith("-"):
            plain.append(word)
        elif word in flags:
            given.add(word)
        elif name in ("-m", "--multirun"):
            raise ConfigError(f"{verb} takes one policy; leave out {name}.")
        elif name in known:
            if not equals:
                value = left.pop(0) if left and not left[0].startswith("--") else ""
            if not value:
                raise ConfigError(f"{name} needs a value, such as {EXAMPLES[name]}.")
            values.setdefault(name, []).append(value)
        else:
            raise ConfigError(unknown("option", name, [*known, *flags]))
    return plain, values, given


def _one(name: str, values: dict[str, list[str]]) -> str | None:
    found = values.get(name, [])
    if len(found) > 1:
        raise ConfigError(f"{name} is given twice.")
    return found[0] if found else None


def _number(name: str, values: dict[str, list[str]], otherwise: float) -> float:
    text = _one(name, values)
    if text is None:
        return otherwise
    try:
        value = float(text)
    except ValueError:
        raise _unfit(name, text) from None
    return float(_checked(name, value, text))


def _whole(name: str, values: dict[str, list[str]]) -> int | None:
    text = _one(name, values)
    if text is None:
        return None
    if not re.fullmatch(r"-?[0-9]{1,20}", text):
        raise _unfit(name, text)
    return int(_checked(name, int(text), text))


def _checked(name: str, value: Any, text: str) -> Any:
    if flaw(_key_of(name), value) is not None:
        raise _unfit(name, text)
    return value


def _unfit(name: str, text: str) -> ConfigError:
    return ConfigError(f"{name}: {flaw(_key_of(name), text)}.")


def _key_of(name: str) -> str:
    return name.removeprefix("--").replace("-", "_")


def _named(name: str, values: dict[str, list[str]], kind: type[Name]) -> Name | None:
    word = _one(name, values)
    if word is None:
        return None
    names = [member.value for member in kind]
    if word not in names:
        raise ConfigError(f"{name}: " + unknown(name.removeprefix("--"), word, names))
    return kind(word)


def _wanted(verb: str, plain: Sequence[str], values: dict[str, list[str]]) -> Wanted:
    outputs = [word.removeprefix(OUTPUT) for word in plain if word.startswith(OUTPUT)]
    recipes = [word for word in plain if word.startswith(RECIPE)]
    others = [word for word in plain if not word.startswith((OUTPUT, RECIPE))]
    overrides = [word for word in others if "=" in word and OVERRIDE.fullmatch(word)]
    things = [word for word in others if word not in overrides]
    if len(recipes) + len(things) != 1:
        said = [*recipes, *things]
        raise ConfigError(
            f"{verb} takes one run, artifact, folder or recipe=NAME, but got "
            + (f"{len(said)}: {' '.join(said)}." if said else "none; `ftpipe runs` lists the runs.")
        )
    if things and overrides:
        raise ConfigError(f"{overrides[0]} overrides a recipe; give recipe=NAME with it, and no run.")
    if len(outputs) > 1 or "" in outputs:
        raise ConfigError("output=PATH: give one folder of outputs.")
    return Wanted(
        what=things[0] if things else None,
        recipe=(*recipes, *overrides, *(f"{OUTPUT}{one}" for one in outputs)) if recipes else (),
        output=expanded(outputs[0]) if outputs else Path(RunConfig.output),
        stage=_one("--stage", values),
        template=_named("--template", values, TemplateName),
        device=_named("--device", values, Device) or Device.auto,
    )


def _key(variable: str | None) -> str | None:
    """Return the key that an environment variable holds, None where none is named.

    Raises:
        ConfigError: naming the variable, never what is in it.
    """
    if variable is None:
        return None
    value = os.environ.get(variable, "").strip()
    if not value:
        raise ConfigError(
            f"--api-key-env={variable}: this environment variable is not set; put the key that clients "
            "are to present into it, or leave the option out."
        )
    if not (value.isascii() and value.isprintable() and " " not in value):
        raise ConfigError(
            f"--api-key-env={variable}: what this environment variable holds is no key (it has spaces, "
            "line ends or characters beyond ASCII)."
        )
    return value
