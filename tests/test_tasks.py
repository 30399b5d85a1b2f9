"""Built-in tasks: small handwritten files, damaged files, and every row of the distributed dev files."""

import copy
import gzip
import hashlib
import json
import lzma
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples

from tinyprompt import methods
from tinyprompt.cli.main import main
from tinyprompt.data import Row
from tinyprompt.errors import DataError
from tinyprompt.files import tables
from tinyprompt.files.models import load
from tinyprompt.model import Prompt
from tinyprompt.predict import predict
from tinyprompt.tasks import registry
from tinyprompt.tasks.registry import TASKS
from tinyprompt.tuning import evaluate

SHARED = Path(__file__).parents[2] / "shared" / "data"

PAIR = dict(premise="It rained all day.", hypothesis="The grass is wet.", idx=0)
SENTENCES = dict(sentence1="He fed the bat.", sentence2="He swung a bat.", word="bat", idx=0, start1=11)
PASSAGE = dict(
    text="Ann<br>met <b>Bob</b>.",
    questions=[
        dict(
            question="Who met Bob?", idx=7, answers=[dict(text="Ann", idx=0, label=1), dict(text="Eve", idx=1, label=0)]
        )
    ],
)
NEWS = dict(
    text="Oslo beat Bergen\n@highlight\nRain in Oslo!\n@highlight\nNo goals",
    entities=[dict(start=10, end=15), dict(start=0, end=3), dict(start=36, end=39)],
)
QUERY = dict(query="@placeholder won", idx=3, answers=[dict(text="Oslo"), dict(text="Bergen"), dict(text="Oslo")])
SPANS = dict(span1_text="The cup", span1_index=2, span2_text="it", span2_index=6)
WSC = dict(text="He dropped the cup , and it broke.", target=SPANS, label=True, idx=0)
QUESTION = dict(id="q1", question="Who came (first)?", answers=[dict(text="J. Doe"), dict(text="Doe")])
SQUAD = dict(data=[dict(title="t", paragraphs=[dict(context="Then  J. Doe\ncame.", qas=[QUESTION])])])
SPACED = "question: Who came ( first ) ? context: Then J . Doe came ."


def lines(*records):
    return "\n".join(map(json.dumps, records))


