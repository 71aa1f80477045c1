"""A model, an adapter, a checkpoint, a run of a stranger's: each holds a payload that leaves a mark, and is read."""

import io
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import small_model, small_tokenizer
from heatbath import models
from heatbath import recipe as recipes
from heatbath.errors import HeatbathError, RecipeError, RunError
from heatbath.models import TrustedName
from heatbath.progress import Progress
from heatbath.report.page import write_report
from heatbath.run import Run
from heatbath.stages.sft import run_sft
from heatbath.unpickling import require_data
from heatbath.verify.reward_model import RewardModel


class Payload:
    """What a pickle can be: a call made when it is read."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return open, (str(self.mark), "w")


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "it-ran"


@pytest.fixture
def folder(tmp_path: Path, small_base: Path) -> Path:
    """A model folder to be spoilt."""
    return Path(shutil.copytree(small_base, tmp_path / "model"))


def test_the_payload_would_run(mark: Path) -> None:
    """What every other test here would see."""
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists()


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pkl"])
def test_a_model_of_pickled_weights_is_refused_by_name(folder: Path, mark: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(Payload(mark), folder / name)
    for load in (lambda: models.load_model(str(folder), torch.float32), lambda: models.fingerprint_of(str(folder))):
        with pytest.raises(RecipeError, match="pickled") as caught:
            load()
        assert name in caught.value.what and str(folder) in caught.value.where
        assert "safetensors" in caught.value.remedy
    assert not mark.exists()


def test_a_pickle_beside_safetensors_is_not_read(folder: Path, mark: Path) -> None:
    torch.save(Payload(mark), folder / "pytorch_model.bin")
    assert models.fingerprint(models.load_model(str(folder), torch.float32)) == models.fingerprint(small_model())
    assert not mark.exists()


def test_weights_that_are_no_safetensors_are_a_named_error(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x00" * 64)
    with pytest.raises(RecipeError, match="cannot load the model"):
        models.load_model(str(folder), torch.float32)


def test_a_reward_model_of_pickled_weights_is_refused(tmp_path: Path, mark: Path) -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=101, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=1
    )
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "rm")
    small_tokenizer().save_pretrained(tmp_path / "rm")
    RewardModel(str(tmp_path / "rm"))
    (tmp_path / "rm" / "model.safetensors").unlink()
    torch.save(Payload(mark), tmp_path / "rm" / "pytorch_model.bin")
    with pytest.raises(RecipeError, match="pickled"):
        RewardModel(str(tmp_path / "rm"))
    assert not mark.exists()


@pytest.fixture
def adapter(tmp_path: Path, small_base: Path) -> Path:
    import peft

    model = peft.get_peft_model(small_model(), peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_pickled_adapter_is_refused_by_name(adapter: Path, mark: Path) -> None:
    models.load_adapter(small_model(), adapter)
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(Payload(mark), adapter / "adapter_model.bin")
    with pytest.raises(RecipeError, match=r"pickled \(adapter_model.bin\)"):
        models.load_adapter(small_model(), adapter)
    assert not mark.exists()


# --- code beside a model --------------------------------------------------------------------------------------------

OWN_CODE = """\
open({mark!r}, "w").close()
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def with_code(folder: Path, mark: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    (folder / "modeling_own.py").write_text(OWN_CODE.format(mark=str(mark)))
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    config |= {"model_type": "own", "architectures": ["OwnModel"], "auto_map": names}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_code_beside_a_model_does_not_run_and_nobody_is_asked(
    with_code: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers asks on the terminal where it is told nothing; a "y" piped into a command must not be a consent."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\ny\ny\n"))
    models.load_tokenizer(str(with_code))  # has none of its own
    for load in (models.load_config, models.fingerprint_of, lambda name: models.load_model(name, torch.float32)):
        with pytest.raises(RecipeError, match="cannot load the model") as caught:
            load(str(with_code))
        assert "trust_remote_code = true" in caught.value.remedy
    assert not mark.exists()


def test_it_runs_where_the_recipe_says_so(with_code: Path, mark: Path) -> None:
    table = {"model": str(with_code), "trust_remote_code": True}
    recipe = recipes.parse(table)
    assert isinstance(recipe.model, TrustedName) and recipe.model == str(with_code)
    again = recipes.parse(recipes.parse(table).model_dump())  # as a run's own recipe.toml is read back
    assert type(models.load_model(again.model, torch.float32)).__name__ == "OwnModel"
    assert mark.exists()


