# %% [markdown]
# Solutions of lesson 5, and a common mistake for each. The cells go in place of those
# of the lesson with the same tag.

# %% tags=["exercise-1"]


def nearest_row(vector, table):
    """The length of the vector changes nothing; the length of the rows does."""
    return (table @ vector / np.linalg.norm(table, axis=1)).argmax()


# %% tags=["mistake-1"]


def nearest_row(vector, table):
    """A product without norms prefers long rows."""
    return (table @ vector).argmax()


# %% tags=["exercise-2"]


def with_a_twin(prompt):
    """Each vector with each other one, not with itself."""
    cosines = unit(prompt) @ unit(prompt).T
    np.fill_diagonal(cosines, 0)
    return (cosines > 0.99).any(1).sum()


# %% tags=["mistake-2"]


def with_a_twin(prompt):
    """Everybody is a twin of oneself here."""
    return ((unit(prompt) @ unit(prompt).T) > 0.99).any(1).sum()


# %% tags=["exercise-3"]


def label_vector(table, ids):
    """The mean of the pieces, without the end mark."""
    return table[np.asarray(ids[:-1])].mean(0)


# %% tags=["mistake-3"]


def label_vector(table, ids):
    """The end mark is no piece of the word."""
    return table[np.asarray(ids)].mean(0)