# task, file name, content, rows
FILES = [
    (
        "boolq",
        "a.jsonl",
        lines(dict(question="is it wet", passage="Rain -- It falls.", idx=0, label=True)),
        [Row("passage: Rain -- It falls. question: is it wet", "True")],
    ),
    (
        "cb",
        "a.jsonl",
        lines(PAIR | {"label": "neutral"}),
        [Row("hypothesis: The grass is wet. premise: It rained all day.", "neutral")],
    ),
    (
        "copa",
        "a.jsonl",
        lines(dict(premise="It rained.", choice1="He danced.", choice2="He got wet.", question="effect", label=1)),
        [Row("choice1: He danced. choice2: He got wet. premise: It rained. question: effect", "choice2")],
    ),
    (
        "multirc",
        "a.jsonl",
        lines(dict(idx=4, passage=PASSAGE)),
        [
            Row(f"question: Who met Bob? answer: {answer} paragraph: Ann met Bob.", target, (), "4-7")
            for answer, target in (("Ann", "True"), ("Eve", "False"))
        ],
    ),
    (
        "record",
        "a.jsonl",
        lines(dict(idx=4, passage=NEWS, qas=[QUERY])),
        [
            Row(
                "query: @placeholder won entities: Bergen, Oslo passage: Oslo beat Bergen. Rain in Oslo! No goals",
                "Bergen",
                ("Bergen", "Oslo"),
                "4-3",
            )
        ],
    ),
    (
        "rte",
        "a.jsonl.gz",
        lines(PAIR | {"label": "entailment"}),
        [Row("hypothesis: The grass is wet. premise: It rained all day.", "entailment")],
    ),
    (
        "wic",
        "a.jsonl",
        lines(SENTENCES | {"label": False}),
        [Row("sentence1: He fed the bat. sentence2: He swung a bat. word: bat", "False")],
    ),
    (
        "wsc",
        "a.jsonl",
        lines(WSC, WSC | {"label": False, "target": SPANS | {"span2_index": 5, "span1_text": "he"}}),
        [
            Row("He dropped the cup , and *it* broke.", "the cup", ("the cup",), WSC["text"]),
            Row("He dropped the cup , and *it* broke.", "he", (), WSC["text"]),
        ],
    ),
    (
        "axb",
        "a.jsonl",
        lines(dict(sentence1="He sat.", sentence2="He stood.", label="not_entailment", idx="0", logic="x")),
        [Row("hypothesis: He stood. premise: He sat.", "not_entailment")],
    ),
    (
        "axg",
        "a.jsonl",
        lines(PAIR | {"label": "not_entailment", "pair_id": 1}),
        [Row("hypothesis: The grass is wet. premise: It rained all day.", "not_entailment")],
    ),
    (
        "cola",
        "a.tsv",
        "ab1\t1\t\tHe sat.\nab1\t0\t*\tSat he the.\n",
        [Row("sentence: He sat.", "acceptable"), Row("sentence: Sat he the.", "unacceptable")],
    ),
    (
        "glue-rte",
        "a.tsv",
        'index\tsentence1\tsentence2\tlabel\n0\tA "cat sat.\tIt stood.\tnot_entailment\n',
        [Row('sentence1: A "cat sat. sentence2: It stood.', "not_entailment")],
    ),
    (
        "mrpc",
        "a.txt",
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t3\t4\tHe sat.\tHe sat down.\r\n",
        [Row("sentence1: He sat. sentence2: He sat down.", "equivalent")],
    ),
    (
        "qqp",
        "a.tsv.xz",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\tWhy?\tHow?\t0\n",
        [Row("question1: Why? question2: How?", "not_duplicate")],
    ),
    (
        "qqp",
        "a.jsonl",
        lines(dict(text_a="Why?", text_b="How come?", label="1")),
        [Row("question1: Why? question2: How come?", "duplicate")],
    ),
    ("sst2", "a.tsv", "sentence\tlabel\nso dull \t0\n", [Row("sentence: so dull", "negative")]),
    ("squad", "a.json", json.dumps(SQUAD), [Row(SPACED, "J . Doe", ("J . Doe", "Doe"))]),
    (
        "squad",
        "a.jsonl",
        lines(
            {"header": {"dataset": "x"}},
            dict(
                context="Then J. Doe came.",
                qas=[dict(qid="1", question="Who came (first)?", answers=["Doe"], detected_answers=[dict(text="J.")])],
            ),
        ),
        [Row(SPACED, "J .", ("Doe",))],
    ),
    ("trec", "a.label", "NUM:date When is caf\xe9 time ?\n\n", [Row("text: When is caf\xe9 time ?", "number")]),
    ("agnews", "a.csv", '"3","Up","Sales ""rose""."\n', [Row('description: Sales "rose". title: Up', "Business")]),
    (
        "agnews",
        "a.csv",
        "Class Index,Title,Description\n1,Vote,Many came.\n",
        [Row("description: Many came. title: Vote", "World")],
    ),
    ("agnews", "a.tsv", "Many came.\tSports\n", [Row("description: Many came.", "Sports")]),
]


def write(path, content):
    packed = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
    path.write_bytes(packed(content.encode("latin-1" if path.suffix == ".label" else "utf-8")))
    return path


@pytest.mark.parametrize(("task", "name", "content", "rows"), FILES)
def test_rows_of_each_task(tmp_path, task, name, content, rows):
    path = write(tmp_path / name, content)
    assert registry.read(task, path) == rows
    assert [row.input for row in registry.read(task, path, labelled=False)] == [row.input for row in rows]
    assert all(row.target in (TASKS[task].labels or [row.target]) for row in rows)
    with pytest.raises(DataError, match=f"none{name[1:]}: (no rows|empty|not valid JSON)"):
        registry.read(task, write(tmp_path / f"none{name[1:]}", ""))


def test_every_task_has_a_file_above():
    assert {task for task, *_ in FILES} == TASKS.keys()


