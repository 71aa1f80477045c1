"""Runs whose files are written here, without a model: what the report is made of, hostile where a model could be."""

from pathlib import Path
from typing import Any

from heatbath import recipe as recipes
from heatbath.run import Run
from heatbath.stages import scoring

HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"window.owned=1\"> </pre> "
    "\u2028 \u202e 5 <b>&amp;"
)
RECIPE: dict[str, Any] = {
    "model": "m",
    "data": {"source": "arithmetic"},
    "sft": {"objective": {"name": "gift", "beta": 7.5}},
    "rl": {},
}
PROFILE: dict[str, Any] = {
    "tokens": 100,
    "rows": 10,
    "demonstrations": 10,
    "histogram": [60, 30, 8, 1, *[0] * 35, 1],
    "betas": [
        {"beta": b, "w_below_0.99": 0.2, "w_below_0.5": 0.02, "w_below_0.1": 0.001, "keep": 0.01, "whole": 0.6}
        for b in (5.0, 7.5)
    ],
    "suggested_beta": 6.0,
    "suggested_share": 0.02,
    "left": [{"token": HOSTILE, "left": 2, "of": 3}],
    "most_surprising": [{"nats": 9.0, "before": "<b>", "token": HOSTILE}],
    "beta": 7.5,
    "smoothing": 0.0,
    "floor": 0.0,
    "below_floor": 0.0,
    "kinds": {},
    "objective": {"w_below_0.99": 0.2, "w_below_0.5": 0.02, "w_below_0.1": 0.001, "keep": 0.01, "whole": 0.6},
    "vocab_size": 50,
    "examples": [
        {
            "row": 3,
            "begins": False,
            "ends": True,
            "tokens": [["What?"], ["4", 0.2, 1.0], ["<b>", 2.5, 0.9], ["5", 7.0, 0.55], [HOSTILE, 12.5, 0.02]],
        }
    ],
}


def sample(policy: str, problem: int, right: bool, completion: str | None = None, task: str = "test") -> dict[str, Any]:
    said = completion if completion is not None else (str(problem + 1) if right else HOSTILE)
    return {
        "task": task,
        "policy": policy,
        "problem": f"p{problem:03}",
        "question": f"What is {problem} + 1? <i>{problem}</i>",
        "gold": str(problem + 1),
        "completion": said,
        "tokens": len(said) + 1,
        "finished": right,
        "status": "right" if right else "wrong",
        "answer": str(problem + 1) if right else None,
        "rule": "number" if right else "none",
    }


def written(
    folder: Path,
    shares: dict[str, int],
    *,
    problems: int = 24,
    draws: int = 8,
    completion: Any = None,
    k: tuple[int, ...] = (1, 8),
    **changes: Any,
) -> Run:
    """A run with `draws` samples of each problem, of which a policy has `shares` right, one more of every third
    problem; `completion(policy, problem, draw)` is what was said."""
    run = Run.create(folder, recipes.parse(RECIPE | changes))
    for policy, share in shares.items():
        run.add_samples(
            [
                sample(policy, q, i < share + (q % 3 == 0), completion(policy, q, i) if completion else None)
                for q in range(problems)
                for i in range(draws)
            ]
        )
    results = scoring.summarise({p: run.samples(p) for p in shares}, k)
    scoring.correct(results["differences"])
    run.write_json("results.json", {**results, "tasks": {}})
    return run


def logged(run: Run, shift: float = 0.0) -> Run:
    """The same run with the rows of a warm start and of RL."""
    for step in range(1, 9):
        run.log(
            "sft", step, {"nll": 1.0 / step + shift, "entropy": 0.5, "tokens_per_second": 9.0, "left_to_base": 0.02}
        )
        if step % 4 == 0:
            run.log("sft", step, {"val/nll": 1.1 / step + shift})
        share = {"informative_share": 0.5, "truncated_share": 0.1, "clip_share": 0.0, "completion_tokens": 7.0}
        values = {"reward": 0.05 * step + shift, "entropy": 0.3, "kl_init": 0.01 * step, "step_seconds": 2.0}
        run.log("rl", step, {**values, **share})
    return run


def shifted(kl: float = 0.3) -> dict[str, Any]:
    """A shift.json of three policies with made-up numbers."""

    def near(mean: float) -> dict[str, float]:
        return {"mean": mean, "low": mean - 0.01, "high": mean + 0.01}

    def transition(start: str, end: str, scale: float) -> dict[str, Any]:
        names = ("cosine", "l2", "kl_from_to", "kl_to_from", "entropy_from", "entropy_to", "logp_from", "logp_to")
        numbers = {
            name: near(scale * value) for name, value in zip(names, (0.9, 40, kl, kl, 1, 0.8, -1, -0.8), strict=True)
        }
        ranks = {str(k): near(0.9 - 0.001 * k) for k in (1, 2, 5, 10)}
        return {"from": start, "to": end, **numbers, "overlap": ranks, "jaccard": ranks}

    pairs = (("base", "init", 1.0), ("init", "final", 0.5), ("base", "final", 1.1))
    return {
        "format": 1,
        "options": {"on": "demos", "tokens": "response", "layer": "before", "mean": "token", "pool": "none",
                    "temperature": 1.0, "dtype": "float32"},
        "data": {"source": "validation of x", "sequences": 3, "problems": 3, "tokens": 60, "truncated": 0,
                 "retokenised": 0, "fingerprint": "f"},
        "vocab_size": 50,
        "width": 8,
        "models": {},
        "transitions": [transition(*pair) for pair in pairs],
        "sequences": {"problem": ["a"], "tokens": [3], "transitions": []},
    }  # fmt: skip
