"""The Triton kernels against the eager backend and plain autograd, in float64.

A Triton kernel runs on a GPU, or on a CPU where TRITON_INTERPRET=1 was set before Triton was first imported. So that no
other test meets an interpreted Triton, the cases below run in one process of their own (`python test_triton_rows.py`),
which prints what came of each. `-m gpu` runs the same cases compiled, in this process.
"""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from heatbath.ideas.engine import dense_loss, linear_loss, linear_stats
from heatbath.ideas.gift import Gift
from heatbath.ideas.objectives import Asft, Eaft, Entropy, Kd, Sft
from heatbath.ideas.rows import EagerRows, RowState, RowWork
from heatbath.ideas.statistics import DIFFERENTIABLE, STATS

triton = pytest.importorskip("triton", reason="triton is not installed (it has wheels for Linux only)")

C, V, BLOCK = 6, 2503, 1024  # three tiles a row, the last one partly filled
N, D = 7, 16
CAP = 12.0
ALL = frozenset(STATS)
# Error of a statistic, and of a gradient against its largest entry, by the dtype of the logits: of float32 sums, save
# for float64. A gradient in 16 bits is rounded besides, and the interpreter cuts bfloat16 off where a GPU rounds it.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 3e-6, torch.bfloat16: 3e-6, torch.float16: 3e-6}
ROUNDING = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 2**-7, torch.float16: 2**-11}
CASES: dict[str, Callable[[], None]] = {}


def device() -> torch.device:
    return torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")


def case(name: str):
    def register(function: Callable[[], None]) -> Callable[[], None]:
        CASES[name] = function
        return function

    return register


class Problem:
    """Logits of C rows as a 16-bit product leaves them, and the label's exactly."""

    def __init__(self, dtype: torch.dtype, *, exact: bool = True, spread: float = 3.0):
        g = torch.Generator().manual_seed(5)
        self.z = (spread * torch.randn(C, V, generator=g)).to(dtype)
        self.r = (spread * torch.randn(C, V, generator=g)).to(dtype)
        self.labels = torch.randint(V, (C,), generator=g)
        self.labels[0], self.labels[1] = 0, V - 1
        self.z[0, 0] = self.r[2, self.labels[2]] = 30.0  # nearly certain
        self.z[3] += 100.0
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        off = 0.01 * torch.randn(2, C, generator=g, dtype=torch.float64).to(wide)
        at = torch.arange(C), self.labels
        self.exact = (self.z[at].to(wide) + off[0], self.r[at].to(wide) + off[1]) if exact else (None, None)
        self.slopes = {name: torch.randn(C, generator=g, dtype=torch.float64).to(wide) for name in DIFFERENTIABLE}

    def run(self, rows, dtype: torch.dtype, work: RowWork, *, base: bool = True) -> tuple[RowState, Tensor]:
        """Statistics and dz of a backend, from copies in `dtype`."""
        where = device()
        z, r = self.z.to(where, dtype, copy=True), self.r.to(where, dtype, copy=True) if base else None
        labels = self.labels.to(where)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        exact = tuple(None if x is None else x.to(where, wide) for x in self.exact)
        state = rows.statistics(z, r, labels, work, exact if base else (exact[0], None))
        slopes = {name: g.to(where, wide) for name, g in self.slopes.items() if name in state.stats}
        rows.gradient(z, r, labels, work, state, slopes)
        return state, z


def triton_rows():
    """The module, imported only where it is known whether Triton is to be interpreted."""
    from heatbath.ideas.kernels import triton_rows

    return triton_rows


def errors(found: Tensor, expected: Tensor, rounding: float = 0.0) -> float:
    """Largest error beyond the rounding, in shares of the largest entry."""
    expected = expected.double()
    beyond = (found.double() - expected).abs() - rounding * expected.abs()
    return (beyond.max() / expected.abs().max()).item()


