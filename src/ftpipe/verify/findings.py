"""What is found when two runs are compared: layer by layer, from the environment to the last weight."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class Layer(StrEnum):
    """What decides what, in this order: a difference in one explains those after it."""

    record = "record"  # the artifacts are as they were written, and their run.yaml is theirs
    environment = "environment"  # python, packages, hardware, ranks
    code = "code"  # of ftpipe
    config = "config"
    data = "data"  # rows, from their files to token ids; base models and tokenizers by their files
    weights = "initial weights"
    steps = "steps"
    result = "result"  # what a stage leaves


@dataclass(frozen=True)
class Finding:
    """One difference.

    Attributes:
        stage: where it was found; "" where it is of the whole run.
        says: a sentence's worth: what was recorded, what is here.
        tolerated: it is within what other hardware may do to a number.
    """

    layer: Layer
    stage: str
    says: str
    tolerated: bool = False


@dataclass
class Report:
    """All that was compared.

    Attributes:
        compared: what was looked at, in words, by layer and stage.
        left_out: what was not looked at, and why.
        unmade: what could not be looked at here, and why.
    """

    findings: list[Finding] = field(default_factory=list)
    compared: list[tuple[Layer, str, str]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    unmade: list[str] = field(default_factory=list)

    def look(self, layer: Layer, stage: str, what: str, found: list[Finding]) -> None:
        """Put on record that something was compared, with what came of it."""
        self.compared.append((layer, stage, what))
        self.findings += found

    @property
    def first(self) -> Finding | None:
        """Return the difference that comes first in the order of layers; None where all is equal."""
        order = list(Layer)
        real = [finding for finding in self.findings if not finding.tolerated]
        return min(real, key=lambda finding: order.index(finding.layer), default=None)

    @property
    def equal(self) -> bool:
        return self.first is None and not self.unmade

    def lines(self, shown: int = 3) -> list[str]:
        """Return the report for a person: a line for each comparison, and what differs below it.

        Args:
            shown: differences of one comparison at most; the rest is counted.
        """
        lines = []
        for layer, stage, what in self.compared:
            of = [one for one in self.findings if (one.layer, one.stage) == (layer, stage)]
            real = [one for one in of if not one.tolerated]
            word = "DIFFERS" if real else "close" if of else "equal"
            where = f"{stage}: {layer}" if stage else str(layer)
            lines.append(f"  {word:8}{where:28}{what}".rstrip())
            lines += [f"            {one.says}" for one in [*real, *(of if not real else [])][:shown]]
            more = len(real or of) - shown
            if more > 0:
                lines.append(f"            and {more:,} more")
        lines += [f"  not compared: {why}" for why in self.left_out]
        lines += [f"  NOT MADE: {why}" for why in self.unmade]
        first = self.first
        if first is None and self.unmade:
            lines.append("equal as far as it was compared, which is not all")
        elif first is None:
            close = any(one.tolerated for one in self.findings)
            lines.append("equal, within what other hardware may do" if close else "equal")
        else:
            lines.append(f"the first layer that differs is {first.layer}: {first.says}")
        return lines

    def as_json(self) -> dict[str, object]:
        """Return the report for a program."""
        first = self.first
        return {
            "equal": self.equal,
            "first": None if first is None else _plain(first),
            "findings": [_plain(finding) for finding in self.findings],
            "compared": [
                {"layer": str(layer), "stage": stage, "what": what}
                for layer, stage, what in self.compared
            ],
            "not_compared": self.left_out,
            "not_made": self.unmade,
        }


def _plain(finding: Finding) -> dict[str, object]:
    return {
        "layer": str(finding.layer),
        "stage": finding.stage,
        "says": finding.says,
        "tolerated": finding.tolerated,
    }
