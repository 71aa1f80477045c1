"""A policy of a run as a plain folder for others: safetensors, tokenizer with its chat template, generation settings,
and a model card that says how it was made and what to doubt.

The folder is read back before it takes its name, and its logits compared with those of the run's own policy.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from heatbath import models
from heatbath.errors import RecipeError, RunError
from heatbath.progress import Progress
from heatbath.report.model_card import model_card
from heatbath.run import Run
from heatbath.stages.training import ADAPTER

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TEXTS = ("What is 17 + 25?", "48 clips.\n\n  x = \\frac{1}{2}, naïve — 漢字", "def f(n):\n    return n * (n + 1) // 2")
SAME = 1e-5  # nats: float32 read back must be the same but for the order of sums
CARD, FACTS = "README.md", "heatbath.json"


@dataclass(frozen=True)
class Export:
    """What is written: a policy (by default what the run ends with), in which type, or the adapter alone."""

    out: Path
    policy: str | None = None
    dtype: str = "float32"
    adapter: bool = False
    push: str | None = None


def run_export(run: Run, wanted: Export, progress: Progress) -> dict[str, Any]:
    """Writes the folder, and uploads it where `push` names a repository; returns what was measured and where it lies.

    Raises RecipeError where the folder is not empty or there is no such policy or adapter, RunError where what was read
    back is not the policy.
    """
    if wanted.dtype not in TYPES:
        raise RecipeError(f"no type is called '{wanted.dtype}'", "--dtype", f"one of {', '.join(TYPES)}")
    policy = wanted.policy or next((p for p in reversed(run.policies) if run.checkpoint(p).is_dir()), "base")
    if policy not in run.policies:
        raise RecipeError(f"the run has no policy '{policy}'", "--policy", f"one of {', '.join(run.policies)}")
    if wanted.out.exists() and any(wanted.out.iterdir()):
        raise RecipeError("the folder exists and is not empty; nothing was written", str(wanted.out), "name another")
    name = run.model_of(policy)
    tokenizer = models.load_tokenizer(name, run.template_of(policy))
    model = models.load_model(name, torch.float32)
    ids = _ids(tokenizer, model)
    before, weights = _log_probs(model, ids), models.fingerprint(model)
    unfinished = wanted.out.with_name(f".{wanted.out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    if wanted.adapter:
        _write_adapter(run, policy, unfinished)
    else:
        _write_model(model, tokenizer, unfinished, TYPES[wanted.dtype])
    tokenizer.save_pretrained(unfinished)
    after = _log_probs(_read_back(run, wanted, unfinished), ids)
    compared = _compared(before, after)
    if not wanted.adapter and wanted.dtype == "float32" and compared["largest_difference_nats"] > SAME:
        raise RunError("what was read back is not the policy", str(unfinished), f"{compared}: report this as a fault")
    facts = {"policy": policy, "type": "adapter" if wanted.adapter else wanted.dtype, "fingerprint": weights}
    facts |= {"compared": compared, "data": (run.read_json("data.json") or {}).get("digest")}
    facts["env"] = run.read_json("env.json")
    (unfinished / FACTS).write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (unfinished / CARD).write_text(model_card(run, policy, facts), encoding="utf-8")
    if wanted.out.exists():
        wanted.out.rmdir()
    unfinished.rename(wanted.out)
    progress.say(_said(compared))
    url = _push(wanted) if wanted.push else None
    return {"folder": str(wanted.out), **facts, "url": url}


def _ids(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> list[torch.Tensor]:
    """What both are read on: questions in the chat template, and the texts themselves; [1, T] each."""
    asked = [tokenizer.apply_chat_template([{"role": "user", "content": t}], tokenize=False) for t in TEXTS]
    rows = [tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"] for text in (*asked, *TEXTS)]
    most = models.context_of(model.config) or 512
    return [row[:, :most].to(model.device) for row in rows if row.numel()]


@torch.no_grad()
def _log_probs(model: PreTrainedModel, ids: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.log_softmax(model(input_ids=row).logits.float(), dim=-1).cpu() for row in ids]


def _compared(before: list[torch.Tensor], after: list[torch.Tensor]) -> dict[str, float]:
    """Largest difference of a log-probability above 1e-4, mean KL per token, and share of tokens with the same
    likeliest successor."""
    pairs = list(zip(before, after, strict=True))
    likely = [(a - b)[a > -9.2].abs().max() for a, b in pairs]
    kl = torch.cat([(a.exp() * (a - b)).sum(-1).flatten() for a, b in pairs])
    same = torch.cat([(a.argmax(-1) == b.argmax(-1)).flatten() for a, b in pairs])
    return {
        "largest_difference_nats": float(torch.stack(likely).max()),
        "kl_nats_per_token": float(kl.mean()),
        "same_likeliest_token": float(same.float().mean()),
    }


def _said(compared: dict[str, float]) -> str:
    return (
        f"read back: log-probabilities differ by at most {compared['largest_difference_nats']:.2g} nats, KL "
        f"{compared['kl_nats_per_token']:.2g} nats per token, the likeliest token is the same for "
        f"{compared['same_likeliest_token']:.1%}"
    )


def _write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype) -> None:
    """Weights, config and generation settings; it ends where the tokenizer says that an answer ends."""
    model.to(dtype)
    settings = GenerationConfig.from_model_config(model.config)
    settings.eos_token_id, settings.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    settings.bos_token_id = tokenizer.bos_token_id
    model.generation_config = settings
    model.save_pretrained(folder)


def _write_adapter(run: Run, policy: str, folder: Path) -> None:
    """The adapter with the name of its base, for PEFT."""
    source = run.checkpoint(policy) / ADAPTER
    if not source.is_dir():
        raise RecipeError(f"'{policy}' was not trained with adapters", "--adapter", "train it with [lora]")
    shutil.copytree(source, folder, dirs_exist_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": run.recipe.model}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _read_back(run: Run, wanted: Export, folder: Path) -> PreTrainedModel:
    """What somebody else's `from_pretrained` makes of the folder."""
    if wanted.adapter:
        base = models.load_model(run.model_of("base"), torch.float32)
        found: PreTrainedModel = models.load_adapter(base, folder).eval()
        return found
    return models.load_model(run.named(folder), TYPES[wanted.dtype])


def _push(wanted: Export) -> str:
    """Uploads the folder to a private repository of the hub, as whoever is logged in; returns its address."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        url = api.create_repo(str(wanted.push), private=True, exist_ok=True)
        api.upload_folder(repo_id=str(wanted.push), folder_path=str(wanted.out))
    except (HfHubHTTPError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        remedy = f"{wanted.out} is whole; log in (hf auth login), or upload it by hand"
        raise RunError(f"the hub did not take it: {first}", str(wanted.push), remedy) from None
    return str(url)
