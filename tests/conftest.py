"""Fixtures that several modules share, and the number of examples that hypothesis draws."""

import re

import profiles  # noqa: F401 - sets the number of examples
import pytest

# Tests in these files start processes, compare with torch or draw many models. `pytest -m "not slow"` skips them.
SLOW = {
    *("bench", "check", "classifier", "cli", "cuda_kernels", "decode", "describe", "details", "device", "devices"),
    *("docs", "ensemble", "export", "frozen", "fuzz", "gradients", "halves", "hub", "lessons", "lowering", "methods"),
    *("models", "mutants", "page", "parity", "predict", "prompts", "serve", "site", "study", "t5", "t5x", "tasks"),
    *("torch_bin", "train", "tuning", "web", "weights"),
}


def pytest_collection_modifyitems(items):
    """Mark the tests in slow files."""
    for item in items:
        if item.path.stem.removeprefix("test_") in SLOW:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def folder(tmp_path):
    """Return a small model directory."""
    import files

    return files.write(tmp_path / "small", files.SMALL, files.weights())


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """Return a directory that hypothesis may change repeatedly, and the original bytes of its weights."""
    import files

    folder = files.write(tmp_path_factory.mktemp("shared"), files.SMALL, files.weights())
    return folder, (folder / "model.safetensors").read_bytes()


drawn: dict[str, int] = {}


def pytest_runtest_teardown(item):
    """Read hypothesis's statistics of the test: '20 passing, 0 failing, and 0 invalid test cases'."""
    passing = re.findall(r"(\d+) passing", getattr(item, "hypothesis_statistics", ""))
    if passing:
        drawn[item.nodeid] = sum(map(int, passing))


def pytest_terminal_summary(terminalreporter):
    if drawn:
        terminalreporter.write_line(f"hypothesis drew {sum(drawn.values()):,} examples for {len(drawn)} tests")
