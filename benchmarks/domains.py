"""Tables of two families of reasoning-gym for recipes/study-domains.toml: what a small base knows, and what an expert
has beyond it.

    python benchmarks/domains.py --out domains     # domains/knights and domains/family: base, train, test (seconds)
    python benchmarks/domains.py --read runs/domains-knights     # words that are no role, new words got right

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
from heatbath.run import Run, is_run

FAMILY_SIZE = 1_000_000
SIZES = {"base": 16_000, "train": 6_000, "test": 400}
NAMES = {"male_names": [*"ABCDEFGH"], "female_names": [*"STUVWXYZ"]}
KNOWN_ROLES = ("knight", "pioneer", "saint", "hero")
KNOWN_WORDS = {*KNOWN_ROLES, "knave", "laggard", "sinner", "villain"}
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


def read_words(folder: Path) -> None:
    """Of each policy of a setting, over its seeds: answers with a word that is no role, and right ones among the
    problems whose answer has a word that the base has not seen."""
    for setting in sorted(path for path in folder.iterdir() if (path / "0").is_dir()):
        runs = [Run.read(path) for path in sorted(setting.iterdir()) if is_run(path)]
        for policy in runs[0].policies:
            samples = [one for run in runs for one in run.samples(policy)]
            roles = {word for one in samples for word in re.findall("[a-z]+", one["gold"])}
            seen = {word for word in roles if word in KNOWN_WORDS}
            foreign = sum(not roles.issuperset(re.findall("[a-z]+", one["completion"].lower())) for one in samples)
            new = [
                one["status"] == "right" for one in samples if not seen.issuperset(re.findall("[a-z]+", one["gold"]))
            ]
            print(
                f"{setting.name} {policy}: {foreign / len(samples):.3f} hold a word that is no role; problems with new "
                f"words {len(new) / len(samples):.3f}, right of these {sum(new) / len(new):.3f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("domains"))
    parser.add_argument("--read", type=Path, help="the folder of study-domains on knights")
    options = parser.parse_args()
    if options.read:
        return read_words(options.read)
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
