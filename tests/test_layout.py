"""The structure of the package: which modules may import which, and how many parameters a function has."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tinyprompt

PACKAGE = Path(tinyprompt.__file__).parent
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
# Modules in the order of the data flow. A module imports only from earlier modules, or from its own folder.
CORE = ["errors", "tree", "ops", "config", "t5", "model", "methods", "optim", "settings", "data", "train"]
ORDER = [
    *CORE,
    *("version", "tokenizer", "fit", "lowering", "device", "decode", "predict"),
    *("ensemble", "display", "resume", "assess"),
    *("files", "tasks", "tuning", "classifier", "describe", "check", "study", "bench"),
    *("export", "golden", "serve", "cli"),
]
APPLICATIONS = {"bench", "study", "export", "golden", "serve"}
# Programs that run in a separate process.
ALONE = {"check/torch_side.py", "bench/peft_side.py", "bench/ctranslate2_side.py", "bench/products_side.py"}
SERVER = {"serve/app.py", "serve/metrics.py"}  # imported only by the command `serve` when it runs
SERVED = {"starlette", "uvicorn", "prometheus_client"}
LAZY = {  # imported inside functions
    *("onnx", "onnxruntime", "matplotlib", "IPython", "huggingface_hub", "msgpack", "google", "resource"),
    *("joblib", "dask", "distributed", "ray", "sklearn"),
}
ALWAYS = {"numpy", "autograd", "ml_dtypes", "tokenizers", "sentencepiece", "safetensors", "tqdm"}


def modules_of(file):
    """Yield the module names that a file imports at run time, and whether the import is inside a function."""
    whole = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
    typing = {
        id(n)
        for top in ast.walk(whole)
        if isinstance(top, ast.If) and "TYPE_CHECKING" in ast.dump(top.test)
        for n in ast.walk(top)
    }
    inside = {id(n) for f in ast.walk(whole) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    for node in ast.walk(whole):
        if id(node) in typing:
            continue
        if isinstance(node, ast.Import):
            yield from ((name.name, id(node) in inside) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            for name in node.names:
                folder = PACKAGE.joinpath(*(node.module or "").split(".")[1:])
                is_module = (folder / f"{name.name}.py").exists() or (folder / name.name).is_dir()
                ours = (node.module or "").split(".")[0] == "tinyprompt"
                yield (f"{node.module}.{name.name}" if ours and is_module else node.module), id(node) in inside


def position(module):
    """Return the position in ORDER of a module of the package, or of its folder."""
    path = module.removeprefix("tinyprompt.").replace(".", "/")
    return next(
        i
        for i, name in enumerate(ORDER)
        if path in (name, f"{name}/__init__") or (path.split("/")[0] == name and path not in ORDER)
    )


@pytest.mark.parametrize("file", [f for f in FILES if f not in ("__init__.py", "__main__.py")])
def test_imports_follow_the_order_of_the_layers(file):
    own = file.removesuffix(".py").replace("/", ".")
    for module, _ in modules_of(file):
        if module.startswith("tinyprompt.") and module.split(".")[1] != own.split(".")[0]:
            assert position(module) < position(f"tinyprompt.{own}"), f"{file} imports {module}"


@pytest.mark.parametrize("file", FILES)
def test_only_the_command_line_imports_applications(file):
    folder = file.split("/")[0].removesuffix(".py")
    for module, _ in modules_of(file):
        other = module.removeprefix("tinyprompt.").split(".")[0]
        if module.startswith("tinyprompt.") and other in APPLICATIONS and other != folder:
            assert folder == "cli" or (folder == "bench" and other == "study"), f"{file} imports {module}"


def test_the_reading_list_imports_nothing_else():
    readme = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"\[`(\w+)`\]\(tinyprompt/\w+\.py\)", readme)
    assert listed == CORE
    for name in listed:
        own = {m.removeprefix("tinyprompt.") for m, _ in modules_of(f"{name}.py") if m.startswith("tinyprompt")}
        assert own <= set(listed), f"{name}.py imports {own - set(listed)}"
    lines = sum(len((PACKAGE / f"{name}.py").read_text(encoding="utf-8").splitlines()) for name in listed)
    assert f"{lines:,} lines" in readme


PROBE = """
import csv, json, sys
import autograd.numpy, autograd.numpy.numpy_vjps, autograd.numpy.numpy_wrapper
from autograd.core import primitive_vjps
from autograd.numpy import numpy_wrapper
def state():
    return [csv.field_size_limit(), {id(f): id(v) for f, v in primitive_vjps.items()},
            {n: id(v) for n, v in vars(numpy_wrapper).items()}, {n: id(v) for n, v in vars(autograd.numpy).items()}]