def test_training_rows_of_each_task(tmp_path):
    path = {task: write(tmp_path / f"{task}-{name}", content) for task, name, content, _ in FILES}
    assert [row.target for row in registry.read("record", path["record"], training=True)] == ["Bergen", "Oslo"]
    assert [row.target for row in registry.read("wsc", path["wsc"], training=True)] == ["the cup"]
    for task in TASKS.keys() - {"record", "wsc"}:
        assert registry.read(task, path[task], training=True) == registry.read(task, path[task])
    assert TASKS["record"].init == ("commonsense", "reasoning", "reading", "comprehension")
    assert {task for task in TASKS if TASKS[task].init} == {"record", "wsc"}
    assert TASKS.keys().isdisjoint(registry.PLAIN)


@pytest.mark.parametrize(
    ("spans", "text", "marked"),
    [
        (dict(span2_text="him", span2_index=4), 'He had it. "For him," he said.', 'He had it. "For *him* ," he said.'),
        (dict(span2_text="it", span2_index=2), "He did use it again.", "He did use *it* again."),
        (dict(span2_text="it.", span2_index=3), "He did use it. Again.", "He did use *it.* Again."),
    ],
)
def test_pronouns_with_a_wrong_index_or_punctuation_are_found(tmp_path, spans, text, marked):
    record = dict(text=text, target=dict(span1_text="He", span1_index=0) | spans, label=1)
    assert registry.read("wsc", write(tmp_path / "a.jsonl", lines(record)))[0].input == marked


@pytest.mark.parametrize(
    ("task", "name", "content", "message"),
    [
        ("boolq", "a.jsonl", lines(dict(question="q", label=True)), "row 1: expected 'passage', found 'question', 'la"),
        ("boolq", "a.jsonl", lines(dict(question=1, passage="p")), "row 1: 'question': expected a text, found 1"),
        ("boolq", "a.jsonl", lines(dict(question="q", passage="p")), "row 1: has no label or answer"),
        ("boolq", "a.tsv", "question\tpassage\nq\tp\tx", "row 2: 3 fields, but the header names 2"),
        ("boolq", "a.json", "{}", "expected a file that ends in .tsv, .csv or .jsonl"),
        ("cb", "a.jsonl", lines(PAIR | {"label": "maybe"}), "label 'maybe': expected one of 0 or 'entailment', 1 or"),
        ("cb", "a.jsonl", lines(PAIR | {"label": 3}), "row 1: label 3: expected one of"),
        ("multirc", "a.jsonl", lines(dict(passage="text")), "row 1: 'passage': expected an object, found 'text'"),
        ("record", "a.jsonl", lines(dict(passage=NEWS, qas=[{}])), "row 1: expected 'query', found"),
        ("wsc", "a.jsonl", lines(WSC | {"text": "He fell."}), "row 1: expected 'it' as word 6 of 'He fell.'"),
        ("squad", "a.json", "[", "a.json: not valid JSON"),
        ("squad", "a.json", json.dumps(SQUAD | {"data": [{}]}), "a.json: article 1: expected 'paragraphs', found"),
        ("squad", "a.json", json.dumps(SQUAD).replace('"J. Doe"', "3"), "question q1: 'text': expected a text, fou"),
        ("squad", "a.json", json.dumps(SQUAD).replace('"answers"', '"a"'), "question q1: has no label or answer"),
        ("trec", "a.label", "NUM When?\n", "row 1: expected 'COARSE:fine question'"),
        ("agnews", "a.csv", "5,a,b\n", "row 1: class '5': expected 1, 2, 3 or 4"),
        ("sst2", "a.tsv.gz", None, "a.tsv.gz: cannot be decompressed"),
        ("sst2", "a.tsv.xz", None, "a.tsv.xz: cannot be decompressed"),
    ],
)
def test_errors_name_the_file_and_the_place(tmp_path, task, name, content, message):
    path = tmp_path / name
    path.write_bytes(b"no archive" if content is None else content.encode())
    with pytest.raises(DataError) as caught:
        registry.read(task, path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_a_truncated_archive_is_named(tmp_path):
    for name, pack in (("a.tsv.gz", gzip.compress), ("a.tsv.xz", lzma.compress)):
        path = tmp_path / name
        path.write_bytes(pack(b"sentence\tlabel\nso dull\t0\n")[:-9])
        with pytest.raises(DataError, match="cannot be decompressed"):
            registry.read("sst2", path)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 60) | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["text", "idx", "a"]), inner, max_size=2)
    ),
    max_leaves=3,
)
JSON_TASKS = [(task, name, content) for task, name, content, _ in FILES if name.endswith((".json", ".jsonl"))]