def check_rows(problem: Problem, work: RowWork, *, base: bool = True) -> None:
    dtype = problem.z.dtype
    state, dz = problem.run(triton_rows().TritonRows(), dtype, work, base=base)
    truth, expected = problem.run(EagerRows(), torch.float64, work, base=base)
    assert set(state.stats) == set(truth.stats)
    found = {name: errors(state.stats[name], value) for name, value in truth.stats.items()}
    assert max(found.values()) < TOLERANCE[dtype], found
    assert (state.stats["logp"] <= 0).all()
    assert dz.dtype == dtype
    assert errors(dz, expected, ROUNDING[dtype]) < TOLERANCE[dtype], errors(dz, expected, ROUNDING[dtype])


def register_rows() -> None:
    for dtype in TOLERANCE:
        for cap in (None, CAP):
            work = RowWork(ALL, keep_logits=True, topk=5, softcap=cap)
            name = f"rows {dtype}{' softcap' if cap else ''}".replace("torch.", "")
            case(name)(lambda d=dtype, w=work: check_rows(Problem(d), w))


register_rows()


@case("rows of the policy alone")
def policy_alone() -> None:
    check_rows(Problem(torch.bfloat16), RowWork(frozenset({"logp"})), base=False)


@case("rows of cross-entropy to the base")
def cross_entropy() -> None:
    check_rows(Problem(torch.bfloat16), RowWork(frozenset({"logp", "ref_ce", "ref_logp"})))


@case("rows without exact labels")
def no_exact_labels() -> None:
    check_rows(Problem(torch.float32, exact=False), RowWork(ALL, keep_logits=True))


@case("more of the likeliest than there are tokens")
def topk_of_few() -> None:
    problem = Problem(torch.bfloat16)
    problem.z, problem.r, problem.labels = problem.z[:, :3], problem.r[:, :3], problem.labels % 3
    check_rows(problem, RowWork(ALL, keep_logits=True, topk=20))


@case("the label's exact logit takes it in and out of the likeliest")
def topk_at_the_edge() -> None:
    for step in (-2.0, 2.0):
        problem = Problem(torch.bfloat16)
        order = problem.z.argsort(-1, descending=True)
        problem.labels = order[:, 4] if step < 0 else order[:, 5]
        label = problem.z.gather(-1, problem.labels[:, None]).squeeze(-1).float() + step
        problem.exact = (label, problem.exact[1])
        check_rows(problem, RowWork(ALL, keep_logits=True, topk=5))


@case("statistics leave the logits as they are")
def logits_stay() -> None:
    problem = Problem(torch.bfloat16)
    z, r = problem.z.to(device(), copy=True), problem.r.to(device(), copy=True)
    exact = tuple(x.to(device()) for x in problem.exact)
    triton_rows().TritonRows().statistics(z, r, problem.labels.to(device()), RowWork(ALL, softcap=CAP), exact)
    assert torch.equal(z.cpu(), problem.z) and torch.equal(r.cpu(), problem.r)


@case("a large offset of all logits costs nothing")
def offset() -> None:
    problem = Problem(torch.float32, exact=False)
    problem.z = (problem.z * 64).round() / 64  # so that the sum with 4,096 is exact
    work = RowWork(ALL, keep_logits=True)
    stats, dz = problem.run(triton_rows().TritonRows(), torch.float32, work)
    problem.z += 4096
    shifted, shifted_dz = problem.run(triton_rows().TritonRows(), torch.float32, work)
    assert all(torch.equal(stats.stats[name], shifted.stats[name]) for name in stats.stats)
    assert torch.equal(dz, shifted_dz)


