"""How far the policies of a run are from each other: base → init, init → final, base → final (docs/shift.md).

Two models are held at a time. What needs them is measured once per sequence and kept in shift.json; means, intervals
and the differences of two runs are made of that.
"""

from __future__ import annotations

import gc
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from heatbath import models
from heatbath import recipe as recipes
from heatbath.data.rendering import IGNORE
from heatbath.errors import RecipeError, RunError
from heatbath.ideas.shift import sequence_geometry, token_shift, top_share
from heatbath.progress import Progress
from heatbath.recipe import Recipe
from heatbath.reference import PASS_TOKENS, padded
from heatbath.run import Run, is_run, write_atomically
from heatbath.stages import shift_rows, shift_summary
from heatbath.stages.shift_rows import Sequences
from heatbath.stages.shift_settings import LAYERS, ONLY_CHOOSE, Settings
from heatbath.states import LastStates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1
FILE = "shift.json"
NAMES = ("base", "init", "final")  # of models given one by one
SAMPLE = "The quick brown fox:\n  12345 + 678 = 13,023 \\frac{1}{2} naïve — 漢字\t<|end|>"


@dataclass(frozen=True)
class Policy:
    """A model to be compared: its name here, what `from_pretrained` takes, the template for a tokenizer without one,
    and what is asked of its fingerprint."""

    name: str
    model: str
    template: str | None = None
    check: Callable[[str], None] | None = None


