"""Answers over HTTP: batches, refusals, changing prompts, signals, and the documentation."""

import contextlib
import importlib
import json
import os
import re
import shutil
import signal
import socket
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import fields

import files
import hostile
import pytest
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples
from serving import JSON as AS_JSON
from serving import ROOT, post, random_prompt, request_body, running_server, small_model, three_prompts
from tuning import prompt_of

from tinyprompt.cli.main import main
from tinyprompt.files import models
from tinyprompt.files.prompts import Prompts, save_prompt
from tinyprompt.methods import init_params
from tinyprompt.predict import answer
from tinyprompt.serve.batcher import Batcher, Full
from tinyprompt.serve.limits import Limits
from tinyprompt.settings import Settings

WHY = "needs the extra serve: pip install '.[serve,test]'"
pytest.importorskip("uvicorn", reason=WHY)
pytest.importorskip("prometheus_client", reason=WHY)
TestClient = pytest.importorskip("starlette.testclient", reason=WHY).TestClient
app = importlib.import_module("tinyprompt.serve.app")
HERE, Service = app.HERE, app.Service

QUICK = Limits(
    max_bytes=20_000,
    max_rows=8,
    max_characters=100,
    max_waiting=16,
    batch_rows=4,
    batch_wait=0.0,
    timeout=5.0,
    reload_every=0.05,
)

# ---- batches ----


@given(
    st.lists(st.lists(st.integers(0, 40), max_size=9), max_size=12),
    st.integers(1, 8),
    st.sampled_from([0.0, 0.001]),
    st.sets(st.integers(0, 40), max_size=2),
)
@examples(40)
def test_every_request_gets_its_own_results_in_order(requests, size, wait, bad):
    sizes = []

    def work(rows):
        sizes.append(len(rows))
        if bad & set(rows):
            raise ValueError("bad row")
        return [2 * row for row in rows]

    batcher = Batcher(work, Limits(batch_rows=size, batch_wait=wait))
    futures = [batcher.submit(rows) for rows in requests]
    assert not wait_for(futures, 5).not_done
    for rows, future in zip(requests, futures, strict=True):
        if bad & set(rows):
            with pytest.raises(ValueError, match="bad row"):
                future.result(5)
        else:
            assert future.result(5) == [2 * row for row in rows]
    batcher.close()
    assert not batcher.alive
    assert max(sizes, default=1) <= size


class Gate:
    """A work function that waits for a signal and records its batches."""

    def __init__(self):
        self.batches, self.begun, self.open = [], threading.Semaphore(0), threading.Event()

    def __call__(self, rows):
        self.batches.append(rows)
        self.begun.release()
        assert self.open.wait(5)
        return rows


def blocked_batcher(limits):
    """Return a batcher whose thread is blocked by a first row."""
    gate = Gate()
    batcher = Batcher(gate, limits)
    first = batcher.submit([0])
    assert gate.begun.acquire(timeout=5)
    return batcher, gate, first


def test_requests_that_arrive_together_share_a_batch():
    batcher, gate, _ = blocked_batcher(Limits(batch_rows=5, batch_wait=0.0))
    last = [batcher.submit(rows) for rows in ([1], [2, 3], [4, 5, 6])][-1]
    gate.open.set()
    assert last.result(5) == [4, 5, 6]
    assert gate.batches == [[0], [1, 2, 3, 4, 5], [6]]
    batcher.close()


def test_a_row_waits_briefly_for_more_rows():
    gate = Gate()
    gate.open.set()
    batcher = Batcher(gate, Limits(batch_rows=2, batch_wait=0.3))
    started = time.monotonic()
    batcher.submit([1])
    batcher.submit([2]).result(5)
    assert time.monotonic() - started < 0.25  # a full batch does not wait
    assert gate.batches == [[1, 2]]
    started = time.monotonic()
    batcher.submit([3]).result(5)
    assert 0.25 < time.monotonic() - started < 3
    batcher.close()


def test_the_queue_is_bounded_and_urgent_rows_come_first():
    batcher, gate, first = blocked_batcher(Limits(max_waiting=3, max_rows=3, batch_rows=1))
    kept = batcher.submit([1, 2])
    with pytest.raises(Full):
        batcher.submit([3, 4])
    assert batcher.waiting == 2
    batcher.submit([3])
    urgent = batcher.submit([9, 8], urgent=True)
    gate.open.set()
    assert [x.result(5) for x in (first, kept, urgent)] == [[0], [1, 2], [9, 8]]
    batcher.close()
    assert gate.batches == [[0], [9], [8], [1], [2], [3]]
    with pytest.raises(Full):
        batcher.submit([1])


