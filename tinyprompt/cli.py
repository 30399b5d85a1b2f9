"""The command line: one function for each command, and the parser of their arguments."""

import argparse
import json
import os
import sys
import time
from collections.abc import Container, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from tinyprompt import __version__, backend, bench, check, checkpoint, data, hub, interpret, metrics, optim, prompts
from tinyprompt.backend import DeviceError
from tinyprompt.checkpoint import CheckpointError, Model
from tinyprompt.data import DataError, Row
from tinyprompt.export import export
from tinyprompt.lower import LoweringError
from tinyprompt.methods import INITS
from tinyprompt.prompts import Prompt
from tinyprompt.train import Progress, Result, Settings, predict, tune

DEMO = Path(__file__).parent / "demo"
DEMO_TASKS = ("topic", "sentiment")
DEMO_SETTINGS = dict(steps=400, batch=16, length=20, optimizer="adam", schedule="linear", eval_every=40)

ENGINE_NAMES = dict.fromkeys(name for names in bench.ENGINES.values() for name in names)

HELP = {
    "size": "shape of the T5: 1.1, or 1.0 where it says so",
    "input_tokens": "tokens of every input, padding included",
    "target_tokens": "tokens of every target",
    "storage": "dtype of the weights in their file",
    "device": "where to compute",
    "steps": "training steps",
    "batch": "rows of a batch",
    "length": "prompt vectors",
    "init": f"first prompt: {', '.join(INITS)}",
    "init_text": "text for --init text",
    "init_file": "saved prompt for --init file",
    "optimizer": f"one of {', '.join(optim.OPTIMIZERS)}",
    "rate": "learning rate",
    "schedule": "constant, or linear (down to 0)",
    "warmup": "steps in which the rate rises",
    "z_loss": "weight of the squared log of the softmax denominator",
    "dropout": "dropout rate of the frozen model during training",
    "eval_every": "steps between two dev scores",
    "patience": "dev scores without a better one before stopping; 0: never stop early",
    "max_input": "tokens of an input that are read",
    "max_target": "tokens of a free-text answer that are written",
    "seed": "seed of the first prompt, the order of the rows, dropout",
}


class Bar:
    """Progress on standard error: loss, dev score, steps a second, time left."""

    def __init__(self, steps: int):
        self.bar = tqdm(total=steps, unit="step", file=sys.stderr, dynamic_ncols=True, mininterval=0.5)
        self.dev = ""

    def __call__(self, p: Progress) -> None:
        if p.dev is not None:
            self.dev = f" dev {p.dev:.3f} best {p.best:.3f}"
        self.bar.set_postfix_str(f"loss {p.loss:.3f}{self.dev}", refresh=False)
        self.bar.update(p.step - self.bar.n)  # more than one where a run is resumed


def run_tune(model: Model, train, dev, settings: Settings, labels, device: str, precision: str, **more) -> Result:
    """`tune` with a progress bar."""
    bar = Bar(settings.steps)
    try:
        return tune(model, train, dev, settings, labels, bar, device, precision, **more)
    finally:
        bar.bar.close()


def evaluate(model: Model, rows: Sequence[Row], labels, delta, settings: Settings, *where: str) -> float:
    """Accuracy (exact match for free text) on rows, 0 to 1; where: device and precision."""
    answers = predict(model, [row.input for row in rows], labels, delta, settings, *where)
    return metrics.accuracy(answers, [row.target for row in rows])


