"""The lessons: each lesson runs, its final assertions hold, and its notebook matches the script.

An exercise has three cells with the same tag number: `exercise-1` in the lesson is the reader's cell, `exercise-1` in
`lessons/solutions` is a correct solution, and `mistake-1` there is a common mistake, which the check must reject.
"""

import base64
import importlib.util
import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
LESSONS = sorted((ROOT / "lessons").glob("[0-9][0-9]_*.py"))

jupytext = pytest.importorskip("jupytext", reason="needs jupytext: pip install '.[lessons]'")
pytest.importorskip("onnxruntime", reason="needs ONNX Runtime: pip install '.[ort]'")


@pytest.fixture(autouse=True)
def kept_folder(tmp_path, monkeypatch):
    """Return an empty folder for the functions that a reader keeps."""
    monkeypatch.setenv("TINYPROMPT_PIECES", str(tmp_path / "pieces"))
    return tmp_path / "pieces"


@pytest.fixture(scope="module")
def build():
    pytest.importorskip("nbclient", reason="needs nbclient: pip install '.[lessons]'")
    spec = importlib.util.spec_from_file_location("build", ROOT / "lessons" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code(path):
    """Return the code cells of a script as (tag or None, source)."""
    cells = [cell for cell in jupytext.read(path).cells if cell.cell_type == "code"]
    return [(next(iter(cell.metadata.get("tags", [])), None), cell.source) for cell in cells]


def name_of(judge):
    """Return the name of the function that a cell judges."""
    return re.search(r'@check\("Exercise \d", (\w+), ', judge)[1]


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
    verdicts = re.findall(r"^(Exercise \d): (.*)$", capsys.readouterr().out, re.M)
    assert verdicts == [(f"Exercise {i}", "your turn") for i in (1, 2, 3)]
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
            assert not re.search("your code raises|check fails", verdict), "a common mistake deserves a hint of its own"
        for wrong in ("'hello'", "-1", "None", "(None, 'hello')", "{'a': 'hello'}", "np.full(3, np.nan)"):
            run(f"{name_of(judge)} = lambda *args, **kwargs: {wrong}", names, "a wrong kind")
            run(judge, names, path.name)
            verdict = capsys.readouterr().out.strip()
            expected = "your turn" if wrong == "None" else "not yet: "
            assert verdict.startswith(f"Exercise {i}: {expected}"), (wrong, verdict)
            assert not re.search("your code raises|check fails", verdict), (wrong, verdict)
        run(f"{name_of(judge)} = 'hello'", names, "not a function")
        run(judge, names, path.name)
        verdict = capsys.readouterr().out.strip()
        assert verdict == f"Exercise {i}: not yet: the name stands for a str; expected a function"


@pytest.fixture
def check(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "lessons")
    from classroom import check

    return check


PAIR = (np.zeros((2, 3)), 0.0)


@pytest.mark.parametrize(
    ("like", "answer", "verdict"),
    [
        (np.zeros((3, 5)), "hello", "not yet: returned a str; expected an array (3, 5)"),
        (np.zeros((3, 5)), -1, "not yet: returned an int; expected an array (3, 5)"),
        (np.zeros((3, 5)), np.ones((5, 3)), "not yet: returned an array (5, 3); expected an array (3, 5)"),
        (np.zeros((3, 5)), np.ones((3, 5), complex), "not yet: returned an array (3, 5) of complex128; expected"),
        (np.zeros((3, 5)), None, "not yet: returned None: is a `return` missing?"),
        (np.zeros((3, 5)), np.ones((3, 5), np.float32), "right"),
        (0.0, [1], "not yet: returned a list of 1; expected a number"),
        (0.0, True, "not yet: returned a bool; expected a number"),
        (0.0, np.ones(1), "not yet: returned an array (1,); expected a number"),
        (0, np.float32(2), "right"),
        ("", 3, "not yet: returned an int; expected a str"),
        ([], {}, "not yet: returned a dict; expected a list"),
        ((), [1, 2], "right"),
        (PAIR, (np.ones((2, 3)),), "not yet: returned a tuple of 1; expected a tuple of 2"),
        (PAIR, (None, 1.0), "not yet: in the place [0], returned None; expected an array (2, 3)"),
        ({"a": 0.0}, {"b": 0.0}, "not yet: returned a dict with ['b']; expected ['a']"),
        ({"a": 0.0}, {"a": "hello"}, "not yet: in the place ['a'], returned a str; expected a number"),
    ],
)
def test_an_answer_of_the_wrong_type_is_named(check, like, answer, verdict, capsys):
    check("Exercise 1", lambda x: answer, lambda x: like)(lambda mine: iter([(mine(0) is answer, "another object")]))
    assert capsys.readouterr().out.strip().startswith(f"Exercise 1: {verdict}")


RIGHT = "@check('Exercise 1', causal_bias, lambda n: np.zeros((n, n)))\ndef _(mine):\n    yield mine(2).any(), 'a hint'"


def in_a_notebook(source):
    """Run a cell in an IPython kernel, where functions have source code."""
    shell = pytest.importorskip("IPython.core.interactiveshell").InteractiveShell.instance()
    shell.run_cell("import numpy as np\nfrom classroom import check, pieces")
    assert shell.run_cell(source).success


def test_a_passed_exercise_is_kept_and_loaded(check, kept_folder, capsys):
    from classroom import pieces

    source = "def causal_bias(length):\n    return np.where(np.tri(length), 0, -1e9)\n"
    in_a_notebook(f"{source}\n\n{RIGHT}")
    assert "Exercise 1: right; kept for lesson 11 in pieces/causal_bias.py" in capsys.readouterr().out
    assert (kept_folder / "causal_bias.py").read_text(encoding="utf-8") == source
    (kept_folder / "causal_bias.py").write_text(
        "def causal_bias(length):\n    return np.zeros(length)\n", encoding="utf-8"
    )
    mine, theirs = pieces("causal_bias", "my_norm")
    assert mine(3).tolist() == [0, 0, 0]
    assert np.allclose(theirs(np.array([3.0, 4.0]), np.ones(2)), np.array([3, 4]) / 12.5**0.5)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["lesson", "2:", "causal_bias", "yours"],
        ["lesson", "3:", "my_norm", "the", "solution"],
    ]
    (kept_folder / "causal_bias.py").write_text("", encoding="utf-8")
    with pytest.raises(NameError, match="does not define causal_bias: delete the file"):
        pieces("causal_bias")


