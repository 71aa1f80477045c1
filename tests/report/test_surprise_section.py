"""The surprise of a few demonstrations token by token: each number is that token's, and each colour that number's."""

import re

import numpy as np
import pytest
from markupsafe import escape

from conftest import small_tokenizer
from heatbath.data.rendering import IGNORE, Rendered
from heatbath.ideas.gift import Gift
from heatbath.ideas.objectives import objective
from heatbath.report.rendering import rendered
from heatbath.report.surprise_section import note, section
from heatbath.surprise import CONTEXT, EXAMPLE_TOKENS, profile
from written_runs import HOSTILE, PROFILE

V = 100


def row(context: str, answer: str) -> Rendered:
    tokenizer = small_tokenizer()
    before, after = (tokenizer(text)["input_ids"] for text in (context, answer))
    return Rendered([*before, *after], [*[IGNORE] * len(before), *after], truncated=False)


ROWS = [row("1 + 1", "= 2"), row("2 + 2", "= 4"), row("x" * 60, "= 6"), row("5", "y" * 400), row("7 + 7", "= 14")]
RNG = np.random.default_rng(0)
NATS = [RNG.uniform(0, 9, r.supervised) + extra for r, extra in zip(ROWS, (0, 0, 6, 9, 1), strict=True)]


def test_the_first_and_the_most_surprising_rows_are_shown_token_by_token() -> None:
    found = profile(ROWS, NATS, small_tokenizer(), Gift(5.0), vocab_size=V)["examples"]
    assert [example["row"] for example in found] == [1, 2, 4, 3]
    for example in found:
        source, costs = ROWS[example["row"] - 1], NATS[example["row"] - 1]
        texts = "".join(token[0] for token in example["tokens"])
        whole = small_tokenizer().decode(source.input_ids)
        assert (
            texts in whole and example["begins"] == whole.startswith(texts) and example["ends"] == whole.endswith(texts)
        )
        learned = [token for token in example["tokens"] if len(token) == 3]
        assert [token[1] for token in learned] == pytest.approx(costs[: len(learned)], abs=0.005)
        w = 1 / (1 + np.exp(-(5.0 - costs - np.log(-np.expm1(-costs)))))  # σ(β + logit p)
        assert [token[2] for token in learned] == pytest.approx(w[: len(learned)], abs=0.0005)
    long_context, long_answer = found[3], found[2]
    assert not long_context["begins"] and long_context["ends"]
    assert sum(len(token) == 1 for token in long_context["tokens"]) == 2 * CONTEXT
    assert long_answer["begins"] and not long_answer["ends"] and len(long_answer["tokens"]) == EXAMPLE_TOKENS


def test_an_objective_without_a_target_has_surprise_alone() -> None:
    found = profile(ROWS[:2], NATS[:2], small_tokenizer(), objective("sft"), vocab_size=V)
    assert {len(token) for example in found["examples"] for token in example["tokens"]} == {1, 2}
    assert [example["row"] for example in found["examples"]] == [1, 2]  # each once
    assert section(found)["with_w"] is False and "left to the base (w" not in shown(found)


def shown(found: dict) -> str:
    values = {
        "title": "t",
        "subtitle": "s",
        "surprise": section(found),
        "cache_rows": [["a"]],
        "cache_text": "",
        "command": "",
    }
    return rendered("surprise.html", values)


def test_each_token_is_coloured_by_its_surprise_and_underlined_where_it_is_left_to_the_base() -> None:
    page = shown(PROFILE)
    tokens = re.search(r'<p class="tokens">(.*?)</p>', page, flags=re.DOTALL)
    assert tokens is not None
    assert tokens[1] == (
        '<span class="row">3</span><span class="context">…</span><span class="context">What?</span>4'
        '<span class="heat-1" title="2.5 nats, w 0.90">&lt;b&gt;</span>'
        '<span class="heat-3" title="7.0 nats, w 0.55">5</span>'
        f'<span class="heat-4 left" title="12.5 nats, w 0.02">{escape(HOSTILE)}</span>'
    )
    for nats, css in (
        (0.99, ""),
        (1.0, "heat-1"),
        (2.99, "heat-1"),
        (3.0, "heat-2"),
        (6.0, "heat-3"),
        (10.0, "heat-4"),
    ):
        one = PROFILE | {"examples": [{"row": 1, "begins": True, "ends": True, "tokens": [["z", nats, 0.6]]}]}
        assert section(one)["examples"][0]["tokens"][0]["css"] == css
    one = PROFILE | {"examples": [{"row": 1, "begins": True, "ends": True, "tokens": [["z", 0.1, 0.499]]}]}
    assert section(one)["examples"][0]["tokens"][0]["css"] == "left"
    assert section(PROFILE)["bands"] == ["1–3", "3–6", "6–10", "10+"]


def test_a_profile_of_an_earlier_version_is_named() -> None:
    assert note(PROFILE) == ""
    assert "lacks floor, kinds;" in note({k: v for k, v in PROFILE.items() if k not in ("floor", "kinds")})
    assert "β = 7.5 leaves 2.00%" in section(PROFILE)["text"]