def draw_curve(result: Result, path: Path) -> Path | None:
    """Loss and dev score over the steps as a PNG; None where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, left = plt.subplots(figsize=(6, 3.5), layout="constrained")
    right = left.twinx()
    rows = result.history
    left.plot([r["step"] for r in rows[1:]], [r["loss"] for r in rows[1:]], color="tab:gray", label="training loss")
    right.plot([r["step"] for r in rows], [r["dev"] for r in rows], color="tab:blue", marker="o", ms=3, label="dev")
    right.axvline(result.best_step, color="tab:blue", lw=0.8, ls=":")
    left.set(xlabel="step", ylabel="training loss (nats a token)", ylim=(0, None))
    right.set(ylabel="dev accuracy", ylim=(0, 1))
    left.set_title(f"best on dev: {result.best_dev:.2f} at step {result.best_step}", fontsize=10)
    left.legend(handles=[*left.lines, right.lines[0]], loc="lower left", fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def demo(args: argparse.Namespace) -> dict[str, Any]:
    """Tune a prompt on the built-in model and data; compare it with no prompt and with the majority class."""
    started = time.perf_counter()
    model = checkpoint.load()
    train, dev, test = (data.read_rows(DEMO / f"{args.task}.{part}.tsv") for part in ("train", "dev", "test"))
    labels = data.label_words(train)
    settings = Settings(**{**DEMO_SETTINGS, "seed": args.seed})
    vectors = f"{settings.length} x {model.config.d_model}"
    where = args.device, args.precision
    say(backend.describe(*where))
    say(f"frozen T5 {model.name}; task {args.task}: {', '.join(labels or ())}; prompt {vectors} float32")
    unprompted = evaluate(model, test, labels, None, settings, *where)
    result = run_tune(model, train, dev, settings, labels, *where)
    tuned = evaluate(model, test, labels, result.prompt.delta, settings, *where)
    path = prompts.save_prompt(result.prompt, Path(args.out) / f"{args.task}.safetensors")
    curve = draw_curve(result, path.with_suffix(".png"))
    out = {
        "task": args.task,
        "majority": metrics.majority([r.target for r in train], [r.target for r in test]),
        "unprompted": unprompted,
        "tuned": tuned,
        "test_rows": len(test),
        "seconds": round(time.perf_counter() - started, 1),
        "device": args.device,
        "precision": args.precision,
        "prompt": str(path),
        "curve": str(curve) if curve else None,
    }
    if not args.json:
        print(f"accuracy on {len(test)} test rows it never saw")
        for name, text in (
            ("majority", "majority class"),
            ("unprompted", "frozen model, no prompt"),
            ("tuned", "frozen model, tuned prompt"),
        ):
            print(f"  {text:<28}{out[name]:6.3f}")
        print(f"prompt saved to {path}" + (f", learning curve to {curve}" if curve else "") + f"; {out['seconds']} s")
        print(f"try: tinyprompt predict {path} {json.dumps(test[0].input)}")
    return out


def tune_command(args: argparse.Namespace) -> dict[str, Any]:
    """Tune a prompt on rows of a file.

    It is saved at every dev score, with all that --resume needs to go on as if the run had never stopped.
    """
    resume = prompts.load_prompt(args.resume) if args.resume else None
    given = {f.name: getattr(args, f.name) for f in fields(Settings) if hasattr(args, f.name)}
    settings = settings_of(args.resume, (resume.settings if resume else {}) | given)
    out_path = Path(args.out or (args.resume if resume and resume.state else "prompt.safetensors"))
    prompts.check_target(out_path)
    model = checkpoint.load(args.model)
    train = read(args, args.train)
    if args.dev:
        dev = read(args, args.dev)
    else:
        train, dev = data.split(train, 0.2, settings.seed)
        say(f"no --dev: {len(dev)} of the training rows, drawn with seed {settings.seed}, are the dev rows")
    labels = data.label_words(train) if args.task == "auto" else None
    if args.task == "classify":
        labels = tuple(sorted({row.target for row in train}))
    elif resume and args.task == "auto":
        labels = resume.labels
    where = args.device, args.precision
    say(backend.describe(*where))
    say(f"{len(train)} train rows, {len(dev)} dev rows; " + (f"labels: {', '.join(labels)}" if labels else "free text"))
    saved: list[Path] = []
    try:
        result = run_tune(
            model,
            train,
            dev,
            settings,
            labels,
            *where,
            resume=resume,
            save=lambda prompt: saved.append(prompts.save_prompt(prompt, out_path)),
        )
    except KeyboardInterrupt:
        if not saved:
            raise
        go_on = "" if out_path.suffix == ".npy" else f"; to go on, repeat the command with --resume {out_path}"
        raise KeyboardInterrupt(f"the best prompt so far is in {out_path}{go_on}") from None
    path = prompts.save_prompt(result.prompt, out_path)
    say_what_is_lost(result.prompt, path)
    out = {
        "prompt": str(path),
        "labels": labels,
        "dev": result.best_dev,
        "best_step": result.best_step,
        "steps": result.history[-1]["step"],
        "seconds": round(result.seconds, 1),
        "device": args.device,
        "precision": args.precision,
    }
    if not args.json:
        print(f"dev {out['dev']:.3f} at step {out['best_step']} of {out['steps']}; {out['seconds']} s; saved to {path}")
    return out


def eval_command(args: argparse.Namespace) -> dict[str, Any]:
    """Score a saved prompt on rows of a file."""
    started = time.perf_counter()
    model, prompt, settings = open_prompt(args)
    rows = read(args, args.data)
    for row in rows:
        if prompt.labels and row.target not in prompt.labels:
            raise DataError(
                f"{args.data}: target {row.target!r} is no label word of the prompt ({', '.join(prompt.labels)}); "
                "map it with --words"
            )
    where = args.device, args.precision
    say(backend.describe(*where))
    score = evaluate(model, rows, prompt.labels, prompt.delta, settings, *where)
    metric = "accuracy" if prompt.labels else "exact match"
    out = {"metric": metric, "score": score, "rows": len(rows), "seconds": round(time.perf_counter() - started, 1)}
    if not args.json:
        print(f"{metric} {score:.3f} on {len(rows)} rows")
    return out | {"device": args.device, "precision": args.precision}


def predict_command(args: argparse.Namespace) -> dict[str, Any]:
    """Answer texts with a saved prompt."""
    model, prompt, settings = open_prompt(args)
    texts = args.text
    if args.data:
        texts = [row.input for row in data.read_rows(args.data, args.input, None)]
    texts = texts or [line.strip() for line in sys.stdin if line.strip()]
    if not texts:
        raise DataError("nothing to predict: give a text, --data FILE, or lines on standard input")
    where = args.device, args.precision
    say(backend.describe(*where))
    answers = predict(model, texts, prompt.labels, prompt.delta, settings, *where)
    if not args.json:
        print("\n".join(answers))
    return {"predictions": [{"input": t, "prediction": a} for t, a in zip(texts, answers, strict=True)]}


def check_command(args: argparse.Namespace) -> dict[str, Any]:
    """Compare logits, loss and prompt gradient of every engine with NumPy in float64; exit status 1 if one is wrong.

    Without --batch: three random batches. With --gradient: is this the gradient of that batch's loss by its prompt?
    """
    folder = args.model or checkpoint.default_model()
    model = checkpoint.load(folder)
    cases = [check.load_case(args.batch, model)] if args.batch else [check.draw(model, seed=i) for i in range(3)]
    if args.save:
        check.save_case(cases[0], args.save)
        told = f"{args.save}: {', '.join(('prompt', *data.Batch._fields))}"
        if not args.json:
            print(told)
        return {"saved": args.save}
    if args.gradient:
        if not args.batch:
            raise ValueError("--gradient: of which batch? Name it with --batch; --save writes one")
        report = check.check_gradient(read_array(args.gradient), model, *cases[0], name=args.gradient)
    else:
        report = check.check_model(model, folder, cases, say)
    if not args.json:
        print(report)
    return report.as_dict()


def read_array(path: str) -> np.ndarray:
    """The array of floats in a .npy file. Raises CheckpointError."""
    try:
        array = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise CheckpointError(f"{path}: not a .npy file ({error})") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        raise CheckpointError(f"{path}: expected one array of floats, as numpy.save writes it")
    return array


def pull_command(args: argparse.Namespace) -> dict[str, Any]:
    """Fetch a T5 or a PEFT adapter from the Hugging Face hub, to use it by its name.

    HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE mean what they mean to huggingface_hub.
    """
    folder = hub.pull(args.name, args.revision)
    files = {name: (folder / name).stat().st_size for name in hub.wanted(os.listdir(folder))}
    name = f"{args.name}@{args.revision}" if args.revision else args.name
    if not args.json:
        print(folder)
        for file, size in files.items():
            print(f"  {file:<40}{size:>17,} bytes")
        option = "--model " if "config.json" in files else "tinyprompt inspect "
        print(f"its name is as good as this path: {option}{name}")
    return {"name": name, "folder": str(folder), "files": files}


def inspect_command(args: argparse.Namespace) -> dict[str, Any]:
    """Show what is in prompts, in a frozen model's directory, or in an .onnx file.

    Several prompts are compared; of one alone, the nearest pieces of all its vectors are shown.
    """
    if args.top < 1:
        raise ValueError(f"--top: expected at least 1, found {args.top}")
    out: dict[str, Any] = {"prompts": {}, "models": {}, "graphs": {}}
    found: dict[str, Prompt] = {}
    for thing in args.thing:
        path = hub.find(thing)
        if path.suffix == ".onnx":
            out["graphs"][thing] = interpret.describe_graph(path)
        elif path.is_dir() and not (path / "adapter_config.json").exists():
            out["models"][thing] = interpret.describe_model(checkpoint.load(path, stored=True))
        else:
            found |= open_prompts(thing, found)
    model = checkpoint.load(args.model, stored=True) if found else None
    for name, prompt in found.items():
        out["prompts"][name] = interpret.describe_prompt(prompt, name)
        if model is not None and (args.model or fits(prompt, name, model)):
            try:
                prompt.check(model)
                out["prompts"][name] |= interpret.read_prompt(prompt, name, model, args.top)
            except ValueError as error:
                raise CheckpointError(f"{name}: {error}") from None
    known = any("nearest" in prompt for prompt in out["prompts"].values())
    out["vocabulary"] = interpret.describe_vocabulary(model) if model is not None and known else None
    names, cosines = interpret.similarity({name: interpret.vectors(prompt, name) for name, prompt in found.items()})
    rows = [[None if c != c else round(c, 4) for c in row] for row in cosines.tolist()]  # JSON has no nan
    out["similarity"] = {"names": names, "cosine": rows}
    if not args.json:
        texts = [interpret.model_text(one) for one in out["models"].values()]
        texts += ["\n".join(one["lines"]) for one in out["graphs"].values()]
        texts += [interpret.prompt_text(out)] if found else []
        print("\n\n".join(texts))
    return out


def open_prompts(thing: str, taken: Container[str]) -> dict[str, Prompt]:
    """The prompts of a file by name: as it is given if there is one, else their own names, with the file's if taken."""
    try:
        found = prompts.load_prompts(thing)
    except CheckpointError as error:
        expected = "inspect takes files of prompts, adapter and model directories, names of pulled ones, .onnx files"
        raise CheckpointError(f"{error}; {expected}") from None
    if len(found) == 1:
        return dict(zip([thing], found.values(), strict=True))
    return {f"{thing}:{name}" if name in taken else name: prompt for name, prompt in found.items()}


