"""Certificates for trying encrypted connections: an authority, and one certificate that all machines share."""

import ipaddress
import os
import socket
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from clado.errors import ConfigurationError

FILES = {"ca_file": "ca.pem", "cert": "cert.pem", "key": "key.pem"}


def make_certificates(folder: Path, hosts: Sequence[str] = (), days: int = 30) -> dict[str, Path]:
    """Writes ca.pem, cert.pem and key.pem.

    The flow, the scheduler and the workers share the certificate. Everyone with its key may use the cluster. The key of the
    authority is not written, so that nobody can sign more certificates.

    Args:
        folder: Where the files are written.
        hosts: Names and addresses of machines, in addition to this one.
        days: How long the certificates are valid.

    Returns:
        The files in the form of `cluster.tls`: {ca_file, cert, key}.

    Raises:
        ConfigurationError: A file exists, or a host is not a name.
    """
    files = {name: folder / file for name, file in FILES.items()}
    if existing := [str(path) for path in files.values() if path.exists()]:
        raise ConfigurationError(f"{existing[0]} exists already; expected a folder without {', '.join(FILES.values())}")
    authority, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca = _builder("clado test authority", authority, days, True).sign(authority, hashes.SHA256())
    names = dict.fromkeys(["localhost", "127.0.0.1", "::1", socket.gethostname(), *hosts])
    alternatives = x509.SubjectAlternativeName([_alternative(name) for name in names])
    cert = _builder("clado", key, days, False).add_extension(alternatives, critical=False).sign(authority, hashes.SHA256())
    folder.mkdir(parents=True, exist_ok=True)
    _write(files["ca_file"], ca.public_bytes(Encoding.PEM))
    _write(files["cert"], cert.public_bytes(Encoding.PEM))
    _write(files["key"], key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return files


def _builder(name: str, key: ec.EllipticCurvePrivateKey, days: int, authority: bool) -> x509.CertificateBuilder:
    def distinguished_name(common: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])

    now = datetime.now(UTC)
    issuer, subject = distinguished_name("clado test authority"), distinguished_name(name)
    builder = x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(days=days))
    return builder.add_extension(x509.BasicConstraints(ca=authority, path_length=0 if authority else None), critical=True)


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        try:
            return x509.DNSName(name)
        except ValueError as error:
            raise ConfigurationError(f"--host {name!r} is not the name of a machine ({error}); expected ASCII") from None


def _write(path: Path, content: bytes) -> None:
    """Writes a new file that only this user can read. It has these rights before anything is written."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
