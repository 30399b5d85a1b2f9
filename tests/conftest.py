"""Fixtures that several modules share."""

import pytest


@pytest.fixture
def folder(tmp_path):
    import files

    return files.write(tmp_path / "small", files.SMALL, files.weights())


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A directory that hypothesis may change again and again, and the bytes of its weights."""
    import files

    folder = files.write(tmp_path_factory.mktemp("shared"), files.SMALL, files.weights())
    return folder, (folder / "model.safetensors").read_bytes()
