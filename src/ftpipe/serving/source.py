"""Which policy a word stands for: its folder, what it was made with, and how its turns are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ftpipe import pipeline, schema
from ftpipe.artifacts import MANIFEST
from ftpipe.choices import State, TemplateName
from ftpipe.config import RunConfig
from ftpipe.errors import ModelError, UserError, unknown
from ftpipe.resolve import resolved
from ftpipe.runs import find, records
from ftpipe.runs.records import RUN, Piece, Run
from ftpipe.serving.options import Wanted

POLICY, BUNDLE, BASE = "policy", "bundle", "base_model"  # kinds of artifact that can answer
SPEAKS = (POLICY, BUNDLE, BASE)
MODEL_FILES = ("config.json", "adapter_config.json")  # either makes a folder one of a model


@dataclass(frozen=True)
class Source:
    """A policy on disk.

    Attributes:
        name: what clients call it: that of its run with its stage, or of its folder.
        folder: whole weights or an adapter, with a tokenizer.
        cfg: what it was made with; None of a folder that has no record.
        template: how its turns are written.
        kind: of its artifact; None of a folder that has no record.
    """

    name: str
    folder: Path
    cfg: RunConfig | None
    template: TemplateName
    kind: str | None = None


def find_source(wanted: Wanted) -> Source:
    """Return the policy that is to answer. Loads nothing.

    Raises:
        UserError: if there is no such thing, or it has no policy.
    """
    plain = None if wanted.what is None else _plain(Path(wanted.what))
    if plain is not None:
        if wanted.stage is not None:
            raise UserError(f"--stage={wanted.stage}: {wanted.what} is no run and has no stages.")
        return Source(plain.absolute().name, plain, None, wanted.template or TemplateName.tokenizer)
    if wanted.what is None:
        return _of_run(*_recipe(wanted), wanted)
    found = find.anything(wanted.what, wanted.output)
    if isinstance(found, Run):
        return _of_run(found.name, found.pieces, wanted)
    if wanted.stage not in (None, found.stage):
        raise UserError(f"--stage={wanted.stage}: {found.name} is an artifact of stage '{found.stage}'.")
    return _source(found.name, found, wanted)


def _plain(folder: Path) -> Path | None:
    """Return a model's folder that no manifest and no run is in, such as an exported one."""
    recorded = any((folder / name).is_file() for name in (RUN, MANIFEST))
    is_model = any((folder / name).is_file() for name in MODEL_FILES)
    return folder if is_model and not recorded else None


def _recipe(wanted: Wanted) -> tuple[str, Mapping[str, Piece | None]]:
    """Return the run that a recipe stands for, by what lies at its stages' places."""
    run, *_ = resolved(list(wanted.recipe))  # of several seeds the first
    output = Path(run.cfg.output)
    steps = pipeline.plan(run.cfg, elsewhere=True)
    name = pipeline.run_folder(run.cfg).name
    return name, {step.stage.name: records.look(output, step.place.name) for step in steps}


def _of_run(name: str, pieces: Mapping[str, Piece | None], wanted: Wanted) -> Source:
    """Return the policy of a run's stage: the one that is asked for, or the latest."""
    if wanted.stage is not None:
        if wanted.stage not in pieces:
            raise UserError("--stage: " + unknown(f"stage of {name}", wanted.stage, pieces))
        piece = pieces[wanted.stage]
        if piece is None or piece.artifact is None:
            raise UserError(_unmade(wanted, wanted.stage, piece))
        return _source(f"{name}-{wanted.stage}", piece, wanted)
    made = [piece for piece in pieces.values() if piece and piece.artifact]
    policies = [piece for piece in made if piece.artifact and piece.artifact.kind == POLICY]
    makers = [stage for stage in pieces if stage in pipeline.STAGES]
    makers = [stage for stage in makers if pipeline.STAGES[stage].makes == POLICY]
    if not makers:
        raise UserError(f"{wanted.said}: none of its stages makes a policy: {', '.join(pieces)}.")
    latest = pieces[makers[-1]]
    if latest is None or latest.artifact is None:
        raise UserError(_unmade(wanted, makers[-1], latest, policies))
    return _source(name, latest, wanted)


def _unmade(wanted: Wanted, stage: str, piece: Piece | None, others: list[Piece] | None = None) -> str:
    if piece is not None and piece.damage:
        return piece.damage
    state = State.missing if piece is None else piece.state
    earlier = f"; --stage {others[-1].stage} takes the policy before it" if others else ""
    return (
        f"{wanted.said}: '{stage}' is not made (it is {state}); the command that makes it is "
        f"`ftpipe {stage} recipe=NAME`{earlier}."
    )


def _source(name: str, piece: Piece, wanted: Wanted) -> Source:
    """Return a made artifact as a source.

    Raises:
        UserError: if it is no model, its record is damaged, or does not say how turns are written.
    """
    if piece.damage or piece.artifact is None:
        raise UserError(piece.damage or f"{piece.path} is {piece.state}.")
    if piece.artifact.kind not in SPEAKS:
        raise UserError(
            f"{piece.name} is a {piece.artifact.kind}, which cannot answer; give a run, or an artifact "
            f"that is a {', a '.join(SPEAKS[:-1])} or a {SPEAKS[-1]}."
        )
    try:
        cfg = schema.changed(RunConfig(), piece.told("config"))
    except UserError as error:
        raise ModelError(f"{piece.path / MANIFEST}: {error}") from None
    own = piece.artifact.kind == POLICY  # the others' tokenizers say how their turns are written
    template = wanted.template or (cfg.data.template if own else TemplateName.tokenizer)
    return Source(name, piece.path, cfg, template, piece.artifact.kind)
