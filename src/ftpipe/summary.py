"""What a person reads when a run is done: where the result is, its numbers, what to do next."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftpipe import printing
from ftpipe.artifacts import Artifact
from ftpipe.choices import Quantized
from ftpipe.config import RunConfig

ADAPTER = "adapter_config.json"


def summary(cfg: RunConfig, last: Artifact, run: Path, built: int) -> list[str]:
    """Return the lines about the last artifact of a run.

    Args:
        built: how many stages ran.
    """
    lines = [] if built else ["everything was made already; nothing ran."]
    if last.kind == "reward_model":
        return [*lines, "", *_reward(cfg, last, run)]
    if last.kind == "report":
        return [*lines, "", *_evaluation(last, run)]
    about = POLICIES.get(last.stage)
    if about is None:
        return [*lines, "", f"{last.kind}: {last.path}", f"run:     {run}"]
    lines += ["", f"model:         {last.path}"]
    lines += [f"run:           {run}/run.yaml, manifest in {last.path}/manifest.json"]
    lines += about(last.metrics)
    if (last.path / "samples.md").is_file():
        lines += [f"answers:       before and after in {last.path}/samples.md"]
    loader = "AutoPeftModel" if (last.path / ADAPTER).is_file() else "AutoModel"
    return [
        *lines,
        f"next:          load it with {loader}ForCausalLM.from_pretrained('{last.path}'),",
        "               or change a value and run again: only what depends on it is made anew",
    ]


def _losses(metrics: Mapping[str, float]) -> list[str]:
    return [f"training loss: {metrics['loss_first']:.4f} first, {metrics['loss_last']:.4f} last"]


def _sft(metrics: Mapping[str, float]) -> list[str]:
    lines = _losses(metrics)
    if "held_out_loss" in metrics:
        before, after = metrics["held_out_loss_before"], metrics["held_out_loss"]
        perplexity = f"(perplexity {metrics['held_out_perplexity']:.2f})"
        lines += [f"held-out loss: {before:.4f} before, {after:.4f} after {perplexity}"]
    return lines


def _dpo(metrics: Mapping[str, float]) -> list[str]:
    lines = _losses(metrics)
    for name, words in (
        ("loss", "loss"),
        ("reward_accuracy", "pairs whose chosen reply has the higher reward"),
        ("reward_margin", "reward margin"),
        ("logps_accuracy", "pairs whose chosen reply is the likelier one"),
        ("reward_wanted", "reward of wanted replies"),
        ("reward_unwanted", "reward of unwanted replies"),
    ):
        key = f"held_out_{name}"
        if key in metrics:
            before, after = metrics.get(f"{key}_before", 0.0), metrics[key]
            lines += [f"held-out:      {before:.4f} before, {after:.4f} after: {words}"]
    return lines


def _ppo(metrics: Mapping[str, float]) -> list[str]:
    lines = [
        f"score:         {metrics['score_first']:.4f} first, {metrics['score']:.4f} in the last rollout",
        f"KL:            {metrics['kl']:.4f} nats of an answer from the reference",
    ]
    for name, words in (("score", "score"), ("watched", "watched function"), ("length", "tokens")):
        key = f"held_out_{name}"
        if key in metrics:
            before, after = metrics[f"{key}_before"], metrics[key]
            lines += [f"held-out:      {before:.4f} before, {after:.4f} after: {words}"]
    parts = {part: metrics[f"seconds_{part}"] for part in ("rollout", "scoring", "update")}
    whole = sum(parts.values()) or 1.0
    shares = ", ".join(f"{part} {seconds / whole:.0%}" for part, seconds in parts.items())
    return [
        *lines,
        f"time:          {shares} of the last rollout",
        "curves:        curves.png beside it",
    ]


def _merge(metrics: Mapping[str, float]) -> list[str]:
    mean, most = metrics["apart_mean"], metrics["apart_max"]
    lines = [f"merging:       moved log-probs of tokens by {mean:.1e} nats, at most {most:.1e}"]
    if "apart_in_four_bits" in metrics:
        again = metrics["apart_in_four_bits"]
        lines += [f"in 4 bits:     as QLoRA goes on from it, by {again:.1e} nats"]
    return lines


def _export(metrics: Mapping[str, float]) -> list[str]:
    mean, agreed = metrics["kl_mean"], metrics["agreement"]
    lines = [f"exported:      {mean:.1e} nats per token from the policy, {agreed:.2%} same likeliest"]
    if "loss_delta" in metrics:
        lines += [f"held-out loss: moved by {metrics['loss_delta']:+.1e}"]
    lines += [
        f"{_file(name.removesuffix('_kl_mean')) + ':':14} {value:.1e} nats per token from the policy"
        for name, value in metrics.items()
        if name.endswith("_kl_mean")
    ]
    return lines


def _file(kind: str) -> str:
    return f"{kind}/" if kind in list(Quantized) else f"{kind}.gguf"


def _reward(cfg: RunConfig, last: Artifact, run: Path) -> list[str]:
    """Return the lines about a reward model; the gate judges by the thresholds of this run."""
    from ftpipe.reward import gate, measures  # scipy

    metrics, judge = last.metrics, cfg.reward.gate
    stored = gate.stored(last.path)
    verdict, ends = gate.verdict(stored, judge), measures.interval(stored["accuracy"], judge.confidence)
    lines = [f"reward model:  {last.path}", f"run:           {run}/run.yaml", *_losses(metrics)]
    if "held_out_accuracy" in metrics:
        before, after = metrics["held_out_accuracy_before"], metrics["held_out_accuracy"]
        lines += [f"held-out:      accuracy {before:.2%} before, {after:.2%} after"]
    if ends is not None:
        low, high = ends
        share = gate.percent(judge.confidence)
        lines += [f"               its {share} interval from {low:.2%} to {high:.2%}"]
    if "length_correlation" in metrics:
        length = metrics["length_correlation"]
        lines += [f"               correlation of reward and length within a prompt {length:.3f}"]
    failures = verdict.failures or ["passed"]
    lines += [f"gate:          {failure}" for failure in failures]
    return [*lines, f"next:          read {last.path}/report.md, or change a value and run again"]


def _evaluation(last: Artifact, run: Path) -> list[str]:
    """Return the lines about an evaluation: the main measures of each policy, and who wins."""
    stored = json.loads((last.path / "report.json").read_text(encoding="utf-8"))
    rows = [("measure", "policy", "value", "change")]
    for name, by_policy in stored["measures"].items():
        if "/" in name and name.split("/")[0] in ("loss", "perplexity"):
            continue  # of one source
        for policy, one in by_policy.items():
            change = one.get("change")
            moved = f"{_with_ends(change, '+')} over {one['before']}" if change else ""
            rows.append((name, policy, _with_ends(one), moved))
    lines = [f"report:        {last.path}/report.md", f"run:           {run}", ""]
    lines += printing.table(rows, fit=printing.width())
    for told in stored["judgements"]:
        rate = "undecided" if told["score"] is None else _with_ends(told["score"])
        lines += [
            f"{told['one']} over {told['other']}: win rate {rate}, by {told['judge']} "
            f"({told['wins']} won, {told['ties']} tied, {told['losses']} lost, "
            f"{told['unparsable']} unreadable)"
        ]
    return lines


def _with_ends(score: Mapping[str, Any], sign: str = "") -> str:
    """Return a value with its interval, as ``report.json`` has them."""
    value, low, high = (score[key] for key in ("value", "low", "high"))
    if value is None:
        return "not finite"
    text = f"{value:{sign}.4f}"
    return text if low is None or high is None else f"{text} [{low:{sign}.4f}, {high:{sign}.4f}]"


POLICIES = {"sft": _sft, "dpo": _dpo, "ppo": _ppo, "merge": _merge, "export": _export}
