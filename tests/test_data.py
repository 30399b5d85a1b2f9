"""Rows from files, batches from rows, and the demo's data."""

import itertools
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples

import tinyprompt
from tinyprompt import data
from tinyprompt.data import Row
from tinyprompt.errors import DataError
from tinyprompt.files import tables
from tinyprompt.settings import Settings
from tinyprompt.tasks.reading import Reader
from tinyprompt.tokenizer import ByteTokenizer

DEMO = Path(tinyprompt.__file__).parent / "demo"
WORDS = ByteTokenizer()


@pytest.fixture
def write(tmp_path):
    """Return a function that writes text or bytes to a file and returns its path."""

    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("a.tsv", "input\ttarget\nfilm one\tgood\nfilm two\tbad\n", [("film one", "good"), ("film two", "bad")]),
        ("a.tsv", 'input\ttarget\n"Oh", he said\tgood\nan "odd\tbad', [('"Oh", he said', "good"), ('an "odd', "bad")]),
        ("a.tsv", "\ufeffinput\ttarget\r\nä ß 漢\tgood\r\n\r\n", [("ä ß 漢", "good")]),
        ("a.TSV", "id\ttarget\tinput\n7\tgood\t  film \n", [("film", "good")]),
        ("a.csv", 'input,target\n"one, ""2""\nthree",good\n\n4,bad\n', [('one, "2"\nthree', "good"), ("4", "bad")]),
        ("a.csv", "\ufefftarget,input\ngood,film\n", [("film", "good")]),
        ("a.jsonl", '{"input": "a\\tb", "target": 1}\n\n{"target": 2.5, "input": 0}\n', [("a\tb", "1"), ("0", "2.5")]),
        ("a.jsonl", '\ufeff{"input": "film", "target": "good"}', [("film", "good")]),
    ],
)  # fmt: skip
def test_rows_are_read_from_every_format(write, name, content, rows):
    assert tables.read_rows(write(name, content)) == [Row(*row) for row in rows]


@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.jsonl"])
def test_column_names_and_label_words(write, name):
    records = [{"label": "0", "text": "dull"}, {"label": "1", "text": "fun"}]
    separator = "\t" if name == "a.tsv" else ","
    lines = [separator.join(records[0]), *(separator.join(r.values()) for r in records)]
    path = write(name, "\n".join(map(json.dumps, records) if name == "a.jsonl" else lines))
    assert tables.read_rows(path, "text", "label", {"0": "bad", "1": "good"}) == [
        Row("dull", "bad"),
        Row("fun", "good"),
    ]
    assert tables.read_rows(path, "text", "label") == [Row("dull", "0"), Row("fun", "1")]
    assert tables.read_rows(path, "text", None) == [Row("dull", ""), Row("fun", "")]
    assert tables.read_rows(path, "text", None, {"0": "bad"}) == [Row("dull", ""), Row("fun", "")]


