"""Objectives by their recipe names: what is refused and in which words, and objectives of the user's own."""

import math
from pathlib import Path

import pytest
import torch

from heatbath.ideas.objectives import OBJECTIVES, Kd, objective
from heatbath.ideas.statistics import Objective, TokenStats, needs_reference

NEEDED = {"gift": {"beta": 4.0}, "power": {"a": 0.5}}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_name_makes_its_objective(name: str) -> None:
    made = objective(name, **NEEDED.get(name, {}))
    assert type(made) is OBJECTIVES[name] and isinstance(made, Objective)
    with pytest.raises(AttributeError):
        made.needs = ()  # frozen: a run's objective is what its recipe says


def test_defaults_are_the_papers() -> None:
    """methods.md 1-9: the coefficients an unadorned name stands for."""
    values = {name: objective(name, **NEEDED.get(name, {})) for name in OBJECTIVES}
    assert (values["entropy"].coefficient, values["label_smoothing"].epsilon) == (0.01, 0.01)
    assert (values["kd"].alpha, values["kd"].direction, values["kd"].form) == (0.1, "forward", "convex")
    assert (values["asft"].weight, values["asft"].direction) == (0.05, "forward")
    assert (values["psft"].low, values["psft"].high, values["psft"].refresh) == (0.2, 0.28, 8)
    assert (values["iw_sft"].tau, values["iw_sft"].cap, values["iw_sft"].level) == (1.0, 16.0, "sequence")
    assert (values["eaft"].alpha, values["eaft"].topk, values["eaft"].scale) == (1.0, 20, 3.0)
    assert (values["idft"].strength, values["idft"].temperature) == (1.0, 1.0)
    assert (values["sed"].weight, values["sed"].topk, values["sed"].ratio, values["sed"].threshold) == (
        1,
        10,
        0.7,
        None,
    )
    assert (values["pear"].gamma, values["pear"].low, values["pear"].high) == (0.999, -0.08, 0.3)
    assert (values["trsft"].alpha, values["luffy"].gamma) == (0.1, 0.1)
    assert (values["gift"].smoothing, values["gift"].floor) == (0.0, 0.0)
    assert (values["gift_sequence"].mass, values["gift_sequence"].memory) == (0.5, 1.0)


def test_who_reads_the_base_is_known() -> None:
    reads = {name for name in OBJECTIVES if needs_reference(objective(name, **NEEDED.get(name, {})))}
    assert reads == {"kd", "asft", "gift", "gift_sequence", "iw_sft"}
    assert needs_reference(Kd(direction="reverse"))


