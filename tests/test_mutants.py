"""That the faults of mutants.py can still be planted. `python tests/mutants.py` plants them, and takes minutes."""

from pathlib import Path

import pytest
from mutants import MUTANTS, ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.fault for mutant in MUTANTS])
def test_its_place_and_its_test_are_there(mutant):
    assert (ROOT / "tinyprompt" / f"{mutant.module}.py").read_text(encoding="utf-8").count(mutant.right) == 1
    path, _, name = mutant.test.partition("[")[0].partition("::")
    assert f"def {name}(" in (Path(__file__).parent / path).read_text(encoding="utf-8")