@dataclass(frozen=True)
class Subject:
    """Two or three policies of one line of training, the recipe whose rows they read, and where shift.json goes."""

    name: str
    policies: list[Policy]
    recipe: Recipe
    source: str
    target: Path | None
    run: Run | None = None

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Each step of the training, and from the first to the last."""
        names = [policy.name for policy in self.policies]
        steps = list(itertools.pairwise(names))
        return [*steps, (names[0], names[-1])] if len(steps) > 1 else steps


def run_shift(
    names: Sequence[str],
    settings: Settings,
    *,
    data: str | None = None,
    out: Path | None = None,
    fresh: bool = False,
    progress: Progress,
) -> dict[str, Any]:
    """The shift of a run, of two runs beside each other (`runs`, `differences`), or of two or three plain models.

    A run's is kept in its folder, the rest in `out`. `data` names the recipe whose rows are read, where it is not the
    run's own. Transitions that shift.json holds of the same models, sequences and settings are not measured again,
    unless `fresh`. Raises RecipeError, DataError or RunError.
    """
    subjects = subjects_of(names, data, out)
    for path in (out, *(subject.target for subject in subjects)):
        if path is not None:
            _require_writable(path)
    read = [_read(subject, settings) for subject in subjects]  # of both, before anything is measured
    found = [
        _measured(subject, *rows, settings, fresh=fresh, progress=progress)
        for subject, rows in zip(subjects, read, strict=True)
    ]
    if len(found) == 1:
        return found[0]
    bases = [next(iter(one["models"].values()))["fingerprint"] for one in found]
    compared: dict[str, Any] = {
        "format": FORMAT,
        "runs": [
            {"run": subject.name, **{key: value for key, value in one.items() if key != "sequences"}}
            for subject, one in zip(subjects, found, strict=True)
        ],
        "same_base": bases[0] == bases[1],
        "same_sequences": found[0]["data"]["fingerprint"] == found[1]["data"]["fingerprint"],
        "differences": shift_summary.differences(found, settings),
    }
    if not compared["same_base"]:
        progress.say("the two runs start from different bases: distances from them are not of one scale")
    if not compared["same_sequences"]:
        progress.say("the two runs were read on different sequences: paired by problem")
    if not compared["differences"]:
        progress.say("no differences: the runs have no problem, or no transition, in common (--data: the same rows)")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, json.dumps(compared, indent=1) + "\n")
    return compared


def subjects_of(names: Sequence[str], data: str | None, out: Path | None) -> list[Subject]:
    """What the command line names: one or two runs, or two or three models. Raises RecipeError for anything else."""
    where, usage = "command line", "heatbath shift RUN [RUN2], or BASE INIT [FINAL] --data RECIPE"
    runs = [is_run(Path(name)) for name in names]
    rows = None if data is None else recipes.load(data)
    if all(runs) and len(names) in (1, 2):
        return [_of_run(Path(name), rows, data, out if len(names) == 1 else None) for name in names]
    others = ", ".join(name for name, run in zip(names, runs, strict=True) if not run)
    if any(runs):
        what = f"{others} is no run, which a run cannot be compared with" if others else "more than two runs"
        raise RecipeError(what, where, usage)
    if rows is None or data is None:
        raise RecipeError(f"{others or 'nothing'} is no run, and plain models need --data", where, usage)
    if len(names) not in (2, 3):
        raise RecipeError(f"{len(names)} models given", where, usage)
    policies = [Policy(name, model, rows.template) for name, model in zip(NAMES, names, strict=False)]
    return [Subject(" → ".join(names), policies, rows, data, out)]


def _of_run(folder: Path, rows: Recipe | None, data: str | None, out: Path | None) -> Subject:
    run = Run.read(folder)
    made = [name for name in run.policies if (name == "base" and run.recipe.model) or run.checkpoint(name).is_dir()]
    if len(made) < 2:
        raise RunError(f"the run has only {' and '.join(made) or 'no policy'} so far", str(folder), "train it first")
    policies = [
        Policy(name, run.model_of(name), run.template_of(name), run.require_same_base if name == "base" else None)
        for name in made
    ]
    return Subject(str(folder), policies, rows or run.recipe, data or str(folder), out or folder / FILE, run)


def _read(subject: Subject, settings: Settings) -> tuple[PreTrainedTokenizerBase, Sequences]:
    """The tokenizer of all its policies, and what they read."""
    tokenizer = require_same_tokenizer(subject.policies)
    if settings.on == "demos":
        return tokenizer, shift_rows.demonstrations(subject.recipe, tokenizer, settings, subject.source)
    if subject.run is None or subject.recipe is not subject.run.recipe:
        raise RecipeError("only a run has samples of its own", "--on", "leave out --on or --data, or give a run")
    if settings.policy not in subject.run.policies:
        known = ", ".join(subject.run.policies)
        raise RecipeError(f"the run has no policy '{settings.policy}'", "--on", f"samples:POLICY with one of {known}")
    return tokenizer, shift_rows.samples(subject.run, subject.recipe, tokenizer, settings, subject.source)


def _measured(
    subject: Subject,
    tokenizer: PreTrainedTokenizerBase,
    sequences: Sequences,
    settings: Settings,
    *,
    fresh: bool,
    progress: Progress,
) -> dict[str, Any]:
    """The content of shift.json, written where the subject says."""
    shelf = Shelf(subject.policies, getattr(torch, settings.dtype))
    known = {} if fresh else _known(subject, sequences, settings)
    if not known and subject.target is not None and subject.target.is_file():
        progress.say(f"{subject.target} holds another measurement, which this one replaces (--out keeps both)")
    measured, kept = [], 0
    vocab_size = None if settings.vocabulary == "head" else len(tokenizer)
    for a, b in subject.pairs:
        found = known.get((shelf.fingerprint(a), shelf.fingerprint(b))) if known else None
        kept += found is not None
        if found is None:
            with progress.bar(f"{subject.name}: {a} → {b}", len(sequences.rows)):
                found = measured_pair(
                    *shelf.pair(a, b),
                    sequences,
                    settings,
                    pad_id=tokenizer.pad_token_id,
                    vocab_size=vocab_size,
                    said=progress.update,
                )
        measured.append(found)
    if kept:
        progress.say(f"{subject.target}: {kept} of {len(measured)} transitions measured before, kept (--fresh: anew)")
    table: dict[str, Any] = {"problem": sequences.problems, "tokens": sequences.tokens}
    result = {
        "format": FORMAT,
        "options": settings.recorded(),
        "models": {p.name: {"name": p.model, "fingerprint": shelf.fingerprint(p.name)} for p in subject.policies},
        "data": sequences.report(),
        "vocab_size": measured[0]["vocab_size"],
        "width": measured[0]["width"],
        "transitions": [
            shift_summary.transition(pair, found, table, settings)
            for pair, found in zip(subject.pairs, measured, strict=True)
        ],
        "sequences": table | {"transitions": [found["means"] for found in measured]},
    }
    if subject.target is not None:
        subject.target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(subject.target, _as_text(result))
    return result


def measured_pair(
    a: LastStates,
    b: LastStates,
    sequences: Sequences,
    settings: Settings,
    *,
    pad_id: int,
    vocab_size: int | None = None,
    tokens: int = PASS_TOKENS,
    said: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Of one pass of both models over the sequences: `means`, each metric's mean within each sequence, [S] in their
    order; `l2_top_share`, of each layer what the 1 % of tokens with the largest L2 carry of its sum; `vocab_size` and
    `width`.

    Metrics are those of `ideas.shift.token_shift` and, for each layer, of `sequence_geometry`. One batch is of B·T ≤
    `tokens`. Raises RunError for models that cannot be compared, or whose numbers are not finite.
    """
    V = require_comparable(a, b, vocab_size)
    topk = [k for k in settings.topk if k <= V]
    if not topk:
        raise RecipeError(f"topk = {list(settings.topk)} of {V:,} tokens in the vocabulary", "command line", "lower it")
    found: list[dict[str, float]] = [{} for _ in sequences.rows]
    largest: dict[str, list[torch.Tensor]] = {layer: [] for layer in LAYERS}
    done = 0
    for picked, ids, mask, labels in padded(sequences.rows, pad_id=pad_id, tokens=tokens, device=a.head.device):
        views = a.view(ids, mask, labels), b.view(ids, mask, labels)
        targets = labels[:, 1:]
        chosen, counts = targets[targets != IGNORE], (targets != IGNORE).sum(-1).tolist()
        columns = token_shift(*views, chosen, temperature=settings.temperature, topk=topk, vocab_size=V)
        values = {name: [float(part.double().mean()) for part in x.cpu().split(counts)] for name, x in columns.items()}
        for layer in LAYERS:
            whole = sequence_geometry(getattr(views[0], layer), getattr(views[1], layer), counts)
            values |= {f"{name}_{layer}": x.tolist() for name, x in whole.items()}
            largest[layer].append(columns[f"l2_{layer}"].cpu())
        _require_finite(values, [sequences.problems[i] for i in picked], settings)
        for k, i in enumerate(picked):  # eight digits, which float32 does not have; shift.json is half as long
            found[i] = {name: float(f"{x[k]:.8g}") for name, x in values.items()}
        done += len(picked)
        said(done)
    return {
        "means": {name: [row[name] for row in found] for name in found[0]},
        "l2_top_share": {layer: top_share(torch.cat(x).double().numpy()) for layer, x in largest.items()},
        "vocab_size": V,
        "width": a.head.shape[1],
    }


