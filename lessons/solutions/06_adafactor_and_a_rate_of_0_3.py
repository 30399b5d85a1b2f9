# %% [markdown]
# Solutions of lesson 6, and a common mistake for each. The cells go in place of those
# of the lesson with the same tag.

# %% tags=["exercise-1"]


def clip(update, threshold=1.0):
    """One factor for all numbers."""
    return update / max(1.0, rms(update) / threshold)


# %% tags=["mistake-1"]


def clip(update, threshold=1.0):
    """Cutting each number on its own changes the direction."""
    return np.clip(update, -threshold, threshold)


# %% tags=["exercise-2"]


def second_moment(v, g, t):
    """The weights beta and 1 - beta sum to 1."""
    beta = 1 - t**-0.8
    return beta * v + (1 - beta) * g * g


# %% tags=["mistake-2"]


def second_moment(v, g, t):
    """The two weights have changed places."""
    beta = 1 - t**-0.8
    return (1 - beta) * v + beta * g * g


# %% tags=["exercise-3"]


def adam(p, g, m, v, t, learning_rate):
    """The formulas, as they stand."""
    m = 0.9 * m + 0.1 * g
    v = 0.999 * v + 0.001 * g * g
    size = np.sqrt(v / (1 - 0.999**t)) + 1e-8
    return p - learning_rate * (m / (1 - 0.9**t)) / size, m, v


# %% tags=["mistake-3"]


def adam(p, g, m, v, t, learning_rate):
    """Both means begin at 0, and nothing makes up for it: the first steps are wrong."""
    m = 0.9 * m + 0.1 * g
    v = 0.999 * v + 0.001 * g * g
    return p - learning_rate * m / (np.sqrt(v) + 1e-8), m, v
