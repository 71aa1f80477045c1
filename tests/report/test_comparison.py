"""Several runs compared: the numbers by hand and by scipy, and what is said of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from heatbath import cli
from heatbath import recipe as recipes
from heatbath.errors import RecipeError
from heatbath.report import comparison
from heatbath.report.page import write_report
from heatbath.report.runs_page import write_comparison
from heatbath.run import Run
from heatbath.stages import scoring
from written_runs import RECIPE, logged, sample, shifted, written


def ended(
    folder: Path, rates: dict[str, float], *, seed: int, problems: int = 60, first: int = 0, **changes: Any
) -> Run:
    """A run whose samples, four of each problem, are right at random."""
    draw = np.random.default_rng(seed)
    run = Run.create(folder, recipes.parse(RECIPE | changes))
    for policy, rate in rates.items():
        run.add_samples(
            [sample(policy, q, bool(draw.random() < rate)) for q in range(first, problems) for _ in range(4)]
        )
    results = scoring.summarise({p: run.samples(p) for p in rates}, (1, 4))
    scoring.correct(results["differences"])
    run.write_json("results.json", {**results, "tasks": {}})
    return run


def right_share(run: Run, policy: str) -> dict[str, float]:
    found: dict[str, list[bool]] = {}
    for row in run.samples(policy):
        found.setdefault(row["problem"], []).append(row["status"] == "right")
    return {problem: float(np.mean(values)) for problem, values in found.items()}


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    folder = tmp_path_factory.mktemp("three")
    return [
        ended(folder / "weak", {"base": 0.1, "init": 0.2, "final": 0.3}, seed=1),
        ended(folder / "strong", {"base": 0.1, "init": 0.3, "final": 0.7}, seed=2, first=10),
        ended(folder / "direct", {"base": 0.1, "final": 0.35}, seed=3, sft=None),
    ]


def test_differences_are_paired_over_the_problems_in_common_and_corrected(three: list[Run]) -> None:
    told = json.loads(write_comparison([run.folder for run in three])["json"].read_text())
    found = {(d["from"], d["to"], d["of"], d["k"]): d for d in told["differences"]}
    pairs = [("weak", "strong"), ("weak", "direct"), ("strong", "direct")]
    assert set(found) == {(a, b, "end", k) for a, b in pairs for k in (1, 4)} | {
        ("weak", "strong", "start", k) for k in (1, 4)
    }
    by_name = dict(zip(("weak", "strong", "direct"), three, strict=True))
    for (a, b, of, k), d in found.items():
        if k != 1:
            continue
        policy = "init" if of == "start" else "final"
        x, y = right_share(by_name[a], policy), right_share(by_name[b], policy)
        common = sorted(x.keys() & y.keys())
        before, after = [x[p] for p in common], [y[p] for p in common]
        assert d["problems"] == len(common) == (50 if "strong" in (a, b) else 60)
        assert d["mean"] == pytest.approx(np.mean(after) - np.mean(before))
        tested = stats.ttest_rel(after, before)
        assert d["p"] == pytest.approx(tested.pvalue)
        interval = tested.confidence_interval(0.95)
        assert (d["low"], d["high"]) == pytest.approx((interval.low, interval.high))
    ps = [d["p"] for d in told["differences"]]
    order = np.argsort(ps)
    stepped = np.maximum.accumulate(np.array(ps)[order] * np.arange(len(ps), 0, -1))  # Holm over all of the page
    corrected = dict(zip(order.tolist(), np.minimum(1, stepped), strict=True))
    assert [d["p_holm"] for d in told["differences"]] == pytest.approx([corrected[i] for i in range(len(ps))])


def test_the_verdict_claims_what_the_differences_show(three: list[Run], tmp_path: Path) -> None:
    told = json.loads(write_comparison([run.folder for run in three])["json"].read_text())
    mean = np.mean(list(right_share(three[1], "final").values()))
    assert told["verdict"].startswith(f"strong ends highest: pass@1 {mean:.2f} [")
    assert told["verdict"].endswith(" It is better than weak, direct on the same problems.")
    again = ended(tmp_path / "again", {"base": 0.1, "final": 0.69}, seed=9, problems=50, sft=None)
    told = json.loads(write_comparison([three[1].folder, again.folder])["json"].read_text())
    assert "better" not in told["verdict"] and "these data decide nothing." in told["verdict"]
    empty = Run.create(tmp_path / "empty", three[0].recipe)
    told = json.loads(write_comparison([three[0].folder, empty.folder], tmp_path / "x.html")["json"].read_text())
    assert told["verdict"] == "The runs have no task in common." and told["differences"] == []


def test_a_difference_that_holm_takes_back_decides_nothing() -> None:
    d = {
        "from": "a",
        "to": "b",
        "policies": ["final", "final"],
        "of": "end",
        "k": 1,
        "mean": 0.1,
        "low": 0.01,
        "high": 0.2,
    }
    assert comparison._ahead({**d, "p_holm": 0.04}, "b") and not comparison._ahead({**d, "p_holm": 0.06}, "b")
    assert not comparison._ahead({**d, "p_holm": 0.04}, "a") and comparison._ahead(d, "b")
    d |= {"low": -0.2, "high": -0.01}
    assert comparison._ahead(d, "a") and not comparison._ahead(d, "b")
    assert not comparison._ahead({**d, "low": None, "high": None}, "a")


def test_of_more_than_four_runs_each_is_compared_with_the_first(tmp_path: Path) -> None:
    runs = [ended(tmp_path / f"r{i}", {"base": 0.1, "final": 0.2}, seed=i, problems=8, sft=None) for i in range(5)]
    told = json.loads(write_comparison([run.folder for run in runs])["json"].read_text())
    assert {(d["from"], d["to"]) for d in told["differences"]} == {("r0", f"r{i}") for i in range(1, 5)}
    assert "Of more than 4 runs each is compared with the first only." in told["caveats"]
    told = json.loads(write_comparison([run.folder for run in runs[:4]])["json"].read_text())
    assert len({(d["from"], d["to"]) for d in told["differences"]}) == 6


def test_only_the_keys_that_differ_are_shown(tmp_path: Path) -> None:
    gift = RECIPE | {"seed": 1}
    sft = RECIPE | {"sft": {"objective": "sft", "lr": 2e-5}}
    direct = RECIPE | {"sft": None, "rl": {"lr": 1e-5}}
    runs = [written(tmp_path / n, {"base": 1}, problems=3, **r) for n, r in (("g", gift), ("s", sft), ("d", direct))]
    rows = comparison.recipe_rows(comparison.read([run.folder for run in runs]))
    assert rows == [
        ["key", "g", "s", "d"],
        ["rl.lr", "1e-06", "1e-06", "1e-05"],
        ["seed", "1", "0", "0"],
        ["[sft]", "yes", "yes", "–"],
        ["sft.lr", "1e-05", "2e-05", "–"],
        ["sft.objective.beta", "7.5", "–", "–"],
        ["sft.objective.name", "gift", "sft", "–"],
    ]
    paths = write_comparison([run.folder for run in runs])
    page = paths["html"].read_text()
    assert page.count("<summary>The whole recipe of ") == 3 and "max_length" in page
    assert json.loads(paths["json"].read_text())["recipe"]["seed"] == {"g": "1", "s": "0", "d": "0"}
    same = written(tmp_path / "g2", {"base": 1}, problems=3, **gift)
    assert "The recipes are the same." in write_comparison([runs[0].folder, same.folder])["html"].read_text()


def test_names_are_as_short_as_tells_them_apart() -> None:
    names = comparison.distinct_names
    assert names([Path("/x/a"), Path("/y/b")]) == ["a", "b"]
    assert names([Path("/x/a"), Path("/y/a"), Path("/y/b")]) == ["x/a", "y/a", "y/b"]
    assert names([Path("/a/x"), Path("/a/b/x"), Path("/c/b/x")]) == ["//a/x", "a/b/x", "c/b/x"]


def test_what_forbids_a_comparison_is_said(three: list[Run], tmp_path: Path) -> None:
    alike = [ended(tmp_path / n, {"base": 0.1, "final": 0.2}, seed=5, problems=9) for n in ("a", "b")]
    read = comparison.read([run.folder for run in alike])
    assert comparison.caveats(read, "test")[0].startswith("One training seed each")
    other = ended(tmp_path / "c", {"base": 0.1, "final": 0.2}, seed=5, problems=8, eval={"temperature": 1.0})
    for run, mark in ((alike[0], "x"), (other, "y")):
        run.write_json("base.json", {"fingerprint": mark})
    said = comparison.caveats(comparison.read([alike[0].folder, other.folder]), "test")
    for words in ("not start from the same base", "under different conditions", "not asked the same problems"):
        assert any(words in line for line in said), words


def test_the_base_is_complained_about_once_where_it_is_the_same(tmp_path: Path) -> None:
    runs = [ended(tmp_path / n, {"base": 0.1, "final": 1.0}, seed=5, problems=9) for n in ("a", "b")]
    for run in runs:
        results = run.read_json("results.json")
        results["policies"]["base"]["grader_failures"] = 3
        run.write_json("results.json", results)

    def complaints() -> list[str]:
        said = comparison.caveats(comparison.read([run.folder for run in runs]), "test")
        return [line for line in said if "could not be graded" in line]

    assert len(complaints()) == 1 and "3 completions of a base could not be graded" in complaints()[0]
    for run in runs:
        run.write_json("base.json", {"fingerprint": run.folder.name})
    assert len(complaints()) == 2


def test_what_is_not_known_of_the_base_is_not_taken_for_the_same(tmp_path: Path) -> None:
    def same(**of: dict[str, Any]) -> bool | None:
        folders = []
        for name, changes in of.items():
            fingerprint = changes.pop("fingerprint", None)
            run = written(tmp_path / str(len(list(tmp_path.iterdir()))) / name, {"base": 1}, problems=2, **changes)
            folders.append(run.folder)
            if fingerprint:
                run.write_json("base.json", {"fingerprint": fingerprint})
        read = comparison.read(folders)
        said = " ".join(comparison.caveats(read, "test"))
        known = comparison.same_base(read)
        assert ("do not start from the same base" in said) == (known is False)
        assert ("same base is not known" in said) == (known is None)
        return known

    pretrained: dict[str, Any] = {"model": None, "pretrain": {}}
    assert same(a={}, b={}) is True
    assert same(a={"model": "m"}, b={"model": "other"}) is False
    assert same(a={"model": "m", "fingerprint": "x"}, b={"model": "other"}) is False
    assert same(a={"model": "m", "fingerprint": "x"}, b={"model": "m2", "fingerprint": "x"}) is True
    assert same(a={"fingerprint": "x"}, b={"fingerprint": "y"}, c={}) is False
    assert same(a={**pretrained}, b={**pretrained}) is None


def test_one_seed_each_is_said_unless_a_seed_is_all_that_differs(tmp_path: Path) -> None:
    other = {"sft": {"objective": "sft"}}
    runs = [
        written(tmp_path / name, {"base": 1}, problems=2, **changes)
        for name, changes in {"a": {"seed": 1}, "b": {"seed": 2, **other}, "c": {"seed": 3, **other}}.items()
    ]
    read = comparison.read([run.folder for run in runs])
    warned = [any("One training seed each" in line for line in comparison.caveats(r, "test")) for r in (read[:2], read)]
    assert warned == [True, False]


def test_without_a_pair_there_is_no_winner(tmp_path: Path) -> None:
    one = ended(tmp_path / "one", {"base": 0.1, "final": 1.0}, seed=1, problems=1)
    two = ended(tmp_path / "two", {"base": 0.1, "final": 0.5}, seed=2, problems=9, first=5)
    told = json.loads(write_comparison([one.folder, two.folder])["json"].read_text())
    assert told["verdict"] == "Not compared: no problem in common." and told["differences"] == []
    assert "| difference" not in (tmp_path / "report-2-runs.md").read_text()
    again = ended(tmp_path / "again", {"base": 0.1, "final": 1.0}, seed=3, problems=1)
    paths = write_comparison([two.folder, one.folder, again.folder])
    said = json.loads(paths["json"].read_text())["verdict"]
    assert said == (
        "one ends highest: pass@1 1.00 (one problem, no interval). Against again these data decide nothing. "
        "Not compared: two (no problem in common)."
    )
    assert "1.00–1.00" not in paths["html"].read_text()
    results = again.read_json("results.json")
    for found in results["policies"].values():
        found["pass"] = {"4": found["pass"]["4"]}
    again.write_json("results.json", results | {"policies": results["policies"]})
    other = ended(tmp_path / "other", {"final": 0.5}, seed=4, problems=1)
    for found in (results := other.read_json("results.json"))["policies"].values():
        found["pass"] = {"1": found["pass"]["1"]}
    other.write_json("results.json", results)
    read = comparison.read([again.folder, other.folder])
    assert comparison.verdict(read, comparison.differences(read, "test"), "test") == (
        "Not compared: no pass@k in common."
    )


def test_problems_that_the_last_evaluation_did_not_ask_are_left_out(tmp_path: Path) -> None:
    runs = [written(tmp_path / name, {"base": 1, "final": 4}, problems=24) for name in ("a", "b")]
    kept = [f"p{q:03}" for q in range(0, 24, 2)]
    for run in runs:
        asked = {p: [row for row in run.samples(p) if row["problem"] in kept] for p in ("base", "final")}
        found = scoring.summarise(asked, (1, 8))
        run.write_json("results.json", {**found, "tasks": {}, "asked": " ".join(kept)})
    read = comparison.read([run.folder for run in runs])
    assert [len(each.samples) for each in read] == [2 * 12 * 8] * 2 and read[0].counted["test"]["final"][0] == kept
    told = json.loads(write_comparison([run.folder for run in runs])["json"].read_text())
    assert {d["problems"] for d in told["differences"]} == {12}
    page = write_report(runs[0])["html"].read_text()
    assert "All 192 samples are in this page." in page
    assert "192 samples are left out: the last evaluation did not ask their problems." in page


def test_runs_that_share_only_a_judged_task_are_told_by_their_ratings(tmp_path: Path) -> None:
    runs = []
    for name, rating in (("a", 4.0), ("b", None)):
        run = Run.create(tmp_path / name, recipes.parse(RECIPE))
        mean = None if rating is None else {"mean": rating, "low": 3.5, "high": 4.5}
        entry = {"rating": mean, "problems": 8, "categories": {}}
        part = {"kind": "judge", "version": 1, "policies": {"base": entry, "final": entry}, "differences": []}
        run.write_json("results.json", {"policies": {}, "differences": [], "tasks": {"mt_bench": part}})
        runs.append(run)
    paths = write_comparison([run.folder for run in runs])
    told, page = json.loads(paths["json"].read_text()), paths["html"].read_text()
    assert told["verdict"].startswith("The runs have only judged tasks in common: mt_bench.")
    assert [run["ends_with"] for run in told["runs"]] == ["final", "final"]
    assert "final rating of 10 in mt_bench 3.50–4.50" in page and "no rating in mt_bench" in page
    assert "no samples" not in page


def test_ones_own_problems_come_before_the_tasks(tmp_path: Path) -> None:
    runs = [ended(tmp_path / n, {"base": 0.1, "final": 0.5}, seed=5, problems=9) for n in ("a", "b")]
    for run in runs:
        rows = [
            sample("final", q, q % 2 == 0, task=task) for task in ("aime", "only-" + run.folder.name) for q in range(4)
        ]
        run.replace_samples([*rows, *run.samples()])
    read = comparison.read([run.folder for run in runs])
    assert comparison.tasks_of(read) == ["test", "aime"]
    told = json.loads(write_comparison([run.folder for run in runs])["json"].read_text())
    assert {d["task"] for d in told["differences"]} == {"test", "aime"} and "pass@1 0." in told["verdict"]
    page = (tmp_path / "report-2-runs.html").read_text()
    assert page.index('<h2 id="scores-h">Held-out problems') < page.index('<h2 id="task-aime-h">aime')


def test_the_page_of_runs_with_everything(three: list[Run], tmp_path: Path) -> None:
    runs = [
        logged(written(tmp_path / name, {"base": 1, "init": 2, "final": 4}, problems=6, seed=i))
        for i, name in enumerate(("one", "two"))
    ]
    for run in runs:
        run.write_json("shift.json", shifted())
    for run, rating in zip(runs, (4.0, 6.0), strict=True):
        results = run.read_json("results.json")
        judged = {"rating": {"mean": rating, "low": rating - 1, "high": rating + 1}, "problems": 8, "categories": {}}
        results["tasks"] = {
            "mt_bench": {"kind": "judge", "version": 1, "policies": {"final": judged}, "differences": []}
        }
        run.write_json("results.json", results)
    paths = write_comparison([run.folder for run in runs], tmp_path / "out" / "both.html")
    page, text = paths["html"].read_text(), paths["md"].read_text()
    assert "Not of one measure" not in page and "Warm start" in page and "Reinforcement learning" in page
    assert "| one | mt_bench | final  | 4.00 [3.00, 5.00] | 8         |" in text
    assert "| two | final  | 6" in text and "over its base +0.37 [+0.37, +0.37]" in page
    assert "base → init:" in text and "| one                     | two                     |" in text
    other = shifted()
    other["data"]["fingerprint"] = "another"
    runs[1].write_json("shift.json", other)
    assert "Not of one measure" in write_comparison([run.folder for run in runs])["html"].read_text()
    assert [path.name for path in (tmp_path / "out").iterdir() if path.suffix == ".md"] == ["both.md"]
    assert (tmp_path / "report-2-runs.html").is_file()  # beside the first run


def test_mistakes_are_told(three: list[Run], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="the run is given twice"):
        write_comparison([three[0].folder, three[0].folder / ".." / three[0].folder.name])
    with pytest.raises(RecipeError, match="not a run"):
        write_comparison([three[0].folder, tmp_path])
    for out in (tmp_path, tmp_path / "page"):
        with pytest.raises(RecipeError, match=r"ends in \.html"):
            write_comparison([run.folder for run in three], out)


def test_the_command_takes_one_run_or_several(three: list[Run], tmp_path: Path, capsys, monkeypatch) -> None:
    def call(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["heatbath", "report", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code
        return capsys.readouterr().out.strip()

    folders = [str(run.folder) for run in three]
    assert call(folders[0]) == f"{folders[0]}/report.html"
    assert call(*folders) == str(three[0].folder.parent / "report-3-runs.html")
    written_to = json.loads(call(*folders[:2], "--out", str(tmp_path / "x.html"), "--json"))
    assert {Path(path).name for path in written_to.values()} == {"x.html", "x.md", "x.json"}
    assert "2 runs compared" in (tmp_path / "x.html").read_text()
