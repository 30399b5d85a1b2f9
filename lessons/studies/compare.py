"""Every tuning method on the built-in topic task and on TREC-6, in one table.

    python lessons/studies/compare.py TREC.train TREC.test [--seeds 3] [--steps 600] [--results compare.jsonl]

Each method has its own learning rate, chosen on the dev rows of both tasks with other settings; all else is the same:
Adam with a linear schedule, batches of 16, 20 vectors, rank 8, networks 128 wide. The accuracy is that on test rows of
what was best on the dev rows. A step is timed in turns, a round for all methods, and divided by that of `prompt`. What
was computed is kept in the file of results, so that the same command goes on where it was stopped.
"""

import argparse
import contextlib
import itertools
import json
import sys
import tempfile
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np

import tinyprompt as tp
from tinyprompt import data, methods, optim, train
from tinyprompt.cli.tuning import DEMO
from tinyprompt.device import compile, default_device
from tinyprompt.predict import target_ids
from tinyprompt.tasks import registry
from tinyprompt.train import TaskData

SETTINGS = tp.Settings(
    steps=600,
    batch_size=16,
    prompt_length=20,
    hidden=128,
    optimizer="adam",
    schedule="linear",
    eval_every=100,
    max_input_tokens=512,
)
SHOTS, TEMPLATE = 4, "{input} answer: {target}"
BARE, FEW, TRANSFER = "no prompt", f"{SHOTS} examples in the input", "prompt, from the other task's"


def read(trec_train, trec_test):
    """Train, dev and test rows of both tasks; of TREC-6 without the name of the column in front of each input."""
    topic = [data.read_rows(DEMO / f"topic.{part}.tsv") for part in ("train", "dev", "test")]
    trec, test = (
        [row._replace(input=row.input.partition(": ")[2]) for row in registry.read("trec", path)]
        for path in (trec_train, trec_test)
    )
    trec = [trec[i] for i in np.random.default_rng(0).permutation(len(trec))]
    return {"topic": topic, "TREC-6": (trec[:-500], trec[-500:], test)}


def shots(model, rows, words, seed):
    """Accuracy of the frozen model with examples in front of each input, and their bytes."""
    learned, _, test = rows
    chosen = [learned[i] for i in np.random.default_rng(seed).choice(len(learned), SHOTS, replace=False)]
    texts = data.in_context([row.input for row in test], chosen, TEMPLATE, model.tokenizer, 512)
    size = len(TEMPLATE) + sum(len(f"{row.input}{row.target}".encode()) for row in chosen)
    filled = [tp.Row(text, row.target) for text, row in zip(texts, test, strict=True)]
    return tp.evaluate(model, tp.Prompt(label_words=words, settings=vars(SETTINGS)), filled).mean, size


def tuned(model, rows, words, settings, init=()):
    """The prompt that `settings` make, its test accuracy, and the bytes of its file without the training state."""
    learned, dev, test = rows
    *_, last = train.run(model, TaskData(learned, dev, words, train.right_answers, init), settings)
    prompt = replace(last.prompt, train_state=None)
    with tempfile.TemporaryDirectory() as folder:
        size = tp.save_prompt(prompt, Path(folder) / "prompt.safetensors").stat().st_size
    return prompt, tp.evaluate(model, prompt, test).mean, size


def score(row, model, sets, name, settings):
    """Test accuracy and stored bytes of one row of the table on one task."""
    rows, words = sets[name]
    if row == BARE:
        return tp.evaluate(model, tp.Prompt(label_words=words, settings=vars(SETTINGS)), rows[2]).mean, 0
    if row == FEW:
        return shots(model, rows, words, settings.seed)
    settings, init = replace(settings, method=row if row in methods.METHODS else "prompt"), ()
    if row == TRANSFER:  # SPoT, Vu et al. 2022, arXiv:2110.07904
        init, *_ = tuned(model, *next(sets[other] for other in sets if other != name), settings)
        settings = replace(settings, init="file", init_file="the other task's")
    return tuned(model, rows, words, settings, init)[1:]


def step_times(model, rows, labels, rounds=15):
    """Median seconds of one step of training, with Adam's, by method; the methods take turns."""
    compute = compile(train.loss_and_grads, default_device())
    optimizer = optim.OPTIMIZERS[SETTINGS.optimizer]()
    trained = {name: methods.init_params(model, replace(SETTINGS, method=name), labels) for name in methods.METHODS}
    states = {name: optimizer.init(params) for name, params in trained.items()}
    batches = {
        warp: next(data.training_batches(rows[0], model.tokenizer, SETTINGS, target_ids(model, labels, warp)))
        for warp in (False, True)
    }
    seconds = {name: [] for name in trained}
    for round_ in range(rounds + 2):
        for name in trained:
            started = time.perf_counter()
            _, grads = compute(trained[name], model.params, model.config, batches[name == "warp"])
            trained[name], states[name] = optimizer.update(trained[name], grads, states[name], 1e-6)
            if round_ >= 2:  # after the graph is made, and memory is warm
                seconds[name].append(time.perf_counter() - started)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def read_results(path):
    """Accuracy and bytes of what has been computed already, by row, task, seed and a checksum of all else."""
    results = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):  # of a line that was cut
            key, value = json.loads(line)
            results[tuple(key)] = value
    return results


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trec_train")
    parser.add_argument("trec_test")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=SETTINGS.steps)
    parser.add_argument("--results", type=Path, default=Path("compare.jsonl"))
    args = parser.parse_args()
    model = tp.load()
    sets = {name: (rows, data.label_words(rows[0])) for name, rows in read(args.trec_train, args.trec_test).items()}
    rows = [BARE, FEW, *methods.METHODS, TRANSFER]
    results = read_results(args.results)
    seconds = step_times(model, *sets["TREC-6"])
    found = {}
    for row, name, seed in itertools.product(rows, sets, range(args.seeds)):
        settings = replace(SETTINGS, steps=args.steps, seed=seed)
        rate = methods.METHODS[row].learning_rate if row in methods.METHODS else None
        key = row, name, seed, zlib.crc32(repr((settings, rate, sets)).encode())
        if key not in results:
            results[key] = score(row, model, sets, name, settings)
            with open(args.results, "a", encoding="utf-8") as file:
                file.write(json.dumps([key, results[key]]) + "\n")
            print(*key[:3], *results[key], file=sys.stderr)
        found.setdefault((row, name), []).append(results[key])
    labels = len(sets["TREC-6"][1])
    print(f"| | trained | stored bytes | step | {' | '.join(sets)} |\n| --- |{' ---: |' * (3 + len(sets))}")
    for row in rows:
        method = "prompt" if row == TRANSFER else row
        trained = (
            methods.count(model.config, replace(SETTINGS, method=method), labels)[0] if method in methods.METHODS else 0
        )
        step = f"{seconds[method] / seconds['prompt']:.2f}" if method in seconds else ""
        cells = [f"{trained:,}", f"{found[row, 'TREC-6'][0][1]:,}", step]
        for name in sets:
            x = [accuracy for accuracy, _ in found[row, name]]
            cells.append(f"{np.mean(x):.3f}" + (f" ± {np.std(x, ddof=1):.3f}" if len(set(x)) > 1 else ""))
        print(f"| {row} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
