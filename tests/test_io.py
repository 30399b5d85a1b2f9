"""Files are written completely or not at all, and existing files and links are neither followed nor lost."""

import gzip
import lzma
import os
import threading
import time
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as drawn
from ml_dtypes import bfloat16
from profiles import examples
from reference import torch
from safetensors import safe_open
from safetensors.numpy import load_file

from tinyprompt.errors import CheckpointError
from tinyprompt.files import io, prompts, tables
from tinyprompt.files.safetensors import DTYPES, dump, map_tensors


def contents_of(folder):
    """Map all paths below a folder to file contents and link targets."""
    return {
        path: os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def failing(error, *parts):
    """Yield parts of a file, then raise an error."""
    yield from parts
    raise error


FAILURES = [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()]
failures = pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)


def test_bytes_parts_and_copies_are_written_into_new_folders(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"copied")
    at = tmp_path / "new" / "folder"
    io.write({at / "a": b"whole", at / "b": iter([b"in ", memoryview(b"parts")]), at / "more" / "c": source})
    found = {path.name: path.read_bytes() for path in at.rglob("*") if path.is_file()}
    assert found == {"a": b"whole", "b": b"in parts", "c": b"copied"}
    io.write({at / "a": b"other", source: source})
    assert (at / "a").read_bytes() == b"other"
    assert source.read_bytes() == b"copied"
    assert sorted(path.name for path in at.iterdir()) == ["a", "b", "more"]


def test_a_link_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "far").write_bytes(b"kept")
    for content in (b"new", iter([b"new"]), tmp_path / "source"):
        (tmp_path / "source").write_bytes(b"new")
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to("far")
        io.write({tmp_path / "link": content})
        assert not (tmp_path / "link").is_symlink()
        assert (tmp_path / "link").read_bytes() == b"new"
    assert (tmp_path / "far").read_bytes() == b"kept"


PLANTED = {
    "file": lambda path: path.write_bytes(b"planted"),
    "link to a file": lambda path: path.symlink_to("far"),
    "link to nothing": lambda path: path.symlink_to("nowhere"),
    "link to a folder": lambda path: path.symlink_to("folder"),
    "folder": lambda path: path.mkdir(),
}
planted = pytest.mark.parametrize("plant", PLANTED.values(), ids=PLANTED)


@pytest.fixture
def predictable_names(tmp_path, monkeypatch):
    """Make temporary names predictable; return a folder, and an empty folder and a file as targets of links."""
    monkeypatch.setattr(io.secrets, "token_hex", lambda size: "00" * size)
    (tmp_path / "far").write_bytes(b"kept")
    (tmp_path / "folder").mkdir()
    return tmp_path


@planted
def test_an_entry_at_the_temporary_name_of_a_file_is_left_alone(predictable_names, plant):
    path = predictable_names / "b"
    plant(io.part_of(path))
    for old in (None, b"old"):
        if old:
            path.write_bytes(old)
        before = contents_of(predictable_names)
        for content in (b"new", iter([b"new"]), predictable_names / "far"):
            with pytest.raises(OSError, match="exists"):
                io.write({predictable_names / "a": b"first", path: content})
        assert contents_of(predictable_names) == before


@planted
def test_an_entry_at_the_temporary_name_of_a_folder_is_left_alone(predictable_names, plant):
    plant(io.part_of(predictable_names / "out"))
    before = contents_of(predictable_names)
    with pytest.raises(FileExistsError):
        io.write_folder(predictable_names / "out", {"a": b"new"})
    assert contents_of(predictable_names) == before


def test_temporary_names_cannot_be_guessed(tmp_path):
    names = {io.part_of(tmp_path / "a").name for _ in range(50)}
    assert len(names) == 50
    assert all(name.startswith(".a.") and name.endswith(".part") for name in names)


@failures
@pytest.mark.parametrize("old", [False, True], ids=["new", "over an old one"])
def test_a_failing_part_leaves_the_old_file(tmp_path, error, old):
    if old:
        io.write({tmp_path / "new" / "a": b"old a", tmp_path / "new" / "deep" / "b": b"old b"})
    before = contents_of(tmp_path)
    files = {"a": b"new a", "deep/b": failing(error, b"ne"), "c": b"new c"}
    with pytest.raises(type(error)):
        io.write({tmp_path / "new" / name: content for name, content in files.items()})
    with pytest.raises(FileNotFoundError):
        io.write({tmp_path / "new" / "a": b"new a", tmp_path / "other" / "b": tmp_path / "no such source"})
    assert contents_of(tmp_path) == before


