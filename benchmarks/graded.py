"""Writes a recipe's problems as files whose rows say how good each token is, for the studies graded and adaptive.

    python benchmarks/graded.py study-paths data.paths=4 data.demos=640 --values --out runs/graded
    python benchmarks/graded.py study-initialisation data.demos=1536 --out runs/solved

demos.jsonl has a row for each demonstration, with the columns

    solved                          share of the base's answers to the problem that are right
    allowed_expert, allowed_keep    (--values) GIFT's target where e^β lifts every token that a demonstration of the
                                    problem goes on with, in the base's proportions; shared by those that agree so far
    value_expert, value_keep        (--values) the Gibbs target of the verifier, e^{lift·right}: w = p·E[y] / (p·E[y] +
                                    (1 − p)·E[others]), each E from answers that the base completes after the token, or
                                    that left the demonstration there, drawn to what the prefix is worth as a whole.
                                    Tokens of p ≥ `SURE`, or that every answer took, are left to the base

as `soft_targets.py` reads them. The same solution in two forms is one row. validation.jsonl has the column `solved`,
too, prompts.jsonl and test.jsonl are the recipe's own. Answers are kept in answers.jsonl, so that an interrupted run
goes on.
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
from heatbath.verify.graders import as_gold, require_few_failures
from heatbath.verify.verdict import Verdict

SURE = 0.95  # a token at least this likely to the base tells nothing of the answer's worth
PIECE = 2048  # answers between two savings
Prefix = tuple[str, tuple[int, ...]]  # a problem, and the tokens of an answer so far


class Base:
    """The recipe's base, its answers and its probabilities."""

    def __init__(self, recipe: Recipe, samples: int, folder: Path) -> None:
        assert recipe.model is not None
        path = models.resolve(recipe.model)
        self.recipe, self.samples, self.file = recipe, samples, folder / "answers.jsonl"
        made = {"base": models.fingerprint_of(path), "samples": samples, "tokens": recipe.eval.max_new_tokens}
        head = folder / "answers.json"
        if head.exists() and json.loads(head.read_text()) != made:
            raise SystemExit(f"{folder} holds answers of another base or other settings: choose another --out")
        head.write_text(json.dumps(made) + "\n")
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
        found = defaultdict(list, {prefix: own for prefix, own in found.items() if len(own) == self.samples})
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
        verdicts = self.graded(texts, golds)
        return [
            {"problem": prefix[0], "prefix": prefix[1], "ids": ids[i], "right": verdicts[i].status == "right"}
            for i, prefix in enumerate(prefixes)
        ]

    def graded(self, texts: list[str], golds: list[Any]) -> list[Verdict]:
        with grader_of(self.recipe.reward) as grader:
            verdicts = grader.grade(texts, golds)
        require_few_failures(verdicts, texts, golds, self.recipe.reward.failed_share, "graded.py")
        return verdicts


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
    problem: str, answer: list[int], logp: list[float], found: dict[Prefix, list[Any]], right: bool, lift: float
) -> list[tuple[float, float]]:
    """(expert, keep) of each token under the verifier's Gibbs target, from what the base does at each prefix; `right`
    is whether the answer itself is."""
    unsure, out = set(nodes(answer, logp)), []
    for t, token in enumerate(answer):
        p = math.exp(logp[t])
        before = found[problem, tuple(answer[:t])] if t in unsure else []
        others = [good for ids, good in before if ids[t : t + 1] != (token,)]
        if not others:  # nothing tells what the base makes of the rest
            out.append((0.0, 1.0))
            continue
        whole = sum(good for _, good in before) / len(before)
        if t + 1 < len(answer):
            own = _lifted([good for _, good in found[problem, tuple(answer[: t + 1])]], whole, lift)
        else:
            own = math.exp(lift) if right else 1.0
        worth = p * own
        w = worth / (worth + (1 - p) * _lifted(others, whole, lift))
        out.append(((w - p) / (1 - p), (1 - w) / (1 - p)))
    return out


def _lifted(right: list[bool], whole: float, lift: float) -> float:
    """E[e^{lift·right}], the share of right answers drawn to that of the `whole` prefix by two more."""
    share = (sum(right) + 2 * whole) / (len(right) + 2)
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
    for name in ("prompts", "test"):
        write(given.out, name, [fact(row) for row in getattr(splits, name)])
    write(given.out, "validation", columned(base, splits.validation, values=None))
    write(given.out, "demos", columned(base, splits.demos, values=(given.beta, given.lift) if given.values else None))


def fact(row: Row) -> dict[str, Any]:
    return {"question": row.question, "solution": row.solution, "answer": row.answer, "kind": row.kind}


def columned(base: Base, rows: list[Row], values: tuple[float, float] | None) -> list[dict[str, Any]]:
    """The rows with their columns, each solution of a problem once; with `values`, β and the lift, the graded ones."""
    by_problem: dict[str, dict[str | None, Row]] = defaultdict(dict)
    for row in rows:
        by_problem[row.id].setdefault(row.solution, row)
    known = {}
    asked: dict[Prefix, Row] = {}
    for problem, own in by_problem.items():
        first = next(iter(own.values()))
        ids = [supervised(base, row) for row in own.values()] if values else []
        logp = [base.logp(first, answer) for answer in ids]
        known[problem] = ids, logp
        asked[problem, ()] = first
        for answer, each in zip(ids, logp, strict=True):
            ends = {end for t in nodes(answer, each) for end in (t, t + 1) if end < len(answer)}
            asked |= {(problem, tuple(answer[:end])): first for end in ends}
    found = base.answers(asked)
    roots = [good for problem in by_problem for _, good in found[problem, ()]]
    whole = [row for own in by_problem.values() for row in own.values()]
    print(f"{len(by_problem):,} problems, {len(whole):,} solutions; the base solves {sum(roots) / len(roots):.3f}")
    golds = [as_gold(base.recipe.reward.kind, str(row.answer)) for row in whole]
    verdicts = base.graded([str(row.solution) for row in whole], golds) if values else []
    right = {(row.solution, row.answer): v.status == "right" for row, v in zip(whole, verdicts, strict=False)}
    out = []
    for problem, solutions in by_problem.items():
        own = [*solutions.values()]
        columns: list[dict[str, Any]] = [{"solved": sum(r for _, r in found[problem, ()]) / base.samples} for _ in own]
        if values:
            ids, logp = known[problem]
            lifted = allowed(ids, logp, values[0])
            for column, some, answer, each, row in zip(columns, lifted, ids, logp, own, strict=True):
                valued = graded(problem, answer, each, found, right[row.solution, row.answer], values[1])
                for name, pairs in (("allowed", some), ("value", valued)):
                    column[f"{name}_expert"], column[f"{name}_keep"] = ([*share] for share in zip(*pairs, strict=True))
        out += [fact(row) | column for row, column in zip(own, columns, strict=True)]
    for name in ("allowed", "value") if values else ():
        keep = [share for row in out for share in row[f"{name}_keep"]]
        left, moved = (sum(map(test, keep)) / len(keep) for test in (lambda k: k > 0.999, lambda k: k < 0.5))
        print(f"{name}: {left:.1%} of {len(keep):,} tokens left to the base, {moved:.1%} moved by more than half")
    return out


if __name__ == "__main__":
    main()
