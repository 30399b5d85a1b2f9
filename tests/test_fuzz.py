"""Damaged files, saves that race, and runs that are killed."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

import tinyprompt
from tinyprompt.files import prompts
from tinyprompt.files.safetensors import map_tensors
from tinyprompt.model import Prompt

MORE = settings.default.max_examples // 100  # 1, or 20 with --hypothesis-profile long
ENV = os.environ | {"PYTHONPATH": str(Path(tinyprompt.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
posix = pytest.mark.skipif(os.name != "posix", reason="needs fork and signals")


@posix
def test_damaged_files_are_refused_in_one_line_that_names_them():
    command = [sys.executable, str(Path(__file__).parent / "fuzz.py"), "--cases", str(300 * MORE)]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


SAVE = """
import sys
import numpy as np
from tinyprompt.files.prompts import save_prompt
from tinyprompt.model import Prompt
value = float(sys.argv[1])
for _ in range(int(sys.argv[3])):
    save_prompt(Prompt({"encoder.prompt.embedding": np.full((40, 64), value, np.float32)}), sys.argv[2])
"""


@posix
def test_two_processes_saving_to_one_path_mix_nothing(tmp_path):
    path, saves = tmp_path / "p.safetensors", str(100 * MORE)
    prompts.save_prompt(Prompt({"encoder.prompt.embedding": np.zeros((40, 64), np.float32)}), path)
    running = [subprocess.Popen([sys.executable, "-c", SAVE, x, str(path), saves], env=ENV) for x in ("1", "2")]
    seen = set()
    while any(process.poll() is None for process in running):
        seen |= set(np.unique(prompts.load_prompt(path).array).tolist())
        assert np.unique(prompts.load_prompt(path).array).size == 1
    assert [process.returncode for process in running] == [0, 0]
    assert seen <= {0.0, 1.0, 2.0}
    assert [found.name for found in tmp_path.iterdir()] == ["p.safetensors"]


@posix
def test_a_repeatedly_killed_run_gives_the_result_of_an_unbroken_run(folder, tmp_path):
    rows = tmp_path / "rows.tsv"
    rows.write_text("input\ttarget\n" + "".join(f"film {i}\t{'bad' if i % 2 else 'good'}\n" for i in range(20)))
    command = [sys.executable, "-m", "tinyprompt", "tune", str(rows), "--dev", str(rows), "--model", str(folder)]
    first = "--steps 400 --batch-size 4 --prompt-length 3 --eval-every 1 --device numpy --out".split()  # noqa: SIM905
    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    subprocess.run([*command, *first, str(whole)], env=ENV, check=True, capture_output=True)
    rng, kills, resume = random.Random(0), 0, [*command, *first, str(broken)]
    while True:
        process = subprocess.Popen(resume, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for _ in range(10_000):  # until a first checkpoint exists
            if broken.exists() or process.poll() is not None:
                break
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.4) if kills else 0.1)
        process.send_signal(signal.SIGKILL) if kills < 4 * MORE else process.wait()
        _, err = process.communicate()
        if process.returncode == 0 or b"completed steps" in err:
            break
        kills += process.returncode == -signal.SIGKILL
        assert process.returncode == -signal.SIGKILL, err.decode()
        resume = [*command, "--resume", str(broken), "--device", "numpy"]
    assert kills
    expected, found = map_tensors(whole), map_tensors(broken)
    assert expected.keys() == found.keys()
    assert [name for name in expected if expected[name].tobytes() != found[name].tobytes()] == []
    prompts.load_prompt(broken)
