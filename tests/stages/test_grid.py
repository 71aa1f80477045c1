"""The cells of a comparison, what they may share, and the numbers made of them by hand."""

import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from heatbath import recipe as recipes
from heatbath.compare_sections import Compare, Tune, trials
from heatbath.errors import RecipeError, RunError
from heatbath.ideas.passk import pass_at_k
from heatbath.run import Run
from heatbath.stages import grid, grid_summary, scoring
from heatbath.stages.grid import Cell
from written_runs import written

RECIPE = """
model = "m"
[data]
source = "arithmetic"
[sft]
objective = "sft"
[rl]
[eval]
samples = 2
k = [1, 2]
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    (tmp_path / "r.toml").write_text(RECIPE)
    return str(tmp_path / "r.toml")


def test_settings_are_every_combination_in_order() -> None:
    vary = {"strategy": ["sft", "gift"], "sft.lr": [1e-3, 0.5], "rl.policy": [{"name": "grpo", "kl": 0.1}, "paper"]}
    found = grid.of_plan(Compare(vary=vary))
    assert list(found)[:3] == ["sft lr=0.001 grpo,kl=0.1", "sft lr=0.001 paper", "sft lr=0.5 grpo,kl=0.1"]
    assert len(found) == 8
    assert found["gift lr=0.5 paper"] == ("strategy=gift", "sft.lr=0.5", "rl.policy=paper")
    assert grid.settings({}) == {"recipe": ()}
    twice = grid.of_plan(Compare(vary={"sft.lr": [1e-3], "rl.lr": [1e-3]}))
    assert list(twice) == ["sft.lr=0.001 rl.lr=0.001"], "two keys of one last part are told apart"
    assert len(grid.of_plan(Compare(vary={"sft.lr": [0.1234567, 0.12345671]}))) == 2


def test_what_a_label_says_is_what_the_recipe_gets(path: str) -> None:
    """Every override is read back by the recipe's own reader."""
    vary = {"rl.policy": [{"name": "grpo", "kl": 0.1}], "sft.lr": [3e-05], "data.forms": [["tens", "ones"]]}
    ((_, overrides),) = grid.settings(vary).items()
    made = recipes.load(path, list(overrides))
    assert made.rl.policy.hyper == {"kl": 0.1} and made.sft.lr == 3e-05 and made.data.forms == ["tens", "ones"]


def test_cells_go_seed_by_seed_each_in_a_folder_of_its_own(path: str, tmp_path: Path) -> None:
    plan = Compare(vary={"strategy": ["sft", "dft"], "sft.epochs": [1, 2]}, seeds=[5, 3])
    cells = grid.cells(plan, path, ("sft.lr=1e-3",), tmp_path, {"dft epochs=2": ["sft.batch=4"]})
    assert [cell.seed for cell in cells] == [5] * 4 + [3] * 4
    assert len({cell.folder for cell in cells}) == 8
    last = cells[-1]
    assert last.overrides == ("sft.lr=1e-3", "strategy=dft", "sft.epochs=2", "sft.batch=4", "seed=3")
    made = recipes.load(path, [*last.overrides, "sft.micro_batch=4"])
    assert (made.seed, made.name, made.sft.epochs, made.sft.batch, made.sft.lr) == (3, "dft", 2, 4, 1e-3)


def test_tuning_asks_the_validation_problems_with_other_seeds_and_as_many_trials_for_each(path: str) -> None:
    tune = {"grid": {"sft.lr": [1e-3, 1e-4]}, "grids": {"direct-rl": {"rl.lr": [1, 2]}}, "seeds": [9]}
    plan = Compare(vary={"strategy": ["sft", "direct-rl"]}, tune=tune | {"overrides": {"rl.max_steps": 3}})
    found = grid.tuning_cells(plan, path, (), Path("out"))
    assert [cell.trial for cell in found] == ["sft.lr=0.001", "sft.lr=0.0001", "rl.lr=1", "rl.lr=2"]
    for cell in found:
        made = recipes.load(path, list(cell.overrides))
        assert (made.eval.split, made.seed, made.rl.max_steps) == ("validation", 9, 3)
        assert (made.sft is None) == (cell.setting == "direct-rl")
    two = plan.model_copy(update={"vary": {"strategy": ["sft", "direct-rl"], "data.demos": [64, 128]}})
    trials_by = {cell.setting: [] for cell in grid.tuning_cells(two, path, (), Path("out"))}
    for cell in grid.tuning_cells(two, path, (), Path("out")):
        trials_by[cell.setting].append(cell.trial)
    assert trials_by["direct-rl demos=128"] == ["rl.lr=1", "rl.lr=2"], "the grid of its strategy"
    with pytest.raises(ValueError, match="give all the same number"):
        Tune(grid={"a": [1, 2]}, grids={"x": {"b": [1, 2, 3]}})
    assert trials({"a": [1, 2], "b": [1, 2, 3]}) == 6
    with pytest.raises(ValueError, match="share a seed"):
        Compare(seeds=[1, 9], tune=tune)


