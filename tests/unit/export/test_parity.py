"""How far a model is from another: against sums over the vocabulary written out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ftpipe.choices import Part, Use
from ftpipe.data import table
from ftpipe.export import parity
from ftpipe.export.parity import Parity, Row


def model(seed: int, tokens: int = 40) -> Any:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=tokens, num_attention_heads=2, initializer_range=0.3, **sizes)
    return LlamaForCausalLM(config).eval()


ROWS = [
    Row([3, 7, 1, 9, 30, 2], [-100, -100, -100, 9, 30, 2]),
    Row(list(range(1, 39)) * 4, [-100] * 150 + [37, 38]),
]


def test_it_is_the_divergence_of_each_token(tmp_path: Path) -> None:
    one, other = model(0), model(1)
    parity.remember(one, ROWS, tmp_path, None)
    found = parity.compare(other, ROWS, tmp_path, "somewhere")
    kl, same, losses = [], 0, [[], []]  # type: ignore[var-annotated]
    for row in ROWS:
        p, q = (m(torch.tensor([row.ids])).logits[0].softmax(-1).tolist() for m in (one, other))
        for at in range(len(row.ids) - 1):
            kl.append(sum(a * math.log(a / b) for a, b in zip(p[at], q[at], strict=True)))
            same += p[at].index(max(p[at])) == q[at].index(max(q[at]))
            token = row.labels[at + 1]
            if token != -100:
                for loss, said in zip(losses, (p, q), strict=True):
                    loss.append(-math.log(said[at][token]))
    assert (found.on, found.rows, found.tokens) == ("somewhere", 2, len(kl))
    assert found.kl_mean == pytest.approx(sum(kl) / len(kl), rel=1e-4)
    assert found.kl_max == pytest.approx(max(kl), rel=1e-4)
    assert sorted(kl)[-4] <= found.kl_p99 <= max(kl) + 1e-6
    assert found.agreement == same / len(kl) < 0.9
    before, after = (sum(loss) / len(loss) for loss in losses)
    assert found.loss_before == pytest.approx(before, rel=1e-5)
    assert found.loss_delta == pytest.approx(after - before, rel=1e-4)
    assert found.facts()["loss_delta"] == found.loss_delta
    parity.forget(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_is_itself(tmp_path: Path) -> None:
    parity.remember(model(0), ROWS[:1], tmp_path, None)
    found = parity.compare(model(0), ROWS[:1], tmp_path, "x")
    assert abs(found.kl_max) < 1e-12 and found.agreement == 1 and found.loss_delta == 0
    probes = [Row([1, 2, 3], [-100] * 3)]
    parity.remember(model(0), probes, tmp_path, torch.bfloat16)
    rounded = parity.compare(model(0), probes, tmp_path, "x")
    assert rounded.loss_delta is None and rounded.kl_max > 1e-12  # autocast rounds


def test_what_was_said_in_sixteen_bits_takes_sixteen_on_the_disk(tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        parity.remember(model(0).to(dtype), ROWS[:1], tmp_path, None)
        (file,) = tmp_path.iterdir()
        size = 5 * 40 * dtype.itemsize  # five tokens with a next one, of a vocabulary of 40
        assert size < file.stat().st_size < size + 200


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    parity.remember(model(0), ROWS[:1], tmp_path, None)
    with pytest.raises(ValueError, match="knows 41 tokens and the policy 40"):
        parity.compare(model(0, 41), ROWS[:1], tmp_path, "x")


def told(**changed: float) -> Parity:
    facts: dict[str, Any] = {"on": "x", "rows": 1, "tokens": 10, "kl_p99": 0.1, "kl_max": 0.2}
    facts |= {"kl_mean": 0.01, "agreement": 0.95, "loss_before": None, "loss_after": None}
    return Parity(**{**facts, **changed})


@pytest.mark.parametrize(
    "changed", [{"kl_mean": 0.0101}, {"kl_mean": float("nan")}, {"agreement": 0.9499}]
)
def test_thresholds_refuse_what_is_beyond_them(changed: dict[str, float]) -> None:
    assert parity.refusal(told(), 0.01, 0.95, "it") is None
    said = parity.refusal(told(**changed), 0.01, 0.95, "it")
    assert said is not None and said.startswith("it is not the policy: KL ")
    assert "export.max_kl=0.01" in said and "export.min_agreement=95.0%" in said


def write(folder: Path, use: Use, part: Part, rows: list[dict[str, Any]]) -> None:
    writer = table.Writer(table.place(folder, use, part), table.SCHEMAS[use])
    blank = {field.name: None for field in table.SCHEMAS[use]}
    writer.write(pa.RecordBatch.from_pylist([{**blank, **row} for row in rows], table.SCHEMAS[use]))
    writer.close()


def test_rows_are_those_of_the_test_part_then_of_what_is_held_out(tmp_path: Path) -> None:
    long = {"input_ids": list(range(700)), "labels": [-100] * 600 + list(range(600, 700))}
    write(tmp_path, Use.demonstrations, Part.train, [{"input_ids": [1, 2], "labels": [1, 2]}])
    on, rows = parity.held_out(tmp_path, 5, 40)
    assert on == "probes" and len(rows) == parity.PROBES  # nothing is held out
    assert all(0 <= token < 40 for row in rows for token in row.ids)
    pair = {"input_ids": [[5, 6, 7, 8], [5, 6, 9]], "starts": [2, 2], "stops": [4, 3]}
    write(tmp_path, Use.preferences, Part.validation, [pair])
    on, rows = parity.held_out(tmp_path, 5, 40)
    assert (on, rows) == ("preferences/validation", [Row([5, 6, 7, 8], [-100, -100, 7, 8])])
    write(tmp_path, Use.unpaired, Part.test, [{"input_ids": [4], "start": 0, "stop": 1}])
    assert parity.held_out(tmp_path, 5, 40)[0] == "preferences/validation"  # one token says nothing
    write(tmp_path, Use.demonstrations, Part.test, [long, long, {"input_ids": [1], "labels": [1]}])
    on, rows = parity.held_out(tmp_path, 2, 40)
    assert on == "demonstrations/test" and len(rows) == 2
    assert rows[0] == Row(list(range(512)), [-100] * 512)
    assert len(parity.held_out(tmp_path, 5, 40)[1]) == 2  # a row of one token says nothing
    assert parity.held_out(None, 5, 40)[0] == "probes"


def test_spread_rows_reach_the_last_source(tmp_path: Path) -> None:
    rows = [{"input_ids": [number, 1], "labels": [number, 1]} for number in range(10)]
    write(tmp_path, Use.demonstrations, Part.train, rows)

    def taken(most: int, spread: bool) -> list[int]:
        use, found = parity.some_rows(tmp_path, Part.train, most, spread)
        assert use is Use.demonstrations
        return [row.ids[0] for row in found]

    assert taken(4, spread=False) == [0, 1, 2, 3]
    assert taken(4, spread=True) == [0, 2, 5, 7]
    assert taken(99, spread=True) == list(range(10))
    assert parity.some_rows(tmp_path, Part.test, 4) == (None, [])


@pytest.mark.parametrize(
    ("use", "row", "labels"),
    [
        (Use.unpaired, {"input_ids": [4, 5, 6], "start": 1, "stop": 2}, [-100, 5, -100]),
        (Use.prompts, {"input_ids": [4, 5, 6]}, [-100, -100, -100]),
    ],
)
def test_every_use_has_rows(use: Use, row: dict[str, Any], labels: list[int], tmp_path: Path) -> None:
    write(tmp_path, use, Part.validation, [row])
    assert parity.held_out(tmp_path, 5, 40) == (f"{use}/validation", [Row([4, 5, 6], labels)])
