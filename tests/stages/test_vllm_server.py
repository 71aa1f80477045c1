"""What is asked before RL is sampled by vLLM: settings that fit together, the version, and the server."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from heatbath import doctor
from heatbath import recipe as recipes
from heatbath.errors import RecipeError
from heatbath.stages import vllm_server

WHOLE = {
    "/health": (200, {}),
    "/v1/models": (200, {"data": [{"id": "m", "max_model_len": 100}]}),
    "/server_info": (
        200,
        {
            "vllm_config": {
                "weight_transfer_config": {"backend": "nccl"},
                "model_config": {"logprobs_mode": "processed_logprobs"},
            }
        },
    ),
}


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict], str]]:
    """An HTTP server that answers GET as a table says."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(vllm_server, "has_cuda", lambda: True)
    monkeypatch.setattr(vllm_server, "installed", lambda: "0.31.0")
    started: list[ThreadingHTTPServer] = []

    def start(table: dict[str, tuple[int, Any]]) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, content = table.get(self.path.partition("?")[0], (404, {}))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(content).encode())

            def log_message(self, *_: object) -> None:
                pass

        started.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=started[-1].serve_forever, args=(0.02,), daemon=True).start()
        return f"http://127.0.0.1:{started[-1].server_port}"

    yield start
    for http in started:
        http.shutdown()
        http.server_close()


def recipe(trainer: dict[str, Any], **rl: Any) -> recipes.Recipe:
    return recipes.parse({"model": "org/m", "rl": {"max_new_tokens": 60, "trainer": trainer, **rl}})


def server(url: str, **more: Any) -> recipes.Recipe:
    return recipe({"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": url, **more})


# --- the server -----------------------------------------------------------------------------------------------------


def test_a_server_with_all_that_is_needed_passes(serving) -> None:
    assert vllm_server.require(server(serving(WHOLE)), 40) == []


def server_info(**changes: Any) -> tuple[int, Any]:
    return 200, {"vllm_config": {**WHOLE["/server_info"][1]["vllm_config"], **changes}}


@pytest.mark.parametrize(
    ("table", "says", "remedy"),
    [
        ({"/health": (503, {})}, "no vLLM server answers", "vllm serve org/m"),
        ({"/v1/models": (401, {"error": "Unauthorized"})}, "asks for a key", "without --api-key"),
        ({"/v1/models": (200, [])}, "lists no model", "vllm serve org/m"),
        ({"/server_info": (404, {})}, "no route by which weights", "VLLM_SERVER_DEV_MODE=1"),
        ({"/server_info": server_info(weight_transfer_config=None)}, "takes no weights", "--weight-transfer-config"),
        (
            {"/server_info": server_info(model_config={"logprobs_mode": "raw_logprobs"})},
            "log-probabilities before the temperature",
            "--logprobs-mode processed_logprobs",
        ),
        ({"/v1/models": (200, {"data": [{"max_model_len": 99}]})}, "refuses more than 99", "--max-model-len 100"),
    ],
)
def test_a_server_that_lacks_something_is_told_what(serving, table: dict, says: str, remedy: str) -> None:
    with pytest.raises(RecipeError) as caught:
        vllm_server.require(server(serving({**WHOLE, **table})), 40)
    assert says in caught.value.what and remedy in caught.value.remedy
    assert caught.value.where.startswith("rl.")


def test_without_the_correction_no_ratio_can_be_biased(serving) -> None:
    table = {**WHOLE, "/server_info": server_info(model_config={"logprobs_mode": "raw_logprobs"})}
    assert vllm_server.require(server(serving(table), vllm_importance_sampling_correction=False), 40) == []


def test_a_server_that_is_late_is_waited_for_only_where_the_recipe_says_so(serving, monkeypatch) -> None:
    table = {**WHOLE, "/health": (503, {})}
    url, asked = serving(table), []

    def sleep(seconds: float) -> None:
        asked.append(seconds)
        table["/health"] = (200, {})

    monkeypatch.setattr(vllm_server.time, "sleep", sleep)
    with pytest.raises(RecipeError, match="no vLLM server answers"):
        vllm_server.require(server(url), 40)
    assert asked == []
    assert vllm_server.require(server(url, vllm_server_timeout=30.0), 40) == [] and len(asked) == 1


def test_without_cuda_a_server_gets_no_weights(serving, monkeypatch) -> None:
    url = serving(WHOLE)
    monkeypatch.setattr(vllm_server, "has_cuda", lambda: False)
    with pytest.raises(RecipeError, match="no CUDA device") as caught:
        vllm_server.require(server(url), 40)
    assert caught.value.where == "rl.trainer.vllm_mode"


def test_the_command_it_names_is_that_of_trl(serving) -> None:
    """TRL's own script builds the flags that its trainers need."""
    from trl.scripts.vllm_serve import ScriptArguments, build_command

    theirs = build_command(ScriptArguments(model="org/m"))
    ours = vllm_server.command(server("http://127.0.0.1:1"))
    for flag in ("--weight-transfer-config", "--logprobs-mode"):
        assert f"{flag} {theirs[theirs.index(flag) + 1]}" in ours.replace("'", "")