def test_an_override_for_all_brings_no_stage_back(path: str) -> None:
    """The keys of a stage that a strategy leaves out are those of no stage: a default one would be trained."""
    tune = {"grid": {"sft.lr": [1e-3]}, "overrides": {"rl.max_steps": 3, "eval.samples": 4}}
    plan = Compare(
        vary={"strategy": ["direct-sft", "sft", "direct-rl"]}, tune=tune | {"grids": {"direct-rl": {"rl.lr": [1]}}}
    )
    both = [*grid.cells(plan, path, ("sft.epochs=3",), Path("o")), *grid.tuning_cells(plan, path, (), Path("o"))]
    for cell in both:
        made = recipes.load(path, list(cell.overrides))
        assert (made.rl is None, made.sft is None) == (cell.setting == "direct-sft", cell.setting == "direct-rl")
        assert not cell.trial or made.eval.samples == 4
    with pytest.raises(RecipeError, match=r"the strategy 'direct-rl' has no \[sft\]"):
        recipes.load(path, ["strategy=direct-rl", "sft.lr=1e-3"])


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({"vary": {"strategy": ["sft", "gfit"]}}, "did you mean 'gift'"),
        ({"vary": {"sft.lrr": [1]}}, "unknown key"),
        ({"vary": {"strategy": ["sft"]}, "baseline": "dft"}, "no setting is called 'dft'"),
        ({"vary": {"data.system": ["a b", "a/b"]}}, "share the folder"),
        ({"vary": {"strategy": ["sft"]}, "tune": {"grid": {"sft.lr": [1]}, "grids": {"stf": {"x": [1]}}}}, "'stf'"),
        ({"vary": {"sft.lr": [1, 2]}, "tune": {"grid": {"sft.lr": [1]}}}, "varied and tuned"),
        ({"vary": {"sft.epochs": [1, 2]}}, "sets this key itself"),
    ],
)
def test_a_wrong_comparison_is_told_before_anything_runs(plan: dict, said: str, path: str, tmp_path: Path) -> None:
    made = Compare.model_validate(plan)
    with pytest.raises(RecipeError, match=said):
        grid.require(made, path, ["sft.epochs=1"])
        for cell in grid.cells(made, path, (), tmp_path):
            cell.recipe(path)


def test_the_command_line_is_read() -> None:
    assert grid.parse_vary(["strategy=sft,gift", "sft.lr=1e-3,2", 'x=["a, b", 3]', "y=[[1], [2]]"]) == {
        "strategy": ["sft", "gift"],
        "sft.lr": [1e-3, 2],
        "x": ["a, b", 3],
        "y": [[1], [2]],
    }
    assert grid.parse_seeds("0..4") == [0, 1, 2, 3, 4] and grid.parse_seeds("3,1") == [3, 1]
    for wrong in ("sft", "=3", "sft="):
        with pytest.raises(RecipeError, match="key=value"):
            grid.parse_vary([wrong])
    with pytest.raises(RecipeError, match="not a list of seeds"):
        grid.parse_seeds("a..b")
    plan = Compare(vary={"strategy": ["sft", "dft"]}, baseline="dft")
    assert grid.with_options(plan, {"sft.lr": [1, 2]}, [4], None).baseline is None
    assert grid.with_options(plan, {}, [4], None).baseline == "dft"
    with pytest.raises(RecipeError, match="twice"):
        grid.with_options(plan, {"sft.lr": [1, 1]}, None, None)


