"""Run the lessons and write their notebooks with outputs: python lessons/build.py [NUMBER ...].

The script (py:percent) is the source; edit the script. `--check` runs nothing, and names the pairs that do not match.
"""

import argparse
import base64
import io
import os
import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).parent
LARGEST = 150_000  # largest notebook in bytes, which opens quickly on a code host


def scripts(numbers=()) -> list[Path]:
    """Return the lessons in order, or the lessons with these numbers."""
    found = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
    return [path for path in found if not numbers or int(path.name[:2]) in numbers]


def cells(path: Path) -> list[tuple]:
    """Return kind, source, tags and alternative text of each cell of a script or a notebook."""
    found = jupytext.read(path).cells
    return [
        (
            cell.cell_type,
            cell.source,
            cell.metadata.get("tags", []),
            cell.metadata.get("alt"),
        )
        for cell in found
    ]


def in_step(path: Path) -> bool:
    """Return whether the notebook has the script's cells and all of them were executed."""
    notebook = path.with_suffix(".ipynb")
    if not notebook.exists() or cells(notebook) != cells(path):
        return False
    return all(
        cell.execution_count
        for cell in jupytext.read(notebook).cells
        if cell.cell_type == "code"
    )


def smaller(png: str) -> str:
    """Reduce a picture (base64) to 64 colours: a third of the bytes, visually equal, and still transparent."""
    out = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGBA")
    transparent = picture.getextrema()[3][0] < 255
    (picture if transparent else picture.convert("RGB")).quantize(64).save(
        out, "PNG", optimize=True
    )
    return base64.b64encode(out.getvalue()).decode()


def execute(path: Path) -> None:
    """Run a lesson in a kernel in the lessons' folder, and write its notebook."""
    notebook = jupytext.read(path)
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"  # jupytext draws ids at random, which would change the file with each build
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata = nbformat.from_dict({"kernelspec": kernel})
    resources = {"metadata": {"path": str(FOLDER)}}
    with (
        tempfile.TemporaryDirectory() as pieces
    ):  # without the exercises of the person who builds
        os.environ["TINYPROMPT_PIECES"] = pieces
        NotebookClient(
            notebook, timeout=300, coalesce_streams=True, resources=resources
        ).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = smaller(output.data["image/png"])
                output.metadata.pop(
                    "needs_background", None
                )  # a transparent figure is readable on any background
                if "alt" in cell.metadata:  # for JupyterLab and the site
                    output.metadata["image/png"] = {"alt": cell.metadata["alt"]}
                    cell.metadata["mystnb"] = {"image": {"alt": cell.metadata["alt"]}}
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": kernel, "language_info": {"name": "python"}}
    )
    text = nbformat.writes(notebook) + "\n"
    if len(text) > LARGEST:
        sys.exit(
            f"{path.name}: the notebook has {len(text):,} bytes, at most {LARGEST:,}; make its outputs smaller"
        )
    path.with_suffix(".ipynb").write_text(text, encoding="utf-8")


def main() -> None:
    """Build or check the requested lessons."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "numbers", nargs="*", type=int, help="lessons; without any, all"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="run nothing; name the pairs that are out of step",
    )
    args = parser.parse_args()
    for path in scripts(args.numbers):
        if not args.check:
            execute(path)
        print(f"{path.name}: {'in step' if in_step(path) else 'OUT OF STEP'}")
    if not all(map(in_step, scripts(args.numbers))):
        sys.exit("run: python lessons/build.py")


if __name__ == "__main__":
    main()
