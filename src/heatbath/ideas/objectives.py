"""Every SFT objective but the two GIFTs (`gift.py`), as its authors define it: a few lines over per-token statistics.

An objective names the statistics it `needs`; the engine (`engine.py`) computes just those and turns the objective's
derivatives in them into the gradient of the logits. An objective never reduces, never sees [N, V], never knows about
chunks, ranks or trainers. π policy, p base, y the demonstrated token, nll −log π(y), sg(·) without gradient.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from heatbath.ideas.gift import Gift, GiftSequence
from heatbath.ideas.importing import module_of
from heatbath.ideas.statistics import Objective, TokenStats, discounted_sum

Direction = Literal["forward", "reverse"]


@dataclass(frozen=True)
class Sft:
    """nll: the zero-temperature limit (β → ∞) of GIFT."""

    needs: ClassVar[tuple[str, ...]] = ("logp",)

    def __call__(self, stats: TokenStats) -> Tensor:
        return -stats.logp


@dataclass(frozen=True)
class Entropy:
    """nll − c·H(π), entropy of the whole vocabulary, with its gradient (arXiv 2601.09233, appendix E: c = 0.01).

    The paper gives the coefficient only; that both terms share one token mean is our reading.
    """

    coefficient: float = 0.01
    needs: ClassVar[tuple[str, ...]] = ("logp", "entropy")

    def __call__(self, stats: TokenStats) -> Tensor:
        return -stats.logp - self.coefficient * stats.entropy


@dataclass(frozen=True)
class LabelSmoothing:
    """(1 − ε)·nll + ε·H(uniform, π), y included in the uniform part: `F.cross_entropy(label_smoothing=ε)`.

    V is the width of the logits, padding rows of the embedding included, as in torch and transformers. ε = 0.01 is that
    of arXiv 2601.09233, appendix E.
    """

    epsilon: float = 0.01
    needs: ClassVar[tuple[str, ...]] = ("logp", "mean_logp")

    def __post_init__(self) -> None:
        _require_share("epsilon", self.epsilon)

    def __call__(self, stats: TokenStats) -> Tensor:
        return (1 - self.epsilon) * -stats.logp - self.epsilon * stats.mean_logp


@dataclass(frozen=True)
class Kd:
    """SFT with distillation from the base, temperature 1 (arXiv 2601.09233, appendix E: α = 0.1).

    form "convex": (1 − α)·nll + α·KL, "additive": nll + α·KL; direction "forward": KL(p‖π), "reverse": KL(π‖p). It is
    the KL itself, not the cross-entropy. The paper states neither form nor direction; these defaults are our reading.
    """

    alpha: float = 0.1
    direction: Direction = "forward"
    form: Literal["convex", "additive"] = "convex"

    def __post_init__(self) -> None:
        if self.form == "convex" and not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1] in the convex form, not {self.alpha}")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("logp", *_kl_needs(self.direction))

    def __call__(self, stats: TokenStats) -> Tensor:
        share = 1 - self.alpha if self.form == "convex" else 1.0
        return share * -stats.logp + self.alpha * _kl(stats, self.direction)


@dataclass(frozen=True)
class Dft:
    """sg(π(y))·nll, Dynamic Fine-Tuning (arXiv 2508.05629); its gradient is that of 1 − π(y)."""

    needs: ClassVar[tuple[str, ...]] = ("logp",)

    def __call__(self, stats: TokenStats) -> Tensor:
        return stats.logp.detach().exp() * -stats.logp


@dataclass(frozen=True)
class Asft:
    """DFT + weight·KL, Anchored SFT (arXiv 2509.23753), over the whole vocabulary.

    The paper writes the reverse KL(π‖p), its code and LLaMA-Factory compute the forward KL(p‖π); forward reproduces
    published numbers. The weight is 0.05 in the README's command, 0.1 the code's default, 0.03 the later advice.
    """

    weight: float = 0.05
    direction: Direction = "forward"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("logp", *_kl_needs(self.direction))

    def __call__(self, stats: TokenStats) -> Tensor:
        return stats.logp.detach().exp() * -stats.logp + self.weight * _kl(stats, self.direction)


@dataclass(frozen=True)
class Psft:
    """−min(r, clip(r, 1 − low, 1 + high)), r = π(y) / π_old(y): Proximal SFT (arXiv 2508.17784), PPO's clip, A = 1.

    The old policy is a copy of the weights, taken anew every `refresh` optimizer steps (the authors' 8); its log-
    probability of y is the column `old_logp`. The log-ratio is held in ±20 as in their code, `low` never binds at
    A = 1, and a step right after a refresh has SFT's gradient. Their dataset adds no EOS; ours is supervised.
    """

    low: float = 0.2
    high: float = 0.28
    refresh: int = 8
    needs: ClassVar[tuple[str, ...]] = ("logp",)
    columns: ClassVar[tuple[str, ...]] = ("old_logp",)

    def __post_init__(self) -> None:
        if not (0 < self.low < 1 and self.high > 0 and self.refresh >= 1):
            raise ValueError(f"low must lie in (0, 1), high be > 0 and refresh ≥ 1, not {self}")

    def __call__(self, stats: TokenStats) -> Tensor:
        ratio = (stats.logp - stats.old_logp.detach()).clamp(-20, 20).exp()
        return -torch.minimum(ratio, ratio.clamp(1 - self.low, 1 + self.high))

    def diagnostics(self, stats: TokenStats) -> dict[str, Tensor]:
        ratio = (stats.logp.detach() - stats.old_logp).clamp(-20, 20).exp()
        return {"ratio": ratio, "clip_share": (ratio > 1 + self.high).to(ratio.dtype)}


@dataclass(frozen=True)
class IwSft:
    """sg(w)·nll with the importance weight of the whole sequence, w = clip(exp(τ·mean_t log(π/p)), 0, `cap`): iw-SFT
    (arXiv 2507.12856; τ = 1 in the authors' runs, 2 their code's default).

    The ratio is to the base, so training begins as SFT. level "token" is their other form: clip(π/p, 0.2, 1.8) of each.
    """

    tau: float = 1.0
    cap: float = 16.0
    level: Literal["sequence", "token"] = "sequence"
    sequence_needs: ClassVar[tuple[str, ...]] = ("logp", "ref_logp")
    needs: ClassVar[tuple[str, ...]] = ("logp",)

    def sequence_weights(self, stats: TokenStats, segments: Tensor) -> Tensor:
        ratio = stats.logp - stats.ref_logp
        if self.level == "token":
            return ratio.exp().clamp(0.2, 1.8)
        _, sequence, tokens = torch.unique(segments, return_inverse=True, return_counts=True)
        mean = torch.zeros_like(tokens, dtype=ratio.dtype).index_add_(0, sequence, ratio) / tokens
        weights: Tensor = (self.tau * mean).exp().clamp(0, self.cap)[sequence]
        return weights

    def __call__(self, stats: TokenStats) -> Tensor:
        return stats.sequence_weight * -stats.logp

    def diagnostics(self, stats: TokenStats) -> dict[str, Tensor]:
        return {"sequence_weight": stats.sequence_weight}


@dataclass(frozen=True)
class Eaft:
    """sg((H_k / 3)^α)·nll, H_k the entropy of the policy's 20 likeliest tokens renormalised (at most ln 20 ≈ 3):
    entropy-adaptive fine-tuning (arXiv 2601.02151, as in LLaMA-Factory; axolotl leaves out the division by 3)."""

    alpha: float = 1.0
    topk: int = 20
    scale: float = 3.0
    needs: ClassVar[tuple[str, ...]] = ("logp", "topk_entropy")

    def __post_init__(self) -> None:
        if self.topk < 2 or self.scale <= 0:
            raise ValueError(f"topk must be ≥ 2 and scale > 0, not {self.topk} and {self.scale}")

    def __call__(self, stats: TokenStats) -> Tensor:
        return (stats.topk_entropy / self.scale) ** self.alpha * -stats.logp


@dataclass(frozen=True)
class Power:
    """(1 − π(y)^a) / a (arXiv 2510.00526): a → 0 is SFT, a = 1 is 1 − π(y); nothing is detached."""

    a: float
    needs: ClassVar[tuple[str, ...]] = ("logp",)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.a) and self.a > 0):
            raise ValueError(f"a must be a finite number > 0, not {self.a}")

    def __call__(self, stats: TokenStats) -> Tensor:
        return -torch.expm1(self.a * stats.logp) / self.a


@dataclass(frozen=True)
class ChordPhi:
    """sg(π(y)·(1 − π(y)))·nll: the token weight φ of CHORD (arXiv 2508.11408), without their mixture with RL."""

    needs: ClassVar[tuple[str, ...]] = ("logp",)

    def __call__(self, stats: TokenStats) -> Tensor:
        p = stats.logp.detach().exp()
        return p * -torch.expm1(stats.logp.detach()) * -stats.logp


@dataclass(frozen=True)
class Idft:
    """sg(π(y)^γ)·nll, γ = 1 + λ·(clip(exp(−(log π(y) + H(π)) / τ), 0.1, 2) − 1): IDFT, or distribution-discriminant
    training (arXiv 2602.12222; π(y) at least 1e-10 as in their code). λ = 0 is DFT; their warm-up of λ is left out
    (its ratio is 0 in their script)."""

    strength: float = 1.0
    temperature: float = 1.0
    needs: ClassVar[tuple[str, ...]] = ("logp", "entropy")

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0, not {self.temperature}")

    def __call__(self, stats: TokenStats) -> Tensor:
        logp = stats.logp.detach()
        gamma = (-(logp + stats.entropy.detach()) / self.temperature).exp().clamp(0.1, 2.0)
        gamma = 1 + self.strength * (gamma - 1)
        return (gamma * logp.clamp_min(math.log(1e-10))).exp() * -stats.logp


@dataclass(frozen=True)
class Sed:
    """nll + weight·M·(π(y) − ½)², M = 1 where the policy's `topk` likeliest tokens hold less than `threshold`: SED-SFT
    (arXiv 2602.07464), which keeps tokens undecided where the base is.

    Without a `threshold` it is estimated once on the base before training: of the top-k masses of the demonstrations in
    order, the one at −int(ratio·N). Departures: the authors' code takes 100 validation rows for it (the sft stage the
    first 512 demonstrations), and k = 10 for the threshold but, where none is given, k = 2 in the loss; here both are
    `topk`.
    """

    weight: float = 1.0
    topk: int = 10
    ratio: float = 0.7
    threshold: float | None = None
    needs: ClassVar[tuple[str, ...]] = ("logp", "topk_mass")

    def __post_init__(self) -> None:
        _require_share("ratio", self.ratio)
        if self.topk < 1:
            raise ValueError(f"topk must be ≥ 1, not {self.topk}")

    def calibrate(self, stats: TokenStats) -> dict[str, float]:
        """The threshold, from the statistics of the base as the policy; nothing where the recipe gives one."""
        if self.threshold is not None:
            return {}
        masses = stats.topk_mass.sort().values
        return {"threshold": float(masses[-max(1, int(self.ratio * len(masses)))])}

    def __call__(self, stats: TokenStats) -> Tensor:
        if self.threshold is None:
            raise ValueError("sed has no threshold yet: give one, or take sed.calibrate(statistics of the base)")
        undecided = (stats.topk_mass < self.threshold).to(stats.logp.dtype)
        return -stats.logp + self.weight * undecided * (stats.logp.exp() - 0.5) ** 2

    def diagnostics(self, stats: TokenStats) -> dict[str, Tensor]:
        return {"undecided_share": (stats.topk_mass < (self.threshold or 0.0)).to(stats.logp.dtype)}


@dataclass(frozen=True)
class Pear:
    """sg(G)·nll, G_t = γ^{T−t}·exp(Σ_{j>t} δ_j), δ = log π(y) − log π_generator(y) held in [low, high], log G in
    [−10, 5]: PEAR (arXiv 2602.01058; the authors have published no code; formula from summaries of the paper).

    The column `generator_logp` holds the log-probabilities of whoever wrote the demonstrations. The last token of a
    sequence has weight 1.
    """

    gamma: float = 0.999
    low: float = -0.08
    high: float = 0.3
    needs: ClassVar[tuple[str, ...]] = ("logp",)
    columns: ClassVar[tuple[str, ...]] = ("generator_logp",)
    sequence_needs: ClassVar[tuple[str, ...]] = ("logp",)

    def __post_init__(self) -> None:
        if not (0 < self.gamma <= 1 and self.low < self.high):
            raise ValueError(f"gamma must lie in (0, 1] and low be below high, not {self}")

    def sequence_weights(self, stats: TokenStats, segments: Tensor) -> Tensor:
        step = (stats.logp - stats.generator_logp).clamp(self.low, self.high).double() + math.log(self.gamma)
        after = discounted_sum(step.flip(0), segments.flip(0)).flip(0) - step  # strictly after t
        return after.clamp(-10, 5).exp().to(stats.logp.dtype)

    def __call__(self, stats: TokenStats) -> Tensor:
        return stats.sequence_weight * -stats.logp

    def diagnostics(self, stats: TokenStats) -> dict[str, Tensor]:
        return {"sequence_weight": stats.sequence_weight}


@dataclass(frozen=True)
class TrSft:
    """−π(y) / max(sg(π(y)), α): TrSFT of TRAPO (arXiv 2512.17636); SFT's gradient times min(1, π(y)/α).

    α → 0 is SFT's gradient, α ≥ 1 DFT's divided by α.
    """

    alpha: float = 0.1
    needs: ClassVar[tuple[str, ...]] = ("logp",)

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise ValueError(f"alpha must be > 0, not {self.alpha}")

    def __call__(self, stats: TokenStats) -> Tensor:
        # π / max(sg π, α) as exp of a difference: π alone underflows on tokens that α → 0 should still teach
        return -(stats.logp - stats.logp.detach().clamp_min(math.log(self.alpha))).exp()


@dataclass(frozen=True)
class Luffy:
    """−A·π(y) / (π(y) + γ): LUFFY's shaped term on expert tokens (arXiv 2504.14945), behaviour probability 1, no clip.

    A is the column `advantage` where there is one, else 1; gradient through the shape is A·γ·π/(π + γ)² of SFT's.
    """

    gamma: float = 0.1
    needs: ClassVar[tuple[str, ...]] = ("logp",)

    def __post_init__(self) -> None:
        if not self.gamma > 0:
            raise ValueError(f"gamma must be > 0, not {self.gamma}")

    def __call__(self, stats: TokenStats) -> Tensor:
        shaped = torch.sigmoid(stats.logp - math.log(self.gamma))  # π / (π + γ)
        return -stats.columns["advantage"] * shaped if "advantage" in stats.columns else -shaped


def _kl_needs(direction: Direction) -> tuple[str, ...]:
    return ("ref_ce", "ref_entropy") if direction == "forward" else ("rev_ce", "entropy")


def _kl(stats: TokenStats, direction: Direction) -> Tensor:
    """KL(p‖π) forward, KL(π‖p) reverse, over the whole vocabulary."""
    return stats.ref_ce - stats.ref_entropy if direction == "forward" else stats.rev_ce - stats.entropy


def _require_share(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name} must lie in [0, 1), not {value}")


OBJECTIVES: dict[str, type] = {
    "sft": Sft,
    "entropy": Entropy,
    "label_smoothing": LabelSmoothing,
    "kd": Kd,
    "dft": Dft,
    "asft": Asft,
    "psft": Psft,
    "gift": Gift,
    "gift_sequence": GiftSequence,
    "iw_sft": IwSft,
    "eaft": Eaft,
    "power": Power,
    "chord_phi": ChordPhi,
    "idft": Idft,
    "sed": Sed,
    "pear": Pear,
    "trsft": TrSft,
    "luffy": Luffy,
}


def objective(name: str, **hyper: Any) -> Objective:
    """The objective of that recipe name, e.g. `objective("gift", beta=10.0)`; or a user's own: "package.module:Class",
    or "file.py:Class".

    Raises ValueError on an unknown name, an unknown or missing hyper-parameter, or one out of range.
    """
    cls = _imported(name) if ":" in name else OBJECTIVES.get(name)
    if cls is None:
        raise ValueError(
            f"unknown objective '{name}'{suggestion(name, OBJECTIVES)}; known: {', '.join(OBJECTIVES)}; one of your "
            "own is 'file.py:Class'"
        )
    known = {f.name: f for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
    for key in hyper:
        if key not in known:
            takes = ", ".join(known) or "no hyper-parameters"
            raise ValueError(f"objective '{name}' has no '{key}'{suggestion(key, known)}; it takes {takes}")
    for key, f in known.items():
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and key not in hyper:
            raise ValueError(f"objective '{name}' needs '{key}'")
    types = get_type_hints(cls) if known else {}
    try:
        built = cls(**{key: typed(key, value, types[key]) for key, value in hyper.items()})
    except (ValueError, TypeError) as error:
        raise ValueError(f"objective '{name}': {error}") from None
    if not (isinstance(built, Objective) and isinstance(built.needs, tuple | list)):
        raise ValueError(f"'{name}' is no objective: it needs `needs`, a tuple of statistics, and `__call__(stats)`")
    return built


def typed(key: str, value: Any, wanted: Any) -> Any:
    """A hyper-parameter in the type its dataclass declares; what has no plain type checks itself."""
    if wanted is bool or isinstance(value, bool):
        if wanted is not bool or not isinstance(value, bool):
            raise ValueError(f"{key} must be {'true or false' if wanted is bool else 'a number'}, not {value!r}")
        return value
    if get_origin(wanted) is Literal:
        if value not in get_args(wanted):
            raise ValueError(f"{key} must be one of {', '.join(map(repr, get_args(wanted)))}, not {value!r}")
    elif wanted is int or wanted == int | None:
        if not isinstance(value, int):
            raise ValueError(f"{key} must be a whole number, not {value!r}")
    elif wanted is float or wanted == float | None:
        if not isinstance(value, int | float):
            raise ValueError(f"{key} must be a number, not {value!r}")
        if not math.isfinite(value):
            raise ValueError(f"{key} must be a finite number, not {value!r}")
        return float(value)
    return value


def _imported(name: str) -> type:
    """The class at "package.module:Class" or "file.py:Class". Raises ValueError where there is none."""
    module_name, _, attribute = name.rpartition(":")
    try:
        module = module_of(module_name)
    except Exception as error:  # noqa: BLE001 - whatever a user's own file raises while it is read
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"cannot import '{module_name}' of the objective '{name}': {what}") from None
    found = getattr(module, attribute, None)
    if not isinstance(found, type):
        raise ValueError(f"'{module_name}' has no class '{attribute}'")
    return found


def suggestion(word: str, known: Mapping[str, object]) -> str:
    """', did you mean 'x'?' for the nearest known word, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f", did you mean '{near[0]}'?" if near else ""