def test_cancelled_rows_are_not_computed_and_take_no_room():
    batcher, gate, _ = blocked_batcher(Limits(batch_rows=4, max_waiting=3, max_rows=3))
    gone, kept = batcher.submit([1, 2]), batcher.submit([3])
    assert gone.cancel()
    late = batcher.submit([4])
    assert late.cancel()
    gate.open.set()
    assert kept.result(5) == [3]
    with pytest.raises(CancelledError):
        gone.result(5)
    batcher.close()
    assert gate.batches == [[0], [3]]


@pytest.mark.parametrize("fault", [MemoryError("no room"), type("PanicException", (BaseException,), {})("a panic")])
def test_the_thread_survives_any_error(fault):
    def work(rows):
        if rows == ["bad"]:
            raise fault
        return [] if "short" in rows else rows

    batcher = Batcher(work, Limits(batch_wait=0.0))
    for row, kind in (("bad", type(fault)), ("short", ValueError)):
        with pytest.raises(kind):
            batcher.submit([row]).result(5)
    assert batcher.submit(["good"]).result(5) == ["good"]
    batcher.close()


@pytest.mark.parametrize(
    "wrong", [dict(max_rows=0), dict(timeout=0.0), dict(batch_wait=-1.0), dict(max_rows=9, max_waiting=8)]
)
def test_an_invalid_limit_is_named(wrong):
    with pytest.raises(ValueError, match="|".join(f"setting {name}: expected" for name in wrong)):
        Limits(**wrong)


# ---- requests ----


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return three_prompts(model, tmp_path_factory.mktemp("prompts"))


@contextlib.contextmanager
def serving(model, folder, limits=QUICK, log=None):
    service = Service(model, Prompts(folder, model), limits, "numpy", (log if log is not None else []).append)
    with TestClient(service.app(), headers=AS_JSON) as client:
        client.service = service
        yield client


@pytest.fixture(scope="module")
def client(model, folder):
    with serving(model, folder) as client:
        yield client


def assert_near(found, wanted):
    assert [found_answer["text"] for found_answer in found] == [found_answer.text for found_answer in wanted]
    for found_answer, wanted_answer in zip(found, wanted, strict=True):
        assert found_answer["probabilities"] == pytest.approx(wanted_answer.probabilities, abs=1e-5)


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30).filter(str.strip)


@given(data=st.data())
@examples(15)
def test_an_answer_over_http_equals_python(client, model, data):
    tasks = st.sampled_from(["topic", "sentiment", "free"])
    pairs = data.draw(st.lists(st.tuples(tasks, TEXTS), min_size=1, max_size=8))
    reply = client.post("/predict", json=request_body(*pairs))
    assert reply.status_code == 200
    assert_near(
        reply.json()["answers"], answer(model, [(client.service.tasks[task], text) for task, text in pairs], "numpy")
    )


def test_unusual_texts_are_answered(client):
    for text in ("\0", "\u202e", "e\u0301\U0001f35c" * 10, "</script>", "%s{0}"):
        assert client.post("/predict", json=request_body(("topic", text))).status_code == 200
    same = client.post("/predict", json=request_body(("topic", "soup"), ("topic", "soup"))).json()["answers"]
    assert same[0] == same[1]


