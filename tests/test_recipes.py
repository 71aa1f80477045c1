"""Every shipped recipe loads; every way a recipe can be wrong is told, all at once, with a suggestion."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from heatbath import recipe as recipes
from heatbath.errors import RecipeError
from heatbath.recipe import as_toml, load, parse, shipped
from heatbath.stages.rl import policy_of
from heatbath.stages.trainer_fields import ONLY, READ_BY_LOSS, REFUSED, REFUSED_IN, SAID_ELSEWHERE, _types

MINIMAL = {"model": "m", "data": {"source": "arithmetic"}}


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_loads_by_name_and_by_path(name: str) -> None:
    path = shipped()[name]
    assert load(name) == load(path)
    commands = (f"# heatbath run recipes/{name}.toml", f"# heatbath compare {name} ")
    assert path.read_text().startswith(commands), "the first line is the command"


def test_defaults_are_the_papers() -> None:
    """arXiv 2601.09233, appendix E.1 (SFT) and E.2 (RL)."""
    made = parse({**MINIMAL, "sft": {}, "rl": {}})
    sft, rl = made.sft, made.rl
    assert (sft.lr, sft.schedule, sft.batch, sft.epochs, sft.max_length) == (1e-5, "constant", 128, 6, 8192)
    assert (sft.adam_betas, sft.weight_decay, sft.reduction) == ((0.9, 0.95), 0.01, "token_mean")
    assert (rl.group_size, rl.temperature, rl.lr, rl.schedule) == (8, 1.0, 1e-6, "constant")
    assert (rl.prompts, rl.update_prompts, rl.policy.name, rl.epochs, rl.max_new_tokens) == (128, 64, "paper", 1, 8192)
    e2 = policy_of(rl)
    assert (e2.advantage, e2.clip_low, e2.clip_high, e2.reduction, e2.kl) == ("centred", 0.2, 0.2, "token_mean", 0.0)
    assert (made.eval.temperature, made.eval.max_new_tokens, made.reward.deadline) == (0.6, 8192, 10.0)


def test_a_resolved_recipe_reads_back_as_itself() -> None:
    text = 'Say "yes"\\no\n\ttab \x01 ünï'
    made = parse(
        {
            **MINIMAL,
            "data": {"source": "arithmetic", "system": text},
            "sft": {"objective": {"name": "gift", "beta": 7}},
            "rl": {},
        }
    )
    assert parse(tomllib.loads(as_toml(made))) == made


@pytest.mark.parametrize(
    ("table", "messages"),
    [
        ({**MINIMAL, "sfx": {}}, ["sfx: unknown key, did you mean 'sft'?"]),
        (
            {**MINIMAL, "data": {"source": "arithmetic", "digts": 2}},
            ["data.digts: unknown key, did you mean 'digits'?"],
        ),
        ({**MINIMAL, "sft": {"beta": 3}}, ["sft.beta: unknown key here, did you mean 'sft.objective.beta'?"]),
        ({**MINIMAL, "lr": 3}, ["lr: unknown key here, did you mean"]),
        (
            {**MINIMAL, "sft": {"lr": "fast"}, "rl": {"group_size": 1}},
            ["sft.lr:", "'fast'", "rl.group_size:", "(got 1)"],
        ),
        ({**MINIMAL, "sft": {"lr": float("nan")}}, ["sft.lr:"]),
        ({**MINIMAL, "sft": {"objective": "gfit"}}, ["sft.objective: unknown objective 'gfit', did you mean 'gift'?"]),
        ({**MINIMAL, "sft": {"objective": {"name": "gift", "beta": -1}}}, ["objective 'gift': beta must be"]),
        (
            {**MINIMAL, "sft": {"batch": 10, "micro_batch": 4}},
            ["sft: batch (10) must be a multiple of micro_batch (4)"],
        ),
        ({**MINIMAL, "rl": {"prompts": 10, "update_prompts": 4}}, ["rl: prompts (10) must be a multiple"]),
        ({**MINIMAL, "rl": {"micro_batch": 7}}, ["must be a multiple of micro_batch (7)"]),
        ({**MINIMAL, "eval": {"samples": 4, "k": [8]}}, ["eval: pass@8 needs at least 8 samples"]),
        ({"model": "m", "data": {"source": "files"}, "sft": {}}, ["the sft stage reads data.demos"]),
        ({"model": "m", "data": {"source": "hug"}}, ["data.source: no source is called 'hug', did you mean 'hub'?"]),
        ({"data": {"source": "arithmetic"}}, ["model: required"]),
        ({**MINIMAL, "seed": -1}, ["seed: input should be greater than or equal to 0 (got -1)"]),
        ({**MINIMAL, "seed": 2**32}, ["seed: input should be less than 4294967296"]),
    ],
)
def test_wrong_recipes_are_told(table: dict, messages: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(table)
    for message in messages:
        assert message in str(caught.value)
    assert caught.value.exit_code == 2


def test_overrides(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('model = "m"\n[data]\nsource = "arithmetic"\n[sft]\nobjective = { name = "gift", beta = 9 }\n')
    assert load(path, ["sft.lr=2e-5", "model=other", "eval.k=[1, 2]", "data.system=Be brief."]).model == "other"
    assert load(path, ["data.system=Be brief."]).data.system == "Be brief."
    assert load(path, ["sft.objective.beta=3"]).sft.objective.hyper == {"beta": 3}
    # a new objective starts from its own defaults, whatever the order; what is overridden beside it stays
    assert load(path, ["sft.objective.name=sft"]).sft.objective.hyper == {}
    made = load(path, ["sft.objective.smoothing=0.1", "sft.objective.beta=4", "sft.objective.name=gift"])
    assert made.sft.objective.hyper == {"smoothing": 0.1, "beta": 4}
    for wrong in ("sft.lr", "=3", "model.name=x"):
        with pytest.raises(RecipeError):
            load(path, [wrong])


def test_a_recipe_may_extend_another(tmp_path: Path) -> None:
    (tmp_path / "under.toml").write_text(
        'model = "m"\nseed = 3\n[data]\nsource = "arithmetic"\n[sft]\nobjective = { name = "gift", beta = 9 }\n'
        "lr = 1e-3\n[rl]\n[compare]\nseeds = [7]\n[strategies.mine]\nsft.lr = 5e-3\n"
    )
    over = tmp_path / "over.toml"
    over.write_text('extends = "under.toml"\nrl = false\n[sft]\nepochs = 2\n[strategies.mine]\nseed = 4\n')
    made = load(over)
    assert (made.model, made.seed, made.rl, made.sft.epochs, made.sft.lr) == ("m", 3, None, 2, 1e-3)
    assert made.sft.objective.hyper == {"beta": 9} and recipes.comparison(over).seeds == [7]
    mine = load(over, ["strategy=mine"])
    assert (mine.seed, mine.sft.lr) == (4, 5e-3)
    over.write_text('extends = "under.toml"\n[compare]\nbaseline = "x"\n')
    assert (recipes.comparison(over).seeds, recipes.comparison(over).baseline) == ([0, 1, 2], "x")
    over.write_text('extends = "smoke"\nseed = 5\n')
    assert load(over) == load("smoke", ["seed=5"])
    over.write_text('extends = "over.toml"\n')
    with pytest.raises(RecipeError, match="extends itself"):
        load(over)
    over.write_text('extends = "smok"\n')
    with pytest.raises(RecipeError, match="did you mean 'smoke'"):
        load(over)


def test_missing_and_broken_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'demo'"):
        load("dmo.toml")
    (tmp_path / "b.toml").write_text("model =")
    with pytest.raises(RecipeError, match="not valid TOML"):
        load(tmp_path / "b.toml")
    with pytest.raises(RecipeError, match="cannot read"):
        load(tmp_path)


def test_a_folder_of_a_recipes_name_does_not_hide_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smoke").mkdir()
    assert load("smoke") == load(shipped()["smoke"])
    (tmp_path / "smoke" / "recipe.toml").write_text('model = "mine"\n[data]\nsource = "arithmetic"\n')
    assert load("smoke").model == "mine", "a run's own recipe"


def test_recipes_travel_with_the_package() -> None:
    assert {p.stem for p in (Path(__file__).parents[1] / "recipes").glob("*.toml")} == set(recipes.shipped())


def test_a_recipe_is_copied_once_and_never_over_a_file(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert recipes.copy("smoke") == Path("smoke.toml") and load("smoke.toml") == load(shipped()["smoke"])
    assert recipes.copy("fsdp2") == Path("fsdp2.yaml") and "fsdp_version: 2" in Path("fsdp2.yaml").read_text()
    assert recipes.copy("demo.toml", tmp_path / "mine.toml") == tmp_path / "mine.toml"
    (tmp_path / "smoke.toml").write_text("mine")
    for to in (None, tmp_path, tmp_path / "smoke.toml"):
        with pytest.raises(RecipeError, match="nothing was written"):
            recipes.copy("smoke", to)
    assert (tmp_path / "smoke.toml").read_text() == "mine"
    with pytest.raises(RecipeError, match="did you mean 'smoke'"):
        recipes.copy("smokes")


def test_trainer_fields_keep_their_type(tmp_path: Path) -> None:
    """The text "False" would switch a feature on."""
    path = tmp_path / "r.toml"
    path.write_text('model = "m"\n[data]\nsource = "arithmetic"\n[rl]\n[sft]\n')
    for text in ("False", "false"):
        made = load(path, [f"rl.trainer.mask_truncated_completions={text}", "sft.trainer.neftune_noise_alpha=5"])
        assert made.rl.trainer == {"mask_truncated_completions": False}
        assert made.sft.trainer == {"neftune_noise_alpha": 5}
    for wrong in ("rl.trainer.mask_truncated_completions=no", "sft.trainer.dataloader_num_workers='2'"):
        with pytest.raises(RecipeError, match="input should be a valid"):
            load(path, [wrong])


def test_every_trainer_field_named_in_the_tables_exists() -> None:
    """A refusal of a field that TRL no longer has would be dead text."""
    for stage in ONLY:
        known = set(_types(stage))
        assert set(ONLY[stage]) | set(REFUSED_IN.get(stage, {})) <= known
    assert set(READ_BY_LOSS) <= set(_types("preference"))
    both = set(_types("sft")) | set(_types("rl"))
    assert set(SAID_ELSEWHERE) | set(REFUSED) <= both


@pytest.mark.slow
def test_the_wheel_alone_runs_smoke(tmp_path: Path) -> None:
    """Built, installed without the source tree beside it; what it depends on is that of the test's own interpreter."""
    root = Path(__file__).parents[1]
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(root)], check=True
    )
    (wheel,) = tmp_path.glob("heatbath-*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", str(wheel)], check=True)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    theirs = [p for p in sys.path if p.endswith("site-packages")]
    (site / "zz-dependencies.pth").write_text("\n".join(theirs) + "\n")
    command = "import heatbath, runpy, sys; print(heatbath.__file__); sys.argv[1:] = ['run', 'smoke']; "
    command += "runpy.run_module('heatbath', run_name='__main__')"
    done = subprocess.run([python, "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith(str(site)), "the source tree was used"
    assert (tmp_path / "runs" / "smoke" / "report.html").is_file()
