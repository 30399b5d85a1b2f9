"""Train the demo's prompt in headless Chromium on the page of `export --web`, and score it with `tinyprompt eval`.

    python tests/train_in_browser.py                        # the built-in model, topic, 100 steps
    python tests/train_in_browser.py --model small --pictures .   # and light.png, dark.png, phone.png

Prints the seconds until the page is ready, steps per second, losses, and the accuracies that the page and `tinyprompt
eval` compute. The exit status is 1 if these two differ.
"""

import argparse
import re
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from browsing import chromium, serve_folder, set_view, wait_until
from selenium.webdriver.support.ui import Select

from tinyprompt.cli.main import main
from tinyprompt.tasks.registry import DEMO

PICTURES = {"light": (1100, False), "dark": (1100, True), "phone": (390, False)}


def text_of(browser, name):
    return browser.find_element("id", name).text


def train(browser, url, steps, init):
    """Train as a visitor does; return the page's final message."""
    browser.get(url)
    wait_until(lambda: text_of(browser, "status").startswith("ready"), 120)
    print(f"{text_of(browser, 'status')}; {text_of(browser, 'about')}")
    field = browser.find_element("id", "steps")
    field.clear()
    field.send_keys(str(steps))
    Select(browser.find_element("id", "init")).select_by_value(init)
    browser.find_element("id", "train").click()
    wait_until(lambda: browser.find_element("id", "train").is_enabled(), 10_000)
    return text_of(browser, "progress")


def take_pictures(browser, folder):
    for name, (width, dark) in PICTURES.items():
        set_view(browser, width, dark)
        height = browser.execute_script("return document.documentElement.scrollHeight")
        set_view(browser, width, dark, height)
        time.sleep(0.2)  # wait for the drawing
        browser.save_screenshot(str(folder / f"{name}.png"))


def run(args, work):
    site, prompt = work / "site", work / "topic.safetensors"
    if main(["export", "--web", str(site), "--model", args.model]):
        return 2
    with chromium(downloads=work) as browser, serve_folder(site) as url:
        set_view(browser)
        message = train(browser, url, args.steps, args.init)
        stayed = text_of(browser, "stayed").split(". ")[0]
        losses = browser.execute_async_script(
            "const done = arguments[0]; import('./app.js').then(({ state }) => done(state.losses))"
        )
        words = re.search("--label-words (.*)", text_of(browser, "commands"))[1].split()
        browser.find_element("id", "save").click()
        wait_until((work / "topic.npy").exists)
        if args.pictures:
            take_pictures(browser, args.pictures)
    print(f"loss at steps 1, 2, 3: {', '.join(f'{loss:.6f}' for loss in losses[:3])}")
    print(f"in the page: {message}\n{stayed}", flush=True)
    main(["convert", str(work / "topic.npy"), str(prompt), "--model", args.model, "--label-words", *words])
    out = work / "answers.tsv"
    main(["eval", str(prompt), str(DEMO / "topic.test.tsv"), "--model", args.model, "--rows", str(out)])
    rows = [line.split("\t")[1:3] for line in out.read_text(encoding="utf-8").splitlines()[1:]]
    accuracy = sum(target == answer for target, answer in rows) / len(rows)
    same = f"accuracy {accuracy:.3f} on" in message
    print("the same accuracy in the page and by tinyprompt eval" if same else "the accuracies differ")
    return 0 if same else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="base", help="a model as for tinyprompt (base)")
    parser.add_argument("--init", default="labels", choices=("labels", "prompt"), help="first vectors (labels)")
    parser.add_argument("--steps", type=int, default=100, help="training steps (100)")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="a folder for pictures of the page")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(run(arguments, Path(folder)))
