"""The client: order, retries, refusals, the cache; against a real HTTP server."""

import email.utils
import json
import threading
import time
from pathlib import Path

import pytest
from judge_server import (
    KEY,
    asking,
    endpoint,
    failed,
    rates,
    said,
    script_server,  # noqa: F401 - the fixture `serving`
)

from heatbath.errors import HeatbathError, RecipeError, RunError
from heatbath.verify.endpoint import Endpoint, RefusalError, _retry_after


def test_replies_come_in_order_and_no_more_than_asked_are_in_flight(serving) -> None:
    def script(request: dict, number: int) -> tuple[int, dict, str]:
        time.sleep(0.02 * (number % 3))
        return said(request["messages"][0]["content"].upper())

    server = serving(script)
    seen: list[tuple[int, int]] = []
    replies = endpoint(server, concurrency=3).answers(
        [asking(f"q{i}") for i in range(20)], progress=lambda done, total: seen.append((done, total))
    )
    assert [reply.text for reply in replies] == [f"Q{i}" for i in range(20)]
    assert {reply.served for reply in replies} == {"judge-0613"}
    assert seen == [(i, 20) for i in range(1, 21)]
    assert server.most <= 3
    assert set(server.keys) == {f"Bearer {KEY}"}
    assert server.requests[0].keys() == {"model", "messages", "temperature", "max_tokens"}


def test_threads_share_the_limit(serving) -> None:
    def script(request: dict, number: int) -> tuple[int, dict, str]:
        time.sleep(0.03)
        return said("x")

    server = serving(script)
    client = endpoint(server, concurrency=2)
    threads = [threading.Thread(target=client.answer, args=(asking(str(i)),)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.requests) == 8 and server.most <= 2


@pytest.mark.parametrize(
    "trouble",
    [
        failed(429, "slow down", Retry_After="0.02"),
        failed(500, "oops"),
        failed(503, "loading"),
        (200, {}, "<html>a proxy's page</html>"),
        (200, {}, '{"error": {"message": "upstream"}}'),
        (200, {}, '{"choices": []}'),
        (200, {}, '["a list"]'),
        (0, {}, ""),
    ],
    ids=["429", "500", "503", "html", "error-in-200", "no-choice", "list", "hang-up"],
)
def test_passing_trouble_is_tried_again(serving, trouble: tuple[int, dict, str], tmp_path: Path) -> None:
    server = serving(lambda request, number: trouble if number <= 2 else said("at last"))
    assert endpoint(server, cache=tmp_path).answer(asking("q")).text == "at last"
    assert len(server.requests) == 3
    assert len(list(tmp_path.rglob("*.json"))) == 1  # the trouble itself was not kept


def test_a_hanging_server_is_given_up_and_asked_again(serving) -> None:
    released = threading.Event()

    def script(request: dict, number: int) -> tuple[int, dict, str]:
        if number == 1:
            released.wait(30)
        return said("awake")

    server = serving(script)
    assert endpoint(server, timeout=1.0).answer(asking("q")).text == "awake"
    released.set()
    assert len(server.requests) >= 2


def test_retry_after_is_honoured(serving) -> None:
    server = serving(lambda request, number: failed(429, "slow", Retry_After="0.5") if number == 1 else said("ok"))
    started = time.monotonic()
    assert endpoint(server).answer(asking("q")).text == "ok"
    assert time.monotonic() - started >= 0.5
    assert _retry_after("7") == 7.0
    assert 50 < _retry_after(email.utils.formatdate(time.time() + 60, usegmt=True)) <= 60
    assert [_retry_after(text) for text in ("", "soon", "-3", "nan", "inf")] == [0.0] * 5


def test_a_server_that_asks_for_hours_is_an_error(serving) -> None:
    server = serving(lambda request, number: failed(429, "daily limit", Retry_After="7200"))
    with pytest.raises(RunError, match=r"(?s)daily limit; the server asks to wait 7,200 seconds"):
        endpoint(server).answer(asking("q"))
    assert len(server.requests) == 1


def test_giving_up_names_url_tries_reason_and_remedy(serving) -> None:
    server = serving(lambda request, number: failed(500, "CUDA out of memory"))
    with pytest.raises(RunError) as caught:
        endpoint(server, retries=2).answer(asking("q"))
    text = str(caught.value)
    assert "3 tries" in text and "HTTP 500: CUDA out of memory" in text and server.url in text and "cache" in text
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("status", "remedy"),
    [(401, "$OPENAI_API_KEY"), (403, "$OPENAI_API_KEY"), (404, "/v1"), (400, "max_tokens = None"), (301, "redirect")],
)
def test_what_is_our_fault_is_said_at_once_and_never_with_the_key(serving, status: int, remedy: str) -> None:
    server = serving(lambda request, number: failed(status, f"no good: {KEY}", Location="http://elsewhere"))
    with pytest.raises(RunError) as caught:
        endpoint(server).answer(asking("q"))
    text = str(caught.value)
    assert f"HTTP {status}: no good: ***" in text and server.url in text and remedy in text
    assert KEY not in text and KEY not in repr(endpoint(server))
    assert len(server.requests) == 1
    assert isinstance(caught.value, RefusalError) == (status == 400)


