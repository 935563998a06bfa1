"""Which stages a run has, what each needs and makes, and what would run or be reused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftpipe import artifacts, combinations
from ftpipe.artifacts import Artifact
from ftpipe.choices import SERVES, Init, PreferenceLoss, RewardKind, Start, Use
from ftpipe.config import RunConfig
from ftpipe.data.uses import uses
from ftpipe.errors import ConfigError, UserError, unknown
from ftpipe.evaluate_config import BASE
from ftpipe.pins import MEMORY, PINS, Digests
from ftpipe.schema import plain, recorded
from ftpipe.training_config import REFERENCE_FREE


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline: a pure function of its fingerprint.

    Attributes:
        needs: kinds of artifact it cannot do without; each is the latest one made before it.
        takes: kinds it uses where something before it makes them.
        every: kinds of which it uses all that were made before it: ``policy/sft``, ``policy/dpo``.
        reads: config keys or groups that decide its result.
        learns_from: the uses of rows that a configuration makes it need.
        pins: outside input that decides its result, by content (see ``pins.PINS``).
        all_ranks: whether it runs on every rank, or on one.
        resumes: whether an interrupted build is continued from what it left.
        stops: whether it saves and ends when it is asked to, so that nothing is lost.
        on_gpu: whether it computes where ``launch.device`` says; else a job asks for no GPU.
        keeps: pattern of files that an error leaves and that are worth continuing from.
        unused: which of ``needs``, ``takes``, ``reads`` and ``pins`` a configuration makes no use of.
        version: raised whenever the same input gives another result.
    """

    name: str
    does: str
    makes: str
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    every: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    learns_from: Callable[[RunConfig], Collection[Use]] = lambda cfg: ()
    pins: tuple[str, ...] = ()
    all_ranks: bool = False
    resumes: bool = False
    stops: bool = False
    on_gpu: Callable[[RunConfig], bool] = lambda cfg: True
    keeps: str = ""
    unused: Callable[[RunConfig], Collection[str]] = lambda cfg: ()
    version: int = 1


def table(*stages: Stage) -> dict[str, Stage]:
    return {stage.name: stage for stage in stages}


def _unused_by_evolve(cfg: RunConfig) -> Collection[str]:
    """With a server, the run's own model says nothing in the matter."""
    return (
        ()
        if cfg.evolve.url is None
        else ("base_model", "model", "tokenizer", "launch.precision", "determinism")
    )


def _unused_by_start(start: Start) -> Collection[str]:
    """What comes in is the policy of an earlier stage, which stands for its base, or the base itself."""
    return ("base_model",) if start is Start.policy else ("policy",)


def _unused_by_dpo(cfg: RunConfig) -> Collection[str]:
    free = cfg.dpo.loss in REFERENCE_FREE
    return (*_unused_by_start(cfg.dpo.start), *(("reference_logps",) if free else ()))


def _unused_by_ppo(cfg: RunConfig) -> Collection[str]:
    by_function = cfg.ppo.reward is RewardKind.function
    return (*_unused_by_start(cfg.ppo.start), *(("reward_model",) if by_function else ()))


def _dpo_learns_from(cfg: RunConfig) -> Collection[Use]:
    return (Use.unpaired if cfg.dpo.loss is PreferenceLoss.kto else Use.preferences,)


def _ppo_learns_from(cfg: RunConfig) -> Collection[Use]:
    return (Use.prompts, *((Use.demonstrations,) if cfg.ppo.ptx_weight else ()))


def _unused_by_evaluate(cfg: RunConfig) -> Collection[str]:
    """Policies that are not asked for, and a reward model that does not judge."""
    wanted, judge = cfg.evaluate.policies, cfg.evaluate.judge
    left_out = [f"policy/{name}" for name in cfg.stages if wanted and name not in wanted]
    judged = judge.reward and judge.reward_model is None
    return (*left_out, *(() if judged else ("reward_model",)))


def _unused_by_export(cfg: RunConfig) -> Collection[str]:
    # a policy comes with its tokenizer, and what it was made of is in its fingerprint
    own = ("model", "tokenizer") if cfg.export.start is Start.policy else ("adapter.dtype",)
    whole = () if cfg.export.quantize else FOUR_BITS
    return (*_unused_by_start(cfg.export.start), *own, *whole)


