"""The wrapper that learns answers of the base beside an objective's demonstrations."""

import itertools

import pytest
import torch
from enumerable import conditionals, joined, random_base
from formulas import EXACT, Tokens, gradient, loss, same, tokens

from heatbath.ideas.gift import Gift, GiftSequence, Schedule
from heatbath.ideas.objectives import Psft, Sft
from heatbath.ideas.replay import DEMONSTRATION, Replayed, holds_the_base
from heatbath.ideas.statistics import TokenStats
from heatbath.stages.replay import _left


def half_replayed() -> tuple[Tokens, torch.Tensor]:
    """Tokens of which the first, the second and the last sequence are answers of the base, of weights 0, 0.5 and 2."""
    t = tokens()
    weight = torch.full((len(t.y),), DEMONSTRATION, dtype=torch.float64)
    weight[t.segments == 0], weight[t.segments == 1], weight[t.segments == t.segments.max()] = 0.0, 0.5, 2.0
    t.columns["replay"] = weight
    return t, weight


@pytest.mark.parametrize("goal", [Sft(), Gift(4.0), GiftSequence(0.3)])
def test_demonstrations_have_their_loss_and_answers_weighted_nll(goal) -> None:
    t, weight = half_replayed()
    whole = loss(Replayed(goal), t)
    expected = torch.where(weight >= 0, weight * -t.logp, loss(goal, t))
    same(whole, expected, t)
    assert gradient(whole, t)[weight > 0].abs().sum() > 0


def test_the_two_parts_are_the_cross_entropy_to_the_sequence_target() -> None:
    """Every answer listed: m·nll(y*) + (1 − m)·Σ_y p_base(y)·nll(y) = H((1 − m)·p_base + m·δ, π), for any policy."""
    m, base, expert = 0.3, random_base(3, 3, 1.5, torch.Generator().manual_seed(0)), (0, 2, 1)
    policy = random_base(3, 3, 1.5, torch.Generator().manual_seed(1))
    target = (1 - m) * base.exp()
    target[expert] += m
    answers = list(itertools.product(range(3), repeat=3))
    steps = conditionals(policy)

    def nll(y: tuple[int, ...]) -> torch.Tensor:
        return -torch.stack([c[y[: t + 1]] for t, c in enumerate(steps)])

    rows = [(expert, DEMONSTRATION), *((y, (1 - m) / m * float(base[y].exp())) for y in answers)]
    parts = [
        Replayed(Sft())(TokenStats(logp=-nll(y), columns={"replay": torch.full((3,), w, dtype=torch.float64)}))
        for y, w in rows
    ]
    assert float(m * torch.cat(parts).sum()) == pytest.approx(float((target * -joined(steps)).sum()), rel=1e-12)


def test_it_has_what_its_objective_has_and_nothing_else() -> None:
    plain, moving = Replayed(Sft()), Replayed(Gift(Schedule(20.0, 5.0, 10)))
    assert not any(hasattr(plain, name) for name in ("at", "target_mass", "sequence_weights", "diagnostics", "refresh"))
    assert plain.needs == ("logp",) and plain.columns == ("replay",)
    assert moving.at(10) == Replayed(Gift(5.0)) == moving.most_cautious()
    assert set(Replayed(Gift(3.0)).needs) == {"logp", "ref_ce", "ref_logp"}
    old = Replayed(Psft(refresh=7))
    assert old.refresh == 7 and set(old.columns) == {*Psft(refresh=7).columns, "replay"}
    with pytest.raises(AttributeError, match="nonsense"):
        _ = plain.nonsense


def test_answers_of_the_base_need_no_base() -> None:
    """Their target lies on the token, so that a surprise cache keeps no hidden state of them."""
    t, weight = half_replayed()
    stats = TokenStats(vocab_size=t.z.shape[-1], ref_logp=t.ref_logp, columns=t.columns)
    mass = Replayed(Gift(4.0)).target_mass(stats)
    assert (mass[weight >= 0] == 1).all()
    torch.testing.assert_close(mass[weight < 0], Gift(4.0).target_mass(stats)[weight < 0], **EXACT)


def test_after_leaving_the_demonstration_the_exact_target_is_where_nothing_pulls() -> None:
    """gift_sequence on the demonstration, and every answer of the base from where its beginning is none of the
    demonstration's: at the exact target's conditionals the sum has no gradient. With whole answers it has."""
    m, base, expert = 0.3, random_base(3, 3, 1.5, torch.Generator().manual_seed(0)), (0, 2, 1)
    target = ((1 - m) * base.exp()).clone()
    target[expert] += m
    own, answers = conditionals(base), list(itertools.product(range(3), repeat=3))

    def pull(whole: bool) -> float:
        z = [c.clone().requires_grad_() for c in conditionals(target.log())]
        logp = [c.log_softmax(-1) for c in z]
        total = torch.zeros((), dtype=torch.float64)
        for y in [None, *answers]:
            row = expert if y is None else y
            weight = DEMONSTRATION if y is None else float(base[y].exp())
            first = 0 if whole or y is None else _left(y, [expert])
            stats = TokenStats(
                vocab_size=3,
                logp=torch.stack([c[row[: t + 1]] for t, c in enumerate(logp)]),
                ref_logp=torch.stack([c[row[: t + 1]] for t, c in enumerate(own)]),
                ref_ce=torch.stack([-(own[t][row[:t]].exp() * logp[t][row[:t]]).sum() for t in range(3)]),
                columns={"replay": torch.full((3,), weight, dtype=torch.float64)},
            )
            goal = Replayed(GiftSequence(m))
            stats.columns["sequence_weight"] = goal.sequence_weights(stats, torch.zeros(3, dtype=torch.long))
            total = total + goal(stats)[first:].sum()
        return max(float(g.abs().max()) for g in torch.autograd.grad(total, z))

    assert pull(whole=False) < 1e-12 < 0.01 < pull(whole=True)


def test_where_an_answer_leaves_its_demonstrations() -> None:
    demos = [(1, 2, 3, 9), (1, 5, 9)]
    assert _left((4, 4), demos) == 1, "at once: its first token is still chosen after the demonstration's beginning"
    assert _left((1, 5, 7, 7), demos) == 3 and _left((1, 2, 3, 9), demos) == 5 and _left((1, 2), demos) == 3
    assert [holds_the_base(goal) for goal in (Sft(), Gift(3.0), GiftSequence(0.5), Psft())] == [
        False,
        True,
        True,
        False,
    ]
