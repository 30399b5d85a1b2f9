# %% [markdown]
# Solutions of lesson 0, and a common mistake for each. The cells go in place of those
# of the lesson with the same tag.

# %% tags=["exercise-1"]


def tanh_rule(g, y):
    """The derivative in terms of the result."""
    return g * (1 - y * y)


# %% tags=["mistake-1"]


def tanh_rule(g, y):
    """Takes y for x: the derivative is already a function of y."""
    return g * (1 - np.tanh(y) ** 2)


# %% tags=["exercise-2"]


def mean_rule(g, x):
    """Each row has a share of 1 / N, and g is the same for all rows."""
    return np.ones_like(x) * g / len(x)


# %% tags=["mistake-2"]


def mean_rule(g, x):
    """The rule of a sum: the share 1 / N is missing."""
    return np.ones_like(x) * g


# %% tags=["exercise-3"]


def lookup_rule(g, ids, table):
    """`np.add.at` adds once for each place, also where an id is repeated."""
    grad = np.zeros_like(table)
    np.add.at(grad, ids, g)
    return grad


# %% tags=["mistake-3"]


def lookup_rule(g, ids, table):
    """An assignment keeps the last place of a repeated word and drops the others."""
    grad = np.zeros_like(table)
    grad[ids] = g
    return grad
