"""The commands: a function for each, of parsed arguments, that prints and returns what --json prints."""

import argparse
import json
import os
import sys
import time
from collections.abc import Container, Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from tinyprompt import (
    backend,
    bench,
    check,
    checkpoint,
    data,
    figures,
    hub,
    interpret,
    methods,
    metrics,
    prompts,
    tasks,
)
from tinyprompt.checkpoint import CheckpointError, Model
from tinyprompt.data import DataError, Row
from tinyprompt.export import export
from tinyprompt.prompts import Prompt
from tinyprompt.train import Progress, Result, Settings, predict, stream, tune

DEMO = Path(__file__).parent / "demo"
DEMO_TASKS = ("topic", "sentiment")
DEMO_SETTINGS = dict(steps=400, batch=16, length=20, optimizer="adam", schedule="linear", eval_every=40)

LENGTHS = (1, 5, 20, 50, 100, 150)  # of the paper's table 4
WRITING = {"max_target": int, "beams": int, "length_penalty": float}  # settings that predict and eval may change


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


def demo(args: argparse.Namespace) -> dict[str, Any]:
    """Tune a prompt on built-in data, and a built-in model; compare it with no prompt and the majority class."""
    started = time.perf_counter()
    model = checkpoint.load(args.model)
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
    curve = figures.draw_curve(result, path.with_suffix(".png"))
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
    """Tune a prompt, or what another method trains, on rows of a file.

    It is saved at every dev score, with all that --resume needs to go on as if the run had never stopped.
    """
    resume = prompts.load_prompt(args.resume) if args.resume else None
    given = {f.name: getattr(args, f.name) for f in fields(Settings) if hasattr(args, f.name)}
    settings = settings_of(args.resume, (resume.settings if resume else {}) | given)
    out_path = Path(args.out or (args.resume if resume and resume.state else "prompt.safetensors"))
    prompts.check_target(out_path, settings.method)
    model = checkpoint.load(args.model)
    train = read(args, args.train, settings.task, training=True)
    if args.dev:
        dev = read(args, args.dev, settings.task)
    elif any(row.group or row.task for row in train):
        raise DataError(f"--task {settings.task}: rows that belong together must not be split; name a file with --dev")
    else:
        train, dev = data.split(train, 0.2, settings.seed)
        say(f"no --dev: {len(dev)} of the training rows, drawn with seed {settings.seed}, are the dev rows")
    builtin = settings.task in tasks.TASKS
    labels = resume.labels if resume and not builtin else labels_for(args, settings.task, train)
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
    rows = read(args, args.data, settings.task, named=of_mixture(prompt))
    check_targets(", ".join(args.data), rows, prompt.labels)
    where = args.device, args.precision
    say(backend.describe(*where))
    answers = predict(model, [row.input for row in rows], prompt.labels, prompt.delta, settings, *where)
    labels = tasks.labels_of(settings.task, words_of(args)) if settings.task in tasks.TASKS else prompt.labels
    out = scores_of(args, settings.task, answers, rows, labels)
    seconds = round(time.perf_counter() - started, 1)
    return {"task": settings.task, **out, "seconds": seconds, "device": args.device, "precision": args.precision}


def predict_command(args: argparse.Namespace) -> dict[str, Any]:
    """Answer texts with a saved prompt."""
    model, prompt, settings = open_prompt(args)
    texts = args.text
    if args.data:
        rows = read(args, [args.data], settings.task, labelled=False, named=of_mixture(prompt))
        texts = [row.input for row in rows]
    texts = texts or [line.strip() for line in sys.stdin if line.strip()]
    if not texts:
        raise DataError("nothing to predict: give a text, --data FILE, or lines on standard input")
    if args.stream and (args.json or prompt.labels or settings.beams > 1):
        raise ValueError("--stream: goes with free text, written with one beam and without --json")
    where = args.device, args.precision
    say(backend.describe(*where))
    if args.stream:
        answers = [show(stream(model, text, prompt.delta, settings, *where)) for text in texts]
    else:
        answers = predict(model, texts, prompt.labels, prompt.delta, settings, *where)
        if not args.json:
            print("\n".join(answers))
    return {"predictions": [{"input": t, "prediction": a} for t, a in zip(texts, answers, strict=True)]}


def show(pieces: Iterable[str]) -> str:
    """Print pieces of a text as they come, in one line; returns the text."""
    text = ""
    for piece in pieces:
        print(piece, end="", flush=True)
        text += piece
    print()
    return text


