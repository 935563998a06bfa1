"""The loss of each held-out row against plain transformers, and which rows depend on each other."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from ftpipe.choices import Part, Use
from ftpipe.data import table
from ftpipe.evaluation import heldout
from ftpipe.evaluation.heldout import Losses
from ftpipe.evaluation.policies import Loaded
from ftpipe.policy import Incoming
from ftpipe.stopping import FILE, Stopped
from ftpipe.tokenizer import byte_level

from .tiny import config, save

IGNORED = -100


def row(source: str, number: int, prompt: list[int], answer: list[int]) -> dict[str, Any]:
    ids = [*prompt, *answer]
    return {
        "input_ids": ids,
        "labels": [IGNORED] * len(prompt) + answer,
        "length": len(ids),
        "prompt": len(prompt),
        "source": source,
        "row": number,
    }


ROWS = [
    row("a", 1, [5, 6, 7], [8, 9]),
    row("b", 1, [9, 9, 4, 4, 4, 4, 4], [1, 2, 3, 4, 5]),
    row("a", 2, [], [3, 1, 4, 1, 5]),  # the first token of a row is predicted from nothing
    row("a", 3, [7], [7] * 9),
    row("b", 2, [200, 3], [17]),
]


def dataset(folder: Path, part: Part, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa

    schema = table.SCHEMAS[Use.demonstrations]
    writer = table.Writer(table.place(folder, Use.demonstrations, part), schema)
    if rows:
        writer.write(pa.RecordBatch.from_pylist(rows, schema=schema))
    writer.close()


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_the_loss_of_a_row_is_that_of_plain_transformers(empty_folder: Path, batch_size: int) -> None:
    base = save(empty_folder / "base")
    model = Loaded(config(), Incoming(str(base)), byte_level())()
    found = heldout.measure(model, Dataset.from_list(ROWS), 0, batch_size, nullcontext)
    plain = AutoModelForCausalLM.from_pretrained(str(base)).eval()
    for at, one in enumerate(ROWS):
        ids, labels = torch.tensor([one["input_ids"]]), torch.tensor([one["labels"]])
        with torch.no_grad():
            mean = float(plain(ids, labels=labels).loss)  # over the labels that are predicted
        tokens = sum(label != IGNORED for label in one["labels"][1:])
        assert found.tokens[at] == tokens
        assert found.nats[at] == pytest.approx(mean * tokens, rel=1e-5)
    assert found.source == ["a", "b", "a", "a", "b"]
    assert len(set(found.cluster)) == 5


def test_rows_of_one_conversation_or_prompt_are_one_cluster() -> None:
    rows = [
        row("a", 1, [5, 6], [1]),
        row("a", 2, [5, 6], [2]),  # the same prompt as the first
        row("a", 2, [7, 7], [3]),  # another piece of the second's conversation
        row("b", 1, [7, 7], [4]),  # the same prompt as that, from another source
        row("b", 2, [8], [5]),
        row("c", 2, [8, 8], [6]),  # the same number in another source is another row
    ]
    found = heldout.clusters(Dataset.from_list(rows)).tolist()
    groups = [{at for at, one in enumerate(found) if one == name} for name in dict.fromkeys(found)]
    assert groups == [{0, 1, 2, 3}, {4}, {5}]


def test_the_test_part_goes_before_validation(empty_folder: Path) -> None:
    assert heldout.rows_of(empty_folder, None) is None
    dataset(empty_folder, Part.validation, ROWS[:3])
    part, rows = heldout.rows_of(empty_folder, None) or (None, [])
    assert (part, len(rows)) == (Part.validation, 3)
    dataset(empty_folder, Part.test, [])
    assert (heldout.rows_of(empty_folder, None) or (None,))[0] is Part.validation
    dataset(empty_folder, Part.test, ROWS)
    part, rows = heldout.rows_of(empty_folder, 1) or (None, [])
    assert part is Part.test
    assert [(one["source"], one["row"]) for one in rows] == [("a", 1), ("b", 1)]  # one of each source


def test_losses_come_back_from_their_file(empty_folder: Path) -> None:
    found = Losses(["a"], [0], [1.25], [3])
    (empty_folder / "losses.json").write_text(found.text())
    assert Losses.read(empty_folder / "losses.json") == found
    assert Losses.read(empty_folder / "none.json") is None


def test_a_stage_that_is_asked_to_stop_does(empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save(empty_folder / "base")
    model = Loaded(config(), Incoming(str(base)), byte_level())()
    monkeypatch.setenv(FILE, str(base))
    with pytest.raises(Stopped, match="held-out rows"):
        heldout.measure(model, Dataset.from_list(ROWS), 0, 2, nullcontext)
