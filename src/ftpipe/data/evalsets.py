"""Evaluation sets as published: the texts that no training row may hold, each with where it stands."""

from __future__ import annotations

import csv
import io
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ftpipe.choices import EvalFormat
from ftpipe.config import EvalSetConfig, SourceConfig
from ftpipe.data import rows
from ftpipe.errors import DataError, unknown
from ftpipe.pins import local_data

OWN_SUFFIXES = (".zip", ".txt", ".csv")  # a path that ends so is a file, never a hub id

# Searched where `columns` is empty: what is asked. The answers of MMLU are short and occur anywhere.
COLUMNS = {
    EvalFormat.mmlu: ("question",),
    EvalFormat.gsm8k: ("question",),
    EvalFormat.questions: ("turns",),
    EvalFormat.text: (),
}
MMLU_COLUMNS = ("question", "A", "B", "C", "D", "answer")
# artidoro/qlora, zero_shot_mmlu_val.json: header, question, options and "Answer:" in one text.
ZERO_SHOT = re.compile(
    r"The following are multiple choice questions \(with answers\) about [^\n]*\n\n"
    r"(?P<question>.*)\nA\. (?P<A>.*)\nB\. (?P<B>.*)\nC\. (?P<C>.*)\nD\. (?P<D>.*)\nAnswer:",
    re.DOTALL,
)

Fields = tuple[str, dict[str, Any]]  # where, and the columns


@dataclass(frozen=True)
class Item:
    """A text of an evaluation set.

    Attributes:
        set: its name in the configuration.
        where: file and row or line.
    """

    set: str
    where: str
    text: str


def items(name: str, settings: EvalSetConfig) -> Iterator[Item]:
    """Yield the texts of an evaluation set, one for each row and column (or turn) searched.

    - ``mmlu``: hendrycks/test, a .zip or a folder of headerless CSV (files named ``*_<split>.csv``), or
      artidoro/qlora's zero-shot JSON lines. The question alone: neither the header with the subject
      nor the options, unless ``columns`` names them (question, A, B, C, D).
    - ``gsm8k``: openai/grade-school-math; the question, or ``columns`` (question, answer).
    - ``questions``: lm-sys/FastChat's question.jsonl; every turn.
    - ``text``: any .txt (an item a line) or rows; all columns with text, or ``columns``.

    Raises:
        DataError: if the set cannot be read, is empty, or has no such column. One bad row is enough:
            a set read in part would let through what it should hold back.
    """
    wanted = tuple(settings.columns) or COLUMNS[settings.format]
    found = 0
    for where, fields in _rows(name, settings):
        for column in wanted or fields:
            if column not in fields:
                raise DataError(
                    f"{where}: "
                    + unknown("column", column, fields).replace("no column", "it has no column")
                )
            for text in _texts(where, column, fields[column], strict=bool(wanted)):
                found += 1
                yield Item(name, where, text)
    if not found:
        raise DataError(f"data.decontaminate.{name}.path={settings.path} holds no text to search for.")


def _rows(name: str, settings: EvalSetConfig) -> Iterator[Fields]:
    file = local_data(settings.path)
    if file is None and settings.path.endswith(OWN_SUFFIXES):
        raise DataError(f"no file {settings.path}; it was looked for from {Path.cwd()}.")
    if settings.format is EvalFormat.mmlu:
        return _mmlu(name, settings, file)
    if file is not None and file.is_dir():
        raise DataError(f"data.decontaminate.{name}.path={settings.path} is a folder; give one file.")
    if file is not None and file.suffix == ".txt":
        return _lines(file)
    return _read(settings)


def _read(settings: EvalSetConfig) -> Iterator[Fields]:
    """Yield rows of JSON, CSV or the hub, as training rows are read."""
    source = SourceConfig(
        path=settings.path,
        revision=settings.revision,
        subset=settings.subset,
        split=settings.split,
    )
    for row in rows.read(source):
        if row.flaw:
            raise DataError(f"{row.where}: {row.flaw}.")
        yield row.where, row.fields


