"""What a client asks for: the fields of OpenAI's API, checked one by one.

Source: the API reference of OpenAI (platform.openai.com/docs/api-reference), chat/create and
completions/create. A field that would change the answer and is not supported is refused, never ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from ftpipe.choices import Role
from ftpipe.data.example import SURROGATE, Turn, shown
from ftpipe.errors import nearest
from ftpipe.serving.sampling import Sampling, flaw

INVALID = "invalid_request_error"
COMPLETION_TOKENS = 16  # of a completion that names no number; OpenAI's default
# Instructions by the developer are what system prompts are called for OpenAI's newer models.
ROLES = {"system": Role.system, "developer": Role.system, "user": Role.user, "assistant": Role.assistant}
SAMPLED = ("temperature", "top_p", "max_tokens", "max_completion_tokens", "seed", "stop")
# Fields of the API that ask for what is not done here, with the values that ask for nothing.
NEUTRAL: Mapping[str, Sequence[Any]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "web_search_options": (),
}
# Fields that change nothing in an answer.
UNHEARD = (
    *("user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier"),
    *("prompt_cache_key", "verbosity"),
)
KNOWN = (
    *("model", "messages", "prompt", "stream", "stream_options"),
    *(*SAMPLED, *NEUTRAL, *UNHEARD),
)


class Refused(Exception):
    """A request that cannot be served, as OpenAI's API says it.

    Attributes:
        status: the HTTP status.
        param: the field that is wrong.
        code: a word for programs.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        kind: str = INVALID,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.kind = kind

    def body(self) -> dict[str, Any]:
        told = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return {"error": told}


@dataclass(frozen=True)
class Asked:
    """A request.

    Attributes:
        turns: of a chat; None of a completion.
        prompt: of a completion, as text or tokens; None of a chat.
        stream: send the answer as it is made.
        usage: tell the tokens at the end of a stream.
    """

    sampling: Sampling
    turns: tuple[Turn, ...] | None = None
    prompt: str | tuple[int, ...] | None = None
    stream: bool = False
    usage: bool = False


def read(body: bytes, chat: bool, model: str) -> Asked:
    """Return what the body of a request asks for.

    Args:
        chat: it is a chat, else a completion.
        model: the name of the only model.

    Raises:
        Refused: saying which field is wrong, and what is allowed.
    """
    fields = _fields(body, chat)
    named = fields.get("model")
    if not isinstance(named, str):
        _wrong("model", f"must be the name of a model, here '{model}'")
    if named != model:
        raise Refused(
            f"The model '{shown(named)}' does not exist. This server has '{model}'.",
            "model",
            "model_not_found",
            404,
        )
    stream = _flag(fields, "stream")
    asked_usage = _usage(fields, stream)
    sampling = _sampling(fields, chat)
    if chat:
        return Asked(sampling, turns=_turns(fields), stream=stream, usage=asked_usage)
    return Asked(sampling, prompt=_prompt(fields), stream=stream, usage=asked_usage)


def _fields(body: bytes, chat: bool) -> dict[str, Any]:
    """Return the fields that say something: null is as good as nothing."""
    try:
        found = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is one of the former
        why = str(error) if isinstance(error, json.JSONDecodeError | _NoNumber) else "it is damaged"
        raise Refused(f"The body is no JSON: {shown(why)}.", code="invalid_json") from None
    if not isinstance(found, dict):
        raise Refused("The body must be a JSON object.", code="invalid_json")
    other = "prompt" if chat else "messages"
    for name in found:
        if name not in KNOWN or name == other:
            known = [field for field in KNOWN if field != other]
            raise Refused(
                f"Unknown field '{shown(name)}'.{nearest(name, known)}", shown(name), "unknown_parameter"
            )
    fields = {name: value for name, value in found.items() if value is not None}
    for name, neutral in NEUTRAL.items():
        if name in fields and not any(
            fields[name] == one and isinstance(fields[name], bool) == isinstance(one, bool)
            for one in neutral
        ):
            allowed = f"; allowed: {', '.join(map(json.dumps, neutral))}" if neutral else ""
            raise Refused(
                f"'{name}' is not supported{allowed}, or nothing.", name, "unsupported_parameter"
            )
    return fields


