"""What β would do on some demonstrations, known before any training: the surprise profile.

Surprise is −log p_base of a demonstrated token, in nats. A profile is a plain dictionary, stored as surprise.json.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from heatbath.cache import EPSILON, NeededBy, token_columns
from heatbath.data.rendering import IGNORE, Rendered
from heatbath.ideas.gift import Gift, GiftSequence, LeftToBase
from heatbath.ideas.statistics import Objective, TokenStats
from heatbath.reference import PASS_TOKENS, FrozenBase, base_pass

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BETAS = (5.0, 10.0, 15.0, 20.0, 25.0)
HISTOGRAM_NATS = 40
LEFT_TO_BASE = 0.02  # the share of tokens for which the profile suggests a β
HARDLY, MUCH = 0.001, 0.05  # of the tokens; above the second the start may be neither base nor expert
WHOLE = 0.99  # of the demonstrations: below the first and above this GIFT is SFT in all but name
MOST_LEFT = 10  # tokens listed that are left to the base
MOST_SURPRISING = 10  # tokens shown, each after so many others:
CONTEXT = 16
EXAMPLES, EXAMPLE_TOKENS = 2, 300  # demonstrations shown token by token, twice as many; of each at most so many tokens
FLOOR = 1e-10  # below it a probability is none to the authors' code, which adds it inside the logarithm

Nats = np.ndarray[Any, np.dtype[np.float64]]


def surprises(
    base: FrozenBase,
    rows: Sequence[Rendered],
    *,
    pad_id: int,
    autocast: torch.dtype | None = None,
    tokens: int = PASS_TOKENS,
) -> list[Nats]:
    """−log p_base of every supervised token of each row, in nats."""
    out: list[Any] = [None] * len(rows)
    for number, _, logp in base_pass(base, rows, pad_id=pad_id, autocast=autocast, tokens=tokens):
        out[number] = -logp.double().numpy()
    return out


def resolve(objective: Objective, nats: Sequence[Nats], vocab_size: int) -> Objective:
    """The objective with β = {left_to_base = …} as a number: the β at which that share of the tokens keeps w < 0.5."""
    if not (isinstance(objective, Gift) and isinstance(objective.beta, LeftToBase)):
        return objective
    beta = beta_for(objective.beta.left_to_base, nats, dataclasses.replace(objective, beta=0.0), vocab_size)
    return dataclasses.replace(objective, beta=beta)


def beta_for(share: float, nats: Sequence[Nats], like: Gift, vocab_size: int) -> float:
    """The β ≥ 0 at which `share` of the tokens keeps w < 0.5, with the smoothing and floor of `like`.

    w < 0.5 where −logit p~ > β, so the share fixes β as a quantile of −logit p~.
    """
    lifted = -like.smoothed(_stats(nats, vocab_size)).numpy()
    minus_logit = lifted + np.log(-np.expm1(-np.maximum(lifted, 1e-12)))
    return max(0.0, float(np.quantile(minus_logit, 1 - share)))


def profile(
    rows: Sequence[Rendered],
    nats: Sequence[Nats],
    tokenizer: PreTrainedTokenizerBase,
    objective: Objective,
    *,
    vocab_size: int,
    kinds: Sequence[str] = (),
    betas: Sequence[float] = BETAS,
) -> dict[str, Any]:
    """The surprise histogram (1 nat per bin), shares of tokens by w at each β and under the run's own objective, the β
    for which a share `LEFT_TO_BASE` of the tokens keeps w < 0.5, the same by kind of row, the tokens that the objective
    leaves to the base (a schedule at its smallest β), the most surprising ones in context, and the first demonstrations
    token by token."""
    x = np.concatenate([*nats, np.zeros(0)])
    like = objective if isinstance(objective, Gift) else Gift(0.0)
    beta = like.beta if isinstance(objective, Gift) and isinstance(like.beta, float) else None
    counts, _ = np.histogram(np.minimum(x, HISTOGRAM_NATS - 1e-9), bins=HISTOGRAM_NATS, range=(0, HISTOGRAM_NATS))
    stats = _stats(nats, vocab_size)
    own = _own_masses(objective, rows, nats, vocab_size)

    def at(beta: float) -> dict[str, float]:
        made = dataclasses.replace(like, beta=beta)
        return {"beta": beta, **_shares(made.target_mass(stats), made.keep(stats), nats)}

    every = {*betas, *(() if beta is None else (beta,))}
    by_kind = sorted(set(kinds)) if len(set(kinds)) > 1 else []
    return {
        "beta": beta,
        "smoothing": like.smoothing,
        "floor": like.floor,
        "vocab_size": vocab_size,
        "tokens": int(x.size),
        "rows": len(rows),
        "mean": float(x.mean()),
        "quantiles": {str(q): float(np.quantile(x, q)) for q in (0.5, 0.9, 0.99, 0.999)},
        "max": float(x.max()),
        "below_floor": _below_floor(dataclasses.replace(like, floor=0.0), stats),
        "histogram": counts.tolist(),
        "betas": [at(b) for b in sorted(every)],
        "objective": None if own is None else _shares(*own, nats),
        "kinds": {k: _kind(k, kinds, nats, like, beta, vocab_size) for k in by_kind},
        "suggested_beta": beta_for(LEFT_TO_BASE, nats, like, vocab_size),
        "suggested_share": LEFT_TO_BASE,
        "left": [] if own is None else _left(rows, own[0], tokenizer),
        "most_surprising": _most_surprising(rows, nats, tokenizer),
        "examples": _examples(rows, nats, tokenizer, None if own is None else own[0]),
    }


def cache_bytes(
    rows: Sequence[Rendered],
    nats: Sequence[Nats],
    objective: Objective,
    *,
    vocab_size: int,
    width: int,
    item: int,
    epsilon: float = EPSILON,
) -> dict[str, int]:
    """Bytes that each reference cache would take for these rows, the head [V, d] not counted: `hidden`, and `surprise`
    where the objective allows it. `item` are the bytes of one number of a hidden state."""
    tokens = sum(len(n) for n in nats)
    scalars = 12 * tokens  # log p_base, and where its hidden state lies
    out = {"hidden": scalars + tokens * width * item}
    if hasattr(objective, "target_mass"):
        needed = NeededBy(objective, vocab_size, epsilon)
        held = 0
        for row, n in zip(rows, nats, strict=True):
            one = torch.zeros(len(n), dtype=torch.long)
            held += int(needed(torch.from_numpy(-n), token_columns(row), one).sum())
        out["surprise"] = scalars + held * width * item
        out["surprise_tokens"] = held
    return out


def describe(found: dict[str, Any]) -> str:
    """One or two lines a user reads before training starts."""
    text = f"surprise: mean {found['mean']:.2f} nats over {found['tokens']:,} tokens, 99 % below "
    text += f"{found['quantiles']['0.99']:.1f}, max {found['max']:.1f}"
    if found["beta"] is not None and not found["beta"]:
        return text + "\nβ = 0 is distillation from the base; the demonstrations only choose where"
    own = found["objective"]
    if own is None:
        return text
    name = "the target" if found["beta"] is None else f"β = {found['beta']:.4g}"
    text += f"\n{name} leaves {own['w_below_0.5']:.1%} of the tokens to the base (w < 0.5){reading(own)}"
    text += f".\nA sample of the target follows its demonstration to the end {own['whole']:.1%} of the time"
    return text + f". {left(found)}{found['suggested_share']:.0%} would be β = {found['suggested_beta']:.1f}"


def left(found: Mapping[str, Any]) -> str:
    """Which tokens the target leaves to the base, as a sentence; empty where it leaves hardly any."""
    own, most = found["objective"], found.get("left", [])[:3]  # a profile of an earlier version has none
    if not most or own["w_below_0.5"] < HARDLY:
        return ""
    told = ", ".join(f"{one['token']!r} ({one['left']:,} of its {one['of']:,} places)" for one in most)
    return f"Left to the base above all: {told}. "


def reading(shares: Mapping[str, float]) -> str:
    """What the share of tokens left to the base means for the start, as the tail of a sentence."""
    if shares["w_below_0.5"] < HARDLY and shares.get("whole", 1.0) > WHOLE:  # earlier profiles have no `whole`
        return "; GIFT can hardly differ from SFT on this data"
    if shares["w_below_0.5"] > MUCH:
        return f"; above about {MUCH:.0%} the start may be neither base nor expert"
    return ""


def _shares(w: Tensor, keep: Tensor, nats: Sequence[Nats]) -> dict[str, float]:
    """Of the tokens by w; `whole` is the mean of Π w, with which the target writes a demonstration to its end."""
    whole = [float(row.log().sum().exp()) for row in w.double().split([len(n) for n in nats])]
    return {
        "w_below_0.99": float((w < 0.99).double().mean()),
        "w_below_0.5": float((w < 0.5).double().mean()),
        "w_below_0.1": float((w < 0.1).double().mean()),
        "keep": float(keep.mean()),
        "whole": float(np.mean(whole)),
    }


def _below_floor(like: Gift, stats: TokenStats) -> float:
    """Share of tokens whose probability under the base, smoothed, is below `FLOOR`."""
    return float((like.smoothed(stats) < np.log(FLOOR)).double().mean())


def _own_masses(
    objective: Objective, rows: Sequence[Rendered], nats: Sequence[Nats], vocab_size: int
) -> tuple[Tensor, Tensor] | None:
    """w and keep of every token under the run's own objective, where it is one of the two GIFTs; of a schedule its
    smallest β."""
    if not isinstance(objective, Gift | GiftSequence):
        return None
    goal = objective.most_cautious() if isinstance(objective, Gift) else objective
    stats = _stats(nats, vocab_size)
    columns = [token_columns(row) for row in rows]
    stats.columns |= {name: torch.cat([c[name] for c in columns]) for name in (columns[0] if columns else ())}
    if isinstance(goal, Gift):
        return goal.target_mass(stats), goal.keep(stats)
    segments = torch.repeat_interleave(torch.arange(len(nats)), torch.tensor([len(n) for n in nats]))
    keep = stats.columns["sequence_weight"] = goal.sequence_weights(stats, segments)
    return goal.target_mass(stats), keep


def _kind(
    kind: str, kinds: Sequence[str], nats: Sequence[Nats], like: Gift, beta: float | None, vocab_size: int
) -> dict[str, float]:
    own = [n for n, k in zip(nats, kinds, strict=True) if k == kind]
    x = np.concatenate(own)
    out = {"rows": len(own), "tokens": int(x.size), "mean": float(x.mean()), "q99": float(np.quantile(x, 0.99))}
    if beta is not None:
        w = like.target_mass(_stats(own, vocab_size))
        out["w_below_0.5"] = float((w < 0.5).double().mean())
    return out


def _stats(nats: Sequence[Nats], vocab_size: int) -> TokenStats:
    return TokenStats(vocab_size=vocab_size, ref_logp=torch.from_numpy(-np.concatenate([*nats, np.zeros(0)])))


def _examples(
    rows: Sequence[Rendered], nats: Sequence[Nats], tokenizer: PreTrainedTokenizerBase, w: Tensor | None
) -> list[dict[str, Any]]:
    """The first demonstrations, and those that surprise most per token: the number of the row (from 1), and of each
    token its text, of a supervised one also its surprise in nats, and w where the objective has one. `begins` and
    `ends` say whether the row's beginning and end are shown."""
    means = [float(costs.mean()) if costs.size else 0.0 for costs in nats]
    surprising = sorted(range(len(means)), key=lambda i: (-means[i], i))
    picked = list(dict.fromkeys([*range(min(EXAMPLES, len(rows))), *surprising[:EXAMPLES]]))
    starts = np.concatenate([[0], np.cumsum([costs.size for costs in nats])]).astype(int)
    shown = []
    for r in picked:
        row, costs = rows[r], nats[r]
        mass = None if w is None else w[starts[r] : starts[r + 1]].tolist()
        supervised = [i for i, label in enumerate(row.labels) if i and label != IGNORE]
        number = {position: at for at, position in enumerate(supervised)}
        first = max(0, (supervised[0] if supervised else 0) - 2 * CONTEXT)
        last = min(first + EXAMPLE_TOKENS, len(row.input_ids))
        tokens: list[list[Any]] = []
        for position in range(first, last):
            text = _text(tokenizer, row.input_ids[position])
            at = number.get(position)
            token = [text] if at is None else [text, round(float(costs[at]), 2)]
            tokens.append(token if at is None or mass is None else [*token, round(mass[at], 3)])
        shown.append({"row": r + 1, "tokens": tokens, "begins": first == 0, "ends": last == len(row.input_ids)})
    return shown


