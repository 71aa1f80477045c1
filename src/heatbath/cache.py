"""What the base says about each supervised token, kept on disk, so that training needs no base body.

For every token of a row log p_base(y), 4 bytes; and the base's hidden state either everywhere (`hidden`, exact) or only
where the objective's target leaves the base more than ε (`surprise`). The base's head is kept once.

Nothing in it can be stale: a folder is named by the base's every weight, its configuration and the precision of its
products, and a row within it by its token ids and labels, in which its text, the chat template and the tokenizer are.
Rows are written in shards that take their name only when complete; an interrupted fill goes on after the last of them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from heatbath.data.rendering import IGNORE, Rendered
from heatbath.errors import RunError
from heatbath.ideas.statistics import TokenStats
from heatbath.reference import BaseView, FrozenBase, base_pass, sequences

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EPSILON = 1e-3
SHARD_TOKENS = 2**20  # a fill loses at most so many supervised tokens to a kill
SHARD_BYTES = 2**28
STORED = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
}

OPEN_FILES = 300  # a process may usually have 1,024, and a large cache has thousands
ASKED_TOKENS = 2**20  # whose need is found at once
# Irrelevant to what the body computes, and changed by trainers.
NOT_WEIGHTS = ("_name_or_path", "transformers_version", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id")

# Which tokens' hidden states must be there: of log p_base [n], columns and the row of each token [n], a mask [n].
Needed = Callable[[Tensor, dict[str, Tensor], Tensor], Tensor]


def nothing(logp: Tensor, columns: dict[str, Tensor], segments: Tensor) -> Tensor:
    """No hidden state at all: log p_base alone."""
    return torch.zeros(len(logp), dtype=torch.bool)


def everything(logp: Tensor, columns: dict[str, Tensor], segments: Tensor) -> Tensor:
    """The hidden state of every token: exact for any objective."""
    return torch.ones(len(logp), dtype=torch.bool)


@dataclass(frozen=True)
class NeededBy:
    """The tokens whose target leaves the base more than `epsilon`: 1 − w > ε under the objective's smallest β."""

    objective: Any
    vocab_size: int
    epsilon: float = EPSILON

    def __post_init__(self) -> None:
        if not hasattr(self.objective, "target_mass"):
            raise RunError(
                f"{type(self.objective).__name__} is not the base lifted at one token: it needs the base everywhere",
                "sft.reference",
                'take "hidden" or "model"',
            )

    def __call__(self, logp: Tensor, columns: dict[str, Tensor], segments: Tensor) -> Tensor:
        goal = self.objective.most_cautious() if hasattr(self.objective, "most_cautious") else self.objective
        stats = TokenStats(vocab_size=self.vocab_size, ref_logp=logp.double(), columns=columns)
        if hasattr(goal, "sequence_weights"):
            stats.columns["sequence_weight"] = goal.sequence_weights(stats, segments)
        left: Tensor = 1 - goal.target_mass(stats) > self.epsilon
        return left


@dataclass(frozen=True)
class CachedRow:
    """Of one row: log p_base [n] of its supervised tokens, and the hidden states [m, d] at the positions `held` [m]."""

    logp: Tensor
    hidden: Tensor
    held: Tensor


