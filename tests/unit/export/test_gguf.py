"""GGUF files, read by transformers and by the gguf package: neither shares code with the writer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from ftpipe import tokenizer as tokenizers
from ftpipe.choices import Gguf
from ftpipe.errors import ModelError
from ftpipe.export import gguf_file, vocabulary
from ftpipe.export.source import Source
from tests.unit.export.test_chat import trained

gguf = pytest.importorskip("gguf", reason="the gguf package is an extra")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny Llama with grouped queries and a width of heads of its own, with its tokenizer."""
    where = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    tokenizer = trained(bos=True)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 3,  # padded, as many are
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        max_position_embeddings=128,
        initializer_range=0.2,
        rms_norm_eps=3e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 12345.0},
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(str(where))
    tokenizer.save_pretrained(str(where))
    return where


def written(folder: Path, file: Path, kind: Gguf) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    gguf_file.write(folder, file, kind, tokenizer, [1, 3], "tiny")
    return file


def logits(folder: Path, **options: Any) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, **options).eval()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(4, 60).reshape(2, 28)).logits
    return found


@pytest.mark.parametrize(
    ("kind", "apart"), [(Gguf.f32, 1e-5), (Gguf.f16, 0.05), (Gguf.bf16, 0.5), (Gguf.q8_0, 1.0)]
)
def test_transformers_reads_the_same_model(
    kind: Gguf, apart: float, folder: Path, tmp_path: Path
) -> None:
    written(folder, tmp_path / "x.gguf", kind)
    before, after = logits(folder), logits(tmp_path, gguf_file="x.gguf")
    off = float((before - after).abs().max() / before.std())
    assert off < apart and (kind is Gguf.f32 or off > 1e-7)