def test_a_function_that_lesson_11_cannot_run_is_not_kept(check, kept_folder, capsys):
    in_a_notebook("import math\ndef causal_bias(length):\n    return -math.pi * (1 - np.tri(length))\n\n" + RIGHT)
    assert "right; not kept: it uses math. Lesson 11 has only np" in capsys.readouterr().out
    names = {"np": np, "check": check}
    run(f"causal_bias = lambda n: np.tri(n)\ncausal_bias.__name__ = 'causal_bias'\n{RIGHT}", names, "nowhere")
    assert "right; not kept: Python does not know its source" in capsys.readouterr().out
    run(f"def other(n):\n    return np.tri(n)\n{RIGHT.replace('causal_bias', 'other')}", names, "nowhere")
    assert capsys.readouterr().out == "Exercise 1: right\n"  # lesson 11 does not use it
    assert not kept_folder.exists()


def test_a_kept_function_may_be_a_lambda_or_import_modules(check, kept_folder, capsys):
    in_a_notebook(f"causal_bias = lambda n: 1 - np.tri(n)\n{RIGHT}")
    assert "right; kept for lesson 11" in capsys.readouterr().out
    in_a_notebook(f"def causal_bias(n):\n    import math\n    return -math.pi * (1 - np.tri(n))\n\n{RIGHT}")
    assert "right; kept for lesson 11" in capsys.readouterr().out
    source = "class Bias:\n    def __call__(self, n):\n        return 1 - np.tri(n)\n\ncausal_bias = Bias()\n"
    in_a_notebook(source + RIGHT)
    assert "right; not kept: Python does not know its source" in capsys.readouterr().out