class ReferenceCache:
    """The cache of one base model. `fill` adds rows, `row` reads one by its token ids and labels."""

    def __init__(self, folder: Path):
        self.folder = folder
        meta = json.loads((folder / "meta.json").read_text())
        self.dtype = STORED[meta["dtype"]]
        self.vocab_size, self.width = meta["vocab_size"], meta["width"]
        self._shards: dict[str, _Shard] = {}
        self._where: dict[bytes, tuple[_Shard, int]] = {}
        self._read_shards()

    @classmethod
    def of(cls, model: PreTrainedModel, root: Path, autocast: torch.dtype | None = None) -> ReferenceCache:
        """The cache of that base under `root`, made where there is none yet. Reads every weight (about 1 s per GB)."""
        dtype = autocast or model.get_output_embeddings().weight.dtype
        name = str(dtype).removeprefix("torch.")
        folder = root / f"{weights_hash(model)[:24]}-{name}"
        if not (folder / "meta.json").is_file():
            head = model.get_output_embeddings().weight.detach()
            with _made_whole(folder) as unfinished:
                np.save(unfinished / "head.npy", _to_numpy(head))
                meta = {"dtype": name, "head": str(head.dtype).removeprefix("torch."), "width": head.shape[1]}
                (unfinished / "meta.json").write_text(json.dumps({**meta, "vocab_size": head.shape[0]}))
        return cls(folder)

    @property
    def head(self) -> Tensor:
        """The base's output embedding, [V, d]."""
        meta = json.loads((self.folder / "meta.json").read_text())
        return _to_torch(np.load(self.folder / "head.npy"), STORED[meta["head"]])

    def missing(self, rows: Sequence[Rendered], needed: Needed) -> list[int]:
        """Numbers of the rows that are not there, or lack a hidden state that is needed."""
        found, known, tokens = [], [], 0
        for number, row in enumerate(rows):
            held = self._held(row)
            if held is None:
                found.append(number)
                continue
            known.append((number, row, *held))
            tokens += len(held[0])
            if tokens >= ASKED_TOKENS:
                found += _lacking(known, needed)
                known, tokens = [], 0
        return sorted(found + _lacking(known, needed))

    def _held(self, row: Rendered) -> tuple[Tensor, Tensor] | None:
        """log p_base and whether the hidden state is there, [n] each, without reading a hidden state."""
        place = self._where.get(row_key(row.input_ids, row.labels))
        if place is None:
            return None
        shard, number = place
        logp, where = shard.tokens(number)
        return torch.from_numpy(logp.copy()), torch.from_numpy(where >= 0)

    def fill(
        self,
        base: FrozenBase,
        rows: Sequence[Rendered],
        needed: Needed,
        *,
        pad_id: int,
        autocast: torch.dtype | None = None,
        said: Callable[[int], None] = lambda count: None,
    ) -> int:
        """Adds what is missing of the rows, in one pass of the base over them; returns how many rows it passed over.
        `said` hears the number of rows done. Killed and called again it goes on after its last whole shard."""
        with FileLock(self.folder / ".lock"):
            self._clear_away()
            self._read_shards()
            alike: dict[bytes, list[Rendered]] = {}  # rows of the same tokens may differ in their columns
            for number in self.missing(rows, needed):
                alike.setdefault(row_key(rows[number].input_ids, rows[number].labels), []).append(rows[number])
            todo, shard = [same[0] for same in alike.values()], _NewShard(self)
            found = base_pass(base, todo, pad_id=pad_id, autocast=autocast)
            for done, (number, hidden, logp) in enumerate(found, 1):
                row, before = todo[number], self._held(todo[number])
                key, one = row_key(row.input_ids, row.labels), torch.zeros(len(logp), dtype=torch.long)
                mask = torch.zeros(len(logp), dtype=torch.bool) if before is None else before[1]  # what is there stays
                for same in alike[key]:
                    mask = mask | needed(logp, token_columns(same), one)
                shard.add(key, logp, mask, hidden)
                said(done)
                if shard.full:
                    shard.write()
                    shard = _NewShard(self)
            shard.write()
            self._read_shards()
            return len(todo)

    def _clear_away(self) -> None:
        """Removes what a kill has left: unfinished folders, and shards that a power cut has broken."""
        _mapped.cache_clear()  # what is mapped may have been broken since
        for path in [
            *self.folder.glob(".shard-*"),
            *(p for p in self.folder.glob("shard-*") if _Shard.read(p) is None),
        ]:
            shutil.rmtree(path, ignore_errors=True)
            self._shards.pop(path.name, None)
        self._where = {key: (s, n) for key, (s, n) in self._where.items() if s.path.name in self._shards}

    def row(self, input_ids: Sequence[int], labels: Sequence[int]) -> CachedRow | None:
        """What is known of a row, or None."""
        place = self._where.get(row_key(input_ids, labels))
        if place is None:
            return None
        shard, number = place
        logp, where = shard.tokens(number)
        held = np.flatnonzero(where >= 0)
        hidden = shard.hidden(where[held])
        return CachedRow(torch.from_numpy(logp.copy()), _to_torch(hidden, self.dtype), torch.from_numpy(held))

    def logp(self, row: Rendered) -> Tensor:
        """log p_base of the row's supervised tokens, [n]. Raises RunError where the row is not in the cache."""
        held = self._held(row)
        if held is None:
            raise RunError("the reference cache does not hold a row", str(self.folder), "fill it with these rows first")
        return held[0]

    def _read_shards(self) -> None:
        for path in sorted(self.folder.glob("shard-*")):
            shard = None if path.name in self._shards else _Shard.read(path)
            if shard is not None:
                self._shards[path.name] = shard
                for number, key in enumerate(shard.keys):  # a later shard knows more about the same row
                    self._where[key] = (shard, number)


