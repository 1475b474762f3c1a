"""What a runtime measured of networks: size, milliseconds and accuracy as it computes them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clado.records.text import markdown_table, percent


@dataclass(frozen=True)
class Served:
    """A network as the runtime computes it."""

    name: str
    """What it is called in the table: a budget, `float`, or uniform bits."""
    file_bytes: int
    """The whole file."""
    milliseconds: float
    """Median of one image."""
    top1: float
    """Share of images whose first class is the label, or the float network's where there are no labels."""
    predicted_milliseconds: float | None = None
    """What the table of a profile says; None without a table."""


@dataclass(frozen=True)
class Serving:
    """What was measured, and where."""

    runtime: str
    """What the runtime is called in documents."""
    networks: tuple[Served, ...]
    """The chosen networks first; what they are compared with."""
    num_images: int
    """Validation images that were computed."""
    has_labels: bool
    """Whether top-1 is of labels."""
    machine: str
    """The processor, threads and versions, in words."""
    threads: int
    """Threads of the runtime."""

    @classmethod
    def of_document(cls, document: Mapping[str, Any] | None) -> "Serving | None":
        """What `dataclasses.asdict` made plain data of; None of None. KeyError or TypeError for anything else."""
        if document is None:
            return None
        return cls(**{**document, "networks": tuple(Served(**row) for row in document["networks"])})

    def find(self, name: str) -> Served | None:
        """The network of a name. None if there is none."""
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
        """What the figures of the table are."""
        return (
            f"As {self.runtime} computes them: {self.num_images:,} validation images; medians of one image, in turns; "
            f"{self.machine}"
        )
