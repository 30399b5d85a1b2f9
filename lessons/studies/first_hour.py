"""A stranger's rows: the defaults of `tune` beside options by hand, full tuning and a bag of words.

    python lessons/studies/first_hour.py [--only NAME ...] [--model base] [--seed 0]

Each line of the table is a file of rows of some kind, and rows that were not trained on. Every run is the command, in a
process of its own. `by hand` is `--batch-size 8 --steps 60` with the first word of each label, which were the best
options before the defaults knew the rows. Scores are accuracies with their standard errors.

The rows are those of the demo (the dev rows are the test), and first_hour/support.tsv, which has twelve long labels.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tinyprompt.assess import Share, bag_of_words, majority, share
from tinyprompt.cli.tuning import DEMO
from tinyprompt.data import Row
from tinyprompt.files.tables import read_rows

LONG = {
    "food": "Cooking and eating",
    "money": "Personal finance",
    "music": "Concerts and music",
    "nature": "Animals and outdoors",
    "sport": "Games and sport",
}
BY_HAND = ["--batch-size", "8", "--steps", "60"]


def demo(name):
    """Rows to train on, and dev rows of the demo, which are the test here."""
    return tuple(read_rows(DEMO / f"{name}.{part}.tsv") for part in ("train", "dev"))


def balanced(rows, each):
    """The first rows of every class."""
    kept, counts = [], {}
    for row in rows:
        counts[row.target] = counts.get(row.target, 0) + 1
        if counts[row.target] <= (each[row.target] if isinstance(each, dict) else each):
            kept.append(row)
    return kept


def of_words(rows, words, count, rng):
    """`count` rows of about so many words: the beginnings of rows, or rows of one class behind one another."""
    if words < 10:
        return [
            Row(" ".join(row.input.split()[:words]), row.target) for row in rows[:count]
        ]
    out = []
    for _ in range(count):
        target = rng.choice(sorted({row.target for row in rows}))
        own, text = [row.input for row in rows if row.target == target], ""
        while len(text.split()) < words:
            text += " " + own[rng.integers(len(own))]
        out.append(Row(text.strip(), str(target)))
    return out


def kinds(seed):
    """Each kind of rows: name, rows to train on, rows to test."""
    rng = np.random.default_rng(seed)
    topic, topic_test = demo("topic")
    feeling, feeling_test = demo("sentiment")
    topic, feeling = (
        [rows[i] for i in rng.permutation(len(rows))] for rows in (topic, feeling)
    )
    support = read_rows(Path(__file__).parent / "first_hour" / "support.tsv")
    support = [support[i] for i in rng.permutation(len(support))]
    twelve = balanced(support, 12)
    rest = [row for row in support if row not in twelve]
    good, bad = sorted({row.target for row in feeling})
    yield "two classes, 30 rows", balanced(feeling, 15), feeling_test
    yield (
        "two classes, 60 rows, 5 of 6 of one",
        balanced(feeling, {good: 50, bad: 10}),
        feeling_test,
    )
    yield "five classes, 60 rows", balanced(topic, 12), topic_test
    yield (
        "five classes, 60 rows of 5 words",
        of_words(balanced(topic, 12), 5, 60, rng),
        of_words(topic_test, 5, 100, rng),
    )
    few = balanced(topic, 40)
    yield (
        "five classes, 60 rows of 200 words",
        of_words(few, 200, 60, rng),
        of_words(topic_test, 200, 60, rng),
    )
    yield (
        "five classes, 200 rows of 200 words",
        of_words(balanced(topic, 80), 200, 200, rng),
        of_words(topic_test, 200, 60, rng),
    )
    long = lambda rows: [Row(row.input, LONG[row.target]) for row in rows]
    yield (
        "five classes, 200 rows, long labels",
        long(balanced(topic, 40)),
        long(topic_test),
    )
    yield "twelve classes, 60 rows, long labels", balanced(twelve, 5), rest
    yield "twelve classes, 144 rows, long labels", twelve, rest


def write(path, rows):
    """Write rows as .tsv, and return the path."""
    path.write_text(
        "".join(
            f"{a}\t{b}\n"
            for a, b in [("input", "target"), *((r.input, r.target) for r in rows)]
        )
    )
    return str(path)


def accuracy(folder, train, test, options):
    """Tune by the command and score on the test: accuracy, and the seconds of `tune`."""
    command, out = (
        [sys.executable, "-m", "tinyprompt"],
        str(folder / "prompt.safetensors"),
    )
    begin = time.perf_counter()
    subprocess.run(
        [*command, "tune", train, "--out", out, *options],
        check=True,
        capture_output=True,
    )
    seconds = time.perf_counter() - begin
    done = subprocess.run(
        [*command, "eval", out, test, "--json"],
        check=True,
        capture_output=True,
        text=True,
    )
    return Share(
        json.loads(done.stdout)["scores"]["accuracy"], len(read_rows(test))
    ), seconds


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", default=[], help="parts of the names of kinds"
    )
    parser.add_argument("--model", default="base")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(
        "| rows | majority | bag of words | by hand | defaults | full tuning | seconds, by hand, defaults, full |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, train, test in kinds(args.seed):
        if args.only and not any(word in name for word in args.only):
            continue
        words = dict.fromkeys(row.target for row in train)
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            files = write(folder / "train.tsv", train), write(folder / "test.tsv", test)
            seed = ["--model", args.model, "--seed", str(args.seed)]
            short = [
                f"{word}={word.split()[0].lower()}" for word in words if " " in word
            ]
            by_hand = [
                *BY_HAND,
                *(
                    ["--words", *short]
                    if len({x.split("=")[1] for x in short}) == len(short) > 0
                    else []
                ),
            ]
            runs = [
                accuracy(folder, *files, [*seed, *more])
                for more in (by_hand, [], ["--method", "full"])
            ]
        scores = [
            majority(train, test),
            share(bag_of_words(train, test), test),
            *(score for score, _ in runs),
        ]
        seconds = ", ".join(f"{seconds:.0f}" for _, seconds in runs)
        print(f"| {name} | {' | '.join(map(str, scores))} | {seconds} |", flush=True)


if __name__ == "__main__":
    main()