class CachedBase:
    """The base from a `ReferenceCache`: no base body in memory, only its head.

    A batch's sequences are found by their own token ids and labels, so padding, packing, order, accumulation and ranks
    make no difference, and a row of another text, template or tokenizer is not found rather than taken for its like.
    """

    def __init__(self, cache: ReferenceCache, epsilon: float = EPSILON):
        """`epsilon` is how much an objective may leave the base at a token whose hidden state the cache lacks; training
        stops where one leaves it more."""
        self.cache, self.epsilon = cache, epsilon
        self._head = cache.head

    @property
    def head(self) -> Tensor:
        """Output embedding of the base, [V, d]."""
        return self._head

    def view(self, inputs: Mapping[str, Tensor], labels: Tensor) -> BaseView:
        """Raises RunError where a sequence of the batch is not in the cache."""
        nothing_yet = torch.zeros(0)
        logps, hiddens, places = [nothing_yet], [self._head[:0].to("cpu", self.cache.dtype)], [nothing_yet.long()]
        start = 0
        for ids, row_labels in sequences(inputs, labels):
            if all(label == IGNORE for label in row_labels[1:]):
                continue
            row = self.cache.row(ids, row_labels)
            if row is None:
                raise RunError(
                    f"the reference cache does not hold a sequence of {len(ids)} tokens that is trained on",
                    str(self.cache.folder),
                    "fill it with these very rows (cache.fill, or heatbath surprise)",
                )
            logps.append(row.logp)
            hiddens.append(row.hidden)
            places.append(row.held + start)
            start += len(row.logp)
        device = labels.device
        if self._head.device != device:
            self._head = self._head.to(device)
        hidden, logp, held = (torch.cat(parts).to(device) for parts in (hiddens, logps, places))
        return BaseView(hidden, logp, None if len(held) == len(logp) else held, self.epsilon)


class _Shard:
    """Some rows on disk, memory-mapped. Token arrays of all rows end to end; `where` is −1 or a row of `hidden`."""

    @classmethod
    def read(cls, path: Path) -> _Shard | None:
        """The shard, or None where it is broken or gone. Any other trouble of the file system is raised: a shard that
        cannot be opened just now is not broken."""
        try:
            return cls(path)
        except (FileNotFoundError, NotADirectoryError, ValueError, EOFError):
            return None

    def __init__(self, path: Path):
        self.path = path
        self.keys = [k.tobytes() for k in np.load(path / "keys.npy")]
        self._offsets = np.load(path / "offsets.npy")
        for name in ("logp", "where", "hidden"):
            _mapped(path / f"{name}.npy")

    def tokens(self, number: int) -> tuple[Any, Any]:
        part = slice(self._offsets[number], self._offsets[number + 1])
        return _mapped(self.path / "logp.npy")[part], _mapped(self.path / "where.npy")[part]

    def hidden(self, where: Any) -> Any:
        hidden = _mapped(self.path / "hidden.npy")
        if len(where) and where[-1] - where[0] + 1 == len(where):
            return np.array(hidden[where[0] : where[-1] + 1])
        return hidden[where]


@functools.lru_cache(maxsize=OPEN_FILES)
def _mapped(path: Path) -> Any:
    return np.load(path, mmap_mode="r")