def _left(rows: Sequence[Rendered], w: Tensor, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """The tokens with w < 0.5, each with the number of these and of all its places in the demonstrations: first those
    with most, weighed by their share of the places, so that what is left everywhere comes before what is frequent."""
    ids = [i for row in rows for i, label in zip(row.input_ids[1:], row.labels[1:], strict=True) if label != IGNORE]
    every, low = Counter(ids), Counter(i for i, mass in zip(ids, w.tolist(), strict=True) if mass < 0.5)
    most = sorted(low, key=lambda i: (-low[i] * low[i] / every[i], i))[:MOST_LEFT]
    texts = {i: _text(tokenizer, i) for i in most}
    alike = Counter(texts.values())
    return [
        {
            "token": texts[i] if alike[texts[i]] == 1 else str(tokenizer.convert_ids_to_tokens(i)),
            "left": low[i],
            "of": every[i],
        }
        for i in most
    ]


def _text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    text = tokenizer.decode([token])
    # a piece of a character: the tokenizer's own name for it says more
    return str(tokenizer.convert_ids_to_tokens(token)) if "\ufffd" in text else str(text)


def _most_surprising(
    rows: Sequence[Rendered], nats: Sequence[Nats], tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """The tokens that surprise most, each once with what stands before it."""
    x = np.concatenate([*nats, np.zeros(0)])
    starts = np.concatenate([[0], np.cumsum([len(n) for n in nats])])
    enough = min(50 * MOST_SURPRISING, len(x))
    largest = np.argpartition(-x, enough - 1)[:enough] if enough else np.zeros(0, dtype=int)
    listed: list[dict[str, Any]] = []
    seen = set()
    for at in sorted(largest.tolist(), key=lambda i: -x[i]):
        r = int(np.searchsorted(starts, at, side="right")) - 1
        supervised = [i for i, label in enumerate(rows[r].labels) if i and label != IGNORE]
        position = supervised[at - int(starts[r])]
        token = tokenizer.decode(rows[r].input_ids[position])
        before = tokenizer.decode(rows[r].input_ids[max(0, position - CONTEXT) : position])
        if (token, before[-4:]) not in seen:
            seen.add((token, before[-4:]))
            shown = {"before": before.replace("\n", "↵"), "token": token.replace("\n", "↵")}
            listed.append({"nats": float(x[at]), **shown})
        if len(listed) == MOST_SURPRISING:
            break
    return listed
