"""Sampling with transformers on this machine: batches of prompts of similar length, as many as memory holds, out of
which rows are dropped as they end."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, LogitsProcessor, StoppingCriteria

from heatbath import models
from heatbath.engines.sampling import Closing, Completion, LeftOutError, Sampling, eos_ids_of, seeds_of, until_eos
from heatbath.errors import RunError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MOST, MOST_OF_LARGE = 256, 64  # rows of a batch, and on a CPU of a model above LARGE; more hardly cost less per row
LARGE = 32 * 2**20  # bytes of weights; below it a CPU's caches hold them
DROPPED = 1 / 8  # of a batch's rows must have ended before they are dropped from it, for a copy of the cache
ACTIVATIONS = 20  # numbers per prompt token and hidden size that a layer of the prompt's pass holds at its widest
CHOOSING = 64  # bytes per row and vocabulary entry while a token is chosen


class LocalSampler(Closing):
    """Samples a model of transformers: one named in a recipe, or one that is loaded, which is left as it was.

    The model's own generation settings (penalties, top-k, ...) are set aside: they would make another policy of it.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        precision: str = "auto",
        batch: int | None = None,
    ):
        dtype = models.autocast_dtype(precision) or torch.float32
        self.model: PreTrainedModel = models.load_model(model, dtype) if isinstance(model, str) else model
        self.batch, self.pad_id = batch, tokenizer.pad_token_id
        self.context = models.context_of(self.model.config)
        self.eos_ids = eos_ids_of(self.model, tokenizer)

    def sample(
        self, prompts: Sequence[list[int]], settings: Sampling, seeds: int | Sequence[int]
    ) -> Iterator[list[Completion]]:
        """Yields batches, the longest prompts first. A batch that does not fit into memory is halved and drawn again;
        a completion ends where the model's context does.

        Raises RunError where not even one prompt fits, or the model gives no finite logits; LeftOutError in the end
        where prompts leave no room in the context.
        """
        own = seeds_of(seeds, len(prompts))
        most_new = [self._most_new(prompt, settings) for prompt in prompts]
        left = sorted((i for i, new in enumerate(most_new) if new > 0), key=lambda i: -len(prompts[i]))
        per_token, droppable = _cache_of(self.model)
        most = self.batch or len(prompts)
        while left:
            width = len(prompts[left[0]])
            size = min(most, self.batch or fitting(self.model, width, most_new[left[-1]], per_token))
            rows = left[:size]
            if not droppable:  # then all rows of a batch go on until the last one ends
                rows = [i for i in rows if most_new[i] == most_new[rows[0]]]
            limits = [most_new[i] for i in rows]
            try:
                found = self._draw([prompts[i] for i in rows], limits, settings, [own[i] for i in rows], droppable)
            except (MemoryError, RuntimeError) as error:
                if not _out_of_memory(error):
                    raise
                found = None
            if found is None:
                if len(rows) == 1:
                    raise RunError(
                        f"not even one completion fits into memory: {width:,} tokens of prompt and up to "
                        f"{settings.max_new_tokens:,} new ones",
                        "eval.max_new_tokens",
                        'lower it, set precision = "bf16", or take a smaller model or another engine',
                    )
                most = len(rows) // 2
                _free()
                continue
            left = left[len(rows) :]
            yield [self._completion(i, ids) for i, ids in zip(rows, found, strict=True)]
        if long := [len(prompt) for prompt, new in zip(prompts, most_new, strict=True) if new <= 0]:
            raise LeftOutError(
                f"{len(long):,} of {len(prompts):,} prompts do not fit into the model's context of {self.context:,} "
                f"tokens (the longest has {max(long):,})",
                "sampling",
                "leave these problems out, or take a model with a longer context",
            )

    def _most_new(self, prompt: list[int], settings: Sampling) -> int:
        """Tokens that the completion may have, 0 or less where the prompt fills the context."""
        most = settings.max_new_tokens
        return most if self.context is None else min(most, self.context - len(prompt))

    def close(self) -> None:
        if hasattr(self, "model"):
            del self.model
            _free()

    def _completion(self, prompt: int, ids: list[int]) -> Completion:
        return Completion(prompt, ids, "eos" if ids[-1] in self.eos_ids else "length")

    @torch.inference_mode()
    def _draw(
        self, prompts: list[list[int]], limits: list[int], settings: Sampling, seeds: list[int], droppable: bool
    ) -> list[list[int]]:
        """The completions of prompts, in order, up to and including EOS, each of `limits` tokens at most.

        They are left-padded, so that each continues its prompt directly. `generate` is left whenever enough rows have
        ended, and goes on with the cache of the others.
        """
        width, device = max(map(len, prompts)), self.model.device
        ids = torch.tensor([[self.pad_id] * (width - len(p)) + p for p in prompts], device=device)  # [B, T]
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        rows, draw = list(range(len(prompts))), _Draw(settings, seeds)
        cache = self._shared(ids, mask, prompts) if droppable else None
        found: list[list[int]] = [[] for _ in prompts]
        ends = torch.tensor(self.eos_ids, dtype=torch.long, device=device)
        while rows:
            end = width + min(limits[i] for i in rows)  # where the first of them must end
            ended = _Ended(ends, max(1, int(len(rows) * DROPPED)) if droppable else len(rows))
            out = self._generate(ids, mask, new=end - ids.shape[1], cache=cache, hooks=(draw, ended))
            draw.require_finite()
            ids, cache = out.sequences, out.past_key_values
            full = torch.tensor([width + limits[i] <= ids.shape[1] for i in rows], device=device)
            over = ended.rows | full
            for i in over.nonzero()[:, 0].tolist():
                found[rows[i]] = until_eos(ids[i, width:].tolist(), self.eos_ids)
            live = (~over).nonzero()[:, 0]
            if not len(live):
                break
            mask = torch.cat([mask, mask.new_ones(len(mask), ids.shape[1] - mask.shape[1])], 1)[live]
            ids = ids[live]
            cache.reorder_cache(live)  # which also takes a part of the rows
            rows = [rows[i] for i in live.tolist()]
            draw.keep(live.tolist())
        return found

    def _shared(self, ids: Tensor, mask: Tensor, prompts: list[list[int]]) -> Any:
        """The cache of all but the last token of each prompt, computed once for prompts that are there several times;
        None where there are none."""
        number = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        if len(number) == len(prompts) or min(map(len, prompts)) == 1:
            return None
        place = {tuple(prompt): i for i, prompt in enumerate(prompts)}
        once = [place[prompt] for prompt in number]
        cache = self._generate(ids[once, :-1], mask[once, :-1], new=1).past_key_values
        cache.reorder_cache(torch.tensor([number[tuple(prompt)] for prompt in prompts], device=ids.device))
        return cache

    def _generate(self, ids: Tensor, mask: Tensor, *, new: int, cache: Any = None, hooks: Any = (None, None)) -> Any:
        """What `generate` returns of ids [B, T], of which `cache` may hold the first; hooks: (_Draw, _Ended)."""
        own = self.model.generation_config
        self.model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
            eos_token_id=self.eos_ids or None, pad_token_id=self.pad_id
        )
        try:
            return self.model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=mask,
                past_key_values=cache,
                max_new_tokens=new,
                do_sample=False,  # _Draw leaves one token to choose
                logits_processor=[hook for hook in hooks[:1] if hook],
                stopping_criteria=[hook for hook in hooks[1:] if hook],
                return_dict_in_generate=True,
            )
        finally:
            self.model.generation_config = own


