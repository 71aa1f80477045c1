"""`heatbath inspect` shows what the loss sees: the same ids, the same mask, the base's own surprise."""

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from heatbath.data import checks, sources
from heatbath.data.rendering import IGNORE
from heatbath.errors import DataError
from heatbath.inspecting import inspect, show
from heatbath.recipe import parse
from heatbath.stages.pipeline import tokenizer_of


def recipe(base: Path, **sft: object):
    data = {"source": "arithmetic", "demos": 5, "test": 2, "system": "Add."}
    return parse({"model": str(base), "precision": "fp32", "data": data, "sft": sft})


def test_rows_are_those_of_the_loss(small_base: Path) -> None:
    made = recipe(small_base)
    demos = sources.load(made.data, made.seed).demos
    rendered = checks.rendered(tokenizer_of(made), demos, made, "demos")
    found = inspect(made, count=9)
    assert [entry["row"] for entry in found] == [1, 2, 3, 4, 5]
    for entry, row, demo in zip(found, rendered, demos, strict=True):
        assert [t["id"] for t in entry["tokens"]] == row.input_ids
        assert [t["supervised"] for t in entry["tokens"]] == [label != IGNORE for label in row.labels]
        learned = "".join(t["text"] for t in entry["tokens"] if t["supervised"])
        assert learned == demo.solution + "<|end|>"
    assert [entry["row"] for entry in inspect(made, row=4)] == [4]
    with pytest.raises(DataError, match="there is no row 6"):
        inspect(made, row=6)


def test_surprise_is_the_models_own(small_base: Path) -> None:
    entry = inspect(recipe(small_base), count=1, surprise=True)[0]
    ids = torch.tensor([[t["id"] for t in entry["tokens"]]])
    logp = AutoModelForCausalLM.from_pretrained(small_base)(ids).logits[0].log_softmax(-1)
    for position, token in enumerate(entry["tokens"]):
        assert ("nats" in token) == token["supervised"]
        if token["supervised"]:
            assert token["nats"] == pytest.approx(-logp[position - 1, token["id"]].item(), abs=2e-3)


def test_a_cut_row_can_be_looked_at(small_base: Path) -> None:
    entry = inspect(recipe(small_base, max_length=45), count=1)[0]
    assert entry["truncated"] and len(entry["tokens"]) == 45


def test_colours_are_those_of_mask_and_surprise(small_base: Path) -> None:
    found = inspect(recipe(small_base), count=1)
    screen = io.StringIO()
    show(found, Console(file=screen, force_terminal=True, width=200, color_system="standard"))
    text = screen.getvalue()
    assert "\x1b[2m<|system|>Add." in text.replace("\x1b[0m\x1b[2m", "")
    assert "\x1b[1;32m" in text and "supervised" in text
    tokens = [{"text": "x", "id": 1, "supervised": True, "nats": nats} for nats in (0.1, 3.0, 30.0)]
    screen.truncate(0)
    show([{"row": 1, "origin": "", "truncated": False, "tokens": tokens}], Console(file=screen, force_terminal=True))
    assert "\x1b[32mx" in screen.getvalue() and "\x1b[33mx" in screen.getvalue() and "\x1b[31mx" in screen.getvalue()
    assert "10+ nats" in screen.getvalue()


def test_without_colour_marks_stand_around_what_is_learned(small_base: Path) -> None:
    screen = io.StringIO()
    show(inspect(recipe(small_base), count=1, surprise=True), Console(file=screen, width=300))
    text = screen.getvalue()
    assert "<|assistant|>⟦" in text and "⟧" in text and "{" in text


def test_the_command_prints_json(small_base: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    from heatbath import cli

    monkeypatch.setattr("sys.argv", ["heatbath", "inspect", "demo", f"model={small_base}", "-n", "2", "--json"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    found = json.loads(capsys.readouterr().out)
    assert [entry["row"] for entry in found] == [1, 2] and found[0]["tokens"][0].keys() == {"text", "id", "supervised"}
