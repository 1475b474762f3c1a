"""The exception tree. Every message says what was wrong, what was expected and what to do.

CladoError
├── ConfigurationError   a setting is missing, unknown or impossible
├── NetworkError         the network cannot be exported, loaded or searched
├── DataError            images or labels do not fit
│   └── UnreadableImage  an image file is damaged
├── StoreError           a store is missing, damaged or not ours
│   ├── IdentityMismatch the store was measured under other settings
│   └── FolderBusy       another run is writing to the same folder
├── MeasurementError     a measured number is unusable (NaN, infinite)
├── InfeasibleError      no assignment meets the constraints
├── SolverError          a solver failed or met a problem it does not take
│   └── SolverInterrupted it was interrupted before it had found anything
└── ServerError          a server that the run needs does not start or answer
"""


class CladoError(Exception):
    """Base of every error that a user can fix. The command line prints its message without a traceback."""

    exit_code = 2


class ConfigurationError(CladoError):
    """A setting is missing, unknown or impossible."""


class NetworkError(CladoError):
    """The network cannot be exported, loaded or searched."""


class DataError(CladoError):
    """Images or labels do not fit the network or the plan."""


class UnreadableImage(DataError):
    """An image file cannot be read or decoded; `image` is its name below the folder of the data."""

    def __init__(self, message: str, image: str) -> None:
        super().__init__(message, image)  # both, so that it can be pickled
        self.image = image

    def __str__(self) -> str:
        return str(self.args[0])


class StoreError(CladoError):
    """A store is missing, damaged or not ours."""


class IdentityMismatch(StoreError):
    """The store was measured under other settings; its numbers mean something else."""


class FolderBusy(StoreError):
    """Another run is writing to the same folder."""


class MeasurementError(CladoError):
    """A measured number is unusable."""


class InfeasibleError(CladoError):
    """No assignment meets the constraints."""


class ServerError(CladoError):
    """A server that the run needs does not start, or does not answer."""


class SolverError(CladoError):
    """A solver failed, or met a problem that it does not take."""


class SolverInterrupted(SolverError):
    """A solver was interrupted before it had found any assignment."""
