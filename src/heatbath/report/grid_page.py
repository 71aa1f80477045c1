"""The page of a comparison: settings × seeds, with intervals over both seeds and problems."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from heatbath.report import grid_figures, tables
from heatbath.report.drawing import standalone
from heatbath.report.page import paths_of
from heatbath.report.rendering import rendered
from heatbath.run import OWN_TEST, write_atomically
from heatbath.stages import grid_summary

MISSING = "–"
ALONE = "one seed"  # has no interval
Found = Mapping[str, Any]


def write_page(found: Found, folder: Path) -> dict[str, Path]:
    """Writes compare.html, compare.md and compare.json into the folder, and the figures one by one into figures/;
    returns the paths of the three."""
    paths = paths_of(folder / "compare.html")
    write_atomically(paths["json"], json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    values = gather(found, folder.name)
    (folder / "figures").mkdir(exist_ok=True)
    for name, drawn in values["figures"].items():
        write_atomically(folder / "figures" / f"{name}.svg", standalone(drawn))
    write_atomically(paths["md"], markdown(values))
    write_atomically(paths["html"], rendered("grid.html", values))
    return paths


def gather(found: Found, name: str) -> dict[str, Any]:
    """Everything the page says."""
    done = {setting: len(own["seeds"]) for setting, own in found["settings"].items()}
    there = {setting: own for setting, own in found["settings"].items() if own["seeds"]}
    tasks = [task for task in found["differences"] if any(task in own["tasks"] for own in there.values())]
    titles = {task: "Held-out problems" if task == OWN_TEST else task for task in tasks}
    drawn = {task: grid_figures.of_task(found, there, task) for task in tasks}
    beside = {
        "curves": grid_figures.curves(there, found["baseline"]),
        "validation": grid_figures.validation(there),
        "overlaps": grid_figures.overlaps(there),
    }
    files = {f"{task.rpartition('/')[2]}-{name}": one for task in tasks for name, one in drawn[task].items()}
    for part, figures in beside.items():
        files |= grid_figures.numbered(part, figures)
    return {
        "title": f"{len(done)} settings × {len(found['seeds'])} seeds: {name}",
        "subtitle": f"{found['recipe']} {' '.join(found['overrides'])}".strip() + f" · {_state(found, done)}",
        "tasks": [
            {
                "id": f"task-{i}",
                "title": titles[task],
                "rows": score_rows(there, task),
                "differences": difference_rows([d for d in found["differences"][task] if d["to_baseline"]]),
                "others": difference_rows([d for d in found["differences"][task] if not d["to_baseline"]]),
                "figures": [Markup(one) for one in drawn[task].values()],
                "verdict": grid_summary.verdict(found, task),
            }
            for i, task in enumerate(tasks)
        ],
        "figures": files,
        **{part: [Markup(one) for one in figures] for part, figures in beside.items()},
        "starts": start_rows(there, str(found["baseline"])),
        "shift": shift_rows(there),
        "costs": cost_rows(there),
        "tuned": tuned_rows(found["tuned"]) if found.get("tuned") else [],
        "caveats": caveats(found, there),
    }


def _state(found: Found, done: Mapping[str, int]) -> str:
    total = sum(done.values())
    return f"{total} cells" if total == found["cells"] else f"{total} of {found['cells']} cells so far"


def score_rows(settings: Mapping[str, Found], task: str) -> list[list[str]]:
    """Header and a row per setting and policy: pass@k in the recipe's order, with intervals over seeds and problems;
    distinct@k of the largest k alone."""
    ks, most = (_ks(settings, part, task) for part in ("tasks", "distinct"))
    head = [*(f"pass@{k} [95 % interval]" for k in ks), *(f"distinct@{k}" for k in most)]
    rows = [["setting", "policy", "seeds", *head]]
    for name, own in settings.items():
        for policy, scores in own["tasks"].get(task, {}).items():
            different = own["distinct"].get(task, {}).get(policy, {})
            found = [*(scores.get(str(k)) for k in ks), *(different.get(str(k)) for k in most)]
            cells = [MISSING if one is None else tables.interval(one, alone=ALONE) for one in found]
            rows.append([name, policy, str(len(own["seeds"])), *cells])
    return rows


def _ks(settings: Mapping[str, Found], part: str, task: str) -> list[int]:
    return sorted({int(k) for own in settings.values() for policy in own[part].get(task, {}).values() for k in policy})


def difference_rows(found: Sequence[Found]) -> list[list[str]]:
    """Header and a row per difference of what two settings end with."""
    rows = [["difference", "k", "mean [95 % interval]", "p", "p (Holm)", "seeds", "would be seen", "decided"]]
    for row in found:
        p, corrected = (MISSING if row.get(key) is None else tables.p_value(row[key]) for key in ("p", "p_holm"))
        mde = MISSING if row["mde"] is None else f"{row['mde']:.3f}"
        said = ("better" if row["mean"] > 0 else "worse") if grid_summary.decided(row) else "no"
        interval = tables.interval(row, signed=True, alone=ALONE)
        rows.append(
            [f"{row['from']} → {row['to']}", str(row["k"]), interval, p, corrected, str(len(row["seeds"])), mde, said]
        )
    return rows


def start_rows(settings: Mapping[str, Found], baseline: str) -> list[list[str]]:
    """Header and a row per setting: its start before RL, and where its curve passes the baseline's."""
    passes = f"passes {baseline} at step"
    rows = [["setting", "informative groups", "validation NLL, last epoch", "cut answers at the end", passes]]
    reference = settings[baseline]["curve"] if baseline in settings else []
    for name, own in settings.items():
        ready = [share for share in own["readiness"] if share is not None]
        nll = own["validation"][-1][1] if own["validation"] else []
        cut = own["truncated"].get(own["last"])
        told = [f"{np.mean(x):.3f}" if len(x) else MISSING for x in (ready, nll)]
        step = grid_summary.crossing(own["curve"], reference)
        rows.append([name, *told, MISSING if cut is None else f"{cut:.1%}", MISSING if step is None else f"{step:g}"])
    return rows