GOOD = "input\ttarget\nfilm\tgood\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "text\ttarget\nfilm\tgood\n", "row 2: no column 'input'; found 'text', 'target'"),
        ("a.jsonl", '{"input": "a", "target": "b"}\n{"input": "a"}', "row 2: no column 'target'"),
        ("a.tsv", GOOD + "film\tgood\tbad\n", "row 3: 3 fields, but the header names 2"),
        ("a.csv", "input,target\nfilm\n", "row 2: 1 fields, but the header names 2"),
        ("a.tsv", GOOD + "\tgood\n", "row 3: column 'input': expected a text, found ''"),
        ("a.csv", "input,target\nfilm,  \n", "row 2: column 'target': expected a text, found '  '"),
        ("a.csv", 'input,target\na,b\nc, "good"\n', "row 3: a quote is misplaced"),
        ("a.csv", 'input,target\n "a, b"\n', "row 2: a quote is misplaced"),
        ("a.jsonl", '{"input": "a", "target": null}', "row 1: column 'target': expected a text, found None"),
        ("a.jsonl", '{"input": ["a"], "target": "b"}', "row 1: column 'input': expected a text"),
        ("a.jsonl", '{"input": "a", "target": true}', "row 1: column 'target': expected a text, found True"),
        ("a.jsonl", '{"input": NaN, "target": "b"}', "row 1: column 'input': expected a text, found nan"),
        ("a.tsv", "input\tinput\ttarget\na\tb\tc\n", "the header names 'input' twice; rename one"),
        ("a.jsonl", '\n{"input": "a",\n', "row 2: not valid JSON"),
        ("a.jsonl", '["a", "b"]', "row 1: expected a JSON object"),
        ("a.tsv", GOOD.encode() + b"caf\xe9\tgood\n", "row 3: not UTF-8"),
        ("a.jsonl", b'{"input": "a", "target": "b"}\n' * 500 + b"\xff", "row 501: not UTF-8"),
        ("a.csv", b"\xef\xbb\xbfinput,target\n\xff,good\n", "row 2: not UTF-8"),
        ("a.csv", "input;target\na;b\n", "row 2: one column, 'input;target': separated by semicolons; expected commas"),
        ("a.csv", "text\na\n", "row 2: no column 'input'; found 'text'"),
        ("a.csv", "input\na\n", "row 2: no column 'target'; found 'input'"),
        ("a.tsv", "a;b\tc\n1\t2\n", "row 2: no column 'input'; found 'a;b', 'c'"),
        ("a.tsv", "", "empty"),
        ("a.csv", "", "empty"),
        ("a.jsonl", "", "no rows"),
        ("a.tsv", "input\ttarget\n", "no rows"),
        ("a.doc", GOOD, "expected a file that ends in .tsv, .csv or .jsonl"),
        ("a.csv", 'input,target\na,b\nfine,"good\nc,d\ne,f\n', "row 3: a quote is misplaced or never closed"),
        ("a.csv", 'input,target\na,b\n"fine,good\nc,d\n"e, f",g\n', "row 3: a quote is misplaced"),
        ("a.csv", 'input,target\n"say \\"hi\\", you",b\n', "row 2: a quote is misplaced"),
        ("a.csv", 'input,target\n"a" ,b\n', "row 2: a quote is misplaced"),
        ("a.csv", "input,target\na,b\ninput,target\nc,d\n", "row 3: repeats the header"),
        ("a.tsv", GOOD + GOOD, "row 3: repeats the header"),
        ("a.tsv", "input\ttarget\ra\tb\rc\r", "row 3: 1 fields, but the header names 2"),
        ("a.tsv", GOOD.replace("film", "fi\0lm"), "row 2: contains a NUL byte"),
        ("a.tsv", GOOD.encode("utf-16"), "is UTF-16; convert it to UTF-8"),
        ("a.csv", "input,target\nä,b\n".encode("utf-16-be"), "row 1: contains a NUL byte"),
        ("a.jsonl", GOOD.encode("utf-16-le"), "row 1: contains a NUL byte"),
        ("a.csv", b"input,target\ra,b\r\xff,d\r", "row 3: not UTF-8"),
        ("a.jsonl", '{"input": "a", "target": "b", "input": "c"}', "row 1: the key 'input' occurs twice"),
        ("a.jsonl", '{"input": "a", "target": "b"},\n', "row 1: not valid JSON"),
        ("a.jsonl", '[{"input": "a", "target": "b"}]', "row 1: expected a JSON object on each line"),
        ("a.jsonl", '{"input": "a", "target": false}', "row 1: column 'target': expected a text, found False"),
    ],
)
def test_an_error_names_the_file_and_the_row(write, name, content, message):
    path = write(name, content)
    with pytest.raises(DataError, match=re.escape(f"{path}: {message}")):
        tables.read_rows(path)


