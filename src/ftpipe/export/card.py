"""What comes with the weights for people: the model card, and notes on licences.

The card's front matter is that of the Hub (huggingface.co/docs/hub/model-cards). Licences are given as
the recipe states them; nobody has looked further.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from ftpipe import __version__, artifacts, pins
from ftpipe.artifacts import MANIFEST, Artifact
from ftpipe.choices import Gguf, Init, Quantized, Start
from ftpipe.config import RunConfig
from ftpipe.export.compress import BITS
from ftpipe.export.parity import Parity
from ftpipe.samples import PREFIX
from ftpipe.schema import recorded

CARD, NOTES = "README.md", "LICENSE-NOTES.md"
TRAINS = ("sft", "reward", "dpo", "ppo")
UNSAID = "not stated"


@dataclass(frozen=True)
class Told:
    """What a card is written from.

    Attributes:
        bundle: the name of the artifact that it comes with.
        parity: how far its weights are from the policy.
        files: GGUF files by type, each with how far it is, where that was measured.
        folders: in 4 bits by how they were found, each with how far it is.
        report: of the evaluation, where there is one.
    """

    cfg: RunConfig
    inputs: Mapping[str, Artifact]
    bundle: str
    parity: Parity
    files: Mapping[Gguf, tuple[str, Parity | None]] = field(default_factory=dict)
    folders: Mapping[Quantized, Parity] = field(default_factory=dict)

    @property
    def report(self) -> Artifact | None:
        return self.inputs.get("report")

    @property
    def stages(self) -> list[str]:
        """Return the stages that made the policy, the first one first."""
        policy = self.inputs.get("policy")
        return [] if policy is None else [one.stage for one in reversed(list(lineage(policy)))]


def lineage(artifact: Artifact) -> Iterator[Artifact]:
    """Yield an artifact and all that it was made from, each once, what is nearer first.

    What lies no longer beside it is left out.
    """
    seen: set[str] = set()
    waiting = [artifact]
    while waiting:
        one = waiting.pop(0)
        if one.path.name in seen:
            continue
        seen.add(one.path.name)
        yield one
        folders = (artifact.path.parent / name for name in one.manifest["inputs"].values())
        waiting += [artifacts.open_artifact(path) for path in folders if (path / MANIFEST).is_file()]


def hub_model(cfg: RunConfig) -> str | None:
    """Return the hub id of the base model, where it is on the hub."""
    model = cfg.model
    if model.init is Init.random or model.path is None or model.revision is None:
        return None
    return model.path if pins.local_model(model) is None else None


def hub_datasets(cfg: RunConfig) -> list[str]:
    """Return the hub ids of the sources that are on the hub, each once."""
    pinned = [source.path for source in cfg.data.sources.values() if source.revision]
    return list(dict.fromkeys(path for path in pinned if pins.local_data(path) is None))


def front_matter(told: Told) -> dict[str, Any]:
    """Return what the Hub reads of a card."""
    cfg = told.cfg
    base, sets, stated = hub_model(cfg), hub_datasets(cfg), licences(cfg)
    matter: dict[str, Any] = {}
    all_one = len(set(stated.values())) == 1 and not {UNSAID, "other"} & set(stated.values())
    if all_one:
        matter["license"] = next(iter(stated.values()))
    else:  # several, or some that nobody stated
        matter |= {"license": "other", "license_name": "see-notes", "license_link": NOTES}
    if base is not None:
        matter |= {"base_model": [base]}
        matter |= {"base_model_relation": "finetune"} if told.stages else {}
    if sets and told.stages:
        matter["datasets"] = sets
    method = [str(cfg.adapter.method)] if told.stages else []
    trained = [stage for stage in told.stages if stage in TRAINS]
    gguf = ["gguf"] if told.files else []
    tags = ["ftpipe", *trained, *method, *gguf, *map(str, told.folders)]
    matter |= {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    return matter


def licences(cfg: RunConfig) -> dict[str, str]:
    """Return the licence of what the weights were made from, as the recipe states them.

    The base model, and each source of data unless the base itself is exported.
    """
    found = {} if cfg.model.init is Init.random else {"base model": cfg.model.license or UNSAID}
    sources = {} if cfg.export.start is Start.model else cfg.data.sources
    return found | {f"data: {name}": source.license or UNSAID for name, source in sources.items()}


def notes(cfg: RunConfig) -> str:
    """Return what is known of licences, as Markdown."""
    model = cfg.model
    rows = {
        "base model": "random weights" if model.init is Init.random else _place(hub_model(cfg)),
        **{
            f"data: {name}": _place(source.path if source.revision else None, source.path)
            for name, source in cfg.data.sources.items()
        },
    }
    lines = [
        "# Licences of what this model was made from",
        "",
        "As the recipe states them (`model.license`, `data.sources.NAME.license`); read the originals.",
        "A licence of the base model, or of the data, may bind whoever uses or passes on these weights.",
        "",
        "| what | where | licence |",
        "|---|---|---|",
    ]
    lines += [f"| {what} | {rows[what]} | {licence} |" for what, licence in licences(cfg).items()]
    if model.init is Init.random:
        lines += ["| base model | random weights | none needed |"]
    return "\n".join(lines) + "\n"


def _place(hub: str | None, path: str = "") -> str:
    if hub is not None:
        return f"https://huggingface.co/{'datasets/' if path else ''}{hub}"
    return path if path.startswith(PREFIX) else "a local file"


def card(told: Told) -> str:
    """Return the model card: front matter, how to load it, how it was made, measured and checked."""
    cfg = told.cfg
    matter = yaml.safe_dump(front_matter(told), sort_keys=False, allow_unicode=True)
    return "\n".join(
        [
            f"---\n{matter}---",
            f"# {cfg.name}\n",
            *_use(told),
            *_made(told),
            *_measured(told),
            *_same(told),
            *_verify(told),
        ]
    )


def _use(told: Told) -> list[str]:
    start = told.cfg.export.start
    what = "the base model" if start is Start.model else "a fine-tuned model, its adapter merged"
    return [
        f"Made by ftpipe {__version__}: {what}. It loads with transformers alone.\n",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n",
        'model = AutoModelForCausalLM.from_pretrained("PATH")',
        'tokenizer = AutoTokenizer.from_pretrained("PATH")',
        'turns = [{"role": "user", "content": "Hello"}]',
        "inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, "
        'return_tensors="pt", return_dict=True)',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))\n```\n",
        f"Its chat template is the one it was trained with (`data.template={told.cfg.data.template}`). "
        f"[{NOTES}]({NOTES}) has the licences of what it was made from.\n",
        *(_quantised(told, kind) for kind in told.folders),
    ]


def _quantised(told: Told, kind: Quantized) -> str:
    export = told.cfg.export
    return (
        f"`{kind}/` is the same in {BITS} bits by {kind.upper()}, a scale for {export.group_size} "
        f"inputs, calibrated on up to {export.calibration_rows:,} training rows. vLLM serves it; "
        f'transformers loads it by `subfolder="{kind}"` where compressed-tensors is installed.\n'
    )


def _made(told: Told) -> list[str]:
    cfg, base = told.cfg, hub_model(told.cfg)
    random = "random weights" if cfg.model.init is Init.random else "a local model"
    lines = ["## How it was made\n", f"- recipe: `{cfg.name}`, seed {cfg.seed}"]
    lines += [f"- base model: {f'{base} at commit {cfg.model.revision}' if base else random}"]
    if cfg.data.sources and told.stages:
        lines += ["- data:"]
        for name, source in cfg.data.sources.items():
            where = f"{source.path} at commit {source.revision}" if source.revision else "local rows"
            where = source.path if source.path.startswith(PREFIX) else where
            lines += [f"  - {name}: {where}, format {source.format}"]
    policy = told.inputs.get("policy")
    if policy is not None:
        lines += ["- lineage, the newest first:"]
        for one in lineage(policy):
            lines += [f"  - `{one.path.name}` ({one.kind}), manifest sha256 `{_digest(one)}`"]
    return [*lines, ""]


def _digest(artifact: Artifact) -> str:
    return artifacts.digest(artifact.path / MANIFEST)


def _measured(told: Told) -> list[str]:
    """Return what the stage evaluate found of each policy, and what changed from one to the next."""
    if told.report is None:
        return []
    stored = json.loads((told.report.path / "report.json").read_text(encoding="utf-8"))
    share = f"{stored['confidence']:.0%}"
    lines = [
        "## Measured\n",
        f"| measure | policy | value | {share} interval | n | change | its interval |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, by_policy in stored["measures"].items():
        for policy, one in by_policy.items():
            change = one.get("change")
            moved = ("", "") if change is None else _with_ends(change, "+")
            cells = (name, policy, *_with_ends(one), f"{one['n']:,}", *moved)
            lines.append(f"| {' | '.join(cells)} |")
    for told_of in stored["judgements"]:
        rate = told_of["score"]
        value, ends = ("undecided", "") if rate is None else _with_ends(rate)
        between = f" ({ends})" if ends else ""
        pair = f"{told_of['one']} over {told_of['other']}"
        lines.append(f"\nWin rate of {pair}, judged by {told_of['judge']}: {value}{between}")
    return [*lines, ""]


def _with_ends(score: Mapping[str, Any], sign: str = "") -> tuple[str, str]:
    """Return a value and its interval as text, as ``report.json`` has them."""
    value, low, high = (score[key] for key in ("value", "low", "high"))
    ends = "" if low is None or high is None else f"{low:{sign}.4g} to {high:{sign}.4g}"
    return ("not finite" if value is None else f"{value:{sign}.4g}", ends)


def _same(told: Told) -> list[str]:
    lines = [
        "## Is it the policy that was trained?\n",
        "Both were given the same rows; `parity.json` has more.\n",
        "| file | KL, nats per token | 99th percentile | same likeliest | held-out loss moved by |",
        "|---|---|---|---|---|",
        _row("safetensors", told.parity),
    ]
    for kind, (file, parity) in told.files.items():
        unknown = f"| {file} ({kind}) | not measured: transformers cannot load it | | | |"
        lines += [unknown if parity is None else _row(f"{file} ({kind})", parity)]
    lines += [_row(f"{kind}/", parity) for kind, parity in told.folders.items()]
    return [*lines, ""]


def _row(file: str, found: Parity) -> str:
    moved = "" if found.loss_delta is None else f"{found.loss_delta:+.2g}"
    numbers = f"{found.kl_mean:.2g} | {found.kl_p99:.2g} | {found.agreement:.2%} | {moved}"
    return f"| {file} | {numbers} |"


def _verify(told: Told) -> list[str]:
    run = f"{told.cfg.name}-{artifacts.fingerprint(recorded(told.cfg))[:8]}"
    return [
        "## How to verify it\n",
        "Where the run is kept, its first steps are made again and compared with the record, or all:\n",
        f"```sh\nftpipe verify {run}\nftpipe verify {run} --full",
        f"ftpipe runs lineage {told.bundle}\n```\n",
        f"`{MANIFEST}` beside the weights has the digest of each file, every value of the "
        "configuration, versions and hardware.\n",
    ]
