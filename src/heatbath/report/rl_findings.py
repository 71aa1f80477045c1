"""Findings about RL: what the rows that it logged show to have gone wrong."""

from __future__ import annotations

import math

import numpy as np
from scipy.special import bdtr

from heatbath.ideas.trend import Trend, trend
from heatbath.report.seen import Finding, Seen, Unjudged, series, too_few

LEAST_HELD_OUT = 6  # evaluations; with fewer an interval of a trend is wider than anything seen in practice
LEAST_GENERATIONS = 10
LOOK_CONFIDENCE = 0.975  # of each of two looks, at the whole run and at its last half
LEAST_FALL = 0.02  # of held-out accuracy
LEAST_GROWTH = 0.2  # of the tokens per completion
FLAT = 0.05  # of reward
EXPLODES = 10.0  # × the median of the gradient norms so far
DEVIATIONS = 6.0  # of their logarithms
LEAST_STEPS = 10  # that a median is taken over
LEAST_INFORMATIVE = 0.1  # share of groups
LEAST_GROUPS = 36  # of fewer, none informative does not exclude a tenth


def train_eval_gap(seen: Seen) -> Finding | Unjudged | None:
    """The reward rises while held-out accuracy falls; the number is the change of held-out accuracy (a share).

    Over the whole run, or over its last half (a peak in the middle), the fitted change of `held_out/right` is at most
    −0.02 with an interval below 0, and that of `reward` has an interval above 0. Intervals of 97.5 %. False alarms:
    0.05 % of runs of noise, 1.1 % where the reward does rise and accuracy only fluctuates.
    """
    name = "train–eval gap"
    if not seen.rl:
        return None
    held, reward = series(seen.rl, "held_out/right"), series(seen.rl, "reward")
    if len(held) < LEAST_HELD_OUT:
        return Unjudged(name, too_few(len(held), LEAST_HELD_OUT, "held-out evaluations (rl.eval_every)"))
    if len(reward) < LEAST_GENERATIONS:
        return Unjudged(name, too_few(len(reward), LEAST_GENERATIONS, "generations"))
    for part in _looks(held, LEAST_HELD_OUT):
        first, last = part[0][0], part[-1][0]
        down, up = _line(part), _line([(s, v) for s, v in reward if first <= s <= last])
        if up is None or down is None or not (up.low > 0 and down.high < 0 and down.change <= -LEAST_FALL):
            continue
        best = max(held, key=lambda point: point[1])
        sooner = "" if best == held[0] else f"end near step {best[0]} (rl.max_steps), "
        return Finding(
            name,
            down.change,
            f"from step {first} to {last} the reward changed by {up}, held-out accuracy by {down}; its best was "
            f"{best[1]:.3f} at step {best[0]}",
            f"{sooner}take more or other prompts, or a lower rl.lr; where the reward is more than the verdict, read "
            "what it likes",
        )
    return None


def length_without_reward(seen: Seen) -> Finding | Unjudged | None:
    """Completions grow at flat reward; the number is the growth of the tokens per completion (0.5: half as long again).

    Over the whole run, or over its last half, the fitted `completion_tokens` grow by at least a fifth with an interval
    above 0, and that of the reward's change holds 0 or less and excludes a rise of 0.05. Intervals of 97.5 %. False
    alarms: 0.6 % of runs of noise, 1.3 % where the reward rises by 0.1 with the length.
    """
    name = "length without reward"
    if not seen.rl:
        return None
    tokens, reward = series(seen.rl, "completion_tokens"), series(seen.rl, "reward")
    if min(len(tokens), len(reward)) < LEAST_GENERATIONS:
        return Unjudged(name, too_few(min(len(tokens), len(reward)), LEAST_GENERATIONS, "generations"))
    for part in _looks(tokens, LEAST_GENERATIONS):
        first, last = part[0][0], part[-1][0]
        longer, up = _line(part), _line([(s, v) for s, v in reward if first <= s <= last])
        if longer is None or up is None or longer.low <= 0 or up.low > 0 or up.high >= FLAT:
            continue
        growth = longer.change / max(longer.start, min(value for _, value in part), 1.0)
        if growth >= LEAST_GROWTH:
            return Finding(
                name,
                growth,
                f"from step {first} to {last} completions grew by {longer} tokens ({growth:+.0%}), the reward changed "
                f"by {up}",
                "a reduction that does not favour length (rl.policy = 'dr_grpo'), a penalty of overlong completions "
                "('dapo'), or fewer steps",
            )
    return None


