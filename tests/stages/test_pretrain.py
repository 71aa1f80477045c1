"""The tiny base: a prior worth keeping, the same wherever it is made, made once."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from heatbath import recipe as recipes
from heatbath.data import sources
from heatbath.data.arithmetic import FORMS, Sum, solve
from heatbath.progress import Progress
from heatbath.run import Run
from heatbath.stages.evaluate import run_evaluation
from heatbath.stages.pretrain import cached_folder, run_pretrain

SMALLER = ["data.demos=200", "pretrain.width=32", "pretrain.layers=1", "pretrain.epochs=1", "data.test=20"]


def test_the_tiny_base_is_worth_preserving(tiny_base: str, tmp_path: Path) -> None:
    """pass@1 between 0.1 and 0.5, pass@16 above 0.8, on problems it has not seen; and several ways to a solution."""
    recipe = recipes.load("base-tiny")
    parameters = AutoModelForCausalLM.from_pretrained(tiny_base).num_parameters()
    assert 1_000_000 <= parameters <= 3_000_000
    run = Run.create(tmp_path / "run", recipe)
    run_pretrain(run, recipe, Progress(quiet=True))  # from the cache
    found = run_evaluation(run, recipe, Progress(quiet=True))["policies"]["base"]
    assert found["problems"] == 100 and 0.1 < found["pass"]["1"]["mean"] < 0.5 and found["pass"]["16"]["mean"] > 0.8
    corpus = {row.problem for row in sources.load(recipe.data, recipe.seed).demos}
    forms = dict.fromkeys(FORMS, 0)
    for sample in run.samples("base"):
        assert sample["question"].casefold() not in corpus
        a, o, b = sample["question"].removeprefix("What is ").removesuffix("?").split()
        for form in FORMS:
            forms[form] += sample["completion"] == solve(Sum(int(a), int(b), o), form)
    assert all(forms[form] >= 10 for form in ("tens", "columns", "ones", "bare")), forms


def test_a_base_is_made_once_and_its_content_names_it(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HEATBATH_CACHE", str(tmp_path / "cache"))
    recipe = recipes.load("base-tiny", SMALLER)
    weights, said = [], []
    for name in ("a", "b"):
        run, progress = Run.create(tmp_path / name, recipe), Progress(quiet=True)
        progress.say = said.append
        run_pretrain(run, recipe, progress)
        weights.append(load_file(run.checkpoint("base") / "model.safetensors"))
    told = [line.partition(" ")[0] for line in said if line.startswith(("pretraining", "base:"))]
    assert told == ["pretraining", "base:"], "trained once, then taken from the cache"
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])

    def folder(*overrides: str) -> Path:
        made = recipes.load("base-tiny", [*SMALLER, *overrides])
        return cached_folder(made, sources.load(made.data, made.seed).demos)

    assert folder() == folder("pretrain.save_every=3", "eval.samples=32")
    others = {
        folder(o) for o in ("seed=1", "pretrain.lr=1e-3", "data.label_noise=0.2", "precision=fp32", "data.paths=3")
    }
    assert len({folder(), *others}) >= 5 and folder() not in others - {folder("precision=fp32")}


@pytest.mark.thorough
def test_made_again_it_is_the_same_bit_for_bit(tmp_path: Path, monkeypatch) -> None:
    """However many threads the process has, which it keeps."""
    recipe, found, own = recipes.load("base-tiny", [*SMALLER, "pretrain.width=160"]), [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            monkeypatch.setenv("HEATBATH_CACHE", str(tmp_path / f"cache-{threads}"))
            run = Run.create(tmp_path / str(threads), recipe)
            torch.set_num_threads(threads)
            run_pretrain(run, recipe, Progress(quiet=True))
            assert torch.get_num_threads() == threads
            found.append(load_file(run.checkpoint("base") / "model.safetensors"))
    finally:
        torch.set_num_threads(own)
    assert all(torch.equal(one[n], found[0][n]) for one in found for n in one)


@pytest.mark.parametrize("text", ["What is 47 + 38?\n47 + 38 = 85", 'every {character} of "ASCII" ~ survives', "a  b"])
def test_the_character_tokenizer_loses_nothing(tiny_base: str, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer(text)["input_ids"]) == len(text)
