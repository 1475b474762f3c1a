"""Buckets that hold stores: S3, or a server that speaks its protocol. Needs obstore, which is optional."""

from datetime import timedelta
from typing import TYPE_CHECKING

from clado.errors import ConfigurationError, StoreError
from clado.settings.redaction import redact

if TYPE_CHECKING:
    from obstore.store import S3Store


def open_bucket(url: str) -> "S3Store":
    """A prefix of a bucket.

    Raises:
        ConfigurationError: obstore is not installed.
        StoreError: The bucket cannot be used.
    """
    try:
        from obstore.store import S3Store
    except ImportError as error:
        raise ConfigurationError(f"a store at {url} needs obstore ({error}); expected: pip install 'clado[s3]'") from None
    # stop waiting for a server after one minute; obstore's default is three
    bucket = S3Store.from_url(url, retry_config={"max_retries": 3, "retry_timeout": timedelta(seconds=60)})
    try:
        next(iter(bucket.list(chunk_size=1)), None)
    except Exception as error:  # exceptions of obstore, by kind of server and fault
        told = redact(" ".join(str(error).split()))[:300]
        raise StoreError(
            f"{url} cannot be used ({told}); expected a bucket that exists, its keys and AWS_ENDPOINT_URL "
            "in the environment, and AWS_ALLOW_HTTP=true for a server without TLS"
        ) from None
    return bucket
