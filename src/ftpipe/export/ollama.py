"""A Modelfile for Ollama: the template as Go has it, where an answer stops, how its tokens are chosen.

The templates are in Go's text/template, over ``.Messages`` (github.com/ollama/ollama, docs/template.md).
Ollama itself puts the tokenizer's bos first. Go has no word that trims, so where a template trims what
is said (llama2, llama3), that is left to the one who says it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftpipe.choices import TemplateName
from ftpipe.data import templates
from ftpipe.export import chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EOS, BOS = chat.EOS, chat.BOS
WORDS = "{{ .Content }}"
MARK = "words of the system"
# What transformers takes where it samples and a generation_config does not say (its docs of generate).
SAMPLED = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}


@dataclass(frozen=True)
class Form:
    """A template in Go, by role.

    Attributes:
        system, user, assistant: what a turn of that role becomes.
        prompt: what asks for an answer.
        before: what comes before all turns.
        stop: texts that end an answer besides the tokenizer's own end.
    """

    system: str
    user: str
    assistant: str
    prompt: str = ""
    before: str = ""
    stop: Sequence[str] = ()

    def go(self) -> str:
        """Return the whole template: an answer is asked for where the last turn is the user's."""
        last = "{{ if eq (len (slice $.Messages $i)) 1 }}" + self.prompt + "{{ end }}"
        turns = (
            '{{ range $i, $_ := .Messages }}{{ if eq .Role "system" }}'
            + self.system
            + '{{ else if eq .Role "user" }}'
            + self.user
            + (last if self.prompt else "")
            + "{{ else }}"
            + self.assistant
            + "{{ end }}{{ end }}"
        )
        return self.before + turns


def _alike(opening: str, ending: str, stop: Sequence[str], names: Sequence[str] = ()) -> Form:
    """Return a form that is the same for all roles but for their names."""
    system, user, assistant = names or ("system", "user", "assistant")
    marks = [opening.format(name) for name in (system, user, assistant)]
    return Form(*(mark + WORDS + ending for mark in marks), prompt=marks[2], stop=stop)  # type: ignore[misc]


FIRST = (
    '{{ $system := false }}{{ range .Messages }}{{ if eq .Role "system" }}{{ $system = true }}'
    "{{ end }}{{ end }}"
)
# The first question is the first turn, or the second after a system turn.
OPENS, FIRST_WORDS = "{{ if and $system (eq $i 1) }}", "{{ (index $.Messages 0).Content }}"

FORMS: Mapping[TemplateName, Form] = {
    TemplateName.plain: Form(f"{WORDS}\n\n", WORDS, f" {WORDS}{EOS}"),
    TemplateName.alpaca: Form(
        "",
        templates.ALPACA_NO_INPUT.replace("{instruction}", WORDS),
        f"{WORDS}{EOS}",
        stop=("### Instruction:",),
    ),
    TemplateName.guanaco: Form(
        f"{WORDS}\n",
        f"### Human: {WORDS}",
        f"### Assistant: {WORDS}",
        "### Assistant:",
        stop=("### Human:",),
    ),
    TemplateName.hh: Form(
        WORDS,
        f"\n\nHuman: {WORDS}",
        f"\n\nAssistant: {WORDS}",
        "\n\nAssistant:",
        stop=("Human:",),
    ),
    TemplateName.vicuna: Form(
        f"{WORDS} ",
        f"USER: {WORDS}",
        f" ASSISTANT: {WORDS}{EOS}",
        " ASSISTANT:",
        before=FIRST + "{{ if not $system }}" + templates.VICUNA_SYSTEM + " {{ end }}",
        stop=("USER:",),
    ),
    TemplateName.wizardlm: Form(
        f"{WORDS}\n\n", f"{WORDS}\n\n", f"### Response:{WORDS}{EOS}", "### Response:"
    ),
    TemplateName.oasst: _alike(
        "<|{}|>", EOS, ("<|prompter|>", "<|system|>"), ("system", "prompter", "assistant")
    ),
    TemplateName.chatml: _alike("<|im_start|>{}\n", "<|im_end|>\n", ("<|im_start|>", "<|im_end|>")),
    TemplateName.llama2: Form(
        "",
        "{{ if not (or (eq $i 0) (and $system (eq $i 1))) }}"
        + BOS
        + "{{ end }}[INST] "
        + OPENS
        + "<<SYS>>\n"
        + FIRST_WORDS
        + "\n<</SYS>>\n\n{{ end }}"
        + WORDS
        + " [/INST]",
        f" {WORDS} {EOS}",
        before=FIRST,
        stop=("[INST]",),
    ),
    TemplateName.llama3: _alike(
        "<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>", ("<|start_header_id|>", "<|eot_id|>")
    ),
    TemplateName.mistral: Form(
        "",
        " [INST] " + OPENS + FIRST_WORDS + "\n\n{{ end }}" + WORDS + " [/INST]",
        f" {WORDS}{EOS}",
        before=FIRST,
        stop=("[INST]",),
    ),
    TemplateName.zephyr: _alike("<|{}|>\n", f"{EOS}\n", ("<|user|>", "<|system|>", "<|assistant|>")),
}