# What export.quantize alone makes use of.
FOUR_BITS = ("export.quantize", "export.group_size", "export.calibration_rows", "quantizer")
# Whether the base is in 4 bits, and how: all that an adapter's settings say of a model as it comes in.
QUANTIZED = ("adapter.method", "adapter.quantization", "adapter.double_quantization")

STAGES = table(
    Stage(
        "model",
        does="writes an ordinary model folder from a GGUF file or from random weights",
        makes="base_model",
        reads=("model.init", "model.architecture", "model.trust_remote_code"),
        on_gpu=lambda cfg: False,
        pins=("model", "tokenizer"),
    ),
    Stage(
        "evolve",
        does="evolves seed instructions into harder and rarer ones, with answers (Evol-Instruct)",
        makes="evolved",
        takes=("base_model",),
        reads=("determinism", "evolve", "model", "launch.precision"),
        pins=("seeds", "model", "tokenizer"),
        on_gpu=lambda cfg: cfg.evolve.url is None,
        resumes=True,
        stops=True,
        keeps="journal.jsonl",
        unused=_unused_by_evolve,
        version=2,
    ),
    Stage(
        "prepare",
        does="turns rows into token ids and a mask of what is learned",
        makes="dataset",
        takes=("base_model", "evolved"),
        reads=("data", "model.trust_remote_code", "model.new_tokens"),
        on_gpu=lambda cfg: False,
        pins=("data", "tokenizer"),
        version=4,
    ),
    Stage(
        "sft",
        does="supervised fine-tuning: all weights, LoRA or QLoRA",
        makes="policy",
        needs=("dataset",),
        takes=("base_model",),
        reads=("determinism", "model", "adapter", "sft", "launch.precision", "launch.tf32"),
        learns_from=lambda cfg: (Use.demonstrations,),
        pins=("model",),
        all_ranks=True,
        resumes=True,
        stops=True,
        version=2,
    ),
    Stage(
        "merge",
        does="writes the policy's adapter into its base: an ordinary model folder",
        makes="policy",
        needs=("policy",),
        reads=("model.dtype", "model.trust_remote_code", "launch.precision", *QUANTIZED),
    ),
    Stage(
        "reward",
        does="learns from ranked replies what people prefer, and reports how well it knows",
        makes="reward_model",
        needs=("dataset", "policy"),
        takes=("base_model",),
        reads=("determinism", "model", "adapter", "reward", "launch.precision", "launch.tf32"),
        learns_from=lambda cfg: (Use.preferences,),
        pins=("model",),
        all_ranks=True,
        resumes=True,
        stops=True,
        unused=lambda cfg: _unused_by_start(cfg.reward.start),
    ),
    Stage(
        "reference",
        does="computes the reference's log-probabilities of every reply once, for dpo to reuse",
        makes="reference_logps",
        needs=("dataset", "policy"),
        takes=("base_model",),
        reads=("determinism", "model", "dpo.start", "launch.precision", "launch.tf32", *QUANTIZED),
        learns_from=_dpo_learns_from,
        pins=("model",),
        all_ranks=True,
        unused=lambda cfg: _unused_by_start(cfg.dpo.start),
    ),
    Stage(
        "dpo",
        does="direct preference optimisation and its family: learns from preferences without a reward",
        makes="policy",
        needs=("dataset", "policy"),
        takes=("base_model", "reference_logps"),
        reads=("determinism", "model", "adapter", "dpo", "launch.precision", "launch.tf32"),
        learns_from=_dpo_learns_from,
        pins=("model",),
        all_ranks=True,
        resumes=True,
        stops=True,
        unused=_unused_by_dpo,
    ),
    Stage(
        "ppo",
        does="proximal policy optimisation: raises the reward of the policy's own answers",
        makes="policy",
        needs=("dataset", "policy", "reward_model"),
        takes=("base_model",),
        reads=("determinism", "model", "adapter", "ppo", "launch.precision", "launch.tf32"),
        learns_from=_ppo_learns_from,
        pins=("model",),
        all_ranks=True,
        resumes=True,
        stops=True,
        keeps="checkpoints/*/state.json",
        unused=_unused_by_ppo,
    ),
    Stage(
        "evaluate",
        does="measures every policy of the run on the same rows and questions, before and after",
        makes="report",
        takes=("dataset", "base_model", "reward_model"),
        every=("policy",),
        reads=(
            *("determinism", "evaluate", "model", "adapter.dtype", *QUANTIZED, "data.template"),
            *("launch.precision", "launch.tf32"),
        ),
        pins=("evaluation", "benchmarks", "model", "tokenizer"),
        resumes=True,
        stops=True,
        keeps="kept/*",
        unused=_unused_by_evaluate,
        version=2,
    ),
    Stage(
        "export",
        does="writes the policy as a folder that others load, compared with what was trained",
        makes="bundle",
        needs=("policy",),
        takes=("base_model", "dataset", "report"),
        reads=(
            *("determinism", "export", "data.template", "adapter.dtype", "launch.precision"),
            *("model.dtype", "model.attention", "model.trust_remote_code", "model.license", *QUANTIZED),
            "data.sources",
        ),
        pins=("model", "tokenizer", "converter", "quantizer"),
        unused=_unused_by_export,
    ),
)

