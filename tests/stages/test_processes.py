"""Several processes leave what one leaves: curves, weights, samples; and what does not fit them is said before."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sharding_on_cpu
import torch
import whole_stages
from safetensors.torch import load_file

from heatbath import cli, cli_stages, ranks
from heatbath import recipe as recipes
from heatbath.errors import RecipeError, RunError
from heatbath.launch import Launch
from heatbath.recipe import as_toml
from heatbath.run import Run
from heatbath.stages import pipeline
from mistakes import call

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def both(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what one process leaves in `one`, and two of torchrun's in `two`."""
    folder = tmp_path_factory.mktemp("processes")
    kept: list = []
    whole_stages.run_all(folder / "one", str(small_base), kept)
    (folder / "completions.json").write_text(json.dumps(kept))
    two_processes(folder / "two", small_base, folder / "completions.json")
    return folder


@pytest.fixture(scope="module")
def shared(both: Path, small_base: Path) -> Path:
    """`both`, with what two processes that share the weights leave in `fsdp2`."""
    two_processes(both / "fsdp2", small_base, both / "completions.json", "fsdp2")
    return both


def test_in_16_bits_policy_and_base_are_rounded_alike(shared: Path) -> None:
    """Under FSDP2 both are gathered in bf16, heads too: before the first step of a warm start the two are one, and in
    RL, which samples from gathered weights, the policy is its frozen start."""
    rows = [json.loads(line) for line in (shared / "fsdp2" / "bf16" / "metrics.jsonl").read_text().splitlines()]
    before = next(row for row in rows if row["step"] == 0)
    assert before["val/nll"] == pytest.approx(before["val/surprise"], rel=1e-6)
    assert len([row for row in rows if "nll" in row]) == whole_stages.STEPS
    assert curve(shared / "fsdp2" / "bf16-rl", "rl", "kl_init")[0] == pytest.approx(0.0, abs=1e-6)
    assert len(curve(shared / "fsdp2" / "bf16-rl", "rl", "reward")) == 2


@pytest.fixture(scope="module")
def shared_by_deepspeed(both: Path, small_base: Path) -> Path:
    """`both`, with what two processes of DeepSpeed leave in `zero2`."""
    pytest.importorskip("deepspeed", reason="pip install deepspeed: it compiles itself")
    two_processes(both / "zero2", small_base, both / "completions.json", "zero2")
    return both


def two_processes(folder: Path, base: Path, completions: Path, *how: str) -> None:
    script = Path(whole_stages.__file__)
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        [*line, str(folder), str(base), str(completions), *how],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[1])},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def curve(folder: Path, stage: str, name: str) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if row["stage"] == stage and name in row]


def moved(one: Path, two: Path) -> float:
    """The largest difference of two policies' weights, in units of the largest weight."""
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert ours.keys() == theirs.keys()
    return max(float((ours[n] - theirs[n]).abs().max() / ours[n].abs().max()) for n in ours)


def assert_same_start(folder: Path, other: str, name: str) -> None:
    for measure, count in (("objective", 20), ("nll", 20), ("val/nll", 11), ("grad_norm", 20)):
        one, two = (curve(folder / n / name, "sft", measure) for n in ("one", other))
        assert len(one) == count
        assert two == pytest.approx(one, rel=1e-5), measure
    assert one[-1] != pytest.approx(one[0], rel=0.1), "nothing was learned"
    assert moved(*(folder / n / name / "checkpoints" / "init" for n in ("one", other))) < 1e-4


def assert_same_rl(folder: Path, other: str) -> None:
    for measure in ("reward", "entropy", "kl_init", "grad_norm"):
        one, two = (curve(folder / n / "rl", "rl", measure) for n in ("one", other))
        assert len(one) == whole_stages.STEPS
        assert two == pytest.approx(one, rel=1e-5, abs=1e-9), measure
    assert any(curve(folder / "one" / "rl", "rl", "grad_norm")), "no group taught anything"
    assert moved(*(folder / n / "rl" / "checkpoints" / "final" for n in ("one", other))) < 1e-4


@pytest.mark.parametrize("name", whole_stages.STARTS)
def test_two_processes_give_the_curve_of_one(both: Path, name: str) -> None:
    """Loss, NLL, validation and gradient norm of 20 steps to 5 digits, under every place the base's view comes from."""
    assert_same_start(both, "two", name)


def test_two_processes_give_the_curve_of_one_in_rl(both: Path) -> None:
    """GRPO on the same completions, 20 steps of 4 groups shared by the ranks."""
    assert_same_rl(both, "two")