@examples(300)
@given(st.data())
def test_a_damaged_file_gives_rows_or_one_error(tmp_path_factory, data):
    task, name, content = data.draw(st.sampled_from(JSON_TASKS))
    records = [copy.deepcopy(json.loads(line)) for line in content.splitlines()]
    node, key = records, len(records) - 1
    while isinstance(node[key], dict | list) and node[key] and data.draw(st.integers(0, 4)):
        node = node[key]
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
    if isinstance(node, dict) and data.draw(st.booleans()):
        del node[key]
    else:
        node[key] = data.draw(JUNK)
    path = tmp_path_factory.getbasetemp() / f"damaged-{name}"
    path.write_text("\n".join(map(json.dumps, records)))
    for labelled, training in ((True, False), (True, True), (False, False)):
        try:
            rows = registry.read(task, path, training, labelled=labelled)
        except DataError as error:
            assert str(path) in str(error)  # noqa: PT017
        else:
            assert all(row.input and (row.target or not labelled) for row in rows)


@pytest.mark.parametrize("words", [("x", "x"), ("equivalent", "not_equivalent")])
def test_ambiguous_label_words_are_refused(words):
    with pytest.raises(DataError, match=f"mrpc: expected distinct words that do not swap labels, found {words[0]}"):
        registry.task_labels("mrpc", dict(zip(("not_equivalent", "equivalent"), words, strict=True)))


def test_custom_label_words(tmp_path):
    words = {"not_equivalent": "not_duplicate", "equivalent": "duplicate"}
    task, name, content, (row,) = next(entry for entry in FILES if entry[0] == "mrpc")
    path = write(tmp_path / name, content)
    assert registry.read(task, path, words=words) == [row._replace(target="duplicate")]
    labels = registry.task_labels(task, words)
    assert labels == ("not_duplicate", "duplicate")
    rows = [row._replace(target=labels[i]) for i in (1, 1, 1, 0)]
    predicted = [labels[i] for i in (1, 1, 0, 1)]
    assert registry.score(task, predicted, rows, labels).metrics == {"f1": 2 / 3, "accuracy": 0.5}
    assert registry.score(task, predicted, rows, labels).mean == pytest.approx(7 / 12)
    rows = [row._replace(target=TASKS[task].labels[i]) for i in (1, 1, 1, 0)]
    predicted = [TASKS[task].labels[i] for i in (1, 1, 0, 1)]  # sorted, like the labels of a table
    assert registry.score(task, predicted, rows, ("equivalent", "not_equivalent")).metrics == {
        "f1": 2 / 3,
        "accuracy": 0.5,
    }
    for wrong in ({"equivalent": "yes"}, {"0": "no", "1": "yes"}):
        with pytest.raises(DataError, match="mrpc: expected words for not_equivalent, equivalent; found words for"):
            registry.read(task, path, words=wrong)
    with pytest.raises(DataError, match="answers are free text"):
        registry.task_labels("squad", words)


@pytest.mark.parametrize(
    ("predicted", "candidate", "true", "right"),
    [
        ("The Cup", "cup", True, True),
        ("fuzzy bunny", "the bunny", True, True),
        ("bunny", "the fuzzy bunny", False, False),
        ("Bob", "Bob's hat", True, False),
        ("Bob", "Bob's hat", False, True),
        ("a man", "the dog", False, True),
        ("", "the dog", False, False),
        ("the", "the dog", False, False),
        ("dog", "his", False, True),
    ],
)
def test_answers_of_wsc_are_compared_as_referents(predicted, candidate, true, right):
    row = Row("x", candidate, (candidate,) if true else ())
    assert registry.score("wsc", [predicted], [row], None).metrics == {"accuracy": right}


