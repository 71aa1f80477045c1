"""The report in a real browser: self-contained, quiet, readable on a phone and in the dark."""

import json
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from heatbath import recipe as recipes
from heatbath.report.page import write_report
from heatbath.report.tables import difference_rows, markdown
from heatbath.run import Run
from heatbath.stages.evaluate import summarise

HOSTILE = "<script>document.title='owned'</script><img src=x onerror=alert(1)> </pre> \\u202e 5"


def sample(policy: str, problem: int, right: bool) -> dict:
    return {
        "policy": policy,
        "problem": f"p{problem}",
        "question": f"What is {problem} + 1?",
        "gold": str(problem + 1),
        "completion": str(problem + 1) if right else HOSTILE,
        "tokens": 5,
        "finished": right,
        "status": "right" if right else "wrong",
    }


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run whose files are written here: three policies, 12 problems × 8 samples."""
    recipe = recipes.parse(
        {
            "model": "m",
            "data": {"source": "arithmetic"},
            "sft": {"objective": {"name": "gift", "beta": 7.5}},
            "rl": {},
        }
    )
    run = Run.create(tmp_path_factory.mktemp("report") / "run", recipe)
    for policy, share in (("base", 1), ("init", 4), ("final", 6)):
        run.add_samples([sample(policy, q, i < share + q % 2) for q in range(12) for i in range(8)])
    run.write_json("results.json", summarise({p: run.samples(p) for p in run.policies}, [1, 8]))
    betas = [
        {"beta": b, "w_below_0.99": 0.2, "w_below_0.5": 0.02, "w_below_0.1": 0.001, "keep": 0.01} for b in (5.0, 7.5)
    ]
    profile = {
        "tokens": 100,
        "rows": 10,
        "demonstrations": 10,
        "histogram": [60, 30, 8, 1, *[0] * 35, 1],
        "betas": betas,
        "suggested_beta": 6.0,
        "suggested_share": 0.02,
        "most_surprising": [{"nats": 9.0, "before": "<b>", "token": HOSTILE}],
        "beta": 7.5,
        "smoothing": 0.0,
        "floor": 0.0,
        "kinds": {},
        "objective": {key: value for key, value in betas[1].items() if key != "beta"},
        "vocab_size": 50,
    }
    run.write_json("surprise.json", profile)
    for step in range(3):
        run.log("sft", step, {"nll": 1.0 / (step + 1), "entropy": 0.5, "tokens_per_second": 9.0})
        run.log("sft", step, {"val/nll": 1.1 / (step + 1)})
        share = {"informative_share": 0.5, "truncated_share": 0.1, "clip_share": 0.0}
        run.log("rl", step + 1, {"reward": 0.2 * step, "entropy": 0.3, "kl_init": 0.01, "step_seconds": 1.0, **share})
    return write_report(run)["html"]


def test_the_page_in_a_browser(report: Path, needs) -> None:
    chromium = needs("chromium")
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for width, scheme in ((1200, "light"), (390, "light"), (1200, "dark")):
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            noise, requests = [], []
            page.on("console", lambda m, noise=noise: noise.append(m.text))
            page.on("pageerror", lambda e, noise=noise: noise.append(str(e)))
            page.on("request", lambda r, requests=requests: requests.append(r.url))
            page.goto(report.as_uri())
            assert requests == [report.as_uri()] and noise == []
            assert page.title() == "GIFT (β = 7.5) warm start, then RL (paper)"  # and no script of a completion ran
            assert page.locator("figure svg").count() == 4
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            ink, paper = (page.evaluate(f"getComputedStyle(document.body).{k}") for k in ("color", "backgroundColor"))
            drawn = page.locator("figure svg text").first.evaluate("e => getComputedStyle(e).fill")
            assert drawn != paper and ink != paper
            page.locator("summary").first.click()
            assert page.get_by_text("9.0 nats").is_visible()
        browser.close()


def test_markdown_and_json_say_the_same(report: Path) -> None:
    results = json.loads((report.parent / "results.json").read_text())
    told = json.loads((report.parent / "report.json").read_text())
    text = (report.parent / "report.md").read_text()
    assert told["results"] == results
    for name, found in results["policies"].items():
        assert f"{found['pass']['1']['mean']:.3f}" in text and name in text
    assert markdown(difference_rows(results)) in text
    assert "<script>" not in report.read_text()


def test_differences_are_read_by_their_interval() -> None:
    rows = difference_rows(
        {
            "differences": [
                {"from": "a", "to": "b", "k": 1, "mean": 0.1, "low": 0.01, "high": 0.19},
                {"from": "a", "to": "b", "k": 1, "mean": -0.1, "low": -0.19, "high": -0.01},
                {"from": "a", "to": "b", "k": 1, "mean": 0.1, "low": -0.01, "high": 0.19},
                {"from": "a", "to": "b", "k": 1, "mean": 0.1, "low": None, "high": None},
            ]
        }
    )
    assert [row[-1] for row in rows[1:]] == [
        "b is better",
        "b is worse",
        "not decided by these data",
        "one problem decides nothing",
    ]


def test_a_run_with_nothing_but_its_recipe_has_a_page_too(tmp_path: Path) -> None:
    recipe = recipes.parse({"model": "m", "data": {"source": "arithmetic"}})
    page = write_report(Run.create(tmp_path / "run", recipe))["html"].read_text()
    assert "no warm start" in page and "<svg" not in page


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
    (found,) = told["findings"]
    assert found["name"] == "train–eval gap" and found["number"] < -0.1 and told["unjudged"] == []
    assert told["readiness"]["happened"]["as_predicted"] is True and told["readiness"]["entropy"] == 0.512


def test_held_out_accuracy_stands_beside_the_reward_where_it_was_measured(trained: Run, report: Path) -> None:
    drawn = write_report(trained)["html"].read_text()
    assert drawn.index(">mean reward<") < drawn.index(">held-out accuracy<") < drawn.index(">informative groups<")
    assert ">tokens per completion<" in drawn
    assert "held-out accuracy" not in report.read_text()


def test_no_finding_is_said_plainly_and_so_is_what_could_not_be_judged(trained: Run, report: Path) -> None:
    assert "<h2>Findings</h2>\n<p>None could be judged.</p>" in report.read_text()
    assert "Not judged: train–eval gap (it takes 6 held-out" in report.read_text()
    assert "Readiness" not in report.read_text()  # that run has none
    text = (report.parent / "report.md").read_text()
    assert "## Findings\n\nNone could be judged.\n\n- not judged: train–eval gap" in text
    for step in range(41, 61):  # accuracy recovers
        trained.log("rl", step, {"held_out/right": 0.6})
    assert "<h2>Findings</h2>\n<p>None.</p>" in write_report(trained)["html"].read_text()
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