def fits(prompt: Prompt, name: str, model: Model) -> bool:
    """Whether a prompt can be one of this model."""
    if interpret.vectors(prompt, name).shape[1] != model.config.d_model:
        return False
    return prompt.fingerprint is None or prompt.fingerprint == model.fingerprint()


def convert_command(args: argparse.Namespace) -> dict[str, Any]:
    """Write a prompt, or a frozen model, in another format; the name of the target tells which.

    A prompt: .safetensors, .npy, or without suffix a directory for PEFT. A model: a Hugging Face directory.
    """
    source, target = hub.find(args.source), Path(args.target)
    if source.is_dir() and not (source / "adapter_config.json").exists():
        if args.model or args.labels:
            raise ValueError(f"{source}: is no prompt; --model and --labels go with prompts only")
        path = checkpoint.convert(source, target, args.tokenizer)
        about: dict[str, Any] = {"kind": "model"}
    else:
        if args.tokenizer:
            raise ValueError(f"{source}: is a prompt; --tokenizer goes with models only")
        prompt = prompts.load_prompt(args.source)
        if args.model:
            model = checkpoint.load(args.model)
            prompt.check(model)
            say_if_unknown(prompt, args.source)
            prompt = prompt._replace(model=model.name, fingerprint=model.fingerprint())
        if args.labels:
            words = [label.strip() for label in args.labels]
            if not all(words) or len(set(words)) < len(words):
                raise ValueError(f"--labels: expected different words, found {args.labels}")
            prompt = prompt._replace(labels=tuple(words))
        if target.suffix != ".safetensors":
            prompt.vectors(f"{args.source}, which can only be written to .safetensors")
        path = prompts.save_prompt(prompt, target)
        say_what_is_lost(prompt, path)
        shapes = {name: list(value.shape) for name, value in prompt.delta.items()}
        about = {"kind": "prompt", "model": prompt.model, "labels": prompt.labels, "shapes": shapes}
    if not args.json:
        print(f"{args.source} written to {path}")
    return {"source": args.source, "target": str(path), **about}