@case("logits of −inf have probability 0")
def padded_vocabulary() -> None:
    problem = Problem(torch.bfloat16)
    problem.labels = problem.labels % 100 + BLOCK
    problem.z[:, :BLOCK] = problem.r[:, :BLOCK] = -torch.inf  # the whole first tile
    problem.z[:, -9:] = problem.r[:, -9:] = -torch.inf
    kept = Problem(torch.bfloat16)
    kept.z, kept.r, kept.labels = problem.z[:, BLOCK:-9], problem.r[:, BLOCK:-9], problem.labels - BLOCK
    work = RowWork(ALL - {"mean_logp"}, keep_logits=True)
    state, dz = problem.run(triton_rows().TritonRows(), torch.bfloat16, work)
    truth, expected = kept.run(EagerRows(), torch.float64, work)
    for name, value in truth.stats.items():
        assert errors(state.stats[name], value) < TOLERANCE[torch.bfloat16], name
    assert errors(dz[:, BLOCK:-9], expected, ROUNDING[torch.bfloat16]) < TOLERANCE[torch.bfloat16]
    assert not dz[:, :BLOCK].any() and not dz[:, -9:].any()


@case("no rows")
def no_rows() -> None:
    z, labels = (
        torch.empty(0, V, dtype=torch.bfloat16, device=device()),
        torch.empty(0, dtype=torch.long, device=device()),
    )
    rows, work = triton_rows().TritonRows(), RowWork(ALL)
    state = rows.statistics(z, z.clone(), labels, work, (None, None))
    assert set(state.stats) == ALL and all(value.shape == (0,) for value in state.stats.values())
    rows.gradient(z, z.clone(), labels, work, state, {"logp": state.stats["logp"]})


@case("rows that are not contiguous are refused")
def strides() -> None:
    z = torch.zeros(V, C, device=device()).T
    with pytest.raises(ValueError, match="contiguous"):
        triton_rows().TritonRows().statistics(
            z, None, torch.zeros(C, dtype=torch.long, device=device()), RowWork(ALL), (None, None)
        )


class Linear:
    """Hidden states and heads of N tokens, one of them ignored; the base's of all or of some."""

    def __init__(self, dtype: torch.dtype, *, partial: bool = False, **options):
        g = torch.Generator().manual_seed(3)

        def random(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(*shape, generator=g)).to(dtype).to(device())

        self.hidden, self.head = random(N, D).requires_grad_(), random(V, D).requires_grad_()
        self.base, self.options = {"ref_hidden": random(N, D), "ref_head": random(V, D)}, options
        self.labels = torch.randint(V, (N,), generator=g).to(device())
        self.labels[2] = -100
        if partial:
            known = torch.tensor([0, 2, 3, 6], device=device())
            self.base["ref_hidden"] = self.base["ref_hidden"][known]
            self.options |= {"ref_rows": known, "ref_logp": -3 * torch.rand(N, generator=g).to(device())}

    def run(self, objective, backend: str) -> list[Tensor]:
        """Loss, dh and dW."""
        loss = linear_loss(
            objective, self.hidden, self.head, self.labels, **self.base, chunk=4, backend=backend, **self.options
        )
        return [loss.detach(), *torch.autograd.grad(3 * loss, [self.hidden, self.head])]

    def logits(self, hidden: Tensor, head: Tensor) -> Tensor:
        cap = self.options.get("softcap")
        z = self.options.get("scale", 1.0) * hidden.double() @ head.double().T
        return z if cap is None else cap * (z / cap).tanh()

    def truth(self, objective) -> list[Tensor]:
        """The same by plain autograd in float64, which needs the base at every token."""
        z, r = self.logits(self.hidden, self.head), self.logits(self.base["ref_hidden"], self.base["ref_head"])
        loss = dense_loss(objective, z, self.labels, ref_logits=r).sum()
        return [loss.detach(), *torch.autograd.grad(3 * loss, [self.hidden, self.head])]


def check_linear(objective, **options) -> None:
    exact = Linear(torch.float32, **options)
    truth = exact.run(objective, "eager") if options.get("partial") else exact.truth(objective)
    for found, expected in zip(exact.run(objective, "triton"), truth, strict=True):
        assert errors(found, expected) < 3e-6, errors(found, expected)
    rounded = Linear(torch.bfloat16, **options)
    pairs = zip(rounded.run(objective, "triton"), rounded.run(objective, "eager"), strict=True)
    for found, expected, tolerance in zip(*zip(*pairs, strict=True), (3e-6, 2**-6, 2**-6), strict=True):
        assert found.dtype == expected.dtype
        assert errors(found, expected) < tolerance, errors(found, expected)