before = state()
import tinyprompt
after = state()
same = before[0] == after[0] and before[2:] == after[2:] and all(after[1][n] == v for n, v in before[1].items())
loaded = sorted(m for m in sys.modules if m.split(".")[0] in ("onnx", "onnxruntime", "matplotlib", "torch", "sklearn")
                or m.startswith("tinyprompt.") and m.split(".")[1] in ("lowering", "check", "cli", "bench", "study",
                "export", "golden", "serve", "describe"))
print(json.dumps([same, loaded]))
"""


def test_importing_the_package_has_no_side_effects():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [True, []]


# Topic: the layers that must not know it, and the modules that they must not import.
RULES = {
    "file formats": (("t5", "predict", "ensemble", "train", "methods", "settings", "fit", "data"), ("files",)),
    "forward pass": (("files",), ("t5", "predict", "train", "decode", "lowering", "device", "tasks")),
    "T5": (("lowering", "device", "ops", "optim", "tree"), ("t5", "config", "model", "methods")),
    "model": (("tasks",), ("t5", "predict", "decode", "tuning")),
    "rules": (("lowering/graph",), ("lowering/rules", "lowering/primitives")),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_layer_does_not_import_what_it_must_not_know(rule):
    parts, unknown = RULES[rule]
    for file in FILES:
        path = file.removesuffix(".py")
        if path in parts or path.split("/")[0] in parts:
            for module, _ in modules_of(file):
                name = module.removeprefix("tinyprompt.").replace(".", "/")
                assert name not in unknown, f"{file} imports {module}"
                assert name.split("/")[0] not in unknown, f"{file} imports {module}"


@pytest.mark.parametrize("file", FILES)
def test_imports_are_limited_to_the_dependencies(file):
    for module, inside in modules_of(file):
        name = module.split(".")[0]
        if name == "tinyprompt" or name in ALWAYS or name in __import__("sys").stdlib_module_names - {"resource"}:
            continue
        if file in SERVER and name in SERVED:
            continue
        assert file in ALONE or (inside and name in LAZY), f"{file} imports {module}"


@pytest.mark.parametrize("file", [f for f in FILES if f not in SERVER])
def test_the_server_is_imported_only_inside_functions(file):
    names = {path.removesuffix(".py").replace("/", ".") for path in SERVER}
    for module, inside in modules_of(file):
        assert inside or module.removeprefix("tinyprompt.") not in names, f"{file} imports {module}"


def functions(file):
    """Yield the functions of a file with their docstrings and the file's text."""
    text = (PACKAGE / file).read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            yield node, ast.get_docstring(node) or "", text


@pytest.mark.parametrize("file", FILES)
def test_a_function_has_at_most_six_parameters_or_gives_a_reason(file):
    for node, doc, text in functions(file):
        names = [a.arg for a in (*node.args.posonlyargs, *node.args.args) if a.arg != "self"]
        reason = re.search(
            r"\b(\w+ parameters|more than six parameters)\b", doc + (ast.get_docstring(ast.parse(text)) or "")
        )
        assert len(names) <= 6 or reason, f"{file}: {node.name} has {len(names)} parameters"


def test_attention_functions_are_short():
    found = {node.name: node for node, _, _ in functions("t5.py")}
    for name in ("attention", "attend", "attend_short"):
        body = found[name].body[1:]  # without the docstring
        assert body[-1].end_lineno - body[0].lineno + 1 <= 15
