"""The generated C trains a prompt like NumPy, and its accuracy equals that of `eval`."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from test_export import write_model

from tinyprompt import optim, train
from tinyprompt.cli.main import main
from tinyprompt.data import Batch, Row
from tinyprompt.device import version
from tinyprompt.errors import DataError
from tinyprompt.export import embedded
from tinyprompt.export.graphs import Shape
from tinyprompt.files import models
from tinyprompt.model import PROMPT, Prompt
from tinyprompt.predict import predict

SHAPE = Shape(batch_size=4, input_tokens=12, target_tokens=5, prompt_length=3)
WORDS = "bad", "good", "odd"
TRAIN = [Row(f"row {i} {WORDS[i % 3]}", WORDS[i % 3]) for i in range(20)]
TEST = [Row(f"text {i * 7}", WORDS[i * i % 3]) for i in range(30)]  # 30 is not a multiple of the batch size
STEPS = 6
needs_translator = pytest.mark.skipif(
    not version("emx-onnx-cgen"), reason="needs emx-onnx-cgen: pip install '.[embedded]'"
)


def table(path, rows):
    path.write_text("\n".join(["input\ttarget", *(f"{row.input}\t{row.target}" for row in rows)]) + "\n")
    return str(path)


def unpacked(content):
    """Parse labels and rows of a rows.bin according to its README.md."""
    numbers = np.frombuffer(content, "<i4")
    magic, length, out, labels, train_rows, test_rows = numbers[:6]
    assert (magic, length, out) == (0x31505254, SHAPE.input_tokens, SHAPE.target_tokens)
    words = numbers[6 : 6 + labels * (1 + out)].reshape(labels, 1 + out)
    return words, numbers[6 + words.size :].reshape(train_rows + test_rows, 2 + length)


def batch_of(words, rows):
    ids, length = rows[:, 2:].astype(np.int64), rows[:, 1:2]
    labels = words[rows[:, 0]]
    mask = (np.arange(ids.shape[1]) < length).astype(np.int64)
    weights = (np.arange(labels.shape[1] - 1) < labels[:, :1]).astype(np.float32)
    return Batch(ids, mask, labels[:, 1:].astype(np.int64), weights)


def drawn(count, rows):
    """Yield the row indices that train.c's xorshift draws."""
    state = 2463534242
    for _ in range(count):
        state ^= state << 13 & 0xFFFFFFFF
        state ^= state >> 17
        state ^= state << 5 & 0xFFFFFFFF
        yield state % rows


@pytest.mark.slow
@needs_translator
@pytest.mark.skipif(not (shutil.which("cc") and shutil.which("make")), reason="needs a C compiler and make")
def test_the_program_learns_like_numpy_and_prints_the_accuracy_of_eval(tmp_path, capsys):
    folder, out = write_model(tmp_path / "model", dtype=np.float16), tmp_path / "out"
    files = [table(tmp_path / f"{name}.tsv", rows) for name, rows in (("train", TRAIN), ("test", TEST))]
    sizes = [word for name, n in SHAPE._asdict().items() for word in (f"--{name.replace('_', '-')}", str(n))]
    assert main(["export", "--c", str(out), "--model", str(folder), *sizes, "--rows", *files]) == 0
    subprocess.run(["make", "-s", "CFLAGS=-O1 -Wall -Wextra -Werror=implicit"], cwd=out, check=True)
    command = ["./train", "rows.bin", str(STEPS), "0.1"]
    done = subprocess.run(command, cwd=out, capture_output=True, text=True, check=True)
    losses = [float(x) for x in re.findall(r"^step \d+ loss (\S+)$", done.stdout, re.M)]
    accuracy = float(re.search(r"^accuracy (\S+)$", done.stdout, re.M)[1])
    assert re.search(r"^[\d.]+ ms a step, \d+ kB of memory at most$", done.stdout, re.M)

    model, prompt = models.load(folder), np.load(out / "prompt.npy")
    words, rows = unpacked((out / "rows.bin").read_bytes())
    rule, wanted, picks = optim.adam(), [], list(drawn(STEPS * SHAPE.batch_size, len(TRAIN)))
    trained = {PROMPT: prompt}
    state = rule.init(trained)
    for step in range(STEPS):
        chosen = rows[picks[step * SHAPE.batch_size : (step + 1) * SHAPE.batch_size]]
        loss, grads = train.loss_and_grads(trained, model.params, model.config, batch_of(words, chosen))
        trained, state = rule.update(trained, grads, state, 0.1)
        wanted.append(float(loss))
    assert np.allclose(losses, [wanted[0], wanted[-1]], rtol=1e-4)
    tuned = np.load(out / "tuned.npy")
    assert np.linalg.norm(tuned - trained[PROMPT]) < 1e-3 * np.linalg.norm(tuned - prompt)

    saved = str(tmp_path / "tuned.safetensors")
    source = str(out / "tuned.npy")
    assert main(["convert", source, saved, "--model", str(folder), "--label-words", *WORDS]) == 0
    capsys.readouterr()
    words = ["--model", str(folder), "--max-input-tokens", "12", "--json"]
    assert main(["eval", saved, files[1], *words]) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert np.isclose(scores["accuracy"], accuracy, atol=1e-6)
    assert 0 < accuracy < 1
    (out / "rows.bin").write_bytes((out / "rows.bin").read_bytes()[:-4])
    cut = subprocess.run(command, cwd=out, capture_output=True, text=True)
    assert (cut.returncode, cut.stderr) == (2, "rows.bin: cut short; write it again\n")