REFUSED = {
    "not JSON": (b"rows", 400, "not valid JSON"),
    "an empty body": (b"", 400, "not valid JSON"),
    "not UTF-8": (b'{"rows": "\xff"}', 400, "not valid JSON"),
    "deep nesting": (b"[" * 19_000, 400, "not valid JSON"),
    "a long number": (b"1" * 19_000, 400, "not valid JSON"),
    "a key twice": (b'{"rows": [{"task": "a", "task": "b", "input": ""}]}', 400, "a key occurs twice"),
    "a list": (b"[1]", 422, "expected an object with 'rows', found [1]"),
    "null": (b"null", 422, "found None"),
    "another key": (b'{"texts": []}', 422, "found the keys 'texts'"),
    "an additional key": (b'{"rows": [], "x": 1}', 422, "found the keys 'rows', 'x'"),
    "rows that are not a list": (b'{"rows": {}}', 422, "'rows': expected a list, found {}"),
    "zero rows": (b'{"rows": []}', 422, "expected 1 to 8, found 0"),
    "too many rows": (json.dumps(request_body(*[("topic", "x")] * 9)).encode(), 422, "expected 1 to 8, found 9"),
    "a row that is a text": (b'{"rows": ["soup"]}', 422, "row 1: expected an object with 'task' and 'input'"),
    "a row without input": (b'{"rows": [{"task": "topic"}]}', 422, "row 1: expected an object"),
    "an input that is a number": (b'{"rows": [{"task": "topic", "input": 1}]}', 422, "'input': expected a text"),
    "a task that is null": (b'{"rows": [{"task": null, "input": ""}]}', 422, "'task': expected a text, found None"),
    "an unknown task": (
        json.dumps(request_body(("topic", "soup"), ("x", ""))).encode(),
        404,
        "row 2: no task 'x'; the tasks are",
    ),
    "a surrogate in a task": (b'{"rows": [{"task": "\\ud800", "input": ""}]}', 404, r"no task '\ud800'"),
    "a surrogate in an input": (b'{"rows": [{"task": "topic", "input": "\\ud800"}]}', 422, "an unpaired surrogate"),
    "a long row": (json.dumps(request_body(("topic", "x" * 101))).encode(), 422, "has 101 characters; at most 100"),
    "a long task": (json.dumps(request_body(("t" * 9999, ""))).encode(), 404, "row 1: no task"),
    "NaN": (b'{"rows": [NaN]}', 400, "NaN is not JSON"),
    "infinity": (b'{"rows": -Infinity}', 400, "-Infinity is not JSON"),
    "many keys": (json.dumps(dict.fromkeys(map(str, range(1000)), 1)).encode(), 422, "'3', '4', ..."),
    "long keys": (json.dumps({"k" * 3000 + str(i): 1 for i in range(5)}).encode(), 422, "found the keys 'kkk"),
    "a deep task": (b'{"rows": [{"task": ' + b"[" * 400 + b"]" * 400 + b', "input": "a"}]}', 422, "expected a text"),
    "a surrogate in a key": (b'{"\\ud800": 1}', 422, r"the keys '\ud800'"),
    "an empty text": (
        json.dumps(request_body(("topic", "soup"), ("topic", ""))).encode(),
        422,
        "row 2: 'input' is empty",
    ),
    "white space": (json.dumps(request_body(("topic", " \n\u3000"))).encode(), 422, "row 1: 'input' is empty"),
    "a large body": (b" " * 20_001, 413, "more than 20,000 bytes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_invalid_requests_are_refused_with_a_reason(client, case):
    body, status, message = REFUSED[case]
    reply = client.post("/predict", content=body)
    assert reply.status_code == status
    assert reply.json().keys() == {"error"}
    assert message in reply.json()["error"]
    assert len(reply.json()["error"]) < 410


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["topic", "rows", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["rows", "task", "input", "x"]), inner, max_size=3)
        | st.fixed_dictionaries({"rows": st.lists(st.fixed_dictionaries({"task": inner, "input": inner}), max_size=3)})
    ),
    max_leaves=8,
)


@given(JSON | st.binary(max_size=50))
@examples(100)
def test_any_body_gets_one_json_object(client, value):
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    reply = client.post("/predict", content=body)
    assert reply.status_code in (200, 400, 404, 422)
    assert reply.json().keys() == {"answers" if reply.status_code == 200 else "error"}


def test_a_file_name_may_be_invalid_utf8(model, folder, tmp_path):
    at = shutil.copytree(folder, tmp_path / "p")
    try:
        shutil.copy(at / "topic.safetensors", os.fsencode(at / "x") + b"\xff.safetensors")
    except OSError:
        pytest.skip("this file system has only names in UTF-8")
    with serving(model, at) as client:
        (name,) = {task["task"] for task in client.get("/tasks").json()["tasks"]} - {"topic", "sentiment", "free"}
        assert client.post("/predict", content=json.dumps(request_body((name, "soup")))).status_code == 200
        assert (
            client.post("/predict", json=request_body(("none", "soup")))
            .json()["error"]
            .endswith(r"'topic', 'x\udcff'; see /tasks")
        )
        assert 'task="x\\\\udcff"' in client.get("/metrics").text


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({"Content-Encoding": "gzip"}, "Content-Encoding: expected none, found 'gzip'"),
        ({"Content-Encoding": "br, gzip"}, "'br, gzip'"),
        ({"Content-Encoding": "x" * 5000}, "Content-Encoding: expected none"),
    ],
)
def test_a_compressed_body_is_refused_and_any_content_type_is_accepted(client, headers, message):
    reply = client.post("/predict", json=request_body(("topic", "soup")), headers=headers)
    assert reply.status_code == 415
    assert message in reply.json()["error"]
    assert len(reply.json()["error"]) < 410
    for kind in ("application/json; charset=utf-8", "application/x-www-form-urlencoded", ""):
        right = {"Content-Type": kind, "Content-Encoding": "identity"}
        assert client.post("/predict", json=request_body(("topic", "soup")), headers=right).status_code == 200


