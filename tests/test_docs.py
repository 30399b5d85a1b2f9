"""Test README.md and docs/: parse every command, and run every cheap command and every Python snippet.

A command is a line that begins with `tinyprompt ` or `python ` in an indented or fenced block. A backslash at the end
continues a line, and `&&` joins two commands. A snippet is a block fenced as python. The commands and snippets of a
page run in order, in one folder and one namespace, so a page may use its earlier results. The folder initially contains
the files that `work` writes. A small random T5 replaces the built-in "base".

Commands between backticks in prose are only parsed.
"""

import io
import json
import re
import shlex
import shutil
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from files import SMALL, weights, write
from test_layout import ORDER

import tinyprompt
from tinyprompt import lowering
from tinyprompt.cli.main import COMMANDS, main, parser
from tinyprompt.files import models, prompts

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Commands that are only parsed: a pattern, and the reason why they do not run here.
NOT_RUN = {
    r"tinyprompt pull": "fetches a model from the network",
    r"google/": "needs a model from `pull`",
    r"tinyprompt demo": "takes minutes; test_cli.py runs it on a small model",
    r"tinyprompt bench": "takes minutes, and other processes disturb its times; test_bench.py runs it on a tiny shape",
    r"export --c": "needs emx-onnx-cgen and a C compiler; test_embedded.py runs it",
    r"from-c\.": "needs a prompt from the C program; test_embedded.py converts and evaluates it",
    r"golden --judge": "ends with exit status 1; test_golden.py runs it",
    r"tinyprompt serve": "runs until it is stopped; test_serve.py starts it and sends the page's requests",
    r"--device cuda": "needs a GPU",
    r"export --web": "needs the npm registry, and a tokenizer of pieces; test_web.py runs it",
    r"tinyprompt \w+ topic\.": "needs a prompt from the page; test_web.py runs it",
    r"lessons/studies": "takes hours; test_study.py reads the studies and their rows",
    r"--backend": "needs a cluster's software; test_study.py runs it where it is installed",
    r"t5x/": "needs a T5X checkpoint; test_t5x.py writes a small checkpoint",
}
# Other programs that do not run here: environments, pytest inside pytest, and scripts that need data sets or hours.
PROGRAMS = r"(\S*/)?(pip |pre-commit |python -m (venv|pytest|http\.server)|python (lessons|weights|tests)/[\w/]+\.py)"
FOREIGN = {"--hypothesis-profile"}  # options of other programs


class Block(NamedTuple):
    """An executable part of a page."""

    line: int
    kind: str  # "command" or "snippet"
    text: str


def blocks(text):
    """Return the commands and snippets of a page in order."""
    fence, found, part = None, [], ""
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("```"):
            fence = None if fence is not None else line[3:].strip()
            if fence == "python":
                found.append(Block(number, "snippet", "\n" * number))
        elif fence == "python":
            found[-1] = found[-1]._replace(text=f"{found[-1].text}{line}\n")
        elif fence is not None or line.startswith("    "):
            part += line.strip().removeprefix("$ ")
            if part.startswith(("tinyprompt ", "python ")) and not part.endswith("\\"):
                found += [Block(number, "command", command.strip()) for command in part.split(" && ")]
            part = part.removesuffix("\\") if part.endswith("\\") else ""
    return found


def inline(text):
    """Return the commands between backticks in a page's prose, except abbreviated commands with "..."."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    found = [" ".join(words.split()) for words in re.findall(r"`((?:tinyprompt|python)\s[^`]+)`", prose)]
    return [command for command in found if "..." not in command.split()]


def words_of(command):
    """Return the arguments of a tinyprompt command, or None for another program."""
    words = shlex.split(command, comments=True)
    if words[:3] == ["python", "-m", "tinyprompt"]:
        return words[3:]
    return words[1:] if words and words[0].split("/")[-1] == "tinyprompt" else None


def refused(words):
    """Return the parser's objection to these words, or None."""
    try:
        args, rest = parser().parse_known_args(words)
    except SystemExit as stop:
        return f"exit status {stop.code}" if stop.code else None  # 0: --help
    texts = "text" in args and not any(word.startswith("-") for word in rest)
    return f"unknown: {rest}" if rest and not texts else None


def wrong_program(command):
    """Return an error message if another program or its options do not exist, else None."""
    if not re.match(PROGRAMS, command):
        return "no program of this repository"
    script = re.search(r"[\w/]+\.py", command)
    if script and not (ROOT / script[0]).exists():
        return f"no file {script[0]}"
    source = (ROOT / script[0]).read_text(encoding="utf-8") if script else command
    return next((f"no option {name}" for name in re.findall(r"--[\w-]+", command) if name not in source), None)


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def why_not_run(command):
    return next((reason for start, reason in NOT_RUN.items() if re.search(start, command)), None)


