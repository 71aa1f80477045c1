"""Writes a recipe's problems as files whose rows say how good each token is, for the studies graded and adaptive.

    python benchmarks/graded.py study-paths data.paths=4 data.demos=640 --values --out runs/graded
    python benchmarks/graded.py study-initialisation data.demos=1536 --out runs/solved

demos.jsonl has a row for each demonstration, with the columns

    solved                          share of the base's answers to the problem that are right
    allowed_expert, allowed_keep    (--values) GIFT's target where e^β lifts every token that a demonstration of the
                                    problem goes on with, in the base's proportions; shared by those that agree so far
    value_expert, value_keep        (--values) the Gibbs target of the verifier, e^{lift·right}: w = p·E[y] / (p·E[y] +
                                    (1 − p)·E[others]), each E from answers that the base completes after the token, or
                                    that left the demonstration there. Tokens of p ≥ `SURE` are left to the base

as `soft_targets.py` reads them. prompts.jsonl, validation.jsonl and test.jsonl are the recipe's own. Answers are kept
in answers.jsonl, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from heatbath import models
from heatbath import recipe as recipes
from heatbath.data import rendering, sources
from heatbath.data.rendering import IGNORE
from heatbath.data.rows import Row
from heatbath.engines.local import LocalSampler
from heatbath.engines.sampling import Sampling, seed_of
from heatbath.recipe import Recipe
from heatbath.run import append_jsonl, read_jsonl
from heatbath.stages.rewards import grader_of
from heatbath.verify.graders import as_gold

SURE = 0.95  # a token at least this likely to the base tells nothing of the answer's worth
PIECE = 2048  # answers between two savings
Prefix = tuple[str, tuple[int, ...]]  # a problem, and the tokens of an answer so far


class Base:
    """The recipe's base, its answers and its probabilities."""

    def __init__(self, recipe: Recipe, samples: int, folder: Path) -> None:
        assert recipe.model is not None
        path = models.resolve(recipe.model)
        self.recipe, self.samples, self.file = recipe, samples, folder / "answers.jsonl"
        self.tokenizer = models.load_tokenizer(path, recipe.template)
        self.model = models.load_model(path, torch.float32).eval()

    def prompt(self, row: Row) -> list[int]:
        return rendering.prompt_ids(self.tokenizer, rendering.messages(row, self.recipe.data.system))

    def logp(self, row: Row, answer: list[int]) -> list[float]:
        """Log-probability of each token of the answer."""
        prompt = self.prompt(row)
        with torch.no_grad():
            logits = self.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
        return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0].tolist()

    def answers(self, asked: dict[Prefix, Row]) -> dict[Prefix, list[tuple[tuple[int, ...], bool]]]:
        """`samples` answers from each prefix on: the whole answer's tokens, and whether it is right."""
        found: dict[Prefix, list[tuple[tuple[int, ...], bool]]] = defaultdict(list)
        for one in read_jsonl(self.file):
            found[one["problem"], tuple(one["prefix"])].append((tuple(one["ids"]), one["right"]))
        lacking = [prefix for prefix in asked if prefix not in found]
        each = PIECE // self.samples
        for start in range(0, len(lacking), each):
            piece = lacking[start : start + each]
            rows = self._completed([prefix for prefix in piece for _ in range(self.samples)], asked)
            append_jsonl(self.file, rows)
            for one in rows:
                found[one["problem"], tuple(one["prefix"])].append((tuple(one["ids"]), one["right"]))
            print(f"{min(start + each, len(lacking)):,} of {len(lacking):,} prefixes", flush=True)
        return found

    def _completed(self, prefixes: list[Prefix], asked: dict[Prefix, Row]) -> list[dict[str, Any]]:
        prompts = [self.prompt(asked[prefix]) + list(prefix[1]) for prefix in prefixes]
        seeds = [seed_of(0, *map(str, prefix), number % self.samples) for number, prefix in enumerate(prefixes)]
        drawn = LocalSampler(self.model, self.tokenizer).sample(
            prompts, Sampling(1.0, 1.0, self.recipe.eval.max_new_tokens), seeds
        )
        ids = {one.prompt: [*prefixes[one.prompt][1], *one.ids] for batch in drawn for one in batch}
        texts = [self.tokenizer.decode(ids[i], skip_special_tokens=True) for i in range(len(prefixes))]
        golds = [as_gold(self.recipe.reward.kind, str(asked[prefix].answer)) for prefix in prefixes]
        with grader_of(self.recipe.reward) as grader:
            verdicts = grader.grade(texts, golds)
        return [
            {"problem": prefix[0], "prefix": prefix[1], "ids": ids[i], "right": verdicts[i].status == "right"}
            for i, prefix in enumerate(prefixes)
        ]


def supervised(base: Base, row: Row) -> list[int]:
    """The tokens of a demonstration that are learned, EOS included."""
    rendered = rendering.render(base.tokenizer, row, max_length=10**6, system=base.recipe.data.system)
    return [token for token, label in zip(rendered.input_ids, rendered.labels, strict=True) if label != IGNORE]


