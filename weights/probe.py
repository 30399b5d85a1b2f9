"""Measure how well a frozen model suits a task, and how well a prompt works on it: on dev rows, never on test rows.

    python weights/probe.py MODEL [MODEL ...] [--data DIR] [--prompts N] [--steps 200] [--device cpu]

The linear probe takes seconds: logistic regression on the mean encoder output over the tokens of a text, standardised,
with the best of four strengths by five-fold cross-validation on the training rows. With --prompts N, it also prints the
mean of N tuned prompts, each at its last step, so that nothing is selected. They start from label words followed by
random pieces ("labels"), and by the first prompt of promptable.py, if the model has one ("first"). MODEL is a directory
or a built-in size. Needs scikit-learn, which tinyprompt does not need.

Tasks: the demo's two (400 training rows, accuracy on their 100 dev rows); with --data, the folder of data/README, also
TREC-6, SST-2 and AG News (2,000 training rows, accuracy on 1,000 other rows of the same training file).
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tinyprompt import data, methods, t5
from tinyprompt.files import models, tables
from tinyprompt.model import Prompt
from tinyprompt.settings import Settings
from tinyprompt.tasks import registry
from tinyprompt.tuning import run_task, task_data

DEMO = Path(registry.__file__).parents[1] / "demo"
FILES = {
    "TREC-6": ("trec", "sentcls/TREC.train"),
    "SST-2": (None, "sentcls/SST-2_sentences.train"),  # whole sentences: phrases are not independent
    "AG News": ("agnews", "agnews/alps_dev.tsv"),
}
TRAIN, DEV = 2000, 1000  # rows of these tasks


def tasks(folder):
    """Yield name, training rows, dev rows and batch size of each task."""
    for name in ("topic", "sentiment"):
        yield name, *(tables.read_rows(DEMO / f"{name}.{part}.tsv") for part in ("train", "dev")), 16
    for name, (task, file) in FILES.items() if folder else ():
        if task:
            rows = registry.read(task, folder / file)
        else:
            lines = (folder / file).read_text(encoding="latin-1").splitlines()
            rows = [data.Row(line[2:], "good" if line[0] == "1" else "bad") for line in lines]
        rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[: TRAIN + DEV]]
        yield name, rows[:TRAIN], rows[TRAIN:], 32


def means(model, rows, size=64):
    """Return the mean encoder output of each row's input, (N, d_model)."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].input))
    out = np.empty((len(rows), model.config.d_model), np.float32)
    for i in range(0, len(rows), size):
        part = order[i : i + size]
        batch = data.pad([model.tokenizer.encode(rows[k].input)[:128] for k in part])
        states, mask = t5.encode(model.params, model.config, *batch)
        out[part] = (states * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    return out


def probe(model, rows, dev):
    """Return the accuracy of a linear probe."""
    fit = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
    fit = GridSearchCV(fit, {"logisticregression__C": [0.0003, 0.003, 0.03, 0.3]}, cv=5)
    fit.fit(means(model, rows), [row.target for row in rows])
    return fit.score(means(model, dev), [row.target for row in dev])


def prompt(model, rows, dev, batch, steps, seed, device, first=None):
    """Return the accuracy before tuning and at the last step. first: vectors that follow the label words."""
    settings = Settings(
        steps=steps, batch_size=batch, prompt_length=20, optimizer="adam", schedule="linear", eval_every=steps,
        seed=seed, max_input_tokens=128,
    )  # fmt: skip
    task = task_data(settings, rows, dev, data.label_words(rows))
    if first is not None:
        vectors = methods.init_params(model, settings, task.label_words)[methods.PROMPT]
        vectors[len(task.label_words) :] = first[len(task.label_words) :]
        task = task._replace(init=Prompt({methods.PROMPT: vectors}, model.name, model.fingerprint, task.label_words))
        settings = replace(settings, init="file")
    *_, last = run_task(model, task, settings, device)
    return last.state.scores[[0, -1], 1]


def main():
    """Print one JSON line per model and task."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--data", type=Path, help="folder with glue/, sentcls/ and agnews/")
    parser.add_argument("--prompts", type=int, default=0, help="prompts to tune for each task")
    parser.add_argument("--steps", type=int, default=200, help="steps of each prompt")
    parser.add_argument("--tasks", help="names of tasks, separated by commas")
    parser.add_argument("--device", default="cpu", help="device on which prompts are tuned")
    args = parser.parse_args()
    for path in args.models:
        model, inits = models.load(path), {"labels": None}
        if (file := Path(path) / "first-prompt.npy").exists():
            inits["first"] = np.load(file)
        for name, rows, dev, batch in tasks(args.data):
            if args.tasks and name not in args.tasks.split(","):
                continue
            found, start = {"model": str(path), "task": name, "probe": round(probe(model, rows, dev), 3)}, time.time()
            if args.prompts:
                for kind, first in inits.items():
                    runs = range(args.prompts)
                    scores = [prompt(model, rows, dev, batch, args.steps, s, args.device, first) for s in runs]
                    found[f"{kind}, no tuning"], found[f"{kind}, tuned"] = np.mean(scores, 0).round(3).tolist()
                found |= dict(prompts=args.prompts, steps=args.steps, seconds=round(time.time() - start))
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