def test_the_permission_is_for_the_models_of_that_recipe_alone(with_code: Path, mark: Path, tmp_path: Path) -> None:
    trusted = recipes.parse({"model": "org/m", "trust_remote_code": True})
    plain = recipes.parse({"model": "org/m"})
    assert not isinstance(plain.model, TrustedName)
    for recipe, expected in ((trusted, True), (plain, False)):
        run = Run(tmp_path / str(expected), recipe)
        (run.checkpoint("init")).mkdir(parents=True)
        assert isinstance(run.model_of("init"), TrustedName) is expected
        assert isinstance(run.model_of("base"), TrustedName) is expected
    with pytest.raises(RecipeError):
        models.load_model(str(with_code), torch.float32)
    assert not mark.exists()


def test_a_known_architecture_keeps_its_own_code_out(folder: Path, mark: Path) -> None:
    (folder / "modeling_own.py").write_text(OWN_CODE.format(mark=str(mark)))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    assert type(models.load_model(str(folder), torch.float32)).__name__ == "LlamaForCausalLM"
    assert not mark.exists()


def test_a_chat_template_reaches_nothing(folder: Path, mark: Path) -> None:
    template = "{{ cycler.__init__.__globals__.os.system('touch " + str(mark) + "') }}"
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = models.load_tokenizer(str(folder))
    with pytest.raises(Exception, match=r"unsafe|undefined"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])
    assert not mark.exists()


# --- checkpoints ----------------------------------------------------------------------------------------------------

RECIPE = """\
model = "{base}"
precision = "fp32"
[data]
source = "arithmetic"
demos = 16
validation = 0
prompts = 0
test = 0
[sft]
batch = 4
micro_batch = 4
epochs = 2
save_every = 2
max_steps = {steps}
"""


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory, small_base: Path) -> Path:
    """A run with a complete checkpoint of an unfinished stage."""
    folder = tmp_path_factory.mktemp("interrupted")
    (folder / "r.toml").write_text(RECIPE.format(base=small_base, steps=8))
    recipe = recipes.load(folder / "r.toml")
    run = Run(folder / "run", recipe).write()

    class StopError(Exception):
        pass

    class Stopping(Progress):
        def update(self, done: int, note: str = "") -> None:
            if done == 5:
                raise StopError

    with pytest.raises(StopError):
        run_sft(run, recipe, Stopping(quiet=True))
    assert run.last_checkpoint("sft") is not None
    return run.folder


def newest(folder: Path) -> Path:
    """The checkpoint that a resumed stage would go on from."""
    found = Run(folder, recipes.load(folder / "recipe.toml")).last_checkpoint("sft")
    assert found is not None
    return found


def resumed(folder: Path) -> Run:
    run = Run(folder, recipes.load(folder / "recipe.toml"))
    run_sft(run, run.recipe, Progress(quiet=True))
    return run


def test_an_honest_checkpoint_is_gone_on_with(interrupted: Path, tmp_path: Path) -> None:
    run = resumed(Path(shutil.copytree(interrupted, tmp_path / "run")))
    assert load_file(run.checkpoint("init") / "model.safetensors")


PICKLED = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "heatbath.pt"]


def test_these_are_all_the_pickles_of_a_checkpoint(interrupted: Path) -> None:
    checkpoint = newest(interrupted)
    found = {p.name for p in checkpoint.iterdir() if p.suffix not in (".json", ".safetensors", ".jinja", ".md")}
    assert found == {*PICKLED, "complete"}


@pytest.mark.parametrize("name", PICKLED)
def test_a_program_in_a_checkpoint_is_refused_by_name(interrupted: Path, tmp_path: Path, mark: Path, name: str) -> None:
    folder = Path(shutil.copytree(interrupted, tmp_path / "run"))
    checkpoint = newest(folder)
    torch.save(Payload(mark), checkpoint / name)
    Run(folder, recipes.load(folder / "recipe.toml")).complete(checkpoint, "sft")  # its sizes are no protection
    with pytest.raises(RunError, match="is a program") as caught:
        resumed(folder)
    assert name in caught.value.where and "--fresh" in caught.value.remedy
    assert not mark.exists()


def test_training_arguments_are_never_read(interrupted: Path, tmp_path: Path, mark: Path) -> None:
    folder = Path(shutil.copytree(interrupted, tmp_path / "run"))
    checkpoint = newest(folder)
    torch.save(Payload(mark), checkpoint / "training_args.bin")
    resumed(folder)
    assert not mark.exists()


def sharded(folder: Path, value: object) -> None:
    """What FSDP leaves: an index and shards, by torch's own writer."""
    import warnings

    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"optim": value}, checkpoint_id=str(folder))


