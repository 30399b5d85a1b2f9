"""The command line in difficult conditions: closed streams, full disks, narrow encodings, an early Ctrl-C."""

import os
import subprocess
import sys

import pytest
from test_cli import NAMED, QUICK, write_model, write_rows

from tinyprompt.cli.main import main
from tinyprompt.files import io

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rough")
    model, rows = write_model(folder / "m", 0), write_rows(folder / "rows.tsv", NAMED)
    words = ["--words", "good=très ☺", "bad=no"]
    assert main(["tune", rows, "--model", str(model), "--out", str(folder / "p.safetensors"), *words, *QUICK]) == 0
    return folder


def tinyprompt(folder, *args, shell="", **environment):
    """Run a command; `shell` redirects its streams."""
    command = " ".join([f"'{sys.executable}' -m tinyprompt", *(f"'{arg}'" for arg in args), shell])
    environment = os.environ | {"PYTHONPATH": os.path.abspath("."), **environment}
    done = subprocess.run(["sh", "-c", command], cwd=folder, env=environment, capture_output=True, timeout=120)
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    return done


PREDICT = ("predict", "p.safetensors", "film 1", "--model", "m")


@pytest.mark.parametrize("shell", [">&-", "2>&-", ">&- 2>&- <&-"])
def test_closed_streams_are_accepted(folder, shell):
    done = tinyprompt(folder, *PREDICT, shell=shell)
    assert done.returncode == 0
    assert bool(done.stdout) == (shell == "2>&-")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("more", [(), ("--json",)])
def test_a_full_standard_output_is_reported_in_one_line(folder, more):
    done = tinyprompt(folder, *PREDICT, *more, shell=">/dev/full")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == b"tinyprompt: standard output: No space left on device"


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_output_is_escaped_for_the_encoding_of_the_terminal(folder, encoding):
    done = tinyprompt(folder, "inspect", "p.safetensors", "--model", "m", PYTHONIOENCODING=encoding)
    assert done.returncode == 0
    assert "très ☺".encode(encoding, "backslashreplace") in done.stdout


def test_texts_are_utf8_in_any_locale(folder):
    done = tinyprompt(
        folder, "predict", "p.safetensors", "très ☺", "--json", "--model", "m", LC_ALL="C", PYTHONUTF8="0"
    )
    assert done.returncode == 0
    assert b'"input": "tr\\u00e8s \\u263a"' in done.stdout


def test_a_full_disk_is_named(folder, tmp_path, monkeypatch):
    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*p\.npy'"):
        io.write({tmp_path / "p.npy": b"1"})
    assert not [*tmp_path.iterdir()]


def test_ctrl_c_during_imports_is_reported_in_one_line(folder):
    code = "import sys; sys.modules['tinyprompt.cli.main'] = None\n"
    code += "import builtins; real = builtins.__import__\n"
    code += "def fake(name, *rest):\n    if name == 'tinyprompt.cli.main': raise KeyboardInterrupt\n"
    code += "    return real(name, *rest)\n"
    code += "from tinyprompt.__main__ import main; builtins.__import__ = fake; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "tinyprompt: stopped; nothing was done\n")


def test_deep_nesting_is_refused(folder, capsys):
    (folder / "deep.toml").write_text("a = " + "[" * 100_000)
    assert main(["study", str(folder / "deep.toml")]) == 2
    assert "deep.toml: not valid TOML" in capsys.readouterr().err


def test_an_ensemble_names_the_prompt_with_other_label_words(folder, capsys):
    rows, other = str(folder / "rows.tsv"), str(folder / "q.safetensors")
    assert main(["tune", rows, "--model", str(folder / "m"), "--out", other, *QUICK]) == 0
    assert main(["ensemble", str(folder / "p.safetensors"), other, "--data", rows, "--model", str(folder / "m")]) == 2
    assert "q.safetensors has bad, good" in capsys.readouterr().err


def test_an_error_without_a_file_is_not_attributed_to_the_output(folder, capsys, monkeypatch):
    def refused(*_):
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr("tinyprompt.cli.shared.prompts.load_prompt", refused)
    assert main(["predict", str(folder / "p.safetensors"), "a"]) == 2
    assert capsys.readouterr().err == "tinyprompt: [Errno 111] Connection refused\n"