@pytest.mark.parametrize("kind", list(Gguf))
def test_each_tensor_is_stored_in_the_type_asked_for(kind: Gguf, folder: Path, tmp_path: Path) -> None:
    reader = gguf.GGUFReader(written(folder, tmp_path / "x.gguf", kind))
    coarse = kind.startswith(("q4", "q5"))
    # of a block of 32 numbers, the largest step that its type can be off by, over its largest number
    steps = {"F32": 0.0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 1 / 250, "Q5_0": 1 / 15, "Q5_1": 1 / 30}
    steps |= {"Q4_0": 1 / 7, "Q4_1": 1 / 14}
    weights = LlamaForCausalLM.from_pretrained(str(folder), dtype=torch.float32).state_dict()
    value = weights["model.layers.1.mlp.down_proj.weight"].numpy()
    seen = {tensor.name: tensor for tensor in reader.tensors}
    assert len(seen) == len(weights) and "output.weight" in seen
    for name, tensor in seen.items():
        if len(tensor.shape) == 1:
            assert tensor.tensor_type.name == "F32", name
        elif coarse and name in ("token_embd.weight", "output.weight"):
            assert tensor.tensor_type.name == "Q8_0", name
        else:
            assert tensor.tensor_type.name == kind.upper(), name
    stored = seen["blk.1.ffn_down.weight"]
    read = gguf.dequantize(stored.data, stored.tensor_type)
    off = np.abs(read - value).reshape(-1, 32).max(1)
    most = np.abs(value).reshape(-1, 32).max(1)
    assert (off <= steps[kind.upper()] * most * 2 + 1e-7).all()
    told = {name: field.contents() for name, field in reader.fields.items()}
    assert (
        told["general.file_type"]
        == {**{"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "bf16": 32}}[
            kind
        ]
    )


@pytest.mark.parametrize("kind", [Gguf.q8_0, Gguf.q4_0])
def test_a_row_that_is_no_multiple_of_a_block_stays_in_sixteen_bits(kind: Gguf) -> None:
    sizes: dict[str, tuple[int, ...]] = {"model.layers.0.mlp.down_proj.weight": (64, 80)}
    sizes |= {"model.embed_tokens.weight": (80, 72)}
    sizes |= {"model.layers.0.mlp.up_proj.weight": (80, 64)}
    found = gguf_file.plan(Source({}, sizes), LlamaConfig(num_hidden_layers=1), kind)
    assert [one.kind.name for one in found] == ["F16", "F16", kind.upper()]
    with pytest.raises(ModelError, match="GGUF has no name for the tensor strange"):
        gguf_file.plan(Source({}, {"strange": (2, 2)}), LlamaConfig(num_hidden_layers=1), kind)


def test_what_is_said_of_the_model_and_its_tokenizer(folder: Path, tmp_path: Path) -> None:
    reader = gguf.GGUFReader(written(folder, tmp_path / "x.gguf", Gguf.f16))
    told = {name: field.contents() for name, field in reader.fields.items()}
    expected = {
        "general.architecture": "llama",
        "general.name": "tiny",
        "llama.context_length": 128,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 24,
        "llama.attention.value_length": 24,
        "llama.rope.dimension_count": 24,
        "llama.rope.freq_base": 12345.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.eot_token_id": 3,
        "tokenizer.ggml.padding_token_id": 1,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }
    assert {name: told[name] for name in expected} == expected
    assert told["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(3e-6)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    pieces, kinds = told["tokenizer.ggml.tokens"], told["tokenizer.ggml.token_type"]
    assert pieces[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    assert pieces[len(tokenizer) :] == [f"[PAD{len(tokenizer) + at}]" for at in range(3)]
    control, normal, unused = 3, 1, 5
    assert kinds == [control] * 5 + [normal] * (len(tokenizer) - 5) + [unused] * 3
    core = json.loads((folder / "tokenizer.json").read_text())
    merges = core["model"]["merges"]
    assert told["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]
    again = AutoTokenizer.from_pretrained(str(tmp_path), gguf_file="x.gguf")
    for text in ("Name a colour, please.", "It is green. é 🚀"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert again(text, add_special_tokens=False)["input_ids"] == ids


def test_sentencepiece_goes_by_scores(shared: Path, tmp_path: Path) -> None:
    stories = shared / "models" / "stories260k"
    tokenizer = AutoTokenizer.from_pretrained(str(stories))
    tokenizer.chat_template = "x"
    gguf_file.write(stories, tmp_path / "s.gguf", Gguf.f16, tokenizer, [2], "stories")
    told = {
        name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "s.gguf").fields.items()
    }
    assert told["tokenizer.ggml.model"] == "llama" and told["tokenizer.ggml.add_space_prefix"] is True
    kinds, scores = told["tokenizer.ggml.token_type"], told["tokenizer.ggml.scores"]
    assert kinds[:4] == [2, 3, 3, 6] and kinds[258] == 6 and kinds[259] == 1
    assert scores[259:264] == [-0.0, -1.0, -2.0, -3.0, -4.0]  # in the order of learning
    again = AutoTokenizer.from_pretrained(str(tmp_path), gguf_file="s.gguf")
    model: Any = AutoModelForCausalLM.from_pretrained(str(stories), dtype=torch.float32)
    other: Any = AutoModelForCausalLM.from_pretrained(
        str(tmp_path), gguf_file="s.gguf", dtype=torch.float32
    )
    text = "Once upon a time, there was a little girl named Lily."
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert again(text)["input_ids"] == ids[0].tolist()
    told_stories = [
        one.generate(ids, max_new_tokens=60, do_sample=False, pad_token_id=2)[0].tolist()
        for one in (model, other)
    ]
    assert told_stories[0] == told_stories[1] and len(told_stories[0]) > 60


def test_a_piece_scores_by_the_first_of_its_merges() -> None:
    pieces = ["<unk>", "a", "b", "c", "ab", "bc", "abc"]
    merges = [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")]
    numbers = {piece: at for at, piece in enumerate(pieces)}
    core = Tokenizer(models.BPE(numbers, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    found = vocabulary.of(tokenizer, 0)
    assert found.model == "llama" and not found.prefixed
    assert list(found.scores) == [-4, -4, -4, -4, 0, -1, -2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Gguf.f16, Gguf.q8_0, Gguf.q4_0])
def test_llama_cpp_reads_the_same_model(kind: Gguf, folder: Path, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp's Python package is not here")
    file = written(folder, tmp_path / "x.gguf", kind)
    there = llama_cpp.Llama(str(file), n_ctx=128, n_threads=1, logits_all=True, verbose=False)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    text = "Name a colour, please. It is green."
    ids = tokenizer(text)["input_ids"]
    assert there.tokenize(text.encode(), add_bos=True) == ids
    there.eval(ids)
    found = torch.tensor(there.scores[: len(ids)])
    model = AutoModelForCausalLM.from_pretrained(
        str(tmp_path), gguf_file="x.gguf", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits[0]
    kl = (expected.softmax(-1) * (expected.log_softmax(-1) - found.log_softmax(-1))).sum(-1)
    assert float(kl.max()) < 0.02  # llama.cpp rounds activations to 8 bits besides
    there.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Gguf.f32, Gguf.f16, Gguf.bf16, Gguf.q8_0])
def test_llama_cpps_own_script_writes_the_same_tensors(kind: Gguf, folder: Path, tmp_path: Path) -> None:
    script = os.environ.get("FTPIPE_CONVERTER")
    if script is None:
        pytest.skip("FTPIPE_CONVERTER does not name llama.cpp's convert_hf_to_gguf.py")
    # its own table of rules does not know this vocabulary: stated as GPT-2's, which it splits by
    changed = "from conversion import base; base.TextModel.get_vocab_base_pre = lambda *_: 'gpt-2'"
    wrapped = tmp_path / "convert.py"
    wrapped.write_text(
        f"import runpy, sys; sys.path.insert(0, {str(Path(script).parent)!r}); {changed}\n"
        f"runpy.run_path({script!r}, run_name='__main__')\n"
    )
    gguf_file.convert(wrapped, folder, tmp_path / "theirs.gguf", kind)
    ours, theirs = (
        {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
        for file in (written(folder, tmp_path / "ours.gguf", kind), tmp_path / "theirs.gguf")
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.tensor_type == theirs[name].tensor_type, name
        assert np.array_equal(tensor.data, theirs[name].data), name


def test_what_cannot_be_written_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"GGUF files of gpt2 are not written here, only of llama, mistr"
    ):
        gguf_file.check(GPT2Config())
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    for options, what in (
        ({"rope_parameters": scaled}, "rope_type=linear"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"attention_bias": True}, "attention_bias=true"),
        ({"mlp_bias": True}, "mlp_bias=true"),
    ):
        with pytest.raises(
            ModelError, match=f"a llama with {what} are not written here; set export.con"
        ):
            gguf_file.check(LlamaConfig(**options))
    with pytest.raises(ModelError, match=r"one token for each byte and no merges"):
        vocabulary.of(tokenizers.byte_level(), 258)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"pre_tokenizer": {"type": "Digits", "individual_digits": True}}, "smollm"),
        ({"pre_tokenizer": {"type": "Digits", "individual_digits": False}}, None),
        ({"normalizer": {"type": "NFC"}}, "gpt-2"),
        ({"normalizer": {"type": "Lowercase"}}, None),
    ],
)
def test_a_rule_of_splitting_has_a_name_or_is_refused(change: dict[str, Any], rule: str | None) -> None:
    tokenizer = trained(bos=False)
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    if "pre_tokenizer" in change:
        parts = [change["pre_tokenizer"], told["pre_tokenizer"]]
        change = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": parts}}
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps({**told, **change}))
    if rule is None:
        with pytest.raises(ModelError, match=r"by a rule that has no name here"):
            vocabulary.of(tokenizer, 0)
    else:
        assert vocabulary.of(tokenizer, 0).rule == rule


def test_a_converter_that_fails_says_why(tmp_path: Path) -> None:
    script = tmp_path / "convert.py"
    script.write_text("import sys\nprint('no such model', file=sys.stderr)\nsys.exit(3)\n")
    with pytest.raises(ModelError, match=r"convert.py failed: no such model"):
        gguf_file.convert(script, tmp_path, tmp_path / "x.gguf", Gguf.f16)
    script.write_text("pass\n")
    with pytest.raises(ModelError, match=r"it wrote nothing"):
        gguf_file.convert(script, tmp_path, tmp_path / "x.gguf", Gguf.f16)
    script.write_text(
        "import sys, pathlib\npathlib.Path(sys.argv[3]).write_text(' '.join(sys.argv[1:]))\n"
    )
    gguf_file.convert(script, tmp_path, tmp_path / "x.gguf", Gguf.q8_0)
    words = (tmp_path / "x.gguf").read_text().split()
    assert words == [str(tmp_path), "--outfile", str(tmp_path / "x.gguf"), "--outtype", "q8_0"]