class _NoNumber(ValueError):
    pass


def _no_number(word: str) -> NoReturn:
    raise _NoNumber(f"{word} is no number")


def _wrong(name: str, why: str, code: str = "invalid_value") -> NoReturn:
    raise Refused(f"'{name}' {why}.", name, code)


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        _wrong(name, "must be true or false")
    return value


def _usage(fields: Mapping[str, Any], stream: bool) -> bool:
    options = fields.get("stream_options")
    if options is None:
        return False
    if not stream:
        _wrong("stream_options", "is for a stream; set 'stream' to true with it")
    if not isinstance(options, dict) or not set(options) <= {"include_usage", "include_obfuscation"}:
        _wrong("stream_options", 'must be an object such as {"include_usage": true}')
    return _flag({k: v for k, v in options.items() if v is not None}, "include_usage")


def _sampling(fields: Mapping[str, Any], chat: bool) -> Sampling:
    for name in SAMPLED:
        if name in fields and (why := flaw(name, fields[name])):
            _wrong(name, why)
    stop = fields.get("stop", ())
    most = fields.get("max_completion_tokens", fields.get("max_tokens"))
    return Sampling(
        temperature=float(fields.get("temperature", 1.0)),
        top_p=float(fields.get("top_p", 1.0)),
        max_tokens=most if most is not None or chat else COMPLETION_TOKENS,
        seed=fields.get("seed"),
        stops=(stop,) if isinstance(stop, str) else tuple(stop),
    )


def _turns(fields: Mapping[str, Any]) -> tuple[Turn, ...]:
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        _wrong("messages", "must be a list of messages, and not an empty one")
    turns = tuple(_turn(f"messages[{at}]", message) for at, message in enumerate(messages))
    expected = Role.user
    for at, turn in enumerate(turns):
        if turn.role is Role.system and at == 0:
            continue
        if turn.role is not expected:
            why = f"is by the {turn.role}, where the {expected} must speak: user and assistant by turns"
            _wrong(f"messages[{at}].role", f"{why}, after at most one system message")
        expected = Role.assistant if expected is Role.user else Role.user
    if turns[-1].role is not Role.user:
        _wrong("messages", "must end with the user, whom the model is to answer")
    return turns


def _turn(name: str, message: Any) -> Turn:
    if not isinstance(message, dict):
        _wrong(name, "must be an object with 'role' and 'content'")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        near = nearest(role, ROLES) if isinstance(role, str) else ""
        raise Refused(
            f"'{name}.role' must be one of {', '.join(ROLES)}, not {shown(repr(role))}.{near}",
            f"{name}.role",
            "invalid_value",
        )
    for field, value in message.items():
        if field not in ("role", "content", "name", "refusal", "annotations") and value not in (
            None,
            [],
        ):
            _wrong(f"{name}.{shown(field)}", "is not supported", "unsupported_parameter")
    text = _content(f"{name}.content", message.get("content"))
    if not text.strip():
        _wrong(f"{name}.content", "is empty")
    if SURROGATE.search(text):
        _wrong(f"{name}.content", "holds half a character (a lone surrogate)")
    return Turn(ROLES[role], text)


def _content(name: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        _wrong(name, "must be a text, or a list of parts of type 'text'")
    texts = []
    for at, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text":
            _wrong(f"{name}[{at}]", "must be a part of type 'text'; the model reads nothing else")
        if not isinstance(part.get("text"), str):
            _wrong(f"{name}[{at}].text", "must be a text")
        texts.append(part["text"])
    return "".join(texts)


def _prompt(fields: Mapping[str, Any]) -> str | tuple[int, ...]:
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        (prompt,) = prompt  # one prompt in a list of them
    if isinstance(prompt, str):
        if SURROGATE.search(prompt):
            _wrong("prompt", "holds half a character (a lone surrogate)")
        return prompt
    if isinstance(prompt, list) and all(type(one) is int for one in prompt):
        return tuple(prompt)
    _wrong("prompt", "must be one text, or one list of tokens")
