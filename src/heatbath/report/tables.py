"""Results as text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def interval(
    estimate: Mapping[str, Any], *, signed: bool = False, digits: int = 3, alone: str = "one problem, no interval"
) -> str:
    """`0.740 [0.680, 0.800]`, with a sign for a difference; `alone` says why there is no interval."""
    form = f"{'+' if signed else ''}.{digits}f"
    found = [estimate[key] for key in ("mean", "low", "high")]
    mean, *ends = (f"{round(x, digits) + 0.0:{form}}" for x in found if x is not None)
    return f"{mean} [{', '.join(ends)}]" if ends else f"{mean} ({alone})"


def results_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """Header and one row per policy: pass@k (and maj@k) with 95 % intervals, what was cut, what is right of the rest,
    mean length."""
    policies = results["policies"]
    columns = _metrics(policies)
    rows = [["policy", *(f"{kind}@{k}" for kind, k in columns), *BESIDE]]
    return rows + [[name, *_scores(found, columns)] for name, found in policies.items()]


BESIDE = ("truncated", "right of finished", "tokens")


def _metrics(policies: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(pass or maj, k) in order of k, of any of the policies."""
    found = {(kind, k) for one in policies.values() for kind in ("pass", "maj") for k in one.get(kind, {})}
    return sorted(found, key=lambda each: (each[0] != "pass", int(each[1])))


def _scores(found: Mapping[str, Any], columns: list[tuple[str, str]]) -> list[str]:
    estimates = [found.get(kind, {}).get(k) for kind, k in columns]
    finished = found.get("right_of_finished")
    return [
        *("–" if e is None else interval(e) for e in estimates),
        f"{found['truncated_share']:.1%}",
        "–" if finished is None else f"{finished:.3f}",
        f"{found['mean_tokens']:.1f}",
    ]


def difference_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """Header and one row per paired difference, with its tests where there are any, and its reading."""
    found = results["differences"]
    tested = [key for key in TESTS if any(d.get(key) is not None for d in found)]
    rows = [["difference", "pass@k", "mean [95 % interval]", *(TESTS[key] for key in tested), "reading"]]
    for d in found:
        cells = [_number(key, d.get(key)) for key in tested]
        rows.append([f"{d['from']} → {d['to']}", f"pass@{d['k']}", interval(d, signed=True), *cells, reading(d)])
    return rows


TESTS = {"p": "p", "p_holm": "p (Holm)", "mde": "would be seen"}


def p_value(p: float) -> str:
    """`0.032`, or `< 0.001`."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _number(key: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if key == "mde" else p_value(value)


def reading(difference: Mapping[str, Any]) -> str:
    """What a paired difference says, by whether its interval excludes 0, and the p corrected for all differences."""
    if difference["low"] is None:
        return "one problem decides nothing"
    if doubtful(difference):
        return f"not decided (p = {p_value(difference['p'])})"
    corrected = difference.get("p_holm")
    doubt = ", not after Holm" if corrected is not None and corrected > 0.05 else ""
    if difference["low"] > 0:
        return f"{difference['to']} is better{doubt}"
    if difference["high"] < 0:
        return f"{difference['to']} is worse{doubt}"
    return "not decided by these data"


def decided(difference: Mapping[str, Any]) -> bool:
    """Whether the interval excludes 0 and the test, where there is one, agrees, before any correction."""
    low, high = difference["low"], difference["high"]
    return low is not None and (low > 0 or high < 0) and not doubtful(difference)


def doubtful(difference: Mapping[str, Any]) -> bool:
    """Whether the interval excludes 0 and the test does not agree: McNemar's, exact, asks more of few problems."""
    low, high, p = difference["low"], difference["high"], difference.get("p")
    return low is not None and (low > 0 or high < 0) and p is not None and p > 0.05


def task_rows(tasks: Mapping[str, Any]) -> list[list[str]]:
    """Header and one row per task and metric: problems × samples, and each policy's score; of a judged task its mean
    rating of 10."""
    names = list(dict.fromkeys(policy for found in tasks.values() for policy in found["policies"]))
    rows = [["task", "problems × samples", "metric", *names]]
    for task, found in tasks.items():
        first = next(iter(found["policies"].values()))
        asked = f"{first['problems']:,} × {first['samples'] / max(first['problems'], 1):g}"
        for metric, key in _of_task(found):
            estimates = [_looked_up(found["policies"].get(name, {}), key) for name in names]
            rows.append([task, asked, metric, *("–" if e is None else interval(e) for e in estimates)])
    return rows


def _of_task(found: Mapping[str, Any]) -> list[tuple[str, tuple[str, ...]]]:
    """What is reported of a task: its name, and where it stands in a policy's entry."""
    if found.get("kind") == "judge":
        return [("rating of 10", ("rating",))]
    return [(f"{kind}@{k}", (kind, k)) for kind, k in _metrics(found["policies"])]


