"""Three questions that Group-relative Implicit Fine-Tuning (arXiv 2510.23868) leaves open, on the tiny base.

    python benchmarks/implicit_questions.py --seeds 5 --out questions.json --figures docs/images   # resumes per cell
    python benchmarks/implicit_questions.py --read questions.json --figures docs/images            # draws again

Every seed has a start of its own, which learned bare results and columns of two-digit sums, so that the completions of
a group differ in length. Two kinds of cells, for docs/results/implicit-questions.md:

gradients  8 completions of each of 96 held-out problems, from the start or from the policy after RL (the start is the
           reference). A loss weighs the ∇log π of completions by its own derivatives (`heatbath.policy_loss`), so
           that their inner products, [n, n], hold everything that is asked of any loss: the relative variance of a
           group's gradient E‖g − Eg‖²/‖Eg‖², where ‖Eg‖² is the mean of g_k·g_l over pairs of groups (unbiased); its
           cosine with the mean of the other groups; and g·∇E[length], g·∇E[reward], each ∇ from the other groups.
           `permuted` is the same with the rewards of each group shuffled, where length and reward are unrelated.
rl         12 steps of 16 problems × 8 completions by heatbath's own trainer, then 4 answers to each of 200 held-out
           sums at T = 1. Kept of each step: gradient norm, the deviation s of each group's implicit rewards, reward,
           length. `coin` rewards each completion with a coin that knows nothing of it.

Some 20 minutes on one core.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from implicit_questions_summary import draw, rounded, said, summary
from made_with import made_with
from torch import Tensor
from transformers import PrinterCallback

import heatbath
from heatbath import models
from heatbath import recipe as recipes
from heatbath.data import rendering, sources
from heatbath.data.rows import Row
from heatbath.engines.local import LocalSampler
from heatbath.engines.sampling import Sampling
from heatbath.ideas.implicit import Implicit
from heatbath.ideas.surrogates import informative
from heatbath.progress import Progress
from heatbath.run import Run
from heatbath.stages.fused_forward import add_objective_forward
from heatbath.stages.rewards import grader_of, verdict_reward
from heatbath.stages.rl import build_trainer
from heatbath.stages.sft import run_sft
from heatbath.verify.graders import Grader, as_gold

GROUP, PROBLEMS, STEPS, NEW = 8, 96, 12, 40
PERMUTATIONS, ANSWERS = 24, 4
DATA = {"source": "arithmetic", "forms": ["bare", "columns"], "demos": 192, "validation": 32, "prompts": 256}
DATA |= {"test": 200}
SFT = {"objective": "sft", "lr": 3e-4, "epochs": 2, "batch": 16, "micro_batch": 16, "save_every": 0}
RL = {"prompts": 16, "update_prompts": 16, "group_size": GROUP, "micro_batch": 16 * GROUP, "max_new_tokens": NEW}
RL |= {"epochs": 10, "max_steps": STEPS, "readiness": 0, "save_every": 0, "kl_every": 1000}
RATES = (1.5e-4, 3e-4, 6e-4, 1.2e-3)
FLOORS = (0.1, 1.0)
COIN = 0.25  # about the share of right answers at the start
PG = "policy gradient"
LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "kl_sum": ("implicit", {}),
    "kl_mean": ("implicit", {"score": "kl_mean"}),
    "kl_sum detached": ("implicit", {"std": "detached"}),
    "kl_sum, floor 1": ("implicit", {"std_floor": FLOORS[1]}),
    "grpo": ("grpo", {}),
    PG: ("reinforce", {"advantage": "leave_one_out"}),  # unbiased: −∇E[reward]
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell of the study, by what its recipe sets."""

    kind: str
    seed: int
    policy: str = "implicit"
    lr: float = 1.5e-4
    hyper: tuple[tuple[str, Any], ...] = ()
    coin: bool = False

    @property
    def name(self) -> str:
        hyper = "".join(f"-{key}={value}" for key, value in self.hyper)
        return f"{self.kind}-{self.policy}-{self.lr:g}{hyper}{'-coin' * self.coin}-{self.seed}"


