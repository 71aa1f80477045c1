"""Figures: the numbers they draw are the right ones, and their colours can be told apart."""

import itertools
import re
from importlib.resources import files
from xml.etree import ElementTree

import numpy as np
import pytest

from heatbath.report import drawing, grid_figures, profile_figures, score_figures, scores, training_figures
from heatbath.report.drawing import POLICY_LOOKS, run_looks, spread, swatch, thinned
from written_runs import shifted

STYLE = files("heatbath.report").joinpath("style.css").read_text("utf-8")
# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB: none, protanopia, deuteranopia, tritanopia.
EYES = [
    np.eye(3),
    np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
    np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]),
]


def palettes() -> dict[str, dict[str, str]]:
    """Scheme → variable → colour, of the style sheet."""
    light, dark = re.findall(r":root \{(.*?)\}", STYLE, flags=re.DOTALL)[:2]
    read = [dict(re.findall(r"--([\w-]+): (#\w+)", block)) for block in (light, dark)]
    return {"light": read[0], "dark": read[0] | read[1]}


def linear(colour: str) -> np.ndarray:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * x for x in colour[1:])
    c = np.array([int(digits[i : i + 2], 16) for i in (0, 2, 4)]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def contrast(a: str, b: str) -> float:
    low, high = sorted(float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (a, b))
    return (high + 0.05) / (low + 0.05)


def lab(rgb: np.ndarray) -> np.ndarray:
    to_xyz = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    )
    f = to_xyz @ np.clip(rgb, 0, 1) / np.array([0.95047, 1, 1.08883])
    f = np.where(f > 0.008856, np.cbrt(f), 7.787 * f + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_read_and_told_apart_by_every_eye(scheme: str) -> None:
    colours = palettes()[scheme]
    runs = [colours[f"run-{i}"] for i in range(1, 7)]
    policies = [colours[name] for name in ("base", "init", "final")]
    for text in (
        "ink",
        "muted",
        "accent",
        "right",
        "wrong",
        "other",
        *(f"run-{i}" for i in range(1, 7)),
        *POLICY_LOOKS,
    ):
        for paper in ("paper", "card"):
            assert contrast(colours[text], colours[paper]) >= 4.5, (text, paper)
    for heat in range(1, 5):
        assert contrast(colours["ink"], colours[f"heat-{heat}"]) >= 4.5
    for group, least in ((runs, 14.0), (policies, 11.0)):  # ΔE 1976; 2 to 3 is just noticeable side by side
        for eye in EYES:
            for a, b in itertools.combinations(group, 2):
                assert np.linalg.norm(lab(eye @ linear(a)) - lab(eye @ linear(b))) >= least, (a, b)


def test_twelve_runs_differ_in_colour_or_in_dashes_and_marker() -> None:
    looks = run_looks([f"run {i}" for i in range(12)])
    assert len({(look.colour, str(look.dash), look.marker) for look in looks}) == 12
    assert len({look.css for look in looks}) == 6 and looks[0].css == looks[6].css
    assert "stroke-dasharray" not in swatch(looks[0]) and "stroke-dasharray" in swatch(looks[1])


def test_every_figure_is_well_formed_and_takes_its_colours_from_the_page() -> None:
    hostile = run_looks(["</svg><script>alert(1)</script>", "$x_1$", "b & c"])
    curve = [(1, 0.1, 0.2, 0.3), (4, 0.3, 0.5, 0.7)]
    difference = {"mean": 0.1, "low": -0.1, "high": 0.3}
    rows = [{"step": i, "reward": 0.1 * i, "nll": 1.0 / i, "val/nll": 1.0} for i in range(1, 6)]
    overlap = shifted()["transitions"][0]["overlap"]
    drawn = {
        "curves": score_figures.pass_curves([(look, curve) for look in hostile], 'of "x" <y>'),
        "dots": score_figures.dots([("pass@1", {"base": difference})], "x", "dots"),
        "forest": score_figures.forest({"pass@1": [(hostile[0].label, difference, hostile[0].colour)]}, "x", "forest"),
        "training": training_figures.overlaid_curves("rl", [(look, rows) for look in hostile])[0],
        "one": training_figures.learning_curves("sft", rows)[0],
        "overlap": profile_figures.overlap([(look, overlap) for look in hostile], "<t>", "overlap"),
    }
    for name, svg in drawn.items():
        tree = ElementTree.fromstring(svg)
        assert not list(tree.iter("{http://www.w3.org/2000/svg}script")), name
        assert not re.findall(r"#0[0-9a-f]0[0-9a-f]0[0-9a-f]\b", svg), name  # a stand-in left over
        assert set(re.findall(r"(?:fill|stroke): (#\w+)", svg)) == set(), name
        assert tree.attrib["aria-label"] and tree.attrib["role"] == "img"
    texts = [text for svg in drawn.values() for text in ElementTree.fromstring(svg).itertext()]
    assert "$x_1$" in texts and "b & c" in texts
    ids = [re.findall(r' id="([^"]+)"', svg) for svg in drawn.values()]
    for a, b in itertools.combinations(ids, 2):
        assert not set(a) & set(b)


def test_a_forest_is_filled_where_the_interval_leaves_zero_out() -> None:
    def faces(low: float | None, high: float | None) -> int:
        row = ("a → b", {"mean": 0.2, "low": low, "high": high}, drawing.RUNS[0])
        svg = score_figures.forest({"pass@1": [row]}, "x", "d")
        return svg.count("fill: var(--run-1)")

    assert faces(0.1, 0.3) == 1 and faces(-0.3, -0.1) == 1
    assert faces(-0.1, 0.3) == 0 and faces(0.0, 0.3) == 0 and faces(None, None) == 0


def test_signed_numbers() -> None:
    assert [score_figures.signed(x) for x in (0.123, -0.126, 0.001, -0.001, 0.0)] == [
        "+0.12",
        "−0.13",
        "0.00",
        "0.00",
        "0.00",
    ]


def test_labels_keep_their_distance_and_their_order() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        wanted = rng.uniform(0, 1, rng.integers(1, 9)).tolist()
        placed = spread(wanted, 0.1, 0.0, 1.0)
        order = np.argsort(wanted, kind="stable")
        gaps = np.diff(np.array(placed)[order])
        assert (gaps >= 0.1 - 1e-9).all() and min(placed) >= -1e-9 and max(placed) <= 1 + 1e-9
    assert spread([0.2, 0.5, 0.9], 0.1, 0, 1) == [0.2, 0.5, 0.9]  # nothing in the way: nothing moves
    crowded = spread([0.5] * 21, 0.1, 0, 1)
    assert np.diff(sorted(crowded)) == pytest.approx(0.05)


def test_a_long_line_is_means_of_as_many_neighbours() -> None:
    points = [(i, float(i % 7)) for i in range(1000)]
    x, y = thinned(points, 100)
    assert len(x) == len(y) == 100
    assert y == pytest.approx(np.array([v for _, v in points]).reshape(100, 10).mean(1))
    assert x[0] == pytest.approx(4.5) and np.mean(y) == pytest.approx(np.mean([v for _, v in points]))
    assert thinned(points[:100], 100) == ([p[0] for p in points[:100]], [p[1] for p in points[:100]])


def test_panels_of_what_was_logged_and_of_nothing_else() -> None:
    rows = [{"step": 1, "reward": 0.5, "truncated_share": 0.0, "clip_share": 0.009, "verdict/no_answer": 0.2,
             "verdict/crashed": 0.02, "verdict/timeout": 0.03}]  # fmt: skip
    titles = [panel.title for panel in training_figures.measured("rl", [rows])]
    assert titles == ["mean reward", "completions without an answer", "verdicts that failed"]
    assert training_figures.unseen("rl", [rows]) == " Below 1 % throughout: truncated completions, tokens clipped."
    assert training_figures.with_shares(rows)[0]["failed_share"] == pytest.approx(0.05)
    more = [{"step": 1, "truncated_share": 0.01}]
    assert "truncated completions" in [panel.title for panel in training_figures.measured("rl", [rows, more])]
    assert training_figures.unseen("rl", [rows, more]) == " Below 1 % throughout: tokens clipped."
    assert training_figures.unseen("rl", [more]) == ""


def test_held_out_numbers_have_panels_of_their_own_where_runs_are_compared() -> None:
    rows = [{"step": i, "nll": 1.0, "val/nll": 2.0} for i in range(1, 4)]
    looks = run_looks(["a", "b"])
    assert len(training_figures.learning_curves("sft", rows)) == 1
    drawn = training_figures.overlaid_curves("sft", [(look, rows) for look in looks])
    assert [re.search(">([^<]*NLL[^<]*)</text>", svg)[1] for svg in drawn] == [  # type: ignore[index]
        "NLL per token (nats)",
        "held-out NLL per token (nats)",
    ]
    without = [{"step": 1, "nll": 1.0}]
    assert len(training_figures.overlaid_curves("sft", [(look, without) for look in looks])) == 1


def test_the_curve_is_pass_at_k_by_brute_force() -> None:
    """Over every subset of k of the samples."""
    right = {"a": 1, "b": 4, "c": 0}
    rows = [{"problem": q, "status": "right" if i < c else "wrong"} for q, c in right.items() for i in range(5)]
    from heatbath.stages.scoring import per_problem

    found = scores.curve(per_problem(rows))
    assert [point[0] for point in found] == [1, 2, 3, 4, 5]
    for k, low, mean, high in found:
        values = [
            np.mean([any(i < c for i in drawn) for drawn in itertools.combinations(range(5), k)])
            for c in right.values()
        ]
        assert mean == pytest.approx(np.mean(values)) and low <= mean <= high
    one = scores.curve(per_problem([{"problem": "a", "status": "right"}] * 3))
    assert [low == mean == high for _, low, mean, high in one] == [True] * 3  # one problem has no interval


def test_many_k_are_thinned_to_the_first_the_last_and_some_between() -> None:
    counted = (["a", "b"], np.array([200, 128]), np.array([3, 50]))
    ks = [point[0] for point in scores.curve(counted)]
    assert ks[0] == 1 and ks[-1] == 128 and len(ks) <= 20 and ks == sorted(set(ks))
    few = (["a", "b"], np.array([20, 30]), np.array([3, 5]))
    assert [point[0] for point in scores.curve(few)] == list(range(1, 21))


def test_settings_are_labelled_by_what_they_do_not_share() -> None:
    """The end of a long name is cut off where a label has no room; here it is what tells the settings apart."""
    names = ["model=tiny beta=5.0", "model=tiny beta=10.0"]
    assert grid_figures.told_apart(names) == ("model=tiny", {names[0]: "beta=5.0", names[1]: "beta=10.0"})
    assert grid_figures.told_apart(["sft"]) == ("", {"sft": "sft"})
    common, labels = grid_figures.told_apart([*names, "model=runs/weak/checkpoints/base beta=5.0"])
    assert common == "" and len(set(labels.values())) == 3 and all(label.endswith(".0") for label in labels.values())
    drawn = grid_figures.validation({name: {"validation": [[0, [2.0]], [1, [1.0]]]} for name in names})
    assert "beta=5.0" in drawn[0] and "beta=10.0" in drawn[0] and "…" not in drawn[0]
