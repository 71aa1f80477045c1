"""The page of one run, its Markdown and its JSON: every part says what the run's files say, and what is not there is
left out."""

import json
import re
from pathlib import Path

import pytest

from heatbath import recipe as recipes
from heatbath.report import costs
from heatbath.report.page import write_report
from heatbath.report.tables import difference_rows, markdown, markdown_results, minus, numeric, results_rows
from heatbath.run import Run
from heatbath.stages.judged import digest
from written_runs import PROFILE, RECIPE, logged, sample, shifted, written


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run with three policies, 12 problems × 8 samples, a profile and three steps of each stage."""
    run = written(tmp_path_factory.mktemp("report") / "run", {"base": 1, "init": 4, "final": 6}, problems=12)
    run.write_json("surprise.json", PROFILE)
    for step in range(3):
        run.log("sft", step, {"nll": 1.0 / (step + 1), "entropy": 0.5, "tokens_per_second": 9.0})
        run.log("sft", step, {"val/nll": 1.1 / (step + 1)})
        share = {"informative_share": 0.5, "truncated_share": 0.1, "clip_share": 0.0}
        run.log("rl", step + 1, {"reward": 0.2 * step, "entropy": 0.3, "kl_init": 0.01, "step_seconds": 1.0, **share})
    return write_report(run)["html"]


def test_markdown_and_json_say_the_same(report: Path) -> None:
    results = json.loads((report.parent / "results.json").read_text())
    told = json.loads((report.parent / "report.json").read_text())
    text = (report.parent / "report.md").read_text()
    assert told["results"] == results
    for name, found in results["policies"].items():
        assert f"{found['pass']['1']['mean']:.3f}" in text and name in text
    assert markdown(difference_rows(results)) in text
    assert report.read_text().count("<script") == 2  # our own, and the samples as data


def test_differences_are_read_by_their_interval() -> None:
    rows = difference_rows(
        {
            "differences": [
                {"from": "a", "to": "b", "k": 1, "mean": 0.1, "low": 0.01, "high": 0.19},
                {"from": "a", "to": "b", "k": 1, "mean": -0.1, "low": -0.19, "high": -0.01},
                {"from": "a", "to": "b", "k": 1, "mean": 0.1, "low": -0.01, "high": 0.19},
                {"from": "a", "to": "b", "k": 1, "mean": 0.1, "low": None, "high": None},
                {"from": "a", "to": "b", "k": 1, "mean": 0.1, "low": 0.01, "high": 0.19, "p": 0.03, "p_holm": 0.06},
                {"from": "a", "to": "b", "k": 1, "mean": -0.1, "low": -0.19, "high": -0.01, "p": 0.03, "p_holm": 0.04},
                {"from": "a", "to": "b", "k": 1, "mean": 0.25, "low": 0.04, "high": 0.46, "p": 0.0625, "p_holm": 0.12},
            ]
        }
    )
    assert [row[-1] for row in rows[1:]] == [
        "b is better",
        "b is worse",
        "not decided by these data",
        "one problem decides nothing",
        "b is better, not after Holm",
        "b is worse",
        "not decided (p = 0.062)",
    ]
    assert [row[-3:-1] for row in rows[-3:-1]] == [["0.030", "0.060"], ["0.030", "0.040"]]


def test_pass_comes_before_maj_and_2_before_10() -> None:
    e = {"mean": 0.5, "low": 0.4, "high": 0.6}
    entry = {"maj": {"10": e}, "pass": {"10": e, "2": e, "1": e}, "truncated_share": 0.0, "mean_tokens": 1.0}
    head, row = results_rows({"policies": {"base": entry}})
    assert head == ["policy", "pass@1", "pass@2", "pass@10", "maj@10", "truncated", "right of finished", "tokens"]
    assert row[1] == "0.500 [0.400, 0.600]" and row[-2] == "–"


def test_a_run_with_nothing_but_its_recipe_has_a_page_too(tmp_path: Path) -> None:
    recipe = recipes.parse({"model": "m", "data": {"source": "arithmetic"}})
    page = write_report(Run.create(tmp_path / "run", recipe))["html"].read_text()
    assert "evaluation of the base" in page and "<svg" not in page and 'id="samples"' not in page


def test_what_has_not_ended_is_said(tmp_path: Path) -> None:
    """RL killed at step 30, and after an evaluation a policy that it did not sample."""
    run = written(tmp_path / "run", {"base": 1, "init": 4}, rl={"max_steps": 200})
    assert "Unfinished: rl did not run yet." in write_report(run)["html"].read_text()
    run.log("rl", 30, {"reward": 0.5})
    page = write_report(run)["html"].read_text()
    assert "Unfinished: rl has come to step 30 of 200." in page and "Without a score" not in page
    run.checkpoint("final").mkdir(parents=True)
    page = write_report(run)["html"].read_text()
    assert "Unfinished" not in page and "Without a score: final, of which the evaluation has no samples" in page


def test_pretraining_has_its_curve(tmp_path: Path) -> None:
    recipe = recipes.parse({"data": {"source": "arithmetic"}, "pretrain": {}})
    run = Run.create(tmp_path / "run", recipe)
    for step in (10, 20):
        run.log("pretrain", step, {"nll": 1.0 / step, "tokens_per_second": 9.0, "step_seconds": 1.0})
    page = write_report(run)["html"].read_text()
    assert "a base, pretrained" in page and '<h2 id="pretrain-h">Pretraining</h2>' in page
    assert "NLL per token (nats) over the optimizer steps of pretraining" in page and "20 optimizer steps" in page
    assert "Findings" not in page


READINESS = {
    "prompts": 32,
    "of_prompts": 256,
    "group_size": 8,
    "temperature": 1.0,
    "max_new_tokens": 64,
    "pass": {"1": {"mean": 0.1, "low": 0.05, "high": 0.15}, "8": {"mean": 0.4, "low": 0.2, "high": 0.6}},
    "informative_share": {"mean": 0.375, "low": 0.2, "high": 0.55},
    "all_right_share": {"mean": 0.0, "low": 0.0, "high": 0.11},
    "all_wrong_share": {"mean": 0.625, "low": 0.45, "high": 0.8},
    "truncated_share": {"mean": 0.25, "low": 0.2, "high": 0.3},
    "eos_rate": {"mean": 0.75, "low": 0.7, "high": 0.8},
    "mean_tokens": 30.25,
    "entropy": 0.512,
    "judged": True,
    "notes": ["sampled without top_p of rl.trainer"],
    "warnings": ["60% of 256 completions were cut at 64 tokens; raise rl.max_new_tokens"],
}


@pytest.fixture
def trained(tmp_path: Path) -> Run:
    """A run of RL alone: readiness, and 40 steps in which the reward rises and held-out accuracy falls."""
    recipe = recipes.parse({"model": "m", "data": {"source": "arithmetic"}, "rl": {}})
    run = Run.create(tmp_path / "run", recipe)
    run.write_json("readiness.json", READINESS)
    for step in range(40):
        shares = {"informative_share": 0.375, "truncated_share": 0.1, "clip_share": 0.0, "completion_tokens": 30.0}
        values = {"reward": 0.3 + 0.01 * step + 0.01 * (step % 3), "entropy": 0.3, "learning_rate": 1e-6, **shares}
        run.log("rl", step + 1, {**values, "grad_norm": 0.2, "step_seconds": 1.0})
        if step % 4 == 0:
            run.log("rl", step + 1, {"held_out/right": 0.6 - 0.005 * step - 0.01 * (step % 3), "held_out/reward": 0.6})
    return run


def test_readiness_and_findings_are_in_every_form(trained: Run) -> None:
    paths = write_report(trained)
    page, text, told = paths["html"].read_text(), paths["md"].read_text(), json.loads(paths["json"].read_text())
    for said in ("Readiness", "pass@8", "0.400 [0.200, 0.600]", "0.512 nats per token", "raise rl.max_new_tokens"):
        assert said in page and said in text
    assert "Sampled without top_p of rl.trainer." in page
    assert "0.375 [0.290, 0.460] as predicted" in text  # 48 of the 128 groups of the first generation
    assert "train–eval gap" in page and "**train–eval gap**: from step 1 to 37" in text
    assert "40 optimizer steps of 1.0 s. 62% of the groups had no signal" in page
    found = {one["name"]: one["number"] for one in told["findings"]}
    assert found.keys() == {"train–eval gap", "truncation"} and found["train–eval gap"] < -0.1
    assert told["unjudged"] == []
    assert '<a href="#findings">train–eval gap</a>' in page and "2 findings" in page
    assert told["readiness"]["happened"]["as_predicted"] is True and told["readiness"]["entropy"] == 0.512


def test_held_out_accuracy_stands_beside_the_reward_where_it_was_measured(trained: Run, report: Path) -> None:
    drawn = write_report(trained)["html"].read_text()
    assert drawn.index(">mean reward<") < drawn.index(">held-out accuracy<") < drawn.index(">informative groups<")
    assert ">tokens per completion<" in drawn
    assert "held-out accuracy" not in report.read_text()


def test_no_finding_is_said_plainly_and_so_is_what_could_not_be_judged(trained: Run, report: Path) -> None:
    judged = '<section id="findings" aria-labelledby="findings-h"><h2 id="findings-h">Findings</h2>\n'
    assert "<li>train–eval gap (it takes 6 held-out" in report.read_text()
    assert "Readiness" not in report.read_text()  # that run has none
    text = (report.parent / "report.md").read_text()
    assert "- not judged: train–eval gap (it takes 6 held-out" in text
    for step in range(41, 61):  # accuracy recovers, and nothing is cut any more
        share = {"informative_share": 0.4, "truncated_share": 0.0, "reward": 0.7}
        trained.log("rl", step, {"held_out/right": 0.6, **share})
    page = write_report(trained)["html"].read_text()
    assert f"{judged}<p>None.</p>" in page and "finding</strong>" not in page and "findings</strong>" not in page
    trained.forget("rl")
    assert "Findings" not in write_report(trained)["html"].read_text()


def test_a_preference_stage_has_its_curves(tmp_path: Path) -> None:
    recipe = recipes.parse(
        {"model": "m", "data": {"source": "arithmetic"}, "preference": {"method": "una", "data": "sums-labelled"}}
    )
    run = Run.create(tmp_path / "run", recipe)
    for step in (1, 2, 3):
        run.log("preference", step, {"objective": 0.3 - 0.01 * step, "score_error": 0.5, "grad_norm": 1.0})
    page = write_report(run)["html"].read_text()
    assert "no warm start, then UNA" in page and ">distance to the score<" in page and "3 optimizer steps." in page
    assert ">pairs in the right order<" not in page  # rows of one completion have no order
    run.log("preference", 4, {"objective": 0.2, "accuracy": 0.75})
    page = write_report(run)["html"].read_text()
    assert ">pairs in the right order<" in page and "75% were in the right order" in page


def test_the_first_screen_answers_whether_it_helped(tmp_path: Path) -> None:
    run = written(tmp_path / "run", {"base": 1, "init": 4, "final": 4})
    told = json.loads(write_report(run)["json"].read_text())["verdict"]
    results = run.read_json("results.json")
    whole, start, rest = (
        next(d for d in results["differences"] if d["k"] == 1 and (d["from"], d["to"]) == pair)
        for pair in (("base", "final"), ("base", "init"), ("init", "final"))
    )
    assert whole["mean"] == pytest.approx(0.375) == start["mean"] and rest["mean"] == 0
    assert told == (
        "pass@1 on the same 24 problems: final is better than base, +0.37 [+0.37, +0.37]; init is better than base, "
        "+0.37 [+0.37, +0.37]. Not decided: init → final +0.00 [+0.00, +0.00]."
    )
    for d in results["differences"]:
        d |= {"low": -0.01, "p_holm": 0.9}
    run.write_json("results.json", results)
    told = json.loads(write_report(run)["json"].read_text())["verdict"]
    assert told.startswith("Not decided by these 24 problems, pass@1: base → final +0.37 [-0.01, +0.37], base → init ")
    for d in results["differences"]:
        d |= {"low": -0.5, "high": -0.01, "mean": -0.3}
    run.write_json("results.json", results)
    told = json.loads(write_report(run)["json"].read_text())["verdict"]
    assert "final is worse than base, -0.30 [-0.50, -0.01] (not after Holm's correction)" in told
    for d in results["differences"]:
        d |= {"p": 0.0625}  # McNemar's of few problems, beside a t interval that leaves 0 out
    run.write_json("results.json", results)
    told = json.loads(write_report(run)["json"].read_text())["verdict"]
    assert told.startswith("Not decided by these 24 problems, pass@1: base → final -0.30 [-0.50, -0.01] (p = 0.062), ")
    page = (run.folder / "report.html").read_text()
    assert '<dt class="policy-base">base <small>pass@1</small></dt><dd>0.17<small>0.14–0.19</small></dd>' in page


TASKS = {
    "sums": {
        "version": 1,
        "kind": "math",
        "policies": {
            "base": {
                "problems": 30,
                "samples": 120,
                "pass": {
                    "1": {"mean": 0.2, "low": 0.1, "high": 0.3},
                    "4": {"mean": 0.5, "low": 0.4, "high": 0.6},
                },
                "maj": {"4": {"mean": 0.31, "low": 0.2, "high": 0.4}},
                "truncated_share": 0.25,
                "right_of_finished": 0.3,
                "mean_tokens": 9.0,
                "verdicts": {"right": 24},
                "grader_failures": 2,
            },
            "final": {
                "problems": 30,
                "samples": 120,
                "pass": {"1": {"mean": 0.6, "low": 0.5, "high": 0.7}, "4": {"mean": 0.9, "low": 0.8, "high": 1.0}},
                "maj": {"4": {"mean": 0.7, "low": 0.6, "high": 0.8}},
                "truncated_share": 0.0,
                "right_of_finished": 0.6,
                "mean_tokens": 9.0,
                "verdicts": {"right": 72},
                "grader_failures": 0,
            },
        },
        "differences": [
            {"from": "base", "to": "final", "k": 1, "mean": 0.4, "low": 0.3, "high": 0.5, "p": 1e-5, "p_holm": 2e-5,
             "mde": 0.08, "test": "paired t"}
        ],
    },
    "mt_bench": {
        "version": 1,
        "kind": "judge",
        "policies": {
            "base": {
                "rating": {"mean": 3.5, "low": 3.0, "high": 4.0},
                "categories": {"math": {"mean": 2.0, "low": None, "high": None}, "roleplay": None},
                "turns": {},
                "failures": 3,
                "problems": 8,
                "samples": 16,
                "truncated_share": 0.0,
                "mean_tokens": 80.0,
            }
        },
        "differences": [{"from": "base", "to": "final", "k": 1, "mean": 1.5, "low": 1.0, "high": 2.0, "p": 0.01}],
    },
}  # fmt: skip


def test_tasks_stand_beside_each_other_and_alone(tmp_path: Path) -> None:
    recipe = recipes.parse({"model": "m", "eval": {"tasks": ["gsm8k"]}})
    run = Run.create(tmp_path / "run", recipe)
    run.write_json("results.json", {"policies": {}, "differences": [], "tasks": TASKS})
    run.write_json("sampling.json", {"sums": {"temperature": 0.6, "max_new_tokens": 99}})
    run.add_samples([sample("base", q, i == 0, task="sums") for q in range(6) for i in range(4)])
    judged = {
        "task": "mt_bench",
        "policy": "base",
        "problem": "81",
        "question": "Rhyme?",
        "completion": "No.",
        "tokens": 2,
    }
    run.add_samples(
        [judged | {"turn": t, "finished": True, "status": "answered", "gold": None, "answer": None} for t in (1, 2)]
    )
    rating = {"task": "mt_bench", "policy": "base", "problem": "81", "turn": 1, "rating": 7.0, "of": digest(["No."])}
    (run.folder / "judgments.jsonl").write_text(json.dumps(rating) + "\n")
    paths = write_report(run)
    page, text = paths["html"].read_text(), paths["md"].read_text()
    for row in (
        "| sums     | 30 × 4             | pass@4       | 0.500 [0.400, 0.600] | 0.900 [0.800, 1.000] |",
        "| sums     | 30 × 4             | maj@4        | 0.310 [0.200, 0.400] | 0.700 [0.600, 0.800] |",
        "| mt_bench | 8 × 2              | rating of 10 | 3.500 [3.000, 4.000] | –                    |",
        "| sums     | base → final | pass@1 | +0.400 [+0.300, +0.500] | < 0.001 | < 0.001  | 0.080         | final is",
        "| mt_bench | base → final | rating | +1.500 [+1.000, +2.000] | 0.010   | –        | –             | final is",
        "| math     | 2.00 (one problem, no interval) |",
        "| roleplay | –                               |",
    ):
        assert row in text, row
    assert 'id="scores"' not in page and 'id="tasks"' in page and "pass@1 on the same 30 problems of sums" in page
    assert "cut at the limit: 25% of base in sums" in page and page.count("25%") == 1  # a finding, no caveat too
    assert "<summary>sums: pass@k over k, differences, truncation, verdicts</summary>" in page
    assert "30 problems × 4 samples of each policy, T = 0.6, at most 99 tokens" in page
    assert "2 completions of base in sums could not be graded" in page
    assert "3 answers of base in mt_bench have no rating" in page
    assert '"rated 7"' in page and '"not rated"' in page  # the two turns
    assert markdown_results(run.read_json("results.json")) in text


def test_the_shift_is_drawn_and_tabled(tmp_path: Path) -> None:
    run = written(tmp_path / "run", {"base": 1, "final": 2}, sft=None)
    assert "How far" not in write_report(run)["html"].read_text()
    run.write_json("shift.json", shifted())
    paths = write_report(run)
    page, text = paths["html"].read_text(), re.sub(" +", " ", paths["md"].read_text())
    assert "| mean [95 % interval] | base → init | init → final | base → final |" in text
    assert "| L2 | 40.0 [40.0, 40.0] | 20.0 [20.0, 20.0] | 44.0 [44.0, 44.0] |" in text
    assert "| KL(from ‖ to), nats | 0.300 [0.290, 0.310] | 0.150 [0.140, 0.160] |" in text
    assert "| top-10 overlap | 0.890 [0.880, 0.900] |" in text
    assert text.index("top-2 overlap") < text.index("top-10 overlap")
    assert ">base → init</text>" in page and ">init → final</text>" in page
    assert "sequences" not in json.loads(paths["json"].read_text())["shift"]  # megabytes of single values


def test_costs_are_those_of_the_log(tmp_path: Path) -> None:
    run = logged(written(tmp_path / "run", {"base": 1}, problems=3, rl={"prompts": 4, "update_prompts": 4}))
    told = json.loads(write_report(run)["json"].read_text())["costs"]
    rows = {row[0]: row[1:] for row in told}
    assert rows["rl"] == ["8", "16", f"{8 * 7 * 4 * 8:,}", f"{8 * 7 * 4 * 8 / 16:,.0f}"]  # steps of 2 s, 32 × 7 tokens
    assert rows["sft"][0] == "8" and rows["eval"][2] == f"{sum(s['tokens'] for s in run.samples()):,}"
    assert "preference" not in rows
    run = Run.create(tmp_path / "new", run.recipe)
    for step, seconds in ((1, 2.0), (2, 3.0)):
        row = {"step_seconds": seconds, "tokens": 100, "supervised_tokens": 40}
        run.log("sft", step, {"nll": 1.0, "tokens_per_second": 100 / seconds, **row})
    logged_rows = run.metrics("sft")
    logged_rows[1]["time"] += 3600  # resumed an hour later
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in logged_rows))
    told = json.loads(write_report(run)["json"].read_text())["costs"]
    assert told[1] == ["sft", "2", "5", "200 (80 supervised)", "40"]
    del logged_rows[0]["step_seconds"]  # by an earlier version
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in logged_rows))
    assert costs.spent(run.metrics("sft")) == pytest.approx(3600, abs=1)


OLD = ("floor", "below_floor", "objective", "kinds", "examples")


def test_runs_of_earlier_versions_have_a_page(tmp_path: Path) -> None:
    run = written(tmp_path / "run", {"base": 1, "final": 4})
    rows = run.samples()
    (run.folder / "samples.jsonl.gz").unlink()
    lacking = ("task", "ids", "finish", "seed", "answer", "rule")
    old = [{k: v for k, v in row.items() if k not in lacking} for row in rows]
    (run.folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in old))
    results = run.read_json("results.json")
    del results["tasks"]
    for found in results["policies"].values():
        del found["maj"], found["right_of_finished"]
    for d in results["differences"]:
        for key in ("p", "p_holm", "mde", "test"):
            del d[key]
    run.write_json("results.json", results)
    env = run.read_json("env.json")
    run.write_json("env.json", {k: env[k] for k in ("command", "started", "device", "versions")})
    run.write_json("surprise.json", {k: v for k, v in PROFILE.items() if k not in OLD})
    paths = write_report(run)
    page = paths["html"].read_text()
    assert "surprise.json was made by an earlier version of heatbath and lacks floor, objective, kinds" in page
    assert "p (Holm)" not in page and "final is better" in page and page.count('"voices"') == 1
    profile = {k: v for k, v in PROFILE.items() if k not in ("examples", "below_floor")}
    run.write_json("surprise.json", profile)
    page = write_report(run)["html"].read_text()
    assert "Token by token" not in page and "leaves 2.00% of the supervised tokens" in page


def test_numbers_are_set_as_numbers() -> None:
    assert (
        minus("base → final -0.10 [-0.29, +0.09] a-b top-5 1e-3") == "base → final −0.10 [−0.29, +0.09] a-b top-5 1e-3"
    )
    rows = [["a", "b", "c", "d", "e"], ["1", "0.5 [0.1, 0.9]", "x", "–", "5%"], ["2", "-3", "1", "< 0.001", "≈ 7"]]
    assert numeric(rows) == {1, 3, 4}
    assert numeric(rows[:1]) == set()
    assert markdown([["a|b", "c"], ["x\ny", "|"]]) == "| a\\|b | c  |\n|------|----|\n| x y  | \\| |"


def test_a_page_can_be_written_elsewhere(tmp_path: Path) -> None:
    run = written(tmp_path / "run", {"base": 1})
    paths = write_report(run, tmp_path / "else" / "page.html")
    assert [path.name for path in paths.values()] == ["page.html", "page.md", "page.json"]
    assert all(path.is_file() for path in paths.values()) and not (run.folder / "report.html").exists()


def test_a_recipe_is_shown_as_text(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", recipes.parse(RECIPE | {"model": "</pre><script>alert(1)</script>"}))
    page = write_report(run)["html"].read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_published_scores_stand_beside_those_of_a_run(tmp_path: Path) -> None:
    """Of the strategy, the policy and the metric that the paper names; a mean where every task of it is there."""
    run = written(tmp_path / "run", {"init": 2, "final": 6}, published="2601.09233/llama-3.1-8b", name="sft")
    one = run.read_json("results.json")
    k32 = {"mean": 0.25, "low": 0.15, "high": 0.35}
    final = one["policies"]["final"]
    aime = {**final, "pass": {**final["pass"], "32": k32}}
    tasks = {"gsm8k": one["policies"], "aime24": {"final": aime}, "math500": {"init": final, "final": final}}
    rated = {
        "final": {"rating": {"mean": 5.0, "low": 4.0, "high": 6.0}, "categories": {}, "problems": 80, "samples": 80}
    }
    of = {name: {"version": 1, "kind": "math", "policies": p, "differences": []} for name, p in tasks.items()}
    of["mt_bench"] = {"version": 1, "kind": "judge", "policies": rated, "differences": []}
    run.write_json("results.json", {**one, "tasks": of})
    page = write_report(run)["html"].read_text()
    told = {
        (s["table"], *s["tasks"], s["metric"]): s
        for s in json.loads((run.folder / "report.json").read_text())["published"]["scores"]
    }
    assert told["Table 1", "gsm8k", "pass@1"]["published"] == 73.39
    assert told["Table 1", "gsm8k", "pass@1"]["ours"] == final["pass"]["1"]
    assert told["Table 1", "aime24", "pass@32"]["ours"] == k32
    assert told["Table 2", "gpqa_diamond", "pass@1"]["ours"] is None, "not asked"
    assert told["Table 5", "mt_bench", "rating of 10"]["ours"]["mean"] == 5.0
    before = told["Table 3", "gsm8k", "math500", "aime24", "aime25", "pass@1"]
    assert before["policy"] == "init" and before["ours"] is None, "two of the four are not there"
    text = (run.folder / "report.md").read_text()
    for said in ("Published scores", "0.7339", "Anchors, not targets", "0.250 [0.150, 0.350]"):
        assert said in text and said in page
    of |= {name: {**of["gsm8k"]} for name in ("aime24", "aime25")}
    run.write_json("results.json", {**one, "tasks": of})
    write_report(run)
    scores = json.loads((run.folder / "report.json").read_text())["published"]["scores"]
    means = [one["policies"]["init"]["pass"]["1"]["mean"]] * 3 + [final["pass"]["1"]["mean"]]
    assert next(s for s in scores if s["table"] == "Table 3")["ours"] == {"mean": pytest.approx(sum(means) / 4)}


@pytest.mark.parametrize(("name", "told"), [("gift-sequence", "prints no score for 'gift-sequence'"), (None, None)])
def test_a_strategy_without_published_scores_is_said_so(tmp_path: Path, name: str | None, told: str | None) -> None:
    run = written(tmp_path / "run", {"final": 6}, published="2601.09233/qwen2.5-7b", name=name)
    page = write_report(run)["html"].read_text()
    assert ('id="published"' in page) == (told is not None) and (told is None or told in page.replace("&#39;", "'"))