# Every row of the dev files: task, number of rows, digest, scores. The digests are of "input<tab>target<newline>" for
# the strings that t5 0.9.4 generates (t5.data.preprocessors on TFDS 4.9.10, as in its tasks, then
# remove_first_text_token of prompt-tuning), with both ends stripped. T5 has no TREC and AG News; their strings were
# composed by hand. The scores are those of t5.evaluation.metrics (with scikit-learn) for `guesses`, divided by 100.
DEV = {
    "superglue/BoolQ.val.jsonl": ("boolq", 3270, "a3235aef014b6221", 0.801529051988),
    "superglue/CB.val.jsonl": ("cb", 56, "fe39ae7e372506a5", 0.735600907029, 0.75),
    "superglue/COPA.val.jsonl": ("copa", 100, "f3c095ea71eedebb", 0.77),
    "superglue/MultiRC.val.jsonl": ("multirc", 4848, "91f94e971de96805", 0.777363763391, 0.366211962225),
    "superglue/ReCoRD.fewglue_dev32.jsonl": ("record", 46, "e5961fbb0692e536", 0.5, 0.589285714286),
    "superglue/RTE.val.jsonl": ("rte", 277, "2759aa8332eb07ac", 0.790613718412),
    "superglue/WiC.val.jsonl": ("wic", 638, "d5cee50f70d9c80a", 0.819749216301),
    "superglue/WSC.val.jsonl": ("wsc", 104, "589527b92aac3b24", 0.442307692308),
    "superglue/AX-b.jsonl": ("axb", 1104, "fc9434f66b7c1a8e", 0.600573247643),
    "superglue/AX-g.jsonl": ("axg", 356, "65f9e2d6cfb574da", 0.794943820225),
    "glue/CoLA.dev.tsv": ("cola", 1043, "c0be9d172a383b66", 0.615562717233),
    "glue/RTE.dev.tsv": ("glue-rte", 277, "739c221be9cce12c", 0.790613718412),
    "glue/MRPC.msr_paraphrase_test.txt": ("mrpc", 1725, "05aa54b873888ca9", 0.832275611967, 0.785507246377),
    "glue/QQP.subset_dev.jsonl": ("qqp", 1000, "79c36e2ef2951a3d", 0.745341614907, 0.795),
    "glue/SST-2.test.tsv": ("sst2", 872, "26f9b30731ed5c81", 0.80619266055),
    "squad_v1.1_dev/dev-v1.1.rebuilt.json.xz": ("squad", 10570, "9759834985a14c04", 0.572185430464, 0.627471856537),
    "squadshifts/new_wiki_v1.0.json.xz": ("squad", 7938, "d792db1b79331326", 0.573192239859, 0.625345074746),
    "sentcls/TREC.test": ("trec", 500, "918655cdecbc0cb8", 0.692),
    "agnews/test_title_desc.csv": ("agnews", 7600, "4b98dec3c4c7e7e8", 0.728289473684),
}


def guesses(rows, labels):
    """Return answers: half of them right, the rest from other rows, impossible, or worded differently."""
    rng, out = random.Random(0), []
    for row in rows:
        kind = rng.random()
        right = rng.choice(row.answers) if row.answers else row.target
        if kind < 0.5:
            out.append(right)
        elif kind < 0.8:
            out.append(rng.choice(labels) if labels else rng.choice(rows).target)
        elif kind < 0.85:
            out.append("no such thing" if labels else "")
        else:
            out.append(right if labels else rng.choice([f"The {right.upper()}!", right.split()[0], f"an old {right}"]))
    return out


def digest(rows):
    return hashlib.sha256("".join(f"{row.input}\t{row.target}\n" for row in rows).encode()).hexdigest()[:16]


distributed = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no {SHARED}, where the distributed files are")


