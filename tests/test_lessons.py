"""The lessons: each runs, its closing assertions hold, and its notebook has the script's cells.

An exercise is three cells of a solution with the same tag: `exercise-1` in the lesson is what the reader writes,
`exercise-1` in `lessons/solutions` is right, and `mistake-1` there is a common mistake, which the check must refuse.
"""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LESSONS = sorted((ROOT / "lessons").glob("[0-9][0-9]_*.py"))

jupytext = pytest.importorskip("jupytext", reason="needs jupytext: pip install '.[lessons]'")
pytest.importorskip("onnxruntime", reason="needs ONNX Runtime: pip install '.[ort]'")


@pytest.fixture(scope="module")
def build():
    pytest.importorskip("nbclient", reason="needs nbclient: pip install '.[lessons]'")
    spec = importlib.util.spec_from_file_location("build", ROOT / "lessons" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code(path):
    """The code cells of a script: tag or None, source."""
    cells = [cell for cell in jupytext.read(path).cells if cell.cell_type == "code"]
    return [(next(iter(cell.metadata.get("tags", [])), None), cell.source) for cell in cells]


def run(source, names, where):
    exec(compile(source, where, "exec"), names)


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_runs_and_its_exercises_are_judged(path, monkeypatch, capsys):
    import matplotlib

    matplotlib.use("agg")
    monkeypatch.syspath_prepend(ROOT / "lessons")
    monkeypatch.chdir(ROOT / "lessons")
    names, cells = {"__name__": "lesson"}, code(path)
    for _, source in cells:
        run(source, names, path.name)
    matplotlib.pyplot.close("all")
    said = re.findall(r"^(Exercise \d): (.*)$", capsys.readouterr().out, re.M)
    assert said == [(f"Exercise {i}", "your turn") for i in (1, 2, 3)]
    solutions = dict(code(path.parent / "solutions" / path.name))
    assert {f"{kind}-{i}" for kind in ("exercise", "mistake") for i in (1, 2, 3)} <= set(solutions)
    for i in (1, 2, 3):
        at = [tag for tag, _ in cells].index(f"exercise-{i}")
        judge = cells[at + 1][1]
        for kind, expected in (("mistake", "not yet: "), ("exercise", "right")):
            run(solutions[f"{kind}-{i}"], names, f"solutions/{path.name}")
            run(judge, names, path.name)
            verdict = capsys.readouterr().out.strip()
            assert verdict.startswith(f"Exercise {i}: {expected}"), (kind, verdict)
            assert "your code raises" not in verdict, "a common mistake deserves a hint of its own"


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_ends_in_assertions_and_has_figures(path):
    cells = code(path)
    assert re.search(r"^assert ", cells[-1][1], re.M)
    assert 1 <= sum("plt.show()" in source for _, source in cells) <= 2


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_pair_is_in_step(path, build):
    assert build.in_step(path), f"{path.stem}.ipynb is not what {path.name} says; run: python lessons/build.py"
    assert path.with_suffix(".ipynb").stat().st_size <= build.LARGEST


def test_a_pair_out_of_step_is_found(build, tmp_path):
    if not LESSONS:
        pytest.skip("there is no lesson")
    path = tmp_path / LESSONS[0].name
    path.write_text(LESSONS[0].read_text(encoding="utf-8"), encoding="utf-8")
    assert not build.in_step(path)
    notebook = LESSONS[0].with_suffix(".ipynb").read_text(encoding="utf-8")
    path.with_suffix(".ipynb").write_text(notebook, encoding="utf-8")
    assert build.in_step(path)
    path.write_text(LESSONS[0].read_text(encoding="utf-8").replace("assert ", "assert True or ", 1), encoding="utf-8")
    assert not build.in_step(path)


def test_every_lesson_is_listed_in_order():
    text = (ROOT / "lessons" / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\((\d\d_\w+)\.ipynb\)", text) == [path.stem for path in LESSONS]