class _Draw(LogitsProcessor):
    """Leaves of each row's logits one token, drawn with the row's own stream of random numbers."""

    def __init__(self, settings: Sampling, seeds: list[int]):
        self.settings = settings
        self.streams = [np.random.default_rng(seed) for seed in seeds]
        self.finite: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # scores: [B, V]
        good = scores.amax(-1).isfinite().all()
        self.finite = good if self.finite is None else self.finite & good
        u = torch.tensor([stream.random() for stream in self.streams], dtype=torch.float64, device=scores.device)
        chosen = choose(scores, self.settings, u)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)

    def keep(self, rows: list[int]) -> None:
        self.streams = [self.streams[i] for i in rows]

    def require_finite(self) -> None:
        if self.finite is not None and not self.finite:
            raise RunError(
                "the model's logits are not finite",
                "sampling",
                'the weights are broken, or overflow in 16 bits: set precision = "fp32"',
            )


def choose(logits: Tensor, settings: Sampling, u: Tensor) -> Tensor:
    """One token of each row of logits [B, V]: the one at which the distribution function, of the tokens in order of
    their number (with top_p: of their probability), first exceeds u [B], float64 in [0, 1)."""
    if settings.temperature == 0:
        return logits.argmax(-1)
    logits = logits.float()
    weights = ((logits - logits.amax(-1, keepdim=True)) / settings.temperature).exp()
    if settings.top_p == 1:
        mass = weights.cumsum(-1, dtype=torch.float64)
        place = torch.searchsorted(mass, (u * mass[:, -1])[:, None], right=True)
        return place[:, 0].clamp(max=logits.shape[1] - 1)  # beyond it where logits are not numbers, which is told later
    weights, tokens = weights.sort(dim=-1, descending=True, stable=True)
    mass = weights.cumsum(-1, dtype=torch.float64)
    before = mass - weights
    last = ((before < settings.top_p * mass[:, -1:]).sum(-1, keepdim=True) - 1).clamp(min=0)
    place = torch.searchsorted(mass, u[:, None] * mass.gather(1, last), right=True)
    return tokens.gather(1, place.clamp(max=last))[:, 0]


