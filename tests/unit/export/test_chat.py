"""Chat templates of what is exported: the ids of the training, in Jinja and in Go."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ftpipe import tokenizer as tokenizers
from ftpipe.choices import Role, TemplateName
from ftpipe.data import templates
from ftpipe.data.encode import encode
from ftpipe.data.example import Turn
from ftpipe.data.pieces import final_reply
from ftpipe.export import chat, ollama
from tests.conftest import SHARED
from tests.unit.export import go_template

WORDS = ["Name a colour, please.", "It is  green.", "Why?\n\nSay so.", 'Since "it" {{ is }} so.']
NAMED = [name for name in TemplateName if name is not TemplateName.tokenizer]
SYSTEM = "Be brief."


def trained(bos: bool) -> Any:
    """Return a byte-level BPE tokenizer, with a bos before every text or without."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        [" ".join(WORDS) * 3],
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet),
    )
    if bos:
        core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


@pytest.fixture(scope="module", params=["bytes", "bpe", "bpe with bos", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    if request.param == "sentencepiece":
        folder = SHARED / "models" / "stories260k"
        if not folder.is_dir():
            pytest.skip("no folder of real models (shared) beside the checkout")
        return AutoTokenizer.from_pretrained(str(folder))
    if request.param == "bytes":
        return tokenizers.byte_level()
    return trained(bos=request.param.endswith("bos"))


def talks(name: TemplateName) -> list[tuple[Turn, ...]]:
    roles = (Role.user, Role.assistant, Role.user, Role.assistant)
    long = tuple(Turn(role, text) for role, text in zip(roles, WORDS, strict=True))
    if name is TemplateName.alpaca:  # it holds one exchange and no system prompt
        return [long[:2], (Turn(Role.user, "Add them.", "2, 3"), long[1])]
    system = Turn(Role.system, SYSTEM)
    return [long[:2], long, (system, *long[:2]), (system, *long)]


def messages(turns: tuple[Turn, ...]) -> list[dict[str, str]]:
    given = [{"input": turn.given} if turn.given else {} for turn in turns]
    return [
        {"role": str(turn.role), "content": turn.content, **more}
        for turn, more in zip(turns, given, strict=True)
    ]


@pytest.mark.parametrize("name", NAMED)
def test_apply_chat_template_gives_the_ids_of_the_training(name: TemplateName, tokenizer: Any) -> None:
    template = chat.jinja(name, tokenizer)
    for turns in talks(name):
        pieces = templates.render(name, turns, tokenizer)
        (expected,) = encode([pieces], tokenizer, [Role.assistant])
        options: dict[str, Any] = {"chat_template": template, "return_dict": False}
        got = tokenizer.apply_chat_template(messages(turns), **options)
        assert got == expected.input_ids.tolist(), tokenizer.decode(got)
        asked = tokenizer.apply_chat_template(
            messages(turns[:-1]),
            chat_template=template,
            tokenize=False,
            add_generation_prompt=True,
        )
        assert asked == "".join(piece.text for piece in pieces[: final_reply(pieces)])


def test_alpaca_refuses_what_it_cannot_hold() -> None:
    tokenizer = tokenizers.byte_level()
    template = chat.jinja(TemplateName.alpaca, tokenizer)
    for turns in talks(TemplateName.plain)[1:]:
        with pytest.raises(Exception, match="holds one instruction and one answer"):
            tokenizer.apply_chat_template(messages(turns), chat_template=template)


def test_the_tokenizers_own_template_is_told_what_day_the_training_had() -> None:
    tokenizer = tokenizers.byte_level()
    tokenizer.chat_template = "{{ strftime_now('%Y') }}{{ messages[0]['content'] }}"
    template = chat.jinja(TemplateName.tokenizer, tokenizer)
    said = tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}], chat_template=template, tokenize=False
    )
    assert said == "2024x"
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        chat.jinja(TemplateName.tokenizer, tokenizer)


def test_an_answer_ends_with_eos_or_the_mark_of_its_turn() -> None:
    tokenizer = trained(bos=False)
    numbers = tokenizer.get_vocab()
    eos, turn, eot = numbers["</s>"], numbers["<|im_end|>"], numbers["<|eot_id|>"]
    for name in NAMED:
        also = {TemplateName.chatml: [turn], TemplateName.llama3: [eot]}.get(name, [])
        assert chat.ends(name, tokenizer) == [eos, *also], name
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
    )
    assert chat.ends(TemplateName.tokenizer, tokenizer) == [eos, turn]


