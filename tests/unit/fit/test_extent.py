"""Steps, tokens, disk and time, against what is counted by hand."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from ftpipe.artifacts import Artifact
from ftpipe.choices import Format, Method, OverLength, Part, PreferenceLoss, Start, Use
from ftpipe.config import RunConfig
from ftpipe.data.ledger import Account, Tally, as_dict
from ftpipe.data.table import SCHEMAS, Writer, place
from ftpipe.fit.extent import Extent, Rows, extent, per_token, rows_of
from ftpipe.fit.model import model_of
from ftpipe.fit.training import training_of
from tests.unit.fit.made import run

WEIGHTS = 6_738_415_616
ROWS = [{"instruction": "a", "output": "b"}] * 40


def of(cfg: RunConfig, dataset: Artifact | None = None, stage: str = "sft") -> Extent:
    return extent(cfg, training_of(cfg, stage, model_of(cfg.model)), dataset)


@pytest.fixture(params=["rows.json", "rows.jsonl", "rows.jsonl.gz"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / str(request.param)
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    text = json.dumps(ROWS) if path.suffix == ".json" else lines
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def dataset(folder: Path, rows: int, tokens: int) -> Artifact:
    account = Account(train=Tally(rows, tokens, tokens))
    other = Account(train=Tally(9, 90, 9), validation=Tally(2, 20, 2))
    book = as_dict({("rows", Use.demonstrations): account, ("rows", Use.prompts): other})
    (folder / "ledger.json").write_text(json.dumps(book))
    return Artifact("dataset", "prepare", "0", folder, {})


def test_before_prepare_rows_of_a_file_are_a_bound(file: Path) -> None:
    cfg = run(file=file, data__validation=0.25, sft__epochs=2.0, sft__batch_size=16)
    assert rows_of(cfg, "sft", None) == Rows(30, 30 * 1024, exact=False, held=10)
    told = of(cfg)
    assert (told.steps, told.steps_exact) == (2 * 2, False)  # two batches hold 30 rows
    assert told.tokens == 4 * 16 * 1024


def test_rows_that_a_source_leaves_out_are_not_counted(file: Path) -> None:
    cfg = run(file=file, data__validation=4)
    cfg.data.sources["rows"].count = 10
    assert rows_of(cfg, "sft", None) == Rows(6, 6 * 1024, exact=False, held=4)


def test_once_the_dataset_is_made_its_ledger_says(tmp_path: Path) -> None:
    cfg = run(sft__epochs=3.0, sft__batch_size=16)
    told = of(cfg, dataset(tmp_path, rows=33, tokens=3300))
    assert (told.steps, told.steps_exact, told.tokens_exact) == (9, True, True)
    assert told.tokens == 3 * 3300  # empty rows fill the last step of each epoch


def test_rows_of_a_hub_are_not_known_here() -> None:
    cfg = run(file="someone/rows")
    told = of(cfg)
    assert told.steps is told.tokens is told.operations is None
    assert told.hours(100.0, 0.5, 1) is None
    cfg.sft.max_steps = 7
    assert (of(cfg).steps, of(cfg).steps_exact, of(cfg).tokens_exact) == (7, True, False)


def test_rows_that_are_still_to_be_evolved_are_not_known(file: Path) -> None:
    cfg = run(file=file, stages=["evolve", "prepare", "sft"])
    assert rows_of(cfg, "sft", None) is None


def test_rows_of_which_several_may_come_are_no_bound(file: Path) -> None:
    split = run(file=file, data__over_length=OverLength.split)
    assert rows_of(split, "sft", None) is None
    ranked = run(file=file)
    ranked.data.sources["rows"].format = Format.ultrafeedback
    ranked.data.sources["rows"].use = [Use.preferences]
    assert rows_of(ranked, "dpo", None) is None
    assert rows_of(ranked, "reward", None) == Rows(38, 38 * 1024, exact=False, held=2)
    pairs = run(file=file, dpo__loss=PreferenceLoss.kto)
    pairs.data.sources["rows"].format = Format.preference
    pairs.data.sources["rows"].use = [Use.unpaired]
    assert rows_of(pairs, "dpo", None) == Rows(76, 76 * 1024, exact=False, held=4)


@pytest.fixture
def ranked(tmp_path: Path) -> Artifact:
    """A dataset of five prompts whose four replies are compared in six pairs each; two are held out."""
    account = Account(train=Tally(5, 5 * 4 * 50, 0), validation=Tally(2, 2 * 4 * 50, 0))
    (tmp_path / "ledger.json").write_text(json.dumps(as_dict({("rows", Use.preferences): account})))
    for part, prompts in ((Part.train, 5), (Part.validation, 2)):
        row: dict[str, Any] = {key: [] for key in SCHEMAS[Use.preferences].names}
        row |= {"source": "rows", "row": 0, "length": 50, "pairs": [0, 1] * 6}
        path = place(tmp_path, Use.preferences, part)
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = Writer(path, SCHEMAS[Use.preferences])
        writer.write(pa.RecordBatch.from_pylist([row] * prompts, SCHEMAS[Use.preferences]))
        writer.close()
    return Artifact("dataset", "prepare", "0", tmp_path, {})


def test_a_row_of_reward_is_a_prompt_and_one_of_dpo_a_pair(ranked: Artifact) -> None:
    cfg = run(reward__batch_size=2, dpo__batch_size=2, reward__epochs=1.0, dpo__epochs=1.0)
    reward, dpo = of(cfg, ranked, "reward"), of(cfg, ranked, "dpo")
    assert (reward.steps, dpo.steps) == (3, 15)
    assert (reward.tokens, dpo.tokens) == (5 * 4 * 50, 15 * 2 * 2 * 1024)
    assert reward.steps_exact and dpo.steps_exact
    assert not reward.tokens_exact and not dpo.tokens_exact


def test_the_reference_is_asked_once_for_every_reply(ranked: Artifact) -> None:
    cfg = run(stages=["prepare", "reference", "dpo"], dpo__start=Start.model)
    told = of(cfg, ranked, "reference")
    assert told.steps is None and told.tokens == (30 + 12) * 2 * 1024
    weights, attention = WEIGHTS - 32000 * 4096, 32 * 4096 * 1024
    assert told.operations == told.tokens * (2 * weights + 4 * attention)
    assert told.hours(100.0, 0.5, 1) is not None


def test_dpo_is_charged_for_a_reference_that_it_asks() -> None:
    def cost(*stages: str, loss: PreferenceLoss = PreferenceLoss.sigmoid) -> float:
        cfg = run(stages=["prepare", *stages, "dpo"], dpo__start=Start.model, dpo__loss=loss)
        return per_token(training_of(cfg, "dpo", model_of(cfg.model)))

    asked = cost()
    assert cost("reference") == cost(loss=PreferenceLoss.simpo) == pytest.approx(asked * 3 / 4)


def test_a_rollout_is_a_step_of_ppo(tmp_path: Path) -> None:
    cfg = run(ppo__batch_size=4, ppo__answers_per_prompt=2, ppo__ppo_epochs=3, ppo__max_new_tokens=28)
    cfg.data.max_length = 100
    told = of(cfg, dataset(tmp_path, 1, 1), "ppo")
    assert told.steps == 5  # nine prompts, twice each, four at a time
    assert told.tokens == 5 * 4 * 3 * 128
    assert not told.whole


def test_a_trained_weight_costs_six_operations_a_token_and_a_frozen_one_four() -> None:
    # arXiv:2204.02311, appendix B: 6 N + 12 L H Q T; the embedding is looked up, not multiplied
    def cost(method: Method, **changed: Any) -> float:
        cfg = run(method, **changed)
        return per_token(training_of(cfg, "sft", model_of(cfg.model)))

    weights, attention = WEIGHTS - 32000 * 4096, 32 * 4096 * 1024
    assert cost(Method.full) == 6 * weights + 12 * attention
    assert cost(Method.lora) == pytest.approx(cost(Method.full) * 2 / 3)
    assert cost(Method.full, sft__gradient_checkpointing=True) == cost(Method.full) * 4 / 3


def test_hours_follow_from_operations() -> None:
    told = Extent(1, 1.0, 3600 * 50e12 * 4, False, False, 0.0)
    assert told.hours(100.0, 0.5, 2) == pytest.approx(2.0)


def test_disk_holds_the_artifact_and_the_checkpoints_that_stay() -> None:
    plain = of(run(file="someone/rows"))
    assert plain.disk == 4 * WEIGHTS
    kept = of(run(file="someone/rows", sft__save_every=10, sft__keep_checkpoints=3))
    assert kept.disk == 4 * WEIGHTS + 3 * 12 * WEIGHTS
