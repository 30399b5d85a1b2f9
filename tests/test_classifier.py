"""PromptClassifier under scikit-learn's conventions."""

import numpy as np
import pytest
from tuning import byte_model

import tinyprompt
from tinyprompt import PromptClassifier
from tinyprompt.errors import TinypromptError

# A prompt cannot teach a random model, so all weights are tuned.
QUICK = {"steps": 40, "method": "full", "batch_size": 8, "eval_every": 10, "optimizer": "adam", "learning_rate": 0.01}
TEXTS = np.array(["+-"[i % 2] * (1 + i % 4) for i in range(40)])


@pytest.fixture(scope="module")
def model():
    return byte_model()


@pytest.mark.parametrize("labels", [["plus", "minus"], [1, 0], [True, False], [2.5, -1.0]])
def test_it_learns_labels_of_every_type(model, labels):
    y = np.array(labels)[np.arange(40) % 2]
    classifier = PromptClassifier(model, **QUICK).fit(TEXTS, y)
    assert classifier.predict(TEXTS).dtype == y.dtype
    assert classifier.score(TEXTS, y) == np.mean(classifier.predict(TEXTS) == y) > 0.9
    assert classifier.classes_.tolist() == sorted(labels)
    shares = classifier.predict_proba(TEXTS)
    assert shares.shape == (40, 2)
    assert np.allclose(shares.sum(1), 1)
    assert (classifier.classes_[shares.argmax(1)] == classifier.predict(TEXTS)).all()
    answers = tinyprompt.predict(model, classifier.prompt_, TEXTS.tolist())
    assert answers == [str(label) for label in classifier.predict(TEXTS).tolist()]


def test_it_works_with_the_tools_of_scikit_learn(model):
    pytest.importorskip("sklearn")
    from sklearn.base import clone
    from sklearn.model_selection import GridSearchCV, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer

    y = np.array(["plus", "minus"])[np.arange(40) % 2]
    classifier = PromptClassifier(model, **QUICK)
    assert np.mean(cross_val_score(classifier, TEXTS, y, cv=2)) > 0.8
    search = GridSearchCV(classifier, {"learning_rate": [1e-7, 0.01], "seed": [1]}, cv=2).fit(TEXTS, y)
    assert search.best_params_ == {"learning_rate": 0.01, "seed": 1}
    assert search.best_estimator_.prompt_.settings["learning_rate"] == 0.01
    pipeline = make_pipeline(FunctionTransformer(lambda texts: [text[:3] for text in texts]), classifier)
    assert pipeline.fit(TEXTS, y).score(TEXTS, y) > 0.8
    assert list(pipeline.classes_) == ["minus", "plus"]
    text = PromptClassifier(model, init_text="plus or minus", steps=3)
    assert clone(text).get_params() == text.get_params()


def test_parameters_are_read_and_set(model):
    classifier = PromptClassifier("tiny", steps=7)
    found = classifier.get_params()
    assert (found["model"], found["device"], found["steps"], found["prompt_length"]) == ("tiny", None, 7, None)
    assert (
        repr(classifier.set_params(steps=8, device="numpy"))
        == "PromptClassifier(model='tiny', device='numpy', steps=8)"
    )
    with pytest.raises(TypeError, match="setting 'step' does not exist; did you mean 'steps'"):
        PromptClassifier(step=3)
    with pytest.raises(ValueError, match="setting steps: expected at least 1"):
        classifier.set_params(steps=0)
    with pytest.raises(TinypromptError, match="not fitted; call fit first"):
        classifier.predict(TEXTS)
    with pytest.raises(ValueError, match="40 texts and 3 labels"):
        classifier.fit(TEXTS, [0, 1, 0])
    with pytest.raises(ValueError, match="at least 2 classes, found 1"):
        classifier.fit(TEXTS, ["a"] * 40)
