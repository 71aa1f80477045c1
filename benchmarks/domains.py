"""Tables of two families of reasoning-gym for recipes/study-domains.toml: what a small base knows, and what an expert
has beyond it.

    python benchmarks/domains.py --out domains     # domains/knights and domains/family: base, train, test (seconds)

`knights_knaves` (logical inference: two people, of whom each tells the truth or lies) and `family_relationships` (4 or
5 people). A model of characters reads them, so people have letters for names. Of knights and knaves the opening is left
out, and the sentence that prescribes the form of the answer, which is here the roles of A and B in that order; kin are
asked for in one form of words.

Each family has words that `base.jsonl` never uses: three of the seven pairs of roles, the relations beyond parent,
child and spouse. `train.jsonl` (demonstrations and prompts) and `test.jsonl` have all of them. A quarter of all
problems, by hash, is `test`; what the base learns from is disjoint from `train`, too. A solution is the answer behind
`####`, where the grader looks for it; a bare word of a completion is no answer to it.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from heatbath.data.rows import HELD_OUT, normalised, position

FAMILY_SIZE = 1_000_000
SIZES = {"base": 16_000, "train": 6_000, "test": 400}
NAMES = {"male_names": [*"ABCDEFGH"], "female_names": [*"STUVWXYZ"]}
KNOWN_ROLES = ("knight", "pioneer", "saint", "hero")
KNOWN_RELATIONS = ("mother", "father", "son", "daughter", "wife", "husband")


def knights(entry: dict[str, Any]) -> tuple[str, str, bool]:
    """The statements and the question, the roles of both ("hero, villain"), and whether the base knows them."""
    told = entry["question"].partition("inhabitants: ")[2].partition(" (Format")[0]
    for name, letter in zip(entry["metadata"]["names"], "AB", strict=True):
        told = re.sub(rf"\b{name}\b", letter, told)
    roles = entry["metadata"]["knight_knave_terms"]
    said = (roles["knight" if truthful else "knave"] for truthful in entry["metadata"]["solution"])
    return told.removeprefix("A, and B. "), ", ".join(said), roles["knight"] in KNOWN_ROLES


def family(entry: dict[str, Any]) -> tuple[str, str, bool]:
    """The story and a question in one form of the family's three, one word, and whether the base knows it."""
    story, asked = entry["question"].partition("\n\n")[0], entry["metadata"]
    question = f"{story} What is {asked['person1']} to {asked['person2']}?"
    return question, entry["answer"], entry["answer"] in KNOWN_RELATIONS


FAMILIES: dict[str, tuple[str, dict[str, Any], Callable[[dict[str, Any]], tuple[str, str, bool]]]] = {
    "knights": ("knights_knaves", {"n_people": 2}, knights),
    "family": ("family_relationships", {"min_family_size": 4, "max_family_size": 5, **NAMES}, family),
}


def tables(name: str) -> dict[str, list[dict[str, str]]]:
    """The three tables of a family, each problem in one of them."""
    found: dict[str, dict[str, dict[str, str]]] = {table: {} for table in SIZES}
    for question, answer, known in _entries(name):
        problem = normalised(question)
        place = position(problem)
        table = "test" if place < HELD_OUT else "train" if place < (1 + HELD_OUT) / 2 else "base"
        if len(found[table]) < SIZES[table] and (known or table != "base"):
            kind = "known" if known else "new"
            row = {"question": question, "solution": f"#### {answer}", "answer": answer, "kind": kind}
            found[table].setdefault(problem, row)
        if all(len(found[table]) == size for table, size in SIZES.items()):
            break
    return {table: list(rows.values()) for table, rows in found.items()}


def _entries(name: str) -> Iterator[tuple[str, str, bool]]:
    import reasoning_gym

    family_name, settings, read = FAMILIES[name]
    for entry in reasoning_gym.create_dataset(family_name, seed=0, size=FAMILY_SIZE, **settings):
        yield read(entry)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("domains"))
    options = parser.parse_args()
    for name in FAMILIES:
        folder = options.out / name
        folder.mkdir(parents=True, exist_ok=True)
        for table, rows in tables(name).items():
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{table}.jsonl").write_text(text, encoding="utf-8")
            new = sum(row["kind"] == "new" for row in rows) / len(rows)
            print(f"{folder / table}.jsonl: {len(rows):,} problems, {new:.0%} with words that the base has not seen")


if __name__ == "__main__":
    main()
