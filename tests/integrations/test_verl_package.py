"""verl itself on what heatbath writes: its configuration, its dataset class, its reward loader and manager, its losses,
its SFT trainer (two steps on a CPU, by the platform of verl_on_cpu.py), its merger, and a Ray cluster.

`make test-verl` runs these. The environment is $HEATBATH_VERL_PYTHON's, or is built once in heatbath's cache folder.
Nothing here samples: verl's rollouts, and with them a whole step of its RL, need a GPU.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from transformers import AutoModelForCausalLM

from conftest import small_model, small_tokenizer
from heatbath import models
from heatbath import recipe as recipes
from heatbath.data import checks, rendering, sources
from heatbath.ideas.policy import policy, policy_loss
from heatbath.integrations.verl import files, launch
from heatbath.progress import Progress
from heatbath.run import Run
from heatbath.verify.math import MathGrader

pytestmark = pytest.mark.slow
HERE, SOURCE = Path(__file__).parent, Path(launch.__file__).parents[3]
# torch first and alone: as somebody's dependency it brings CUDA. antlr4 is hydra's, which math-verify takes as well.
PACKAGES = (
    ("torch==2.13.0",),
    ("transformers==5.10.4", "ray==2.60.0", "tensordict==0.10.0", "torchdata==0.11.0", "datasets", "peft"),
    (f"verl=={launch.VERL}", "uvicorn", "fastapi", "pyzmq", "msgspec", "cachetools", "math-verify", "pebble"),
    ("--no-deps", "TransferQueue==0.1.11"),
)
ON_CPU = ("trainer.device=cpu", "model.use_remove_padding=False", "+model.override_config.attn_implementation=sdpa")
BETA, LR = 3.0, 1e-3
POLICIES = {
    "paper": {},
    "grpo": {"std_epsilon": 1e-6, "kl": 0.1},
    "dr_grpo": {"length": 40, "clip_high": 0.4, "kl": 0.05, "kl_estimator": "k2"},
    "dapo": {"std_epsilon": 1e-6, "overlong": 0.0, "dynamic_sampling": False, "dual_clip": 1.5},
    "gspo": {"std_epsilon": 1e-6, "clip_low": 0.05, "clip_high": 0.1},
    "cispo": {"std_epsilon": 1e-6, "clip_high": 1.1, "entropy": 0.1},
    "rloo": {"ratio": "token", "kl": 0.1, "kl_estimator": "k1"},
    "reinforce": {"advantage": "leave_one_out"},
}


@pytest.fixture(scope="session")
def python() -> str:
    """The python of verl's environment."""
    if given := os.environ.get(launch.PYTHON):
        return given
    folder = models.cache_folder() / "venv-verl"
    if not (folder / "ready").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        for packages in PACKAGES:
            subprocess.run([str(folder / "bin" / "pip"), "install", "--quiet", *packages], check=True)
        (folder / "ready").touch()
    return str(folder / "bin" / "python")


def environment(python: str, **more: str) -> dict[str, str]:
    """Our sources and the platform for verl's python; here that stands for an installed heatbath."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "HYDRA_", "VERL_"))}
    own = {"PYTHONPATH": f"{SOURCE}:{HERE}", launch.PYTHON: python, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return kept | own | more


def on_cpu(python: str) -> dict[str, str]:
    return environment(python, VERL_USE_EXTERNAL_MODULES="verl_on_cpu", VERL_PLATFORM="cpu", GPUS="1")


def call(command: list[str], env: dict[str, str], timeout: float = 900) -> tuple[int, str]:
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)
    return done.returncode, done.stdout + done.stderr


def ask(python: str, question: str, folder: Path, **asked: object) -> object:
    """The answer of verl itself (inside_verl.py)."""
    (folder / "asked.json").write_text(json.dumps(asked))
    code, said = call([python, str(HERE / "inside_verl.py"), question, str(folder)], on_cpu(python))
    assert code == 0, said[-3000:]
    return json.loads(re.findall(r"^answer: (.*)$", said, flags=re.MULTILINE)[-1])


def table(base: Path, policy_: object = "grpo") -> dict:
    return {
        "model": str(base),
        "precision": "fp32",
        "data": {"source": "arithmetic", "demos": 16, "prompts": 8, "test": 4, "system": "Answer the question."},
        "sft": {"objective": {"name": "gift", "beta": BETA}, "batch": 16, "micro_batch": 8, "epochs": 2, "lr": LR},
        "rl": {"policy": policy_, "prompts": 4, "update_prompts": 4, "group_size": 4, "micro_batch": 4}
        | {"max_new_tokens": 32, "eval_every": 1, "verl": {"trainer": {"n_gpus_per_node": 2}}},
    }


@pytest.fixture(scope="session")
def run(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose files are written, before its warm start."""
    recipe = recipes.parse(table(small_base))
    made = Run(tmp_path_factory.mktemp("verl") / "run", recipe).write()
    files.write(made, recipe, sources.of(recipe), small_tokenizer())
    return made


