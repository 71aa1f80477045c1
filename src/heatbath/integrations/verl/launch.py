"""`heatbath rl RECIPE --engine verl`: writes what verl reads, starts its trainer, takes over the policy it ends with.

The trainer runs in verl's own environment, whose python $HEATBATH_VERL_PYTHON names; $RAY_ADDRESS names the cluster.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from heatbath import models
from heatbath.data.rows import Splits
from heatbath.errors import RunError
from heatbath.integrations.verl import files
from heatbath.progress import Progress
from heatbath.recipe import Recipe
from heatbath.run import Run

VERL = "0.9.1"  # what the keys were read from
PYTHON = "HEATBATH_VERL_PYTHON"
PROBE = """\
import importlib, json, sys
found = {}
for name in ("verl", "verl.trainer.main_ppo", "heatbath.integrations.verl.check", "math_verify"):
    try:
        found[name] = str(getattr(importlib.import_module(name), "__version__", ""))
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}", "name": name}
        break
print(json.dumps(found))
"""


def run_rl_on_verl(run: Run, recipe: Recipe, splits: Splits, progress: Progress) -> None:
    """Leaves the policy `final`, as `run_rl` does. Raises RunError where verl is not there or fails; the files stay."""
    trained = recipe.sft is not None and run.finished("sft")
    start = "init" if trained else "base"
    tokenizer = models.load_tokenizer(run.model_of(start), run.template_of(start))
    written = files.write(run, recipe, splits, tokenizer)
    names = sorted(path.name for path in written.folder.iterdir() if path.is_file())
    progress.say(f"verl: wrote {', '.join(names)} into {written.folder}")
    for note in written.notes:
        progress.say(f"verl: {note}")
    if recipe.sft is not None and not trained:
        _warm_start(run, written, progress)
    last = run.working("rl") / files.SHARDS / f"global_step_{written.last}"
    if not _complete(last):
        python = require_verl(written.folder)
        progress.say(f"verl: {written.last} generations, started by sh {written.folder / 'rl.sh'}")
        _call(["sh", str(written.folder / "rl.sh")], python, written.folder)
    if not _complete(last):
        raise RunError("verl ended without its last checkpoint", str(last), "--resume starts it again where it stopped")
    take_over(run, "final", last / "actor", progress)


def _warm_start(run: Run, written: files.Written, progress: Progress) -> None:
    """Takes over the policy `init` of verl's SFT trainer, where it has run. Raises RunError where nothing made one."""
    last = run.working("sft") / files.SHARDS / f"global_step_{written.sft_last}"
    if not _complete(last):
        other = f", sh {written.folder / 'sft.sh'} with verl's SFT trainer" if written.sft_last else ""
        remedy = f"heatbath sft makes it here{other}; then --resume"
        raise RunError("the run has no 'init' policy yet, with which RL begins", str(run.checkpoint("init")), remedy)
    take_over(run, "init", last, progress)


def _complete(checkpoint: Path) -> bool:
    """Whether verl has finished writing it: only then it names it as its latest."""
    latest = checkpoint.parent / "latest_checkpointed_iteration.txt"
    number = checkpoint.name.rpartition("_")[2]
    return checkpoint.is_dir() and latest.is_file() and latest.read_text().strip() == number


def require_verl(folder: Path) -> str:
    """The python of verl's environment. Raises RunError naming what cannot be imported there."""
    python = os.environ.get(PYTHON) or sys.executable
    try:
        done = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, check=False)
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (OSError, IndexError, ValueError) as error:
        found = {"error": f"{type(error).__name__}: {error}", "name": "it"}
    if "error" in found:
        raise RunError(
            f"{found['name']} cannot be imported by {python}: {found['error']}",
            PYTHON,
            f"name the python of an environment with verl {VERL} and heatbath (docs/verl.md), or run "
            f"{folder / 'rl.sh'} where there is one; then --resume",
        )
    return python


def take_over(run: Run, policy: str, checkpoint: Path, progress: Progress) -> None:
    """A checkpoint of verl as a policy of the run: the whole weights that it saved beside its shards, else its merger's
    (which rounds to 16 bits). Raises RunError where what lies there is no model."""
    whole = checkpoint / "huggingface"
    tokenizer = run.folder / files.FOLDER / "tokenizer"
    with run.new_checkpoint(policy) as folder:
        if list(whole.glob("*.safetensors")):
            shutil.copytree(whole, folder, dirs_exist_ok=True)
            said = "its whole weights"
        else:
            python = require_verl(run.folder / files.FOLDER)
            merge = [python, "-m", "verl.model_merger", "merge", "--backend", "fsdp", "--local_dir", str(checkpoint)]
            _call([*merge, "--target_dir", str(folder)], python, run.folder / files.FOLDER)
            said = "its shards, merged and rounded to 16 bits by verl"
        shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
        if not list(folder.glob("*.safetensors")):
            raise RunError("verl's checkpoint holds no weights", str(checkpoint), "look at what verl wrote there")
        progress.say(f"{policy}: taken over from {checkpoint} ({said})")


def _call(command: list[str], python: str, folder: Path) -> None:
    """Runs it with its output on stderr. Raises RunError with its exit code."""
    environment = os.environ | {PYTHON: python}
    done = subprocess.run(command, env=environment, stdout=sys.stderr, check=False)
    if done.returncode:
        remedy = f"what it said stands above; the files are in {folder}, --resume starts it again"
        raise RunError(f"it ended with exit code {done.returncode}", " ".join(command), remedy)
