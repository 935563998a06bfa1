"""Who may import whom (docs: DESIGN, "Who may import whom"), read from the source by AST."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import ftpipe
from ftpipe.pipeline import STAGES

ROOT = Path(ftpipe.__file__).parent
HEAVY = {
    *("torch", "transformers", "tokenizers", "datasets", "trl", "peft", "accelerate", "deepspeed"),
    *("bitsandbytes", "safetensors", "pyarrow", "numpy", "wandb", "liger_kernel", "gguf", "hydra"),
    *("datasketch", "lm_eval"),
}
# The driver composes, plans and launches; the work below it knows nothing of that.
DRIVER = {"cli", "compose", "doctor", "launch", "pipeline", "resolve", "seeds", "smoke", "worker"}
DRIVER |= {f"cluster.{name}" for name in ("job", "script", "status", "submit")}
DRIVER |= {f"lock.{name}" for name in ("hold", "hub", "record")}
# What looks at runs, too: it plans, asks the plan what a run refers to, makes its stages again.
LOOKS = ("diff", "runs", "serving", "verify")
LIGHT = (
    "cli",
    "diff.command",
    "runs.command",
    "serving.verb",
    "pipeline",
    "pins",
    "artifacts",
    "launch",
    "config",
    "benchmark_config",
    "training_config",
    "ppo_config",
    "slurm_config",
    "evaluate_config",
    "evaluation.prompts",
    "cluster.job",
    "cluster.ranks",
    "cluster.script",
    "cluster.status",
    "cluster.submit",
    "stopping",
    "choices",
    "schema",
    "smoke",
    "errors",
    "home",
    "origins",
    "resolve",
    "lock.record",
    "lock.hub",
    "lock.hold",
    "fit.show",
    "inspect.options",
    "worker",
)


@dataclass(frozen=True)
class Import:
    name: str  # dotted, as far as it names a module
    at_once: bool  # runs when the module is imported, not in a function


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


FILES = {module_name(file): file for file in ROOT.rglob("*.py")}
DRIVER |= {name for name in FILES if name.split(".")[0] in LOOKS}
DRIVER |= {"fit.advice", "fit.extent", "fit.show"}  # they ask the plan and what goes together


@functools.cache
def imports(module: str) -> list[Import]:
    return list(_imports(ast.parse(FILES[module].read_text(encoding="utf-8")), at_once=True))


def _imports(node: ast.AST, at_once: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, at_once) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            for alias in child.names:
                whole = f"{child.module}.{alias.name}"
                is_module = whole.removeprefix("ftpipe.") in FILES
                yield Import(whole if is_module else str(child.module), at_once)
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _imports(child, at_once and not inside)


def own(module: str, at_once: bool = False) -> set[str]:
    """Return the modules of ftpipe that a module imports, by their name within ftpipe."""
    return {
        found.name.removeprefix("ftpipe").removeprefix(".")
        for found in imports(module)
        if found.name.split(".")[0] == "ftpipe" and (found.at_once or not at_once)
    }


def foreign(module: str, at_once: bool = False) -> set[str]:
    return {
        found.name.split(".")[0]
        for found in imports(module)
        if found.name.split(".")[0] != "ftpipe" and (found.at_once or not at_once)
    }


def reached(module: str) -> set[str]:
    """Return a module and all it imports at once, through others too."""
    seen: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += own(name, at_once=True) & set(FILES)
    return seen


STAGE_MODULES = sorted(
    name for name in FILES if name.startswith("stages.") and FILES[name].name != "__init__.py"
)


def test_the_reader_of_imports_sees_what_is_there() -> None:
    # known by eye, so that the tests below cannot pass for want of sight
    assert {"artifacts", "config", "modeling", "tracking"} <= own("stages.sft")
    assert {"transformers", "trl"} <= foreign("stages.sft", at_once=True)
    assert "torch" in foreign("doctor") and "torch" not in foreign("doctor", at_once=True)
    assert "compose" in own("resolve") and "compose" not in own("resolve", at_once=True)
    assert "data.ledger" in own("stages.prepare")
    assert "torch" in {
        name for part in reached("stages.model") - {"stages.model"} for name in foreign(part)
    }


@pytest.mark.parametrize(
    ("library", "where"),
    [
        ("hydra", {"compose"}),
        ("omegaconf", {"config", "schema", "compose"}),
        ("wandb", {"tracking"}),
        ("fastapi", {"serving.endpoint"}),
        ("uvicorn", {"serving.server"}),
    ],
)
def test_a_library_stays_where_it_belongs(library: str, where: set[str]) -> None:
    assert {module for module in FILES if library in foreign(module)} == where


@pytest.mark.parametrize("stage", STAGE_MODULES)
def test_stages_never_import_each_other_nor_the_driver(stage: str) -> None:
    assert not own(stage) & {*STAGE_MODULES, "stages"}
    assert not own(stage) & DRIVER


@pytest.mark.parametrize("module", sorted(set(FILES) - DRIVER))
def test_what_works_knows_nothing_of_what_drives(module: str) -> None:
    assert not own(module) & DRIVER


@pytest.mark.parametrize("module", sorted(FILES))
def test_nobody_imports_the_ends(module: str) -> None:
    # the worker imports its stage by the name in the job
    assert not own(module) & {"cli", "worker", "stages", *STAGE_MODULES}


def test_no_module_imports_itself_through_others() -> None:
    for module in FILES:
        for other in own(module):
            assert module not in reached(other) or other == "", f"{module} -> {other} -> {module}"


@pytest.mark.parametrize("module", LIGHT)
def test_what_plans_loads_nothing_heavy(module: str) -> None:
    for part in reached(module):
        assert not foreign(part, at_once=True) & HEAVY, part


def test_the_worker_needs_nothing_of_the_command_line() -> None:
    assert not reached("worker") & {"cli", "compose", "doctor", "smoke"}


def test_every_stage_has_its_row_and_every_row_its_stage() -> None:
    assert [f"stages.{name}" for name in sorted(STAGES)] == STAGE_MODULES
    assert all(stage.name == name for name, stage in STAGES.items())


@pytest.mark.parametrize("stage", STAGE_MODULES)
def test_every_stage_has_the_one_signature(stage: str) -> None:
    tree = ast.parse(FILES[stage].read_text(encoding="utf-8"))
    (run,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "run"]
    assert ast.unparse(run.args) == "cfg: RunConfig, inputs: Mapping[str, Artifact], out: Path"
    assert run.returns is not None and ast.unparse(run.returns) == "dict[str, float]"


@pytest.mark.parametrize("module", sorted(FILES))
def test_every_module_says_what_it_is_for(module: str) -> None:
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    assert module == "" or ast.get_docstring(tree)


def test_no_module_is_called_by_a_word_that_says_nothing() -> None:
    empty = {"utils", "util", "helpers", "helper", "common", "base", "manager", "misc"}
    assert not {name.split(".")[-1] for name in FILES} & empty
