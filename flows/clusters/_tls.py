"""Encryption of Dask's connections: `cluster.tls` in Dask's form. Every role has the same certificate and must show it."""

from distributed import Security

from clado.errors import ConfigurationError
from clado.settings.cluster import ClusterSettings

ROLES = ("client", "scheduler", "worker")


def security(settings: ClusterSettings) -> Security | None:
    """The encryption for a cluster or a client in this process. None without `tls`."""
    options = tls_options(settings)
    if options is None:
        return None
    dask_security = Security(**options)
    try:
        dask_security.get_connection_args("client")
    except OSError as error:  # the ssl module raises subclasses of it
        raise ConfigurationError(
            f"cluster.tls cannot be used ({error}); expected PEM files: ca_file, and a cert that it signed with its key"
        ) from None
    return dask_security


def tls_options(settings: ClusterSettings) -> dict[str, bool | str] | None:
    """The same as plain data with absolute paths, for a process on another machine."""
    if settings.tls is None:
        return None
    cert, key = str(settings.tls.cert.absolute()), str(settings.tls.key.absolute())
    pairs = {f"tls_{role}_cert": cert for role in ROLES} | {f"tls_{role}_key": key for role in ROLES}
    return {"require_encryption": True, "tls_ca_file": str(settings.tls.ca_file.absolute()), **pairs}


def protocol(settings: ClusterSettings) -> str:
    """The scheme of addresses."""
    return "tcp://" if settings.tls is None else "tls://"