def cells(seeds: int) -> list[Cell]:
    """All cells, setting by setting: gradients after RL come behind the runs that they read."""
    floor = (("std_floor", FLOORS[1]),)
    settings: list[dict[str, Any]] = [{"kind": "gradients", "lr": 0.0}, {"kind": "rl"}]
    settings += [{"kind": "rl", "policy": "grpo", "lr": 3e-4}, {"kind": "rl", "lr": 3e-4}]
    settings += [{"kind": "rl", "lr": 3e-4, "hyper": floor}, {"kind": "rl", "lr": 6e-4}]
    settings += [{"kind": "gradients"}, {"kind": "rl", "lr": 1.2e-3}, {"kind": "rl", "lr": 6e-4, "hyper": floor}]
    settings += [{"kind": "rl", "coin": True}, {"kind": "rl", "hyper": (("score", "kl_mean"),)}]
    settings += [{"kind": "rl", "policy": "grpo", "lr": 6e-4}]
    settings += [{"kind": "rl", "lr": lr, "hyper": floor} for lr in (1.5e-4, 1.2e-3)]
    return [Cell(seed=seed, **own) for own in settings for seed in range(seeds)]


class Bench:
    """What the cells share: the folder, one grader, one tokenizer."""

    def __init__(self, work: Path, model: str, grader: Grader):
        self.work, self.model, self.grader = work, model, grader
        self.tokenizer = models.load_tokenizer(model)

    def recipe(self, cell: Cell) -> recipes.Recipe:
        made: dict[str, Any] = {"model": self.model, "seed": cell.seed, "precision": "fp32", "data": DATA, "sft": SFT}
        made["rl"] = RL | {"lr": cell.lr or 1.0, "policy": {"name": cell.policy, **dict(cell.hyper)}}
        return recipes.parse(made)

    def start(self, cell: Cell) -> Run:
        """The warm start of the cell's seed, trained where it is not there."""
        folder, recipe = self.work / f"start-{cell.seed}", self.recipe(cell)
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            run_sft(Run.create(folder, recipe), recipe, Progress(quiet=True))
            (folder / "done").touch()
        return Run(folder, recipe)

    def asked(self, rows: list[Row]) -> list[list[int]]:
        return [rendering.prompt_ids(self.tokenizer, rendering.messages(row, None)) for row in rows]

    def answers(self, model: Any, rows: list[Row], count: int, seed: int) -> tuple[list[list[int]], Tensor]:
        """`count` answers to each row, one after the other, as tokens; and 1 for right ones."""
        prompts = [p for p in self.asked(rows) for _ in range(count)]
        ids: list[list[int]] = [[] for _ in prompts]
        for batch in LocalSampler(model, self.tokenizer).sample(prompts, Sampling(1.0, 1.0, NEW), seed * 1_000_000):
            for completion in batch:
                ids[completion.prompt] = completion.ids
        texts = [self.tokenizer.decode(own, skip_special_tokens=True) for own in ids]
        golds = [as_gold("math", str(row.answer)) for row in rows for _ in range(count)]
        right = [float(v.score or 0.0) for v in self.grader.grade(texts, golds)]
        return ids, torch.tensor(right, dtype=torch.float64)


# --- gradients -------------------------------------------------------------------------------------------------------


