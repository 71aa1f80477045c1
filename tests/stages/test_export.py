"""What is handed over: a folder that transformers, PEFT and others load, with the weights of the run and a card."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from heatbath.errors import RecipeError, RunError
from heatbath.progress import Progress
from heatbath.recipe import load
from heatbath.run import Run
from heatbath.stages import export
from heatbath.stages.export import Export, run_export
from heatbath.stages.sft import run_sft
from mistakes import call

RECIPE = """
model = "{base}"
precision = "fp32"
[data]
source = "arithmetic"
demos = 16
validation = 4
test = 4
[sft]
objective = {{ name = "gift", beta = 4.0 }}
lr = 3e-3
epochs = 1
batch = 8
micro_batch = 8
[eval]
samples = 2
k = [1]
max_new_tokens = 6
"""


@pytest.fixture(scope="module")
def finished(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("export")
    (folder / "r.toml").write_text(RECIPE.format(base=small_base))
    code, said = call(folder, "run r.toml --out run")
    assert code == 0, said
    return Run.read(folder / "run")


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 9, 11, 40, 41, 42]])).logits.float()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_others_read_the_same_policy(finished: Run, tmp_path: Path, dtype: str) -> None:
    found = run_export(finished, Export(tmp_path / "out", dtype=dtype), Progress(quiet=True))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    ours = AutoModelForCausalLM.from_pretrained(finished.checkpoint("init"), dtype=torch.float32)
    assert theirs.dtype == getattr(torch, dtype) and AutoConfig.from_pretrained(tmp_path / "out").dtype == theirs.dtype
    assert (logits(theirs) - logits(ours)).abs().max() <= {"float32": 1e-6, "bfloat16": 0.2, "float16": 0.02}[dtype]
    assert found["compared"]["kl_nats_per_token"] <= {"float32": 1e-9, "bfloat16": 1e-2, "float16": 1e-4}[dtype]
    assert found["compared"]["same_likeliest_token"] >= (1.0 if dtype == "float32" else 0.9)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "README.md", "heatbath.json"} <= files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))], "nothing pickled"


def test_it_asks_and_ends_as_the_run_did(finished: Run, tmp_path: Path) -> None:
    run_export(finished, Export(tmp_path / "out"), Progress(quiet=True))
    theirs, ours = (AutoTokenizer.from_pretrained(p) for p in (tmp_path / "out", finished.checkpoint("init")))
    message = [{"role": "user", "content": "What is 1 + 2?"}]
    assert theirs.apply_chat_template(message, tokenize=False) == ours.apply_chat_template(message, tokenize=False)
    settings = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (settings.eos_token_id, settings.pad_token_id) == (ours.eos_token_id, ours.pad_token_id)


def test_the_card_says_how_it_was_made_and_what_to_doubt(finished: Run, tmp_path: Path) -> None:
    run_export(finished, Export(tmp_path / "out"), Progress(quiet=True))
    text = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "transformers" and "gift" in front["tags"] and "base_model" not in front
    recipe = re.search(r"```toml\n(.*?)```", text, re.S)
    assert recipe is not None
    (tmp_path / "again.toml").write_text(recipe[1])
    assert load(tmp_path / "again.toml") == finished.recipe
    score = finished.read_json("results.json")["policies"]["init"]["pass"]["1"]["mean"]
    assert f"{score:.3f}" in text and "One training seed" in text
    facts = json.loads((tmp_path / "out" / "heatbath.json").read_text())
    assert facts["data"] == finished.read_json("data.json")["digest"] and facts["data"] in text


def test_the_base_may_be_handed_over_too_and_nothing_is_overwritten(finished: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    run_export(finished, Export(tmp_path / "out", policy="base"), Progress(quiet=True))
    base = AutoModelForCausalLM.from_pretrained(finished.recipe.model, dtype=torch.float32)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(base))
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for wanted, said in (
        (Export(tmp_path / "out"), "not empty"),
        (Export(tmp_path / "x", policy="final"), "no policy 'final'"),
        (Export(tmp_path / "x", dtype="int8"), "one of float32"),
        (Export(tmp_path / "x", adapter=True), "not trained with adapters"),
    ):
        with pytest.raises(RecipeError, match=said):
            run_export(finished, wanted, Progress(quiet=True))
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert not (tmp_path / "x").exists()


def test_what_does_not_come_back_is_not_handed_over(finished: Run, tmp_path: Path, monkeypatch) -> None:
    def spoiled(*_: object) -> torch.nn.Module:
        model = AutoModelForCausalLM.from_pretrained(finished.checkpoint("init"), dtype=torch.float32)
        with torch.no_grad():
            model.model.norm.weight[0] += 1e-2
        return model

    monkeypatch.setattr(export, "_read_back", spoiled)
    with pytest.raises(RunError, match="not the policy"):
        run_export(finished, Export(tmp_path / "out"), Progress(quiet=True))
    assert not (tmp_path / "out").exists()


def test_an_adapter_alone_or_merged_is_the_same_policy(small_base: Path, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(RECIPE.format(base=small_base) + "[lora]\nrank = 4\n")
    run = Run.create(tmp_path / "run", load(tmp_path / "r.toml"))
    run_sft(run, run.recipe, Progress(quiet=True))
    merged = run_export(run, Export(tmp_path / "merged"), Progress(quiet=True))
    alone = run_export(run, Export(tmp_path / "alone", adapter=True), Progress(quiet=True))
    assert merged["compared"]["largest_difference_nats"] <= 1e-5
    assert alone["compared"]["largest_difference_nats"] <= 1e-4, "merging rounds"
    whole = sum(path.stat().st_size for path in (tmp_path / "alone").glob("*.safetensors"))
    assert 4 * whole < sum(path.stat().st_size for path in (tmp_path / "merged").glob("*.safetensors"))
    config = json.loads((tmp_path / "alone" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(small_base)
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "alone", dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(theirs), logits(plain), atol=1e-4, rtol=0)


def test_it_is_uploaded_private_and_whole(finished: Run, tmp_path: Path, monkeypatch) -> None:
    said = []

    class Api:
        def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> str:
            said.append((repo, private, exist_ok))
            return f"https://example.invalid/{repo}"

        def upload_folder(self, *, repo_id: str, folder_path: str) -> None:
            said.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    found = run_export(finished, Export(tmp_path / "out", push="me/mine"), Progress(quiet=True))
    assert found["url"] == "https://example.invalid/me/mine" and said[0] == ("me/mine", True, True)
    assert "model.safetensors" in said[1][1]
    broken = SimpleNamespace(create_repo=lambda *a, **k: (_ for _ in ()).throw(OSError("offline")))
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: broken)
    with pytest.raises(RunError, match="offline"):
        run_export(finished, Export(tmp_path / "two", push="me/mine"), Progress(quiet=True))
    assert (tmp_path / "two" / "model.safetensors").is_file(), "what was written stays"


def test_the_command_says_where_it_lies(finished: Run, tmp_path: Path) -> None:
    code, said = call(tmp_path, f"export {finished.folder} --out mine --dtype bfloat16")
    assert code == 0 and "the likeliest token is the same" in said
    code, said = call(tmp_path, f"export {finished.folder} --out mine")
    assert code == 2 and "not empty" in said
