# %% [markdown]
# Solutions of lesson 4, and a common mistake for each. The cells go in place of those
# of the lesson with the same tag.

# %% tags=["exercise-1"]


def descend(trainable, grads, learning_rate):
    """Against the gradient."""
    return {
        name: array - learning_rate * grads[name] for name, array in trainable.items()
    }


# %% tags=["mistake-1"]


def descend(trainable, grads, learning_rate):
    """`-=` writes into the array that was given."""
    for name, array in trainable.items():
        array -= learning_rate * grads[name]
    return dict(trainable)


# %% tags=["exercise-2"]


def mean_loss(log_p, weights):
    """The sum over the words, divided by their number."""
    return -(log_p * weights).sum() / weights.sum()


# %% tags=["mistake-2"]


def mean_loss(log_p, weights):
    """`mean` divides by the number of all places, padding included."""
    return -(log_p * weights).mean()


# %% tags=["exercise-3"]


def put_in_front(prompt, x, mask):
    """The same prompt for each text; ones in the mask."""
    vectors = np.broadcast_to(prompt, (len(x), *prompt.shape))
    seen = np.ones((len(x), len(prompt)), mask.dtype)
    return np.concatenate([vectors, x], axis=1), np.concatenate([seen, mask], axis=1)


# %% tags=["mistake-3"]


def put_in_front(prompt, x, mask):
    """Padding the mask with its default, 0, hides the prompt from everybody."""
    vectors = np.broadcast_to(prompt, (len(x), *prompt.shape))
    return np.concatenate([vectors, x], axis=1), np.pad(
        mask, ((0, 0), (len(prompt), 0))
    )