@distributed
@pytest.mark.parametrize("file", DEV)
def test_every_row_of_the_distributed_files(file):
    task, count, sha256, *scores = DEV[file]
    rows = registry.read(task, SHARED / file, training=task == "record")  # T5 has a row for each answer in both splits
    assert (len(rows), digest(rows)) == (count, sha256)
    rows = registry.read(task, SHARED / file)
    labels = TASKS[task].labels
    found = registry.score(task, guesses(rows, labels), rows, labels)
    assert [*found.metrics.values()] == pytest.approx(scores, abs=1e-12)


@distributed
def test_training_uses_true_referents_only():
    assert (
        len(registry.read("wsc", SHARED / "superglue/WSC.train.jsonl", training=True)) == 259
    )  # section 3 of the paper


QUICK = "--steps 2 --batch-size 4 --prompt-length 3 --eval-every 1 --optimizer adam --max-new-tokens 3".split()  # noqa: SIM905


@pytest.fixture
def call(capsys, folder):
    """Return a function that runs a command on the small model and returns its JSON or, on failure, its last line."""

    def call(*args):
        status = main([*map(str, args), "--model", str(folder), "--device", "numpy", "--json"])
        out, err = capsys.readouterr()
        return json.loads(out) if status == 0 else err.splitlines()[-1]

    return call


def pairs(path, first, second, label, labels):
    rows = [{first: f"Text {i}.", second: f"Text {i // 2}.", label: labels[i % 2]} for i in range(12)]
    path.write_text(lines(*rows))
    return path


def test_a_prompt_keeps_its_task(call, tmp_path):
    train, prompt = pairs(tmp_path / "a.jsonl", "text_a", "text_b", "label", "01"), tmp_path / "p.safetensors"
    tuned = call("tune", train, "--dev", train, "--task", "qqp", "--out", prompt, *QUICK)
    assert tuned["label_words"] == ["not_duplicate", "duplicate"]
    scored = call("eval", prompt, train)
    assert (scored["task"], scored["metric"], scored["score"]) == ("qqp", "mean of f1 and accuracy", tuned["dev"])
    assert scored["scores"].keys() == {"f1", "accuracy"}
    answered = call("predict", prompt, "--data", train)["predictions"]
    assert answered[0]["input"] == "question1: Text 0. question2: Text 0."
    assert {answer["prediction"] for answer in answered} <= set(tuned["label_words"])
    # The transfer of the paper (table 2): the same prompt on the other paraphrase task.
    other = pairs(tmp_path / "b.jsonl", "sentence1", "sentence2", "label", ["not_equivalent", "equivalent"])
    words = ("--words", "not_equivalent=not_duplicate", "equivalent=duplicate")
    scored = call("eval", prompt, other, "--task", "mrpc", *words)
    assert scored["rows"] == 12
    assert 0 <= scored["scores"]["f1"] <= 1
    assert "'question1', found" in call("eval", prompt, other)
    assert "is not a label word (not_duplicate, duplicate)" in call("eval", prompt, other, "--task", "mrpc")
    assert "expected words for not_equivalent, equivalent" in call(
        "eval", prompt, other, "--task", "mrpc", "--words", "a=b"
    )
    assert "task 'mnli': expected one of auto, classify" in call("eval", prompt, other, "--task", "mnli")
    assert "--input and --target need a file with columns" in call("eval", prompt, train, "--input", "text_a")
    assert "setting task: expected 'qqp' as in the run to resume" in call(
        "tune", other, "--dev", other, "--task", "mrpc", "--resume", prompt, "--steps", 3
    )


