"""The faults in mutants.py can still be planted. `python tests/mutants.py` runs them, and takes minutes."""

import ast
import random
from pathlib import Path

import pytest
from mutants import EQUIVALENT, MUTANTS, ROOT, every_mutation, planted


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.fault for mutant in MUTANTS])
def test_each_fault_has_its_text_and_its_test(mutant):
    assert (ROOT / "tinyprompt" / f"{mutant.module}.py").read_text(encoding="utf-8").count(mutant.right) == 1
    path, _, name = mutant.test.partition("[")[0].partition("::")
    assert f"def {name}(" in (Path(__file__).parent / path).read_text(encoding="utf-8")


def test_each_drawn_mutation_changes_a_module_and_parses():
    every = every_mutation()
    assert set(EQUIVALENT) <= {mutation[:4] for mutation in every}
    for mutation in random.Random(0).sample(every, 30):
        before = (ROOT / "tinyprompt" / f"{mutation.module}.py").read_text(encoding="utf-8")
        assert ast.dump(ast.parse(planted(mutation))) != ast.dump(ast.parse(before))
