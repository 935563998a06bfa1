"""Requests of OpenAI's API, field by field: what is taken, and the error for what is not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ftpipe.choices import Role
from ftpipe.serving.requests import Refused, read
from ftpipe.serving.sampling import Sampling

USER = {"role": "user", "content": "Hi"}
BOT = {"role": "assistant", "content": "Hello"}


def chat(**fields: Any) -> Any:
    body = {"model": "m", "messages": [USER], **fields}
    return read(json.dumps(body).encode(), chat=True, model="m")


def completion(**fields: Any) -> Any:
    body = {"model": "m", "prompt": "Once", **fields}
    return read(json.dumps(body).encode(), chat=False, model="m")


def test_what_is_not_said_has_openais_defaults() -> None:
    assert chat().sampling == Sampling(1.0, 1.0, None, None, ())
    assert completion().sampling == Sampling(1.0, 1.0, 16, None, ())
    assert (chat().stream, chat().usage, chat().prompt) == (False, False, None)
    assert completion().prompt == "Once" and completion().turns is None


def test_null_says_nothing() -> None:
    names = ("temperature", "top_p", "max_tokens", "seed", "stop", "stream", "stream_options", "n")
    assert chat(**dict.fromkeys((*names, "tools", "logit_bias", "response_format"))) == chat()


def test_fields_that_ask_for_nothing_are_taken() -> None:
    neutral = {"n": 1, "presence_penalty": 0.0, "frequency_penalty": 0, "logit_bias": {}, "tools": []}
    more = {"logprobs": False, "response_format": {"type": "text"}, "tool_choice": "none"}
    assert chat(**neutral, **more, user="me", metadata={"a": "b"}, store=True) == chat()


def test_what_is_said_is_heard() -> None:
    asked = chat(
        messages=[
            {
                "role": "developer",
                "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}],
            },
            {**USER, "name": "ann"},
            {**BOT, "refusal": None, "tool_calls": None, "annotations": []},
            USER,
        ],
        temperature=0,
        top_p=0.5,
        max_tokens=5,
        max_completion_tokens=7,
        seed=-1,
        stop="##",
        stream=True,
        stream_options={"include_usage": True},
    )
    assert [(turn.role, turn.content) for turn in asked.turns] == [
        *((Role.system, "Be kind."), (Role.user, "Hi"), (Role.assistant, "Hello"), (Role.user, "Hi")),
    ]
    assert asked.sampling == Sampling(0.0, 0.5, 7, -1, ("##",))
    assert asked.stream and asked.usage
    assert chat(stop=["a", "b"]).sampling.stops == ("a", "b")
    assert completion(prompt=[[1, 2]]).prompt == (1, 2) == completion(prompt=[1, 2]).prompt
    assert completion(prompt=["Once"]).prompt == "Once"


BAD = [
    ({"model": None}, "model", None, "must be the name of a model, here 'm'"),
    ({"model": "x" * 999}, "model", "model_not_found", "..."),
    ({"messages": None}, "messages", None, "must be a list of messages"),
    ({"messages": "Hi"}, "messages", None, "must be a list of messages"),
    ({"messages": ["Hi"]}, "messages[0]", None, "must be an object"),
    ({"messages": [{"content": "Hi"}]}, "messages[0].role", None, "must be one of system, developer"),
    ({"messages": [{**USER, "role": "tool"}]}, "messages[0].role", None, "not 'tool'"),
    ({"messages": [{**USER, "role": ["user"]}]}, "messages[0].role", None, "must be one of"),
    ({"messages": [BOT]}, "messages[0].role", None, "the user must speak"),
    ({"messages": [USER, BOT]}, "messages", None, "must end with the user"),
    ({"messages": [USER, BOT, {**USER, "role": "system"}]}, "messages[2].role", None, "by turns"),
    ({"messages": [{**USER, "role": "system"}]}, "messages", None, "must end with the user"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", None, "must be a text"),
    ({"messages": [{"role": "user", "content": " \n"}]}, "messages[0].content", None, "is empty"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", None, "is empty"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        *("messages[0].content[0]", None, "part of type 'text'"),
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        *("messages[0].content[0].text", None, "must be a text"),
    ),
    (
        {"messages": [{**USER, "tool_calls": [1]}]},
        *("messages[0].tool_calls", "unsupported_parameter", "is not supported"),
    ),
    ({"temperature": "1"}, "temperature", None, "must be a number from 0 to 2, not '1'"),
    ({"temperature": True}, "temperature", None, "not True"),
    ({"temperature": -0.1}, "temperature", None, "not -0.1"),
    ({"temperature": 1e999}, None, "invalid_json", "Infinity is no number"),
    ({"top_p": 0}, "top_p", None, "above 0, up to 1"),
    ({"max_tokens": 0}, "max_tokens", None, "from 1 on, not 0"),
    ({"max_tokens": 1.5}, "max_tokens", None, "not 1.5"),
    ({"max_completion_tokens": "9"}, "max_completion_tokens", None, "not '9'"),
    ({"seed": 2**63}, "seed", None, "64 bits"),
    ({"stop": ["a"] * 5}, "stop", None, "up to 4"),
    ({"stop": ""}, "stop", None, "none empty"),
    ({"stop": ["a", 1]}, "stop", None, "none empty"),
    ({"stream": 1}, "stream", None, "true or false"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options", None, "include_usage"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "include_usage", None, "true or false"),
    ({"n": 2}, "n", "unsupported_parameter", "allowed: 1"),
    ({"n": True}, "n", "unsupported_parameter", "allowed: 1"),
    ({"logprobs": True}, "logprobs", "unsupported_parameter", "allowed: false"),
    ({"presence_penalty": 0.1}, "presence_penalty", "unsupported_parameter", "allowed: 0"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "unsupported_parameter", "allowed: {}"),
    ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter", "allowed: []"),
    ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter", "text"),
    ({"audio": {}}, "audio", "unsupported_parameter", "'audio' is not supported, or nothing."),
    ({"max_token": 3}, "max_token", "unknown_parameter", "Did you mean 'max_tokens'?"),
    ({"prompt": "Hi"}, "prompt", "unknown_parameter", "Unknown field 'prompt'"),
]


@pytest.mark.parametrize(("fields", "param", "code", "said"), BAD)
def test_what_does_not_fit_is_refused_by_its_field(
    fields: dict[str, Any], param: str | None, code: str | None, said: str
) -> None:
    with pytest.raises(Refused) as caught:
        chat(**fields)
    error = caught.value
    assert (error.param, error.code) == (param, code or "invalid_value")
    assert error.status == (404 if code == "model_not_found" else 400)
    assert said in str(error) and len(str(error)) < 1000
    assert error.body() == {
        "error": {
            "message": str(error),
            "type": "invalid_request_error",
            "param": param,
            "code": error.code,
        }
    }


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        *[({"prompt": prompt}, "prompt") for prompt in (None, [], ["a", "b"], [True], [1.5], {"a": 1})],
        *[({name: value}, name) for name, value in (("echo", True), ("best_of", 3), ("logprobs", 1))],
        *[({"suffix": "end"}, "suffix"), ({"messages": [USER]}, "messages")],
    ],
)
def test_completions_refuse_what_they_cannot_do(fields: dict[str, Any], param: str) -> None:
    if fields == {"prompt": []}:
        assert completion(**fields).prompt == ()  # without a token, which the endpoint refuses
        return
    with pytest.raises(Refused) as caught:
        completion(**fields)
    assert caught.value.param == param
