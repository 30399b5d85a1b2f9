"""Commands for files of models and prompts."""

import argparse
import os
from collections.abc import Container
from dataclasses import replace
from pathlib import Path
from typing import Any

from tinyprompt import describe, methods
from tinyprompt.cli.report import Output, argument, command
from tinyprompt.cli.report import model as model_argument
from tinyprompt.cli.shared import warn_if_unknown, warn_of_loss
from tinyprompt.data import target_ids
from tinyprompt.errors import CheckpointError
from tinyprompt.export import page as web
from tinyprompt.export.embedded import export_c
from tinyprompt.export.graphs import PLAIN, Shape, export
from tinyprompt.files import adapters, hub, models, prompts
from tinyprompt.fit import check_fit
from tinyprompt.model import Prompt
from tinyprompt.tasks.reading import Reader


@command(
    "pull",
    "google/t5-v1_1-small",
    argument("name", metavar="NAME", help="org/name"),
    argument("--revision", metavar="NAME", help="a branch, tag or commit (main)"),
)
def pull(args: argparse.Namespace) -> Output:
    """Download a T5 or a PEFT adapter from the Hugging Face hub, to use it by name.

    HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE apply as in huggingface_hub.
    """
    folder = hub.pull(args.name, args.revision)
    files = {name: (folder / name).stat().st_size for name in hub.wanted(os.listdir(folder))}
    name = f"{args.name}@{args.revision}" if args.revision else args.name
    option = "--model " if "config.json" in files else "tinyprompt inspect "
    lines = [str(folder), *(f"  {file:<40}{size:>17,} bytes" for file, size in files.items())]
    lines.append(f"use it by its name: {option}{name}")
    return Output({"name": name, "folder": str(folder), "files": files}, "\n".join(lines))


@command(
    "inspect",
    "mine.safetensors --top 3",
    argument("thing", metavar="THING", nargs="+", help="prompts, a model directory or name, an .onnx file"),
    argument("--model", metavar="MODEL", help="model of the prompts (default: the built-in model, if it fits)"),
    argument("--top", type=int, metavar="N", default=5, help="nearest pieces of each vector"),
)
def inspect_things(args: argparse.Namespace) -> Output:
    """Describe prompts, the directory of a frozen model, or an .onnx file.

    Several prompts are compared. For a single prompt, the nearest pieces of all its vectors are shown.
    """
    if args.top < 1:
        raise ValueError(f"--top: expected at least 1, found {args.top}")
    out: dict[str, Any] = {"prompts": {}, "models": {}, "graphs": {}, "vocabulary": None}
    found: dict[str, Prompt] = {}
    for thing in args.thing:
        path = hub.find(thing)
        if path.suffix == ".onnx":
            out["graphs"][thing] = describe.describe_graph(path)
        elif path.is_dir() and not (path / "adapter_config.json").exists():
            out["models"][thing] = describe.describe_model(models.load(path, stored=True))
        else:
            found |= open_prompts(thing, found)
    if found:
        out |= describe_prompts(args, found)
    texts = [describe.model_text(one) for one in out["models"].values()]
    texts += ["\n".join(one["lines"]) for one in out["graphs"].values()]
    texts += [describe.prompt_text(out)] if found else []
    return Output(out, "\n\n".join(texts))


def describe_prompts(args: argparse.Namespace, found: dict[str, Prompt]) -> dict[str, Any]:
    """Describe prompts, the vocabulary, and the similarity of the prompts."""
    model, described, vocabulary = models.load(args.model, stored=True), {}, None
    for name, prompt in found.items():
        described[name] = describe.describe_prompt(prompt)
        try:
            check_fit(prompt, model, name)
        except CheckpointError:
            if args.model:
                raise
            continue  # the prompt belongs to another model than the built-in one
        warn_if_unknown(prompt, name)
        if "norm" in described[name]:
            described[name] |= describe.read_prompt(prompt, name, model, args.top)
            vocabulary = vocabulary or describe.describe_vocabulary(model)
    soft = {name: prompt.array for name, prompt in found.items() if "norm" in described[name]}
    names, cosines = describe.similarity(soft)
    rows = [[None if c != c else round(c, 4) for c in row] for row in cosines.tolist()]  # JSON does not support NaN
    return {"prompts": described, "vocabulary": vocabulary, "similarity": {"names": names, "cosine": rows}}


def open_prompts(thing: str, taken: Container[str]) -> dict[str, Prompt]:
    """Open the prompts of a file. One prompt: the path. Several: `name`, or `path:name` on a clash."""
    try:
        found = prompts.load_prompts(thing)
    except CheckpointError as error:
        expected = "inspect accepts prompt files, adapter and model directories, names of pulled models, .onnx files"
        raise CheckpointError(f"{error}; {expected}") from None
    if len(found) == 1:
        return dict(zip([thing], found.values(), strict=True))
    return {f"{thing}:{name}" if name in taken else name: prompt for name, prompt in found.items()}


