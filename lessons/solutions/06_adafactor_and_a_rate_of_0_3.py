# %% [markdown]
# Solutions of lesson 6, and a common mistake for each. The cells go in place of those of the lesson with the same tag.

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


def factored(square):
    """The product of the means has the right shape; one mean too many is divided away."""
    r, c = square.mean(1), square.mean(0)
    return np.outer(r, c) / r.mean()


# %% tags=["mistake-3"]


def factored(square):
    """Without the division, the estimate has the unit of a fourth power."""
    return np.outer(square.mean(1), square.mean(0))