def stages(path: str, *overrides: str) -> dict[str, str]:
    made = recipes.load(path, list(overrides))
    return {stage: grid.keys_of(made, stage) for stage in ("sft", "rl")}


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("rl.lr=1e-3", {"rl"}),
        ("reward.deadline=3", {"rl"}),
        ("sft.lr=1e-3", {"sft", "rl"}),
        ("seed=1", {"sft", "rl"}),
        ("data.demos=7", {"sft", "rl"}),
        ("eval.temperature=0.1", set()),
        ("rl.save_every=3", set()),
        ("name=x", set()),
        ("lora.rank=4", {"sft", "rl"}),
        ("model=other", {"sft", "rl"}),
        ("precision=bf16", {"sft", "rl"}),
        ('sft.splits=["demos", "prompts"]', {"sft", "rl"}),
    ],
)
def test_a_policy_is_shared_only_where_all_that_made_it_is_the_same(override: str, changed: set, path: str) -> None:
    before, after = stages(path), stages(path, override)
    assert {stage for stage in before if before[stage] != after[stage]} == changed


def test_the_content_of_a_file_of_ones_own_counts(path: str, tmp_path: Path) -> None:
    source = "from dataclasses import dataclass\nfrom heatbath.ideas.objectives import Sft\n"
    source += "@dataclass(frozen=True)\nclass Mine(Sft): ...\n"
    (tmp_path / "mine.py").write_text(source)
    before = stages(path, f"sft.objective={tmp_path / 'mine.py'}:Mine")
    (tmp_path / "mine.py").write_text(source + "# other")
    assert stages(path, f"sft.objective={tmp_path / 'mine.py'}:Mine")["sft"] != before["sft"]


def cell_run(folder: Path, *, trained: bool = True, **changes: object) -> Run:
    """A run that has trained its warm start and drawn its samples."""
    run = written(folder, {"base": 1, "init": 3, "final": 5}, **changes)
    run.write_json("base.json", {"model": "m", "fingerprint": "f"})
    run.write_json("surprise.json", {"tokens": 1})
    if trained:
        run.log("sft", 1, {"nll": 1.0})
        run.checkpoint("init").mkdir(parents=True)
        (run.checkpoint("init") / "model.safetensors").write_bytes(b"weights")
    return run


def test_a_cell_takes_what_another_has_made_in_the_same_way(tmp_path: Path) -> None:
    other = cell_run(tmp_path / "a" / "0")
    run = Run.create(tmp_path / "b" / "0", recipes.parse(other.recipe.model_dump() | {"rl": {"lr": 1e-3}}))
    taken = grid.adopt(run, [other.folder, run.folder, tmp_path / "not-there"])
    assert len(taken) == 3 and run.finished("sft") and not run.finished("rl")
    weights = [r.checkpoint("init") / "model.safetensors" for r in (run, other)]
    assert os.path.samefile(*weights), "one file of two names"
    assert run.metrics("sft") == other.metrics("sft") and run.read_json("surprise.json") == {"tokens": 1}
    for policy in ("base", "init"):
        assert run.samples(policy) == other.samples(policy)
    assert run.samples("final") == []
    assert grid.adopt(run, [other.folder]) == [], "once"


@pytest.mark.parametrize(
    ("changes", "shared"),
    [
        ({"sft": {"objective": {"name": "gift", "beta": 7.0}}}, {"base"}),
        ({"seed": 3}, set()),
        ({"eval": {"temperature": 0.3}}, set()),
        ({"reward": {"profile": "paper"}}, set()),
    ],
)
def test_a_cell_draws_itself_what_the_other_has_drawn_otherwise(tmp_path: Path, changes: dict, shared: set) -> None:
    other = cell_run(tmp_path / "a")
    table = other.recipe.model_dump(exclude_none=True) | changes
    run = Run.create(tmp_path / "b", recipes.parse(table))
    grid.adopt(run, [other.folder])
    assert {row["policy"] for row in run.samples()} == shared
    same_start = "sft" not in changes and "seed" not in changes
    assert run.finished("sft") == same_start


@pytest.mark.parametrize("what", ["base", "rows", "versions"])
def test_a_cell_takes_nothing_that_was_made_of_something_else(tmp_path: Path, what: str) -> None:
    other = cell_run(tmp_path / "a")
    run = Run.create(tmp_path / "b", other.recipe)
    for each in (run, other):
        each.write_json("data.json", {"digest": "x"})
    assert what == "base" or grid._of_one_kind(run, other, "f")
    if what == "rows":
        other.write_json("data.json", {"digest": "y"})
    if what == "versions":
        other.write_json("env.json", other.read_json("env.json") | {"versions": {"torch": "1.0"}})
    assert grid.adopt(run, [other.folder], "another" if what == "base" else "f") == []


