"""Data preparation: rows of published schemas become token ids and a mask of what is learned.

Two passes. The first reads, renders, tokenizes and fits every row, batch by batch, into a scratch
file; then a few numbers for each row decide where it goes; the second copies it there. So memory
hardly grows with the rows.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import AutoTokenizer

from ftpipe import home
from ftpipe import tokenizer as tokenizers
from ftpipe.artifacts import Artifact
from ftpipe.choices import Format, OnBadRow, Part, Use
from ftpipe.config import DataConfig, RunConfig, SourceConfig
from ftpipe.data import judge, ledger, near, packing, rows
from ftpipe.data.batches import SIGNATURE, Made, Maker, scratch_schema
from ftpipe.data.contamination import LEAST, Index
from ftpipe.data.evalsets import items
from ftpipe.data.formats import examples
from ftpipe.data.ledger import Account, Packing
from ftpipe.data.pool import Batch, make_all
from ftpipe.data.select import PARTS, Decision, Rows, Verdict, decide
from ftpipe.data.table import SCHEMAS, Writer, batches, place
from ftpipe.data.templates import missing_marks
from ftpipe.data.uses import uses
from ftpipe.errors import DataError
from ftpipe.logs import progress, say
from ftpipe.tracking import Tracker

BATCH = 500  # rows made at a time
MOST = 16  # processes, unless more are asked for: one reads for all of them
REMOVED = "removed.jsonl"  # each row that was left out, and why


@dataclass
class Work:
    """A preparation on its way.

    Attributes:
        accounts: by source and use.
        lengths: how many examples have how many tokens, by use.
        removed: open file of what was left out.
    """

    data: DataConfig
    out: Path
    removed: TextIO
    accounts: dict[tuple[str, Use], Account] = field(default_factory=dict)
    lengths: dict[Use, Counter[int]] = field(default_factory=dict)

    def note(self, source: str, use: Use, entry: Mapping[str, Any]) -> None:
        """Write why a row was left out; files below the user's home are named by ``~``."""
        files = {key: home.short_path(entry[key]) for key in ("where", "question") if key in entry}
        self.removed.write(json.dumps({"source": source, "use": use, **entry, **files}) + "\n")

    def scratch(self, use: Use) -> Path:
        return self.out / f".{use}.arrow"


def run(cfg: RunConfig, inputs: Mapping[str, Artifact], out: Path) -> dict[str, float]:
    """Write ``<use>/<part>.arrow``, the tokenizer, the ledger and what was removed to ``out``.

    Raises:
        DataError: if a row cannot be used (unless told to skip), or nothing is left.
        ConfigError: if more is lost or skipped than allowed.
    """
    base = inputs.get("base_model")
    tokenizer = tokenizers.load(cfg.model, base.path if base else None)
    added = tokenizers.add_tokens(tokenizer, cfg.model.new_tokens)
    tokenizer.save_pretrained(str(out / "tokenizer"))
    (out / tokenizers.NEW_TOKENS).write_text(json.dumps(added) + "\n", encoding="utf-8")
    missing = missing_marks(cfg.data.template, tokenizer)
    if missing:
        say(
            f"the {cfg.data.template} template's {', '.join(missing)} are several tokens each to this "
            f"tokenizer; model.new_tokens=[{','.join(missing)}] makes one of each"
        )
    data = with_evolved(cfg.data, inputs.get("evolved"))
    with (out / REMOVED).open("w", encoding="utf-8") as removed:
        work = Work(data, out, removed)
        _first_pass(work, cfg.launch.workers)
        known = {use: _known(work, use) for use in work.lengths}
        decisions = decide(known, data, cfg.seed)
        for use, decision in decisions.items():
            _count(work, use, known[use], decision)
            _second_pass(work, use, decision)
            work.scratch(use).unlink()
    packed = _pack(data, out) if Use.demonstrations in decisions else None
    book = ledger.as_dict(work.accounts, packed)
    (out / "ledger.json").write_text(json.dumps(book, indent=1) + "\n", encoding="utf-8")
    say(ledger.render(work.accounts, packed))
    judge.judge(data, work.accounts, work.lengths)
    counts = _metrics(work, packed)
    with Tracker(cfg, "prepare", out) as tracker:
        tracker.log(0, counts)
        tracker.summary(counts)
    return counts


