"""What `heatbath recipes --policies` shows: every RL policy and every preference method, read from their own tables."""

from __future__ import annotations

import dataclasses
from typing import Any

# The two that `[preference]` has, beside the policies of `[rl]`; their defaults are those of the recipe's table.
PREFERENCE = {
    "dpo": ("arXiv 2305.18290", "pairs of completions, the better one preferred by the implicit reward", "pairs"),
    "una": (
        "arXiv 2408.15339",
        "the implicit score of a completion drawn to a score or a label; pairs as in dpo",
        "scores in [0, 1], labels or pairs",
    ),
}
PREFERENCE_KEYS = ("beta", "loss", "lr", "schedule", "batch", "epochs")


def listed() -> list[dict[str, Any]]:
    """Name, table of the recipe, what it does, source, what it needs beside prompts and rewards, and defaults."""
    from heatbath.ideas.policy import POLICIES, defaults
    from heatbath.sections import Preference

    rows = [
        {
            "name": name,
            "table": "rl",
            "says": row.says,
            "source": row.source,
            "needs": row.needs,
            "defaults": {k: list(v) if isinstance(v, tuple) else v for k, v in defaults(name).items()},
        }
        for name, row in POLICIES.items()
    ]
    for name, (source, says, needs) in PREFERENCE.items():
        found = {key: Preference.model_fields[key].default for key in PREFERENCE_KEYS}
        rows.append(
            {"name": name, "table": "preference", "says": says, "source": source, "needs": needs, "defaults": found}
        )
    return rows


def shown() -> str:
    """The list as text: what every policy takes with the same default stands once, at the end."""
    from heatbath.ideas.surrogates import Policy

    plain = {f.name: f.default for f in dataclasses.fields(Policy)}
    shared = ("kl", "entropy", "overlong", "sqrt_length", "dynamic_sampling", "dual_clip", "length")
    lines = []
    for row in listed():
        own = {k: v for k, v in row["defaults"].items() if k not in shared or v != plain[k]}
        needs = f"; needs {row['needs']}" if row["needs"] else ""
        lines += [
            f"{row['name']:10} {row['says']}",
            f"{'':10} {row['source']}, [{row['table']}]{needs}",
            f"{'':10} {', '.join(f'{k} = {_written(v)}' for k, v in own.items())}",
            "",
        ]
    common = ", ".join(f"{key} = {_written(plain[key])}" for key in shared)
    return (
        "\n".join(lines)
        + f"Where not said otherwise, policies that have them take {common}.\n"
        + ('Use: [rl] policy = "grpo", or policy = { name = "grpo", kl = 0.01 } (docs/rl.md).')
    )


def _written(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