def test_an_unknown_coded_target_is_named(write):
    path = write("a.tsv", "input\ttarget\nfilm\t1\nfilm\t2\n")
    with pytest.raises(DataError, match=re.escape(f"{path}: row 3: target '2' has no label word; given for 0, 1")):
        tables.read_rows(path, words={"0": "bad", "1": "good"})


def test_a_missing_file_and_a_directory_are_named(tmp_path):
    with pytest.raises(DataError, match=re.escape(f"{tmp_path / 'no.tsv'}: no such file")):
        tables.read_rows(tmp_path / "no.tsv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match=re.escape(f"{tmp_path / 'folder.csv'}: is a directory")):
        tables.read_rows(tmp_path / "folder.csv")


@pytest.mark.parametrize(
    ("targets", "labels"),
    [
        (["good", "bad"] * 4, ("bad", "good")),
        (["good", "bad"] * 2, ("bad", "good")),
        (["good", "bad", "good"], None),  # too few rows to decide
        (["good"] * 20, None),
        ([f"label {i:02}" for i in range(50)] * 4, tuple(f"label {i:02}" for i in range(50))),
        ([str(i) for i in range(51)] * 9, None),
        ([f"answer {i}" for i in range(20)], None),
    ],
)
def test_repeated_targets_are_labels_and_others_free_text(targets, labels):
    rows = [Row("x", t) for t in targets]
    assert data.label_words(rows) == data.label_words(rows, "auto") == labels
    assert data.label_words(rows, "classify") == tuple(sorted(set(targets)))
    assert data.label_words(rows, "generate") is None


def test_rows_may_be_given_as_a_file_name(tmp_path):
    rows, path = [Row("a", "b"), Row("c", "d")], tmp_path / "a.tsv"
    path.write_text("input\ttarget\na\tb\nc\td\n")
    read = Reader().read
    assert read(path) == read(str(path)) == read([path]) == read(tuple(rows)) == read(iter(rows)) == rows
    pairs, dicts = [tuple(row[:2]) for row in rows], [{"target": row.target, "input": row.input} for row in rows]
    assert read(pairs) == read(dicts) == rows
    named = [{"text": row.input, "label": row.target, "id": i} for i, row in enumerate(rows)]
    assert Reader(input="text", target="label").read(named) == rows
    assert Reader(words={"b": "good", "d": "bad"}).read(rows[:0] + pairs) == [Row("a", "good"), Row("c", "bad")]
    for wrong, message in (
        ([("a", "b"), "c"], "row 2: expected a Row, a pair (input, target), or a dict, found 'c'"),
        ([("a", "b", "c")], "row 1: expected a Row"),
        ([{"input": "a"}], "row 1: no column 'target'; found 'input'"),
        ([("a", None)], "row 1: column 'target': expected a text, found None"),
        ({"input": ["a"]}, "found a dict with the keys input"),
        (3, "expected a file name, rows, a DataFrame or a Dataset, found 3"),
        ([], "no rows"),
    ):
        with pytest.raises(DataError, match=re.escape(message)):
            read(wrong)


def test_rows_of_a_data_frame_and_a_dataset():
    class Frame:  # implements the used parts of pandas.DataFrame
        columns = ("text", "label")

        def to_dict(self):
            raise AssertionError("rows are read one by one")

        def itertuples(self, index, name):
            assert (index, name) == (False, None)
            return iter([("a", 1), ("c", 0)])

    class Dataset(list):  # a datasets.Dataset yields dicts
        features = ("text", "label")

    rows = [Row("a", "1"), Row("c", "0")]
    reader = Reader(input="text", target="label")
    assert reader.read(Frame()) == reader.read(Dataset([{"text": "a", "label": 1}, {"text": "c", "label": 0}])) == rows


@given(count=st.integers(1, 150), most=st.integers(2, 40))
def test_batches_have_all_rows_once_in_order_of_length(count, most):
    rows = rows_of_many_lengths(count)
    batches = list(data.batches_in_order_of_length(rows, WORDS, most))
    assert sorted(WORDS.decode(ids) for batch in batches for ids in batch.labels) == sorted(row.target for row in rows)
    assert [len(batch.labels) for batch in batches] == [64] * (count // 64) + [count % 64] * (count % 64 > 0)
    widths = [batch.attention_mask.sum(1).max() for batch in batches]
    assert widths == sorted(widths)
    assert max(widths) <= most


def test_given_target_ids_replace_those_of_the_tokenizer():
    rows = [Row("x", "good"), Row("yy", "bad"), Row("z", "else")]
    batch = data.batch_of(rows, WORDS, 10, {"good": (7,), "bad": (8, 9)})
    found = [ids[weights == 1].tolist() for ids, weights in zip(batch.labels, batch.weights, strict=True)]
    assert found == [[7], [8, 9], WORDS.encode("else")]
    settings = Settings(batch_size=3)
    batch = next(data.training_batches(rows, WORDS, settings, {"good": (7,), "bad": (8, 9), "else": (10, 11, 12)}))
    assert all(batch.weights.sum(1) == [int(ids[0] - 6) if ids[0] < 9 else 3 for ids in batch.labels])


@given(count=st.integers(2, 60), share=st.floats(0.01, 0.5), seed=st.integers(0, 99))
def test_split_is_disjoint_complete_and_seeded(count, share, seed):
    rows = [Row(str(i), "x") for i in range(count)]
    train, dev = data.split(rows, share, seed)
    assert sorted(train + dev) == sorted(rows)
    assert len(dev) == max(1, round(count * share))
    assert data.split(rows, share, seed) == (train, dev)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'input,target\n" ""a"" b", good\n5" pipe, bad\n'),
        ("a.csv", 'input,target\r"""a"" b",good\r5" pipe,bad\r'),
        ("a.tsv", 'input\ttarget\r"a" b\tgood\r  \t\r5" pipe\tbad'),
    ],
)
def test_clear_quotes_and_line_ends_are_read(write, name, content):
    assert tables.read_rows(write(name, content)) == [Row('"a" b', "good"), Row('5" pipe', "bad")]


