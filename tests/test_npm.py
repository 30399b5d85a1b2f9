"""Packages of the npm registry are fetched once, checked by their hash, and then used offline."""

import base64
import hashlib
import io
import shutil
import tarfile

import pytest

from tinyprompt.errors import CheckpointError
from tinyprompt.export import npm

FILES = {"dist/a.mjs": b"export const a = 1;\n", "LICENSE": b"MIT\n"}


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """Return a registry with one package in a folder, and an empty cache."""
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w:gz") as archive:
        for name, content in FILES.items():
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    integrity = f"sha512-{base64.b64encode(hashlib.sha512(held.getvalue()).digest()).decode()}"
    package = npm.Package("@them/a", "1.2.3", integrity)
    at = tmp_path / "registry" / "@them" / "a" / "-" / "a-1.2.3.tgz"
    at.parent.mkdir(parents=True)
    at.write_bytes(held.getvalue())
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", f"{(tmp_path / 'registry').as_uri()}/")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return package, at


def test_a_package_is_fetched_once(registry):
    package, at = registry
    assert npm.read(package, ["LICENSE", "dist/a.mjs"]) == FILES
    shutil.rmtree(at.parent)
    assert npm.read(package, ["dist/a.mjs"]) == {"dist/a.mjs": FILES["dist/a.mjs"]}


def test_a_damaged_cache_is_fetched_again(registry):
    package, _ = registry
    npm.fetch(package)
    npm.cached(package).write_bytes(b"cut short")
    assert npm.read(package, ["LICENSE"]) == {"LICENSE": FILES["LICENSE"]}


def test_a_modified_archive_is_refused_and_not_kept(registry):
    package, at = registry
    at.write_bytes(at.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match=r"a-1\.2\.3\.tgz: is not the archive of a-1\.2\.3\.tgz that was"):
        npm.read(package, ["LICENSE"])
    assert not npm.cached(package).exists()


@pytest.mark.parametrize(
    ("registry_url", "reason"),
    [(None, "No such file"), ("http://127.0.0.1:9", "Connection refused"), ("nonsense", "unknown url type")],
)
def test_without_a_network_the_error_names_the_cache_path(registry, registry_url, reason, monkeypatch):
    package, at = registry
    held = at.read_bytes()
    at.unlink()
    if registry_url:
        monkeypatch.setenv("NPM_CONFIG_REGISTRY", registry_url)
    with pytest.raises(CheckpointError, match=f"cannot be fetched .*{reason}.*put it at") as error:
        npm.read(package, ["LICENSE"])
    path = npm.cached(package)
    assert str(error.value).endswith(f"put it at {path}")
    path.parent.mkdir(parents=True)
    path.write_bytes(held)  # follow the advice of the error
    assert npm.read(package, ["LICENSE"]) == {"LICENSE": FILES["LICENSE"]}