@pytest.mark.slow
@needs_translator
@pytest.mark.skipif(not (shutil.which("cc") and shutil.which("make")), reason="needs a C compiler and make")
def test_the_program_answers_like_predict(tmp_path):
    texts = ["Two goals in the last minute.", "The soup was cold.", "Stir in the <unk> Garlic, Crème fraîche!", ""]
    rows = [Row(text, word) for text, word in zip(texts, ("sport", "food", "money", "nature"), strict=True)]
    out, shape = tmp_path / "out", Shape(batch_size=3, input_tokens=12, target_tokens=3, prompt_length=2)
    embedded.export_c("tiny", out, shape, train=rows)
    assert (out / "labels.txt").read_text() == "food\nmoney\nnature\nsport\n"
    subprocess.run(["make", "-s", "predict", "CFLAGS=-O1 -Wall -Wextra -Werror=implicit"], cwd=out, check=True)
    texts[-1] = "Old bears sleep. " * 20  # too long: its end is cut, as in training
    command = ["./predict", "labels.txt", "prompt.npy"]
    done = subprocess.run(command, input="\n".join(texts), cwd=out, capture_output=True, text=True, check=True)
    settings = {"max_input_tokens": shape.input_tokens}
    words = tuple((out / "labels.txt").read_text().split())
    prompt = Prompt({PROMPT: np.load(out / "prompt.npy")}, label_words=words, settings=settings)
    answers = predict(models.load("tiny"), prompt, texts, "numpy")
    assert done.stdout.splitlines() == answers
    assert len(set(answers)) > 1
    (out / "words.bin").write_bytes(b"no table")
    failed = subprocess.run(command, input="", cwd=out, capture_output=True, text=True)
    assert (failed.returncode, failed.stderr) == (2, "words.bin: cannot be read\n")


def test_rows_are_packed_in_the_documented_format(tmp_path):
    model = models.load(write_model(tmp_path / "model"))
    words, rows = unpacked(embedded.packed(model, SHAPE, TRAIN, TEST))
    assert [tuple(x[1 : 1 + x[0]]) for x in words] == [tuple(model.tokenizer.encode(word)) for word in WORDS]
    for row, numbers in zip([*TRAIN, *TEST], rows, strict=True):
        ids = model.tokenizer.encode(row.input)
        ids = ids if len(ids) <= 12 else [*ids[:11], 1]
        assert WORDS[numbers[0]] == row.target
        assert numbers[1:].tolist() == [len(ids), *ids, *[0] * (12 - len(ids))]


def test_errors_name_the_remedy(tmp_path, capsys, monkeypatch):
    model = models.load(write_model(tmp_path / "model"))
    with pytest.raises(DataError, match="add rows to learn from that have it"):
        embedded.packed(model, SHAPE, TRAIN, [Row("a", "so")])
    with pytest.raises(DataError, match="up to 5 tokens, with their end; give --target-tokens 5, found 4"):
        embedded.packed(model, SHAPE._replace(target_tokens=4), TRAIN, TEST)

    def error_of(*words):
        assert main(["export", *map(str, words)]) == 2
        return capsys.readouterr().err

    assert "--c: has its own folder; leave out --plain" in error_of("--c", tmp_path / "c", "--plain")
    assert "--rows: needs --c" in error_of("--rows", "a.tsv")
    assert "needs --c and one or two files" in error_of("--c", tmp_path / "c", "--rows", "a", "b", "c")
    monkeypatch.setattr(embedded, "version", lambda package: None)
    assert "pip install 'tinyprompt-t5[embedded]'" in error_of("--c", tmp_path / "c")
    assert not (tmp_path / "c").exists()


@needs_translator
def test_a_graph_that_cannot_be_translated_is_refused():
    with pytest.raises(embedded.DeviceError, match=r"emx-onnx-cgen \S+ cannot translate step: "):
        embedded.translated("step", b"no graph")