def config_of(run: Run) -> Path:
    return (run.folder / "verl" / "rl.yaml").resolve()


def with_policy(folder: Path, given: object, model: Path) -> Path:
    """The configuration of another policy, with a model that is there."""
    recipe = recipes.parse({key: value for key, value in table(model, given).items() if key != "sft"})
    other = Run(folder, recipe).write()
    files.write(other, recipe, sources.of(recipe), small_tokenizer())
    return config_of(other)


def test_verl_accepts_the_configuration_of_every_policy(python: str, small_base: Path, tmp_path: Path) -> None:
    paths = [with_policy(tmp_path / n, {"name": n, **hyper}, small_base) for n, hyper in POLICIES.items()]
    found = ask(python, "checks", tmp_path, calls=[[str(path), []] for path in paths])
    assert [code for code, _ in found] == [0] * len(POLICIES), found
    for path in paths:
        whole = yaml.safe_load(path.with_name("rl.composed.yaml").read_text())
        assert whole["critic"]["ppo_epochs"] and whole["actor_rollout_ref"]["rollout"]["n"] == 4, "verl's defaults too"


def test_verl_refuses_what_it_does_not_know(python: str, small_base: Path, tmp_path: Path) -> None:
    path = str(with_policy(tmp_path / "one", "grpo", small_base))
    wrong = ["+trainer.nodes=2", "+actor_rollout_ref.actor.clip_rate=0.1", "data.train_batch_size=3"]
    found = ask(python, "checks", tmp_path, calls=[[path, [override]] for override in wrong])
    assert [code for code, _ in found] == [2] * len(wrong), found
    for (_, said), word in zip(found, ("trainer.nodes", "clip_rate", "train_batch_size"), strict=True):
        assert "error: verl refuses the configuration" in said and word in said
    code, said = call([python, "-m", "heatbath.integrations.verl.check", path], on_cpu(python))
    assert code == 0 and "verl accepts rl.yaml" in said, said[-2000:]


def test_verls_dataset_reads_our_rows_as_heatbath_asks_them(python: str, run: Run, tmp_path: Path) -> None:
    found = ask(python, "rows", tmp_path, config=str(config_of(run)))
    splits, tokenizer = sources.of(run.recipe), small_tokenizer()
    for name, rows in (("train", splits.prompts), ("val", splits.test)):
        ids = [rendering.prompt_ids(tokenizer, rendering.messages(row, run.recipe.data.system)) for row in rows]
        assert [row["ids"] for row in found[name]] == ids
        assert [row["gold"] for row in found[name]] == [row.answer for row in rows]
        assert [row["index"] for row in found[name]] == list(range(len(rows)))


def test_verls_reward_manager_gives_heatbaths_verdicts(python: str, run: Run, tmp_path: Path) -> None:
    cases = [
        ("so the answer is 12.", "12"),
        ("so \\boxed{13}", "12"),
        ("I do not know", "12"),
        ("\\boxed{\\frac{4}{6}}", "2/3"),
        ("\\boxed{\\sum_{k=1}^n k}", "n(n+1)/2"),
        ("12", ""),
    ]
    info = {"kind": "math", "profile": "strict", "index": 0}
    rows = [{"response": r, "gold": g, "data_source": "heatbath/arithmetic", "extra_info": info} for r, g in cases]
    found = ask(python, "reward", tmp_path, config=str(config_of(run)), rows=rows)
    with MathGrader(workers=1) as grader:
        verdicts = grader.grade([r for r, _ in cases], [g for _, g in cases])
    assert [f["status"] for f in found] == [v.status for v in verdicts]
    assert [f["score"] for f in found] == [v.score or 0.0 for v in verdicts]
    assert {v.status for v in verdicts} == {"right", "wrong", "no_answer", "bad_gold"}, "the cases tell them apart"