def test_quotes_in_tsv_cause_a_warning(write, caplog):
    content = 'input\ttarget\n"He said ""hi"" to me"\tgood\n"Plain"\tgood\n'
    assert tables.read_rows(write("a.tsv", content))[0].input == '"He said ""hi"" to me"'
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "a.tsv: 1 texts look quoted" in warning
    caplog.clear()
    tables.read_rows(write("a.csv", 'input,target\n"""He ""said"" so""",good\n'))
    tables.read_rows(write("a.tsv", 'input\ttarget\n"Oh", he "said"\t""\n'))
    assert not caplog.records


def test_equal_numbers_are_one_label(write):
    targets = [0, 1, 0.0, 1.0, "0", "1", -1, -1.0] * 4
    lines = [json.dumps({"input": f"text {i}", "target": target}) for i, target in enumerate(targets)]
    assert data.label_words(tables.read_rows(write("a.jsonl", "\n".join(lines)))) == ("-1", "0", "1")
    where = "row 1"
    for value in (1, 1.0, np.float64(1), np.float32(1), np.int64(1)):
        assert tables.row_of({"input": "a", "target": value}, "input", "target", None, where).target == "1"
    with pytest.raises(DataError, match=r"found (np\.True_|True)"):
        tables.row_of({"input": "a", "target": np.True_}, "input", "target", None, where)
    rows = [Row(str(i), target) for i, target in enumerate(["1", "1.0", "2", "2.5"] * 4)]
    with pytest.raises(DataError, match=r"the targets '1' and '1\.0' are the same number"):
        data.label_words(rows)
    assert data.label_words(rows, "generate") is None


def test_a_lone_surrogate_in_memory_is_named():
    for record in ({"input": "\ud83d", "target": "b"}, {"input": "a", "target": "\ud83d"}):
        with pytest.raises(DataError, match=r"row 1: column '(input|target)': contains"):
            tables.row_of(record, "input", "target", None, "row 1")


