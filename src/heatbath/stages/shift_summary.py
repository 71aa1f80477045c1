"""Means with intervals, and the differences of two runs, from what each sequence measured; and both as tables.

The problem is the sampling unit: several sequences of one problem (several solutions, several samples) count as one.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from heatbath.ideas.intervals import Estimate, mean_with_interval, paired_difference
from heatbath.ideas.shift import POOLS, TOP_SHARE, by_problem
from heatbath.report.tables import interval
from heatbath.stages.shift_settings import LAYERS, MEANS, Settings
from heatbath.terminal import printable

DISTRIBUTION = ("kl_from_to", "kl_to_from", "entropy_from", "entropy_to", "logp_from", "logp_to")
BOUNDS = {"cosine": (-1.0, 1.0), "overlap": (0.0, 1.0), "jaccard": (0.0, 1.0), "logp": (-math.inf, 0.0)}  # else [0, ∞)
NAMES = {
    "cosine": "cosine",
    "l2": "L2",
    "kl_from_to": "KL(from ‖ to), nats",
    "kl_to_from": "KL(to ‖ from), nats",
    "entropy_from": "entropy of from, nats",
    "entropy_to": "entropy of to, nats",
    "logp_from": "log p(token) of from",
    "logp_to": "log p(token) of to",
}
Means = dict[str, list[float]]


def transition(
    pair: tuple[str, str], measured: dict[str, Any], table: dict[str, Any], settings: Settings
) -> dict[str, Any]:
    """One transition as shift.json shows it. `measured` holds `means` (metric → value of each sequence, [S]) and
    `l2_top_share`; `table` the sequences' `tokens` and `problem`."""
    numbers = _estimates(measured["means"], table, settings)
    out: dict[str, Any] = {"from": pair[0], "to": pair[1], **{n: x for n, x in numbers.items() if "@" not in n}}
    for kind in ("overlap", "jaccard"):
        out[kind] = {n.partition("@")[2]: x for n, x in numbers.items() if n.startswith(f"{kind}@")}
    out["geometry"] = {layer: {} for layer in LAYERS}
    for layer, way in itertools.product(LAYERS, (*MEANS, *POOLS)):
        asked: dict[str, Any] = {"mean": way, "pool": "none"} if way in MEANS else {"pool": way}
        found = _estimates(measured["means"], table, dataclasses.replace(settings, layer=layer, **asked))
        out["geometry"][layer][way] = {name: found[name] for name in ("cosine", "l2")}
    return out | {"l2_top_share": measured["l2_top_share"]}


def differences(runs: Sequence[dict[str, Any]], settings: Settings) -> list[dict[str, Any]]:
    """Second run − first run of every metric of every transition that both have, over the problems that both have,
    paired: `from`, `to`, `metric`, `mean`, `low`, `high`, `problems`."""
    tables = [run["sequences"] for run in runs]
    common = set(tables[0]["problem"]).intersection(tables[1]["problem"])
    kept = [[i for i, problem in enumerate(table["problem"]) if problem in common] for table in tables]
    if not common:
        return []
    short = [
        {key: [table[key][i] for i in rows] for key in ("problem", "tokens")}
        for table, rows in zip(tables, kept, strict=True)
    ]
    out = []
    for pair in (_pair(t) for t in runs[0]["transitions"]):
        places = [[_pair(t) for t in run["transitions"]] for run in runs]
        if pair not in places[1]:
            continue
        means = [
            {name: [column[i] for i in rows] for name, column in table["transitions"][place.index(pair)].items()}
            for table, place, rows in zip(tables, places, kept, strict=True)
        ]
        first, second = (_columns(m, t, settings) for m, t in zip(means, short, strict=True))
        for name in (n for n in first if n in second):
            a = by_problem(*first[name], short[0]["problem"])
            b = by_problem(*second[name], short[1]["problem"])
            found = paired_difference([a[p] for p in sorted(common)], [b[p] for p in sorted(common)])
            row = {"from": pair[0], "to": pair[1], "metric": name, **found.numbers(), "problems": len(common)}
            out.append(row)
    return out


def _pair(transition: dict[str, Any]) -> tuple[str, str]:
    return transition["from"], transition["to"]


def _columns(means: Means, table: dict[str, Any], settings: Settings) -> dict[str, tuple[list[float], list[float]]]:
    """Metric → its value in each sequence and the sequence's weight, by the settings' layer, pool and mean."""
    tokens = [float(n) for n in table["tokens"]]
    alike = [1.0] * len(tokens)
    of_tokens, pool = tokens if settings.mean == "token" else alike, settings.pool
    geometry = ("", of_tokens) if pool == "none" else (f"{pool}_", alike)
    out = {name: (means[f"{geometry[0]}{name}_{settings.layer}"], geometry[1]) for name in ("cosine", "l2")}
    ranked = [name for name in means if "@" in name]
    return out | {name: (means[name], of_tokens) for name in (*DISTRIBUTION, *ranked)}


def _estimates(means: Means, table: dict[str, Any], settings: Settings) -> dict[str, dict[str, float | None]]:
    columns = _columns(means, table, settings).items()
    return {
        name: _within(name, mean_with_interval(list(by_problem(*column, table["problem"]).values())))
        for name, column in columns
    }


