"""Tables and curves in a notebook."""

import builtins

import pytest
from tuning import byte_model

import tinyprompt
from tinyprompt import Row, Settings, display

ROWS = [Row("+-"[i % 2], "ab"[i % 2]) for i in range(20)]
SHORT = Settings(steps=4, prompt_length=2, batch_size=4, eval_every=2)


def test_items_with_commas_are_separated_by_semicolons():
    assert display.listing(("bad", "good")) == "bad, good"
    assert display.listing(("keys, lost", "rent")) == "keys, lost; rent"


def test_table_cells_are_escaped():
    assert display.table([("<b>", 1)], ("a&b", "n")) == (
        "<table><thead><tr><th>a&amp;b</th><th>n</th></tr></thead><tbody><tr><td>&lt;b&gt;</td><td>1</td></tr></tbody></table>"
    )


def test_results_rows_and_scores_are_displayed_as_tables():
    model = byte_model()
    result = tinyprompt.tune(model, ROWS, SHORT, progress=False)
    assert "<td>dev score</td>" in result._repr_html_()
    scores = tinyprompt.evaluate(model, result.prompt, ROWS)
    assert scores.confusion == [[scores.confusion[0][0], 10 - scores.confusion[0][0]], scores.confusion[1]]
    assert sum(map(sum, scores.confusion)) == 20
    assert "<th>a</th><th>b</th>" in scores._repr_html_()


def test_rows_of_a_file_are_a_list_and_a_table(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text("input\ttarget\n" + "".join(f"text {i}\t<b>\n" for i in range(30)))
    rows = tinyprompt.read_rows(path)
    assert rows == list(rows) == [Row(f"text {i}", "<b>") for i in range(30)]
    shown = rows._repr_html_()
    assert shown.count("<tr>") == 1 + display.SHOWN + 1
    assert "&lt;b&gt;" in shown
    assert "30 rows" in shown


class Handle:
    def __init__(self):
        self.shown = []

    def update(self, picture):
        self.shown.append(picture)


def test_the_curve_in_a_notebook_is_updated(monkeypatch):
    pytest.importorskip("matplotlib").use("agg")
    shell, handle = type("ZMQInteractiveShell", (), {})(), Handle()
    monkeypatch.setattr(builtins, "get_ipython", lambda: shell, raising=False)
    ipython = pytest.importorskip("IPython.display")
    monkeypatch.setattr(ipython, "display", lambda picture, display_id: handle.update(picture) or handle)
    tinyprompt.tune(byte_model(), ROWS, SHORT)
    assert len(handle.shown) == 4 + 1  # one picture for each step, and none at the end
    assert type(handle.shown[-1]).__name__ == "HTML"