LOCAL_ONLY = app.hosts_of("127.0.0.1", ["https://proxy.example:8443"])
SITES = {
    "a name of this machine": ({"Host": "localhost:8000"}, 200),
    "the name in capitals": ({"Host": "LocalHost"}, 200),
    "the loopback address": ({"Host": "127.0.0.1:1"}, 200),
    "the loopback address in IPv6": ({"Host": "[::1]:8000"}, 200),
    "the server's page": (
        {"Host": "localhost:8000", "Origin": "http://localhost:8000", "Sec-Fetch-Site": "same-origin"},
        200,
    ),
    "an address typed into the browser": ({"Host": "localhost", "Sec-Fetch-Site": "none"}, 200),
    "a proxy": ({"Host": "proxy.example", "Origin": "https://proxy.example:8443"}, 200),
    "a proxy under our name": ({"Host": "localhost", "Origin": "https://proxy.example:8443"}, 200),
    "an allowed site": (
        {"Host": "localhost", "Origin": "https://proxy.example:8443", "Sec-Fetch-Site": "cross-site"},
        200,
    ),
    "rebinding": ({"Host": "evil.example:8000"}, 403),
    "rebinding, with an origin": ({"Host": "evil.example", "Origin": "http://evil.example"}, 403),
    "a name that begins with localhost": ({"Host": "localhost.evil.example"}, 403),
    "a name that ends with localhost": ({"Host": "evil.localhost"}, 403),
    "two ports": ({"Host": "localhost:1:2"}, 403),
    "an empty name": ({"Host": ""}, 403),
    "a long name": ({"Host": "x" * 9000}, 403),
    "another site": ({"Host": "localhost", "Origin": "https://evil.example"}, 403),
    "another port": ({"Host": "localhost:8000", "Origin": "http://localhost:3000"}, 403),
    "a local file": ({"Host": "localhost", "Origin": "null"}, 403),
    "a cross-site request without an origin": ({"Host": "localhost", "Sec-Fetch-Site": "cross-site"}, 403),
}


@pytest.mark.parametrize("case", SITES)
@pytest.mark.parametrize("path", ["/tasks", "/predict", "/metrics"])
def test_only_this_machine_and_allowed_sites_may_ask(client, case, path):
    headers, status = SITES[case]
    guarded = TestClient(client.service.app(LOCAL_ONLY, ["https://proxy.example:8443"]), headers=AS_JSON | headers)
    reply = guarded.post(path, json=request_body(("topic", "soup"))) if path == "/predict" else guarded.get(path)
    assert reply.status_code == status
    assert status == 200 or 0 < len(reply.json()["error"]) < 410
    assert reply.headers.get("access-control-allow-origin") in (None, "https://proxy.example:8443")


def test_other_sites_need_the_option_origin(client):
    asks = {
        "Origin": "https://site.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type",
        "Host": "localhost",
    }
    for origins, status in (((), 403), (["https://other.example"], 400), (["https://site.example"], 200)):
        hosts = app.hosts_of("::1", origins)
        reply = TestClient(client.service.app(hosts, origins)).options("/predict", headers=asks)
        assert reply.status_code == status
        assert (reply.headers.get("access-control-allow-origin") == "https://site.example") == (status == 200)
    assert app.hosts_of("0.0.0.0", []) == app.hosts_of("192.168.1.2", ["https://a.example"]) == []
    assert "127.0.0.2" in app.hosts_of("127.0.0.2", [])


def test_the_server_never_redirects(client):
    for path in ("/predict/", "/tasks/", "/docs/"):
        for reply in (client.get(path, follow_redirects=False), client.post(path, json={}, follow_redirects=False)):
            assert reply.status_code == 404


@pytest.mark.parametrize("path", ["/predict", "/none", "/../etc/passwd", "/page.html"])
def test_missing_pages_get_an_error(client, path):
    reply = client.get(path)
    assert reply.status_code == (405 if path == "/predict" else 404)
    assert "see /docs" in reply.json()["error"]


@pytest.mark.parametrize("path", ["/predict", "/health", "/none"])
def test_a_body_without_a_length_is_not_read(client, path):
    reply = client.post(path, content=iter([b" "] * 1000))
    assert reply.status_code == 411
    assert "Content-Length" in reply.json()["error"]


def test_a_full_queue_and_a_late_answer_are_reported(model, folder):
    with serving(model, folder, Limits(max_waiting=4, max_rows=4, batch_rows=1, batch_wait=0.0, timeout=0.5)) as client:
        gate, work = Gate(), client.service.batcher._work
        client.service.batcher._work = lambda rows: work(gate(rows))
        with ThreadPoolExecutor() as pool:
            late = pool.submit(client.post, "/predict", json=request_body(("topic", "a")))
            assert gate.begun.acquire(timeout=5)
            waits = pool.submit(client.post, "/predict", json=request_body(*[("topic", "b")] * 3))
            while client.service.batcher.waiting < 3:
                time.sleep(0.01)
            full = client.post("/predict", json=request_body(*[("topic", "c")] * 2))
            assert full.status_code == 503
            assert "3 rows are waiting, the limit is 4" in full.json()["error"]
            for reply in (late.result(), waits.result()):
                assert reply.status_code == 504
                assert "no answer within 0.5 s" in reply.json()["error"]
                assert reply.headers["retry-after"] == full.headers["retry-after"] == "1"
            gate.open.set()
        assert client.post("/predict", json=request_body(*[("topic", "d")] * 4)).status_code == 200
        assert sum(len(batch) for batch in gate.batches if batch[0][1] == "b") == 0  # their clients had left