def gradients(bench: Bench, cell: Cell) -> dict[str, Any]:
    """Of one policy, every loss's gradients as inner products."""
    run = bench.start(cell)
    reference = models.load_model(run.model_of("init"), torch.float32)
    after = bench.work / dataclasses.replace(cell, kind="rl").name
    model = models.load_model(str(after) if cell.lr else run.model_of("init"), torch.float32)
    rows = sources.of(bench.recipe(cell)).test[:PROBLEMS]  # RL never sees them
    ids, right = bench.answers(model, rows, GROUP, seed=10 + cell.seed)
    prompts = [p for p in bench.asked(rows) for _ in range(GROUP)]
    gradient, logp, ref_logp, mask = score_gradients(model, reference, prompts, ids)
    gram = products(gradient)
    del gradient
    groups, lengths = torch.arange(len(ids)) // GROUP, mask.sum(1)
    told = informative(right, groups)

    def weights(name: str, rewards: Tensor) -> Tensor:
        """∂loss/∂log π of each completion, [n], times the groups that count."""
        policy, hyper = LOSSES[name]
        leaf = logp.clone().requires_grad_()
        made = heatbath.policy(policy, **hyper)
        loss = heatbath.policy_loss(
            made, leaf, old_logp=logp, mask=mask, rewards=rewards, groups=groups, ref_logp=ref_logp
        )
        (own,) = torch.autograd.grad(loss, leaf)
        assert torch.allclose(own, own[:, :1] * mask, rtol=1e-6, atol=1e-12)  # one weight for all of its tokens
        return own[:, 0] * len(rows)

    kept = told.view(-1, GROUP)[:, 0]
    where = torch.nn.functional.one_hot(groups, len(rows)).double().T  # [K, n]
    uphill = {"length": -where * weights(PG, lengths), "reward": -where * weights(PG, right)}
    longer, better = (v @ gram for v in uphill.values())  # ∇ of one group · ∇log π of one completion
    found: dict[str, Any] = {name: [] for name in ("spread", "covariance")}
    deviation = lengths.view(-1, GROUP).std(1)
    found["spread"] = (deviation / lengths.view(-1, GROUP).mean(1))[kept].tolist()
    found["covariance"] = covariance(lengths, right)[kept].tolist()
    g = torch.Generator().manual_seed(cell.seed)
    shuffles = [permuted(right, g) for _ in range(PERMUTATIONS)]
    parts = {name: where * weights(name, right) for name in LOSSES}
    for name, own in parts.items():
        mine = own[kept]
        truth = parts[PG][kept]
        found[name] = apart(mine @ gram @ mine.T, mine @ gram @ truth.T, truth @ gram @ truth.T)
        found[name]["longer"] = others(-own @ longer.T, kept)
        found[name]["better"] = others(-own @ better.T, kept)
        drawn = [others(-(where * weights(name, r)) @ longer.T, kept) for r in shuffles]
        found[name]["permuted"] = np.mean(drawn, axis=0).tolist()
    length, size = lengths.log(), gram.diagonal().log()
    found["within"] = within(lengths, right, mask.shape[1])
    found["exponent"] = float(((length - length.mean()) * size).sum() / ((length - length.mean()) ** 2).sum())
    found |= {"right": float(right.mean()), "tokens": float(lengths.mean()), "informative": int(kept.sum())}
    return found


def score_gradients(model: Any, reference: Any, prompts: list[list[int]], ids: list[list[int]]) -> tuple[Tensor, ...]:
    """∇ Σ_t log π of each completion, [n, P]; log π of its tokens under the policy and the reference, and their mask,
    each [n, T] in float64."""
    for one in (model, reference):
        add_objective_forward(one)
    parameters = list(model.parameters())
    out = torch.empty(len(ids), sum(p.numel() for p in parameters))
    logp, ref_logp, mask = torch.zeros(3, len(ids), max(map(len, ids)), dtype=torch.float64)
    for i, (prompt, own) in enumerate(zip(prompts, ids, strict=True)):
        row = torch.tensor([[*prompt, *own]])
        batch = {"input_ids": row, "attention_mask": torch.ones_like(row), "statistics": ("logp",)}
        batch["labels"] = torch.where(torch.arange(row.shape[1]) < len(prompt), rendering.IGNORE, row)
        found = model(**batch)["logp"]
        parts = torch.autograd.grad(found.sum(), parameters)
        torch.cat([part.flatten() for part in parts], out=out[i])
        with torch.no_grad():
            logp[i, : len(own)], ref_logp[i, : len(own)] = found, reference(**batch)["logp"]
        mask[i, : len(own)] = 1
    return out, logp, ref_logp, mask


def products(rows: Tensor) -> Tensor:
    """Of all pairs of rows, [n, n] in float64; blocks above the diagonal are those below it."""
    out = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for i in (parts := torch.arange(len(rows)).split(256)):
        for j in parts:
            if j[0] <= i[0]:
                block = (rows[i[0] : i[-1] + 1] @ rows[j[0] : j[-1] + 1].T).double()
                out[i[0] : i[-1] + 1, j[0] : j[-1] + 1] = block
                out[j[0] : j[-1] + 1, i[0] : i[-1] + 1] = block.T
    return out