def with_evolved(data: DataConfig, evolved: Artifact | None) -> DataConfig:
    """Return the sources with what was evolved before, if anything was, as one more at the end."""
    if evolved is None:
        return data
    rows_of = SourceConfig(format=Format.evol_instruct, path=str(evolved.path / "rows.jsonl"))
    return replace(data, sources={**data.sources, "evolved": rows_of})


def _first_pass(work: Work, processes: int | None) -> None:
    """Write every row that can be used to its use's scratch file, and account for the others."""
    data = work.data
    keys = [(name, use) for name, source in data.sources.items() for use in uses(source)]
    work.accounts |= {key: Account() for key in keys}
    work.lengths |= {use: Counter() for _, use in keys}
    signed = data.near_duplicates is not None
    writers = {use: Writer(work.scratch(use), scratch_schema(use, signed)) for use in work.lengths}
    # the tokenizer as it was saved, which is what later stages load
    saved = AutoTokenizer.from_pretrained(str(work.out / "tokenizer"))
    maker = Maker(data, saved, _contamination(data))
    sent: list[tuple[str, Use]] = []  # the key of each batch on its way
    processes = processes or min(MOST, len(os.sched_getaffinity(0)))
    for made in make_all(_batches(work, sent), maker, processes):
        name, use = sent.pop(0)
        _refuse(data, made)
        work.accounts[name, use].add(made.account)
        work.lengths[use].update(made.lengths)
        for entry in made.removed:
            work.note(name, use, entry)
        writers[use].write(made.rows)
    for writer in writers.values():
        writer.close()
    for (name, _), account in work.accounts.items():
        if not account.read:
            raise DataError(f"data.sources.{name}.path={data.sources[name].path} holds no rows.")


def _contamination(data: DataConfig) -> Index | None:
    """Return the evaluation questions to search rows for, where there are any."""
    if not data.decontaminate:
        return None
    questions = chain.from_iterable(items(name, found) for name, found in data.decontaminate.items())
    index = Index.build(questions, data.ngram)
    for name, few in index.unsearched.items():
        every = few + index.searched[name]
        least = min(data.ngram, LEAST)
        say(
            f"{name}: {few:,} of {every:,} questions have fewer than {least} words; "
            "no row is searched for them"
        )
    return index


def _refuse(data: DataConfig, made: Made) -> None:
    if made.bad is not None and data.on_bad_row is OnBadRow.error:
        raise DataError(
            f"{made.bad.where}: {made.bad.why}. "
            "Mend it, or leave such rows out with data.on_bad_row=skip."
        )


def _batches(work: Work, sent: list[tuple[str, Use]]) -> Iterator[Batch]:
    """Yield batches of one source and use each; their keys go to ``sent`` in the same order."""
    for (name, use), account in work.accounts.items():
        source = work.data.sources[name]

        def counted(account: Account = account, source: SourceConfig = source) -> Iterator[rows.Row]:
            for row in rows.read(source):
                account.read += 1
                yield row

        found = examples(name, source, progress(counted(), f"{name} rows"), use)
        last = 0
        while batch := list(islice(found, BATCH)):
            numbers = [last, *(item.row for item in batch)]
            account.further += sum(number == before for before, number in pairwise(numbers))
            last = numbers[-1]
            sent.append((name, use))
            yield use, batch


