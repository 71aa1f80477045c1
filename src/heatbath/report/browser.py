"""The samples of one or several runs as compact JSON for the page's browser, and the first of them in plain words.

Model output is not to be trusted: it enters the page as JSON in which nothing can end the script element, and from
there as text, never as HTML.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from heatbath.run import OWN_TEST, Run, read_jsonl
from heatbath.stages import judged
from heatbath.verify.verdict import STATUSES

BUDGET = 2_300_000  # bytes of samples in a page
EXCERPT = 4_000  # characters of one text; of a longer one the first and the last are shown
EXAMPLES = 6

Rows = Sequence[Mapping[str, Any]]
Problem = tuple[str, str, int]  # task, problem, turn


def rated(run: Run, samples: Rows) -> list[Mapping[str, Any]]:
    """The samples; an answer of a judged task has as its status its rating by the recipe's judge, where that is of the
    answers there are now."""
    judge = run.recipe.eval.judge
    ratings = {
        (row["task"], row["policy"], row["problem"], row["turn"], row["of"]): row["rating"]
        for row in read_jsonl(run.folder / "judgments.jsonl")
        if judge is None or row["judge"] == judge.model
    }
    said: dict[tuple[Any, ...], list[str]] = {}  # the answers of a conversation, which come in order
    out = []
    for row in samples:
        if row.get("status") not in STATUSES:
            conversation = row["task"], row["policy"], row["problem"]
            said.setdefault(conversation, []).append(row["completion"])
            rating = ratings.get((*conversation, row.get("turn"), judged.digest(said[conversation])))
            row = {**row, "status": "not rated" if rating is None else f"rated {rating:g}"}
        out.append(row)
    return out


@dataclass(frozen=True)
class Voice:
    """One policy of one run (or of all, where they drew the same), and everything it was asked."""

    label: str
    css: str
    rows: Rows


def voices(runs: Sequence[tuple[str, str, Mapping[str, Rows]]]) -> list[Voice]:
    """The policies of runs given as (name, CSS class, policy → samples). A base whose samples several runs share word
    for word, is one voice."""
    if len(runs) == 1:
        return [Voice(policy, f"policy-{policy}", rows) for policy, rows in runs[0][2].items() if rows]
    out: list[Voice] = []
    bases: dict[tuple[Any, ...], list[str]] = {}
    for name, css, policies in runs:
        for policy, rows in policies.items():
            if policy == "base" and rows:
                bases.setdefault(tuple((r["problem"], r["completion"], r["status"]) for r in rows), []).append(name)
            elif rows:
                out.append(Voice(f"{name} {policy}", css, rows))
    first = {name: policies["base"] for name, _, policies in runs if policies.get("base")}
    for names in reversed(bases.values()):
        label = "base" if len(bases) == 1 and len(names) == len(first) else f"{', '.join(names)} base"
        out.insert(0, Voice(label, "policy-base", first[names[0]]))
    return out


@dataclass
class _Table:
    """Distinct values in the order in which they came, each with its number."""

    numbers: dict[Any, int] = field(default_factory=dict)

    def __call__(self, value: Any) -> int:
        return self.numbers.setdefault(value, len(self.numbers))

    def __len__(self) -> int:
        return len(self.numbers)


def embedded(found: Sequence[Voice], *, budget: int = BUDGET) -> dict[str, Any]:
    """What the page's browser reads, in at most `budget` bytes of JSON, and how much of the whole that is.

    Where everything is too much, the first samples of every problem are kept, as many per voice as fit, and no problem
    of which none is. `tallies` are of all graded samples, shown or not: right and drawn, by problem and voice.
    """
    most = max((len(voice.rows) for voice in found), default=0)
    limit = most
    while True:
        data = _packed(found, limit)
        size = len(as_json(data).encode())
        if size <= budget or limit <= 1:
            data["of"] = sum(len(voice.rows) for voice in found)
            data["limit"] = limit if limit < most else None
            return data
        limit = max(1, min(limit - 1, int(limit * budget / size)))


def _packed(found: Sequence[Voice], limit: int) -> dict[str, Any]:
    texts, statuses, rules, tasks, problems = _Table(), _Table(), _Table(), _Table(), _Table()
    tallies: dict[Problem, list[list[int]]] = {}
    samples: list[int] = []
    asked: list[list[int]] = []
    for number, voice in enumerate(found):
        for row in voice.rows:
            tally = tallies.setdefault(_problem(row), [[0, 0] for _ in found])[number]
            tally[0] += row["status"] == "right"
            tally[1] += row["status"] in STATUSES  # a rating is no share
        for i in _first([_problem(row) for row in voice.rows], limit):
            row = voice.rows[i]
            before = len(problems)
            problem = problems(_problem(row))
            if problem == before:
                question, gold = cut(str(row.get("question") or "")), row.get("gold")
                asked.append([tasks(_problem(row)[0]), texts(question), texts("" if gold is None else cut(str(gold)))])
            answer, rule = row.get("answer"), row.get("rule") or ""
            samples += [number, problem, statuses(row["status"]), int(not row["finished"]), row["tokens"]]
            samples += [texts(cut(row["completion"])), -1 if answer is None else texts(cut(str(answer))), rules(rule)]
    return {
        "voices": [[voice.label, voice.css] for voice in found],
        "tasks": list(tasks.numbers),
        "statuses": list(statuses.numbers),
        "rules": list(rules.numbers),
        "texts": list(texts.numbers),
        "problems": asked,
        "tallies": [tallies[problem] for problem in problems.numbers],
        "samples": samples,  # 8 numbers each
        "kept": len(samples) // 8,
        "of_problems": len(tallies),
    }


def _problem(row: Mapping[str, Any]) -> Problem:
    return row.get("task", OWN_TEST), row["problem"], row.get("turn", 1)


def _first(problems: Sequence[Problem], limit: int) -> list[int]:
    """Which samples are kept of a voice: the first of every problem, then the second …, until there are `limit`; in
    their own order."""
    drawn: dict[Problem, int] = {}
    rounds = []
    for i, problem in enumerate(problems):
        drawn[problem] = drawn.get(problem, 0) + 1
        rounds.append((drawn[problem], i))
    return sorted(i for _, i in sorted(rounds)[:limit])


def cut(text: str) -> str:
    """The text, or where it is long its beginning and its end with the number of characters between them."""
    if len(text) <= EXCERPT:
        return text
    head, tail = EXCERPT // 4, EXCERPT - EXCERPT // 4
    return f"{text[:head]}\n[… {len(text) - EXCERPT:,} characters left out …]\n{text[-tail:]}"


def as_json(value: Any) -> str:
    """JSON that stands safely inside a script element: what could end or open a tag is escaped, and so is half a
    surrogate pair, which no encoding can write."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return re.sub("[<>&\u2028\u2029\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)


