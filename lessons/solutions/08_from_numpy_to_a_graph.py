# %% [markdown]
# Solutions of lesson 8, and a common mistake for each. The cells go in place of those
# of the lesson with the same tag.

# %% tags=["exercise-1"]


def needed(program, outputs):
    """From the end: a line is kept if a later line, or an output, needs it."""
    wanted, kept = set(outputs), []
    for line in reversed(program):
        name, _, inputs = line
        if name in wanted:
            wanted |= set(inputs)
            kept.append(line)
    return kept[::-1]


# %% tags=["mistake-1"]


def needed(program, outputs):
    """Asks only whether any line uses a result, also a line that is dropped itself."""
    used = {x for _, _, inputs in program for x in inputs} | set(outputs)
    return [line for line in program if line[0] in used]


# %% tags=["exercise-2"]


def merged(program):
    """Rename the inputs first; then equal lines look equal."""
    known, names, out = {}, {}, []
    for name, operation, inputs in program:
        inputs = tuple(names.get(x, x) for x in inputs)
        if (operation, inputs) in known:
            names[name] = known[operation, inputs]
        else:
            known[operation, inputs] = name
            out.append((name, operation, inputs))
    return out


# %% tags=["mistake-2"]


def merged(program):
    """Compares lines before their inputs are renamed."""
    known, names, out = {}, {}, []
    for name, operation, inputs in program:
        if (operation, inputs) in known:
            names[name] = known[operation, inputs]
        else:
            known[operation, inputs] = name
            out.append((name, operation, tuple(names.get(x, x) for x in inputs)))
    return out


# %% tags=["exercise-3"]


def matmul_shape(a, b):
    """Rows of a, columns of b, and in front what NumPy makes of both."""
    return (*np.broadcast_shapes(a[:-2], b[:-2]), a[-2], b[-1])


# %% tags=["mistake-3"]


def matmul_shape(a, b):
    """Takes the batch of a alone."""
    return (*a[:-1], b[-1])
