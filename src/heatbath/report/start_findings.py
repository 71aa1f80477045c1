"""Findings about the start of RL: what the surprise profile, the SFT log and the evaluation show to have gone wrong."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from heatbath.ideas.intervals import Floats, bootstrap_interval
from heatbath.ideas.passk import pass_at_k
from heatbath.report.seen import Finding, Seen, Unjudged, series, too_few
from heatbath.surprise import FLOOR

LEAST_UNDERFLOW = 1e-3  # share of the supervised tokens: one in a demonstration of a thousand
LATE = 0.03  # above the lowest validation NLL, relative to it
MOST_SAMPLES = 8  # k of the pass@k that flattens
LEAST_SAMPLES = 4
LEAST_PROBLEMS = 20  # for a bootstrap
LEAST_GENERATIONS = 10  # of RL, before it can be said not to help
LEARNED = 0.9  # of the first validation NLL, at most, for one that is good
COLLAPSED = 0.5  # of the first validation entropy, at most
LEAST_GAIN = 0.05  # of pass@1, which RL must be shown not to have brought
MOST_CUT, MOST_CUT_IN_RL = 0.05, 0.1  # shares of completions


def target_underflow(seen: Seen) -> Finding | Unjudged | None:
    """The base gives demonstrated tokens a probability that is 0 to the arithmetic, so that lifting it by β still
    leaves nothing to learn from. The number is the share of the supervised tokens with p_base < 1e-10 (a surprise above
    23 nats), smoothing included.

    1e-10 is the floor of the authors' code, which works with probabilities in float32. Here they are logarithms, which
    lose nothing before e^-87 and keep the target exact; but at β < 23 its mass on such a token is below a half, at the
    authors' β of 20 and 10 at most 0.05 and 2e-6. Found from one token in a thousand on, where the objective has such a
    target. It is a count of what the profile holds, free of false alarms; a base that never saw the chat template's
    marks shows it at EOS.
    """
    name, profile = "target underflow", seen.surprise
    if profile is None or profile.get("objective", {}) is None or profile["beta"] == 0:
        return None
    if "below_floor" not in profile:
        return Unjudged(name, "the surprise profile is of an earlier version")
    share, beta = profile["below_floor"], profile["beta"]
    mass = None if beta is None else 1 / (1 + math.exp(-beta) / (FLOOR + profile["floor"]))  # with the authors' floor
    if share < LEAST_UNDERFLOW or (mass is not None and mass >= 0.5):
        return None
    left = f"; at β = {beta:.4g} at most {mass:.1g} of the target is theirs" if mass is not None else ""
    V = profile["vocab_size"]
    return Finding(
        name,
        share,
        f"{share:.2%} of {profile['tokens']:,} supervised tokens have a probability below {FLOOR:g} under the base"
        f"{left}, so they are not taught",
        f"smoothing with a β above log(V/λ) = {math.log(V / 0.01):.1f} (sft.objective.smoothing = 0.01, "
        f"sft.objective.beta), or demonstrations without these tokens: heatbath surprise shows them",
    )


def late_checkpoint(seen: Seen) -> Finding | Unjudged | None:
    """The start is past the minimum of its validation NLL; the number is by how many nats per token.

    Found where the last value is more than 3 % above the lowest, the one before training included. The rows are the
    same every time, so a rise is one; six checkpoints of equal worth that scatter by 0.5 % are never told, by 1 % in 7
    of 100 runs.
    """
    name = "late checkpoint"
    if seen.recipe.sft is None or not seen.sft:
        return None
    measured = series(seen.sft, "val/nll")
    if len(measured) < 2:
        return Unjudged(name, too_few(len(measured), 2, "measurements of the validation NLL (data.validation)"))
    lowest, last = min(measured, key=lambda point: point[1]), measured[-1]
    if last[1] <= (1 + LATE) * lowest[1]:
        return None
    before = lowest[0] == 0
    remedy = "a lower sft.lr, or validation rows like the demonstrations"
    return Finding(
        name,
        last[1] - lowest[1],
        f"validation NLL {last[1]:.3f} at step {last[0]}, where the start was taken, is {last[1] / lowest[1] - 1:.1%} "
        f"above its lowest, {lowest[1]:.3f} " + ("before training" if before else f"at step {lowest[0]}"),
        remedy if before else f"end there (sft.max_steps = {lowest[0]}), with fewer sft.epochs or a lower sft.lr",
    )


def over_constrained(seen: Seen) -> Finding | Unjudged | None:
    """Held to the demonstrations so closely that samples no longer differ: pass@k flattens. The number is pass@k/pass@1
    of the start over that of the base, k = 8 or the fewest samples of a problem; below 1 the curve is flatter.

    The ratio falls too where pass@1 rises towards 1. So two 95 % intervals must lie on the bad side, both of a paired
    bootstrap over problems: that of the number below 1, and that of the change of (pass@k − pass@1)/(1 − pass@1) below
    0, which is the share of the problems missed by one sample that k − 1 others recover. False alarms (400 simulated
    runs of each kind, 20 or 60 problems × 8 samples): 1.5 % where nothing changed, 1.1 % where every problem became
    easier by up to 2 logits, 3 % where each moved at random by about 1. With three times the logits, 75 % of the starts
    are found with 60 problems, 36 % with 20.
    """
    name = "over-constrained"
    if seen.recipe.sft is None or not {"base", "init"} <= seen.right.keys():
        return None
    found = _pass_at_1_and_k(seen, "base", "init")
    if isinstance(found, str):
        return Unjudged(name, found)
    values, k = found

    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = bootstrap_interval(values, lambda m: (m[:, 3] / m[:, 2]) / (m[:, 1] / m[:, 0]))
        change = bootstrap_interval(values, lambda m: _recovered(m[:, 2:]) - _recovered(m[:, :2]))
    if math.isnan(ratio.high) or math.isnan(change.high):
        return Unjudged(name, "too few of the samples are right (or wrong) for a ratio")
    if ratio.high >= 1 or change.high >= 0:
        return None
    curves = [f"{one:.3f} → {many:.3f}" for one, many in values.mean(axis=0).reshape(2, 2)]
    base, start = _recovered(values.mean(axis=0).reshape(2, 2))
    return Finding(
        name,
        ratio.mean,
        f"from pass@1 to pass@{k} the base goes {curves[0]}, the start {curves[1]}: {ratio} of the base's ratio. Of "
        f"what one sample misses, {k - 1} more recover {start:.0%}, from the base {base:.0%}",
        "a smaller sft.objective.beta (GIFT instead of SFT), fewer sft.epochs or a lower sft.lr, so that more of the "
        "base's ways are kept",
    )


def under_constrained(seen: Seen) -> Finding | Unjudged | None:
    """Too little held the start to the base: it fits held-out demonstrations well and has become certain, and RL makes
    nothing of it. The number is what RL changed in pass@1.

    All of: validation NLL fell by a tenth at least; validation entropy fell to half or less, below the NLL (surer than
    right); RL went on for 10 generations; and the paired 95 % interval of pass@1, start → final, holds 0 or lies below
    and excludes a gain of 0.05. Where it excludes neither, nothing can be said. False alarms: where RL brings 0.05 or
    more, at most 2.5 % of the runs whose entropy fell so far.
    """
    name, recipe = "under-constrained", seen.recipe
    if recipe.sft is None or recipe.rl is None:
        return None
    gain = _difference(seen.results, "init", "final")
    nll, entropy = series(seen.sft, "val/nll"), series(seen.sft, "val/entropy")
    if gain is None or not seen.rl:
        return None
    if min(len(nll), len(entropy)) < 2:
        return Unjudged(
            name, too_few(min(len(nll), len(entropy)), 2, "validations of the warm start (data.validation)")
        )
    fell = nll[-1][1] <= LEARNED * nll[0][1]
    collapsed = entropy[-1][1] <= min(COLLAPSED * entropy[0][1], nll[-1][1])
    if not fell or not collapsed or gain["low"] is None or gain["low"] > 0:
        return None
    generations = len(series(seen.rl, "reward"))
    if generations < LEAST_GENERATIONS:
        return Unjudged(name, too_few(generations, LEAST_GENERATIONS, "generations"))
    change = f"{gain['mean']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]"
    if gain["high"] >= LEAST_GAIN:
        return Unjudged(name, f"pass@1 changed by {change} in RL, which may be {LEAST_GAIN} or nothing: more problems")
    return Finding(
        name,
        gain["mean"],
        f"validation NLL fell from {nll[0][1]:.3f} to {nll[-1][1]:.3f}, but the entropy there from {entropy[0][1]:.3f} "
        f"to {entropy[-1][1]:.3f} nats, below the NLL; RL then changed pass@1 by {change}",
        "hold the start to the base (GIFT with a smaller β, LoRA, fewer sft.epochs), and choose it by pass@k and "
        "readiness, not by validation NLL",
    )


def truncation(seen: Seen) -> Finding | None:
    """Completions cut at the token limit, without an answer. The number is the largest share.

    In the evaluation more than 5 % of a policy's completions, of the run's own problems or a task's; in RL more than
    10 % in the mean of the last half of the generations. A count of what was sampled: of 200 completions more than 5 %
    are cut in 4 % of the runs whose true share is 3 %.
    """
    parts = [("the evaluation", seen.results)]
    parts += [(name, results) for name, results in seen.results.get("tasks", {}).items()]
    shares = [
        (found["truncated_share"], f"of {policy} in {where}")
        for where, results in parts
        for policy, found in results.get("policies", {}).items()
        if found.get("truncated_share", 0.0) > MOST_CUT
    ]
    remedies = ["eval.max_new_tokens"] if shares else []
    cut = [value for _, value in series(seen.rl, "truncated_share")]
    late = float(np.mean(cut[len(cut) // 2 :])) if cut else 0.0
    if late > MOST_CUT_IN_RL:
        shares.append((late, "in the last half of RL"))
        remedies.append("rl.max_new_tokens")
    if not shares:
        return None
    return Finding(
        "truncation",
        max(share for share, _ in shares),
        "cut at the limit: " + ", ".join(f"{share:.0%} {where}" for share, where in shares),
        f"raise {' and '.join(remedies)}; where that changes nothing the policy has not learned to end, which "
        "demonstrations with EOS teach",
    )


def _pass_at_1_and_k(seen: Seen, before: str, after: str) -> tuple[Floats, int] | str:
    """pass@1 and pass@k of both policies on the problems that both answered, [Q, 4], and k; or why there is none."""
    (names, n, c), (others, m, d) = seen.right[before], seen.right[after]
    _, i, j = np.intersect1d(names, others, return_indices=True)
    if len(i) < LEAST_PROBLEMS:
        return too_few(len(i), LEAST_PROBLEMS, f"problems that {before} and {after} answered")
    n, c, m, d = np.asarray(n)[i], np.asarray(c)[i], np.asarray(m)[j], np.asarray(d)[j]
    k = int(min(n.min(), m.min(), MOST_SAMPLES))
    if k < LEAST_SAMPLES:
        return too_few(k, LEAST_SAMPLES, "samples of every problem (eval.samples)")
    return np.column_stack([pass_at_k(c, n, 1), pass_at_k(c, n, k), pass_at_k(d, m, 1), pass_at_k(d, m, k)]), k


def _recovered(means: Floats) -> Floats:
    """(pass@k − pass@1) / (1 − pass@1) of means [B, 2]: how often k samples hold a right one if the first is not."""
    return np.asarray((means[:, 1] - means[:, 0]) / (1 - means[:, 0]))


def _difference(results: Any, before: str, after: str) -> dict[str, Any] | None:
    """The paired difference of pass@1 between two policies: on the run's own problems, else on the largest task.
    Ratings of a judge are no pass@1."""
    graded = [part for part in results.get("tasks", {}).values() if part.get("kind") != "judge"]
    tasks = sorted(graded, key=_problems, reverse=True)
    for part in (results, *tasks):
        for found in part.get("differences", []):
            if (found["from"], found["to"], found["k"]) == (before, after, 1):
                return dict(found)
    return None


def _problems(part: Any) -> int:
    return max((found["problems"] for found in part["policies"].values()), default=0)
