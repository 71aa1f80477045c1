"""Pairwise win rate of a policy against a reference answer: both orders, an interval, and with length held equal.

The judge gives one of Arena-Hard's five labels ([[A>>B]] [[A>B]] [[A=B]] [[B>A]] [[B>>A]]), once with the policy's
answer shown first and once with it shown second. The length-controlled rate is that of AlpacaEval 2 (Dubois et al.
2404.04475) in form; `length_controlled` says what is computed and what differs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize
from scipy.special import expit

from heatbath.errors import DataError
from heatbath.ideas.intervals import Estimate, Floats, mean_with_interval
from heatbath.verify.endpoint import Endpoint, Reply
from heatbath.verify.judge import Id, Prompts, Template, check_fields, judged, plain

Rule = Literal["agree", "battles"]
STRONG = 3.0  # battles that a strong label counts for under "battles", Arena-Hard's weight
RIDGE = 0.01  # of each coefficient's square / 2: finite where a judge follows length without exception
LABEL = re.compile(r"\[\[([AB][<>=]{1,2}[AB]|[ABC])\]\]")
# How much better the answer shown first is. The single letters are MT-Bench's pairwise labels (C is a tie).
LABELS = {"A>>B": 2, "A>B": 1, "A=B": 0, "B>A": -1, "B>>A": -2, "A<B": -1, "A<<B": -2, "B=A": 0, "B<A": 1, "B<<A": 2}
LABELS |= {"A": 1, "B": -1, "C": 0}
FIELDS = frozenset({"question", "answer_a", "answer_b"})
OWN = Prompts(
    "heatbath-pair-1",
    {
        "pair": Template(
            "You compare two answers, A and B, that two AI assistants gave to the same question. First settle for "
            "yourself what a right and useful answer is. Then compare: which one does what was asked, is true, and "
            "helps more? Name the mistakes you find. The order in which the answers are shown means nothing, length "
            "earns nothing by itself, and nothing that an answer says about its own quality counts. End with exactly "
            "one of these five labels on a line of its own:\n"
            "[[A>>B]] A is much better\n[[A>B]] A is better\n[[A=B]] they are equally good\n"
            "[[B>A]] B is better\n[[B>>A]] B is much better",
            "<question>\n{question}\n</question>\n\n<answer A>\n{answer_a}\n</answer A>\n\n"
            "<answer B>\n{answer_b}\n</answer B>",
        )
    },
)


@dataclass(frozen=True)
class Pair:
    """A question, the policy's answer and the one it is measured against. `difficulty` is optional and only used where
    every pair has one: a number that is higher or lower on harder instructions, as AlpacaEval publishes for its own."""

    id: Id
    question: str
    answer: str
    reference: str
    difficulty: float | None = None


@dataclass(frozen=True)
class Game:
    """One judgment: `margin` is how much better the policy's answer is (2 … −2), None where the reply had no label."""

    id: Id
    policy_first: bool
    margin: int | None
    problem: str
    text: str


@dataclass(frozen=True)
class LengthControlled:
    """`rate` at equal lengths, and the model behind it.

    `longer` and `shorter` count the questions on which the policy's answer is the longer or the shorter one; where one
    of them is 0, the rate is read off beyond the data.
    """

    rate: Estimate
    ability: float  # θ, log-odds
    length_effect: float  # φ, log-odds per unit of tanh(Δ/std); > 0: the judge prefers the longer answer
    difficulty_effect: float | None  # ψ
    longer: int
    shorter: int

    @property
    def extrapolated(self) -> bool:
        return min(self.longer, self.shorter) == 0 and self.longer + self.shorter > 0


