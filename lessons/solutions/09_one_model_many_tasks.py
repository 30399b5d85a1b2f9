# %% [markdown]
# Solutions of lesson 9, and a common mistake for each. The cells go in place of those
# of the lesson with the same tag.

# %% tags=["exercise-1"]


def batch_of(prompts, texts):
    """Each row from its left end; what is left over stays zero."""
    joined = [np.concatenate(pair) for pair in zip(prompts, texts, strict=True)]
    x = np.zeros((len(joined), max(map(len, joined)), joined[0].shape[1]), np.float32)
    mask = np.zeros(x.shape[:2], np.float32)
    for i, row in enumerate(joined):
        x[i, : len(row)], mask[i, : len(row)] = row, 1
    return x, mask


# %% tags=["mistake-1"]


def batch_of(prompts, texts):
    """Prompts at the left, words at the right: the padding changes distances."""
    lengths = [len(p) + len(w) for p, w in zip(prompts, texts, strict=True)]
    x = np.zeros((len(texts), max(lengths), texts[0].shape[1]), np.float32)
    mask = np.zeros(x.shape[:2], np.float32)
    for i, (p, w) in enumerate(zip(prompts, texts, strict=True)):
        x[i, : len(p)], mask[i, : len(p)] = p, 1
        x[i, -len(w) :], mask[i, -len(w) :] = w, 1
    return x, mask


# %% tags=["exercise-2"]


def vote(answers):
    """`max` keeps the first of those that are equal, and the list has them in order."""
    return max(answers, key=answers.count)


# %% tags=["mistake-2"]


def vote(answers):
    """A sorted set has lost who was named first."""
    return max(sorted(set(answers)), key=answers.count)


# %% tags=["exercise-3"]


def majority_right(p, n):
    """The ways to choose k who are right, for each k of more than half."""
    import math

    return sum(
        math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n // 2 + 1, n + 1)
    )


# %% tags=["mistake-3"]


def majority_right(p, n):
    """Forgets in how many ways the voters can be chosen."""
    return sum(p**k * (1 - p) ** (n - k) for k in range(n // 2 + 1, n + 1))
