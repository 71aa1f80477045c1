"""What a run took: steps, seconds and tokens of each stage, and where and with what it ran."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from heatbath.run import CHECKPOINTS, Run

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Cost:
    """What a stage took; 0 where it is not known. `shown` are its tokens as text."""

    stage: str
    steps: int
    seconds: float
    tokens: float
    shown: str


def costs(run: Run, samples: Rows) -> list[Cost]:
    """Of every stage that has logged something; what was taken over from another run counts as this one's own."""
    found = []
    for stage in CHECKPOINTS:
        logged = run.metrics(stage)
        steps = max((row["step"] for row in logged), default=0)
        if steps:
            seconds = spent(logged)
            tokens = _sampled(run, logged) if stage == "rl" else _read(logged, seconds)
            found.append(Cost(stage, steps, seconds, *tokens))
    if samples:
        tokens = sum(row["tokens"] for row in samples)
        found.append(Cost("eval", 0, 0.0, tokens, f"{tokens:,}"))
    return found


def stage_rows(run: Run, samples: Rows) -> list[list[str]]:
    """Header and one row per stage: steps, seconds, tokens, tokens per second."""
    rows = [["stage", "steps", "seconds", "tokens", "tokens per second"]]
    for c in costs(run, samples):
        speed = f"{c.tokens / c.seconds:,.0f}" if c.seconds and c.tokens else "–"
        rows.append([c.stage, *(f"{x:,.0f}" if x else "–" for x in (c.steps, c.seconds)), c.shown, speed])
    return rows


def spent(logged: Rows) -> float:
    """Seconds of a stage: those that its steps took, or, where an earlier version logged none, those between its first
    and its last row, pauses included."""
    if not _of_earlier_version(logged) and (steps := [row["step_seconds"] for row in logged if "step_seconds" in row]):
        return float(sum(steps))
    times = [row["time"] for row in logged if "time" in row]
    return float(max(times) - min(times)) if times else 0.0


def _of_earlier_version(logged: Rows) -> bool:
    return any("tokens_per_second" in row and "step_seconds" not in row for row in logged)


def _read(logged: Rows, seconds: float) -> tuple[float, str]:
    """Tokens that training read, and as text with how many of them were supervised; from the speed where an earlier
    version did not log them."""
    if _of_earlier_version(logged):
        speeds = [row["tokens_per_second"] for row in logged if "tokens_per_second" in row]
        tokens = seconds * sum(speeds) / len(speeds)
        return tokens, f"≈ {tokens:,.0f}" if tokens else "–"
    tokens, supervised = (sum(row.get(key, 0) for row in logged) for key in ("tokens", "supervised_tokens"))
    return tokens, f"{tokens:,.0f} ({supervised:,.0f} supervised)" if tokens else "–"


def _sampled(run: Run, logged: Rows) -> tuple[float, str]:
    """Tokens of the completions that RL sampled, and as text."""
    settings = run.recipe.rl
    lengths = [row["completion_tokens"] for row in logged if "completion_tokens" in row]
    tokens = sum(lengths) * settings.prompts * settings.group_size if settings is not None else 0.0
    return tokens, f"{tokens:,.0f}" if tokens else "–"


def environment(env: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Precision, machine and versions; what an earlier version did not note down is left out."""
    parts = [env.get("device"), f"{env['cores']} cores" if "cores" in env else None, env.get("platform")]
    facts = [
        ("precision", env.get("precision")),
        ("machine", ", ".join(part for part in parts if part)),
        ("versions", ", ".join(f"{k} {v}" for k, v in env.get("versions", {}).items() if v)),
    ]
    if env.get("python"):
        facts.append(("python", env["python"]))
    resumed = env.get("resumed", [])
    if resumed:
        often = "once" if len(resumed) == 1 else f"{len(resumed)} times"
        facts.append(("resumed", f"{often}, last {resumed[-1]['started'][:16].replace('T', ' ')}"))
        if any(one.get("versions") != env.get("versions") for one in resumed):
            facts.append(("versions since", ", ".join(f"{k} {v}" for k, v in resumed[-1]["versions"].items() if v)))
    return [(name, value) for name, value in facts if value]
