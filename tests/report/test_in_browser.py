"""The pages in a real browser: self-contained, quiet, usable by keyboard, on a phone, in the dark, in print and without
JavaScript, and deaf to what a model wrote."""

import itertools
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from heatbath.report.grid_page import write_page
from heatbath.report.page import write_report
from heatbath.report.runs_page import write_comparison
from heatbath.run import Run
from heatbath.stages import grid_summary
from written_runs import HOSTILE, PROFILE, logged, shifted, written

SHARES = {"base": 1, "init": 3, "final": 5}
# Every text that is seen, with the colours of itself and of what lies behind it, over transparent layers.
CONTRAST = """() => {
  const channels = (text) => { const c = text.match(/[\\d.]+/g).map(Number); return [...c.slice(0, 3), c[3] ?? 1]; };
  const linear = (x) => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4;
  const light = (c) => [.2126, .7152, .0722].reduce((sum, part, i) => sum + part * linear(c[i] / 255), 0);
  const behind = (element) => { for (let e = element; e; e = e.parentElement) {
    const c = channels(getComputedStyle(e).backgroundColor); if (c[3] === 1) return c; } return [255, 255, 255, 1]; };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const seen = element.checkVisibility({ visibilityProperty: true }) && !element.closest("script, .skip");
    if (!walker.currentNode.data.trim() || !seen) continue;
    const style = getComputedStyle(element);
    const own = channels(element.closest("svg") ? style.fill : style.color);
    const [a, b] = [light(own), light(behind(element))].sort((x, y) => y - x);
    found.push([(a + .05) / (b + .05), walker.currentNode.data.trim().slice(0, 30), style.color]);
  }
  return found.sort((x, y) => x[0] - y[0]);
}"""
# Does what is given, and tells which directive of the page's policy refused it.
REFUSED = """() => new Promise(done => {
  document.addEventListener("securitypolicyviolation", e => done(e.violatedDirective), { once: true });
  %s
})"""


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = logged(written(tmp_path_factory.mktemp("one") / "run", SHARES))
    run.write_json("surprise.json", PROFILE)
    run.write_json("shift.json", shifted())
    return write_report(run)["html"]


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("four")
    names = ("plain", "<img src=x onerror=alert(1)>", "$x_1$ & co", "漢字 a name that is far too long for a figure")
    runs = [
        logged(written(folder / name, {"base": 1, "init": 2 + i, "final": 3 + i}, seed=i), 0.1 * i)
        for i, name in enumerate(names)
    ]
    for run in runs[:2]:
        run.write_json("shift.json", shifted(0.2))
    return write_comparison([run.folder for run in runs])["html"]


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three β, one with a hostile name, three seeds each, and all that the page can hold."""
    folder = tmp_path_factory.mktemp("grid")
    runs: dict[str, dict[int, Run]] = {}
    for i, name in enumerate(("beta=5", "<img src=x onerror=alert(1)>", "beta=20")):
        for seed in range(3):
            shares = {"base": 1, "init": 2 + (i + seed) % 3, "final": 3 + i}
            run = logged(written(folder / str(i) / str(seed), shares, seed=seed), 0.1 * i)
            run.write_json("shift.json", shifted(0.1 * seed))
            runs.setdefault(name, {})[seed] = run
    tuned = {"k": 1, "trials": {"beta=5": "lr=1"}, "tried": [{"setting": "beta=5", "trial": "lr=1", "score": 0.5}]}
    facts = {"recipe": "study", "overrides": [], "seeds": [0, 1, 2], "vary": {"sft.objective.beta": [5, 10, 20]}}
    found = {**facts, "cells": 9, "tuned": tuned, **grid_summary.summarise(runs, "beta=5")}
    return write_page(found, folder)["html"]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    found = shutil.which("chromium")
    if found is None:
        reason = "chromium is not installed (apt-get install chromium)"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium: Browser) -> Iterator[Any]:
    """`opened(path, width=…, …)` is the page in a context of its own; nothing may have been said or asked for."""
    contexts, noise, requests, pages = [], [], [], []

    def open_page(path: Path, width: int = 1200, **settings: Any) -> Page:
        context = chromium.new_context(viewport={"width": width, "height": 900}, **settings)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: noise.append(m.text))
        page.on("pageerror", lambda e: noise.append(str(e)))
        page.on("request", lambda r: requests.append(r.url))
        page.goto(path.as_uri())
        pages.append(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert noise == [] and set(requests) == set(pages)


def open_all(page: Page) -> None:
    """Opens every problem in the list; each is filled as it opens, after the click has returned."""
    page.get_by_role("button", name="Open all shown").click()
    expect(page.locator(".problems details:not(:has(pre))")).to_have_count(0)


@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("which", ["one", "four"])
def test_a_page_fits_is_quiet_and_can_be_read(which: str, width: int, scheme: str, opened, request) -> None:
    page = opened(request.getfixturevalue(which), width, color_scheme=scheme)
    assert page.title() == {"one": "GIFT (β = 7.5) warm start, then RL (paper)", "four": "4 runs compared"}[which]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    open_all(page)
    found = page.evaluate(CONTRAST)
    assert len(found) > 300 and found[0][0] >= 4.5, found[:5]
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(22, 21, 20)") == (scheme == "dark")


@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_of_a_comparison_fits_and_can_be_read(width: int, scheme: str, grid: Path, opened) -> None:
    page = opened(grid, width, color_scheme=scheme)
    assert page.title().startswith("3 settings × 3 seeds")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    found = page.evaluate(CONTRAST)
    assert len(found) > 200 and found[0][0] >= 4.5, found[:5]
    assert page.locator("main img").count() == 0 and page.locator("figure svg").count() >= 8


def test_the_figures_of_a_comparison_stand_alone(grid: Path, chromium: Browser) -> None:
    """A file of its own: no colour is that of a page that is not there, and it can be drawn."""
    figures = sorted((grid.parent / "figures").glob("*.svg"))
    names = ["overlaps-1", "overlaps-2", "overlaps-3", "test-differences", "test-distinct@8", "test-over"]
    assert [path.stem for path in figures] == [*names, "test-pass@1", "test-pass@8", "validation"]
    page = chromium.new_page()
    for path in figures:
        text = path.read_text()
        assert "var(" not in text and "<img" not in text
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.getBoundingClientRect().width") > 100
        assert page.evaluate("document.querySelectorAll('[onerror], img').length") == 0
    page.close()


@pytest.mark.parametrize("which", ["one", "four"])
def test_nothing_that_a_model_or_a_user_wrote_becomes_html(which: str, opened, request) -> None:
    page = opened(request.getfixturevalue(which))
    open_all(page)
    shown = page.locator("#browser pre", has_text="document.title").first.text_content()
    assert shown == HOSTILE
    assert page.locator("main img, main b, main i").count() == 0
    assert page.evaluate("window.owned") is None
    assert page.locator("script").count() == 2  # the data, and ours


def test_a_script_that_got_in_all_the_same_would_not_run(one: Path, chromium: Browser) -> None:
    page = chromium.new_page()
    page.goto(one.as_uri())
    script = 'const s = document.createElement("script"); s.textContent = "window.owned = 1"; document.body.append(s);'
    assert page.evaluate(REFUSED % script) == "script-src-elem" and page.evaluate("window.owned") is None
    image = 'const i = document.createElement("img"); i.src = "https://example.invalid/x"; document.body.append(i);'
    assert page.evaluate(REFUSED % image) == "img-src"
    page.close()


@pytest.mark.parametrize("which", ["one", "four", "grid"])
def test_a_screen_reader_finds_its_way(which: str, opened, request) -> None:
    page = opened(request.getfixturevalue(which))
    assert page.evaluate("document.documentElement.lang") == "en"
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(h => Number(h.tagName[1]))")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    nameless = page.evaluate(
        """[...document.querySelectorAll("select, input, button, summary, a")].filter(e =>
          !(e.labels?.length || e.getAttribute("aria-label") || e.textContent.trim())).map(e => e.outerHTML)"""
    )
    assert nameless == []
    svgs = page.evaluate(
        """[...document.querySelectorAll("svg")].map(s =>
          s.ariaHidden === "true" || (s.getAttribute("role") === "img" && s.ariaLabel))"""
    )
    assert all(svgs) and len(svgs) >= 8
    labels = [name for name in svgs if name is not True]
    assert len(set(labels)) == len(labels)
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(set(ids)) == len(ids)
    for attribute in ("aria-labelledby", "href"):
        named = page.evaluate(
            f"[...document.querySelectorAll('[{attribute}]')].map(e => e.getAttribute('{attribute}'))"
        )
        wanted = {name.removeprefix("#") for name in named if attribute != "href" or name.startswith("#")}
        assert wanted and wanted <= set(ids)
    tables = page.evaluate(
        """[...document.querySelectorAll("table")].map(t => [t.caption?.textContent.trim() ?? "",
          [...t.querySelectorAll("th")].every(h => ["col", "row"].includes(h.scope))])"""
    )
    assert len(tables) >= 5 and all(caption and scoped for caption, scoped in tables)
    assert page.evaluate("[...document.querySelectorAll('[tabindex]')].every(e => e.tabIndex <= 0)")
    assert page.locator("[role=status][aria-live=polite]").count() == (which != "grid")


def test_the_keyboard_reaches_and_works_everything(one: Path, opened) -> None:
    page = opened(one)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    seen = []
    for _ in range(400):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            """[document.activeElement].flatMap(e =>
              [`${e.tagName} ${e.name || e.className}`, getComputedStyle(e).outlineWidth])"""
        )
        if name.startswith("BODY"):
            break
        assert outline == "3px", name
        seen.append(name)
    assert {"BUTTON sort", "SELECT voice", "SELECT verdict", "INPUT text", "SELECT change"} <= set(seen)
    assert (
        seen.index("BUTTON sort") < seen.index("SELECT voice") < seen.index("SELECT verdict") < seen.index("INPUT text")
    )
    summary = page.locator(".problems summary").nth(1)
    summary.focus()
    page.keyboard.press("Enter")
    expect(page.locator(".problems details").nth(1).locator("pre")).to_have_count(24)  # filled as it is opened
    page.keyboard.press("Enter")
    expect(page.locator(".problems details[open]")).to_have_count(0)
    sort = page.get_by_role("button", name="mean [95 % interval]").first
    sort.focus()
    page.keyboard.press("Space")
    assert sort.locator("xpath=..").get_attribute("aria-sort") == "ascending"


def test_a_table_is_sorted_by_number_and_by_text(one: Path, opened) -> None:
    page = opened(one)
    table = page.locator("table", has=page.locator("caption", has_text="Paired differences"))

    def column(index: int) -> list[str]:
        return [row.locator("th, td").nth(index).inner_text() for row in table.locator("tbody tr").all()]

    before = column(2)
    button = table.get_by_role("button", name="mean")
    button.click()
    numbers = [float(text.split()[0].replace("−", "-")) for text in column(2)]
    assert numbers == sorted(numbers) and sorted(column(2)) == sorted(before) and column(2) != before
    button.click()
    assert [float(text.split()[0].replace("−", "-")) for text in column(2)] == sorted(numbers, reverse=True)
    assert table.locator("[aria-sort]").count() == 1
    table.get_by_role("button", name="difference").click()
    assert column(0) == sorted(column(0)) and table.locator("[aria-sort]").get_attribute("aria-sort") == "ascending"


def counted(page: Page) -> tuple[int, int, int]:
    """What the page says it shows: samples, problems, and the problems in the list."""
    said = page.locator("[role=status]").inner_text()
    found = re.match(r"([\d,]+) of [\d,]+ samples, of ([\d,]+) of", said)
    if found is None:
        assert said == "No sample is like that."
        return 0, 0, page.locator(".problems li").count()
    return int(found[1].replace(",", "")), int(found[2]), page.locator(".problems li").count()


def test_filters_show_what_they_say(one: Path, opened) -> None:
    """Against the run's own samples, counted here."""
    page, rows = opened(one), Run.read(one.parent).samples()
    problems = {row["problem"] for row in rows}
    assert counted(page) == (len(rows), len(problems), 20)
    page.get_by_role("button", name="Show 4 more problems").click()
    assert counted(page)[2] == 24 and page.get_by_role("button", name=re.compile("more problems")).count() == 0
    assert page.evaluate("[...document.querySelectorAll('.problems summary')].indexOf(document.activeElement)") == 20

    page.locator("form").get_by_label("Policy").select_option(label="init")
    page.locator("form").get_by_label("Verdict").select_option(label="right")
    wanted = [row for row in rows if row["policy"] == "init" and row["status"] == "right"]
    assert counted(page) == (len(wanted), len({row["problem"] for row in wanted}), 20)
    page.locator(".problems summary").first.click()
    expect(page.locator(".problems .badge")).to_have_text(["right"] * 4)

    page.get_by_role("button", name="Reset").click()
    page.get_by_label("Ended").select_option(label="cut at the limit")
    wanted = [row for row in rows if not row["finished"]]
    assert counted(page)[0] == len(wanted)
    page.get_by_label("Ended").select_option(label="by itself")
    assert counted(page)[0] == len(rows) - len(wanted)

    page.get_by_role("button", name="Reset").click()
    page.locator("form").get_by_label("Text").fill("what IS 7 +")  # of the question: every sample of that problem
    assert counted(page) == (24, 1, 1)
    page.locator("form").get_by_label("Text").fill("onerror=")  # of completions: those samples alone
    assert counted(page)[0] == sum("onerror=" in row["completion"] for row in rows)
    page.locator("form").get_by_label("Text").fill("nobody said this")
    assert counted(page) == (0, 0, 0)