def by_go(template: str, turns: list[dict[str, str]]) -> str:
    data = [{"Role": turn["role"], "Content": turn["content"]} for turn in turns]
    return go_template.render(template, {"Messages": data})


def asked(name: TemplateName) -> list[list[dict[str, str]]]:
    """Return conversations that end with the user, of words that no template would trim."""
    return [messages(turns[:-1]) for turns in talks(name) if not turns[-2].given]


@pytest.mark.parametrize("name", NAMED)
def test_ollama_renders_what_transformers_renders(name: TemplateName, tokenizer: Any) -> None:
    template = ollama.go(name, tokenizer)
    bos = templates.leading_bos(tokenizer)
    for turns in asked(name):
        expected = tokenizer.apply_chat_template(
            turns,
            chat_template=chat.jinja(name, tokenizer),
            tokenize=False,
            add_generation_prompt=True,
        )
        assert by_go(template, turns) == expected.removeprefix(bos)  # Ollama puts bos there itself


PROGRAM = """
package main

import (
	"encoding/json"
	"os"
	"text/template"
)

func main() {
	var job struct {
		Template string
		Messages []struct{ Role, Content string }
	}
	if err := json.NewDecoder(os.Stdin).Decode(&job); err != nil {
		panic(err)
	}
	if err := template.Must(template.New("").Parse(job.Template)).Execute(os.Stdout, job); err != nil {
		panic(err)
	}
}
"""


@pytest.mark.slow
def test_go_itself_renders_as_the_tests_do(tmp_path: Path) -> None:
    go = shutil.which("go")
    if go is None:
        pytest.skip("no Go here: what the tests take for Go's templates is compared with nothing")
    (tmp_path / "main.go").write_text(PROGRAM)
    program = tmp_path / "render"
    subprocess.run([go, "build", "-o", str(program), str(tmp_path / "main.go")], check=True)
    tokenizer = trained(bos=True)
    for name in NAMED:
        template = ollama.go(name, tokenizer)
        for turns in asked(name):
            data = [{"Role": turn["role"], "Content": turn["content"]} for turn in turns]
            job = json.dumps({"Template": template, "Messages": data})
            done = subprocess.run([program], input=job, capture_output=True, text=True, check=True)
            assert done.stdout == by_go(template, turns), name


def test_a_tokenizers_own_template_is_recognised_with_its_system_prompt() -> None:
    tokenizer = trained(bos=False)
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are X.<|im_end|>\n{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    assert ollama.named(tokenizer) == (TemplateName.chatml, "You are X.")
    assert ollama.named(tokenizers.byte_level()) == (TemplateName.zephyr, "")
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    assert ollama.named(tokenizer) is None


def test_a_modelfile_says_how_transformers_generates() -> None:
    tokenizer = trained(bos=False)
    greedy = ollama.modelfile("a.gguf", TemplateName.vicuna, tokenizer, {"temperature": 0.6})
    lines = greedy.splitlines()
    assert "FROM ./a.gguf" in lines and "PARAMETER temperature 0" in lines
    # Ollama's own penalty of 1.1 would change the likeliest token
    assert "PARAMETER repeat_penalty 1" in lines and "PARAMETER top_p" not in greedy
    assert 'PARAMETER stop "</s>"' in lines and 'PARAMETER stop "USER:"' in lines
    assert greedy.count('"""') == 2 and ollama.go(TemplateName.vicuna, tokenizer) in greedy
    sampled = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "repetition_penalty": 1.05}
    told = ollama.modelfile("a.gguf", TemplateName.vicuna, tokenizer, sampled).splitlines()
    assert "PARAMETER temperature 0.6" in told and "PARAMETER top_p 0.95" in told
    assert "PARAMETER repeat_penalty 1.05" in told and "PARAMETER repeat_last_n -1" in told
    assert "PARAMETER top_k 50" in told  # what transformers takes where nothing is said
    bare = ollama.modelfile("a.gguf", TemplateName.vicuna, tokenizer, {"do_sample": True, "top_k": 0})
    assert "PARAMETER temperature 1.0\n" in bare and "PARAMETER top_p 1.0\n" in bare
    assert "PARAMETER top_k 0\n" in bare  # of all tokens, in both
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    unknown = ollama.modelfile("a.gguf", TemplateName.tokenizer, tokenizer, {})
    assert "TEMPLATE" not in unknown and "it is none that ftpipe can say" in unknown
