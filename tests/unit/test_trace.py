"""The trace of a training: the same bits give the same lines, and nothing of a kill is left in it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from ftpipe import trace
from ftpipe.config import TrackingConfig
from ftpipe.errors import ConfigError
from ftpipe.sequences import Layout, Row, collate
from ftpipe.trace import Trace


def test_the_first_steps_and_one_in_so_many_are_on_record(tmp_path: Path) -> None:
    kept = Trace.of(TrackingConfig(trace_first=3, trace_every=5), tmp_path, rank=0)
    assert [step for step in range(1, 17) if kept.has(step)] == [1, 2, 3, 5, 10, 15]
    none_first = Trace.of(TrackingConfig(trace_first=0, trace_every=4), tmp_path, rank=0)
    assert [step for step in range(1, 10) if none_first.has(step)] == [4, 8]


@pytest.mark.parametrize(("key", "value"), [("trace_first", -1), ("trace_every", 0)])
def test_a_number_of_steps_that_cannot_be_is_refused(key: str, value: int) -> None:
    cfg = TrackingConfig()
    setattr(cfg, key, value)
    with pytest.raises(ConfigError, match=f"tracking.{key}={value}"):
        cfg.check()


def test_numbers_come_back_to_the_last_bit(tmp_path: Path) -> None:
    kept = Trace(tmp_path, first=10, every=10, writes=True)
    kept.begin(0)
    third = float(torch.tensor(1 / 3))  # a float32 that no short decimal is
    kept.step(1, loss=third, grad_norm=0.1 + 0.2)
    (line,) = trace.read(tmp_path / trace.TRACE)
    assert line == {"step": 1, "loss": third, "grad_norm": 0.30000000000000004}


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    kept = Trace(tmp_path, first=10, every=10, writes=True)
    kept.begin(0)
    for step in (1, 2, 3):
        kept.step(step, loss=float(step))
    path = tmp_path / trace.TRACE
    whole = path.read_text()
    path.write_text(whole + '{"step": 4, "lo')  # killed while it wrote
    kept.begin(2)
    kept.step(3, loss=3.0)
    assert path.read_text() == whole
    kept.begin(0)  # nothing was saved: from the beginning
    assert path.read_text() == ""


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    other = Trace.of(TrackingConfig(), tmp_path, rank=1)
    other.begin(0)
    other.initial({"a": "0"})
    other.step(1, loss=1.0)
    assert list(tmp_path.iterdir()) == []


def test_a_digest_is_of_name_kind_shape_and_bytes() -> None:
    ones = torch.ones(2, 3)
    known = trace.of_tensors([("x", ones)])
    expected = hashlib.sha256(b"x torch.float32 (2, 3) " + bytes.fromhex("0000803f") * 6)
    assert known == expected.hexdigest()[:16]
    others = [
        [("y", ones)],
        [("x", ones.double())],
        [("x", ones.reshape(3, 2))],
        [("x", -ones)],
        [("x", ones), ("x", ones)],
    ]
    assert len({known, *map(trace.of_tensors, others)}) == 6
    assert trace.of_tensors([("x", ones.T.contiguous().T)]) == known  # as it is read, not as it lies
    assert trace.of_tensors([("x", torch.zeros(0, dtype=torch.bfloat16))]) != known


def padded(*rows: list[int], left: bool = False) -> dict[str, torch.Tensor]:
    """Return rows as a batch, with labels that ignore the first token of each."""
    longest = max(map(len, rows))
    filled = [[0] * (longest - len(row)) for row in rows]

    def laid(values: list[list[int]], fill: int) -> torch.Tensor:
        pads = [[fill] * len(pad) for pad in filled]
        whole = [pad + row if left else row + pad for row, pad in zip(values, pads, strict=True)]
        return torch.tensor(whole)

    return {
        "input_ids": laid(list(rows), 0),
        "labels": laid([[-100, *row[1:]] for row in rows], -100),
        "attention_mask": laid([[1] * len(row) for row in rows], 0),
        "tokens": torch.tensor(sum(map(len, rows))),
    }


def test_rows_of_a_step_are_the_same_however_they_are_split_and_padded() -> None:
    rows = [1, 2, 3], [4, 5], [0, 6]  # a token may be the one that pads
    whole = trace.of_batch(padded(*rows))
    assert len(set(whole)) == 3
    assert [*trace.of_batch(padded(rows[0])), *trace.of_batch(padded(*rows[1:]))] == whole
    assert trace.of_batch(padded(*rows, left=True)) == whole


def test_another_token_mask_or_label_is_another_row() -> None:
    known = trace.of_batch(padded([1, 2, 3]))
    assert trace.of_batch(padded([1, 2, 4])) != known
    for name in ("labels", "attention_mask"):
        batch = padded([1, 2, 3])
        batch[name][0, 1] = 0
        assert trace.of_batch(batch) != known
    batch = padded([1, 2, 3]) | {f"mismatched_{k}": v for k, v in padded([7, 8], [9]).items()}
    assert trace.of_batch(batch) == known
    assert trace.of_batch(batch, "mismatched_") == trace.of_batch(padded([7, 8], [9]))


ROWS: list[Row] = [
    ([5, 6, 7], [-100, 6, 7]),
    ([8, 9], [-100, 9]),
    ([1, 2, 3, 4], [-100, -100, 3, 4]),
    ([2, 2], [-100, 2]),
]


@pytest.mark.parametrize("layout", [Layout.positions, Layout.blocks, Layout.flat])
def test_packed_rows_are_the_same_however_they_share_a_sequence(layout: Layout) -> None:
    alone = sorted(trace.of_batch(collate([[row] for row in ROWS], 0, Layout.positions)))
    assert len(set(alone)) == len(ROWS)
    for packs in ([[ROWS[0], ROWS[1]], [ROWS[2]], [ROWS[3]], []], [[*ROWS], []], [[ROWS[3]], ROWS[:3]]):
        assert sorted(trace.of_batch(collate(packs, 0, layout))) == alone
    apart = [collate(ROWS_, 0, layout) for ROWS_ in ([ROWS[:2]], [ROWS[2:]])]  # two micro-batches
    assert sorted(row for batch in apart for row in trace.of_batch(batch)) == alone


def test_rows_that_are_cut_elsewhere_are_others() -> None:
    assert trace.of_rows([[1, 2], [3]]) != trace.of_rows([[1], [2, 3]])
    assert trace.of_rows([[1, 2], [3]]) != trace.of_rows([[1, 23]])
    assert trace.of_rows([[1, 2], [3]]) == trace.of_rows([[1, 2], [3]])


def test_what_is_trained_is_read_whole_and_the_rest_by_a_sample(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trace, "SAMPLED", 4)
    frozen, trained = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    net = nn.ModuleDict({"frozen": frozen, "trained": trained})

    def digests() -> dict[str, str]:
        return trace.of_weights(net.named_parameters(), [trained.weight])

    known = digests()
    assert list(known) == ["frozen.weight", "trained.weight"]
    with torch.no_grad():
        for one in (frozen, trained):
            one.weight[0, 1] += 1
    changed = digests()  # between the 4 of 16 that are looked at
    assert changed["trained.weight"] != known["trained.weight"]
    assert changed["frozen.weight"] == known["frozen.weight"]
    with torch.no_grad():
        frozen.weight[1, 0] += 1
    assert digests()["frozen.weight"] != known["frozen.weight"]


def test_what_a_rank_holds_of_a_weight_in_zero3_is_its_shard() -> None:
    weight = nn.Parameter(torch.empty(0))
    weight.ds_tensor = torch.arange(3.0)  # type: ignore[attr-defined]
    assert trace.here(weight).tolist() == [0, 1, 2]


def test_first_weights_are_json_by_name(tmp_path: Path) -> None:
    Trace(tmp_path, 1, 1, writes=True).initial({"a.weight": "12", "b": "34"})
    assert json.loads((tmp_path / trace.INITIAL).read_text()) == {"a.weight": "12", "b": "34"}
