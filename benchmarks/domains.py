"""Tables of two families of reasoning-gym for recipes/study-domains.toml: what a small base knows, and what an expert
has beyond it.

    python benchmarks/domains.py --out domains     # domains/knights and domains/legs: base, train, test (seconds)
    python benchmarks/domains.py --read runs/domains-knights     # what is new

`knights_knaves` (logical inference: two people, of whom each tells the truth or lies) and `leg_counting` (common
knowledge: how many legs some animals have together). A model of characters reads them. Of knights and knaves the
opening is left out, and the sentence that prescribes the form of the answer, which is here the roles of A and B in that
order; people have letters for names.

Each family has something that `base.jsonl` never uses: three of the seven pairs of roles, and twelve of the 37 animals,
of every number of legs. `train.jsonl` (demonstrations and prompts) and `test.jsonl` have all of them. A quarter of all
problems, by hash, is `test`; what the base learns from is disjoint from `train`, too. The answer stands behind `####`,
where the grader looks for it, and legs are added up before it; a bare word of a completion is no answer.
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
KNOWN_ROLES = ("knight", "pioneer", "saint", "hero")
KNOWN_WORDS = {*KNOWN_ROLES, "knave", "laggard", "sinner", "villain"}
NEW_ANIMALS = {
    *("leech", "duck", "lion", "giraffe", "deer", "starfish", "wasp", "cricket", "firefly", "scorpion", "shrimp"),
    "woodlouse",
}


def knights(entry: dict[str, Any]) -> tuple[str, str, str, bool]:
    """The statements and the question, nothing before the answer, the roles of both ("hero, villain"), and whether the
    base knows them."""
    told = entry["question"].partition("inhabitants: ")[2].partition(" (Format")[0]
    for name, letter in zip(entry["metadata"]["names"], "AB", strict=True):
        told = re.sub(rf"\b{name}\b", letter, told)
    roles = entry["metadata"]["knight_knave_terms"]
    said = (roles["knight" if truthful else "knave"] for truthful in entry["metadata"]["solution"])
    return told.removeprefix("A, and B. "), "", ", ".join(said), roles["knight"] in KNOWN_ROLES


def legs(entry: dict[str, Any]) -> tuple[str, str, str, bool]:
    """The question, the sums ("3 x 4 = 12, 1 x 6 = 6, 12 + 6 = 18"), the last result, and whether the base knows both
    animals."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    asked = entry["metadata"]["animals"]
    own = [(count, ANIMALS[animal]) for animal, count in asked.items()]
    steps = [f"{count} x {each} = {count * each}" for count, each in own]
    total = " + ".join(str(count * each) for count, each in own)
    question = entry["question"].partition("Now, ")[2].strip().capitalize()
    worked = ", ".join([*steps, f"{total} = {entry['answer']}"])
    return question, f"{worked}\n", entry["answer"], NEW_ANIMALS.isdisjoint(asked)


FAMILIES: dict[str, tuple[str, dict[str, Any], Callable[[dict[str, Any]], tuple[str, str, str, bool]]]] = {
    "knights": ("knights_knaves", {"n_people": 2}, knights),
    "legs": ("leg_counting", {"min_animals": 2, "max_animals": 2, "max_instances": 9}, legs),
}


def tables(name: str) -> dict[str, list[dict[str, str]]]:
    """The three tables of a family, each problem in one of them."""
    found: dict[str, dict[str, dict[str, str]]] = {table: {} for table in SIZES}
    for question, before, answer, known in _entries(name):
        problem = normalised(question)
        place = position(problem)
        table = "test" if place < HELD_OUT else "train" if place < (1 + HELD_OUT) / 2 else "base"
        if len(found[table]) < SIZES[table] and (known or table != "base"):
            kind = "known" if known else "new"
            row = {"question": question, "solution": f"{before}#### {answer}", "answer": answer, "kind": kind}
            found[table].setdefault(problem, row)
        if all(len(found[table]) == size for table, size in SIZES.items()):
            break
    return {table: list(rows.values()) for table, rows in found.items()}