def _require_finite(values: dict[str, list[float]], problems: list[str], settings: Settings) -> None:
    """Raises RunError where a metric of a sequence is not finite, which JSON does not hold and no mean survives."""
    for name, column in values.items():
        for problem, x in zip(problems, column, strict=True):
            if not math.isfinite(x):
                remedy = "the weights of one of the two are broken"
                if settings.dtype != "float32":
                    remedy = f"{settings.dtype} may overflow: dtype=float32"
                raise RunError(f"'{name}' is {x} of a sequence", f"problem {problem}", remedy)


def require_comparable(a: LastStates, b: LastStates, vocab_size: int | None = None) -> int:
    """The number of vocabulary rows that are compared: `vocab_size`, or all. Raises RunError where heads do not fit."""
    (rows_a, width_a), (rows_b, width_b) = a.head.shape, b.head.shape
    if width_a != width_b:
        raise RunError(
            f"hidden states of width {width_a:,} and {width_b:,} cannot be compared",
            "models",
            "give stages of one model",
        )
    if vocab_size is None and rows_a != rows_b:
        raise RunError(
            f"the heads have {rows_a:,} and {rows_b:,} rows",
            "models",
            "vocabulary=tokenizer compares the rows that the tokenizer has",
        )
    return min(rows_a, rows_b) if vocab_size is None else min(rows_a, rows_b, vocab_size)


def require_same_tokenizer(policies: Sequence[Policy]) -> PreTrainedTokenizerBase:
    """The tokenizer of the first policy. Raises RunError where another one reads or ends text differently."""
    first, *others = policies
    tokenizer = _tokenizer(first)
    for policy in others:
        other = _tokenizer(policy)
        same = (
            tokenizer.get_vocab() == other.get_vocab()
            and tokenizer.eos_token_id == other.eos_token_id
            and tokenizer(SAMPLE)["input_ids"] == other(SAMPLE)["input_ids"]
        )
        if not same:
            raise RunError(
                f"'{policy.name}' ({policy.model}) has another tokenizer than '{first.name}' ({first.model}): their "
                "distributions are not over the same tokens",
                "models",
                "compare stages of one model",
            )
    return tokenizer


