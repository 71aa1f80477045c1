"""Keys go into the header of a request and nowhere else: whatever a server does with them, no file and no output holds
them afterwards."""

import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from heatbath import addresses, cli
from heatbath import recipe as recipes
from heatbath.errors import RecipeError, RunError
from heatbath.verify import endpoint as endpoints
from heatbath.verify.endpoint import Endpoint
from scripted_server import Script, Server, failed

CANARY = "sk-canary-5d1c9a7e"
TOKEN = "hf_canary0f3b7712"
RECIPE = """\
model = "{base}"
precision = "fp32"

[data]
source = "arithmetic"
demos = 0
validation = 0
prompts = 0
test = 4

[eval]
engine = "api"
endpoint = "{url}"
served = {{ base = "m" }}
samples = 2
k = [1]
max_new_tokens = 4
batch = 2
"""


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Script], Server]]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name, value in {"OPENAI_API_KEY": CANARY, "HF_TOKEN": TOKEN, "HUGGING_FACE_HUB_TOKEN": TOKEN}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(endpoints, "LONGEST_BACKOFF", 0.001)
    started: list[Server] = []

    def start(script: Script) -> Server:
        started.append(Server(script))
        return started[-1]

    yield start
    for server in started:
        server.close()


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["heatbath", *arguments])
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    root.handlers = []  # basicConfig does nothing where pytest has handlers already
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        root.handlers, root.level = before, level
    return 0


def require_no_canary(folder: Path, *outputs: str) -> None:
    import gzip

    for text in outputs:
        assert CANARY not in text and TOKEN not in text
    looked = 0
    for path in folder.rglob("*"):
        if path.is_file():
            content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            assert CANARY.encode() not in content and TOKEN.encode() not in content, path
            looked += 1
    assert looked > 3


def completion(text: str) -> tuple[int, dict, str]:
    return 200, {}, json.dumps({"choices": [{"text": text, "finish_reason": "stop"}], "usage": {"prompt_tokens": 1}})


