"""RL that vLLM samples, through TRL: what must be so before anything is trained, and what is said if the server fails.

TRL's client waits minutes for a server that is not there, and only after the stages before RL; it trains with wrong
importance ratios where the server's log-probabilities are not those of the temperature. Here both are asked first.
"""

from __future__ import annotations

import importlib.metadata
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement
from packaging.version import Version

from heatbath.addresses import without_credentials
from heatbath.errors import HeatbathError, RecipeError, RunError
from heatbath.recipe import Recipe

if TYPE_CHECKING:
    import trl

PATIENCE = 5.0  # seconds that one question to the server may take
FLAGS = """--weight-transfer-config '{"backend": "nccl"}' --logprobs-mode processed_logprobs"""
INSTALL = "pip install 'heatbath[vllm]', or leave use_vllm out"


def supported() -> Requirement | None:
    """The versions of vLLM that the installed TRL supports, from its own metadata."""
    listed = map(Requirement, importlib.metadata.requires("trl") or [])
    return next((r for r in listed if r.name == "vllm" and r.marker and r.marker.evaluate({"extra": "vllm"})), None)


def installed() -> str | None:
    """The installed version of vLLM, or None."""
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return None


def is_supported(version: str) -> bool:
    """Whether TRL supports that version of vLLM; builds for another CUDA ("+cu129") count as their release."""
    known = supported()
    return known is None or known.specifier.contains(Version(version).base_version, prereleases=True)


def require(recipe: Recipe, longest_prompt: int) -> list[str]:
    """Raises RecipeError where RL could not be sampled as the recipe says; returns what else should be known.
    `longest_prompt` in tokens."""
    settings = recipe.rl
    if settings is None or not settings.trainer.get("use_vllm"):
        return []
    version = installed()
    if version is None:
        raise RecipeError("vLLM is not installed", "rl.trainer.use_vllm", INSTALL)
    if settings.trainer.get("vllm_mode") == "server":
        if not has_cuda():
            raise RecipeError(
                "weights go to a vLLM server over NCCL, and this machine has no CUDA device",
                "rl.trainer.vllm_mode",
                "train on a machine with one, or leave use_vllm out",
            )
        _require_server(recipe, longest_prompt)
    if not is_supported(version):
        return [f"vLLM {version} is installed; TRL supports {supported().specifier}"]  # type: ignore[union-attr]
    return []


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def address(trainer: dict[str, Any]) -> tuple[str, str]:
    """Where TRL will look for the server, and the key of the recipe that says so."""
    if "vllm_server_base_url" in trainer:
        return str(trainer["vllm_server_base_url"]).rstrip("/"), "rl.trainer.vllm_server_base_url"
    key = "vllm_server_host" if "vllm_server_host" in trainer else "vllm_server_port"
    return f"http://{trainer.get('vllm_server_host', '0.0.0.0')}:{trainer.get('vllm_server_port', 8000)}", (
        f"rl.trainer.{key}"
    )


def command(recipe: Recipe) -> str:
    """What starts the server that this recipe needs, in another terminal."""
    port = recipe.rl.trainer.get("vllm_server_port", 8000) if recipe.rl else 8000
    named = recipe.model or "the folder checkpoints/base of the run"
    return f"VLLM_SERVER_DEV_MODE=1 vllm serve {shlex.quote(named)} --port {port} {FLAGS}"


def _require_server(recipe: Recipe, longest_prompt: int) -> None:
    """Asks the server everything that TRL's client would trip over later."""
    assert recipe.rl is not None
    trainer = recipe.rl.trainer
    url, key = address(trainer)
    shown, start = without_credentials(url), command(recipe)
    _wait(url, key, start, float(trainer.get("vllm_server_timeout", 0.0)))
    status, listed = _asked(f"{url}/v1/models")
    if status in (401, 403):
        raise RecipeError(
            f"the server at {shown} asks for a key, which TRL's client does not send", key, "start it without --api-key"
        )
    if status != 200 or not listed.get("data"):
        raise RecipeError(f"what answers at {shown} lists no model (HTTP {status})", key, start)
    status, info = _asked(f"{url}/server_info", config_format="json")
    if status != 200:
        raise RecipeError(
            f"the server at {shown} has no route by which weights could be sent to it (HTTP {status})", key, start
        )
    config = info.get("vllm_config") or {}
    if config.get("weight_transfer_config") is None:
        raise RecipeError(f"the server at {shown} takes no weights: it has no --weight-transfer-config", key, start)
    mode = (config.get("model_config") or {}).get("logprobs_mode")
    if mode != "processed_logprobs" and trainer.get("vllm_importance_sampling_correction", True):
        raise RecipeError(
            f"the server at {shown} gives log-probabilities before the temperature ({mode}), which would bias the "
            "importance ratios",
            "rl.trainer.vllm_importance_sampling_correction",
            start,
        )
    context, asked = listed["data"][0].get("max_model_len"), longest_prompt + recipe.rl.max_new_tokens
    if isinstance(context, int) and asked > context:
        raise RecipeError(
            f"the longest prompt has {longest_prompt:,} tokens, with rl.max_new_tokens {asked:,}, and the server at "
            f"{shown} refuses more than {context:,}",
            "rl.max_new_tokens",
            f"lower it, or start the server with --max-model-len {asked}",
        )


def _wait(url: str, key: str, start: str, patience: float) -> None:
    """Until the server answers, or `patience` seconds are over."""
    import requests

    end = time.monotonic() + patience
    while True:
        try:
            status, _ = _asked(f"{url}/health")
            why = f"HTTP {status} from /health"
            if status == 200:
                return
        except requests.exceptions.RequestException as error:
            why = type(error).__name__
        if time.monotonic() >= end:
            raise RecipeError(f"no vLLM server answers at {without_credentials(url)} ({why})", key, start)
        time.sleep(min(1.0, max(0.0, end - time.monotonic())))


def _asked(url: str, **parameters: str) -> tuple[int, dict[str, Any]]:
    """Status and JSON of an answer, {} where it is none; by TRL's own HTTP library, so that it sees what TRL will."""
    import requests

    answer = requests.get(url, params=parameters, timeout=PATIENCE)
    try:
        content = answer.json()
    except ValueError:
        content = None
    return answer.status_code, content if isinstance(content, dict) else {}


@contextmanager
def explained(settings: trl.GRPOConfig) -> Iterator[None]:
    """Turns what TRL's client raises where its server fails, into a RunError."""
    if not (settings.use_vllm and settings.vllm_mode == "server"):
        yield
        return
    import requests

    url = settings.vllm_server_base_url or f"http://{settings.vllm_server_host}:{settings.vllm_server_port}"
    try:
        yield
    except HeatbathError:
        raise
    except Exception as error:
        refused = type(error) is Exception and str(error).startswith("Request failed")  # as the client has it
        if not refused and not isinstance(error, requests.exceptions.RequestException):
            raise
        what = " ".join(str(error).split())[:300] if refused else "it no longer answers"
        raise RunError(
            f"the vLLM server failed: {what}",
            without_credentials(url),
            "look into its log, start it again with the same flags, then --resume",
        ) from error
