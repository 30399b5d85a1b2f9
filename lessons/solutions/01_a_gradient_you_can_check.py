# %% [markdown]
# Solutions of lesson 1, and a common mistake for each. The cells go in place of those
# of the lesson with the same tag.

# %% tags=["exercise-1"]


def log_softmax_vjp(g, y):
    """Every x_j lowers every y_i by exp(y_j), and raises its own by 1."""
    return g - np.exp(y) * g.sum(-1, keepdims=True)


# %% tags=["mistake-1"]


def log_softmax_vjp(g, y):
    """The rule of softmax: y is a logarithm here, and the sum must not be weighted."""
    return g - (g * np.exp(y)).sum(-1, keepdims=True)


# %% tags=["exercise-2"]


def best_step(power, epsilon):
    """h ** (power + 1) == epsilon."""
    return epsilon ** (1 / (power + 1))


# %% tags=["mistake-2"]


def best_step(power, epsilon):
    """The step at which the formula's error equals epsilon, not epsilon / h."""
    return epsilon ** (1 / power)


# %% tags=["exercise-3"]


def times_as_long(theirs, right):
    """The projection of their gradient on the right one."""
    return (theirs * right).sum() / (right * right).sum()


# %% tags=["mistake-3"]


def times_as_long(theirs, right):
    """The ratio of the lengths: it has no sign, and noise makes it longer."""
    return np.linalg.norm(theirs) / np.linalg.norm(right)
