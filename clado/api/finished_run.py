"""A finished run, read back from its folder."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from clado.choosing.constraints import kind_of
from clado.errors import ConfigurationError, StoreError
from clado.interaction.matrix import InteractionMatrix
from clado.records.results import CHOSEN, Accuracy, Result
from clado.records.run_record import RunRecord
from clado.records.tabular import Tabular
from clado.records.text import file_name
from clado.space import Assignment


class Run(Tabular):
    """The results that `clado run` has written to its folder.

    Args:
        folder: The folder of the run, such as "runs/NAME".

    Raises:
        StoreError: The folder holds no finished run.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        """The folder of the run."""
        if not self.folder.is_dir():
            raise StoreError(f"{folder} is not a folder; expected the folder of a finished run, such as runs/NAME")
        self.record = RunRecord.load(self.folder / "record.json")
        """Everything that the run reports."""

    @property
    def budgets(self) -> tuple[str, ...]:
        """Names of the budgets, such as "3 bits"."""
        return self.record.budgets

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods, `chosen` among them."""
        return self.record.methods

    @property
    def assignments(self) -> dict[str, Assignment]:
        """The chosen result of each budget."""
        return {budget: self.assignment(budget) for budget in self.budgets}

    @property
    def accuracies(self) -> dict[str, Accuracy | None]:
        """Accuracy of the chosen result of each budget, on the validation set."""
        return {budget: self.accuracy(budget) for budget in self.budgets}

    @cached_property
    def matrices(self) -> Mapping[str, InteractionMatrix]:
        """The interaction matrices by estimator. `clado.solve` and `clado.front` take them."""
        files = sorted((self.folder / "matrices").glob("*.npz"))
        return {file.stem: InteractionMatrix.load(file) for file in files}

    def result(self, budget: str | float, method: str = CHOSEN) -> Result:
        """One method's answer to a budget.

        Args:
            budget: Its name, or a number of average bits.
            method: One of `methods`.

        Raises:
            ConfigurationError: The run has no such budget or method.
        """
        name = budget if isinstance(budget, str) else _average_bits(budget)
        result = self.record.find(name, method)
        if result is None:
            raise ConfigurationError(
                f"the run has no {method!r} for the budget {name!r}; its budgets are {', '.join(self.budgets)}, its methods "
                f"{', '.join(self.methods)}"
            )
        return result

    def assignment(self, budget: str | float, method: str = CHOSEN) -> Assignment:
        """The bits of each layer. Arguments are those of `result`."""
        return self.result(budget, method).assignment

    def accuracy(self, budget: str | float, method: str = CHOSEN) -> Accuracy | None:
        """Accuracy on the validation set; None if it was not counted. Arguments are those of `result`."""
        return self.result(budget, method).validation

    def network(self, budget: str | float, method: str = CHOSEN) -> nn.Module:
        """The network of a budget as a torch module, with the corrections that it was measured with.

        It is read from the run's folder if it was kept there. Otherwise the run is opened again,
        which needs its images. Arguments are those of `result`.

        Raises:
            NetworkError: A torch module cannot hold the network.
        """
        from clado.settings.loading import load_run_config

        result, config = self.result(budget, method), load_run_config(self.folder)
        packed = self.folder / "models" / file_name(result.budget) / "packed.safetensors"
        if method == CHOSEN and packed.is_file():
            from clado.data.sources import build_network
            from clado.exporting.packed import load_packed

            return load_packed(packed, build_network(config.network)[0])
        from clado.exporting._torch_module import as_module
        from clado.run.opened_run import open_run

        return as_module(*open_run(config).preparation.deployed(result.assignment))

    def summary(self) -> str:
        """Network, budgets and methods, in one line."""
        return self.record.summary()

    def rows(self) -> list[dict[str, Any]]:
        """Each budget and method: bits, bytes, losses, accuracies."""
        return self.record.rows()


def _average_bits(bound: float) -> str:
    text = kind_of("average_bits").text
    return text(bound) if text is not None and isinstance(bound, int | float) else repr(bound)
