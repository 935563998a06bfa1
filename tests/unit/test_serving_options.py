"""The words of chat and serve: what they mean, and one sentence for what they cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftpipe import cli
from ftpipe.choices import Device, ServeEngine, TemplateName
from ftpipe.errors import UserError
from ftpipe.serving import options
from ftpipe.serving.options import ChatOptions, ServeOptions, Wanted
from ftpipe.serving.sampling import Sampling

KEY = "planted-key-0123456789"


def test_what_is_not_said() -> None:
    assert options.chat(["tiny"]) == ChatOptions(Wanted("tiny"), Sampling(0.7, 0.9))
    assert options.serve(["tiny"]) == ServeOptions(Wanted("tiny"), "127.0.0.1", 8000)


def test_what_is_said() -> None:
    words = "./a=b --stage sft --template=chatml --device cpu output=kept --temperature 0 --top-p 1"
    more = ["--max-tokens=9", "--seed", "-3", "--stop", "a b", "--stop=\n", "--system=--x", "--json"]
    wanted = Wanted("./a=b", (), Path("kept"), "sft", TemplateName.chatml, Device.cpu)
    sampling = Sampling(0.0, 1.0, 9, -3, ("a b", "\n"))
    assert options.chat([*words.split(), *more]) == ChatOptions(wanted, sampling, "--x", True)
    words = "x --host ::1 --port 0 --name a/b:c --engine vllm"
    expected = ServeOptions(Wanted("x"), "::1", 0, "a/b:c", None, ServeEngine.vllm)
    assert options.serve(words.split()) == expected


def test_a_recipe_has_its_overrides_and_its_output() -> None:
    wanted = options.chat(["recipe=tiny", "seed=1", "output=kept", "--stage=sft"]).wanted
    assert wanted == Wanted(None, ("recipe=tiny", "seed=1", "output=kept"), Path("kept"), "sft")
    assert wanted.said == "recipe=tiny seed=1 output=kept"


def test_a_key_comes_from_the_environment_and_is_shown_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINE", f" {KEY}\n")
    chosen = options.serve(["x", "--api-key-env", "MINE"])
    assert chosen.key == KEY and KEY not in repr(chosen)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("chat", "chat takes one run, artifact, folder or recipe=NAME, but got none;"),
        ("chat a b", "chat takes one run, artifact, folder or recipe=NAME, but got 2: a b."),
        ("serve a recipe=tiny", "serve takes one run, artifact, folder or recipe=NAME, but got 2:"),
        ("chat a seed=1", "seed=1 overrides a recipe; give recipe=NAME with it"),
        ("chat a output=", "output=PATH: give one folder of outputs."),
        ("chat a --sytem x", "no option '--sytem'. Did you mean '--system'?"),
        ("chat a --port 1", "no option '--port'."),
        ("chat a -m", "chat takes one policy; leave out -m."),
        ("chat a --system", "--system needs a value, such as --system 'Answer in French.'."),
        ("chat a --system --json", "--system needs a value"),
        ("chat a --seed 1 --seed 2", "--seed is given twice."),
        ("chat a --seed 1.5", "--seed: must be a whole number of 64 bits, not '1.5'."),
        ("chat a --seed 99999999999999999999", "--seed: must be a whole number of 64 bits"),
        ("chat a --temperature warm", "--temperature: must be a number from 0 to 2, not 'warm'."),
        ("chat a --temperature nan", "--temperature: must be a number from 0 to 2, not 'nan'."),
        ("chat a --top-p 0", "--top-p: must be a number above 0, up to 1, not '0'."),
        ("chat a --max-tokens 0", "--max-tokens: must be a whole number from 1 on, not '0'."),
        ("chat a " + "--stop x " * 5, "--stop is given 5 times; 4 are allowed."),
        ("chat a --template chatmk", "--template: no template 'chatmk'. Did you mean 'chatml'?"),
        ("chat a --device gpu", "--device: no device 'gpu'."),
        ("serve a --port 65536", "--port=65536 is no port; allowed: 0 (any that is free) to 65535."),
        ("serve a --port -1", "--port=-1 is no port"),
        ("serve a --name a,b", "--name=a,b is no name;"),
        ("serve a --engine tgi", "--engine: no engine 'tgi'. Known: transformers, vllm."),
        ("serve a --api-key-env UNSET", "--api-key-env=UNSET: this environment variable is not set"),
        ("serve a --api-key-env SPACED", "--api-key-env=SPACED: what this environment variable holds"),
        ("chat nothing", "there is no run nothing: outputs holds none; say where with output=PATH."),
        ("serve recipe=tinny", "no recipe 'tinny'. Did you mean 'tiny'?"),
        (
            "chat recipe=tiny",
            "recipe=tiny: 'sft' is not made (it is missing); the command that makes it",
        ),
        ("chat recipe=tiny --stage dpo", "--stage: no stage of tiny-"),
    ],
)
@pytest.mark.usefixtures("empty_folder")
def test_what_does_not_fit_is_one_sentence_and_2(
    words: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPACED", f"{KEY} {KEY}")
    assert cli.main(words.split()) == 2
    got = capsys.readouterr().err
    assert got.startswith(f"ftpipe: {said}") and got.count("\n") == 1 and KEY not in got


def test_an_unknown_home_is_refused() -> None:
    with pytest.raises(UserError, match="no such home"):
        options.chat(["a", "output=~nobody-of-this-name/x"])