def shift_rows(settings: Mapping[str, Found]) -> dict[str, list[list[str]]]:
    """Transition → header and a row per setting: means over seeds."""
    arrows = list(dict.fromkeys(arrow for own in settings.values() for arrow in own["shift"]))
    found = {}
    for arrow in arrows:
        there = {name: own["shift"][arrow] for name, own in settings.items() if arrow in own["shift"]}
        measures = list(next(iter(there.values())))
        rows = [["setting", *measures]]
        rows += [
            [name, *(f"{np.mean(own[m]):.4g}" if m in own else MISSING for m in measures)]
            for name, own in there.items()
        ]
        found[arrow] = rows
    return found


def cost_rows(settings: Mapping[str, Found]) -> list[list[str]]:
    """Header and a row per setting: mean seconds and tokens of a cell by stage."""
    stages = list(dict.fromkeys(stage for own in settings.values() for stage in own["cost"]))
    head = [column for stage in stages for column in (f"{stage}, seconds", f"{stage}, tokens")]
    rows = [["setting", *head]]
    for name, own in settings.items():
        cells = []
        for stage in stages:
            spent = own["cost"].get(stage, {"seconds": 0, "tokens": 0})
            cells += [f"{spent[key]:,.0f}" if spent[key] else MISSING for key in ("seconds", "tokens")]
        rows.append([name, *cells])
    return rows


def tuned_rows(tuned: Found) -> list[list[str]]:
    """Header and a row per setting: what tuning chose, of which scores."""
    rows = [["setting", "chosen", "its score", "the other trials"]]
    for name, trial in tuned["trials"].items():
        own = [row for row in tuned["tried"] if row["setting"] == name]
        scores = {row["trial"]: [o["score"] for o in own if o["trial"] == row["trial"]] for row in own}
        others = ", ".join(f"{np.mean(score):.3f}" for other, score in scores.items() if other != trial)
        rows.append([name, trial, f"{np.mean(scores[trial]):.3f}", others])
    return rows


def caveats(found: Found, settings: Mapping[str, Found]) -> list[str]:
    """What weakens the comparison."""
    said = []
    seeds = {len(own["seeds"]) for own in settings.values()}
    if min(seeds, default=0) < 2:
        said.append("One seed: the scatter between trainings is unknown, and often larger than that between methods.")
    elif min(seeds) < 5:
        covers = "87 to 97" if min(seeds) == 2 else "92 to 98"
        said.append(f"Only {min(seeds)} seeds: an interval from so few is wide, and covers {covers} %.")
    if len(seeds) > 1:
        said.append("Not every setting has all seeds yet; differences are over the seeds that both have.")
    if found.get("tuned"):
        k = found["tuned"]["k"]
        said.append(
            f"Settings were tuned on the validation problems (pass@{k}, other seeds); none of them is asked here."
        )
    elif len(settings) > 1 and found["recipe"]:
        said.append("No setting was tuned: a strategy may be far from its best learning rate here.")
    return said


def markdown(values: Found) -> str:
    """The page as Markdown."""
    parts = [f"# {values['title']}", values["subtitle"]]
    for task in values["tasks"]:
        parts += [f"## {task['title']}", " ".join(task["verdict"]), tables.markdown(task["rows"])]
        parts += [tables.markdown(task["differences"])] * (len(task["differences"]) > 1)
    parts += ["## Starts", tables.markdown(values["starts"])]
    for arrow, rows in values["shift"].items():
        parts += [f"## Shift, {arrow}", tables.markdown(rows)]
    if values["tuned"]:
        parts += ["## Tuning", tables.markdown(values["tuned"])]
    parts += ["## Cost", tables.markdown(values["costs"])]
    parts += ["## Read this with care", "\n".join(f"- {said}" for said in values["caveats"])]
    return "\n\n".join(part for part in parts if part) + "\n"
