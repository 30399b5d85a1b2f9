"""That what the README says of the code is so."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def lines(path):
    return len((ROOT / path).read_text(encoding="utf-8").splitlines())


def test_the_lines_of_every_module_are_counted():
    claims = re.findall(r"\[`\w+`\]\((tinyprompt/\w+\.py)\) (\d+)", README)
    assert {path: int(count) for path, count in claims} == {path: lines(path) for path, _ in claims}
    core = claims[: next(i for i, (path, _) in enumerate(claims) if path.endswith("train.py")) + 1]
    assert int(re.search(r"The core is ([\d,]+) lines", README)[1].replace(",", "")) == sum(int(n) for _, n in core)