def test_an_empty_purse_is_not_waited_for(serving) -> None:
    body = json.dumps({"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}})
    server = serving(lambda request, number: (429, {}, body))
    with pytest.raises(RunError, match="quota is used up"):
        endpoint(server).answer(asking("q"))
    assert len(server.requests) == 1


def test_nobody_listening_is_a_named_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    url = "http://user:password@127.0.0.1:9/v1"
    with pytest.raises(RunError) as caught:
        Endpoint(url, "judge", retries=1, first_wait=0.001, cache=tmp_path).answer(asking("q"))
    text = str(caught.value)
    assert "no connection" in text and "127.0.0.1:9" in text and "check that it runs" in text
    assert "password" not in text


@pytest.mark.parametrize("url", ["localhost:8000/v1", "", "ftp://x/v1"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(RecipeError, match="no address of a server"):
        Endpoint(url, "judge")


def test_a_local_server_needs_no_key(serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    server = serving(rates)
    endpoint(server).answer(asking("q"))
    assert server.keys == [None]


def test_the_cache_answers_by_content(serving, tmp_path: Path) -> None:
    server = serving(lambda request, number: said(f"reply {number} \ud83d\ude00 é"))
    first = endpoint(server, cache=tmp_path).answer(asking("q"))
    again = endpoint(server, cache=tmp_path).answer(asking("q"))  # another object: another process
    assert (first.cached, again.cached, len(server.requests)) == (False, True, 1)
    assert again.text == first.text and again.served == "judge-0613"
    others = [
        endpoint(server, cache=tmp_path, temperature=0.7),
        endpoint(server, cache=tmp_path, max_tokens=9),
        endpoint(server, cache=tmp_path, temperature=None, max_tokens=None, body={"max_completion_tokens": 9}),
        Endpoint(server.url, "another", cache=tmp_path),
    ]
    assert not any(other.answer(asking("q")).cached for other in others)
    assert not endpoint(server, cache=tmp_path).answer(asking("other")).cached
    assert not endpoint(server, cache=tmp_path).answer(asking("q"), attempt=1).cached
    assert endpoint(server, cache=tmp_path).answer(asking("q"), attempt=1).cached
    assert server.requests[3] == {"model": "judge", "messages": asking("q"), "max_completion_tokens": 9}
    kept = "".join(path.read_text() for path in tmp_path.rglob("*.json"))
    assert KEY not in kept and "reply 1" in kept


@pytest.mark.parametrize("rubbish", ["", '{"request": {', "[]", '{"request": {}, "reply": {}}'])
def test_a_broken_cache_file_is_asked_anew_and_mended(serving, tmp_path: Path, rubbish: str) -> None:
    server = serving(rates)
    client = endpoint(server, cache=tmp_path)
    client.answer(asking("q"))
    next(tmp_path.rglob("*.json")).write_text(rubbish)
    assert not client.answer(asking("q")).cached
    assert client.answer(asking("q")).cached


def test_a_refused_conversation_is_returned_where_asked_for_and_fails_the_rest_otherwise(serving) -> None:
    def script(request: dict, number: int) -> tuple[int, dict, str]:
        filtered = "bad" in request["messages"][0]["content"]
        return failed(400, "content filter") if filtered else said("fine")

    server = serving(script)
    replies = endpoint(server).answers([asking("good"), asking("bad"), asking("fine")], refused="return")
    assert isinstance(replies[1], RefusalError) and "content filter" in replies[1].what
    assert [reply.text for reply in (replies[0], replies[2])] == ["fine", "fine"]
    with pytest.raises(RefusalError):
        endpoint(server).answers([asking("good"), asking("bad")])


def test_the_first_failure_ends_the_rest(serving, tmp_path: Path) -> None:
    def script(request: dict, number: int) -> tuple[int, dict, str]:
        time.sleep(0.02)
        return said("x") if number <= 4 else failed(401, "expired")

    server = serving(script)
    with pytest.raises(RunError, match="expired"):
        endpoint(server, cache=tmp_path, concurrency=2).answers([asking(str(i)) for i in range(200)])
    assert len(server.requests) < 100
    assert len(list(tmp_path.rglob("*.json"))) == 4


def test_a_lone_surrogate_goes_through(serving, tmp_path: Path) -> None:
    server = serving(lambda request, number: said(f"{number}"))
    client = endpoint(server, cache=tmp_path)
    assert client.answer(asking("half \ud83d of it")).text == client.answer(asking("half \ud83d of it")).text


def test_every_error_has_a_remedy(serving) -> None:
    server = serving(lambda request, number: failed(418, "teapot"))
    with pytest.raises(HeatbathError) as caught:
        endpoint(server).answer(asking("q"))
    assert caught.value.remedy and caught.value.where and "teapot" in caught.value.what
