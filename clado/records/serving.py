"""Networks as a runtime runs them: their measured sizes, times and accuracies."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clado.records.text import markdown_table, percent


@dataclass(frozen=True)
class Served:
    """A network as the runtime runs it, with its measurements."""

    name: str
    """Its name in the table: a budget, `float`, or uniform bits."""
    file_bytes: int
    """The whole file."""
    milliseconds: float
    """Median milliseconds of one image."""
    top1: float
    """Share of images whose first class is the label. Without labels, the float network's class counts as the label."""
    predicted_milliseconds: float | None = None
    """Milliseconds by the table of a profile. None without a table."""


@dataclass(frozen=True)
class Serving:
    """All measurements, and the machine."""

    runtime: str
    """The title of the runtime."""
    networks: tuple[Served, ...]
    """The chosen networks, then the networks that they are compared with."""
    num_images: int
    """Number of validation images."""
    has_labels: bool
    """Whether top-1 compares with labels."""
    machine: str
    """The processor, threads and versions, in words."""
    threads: int
    """Threads of the runtime."""

    @classmethod
    def of_document(cls, document: Mapping[str, Any] | None) -> "Serving | None":
        """Reads the document that `dataclasses.asdict` makes. None gives None. Other documents raise KeyError or TypeError."""
        if document is None:
            return None
        return cls(**{**document, "networks": tuple(Served(**row) for row in document["networks"])})

    def find(self, name: str) -> Served | None:
        """The network with this name, or None."""
        return next((served for served in self.networks if served.name == name), None)

    @property
    def header(self) -> list[str]:
        """Titles of the columns of `rows`."""
        top1 = "top-1 %" if self.has_labels else "float's class %"
        return ["network", "bytes of the file", top1, "ms", "ms predicted"]

    @property
    def rows(self) -> list[list[str]]:
        """Each network with size, accuracy and milliseconds, as text."""
        return [
            [
                served.name,
                f"{served.file_bytes:,}",
                percent(served.top1),
                f"{served.milliseconds:.3f}",
                "–" if served.predicted_milliseconds is None else f"{served.predicted_milliseconds:.3f}",
            ]
            for served in self.networks
        ]

    def table(self) -> str:
        """The rows as Markdown."""
        return markdown_table(self.header, self.rows)

    def caption(self) -> str:
        """Explains the figures of the table."""
        return (
            f"As {self.runtime} computes them: {self.num_images:,} validation images; medians of one image, in turns; "
            f"{self.machine}"
        )
