# %% [markdown]
# Solutions of lesson 7, and a common mistake for each. The cells go in place of those
# of the lesson with the same tag.

# %% tags=["exercise-1"]


def merge_lora(w, a, b):
    """x (w + b a)' is x w' + (x a') b'."""
    return w + b @ a


# %% tags=["mistake-1"]


def merge_lora(w, a, b):
    """The factors are in the wrong order."""
    return w + (a @ b).sum()


# %% tags=["exercise-2"]


def prefix_numbers(c, P):
    """Keys and values, for each attention."""
    attentions = c.num_layers + 2 * c.num_decoder_layers
    return 2 * P * attentions * c.num_heads * c.d_kv


# %% tags=["mistake-2"]


def prefix_numbers(c, P):
    """Forgets the cross-attentions of the decoder."""
    return 2 * P * (c.num_layers + c.num_decoder_layers) * c.num_heads * c.d_kv


# %% tags=["exercise-3"]


def my_adapter(y, down, up):
    """The layer's own output passes by unchanged."""
    return y + np.maximum(y @ down.T, 0) @ up.T


# %% tags=["mistake-3"]


def my_adapter(y, down, up):
    """Without a relu, the adapter is a matrix of low rank."""
    return y + (y @ down.T) @ up.T