@given(
    st.lists(st.tuples(st.sampled_from("abcdefgh"), st.sampled_from("xy")), min_size=2, max_size=40), st.integers(0, 9)
)
def test_split_keeps_copies_of_an_input_together(pairs, seed):
    rows = [Row(*pair) for pair in pairs]
    if len({row.input for row in rows}) == 1:
        with pytest.raises(DataError, match="rows have the same input"):
            data.split(rows, 0.2, seed)
        return
    train, dev = data.split(rows, 0.2, seed)
    assert sorted(train + dev) == sorted(rows)
    assert train
    assert dev
    assert not {row.input for row in train} & {row.input for row in dev}


def test_split_depends_on_the_seed():
    rows = [Row(str(i), "x") for i in range(50)]
    assert data.split(rows, 0.2, 0) != data.split(rows, 0.2, 1)


def test_pad_adds_padding_on_the_right():
    ids, mask = data.pad([[5, 1], [6, 7, 8, 1], [1]])
    assert ids.tolist() == [[5, 1, 0, 0], [6, 7, 8, 1], [1, 0, 0, 0]]
    assert mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=5), more=st.integers(0, 9))
def test_rows_are_padded_to_a_standard_or_given_length(lengths, more):
    ids, mask = data.pad([[7] * n for n in lengths])
    assert mask.sum(1).tolist() == lengths
    assert ids.shape[1] == min(n for n in (1, 2, 3, 4, *range(8, 33, 4), *range(40, 65, 8)) if n >= max(lengths))
    assert data.pad([[7] * n for n in lengths], max(lengths) + more)[0].shape[1] == max(lengths) + more


@given(st.text(st.characters(codec="utf-8"), max_size=20), st.integers(1, 30))
def test_inputs_are_cut_but_keep_eos(text, most):
    whole = WORDS.encode(text)
    (ids,) = data.encode_inputs([text], WORDS, most)
    assert ids == (whole if len(whole) <= most else [*whole[: most - 1], 1])
    assert ids[-1] == 1
    assert len(ids) <= most


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 8))
def test_by_length_covers_every_index_once(lengths, size):
    batches = data.by_length(lengths, size)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) == size for batch in batches[:-1])


@given(st.integers(1, 5), st.integers(1, 6), st.data())
def test_by_length_computes_the_least_padding(size, count, draw):
    lengths = draw.draw(st.lists(st.integers(1, 50), min_size=size * count, max_size=size * count))
    order = draw.draw(st.permutations(range(len(lengths))))

    def computed(batches):
        return sum(size * max(lengths[i] for i in batch) for batch in batches)

    assert computed(data.by_length(lengths, size)) <= computed(np.reshape(order, (count, size)))


def rows_of_many_lengths(count):
    """Return rows whose targets are their numbers."""
    rng = np.random.default_rng(0)
    return [Row("x" * int(rng.integers(1, 200)), str(i)) for i in range(count)]


def epoch(rows, size, batches, seed=0):
    settings = Settings(batch_size=size, max_input_tokens=256, seed=seed)
    return list(itertools.islice(data.training_batches(rows, WORDS, settings), batches))


def test_training_batches_follow_their_seed():
    rows = rows_of_many_lengths(30)
    a, b, c = (epoch(rows, 4, 20, seed) for seed in (0, 0, 1))
    assert all((x == y).all() for left, right in zip(a, b, strict=True) for x, y in zip(left, right, strict=True))
    assert any(x.labels.tolist() != y.labels.tolist() for x, y in zip(a, c, strict=True))


@examples(25)
@given(count=st.integers(1, 50), size=st.integers(1, 6), pools=st.integers(1, 8), seed=st.integers(0, 99))
def test_training_batches_are_full_and_use_rows_equally_often(count, size, pools, seed):
    rows = rows_of_many_lengths(count)
    seen = Counter(dict.fromkeys((row.target for row in rows), 0))
    for batch in epoch(rows, size, 8 * pools, seed):
        assert len(batch.input_ids) == size
        seen.update(map(WORDS.decode, batch.labels))
    assert max(seen.values()) - min(seen.values()) <= (8 * size * pools % count > 0)


