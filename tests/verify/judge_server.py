"""A real OpenAI-compatible server that follows a script, for the tests of judges."""

import hashlib
import json
from collections.abc import Callable, Iterator

import pytest

from heatbath.verify import judge as mt
from heatbath.verify.endpoint import Endpoint
from heatbath.verify.judge import Question
from scripted_server import (
    Script,
    Server,
    failed,  # noqa: F401 - for the tests
)

KEY = "sk-secret-0123456789"


def said(text: str, finish: str = "stop") -> tuple[int, dict, str]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return 200, {}, json.dumps({"model": "judge-0613", "choices": [choice]})


def stars(request: dict) -> int:
    """The deterministic judge: a rating by the content of what it is asked."""
    return 1 + hashlib.sha256(request["messages"][-1]["content"].encode()).digest()[0] % 10


def rates(request: dict, number: int) -> tuple[int, dict, str]:
    return said(f"Decent.\nRating: [[{stars(request)}]]")


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
        server.close()
