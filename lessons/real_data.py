"""Tune prompts on TREC-6 and SST-2 and compare with majority class and bag-of-words logistic regression.

    python lessons/real_data.py TREC.train TREC.test SST2.train.tsv SST2.test.tsv [--seeds 3] [tune options ...]

The built-in tasks `trec` and `sst2` read the files; the rest runs through the commands a user types (`tinyprompt tune`,
`tinyprompt eval`). The baseline needs scikit-learn, which tinyprompt does not; it sees the same training rows. The last
500 training rows of a seeded shuffle are the dev rows; of SST-2's other rows 6,000 are used for training.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from tinyprompt import tasks
from tinyprompt.metrics import majority

SENTIMENT = {"negative": "bad", "positive": "good"}


def read(task, path, words=None):
    """Rows of a file of a task, without the name of the column in front of each input."""
    return [row._replace(input=row.input.partition(": ")[2]) for row in tasks.read(task, path, words=words)]


def command(*words):
    """One tinyprompt command; its JSON."""
    run = subprocess.run([sys.executable, "-m", "tinyprompt", *map(str, words), "--json"], stdout=subprocess.PIPE)
    if run.returncode:
        raise SystemExit(f"failed: tinyprompt {' '.join(map(str, words))}")
    return json.loads(run.stdout)


def bag_of_words(train, test):
    """Test accuracy of logistic regression over word counts."""
    count = CountVectorizer(token_pattern=r"\S+")
    x = count.fit_transform([r.input for r in train])
    fitted = LogisticRegression(max_iter=2000).fit(x, [r.target for r in train])
    return fitted.score(count.transform([r.input for r in test]), [r.target for r in test])


def write(rows, path):
    """Rows as a TSV file with a header."""
    path.write_text("input\ttarget\n" + "".join(f"{r.input}\t{r.target}\n" for r in rows), encoding="utf-8")
    return path


def main():
    """Print one line a task."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs=4, metavar="FILE")
    parser.add_argument("--seeds", type=int, default=3)
    args, options = parser.parse_known_args()
    trec_train, trec_test, sst2_train, sst2_test = args.files
    sets = {
        "TREC-6": (read("trec", trec_train), read("trec", trec_test), None),
        "SST-2": (read("sst2", sst2_train, SENTIMENT), read("sst2", sst2_test, SENTIMENT), 6000),
    }
    for name, (rows, test, limit) in sets.items():
        rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
        train, dev = rows[:-500][:limit], rows[-500:]
        scores = []
        with tempfile.TemporaryDirectory() as folder:
            files = [write(part, Path(folder) / f"{i}.tsv") for i, part in enumerate((train, dev, test))]
            for seed in range(args.seeds):
                prompt = Path(folder) / f"{seed}.safetensors"
                command("tune", files[0], "--dev", files[1], "--out", prompt, "--seed", seed, *options)
                scores.append(command("eval", prompt, files[2])["score"])
        print(
            f"{name}: {len(train)} train, {len(test)} test rows; "
            f"majority {majority([r.target for r in train], [r.target for r in test]):.3f}; "
            f"bag of words {bag_of_words(train, test):.3f}; "
            f"prompt {np.mean(scores):.3f} +- {np.std(scores, ddof=1) if len(scores) > 1 else 0:.3f} {scores}",
            flush=True,
        )


if __name__ == "__main__":
    main()
