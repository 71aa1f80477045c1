"""RL that vLLM samples, in both of TRL's modes: TRL's own code and heatbath's, against a stand-in for vLLM's engine and
its server (tests/vllm_stand_in), whose weights are noise until TRL sends it the policy's."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import heatbath

pytestmark = pytest.mark.thorough

STAND_IN = Path(__file__).parents[1] / "vllm_stand_in"
RECIPE = """\
model = "./base"
precision = "fp32"

[data]
source = "arithmetic"
prompts = 16
test = 4

[rl]
policy = {policy}
lr = 0.01
prompts = 4
update_prompts = 2
group_size = 2
micro_batch = 2
max_new_tokens = 12
max_steps = 6
readiness = 0
save_every = 2
truncate = true

[reward]
weights = {{ "early.py:early" = 1.0, verdict = 0.0 }}

[rl.trainer]
use_vllm = true
{trainer}
"""
EARLY = """\
def early(completions, **_):
    "The sign of the first letter: something that a group differs in, and RL can learn."
    return [float(ord((c[0]["content"] or " ")[0]) % 7) for c in completions]
"""
SAME = 1e-5  # nats: two float32 passes over the same weights
STALE = 1e-2


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(STAND_IN), str(Path(heatbath.__file__).parents[1])])
    proxies = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    return {**os.environ, **proxies, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "QUICK": "1", **more}


@pytest.fixture
def serve(small_base: Path) -> Iterator[Callable[..., tuple[int, subprocess.Popen]]]:
    """Starts a server on a free port, or the one given, and waits until it answers."""
    started: list[subprocess.Popen] = []

    def start(*options: str, port: int | None = None) -> tuple[int, subprocess.Popen]:
        port = port or free_port()
        command = [sys.executable, str(STAND_IN / "serve.py"), str(small_base), str(port), *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
        started.append(process)
        assert process.stdout is not None and process.stdout.readline().startswith("serving")
        return port, process

    yield start
    for process in started:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def run_rl(
    folder: Path, base: Path, trainer: str, *options: str, policy: str = '"grpo"', more: str = ""
) -> subprocess.CompletedProcess[str]:
    if not (folder / "base").exists():
        (folder / "base").symlink_to(base)
    (folder / "early.py").write_text(EARLY)
    (folder / "r.toml").write_text(RECIPE.format(trainer=trainer, policy=policy) + more)
    command = [sys.executable, str(STAND_IN / "run.py"), "rl", "r.toml", "--out", "run", *options]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)


def in_server_mode(port: int) -> str:
    return f'vllm_mode = "server"\nvllm_server_base_url = "http://127.0.0.1:{port}"\nvllm_group_port = {free_port()}\n'


def logged(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def gaps(folder: Path) -> list[float]:
    return [row["sampler_gap"] for row in logged(folder) if "sampler_gap" in row]


@pytest.mark.parametrize(
    "more",
    [pytest.param("", id="whole"), pytest.param("\n[lora]\nrank = 4\n", id="lora", marks=pytest.mark.slow)],
)
def test_colocated_the_sampler_is_the_policy_at_every_generation(tmp_path: Path, small_base: Path, more: str) -> None:
    done = run_rl(tmp_path, small_base, 'vllm_mode = "colocate"', more=more)
    assert done.returncode == 0, done.stderr
    assert len(gaps(tmp_path)) == 3 and max(gaps(tmp_path)) < SAME
    assert logged(tmp_path)[-1]["kl_init"] > STALE  # the weights have moved, and the sampler with them
    assert (tmp_path / "run" / "checkpoints" / "final" / "model.safetensors").is_file()


def test_a_server_samples_from_the_weights_it_is_sent(tmp_path: Path, small_base: Path, serve) -> None:
    port, _ = serve()
    done = run_rl(tmp_path, small_base, in_server_mode(port))
    assert done.returncode == 0, done.stderr
    assert len(gaps(tmp_path)) == 3 and max(gaps(tmp_path)) < SAME
    assert logged(tmp_path)[-1]["kl_init"] > STALE


@pytest.mark.slow
def test_a_server_that_does_not_take_the_weights_is_told_of(tmp_path: Path, small_base: Path, serve) -> None:
    """What the test before would see if weights were not sent."""
    port, _ = serve("--deaf")
    done = run_rl(tmp_path, small_base, in_server_mode(port))
    assert done.returncode == 0, done.stderr
    assert min(gaps(tmp_path)) > STALE
    assert "the sampler's log-probabilities differ from the trainer's by" in done.stderr


@pytest.mark.slow
def test_completions_begun_from_demonstrations_go_through_a_server(tmp_path: Path, small_base: Path, serve) -> None:
    port, _ = serve()
    policy = '{ name = "uft", hint_steps = 100 }'
    done = run_rl(tmp_path, small_base, in_server_mode(port).rstrip(), policy=policy)
    assert done.returncode == 0, done.stderr
    assert len(gaps(tmp_path)) == 3 and max(gaps(tmp_path)) < SAME
    assert max(row.get("expert_share", 0.0) for row in logged(tmp_path)) > 0


def test_a_server_that_dies_is_a_named_error_and_resume_goes_on(tmp_path: Path, small_base: Path, serve) -> None:
    port, _ = serve("--dies-after", "3")
    trainer = in_server_mode(port)
    done = run_rl(tmp_path, small_base, trainer)
    assert done.returncode == 1
    assert "the vLLM server failed" in done.stderr and f"http://127.0.0.1:{port}" in done.stderr
    assert "--resume" in done.stderr and "Traceback" not in done.stderr
    assert [row["step"] for row in logged(tmp_path)] == [1, 2, 3, 4]
    serve(port=port)
    again = run_rl(tmp_path, small_base, trainer, "--resume")
    assert again.returncode == 0, again.stderr
    assert [row["step"] for row in logged(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert max(gaps(tmp_path)) < SAME  # the new server got the weights before its first completion


def test_without_a_server_nothing_is_trained(tmp_path: Path, small_base: Path) -> None:
    port = free_port()
    sft = "\n[sft]\nbatch = 4\nmicro_batch = 4\n"
    done = run_rl(tmp_path, small_base, in_server_mode(port), more=sft)
    assert done.returncode == 2
    assert f"no vLLM server answers at http://127.0.0.1:{port}" in done.stderr
    assert "rl.trainer.vllm_server_base_url" in done.stderr and "vllm serve ./base" in done.stderr
    assert not (tmp_path / "run").exists()
