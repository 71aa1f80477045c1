"""The frozen surface: changing what a user can type is a decision, with a CHANGELOG line."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import heatbath
from heatbath import cli, recipe
from heatbath.errors import HeatbathError

STAGE_OPTIONS = ["--change", "--dry-run", "--fresh", "--gpus", "--json", "--nodes", "--out", "--resume", "--sharding"]
STAGE_OPTIONS += ["--verbose", "-v"]
COMMANDS = {
    "run": STAGE_OPTIONS,
    "sft": STAGE_OPTIONS,
    "rl": sorted([*STAGE_OPTIONS, "--engine"]),
    "eval": sorted([*STAGE_OPTIONS, "--rescore"]),
    "compare": [
        "--baseline",
        "--cell",
        "--dry-run",
        "--jobs",
        "--json",
        "--no-tune",
        "--out",
        "--seeds",
        "--vary",
        "--verbose",
        "-v",
    ],
    "surprise": ["--json", "--out", "--verbose", "-v"],
    "inspect": ["--json", "--row", "--surprise", "--verbose", "-n", "-v"],
    "shift": ["--data", "--fresh", "--json", "--on", "--out", "--verbose", "-v"],
    "grade": ["--deadline", "--fresh", "--json", "--kind", "--out", "--profile", "--workers"],
    "report": ["--json", "--out"],
    "export": ["--adapter", "--dtype", "--json", "--out", "--policy", "--push", "--verbose", "-v"],
    "recipes": ["--json", "--policies", "--strategies", "--tasks"],
    "doctor": ["--json"],
}
KEYS = [
    "compare.baseline",
    "compare.seeds",
    "compare.shift",
    "compare.tune.grid",
    "compare.tune.grids",
    "compare.tune.k",
    "compare.tune.overrides",
    "compare.tune.seeds",
    "compare.vary",
    "data.config",
    "data.data_dir",
    "data.decontaminate",
    "data.demos",
    "data.demos_from",
    "data.digits",
    "data.family",
    "data.fields.answer",
    "data.fields.answer_after",
    "data.fields.columns",
    "data.fields.kind",
    "data.fields.messages",
    "data.fields.options",
    "data.fields.question",
    "data.fields.solution",
    "data.fields.tests",
    "data.folder",
    "data.forms",
    "data.label_noise",
    "data.name",
    "data.ngram",
    "data.operations",
    "data.options",
    "data.paths",
    "data.pool",
    "data.prompts",
    "data.prompts_from",
    "data.r1_solution",
    "data.revision",
    "data.source",
    "data.system",
    "data.test",
    "data.test_fields.answer",
    "data.test_fields.answer_after",
    "data.test_fields.columns",
    "data.test_fields.kind",
    "data.test_fields.messages",
    "data.test_fields.options",
    "data.test_fields.question",
    "data.test_fields.solution",
    "data.test_fields.tests",
    "data.test_from",
    "data.validation",
    "data.validation_from",
    "eval.batch",
    "eval.data_dir",
    "eval.endpoint",
    "eval.engine",
    "eval.judge.endpoint",
    "eval.judge.key_env",
    "eval.judge.model",
    "eval.k",
    "eval.max_new_tokens",
    "eval.problems",
    "eval.samples",
    "eval.served",
    "eval.split",
    "eval.tasks.k",
    "eval.tasks.max_new_tokens",
    "eval.tasks.name",
    "eval.tasks.problems",
    "eval.tasks.samples",
    "eval.tasks.temperature",
    "eval.tasks.top_p",
    "eval.temperature",
    "eval.top_p",
    "extends",
    "lora.alpha",
    "lora.dropout",
    "lora.quantization",
    "lora.rank",
    "lora.targets",
    "model",
    "name",
    "precision",
    "preference.adam_betas",
    "preference.batch",
    "preference.beta",
    "preference.data",
    "preference.epochs",
    "preference.log_every",
    "preference.loss",
    "preference.lr",
    "preference.max_grad_norm",
    "preference.max_length",
    "preference.max_steps",
    "preference.method",
    "preference.micro_batch",
    "preference.save_every",
    "preference.save_total_limit",
    "preference.schedule",
    "preference.trainer",
    "preference.truncate",
    "preference.warmup_steps",
    "preference.weight_decay",
    "pretrain.adam_betas",
    "pretrain.batch",
    "pretrain.epochs",
    "pretrain.heads",
    "pretrain.layers",
    "pretrain.lr",
    "pretrain.max_grad_norm",
    "pretrain.save_every",
    "pretrain.save_total_limit",
    "pretrain.schedule",
    "pretrain.warmup_steps",
    "pretrain.weight_decay",
    "pretrain.width",
    "published",
    "reward.deadline",
    "reward.failed_share",
    "reward.isolation",
    "reward.kind",
    "reward.model",
    "reward.profile",
    "reward.sqrt_length",
    "reward.stages",
    "reward.weights",
    "reward.workers",
    "rl.adam_betas",
    "rl.epochs",
    "rl.eval_every",
    "rl.eval_prompts",
    "rl.group_size",
    "rl.kl_every",
    "rl.lr",
    "rl.max_grad_norm",
    "rl.max_new_tokens",
    "rl.max_steps",
    "rl.micro_batch",
    "rl.policy.name",
    "rl.prompts",
    "rl.readiness",
    "rl.save_every",
    "rl.save_total_limit",
    "rl.schedule",
    "rl.temperature",
    "rl.trainer",
    "rl.truncate",
    "rl.update_prompts",
    "rl.verl",
    "rl.warmup_steps",
    "rl.weight_decay",
    "seed",
    "sft.adam_betas",
    "sft.batch",
    "sft.epochs",
    "sft.epsilon",
    "sft.log_every",
    "sft.lr",
    "sft.max_grad_norm",
    "sft.max_length",
    "sft.max_steps",
    "sft.micro_batch",
    "sft.objective.name",
    "sft.packing",
    "sft.reduction",
    "sft.reference",
    "sft.replay.alone",
    "sft.replay.lift",
    "sft.replay.max_new_tokens",
    "sft.replay.samples",
    "sft.replay.weight",
    "sft.save_every",
    "sft.save_total_limit",
    "sft.schedule",
    "sft.splits",
    "sft.trainer",
    "sft.truncate",
    "sft.warmup_steps",
    "sft.weight_decay",
    "strategies",
    "strategy",
    "template",
    "trust_remote_code",
]
PUBLIC = [
    "AdaptersOff",
    "CachedBase",
    "FrozenBase",
    "HeatbathError",
    "MathGrader",
    "Objective",
    "ObjectiveMixin",
    "ObjectiveTrainer",
    "PolicyTrainer",
    "ReferenceCache",
    "RowCollator",
    "TokenStats",
    "Verdict",
    "dense_loss",
    "linear_loss",
    "linear_stats",
    "mean_with_interval",
    "objective",
    "paired_difference",
    "pass_at_k",
    "policy",
    "policy_loss",
    "rewards",
]
SOURCE = Path(heatbath.__file__).parent


def test_commands_and_options() -> None:
    group = typer.main.get_command(cli.app)
    found = {
        name: sorted(o for p in command.params for o in (*p.opts, *p.secondary_opts) if o.startswith("-"))
        for name, command in group.commands.items()
    }
    assert found == COMMANDS


def test_recipe_keys() -> None:
    assert recipe.surface() == sorted(KEYS)


def test_public_names_resolve() -> None:
    assert sorted(heatbath.__all__) == sorted(PUBLIC) and len(PUBLIC) <= 25
    for name in PUBLIC:
        found = getattr(heatbath, name)
        assert getattr(found, "__module__", found.__name__).startswith("heatbath.")


def test_importing_heatbath_and_listing_commands_imports_no_torch() -> None:
    code = (
        "import sys, heatbath.cli, heatbath.recipe; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_ideas_import_nothing_but_ideas_and_numbers() -> None:
    allowed = {"torch", "numpy", "scipy", "heatbath.ideas"}
    for path in (SOURCE / "ideas").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                known = name.partition(".")[0] in sys.stdlib_module_names or name.partition(".")[0] in allowed
                assert known or name.startswith("heatbath.ideas"), f"{path.name} imports {name}"


def test_objectives_are_chosen_by_table_not_by_name_in_a_trainer() -> None:
    for path in (SOURCE / "stages").glob("*.py"):
        constants = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
        assert not constants & {"gift", "kd", "dft"}, path.name


def test_nothing_evaluates_text() -> None:
    for path in SOURCE.rglob("*.py"):
        if path.name == "inside.py":
            continue  # runs the model's programs, inside the sandbox
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"eval", "exec", "sympify", "parse_expr"}, path.name


@pytest.mark.parametrize("limit", [500])
def test_files_stay_readable(limit: int) -> None:
    for path in SOURCE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= limit, path.name
        assert path.stem not in {"utils", "helpers", "manager", "base", "misc", "common"}


def test_errors_say_what_where_and_what_to_do() -> None:
    text = str(HeatbathError("it broke", "sft.lr", "lower it"))
    assert text == "it broke\n  where:  sft.lr\n  remedy: lower it"