RECORD = "artifacts.json"  # of a run: the artifact that each of its stages stands for

# Where an input lies is provenance; its content is pinned.
PLACED = ("model.", "data.sources.", "data.decontaminate.", "evolve.seeds.", "evaluate.")
PINNED_KEYS = ("path", "revision", "tokenizer", "tokenizer_revision", "reward_model")
TASK_FILES = re.compile(r"evaluate\.harness\.tasks\.[^.]+\.files\.")
# Changes what is shown or kept on the way, not what comes out.
UNREAD_KEYS = (
    *(f"{stage}.log_every" for stage in ("sft", "reward", "dpo", "ppo")),
    *(f"ppo.health.{key}" for key in ("max_kl", "min_entropy", "min_eos_rate", "patience")),
    *("ppo.ignore_gate", "ppo.generation_batch_size"),
    *(f"reward.gate.{key}" for key in ("confidence", "min_accuracy", "max_length_correlation")),
    *("evolve.url", "evolve.api_key_env", "evolve.min_kept"),
    *("evolve.concurrency", "evolve.timeout", "evolve.retries"),
    *("evaluate.judge.url", "evaluate.judge.api_key_env", "evaluate.generation_batch_size"),
    *(f"evaluate.judge.{key}" for key in ("concurrency", "timeout", "retries")),
    *("evaluate.harness.batch_size", "evaluate.mmlu.batch_size"),
    *("export.push", "export.public", "export.converter", "export.quantizer"),
)


@dataclass(frozen=True)
class Step:
    """A stage placed in a run: its inputs, its fingerprint, and the artifact if there is one."""

    stage: Stage
    inputs: Mapping[str, str]  # kind, or kind/step of several -> name of the step that makes it
    fingerprint: str
    place: Path
    artifact: Artifact | None
    facts: Mapping[str, Any] = field(repr=False, default_factory=dict)


def stage_names(cfg: RunConfig) -> list[str]:
    """Return the run's stages; the base model is made first where it is no ordinary folder."""
    made = cfg.model.init is Init.random or str(cfg.model.path).endswith(".gguf")
    first = ["model"] if made and cfg.stages and "model" not in cfg.stages else []
    return [*first, *cfg.stages]


def check_stages(names: Sequence[str], cfg: RunConfig) -> None:
    """Refuse a list of stages that cannot run in this order.

    Raises:
        ConfigError: for an unknown or repeated stage, or a need that nothing before it makes.
    """
    if not names:
        raise ConfigError(f"stages is empty; choose from {', '.join(STAGES)}.")
    cfg.launch.slurm.check_names(STAGES)
    made: set[str] = set()
    for at, name in enumerate(names):
        if name not in STAGES:
            raise ConfigError("stages: " + unknown("stage", name, STAGES))
        if name in names[:at]:
            raise ConfigError(f"stages: '{name}' appears twice.")
        for kind in STAGES[name].needs:
            if kind not in made and kind not in STAGES[name].unused(cfg):
                makers = [f"'{other.name}'" for other in STAGES.values() if other.makes == kind]
                starts = kind == "policy" and hasattr(getattr(cfg, name, None), "start")
                other_way = f", or set {name}.start=model to start from the base model" if starts else ""
                raise ConfigError(
                    f"stages: '{name}' needs a {kind}, but nothing before it makes one. "
                    f"Put {' or '.join(makers)} earlier in `stages`{other_way}."
                )
        if "policy" in STAGES[name].every:
            _check_policies(cfg, names[:at])
        made.add(STAGES[name].makes)


