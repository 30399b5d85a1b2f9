# %% [markdown]
# Solutions of lesson 3, and a common mistake for each. The cells go in place of those
# of the lesson with the same tag.

# %% tags=["exercise-1"]


def my_norm(x, weight, eps=1e-6):
    """The formula, as it stands."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


# %% tags=["mistake-1"]


def my_norm(x, weight, eps=1e-6):
    """The layer norm of other models: it subtracts the mean first."""
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


# %% tags=["exercise-2"]


def my_shift_right(labels):
    """A column of start marks, then all columns but the last."""
    return np.concatenate([np.zeros_like(labels[:, :1]), labels[:, :-1]], axis=1)


# %% tags=["mistake-2"]


def my_shift_right(labels):
    """`roll` brings the last word to the front, where the start mark belongs."""
    return np.roll(labels, 1, axis=1)


# %% tags=["exercise-3"]


def my_feed_forward(x, wi_0, wi_1, wo):
    """The formula, as it stands."""
    h = x @ wi_0.T
    gelu = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h * h * h)))
    return (gelu * (x @ wi_1.T)) @ wo.T


# %% tags=["mistake-3"]


def my_feed_forward(x, wi_0, wi_1, wo):
    """The gate is added, where it must multiply."""
    h = x @ wi_0.T
    gelu = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h * h * h)))
    return (gelu + x @ wi_1.T) @ wo.T
