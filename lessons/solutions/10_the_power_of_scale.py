# %% [markdown]
# Solutions of lesson 10, and a common mistake for each. The cells go in place of those
# of the lesson with the same tag.

# %% tags=["exercise-1"]


def share_of_the_way(frozen, prompt, full):
    """What the prompt has gained, in units of what there was to gain."""
    return (prompt - frozen) / (full - frozen)


# %% tags=["mistake-1"]


def share_of_the_way(frozen, prompt, full):
    """A ratio of accuracies: the frozen model already has a part of them."""
    return prompt / full


# %% tags=["exercise-2"]


def rows_needed(p, gap):
    """2 sqrt(2 p (1 - p) / n) <= gap."""
    return math.ceil(8 * p * (1 - p) / gap**2 - 1e-9)


# %% tags=["mistake-2"]


def rows_needed(p, gap):
    """The standard error of one accuracy: both of them scatter."""
    return math.ceil(4 * p * (1 - p) / gap**2 - 1e-9)


# %% tags=["exercise-3"]


def advantage(runs):
    """The best of each study against its mean."""
    return (runs.max(1) - runs.mean(1)).mean()


# %% tags=["mistake-3"]


def advantage(runs):
    """The best run of all studies."""
    return runs.max() - runs.mean()
