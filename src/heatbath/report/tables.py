"""Results as text."""

from __future__ import annotations

from typing import Any


def interval(estimate: dict[str, Any], *, signed: bool = False, digits: int = 3) -> str:
    """`0.740 [0.680, 0.800]`, with a sign for a difference."""
    form = f"{'+' if signed else ''}.{digits}f"
    if estimate["low"] is None:
        return f"{estimate['mean']:{form}} (one problem, no interval)"
    return f"{estimate['mean']:{form}} [{estimate['low']:{form}}, {estimate['high']:{form}}]"


def results_rows(results: dict[str, Any]) -> list[list[str]]:
    """Header and one row per policy: pass@k with 95 % intervals, truncated share, mean length."""
    policies = results["policies"]
    ks = list(next(iter(policies.values()))["pass"])
    rows = [["policy", *(f"pass@{k}" for k in ks), "truncated", "tokens"]]
    for name, found in policies.items():
        estimates = [interval(found["pass"][k]) for k in ks]
        rows.append([name, *estimates, f"{found['truncated_share']:.1%}", f"{found['mean_tokens']:.1f}"])
    return rows


def difference_rows(results: dict[str, Any]) -> list[list[str]]:
    """Header and one row per paired difference with its reading."""
    rows = [["difference", "pass@k", "mean [95 % interval]", "reading"]]
    for d in results["differences"]:
        rows.append([f"{d['from']} → {d['to']}", f"pass@{d['k']}", interval(d, signed=True), reading(d)])
    return rows


def reading(difference: dict[str, Any]) -> str:
    """What a paired difference says, by whether its interval excludes 0."""
    if difference["low"] is None:
        return "one problem decides nothing"
    if difference["low"] > 0:
        return f"{difference['to']} is better"
    if difference["high"] < 0:
        return f"{difference['to']} is worse"
    return "not decided by these data"


def markdown(rows: list[list[str]]) -> str:
    """A Markdown table, columns aligned in plain text too."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def markdown_results(results: dict[str, Any]) -> str:
    """Both tables of a run."""
    tables = [markdown(results_rows(results))]
    if results["differences"]:
        tables.append(markdown(difference_rows(results)))
    return "\n\n".join(tables)