def test_verls_losses_under_our_configuration_are_heatbaths(python: str, small_base: Path, tmp_path: Path) -> None:
    """Value and gradient of a batch of three groups, with clipped ratios of either sign and unequal lengths."""
    g = torch.Generator().manual_seed(0)
    B, T = 12, 32
    lengths = torch.randint(3, T + 1, (B,), generator=g)
    mask = (torch.arange(T)[None] < lengths[:, None]).double()
    logp = -2 * torch.rand(B, T, generator=g, dtype=torch.float64)
    tensors = {
        "logp": logp,
        "old_logp": logp + 0.8 * torch.randn(B, T, generator=g, dtype=torch.float64),
        "ref_logp": logp + 0.3 * torch.randn(B, T, generator=g, dtype=torch.float64),
        "entropy": torch.rand(B, T, generator=g, dtype=torch.float64),
        "rewards": torch.tensor([1, 0, 0, 1, 0, 0, 0, 1, 1, 1, 0.5, 0], dtype=torch.float64),
        "mask": mask,
    }
    groups = torch.arange(B) // 4
    assert float((tensors["logp"] - tensors["old_logp"]).exp().max()) > 3, "where verl's own dual clip would act"
    configs = [str(with_policy(tmp_path / n, {"name": n, **h}, small_base)) for n, h in POLICIES.items()]
    given = {name: value.tolist() for name, value in tensors.items()}
    found = ask(python, "losses", tmp_path, configs=configs, tensors=given, groups=groups.tolist())
    seen = set()
    for (name, hyper), theirs in zip(POLICIES.items(), found, strict=True):
        mine = tensors["logp"].clone().requires_grad_()
        more = {key: tensors[key] for key in ("old_logp", "mask", "rewards", "ref_logp", "entropy")}
        loss = policy_loss(policy(name, **hyper), mine, groups=groups, **more)
        loss.backward()
        value, gradient = float(loss.detach()), torch.tensor(theirs["gradient"], dtype=torch.float64)
        assert abs(theirs["loss"] - value) < 1e-6 * max(1, abs(value)), name
        torch.testing.assert_close(gradient, mine.grad, rtol=1e-5, atol=1e-8)
        seen.add(round(value, 6))
    assert len(seen) == len(POLICIES), "policies whose losses are the same would hide a mix-up"


