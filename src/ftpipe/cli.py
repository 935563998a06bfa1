"""The ``ftpipe`` command: compose the configuration, check it, hand over."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ftpipe import __version__, artifacts, origins, pipeline, provenance, schema, seeds, stopping
from ftpipe.config import RunConfig
from ftpipe.errors import ConfigError, UserError, unknown
from ftpipe.export import push
from ftpipe.launch import StageFailed, run_stage
from ftpipe.lock import record
from ftpipe.pipeline import STAGES, Step
from ftpipe.resolve import Resolved, recipe_list, resolved, to_lock
from ftpipe.room import is_full
from ftpipe.stopping import AGAIN, Stopped
from ftpipe.summary import summary

SLURM = "launch=slurm"  # a launch that is submitted
USAGE = """\
ftpipe {version}: a reproducible fine-tuning pipeline

usage: ftpipe VERB recipe=NAME [key=value ...] [-m]

  run       run every stage of the recipe; what is already made is reused
{stages}
  plan      show what would run or be reused, what it needs, and the resolved values; loads nothing
              launch.gpu=NAME: whether it fits on that GPU, how long it takes, and else what to set
  inspect   show the prepared dataset: ledger, lengths, rows with what is learned in colour
              --row N, --source NAME, --part train|validation|test, --use NAME: of what alone
              --html FILE: as a page, with more rows
  submit    the same as jobs of Slurm, with launch=slurm-...: a job for each stage that is to be made
              --dry-run: show the scripts, submit nothing
  status    what became of the jobs: [RUN], a run's folder; without it the newest
  verify    make a run again from its record and say where the two part: RUN, or an archive of one;
              recipe=NAME: make the recipe and compare it with the trace it ships (--write ships it)
              --steps K: of each training; --full: to its last weight; --stage NAME: this one alone
              --json; --scratch DIR: keep what is made there; launch.KEY=value: what this machine has
  lock      pin the recipe to what its inputs and packages are now: commits, digests, versions
  diff      A B [--json]: what two runs, artifacts or recipes have not in common, and what decided it
              each is a run (its folder, or the beginning of its name), the folder of an artifact, or
              recipe=NAME with its overrides after it; exit code 0: nothing, 1: something
  runs      list what was run, its stages, their states and numbers [--json] [output=PATH]
              show RUN, lineage RUN|ARTIFACT: all about one, and back to its data and base model
              find CONDITION ...: recipe=NAME, fingerprint=ab12, 'sft/held_out_loss<2.0', seed=1, ...
              remove RUN ..., gc: drop runs, then what none refers to; asks, or takes --yes
              export RUN [--to FILE.tar] [--without-inputs], import FILE.tar: as one file
  chat      RUN: talk with its policy, in the terminal or line by line through a pipe [--json]
              --system, --temperature, --top-p, --max-tokens, --seed, --stop TEXT: how it answers
  serve     RUN: behind an OpenAI-compatible endpoint of this machine, http://127.0.0.1:8000/v1
              --port N, --host ADDRESS, --name NAME, --api-key-env VARIABLE, --engine vllm
              of both: RUN is a run, an artifact, a model's folder or recipe=NAME; --stage NAME, of an
              earlier stage; --template NAME, where a folder does not say it; --device cpu|cuda
  recipes   list the recipes
  doctor    show what this machine has

  key=value overrides the recipe, such as sft.learning_rate=1e-4 or data=alpaca
  smoke=true swaps in a tiny random model of the same architecture and sample rows
  -m        runs once for each value of a list, such as seed=0,1,2 or recipe=glob(*)