def _known(work: Work, use: Use) -> Rows:
    """Return what decides where the rows of a use go, read from its scratch file."""
    names = pa.array(list(work.data.sources))
    column_of = {"number": "row", "signatures": SIGNATURE.name}  # the others have their own name
    found: dict[str, list[Any]] = {one.name: [] for one in fields(Rows)}
    for batch in batches(work.scratch(use)):
        for name, listed in found.items():
            column = column_of.get(name, name)
            if name == "source":
                listed.append(pc.index_in(batch[column], names).to_numpy())
            elif name != "signatures":
                listed.append(batch[column].to_numpy().copy())  # a view would keep the whole batch
            elif column in batch.schema.names:
                held = np.frombuffer(batch[column].buffers()[1], np.uint32)
                listed.append(held.reshape(-1, near.PERMUTATIONS)[: len(batch)].copy())
    joined: dict[str, Any] = {name: np.concatenate(listed) for name, listed in found.items() if listed}
    return Rows(**joined)


def _second_pass(work: Work, use: Use, decision: Decision) -> None:
    """Copy each row to where it goes."""
    writers = {
        verdict: Writer(place(work.out, use, part), SCHEMAS[use]) for verdict, part in PARTS.items()
    }
    at = 0
    for batch in batches(work.scratch(use)):
        here = slice(at, at + len(batch))
        for verdict, writer in writers.items():
            chosen = np.flatnonzero(decision.verdict[here] == verdict)
            if len(chosen):
                copies = np.repeat(chosen, decision.copies[here][chosen])
                writer.write(batch.select(SCHEMAS[use].names).take(pa.array(copies)))
        at += len(batch)
    for writer in writers.values():
        writer.close()


WHY = {
    Verdict.duplicate: "duplicate",
    Verdict.near_duplicate: "near-duplicate",
    Verdict.leak: "its prompt is held out",
    Verdict.not_drawn: "not drawn",
}


def _count(work: Work, use: Use, known: Rows, decision: Decision) -> None:
    names = list(work.data.sources)
    for at, name in enumerate(names):
        if (name, use) not in work.accounts:
            continue
        account = work.accounts[name, use]
        tallies = {
            Verdict.train: account.train,
            Verdict.validation: account.validation,
            Verdict.test: account.test,
            Verdict.duplicate: account.duplicates,
            Verdict.near_duplicate: account.near_duplicates,
            Verdict.leak: account.leaks,
            Verdict.not_drawn: account.not_drawn,
        }
        mine = known.source == at
        for verdict, tally in tallies.items():
            chosen = mine & (decision.verdict == verdict)
            copies = decision.copies[chosen] if verdict in PARTS else np.ones(chosen.sum(), np.int64)
            tokens, supervised = known.tokens[chosen], known.supervised[chosen]
            tally.add(int(copies.sum()), int(copies @ tokens), int(copies @ supervised))
            if verdict is Verdict.train:
                more = copies - 1
                account.repeated.add(int(more.sum()), int(more @ tokens), int(more @ supervised))
    for row in np.flatnonzero(decision.verdict > Verdict.test):
        verdict, of = Verdict(decision.verdict[row]), decision.of[row]
        entry: dict[str, Any] = {"row": int(known.number[row]), "why": WHY[verdict]}
        if of >= 0:
            entry["of"] = {"source": names[known.source[of]], "row": int(known.number[of])}
        work.note(names[known.source[row]], use, entry)


def _pack(data: DataConfig, out: Path) -> Packing | None:
    """Plan which training rows share a sequence, where they do."""
    if not data.packing:
        return None
    return packing.plan(place(out, Use.demonstrations, Part.train), data.max_length)


def _metrics(work: Work, packed: Packing | None) -> dict[str, float]:
    whole = ledger.total(work.accounts.values())
    assert all(account.balanced() for account in work.accounts.values()), "a row is unaccounted for"
    counts: dict[str, float] = {
        "train_rows": whole.train.rows,
        "validation_rows": whole.validation.rows,
        "train_tokens": whole.train.tokens,
        "train_supervised_tokens": whole.train.supervised,
        "refused_rows": whole.refused.total(),
        "supervised_tokens_lost": whole.lost,
    }
    if packed is not None:
        counts |= {"packed_sequences": packed.sequences, "packed_padding": packed.wasted}
    return counts | ledger.flat(work.accounts)