def test_an_unfinished_cell_gives_nothing_away(tmp_path: Path) -> None:
    other = cell_run(tmp_path / "a", trained=False)
    (other.folder / "results.json").unlink()
    run = Run.create(tmp_path / "b", other.recipe)
    assert grid.adopt(run, [other.folder]) == [] and run.samples() == []


def test_the_best_trial_is_that_of_the_best_mean_and_the_first_of_equals() -> None:
    def cell(setting: str, trial: str, seed: int) -> Cell:
        return Cell(setting, seed, (), Path(f"{setting}/{trial}/{seed}"), trial)

    scores = {cell("a", "x", 0): 0.2, cell("a", "x", 1): 0.6, cell("a", "y", 0): 0.5, cell("a", "y", 1): 0.5}
    scores |= {cell("b", "x", 0): 0.3, cell("b", "y", 0): 0.3}
    assert grid.candidates(scores) == {"a": "y", "b": "x"}
    with pytest.raises(RunError, match="not finished"):
        grid.candidates(scores | {cell("b", "z", 0): None})


def three_by_two(folder: Path) -> dict[str, dict[int, Run]]:
    """Settings whose ends have 2, 5 and 5 or 6 of 8 draws right (one more of each third problem), with two seeds."""
    ends = {"low": (2, 2), "high": (5, 5), "mixed": (5, 6)}
    return {
        name: {seed: written(folder / name / str(seed), {"base": 1, "init": 3, "final": end}, seed=seed)
               for seed, end in enumerate(own)}
        for name, own in ends.items()
    }  # fmt: skip


def test_the_table_is_that_of_a_computation_by_hand(tmp_path: Path) -> None:
    runs = three_by_two(tmp_path)
    found = grid_summary.summarise(runs, "low")
    values = {}
    for (name, own), k in itertools.product(runs.items(), (1, 8)):
        rows = []
        for run in own.values():
            problems, n, right = scoring.per_problem(run.samples("final"))
            assert list(problems) == sorted(problems)
            rows.append(pass_at_k(right, n, k))
        values[name, k] = np.array(rows)
        told = found["settings"][name]["tasks"]["test"]["final"][str(k)]
        assert told["mean"] == pytest.approx(values[name, k].mean())
        assert told["seeds"] == pytest.approx(values[name, k].mean(axis=1))
    rows = {(row["from"], row["to"], row["k"]): row for row in found["differences"]["test"]}
    assert set(rows) == {(a, b, k) for a, b in (("low", "high"), ("low", "mixed"), ("high", "mixed")) for k in (1, 8)}
    for (a, b, k), row in rows.items():
        assert row["mean"] == pytest.approx((values[b, k] - values[a, k]).mean())
        assert row["to_baseline"] == (a == "low")
    # mixed − high is 0 in one seed and 1/8 of every problem in the other: the t interval of two seeds
    row = rows["high", "mixed", 1]
    low, high = stats.t.interval(0.95, 1, loc=1 / 16, scale=1 / 16)
    assert (row["low"], row["high"]) == pytest.approx((low, high)) and row["p"] == pytest.approx(0.5)
    assert rows["low", "high", 1]["p"] == pytest.approx(2 * 0.5**24), (
        "all 24 problems differ by the same: the sign test"
    )


def test_right_answers_that_are_alike_count_once(tmp_path: Path) -> None:
    """Right draws go round three ways of saying it: 2 draws hold 2 different ones, and 4 or 5 hold all 3."""

    def said(policy: str, problem: int, draw: int) -> str:
        return f"{problem + 1}{' ' * (draw + 1)}by way {draw % 3}\n"

    shares = {"base": 1, "final": 4}
    runs = {"ways": {seed: written(tmp_path / str(seed), shares, completion=said, seed=seed) for seed in (0, 1)}}
    found = grid_summary.summarise(runs, "ways")["settings"]["ways"]["distinct"]["test"]
    assert found["final"]["8"]["mean"] == 3 and list(found["final"]) == ["8"]
    assert found["base"]["8"]["seeds"] == pytest.approx([4 / 3, 4 / 3]), "a third of the problems has 2 of 8 right"
    one = runs["ways"][0].read_json("results.json")["policies"]
    assert one["base"]["distinct"]["8"]["mean"] == pytest.approx(4 / 3)