def test_an_error_of_the_model_is_one_sentence(model, folder):
    with serving(model, folder) as client:

        def work(rows):
            known = {"known": "not\nfinite", "long": "x" * 9999}.get(rows[0][1])
            raise FloatingPointError(known) if known else KeyError("a fault")

        client.service.batcher._work = work
        reply = client.post("/predict", json=request_body(("topic", "known")))
        assert (reply.status_code, reply.json()) == (500, {"error": "not finite"})
        reply = client.post("/predict", json=request_body(("topic", "long")))
        assert (reply.status_code, reply.json()) == (500, {"error": f"{'x' * 400}..."})
        with pytest.raises(KeyError):
            client.post("/predict", json=request_body(("topic", "unknown")))  # raised here, and logged by a real server
        quiet = TestClient(client.app, raise_server_exceptions=False, headers=AS_JSON)
        reply = quiet.post("/predict", json=request_body(("topic", "unknown")))
        assert (reply.status_code, reply.json()) == (500, {"error": "internal server error; see the log of the server"})


def test_tasks_health_and_metrics(model, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "p")
    (tmp_path / "p" / "bad.npy").write_bytes(b"bad")
    with serving(model, tmp_path / "p") as client:
        found = client.get("/tasks").json()
        assert [task["task"] for task in found["tasks"]] == ["free", "sentiment", "topic"]
        assert [task["label_words"] for task in found["tasks"]] == [None, ["bad", "good"], ["food", "sport", "other"]]
        assert found["errors"].keys() == {"bad.npy"}
        assert client.get("/health").json() == {"status": "ok", "tasks": 3, "waiting": 0}
        client.post("/predict", json=request_body(("topic", "a"), ("topic", "b"), ("free", "c")))
        client.post("/predict", json=request_body(("none", "a")))
        client.get("/anything")
        text = client.get("/metrics").text
        for line in (
            'tinyprompt_requests_total{path="/predict",status="200"} 1.0',
            'tinyprompt_requests_total{path="/predict",status="404"} 1.0',
            'tinyprompt_requests_total{path="other",status="404"} 1.0',
            'tinyprompt_rows_total{task="topic"} 2.0',
            "tinyprompt_tasks 3.0",
            "tinyprompt_prompt_errors 1.0",
            "tinyprompt_batch_rows_count 4.0",  # three batches when the prompts were read
        ):
            assert f"\n{line}\n" in text
        client.service.batcher.close()
        assert client.get("/health").status_code == 503