@pytest.mark.parametrize("name", whole_stages.SHARDED)
def test_weights_that_processes_share_give_the_curve_of_one(shared: Path, name: str) -> None:
    """The same under accelerate's FSDP2: weights, gradients, optimizer and the base beside them in two parts."""
    assert_same_start(shared, "fsdp2", name)


def test_weights_that_processes_share_give_the_curve_of_one_in_rl(shared: Path) -> None:
    assert_same_rl(shared, "fsdp2")


@pytest.mark.slow
def test_deepspeed_gives_the_curve_of_one_process(shared_by_deepspeed: Path) -> None:
    """ZeRO-2, gradients and optimizer in two parts, through every start and RL."""
    for name in whole_stages.SHARDED:
        assert_same_start(shared_by_deepspeed, "zero2", name)
    assert_same_rl(shared_by_deepspeed, "zero2")


def test_two_processes_share_an_evaluation(both: Path) -> None:
    """The same samples, each once, whoever drew them; and the same scores."""
    runs = [Run.read(both / name / "sft") for name in ("one", "two")]
    one, two = ({(s["policy"], s["problem"], s["seed"]): s["ids"] for s in run.samples()} for run in runs)
    assert len(one) == 2 * 6 * 2 and [len(run.samples()) for run in runs] == [24, 24]
    assert one == two
    results = [json.loads((run.folder / "results.json").read_text()) for run in runs]
    assert results[0]["policies"] == results[1]["policies"]


# --- the launcher -----------------------------------------------------------------------------------------------------


def test_the_line_that_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process is heatbath itself; a CPU takes torchrun, GPUs accelerate with a shipped file; machines meet at
    MASTER_ADDR. What only the launcher reads is not passed on."""
    monkeypatch.setenv("MASTER_ADDR", "head")
    monkeypatch.setenv("SLURM_NODEID", "1")
    typed = ["run", "r.toml", "--gpus", "4", "sft.lr=1e-4", "--sharding=fsdp2", "--out", "x"]
    own = ["run", "r.toml", "sft.lr=1e-4", "--out", "x"]
    assert Launch().command(typed, gpu=True) == ["heatbath", *own]
    line = Launch(4, 1, "fsdp2").command(typed, gpu=True)
    assert line[:2] == ["accelerate", "launch"] and line[-len(own) - 2 :] == ["-m", "heatbath", *own]
    assert Path(line[line.index("--config_file") + 1]).name == "fsdp2.yaml"
    assert line[line.index("--num_processes") + 1] == "4"
    line = Launch(4, 2).command(typed, gpu=True)
    for option, value in (
        ("num_processes", "8"),
        ("num_machines", "2"),
        ("machine_rank", "1"),
        ("main_process_ip", "head"),
    ):
        assert line[line.index(f"--{option}") + 1] == value
    line = Launch(4, 2).command(typed, gpu=False)
    assert line[0] == "torchrun" and line[line.index("--rdzv-endpoint") + 1] == "head:29500"
    assert line[line.index("--nproc-per-node") + 1] == "4" and line[line.index("--nnodes") + 1] == "2"


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2", "zero2"])
def test_accelerate_makes_of_a_shipped_file_what_its_name_says(sharding: str) -> None:
    """Its launcher reads our line with our file; of FSDP2 it tells the processes by these variables."""
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_multi_gpu_env

    line = Launch(4, 1, sharding).command(["run", "r.toml"], gpu=True)
    made, *_ = launch._validate_launch_command(launch.launch_command_parser().parse_args(line[2:]))
    assert (
        made.num_processes == 4
        and made.training_script == "heatbath"
        and made.training_script_args == ["run", "r.toml"]
    )
    assert (made.multi_gpu, made.use_fsdp, made.use_deepspeed) == tuple(
        sharding == n for n in ("ddp", "fsdp2", "zero2")
    )
    if sharding == "fsdp2":
        told = prepare_multi_gpu_env(made)
        wanted = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
        assert wanted.items() <= told.items() and told["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"
    if sharding == "zero2":
        assert made.zero_stage == 2


@pytest.mark.parametrize(
    ("options", "override", "where"),
    [
        (("--gpus", "3"), "sft.batch=16", "sft.batch"),
        (("--gpus", "2"), "sft.batch=12 sft.micro_batch=4", "sft.micro_batch"),
        (("--gpus", "2", "--sharding", "fsdp2"), "", "--sharding"),
        (("--gpus", "2", "--nodes", "2"), "", "MASTER_ADDR"),
        (("--gpus", "0"), "", "--gpus"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_starts(
    tmp_path: Path, small_base: Path, monkeypatch: pytest.MonkeyPatch, options: tuple, override: str, where: str
) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    recipe = whole_stages.warm_start("sft", str(small_base))
    (tmp_path / "r.toml").write_text(as_toml(recipe))
    code, said = call(tmp_path, " ".join(["run r.toml", override, *options, "--out x"]))
    assert code == 2 and where in said and not (tmp_path / "x" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 3}", "ZeRO-3"),
        ("distributed_type: DEEPSPEED\ndeepspeed_config: {deepspeed_config_file: own.json}", "no zero_stage"),
        ("distributed_type: FSDP\nfsdp_config: {fsdp_version: 1}", "FSDP1"),
        ("distributed_type: MEGATRON_LM", "no configuration"),
        ("- a list", "no configuration"),
        ("{", "no configuration"),
    ],
)
def test_what_a_configuration_of_ones_own_may_not_ask_for(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(RecipeError, match=said):
        Launch(8, 1, str(tmp_path / "own.yaml")).require_recipe(whole_stages.warm_start("sft", "tiny"), ("sft",))


@pytest.mark.parametrize(
    ("table", "where"),
    [
        ({"sft": {"objective": "psft"}}, "sft.objective"),
        ({"rl": {"policy": "relift"}}, "rl.policy"),
        ({"lora": {"rank": 4}}, "--sharding"),
        ({"preference": {"data": "sums"}}, "--sharding"),
        ({"sft": {}, "precision": "bf16"}, "zero2"),
    ],
)
def test_what_sharded_weights_cannot_do_is_said_on_any_machine(table: dict, where: str) -> None:
    recipe = recipes.parse({"model": "tiny", "data": {"source": "arithmetic"}, **table})
    sharding, named = ("zero2", "precision") if where == "zero2" else ("fsdp2", where)
    with pytest.raises(RecipeError) as error:
        Launch(8, 1, sharding).require_recipe(recipe, tuple(table) if "preference" in table else ("sft", "rl"))
    assert named in str(error.value)


def test_a_launcher_that_fails_itself_says_so(tmp_path: Path) -> None:
    """A port in use: its first line, and no traceback."""
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        meeting = [
            "--rdzv-backend",
            "static",
            "--master-addr",
            "localhost",
            "--master-port",
            port,
            "--max-restarts",
            "0",
        ]
        line = ["torchrun", "--nproc-per-node", "1", "--nnodes", "1", *meeting, str(tmp_path / "none.py")]
        done = subprocess.run([sys.executable, "-m", "heatbath.starting", *line], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("error: ") == 1, done.stderr
    assert "Traceback" not in done.stderr and "remedy" in done.stderr


def test_what_somebody_else_has_started_is_held_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch --config_file fsdp2.yaml -m heatbath …` says so in its processes' environment."""
    recipe = recipes.parse({"model": "tiny", "data": {"source": "arithmetic"}, "lora": {"rank": 4}})
    Launch().require_started(recipe, ("sft",))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RecipeError, match="adapters"):
        Launch().require_started(recipe, ("sft",))


