"""The same policy behind vLLM's server, where that is installed: which command serves it.

What vLLM would serve otherwise than it was trained is refused: it writes turns with the tokenizer's own
chat template, reads no trained rows of an adapter, and has 4-bit settings of its own.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any, NoReturn

from ftpipe.choices import Method, Precision, TemplateName
from ftpipe.errors import ConfigError
from ftpipe.serving.address import bound
from ftpipe.serving.options import ServeOptions
from ftpipe.serving.source import POLICY, Source

PROGRAM = "vllm"
KEY = "VLLM_API_KEY"  # environment variable that vLLM reads the key from
ADAPTER = "adapter_config.json"
RANKS = (8, 16, 32, 64, 128, 256)  # that --max-lora-rank takes in every version that knows it
DTYPES = {Precision.fp32: "float32", Precision.bf16: "bfloat16", Precision.fp16: "float16"}
EXPORT = "export the policy and serve that folder, or leave --engine out"


def serve(source: Source, chosen: ServeOptions, name: str) -> NoReturn:
    """Become vLLM's server; it takes over this process with its signals and exit code.

    Raises:
        ConfigError: if vLLM is not installed, the address cannot be had, or vLLM would serve something
            other than was trained.
    """
    program = shutil.which(PROGRAM)
    words = command(source, chosen, name)
    if program is None:
        raise ConfigError("--engine=vllm: vLLM is not installed; pip install vllm, or leave it out.")
    with bound(chosen.host, chosen.port):
        pass  # refuse early: vLLM would say so after it has loaded
    env = {**os.environ, **({} if chosen.key is None else {KEY: chosen.key})}
    print(shlex.join(words), file=sys.stderr, flush=True)
    os.execve(program, words, env)


def command(source: Source, chosen: ServeOptions, name: str) -> list[str]:
    """Return vLLM's command line; the key is never in it.

    Sources: docs.vllm.ai, "vllm serve" and "LoRA Adapters".

    Raises:
        ConfigError: saying what vLLM cannot do.
    """
    if source.template is not TemplateName.tokenizer:
        raise ConfigError(
            f"--engine=vllm writes turns with the tokenizer's own chat template, but {source.name} was "
            f"trained with '{source.template}'; {EXPORT}."
        )
    if chosen.port == 0:
        raise ConfigError("--engine=vllm needs a port by number, such as --port 8000.")
    adapter = source.folder / ADAPTER
    model = str(source.folder)
    lora: list[str] = []
    if adapter.is_file():
        if source.cfg is not None and source.cfg.adapter.method is Method.qlora:
            raise ConfigError(
                f"--engine=vllm quantises in its own way, but {source.name} was trained on a 4-bit "
                f"base; {EXPORT}."
            )
        model, lora = _adapter(source, json.loads(adapter.read_text(encoding="utf-8")), name)
    words = [PROGRAM, "serve", model, "--host", chosen.host, "--port", str(chosen.port)]
    if lora:
        words += ["--served-model-name", f"{name}-base", "--tokenizer", str(source.folder), *lora]
    else:
        words += ["--served-model-name", name]
    if source.cfg is not None:
        if source.kind == POLICY:  # others are served as they are stored
            words += ["--dtype", DTYPES[source.cfg.launch.precision]]
        words += ["--trust-remote-code"] * source.cfg.model.trust_remote_code
    # its own defaults would be those of the base model's generation_config.json
    return [*words, "--generation-config", "vllm"]


def _adapter(source: Source, stated: dict[str, Any], name: str) -> tuple[str, list[str]]:
    """Return the base of an adapter, and the words that put the adapter on it."""
    if stated.get("use_dora"):
        raise ConfigError(f"--engine=vllm reads no DoRA; {EXPORT}.")
    if stated.get("trainable_token_indices") or stated.get("modules_to_save"):
        raise ConfigError(f"--engine=vllm reads no trained tokens of an adapter; {EXPORT}.")
    from ftpipe import policy

    start = policy.found(source.folder)
    fits = [rank for rank in RANKS if rank >= int(stated["r"])]
    if not fits:
        raise ConfigError(f"--engine=vllm takes adapters up to rank {RANKS[-1]}; {EXPORT}.")
    words = [
        "--enable-lora",
        "--lora-modules",
        f"{name}={source.folder}",
        "--max-lora-rank",
        str(fits[0]),
    ]
    pinned = (
        [] if start.revision is None or Path(start.weights).is_dir() else ["--revision", start.revision]
    )
    return start.weights, [*words, *pinned]
