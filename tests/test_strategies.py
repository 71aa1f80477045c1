"""Strategies by name: the tables they lay over a recipe, a recipe's own tables on top, overrides last."""

from pathlib import Path

import pytest

from heatbath import recipe as recipes
from heatbath.data import sources
from heatbath.errors import DataError, RecipeError
from heatbath.recipe import load
from heatbath.strategies import STRATEGIES, lay, listed, shown

TABLE_1 = ["direct-sft", "direct-rl", "luffy", "relift", "sft", "sft-entropy", "sft-label-smoothing", "sft-kd"]
TABLE_1 += ["dft", "asft", "psft", "gift"]
RECIPE = """
model = "m"
[data]
source = "arithmetic"
demos = 24
prompts = 16
[sft]
objective = { name = "gift", beta = 4.0 }
lr = 3e-4
epochs = 2
[rl]
policy = { name = "grpo", kl = 0.01 }
prompts = 8
update_prompts = 8
[strategies.gift.sft]
objective = { beta = 8.0 }
lr = 5e-4
[strategies.mine]
rl = false
sft.objective = { name = "kd", alpha = 0.3 }
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "r.toml").write_text(RECIPE)
    return tmp_path / "r.toml"


def test_every_row_of_table_1_has_a_name() -> None:
    assert set(TABLE_1) <= set(STRATEGIES)
    assert [row["name"] for row in listed()] == list(STRATEGIES)
    assert all(name in shown() for name in STRATEGIES)


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_loads_and_is_what_its_name_says(name: str, path: Path) -> None:
    made = load(path, [f"strategy={name}"])
    assert made.name == name
    assert (made.rl is None) == (name == "direct-sft")
    assert (made.sft is None) == (name in ("direct-rl", "luffy", "relift", "trapo", "uft"))
    if made.sft is not None:
        wanted = name.removeprefix("sft-").removeprefix("direct-").replace("-", "_")
        assert made.sft.objective.name == wanted
    if name in ("luffy", "relift", "trapo", "uft"):
        assert made.rl.policy.name == name and not made.rl.policy.hyper
    elif made.rl is not None:
        assert made.rl.policy.hyper == {"kl": 0.01}, "the recipe's own RL"


def test_the_recipes_own_table_comes_on_top_and_overrides_last(path: Path) -> None:
    assert load(path).sft.objective.hyper == {"beta": 4.0} and load(path).name is None
    made = load(path, ["strategy=gift"])
    assert made.sft.objective.hyper == {"beta": 8.0} and (made.sft.lr, made.sft.epochs) == (5e-4, 2)
    made = load(path, ["sft.lr=1e-3", "sft.objective.beta=9", "strategy=gift"])
    assert made.sft.objective.hyper == {"beta": 9} and made.sft.lr == 1e-3
    mine = load(path, ["strategy=mine"])
    assert mine.rl is None and mine.sft.objective.name == "kd" and mine.sft.objective.hyper == {"alpha": 0.3}


def test_a_resolved_recipe_is_that_of_the_strategy(path: Path, tmp_path: Path) -> None:
    """What a run's folder keeps names the strategy and needs no table of strategies."""
    made = load(path, ["strategy=gift", "sft.objective.beta=9"])
    (tmp_path / "resolved.toml").write_text(recipes.as_toml(made))
    assert load(tmp_path / "resolved.toml") == made


def test_a_strategy_in_the_file_is_its_default(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('strategy = "dft"\n' + RECIPE)
    assert load(tmp_path / "r.toml").sft.objective.name == "dft"
    assert load(tmp_path / "r.toml", ["strategy=direct-rl"]).sft is None


def test_an_unknown_strategy_is_told(path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'gift'"):
        load(path, ["strategy=gif"])
    with pytest.raises(RecipeError, match=r"\[strategies.other\]"):
        lay({}, "other", {})
    with pytest.raises(RecipeError, match="strategy"):
        load(path, ["strategies.gift.sft.lr=3"])


def test_direct_sft_learns_from_both_stages(path: Path) -> None:
    made = load(path, ["strategy=direct-sft"])
    plain, both = sources.load(made.data, 0), sources.of(made)
    assert both.demos == [*plain.demos, *plain.prompts] and len(both.demos) == 24 + 16
    assert sources.of(load(path, ["strategy=sft"])).demos == plain.demos
    only = load(path, ["strategy=direct-sft", 'sft.splits=["prompts"]'])
    assert sources.of(only).demos == plain.prompts


def test_a_prompt_without_a_solution_cannot_be_learned_from(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n')
    table = {"source": "files", "folder": str(tmp_path), "prompts_from": "rows.jsonl"}
    made = recipes.parse({"model": "m", "data": table, "sft": {"splits": ["prompts"]}})
    with pytest.raises(DataError, match="a prompt without a solution"):
        sources.of(made)


def test_settings_can_be_chosen_on_the_validation_problems(path: Path) -> None:
    made = load(path, ["eval.split=validation"])
    plain, asked = sources.load(made.data, 0), sources.of(made)
    assert [row.problem for row in asked.test] == [row.problem for row in plain.validation]
    assert not {row.problem for row in asked.test} & {row.problem for row in plain.test}