def go(name: TemplateName, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a template by name in Go, with this tokenizer's bos and eos in it."""
    bos, eos = templates.leading_bos(tokenizer), templates.end_of_text(tokenizer)
    return FORMS[name].go().replace(EOS, eos).replace(BOS, bos)


def named(tokenizer: PreTrainedTokenizerBase) -> tuple[TemplateName, str] | None:
    """Return which template by name a tokenizer's own one is, and its default system prompt.

    None where it is none of them. They are compared by what they render, with and without a system turn.
    """
    asked = [{"role": "user", "content": "a"}]
    talked = [*asked, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c d"}]
    system = [{"role": "system", "content": MARK}]

    def rendered(template: str, turns: list[dict[str, str]]) -> str | None:
        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
        try:
            return str(tokenizer.apply_chat_template(turns, chat_template=template, **options))
        except Exception:  # whatever a template raises: jinja2's errors share no useful base
            return None

    own = chat.jinja(TemplateName.tokenizer, tokenizer)
    for name in FORMS:
        other = chat.jinja(name, tokenizer)
        if rendered(own, system + talked) != rendered(other, system + talked):
            continue
        bare = rendered(own, talked)
        if bare is None or bare == rendered(other, talked):
            return name, ""
        before, _, after = str(rendered(other, system + talked)).partition(MARK)
        if bare.startswith(before) and bare.endswith(after):
            return name, bare[len(before) : len(bare) - len(after)]
    return None


def modelfile(
    file: str, name: TemplateName, tokenizer: PreTrainedTokenizerBase, generation: Mapping[str, Any]
) -> str:
    """Return the Modelfile of a GGUF file that lies beside it.

    Args:
        generation: the model's generation_config.
    """
    found = named(tokenizer) if name is TemplateName.tokenizer else (name, "")
    lines = [f"# ollama create NAME -f Modelfile\nFROM ./{file}"]
    if found is None:
        lines.append(
            "# The tokenizer's own chat template is in the GGUF file; it is none that ftpipe can say\n"
            "# in Go, so Ollama recognises it or takes the text as it is."
        )
    else:
        lines.append(f'TEMPLATE """{go(found[0], tokenizer)}"""')
        lines += [f'SYSTEM """{found[1]}"""'] if found[1] else []
        end = templates.end_of_text(tokenizer)
        lines += [f'PARAMETER stop "{text}"' for text in dict.fromkeys([end, *FORMS[found[0]].stop])]
    lines += [f"PARAMETER {key} {value}" for key, value in _parameters(generation).items()]
    return "\n".join(lines) + "\n"


def _parameters(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Return how transformers generates from the folder: greedy, unless the model says otherwise.

    Each is said, since Ollama has defaults of its own: repeat_penalty 1.1 over the last 64 tokens, top_k
    40, top_p 0.9 (docs/modelfile.mdx of ollama/ollama). In transformers a penalty sees all tokens.
    """
    said = {key: value for key, value in generation.items() if value is not None}
    found: dict[str, Any] = {"temperature": 0}
    found |= {"repeat_penalty": said.get("repetition_penalty", 1), "repeat_last_n": -1}
    if said.get("do_sample"):
        found |= {key: said.get(key, default) for key, default in SAMPLED.items()}
    return found