def test_free_text_tasks_on_the_command_line(call, tmp_path, monkeypatch):
    first, words = methods.init_params, []
    spy = lambda model, settings, labels, init: words.append((labels, init)) or first(model, settings, labels, init)
    monkeypatch.setattr(methods, "init_params", spy)
    wsc, prompt = write(tmp_path / "a.jsonl", lines(WSC, WSC | {"label": False})), tmp_path / "p.safetensors"
    assert "rows of a group must stay together" in call("tune", wsc, "--task", "wsc", "--out", prompt, *QUICK)
    tuned = call("tune", wsc, "--dev", wsc, "--task", "wsc", "--out", prompt, *QUICK)
    assert tuned["label_words"] is None
    assert words == [(None, ("commonsense", "pronoun", "resolution"))]
    scored = call("eval", prompt, wsc)
    assert (scored["metric"], scored["score"], scored["rows"]) == ("accuracy", tuned["dev"], 2)
    squad = write(tmp_path / "a.json", json.dumps(SQUAD))
    assert call("eval", prompt, squad, "--task", "squad")["scores"].keys() == {"exact match", "f1"}


def test_a_mixture_of_tasks_on_the_command_line(call, tmp_path):
    qqp = pairs(tmp_path / "a.jsonl", "question1", "question2", "is_duplicate", [0, 1])
    wsc = write(tmp_path / "b.jsonl", lines(WSC, WSC | {"label": False}))
    out = tmp_path / "p.safetensors"
    both = ("--task", "qqp,wsc")
    tuned = call(
        "tune",
        qqp,
        wsc,
        "--dev",
        qqp,
        "--dev",
        wsc,
        *both,
        "--method",
        "full",
        "--learning-rate",
        "1e-3",
        "--out",
        out,
        *QUICK[:4],
        *QUICK[6:],
    )
    assert tuned["label_words"] is None
    scored = call("eval", out, qqp, wsc)
    assert scored["scores"].keys() == {"qqp f1", "qqp accuracy", "wsc accuracy"}
    assert scored["rows"] == 14
    assert scored["metric"] == "mean of the tasks qqp and wsc"
    alone = call("eval", out, wsc, "--task", "wsc")
    assert alone["score"] == scored["scores"]["wsc accuracy"]
    predictions = call("predict", out, "--data", wsc, "--task", "wsc")["predictions"]
    assert predictions[0]["input"].startswith("wsc ")
    assert "--task qqp,wsc: 2 tasks, found 1 file: " in call("eval", out, qqp)
    assert "task 'auto': expected one of boolq" in call("tune", qqp, wsc, "--task", "qqp,auto")
    assert "a mixture consists of built-in tasks with their own words" in call(
        "eval", out, qqp, "--task", "qqp", "--words", "not_duplicate=no", "duplicate=yes"
    )
    assert "must stay together; give dev rows" in call("tune", qqp, wsc, *both, *QUICK)
    single = tmp_path / "q.safetensors"
    call("tune", qqp, "--dev", qqp, "--task", "qqp", "--out", single, *QUICK)
    assert "was tuned without task names; name one task" in call("eval", single, qqp, wsc, *both)


def test_few_shot_examples_use_true_referents_only(call, tmp_path):
    wsc = write(tmp_path / "a.jsonl", lines(WSC, *[WSC | {"label": False}] * 9))
    assert (
        call("few-shot", wsc, wsc, "--task", "wsc", "--k", "1", "--max-new-tokens", "2", "--max-input-tokens", 999)["k"]
        == 1
    )
    assert "1 rows, expected at least --k 2" in call("few-shot", wsc, wsc, "--task", "wsc", "--k", "2")


def test_a_mixture_is_scored_task_by_task():
    trec, qqp = (
        [Row("a", "HUM"), Row("b", "LOC")],
        [Row("c", "duplicate"), Row("d", "duplicate"), Row("e", "duplicate")],
    )
    rows = registry.mixed(("trec", "qqp"), (trec, qqp))
    assert [row.input for row in rows] == ["trec a", "trec b", "qqp c", "qqp d", "qqp e"]
    answers = ["HUM", "NUM", "duplicate", "duplicate", "not_duplicate"]
    found = registry.score("trec,qqp", answers, rows, None)
    assert found.metrics == {
        "trec accuracy": 1 / 2,
        "qqp f1": pytest.approx(4 / 5),
        "qqp accuracy": pytest.approx(2 / 3),
    }
    # A task with two metrics has the same weight.
    assert found.mean == pytest.approx((1 / 2 + (4 / 5 + 2 / 3) / 2) / 2)