def few_shot_command(args: argparse.Namespace) -> dict[str, Any]:
    """Score the frozen model on rows with solved examples in front of each: prompt design, without training."""
    if args.k < 0:
        raise ValueError(f"--k: expected 0 or more, found {args.k}")
    settings = Settings(task=args.task, max_input=args.max_input, seed=args.seed, **writing_of(args))
    if "," in settings.task:
        raise ValueError(f"--task {settings.task}: expected one task")
    model = checkpoint.load(args.model)
    train = read(args, [args.train], settings.task, training=True)
    rows = read(args, [args.data], settings.task)
    labels = labels_for(args, settings.task, train)
    check_targets(args.data, rows, labels)
    if args.k > len(train):
        raise DataError(f"{args.train}: {len(train)} rows, expected at least the {args.k} of --k")
    chosen = np.random.default_rng(args.seed).choice(len(train), args.k, replace=False)
    shots = [train[i] for i in chosen]
    texts = data.in_context([row.input for row in rows], shots, args.template, model.tokenizer, args.max_input)
    where = args.device, args.precision
    say(backend.describe(*where))
    answers = predict(model, texts, labels, None, settings, *where)
    out = scores_of(args, settings.task, answers, rows, labels)
    if not args.json:
        print(f"{args.k} examples in front of each; the first one read:\n{texts[0]}")
    return {**out, "k": args.k, "seed": args.seed, "first": texts[0]}


def count_command(args: argparse.Namespace) -> dict[str, Any]:
    """Count what every method trains and stores for each size of T5 1.1, or for --model, without weights.

    These are the figures of the paper's table 4 and figure 4.
    """
    sizes = methods.Sizes(args.length, args.rank, args.hidden, args.labels)
    if args.model:
        configs = {args.model: checkpoint.read_config(hub.find(args.model) / "config.json")}
    else:
        configs = {name: bench.config_of(name) for name in ("small", "base", "large", "xl", "xxl")}
    if args.plot and not Path(args.plot).suffix:
        raise ValueError(f"--plot {args.plot}: expected a name that ends in .png")
    path = figures.draw_parameters(configs, (1, args.length), sizes, Path(args.plot)) if args.plot else None
    if args.plot and not path:
        raise ValueError("--plot: matplotlib is not installed; pip install 'tinyprompt[plot]'")
    rows, table = [], []
    for name, config in configs.items():
        for method in methods.METHODS:
            count = methods.count(method, config, sizes)
            rows.append({"size": name, "method": method, **count._asdict(), "percent": count.percent})
        for length in LENGTHS:
            count = methods.count("prompt", config, replace(sizes, length=length))
            table.append({"size": name, "length": length, **count._asdict(), "percent": count.percent})
    if not args.json:
        print("a prompt: vectors, parameters, those of the model with them, percent (table 4)")
        for one in table:
            print("{size:<8}{length:>5}{stored:>12,}{model:>18,}{percent:>12.5f}".format(**one))
        numbers = f"{args.length} vectors, rank {args.rank}, hidden {args.hidden}, {args.labels} labels"
        print(f"what each method stores: {numbers}")
        for one in rows:
            more = "   trained: {trained:,}".format(**one) if one["trained"] > one["stored"] else ""
            print("{size:<8}{method:<14}{stored:>16,}{percent:>12.5f}".format(**one) + more)
    return {"rows": rows, "table": table, "plot": str(path) if path else None}


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
    out["vocabulary"] = None
    if found:
        model = checkpoint.load(args.model, stored=True)
        for name, prompt in found.items():
            out["prompts"][name] = interpret.describe_prompt(prompt, name)
            try:
                prompt.check(model, name)
            except CheckpointError:
                if args.model:
                    raise
                continue  # of another model than the built-in one
            say_if_unknown(prompt, name)
            out["prompts"][name] |= interpret.read_prompt(prompt, name, model, args.top)
        if any("nearest" in prompt for prompt in out["prompts"].values()):
            out["vocabulary"] = interpret.describe_vocabulary(model)
    names, cosines = interpret.similarity({name: prompt.vectors(name) for name, prompt in found.items()})
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
            prompt.check(model, args.source)
            say_if_unknown(prompt, args.source)
            prompt = prompt._replace(model=model.name, fingerprint=prompt.fingerprint or model.fingerprint())
        if args.labels:
            words = [label.strip() for label in args.labels]
            if not all(words) or len(set(words)) < len(words):
                raise ValueError(f"--labels: expected different words, found {args.labels}")
            if methods.HEAD in prompt.delta and prompt.labels and len(words) != len(prompt.labels):
                raise ValueError(
                    f"--labels: expected {len(prompt.labels)}, one for each of its vectors, found {len(words)}"
                )
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
    prompt.check(model, args.prompt)
    say_if_unknown(prompt, args.prompt)
    given = writing_of(args) | ({} if args.task is None else {"task": args.task})
    settings = settings_of(args.prompt, prompt.settings | given)
    if "," in settings.task and not of_mixture(prompt):
        raise ValueError(f"--task {settings.task}: {args.prompt} was tuned without the names of tasks; name one")
    return model, prompt, settings


