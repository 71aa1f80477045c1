"""Each objective against its formula over full logits, against other libraries, and at its limits; all in float64."""

import math
from collections import defaultdict
from types import SimpleNamespace
from unittest.mock import MagicMock

import formulas
import pytest
import torch
import torch.nn.functional as F
from formulas import CASES, EXACT, Case, Tokens, case, entropy, forward_kl, gradient, loss, same, tokens
from torch import Tensor

from heatbath.ideas.gift import Gift
from heatbath.ideas.objectives import (
    OBJECTIVES,
    Asft,
    ChordPhi,
    Dft,
    Eaft,
    Entropy,
    Idft,
    IwSft,
    Kd,
    LabelSmoothing,
    Luffy,
    Pear,
    Power,
    Psft,
    Sed,
    Sft,
    TrSft,
    objective,
)
from heatbath.ideas.statistics import Objective, TokenStats, discounted_sum


def test_every_objective_has_a_formula() -> None:
    assert {type(c.objective) for c in CASES} == set(OBJECTIVES.values())


@pytest.mark.parametrize("c", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("seed", [0, 1])
def test_objective_is_its_formula(c: Case, seed: int) -> None:
    t = tokens(seed=seed)
    same(loss(c.objective, t), c.literal(t), t)


def test_the_problem_reaches_both_sides_of_every_gate() -> None:
    """Clips, masks and thresholds that never bind would prove nothing."""
    t = tokens()
    with torch.no_grad():
        ratio = (t.logp - t.columns["old_logp"]).exp()
        assert (ratio > 1.28).any() and (ratio < 0.8).any() and ((ratio > 1) & (ratio < 1.28)).any()
        gamma = (-(t.logp + entropy(t.log_pi)) / 0.4).exp()
        assert (gamma > 2).any() and (gamma < 0.1).any() and ((gamma > 0.1) & (gamma < 2)).any()
        assert (t.logp < math.log(1e-10)).any()
        mass = t.log_pi.exp().topk(3).values.sum(-1)
        assert (mass < 0.9).any() and (mass > 0.9).any()
        step = t.logp - t.columns["generator_logp"]
        assert (step < -0.08).any() and (step > 0.3).any() and ((step > -0.08) & (step < 0.3)).any()
        token_ratio = (t.logp - t.ref_logp).exp()
        assert (token_ratio < 0.2).any() and (token_ratio > 1.8).any()
        assert ((token_ratio > 0.2) & (token_ratio < 1.8)).any()
        assert (t.logp.exp() > 0.2).any() and (t.logp.exp() < 0.2).any()


WEIGHTS = {  # methods.md 0.3: dL/dz = w·(π − onehot)
    "sft": (Sft(), lambda t, p: torch.ones_like(p)),
    "dft": (Dft(), lambda t, p: p),
    "power 1": (Power(1.0), lambda t, p: p),
    "power": (Power(2.5), lambda t, p: p**2.5),
    "chord_phi": (ChordPhi(), lambda t, p: p * (1 - p)),
    "idft": (Idft(), lambda t, p: p ** ((-(p.log() + entropy(t.log_pi))).exp().clamp(0.1, 2.0))),
    "eaft": (Eaft(2.0, topk=31), lambda t, p: (entropy(t.log_pi) / 3) ** 2),
    "luffy": (Luffy(0.3), lambda t, p: t.columns["advantage"] * 0.3 * p / (p + 0.3) ** 2),
    "trsft": (TrSft(0.3), lambda t, p: (p / 0.3).clamp(max=1)),
    "psft": (Psft(), lambda t, p: (r := p / t.columns["old_logp"].exp()) * (r <= 1.28)),
    "sed": (Sed(0.7, topk=1, threshold=0.6), lambda t, p: 1 + 0.7 * p * (1 - 2 * p) * (t.log_pi.exp().amax(-1) < 0.6)),
    "iw_sft": (IwSft(), lambda t, p: formulas.iw_sft(t, 1.0) / -t.logp),
    "iw_sft token": (IwSft(level="token"), lambda t, p: formulas.iw_sft_token(t) / -t.logp),
    "pear": (Pear(), lambda t, p: formulas.pear(t, 0.999, -0.08, 0.3) / -t.logp),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_hard_targets_are_sft_with_a_token_weight(name: str) -> None:
    target, weight = WEIGHTS[name]
    t = tokens()
    w = weight(t, t.logp.detach().exp()).detach()
    onehot = F.one_hot(t.y, t.z.shape[-1])
    expected = w[:, None] * (t.log_pi.exp() - onehot).detach()
    torch.testing.assert_close(gradient(loss(target, t), t), expected, **EXACT)


def soft_gradients(t: Tokens) -> dict[str, tuple[Objective, Tensor]]:
    """methods.md 0.3, second list: the gradient in the logits of every target that is not one token."""
    pi, p, log_pi, log_p = t.log_pi.exp(), t.log_base.exp(), t.log_pi, t.log_base
    V = pi.shape[-1]
    onehot = F.one_hot(t.y, V).double()
    mixed = 0.99 * p + 0.01 / V
    lifted = mixed * (1 + math.expm1(5.0) * onehot)
    anchor = pi * (log_pi - log_p - (pi * (log_pi - log_p)).sum(-1, keepdim=True))
    dft = t.logp.exp()[:, None] * (pi - onehot)
    return {
        "gift": (Gift(5.0, 0.01), pi - lifted / lifted.sum(-1, keepdim=True)),
        "label_smoothing": (LabelSmoothing(0.1), pi - (0.9 * onehot + 0.1 / V)),
        "kd": (Kd(0.4), pi - (0.6 * onehot + 0.4 * p)),
        "entropy": (Entropy(0.2), pi - onehot + 0.2 * pi * (log_pi + entropy(log_pi)[:, None])),
        "forward anchor": (Kd(0.4, "forward", "additive"), pi - onehot + 0.4 * (pi - p)),
        "reverse anchor": (Kd(0.4, "reverse", "additive"), pi - onehot + 0.4 * anchor),
        "asft": (Asft(0.4), dft + 0.4 * (pi - p)),
        "asft reverse": (Asft(0.4, "reverse"), dft + 0.4 * anchor),
    }


@pytest.mark.parametrize("name", list(soft_gradients(tokens())))
def test_soft_targets_have_the_gradient_of_the_table(name: str) -> None:
    t = tokens()
    target, expected = soft_gradients(t)[name]
    torch.testing.assert_close(gradient(loss(target, t), t), expected.detach(), **EXACT)


def test_label_smoothing_is_torchs_and_transformers() -> None:
    from transformers.trainer_pt_utils import LabelSmoother

    t = tokens()
    same(loss(LabelSmoothing(0.1), t), F.cross_entropy(t.z, t.y, label_smoothing=0.1, reduction="none"), t)
    theirs = LabelSmoother(epsilon=0.1)({"logits": t.z[None]}, t.y[None])  # sums the smooth part in float32
    torch.testing.assert_close(loss(LabelSmoothing(0.1), t).mean(), theirs, rtol=1e-6, atol=0)


def test_kd_is_torchs_kl_div_and_trls_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.sdpo.loss_utils import compute_divergence

    t = tokens()
    forward = F.kl_div(t.log_pi, t.r.softmax(-1), reduction="none").sum(-1)
    same(loss(Kd(1.0), t), forward, t)
    for direction, alpha in (("forward", 0.0), ("reverse", 1.0)):
        kl = compute_divergence(t.log_pi, t.log_base, alpha)
        same(loss(Kd(1.0, direction), t), kl, t)
        same(loss(Kd(0.3, direction, "additive"), t), loss(Sft(), t) + 0.3 * kl, t)
    # the convex form is the cross-entropy to the mixed target up to a constant
    mixed = 0.7 * F.one_hot(t.y, t.z.shape[-1]).double() + 0.3 * t.log_base.exp()
    same(loss(Kd(0.3), t), F.cross_entropy(t.z, mixed, reduction="none") - 0.3 * entropy(t.log_base), t)


def test_entropy_is_categoricals_and_a_pull_to_the_uniform() -> None:
    from trl.trainer.utils import entropy_from_logits

    t, c = tokens(), 0.2
    for theirs in (torch.distributions.Categorical(logits=t.z).entropy(), entropy_from_logits(t.z)):
        same(loss(Entropy(c), t), loss(Sft(), t) - c * theirs, t)
    V = t.z.shape[-1]
    uniform = Tokens(t.z, torch.zeros_like(t.z), t.y, t.segments)
    same(loss(Entropy(c), t), loss(Kd(c, "reverse", "additive"), uniform) - c * math.log(V), t)
    same(loss(LabelSmoothing(c), t), loss(Kd(c), uniform) + c * math.log(V), t)


def test_dft_is_trls() -> None:
    """The loss of `SFTTrainer(loss_type="dft")`, its own code on our log-probabilities."""
    from trl import SFTTrainer
    from trl.trainer.utils import selective_log_softmax

    t = tokens()
    trainer = MagicMock(compute_loss_func=None, label_smoother=None, aux_loss_enabled=False)
    trainer.args.loss_type, trainer.args.average_tokens_across_devices = "dft", False
    trainer.accelerator.parallelism_config, trainer.accelerator.gather_for_metrics = None, lambda x: x
    trainer._metrics, trainer._total_train_tokens, trainer._tp_size = {"train": defaultdict(list)}, 0, 1
    mask = torch.ones_like(t.y)
    outputs = SimpleNamespace(
        log_probs=selective_log_softmax(t.z, t.y), label_mask=mask, entropy=entropy(t.log_pi), is_top1=mask
    )
    theirs = SFTTrainer.compute_loss(trainer, lambda **_: outputs, {"labels": t.y, "attention_mask": mask})
    same(loss(Dft(), t).mean(), theirs, t)


def test_dft_asft_and_eaft_are_llama_factorys() -> None:
    """Its formulas, from methods.md: exp(−CE) without gradient times CE; kl_div to the base beside it; top-20 / 3."""
    t = tokens()
    ce = F.cross_entropy(t.z, t.y, reduction="none")
    dft = torch.exp(-ce.detach()) * ce
    same(loss(Dft(), t), dft, t)
    same(loss(Power(1.0), t) - (1 - t.logp.exp()), torch.zeros_like(ce) * t.z.sum(), t)
    torch.testing.assert_close(gradient(loss(Dft(), t), t), gradient(1 - t.logp.exp(), t), **EXACT)
    kl = F.kl_div(t.z.log_softmax(-1), t.r.softmax(-1), reduction="none").sum(-1)
    same(loss(Asft(0.1), t), dft + 0.1 * kl, t)
    with torch.no_grad():
        top = t.z.topk(20, dim=-1).values.softmax(-1)
        weight = (-(top * top.log()).sum(-1) / 3.0) ** 0.5
    same(loss(Eaft(0.5), t), weight * ce, t)


def test_psft_is_trls_clip_at_advantage_one() -> None:
    """`GRPOTrainer(loss_type="bnpo")`, its own code on our log-probabilities."""
    from trl import GRPOTrainer

    t = tokens()
    trainer = MagicMock(loss_type="bnpo", epsilon_low=0.2, epsilon_high=0.28, beta=0.0, top_entropy_quantile=1.0)
    trainer.importance_sampling_level, trainer.off_policy_mask_threshold = "token", None
    trainer.args.delta, trainer.use_vllm, trainer._entropy_bonus_enabled, trainer.aux_loss_enabled = None, False, 0, 0
    trainer.current_gradient_accumulation_steps, trainer._metrics = 1, {"train": defaultdict(list)}
    trainer.accelerator.gather, trainer.accelerator.reduce = lambda x: x, lambda x, **_: x
    trainer._get_per_token_logps_and_entropies.return_value = (t.logp[None], entropy(t.log_pi)[None], None)
    row = torch.ones_like(t.y)[None]
    inputs = dict.fromkeys(("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"), row)
    inputs |= {"advantages": torch.ones(1), "old_per_token_logps": t.columns["old_logp"][None]}
    same(loss(Psft(), t).mean(), GRPOTrainer._compute_loss(trainer, None, inputs), t)
    # right after a refresh it is SFT
    t.columns["old_logp"] = t.logp.detach()
    torch.testing.assert_close(gradient(loss(Psft(), t), t), gradient(loss(Sft(), t), t), **EXACT)


def test_methods_that_reweigh_are_sft_or_dft_at_their_limits() -> None:
    t = tokens()
    sft, dft = gradient(loss(Sft(), t), t), gradient(loss(Dft(), t), t)
    same(loss(Asft(0.0), t), loss(Dft(), t), t)
    same(loss(Asft(0.0, "reverse"), t), loss(Dft(), t), t)
    same(loss(Idft(strength=0.0), t), -t.logp.exp().clamp_min(1e-10).detach() * t.logp, t)
    same(loss(Idft(strength=0.0), t), loss(Dft(), t), t, rtol=1e-11, atol=1e-8)  # but for that floor
    same(loss(Sed(0.0, threshold=2.0), t), loss(Sft(), t), t)
    same(loss(Eaft(alpha=0.0), t), loss(Sft(), t), t)
    same(loss(Entropy(0.0), t), loss(Sft(), t), t)
    same(loss(LabelSmoothing(0.0), t), loss(Sft(), t), t)
    same(loss(Kd(0.0), t), loss(Sft(), t), t)
    torch.testing.assert_close(gradient(loss(TrSft(1e-30), t), t), sft, **EXACT)
    for alpha in (1.0, 2.5):
        torch.testing.assert_close(gradient(loss(TrSft(alpha), t), t), dft / alpha, **EXACT)
    torch.testing.assert_close(gradient(loss(Power(1.0), t), t), dft, **EXACT)
    same(loss(Power(1e-6), t), loss(Sft(), t), t, rtol=5e-5, atol=1e-5)


def test_iw_sft_at_the_base_is_sft() -> None:
    t = tokens()
    t.r = t.z.detach()
    for target in (IwSft(), IwSft(tau=2.0), IwSft(level="token")):
        same(loss(target, t), loss(Sft(), t), t)


def test_iw_sft_is_capped() -> None:
    t = tokens()
    t.r = t.z.detach() - 6.0 * F.one_hot(t.y, t.z.shape[-1])
    for cap in (3.0, 16.0):
        same(loss(IwSft(tau=20.0, cap=cap), t), cap * loss(Sft(), t), t)


def test_luffy_without_advantages_takes_them_as_one() -> None:
    t = tokens()
    t.columns = {}
    same(loss(Luffy(0.1), t), -t.logp.exp() / (t.logp.exp() + 0.1), t)


def test_methods_hold_their_precision_on_the_least_likely_token() -> None:
    """π(y) = e^−200, far below what float32 can hold: SFT-like losses still teach it, DFT-like ones leave it."""
    y = torch.zeros(1, dtype=torch.long)
    for dtype in (torch.float32, torch.float64):
        z = torch.tensor([[-200.0, 0.0]], dtype=dtype, requires_grad=True)
        t = Tokens(z, torch.zeros(1, 2, dtype=dtype), y, y)
        steep = torch.tensor([[-1.0, 1.0]], dtype=dtype)
        for target in (Sft(), TrSft(1e-300 if dtype == torch.float64 else 1e-90), Kd(0.0)):
            torch.testing.assert_close(gradient(loss(target, t), t), steep)
        for target in (Dft(), Idft(), Power(1.0), TrSft(0.1), Luffy()):
            assert gradient(loss(target, t), t).abs().max() < 1e-9
            assert torch.isfinite(loss(target, t)).all()


@pytest.mark.parametrize("memory", [0.0, 0.5, 0.97, 1.0])
def test_discounted_sum_is_the_loop(memory: float) -> None:
    lengths = [1, 7, 8, 1, 1, 64, 100, 3]
    values = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(0))
    segments = torch.repeat_interleave(torch.tensor([5, 2, 9, 0, 1, 5, 7, 3]), torch.tensor(lengths))
    expected, total, before = [], 0.0, None
    for value, segment in zip(values.tolist(), segments.tolist(), strict=True):
        total = value + (memory * total if segment == before else 0.0)
        expected.append(total)
        before = segment
    found = discounted_sum(values, segments, memory)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert discounted_sum(values[:0], segments[:0], memory).shape == (0,)


@pytest.mark.parametrize(("gamma", "steps"), [(0.999, "up"), (0.9, "down"), (1.0, "mixed")])
def test_pear_weighs_by_the_strict_suffix_within_its_clips(gamma: float, steps: str) -> None:
    """Long sequences in which log G runs into −10 or 5; the last token of each weighs 1."""
    t = tokens(lengths=(160, 90, 1), vocab=5)
    step = {"up": 0.25, "down": -0.07, "mixed": 0.6}[steps]
    delta = torch.full_like(t.logp, step) if steps != "mixed" else step * torch.randn(len(t.y), dtype=torch.float64)
    t.columns = {"generator_logp": (t.logp - delta).detach()}
    same(loss(Pear(gamma), t), formulas.pear(t, gamma, -0.08, 0.3), t)
    weight = (loss(Pear(gamma), t) / loss(Sft(), t)).detach()
    torch.testing.assert_close(weight[[159, 249, 250]], torch.ones(3, dtype=torch.float64))
    if steps == "up":
        assert weight.max().item() == pytest.approx(math.exp(5))
    if steps == "down":
        assert weight.min().item() == pytest.approx(math.exp(-10))


@pytest.mark.parametrize("ratio", [0.3, 0.7])
def test_sed_takes_its_threshold_from_the_sorted_masses(ratio: float) -> None:
    t = tokens()
    masses = t.r.softmax(-1).topk(4).values.sum(-1)
    target = Sed(topk=4, ratio=ratio)
    found = target.calibrate(TokenStats(topk_mass=masses))
    assert found == {"threshold": sorted(masses.tolist())[-int(ratio * len(masses))]}
    assert Sed(threshold=0.2).calibrate(TokenStats(topk_mass=masses)) == {}
    same(loss(objective("sed", topk=4, ratio=ratio, **found), t), formulas.sed(t, 1.0, 4, found["threshold"]), t)
    with pytest.raises(ValueError, match=r"no threshold yet.*calibrate"):
        loss(target, t)


def test_weights_carry_no_gradient_of_their_own() -> None:
    """What is sg(·) in the formula is a constant: the loss of a weighted method is linear in −log π(y)."""
    t = tokens()
    for name in ("dft", "eaft", "chord_phi", "idft", "iw_sft", "iw_sft token", "pear"):
        value = loss(case(name).objective, t)
        weight = (value / loss(Sft(), t)).detach()
        same(value, weight * loss(Sft(), t), t)


def test_diagnostics_are_per_token_and_true() -> None:
    t = tokens()
    stats = TokenStats(logp=t.logp, topk_mass=t.log_pi.exp().topk(3).values.sum(-1), columns=t.columns)
    ratio = (t.logp - t.columns["old_logp"]).exp().detach()
    found = Psft().diagnostics(stats)
    torch.testing.assert_close(found["ratio"], ratio)
    assert found["clip_share"].tolist() == (ratio > 1.28).double().tolist()
    undecided = Sed(topk=3, threshold=0.9).diagnostics(stats)["undecided_share"]
    assert undecided.tolist() == (stats.topk_mass < 0.9).double().tolist()


def test_forward_kl_is_zero_at_the_base_and_reverse_too() -> None:
    t = tokens()
    t.r = t.z.detach()
    for direction in ("forward", "reverse"):
        found = loss(Kd(1.0, direction), t)
        same(found, torch.zeros_like(found) * t.z.sum(), t)
    assert (forward_kl(tokens()) > 0.01).all()
