"""Our graphs use only operators that CUDA has a kernel for, according to the list of operators that ran there."""

import json

from cuda_kernels import LIST, kernels, problems

from tinyprompt.lowering import lower


def test_the_list_equals_the_operators_of_the_graphs():
    known, asked = set(json.loads(LIST.read_text())), {}
    for name, function, arguments in problems():
        for bf16 in (False, True):
            asked |= {kernel: name for kernel in kernels(lower(function, *arguments, bf16=bf16)[0])}
    new = {kernel: name for kernel, name in asked.items() if kernel not in known}
    assert not new, "run tests/cuda_kernels.py on a GPU, and see that it works"
    assert asked.keys() == known