def apart(own: Tensor, cross: Tensor, truth: Tensor) -> dict[str, Any]:
    """From the products g_k·g_l of a loss's group gradients, g_k·h_l with those h of policy gradient, and h_k·h_l, all
    [K, K]. Squares and products of means are over pairs of groups, so that they are unbiased, and may fall below 0."""
    K, diagonal = len(own), own.diagonal()

    def of_pairs(products: Tensor) -> Tensor:
        return (products.sum() - products.diagonal().sum()) / (K * (K - 1))

    def with_others(products: Tensor, norms: Tensor) -> float:
        """Mean cosine of a group's gradient with the mean of the other groups' (whose products are `norms`)."""
        rest = (norms.sum() - 2 * norms.sum(1) + norms.diagonal()).clamp(min=1e-30).sqrt()
        return float(((products.sum(1) - products.diagonal()) / (rest * diagonal.sqrt())).mean())

    return {
        "variance": float((diagonal.sum() - own.sum() / K) / (K - 1)),  # E‖g − Eg‖²
        "squared": float(of_pairs(own)),  # ‖Eg‖²
        "cross": float(of_pairs(cross)),  # Eg·Eh
        "squared truth": float(of_pairs(truth)),  # ‖Eh‖²
        "away": (diagonal - 2 * (own.sum(1) - diagonal) / (K - 1) + of_pairs(own)).tolist(),  # ‖g_k − Eg‖²
        "own cosine": with_others(own, own),
        "reward cosine": with_others(cross, truth),
    }


def others(products: Tensor, kept: Tensor) -> list[float]:
    """Of each group that counts, its gradient's product with the mean uphill direction of all other groups, [K]."""
    return ((products.sum(1) - products.diagonal()) / (len(products) - 1))[kept].tolist()


def covariance(x: Tensor, y: Tensor) -> Tensor:
    """Within each group, [K]."""
    x, y = x.view(-1, GROUP), y.view(-1, GROUP)
    return ((x - x.mean(1, keepdim=True)) * (y - y.mean(1, keepdim=True))).sum(1) / (GROUP - 1)