def _check_policies(cfg: RunConfig, before: Sequence[str]) -> None:
    """Refuse a policy to evaluate, or to judge, that nothing makes by then.

    Raises:
        ConfigError: with the names that there are.
    """
    evaluate = cfg.evaluate
    known = [BASE, *(name for name in before if STAGES[name].makes == "policy")]
    for name in evaluate.policies:
        if name not in known:
            raise ConfigError("evaluate.policies: " + unknown("policy", name, known))
    judged = [name for name in known if name in (evaluate.policies or known)]
    for name in evaluate.answers:
        if name in known:
            raise ConfigError(f"evaluate.answers.{name} has the name of a policy; rename it.")
    for name in (name for pair in evaluate.judge.pairs for name in pair.split(":")):
        if name not in (*judged, *evaluate.answers):
            why = unknown("policy", name, [*judged, *evaluate.answers])
            raise ConfigError(f"evaluate.judge.pairs: {why}")


def check_uses(cfg: RunConfig, names: Sequence[str]) -> None:
    """Refuse stages that would find no rows of the use they learn from.

    Raises:
        ConfigError: saying which source could serve it.
    """
    served = {use for source in cfg.data.sources.values() for use in uses(source)}
    if "evolve" in names:
        served.add(Use.demonstrations)
    wanted = [(name, use) for name in names for use in STAGES[name].learns_from(cfg)]
    for stage, use in wanted:
        if use in served:
            continue
        able = [name for name, source in cfg.data.sources.items() if use in SERVES[source.format]]
        remedy = (
            f"set data.sources.{able[0]}.use=[{','.join((*uses(cfg.data.sources[able[0]]), use))}]"
            if able
            else f"add one, such as of format {next(one for one in SERVES if SERVES[one][0] is use)}"
        )
        raise ConfigError(f"'{stage}' learns from {use}, but no source serves them; {remedy}.")


def plan(cfg: RunConfig, upto: str | None = None, elsewhere: bool = False) -> list[Step]:
    """Return the steps of a run in order, each with its fingerprint. Loads nothing.

    Args:
        upto: the last stage wanted; None for all of them.
        elsewhere: they run as jobs, not on this machine.

    Raises:
        ConfigError: if the stages do not fit together, or ``upto`` is not among them.
        DataError, ModelError: if an input is missing or cannot be used.
    """
    names = stage_names(cfg)
    check_stages(names, cfg)
    check_uses(cfg, names)
    if upto is not None:
        if upto not in names:
            raise ConfigError(
                f"the recipe '{cfg.name}' has no stage '{upto}'; its stages are {', '.join(names)}."
            )
        names = names[: names.index(upto) + 1]
    combinations.check(cfg, names, elsewhere)
    root = Path(cfg.output)
    digests = Digests(_memory(cfg))
    latest: dict[str, Step] = {}
    steps: list[Step] = []
    for name in names:
        stage = STAGES[name]
        unused = stage.unused(cfg)
        kinds = [kind for kind in (*stage.needs, *stage.takes) if kind not in unused]
        inputs = {kind: latest[kind] for kind in kinds if kind in latest}
        inputs |= {
            place: step
            for step in steps
            if step.stage.makes in stage.every
            and (place := f"{step.stage.makes}/{step.stage.name}") not in unused
        }
        _check_reference(inputs)
        facts = _facts(cfg, stage, inputs, digests)
        print_ = artifacts.fingerprint(facts)
        step = Step(
            stage=stage,
            inputs={kind: maker.stage.name for kind, maker in inputs.items()},
            fingerprint=print_,
            place=artifacts.place(root, name, print_),
            artifact=artifacts.find(root, name, print_),
            facts=facts,
        )
        latest[stage.makes] = step
        steps.append(step)
    digests.save()
    return steps


def _check_reference(inputs: Mapping[str, Step]) -> None:
    """Refuse log-probabilities of another policy than the one that comes in.

    Raises:
        ConfigError: saying which policy they are of.
    """
    reference, policy = inputs.get("reference_logps"), inputs.get("policy")
    if reference is not None and policy is not None:
        of = reference.inputs.get("policy")
        if of != policy.stage.name:
            raise ConfigError(
                f"stages: 'reference' computes the log-probabilities of the policy of '{of}', but the "
                f"one that comes in is that of '{policy.stage.name}'; put 'reference' before 'dpo'."
            )


