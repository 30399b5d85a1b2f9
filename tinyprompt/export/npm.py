"""Packages of the npm registry: fetched once into a cache, and verified by the hash of one version."""

import base64
import hashlib
import os
import tarfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

from tinyprompt.errors import CheckpointError
from tinyprompt.files import io

TIMEOUT = 60  # seconds without a byte


class Package(NamedTuple):
    """One version of a package, and the hash of its archive: `npm view NAME dist.integrity`."""

    name: str
    version: str
    integrity: str  # "sha512-" and the hash in base64

    @property
    def file(self) -> str:
        """The name of the archive, as `npm pack` writes it, without the scope."""
        return f"{self.name.rpartition('/')[2]}-{self.version}.tgz"

    @property
    def url(self) -> str:
        """The address of the archive. NPM_CONFIG_REGISTRY has the same meaning as for npm."""
        registry = os.environ.get("NPM_CONFIG_REGISTRY", "https://registry.npmjs.org")
        return f"{registry.rstrip('/')}/{self.name}/-/{self.file}"

    def is_of(self, archive: bytes) -> bool:
        """Return whether these bytes are the archive."""
        return self.integrity == f"sha512-{base64.b64encode(hashlib.sha512(archive).digest()).decode()}"


def cached(package: Package) -> Path:
    """Return the path of an archive in the cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinyprompt" / package.file


def fetch(package: Package) -> bytes:
    """Return the archive of a package, from the cache or from the registry.

    Raises CheckpointError if it cannot be fetched, or is not the one that was expected.
    """
    path = cached(package)
    if path.is_file() and package.is_of(archive := path.read_bytes()):
        return archive
    advice = f"fetch it elsewhere, and put it at {path}"
    try:
        with urlopen(package.url, timeout=TIMEOUT) as reply:
            archive = reply.read(io.LARGEST)
    except (OSError, ValueError) as error:  # of the network; of an address
        reason = getattr(error, "reason", None) or error
        raise CheckpointError(f"{package.url}: cannot be fetched ({reason}); {advice}") from None
    if not package.is_of(archive):
        raise CheckpointError(f"{package.url}: is not the archive of {package.file} that was expected; {advice}")
    io.write({path: archive})
    return archive


def read(package: Package, names: Sequence[str]) -> dict[str, bytes]:
    """Return files of a package by their paths. Raises CheckpointError as `fetch` does."""
    with tarfile.open(fileobj=BytesIO(fetch(package)), mode="r:gz") as archive:
        found = {name: archive.extractfile(f"package/{name}") for name in names}
        return {name: file.read() for name, file in found.items() if file}
