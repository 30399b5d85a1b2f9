"""Linear probe: what the frozen encoder knows of a task, and so about what a prompt can reach, in seconds.

    python weights/probe.py MODEL [MODEL ...] [--seeds N]

Logistic regression on the mean of the encoder's output over the tokens of a text; standardised, the best of four
strengths by five-fold cross-validation on the training rows; accuracy on the test rows of the demo's tasks. Needs
scikit-learn, which tinyprompt does not. MODEL is a directory or a built-in size. With --seeds, also the mean test
accuracy of prompts that are tuned as `tinyprompt demo` tunes them, in half a minute each.
"""

import argparse
import json
from dataclasses import replace

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tinyprompt import data, t5, train
from tinyprompt.cli.tuning import DEMO, DEMO_SETTINGS
from tinyprompt.files import models
from tinyprompt.tasks.registry import evaluate
from tinyprompt.train import TaskData


def means(model, rows, size=64):
    """Mean encoder output of each row's input, (N, d_model)."""
    out = []
    for i in range(0, len(rows), size):
        batch = data.pad([model.tokenizer.encode(row.input)[:128] for row in rows[i : i + size]])
        states, mask = t5.encode(model.params, model.config, *batch)
        out.append((states * mask[..., None]).sum(1) / mask.sum(1, keepdims=True))
    return np.concatenate(out)


def tuned(model, rows, dev, test, seed):
    """Test accuracy of a prompt tuned with the demo's settings."""
    task = TaskData(rows, dev, data.label_words(rows), train.right_answers)
    *_, last = train.run(model, task, replace(DEMO_SETTINGS, seed=seed))
    return evaluate(model, last.prompt, test).mean


def main():
    """Print one JSON line a model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--seeds", type=int, default=0, help="prompts to tune for each task")
    args = parser.parse_args()
    for path in args.models:
        model = models.load(path)
        found = {"model": model.name}
        for task in ("topic", "sentiment"):
            rows, dev, test = (data.read_rows(DEMO / f"{task}.{part}.tsv") for part in ("train", "dev", "test"))
            fit = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
            fit = GridSearchCV(fit, {"logisticregression__C": [0.001, 0.01, 0.1, 1]}, cv=5)
            fit.fit(means(model, rows), [row.target for row in rows])
            found[task] = round(fit.score(means(model, test), [row.target for row in test]), 3)
            scores = [tuned(model, rows, dev, test, seed) for seed in range(args.seeds)]
            if scores:
                found[f"{task}, prompt"] = round(float(np.mean(scores)), 3)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