def test_an_honest_sharded_checkpoint_passes(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    sharded(tmp_path / "c", {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "lr": [1e-3, "x"]})
    require_data(tmp_path / "c")


def test_a_program_in_a_value_of_a_sharded_checkpoint_is_refused(tmp_path: Path, mark: Path) -> None:
    """torch itself runs this one."""
    sharded(tmp_path / "c", Payload(mark))
    with pytest.raises(RunError, match="is a program"):
        require_data(tmp_path / "c")
    assert not mark.exists()


def test_a_program_in_the_index_of_a_sharded_checkpoint_is_refused(tmp_path: Path, mark: Path) -> None:
    sharded(tmp_path / "c", torch.ones(2))
    (tmp_path / "c" / ".metadata").write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(RunError, match=r"it names io\.open"):
        require_data(tmp_path / "c")
    assert not mark.exists()


# --- runs and caches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stage",
    [
        '[sft]\nobjective = { name = "{code}:Own" }\n',
        '[sft]\nobjective = { name = "{code}:Own" }\nreference = "surprise"\n',
        '[rl]\npolicy = { name = "grpo", advantage = "{code}:own" }\n',
    ],
    ids=["objective", "cached", "advantage"],
)
def test_reading_a_run_runs_no_code_that_its_recipe_names(tmp_path: Path, mark: Path, stage: str) -> None:
    """A recipe may name Python, which runs with it; the report of a run that somebody sent is only a report."""
    (tmp_path / "own.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    run = Run(tmp_path / "run", recipes.parse({"model": "m", "sft": {}})).write()
    text = (run.folder / "recipe.toml").read_text().partition("[sft]")[0]
    (run.folder / "recipe.toml").write_text(text + stage.replace("{code}", str(tmp_path / "own.py")))
    read = Run.read(run.folder)
    write_report(read)
    assert "own.py" in (run.folder / "report.html").read_text()
    assert not mark.exists()
    with pytest.raises(HeatbathError):  # to run it is another matter: it is imported, and refused for what it lacks
        recipes.load(run.folder / "recipe.toml")
    assert mark.exists()


def test_our_caches_hold_no_objects(tmp_path: Path, mark: Path) -> None:
    """An array of objects is a pickle; the reference cache reads numbers alone."""
    import numpy as np

    from heatbath.cache import ReferenceCache

    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "meta.json").write_text('{"dtype": "float32", "head": "float32", "vocab_size": 2, "width": 2}')
    np.save(tmp_path / "c" / "head.npy", np.array([Payload(mark)], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        _ = ReferenceCache(tmp_path / "c").head
    assert not mark.exists()


def test_no_module_of_ours_reads_a_pickle() -> None:
    """But the one that looks at them; a new one must be thought about."""
    source = Path(models.__file__).parent
    readers = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*.py")
        if any(word in path.read_text() for word in ("pickle.load", "Unpickler", "allow_pickle=True", "joblib", "dill"))
        or "weights_only=False" in path.read_text()
    }
    assert readers == {"unpickling.py"}
    loads = [line for path in source.rglob("*.py") for line in path.read_text().splitlines() if "torch.load(" in line]
    assert all("weights_only=True" in line for line in loads) and len(loads) >= 4


def test_a_link_laid_where_a_file_will_be_written_is_not_followed(tmp_path: Path) -> None:
    """In a folder that others may write to, such as /tmp."""
    from heatbath.run import write_atomically

    (tmp_path / "victim").write_text("precious")
    (tmp_path / f".page.html.{os.getpid()}.unfinished").symlink_to(tmp_path / "victim")
    (tmp_path / "page.html").symlink_to(tmp_path / "victim")
    write_atomically(tmp_path / "page.html", "report")
    assert (tmp_path / "victim").read_text() == "precious"
    assert not (tmp_path / "page.html").is_symlink() and (tmp_path / "page.html").read_text() == "report"


def test_files_of_ours_are_made_by_this_user_alone(tmp_path: Path) -> None:
    """What is written beside others' files, in a shared folder for temporary ones, is private and has no known name."""
    import tempfile

    from heatbath.models import _dequantise

    seen: list[tuple[str, int]] = []
    real = tempfile.mkdtemp

    def watched(*args, **kwargs):  # type: ignore[no-untyped-def]
        made = real(*args, **kwargs)
        seen.append((made, os.stat(made).st_mode & 0o777))
        return made

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tempfile, "mkdtemp", watched)
        with pytest.raises(OSError):  # there are no weights: only the folder matters
            _dequantise(tmp_path / "none.gguf", tmp_path / "out" / "x")
    assert [mode for _, mode in seen] == [0o700]
    assert not any(Path(name).exists() for name, _ in seen)
