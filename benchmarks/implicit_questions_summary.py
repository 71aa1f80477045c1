"""Tables and figures of docs/results/implicit-questions.md from the cells of benchmarks/implicit_questions.py.

Intervals are 95 %, over seeds: t of one number per seed, or for ratios the jackknife that leaves a seed out.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator
from scipy import stats

from heatbath.ideas.intervals import mean_with_interval
from heatbath.report.drawing import frame, label_ends, run_looks, spread, standalone, style, svg

LOSSES = ("kl_sum", "kl_mean", "kl_sum detached", "kl_sum, floor 1", "grpo", "policy gradient")
WHERE = {0.0: "start", 1.5e-4: "after RL"}
RATES, FLOORS, FLOOR = (1.5e-4, 3e-4, 6e-4, 1.2e-3), (0.1, 1.0), 0.1
BINS = ("small", "middle", "large")
SPIKE, BEFORE = 2.0, 4  # times the median of that many steps before
LATE = 3  # steps at the end of a run
Cells = list[dict[str, Any]]
Found = dict[str, float]


def over(values: Any) -> Found:
    """Mean and t interval of one number per seed, NaN being none."""
    known = np.asarray(values, dtype=float)
    known = known[~np.isnan(known)]
    if not len(known):
        return {"mean": np.nan, "low": np.nan, "high": np.nan}
    e = mean_with_interval(known)
    return {"mean": e.mean, "low": e.low, "high": e.high}


def jackknife(seeds: list[Any], statistic: Callable[[list[Any]], float], *, log: bool = False) -> Found:
    """A statistic of all seeds, and the t interval of what leaving each out does to it; with `log` on that scale."""
    put, back = (np.log, np.exp) if log else (float, float)
    n, whole = len(seeds), put(statistic(seeds))
    rest = np.array([put(statistic(seeds[:i] + seeds[i + 1 :])) for i in range(n)])
    error = np.sqrt((n - 1) / n * ((rest - rest.mean()) ** 2).sum())
    half = stats.t.ppf(0.975, n - 1) * error
    return {"mean": float(back(whole)), "low": float(back(whole - half)), "high": float(back(whole + half))}


def total(cells: Cells, loss: str, key: str) -> float:
    return float(sum(np.sum(cell[loss][key]) for cell in cells))


def noise(cells: Cells, loss: str) -> float:
    """E‖g − Eg‖²/‖Eg‖², each summed over seeds first."""
    return total(cells, loss, "variance") / total(cells, loss, "squared")


def top_tenth(cell: dict[str, Any], loss: str) -> float:
    """Share of Σ‖g_k − Eg‖² that comes from a tenth of the groups."""
    away = np.sort(cell[loss]["away"])[::-1]
    return float(away[: round(len(away) / 10)].sum() / away.sum())


def longer(cells: Cells, loss: str, key: str = "longer") -> float:
    """Tokens that a step against the gradient adds while it adds 0.1 to the reward."""
    return 0.1 * total(cells, loss, key) / total(cells, loss, "better")


def regressed(cells: Cells, loss: str) -> tuple[float, float]:
    """Of the push on length of each group, in tokens per 0.1 reward of the whole step, over the group's covariance of
    length and reward: the value at 0, and at the mean covariance less that at 0."""
    scale = total(cells, loss, "better") / sum(len(cell["spread"]) for cell in cells)
    x = np.concatenate([cell["covariance"] for cell in cells])
    y = np.concatenate([0.1 * np.array(cell[loss]["longer"]) / scale for cell in cells])
    slope, at_zero = np.polyfit(x, y, 1)
    return float(at_zero), float(slope * x.mean())


def gradients(cells: Cells) -> dict[str, Any]:
    """What the gradients of one point, a cell for each seed, say of every loss."""
    out: dict[str, Any] = {}
    for loss in LOSSES:
        out[loss] = {
            "relative variance": jackknife(cells, lambda c, loss=loss: noise(c, loss)),
            "that over kl_sum's": jackknife(cells, lambda c, loss=loss: noise(c, loss) / noise(c, "kl_sum"), log=True),
            "of it from a tenth of the groups": over([top_tenth(c, loss) for c in cells]),
            "cosine with its mean": over([c[loss]["own cosine"] for c in cells]),
            "cosine with the reward's": over([c[loss]["reward cosine"] for c in cells]),
            "that less kl_sum's": over([c[loss]["reward cosine"] - c["kl_sum"]["reward cosine"] for c in cells]),
            "cosine of the means": jackknife(
                cells,
                lambda c, loss=loss: (
                    total(c, loss, "cross") / (total(c, loss, "squared") * total(c, loss, "squared truth")) ** 0.5
                ),
            ),
            "tokens per 0.1": jackknife(cells, lambda c, loss=loss: longer(c, loss)),
            "less policy gradient's": jackknife(
                cells, lambda c, loss=loss: longer(c, loss) - longer(c, "policy gradient")
            ),
            "tokens, shuffled": jackknife(cells, lambda c, loss=loss: longer(c, loss, "permuted")),
            "tokens at covariance 0": jackknife(cells, lambda c, loss=loss: regressed(c, loss)[0]),
            "tokens by covariance": jackknife(cells, lambda c, loss=loss: regressed(c, loss)[1]),
        }
    cuts = np.quantile(np.concatenate([c["spread"] for c in cells]), [1 / 3, 2 / 3])
    out["cuts of the spread"] = cuts.tolist()
    for number, name in enumerate(BINS):

        def ratio(chosen: Cells, number: int = number) -> float:
            """The same of the groups in one third of the spread alone, around the mean of all."""
            found = []
            for loss in ("kl_mean", "kl_sum"):
                away = [np.array(c[loss]["away"])[np.digitize(c["spread"], cuts) == number].sum() for c in chosen]
                found.append(sum(away) / total(chosen, loss, "squared"))
            return float(found[0] / found[1])

        out[f"the same, {name} spread"] = jackknife(cells, ratio, log=True)
    for key in ("all", "ended"):
        out[f"length with reward, {key}"] = over([c["within"][key] for c in cells])
    for key in ("exponent", "right", "tokens", "informative"):
        out[key] = over([c[key] for c in cells])
    return out


def share(values: list[Any]) -> float:
    return float(np.mean(values)) if values else float("nan")


def trend(values: list[float]) -> float:
    """What a straight line through the steps gains from the first to the last."""
    return float(np.polyfit(np.arange(len(values)), values, 1)[0] * (len(values) - 1))


def spikes(norms: list[float]) -> int:
    return sum(norms[i] > SPIKE * float(np.median(norms[i - BEFORE : i])) for i in range(BEFORE, len(norms)))


def detrended(values: Any) -> np.ndarray[Any, Any]:
    x = np.arange(len(values))
    return np.asarray(values - np.polyval(np.polyfit(x, values, 1), x))


def lagged(cell: dict[str, Any], of: Callable[[Any], float], lag: int) -> float:
    """Correlation over the steps of a run, from the second on, of log `of` the groups' deviations with the log of the
    gradient norm `lag` steps later; a straight line is taken out of both. NaN where fewer than 8 steps had a signal."""
    told = [i for i, step in enumerate(cell["deviations"]) if i and len(step) and min(step) > 0]
    if len(told) < 8:
        return float("nan")
    deviations = dict(zip(told, detrended(np.log([of(cell["deviations"][i]) for i in told])), strict=True))
    norms = dict(zip(told, detrended(np.log([cell["grad_norm"][i] for i in told])), strict=True))
    both = [(deviations[i], norms[i + lag]) for i in told if i + lag in norms]
    return float(np.corrcoef(np.array(both).T)[0, 1])


LAGS = {
    f"{name} s, {when}": (of, lag)
    for (name, of), (when, lag) in itertools.product(
        (("mean", np.mean), ("smallest", np.min)), (("same step", 0), ("next step", 1))
    )
}


def runs(cells: Cells) -> dict[str, Any]:
    """What the RL runs of one setting, one for each seed, say."""
    out: dict[str, Any] = {
        "pass@1": over([c["pass@1"] for c in cells]),
        "held-out tokens": over([c["held-out tokens"] for c in cells]),
        "tokens gained": over([trend(c["tokens"]) for c in cells]),
        "right gained": over([trend(c["right"]) for c in cells]),
        "right, last steps": over([np.mean(c["right"][-LATE:]) for c in cells]),
        "lowest right": over([min(c["right"]) for c in cells]),
        "norm, last steps": over([np.median(c["grad_norm"][-LATE:]) for c in cells]),
        "spikes": over([spikes(c["grad_norm"]) for c in cells]),
    }
    if "deviations" in cells[0]:
        nats = "score" not in cells[0]["hyper"]  # of kl_mean they are nats per token, and so is the floor
        for name, steps in (("step 2", slice(1, 2)), ("steps 3 to 4", slice(2, 4)), ("after", slice(4, None))):
            below = [share([s < FLOOR for step in c["deviations"][steps] for s in step]) for c in cells]
            out |= {f"below 0.1, {name}": over(below)} if nats else {}
        out["s, last steps"] = over([share([s for step in c["deviations"][-LATE:] for s in step]) for c in cells])
        for name, (of, lag) in LAGS.items():
            out[name] = over([lagged(c, of, lag) for c in cells])
    return out


def setting(cell: dict[str, Any]) -> str:
    """A name for a table: policy, rate, what else is set."""
    score = cell["hyper"].get("score", "kl_sum" if cell["policy"] == "implicit" else "")
    floor = f", floor {cell['hyper']['std_floor']:g}" if "std_floor" in cell["hyper"] else ""
    name = {"kl_sum": "implicit", "kl_mean": "kl_mean"}.get(score, cell["policy"])
    return f"{name} {cell['lr']:g}{floor}{', coin' * cell['coin']}"


def by_setting(cells: Cells) -> dict[str, Cells]:
    """The RL runs of each setting of which every seed is there."""
    out: dict[str, Cells] = defaultdict(list)
    for cell in cells:
        if cell["kind"] == "rl":
            out[setting(cell)].append(cell)
    most = max(map(len, out.values()))
    return {name: own for name, own in out.items() if len(own) == most}


def summary(cells: Cells) -> dict[str, Any]:
    """All tables, as numbers with their intervals."""
    made = by_setting(cells)
    points = {where: [c for c in cells if c["kind"] == "gradients" and c["lr"] == lr] for lr, where in WHERE.items()}
    start = points["start"]
    differences = {}
    pairs = [("implicit 0.00015", "grpo 0.0003"), ("implicit 0.00015", "kl_mean 0.00015")]
    pairs += [("implicit 0.00015", "implicit 0.00015, coin"), ("grpo 0.0006", "grpo 0.0003")]
    pairs += [("implicit 0.0006", "grpo 0.0006"), ("implicit 0.0003", "grpo 0.0003")]
    pairs += [(f"implicit {lr:g}", "implicit 0.00015") for lr in RATES[1:]]
    pairs += [(f"implicit {lr:g}, floor 1", f"implicit {lr:g}") for lr in RATES]
    for one, other in pairs:
        for key, of in (("pass@1", lambda c: c["pass@1"]), ("tokens gained", lambda c: trend(c["tokens"]))):
            if one in made and other in made:
                both = zip(made[one], made[other], strict=True)
                differences[f"{one} − {other}, {key}"] = over([of(a) - of(b) for a, b in both])
    watched = {
        floor: [c for name in made for c in made[name] if name in {f"implicit {lr:g}{said}" for lr in RATES}]
        for floor, said in zip(FLOORS, ("", f", floor {FLOORS[1]:g}"), strict=True)
    }
    lags = {}
    for floor, own in watched.items():
        seeds = [[c for c in own if c["seed"] == seed] for seed in sorted({c["seed"] for c in own})]
        for name, (of, lag) in LAGS.items() if own else ():  # the runs of a seed share its start
            each = [[r for c in one if (r := lagged(c, of, lag)) == r] for one in seeds]
            lags[f"{name}, floor {floor:g}"] = over([share(r) for r in each])
    per_reward = {
        name: jackknife(own, lambda c: 0.1 * sum(trend(x["tokens"]) for x in c) / sum(trend(x["right"]) for x in c))
        for name, own in made.items()
        if not own[0]["coin"] and own[0]["lr"] <= 3e-4
    }
    return {
        "start tokens": over([c["tokens"] for c in start]),
        "gradients": {where: gradients(own) for where, own in points.items() if len(own) > 1},
        "runs": {name: runs(own) for name, own in made.items()},
        "tokens gained per 0.1 reward gained": per_reward,
        "differences": differences,
        "correlations over all rates": lags,
        "cpu minutes": sum(c["cpu_seconds"] for c in cells) / 60,
    }


def said(found: Any, indent: str = "") -> str:
    """The summary as lines."""
    if not isinstance(found, dict):
        return f"{found}"
    if set(found) == {"mean", "low", "high"}:
        return f"{found['mean']:.3g} [{found['low']:.3g}, {found['high']:.3g}]"
    return "\n" + "\n".join(f"{indent}{key}: {said(value, indent + '  ')}" for key, value in found.items())


def rounded(value: Any) -> Any:
    """The same with five digits of every number."""
    if isinstance(value, dict):
        return {key: rounded(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(own) for own in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


# --- figures ---------------------------------------------------------------------------------------------------------


def curves(made: dict[str, Cells], key: Callable[[dict[str, Any]], Any], ylabel: str, lines: dict[str, str],
           *, log: bool = False, first: int = 1) -> str:  # fmt: skip
    """A number over the steps: mean over seeds and 95 % band, one line for each label → setting."""
    with style():
        figure, axes = frame((4.9, 3.1))
        ends = []
        for look in run_looks([label for label, name in lines.items() if name in made]):
            rows = np.array([key(c) for c in made[lines[look.label]]], dtype=float)
            rows = np.log(np.where(rows > 0, rows, np.nan)) if log else rows
            told = (~np.isnan(rows)).sum(0) > 1  # steps at which two seeds have a value
            x, rows = np.flatnonzero(told) + first, rows[:, told]
            mean, known = np.nanmean(rows, 0), (~np.isnan(rows)).sum(0)
            half = stats.t.ppf(0.975, known - 1) * np.nanstd(rows, 0, ddof=1) / known**0.5
            low, high, mean = (np.exp(x) if log else x for x in (mean - half, mean + half, mean))
            axes.fill_between(x, low, high, color=look.colour, alpha=0.1, linewidth=0)
            axes.plot(x, mean, color=look.colour, linestyle=look.dash, marker=look.marker, markersize=4)
            ends.append((float(x[-1]), float(mean[-1]), look))
        axes.set(xlabel="step", ylabel=ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")  # not as a formula, which svg() would leave as TeX
            label_log_ends(axes, ends)
        else:
            label_ends(figure, axes, ends)
        return standalone(svg(figure, f"{ylabel} over RL steps, means over seeds with 95 % bands"))


def label_log_ends(axes: Any, ends: list[tuple[float, float, Any]]) -> None:
    """`label_ends` on a logarithmic axis."""
    low, high = np.log(axes.get_ylim())
    heights = spread([float(np.log(y)) for _, y, _ in ends], (high - low) / 12, low, high)
    for (x, _, look), y in zip(ends, np.exp(heights), strict=True):
        axes.annotate(look.short, (x, y), xytext=(6, 0), textcoords="offset points", va="center", color=look.colour,
                      annotation_clip=False)  # fmt: skip


def thirds(found: dict[str, Any]) -> str:
    """The noise of kl_mean over that of kl_sum, by how much lengths scatter inside a group."""
    labels = ["all", *BINS]
    with style():
        figure, axes = frame((4.9, 2.8))
        points = found["gradients"]
        for look, own, shift in zip(run_looks(list(points)), points.values(), (-0.1, 0.1), strict=False):
            rows = [own["kl_mean"]["that over kl_sum's"], *(own[f"the same, {name} spread"] for name in BINS)]
            x, mean = np.arange(4) + shift, np.array([row["mean"] for row in rows])
            error = [mean - [row["low"] for row in rows], np.array([row["high"] for row in rows]) - mean]
            axes.errorbar(x, mean, error, color=look.colour, marker=look.marker, linestyle="none", label=look.label)
        axes.axhline(1.0, color="#030303", linewidth=0.8)
        axes.set_xticks(range(4), labels)
        axes.set(xlabel="groups, by the spread of their lengths", ylabel="noise, kl_mean / kl_sum")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0)
        return standalone(svg(figure, "relative variance of kl_mean over that of kl_sum, by spread of lengths"))


def draw(cells: Cells, found: dict[str, Any], folder: Path) -> None:
    """The figures of docs/results/implicit-questions.md."""
    made = by_setting(cells)
    verdicts = {"implicit": "implicit 0.00015", "GRPO": "grpo 0.0003", "kl_mean": "kl_mean 0.00015"}
    coins = {"implicit, coin": "implicit 0.00015, coin"}
    rates = {f"{lr:g}": f"implicit {lr:g}" for lr in RATES}
    pictures = {
        "noise": thirds(found),
        "length": curves(made, lambda c: c["tokens"], "tokens of a completion", verdicts | coins),
        "reward": curves(made, lambda c: c["right"], "share right", rates),
        "norm": curves(made, lambda c: c["grad_norm"], "gradient norm", rates, log=True),
        "deviation": curves(made, lambda c: [share(s) for s in c["deviations"][1:]],
                            "group deviation s, nats", rates, log=True, first=2),
    }  # fmt: skip
    for name, picture in pictures.items():
        (folder / f"implicit-questions-{name}.svg").write_text(picture)