def of_mixture(prompt: Prompt) -> bool:
    """Whether it was tuned on a mixture, whose inputs begin with the name of their task."""
    return "," in str(prompt.settings.get("task"))


def writing_of(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that the arguments change."""
    return {name: getattr(args, name) for name in WRITING if getattr(args, name) is not None}


def labels_for(args: argparse.Namespace, task: str, rows: Sequence[Row]) -> tuple[str, ...] | None:
    """The label words of a task, of which files of columns have those in `rows`; None where answers are free text."""
    if task in tasks.TASKS:
        return tasks.labels_of(task, words_of(args))
    if task == "classify":
        return tuple(sorted({row.target for row in rows}))
    return data.label_words(rows) if task == "auto" else None


def check_targets(path: str, rows: Sequence[Row], labels: Sequence[str] | None) -> None:
    """Raise DataError where a row's target is no label word."""
    for row in rows:
        if labels and row.target not in labels:
            raise DataError(
                f"{path}: target {row.target!r} is no label word ({', '.join(labels)}); map it with --words"
            )


def scores_of(args: argparse.Namespace, task: str, answers, rows: Sequence[Row], labels) -> dict[str, Any]:
    """The metrics of a task by name, and what is made of them; printed unless they go to --json."""
    scores = tasks.score(task, answers, rows, labels)
    mean = "the tasks " + " and ".join(task.split(",")) if "," in task else " and ".join(scores)
    metric = f"mean of {mean}" if len(scores) > 1 else next(iter(scores))
    score = tasks.mean_score(task, answers, rows, labels)
    if not args.json:
        each = "".join(f"; {name} {value:.3f}" for name, value in scores.items()) if len(scores) > 1 else ""
        print(f"{metric} {score:.3f} on {len(rows)} rows{each}")
    return {"metric": metric, "score": score, "scores": scores, "rows": len(rows)}


def settings_of(path: str | None, values: dict[str, Any]) -> Settings:
    """Settings from those of a saved prompt; what they leave out is as by default."""
    try:
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


def words_of(args: argparse.Namespace) -> dict[str, str]:
    """Label words that the arguments name, by the targets they stand for."""
    words = {}
    for pair in getattr(args, "words", None) or ():
        key, equals, word = pair.partition("=")
        if not equals or not word.strip():
            raise DataError(f"--words {pair!r}: expected TARGET=WORD, for example 1=good")
        words[key] = word.strip()
    return words


def read(
    args: argparse.Namespace,
    paths: Sequence[str],
    task: str,
    training: bool = False,
    labelled: bool = True,
    named: bool = False,
) -> list[Row]:
    """Rows of a file of the task, or with the columns and label words that the arguments name; of a mixture, of all.

    named: the input begins with the name of the task, as in a mixture.
    """
    names, target = task.split(","), getattr(args, "target", "target")
    if len(names) != len(paths):
        raise ValueError(
            f"--task {task}: {len(names)} task{'s' * (len(names) > 1)}, found {len(paths)} file"
            f"{'s' * (len(paths) > 1)}: {', '.join(paths)}; name one for each"
        )
    if named or len(names) > 1:
        if words_of(args) or not set(names) <= tasks.TASKS.keys():
            raise ValueError(f"--task {task}: a mixture is of built-in tasks with their own words, without --words")
        return tasks.mixed(names, [tasks.read(*of, training, None, labelled) for of in zip(names, paths, strict=True)])
    if task not in tasks.TASKS:
        return data.read_rows(paths[0], args.input, target if labelled else None, words_of(args))
    if (args.input, target) != ("input", "target"):
        raise ValueError(f"--input and --target go with files of columns; for these: --task auto, not {task}")
    return tasks.read(task, paths[0], training, words_of(args), labelled)


def say(text: str) -> None:
    """A line on standard error."""
    print(text, file=sys.stderr)
