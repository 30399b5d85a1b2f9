"""The command `devices`, and the choice that `--device auto` makes."""

import json

import numpy as np
import pytest

from tinyprompt.check import devices
from tinyprompt.check.devices import AUTO, Line, Survey
from tinyprompt.cli import checking
from tinyprompt.cli.main import main
from tinyprompt.device import DEVICES, default_device
from tinyprompt.files import models

needs_ort = pytest.mark.skipif(default_device() == "numpy", reason="needs ONNX Runtime: pip install '.[ort]'")


@pytest.fixture
def quick(monkeypatch):
    """Try NumPy and the CPU only, on `tiny`, with one step each."""
    monkeypatch.setattr(devices, "SECONDS", 0.001)
    monkeypatch.setattr(models, "load", lambda name, load=models.load, **o: load("tiny" if name is None else name, **o))


@needs_ort
def test_the_command_lists_every_device(quick, capsys):
    assert main(["devices"]) == 0
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[1:]] == list(DEVICES)
    assert main(["devices", "--json"]) == 0
    found = {line["device"]: line for line in json.loads(capsys.readouterr().out)["devices"]}
    assert found["numpy"]["error"] < 1e-5 < found["cpu-int8"]["error"] < 0.1
    assert found["cpu"]["error"] < 1e-4
    for line in found.values():
        assert line["right"] == (line["why"] == "")
        assert (line["steps_per_second"] > 0) == line["right"]


@needs_ort
@pytest.mark.parametrize("wrong", [1.01, float("nan")])
def test_a_wrong_device_is_named_and_not_chosen(quick, monkeypatch, capsys, wrong):
    original = devices.run

    def run(model, params, cases, device):
        found = original(model, params, cases, device)
        if device == "cpu":
            found[0]["gradient"] = found[0]["gradient"] * np.float32(wrong)
        return found

    monkeypatch.setattr(devices, "run", run)
    assert main(["devices", "--json"]) == 1
    found = {line["device"]: line for line in json.loads(capsys.readouterr().out)["devices"]}
    assert (found["cpu"]["right"], found["numpy"]["right"]) == (False, True)
    assert "WRONG" in str(Survey.of(models.load("tiny"), models.load("tiny"), ["cpu"]))
    monkeypatch.setattr(devices, "speed", lambda model, device: {"cpu": 9.0, "numpy": 1.0}.get(device, 0.5))
    assert checking.survey_devices().fastest("auto").device == "numpy"


@pytest.mark.parametrize(("auto", "chosen"), [("auto", "cpu"), ("auto-bf16", "cuda-bf16"), ("auto-int8", "cpu-int8")])
def test_auto_is_the_fastest_correct_and_exact_device(auto, chosen):
    lines = [
        Line("numpy", "", 1e-7, 1e-3, 1.0),
        Line("cpu", "", 1e-6, 1e-3, 3.0),
        Line("cuda", "", 1e-2, 1e-3, 50.0),
        Line("cuda-bf16", "", 1e-2, 1e-1, 5.0),
        Line("cpu-int8", "", 5e-2, 1e-1, 6.0),
        Line("openvino", "not installed"),
    ]
    assert auto in AUTO
    assert Survey(lines).fastest(auto).device == chosen


def test_a_command_prints_the_device_that_auto_chose(monkeypatch, capsys, tmp_path):
    tried = Survey([Line("numpy", "", 1e-7, 1e-3, 2.0), Line("cpu", "not installed")])
    monkeypatch.setattr(checking, "survey_devices", lambda: tried)
    rows = tmp_path / "rows.tsv"
    rows.write_text("input\ttarget\n" + "".join(f"film {i}\t{'good' if i % 2 else 'bad'}\n" for i in range(8)))
    out = str(tmp_path / "prompt.safetensors")
    given = ["tune", str(rows), "--model", "tiny", "--steps", "1", "--prompt-length", "2", "--out", out]
    assert main([*given, "--device", "auto", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["device"] == "numpy"
    assert "device auto: numpy, at 2 steps a second" in printed.err