def shorter(words):
    """Limit a tuning command to two steps."""
    if words[0] != "tune":
        return words
    done = prompts.load_prompt(words[words.index("--resume") + 1]).train_state["step"] if "--resume" in words else 0
    return [*words, "--steps", str(int(np.ravel(done)[0]) + 2)]


def table(path, header, rows, between="\t"):
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(between.join(row) for row in (header, *rows)) + "\n", encoding="utf-8")


def records(path, *rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Write the files that a page's first commands need."""
    at, patch = tmp_path_factory.mktemp("work"), pytest.MonkeyPatch()
    names, both = ("input", "target"), [(f"soup {i}", ("bad", "good")[i % 2]) for i in range(20)]
    for name in ("train", "dev", "test"):
        table(at / f"{name}.tsv", names, both)
    table(at / "coded.csv", ("text", "label"), [(text, str(int(word == "good"))) for text, word in both], ",")
    table(at / "articles.tsv", names, [(f"Summarise: {i}", f"number {i}") for i in range(20)])
    for name in ("train", "val"):
        records(
            at / "BoolQ" / f"{name}.jsonl", *(dict(question="is it", passage=f"{i}", label=i > 3) for i in range(8))
        )
        pairs = (dict(premise=f"{i}", hypothesis="x", label=["entailment", "not_entailment"][i % 2]) for i in range(8))
        records(at / "RTE" / f"{name}.jsonl", *pairs)
    table(at / "qqp.tsv", ("question1", "question2", "is_duplicate"), [("Why?", "How?", str(i % 2)) for i in range(8)])
    quality = ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String")
    table(
        at / "msr_paraphrase_test.txt", quality, [(str(i % 2), "1", "2", "He sat.", "He sat down.") for i in range(8)]
    )
    example = (ROOT / "docs" / "studies.md").read_text(encoding="utf-8").split("```toml\n")[1].split("```")[0]
    for name, value in {"steps": "2", "eval_every": "1", "model": '["path/to/t5"]'}.items():
        example = re.sub(rf"^{name} = .*$", f"{name} = {value}", example, flags=re.M)
    (at / "study.toml").write_text(example)
    shutil.copytree(ROOT / "tinyprompt" / "demo", at / "tinyprompt" / "demo")
    rng, labels = np.random.default_rng(0), np.tile([9, 1, 0, 0], (16, 1))
    ids = rng.integers(3, SMALL["vocab_size"], (16, 64))
    mask, weight = np.ones_like(ids), (labels > 0).astype(np.float32)
    np.savez(at / "rows.npz", input_ids=ids, attention_mask=mask, labels=labels, weights=weight)
    (at / "path" / "to").mkdir(parents=True)
    write(at / "path" / "to" / "t5", SMALL, weights())
    patch.chdir(at)
    tune = ["tune", "--model", "path/to/t5", "--steps", "2", "--out"]
    for seed, name in enumerate(("mine", "other")):
        assert main([*tune, f"{name}.safetensors", "--seed", str(seed), "--dev", "dev.tsv", "train.tsv"]) == 0
    assert main([*tune, "qqp.safetensors", "--task", "qqp", "--dev", "qqp.tsv", "qqp.tsv"]) == 0
    topic = "tinyprompt/demo/topic.dev.tsv"
    assert main([*tune, "tinyprompt-demo/topic.safetensors", "--dev", topic, topic]) == 0
    patch.undo()
    return at


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_snippets_of_a_page_run(page, work, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime", reason="needs ONNX Runtime: pip install '.[ort]'")
    at = shutil.copytree(work, tmp_path / "work")
    monkeypatch.chdir(at)
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setattr(models, "default_model", lambda: at / "path" / "to" / "t5")
    names = {}
    for line, kind, text in blocks(page.read_text(encoding="utf-8")):
        if kind == "snippet":
            for package in re.findall(r"^(?:from|import) (torch|peft|transformers)", text, re.M):
                pytest.importorskip(package, reason=f"line {line} needs {package}: pip install '.[test]'")
            exec(compile(text, f"{page.name} as of line {line}", "exec"), names)
        elif (words := words_of(text)) and refused(words) is None and not why_not_run(text):
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a line\n")))
            capsys.readouterr()
            status = main(shorter(words))
            assert status == 0, f"{page.name}, line {line}: {text}\n{capsys.readouterr().err}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=name_of)
def test_names_on_a_page_exist(page):
    text = page.read_text(encoding="utf-8")
    wrong = {}
    commands = [block.text for block in blocks(text) if block.kind == "command"]
    for command in (*commands, *inline(text)):
        words = words_of(command)
        if words is None:
            why = wrong_program(command)
        else:
            why = refused(words) if words[1:] or words[0] not in COMMANDS else None
        wrong |= {command: why} if why else {}
    known = {option for name in COMMANDS for option in options_of(name)} | FOREIGN
    wrong |= {name: "no such option" for name in re.findall(r"`(--[\w-]+)", text) if name not in known}
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if "://" not in target and not (page.parent / target).exists():
            wrong[target] = "no such file"
    assert not wrong


def options_of(command):
    """Return all options of a command."""
    action = next(action for action in parser()._actions if action.choices and command in action.choices)
    return action.choices[command]._option_string_actions


def test_every_page_is_listed():
    listed = re.findall(r"\]\((\w[\w-]*\.md)\)", (ROOT / "docs" / "README.md").read_text(encoding="utf-8"))
    assert sorted(listed) == [page.name for page in PAGES if page.parent.name == "docs" and page.name != "README.md"]


def test_every_exception_is_needed():
    commands = [block.text for page in PAGES for block in blocks(page.read_text(encoding="utf-8"))]
    assert [start for start in NOT_RUN if not any(re.search(start, text) for text in commands)] == []


def test_a_page_is_split_into_commands_and_snippets():
    page = "text\n\n    tinyprompt a \\\n        --b && python -m c\n    output\n\n```sh\n$ python x\n```\n"
    page += "```python\ny\n```\n"
    assert [(kind, text.strip()) for _, kind, text in blocks(page)] == [
        ("command", "tinyprompt a --b"),
        ("command", "python -m c"),
        ("command", "python x"),
        ("snippet", "y"),
    ]
    assert inline("a `tinyprompt b\nc` and `d`\n```\n`tinyprompt e f`\n```\n") == ["tinyprompt b c"]
    assert refused(["tune", "train.tsv", "--precision", "int8"])
    assert refused(["predict", "p", "--device", "cpu", "text"]) is None


def test_the_tree_in_contributing_lists_the_package():
    found, folder = [], ""
    for line in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("```")[1].splitlines()[2:]:
        name, inside = line.split()[0], line.startswith("    ")
        folder = folder if inside else name if name.endswith("/") else ""
        found += [] if name.endswith("/") else [folder + name]
    package = ROOT / "tinyprompt"
    there = [path.relative_to(package).as_posix() for path in package.rglob("*.py") if not path.stem.startswith("__")]
    assert sorted(found) == sorted(there)
    orders = [name for name in ORDER if f"{name}.py" in found and "/" not in name]
    assert [name for name in (path.removesuffix(".py") for path in found) if name in orders] == orders


def test_the_guide_lists_the_functions_that_lower():
    listed = (ROOT / "docs" / "devices.md").read_text(encoding="utf-8").split("These functions of NumPy lower")[1]
    listed = set(listed.split("```")[1].split())
    functions = {name: getattr(np, name) for name in dir(np)}
    functions |= {f"linalg.{name}": getattr(np.linalg, name) for name in dir(np.linalg)}
    rules = set(map(id, lowering.RULES))
    assert {f for f in listed if f not in functions} == set()
    assert {id(functions[f]) for f in listed} == {id(f) for f in functions.values() if id(f) in rules}


SOURCES = [*PAGES, *sorted((ROOT / "lessons").glob("*.py")), *sorted((ROOT / "lessons" / "solutions").glob("*.py"))]
CORE = {"config", "data", "methods", "ops", "optim", "t5", "train", "tree"}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_pages_and_lessons_use_public_names_only(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        text = "\n".join(block.text for block in blocks(text) if block.kind == "snippet")
    public = set(tinyprompt.__all__)
    assert set(re.findall(r"\btp\.(\w+)", text)) <= public
    for module, names in re.findall(r"^from tinyprompt(\.\w+)* import (.+)$", text, re.M):
        assert module.strip(".") in CORE | {""}, f"from tinyprompt{module} import {names}"
        assert module or {name.strip() for name in names.split(",")} <= public, names


def test_install_commands_name_our_distribution():
    """`tinyprompt` on the package index is an unrelated project."""
    name = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["name"]
    assert name == "tinyprompt-t5"
    for path in [p for p in tracked() if p.suffix in (".py", ".md", ".toml", ".html", ".js", ".ipynb")]:
        for found in re.findall(
            r"(?:pip install|uv add)[^\n]*?\b(tinyprompt\b[-\w]*)\[", path.read_text(encoding="utf-8")
        ):
            assert found == name, f"{path}: {found}"


def tracked():
    """Return the files of the project."""
    folders = (ROOT / name for name in ("tinyprompt", "docs", "lessons", "tests", "weights"))
    return [*ROOT.glob("*.*"), *(path for folder in folders for path in folder.rglob("*.*") if path.is_file())]