def test_a_training_batch_keeps_the_rows():
    rows = rows_of_many_lengths(30)
    for batch in epoch(rows, 4, 8):
        for ids, mask, labels, weights in zip(*batch, strict=True):
            row = rows[int(WORDS.decode(labels))]
            assert WORDS.encode(row.input) == ids[mask == 1].tolist()
            assert WORDS.encode(row.target) == labels[weights == 1].tolist()
            assert not ids[mask == 0].any()
            assert not labels[weights == 0].any()
        assert batch.weights.dtype == np.float32


def test_training_batches_have_little_padding():
    batches = epoch(rows_of_many_lengths(400), 16, 25)
    assert np.concatenate([b.attention_mask.ravel() for b in batches]).mean() > 0.85  # a random order gives 0.5
    assert all(b.attention_mask.any(0)[:-7].all() for b in batches)


def read(name):
    return tables.read_rows(DEMO / f"{name}.tsv")


COUNTS = {"train": 400, "dev": 100, "test": 200}
PARTS = {"sentiment": COUNTS | {"restaurants": 200}, "topic": COUNTS}


@pytest.mark.parametrize("task", PARTS)
def test_demo_data_are_complete_and_balanced(task):
    labels = data.label_words(read(f"{task}.train"))
    assert len(labels) == {"sentiment": 2, "topic": 5}[task]
    assert {path.name for path in DEMO.glob(f"{task}.*")} == {f"{task}.{part}.tsv" for part in PARTS[task]}
    for part, count in PARTS[task].items():
        rows = read(f"{task}.{part}")
        assert Counter(row.target for row in rows) == dict.fromkeys(labels, count // len(labels)), part
        assert len({row.input for row in rows}) == count


@pytest.mark.parametrize("task", PARTS)
def test_demo_splits_share_no_near_duplicates(task):
    """Near-duplicates share half of the words of both texts, or six words in a row."""
    texts = [(part, re.findall(r"[\w']+", row.input.lower())) for part in PARTS[task] for row in read(f"{task}.{part}")]
    sets = [(part, frozenset(words)) for part, words in texts]
    for (part, a), (other, b) in itertools.combinations(sets, 2):
        assert part == other or 3 * len(a & b) < len(a) + len(b), (part, sorted(a), other, sorted(b))
    runs = {}
    for part, words in texts:
        for run in zip(*(words[i:] for i in range(6)), strict=False):
            assert runs.setdefault(run, part) == part, " ".join(run)


@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.jsonl"])
def test_a_field_may_be_as_long_as_a_document(tmp_path, name):
    text, path = "word " * 30_000, tmp_path / name
    sign = "," if name.endswith("csv") else "\t"
    rows = f"input{sign}target\n{text}{sign}short\n"
    path.write_text(json.dumps({"input": text, "target": "short"}) if name.endswith("jsonl") else rows)
    assert tables.read_rows(path) == [Row(text.strip(), "short")]


@examples(30)
@given(counts=st.lists(st.integers(1, 30), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_split_keeps_the_shares_of_the_targets(counts, seed):
    rows = [Row(f"{target} {i}", str(target)) for target, n in enumerate(counts) for i in range(n)]
    train, dev = data.split(rows, 0.2, seed)
    assert sorted(train + dev) == sorted(rows)
    assert len(dev) == max(1, round(0.2 * len(rows)))
    for target, n in enumerate(counts):
        assert abs(sum(row.target == str(target) for row in dev) - 0.2 * n) <= 1.5 + 0.5 * len(counts)
    if len(rows) > 1:
        assert data.split(rows, 0.2, seed) == (train, dev)
    if len(rows) > 20:
        assert any(data.split(rows, 0.2, other)[1] != dev for other in range(seed + 1, seed + 5))


def test_a_too_large_file_of_rows_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.tsv"
    with path.open("wb") as file:
        file.truncate(2**28 + 1)  # a sparse file
    with pytest.raises(DataError, match=re.escape(f"{path}: contains more than 268,435,456 bytes, the limit")):
        tables.read_text(path)
    monkeypatch.setattr(tables, "LARGEST", 10)
    path.write_text("x" * 10)
    assert tables.read_text(path) == "x" * 10
    path.write_text("x" * 11)
    with pytest.raises(DataError, match="contains more than 10 bytes"):
        tables.read_text(path)


@given(lengths=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9)), min_size=1, max_size=5))
def test_a_batch_is_as_wide_as_its_longest_row(lengths):
    batch = data.batch_of([Row("x" * n, "y" * m) for n, m in lengths], WORDS, 20)
    single = next(data.training_batches([Row("x" * n, "y" * m) for n, m in lengths], WORDS, Settings(batch_size=1)))
    for ids, tokens in (
        (batch.input_ids, batch.attention_mask),
        (batch.labels, batch.weights),
        (single.input_ids, single.attention_mask),
        (single.labels, single.weights),
    ):
        assert ids.shape[1] == data.width(int(tokens.sum(1).max()))