ECHO = f"you sent Authorization: Bearer {CANARY}"
FAILURES = {
    "500": failed(500, ECHO),
    "401": failed(401, f"Incorrect API key provided: {CANARY}"),
    "400": failed(400, ECHO),
    "headers": (503, {"X-Echo": CANARY, "Location": f"/{CANARY}"}, ECHO),
    "not json": (200, {}, f"<html>{ECHO}</html>"),
    "no choices": (200, {}, json.dumps({"error": {"message": ECHO}})),
    "strange end": (200, {}, json.dumps({"choices": [{"text": "1", "finish_reason": ECHO}]})),
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_an_evaluation_that_fails_with_the_key_in_the_answer(
    serving, monkeypatch, capsys, tmp_path: Path, small_base: Path, failure: tuple[int, dict, str]
) -> None:
    server = serving(lambda request, number: completion("5") if number <= 4 else failure)
    (tmp_path / "r.toml").write_text(RECIPE.format(base=small_base, url=server.url))
    code = call(monkeypatch, "eval", str(tmp_path / "r.toml"), "--out", str(tmp_path / "run"), "-v")
    out = capsys.readouterr()
    assert code == 1 and "error: " in out.err and "Traceback" in out.err
    assert f"Bearer {CANARY}" in server.keys  # it was sent
    require_no_canary(tmp_path, out.out, out.err)


def test_a_whole_evaluation_its_report_and_its_export(
    serving, monkeypatch, capsys, tmp_path: Path, small_base: Path
) -> None:
    """The server repeats the key inside completions: only it could, and a reader of the report must not get it."""
    server = serving(lambda request, number: completion(f"the key is {CANARY}, so 5"))
    (tmp_path / "r.toml").write_text(RECIPE.format(base=small_base, url=server.url))
    run = str(tmp_path / "run")
    said = []
    for arguments in (
        ("eval", str(tmp_path / "r.toml"), "--dry-run"),
        ("eval", str(tmp_path / "r.toml"), "--out", run, "-v"),
        ("eval", run, "--json"),
        ("eval", run, "--rescore", "--json"),
        ("report", run, "--json"),
        ("export", run, "--out", str(tmp_path / "exported"), "-v"),
        ("doctor", "--json"),
    ):
        assert call(monkeypatch, *arguments) == 0, arguments
        said += [*capsys.readouterr()]
    assert f"Bearer {CANARY}" in server.keys
    assert "the key is ***, so 5" in (tmp_path / "run" / "report.html").read_text()
    assert (tmp_path / "exported" / "README.md").is_file()
    require_no_canary(tmp_path, *said)


def test_a_judges_replies_are_kept_without_the_key(serving, tmp_path: Path) -> None:
    said = json.dumps({"choices": [{"message": {"content": f"[[5]] {CANARY}"}, "finish_reason": "stop"}]})
    server = serving(lambda request, number: (200, {}, said))
    reply = Endpoint(server.url, "judge", cache=tmp_path).answer([{"role": "user", "content": "x"}])
    assert reply.text == "[[5]] ***"
    assert any(tmp_path.rglob("*.json"))
    for path in tmp_path.rglob("*.json"):
        assert CANARY not in path.read_text()


def test_a_placeholder_for_a_key_does_not_change_answers(serving, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")
    said = json.dumps({"choices": [{"message": {"content": "an EMPTY list"}, "finish_reason": "stop"}]})
    server = serving(lambda request, number: (200, {}, said))
    assert Endpoint(server.url, "judge").answer([{"role": "user", "content": "x"}]).text == "an EMPTY list"


# --- in addresses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "table",
    [
        {"eval": {"engine": "api", "endpoint": f"https://me:{CANARY}@h/v1", "served": {"base": "m"}}},
        {"eval": {"judge": {"endpoint": f"https://{CANARY}@h/v1", "model": "j"}}},
    ],
    ids=["endpoint", "judge"],
)
def test_a_recipe_takes_no_address_with_a_password(table: dict) -> None:
    """It is copied into the run, the report and the model card."""
    with pytest.raises(RecipeError) as caught:
        recipes.parse({"model": "m", **table})
    assert "endpoint" in caught.value.what and "holds no name and password" in caught.value.what
    assert CANARY not in str(caught.value)


def test_an_address_with_a_password_is_used_and_not_logged(
    serving, monkeypatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    answer = json.dumps({"choices": [{"message": {"content": "[[5]]"}, "finish_reason": "stop"}]})
    server = serving(lambda request, number: (200, {}, answer) if number == 1 else failed(500, "no"))
    server_url = server.url.replace("//", f"//me:{CANARY}@")
    with caplog.at_level(logging.DEBUG):
        one = Endpoint(server_url, "judge", retries=0)
        assert one.answer([{"role": "user", "content": "x"}]).text == "[[5]]"
        with pytest.raises(RunError) as caught:
            one.answer([{"role": "user", "content": "y"}])
    assert server.keys[0].startswith("Basic ")
    assert any("POST" in record.getMessage() for record in caplog.records)  # the library does log addresses
    for text in (caplog.text, str(caught.value), repr(one), repr(vars(one)["base_url"])):
        assert CANARY not in text


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://me:pa@ss@h/v1", "https://***@h/v1"),
        ("no connection to http://u:p@h:1/v1, http://u@h", "no connection to http://***@h:1/v1, http://***@h"),
        ("https://h/v1/@x", "https://h/v1/@x"),
        ("mail@h", "mail@h"),
    ],
)
def test_what_stands_before_the_at_sign_is_not_shown(url: str, shown: str) -> None:
    assert addresses.without_credentials(url) == shown


def test_a_token_of_the_hub_has_no_place_in_a_recipe() -> None:
    with pytest.raises(RecipeError, match="hub_token cannot be set"):
        recipes.parse({"model": "m", "sft": {"trainer": {"hub_token": "x"}}})
