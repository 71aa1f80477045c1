"""Results as text."""

from __future__ import annotations

from pathlib import Path
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


def readiness_rows(found: dict[str, Any], happened: dict[str, Any] | None) -> list[list[str]]:
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


def kind_rows(profile: dict[str, Any]) -> list[list[str]]:
    """Header and one row per kind of demonstration: how surprising the base finds it."""
    rows = [["kind", "rows", "tokens", "mean nats", "99 % below", "w < 0.5"]]
    for kind, k in profile["kinds"].items():
        left = f"{k['w_below_0.5']:.2%}" if "w_below_0.5" in k else ""
        rows.append([kind, f"{k['rows']:,}", f"{k['tokens']:,}", f"{k['mean']:.2f}", f"{k['q99']:.1f}", left])
    return rows


def beta_rows(profile: dict[str, Any]) -> list[list[str]]:
    """Header and one row per β: the share of tokens below each w, and the mean keep."""
    rows = [["β", "w < 0.99", "w < 0.5", "w < 0.1", "mean keep"]]
    for b in profile["betas"]:
        shares = [f"{b[f'w_below_{w}']:.2%}" for w in ("0.99", "0.5", "0.1")]
        rows.append([f"{b['beta']:.4g}", *shares, f"{b['keep']:.4f}"])
    return rows


def cache_rows(profile: dict[str, Any]) -> list[list[str]]:
    """Header and one row per reference cache: what it would take on disk."""
    sizes = profile["caches"]
    rows = [["sft.reference", "bytes", "hidden states of"], ["hidden", _size(sizes["hidden"]), "every token"]]
    if "surprise" in sizes:
        share = sizes["surprise_tokens"] / max(profile["tokens"], 1)
        rows.append(["surprise", _size(sizes["surprise"]), f"{sizes['surprise_tokens']:,} tokens ({share:.1%})"])
    return rows


def cache_text(profile: dict[str, Any]) -> str:
    """What the caches leave out of the count, and what is in the one on this machine."""
    where = profile["cache"].replace(str(Path.home()), "~", 1)
    return f"Beside them the base's head, {_size(profile['caches']['head'])}, once. Filled by this pass: {where}"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