recipes:
{recipes}"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 2 after a user error, 1 after a failed stage, 75 after a stop."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _main(words)
        sys.stdout.flush()  # so that a reader who went away is met here, not at exit
        return code
    except UserError as error:
        print(f"ftpipe: {error}", file=sys.stderr)
        return 2
    except StageFailed as error:
        print(f"ftpipe: {error}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        print(f"ftpipe: {stopped}", file=sys.stderr)
        return AGAIN
    except KeyboardInterrupt:
        print(
            "ftpipe: interrupted; the same command goes on, from the last checkpoint if there is one",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if not is_full(error, Path.cwd()):
            raise
        print("ftpipe: no room is left; make some, and the same command goes on", file=sys.stderr)
        return 1


def _main(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        print(__version__)
        return 0
    verb, *rest = words
    verbs: dict[str, Callable[[list[str]], int]] = {
        "run": lambda rest: _run(rest, None),
        **{name: lambda rest, name=name: _run(rest, name) for name in STAGES},  # type: ignore[misc]
        "plan": _plan,
        "inspect": _inspect,
        "submit": _submit,
        "status": _status,
        "verify": _verify,
        "lock": _lock,
        "job": _job,
        "diff": _diff,
        "chat": _chat,
        "serve": _serve,
        "runs": _runs,
        "recipes": _recipes,
        "doctor": _doctor,
    }
    if verb not in verbs:
        raise ConfigError(unknown("verb", verb, [name for name in verbs if name != "job"]))
    if "-h" in rest or "--help" in rest:
        print(usage())
        return 0
    return verbs[verb](rest)


def usage() -> str:
    return USAGE.format(
        version=__version__,
        stages="\n".join(
            f"  {stage.name:9} up to this stage: {stage.does}" for stage in STAGES.values()
        ),
        recipes=recipe_list(),
    )


def _recipes(rest: list[str]) -> int:
    if rest:
        raise ConfigError(f"recipes takes no words, but got '{rest[0]}'.")
    print(recipe_list())
    return 0


def _doctor(rest: list[str]) -> int:
    from ftpipe import doctor

    if rest:
        raise ConfigError(f"doctor takes no words, but got '{rest[0]}'.")
    return doctor.main()


def configurations(words: list[str], elsewhere: bool = False) -> list[RunConfig]:
    """Return the configurations alone of what ``resolved`` returns."""
    return [run.cfg for run in resolved(words, elsewhere)]


def _plan(words: list[str]) -> int:
    from ftpipe.fit import show

    made: set[Path] = set()  # by then: an earlier run of this sweep makes it
    job = any(word.startswith(SLURM) for word in words)
    for run in resolved(words, job, judged=True):
        cfg = run.cfg
        # what this machine has is of no account
        steps = run.plan(elsewhere=job or cfg.launch.gpu is not None)
        print(f"{cfg.name}: {len(steps)} stages")
        for step in steps:
            state = "reuse" if step.artifact or step.place in made else "run  "
            print(f"  {state} {step.stage.name:9} {step.place}")
            made.add(step.place)
        names = [step.stage.name for step in steps]
        dataset = next((step.artifact for step in steps if step.stage.makes == "dataset"), None)
        fit = show.lines(cfg, names, dataset)
        print("".join(["\n", *(f"  {line}\n" for line in fit)]) if fit else "", end="")
        text = origins.commented(schema.dump(cfg), run.told)
        print("\n" + "".join(f"  {line}\n" for line in text.splitlines()))
    return 0


def _inspect(words: list[str]) -> int:
    from ftpipe.inspect import options

    chosen, others = options.parse(words)
    run, *more = resolved(others)
    if more:
        raise ConfigError("inspect shows one dataset; leave seeds= and -m out.")
    options.check(chosen, run.cfg)
    made, _, _ = _make(run, run.plan("prepare"), ["ftpipe", "inspect", *words])
    from ftpipe.inspect import show

    show.show(run.cfg, made["prepare"].path, chosen)
    return 0


def _run(words: list[str], upto: str | None) -> int:
    stopping.forget()
    runs = resolved(words)
    plans = [run.plan(upto) for run in runs]  # refuse early: all plans before any run
    for run in runs:
        push.check(run.cfg)
    family: list[tuple[Path, dict[str, artifacts.Artifact]]] = []
    for at, (run, steps) in enumerate(zip(runs, plans, strict=True), start=1):
        if len(runs) > 1:
            print(f"== run {at} of {len(runs)}: {run.cfg.name}", flush=True)
        made, folder, built = _make(run, steps, ["ftpipe", upto or "run", *words])
        print("\n".join(summary(run.cfg, list(made.values())[-1], folder, built)))
        if "export" in made and run.cfg.export.push is not None:
            print(f"pushed:        {push.push(run.cfg, made['export'])}")
        family += [(folder, made)]
        if run.family is not None and len(family) == run.family.seeds:
            print("\n".join(["", *_spread(run.family, family)]))
            family = []
    return 0


def _spread(cfg: RunConfig, runs: list[tuple[Path, dict[str, artifacts.Artifact]]]) -> list[str]:
    """Write and return what several seeds gave."""
    values = seeds.spread([made for _, made in runs])
    path = seeds.write(cfg, [folder for folder, _ in runs], values)
    return [*seeds.table([one.seed for one in seeds.each(cfg)], values), f"  written: {path}"]


def _submit(words: list[str]) -> int:
    from ftpipe.cluster import submit

    rest = [word for word in words if word != "--dry-run"]
    points = [
        submit.Point(run.cfg, run.plan(elsewhere=True), pipeline.run_folder(run.cfg), run.told)
        for run in resolved(rest, elsewhere=True)
    ]
    if any(point.cfg.export.push is not None for point in points):
        raise ConfigError(
            "export.push: jobs push nothing; leave it out here, and push by `ftpipe export`."
        )
    command = ["ftpipe", "submit", *rest]
    print("\n".join(submit.submit(points, command, dry=len(rest) < len(words))))
    return 0


def _status(words: list[str]) -> int:
    from ftpipe.cluster import status

    lines, well = status.of_run(status.chosen(words))
    print("\n".join(lines))
    return 0 if well else 1


def _verify(words: list[str]) -> int:
    from ftpipe.verify import verb

    return verb.main(words)


def _chat(words: list[str]) -> int:
    from ftpipe.serving import verb

    return verb.chat(words)


def _serve(words: list[str]) -> int:
    from ftpipe.serving import verb

    return verb.serve(words)


def _diff(words: list[str]) -> int:
    from ftpipe.diff import command

    return command.main(words, configurations)


def _runs(words: list[str]) -> int:
    from ftpipe.runs import command

    return command.main(words)


def _job(words: list[str]) -> int:
    """Make one stage of a frozen run, as the script of a job asks for: ``job RUN STAGE``."""
    from ftpipe.cluster import job

    if len(words) != 2:
        raise ConfigError("job takes the folder of a run and a stage; `ftpipe submit` makes jobs.")
    artifact, built = job.run(Path(words[0]), words[1])
    print("made" if built else "made already", artifact.path)
    return 0


def _lock(words: list[str]) -> int:
    path, lock = to_lock(words)
    record.write(path, lock, provenance.command(["ftpipe", "lock", *words]))
    pinned = f"{len(lock.inputs)} inputs, {len(lock.files)} files, {len(lock.packages)} packages"
    print(f"{path}: {pinned}; runs of recipe={lock.recipe} are held to it from now on.")
    return 0


def _make(
    resolved: Resolved, steps: list[Step], command: list[str]
) -> tuple[dict[str, artifacts.Artifact], Path, int]:
    """Run or reuse each step; return artifacts by stage, the run's folder, and how many were built."""
    cfg = resolved.cfg
    run = pipeline.write_run(cfg, schema.dump(cfg))
    origins.write(run, resolved.told)
    pipeline.record(run, steps)  # first: what a run refers to is not collected as garbage
    made: dict[str, artifacts.Artifact] = {}  # by stage
    built = 0
    for step in steps:
        inputs = {kind: made[maker] for kind, maker in step.inputs.items()}
        artifact = artifacts.find(Path(cfg.output), step.stage.name, step.fingerprint)
        if artifact is None:
            if stopping.driver_asked():
                raise Stopped(f"'{step.stage.name}' was not begun, as asked; the same command goes on")
            print(f"{step.stage.name}: {step.stage.does}", flush=True)
            artifact, fresh = run_stage(cfg, step, inputs, run, command)
            built += fresh
        else:
            print(f"{step.stage.name}: nothing to do, made already: {artifact.path}", flush=True)
        made[step.stage.name] = artifact
    pipeline.record(run, steps)
    return made, run, built


if __name__ == "__main__":
    sys.exit(main())