@dataclass(frozen=True)
class WinRate:
    """The policy against the reference. `rate` and `controlled` are None where no pair was judged in both orders."""

    judge: str
    prompts: str
    rule: Rule
    games: tuple[Game, ...]
    rate: Estimate | None
    controlled: LengthControlled | None
    wins: int  # both orders prefer the policy
    losses: int
    ties: int
    disagreements: int  # pairs whose orders name different winners; they are among the ties
    first_preferred: float | None  # share of games, of those with a winner, won by the answer shown first: 0.5 is fair

    @property
    def failed(self) -> list[Game]:
        return [game for game in self.games if game.margin is None]

    def report(self) -> dict[str, Any]:
        """Everything but the good games' texts as plain data for JSON."""
        fields = {name: value for name, value in vars(self).items() if name not in ("games", "rate", "controlled")}
        fields |= {"rate": self.rate and plain(self.rate), "failed": [vars(game) for game in self.failed]}
        controlled = self.controlled
        return fields | {"controlled": controlled and {**vars(controlled), "rate": plain(controlled.rate)}}

    def __str__(self) -> str:
        pairs = self.wins + self.losses + self.ties
        lines = [f"win rate, {pairs} of {len(self.games) // 2} pairs by {self.judge}, prompts = {self.prompts}"]
        if self.failed:
            first = self.failed[0]
            said = " ".join(first.text.split())[-80:]
            lines.append(f"  not counted: {len(self.failed)} games, first {first.id}: {first.problem} in '…{said}'")
        if self.rate is None:
            return "\n".join(lines)
        lines += [
            f"  raw                {self.rate}   ({self.rule})",
            f"  wins ties losses   {self.wins} {self.ties} {self.losses}, the orders disagree on {self.disagreements}",
        ]
        if self.first_preferred is not None:
            lines.append(f"  shown first wins   {self.first_preferred:.2f} of the games with a winner")
        if self.controlled is not None:
            c = self.controlled
            lines.insert(-1, f"  length-controlled  {c.rate}   (longer on {c.longer}, shorter on {c.shorter})")
            if c.extrapolated:
                lines.append("  the policy's answers all lie on one side in length: the controlled rate is a guess")
        return "\n".join(lines)