class _Ended(StoppingCriteria):
    """Stops generation once `enough` rows have ended; `rows` [B] says which have."""

    def __init__(self, eos_ids: Tensor, enough: int):
        self.eos_ids, self.enough = eos_ids, enough
        self.rows = torch.zeros(0, dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        now = torch.isin(input_ids[:, -1], self.eos_ids)
        self.rows = self.rows | now if len(self.rows) else now
        return (self.rows.sum() >= self.enough).expand(len(now))


def fitting(model: PreTrainedModel, width: int, new: int, per_token: float) -> int:
    """How many prompts of `width` tokens are continued by `new` at a time: a power of two within [1, MOST].

    `per_token` is the bytes of the cache for a token. On a GPU four fifths of the free memory are taken, on a CPU a
    quarter of the whole, and at most half of what is available.
    """
    config = model.config.get_text_config(decoder=True)
    prompt = width * ACTIVATIONS * config.hidden_size * model.dtype.itemsize
    row = (width + new) * per_token + max(prompt, CHOOSING * config.vocab_size)
    large = sum(p.nbytes for p in model.parameters()) > LARGE
    most = MOST_OF_LARGE if large and model.device.type == "cpu" else MOST
    room = _free_memory(model.device) / row
    return 1 << int(min(room, most)).bit_length() - 1 if room >= 1 else 1


def _free_memory(device: torch.device) -> float:
    """Bytes that a batch may take."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return 0.8 * (torch.cuda.mem_get_info(device)[0] + unused)
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(whole / 4, _available() / 2)


def _available() -> float:
    """Bytes of main memory that are free or could be freed; infinite where the system does not say."""
    found = [float("inf")]
    info, limit, used = (
        Path(name) for name in ("/proc/meminfo", "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current")
    )
    if info.is_file():
        line = next(line for line in info.read_text().splitlines() if line.startswith("MemAvailable"))
        found.append(1024.0 * int(line.split()[1]))
    if limit.is_file() and (most := limit.read_text().strip()).isdigit():
        found.append(float(int(most) - int(used.read_text())))
    return min(found)


@torch.inference_mode()
def _cache_of(model: PreTrainedModel) -> tuple[float, bool]:
    """Bytes that the model's cache grows by with a token, and whether rows can be dropped from it; measured, since
    architectures differ in what they keep."""
    two = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    cache = getattr(model(input_ids=two, use_cache=True), "past_key_values", None)
    if not isinstance(cache, Cache):
        return 0.0, False
    kept = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(t.nbytes for t in kept if isinstance(t, Tensor)) / 2, True


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
