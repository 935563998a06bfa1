"""The keys of export: which folder a policy becomes, what it may lose on the way, and where it goes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ftpipe.choices import Dtype, Gguf, Quantized, Start
from ftpipe.errors import ConfigError, require

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
CONVERTED = (Gguf.f32, Gguf.f16, Gguf.bf16, Gguf.q8_0)  # what llama.cpp's own script writes
GROUPS = (32, 64, 128)  # weights to a scale that vLLM's kernels know
# A repository of the hub: two words of letters, digits, - _ . (huggingface_hub, validate_repo_id).
REPOSITORY = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}", re.ASCII)


@dataclass
class ExportConfig:
    """A policy as a folder that others load: merged, compared with what was trained, described."""

    start: Start = Start.policy  # policy: the stage before makes it; model: the run's base model
    dtype: Dtype = Dtype.auto  # of the weights; auto: as what it is made of is stored, or model.dtype
    max_shard_size: str = "5GB"  # of one file of weights, such as 500MB
    rows: int = 32  # held-out rows on which policy and folder are compared, 512 tokens of each
    # Above these nothing is published. llama.cpp's tools/perplexity/README.md has, for Llama 3 8B:
    # rounding to f16 costs 0.00003 nats and 0.3% of the likeliest tokens, q8_0 0.0014 and 2.3%
    max_kl: float = 0.01  # mean KL divergence of the folder from the policy, nats per token
    min_agreement: float = 0.95  # share of tokens whose likeliest successor is the same
    gguf: list[Gguf] = field(default_factory=list)  # files for llama.cpp and Ollama to write besides
    converter: str | None = None  # llama.cpp's convert_hf_to_gguf.py writes them; null: ftpipe does
    quantize: list[Quantized] = field(default_factory=list)  # folders in 4 bits to write besides
    quantizer: str | None = None  # Python of an environment with llmcompressor; null: this one
    group_size: int = 128  # inputs of a matrix that share a scale, in 4 bits
    calibration_rows: int = 128  # training rows that gptq and awq look at, 512 tokens of each
    push: str | None = None  # user/name on the hub to upload to; the token is read from HF_TOKEN
    public: bool = False  # whether anybody may see what is uploaded

    def check(self) -> None:
        require(
            shard_bytes(self.max_shard_size) is not None,
            "export.max_shard_size",
            self.max_shard_size,
            "a number with KB, MB or GB, such as 500MB",
        )
        require(self.rows >= 1, "export.rows", self.rows, "at least 1")
        require(self.max_kl > 0, "export.max_kl", self.max_kl, "above 0")
        agreed = self.min_agreement
        require(0 <= agreed <= 1, "export.min_agreement", agreed, "in [0, 1]")
        once = len(set(self.gguf)) == len(self.gguf)
        require(once, "export.gguf", [str(kind) for kind in self.gguf], "each type once")
        self._check_quantised()
        if self.converter is not None:
            require(bool(self.gguf), "export.converter", self.converter, "null without export.gguf")
            able = all(kind in CONVERTED for kind in self.gguf)
            allowed = f"{', '.join(CONVERTED)} with export.converter"
            require(able, "export.gguf", [str(kind) for kind in self.gguf], allowed)
        if self.push is not None and not REPOSITORY.fullmatch(self.push):
            raise ConfigError(f"export.push={self.push} is no repository of the hub; write user/name.")
        require(
            not (self.public and self.push is None), "export.public", True, "false without export.push"
        )

    def _check_quantised(self) -> None:
        once = len(set(self.quantize)) == len(self.quantize)
        require(once, "export.quantize", [str(kind) for kind in self.quantize], "each method once")
        if self.quantizer is not None:
            allowed = "null without export.quantize"
            require(bool(self.quantize), "export.quantizer", self.quantizer, allowed)
        allowed = ", ".join(map(str, GROUPS))
        require(self.group_size in GROUPS, "export.group_size", self.group_size, allowed)
        rows = self.calibration_rows
        require(rows >= 1, "export.calibration_rows", rows, "at least 1")


def shard_bytes(size: str) -> int | None:
    """Return a size such as ``500MB`` in bytes, or None where it is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB)", size)
    count = int(float(match.group(1)) * UNITS[match.group(2)]) if match else 0
    return count or None