def told(data: Mapping[str, Any]) -> str:
    """How much of the samples the page holds."""
    if data["limit"] is None:
        return f"All {data['of']:,} samples are in this page."
    shown, there = len(data["problems"]), data["of_problems"]
    of_problems = f"They are of {shown:,} of {there:,} problems. " if shown < there else ""
    return (
        f"Of {data['of']:,} samples {data['kept']:,} are in this page, to keep it small: of each policy the first "
        f"{data['limit']:,}, one of every problem before the second of any. {of_problems}Shares of right answers count "
        "every sample of a problem."
    )


def examples(found: Sequence[Voice]) -> list[dict[str, Any]]:
    """The first sample each voice drew for the first problems, in order of problem id; none is chosen."""
    first: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for voice in found:
        for row in voice.rows:
            by = first.setdefault((row.get("task", OWN_TEST), row["problem"]), {})
            by.setdefault(voice.label, row)
    looks = {voice.label: voice.css for voice in found}
    out = []
    for (_, _), by in sorted(first.items())[:EXAMPLES]:
        row = next(iter(by.values()))
        gold = row.get("gold")
        shown = [
            {
                "label": label,
                "css": looks[label],
                "status": one["status"],
                "finished": one["finished"],
                "completion": cut(one["completion"]),
            }
            for label, one in by.items()
        ]
        out.append({"question": cut(str(row.get("question") or "")), "gold": gold, "samples": shown})
    return out