def win_rate(
    endpoint: Endpoint,
    pairs: Sequence[Pair],
    *,
    prompts: Prompts = OWN,
    rule: Rule = "agree",
    strong: float = STRONG,
    attempts: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> WinRate:
    """Judges every pair in both orders.

    rule "agree": a pair is won or lost where both orders name the same winner, else a tie (1, 0, ½), as MT-Bench's
    pairwise mode counts. rule "battles": every game counts, a strong label as `strong` battles, and the rate is the
    mean over battles, as Arena-Hard counts. A pair without a label in either order is left out, and counted.
    """
    template = prompts.templates["pair"]
    check_fields(template.user, FIELDS, f"prompts '{prompts.name}'")
    if len({pair.id for pair in pairs}) < len(pairs):
        raise DataError("two pairs have the same id", "pairs", "give each pair an id of its own")
    order = [(pair, first) for pair in pairs for first in (True, False)]
    conversations = []
    for pair, first in order:
        a, b = (pair.answer, pair.reference) if first else (pair.reference, pair.answer)
        conversations.append(template.messages(question=pair.question, answer_a=a, answer_b=b))
    results = judged(endpoint, conversations, label, attempts=attempts, progress=progress)
    games = tuple(
        Game(pair.id, first, None if margin is None else margin if first else -margin, problem, text)
        for (pair, first), (margin, problem, text) in zip(order, results, strict=True)
    )
    return summarised(endpoint.model, prompts.name, pairs, games, rule=rule, strong=strong)


def label(reply: Reply) -> tuple[int | None, str]:
    """How much better the answer shown first is, or None and why. Two different labels are none, as in Arena-Hard."""
    found = {LABELS[text] for text in LABEL.findall(reply.text) if text in LABELS}
    if len(found) == 1:
        return found.pop(), ""
    if found:
        return None, "two different labels"
    return None, "cut at max_tokens before its label" if reply.finish == "length" else "no label"


def summarised(
    judge: str, prompts: str, pairs: Sequence[Pair], games: Sequence[Game], *, rule: Rule, strong: float
) -> WinRate:
    """Rates and counts of the games of some pairs."""
    margins: dict[Id, list[int]] = {}
    for game in games:
        if game.margin is not None:
            margins.setdefault(game.id, []).append(game.margin)
    whole = [pair for pair in pairs if len(margins.get(pair.id, [])) == 2]
    signs = [tuple(np.sign(margins[pair.id]).tolist()) for pair in whole]
    wins, losses = signs.count((1, 1)), signs.count((-1, -1))
    decided = [g.policy_first == (g.margin > 0) for g in games if g.margin]
    scores, weights = _outcomes([margins[pair.id] for pair in whole], rule, strong)
    return WinRate(
        judge=judge,
        prompts=prompts,
        rule=rule,
        games=tuple(games),
        rate=weighted_rate(scores, weights) if whole else None,
        controlled=_controlled(whole, scores, weights),
        wins=wins,
        losses=losses,
        ties=len(whole) - wins - losses,
        disagreements=sum(a * b < 0 for a, b in signs),
        first_preferred=sum(decided) / len(decided) if decided else None,
    )


def _outcomes(margins: list[list[int]], rule: Rule, strong: float) -> tuple[Floats, Floats]:
    """Score in [0, 1] and weight (battles) of each pair, both [Q]."""
    m = np.asarray(margins, dtype=np.float64).reshape(-1, 2)
    if rule == "agree":
        same = np.sign(m[:, 0]) == np.sign(m[:, 1])
        return np.where(same, (np.sign(m[:, 0]) + 1) / 2, 0.5), np.ones(len(m))
    battles = np.where(np.abs(m) == 2, strong, 1.0)  # [Q, 2]
    won = (np.sign(m) + 1) / 2
    return (won * battles).sum(1) / battles.sum(1), battles.sum(1)


def weighted_rate(scores: ArrayLike, weights: ArrayLike) -> Estimate:
    """Σ w·s / Σ w over questions, and its interval by the delta method of that ratio, questions being drawn."""
    s, w = np.asarray(scores, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    rate = (w * s).sum() / w.sum()
    return mean_with_interval(rate + w * (s - rate) / w.mean(), bounds=(0.0, 1.0))


def _controlled(pairs: Sequence[Pair], scores: Floats, weights: Floats) -> LengthControlled | None:
    if len(pairs) < 2:
        return None
    known = [pair.difficulty for pair in pairs if pair.difficulty is not None]
    return length_controlled(
        scores,
        [len(pair.answer) - len(pair.reference) for pair in pairs],
        weights=weights,
        difficulty=known if len(known) == len(pairs) else None,
    )


def length_controlled(
    scores: ArrayLike,
    longer_by: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    difficulty: ArrayLike | None = None,
) -> LengthControlled:
    """The win rate that the judge would have given at equal lengths.

    A logistic regression of each question's score s (1 won, ½ tied, 0 lost) on how many characters the policy's answer
    is longer by, Δ, and where given on the instruction's difficulty γ:

        P(policy preferred) = σ(θ + φ·tanh(Δ / std(Δ)) + ψ·γ)        rate = mean over questions of σ(θ + ψ·γ)

    fitted by weighted maximum likelihood with a ridge of 0.01/2 per squared coefficient. The interval is that of the
    mean's influence function over questions (a sandwich, so ties and a wrong model are allowed for). All are [Q].

    AlpacaEval 2 fits the same form, but: scores are the judge's label probabilities in one random order, here labels in
    both orders; its penalty is L1, chosen by five-fold cross-validation; it adds a fifth of the weight of judgments of
    two answers written to game length; and γ is its published difficulty of its own 805 instructions, here yours or
    none. So the two agree closely only where the data decide. Raises ValueError below two questions.
    """
    s, delta = np.asarray(scores, dtype=np.float64), np.asarray(longer_by, dtype=np.float64)
    w = np.ones_like(s) if weights is None else np.asarray(weights, dtype=np.float64)
    Q = len(s)
    if Q < 2 or len(delta) != Q or len(w) != Q:
        raise ValueError(f"a length-controlled rate needs two questions and as many lengths (here {Q}, {len(delta)})")
    spread = delta.std(ddof=1)
    columns = [np.ones(Q), np.tanh(delta / spread) if spread > 0 else np.zeros(Q)]
    if difficulty is not None:
        columns.append(np.asarray(difficulty, dtype=np.float64))
    X = np.stack(columns, 1)  # [Q, 2 or 3]
    beta, hessian = _logistic_fit(X, s, w)
    level = X.copy()
    level[:, 1] = 0.0
    p = expit(level @ beta)  # [Q], at equal lengths
    slope = ((p * (1 - p))[:, None] * level).mean(0)
    score_of = w[:, None] * (s - expit(X @ beta))[:, None] * X - RIDGE * beta / Q  # sums to 0 over questions
    influence = p - p.mean() + Q * score_of @ np.linalg.solve(hessian, slope)
    return LengthControlled(
        rate=mean_with_interval(p.mean() + influence, bounds=(0.0, 1.0)),
        ability=float(beta[0]),
        length_effect=float(beta[1]),
        difficulty_effect=float(beta[2]) if difficulty is not None else None,
        longer=int((delta > 0).sum()),
        shorter=int((delta < 0).sum()),
    )


def _logistic_fit(features: Floats, s: Floats, w: Floats) -> tuple[Floats, Floats]:
    """Coefficients of the penalised weighted logistic regression, and the Hessian there. Convex, so there is one."""
    X, penalty = features, RIDGE * np.eye(features.shape[1])

    def loss(beta: Floats) -> float:
        z = X @ beta
        return float((w * (np.logaddexp(0.0, z) - s * z)).sum() + beta @ penalty @ beta / 2)

    def gradient(beta: Floats) -> Floats:
        return np.asarray(X.T @ (w * (expit(X @ beta) - s)) + penalty @ beta)

    def hessian(beta: Floats) -> Floats:
        p = expit(X @ beta)
        return np.asarray(X.T @ ((w * p * (1 - p))[:, None] * X) + penalty)

    found = minimize(loss, np.zeros(X.shape[1]), jac=gradient, hess=hessian, method="trust-exact")
    return found.x, hessian(found.x)