class Shelf:
    """The models in memory, two at most, and the fingerprint of every one that has been there."""

    def __init__(self, policies: Sequence[Policy], dtype: torch.dtype):
        self.policies, self.dtype = {p.name: p for p in policies}, dtype
        self.held: dict[str, LastStates] = {}
        self.fingerprints: dict[str, str] = {}

    def pair(self, a: str, b: str) -> tuple[LastStates, LastStates]:
        """Both models; any other one makes room first."""
        self._make_room(keep=(a, b))
        return self._get(a), self._get(b)

    def fingerprint(self, name: str) -> str:
        """Of a model that was not there yet by loading it; another one makes room."""
        if name not in self.fingerprints:
            self._make_room(keep=tuple(self.held)[-1:])
            self._get(name)
        return self.fingerprints[name]

    def _make_room(self, keep: Sequence[str]) -> None:
        for name in [name for name in self.held if name not in keep]:
            del self.held[name]
            gc.collect()

    def _get(self, name: str) -> LastStates:
        if name not in self.held:
            policy = self.policies[name]
            if self.dtype == torch.float16 and name not in self.fingerprints:
                # Fingerprints are of bfloat16, which float16 does not hold; casting the module would cast its tables.
                self.fingerprints[name] = models.fingerprint(load_model(policy.model, torch.float32))
                gc.collect()
            model = load_model(policy.model, self.dtype)
            if name not in self.fingerprints:
                self.fingerprints[name] = models.fingerprint(model)
            if policy.check is not None:
                policy.check(self.fingerprints[name])
            self.held[name] = LastStates(model)
        return self.held[name]


def load_model(name: str, dtype: torch.dtype) -> Any:
    """The model of that name or folder; of an adapter's folder its base with the adapter on it, not merged."""
    base = _base_of_adapter(name)
    if base is None:
        return models.load_model(name, dtype)
    return models.load_adapter(models.load_model(base, dtype), Path(name).expanduser()).eval()


def _base_of_adapter(name: str) -> str | None:
    """The base that the adapter in a folder was trained on; None of a whole model."""
    file = Path(name).expanduser() / "adapter_config.json"
    if not file.is_file() or file.with_name("config.json").is_file():
        return None
    base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise RunError("the adapter does not name its base", str(file), "set base_model_name_or_path, or merge it")
    return str(base)


def _tokenizer(policy: Policy) -> PreTrainedTokenizerBase:
    base = _base_of_adapter(policy.model)
    own = base is None or (Path(policy.model).expanduser() / "tokenizer_config.json").is_file()
    return models.load_tokenizer(policy.model if own else str(base), policy.template)


def _require_writable(out: Path) -> None:
    """Raises RecipeError where a folder, or a file that is none of ours, would have to make room."""
    if out.is_dir():
        raise RecipeError("a folder, where a file is to be written", "--out", f"{out / FILE}")
    if out.is_file():
        try:
            found = json.loads(out.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if not isinstance(found, dict) or "format" not in found:
            raise RecipeError("the file holds no shift, and would be lost", str(out), "name another --out")


def _known(subject: Subject, sequences: Sequences, settings: Settings) -> dict[tuple[str, str], dict[str, Any]]:
    """What the subject's shift.json holds of these sequences under these settings: by the fingerprints of the two
    models, as `measured_pair` gives it."""
    if subject.target is None or not subject.target.is_file():
        return {}
    found = json.loads(subject.target.read_text(encoding="utf-8"))
    asked = {key: value for key, value in settings.recorded().items() if key not in ONLY_CHOOSE}
    if found.get("format") != FORMAT or "sequences" not in found:
        return {}
    same = all(found["options"].get(key) == value for key, value in asked.items())
    if not same or found["data"]["fingerprint"] != sequences.report()["fingerprint"]:
        return {}
    shared = {"vocab_size": found["vocab_size"], "width": found["width"]}
    prints = {name: model["fingerprint"] for name, model in found["models"].items()}
    return {
        (prints[t["from"]], prints[t["to"]]): {"means": means, "l2_top_share": t["l2_top_share"], **shared}
        for t, means in zip(found["transitions"], found["sequences"]["transitions"], strict=True)
    }


def _as_text(result: dict[str, Any]) -> str:
    """JSON, the numbers of each sequence on one line per metric."""
    head = json.dumps({key: value for key, value in result.items() if key != "sequences"}, indent=1, ensure_ascii=False)
    table = result["sequences"]
    lists = [f'  "{key}": {json.dumps(table[key])}' for key in ("problem", "tokens")]
    transitions = ",\n".join(
        "   {\n" + ",\n".join(f'    "{name}": {json.dumps(x)}' for name, x in means.items()) + "\n   }"
        for means in table["transitions"]
    )
    tail = ",\n".join([*lists, f'  "transitions": [\n{transitions}\n  ]'])
    return f'{head[:-2]},\n "sequences": {{\n{tail}\n }}\n}}\n'