def test_a_function_that_differs_from_its_file_is_not_kept(check, kept_folder, capsys, tmp_path):
    file = tmp_path / "a.py"
    file.write_text("def causal_bias(length):\n    return 1 - np.tri(length)\n", encoding="utf-8")
    run("def causal_bias(length):\n    return 2 - np.tri(length)\n" + RIGHT, {"np": np, "check": check}, str(file))
    assert "right; not kept" in capsys.readouterr().out


def test_the_last_lesson_loads_all_kept_functions():
    """Each kept function is the solution of an exercise, and lesson 11 loads it."""
    exercises = {}
    for path in LESSONS:
        for tag, source in code(path):
            if tag and tag.startswith("exercise"):
                exercises[re.search(r"def (\w+)", source)[1]] = path
    loads = [source for _, source in code(LESSONS[-1]) if "pieces(" in source]
    asked = {name for source in loads for name in re.findall(r'"(\w+)"', source)}
    from classroom import PIECES

    assert asked == PIECES <= set(exercises)


def test_a_failing_check_is_not_reported_as_an_error_of_the_reader(check, capsys):
    def claims(mine):
        yield int(mine()) == 1, "a hint"

    check("Exercise 1", lambda: float("nan"), 0.0)(claims)
    check("Exercise 1", lambda: [][0], 0.0)(claims)
    computed, raised = capsys.readouterr().out.splitlines()
    assert computed.startswith("Exercise 1: not yet: returned nan, with which the check fails: ValueError: ")
    assert raised == "Exercise 1: not yet: your code raises IndexError: list index out of range"


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_ends_in_assertions_and_has_figures(path):
    cells = code(path)
    assert re.search(r"^assert ", cells[-1][1], re.M)
    assert 2 <= sum("plt.show()" in source for _, source in cells) <= 3 or path.name.startswith("00")


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_has_a_diagram_and_two_questions(path):
    """The diagram is transparent, which makes it readable on any background, and narrow enough for a phone."""
    cells = jupytext.read(path).cells
    drawn = [i for i, cell in enumerate(cells) if re.search(r"diagram\(|set_alpha\(0\)", cell.source)]
    assert len(drawn) == 1
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert text.count("Guess before you run") == 2


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_begins_with_its_prerequisites_and_its_duration(path):
    """Prerequisites must be earlier lessons."""
    first = jupytext.read(path).cells[0].source
    need = re.search(r"^\*\*You need:\*\* (.*?)\*\*Time:\*\*\s\d+\sminutes", first, re.M | re.S)
    assert need
    assert all(int(number) < int(path.name[:2]) for number in re.findall(r"lessons? (\d+)", need[1]))


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_notebook_matches_its_script(path, build):
    assert build.in_step(path), f"{path.stem}.ipynb is not what {path.name} says; run: python lessons/build.py"
    assert path.with_suffix(".ipynb").stat().st_size <= build.LARGEST


def test_the_figures_of_a_short_run_are_drawn(monkeypatch):
    import matplotlib

    matplotlib.use("agg")
    monkeypatch.syspath_prepend(ROOT / "lessons")
    (path,) = (ROOT / "lessons").glob("04_*.py")
    names = {"__name__": "lesson"}
    for _, source in code(path):
        assert "cost = seconds" not in source, "no figure of the run came before"
        run(source.replace("steps=150", "steps=6"), names, path.name)
        if "smooth" in names:
            break
    matplotlib.pyplot.close("all")
    assert len(names["state"].losses) == 6
    assert len(names["smooth"]) == 1