def export_command(args: argparse.Namespace) -> dict[str, Any]:
    """Write graphs for plain ONNX Runtime: a training step, and the score of given targets.

    Every shape is fixed: fill up with id 0, and with 0 in attention_mask and weights.
    """
    out = export(args.model, args.out, args.batch, args.input_tokens, args.target_tokens, args.length, args.prompt)
    if args.prompt:
        say_if_unknown(prompts.load_prompt(args.prompt), args.prompt)
    if not args.json:
        for path, size in out["files"].items():
            print(f"{path}: {size:,} bytes")
        print("inputs: " + ", ".join(f"{name} {shape}" for name, shape in out["inputs"].items()))
    return out


def bench_command(args: argparse.Namespace) -> dict[str, Any]:
    """Time NumPy, ONNX Runtime and, where installed, PEFT on one frozen T5 with random weights."""
    problem = bench.Problem(**{f.name: getattr(args, f.name) for f in fields(bench.Problem)})
    if args.rounds < 1:
        raise ValueError(f"--rounds: expected at least 1, found {args.rounds}")
    engines = bench.available(args.device)
    if args.engines is not None:
        engines = list(dict.fromkeys(name.strip() for name in args.engines.split(",")))
    out = bench.measure(problem, engines, args.rounds, say)
    if not args.json:
        print(bench.table(out))
    return out


