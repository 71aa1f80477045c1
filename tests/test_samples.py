"""The compressed samples of a run: readable by other tools, and whole after a kill at any byte."""

import gzip
import json
from pathlib import Path

import pytest

from heatbath import samples
from heatbath.run import append_jsonl, read_jsonl

BATCHES = [[{"n": i, "text": "é\u2028" * i} for i in range(size)] for size in (3, 1, 400)]


def joined(batches: list[list[dict]]) -> list[dict]:
    return [row for batch in batches for row in batch]


def test_what_was_added_is_read_back_by_us_and_by_gzip(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl.gz"
    assert samples.read(path) == []
    for batch in BATCHES:
        samples.add(path, batch)
    assert samples.read(path) == joined(BATCHES)
    with gzip.open(path) as stream:
        assert [json.loads(line) for line in stream] == joined(BATCHES)
    assert path.stat().st_size < len("".join(map(json.dumps, joined(BATCHES)))) / 5


def test_half_a_character_is_kept_and_read_back(tmp_path: Path) -> None:
    """A server can send half a surrogate pair, escaped, and no encoding writes it."""
    path, rows = tmp_path / "s.jsonl.gz", [{"text": "x\ud83d"}, {"text": "é \U0001f600 \\ud83d"}]
    samples.add(path, rows)
    assert samples.read(path) == rows
    append_jsonl(tmp_path / "rows.jsonl", rows)
    assert read_jsonl(tmp_path / "rows.jsonl") == rows


@pytest.mark.parametrize("known", [True, False])
def test_a_file_cut_at_any_byte_keeps_every_whole_batch_and_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    path = tmp_path / "s.jsonl.gz"
    ends = [0]
    for batch in BATCHES:
        samples.add(path, batch)
        ends.append(path.stat().st_size)
    whole = path.read_bytes()
    for cut in [*range(0, ends[2] + 40), *range(ends[2] + 40, len(whole), 97), len(whole)]:
        path.write_bytes(whole[:cut])
        complete = joined(BATCHES[: sum(end <= cut for end in ends[1:])])
        assert samples.read(path) == complete
        if not known:  # another process wrote the file
            monkeypatch.setattr(samples, "_written", {})
        samples.add(path, [{"later": cut}])
        assert samples.read(path) == [*complete, {"later": cut}]
        with gzip.open(path) as stream:
            assert len(stream.readlines()) == len(complete) + 1


def test_a_member_larger_than_a_chunk_and_rubbish_behind_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "CHUNK", 7)
    path = tmp_path / "s.jsonl.gz"
    for batch in BATCHES[:2]:
        samples.add(path, batch)
    with path.open("ab") as stream:
        stream.write(b"not gzip")
    assert samples.read(path) == joined(BATCHES[:2])
    samples.add(path, [{"n": 9}])
    assert samples.read(path) == [*joined(BATCHES[:2]), {"n": 9}]


def test_replacing_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl.gz"
    samples.add(path, BATCHES[2])
    samples.replace(path, BATCHES[0])
    assert samples.read(path) == BATCHES[0]
    samples.add(path, BATCHES[1])
    assert samples.read(path) == BATCHES[0] + BATCHES[1]
    samples.replace(path, [])
    assert samples.read(path) == [] and [p.name for p in tmp_path.iterdir()] == [path.name]