def trajectory(run: Run, start: Path, steps: int) -> list[float]:
    """GIFT as Algorithm 1 of arXiv 2601.09233 writes it, in float64: the loss before each AdamW step on all rows."""
    policy_ = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float64)
    base = AutoModelForCausalLM.from_pretrained(run.recipe.model, dtype=torch.float64)
    rows = checks.rendered(small_tokenizer(), sources.of(run.recipe).demos, run.recipe, "demos")
    optimizer = torch.optim.AdamW(policy_.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.01)
    losses = []
    for _ in range(steps):
        total, tokens = torch.zeros((), dtype=torch.float64), 0
        for row in rows:
            ids, labels = torch.tensor([row.input_ids]), torch.tensor(row.labels)[1:]
            z = policy_(input_ids=ids).logits[0, :-1].log_softmax(-1)
            with torch.no_grad():
                lifted = base(input_ids=ids).logits[0, :-1].log_softmax(-1)
                lifted = lifted + BETA * F.one_hot(labels.clamp(min=0), lifted.shape[-1])
                target = lifted.softmax(-1)
            learned = labels != -100
            total = total - (target * z).sum(-1)[learned].sum()
            tokens += int(learned.sum())
        loss = total / tokens
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy_.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss))
    return losses


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy that is not the base, so that the loss is not the one of π = p_base."""
    folder = tmp_path_factory.mktemp("models") / "other"
    small_model(seed=9).save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("processes", [1, 2])
def test_two_steps_of_verls_sft_trainer_have_the_loss_of_algorithm_1(
    python: str, run: Run, start: Path, processes: int, tmp_path: Path
) -> None:
    """In micro-batches of 8 on one process, and of 4 on each of two."""
    truth = trajectory(run, start, steps=2)
    changes = [f"model.path={start}", f"data.micro_batch_size_per_gpu={8 // processes}", "data.num_workers=0"]
    where = [] if processes == 1 else [f"trainer.default_local_dir={tmp_path / 'shards'}"]
    env = on_cpu(python) | {"GPUS": str(processes)}
    code, said = call(["sh", str(run.folder / "verl" / "sft.sh"), *ON_CPU, *changes, *where], env)
    assert code == 0, said[-3000:]
    found = [float(x) for x in re.findall(r"train/loss:([0-9.]+)", said)]
    print(f"\n{processes} process(es): verl {found}, Algorithm 1 in float64 {truth}")
    assert len(found) == 2 and abs(found[0] - truth[0]) < 1e-6, (found, truth)
    assert abs(found[1] - truth[1]) < 1e-5, (found, truth)  # after a float32 AdamW step
    assert truth[0] - truth[1] > 1e-2, "the step moved the loss by far more than that"
    plain = yaml.safe_load((run.folder / "verl" / "sft.yaml").read_text())["heatbath"]["objective"]
    assert plain == {"name": "gift", "beta": BETA}


def test_verls_checkpoint_is_a_policy_of_the_run(python: str, run: Run, start: Path, monkeypatch) -> None:
    """The whole weights that verl saves beside its shards, and its merger's from the shards: the same in 16 bits."""
    monkeypatch.setenv(launch.PYTHON, python)
    for key, value in on_cpu(python).items():
        monkeypatch.setenv(key, value)
    shards = run.working("sft") / "verl" / "global_step_2"
    if not shards.is_dir():
        pytest.skip("needs the test above")
    bare = run.folder / "bare"
    shutil.copytree(shards, bare)
    for file in (bare / "huggingface").glob("*.safetensors"):
        file.unlink()
    launch.take_over(run, "init", shards, Progress(quiet=True))
    launch.take_over(run, "final", bare, Progress(quiet=True))
    whole, merged = (models.load_model(str(run.checkpoint(name)), torch.float32) for name in ("init", "final"))
    before = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    moved = max(float((a - b).abs().max()) for a, b in zip(whole.parameters(), before.parameters(), strict=True))
    assert LR < moved < 3 * LR, "two AdamW steps"
    for mine, theirs in zip(merged.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs.bfloat16().float(), rtol=0, atol=0)
    shutil.rmtree(run.checkpoint("final"))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def test_the_job_reaches_the_ray_cluster_it_is_given(python: str, run: Run, start: Path, tmp_path: Path) -> None:
    """A cluster of this machine that claims two GPUs. verl's task runner runs there on our configuration, reads our
    rows, and starts its workers; these stop for want of a real GPU."""
    if not run.checkpoint("init").exists():
        shutil.copytree(start, run.checkpoint("init"))
    port, env, home = free_port(), environment(python), tempfile.mkdtemp(prefix="ray-")  # a socket's path is short
    options = ["--head", "--block", f"--port={port}", "--num-gpus=2", "--num-cpus=64", "--include-dashboard=false"]
    ray = [str(Path(python).with_name("ray")), "start", *options, "--disable-usage-stats", f"--temp-dir={home}"]
    with open(tmp_path / "ray.log", "w") as log:
        head = subprocess.Popen(ray, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        waited = time.time()
        while "Ray runtime started" not in (tmp_path / "ray.log").read_text():
            assert head.poll() is None and time.time() - waited < 90, (tmp_path / "ray.log").read_text()[-2000:]
            time.sleep(1)
        command = [sys.executable, "-m", "heatbath", "rl", str(run.folder), "--engine", "verl", "--resume"]
        code, said = call(command, env | {"RAY_ADDRESS": f"127.0.0.1:{port}"}, timeout=600)
    finally:
        head.terminate()  # it ends what it has started
        head.wait(30)
        shutil.rmtree(home, ignore_errors=True)
    assert f"127.0.0.1:{port} set in the environment variable RAY_ADDRESS" in said, said[-2000:]
    assert "Connected to Ray cluster" in said
    inside = [line for line in said.splitlines() if "TaskRunnerV1 pid=" in line]
    assert any("train dataset size: 8, val dataset size: 4" in line for line in inside), said[-2000:]
    assert any("create worker group" in line for line in inside)
    last = [line for line in said.splitlines() if re.match(r"(\x1b\S+ )?\w*Error: ", line)]
    print("\nthe job ended on the cluster with:", last[-1:] or said[-300:])
    assert code == 1 and re.search(r"NCCL|CUDA|GPU", " ".join(last)), said[-2000:]
    assert "error: it ended with exit code 1" in said