def open_prompt(args: argparse.Namespace) -> tuple[Model, Prompt, Settings]:
    """The model and the prompt, which must belong together, and the settings that the prompt was tuned with."""
    prompt = prompts.load_prompt(args.prompt)
    model = checkpoint.load(args.model)
    prompt.check(model)
    say_if_unknown(prompt, args.prompt)
    return model, prompt, settings_of(args.prompt, prompt.settings)


def settings_of(path: str | None, values: dict[str, Any]) -> Settings:
    """Settings from those of a saved prompt; what they leave out is as by default."""
    try:
        for field in fields(Settings):
            if type(values.get(field.name, field.default)) not in (type(field.default), str, float, type(None)):
                raise TypeError(f"setting {field.name}: {values[field.name]!r}")
            if isinstance(field.default, int) and not isinstance(values.get(field.name, 0), int):
                raise TypeError(f"setting {field.name}: expected a whole number, found {values[field.name]!r}")
        return Settings(**values)
    except TypeError as error:
        raise CheckpointError(f"{path}: its settings are of another version of tinyprompt ({error})") from None


def say_if_unknown(prompt: Prompt, path: str) -> None:
    """Warn where nothing tells whether a prompt belongs to the model that it is used with."""
    if prompt.fingerprint is None:
        say(f"warning: {path} does not say which weights it was tuned on; only its shape was checked")