def test_what_the_data_do_not_decide_is_not_ranked(tmp_path: Path) -> None:
    found = grid_summary.summarise(three_by_two(tmp_path), "low")
    said = grid_summary.verdict(found)
    assert said[0].startswith("At pass@1 better than low: high (+0.375)") and "worse" not in " ".join(said)
    assert said[-1] == "The highest mean is that of mixed, which these data do not tell from low, high."
    one = {name: {0: own[0]} for name, own in three_by_two(tmp_path / "again").items()}
    assert "One seed" in grid_summary.verdict(grid_summary.summarise(one, None))[0]
    empty = grid_summary.summarise({"low": {}, "high": {}}, None)
    assert grid_summary.verdict(empty) == ["Nothing can be compared yet."]


def test_p_values_are_corrected_within_each_k_and_family(tmp_path: Path) -> None:
    found = grid_summary.summarise(three_by_two(tmp_path), "low")["differences"]["test"]
    for k in (1, 8):
        own = [row for row in found if row["k"] == k and row["to_baseline"]]
        p = sorted(row["p"] for row in own)
        assert sorted(row["p_holm"] for row in own) == pytest.approx([min(1, 2 * p[0]), min(1, max(2 * p[0], p[1]))])


def test_settings_are_compared_on_the_problems_that_both_were_asked(tmp_path: Path) -> None:
    a = written(tmp_path / "a", {"base": 1, "init": 3, "final": 5})
    b = written(tmp_path / "b", {"base": 1, "init": 3, "final": 6}, problems=12)
    (row, *_) = grid_summary.summarise({"a": {0: a}, "b": {0: b}}, "a")["differences"]["test"]
    assert (row["problems"], row["mean"]) == (12, pytest.approx(1 / 8))
    c = written(tmp_path / "c", {"base": 1, "init": 3, "final": 6}, problems=12)
    c.replace_samples([r | {"problem": f"other {r['problem']}"} for r in c.samples()])
    assert grid_summary.summarise({"a": {0: a}, "c": {0: c}}, "a")["differences"]["test"] == []


def test_a_verdict_says_what_is_not_there_yet(tmp_path: Path) -> None:
    runs = three_by_two(tmp_path)
    assert (
        grid_summary.verdict(grid_summary.summarise(runs | {"low": {}}, "low"))[0]
        == "The baseline, low, has no results yet."
    )
    done = {"low": runs["low"], "high": runs["high"], "later": {}}
    assert "high is ahead of the others so far; not compared yet: later." in grid_summary.verdict(
        grid_summary.summarise(done, "low")
    )


def test_cells_that_were_asked_other_problems_are_not_averaged(tmp_path: Path) -> None:
    a = written(tmp_path / "a", {"base": 1, "init": 3, "final": 5})
    b = written(tmp_path / "b", {"base": 1, "init": 3, "final": 5}, problems=23)
    with pytest.raises(RunError, match="not asked the same problems"):
        grid_summary.summarise({"x": {0: a, 1: b}}, None)


@pytest.mark.parametrize(
    ("own", "step"),
    [
        ([0.1, 0.3, 0.5, 0.7], 2.0),
        ([0.1, 0.5, 0.3, 0.7], 3.0),  # ahead once is not ahead for good
        ([0.5, 0.6, 0.7, 0.8], None),  # it never was behind
        ([0.1, 0.5, 0.6, 0.2], None),
        ([0.1], None),
    ],
)
def test_a_curve_passes_another_once_and_for_good(own: list, step: float | None) -> None:
    other = [[float(i), [0.3, 0.5]] for i in range(4)]
    assert grid_summary.crossing([[float(i), [value]] for i, value in enumerate(own)], other) == step


def test_curves_hold_the_steps_that_all_seeds_have(tmp_path: Path) -> None:
    runs = {seed: written(tmp_path / str(seed), {"base": 1}) for seed in (0, 1)}
    for seed, run in runs.items():
        for step in range(0, 6 + 3 * seed, 3):
            run.log("rl", step, {"held_out/right": 0.1 * step + seed})
    assert grid_summary.curves(runs, "rl", "held_out/right") == [[0.0, [0.0, 1.0]], [3.0, pytest.approx([0.3, 1.3])]]
    assert json.dumps(grid_summary.summarise({"x": runs}, None))