# --- settings that contradict each other ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trainer", "says"),
    [
        ({"vllm_mode": "server"}, "vllm_mode is read only with use_vllm = true"),
        ({"use_vllm": False, "vllm_gpu_memory_utilization": 0.5}, "read only with use_vllm = true"),
        ({"use_vllm": True, "vllm_mode": "colocated"}, "vllm_mode is colocate or server"),
        ({"use_vllm": True, "vllm_server_port": 8001}, 'vllm_server_port is read only with vllm_mode = "server"'),
        (
            {"use_vllm": True, "vllm_mode": "server", "vllm_tensor_parallel_size": 2},
            'vllm_tensor_parallel_size is read only with vllm_mode = "colocate"',
        ),
        (
            {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": "http://h:1", "vllm_server_host": "h"},
            "vllm_server_host is not read beside vllm_server_base_url",
        ),
        ({"use_vllm": True, "cache_implementation": "static"}, "cache_implementation is read only without use_vllm"),
        (
            {
                "use_vllm": True,
                "vllm_importance_sampling_correction": False,
                "vllm_importance_sampling_mode": "token_mask",
            },
            "vllm_importance_sampling_mode is read only with vllm_importance_sampling_correction = true",
        ),
        ({"use_vllm": True, "generation_kwargs": {"seed": 1}}, "each step draws alike"),
        ({"generation_kwargs": {"temperature": 0.5}}, "generation_kwargs.temperature is set by rl.temperature"),
        ({"use_vllm": True, "trust_remote_code": True}, "the recipe's top-level trust_remote_code decides"),
    ],
)
def test_settings_of_which_one_would_be_ignored_are_refused(trainer: dict, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(trainer)
    assert says in caught.value.what and "rl.trainer" in caught.value.what


def test_every_field_about_vllm_is_known_to_be_of_one_mode_or_both() -> None:
    """A new field of TRL's must be looked at."""
    from heatbath.stages.trainer_fields import READ_BY_MODE, _types

    both = {name for name in _types("rl") if name.startswith("vllm_importance_sampling_")}
    both |= {"vllm_mode", "vllm_structured_outputs_regex"}
    listed = set(READ_BY_MODE["server"]) | set(READ_BY_MODE["colocate"])
    assert {name for name in _types("rl") if name.startswith("vllm_")} == both | listed


def test_a_password_in_the_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(RecipeError) as caught:
        server("http://user:canary@h:1")
    assert "holds no name and password" in str(caught.value) and "canary" not in str(caught.value)


# --- versions -------------------------------------------------------------------------------------------------------


def test_the_range_is_the_one_that_trl_warns_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL has it twice: in its metadata, which is read here, and in the code that warns."""
    from trl import import_utils

    for version in ("0.21.9", "0.22.0", "0.26.1", "0.31.0", "0.31.0+cu129", "0.31.1", "0.32.0"):
        monkeypatch.setattr(import_utils, "_is_package_available", lambda *_, v=version, **__: (True, v))
        with pytest.MonkeyPatch.context() as patched:
            warned: list[object] = []
            patched.setattr(import_utils.warnings, "warn", lambda *a, warned=warned, **_: warned.append(a))
            import_utils.is_vllm_available()
        assert vllm_server.is_supported(version) == (not warned), version


@pytest.mark.parametrize(("version", "ok"), [("0.31.0", True), ("0.24.0+cu129", True), ("0.32.0", False)])
def test_doctor_compares_an_installed_vllm_with_it(monkeypatch: pytest.MonkeyPatch, version: str, ok: bool) -> None:
    monkeypatch.setattr(vllm_server, "installed", lambda: version)
    found = doctor.examine()
    (row,) = [p for p in found["packages"] if p["name"] == "vllm"]
    assert row["ok"] is ok and row["installed"] == version
    (line,) = [line for line in doctor.show(found).splitlines() if line.split()[1:2] == ["vllm"] and version in line]
    assert line.startswith("ok " if ok else "BAD") and "TRL supports" in line
    if not ok:
        assert not found["ok"] and f"'vllm{vllm_server.supported().specifier}'" in doctor.show(found)


def test_without_vllm_doctor_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_server, "installed", lambda: None)
    found = doctor.examine()
    assert "heatbath[vllm]" in found["optional"]["vllm"] and str(vllm_server.supported().specifier) in str(found)


def test_a_version_that_trl_does_not_know_is_a_note(serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_server, "installed", lambda: "0.32.0")
    (note,) = vllm_server.require(recipe({"use_vllm": True}), 40)
    assert "0.32.0" in note and "TRL supports" in note


def test_without_vllm_it_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_server, "installed", lambda: None)
    with pytest.raises(RecipeError, match="vLLM is not installed"):
        vllm_server.require(recipe({"use_vllm": True}), 40)
