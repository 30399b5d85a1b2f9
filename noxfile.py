"""Run the tests on every Python from 3.11 to 3.14, with the lowest and the newest versions of the dependencies.

    pip install nox uv && nox

torch, transformers and PEFT are not installed: their tests are skipped. `nox -s audit` looks for known
vulnerabilities in the dependencies.
"""

import nox

nox.options.default_venv_backend = "uv"
nox.options.error_on_missing_interpreters = False
EXTRAS = ".[ort,hub,t5x,plot,serve]"
TOOLS = ("pytest", "hypothesis")


@nox.session(python=["3.11", "3.12", "3.13", "3.14"])
@nox.parametrize("resolution", ["lowest-direct", "highest"], ids=["oldest", "newest"])
def tests(session: nox.Session, resolution: str) -> None:
    """Run the tests that need no torch."""
    session.install("--resolution", resolution, EXTRAS)
    session.install(*TOOLS)
    session.run("python", "-m", "pytest", "-p", "no:cacheprovider", *session.posargs)


@nox.session
def audit(session: nox.Session) -> None:
    """Look for known vulnerabilities in the dependencies."""
    session.install(EXTRAS, "pip-audit")
    session.run("pip-audit", "--skip-editable")