def _looked_up(entry: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        entry = (entry or {}).get(key)
    return entry


def task_difference_rows(tasks: Mapping[str, Any]) -> list[list[str]]:
    """Header and one row per paired difference of every task; empty where there are none."""
    found = [{**d, "task": task, "kind": t.get("kind")} for task, t in tasks.items() for d in t["differences"]]
    if not found:
        return []
    head, *rows = difference_rows({"differences": found})
    head = ["task", *head]
    head[2] = "metric"
    out = [head]
    for d, row in zip(found, rows, strict=True):
        metric = "rating" if d["kind"] == "judge" else row[1]
        out.append([d["task"], row[0], metric, *row[2:]])
    return out


def category_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Header and one row per category of a judged task: each policy's mean rating."""
    policies = found["policies"]
    names = list(dict.fromkeys(name for entry in policies.values() for name in entry["categories"]))
    rows = [["category", *policies]]
    for name in names:
        ratings = [entry["categories"].get(name) for entry in policies.values()]
        rows.append([name, *("–" if r is None else interval(r, digits=2) for r in ratings)])
    return rows


def minus(text: str) -> str:
    """The text with real minus signs before its numbers, as a page sets them."""
    return re.sub(r"(?<![\w-])-(?=[\d.])", "−", text)


def numeric(rows: list[list[str]]) -> set[int]:
    """The columns that hold numbers, which a page aligns right."""
    of_numbers = [all(re.match(r"[−+-]?\d|[–<≈]", row[i]) for row in rows[1:]) for i in range(len(rows[0]))]
    return {i for i, holds in enumerate(of_numbers) if holds and i and len(rows) > 1}


def markdown(rows: list[list[str]]) -> str:
    """A Markdown table, columns aligned in plain text too."""
    rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def markdown_results(results: Mapping[str, Any]) -> str:
    """The tables of a run: its own problems' and those of the tasks."""
    tables = []
    if results["policies"]:
        tables.append(markdown(results_rows(results)))
    if results["differences"]:
        tables.append(markdown(difference_rows(results)))
    if tasks := results.get("tasks"):
        tables.append(markdown(task_rows(tasks)))
        if differences := task_difference_rows(tasks):
            tables.append(markdown(differences))
    return "\n\n".join(tables)


def readiness_rows(found: Mapping[str, Any], happened: Mapping[str, Any] | None) -> list[list[str]]:
    """Header and one row per number measured before RL, with what happened (`readiness.compare`) where RL has run."""
    G = found["group_size"]
    rows = [
        ["the start of RL", "mean [95 % interval]"],
        *([f"pass@{k}", interval(estimate)] for k, estimate in found["pass"].items()),
        ["informative groups, predicted", interval(found["informative_share"])],
    ]
    if happened:
        told = {True: " as predicted", False: " not as predicted", None: ""}[happened["as_predicted"]]
        later = f"{happened['mean']:.3f} in {happened['generations']:,} generations"
        rows += [["… in the first generation", interval(happened["first"]) + told], ["… in the whole of RL", later]]
    names = {"all_wrong_share": f"groups with all {G} wrong", "all_right_share": f"groups with all {G} right"}
    names |= {"truncated_share": "cut completions", "eos_rate": "completions ended with EOS"}
    rows += [[name, interval(found[key])] for key, name in names.items()]
    return [*rows, ["entropy", f"{found['entropy']:.3f} nats per token"], ["tokens", f"{found['mean_tokens']:.1f}"]]


def shift_rows(transitions: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Header and one row per metric, with a column per transition (or run) under its name."""
    from heatbath.stages.shift_summary import DISTRIBUTION, title

    columns = [{**t, **{f"overlap@{k}": e for k, e in t["overlap"].items()}} for t in transitions.values()]
    ranked = [name for name in dict.fromkeys(key for column in columns for key in column) if "@" in name]
    rows = [["mean [95 % interval]", *transitions]]
    for name in ("cosine", "l2", *DISTRIBUTION, *sorted(ranked, key=lambda name: int(name.partition("@")[2]))):
        rows.append([title(name), *(_measure(column.get(name)) for column in columns)])
    return rows


def _measure(estimate: Mapping[str, Any] | None) -> str:
    """An estimate with as many digits as its size is worth."""
    return "–" if estimate is None else interval(estimate, digits=1 if abs(estimate["mean"]) >= 10 else 3)


def kind_rows(profile: Mapping[str, Any]) -> list[list[str]]:
    """Header and one row per kind of demonstration: how surprising the base finds it."""
    rows = [["kind", "rows", "tokens", "mean nats", "99 % below", "w < 0.5"]]
    for kind, k in profile["kinds"].items():
        left = f"{k['w_below_0.5']:.2%}" if "w_below_0.5" in k else ""
        rows.append([kind, f"{k['rows']:,}", f"{k['tokens']:,}", f"{k['mean']:.2f}", f"{k['q99']:.1f}", left])
    return rows


def beta_rows(profile: Mapping[str, Any]) -> list[list[str]]:
    """Header and one row per β: the share of tokens below each w, the mean keep, and how much of the demonstrations the
    target writes to the end."""
    rows = [["β", "w < 0.99", "w < 0.5", "w < 0.1", "mean keep", "whole"]]
    for b in profile["betas"]:
        shares = [f"{b[f'w_below_{w}']:.2%}" for w in ("0.99", "0.5", "0.1")]
        rows.append([f"{b['beta']:.4g}", *shares, f"{b['keep']:.4f}", f"{b['whole']:.1%}"])
    return rows


def cache_rows(profile: Mapping[str, Any]) -> list[list[str]]:
    """Header and one row per reference cache: what it would take on disk."""
    sizes = profile["caches"]
    rows = [["sft.reference", "bytes", "hidden states of"], ["hidden", _size(sizes["hidden"]), "every token"]]
    if "surprise" in sizes:
        share = sizes["surprise_tokens"] / max(profile["tokens"], 1)
        rows.append(["surprise", _size(sizes["surprise"]), f"{sizes['surprise_tokens']:,} tokens ({share:.1%})"])
    return rows


def cache_text(profile: Mapping[str, Any]) -> str:
    """What the caches leave out of the count, and what is in the one on this machine."""
    where = profile["cache"].replace(str(Path.home()), "~", 1)
    return f"Beside them the base's head, {_size(profile['caches']['head'])}, once. Filled by this pass: {where}"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