@failures
def test_a_failure_between_two_files_removes_the_new_files(tmp_path, monkeypatch, error):
    before = contents_of(tmp_path)
    replace, calls = os.replace, []

    def second_fails(*names):
        calls.append(names)
        if len(calls) == 2:
            raise error
        replace(*names)

    monkeypatch.setattr(io.os, "replace", second_fails)
    with pytest.raises(type(error)):
        io.write({tmp_path / "new" / name: b"new" for name in "abc"})
    assert len(calls) == 2
    assert contents_of(tmp_path) == before


def test_foreign_files_in_a_new_folder_stay(tmp_path):
    def parts():
        (tmp_path / "new" / "theirs").write_bytes(b"kept")
        yield from failing(OSError("full"))

    with pytest.raises(OSError, match="full"):
        io.write({tmp_path / "new" / "a": parts()})
    assert contents_of(tmp_path) == {tmp_path / "new": None, tmp_path / "new" / "theirs": b"kept"}


@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
@failures
def test_a_folder_gets_all_its_files_or_stays_as_it_was(tmp_path, monkeypatch, error, there):
    out = tmp_path / "new" / "out"
    if there:
        out.mkdir(parents=True)
    before = contents_of(tmp_path)
    with pytest.raises(type(error)):
        io.write_folder(out, {"a": b"whole", "b": failing(error, b"ha")})
    assert contents_of(tmp_path) == before
    replace = os.replace

    def folder_fails(part, path):
        if path == out:
            raise error
        replace(part, path)

    with monkeypatch.context() as patch:
        patch.setattr(io.os, "replace", folder_fails)
        with pytest.raises(type(error)):
            io.write_folder(out, {"a": b"whole"})
    assert contents_of(tmp_path).items() == before.items() - {(out, None)}
    io.write_folder(out, {"a": b"whole", "b": b"half"})
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {"a": b"whole", "b": b"half"}
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_folder_that_is_filled_meanwhile_keeps_its_file(tmp_path):
    out = tmp_path / "out"
    out.mkdir()

    def parts():
        (out / "theirs").write_bytes(b"kept")
        yield b"mine"

    with pytest.raises(OSError, match="not empty"):
        io.write_folder(out, {"a": parts()})
    assert contents_of(tmp_path) == {out: None, out / "theirs": b"kept"}


def test_two_concurrent_writers_leave_one_whole_file(tmp_path):
    path, errors = tmp_path / "new" / "a", []
    meet = threading.Barrier(2)

    def slowly(letter):
        meet.wait()  # both temporary files are open
        for _ in range(50):
            yield letter * 1000
            time.sleep(0)

    def writer(letter):
        try:
            for _ in range(20):
                io.write({path: slowly(letter)})
        except Exception as error:  # the assertion below shows the error
            errors.append(error)
            meet.abort()

    threads = [threading.Thread(target=writer, args=(letter,)) for letter in (b"x", b"y")]
    for thread in threads:
        thread.start()
    seen = set()
    while any(thread.is_alive() for thread in threads):
        if path.exists():
            seen.add(path.read_bytes())
    for thread in threads:
        thread.join()
    assert errors == []
    assert seen | {path.read_bytes()} <= {b"x" * 50_000, b"y" * 50_000}
    assert list(path.parent.iterdir()) == [path]


# Safetensors that are written by our writer.

KINDS = [*DTYPES.values(), ">f4", ">f8", ">f2"]
SHAPES = drawn.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)


@st.composite
def arrays(draw):
    """Draw any bits of any dtype and shape: contiguous, transposed, or every second row."""
    shape, dtype = draw(SHAPES), np.dtype(draw(st.sampled_from(KINDS)))
    bits = draw(drawn.arrays(np.uint8, (*shape, dtype.itemsize)))
    array = bits.reshape(-1).view(dtype).reshape(shape)
    view = draw(st.sampled_from(["whole", "transposed", "rows"]))
    return array.T if view == "transposed" else array[::2] if view == "rows" and array.ndim else array


NAMES = st.text(st.characters(codec="utf-8"), max_size=9).filter(lambda name: name != "__metadata__")
TEXTS = st.text(st.characters(codec="utf-8"), max_size=9)


@examples(150)
@given(tensors=st.dictionaries(NAMES, arrays(), max_size=5), metadata=st.dictionaries(TEXTS, TEXTS, max_size=3))
def test_the_safetensors_library_reads_our_files(tensors, metadata, tmp_path_factory):
    path = tmp_path_factory.mktemp("written") / "a.safetensors"
    io.write({path: dump(tensors, metadata)})
    with safe_open(path, "pt") as file:
        assert file.metadata() == metadata
        assert set(file.keys()) == tensors.keys()
        found = {name: file.get_tensor(name) for name in tensors}
    for name, array in tensors.items():
        little = np.ascontiguousarray(array, array.dtype.newbyteorder("=")).reshape(array.shape)
        assert tuple(found[name].shape) == array.shape
        assert str(found[name].dtype) == f"torch.{little.dtype}"
        assert found[name].reshape(-1).view(torch.uint8).numpy().tobytes() == little.tobytes()
    size = int.from_bytes(path.read_bytes()[:8], "little")
    assert (8 + size) % 64 == 0