def allowed(answers: list[list[int]], logp: list[list[float]], beta: float) -> list[list[tuple[float, float]]]:
    """(expert, keep) of each token of each answer to one problem, under the target that lifts all that they go on with.

    At a prefix of k answers whose next tokens have together the probability P, keep = 1 / (1 + (e^β − 1)·P); each
    token's (1 − keep)·p/P is shared by the answers that take it, so that their mean is the target's cross-entropy.
    """
    found: list[list[tuple[float, float]]] = [[] for _ in answers]
    for number, (answer, own) in enumerate(zip(answers, logp, strict=True)):
        for t, token in enumerate(answer):
            same = [i for i, other in enumerate(answers) if other[:t] == answer[:t] and len(other) > t]
            next_tokens = {answers[i][t]: logp[i][t] for i in same}
            whole = math.log(math.fsum(map(math.exp, next_tokens.values())))
            odds = math.log(math.expm1(beta)) + whole
            keep = 1 / (1 + math.exp(odds)) if odds < 700 else 0.0
            takers = sum(answers[i][t] == token for i in same)
            expert = (1 - keep) * math.exp(own[t] - whole) * len(same) / takers
            found[number].append((expert, keep))
    return found


def nodes(answer: list[int], logp: list[float]) -> list[int]:
    """The positions at which the base is not sure of the next token: its answers are wanted before and after it."""
    return [t for t, value in enumerate(logp) if value < math.log(SURE)]


def graded(
    problem: str, answer: list[int], logp: list[float], found: dict[Prefix, list[Any]], prior: float, lift: float
) -> list[tuple[float, float]]:
    """(expert, keep) of each token under the verifier's Gibbs target, from what the base does at each prefix."""
    unsure, out = set(nodes(answer, logp)), []
    for t, token in enumerate(answer):
        p = math.exp(logp[t])
        if t not in unsure:
            out.append((0.0, 1.0))
            continue
        before, after = found[problem, tuple(answer[:t])], found.get((problem, tuple(answer[: t + 1])), [])
        others = [right for ids, right in before if ids[t : t + 1] != (token,)]
        own = [right for _, right in after] or [True]  # nothing follows EOS: a demonstration is right
        worth = p * _lifted(own, prior, lift)
        w = worth / (worth + (1 - p) * _lifted(others, prior, lift))
        out.append(((w - p) / (1 - p), (1 - w) / (1 - p)))
    return out


def _lifted(right: list[bool], prior: float, lift: float) -> float:
    """E[e^{lift·right}], the share of right answers drawn to `prior` by two more."""
    share = (sum(right) + 2 * prior) / (len(right) + 2)
    return 1 + math.expm1(lift) * share


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("recipe")
    arguments.add_argument("overrides", nargs="*")
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--samples", type=int, default=8, help="answers of the base from each prefix on")
    arguments.add_argument("--values", action="store_true", help="the graded columns, too")
    arguments.add_argument("--beta", type=float, default=21.0, help="nats by which allowed tokens are lifted")
    arguments.add_argument("--lift", type=float, default=5.0, help="nats by which right answers are lifted")
    given = arguments.parse_args()
    recipe = recipes.load(given.recipe, given.overrides)
    given.out.mkdir(parents=True, exist_ok=True)
    splits, base = sources.of(recipe), Base(recipe, given.samples, given.out)
    for name in ("validation", "prompts", "test"):
        rows = getattr(splits, name)
        write(given.out, name, [{"question": r.question, "solution": r.solution, "answer": r.answer} for r in rows])
    by_problem: dict[str, list[Row]] = defaultdict(list)
    for row in splits.demos:
        by_problem[row.id].append(row)
    ids = {problem: [supervised(base, row) for row in rows] for problem, rows in by_problem.items()}
    logp = {problem: [base.logp(rows[0], answer) for answer in ids[problem]] for problem, rows in by_problem.items()}
    asked: dict[Prefix, Row] = {(problem, ()): rows[0] for problem, rows in by_problem.items()}
    for problem, rows in by_problem.items() if given.values else ():
        for answer, own in zip(ids[problem], logp[problem], strict=True):
            ends = {end for t in nodes(answer, own) for end in (t, t + 1) if end < len(answer)}
            asked |= {(problem, tuple(answer[:end])): rows[0] for end in ends}
    found = base.answers(asked)
    roots = [right for problem in by_problem for _, right in found[problem, ()]]
    prior = sum(roots) / len(roots)
    print(f"{len(by_problem):,} problems, {len(splits.demos):,} demonstrations; the base solves {prior:.3f}")
    out = []
    for problem, rows in by_problem.items():
        solved = sum(right for _, right in found[problem, ()]) / given.samples
        columns: list[dict[str, Any]] = [{"solved": solved} for _ in rows]
        if given.values:
            lifted = allowed(ids[problem], logp[problem], given.beta)
            for own, some, answer, known in zip(columns, lifted, ids[problem], logp[problem], strict=True):
                valued = graded(problem, answer, known, found, prior, given.lift)
                for name, pairs in (("allowed", some), ("value", valued)):
                    own[f"{name}_expert"], own[f"{name}_keep"] = ([*share] for share in zip(*pairs, strict=True))
        facts = [{"question": r.question, "solution": r.solution, "answer": r.answer, "kind": r.kind} for r in rows]
        out += [fact | column for fact, column in zip(facts, columns, strict=True)]
    write(given.out, "demos", out)


if __name__ == "__main__":
    main()