def _facts(cfg: RunConfig, stage: Stage, inputs: Mapping[str, Step], digests: Digests) -> dict[str, Any]:
    """Return everything that decides the stage's result; its hash is the fingerprint."""
    pins: dict[str, str] = {}
    unused = stage.unused(cfg)
    for pin in stage.pins:
        if pin in unused:
            continue
        if pin in ("model", "tokenizer") and "base_model" in inputs:
            continue  # the input artifact's fingerprint says it
        pins |= {f"{pin}/{name}": value for name, value in PINS[pin](cfg, digests).items()}
    return {
        "stage": stage.name,
        "version": stage.version,
        "seed": cfg.seed,
        "config": read_keys(cfg, stage),
        "pins": pins,
        "inputs": {kind: step.fingerprint for kind, step in inputs.items()},
    }


def changed_data(cfg: RunConfig, step: Step) -> list[str]:
    """Return the keys of outside input that is other than when the step was planned.

    A file that is gone by now was open, so it was read as it was.
    """
    planned: Mapping[str, str] = step.facts["pins"]
    changed = []
    for pin in dict.fromkeys(name.partition("/")[0] for name in planned):
        try:
            now = PINS[pin](cfg, Digests(_memory(cfg)))
        except UserError:
            continue
        changed += [
            f"{pin}/{name}" for name, value in now.items() if planned.get(f"{pin}/{name}") != value
        ]
    return [re.sub(r"^data/(decontaminate)?/?\d+/", _group, name) for name in changed]


def _group(place: re.Match[str]) -> str:
    return f"data.{place.group(1) or 'sources'}."


def _memory(cfg: RunConfig) -> Path:
    """Return where digests of files are remembered."""
    return Path(cfg.output) / "artifacts" / MEMORY


def read_keys(cfg: RunConfig, stage: Stage) -> dict[str, Any]:
    """Return the config values that decide the stage's result, by dotted key."""
    flat = dict(_flatten(plain(cfg)))
    if cfg.model.init is Init.pretrained:  # then the architecture only tells smoke what to shrink
        flat = {key: value for key, value in flat.items() if key[:19] != "model.architecture."}
    unused = stage.unused(cfg)
    reads = [read for read in stage.reads if read not in unused]
    return {
        key: value
        for key, value in flat.items()
        if any(key == read or key.startswith(f"{read}.") for read in reads)
        and key not in UNREAD_KEYS
        and key not in unused
        and not is_pinned(key)
        # a licence is written into what is exported, and decides no weight
        and (stage.makes == "bundle" or not key.endswith(".license"))
    }


def is_pinned(key: str) -> bool:
    """Whether a key says where an input lies."""
    pinned = key.rpartition(".")[2] in PINNED_KEYS or TASK_FILES.match(key) is not None
    return key.startswith(PLACED) and pinned


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def run_folder(cfg: RunConfig) -> Path:
    """Return the folder of a run.

    Its name holds a digest of the resolved configuration, so that repeating a command comes back to the
    same run.
    """
    return Path(cfg.output) / "runs" / f"{cfg.name}-{artifacts.fingerprint(recorded(cfg))[:8]}"


def write_run(cfg: RunConfig, text: str) -> Path:
    """Write ``run.yaml`` into the run's folder and return the folder.

    Raises:
        UserError: if the output folder cannot be written.
    """
    folder = run_folder(cfg)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        artifacts.write_atomic(folder / "run.yaml", text)  # also over one that was edited
    except OSError as error:
        raise artifacts.cannot_write(Path(cfg.output), error) from None
    return folder


def record(run: Path, steps: Sequence[Step]) -> None:
    """Write which artifact each stage of the run stands for, as ``run/artifacts.json``.

    Stages beyond these stay listed where these are what they were: the command may have asked for less.
    """
    names = {step.stage.name: step.place.name for step in steps}
    before = listed(run)
    if names.items() <= before.items():
        names = before
    artifacts.write_atomic(run / RECORD, json.dumps(names, indent=1) + "\n")


def listed(run: Path) -> dict[str, str]:
    """Return the name of the artifact of each stage of a run; nothing where none is told."""
    try:
        names = json.loads((run / RECORD).read_text(encoding="utf-8"))
        return {str(stage): str(name) for stage, name in names.items()}
    except (OSError, ValueError, AttributeError):  # not there, or damaged: the run is planned anew
        return {}