def test_problems_that_changed_between_two_policies_are_found(one: Path, opened) -> None:
    page, rows = opened(one), Run.read(one.parent).samples()

    def right(policy: str, problem: str) -> int:
        return sum(r["status"] == "right" for r in rows if (r["policy"], r["problem"]) == (policy, problem))

    page.get_by_label("Compare", exact=True).select_option(label="final")
    page.get_by_label("Compare with").select_option(label="base")
    page.get_by_label("Changed").select_option(label="right more often")
    assert counted(page)[1] == 0
    page.get_by_label("Changed").select_option(label="right less often")
    lost = [p for p in {r["problem"] for r in rows} if right("base", p) < right("final", p)]
    assert counted(page)[1] == len(lost) == 24
    page.get_by_label("Compare with").select_option(label="final")
    page.get_by_label("Changed").select_option(label="right more or less often")
    assert counted(page)[1] == 0
    page.get_by_role("button", name="Reset").click()
    page.get_by_label("Order").select_option(label="seldom right first")
    tallies = page.locator(".problems .tallies").all_inner_texts()
    finals = [int(re.search(r"final (\d)/8", text)[1]) for text in tallies]  # type: ignore[index]
    assert finals == sorted(finals) and set(finals) == {5, 6}


def test_several_runs_are_told_apart_in_the_samples(four: Path, opened) -> None:
    page = opened(four)
    voices = page.get_by_label("Run and policy").locator("option").all_inner_texts()
    assert len(voices) == 1 + 1 + 8 and voices[1] == "base"  # all; one base, drawn alike by all; two of each run
    page.get_by_label("Compare", exact=True).select_option(label="plain final")
    page.get_by_label("Compare with").select_option(label="$x_1$ & co final")
    page.get_by_label("Changed").select_option(label="right more often")
    assert counted(page)[1] == 24
    page.get_by_label("Compare", exact=True).select_option(label="$x_1$ & co final")
    page.get_by_label("Compare with").select_option(label="plain final")
    assert counted(page)[1] == 0
    drawn = page.locator("figure svg text").all_text_contents()
    assert {"$x_1$ & co", "漢字 a name that…"} <= set(drawn)


@pytest.mark.parametrize("which", ["one", "four"])
def test_on_paper_the_browser_gives_way_to_plain_examples(which: str, opened, request) -> None:
    page = opened(request.getfixturevalue(which), color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert not page.locator("#browser").is_visible() and not page.locator("nav").is_visible()
    assert page.locator("#plain-samples pre").first.is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    found = page.evaluate(CONTRAST)
    assert found[0][0] >= 4.5, found[:5]
    assert page.pdf().startswith(b"%PDF")


@pytest.mark.parametrize("which", ["one", "four"])
def test_without_javascript_everything_but_the_browser_is_there(which: str, opened, request) -> None:
    page = opened(request.getfixturevalue(which), java_script_enabled=False)
    assert page.locator("#plain-samples pre").first.is_visible() and not page.locator("#browser").is_visible()
    assert page.locator("figure svg").first.is_visible() and page.locator("button.sort").count() == 0
    page.locator("summary", has_text="whole recipe").first.click()
    assert page.get_by_text("temperature = ").first.is_visible()