class _NewShard:
    """Rows collected in memory until they are written as one shard."""

    def __init__(self, cache: ReferenceCache):
        self.cache = cache
        self.keys: list[bytes] = []
        self.logps: list[Any] = []
        self.masks: list[Any] = []
        self.hiddens: list[Any] = []
        self._tokens = self._bytes = 0

    @property
    def full(self) -> bool:
        return self._tokens >= SHARD_TOKENS or self._bytes >= SHARD_BYTES

    def add(self, key: bytes, logp: Tensor, mask: Tensor, hidden: Tensor) -> None:
        self.keys.append(key)
        self.logps.append(logp.float().numpy())
        self.masks.append(mask.numpy())
        self.hiddens.append(_to_numpy(hidden[mask].to(self.cache.dtype)))
        self._tokens, self._bytes = self._tokens + len(logp), self._bytes + self.hiddens[-1].nbytes

    def write(self) -> None:
        if not self.keys:
            return
        mask, logp = np.concatenate(self.masks), np.concatenate(self.logps)
        where = np.where(mask, np.cumsum(mask) - 1, -1)
        taken = [int(path.name.partition("-")[2]) for path in self.cache.folder.glob("shard-*")]
        with _made_whole(self.cache.folder / f"shard-{max(taken, default=-1) + 1:06d}") as folder:
            np.save(folder / "keys.npy", np.frombuffer(b"".join(self.keys), dtype="V16"))
            np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum([len(x) for x in self.logps])]))
            np.save(folder / "logp.npy", logp)
            np.save(folder / "where.npy", where)
            np.save(folder / "hidden.npy", np.concatenate(self.hiddens))
            without = -logp[~mask]
            above = float(without.max()) if len(without) else 0.0
            (folder / "about.json").write_text(
                json.dumps({"tokens": len(logp), "hidden": int(mask.sum()), "holds_hidden_above_nats": above})
            )


def _lacking(known: list[tuple[int, Rendered, Tensor, Tensor]], needed: Needed) -> list[int]:
    """Numbers of those rows of which a hidden state is needed and not held."""
    if not known:
        return []
    numbers, rows, logps, held = zip(*known, strict=True)
    columns = [token_columns(row) for row in rows]
    together = {name: torch.cat([c[name] for c in columns]) for name in columns[0]}
    segments = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([len(x) for x in logps]))
    lacking = needed(torch.cat(logps), together, segments) & ~torch.cat(held)
    return [numbers[i] for i in segments[lacking].unique().tolist()]


@contextmanager
def _made_whole(folder: Path) -> Iterator[Path]:
    """A folder to write into that takes its name only when everything in it is on the disk."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield unfinished
        for path in (*unfinished.iterdir(), unfinished):
            _to_disk(path)
        unfinished.chmod(0o755)
        unfinished.rename(folder)
        _to_disk(folder.parent)
    except OSError:
        if not (folder / "meta.json").is_file():  # else another process made the same cache first
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def row_key(input_ids: Sequence[int], labels: Sequence[int]) -> bytes:
    """16 bytes that name a row by its tokens and by which of them are supervised; the first token never is."""
    ids = np.asarray(input_ids, dtype=np.int64)
    supervised = np.asarray(labels, dtype=np.int64).copy()
    supervised[:1] = IGNORE
    return hashlib.sha256(ids.tobytes() + b"|" + supervised.tobytes()).digest()[:16]


def token_columns(row: Rendered) -> dict[str, Tensor]:
    """The row's columns at its supervised tokens, [n] each."""
    at = [i for i, label in enumerate(row.labels) if i and label != IGNORE]
    return {name: torch.tensor([values[i] for i in at]) for name, values in row.columns.items()}


def weights_hash(model: PreTrainedModel) -> str:
    """SHA-256 over the configuration and every byte of every weight."""
    digest = hashlib.sha256()
    config = {k: v for k, v in model.config.to_dict().items() if k not in NOT_WEIGHTS and not k.startswith("output_")}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    tensors: Iterable[tuple[str, Tensor]] = sorted(model.state_dict().items())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()


def _to_numpy(x: Tensor) -> Any:
    x = x.detach().cpu().contiguous()
    return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()


def _to_torch(x: Any, dtype: torch.dtype) -> Tensor:
    out = torch.from_numpy(np.ascontiguousarray(x))
    return out.view(dtype) if dtype == torch.bfloat16 else out