def exploding_gradient(seen: Seen) -> Finding | Unjudged | None:
    """The gradient norm, before clipping, leaves its own scale; the number is how many steps did.

    A step counts where the norm is not finite, or above all of: 10 × the median of the norms so far (at least 10 of
    them; steps without any signal, norm 0, are left out); that median times e^(6 s), s the noise of the logarithms so
    far (1.4826 / √2 × the median absolute change between neighbours); and the clip threshold, taken as 1 at most: what
    is not even clipped has not exploded. False alarms: 2 % of runs of log-normal norms with σ = 0.9, 0.3 % with 0.6.
    """
    name = "exploding gradient"
    # A row of an optimizer step has a learning rate; a norm that is not finite is left out of metrics.jsonl.
    steps = [(row["step"], row.get("grad_norm", math.inf)) for row in seen.rl if "learning_rate" in row]
    if seen.recipe.rl is None or not seen.rl:
        return None
    if all("grad_norm" not in row for row in seen.rl):
        return Unjudged(name, "no gradient norm was logged")
    clip, so_far, found = min(seen.recipe.rl.max_grad_norm, 1.0), [], []
    for step, norm in steps:
        if not math.isfinite(norm):
            found.append((step, math.inf))
            continue
        if len(so_far) >= LEAST_STEPS:
            logs = np.log(so_far)
            middle = float(np.median(logs))
            spread = 1.4826 * float(np.median(np.abs(np.diff(logs)))) / math.sqrt(2)
            if norm > max(clip, math.exp(middle + max(math.log(EXPLODES), DEVIATIONS * spread))):
                found.append((step, norm / math.exp(middle)))
        if norm > 0:
            so_far.append(norm)
    if not found:
        return None if len(steps) > LEAST_STEPS else Unjudged(name, too_few(len(steps), LEAST_STEPS + 1, "steps"))
    worst = max(found, key=lambda each: each[1])
    size = "not finite" if math.isinf(worst[1]) else f"{worst[1]:.3g} × the median until then"
    listed = ", ".join(str(step) for step, _ in found[:5]) + (", …" if len(found) > 5 else "")
    return Finding(
        name,
        len(found),
        f"in {len(found)} of {len(steps)} steps the gradient norm left its scale (steps {listed}); the worst, step "
        f"{worst[0]}, was {size}, before clipping at {seen.recipe.rl.max_grad_norm:g}",
        "lower rl.lr or rl.max_grad_norm, or warm up (rl.warmup_steps); read the completions of these steps",
    )


def nothing_to_learn(seen: Seen) -> Finding | Unjudged | None:
    """Dead groups: all completions of a prompt earned the same, and their advantages are 0. The number is the share of
    dead groups, in the whole run or in its last half.

    Found where so few groups are informative that a true share of 0.1 is excluded at 2.5 % (exact binomial, the groups
    as independent trials). False alarms: at most 5 % of the runs in which a tenth of the groups is informative, 0.5 %
    where 0.15 are.
    """
    name = "nothing to learn"
    settings = seen.recipe.rl
    if settings is None or not seen.rl:
        return None
    shares = series(seen.rl, "informative_share")
    if not shares:
        return Unjudged(name, "no share of informative groups was logged")
    if len(shares) * settings.prompts < LEAST_GROUPS:
        return Unjudged(name, too_few(len(shares) * settings.prompts, LEAST_GROUPS, "groups"))
    from heatbath.stages.readiness import other_signals

    if notes := other_signals(settings):
        return Unjudged(name, "; ".join(notes))
    for part in _looks(shares, math.ceil(LEAST_GROUPS / settings.prompts)):
        groups = len(part) * settings.prompts
        informative = round(sum(value for _, value in part) * settings.prompts)
        if bdtr(informative, groups, LEAST_INFORMATIVE) >= 0.025:
            continue
        first, last = part[0][0], part[-1][0]
        right = [value for step, value in series(seen.rl, "verdict/right") if first <= step <= last]
        easy = bool(right) and float(np.mean(right)) > 0.5
        harder = f"easier prompts, a better warm start, or an rl.group_size above {settings.group_size}"
        return Finding(
            name,
            1 - informative / groups,
            f"from step {first} to {last} {groups - informative:,} of {groups:,} groups were graded all alike and "
            "taught nothing" + (f", with {np.mean(right):.0%} of the completions right" if right else ""),
            "harder prompts, or an end to RL here" if easy else harder,
        )
    return None


def _looks(points: list[tuple[int, float]], least: int) -> list[list[tuple[int, float]]]:
    """The whole, and the last half where it is long enough."""
    half = points[len(points) // 2 :]
    return [points, half] if len(half) >= least else [points]


def _line(points: list[tuple[int, float]]) -> Trend | None:
    if len(points) < 3 or points[0][0] == points[-1][0]:
        return None
    return trend([step for step, _ in points], [value for _, value in points], LOOK_CONFIDENCE)