def say_what_is_lost(prompt: Prompt, path: Path) -> None:
    """Warn where a file cannot hold all of a prompt."""
    if path.suffix == ".npy" and (prompt.model or prompt.labels or prompt.state):
        say(f"warning: {path} holds the vectors only, without the name of the model, label words and training state")


def read(args: argparse.Namespace, path: str) -> list[Row]:
    """Rows of a file with the columns and label words that the arguments name."""
    words = {}
    for pair in args.words or ():
        key, equals, word = pair.partition("=")
        if not equals or not word.strip():
            raise DataError(f"--words {pair!r}: expected TARGET=WORD, for example 1=good")
        words[key] = word.strip()
    return data.read_rows(path, args.input, args.target, words)


def say(text: str) -> None:
    """A line on standard error."""
    print(text, file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    """All commands and their arguments."""
    top = argparse.ArgumentParser(prog="tinyprompt", description="Soft prompts for a frozen T5, in NumPy.")
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(required=True, metavar="command")

    def command(name, function, computes=True):
        sub = commands.add_parser(
            name,
            help=function.__doc__.partition("\n")[0],
            description=function.__doc__,
            formatter_class=argparse.MetavarTypeHelpFormatter,
        )
        sub.set_defaults(function=function)
        sub.add_argument("--json", action="store_true", help="print one JSON object on standard output")
        if computes:
            device = "where to compute (cpu if ONNX Runtime is installed)"
            sub.add_argument("--device", choices=backend.DEVICES, type=str, help=device)
            precision = "int8 on cpu or bf16 on cuda: faster, less exact (full)"
            sub.add_argument("--precision", choices=backend.PRECISIONS, type=str, default="full", help=precision)
        return sub

    def columns(sub):
        sub.add_argument("--input", type=str, default="input", help="column of the input text (input)")
        sub.add_argument("--target", type=str, default="target", help="column of the target text (target)")
        sub.add_argument("--words", type=str, nargs="+", help="label words for coded targets: 0=bad 1=good")

    model = dict(type=str, help="Hugging Face T5 directory, or the name of a pulled one (the built-in model)")

    sub = command("demo", demo)
    sub.add_argument("--task", choices=DEMO_TASKS, type=str, default="topic", help="which built-in data (topic)")
    sub.add_argument("--seed", type=int, default=0, help=HELP["seed"])
    sub.add_argument("--out", type=str, default="tinyprompt-demo", help="folder for the prompt and the curve")

    sub = command("tune", tune_command)
    sub.add_argument("train", type=str, help="training rows: .tsv, .csv or .jsonl")
    sub.add_argument("--dev", type=str, help="dev rows (a fifth of the training rows)")
    sub.add_argument("--model", **model)
    sub.add_argument("--out", type=str, help="where the prompt goes (prompt.safetensors, or what --resume names)")
    sub.add_argument(
        "--resume", type=str, help="saved prompt whose training goes on, with its settings (--steps may grow)"
    )
    sub.add_argument(
        "--task",
        choices=("auto", "classify", "generate"),
        type=str,
        default="auto",
        help="rank labels, or write freely",
    )
    columns(sub)
    for field in fields(Settings):
        kind = str if field.default is None or field.default is MISSING else type(field.default)
        shown = "" if field.default is None else f" ({field.default})"
        sub.add_argument(
            f"--{field.name.replace('_', '-')}", type=kind, default=argparse.SUPPRESS, help=HELP[field.name] + shown
        )

    sub = command("eval", eval_command)
    sub.add_argument("prompt", type=str, help="saved prompt of any format (see convert)")
    sub.add_argument("data", type=str, help="rows: .tsv, .csv or .jsonl")
    sub.add_argument("--model", **model)
    columns(sub)

    sub = command("predict", predict_command)
    sub.add_argument("prompt", type=str, help="saved prompt of any format (see convert)")
    sub.add_argument("text", type=str, nargs="*", help="texts to answer (lines on standard input)")
    sub.add_argument("--data", type=str, help="take the texts from a .tsv, .csv or .jsonl file")
    sub.add_argument("--input", type=str, default="input", help="column of the input text (input)")
    sub.add_argument("--model", **model)

    sub = command("check", check_command, computes=False)
    sub.add_argument("model", nargs="?", **model)
    sub.add_argument("--batch", type=str, help="a .npz file: prompt, input_ids, attention_mask, labels, weights")
    sub.add_argument("--gradient", type=str, help="a .npy file: your gradient of that batch by its prompt")
    sub.add_argument("--save", type=str, help="write a batch there, to compute its gradient elsewhere, and stop")

    sub = command("pull", pull_command, computes=False)
    sub.add_argument("name", type=str, help="org/name, as in google/t5-v1_1-small")
    sub.add_argument("--revision", type=str, help="a branch, tag or commit (main)")

    sub = command("inspect", inspect_command, computes=False)
    sub.add_argument("thing", type=str, nargs="+", help="prompts, a model directory or name, an .onnx file")
    sub.add_argument("--model", type=str, help="model that the prompts were tuned on (the built-in one, if it fits)")
    sub.add_argument("--top", type=int, default=5, help="nearest pieces of each vector (5)")

    sub = command("convert", convert_command, computes=False)
    sub.add_argument("source", type=str, help="prompt (also all.npz:NAME, or a PEFT directory), or model directory")
    sub.add_argument("target", type=str, help="name.safetensors, name.npy, or a directory")
    sub.add_argument("--model", type=str, help="model that the prompt belongs to, if it does not say so")
    sub.add_argument("--labels", type=str, nargs="+", help="label words, if the prompt does not know them")
    sub.add_argument("--tokenizer", type=str, help="tokenizer file or folder, for a model without one")

    sub = command("export", export_command, computes=False)
    sub.add_argument("--model", **model)
    sub.add_argument("--prompt", type=str, help="saved prompt of any format (a first one, of vocabulary rows)")
    sub.add_argument("--out", type=str, default="tinyprompt-export", help="folder for graphs, prompt and weights")
    sub.add_argument("--batch", type=int, default=8, help="rows of all inputs, always (8)")
    sub.add_argument("--input-tokens", type=int, default=64, help="length of input_ids, always (64)")
    sub.add_argument("--target-tokens", type=int, default=4, help="length of labels, always (4)")
    sub.add_argument("--length", type=int, default=100, help="prompt vectors, if no --prompt brings its own (100)")

    sub = command("bench", bench_command, computes=False)
    sub.add_argument("--engines", type=str, help=f"some of {', '.join(ENGINE_NAMES)} (all that can run here)")
    sub.add_argument("--rounds", type=int, default=5, help="turns of every engine (5)")
    for field in fields(bench.Problem):
        known = {"size": bench.SIZES, "storage": bench.STORAGE, "device": bench.ENGINES}.get(field.name)
        sub.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(field.default),
            default=field.default,
            choices=known,
            help=f"{HELP[field.name]} ({field.default})",
        )
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Bad input is one line on standard error and exit status 2; a check that finds a fault is 1."""
    args = parser().parse_args(argv)
    try:
        if hasattr(args, "precision"):
            args.device = args.device or backend.default()
            backend.check(args.device, args.precision)
        out = args.function(args)
        if args.json:
            print(json.dumps(out))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (CheckpointError, DataError, DeviceError, LoweringError, ValueError, FloatingPointError, OSError) as error:
        say(f"tinyprompt: {error}")
        return 2
    except (MemoryError, OverflowError) as error:
        say(f"tinyprompt: too large for this machine: {error}")
        return 2
    except KeyboardInterrupt as stop:
        say(f"tinyprompt: stopped; {str(stop) or 'nothing was saved'}")
        return 130
    return 0 if out.get("ok", True) else 1
