"""One batch of five tasks against batches of one task: rows a second.

    python lessons/studies/mixed_batches.py [--model base] [--device cpu] [--rows 5 10 40 200]

The five prompts have 1, 10, 25, 50 and 100 random vectors. `mixed` gives every fifth row to each of them, in one call.
`single` gives all rows to one prompt of 100 vectors. `fifths` makes five calls, one for each task with its own rows.
The cases take turns; a number is the median of the rounds. `label words` ranks five of them, `free text` writes 8
tokens a row.
"""

import argparse
import time

import numpy as np

import tinyprompt as tp
from tinyprompt.cli.tuning import DEMO
from tinyprompt.device import default_device, describe_device
from tinyprompt.model import PROMPT

LENGTHS = (1, 10, 25, 50, 100)


def prompts(model, words):
    """A prompt of each length, which writes 8 tokens if it has no label words."""
    rng = np.random.default_rng(0)
    shapes = [(length, model.config.d_model) for length in LENGTHS]
    arrays = [rng.normal(0, 0.5, shape).astype(np.float32) for shape in shapes]
    return [
        tp.Prompt({PROMPT: x}, label_words=words, settings={"max_new_tokens": 8})
        for x in arrays
    ]


def cases(model, texts, words, device):
    """The three ways to answer the same number of rows."""
    five = prompts(model, words)
    asked = [(five[i % 5], text) for i, text in enumerate(texts)]
    return {
        "mixed": lambda: tp.answer(model, asked, device),
        "single": lambda: tp.predict(model, five[-1], texts, device),
        "fifths": lambda: [
            tp.predict(model, prompt, texts[i::5], device)
            for i, prompt in enumerate(five)
        ],
    }


def main():
    """Print a table: rows a second, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--rows", type=int, nargs="+", default=[5, 10, 40, 200])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    model, rows = tp.load(args.model), tp.read_rows(DEMO / "topic.test.tsv")
    print(f"{model}\n{describe_device(args.device)}")
    print(
        "| | rows | mixed | single | fifths | mixed / single | mixed / fifths |\n| --- |"
        + " ---: |" * 6
    )
    for kind, words in (("label words", tp.label_words(rows)), ("free text", None)):
        for count in args.rows:
            todo = cases(
                model,
                [rows[i % len(rows)].input for i in range(count)],
                words,
                args.device,
            )
            seconds = {name: [] for name in todo}
            for _ in range(args.rounds + 1):
                for name, run in todo.items():
                    started = time.perf_counter()
                    run()
                    seconds[name].append(time.perf_counter() - started)
            rate = {
                name: count / float(np.median(times[1:]))
                for name, times in seconds.items()
            }
            ratios = [rate["mixed"] / rate[name] for name in ("single", "fifths")]
            cells = [
                *(f"{x:,.0f}" for x in rate.values()),
                *(f"{x:.2f}" for x in ratios),
            ]
            print(f"| {kind} | {count} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