def _within(name: str, estimate: Estimate) -> dict[str, float | None]:
    """Mean and bounds, cut where the metric itself ends."""
    low, high = BOUNDS.get(name.partition("@")[0].partition("_")[0], (0.0, math.inf))
    numbers = estimate.numbers()
    if numbers["low"] is not None and numbers["high"] is not None:
        numbers |= {"low": max(low, numbers["low"]), "high": min(high, numbers["high"])}
    return numbers


def show(found: dict[str, Any], console: Console) -> None:
    """The shift of one run, or of two side by side, on a terminal."""
    runs = found.get("runs", [found])
    for run in runs:
        console.print(printable(described(run)), soft_wrap=True, markup=False)
    console.print()
    console.print(_table(rows(runs[0]) if len(runs) == 1 else rows_of_two(found)))
    for run in runs:
        console.print()
        if len(runs) > 1:
            console.print(printable(run["run"]), markup=False)
        console.print(_table(geometry_rows(run)))
        for t in run["transitions"]:
            shares = [f"{t['l2_top_share'][layer]:.0%} of L2 {layer} the final norm" for layer in LAYERS]
            line = f"{t['from']} → {t['to']}: {TOP_SHARE:.0%} of the tokens carry {' and '.join(shares)}"
            console.print(line, soft_wrap=True, markup=False)


def described(run: dict[str, Any]) -> str:
    """Which sequences and which options the numbers are of, in a line."""
    data, options = run["data"], run["options"]
    geometry = f"{options['layer']} the final norm"
    geometry += f", {options['pool']}" if options["pool"] != "none" else ""
    text = f"{data['source']}: {data['sequences']:,} sequences of {data['problems']:,} problems, "
    text += f"{data['tokens']:,} tokens ({options['tokens']}); states {geometry}; "
    text += f"mean over {options['mean']}s; T = {options['temperature']:g}; "
    text += f"{run['vocab_size']:,} tokens in the vocabulary; {options['dtype']}"
    text += f"; {data['truncated']:,} cut at {data['max_length']:,} tokens" if data["truncated"] else ""
    if data.get("left_out"):
        text += f"; {data['left_out']:,} left out, whose prompt fills {data['max_length']:,} tokens"
    text += f"; {data['retokenised']:,} samples tokenised again" if data["retokenised"] else ""
    return text


def rows(run: dict[str, Any]) -> list[list[str]]:
    """Header, and a row per metric with a column per transition."""
    columns = [_flat(t) for t in run["transitions"]]
    head = ["mean [95 % interval]", *(f"{t['from']} → {t['to']}" for t in run["transitions"])]
    return [head, *([title(name), *(interval(c[name], digits=4) for c in columns)] for name in columns[0])]


def rows_of_two(found: dict[str, Any]) -> list[list[str]]:
    """Header, and a row per transition and metric: the means of the first and of the second run, and their paired
    difference with its interval."""
    first, second = found["runs"]
    out = [["", "mean", first["run"], second["run"], "second − first [95 % interval]"]]
    own, theirs = ({_pair(t): _flat(t) for t in run["transitions"]} for run in (first, second))
    paired = {(d["from"], d["to"], d["metric"]): d for d in found["differences"]}
    for pair in dict.fromkeys([*own, *theirs]):
        both = own.get(pair, {}), theirs.get(pair, {})
        for i, name in enumerate(dict.fromkeys([*both[0], *both[1]])):
            cells = [f"{numbers[name]['mean']:.4f}" if name in numbers else "" for numbers in both]
            d = paired.get((*pair, name))
            last = interval(d, signed=True, digits=4) if d else ""
            out.append([f"{pair[0]} → {pair[1]}" if i == 0 else "", title(name), *cells, last])
    return out


def geometry_rows(run: dict[str, Any]) -> list[list[str]]:
    """Header, and cosine and L2 of each transition by every layer and way of averaging."""
    head = ["states", "averaged by", *(f"{t['from']} → {t['to']}: cosine, L2" for t in run["transitions"])]
    out = [head]
    for layer, way in itertools.product(LAYERS, (*MEANS, *POOLS)):
        found = [t["geometry"][layer][way] for t in run["transitions"]]
        numbers = [f"{f['cosine']['mean']:.4f}  {f['l2']['mean']:.4g}" for f in found]
        out.append([f"{layer} the norm" if way == MEANS[0] else "", way, *numbers])
    return out


def title(metric: str) -> str:
    """A metric's name in a table."""
    kind, _, k = metric.partition("@")
    return f"top-{k} {kind}" if k else NAMES[metric]


def _flat(transition: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Metric → mean and bounds, of a transition of shift.json; not Jaccard, which follows from the overlap."""
    ranked = {f"overlap@{k}": v for k, v in transition["overlap"].items()}
    return {name: transition[name] for name in ("cosine", "l2", *DISTRIBUTION)} | ranked


def _table(rows: list[list[str]]) -> Table:
    table = Table(*rows[0], box=None, header_style="dim", padding=(0, 2, 0, 0))
    for row in rows[1:]:
        table.add_row(*row)
    return table
