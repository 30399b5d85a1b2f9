# %% [markdown]
# Solutions of lesson 3, and a common mistake for each. The cells go in place of those of the lesson with the same tag.

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


def decoder_block_weights(c):
    """Two attentions of four matrices, three matrices of the feed-forward, three norms."""
    return 2 * 4 * c.d_model * c.num_heads * c.d_kv + 3 * c.d_model * c.d_ff + 3 * c.d_model


# %% tags=["mistake-3"]


def decoder_block_weights(c):
    """A block of the encoder: without cross-attention, and its norm."""
    return 4 * c.d_model * c.num_heads * c.d_kv + 3 * c.d_model * c.d_ff + 2 * c.d_model
