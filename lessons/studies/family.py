"""Prompt tuning and model tuning over the sizes of the built-in family: does the gap close with size?

    python lessons/studies/family.py TREC.train TREC.test SST2.train.tsv SST2.test.tsv [--models tiny small]

Tasks: the demo's topic and sentiment with the demo's own settings; TREC-6 (4,952 training rows) and SST-2 (6,000 of its
rows) with batches of 32 and SETTINGS, TREC-6 for 1,500 steps (600 had given .816 and .826 on the test rows). The last
500 training rows of a seeded shuffle are their dev rows. What is best on the dev rows is scored on the test rows. Model
tuning has the same rows, batches and steps, and its own optimiser. The bag of words is logistic regression on the same
training rows, and needs scikit-learn, which tinyprompt does not.

Every score is written at once as a line of --results, so that the same command goes on where it was stopped.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

import tinyprompt as tp
from tinyprompt import data, train
from tinyprompt.cli.tuning import DEMO, DEMO_SETTINGS
from tinyprompt.device import default_device
from tinyprompt.tasks import registry
from tinyprompt.train import TaskData

SETTINGS = tp.Settings(steps=600, prompt_length=20, optimizer="adam", schedule="linear", eval_every=100)
FULL = dict(method="full", optimizer=None, learning_rate=None)  # model tuning with its own optimiser and learning rate
SENTIMENT = {"negative": "bad", "positive": "good"}


def read(task, path, words=None):
    """Rows of a file of a task, without the name of the column in front of each input."""
    return [row._replace(input=row.input.partition(": ")[2]) for row in registry.read(task, path, words=words)]


def split(rows, limit=None):
    """Training and dev rows of a seeded shuffle."""
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    return rows[:-500][:limit], rows[-500:]


def bag_of_words(train, test):
    """Test accuracy of logistic regression over word counts."""
    count = CountVectorizer(token_pattern=r"\S+")
    x = count.fit_transform([row.input.lower() for row in train])
    fitted = LogisticRegression(max_iter=2000).fit(x, [row.target for row in train])
    return fitted.score(count.transform([row.input.lower() for row in test]), [row.target for row in test])


def sets(trec_train, trec_test, sst2_train, sst2_test):
    """Train, dev and test rows, and settings, by the name of the task."""
    out = {
        task: (*(data.read_rows(DEMO / f"{task}.{part}.tsv") for part in ("train", "dev", "test")), DEMO_SETTINGS)
        for task in ("topic", "sentiment")
    }
    out["TREC-6"] = *split(read("trec", trec_train)), read("trec", trec_test), replace(SETTINGS, steps=1500)
    out["SST-2"] = *split(read("sst2", sst2_train, SENTIMENT), 6000), read("sst2", sst2_test, SENTIMENT), SETTINGS
    return out


def score(task, model, method, seed):
    """Test accuracy of one cell; `model` is None for the bag of words."""
    rows, dev, test, settings = task
    if method == "bag of words":
        return bag_of_words(rows, test)
    words = data.label_words(rows)
    prompt = tp.Prompt(label_words=words)
    if method != "no prompt":
        settings = replace(settings, seed=seed, **(FULL if method == "full" else {}))
        *_, last = train.run(model, TaskData(rows, dev, words, train.right_answers), settings)
        prompt = last.prompt
    return tp.evaluate(model, prompt, test).mean


def table(found, models, names):
    """The rows of a Markdown table: mean and standard deviation over the seeds."""
    yield "| task | method | " + " | ".join(models) + " |"
    yield "| --- | --- | " + " | ".join("---:" for _ in models) + " |"
    for task in names:
        for method in ("no prompt", "prompt", "full", "bag of words"):
            cells = []
            for model in models:
                scores = [v for (t, m, k, _), v in found.items() if (t, k) == (task, method) and m in (model, "")]
                spread = f" ± {np.std(scores, ddof=1):.3f}" if len(scores) > 1 else ""
                cells.append(f"{np.mean(scores):.3f}{spread}" if scores else "")
            yield f"| {task} | {method} | " + " | ".join(cells) + " |"


def main():
    """Score what is not in the results yet, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs=4, metavar="FILE")
    parser.add_argument("--models", nargs="+", default=["tiny", "small", "base"])
    parser.add_argument("--methods", nargs="+", default=["no prompt", "prompt", "full", "bag of words"])
    parser.add_argument("--tasks", nargs="+", default=["topic", "sentiment", "TREC-6", "SST-2"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.results.open()] if args.results.exists() else []
    found = {(row["task"], row["model"], row["method"], row["seed"]): row["accuracy"] for row in rows}
    problems = sets(*args.files)
    for name in args.models:
        model = tp.load(name)
        for task in args.tasks:
            for method in args.methods:
                seeds = range(args.seeds if method in ("prompt", "full") else 1)
                for seed in seeds:
                    key = (task, "" if method == "bag of words" else name, method, seed)
                    if key in found:
                        continue
                    found[key] = score(problems[task], model, method, seed)
                    row = dict(zip(("task", "model", "method", "seed"), key, strict=True), accuracy=found[key])
                    row |= dict(fingerprint=model.fingerprint[:12] if key[1] else "", device=default_device())
                    with args.results.open("a") as file:
                        print(json.dumps(row), file=file)
                    print(row, flush=True)
    print("\n".join(table(found, args.models, args.tasks)))


if __name__ == "__main__":
    main()