def test_health_reports_changed_weights(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(models, "COPY", 0)  # map the weights, as for a large model
    at = files.write(tmp_path / "t5", files.SMALL, files.weights())
    with serving(models.load(at), folder) as client:
        files.write(at, files.SMALL, files.weights(seed=1))
        reply = client.get("/health")
        assert reply.status_code == 503
        assert "model.safetensors" in reply.json()["error"]


def test_the_api_schema_matches_the_server(client):
    schema = client.get("/openapi.json").json()
    served = {route.path: route.methods - {"HEAD"} for route in client.app.routes}
    for path in ("/", "/docs", "/style.css", "/openapi.json"):
        assert client.get(path).status_code == 200
        assert served.pop(path) == {"GET"}
    assert served == {path: {method.upper() for method in about} for path, about in schema["paths"].items()}
    parts = schema["components"]["schemas"]
    post = schema["paths"]["/predict"]["post"]
    reply = client.post("/predict", json=post["requestBody"]["content"]["application/json"]["example"])
    assert set(reply.json()) == set(parts["Answers"]["required"])
    assert set(reply.json()["answers"][0]) == set(parts["Answers"]["properties"]["answers"]["items"]["required"])
    assert set(client.get("/tasks").json()) == set(parts["Tasks"]["required"])
    assert set(client.get("/tasks").json()["tasks"][0]) == set(
        parts["Tasks"]["properties"]["tasks"]["items"]["required"]
    )
    assert set(client.get("/health").json()) == set(parts["Health"]["required"])
    source = (HERE / "app.py").read_text(encoding="utf-8")
    statuses = set(re.findall(r"\b([45]\d\d)\b", source)) - {"405"}  # the documented paths do not return 405
    assert {status for status in post["responses"] if status != "200"} == statuses


def test_the_pages_load_nothing_external(client):
    for path in ("/", "/docs", "/style.css"):
        page = client.get(path)
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert not re.search(
            r"(?:src|href)=\"(?!data:|docs|\.|openapi|metrics|style)|https?://|@import|url\(", page.text
        )


# ---- changing prompts ----


def test_prompts_are_reloaded_and_never_partially(model, folder, tmp_path):
    at, log = shutil.copytree(folder, tmp_path / "p"), []
    other, path = random_prompt(model, ("food", "sport", "other"), 7), at / "topic.safetensors"
    whole = save_prompt(other, tmp_path / "other.safetensors").read_bytes()
    old = Prompts(folder, model)["topic"]

    def asked(client):
        assert_near(
            client.post("/predict", json=request_body(("topic", "soup"))).json()["answers"],
            answer(model, [(now, "soup")]),
        )

    def until(line):
        deadline = time.monotonic() + 5
        while line not in "\n".join(log):
            assert time.monotonic() < deadline, log
            time.sleep(0.01)

    with serving(model, at, log=log) as client:
        now = old
        asked(client)
        log.clear()
        path.write_bytes(whole[: len(whole) // 2])
        until("earlier prompts stay in use")
        asked(client)  # the earlier prompt is in use
        assert "topic.safetensors" in client.get("/tasks").json()["errors"]
        log.clear()
        path.write_bytes(whole)
        until("topic: ready")
        now = other
        asked(client)
        assert client.get("/tasks").json()["errors"] == {}
        path.unlink()
        until("topic: removed")
        assert client.post("/predict", json=request_body(("topic", "soup"))).status_code == 404
        log.clear()
        shutil.move(at, tmp_path / "away")
        until("expected a folder of prompts")
        assert client.post("/predict", json=request_body(("sentiment", "soup"))).status_code == 200
        shutil.move(tmp_path / "away", at)
        save_prompt(other, path)
        until("topic: ready")
        asked(client)


def test_an_error_while_prompts_are_read_is_logged_and_not_fatal(model, folder, tmp_path, monkeypatch):
    at, log = shutil.copytree(folder, tmp_path / "p"), []
    with serving(model, at, log=log) as client:
        right = client.service.prompts.refresh
        monkeypatch.setattr(client.service.prompts, "refresh", lambda: 1 / 0)
        deadline = time.monotonic() + 5
        while "ZeroDivisionError: division by zero" not in "\n".join(log):
            assert time.monotonic() < deadline
        monkeypatch.setattr(client.service.prompts, "refresh", right)
        (at / "topic.safetensors").rename(at / "other.safetensors")
        while "other: ready" not in log:
            assert time.monotonic() < deadline


def test_a_bad_entry_is_reported_once_and_does_not_affect_others(model, folder, tmp_path):
    at, log = shutil.copytree(folder, tmp_path / "p"), []
    os.mkfifo(at / "pipe.safetensors")
    (at / "folder.safetensors").mkdir()
    with serving(model, at, log=log) as client:
        (at / "later.npy").symlink_to("nowhere")
        shutil.copy(at / "topic.safetensors", at / "new.safetensors")
        deadline = time.monotonic() + 5
        while "new: ready" not in log or "later.npy" not in "\n".join(log):
            assert time.monotonic() < deadline
        time.sleep(5 * QUICK.reload_every)
        for name in ("pipe.safetensors", "folder.safetensors", "later.npy"):
            assert sum(f"warning: {at / name}" in line for line in log) == 1
        assert client.get("/tasks").json()["errors"].keys() == {"pipe.safetensors", "folder.safetensors", "later.npy"}


def test_a_deleted_prompt_leaves_no_counter(model, folder, tmp_path):
    at, log = shutil.copytree(folder, tmp_path / "p"), []
    with serving(model, at, log=log) as client:
        client.post("/predict", json=request_body(("topic", "soup"), ("free", "soup")))
        assert 'tinyprompt_rows_total{task="topic"} 1.0' in client.get("/metrics").text
        (at / "topic.safetensors").unlink()
        deadline = time.monotonic() + 5
        while "topic: removed" not in log:
            assert time.monotonic() < deadline
        found = client.get("/metrics").text
        assert 'task="topic"' not in found
        assert 'tinyprompt_rows_total{task="free"} 1.0' in found
        client.service.metrics.answered(["topic"], client.service.tasks)  # a late answer
        assert 'task="topic"' not in client.get("/metrics").text
        assert client.service.metrics.totals()["rows"] == 3


def test_a_prompt_that_cannot_answer_is_not_used(model, folder, tmp_path):
    at = shutil.copytree(folder, tmp_path / "p")
    settings = Settings(method="lora", rank=2)
    for name, words in (("lora", ("a", "b")), ("same", ("a", "a"))):
        lora = prompt_of(model, init_params(model, settings, ("a", "b")), words, settings)
        save_prompt(lora, at / f"{name}.safetensors")
    with serving(model, at) as client:
        found = client.get("/tasks").json()
        assert "same" not in [task["task"] for task in found["tasks"]]
        assert "label word 'a' is repeated" in found["errors"]["same"]
        assert client.post("/predict", json=request_body(("lora", "soup"))).json()["answers"][0]["text"] in ("a", "b")
        assert client.post("/predict", json=request_body(("topic", "soup"))).status_code == 200


# ---- a server in a child process ----

TIGHT = {"timeout": 0.5, "max-connections": 6, "batch-wait": 0.3, "batch-rows": 64, "max-rows": 40, "max-waiting": 400}


def raw(port, *parts, wait=0.0, timeout=8):
    """Send bytes; return the server's output until it closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as sock:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for part in parts:
                sock.sendall(part)
                time.sleep(wait)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while part := sock.recv(4096):
                received += part
        return received


HEAD = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %s\r\n\r\n"


@pytest.fixture(scope="module")
def tight_port(folder, tmp_path_factory):
    at = files.write(tmp_path_factory.mktemp("tight") / "t5", files.SMALL, files.weights())
    with running_server(at, folder, TIGHT) as (_, port):
        yield port


@pytest.mark.parametrize(
    ("parts", "wait", "status"),
    [
        ([HEAD % b"x"], 0, b"400"),
        ([HEAD % b"-1"], 0, b"400"),
        ([HEAD % b"99999999999"], 0, b"413"),
        ([HEAD % b"50", b'{"rows": '], 0, b"408"),  # shorter than announced
        ([HEAD % b"3000", *[b" "] * 30], 0.04, b"408"),  # too slow
        ([b"GET / HT"], 0, b""),  # an incomplete header
        ([], 0, b""),  # an empty request
        ([b"\x16\x03\x01\x02\x00\x01"], 0, b"400"),  # TLS
        ([b"GET /" + b"x" * 200_000 + b" HTTP/1.1\r\n"], 0, b"400"),
        ([b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"A: b\r\n" * 50_000], 0, b"400"),
    ],
)
def test_odd_clients_get_an_error_or_are_cut_off(tight_port, parts, wait, status):
    started = time.monotonic()
    received = raw(tight_port, *parts, wait=wait)
    assert received.partition(b" ")[2][:3] == status
    assert time.monotonic() - started < 4
    assert b"Traceback" not in received
    assert post(tight_port, request_body(("topic", "soup")))[0] == 200


def test_a_client_that_closes_its_sending_side_is_answered(tight_port):
    body = json.dumps(request_body(("topic", "soup"))).encode()
    request = HEAD % str(len(body)).encode() + body
    for asked in (1, 3):
        with socket.create_connection(("127.0.0.1", tight_port), timeout=4) as sock:
            sock.sendall(request * asked)
            sock.shutdown(socket.SHUT_WR)
            received = b"".join(iter(lambda: sock.recv(4096), b""))
        assert received.count(b"HTTP/1.1 200 OK") == asked
    with socket.create_connection(("127.0.0.1", tight_port), timeout=4) as sock:
        sock.sendall(request[:-1])
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(4096) == b""


def test_silent_connections_are_cut_off_soon(tight_port):
    found = hostile.silent(tight_port, 20)
    assert found["answered after"] < 3  # the keep-alive time is one second
    assert found["refused at once"] == 20 - TIGHT["max-connections"]


def test_one_byte_chunks_do_not_delay_other_clients(tight_port):
    found = hostile.chunks(tight_port, 100_000)
    assert found["status"] == 411
    assert found["slowest other"] < 0.9  # batches wait 0.3 s here


def test_dns_rebinding_is_refused(tight_port):
    found = hostile.rebinding(tight_port)
    assert found["answers"] == 0
    assert found["statuses"] == {403}
    assert found["own page"] == 200


def test_bad_requests_are_not_logged(folder, tmp_path):
    at = files.write(tmp_path / "t5", files.SMALL, files.weights())
    with running_server(at, folder, TIGHT) as (server, port):
        for _ in range(20):
            assert b" 400 " in raw(port, b"no HTTP\r\n\r\n")
            raw(port, b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
            post(port, {})
        server.terminate()
        server.wait(10)
        assert server.stderr.read().splitlines()[1:] == []


def test_the_limit_on_open_files_is_raised_or_refused(monkeypatch, folder, tmp_path, capsys):
    resource, raised = pytest.importorskip("resource"), []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: raised.append(limits))
    for soft, hard, times in ((4096, 4096, 0), (resource.RLIM_INFINITY, -1, 0), (256, 4096, 1)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, found=(soft, hard): found)
        app.check_open_files(Limits())
        assert len(raised) == times
    assert 2 * Limits().max_connections < raised[0][0] < 1024  # the usual limit suffices
    at = files.write(tmp_path / "t5", files.SMALL, files.weights())
    monkeypatch.undo()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    words = [str(folder), "--model", str(at), "--device", "numpy", f"--max-connections={max(limit, 2**20)}"]
    assert main(["serve", *words]) == 2
    assert "ulimit -n" in capsys.readouterr().err


@pytest.mark.parametrize(
    "url", ["example.org", "https://", "*", "https://*.example.org", "https://a.example/path", "null"]
)
def test_an_invalid_origin_is_refused(folder, url, capsys):
    assert main(["serve", str(folder), "--origin", url]) == 2
    assert (
        f"--origin: expected a scheme and a host, such as https://example.org, found {url!r}" in capsys.readouterr().err
    )


def test_a_client_that_does_not_read_is_cut_off(tight_port):
    asked = 4000
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(4)
        sock.connect(("127.0.0.1", tight_port))
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * asked)
            time.sleep(2.5)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while part := sock.recv(2**20):
                received += part
    assert received.count(b"HTTP/1.1 200") < asked
    assert post(tight_port, request_body(("topic", "soup")))[0] == 200


def test_a_client_that_disconnects_affects_no_one(tight_port):
    body = json.dumps(request_body(*[("topic", "soup")] * 20)).encode()
    for _ in range(4):
        with socket.create_connection(("127.0.0.1", tight_port)) as sock:
            sock.sendall(HEAD % str(len(body)).encode() + body[: len(body) // 2])
        with socket.create_connection(("127.0.0.1", tight_port)) as sock:
            sock.sendall(HEAD % str(len(body)).encode() + body)
    time.sleep(0.1)
    assert post(tight_port, request_body(("topic", "soup")))[0] == 200


def test_connections_are_bounded(tight_port):
    time.sleep(0.2)
    with contextlib.ExitStack() as stack:
        for _ in range(6):
            stack.enter_context(socket.create_connection(("127.0.0.1", tight_port)))
        time.sleep(0.1)
        status, reply = post(tight_port, request_body(("topic", "soup")))
        assert status == 503
        assert "6 connections are open" in reply["error"]
    time.sleep(0.1)
    assert post(tight_port, request_body(("topic", "soup")))[0] == 200


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_stops_the_server_after_pending_answers(folder, tmp_path, name):
    at = files.write(tmp_path / "t5", files.SMALL, files.weights())
    options = {"batch-wait": 1, "batch-rows": 400, "max-waiting": 400}
    with running_server(at, folder, options) as (server, port):
        with ThreadPoolExecutor(10) as pool:
            asked = [pool.submit(post, port, request_body(*[("topic", f"soup {i}")] * 4)) for i in range(10)]
            time.sleep(0.5)
            server.send_signal(getattr(signal, name))
            time.sleep(0.2)
            with pytest.raises(ConnectionRefusedError):
                post(port, request_body(("topic", "too late")))
            for future in asked:
                status, found = future.result(10)
                assert status == 200
                assert len(found["answers"]) == 4
        assert server.wait(5) == 0
        assert "Traceback" not in server.stderr.read()


def test_serve_fails_in_one_line(folder, tmp_path, capsys, monkeypatch):
    at = str(files.write(tmp_path / "t5", files.SMALL, files.weights()))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for words, message in (
            ([str(folder), "--port", port], f"127.0.0.1:{port}: cannot be served at (Address already in use"),
            ([str(folder), "--port", "99999"], "99999: cannot be served at"),
            ([str(folder), "--host", "no.such.host.invalid"], "no.such.host.invalid:8000: cannot be served at"),
            ([str(tmp_path / "none")], "none: expected a folder of prompts"),
            ([str(folder), "--max-rows", "0"], "setting max_rows: expected at least 1"),
        ):
            assert main(["serve", *words, "--model", at, "--device", "numpy"]) == 2
            assert message in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["serve", str(folder), "--model", at, "--device", "numpy"]) == 2
    assert "pip install 'tinyprompt-t5[serve]'" in capsys.readouterr().err


# ---- the guide ----

GUIDE = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")


def test_the_requests_of_the_guide_work(tight_port, capsys):
    guide = GUIDE.replace("127.0.0.1:8000", f"127.0.0.1:{tight_port}")
    (body,) = re.findall(r"curl \S+/predict -H '\S+ \S+' --data '(.*)'", guide)
    status, found = post(tight_port, json.loads(body))
    assert (status, len(found["answers"])) == (200, 1)
    (snippet,) = re.findall(r"```py\n(.*?)```", guide, re.S)
    exec(snippet, {})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["topic", "sentiment"]


def test_the_guide_lists_every_limit_and_status(client):
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in GUIDE.splitlines() if line[:1] == "|"]
    limits = [[f"--{f.name.replace('_', '-')}", str(f.default), f.metadata["help"]] for f in fields(Limits)]
    assert [row for row in rows if re.match(r"--\w", row[0])] == limits
    answers = client.get("/openapi.json").json()["paths"]["/predict"]["post"]["responses"]
    descriptions = {status: about["description"] for status, about in answers.items() if status not in ("200", "500")}
    assert {row[0]: row[1].partition("; `Retry")[0] for row in rows if row[0].isdigit()} == descriptions
