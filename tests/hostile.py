"""Attack a server, and check whether it still answers other clients.

    python tests/hostile.py silent        # 2,000 silent connections, more than the process may open files
    python tests/hostile.py chunks        # a body of 1,000,000 chunks of one byte
    python tests/hostile.py rebinding     # requests of pages from other sites, also with DNS rebinding

Each attack starts a server with a small model and prints figures. The exit status is 0 if the server passes.
"""

import argparse
import contextlib
import json
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from serving import post, request_body, running_server, small_model, three_prompts

OPEN_FILES = 1024  # a usual limit on the server's open files
SOUP = request_body(("topic", "soup"))


def ask(port):
    """Send one request; return its status and duration in seconds."""
    start = time.monotonic()
    try:
        status = post(port, SOUP, timeout=60)[0]
    except OSError:
        status = 0
    return status, time.monotonic() - start


def send_bytes(port, text):
    """Send some bytes; return the whole reply."""
    reply = b""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
        with contextlib.suppress(OSError):
            sock.sendall(text)
        with contextlib.suppress(OSError):
            while part := sock.recv(2**16):
                reply += part
    return reply


def request_head(request, *headers):
    """Return the head of a request."""
    return "\r\n".join([f"{request} HTTP/1.1", *headers, "", ""]).encode()


def status_of(reply):
    return int(reply.split(b" ", 2)[1]) if reply.startswith(b"HTTP/") else 0


def silent(port, count=2000):
    """Open silent connections. Ask until another client is answered."""
    with contextlib.ExitStack() as stack:
        start = time.monotonic()
        socks = [stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60)) for _ in range(count)]
        opened = time.monotonic()
        refused = []
        while (status := ask(port)[0]) != 200:
            refused.append(status)
            time.sleep(0.02)
        answered = time.monotonic()
        refused_at_once = 0
        for sock in socks:
            sock.setblocking(False)
            with contextlib.suppress(OSError):  # the server may have cut off the connection
                refused_at_once += sock.recv(16).startswith(b"HTTP/1.1 503")
    return {
        "connections": count,
        "opened in": round(opened - start, 2),
        "refused at once": refused_at_once,
        "answered after": round(answered - opened, 2),
        "asked to retry": len(refused),
        "lost": refused.count(0),
    }


def chunks(port, count=1_000_000):
    """Send a body in chunks of one byte. Ask from another client meanwhile."""
    head = "POST /predict", "Host: localhost", "Content-Type: application/json", "Transfer-Encoding: chunked"
    other_replies, done, reply = [], threading.Event(), []
    ask(port)

    def attack():
        start = time.monotonic()
        reply.extend(
            [send_bytes(port, request_head(*head) + b"1\r\n \r\n" * count + b"0\r\n\r\n"), time.monotonic() - start]
        )
        done.set()

    attacker = threading.Thread(target=attack)
    attacker.start()
    while not done.is_set() or not other_replies:
        other_replies.append(ask(port))
    attacker.join()
    return {
        "chunks": count,
        "status": status_of(reply[0]),
        "seconds": round(reply[1], 2),
        "others answered": sum(status == 200 for status, _ in other_replies),
        "others lost": sum(status != 200 for status, _ in other_replies),
        "slowest other": round(max(seconds for _, seconds in other_replies), 2),
    }


FOREIGN = [
    ("Host: evil.example",),
    ("Host: evil.example:{port}", "Origin: http://evil.example:{port}"),
    ("Host: localhost:{port}", "Origin: https://evil.example"),
    ("Host: localhost:{port}", "Origin: null"),
    ("Host: 127.0.0.1:{port}", "Sec-Fetch-Site: cross-site"),
]


def rebinding(port):
    """Send the requests that pages of other sites send, and those of the server's own page."""
    body = json.dumps(SOUP)
    kinds = ("application/json", "text/plain")

    def posted(kind, *who):
        about = f"Content-Length: {len(body)}", f"Content-Type: {kind}", "Connection: close"
        return request_head("POST /predict", *who, *about) + body.encode()

    foreign = [[line.format(port=port) for line in who] for who in FOREIGN]
    asked = [
        request_head(f"GET {path}", *who, "Connection: close")
        for who in foreign
        for path in ("/tasks", "/metrics", "/")
    ]
    asked += [posted(kind, *who) for who in foreign for kind in kinds]
    statuses = [status_of(send_bytes(port, text)) for text in asked]
    own = f"Host: localhost:{port}", f"Origin: http://localhost:{port}", "Sec-Fetch-Site: same-origin"
    return {
        "requests": len(asked),
        "answers": statuses.count(200),
        "statuses": set(statuses),
        "own page": status_of(send_bytes(port, posted(kinds[0], *own))),
    }


ATTACKS = {"silent": silent, "chunks": chunks, "rebinding": rebinding}
RIGHT = {
    "silent": lambda found: found["answered after"] < 10 and not found["lost"],
    "chunks": lambda found: found["status"] == 411 and found["slowest other"] < 1 and not found["others lost"],
    "rebinding": lambda found: not found["answers"] and found["own page"] == 200,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("attack", choices=ATTACKS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        three_prompts(small_model(folder), folder / "prompts")
        with running_server(folder / "t5", folder / "prompts", {}, OPEN_FILES) as (server, port):
            log: list[str] = []
            reader = threading.Thread(target=lambda: log.extend(server.stderr))
            reader.start()
            found = ATTACKS[args.attack](port)
            server.terminate()
            server.wait(60)
            reader.join()
    found["lines of log"] = len(log)
    print(f"{args.attack}: " + ", ".join(f"{value} {key}" for key, value in found.items()))
    return 0 if RIGHT[args.attack](found) and not found["lines of log"] else 1


if __name__ == "__main__":
    sys.exit(main())
