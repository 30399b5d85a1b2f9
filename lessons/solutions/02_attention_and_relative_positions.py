# %% [markdown]
# Solutions of lesson 2, and a common mistake for each. The cells go in place of those
# of the lesson with the same tag.

# %% tags=["exercise-1"]


def my_attention(queries, keys, values, bias):
    """The formula, with the largest score of each row subtracted."""
    scores = queries @ keys.mT + bias
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ values


# %% tags=["mistake-1"]


def my_attention(queries, keys, values, bias):
    """Softmax over the queries: the weights of a column sum to 1, not of a row."""
    scores = queries @ keys.mT + bias
    weights = np.exp(scores - scores.max(-2, keepdims=True))
    return weights / weights.sum(-2, keepdims=True) @ values


# %% tags=["exercise-2"]


def last_bucket(num_buckets, max_distance):
    """Ask for every distance. Half of the buckets are for words that come before."""
    distances = np.arange(max_distance + 1)
    bucket = t5.relative_position_bucket(-distances, True, num_buckets, max_distance)
    return int((bucket == num_buckets // 2 - 1).argmax())


# %% tags=["mistake-2"]


def last_bucket(num_buckets, max_distance):
    """The distance of the configuration. Buckets are rounded down, so it is too far."""
    return max_distance


# %% tags=["exercise-3"]


def causal_bias(length):
    """`np.tri` is 1 on and below the diagonal: where j <= i."""
    return np.where(np.tri(length), 0, -1e9)


# %% tags=["mistake-3"]


def causal_bias(length):
    """Hides the word itself too."""
    return np.where(np.tri(length, k=-1), 0, -1e9)
