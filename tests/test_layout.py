"""The house: who may import whom, and how many parameters a function has."""

import ast
import re
from pathlib import Path

import pytest

import tinyprompt

PACKAGE = Path(tinyprompt.__file__).parent
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
# In the order in which data pass: a module imports only from those before it, or from its own folder.
ORDER = [
    *("errors", "tree", "ops", "config", "optim", "tokenizer", "model", "data", "lowering", "device", "t5", "generate"),
    *("methods", "settings", "fit", "tasks/metrics", "predict", "ensemble", "train", "files", "tasks", "tools"),
    *("serve", "cli"),
]
ALONE = {f"tools/{name}.py" for name in ("check_torch", "bench_peft", "bench_ctranslate2")}  # in their own processes
SERVER = {"serve/app.py", "serve/metrics.py"}  # imported by the command `serve` alone, when it runs
SERVED = {"starlette", "uvicorn", "prometheus_client"}
LAZY = {  # inside functions
    *("onnx", "onnxruntime", "matplotlib", "huggingface_hub", "msgpack", "google", "resource"),
    *("joblib", "dask", "distributed", "ray", "sklearn"),
}
ALWAYS = {"numpy", "autograd", "ml_dtypes", "tokenizers", "safetensors", "tqdm"}


def modules_of(file):
    """What a file imports at run time: each module's name, and whether the import is inside a function."""
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


def place(module):
    """Where a module of the package stands in ORDER: that of itself, or that of its folder."""
    path = module.removeprefix("tinyprompt.").replace(".", "/")
    return next(
        i
        for i, name in enumerate(ORDER)
        if path in (name, f"{name}/__init__") or (path.split("/")[0] == name and path not in ORDER)
    )


@pytest.mark.parametrize("file", [f for f in FILES if f not in ("__init__.py", "__main__.py")])
def test_imports_run_downward(file):
    own = file.removesuffix(".py").replace("/", ".")
    for module, _ in modules_of(file):
        if module.startswith("tinyprompt.") and module.split(".")[1] != own.split(".")[0]:
            assert place(module) < place(f"tinyprompt.{own}"), f"{file} imports {module}"


RULES = {
    "no file format": (("t5", "predict", "ensemble", "train", "methods", "settings", "fit", "data"), ("files",)),
    "no forward pass": (("files",), ("t5", "predict", "train", "generate", "lowering", "device", "tasks")),
    "no T5": (("lowering", "device", "generate", "ops", "optim", "tree"), ("t5", "config", "model", "methods")),
    "no data set": (("train", "predict", "ensemble"), ("tasks/registry", "tasks/readers")),
    "no rule": (("lowering/graph",), ("lowering/rules", "lowering/primitives")),
}


@pytest.mark.parametrize("rule", RULES)
def test_what_a_part_does_not_know(rule):
    parts, unknown = RULES[rule]
    for file in FILES:
        path = file.removesuffix(".py")
        if path in parts or path.split("/")[0] in parts:
            for module, _ in modules_of(file):
                name = module.removeprefix("tinyprompt.").replace(".", "/")
                assert name not in unknown, f"{file} imports {module}"
                assert name.split("/")[0] not in unknown, f"{file} imports {module}"


@pytest.mark.parametrize("file", FILES)
def test_what_is_installed_is_what_is_imported(file):
    for module, inside in modules_of(file):
        name = module.split(".")[0]
        if name == "tinyprompt" or name in ALWAYS or name in __import__("sys").stdlib_module_names - {"resource"}:
            continue
        if file in SERVER and name in SERVED:
            continue
        assert file in ALONE or (inside and name in LAZY), f"{file} imports {module}"


@pytest.mark.parametrize("file", [f for f in FILES if f not in SERVER])
def test_the_server_is_imported_when_it_runs(file):
    names = {path.removesuffix(".py").replace("/", ".") for path in SERVER}
    for module, inside in modules_of(file):
        assert inside or module.removeprefix("tinyprompt.") not in names, f"{file} imports {module}"


def functions(file):
    """Functions of a file with their source and what stands around them."""
    text = (PACKAGE / file).read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            yield node, ast.get_docstring(node) or "", text


@pytest.mark.parametrize("file", FILES)
def test_a_function_has_six_parameters_or_says_why(file):
    for node, doc, text in functions(file):
        names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs) if a.arg != "self"]
        reason = re.search(
            r"\b(\w+ parameters|more than six parameters)\b", doc + (ast.get_docstring(ast.parse(text)) or "")
        )
        assert len(names) <= 6 or reason, f"{file}: {node.name} has {len(names)} parameters"


def test_a_folder_says_what_it_knows_and_what_it_does_not():
    for folder in PACKAGE.iterdir():
        if (folder / "__init__.py").exists():
            assert "nows" in (folder / "__init__.py").read_text(encoding="utf-8").partition("\n")[0]


def test_attention_is_read_in_one_look():
    found = {node.name: node for node, _, _ in functions("t5.py")}
    for name in ("attention", "attend", "attend_short", "attend_next"):
        body = found[name].body[1:]  # without the docstring
        assert body[-1].end_lineno - body[0].lineno + 1 <= 15