def register_objectives() -> None:
    objectives = {
        "sft": (Sft(), {}),
        "gift": (Gift(6.0, smoothing=0.05), {"softcap": CAP, "scale": 0.5}),
        "gift, the base known at some tokens": (Gift(2.0), {"partial": True}),
        "kd, reverse": (Kd(0.5, direction="reverse"), {}),
        "entropy": (Entropy(0.1), {}),
        "asft": (Asft(), {}),
        "eaft": (Eaft(topk=5), {"softcap": CAP}),
    }
    for name, (objective, options) in objectives.items():
        case(f"linear_loss of {name}")(lambda o=objective, k=options: check_linear(o, **k))


register_objectives()


@case("linear_stats")
def statistics_of_tokens() -> None:
    problem = Linear(torch.float64, softcap=CAP)

    def run(backend: str) -> list[Tensor]:
        s = linear_stats(
            problem.hidden,
            problem.head,
            problem.labels,
            need=STATS,
            **problem.base,
            chunk=4,
            backend=backend,
            **problem.options,
        )
        loss = (s.logp * s.entropy + s.mean_logp * s.ref_ce - s.rev_ce**2).sum()
        values = [getattr(s, name).detach() for name in STATS]
        return [*values, *torch.autograd.grad(loss, [problem.hidden, problem.head])]

    for found, expected in zip(run("triton"), run("eager"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def outcomes_of_cases() -> dict[str, str]:
    """ "" for each case that passed, else how it failed."""
    outcomes = {}
    for name, run in CASES.items():
        try:
            run()
            outcomes[name] = ""
        except Exception:  # noqa: BLE001
            outcomes[name] = traceback.format_exc()
    return outcomes


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).resolve())],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.thorough
def test_interpreted(name: str, outcomes: dict[str, str]) -> None:
    assert not outcomes[name], outcomes[name]


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_rows(), "BLOCK", BLOCK)
    CASES[name]()


compiled = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 compiles nothing")


@compiled
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("name", ["_statistics_kernel", "_gradient_kernel"])
def test_compiles_without_a_gpu(name: str, everything: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For Hopper, at the sizes in use: the interpreter runs much that the compiler refuses."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    module, pointers = triton_rows(), {"z": "*bf16", "r": "*bf16", "labels": "*i64"}
    pointers |= dict.fromkeys(("z_label", "r_label", "sums", "numbers"), "*fp32")
    fixed = {"cap": CAP if everything else None, "wide": False, "block": module.BLOCK, "stages": module.STAGES}
    signature, constants = {}, {}
    for i, argument in enumerate(getattr(module, name).arg_names):
        if argument in fixed or argument.startswith("has_"):
            signature[argument], constants[(i,)] = "constexpr", fixed.get(argument, everything)
        else:
            signature[argument] = pointers.get(argument, "i32")
    source = ASTSource(fn=getattr(module, name), signature=signature, constexprs=constants)
    options = {"num_warps": module.WARPS, "enable_fp_fusion": True}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    assert "ex2.approx" in ptx
    if name == "_gradient_kernel":
        assert "cvt.rn.bf16" in ptx  # to nearest, unlike the interpreter


@compiled
def test_tensors_on_a_cpu_are_refused() -> None:
    with pytest.raises(ValueError, match="take backend='eager'"):
        linear_loss(Sft(), torch.ones(2, D), torch.ones(V, D), torch.tensor([0, 1]), backend="triton")


if __name__ == "__main__":
    torch.set_num_threads(1)
    triton_rows().BLOCK = BLOCK
    print(json.dumps(outcomes_of_cases()))