@command(
    "convert",
    "mine.safetensors mine-for-peft",
    argument("source", metavar="SOURCE", help="prompt (also all.npz:NAME or a PEFT directory), or model"),
    argument("target", metavar="TARGET", help="name.safetensors, name.npy, or a directory"),
    argument("--model", metavar="MODEL", help="model of the prompt, if the prompt does not store it"),
    argument("--label-words", nargs="+", metavar="WORD", help="label words of the prompt, if it does not store them"),
    argument("--tokenizer", metavar="PATH", help="tokenizer file or folder, for a model without one"),
)
def convert(args: argparse.Namespace) -> Output:
    """Convert a prompt or a frozen model. The name of the target selects the format.

    A prompt: .safetensors, .npy, or a name without suffix for a PEFT directory. A model: a Hugging Face directory.
    """
    source, target = hub.find(args.source), Path(args.target)
    if source.is_dir() and not (source / "adapter_config.json").exists():
        if args.model or args.label_words:
            raise ValueError(f"{source}: is not a prompt; --model and --label-words apply only to prompts")
        path, about = models.convert(source, target, args.tokenizer), {"kind": "model"}
    else:
        if args.tokenizer:
            raise ValueError(f"{source}: is a prompt; --tokenizer applies only to models")
        path, about = convert_prompt(args, target)
    found = {"source": args.source, "target": str(path), **about}
    return Output(found, f"{args.source} written to {path}")


def convert_prompt(args: argparse.Namespace, target: Path) -> tuple[Path, dict[str, Any]]:
    """Write a prompt with the model and the label words of the arguments."""
    prompt = prompts.load_prompt(args.source)
    if args.model:
        model = models.load(args.model)
        check_fit(prompt, model, args.source)
        warn_if_unknown(prompt, args.source)
        prompt = replace(prompt, model=model.name, fingerprint=prompt.fingerprint or model.fingerprint)
    if args.label_words:
        words = [word.strip() for word in args.label_words]
        if not all(words) or len(set(words)) < len(words):
            raise ValueError(f"--label-words: expected different words, found {args.label_words}")
        if methods.HEAD in prompt.params and prompt.label_words and len(words) != len(prompt.label_words):
            wanted = f"expected {len(prompt.label_words)}, one for each of its vectors"
            raise ValueError(f"--label-words: {wanted}, found {len(words)}")
        prompt = replace(prompt, label_words=tuple(words))
        if args.model:  # raises if the tokenizer cannot distinguish two label words
            target_ids(model.tokenizer, words, methods.has_label_head(model.config, prompt.params))
    for_peft = not target.suffix and prompt.settings.get("method") in adapters.KINDS.values()
    if target.suffix != ".safetensors" and not for_peft:
        prompt.vectors(f"{args.source}, which can only be written to .safetensors")
    path = prompts.save_prompt(prompt, target)
    warn_of_loss(prompt, path)
    shapes = {name: list(value.shape) for name, value in prompt.params.items()}
    return path, {"kind": "prompt", "model": prompt.model, "label_words": prompt.label_words, "shapes": shapes}


SHAPES = {
    "batch_size": "fixed number of rows of a step",
    "input_tokens": "fixed length of input_ids",
    "target_tokens": "fixed length of labels",
    "prompt_length": "number of vectors, if --prompt is omitted",
}


@command(
    "export",
    "--prompt mine.safetensors --batch-size 8",
    model_argument(),
    argument("--prompt", metavar="PROMPT", help="saved prompt of any format (default: an initial prompt)"),
    argument("--out", metavar="DIR", help="folder for the files (tinyprompt-export)"),
    argument(
        "--plain",
        nargs="?",
        choices=PLAIN,
        const=PLAIN[0],
        help="only ONNX operators, for any runtime; float32 weights in each graph, or stored weights beside it",
    ),
    argument("--c", metavar="DIR", help="folder for C code that trains a prompt, instead of --out"),
    argument("--rows", metavar="FILE", nargs="+", help="with --c: training rows and test rows"),
    argument("--web", metavar="DIR", help="folder for a page that trains a prompt in a browser, instead of --out"),
    [
        argument(
            f"--{name.replace('_', '-')}", type=int, metavar="N", help=f"{SHAPES[name]} ({size}; --web: {of_page})"
        )
        for (name, size), of_page in zip(Shape()._asdict().items(), web.SHAPE, strict=True)
    ],
)
def export_graphs(args: argparse.Namespace) -> Output:
    """Write graphs for ONNX Runtime, or with --plain for any runtime: a training step, and scores of given targets.

    All shapes are fixed: pad ids with 0, and attention_mask and weights with 0.
    --c writes C code with a training program: make && ./train rows.bin
    --web writes a page for any web server: python -m http.server --directory DIR
    """
    for name in ("web", "c"):
        other = next((x for x in ("out", "plain", "web", "c") if x != name and getattr(args, x)), None)
        if getattr(args, name) and other:
            raise ValueError(f"--{name}: has its own folder; leave out --{other}")
    if args.rows and not (args.c and len(args.rows) <= 2):
        raise ValueError("--rows: needs --c and one or two files: training rows and test rows")
    shape = web.SHAPE if args.web else Shape()
    shape = shape._replace(**{name: n for name in Shape._fields if (n := getattr(args, name)) is not None})
    if args.c:
        rows = [Reader().read(path) for path in args.rows or ()]
        exported = export_c(args.model, args.c, shape, args.prompt, *rows)
    elif args.web:
        exported = web.export_page(args.model, args.web, shape, args.prompt)
    else:
        exported = export(args.model, args.out or "tinyprompt-export", shape, args.prompt, args.plain)
    if args.prompt:
        warn_if_unknown(prompts.load_prompt(args.prompt), args.prompt)
    return Output(exported._asdict(), exported)
