"""A real OpenAI-compatible server that follows a script, for the tests of judges."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from heatbath.verify import judge as mt
from heatbath.verify.endpoint import Endpoint
from heatbath.verify.judge import Question

KEY = "sk-secret-0123456789"
Script = Callable[[dict, int], tuple[int, dict, str]]  # (request, its number) → status, headers, body


def said(text: str, finish: str = "stop") -> tuple[int, dict, str]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return 200, {}, json.dumps({"model": "judge-0613", "choices": [choice]})


def failed(status: int, message: str, **headers: str) -> tuple[int, dict, str]:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, names, json.dumps({"error": {"message": message, "type": "x"}})


def stars(request: dict) -> int:
    """The deterministic judge: a rating by the content of what it is asked."""
    return 1 + hashlib.sha256(request["messages"][-1]["content"].encode()).digest()[0] % 10


def rates(request: dict, number: int) -> tuple[int, dict, str]:
    return said(f"Decent.\nRating: [[{stars(request)}]]")


class Server:
    """An OpenAI-compatible server that follows a script, and remembers what it was asked and how much at once."""

    def __init__(self, script: Script):
        self.script, self.requests, self.keys = script, [], []
        self.now, self.most, self.lock = 0, 0, threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                outer.serve(self)

            def log_message(self, *_: object) -> None:
                pass

        class Listener(ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None:  # a client that was killed
                pass

        self.http = Listener(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        request = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            self.requests.append(request)
            self.keys.append(handler.headers.get("Authorization"))
            number, self.now = len(self.requests), self.now + 1
            self.most = max(self.most, self.now)
        status, headers, body = self.script(request, number)
        with self.lock:
            self.now -= 1
        if status == 0:  # hangs up
            handler.close_connection = True
            return
        content = body.encode()
        handler.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content)


def endpoint(server: Server, **settings: object) -> Endpoint:
    return Endpoint(server.url, "judge", **{"first_wait": 0.001, "timeout": 20.0, **settings})


def asking(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def questions(count: int = 6) -> list[Question]:
    names = [mt.CATEGORIES[i % len(mt.CATEGORIES)] for i in range(count)]
    return [
        Question(i, name, (f"ask {i}?", f"and {i}?"), (f"ref {i}", f"ref {i}b") if name in mt.NEED_REFERENCE else None)
        for i, name in enumerate(names)
    ]


def answers(asked: list[Question], tag: str = "") -> dict[int, tuple[str, ...]]:
    return {q.id: (f"one{tag} {q.id} {{x}}", f"two{tag} {q.id}") for q in asked}


@pytest.fixture(name="serving")
def script_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Script], Server]]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    started: list[Server] = []

    def start(script: Script) -> Server:
        started.append(Server(script))
        return started[-1]

    yield start
    for server in started:
        server.http.shutdown()
        server.http.server_close()