def _lines(file: Path) -> Iterator[Fields]:
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{file}, line {number}", {"text": line.strip()}
    except UnicodeDecodeError:
        raise DataError(f"{file} is not UTF-8.") from None
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}).") from None


def _texts(where: str, column: str, value: Any, strict: bool) -> Iterator[str]:
    """Yield a column's text, or each of a list; refuse what is neither where it was asked for."""
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str):
            yield text
        elif strict:
            raise DataError(f"{where}: '{column}' holds {type(text).__name__}, not text.")


def _mmlu(name: str, settings: EvalSetConfig, file: Path | None) -> Iterator[Fields]:
    if file is None or (file.is_file() and file.suffix not in (".zip", ".csv")):
        return (_question(where, fields) for where, fields in _read(settings))
    key = f"data.decontaminate.{name}"
    if file.is_file() and file.suffix == ".csv":
        return _headerless(file.name, lambda: file.open(encoding="utf-8", newline=""))
    return mmlu_tables(key, file, settings.split)


def _question(where: str, fields: dict[str, Any]) -> Fields:
    """Return the columns of an MMLU row, also of one whose question and options are one text."""
    if "question" in fields or not isinstance(fields.get("input"), str):
        return where, fields
    parts = ZERO_SHOT.fullmatch(fields["input"].strip())
    if parts is None:
        raise DataError(f"{where}: 'input' is no zero-shot MMLU prompt (header, question, A. to D.).")
    return where, parts.groupdict()


def mmlu_tables(key: str, file: Path, split: str) -> Iterator[Fields]:
    """Yield the rows of every subject's file of a split, in the order of their names.

    Args:
        key: what names the file in the configuration, up to ``path``.
        file: hendrycks' .zip, or a folder with its headerless CSV files (``*_<split>.csv``).

    Yields:
        file and row, and the columns: subject, question, A, B, C, D, answer.

    Raises:
        DataError: if it cannot be read, or has no such split.
    """
    try:
        with zipfile.ZipFile(file) if file.is_file() else _Folder(file) as archive:
            tables = sorted(
                member
                for member in archive.namelist()
                if member.endswith(".csv") and not member.rsplit("/", 1)[-1].startswith(".")
            )
            found = [table for table in tables if table.endswith(f"_{split}.csv")]
            if not found:
                splits = sorted({Path(table).stem.rsplit("_", 1)[-1] for table in tables})
                raise DataError(f"{key}: {file}: " + unknown("split", split, splits))
            for table in found:
                yield from _headerless(
                    table,
                    lambda table=table: io.TextIOWrapper(archive.open(table), "utf-8", newline=""),  # type: ignore[misc]
                )
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError):  # the last: of an encrypted one
        raise DataError(f"{key}.path={file} is not a whole, open zip file.") from None
    except OSError as error:
        raise DataError(f"{key}.path={file} cannot be read ({error.strerror}).") from None


class _Folder:
    """A folder read as a zip file is."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> _Folder:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def namelist(self) -> list[str]:
        return [path.relative_to(self._folder).as_posix() for path in self._folder.rglob("*.csv")]

    def open(self, name: str) -> io.BufferedReader:
        return (self._folder / name).open("rb")


def _headerless(table: str, opened: Callable[[], TextIO]) -> Iterator[Fields]:
    try:
        with opened() as text:
            yield from _named(table, csv.reader(text, strict=True))
    except UnicodeDecodeError:
        raise DataError(f"{table} is not UTF-8.") from None
    except csv.Error as error:
        raise DataError(f"{table} is not CSV ({error}).") from None


def _named(table: str, listed: Iterable[list[str]]) -> Iterator[Fields]:
    for number, values in enumerate(listed, start=1):
        if len(values) != len(MMLU_COLUMNS):
            raise DataError(
                f"{table}, row {number}: {len(values)} columns, not the {len(MMLU_COLUMNS)} of MMLU "
                f"({', '.join(MMLU_COLUMNS)}, no header)."
            )
        subject = Path(table).stem.rsplit("_", 1)[0]
        columns = zip(MMLU_COLUMNS, values, strict=True)
        yield f"{table}, row {number}", {"subject": subject, **dict(columns)}