def test_machines_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them with the number 0 would both evaluate, and write the same files."""
    recipe = whole_stages.warm_start("sft", "tiny")
    monkeypatch.setenv("MASTER_ADDR", "head")
    for name in ("NODE_RANK", "SLURM_NODEID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RecipeError, match="NODE_RANK"):
        Launch(2, 2).require(recipe, ("sft",))
    monkeypatch.setenv("SLURM_NODEID", "1")
    Launch(2, 2).require(recipe, ("sft",))


def test_the_processes_see_every_gpu(tmp_path: Path, small_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with two GPUs one process takes the first, and the launcher leaves both to its processes."""
    started: list[str | None] = []

    def run(self: Launch, arguments: list[str], say: object) -> int:
        started.append(os.environ.get("CUDA_VISIBLE_DEVICES"))
        return 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(Launch, "run", run)
    monkeypatch.setattr(pipeline, "check", lambda *_: (None, None))  # which would go to a GPU
    recipe = whole_stages.warm_start("sft", str(small_base))
    (tmp_path / "r.toml").write_text(as_toml(recipe))
    monkeypatch.setattr(sys, "argv", ["heatbath", "sft", "r.toml", "--gpus", "2", "--sharding", "fsdp2"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert (end.value.code, started) == (0, [None])
    monkeypatch.setattr(sys, "argv", ["heatbath", "sft", "r.toml", "--gpus", "3"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert (end.value.code, started) == (2, [None]), "three are asked for and two visible"
    ranks.take_one_device(lambda text: None)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")


def test_a_launcher_that_starts_fewer_is_not_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate's launcher starts one process on a CPU, whatever is asked for."""
    monkeypatch.setenv(ranks.LAUNCHED, "2")
    with pytest.raises(RunError, match="2 processes were asked for and 1 started"):
        ranks.join()


@pytest.mark.parametrize("ending", ["", "raise RunError('what', 'where', 'how')", "raise SystemExit(3)"])
def test_processes_part_before_they_end(ending: str) -> None:
    """However they end: one in five of those that did not was aborted by gloo after its work."""
    program = (
        "import torch\nfrom heatbath import ranks\nfrom heatbath.errors import RunError\n"
        f"try:\n    with ranks.joined():\n        print(ranks.gathered(ranks.rank()))\n        {ending}\n"
        "finally:\n    print('joined', torch.distributed.is_initialized())\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    told = os.environ | meeting | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    line = [sys.executable, "-c", program]
    both = [subprocess.Popen(line, env=told | {"RANK": rank}, stdout=subprocess.PIPE, text=True) for rank in "01"]
    try:
        assert [one.communicate(timeout=120)[0] for one in both] == ["[0, 1]\njoined False\n"] * 2
        assert [one.returncode for one in both] == [3 if "Exit" in ending else int(bool(ending))] * 2
    finally:
        for one in both:
            one.kill()


def test_a_command_joins_and_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    @contextmanager
    def joined() -> Iterator[None]:
        done.append("joined")
        yield
        done.append("parted")

    monkeypatch.setattr(ranks, "joined", joined)
    monkeypatch.setattr(cli_stages, "_carry_out", lambda *asked: done.append("carried out"))
    call(tmp_path, "sft smoke --out x")
    assert done == ["joined", "carried out", "parted"]


@pytest.mark.parametrize("fault", ["a process is killed", "the launcher is told to end", "told to end, fsdp2"])
def test_a_run_of_two_that_is_stopped_resumes_where_it_was(
    shared: Path, small_base: Path, tmp_path: Path, fault: str
) -> None:
    """`heatbath sft --gpus 2`; one rank is killed with -9, or a scheduler ends the command: one line says so, nothing
    half is left, and the resumed run ends in the weights of the uninterrupted one."""
    recipe = whole_stages.warm_start("sft", str(small_base))
    (tmp_path / "r.toml").write_text(as_toml(recipe).replace("save_every = 0", "save_every = 4"))
    line = [sys.executable, "-m", "heatbath", "sft", "r.toml", "--gpus", "2", "--out", "x"]
    if sharded := fault.endswith("fsdp2"):
        torchrun = ["torchrun", "--standalone", "--nproc-per-node", "2", sharding_on_cpu.__file__, "fsdp2"]
        line = [sys.executable, "-m", "heatbath.starting", *torchrun, "sft", "r.toml", "--out", "x"]
    settings = {"cwd": tmp_path, "env": os.environ | {"OMP_NUM_THREADS": "1"}, "stderr": subprocess.PIPE, "text": True}
    started = subprocess.Popen(line, **settings)
    log, deadline = tmp_path / "x" / "metrics.jsonl", time.monotonic() + 240
    while started.poll() is None and time.monotonic() < deadline and not (log.exists() and len(log.read_text()) > 3000):
        time.sleep(0.01)
    if killed := fault == "a process is killed":
        os.kill(_ranks_of(started.pid)[1], signal.SIGKILL)
    else:
        started.terminate()
    said = started.communicate(timeout=120)[1]
    assert started.returncode == (1 if killed or sharded else 130), said
    assert said.count("error: process 1 was killed by SIGKILL" if killed else "interrupted; --resume") == 1, said
    assert "Traceback" not in said, said
    assert not (tmp_path / "x" / "checkpoints" / "init").exists()
    if not killed:
        steps = [row["step"] for row in map(json.loads, log.read_text().splitlines()) if "nll" in row]
        assert (tmp_path / "x" / "checkpoints" / ".sft" / f"checkpoint-{max(steps)}" / "complete").is_file()
    done = subprocess.run([*line, "--resume"], timeout=240, check=False, **settings)
    assert done.returncode == 0 and "going on after step" in done.stderr, done.stderr
    ends = (tmp_path / "x", shared / ("fsdp2" if sharded else "two") / "sft")
    assert moved(*(end / "checkpoints" / "init" for end in ends)) == 0.0


def _ranks_of(launcher: int) -> list[int]:
    """Process ids by rank of heatbath's processes that descend from the launcher."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            held = dict(x.split("=", 1) for x in (folder / "environ").read_text().split("\0") if "=" in x)
            agent = _parent(int(folder.name))
            starter = _parent(agent)
        except (OSError, IndexError):
            continue
        if "RANK" in held and launcher in (agent, starter):
            found[int(held["RANK"])] = int(folder.name)
    assert sorted(found) == [0, 1]
    return [found[0], found[1]]


def _parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