def test_a_notebook_that_does_not_match_is_found(build, tmp_path):
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


def test_the_tape_has_at_most_60_lines():
    (path,) = (ROOT / "lessons").glob("00_*.py")
    (source,) = (source for tag, source in code(path) if tag == "tape")
    assert len([line for line in source.splitlines() if line.strip()]) <= 60


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_cell_fits_the_width_of_the_site(path):
    for file in (path, path.parent / "solutions" / path.name):
        assert max(map(len, file.read_text(encoding="utf-8").splitlines())) <= 88


def test_a_figure_keeps_its_alternative_text_and_its_transparency(build):
    """Each figure has the metadata `alt`, which screen readers use in a notebook and on the site."""
    found = 0
    for path in LESSONS:
        cells = jupytext.read(path).cells
        for cell, made in zip(cells, jupytext.read(path.with_suffix(".ipynb")).cells, strict=True):
            if not re.search(r"^plt\.show\(\)", cell.source, re.M):
                continue
            assert len(cell.metadata["alt"]) > 40
            found += 1
            assert made.metadata["mystnb"] == {"image": {"alt": cell.metadata["alt"]}}
            (image,) = (output for output in made.outputs if "image/png" in output.get("data", {}))
            assert image.metadata["image/png"]["alt"] == cell.metadata["alt"]
            if re.search(r"diagram\(|set_alpha\(0\)", cell.source):
                picture = Image.open(io.BytesIO(base64.b64decode(image.data["image/png"]))).convert("RGBA")
                assert picture.getpixel((0, 0))[3] == 0
                assert picture.width <= 460
                assert "needs_background" not in image.metadata
    assert found


def test_every_lesson_is_listed_in_order():
    text = (ROOT / "lessons" / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\((\d\d_\w+)\.ipynb\)", text) == [path.stem for path in LESSONS]


def test_the_course_names_each_exercise_and_quotes_outputs():
    text = (ROOT / "lessons" / "TEACHING.md").read_text(encoding="utf-8").replace("\n  ", " ")
    assert re.findall(r"\]\((\d\d_\w+)\.ipynb\)", text) == [path.stem for path in LESSONS]
    tagged = [source for path in LESSONS for tag, source in code(path) if tag and tag.startswith("exercise")]
    exercises = [re.search(r"def (\w+)", source)[1] for source in tagged]
    assert re.findall(r"`(\w+)` \d+", text) == exercises
    for session in text.split("\n## Session ")[1:]:
        assert 30 <= sum(map(int, re.findall(r"` (\d+)", session))) <= 45
    cells = [cell for path in LESSONS for cell in jupytext.read(path.with_suffix(".ipynb")).cells]
    outputs = "".join(out.get("text", "") for cell in cells for out in cell.get("outputs", []))
    quotes = set(re.findall(r"`([^`]+)`", text)) - set(exercises) - {"grad(f)", "-=", "y", "classroom.py"}
    assert {quote for quote in quotes if quote not in outputs} == set()


@pytest.mark.slow
def test_the_c_of_lesson_8_equals_the_export(tmp_path):
    pytest.importorskip("emx_onnx_cgen", reason="needs the extra: pip install '.[embedded]'")
    text = next((ROOT / "lessons").glob("08_*.ipynb")).read_text(encoding="utf-8")
    text = "".join(cell.source for cell in jupytext.reads(text, "ipynb").cells)
    command = re.search(r"^    tinyprompt (export --c .*?[^\\])$", text, re.M | re.S)[1].replace("\\\n", "").split()
    out = subprocess.run([sys.executable, "-m", "tinyprompt", *command], cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    squeezed = lambda code: "".join(code.split())
    excerpt = re.search(r"^```c\n(.*?)```", text, re.M | re.S)[1]
    assert squeezed(excerpt) in squeezed((tmp_path / "in-c" / "step.c").read_text())