def test_scores_print_their_metrics_and_rows():
    rows = [Row("a", "duplicate"), Row("b", "not_duplicate"), Row("c", "duplicate")]
    found = registry.score("qqp", ["duplicate", "duplicate", "not_duplicate"], rows, TASKS["qqp"].labels)
    assert (found.rows, found.name) == (3, "mean of f1 and accuracy")
    assert str(found) == "mean of f1 and accuracy 0.417 on 3 rows; f1 0.500; accuracy 0.333"
    assert str(registry.score("auto", ["a", "b"], rows[:2], None)) == "exact match 0.000 on 2 rows"
    assert registry.score("classify", ["duplicate"], rows[:1], ("duplicate",)).name == "accuracy"


@pytest.mark.parametrize("words", [("no", "yes"), None])
def test_evaluate_uses_the_metrics_of_the_task(folder, words):
    model, rows = load(folder), [Row("a", "yes"), Row("b", "no"), Row("c", "yes")]
    prompt = Prompt(label_words=words, settings={"max_new_tokens": 2} | ({"task": "qqp"} if words else {}))
    answers = predict(model, prompt, [row.input for row in rows], "numpy")
    found = evaluate(model, prompt, rows, "numpy")
    assert found == registry.score("qqp" if words else "auto", answers, rows, words)
    assert list(found.metrics) == (["f1", "accuracy"] if words else ["exact match"])


def test_valid_and_invalid_task_names():
    for name in (*registry.PLAIN, *TASKS, "boolq,rte"):
        registry.check_name(name, "here")
    for name in ("mnli", "boolq,auto", "boolq,", ""):
        with pytest.raises(ValueError, match=r"^here: task '(mnli|auto|)': expected one of .*boolq"):
            registry.check_name(name, "here")


def test_qqp_rows_with_a_line_break_are_skipped_and_counted(tmp_path, caplog):
    head = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    good = "".join(f"{i}\t1\t2\tHow is it?\tHow are {i}?\t{i % 2}\n" for i in range(4))
    path = write(tmp_path / "train.tsv", head + good + "9\t1\t2\tWho?\tIs it, and what\n\tis known?\t0\n" + good)
    assert len(registry.read("qqp", path)) == 8
    assert "skipped 2 rows with too many or too few fields, the first at line 6" in caplog.text
    with pytest.raises(DataError, match="row 6: 5 fields"):
        list(tables.records(path))


def test_the_test_file_of_cola_has_a_header(tmp_path):
    path = write(tmp_path / "test.tsv", "index\tsentence\n0\tBill whistled past the house.\n")
    (row,) = registry.read("cola", path, labelled=False)
    assert row.input == "sentence: Bill whistled past the house."


def test_multirc_keeps_an_empty_answer_and_groups_by_line(tmp_path):
    def line(*texts):
        answers = [{"text": text, "label": i % 2} for i, text in enumerate(texts)]
        return {"passage": {"text": "It is so.", "questions": [{"question": "Is it?", "idx": 0, "answers": answers}]}}

    path = write(tmp_path / "val.jsonl", lines(line("", "yes"), line("no", "never")))
    rows = registry.read("multirc", path)
    assert rows[0].input == "question: Is it? answer:  paragraph: It is so."
    assert len({row.group for row in rows}) == 2  # without idx too


def test_files_of_other_releases_are_named(tmp_path):
    qas = [{"question": "Who ran?", "id": "2", "answers": [], "is_impossible": True}]
    whole = {"version": "v2.0", "data": [{"title": "t", "paragraphs": [{"context": "It sat.", "qas": qas}]}]}
    with pytest.raises(DataError, match=r"question 2: has no answer .*: SQuAD 2.0 is not supported"):
        registry.read("squad", write(tmp_path / "dev.json", json.dumps(whole)))
    row = {"question": "is it so", "answer": True, "passage": "It is so."}
    with pytest.raises(DataError, match="row 1: has 'answer' instead of 'label'"):
        registry.read("boolq", write(tmp_path / "dev.jsonl", json.dumps(row)))