def _entries(name: str) -> Iterator[tuple[str, str, str, bool]]:
    import reasoning_gym

    family_name, settings, read = FAMILIES[name]
    for entry in reasoning_gym.create_dataset(family_name, seed=0, size=FAMILY_SIZE, **settings):
        yield read(entry)


def read(folder: Path) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Setting → policy → what is counted → a value for each seed: how many answers to problems without and with
    something new are right; of knights and knaves how many hold a word that is no role, of legs how often each animal's
    are right, and how many answers to problems without a new animal have all legs right."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for setting in sorted(path for path in folder.iterdir() if (path / "0").is_dir()):
        for run in (Run.read(path) for path in sorted(setting.iterdir()) if is_run(path)):
            for policy in run.policies:
                own = found.setdefault(setting.name, {}).setdefault(policy, {})
                for name, value in counted(run.samples(policy)).items():
                    own.setdefault(name, []).append(value)
    return found


def counted(samples: list[dict[str, Any]]) -> dict[str, float]:
    """Of one policy of one run."""
    seen: dict[str, list[bool]] = {}
    roles = {word for one in samples for word in re.findall("[a-z]+", one["gold"])}
    for one in samples:
        seen.setdefault("right, new" if is_new(one) else "right, known", []).append(one["status"] == "right")
        if roles:
            words = re.findall("[a-z]+", one["completion"].lower())
            seen.setdefault("a word that is no role", []).append(not roles.issuperset(words))
            continue
        known = facts(one["question"], one["completion"])
        if not is_new(one):
            seen.setdefault("all legs right, known", []).append(all(known.values()))
        for animal, right in known.items():
            seen.setdefault(f"legs of {animal if animal in NEW_ANIMALS else 'the others'}", []).append(right)
    return {name: sum(values) / len(values) for name, values in sorted(seen.items())}


def facts(question: str, text: str) -> dict[str, bool]:
    """Of each animal asked for, in their order: whether the product in its place has its number of legs. None has where
    there are more or fewer products than animals."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    asked = [name for _, name in re.findall(r"(\d+) ([a-z ]+?)(?=,|\?)", question)]
    animals = [name if name in ANIMALS else name.removesuffix("s") for name in asked]
    said: list[str | None] = [*re.findall(r"\d+ x (\d+) =", text)]
    legs = said if len(said) == len(animals) else [None] * len(animals)
    return {animal: own == str(ANIMALS[animal]) for animal, own in zip(animals, legs, strict=True)}


def is_new(sample: dict[str, Any]) -> bool:
    """Whether a problem needs a word, or an animal, that the base has not seen."""
    words = re.findall("[a-z]+", sample["gold"])
    return not KNOWN_WORDS.issuperset(words) or any(animal in sample["question"] for animal in NEW_ANIMALS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("domains"))
    parser.add_argument("--read", type=Path, help="the folder of a study-domains")
    parser.add_argument("--record", type=Path, help="where to keep what is read, seed by seed")
    options = parser.parse_args()
    if options.read:
        found = read(options.read)
        for setting, policies in found.items():
            for policy, own in policies.items():
                means = ", ".join(f"{name} {sum(values) / len(values):.3f}" for name, values in own.items())
                print(f"{setting} {policy}: {means}")
        if options.record:
            options.record.write_text(json.dumps(found) + "\n")
        return
    for name in FAMILIES:
        folder = options.out / name
        folder.mkdir(parents=True, exist_ok=True)
        for table, rows in tables(name).items():
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{table}.jsonl").write_text(text, encoding="utf-8")
            new = sum(row["kind"] == "new" for row in rows) / len(rows)
            print(f"{folder / table}.jsonl: {len(rows):,} problems, {new:.0%} with something new to the base")


if __name__ == "__main__":
    main()
