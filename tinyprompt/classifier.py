"""A prompt as a scikit-learn classifier."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from tinyprompt.data import Row
from tinyprompt.errors import TinypromptError
from tinyprompt.files.models import load
from tinyprompt.model import Model, Prompt
from tinyprompt.predict import answer, predict
from tinyprompt.settings import Settings
from tinyprompt.tuning import tune


class PromptClassifier:
    """A scikit-learn classifier: `fit` tunes a prompt, and `predict` answers.

    It works in `cross_val_score`, `GridSearchCV` and pipelines. scikit-learn is not imported.

    Args:
        model: A Model, or a name or folder for `load`.
        device: A device of `device.DEVICES`. The default is "cpu" with ONNX Runtime, else "numpy".
        **settings: Fields of `Settings`, such as `steps=200`.

    Attributes:
        classes_: The distinct labels in sorted order.
        prompt_: The tuned Prompt.
        result_: The Result of the run.

    Example:
        >>> classifier = PromptClassifier(model="base", steps=60, prompt_length=20)
        >>> classifier.fit(texts, labels).score(test_texts, test_labels)
    """

    _estimator_type = "classifier"

    def __init__(self, model: Model | str | None = None, device: str | None = None, **settings: Any):
        self.model, self.device = model, device
        self._settings: dict[str, Any] = {}
        self.set_params(**settings)

    def fit(self, X: Sequence[str], y: Sequence[Any]) -> "PromptClassifier":
        """Tune a prompt on texts and their labels. A fifth of the rows becomes dev rows.

        Args:
            X: The texts.
            y: The labels: strings, numbers or booleans. `predict` returns the same type.

        Raises:
            ValueError: The numbers of texts and labels differ, or there is only one class.
        """
        texts, labels = list(X), np.asarray(y)
        if len(texts) != len(labels):
            raise ValueError(f"fit: {len(texts)} texts and {len(labels)} labels; expected one label per text")
        self.classes_ = np.unique(labels)
        if len(self.classes_) < 2:
            raise ValueError(f"fit: expected at least 2 classes, found {len(self.classes_)}")
        self.n_features_in_ = 1
        self._words = [str(label) for label in self.classes_.tolist()]
        names = dict(zip(self.classes_.tolist(), self._words, strict=True))
        rows = [Row(text, names[label]) for text, label in zip(texts, labels.tolist(), strict=True)]
        self._model = self.model if isinstance(self.model, Model) else load(self.model)
        self.result_ = tune(
            self._model, rows, device=self.device, progress=False, **{"task": "classify", **self._settings}
        )
        self.prompt_: Prompt = self.result_.prompt
        return self

    def predict(self, X: Sequence[str]) -> np.ndarray:
        """Return the most likely label of each text, as an array of the type of the labels."""
        found = predict(self._fitted(), self.prompt_, list(X), self.device)
        return self.classes_[[self._words.index(word) for word in found]]

    def predict_proba(self, X: Sequence[str]) -> np.ndarray:
        """Return the probability of each class, (texts, classes), in the order of `classes_`."""
        found = answer(self._fitted(), [(self.prompt_, text) for text in X], self.device)
        return np.array([[one.probabilities[word] for word in self._words] for one in found])

    def score(self, X: Sequence[str], y: Sequence[Any]) -> float:
        """Return the accuracy on texts and their labels."""
        return float(np.mean(self.predict(X) == np.asarray(y)))

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the parameters: model, device and every field of Settings. None depends on the number of rows."""
        chosen = {f.name: self._settings.get(f.name) for f in fields(Settings)}
        return {"model": self.model, "device": self.device, **chosen}

    def set_params(self, **params: Any) -> "PromptClassifier":
        """Set parameters. Raises TypeError or ValueError that names the parameter."""
        for name in ("model", "device"):
            if name in params:
                setattr(self, name, params.pop(name))
        given = {name: value for name, value in (self._settings | params).items() if value is not None}
        Settings.changed({}, given)
        self._settings = given
        return self

    def _fitted(self) -> Model:
        if not hasattr(self, "prompt_"):
            raise TinypromptError("this PromptClassifier is not fitted; call fit first")
        return self._model

    def __sklearn_clone__(self) -> "PromptClassifier":
        return PromptClassifier(**self.get_params())  # shares the model, whose weights scikit-learn would copy

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "prompt_")

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import ClassifierTags, InputTags, Tags, TargetTags  # called by scikit-learn only

        return Tags(
            estimator_type="classifier",
            target_tags=TargetTags(required=True),
            classifier_tags=ClassifierTags(),
            input_tags=InputTags(one_d_array=True, two_d_array=False, string=True),
        )

    def __repr__(self) -> str:
        shown = {"model": self.model, "device": self.device, **self._settings}
        return f"PromptClassifier({', '.join(f'{k}={v!r}' for k, v in shown.items() if v is not None)})"
