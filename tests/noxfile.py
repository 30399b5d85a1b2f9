"""The core of the suite on the oldest and the newest versions of all dependencies, and an audit of those.

    pip install nox uv && nox -f tests/noxfile.py

`oldest` has the lowest versions that pyproject.toml allows, `newest` what is newest today: for each Python that is
there. torch, transformers and PEFT, whose versions are fixed by what they were compared with, are left out: tests that
need them are skipped. `audit` asks for known faults of all that is installed with every extra.
"""

import nox

nox.options.default_venv_backend = "uv"
nox.options.error_on_missing_interpreters = False
EXTRAS = ".[ort,hub,t5x,plot,serve]"
TOOLS = ("pytest", "hypothesis")


@nox.session(python=["3.11", "3.12", "3.13", "3.14"])
@nox.parametrize("resolution", ["lowest-direct", "highest"], ids=["oldest", "newest"])
def tests(session: nox.Session, resolution: str) -> None:
    session.chdir("..")  # nox begins in the folder of its file
    session.install("--resolution", resolution, EXTRAS)
    session.install(*TOOLS)
    session.run("python", "-m", "pytest", "-p", "no:cacheprovider", *session.posargs)


@nox.session
def audit(session: nox.Session) -> None:
    session.chdir("..")
    session.install(EXTRAS, "pip-audit")
    session.run("pip-audit", "--skip-editable")