@examples(50)
@given(tensors=st.dictionaries(NAMES, arrays().filter(lambda array: array.size), max_size=5))
def test_both_readers_agree_and_tensors_are_aligned(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("written") / "a.safetensors"
    io.write({path: dump(tensors, {})})
    ours, theirs = map_tensors(path), load_file(path)
    assert ours.keys() == theirs.keys() == tensors.keys()
    for name, array in ours.items():
        assert array.flags.aligned
        assert (array.dtype, array.shape) == (theirs[name].dtype, theirs[name].shape)
        assert array.tobytes() == theirs[name].tobytes()


@pytest.mark.parametrize("dtype", [np.int64, np.bool_, np.complex64, "U3", object], ids=str)
def test_an_unreadable_dtype_is_not_written(tmp_path, dtype):
    before = contents_of(tmp_path)
    with pytest.raises(CheckpointError, match=r"key 'a\.b' has dtype .*; expected one of float64, float32, float16"):
        io.write({tmp_path / "new" / "a": dump({"a.b": np.zeros(3, dtype), "c": np.ones(2)}, {})})
    assert contents_of(tmp_path) == before


def test_each_tensor_is_read_just_before_it_is_written():
    class Read:
        shape, dtype = (2, 3), np.dtype(bfloat16)

        def __array__(self, dtype=None, copy=None):
            read.append(self)
            return np.ones(self.shape, self.dtype)

    read = []
    parts = dump({"a": Read(), "b": Read()}, {})
    for count in range(3):
        next(parts)
        assert len(read) == count


def bomb(path, size):
    """Write a small file that decompresses to a large array."""
    if path.suffix == ".npz":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.npy", bytes(size))
    else:
        opener = {".gz": gzip.open, ".xz": lzma.open}[path.suffix]
        with opener(path, "wb") as file:
            file.write(b"input\ttarget\n" + bytes(size))
    assert path.stat().st_size < size / 10
    return path


@pytest.mark.parametrize("name", ["a.npz", "a.tsv.gz", "a.tsv.xz"])
def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(io, "LARGEST", 100_000)
    monkeypatch.setattr(tables, "LARGEST", 100_000)
    path = bomb(tmp_path / name, 1_000_000)
    with pytest.raises(ValueError, match=rf"{name}: contains .*100,000"):
        io.load_numpy(path) if name.endswith("npz") else tables.read_rows(path)


@pytest.mark.parametrize("read", [io.load_numpy, io.read_json, tables.read_rows, prompts.load_prompt])
def test_a_pipe_and_a_device_are_refused(tmp_path, read):
    path = tmp_path / "a.tsv"
    os.mkfifo(path)
    with pytest.raises(ValueError, match="is a device or a pipe"):
        read(path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="is a device or a pipe"):
        read(path)


def test_a_file_claimed_by_another_run_is_refused(tmp_path):
    path = tmp_path / "new" / "p.safetensors"
    with (
        io.claimed(path),
        pytest.raises(CheckpointError, match=r"p\.safetensors: another run is writing this file"),
        io.claimed(path),
    ):
        pass
    with io.claimed(path):  # the claim was released
        pass
    assert list(path.parent.iterdir()) == []
    (path.parent / ".p.safetensors.lock").touch()  # left behind by a killed run
    with io.claimed(path):
        pass
    (path.parent / ".p.safetensors.lock").symlink_to("far")
    with pytest.raises(OSError, match=r"symbolic links|loop"), io.claimed(path):
        pass
    assert not (path.parent / "far").exists()


def test_a_run_can_wait_for_another_run(tmp_path):
    path, order = tmp_path / "p.json", []

    def second():
        with io.claimed(path, wait=True):
            order.append("second")

    with io.claimed(path):
        waiting = [threading.Thread(target=second) for _ in range(3)]
        for thread in waiting:
            thread.start()
        time.sleep(0.1)
        order.append("first")
    for thread in waiting:
        thread.join(10)
    assert order == ["first", "second", "second", "second"]
    assert list(tmp_path.iterdir()) == []


def test_waiting_runs_run_one_at_a_time(tmp_path):
    inside, most = [], []

    def runs():
        for _ in range(50):
            with io.claimed(tmp_path / "p.json", wait=True):
                inside.append(1)
                time.sleep(0.0002)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=runs) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert most == [1] * 200