def within(lengths: Tensor, right: Tensor, most: int) -> dict[str, float]:
    """Correlation of length and reward inside groups, of all completions and of those that came to an end."""
    out = {}
    for name, taken in (("all", torch.ones_like(right).bool()), ("ended", lengths < NEW)):
        sums = torch.zeros(3, dtype=torch.float64)
        for k in range(len(right) // GROUP):
            rows = torch.arange(k * GROUP, (k + 1) * GROUP)[taken[k * GROUP : (k + 1) * GROUP]]
            x, y = lengths[rows] - lengths[rows].mean(), right[rows] - right[rows].mean()
            sums += torch.stack([(x * y).sum(), (x * x).sum(), (y * y).sum()])
        out[name] = float(sums[0] / (sums[1] * sums[2]).sqrt())
    return out


def permuted(rewards: Tensor, g: torch.Generator) -> Tensor:
    """The same rewards, shuffled within each group."""
    own = rewards.view(-1, GROUP)
    return own.gather(1, torch.rand(own.shape, generator=g).argsort(1)).flatten()


# --- RL --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Watched(Implicit):
    """The loss as it is, and the deviation of each group's scores at every step."""

    seen: list[list[float]] = dataclasses.field(default_factory=list)

    def coefficients(self, scores: Tensor, rewards: Tensor, groups: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        told = informative(rewards, groups)
        own = [scores[(groups == group) & told] for group in groups.unique()]
        self.seen.append([float(s.std(correction=self.ddof)) for s in own if len(s)])
        return super().coefficients(scores, rewards, groups, lengths)


def trained(bench: Bench, cell: Cell) -> dict[str, Any]:
    """One RL run: its steps, and the held-out sums before and after."""
    run, recipe = bench.start(cell), bench.recipe(cell)
    splits = sources.of(recipe)
    model = models.load_trained(run.model_of("init"), recipe)
    verdict, coin = verdict_reward(bench.grader), random.Random(cell.seed)
    lengths: list[list[int]] = []
    right: list[list[float]] = []

    def reward(completions: list[Any], completion_ids: list[list[int]], **more: Any) -> list[float | None]:
        found = verdict(completions, **more)
        lengths.append([len(ids) for ids in completion_ids])
        right.append([value or 0.0 for value in found])
        return [float(coin.random() < COIN) for _ in found] if cell.coin else found

    trainer = build_trainer(run, recipe, model, bench.tokenizer, splits, [reward])
    if isinstance(trainer.policy, Implicit):
        own = {f.name: getattr(trainer.policy, f.name) for f in dataclasses.fields(trainer.policy)}
        trainer.policy = Watched(**own)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    logged = [row for row in trainer.state.log_history if "grad_norm" in row]
    out: dict[str, Any] = {"grad_norm": [row["grad_norm"] for row in logged]}
    out["right"] = [float(np.mean(step)) for step in right]
    out["tokens"] = [float(np.mean(step)) for step in lengths]
    if isinstance(trainer.policy, Watched):
        out["deviations"] = trainer.policy.seen
    trainer.model.eval()
    if cell == Cell("rl", cell.seed):
        trainer.model.save_pretrained(bench.work / cell.name)
    ids, found = bench.answers(trainer.model, splits.test, ANSWERS, seed=20 + cell.seed)
    out |= {"pass@1": float(found.mean()), "held-out tokens": float(np.mean([len(own) for own in ids]))}
    return out


# --- the study -------------------------------------------------------------------------------------------------------


def measured(bench: Bench, cell: Cell, again: bool = False) -> dict[str, Any]:
    """A cell, or what it left when it was done before."""
    path = bench.work / f"{cell.name}.json"
    if again or not path.exists():
        torch.manual_seed(cell.seed)
        started = time.process_time()
        found = gradients(bench, cell) if cell.kind == "gradients" else trained(bench, cell)
        found["cpu_seconds"] = time.process_time() - started
        if again:
            return found
        path.write_text(json.dumps(found))
        print(f"{cell.name}: {found['cpu_seconds']:.0f} s", flush=True)
    own: dict[str, Any] = json.loads(path.read_text())
    return own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--work", type=Path, default=Path("runs/implicit-questions"))
    parser.add_argument("--only", action="append", help="cells whose name begins like this")
    parser.add_argument("--show", action="store_true", help="what is there; nothing is measured")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figures", type=Path)
    parser.add_argument("--read", type=Path, help="a file of --out, whose tables and figures are made again")
    parser.add_argument("--repeat", help="measures this cell once more and says what differs")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.read:
        record = json.loads(asked.read.read_text())
        found = summary(record["cells"])
    else:
        asked.work.mkdir(parents=True, exist_ok=True)
        with grader_of(recipes.parse({"model": asked.model, "reward": {"workers": 1}}).reward) as grader:
            bench = Bench(asked.work, asked.model, grader)
            if asked.repeat:
                (cell,) = (cell for cell in cells(asked.seeds) if cell.name == asked.repeat)
                one, other = measured(bench, cell), measured(bench, cell, again=True)
                return print(cell.name, "differs in", [k for k in one if k != "cpu_seconds" and one[k] != other[k]])
            chosen = [c for c in cells(asked.seeds) if not asked.only or c.name.startswith(tuple(asked.only))]
            chosen = [c for c in chosen if not asked.show or (asked.work / f"{c.name}.json").exists()]
            made = [
                {**dataclasses.asdict(c), "hyper": dict(c.hyper), "name": c.name} | measured(bench, c) for c in chosen
            ]
        command = f"python benchmarks/implicit_questions.py --seeds {asked.seeds}"
        record = {**made_with(command, "torch", "transformers", "trl"), "cells": rounded(made)}
        there = {cell["name"] for cell in made}
        record["missing"] = [cell.name for cell in cells(asked.seeds) if cell.name not in there]
        found = summary(record["cells"])
        if asked.out:
            asked.out.write_text(json.dumps(record | {"summary": rounded(found)}) + "\n")
    print(said(found))
    if asked.figures:
        draw(record["cells"], found, asked.figures)


if __name__ == "__main__":
    main()
