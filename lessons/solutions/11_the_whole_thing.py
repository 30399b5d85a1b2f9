# %% [markdown]
# Solutions of lesson 11, and a common mistake for each. The cells go in place of those
# of the lesson with the same tag.

# %% tags=["exercise-1"]


def summed_axes(small, large):
    """The axes that are new in front, and those that have grown from 1."""
    front = len(large) - len(small)
    grown = [i for i, n in enumerate(small, front) if n == 1 < large[i]]
    return (*range(front), *grown)


# %% tags=["mistake-1"]


def summed_axes(small, large):
    """Compares from the front, but broadcasting aligns shapes at their ends."""
    pairs = zip(small, large, strict=False)
    return tuple(i for i, (a, b) in enumerate(pairs) if a != b)


# %% tags=["exercise-2"]


def depends(program, source):
    """A line depends on the source if one of its inputs does."""
    known, out = {source}, []
    for name, _, inputs in program:
        if known & set(inputs):
            known.add(name)
            out.append(name)
    return out


# %% tags=["mistake-2"]


def depends(program, source):
    """Finds only the lines that read the source themselves."""
    return [name for name, _, inputs in program if source in inputs]


# %% tags=["exercise-3"]


def last_use(program):
    """A later line overwrites an earlier one."""
    return {x: i for i, (_, _, inputs) in enumerate(program) for x in inputs}


# %% tags=["mistake-3"]


def last_use(program):
    """Finds the first use of each name."""
    found = {}
    for i, (_, _, inputs) in enumerate(program):
        for x in inputs:
            found.setdefault(x, i)
    return found