@pytest.mark.parametrize(
    ("name", "hyper", "message"),
    [
        ("gitf", {}, "did you mean 'gift'"),
        ("dtf", {}, r"known: sft, .*'file\.py:Class'"),
        ("gift", {}, "needs 'beta'"),
        ("gift", {"beta": -1.0}, "beta must be"),
        ("gift", {"beta": math.nan}, "beta must be"),
        ("gift", {"beta": 1.0, "smothing": 0.1}, "did you mean 'smoothing'"),
        ("gift", {"beta": 1.0, "smoothing": 1.0}, "smoothing must lie"),
        ("gift", {"beta": 1.0, "floor": -1e-10}, "floor must lie"),
        ("gift", {"beta": "high"}, "must be a finite number"),
        ("gift", {"beta": {"from": 1.0}}, "has none of the forms"),
        ("gift", {"beta": {"start": 1.0, "end": 2.0}}, "has none of the forms"),
        ("gift", {"beta": {"start": 1.0, "end": 2.0, "steps": 0}}, r"beta\.steps must be a whole number"),
        ("gift", {"beta": {"start": 1.0, "end": 2.0, "steps": 9, "shape": "round"}}, r"beta\.shape must be"),
        ("gift", {"beta": {"start": 1.0, "end": -2.0, "steps": 9}}, "finite number ≥ 0"),
        ("gift", {"beta": {"left_to_base": 1.0}}, r"beta\.left_to_base must lie"),
        ("gift", {"beta": {"left_to_base": "some"}}, r"beta\.left_to_base must be a number"),
        ("sft", {"beta": 1.0}, "takes no hyper-parameters"),
        ("power", {}, "needs 'a'"),
        ("power", {"a": 0.0}, "a must be a finite number > 0"),
        ("label_smoothing", {"epsilon": 1.0}, "epsilon must lie"),
        ("kd", {"alpha": 1.5}, "alpha must lie"),
        ("psft", {"low": 1.0}, "low must lie"),
        ("psft", {"refresh": 0}, "refresh ≥ 1"),
        ("eaft", {"topk": 1}, "topk must be"),
        ("idft", {"temperature": 0.0}, "temperature must be"),
        ("sed", {"ratio": 1.0}, "ratio must lie"),
        ("pear", {"gamma": 0.0}, "gamma must lie"),
        ("trsft", {"alpha": 0.0}, "alpha must be"),
        ("luffy", {"gamma": 0.0}, "gamma must be"),
        ("gift_sequence", {"mass": 1.0}, "mass must lie"),
        ("gift_sequence", {"memory": 1.5}, "memory must lie"),
    ],
)
def test_wrong_objectives_are_named(name: str, hyper: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        objective(name, **hyper)


@pytest.mark.parametrize(
    ("name", "hyper", "message"),
    [
        ("entropy", {"coefficient": "0.01"}, r"objective 'entropy': coefficient must be a number, not '0\.01'"),
        ("entropy", {"coefficient": True}, "coefficient must be a number, not True"),
        ("sed", {"threshold": "0.5"}, "threshold must be a number"),
        ("psft", {"refresh": 8.0}, r"refresh must be a whole number, not 8\.0"),
        ("eaft", {"topk": "20"}, "topk must be a whole number"),
        ("eaft", {"topk": False}, "topk must be a number"),
        ("kd", {"direction": "sideways"}, "direction must be one of 'forward', 'reverse', not 'sideways'"),
        ("asft", {"direction": "backward"}, "direction must be one of"),
        ("kd", {"form": True}, "form must be"),
        ("iw_sft", {"level": "word"}, "level must be one of 'sequence', 'token'"),
        ("gift", {"beta": True}, "beta must be a number, not True"),
    ],
)
def test_hyper_parameters_of_the_wrong_type_are_named(name: str, hyper: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        objective(name, **hyper)


@pytest.mark.parametrize(
    ("name", "hyper", "message"),
    [
        ("entropy", {"coefficient": math.nan}, "coefficient must be a finite number"),
        ("asft", {"weight": math.inf}, "weight must be a finite number"),
        ("kd", {"alpha": math.nan, "form": "additive"}, "alpha must be a finite number"),
        ("luffy", {"gamma": math.inf}, "gamma must be a finite number"),
        ("gift", {"beta": {"column": 3}}, "column must be"),
    ],
)
def test_hyper_parameters_that_are_no_numbers_are_named(name: str, hyper: dict, message: str) -> None:
    """TOML can write nan and inf."""
    with pytest.raises(ValueError, match=message):
        objective(name, **hyper)


def test_whole_numbers_are_numbers_too() -> None:
    assert objective("entropy", coefficient=1).coefficient == 1.0
    assert isinstance(objective("gift", beta=20).beta, float)
    assert objective("sed", threshold=1).threshold == 1.0


OWN = """
from __future__ import annotations
from dataclasses import dataclass
from typing import ClassVar, Literal

@dataclass(frozen=True)
class Focal:
    gamma: float = 2.0
    kind: Literal["hard", "soft"] = "hard"
    needs: ClassVar[tuple[str, ...]] = ("logp",)

    def __call__(self, stats):
        return (1 - stats.logp.exp()) ** self.gamma * -stats.logp

class Plain:
    needs = ("logp",)

    def __call__(self, stats):
        return -stats.logp

class NeedsNothing:
    def __call__(self, stats):
        return -stats.logp

class NeedsAWord:
    needs = "logp"

    def __call__(self, stats):
        return -stats.logp

class NotCalled:
    needs = ("logp",)

focal = Focal()
"""


@pytest.mark.parametrize("form", ["file", "module"])
def test_a_user_can_bring_an_objective(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"own_{form}.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    where = str(tmp_path / "own_file.py") if form == "file" else "own_module"
    logp = torch.tensor([-0.1, -2.0])
    focal = objective(f"{where}:Focal", gamma=3)
    torch.testing.assert_close(focal(TokenStats(logp=logp)), (1 - logp.exp()) ** 3 * -logp)
    assert objective(f"{where}:Focal").gamma == 2.0
    torch.testing.assert_close(objective(f"{where}:Plain")(TokenStats(logp=logp)), -logp)
    for hyper, message in (
        ({"gama": 1.0}, "has no 'gama', did you mean 'gamma'"),
        ({"gamma": "2"}, "gamma must be a number"),
        ({"kind": "soggy"}, "kind must be one of 'hard', 'soft'"),
    ):
        with pytest.raises(ValueError, match=message):
            objective(f"{where}:Focal", **hyper)
    with pytest.raises(ValueError, match="it takes no hyper-parameters"):
        objective(f"{where}:Plain", gamma=1.0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.py:Focal", r"cannot import 'missing\.py' of the objective"),
        ("no_such_package.module:Focal", r"cannot import 'no_such_package\.module'"),
        ("own.py:Fokal", r"'own\.py' has no class 'Fokal'"),
        ("own.py:focal", r"'own\.py' has no class 'focal'"),
        ("own.py:", "has no class ''"),
        ("own.py:NeedsNothing", "is no objective: it needs `needs`"),
        ("own.py:NeedsAWord", "is no objective: it needs `needs`, a tuple"),
        ("own.py:NotCalled", "is no objective"),
        ("broken.py:Focal", r"cannot import 'broken\.py'"),
    ],
)
def test_an_objective_that_cannot_be_used_is_named(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "broken.py").write_text("class Focal(:\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        objective(name)


def test_a_statistic_nobody_asked_for_is_an_error_not_a_zero() -> None:
    with pytest.raises(AttributeError, match="needs"):
        _ = TokenStats(logp=torch.zeros(3)).entropy
    with pytest.raises(AttributeError, match="no statistic or column"):
        _ = TokenStats(logp=torch.zeros(3)).advantage
    with pytest.raises(TypeError, match="'advantage' is no statistic; pass it in `columns`"):
        TokenStats(advantage=torch.zeros(3))
    assert TokenStats(columns={"advantage": torch.ones(3)}).advantage.sum() == 3