def test_a_random_batch_has_every_kind_of_padding():
    seen, widths = set(), set()
    for seed in range(60):
        ids, mask, labels, weights = data.random_batch(9, 4, 6, 5, seed)
        assert ids.shape == mask.shape == (4, 6)
        assert labels.shape == weights.shape == (4, 5)
        assert mask[0].all()
        assert weights[0].all()
        assert all((row[:-1] >= row[1:]).all() for row in (*mask[:-1], *weights))  # padding on the right
        assert (mask[-1][:-1] <= mask[-1][1:]).all()  # one row is padded on the left
        assert ((ids > 0) == mask).all()
        assert ((labels > 0) == weights).all()
        seen |= {*ids[ids > 0].tolist(), *labels[labels > 0].tolist()}
        widths |= {*mask[1:].sum(1).tolist()}
    assert seen == set(range(3, 9))
    assert widths == set(range(1, 7))
    assert all(
        (x == y).all() for x, y in zip(data.random_batch(9, 4, 6, 5), data.random_batch(9, 4, 6, 5, 0), strict=True)
    )
    assert data.random_batch(9, 1, 6, 5).attention_mask.all()
    masks = [data.random_batch(9, 2, 6, 5, seed).attention_mask for seed in range(20)]
    assert all(mask[0].all() and mask[1, -1] for mask in masks)
    assert not all(mask[1, 0] for mask in masks)


def test_a_column_name_may_contain_a_semicolon(write):
    assert tables.read_rows(write("a.csv", "a;b\nc\n"), "a;b", None) == [Row("c", "")]


def test_a_lone_surrogate_in_a_file_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"input": "fine", "target": "x"}\n{"input": "\\ud83d", "target": "x"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl: row 2: contains .ud83d, an unpaired surrogate"):
        tables.read_rows(tmp_path / "a.jsonl")


def test_a_too_long_target_is_named(tmp_path):
    (tmp_path / "a.tsv").write_text("input\ttarget\na\t" + "b" * 10_000 + "\nc\t" + "d" * 10_001 + "\n")
    with pytest.raises(DataError, match=r"a\.tsv: row 3: column 'target': a target of 10,001 characters; at most"):
        tables.read_rows(tmp_path / "a.tsv")


def test_a_rare_target_is_among_the_dev_rows():
    rows = [Row(f"a {i}", "often") for i in range(10)] + [Row(f"b {i}", "rare") for i in range(2)]
    for seed in range(20):
        dev = [row.target for row in data.split(rows, 1 / 3, seed)[1]]
        assert (dev.count("often"), dev.count("rare")) == (3, 1)
