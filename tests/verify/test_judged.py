"""The judged task: answers of both turns and their ratings are kept, gone on with, and turned into results.

A real server judges (`judge_server.py`); the policy is a sampler that answers by a rule, token by token.
"""

import json
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from judge_server import failed, rates, said, script_server, stars  # noqa: F401 - the fixture `serving`
from scipy import stats

from conftest import small_tokenizer
from heatbath.data import rendering
from heatbath.data.tasks import find
from heatbath.engines.sampling import Completion, LeftOutError, Sampling
from heatbath.errors import RecipeError, RunError
from heatbath.progress import Progress
from heatbath.recipe import parse
from heatbath.run import Run
from heatbath.stages import judged
from heatbath.stages.exams import Exam
from heatbath.verify.judge import CATEGORIES, NEED_REFERENCE

TOKENIZER = small_tokenizer()
QUIET = Progress(quiet=True)
COUNT = 16


class Policy:
    """A sampler that answers what it is asked by its last words; batches of `width`; dies before batch `dies`."""

    def __init__(self, tag: str = "", width: int = 3, dies: int | None = None):
        self.tag, self.width, self.dies, self.asked, self.seeds = tag, width, dies, [], []

    def sample(
        self, prompts: Sequence[list[int]], settings: Sampling, seeds: Sequence[int]
    ) -> Iterator[list[Completion]]:
        assert settings.temperature == 0.5 and len(seeds) == len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for number, start in enumerate(range(0, len(order), self.width)):
            if number == self.dies:
                raise KeyboardInterrupt
            batch = order[start : start + self.width]
            texts = {i: TOKENIZER.decode(prompts[i]) for i in batch}
            self.asked += texts.values()
            self.seeds += [seeds[i] for i in batch]
            made = []
            for i, text in texts.items():
                words = f"{self.tag}{text.rpartition('<|user|>')[2].partition('<|end|>')[0]}!"
                ids = TOKENIZER(words)["input_ids"]
                cut = "cut" in words
                made.append(Completion(i, ids if cut else [*ids, 1], "length" if cut else "eos"))
            yield made

    def close(self) -> None: ...

    def __enter__(self) -> "Policy":
        return self

    def __exit__(self, *_: object) -> None: ...


def written(folder: Path, rows: list[dict]) -> Path:
    folder.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def exam(tmp_path: Path) -> Exam:
    """16 questions of two turns, two of each category, and their references, as a task of one's own."""
    names = [CATEGORIES[i % 8] for i in range(COUNT)]
    asked = [{"question_id": 81 + i, "category": c, "turns": [f"ask {i}?", f"and {i}?"]} for i, c in enumerate(names)]
    references = [
        {"question_id": 81 + i, "choices": [{"turns": [f"ref {i}", f"ref {i}b"]}]}
        for i, c in enumerate(names)
        if c in NEED_REFERENCE
    ]
    written(tmp_path / "q.jsonl", asked)
    written(tmp_path / "r.jsonl", references)
    (tmp_path / "talk.toml").write_text(
        'name = "talk"\nkind = "judge"\nfile = "q.jsonl"\nreferences = "r.jsonl"\nproblems = 16\n'
    )
    task = find(tmp_path / "talk.toml")
    return Exam("talk", 1, "judge", task.rows(), None, 1, (1,), Sampling(0.5, 1.0, 64), task)


def made(folder: Path, url: str = "http://127.0.0.1:9/v1", model: str = "judge") -> Run:
    """A run whose three policies nobody needs to train."""
    table = {
        "model": "m",
        "data": {"source": "arithmetic"},
        "sft": {},
        "rl": {},
        "eval": {"tasks": [str(folder / "talk.toml")], "judge": {"endpoint": url, "model": model}},
    }
    (folder / "run").mkdir(exist_ok=True)
    return Run(folder / "run", parse(table))


def ask(run: Run, exam: Exam, policy: str, sampler: Policy) -> None:
    judged.sample_answers(run, exam, policy, sampler, TOKENIZER, 0, QUIET)


def judge(run: Run, exam: Exam, *policies: str) -> dict:
    for policy in policies:
        judged.judge_answers(run, run.recipe, exam, policy, QUIET)
    return judged.results(run, run.recipe, exam)


def conversations(server: object) -> list[str]:
    return sorted(request["messages"][-1]["content"] for request in server.requests)


def test_a_first_answer_that_cannot_be_had_costs_no_other_its_second(exam: Exam, tmp_path: Path) -> None:
    class Choosy(Policy):
        def sample(self, prompts, settings, seeds):
            kept = [i for i, prompt in enumerate(prompts) if "ask 3?" not in TOKENIZER.decode(prompt)]
            for batch in super().sample([prompts[i] for i in kept], settings, [seeds[i] for i in kept]):
                yield [replace(completion, prompt=kept[completion.prompt]) for completion in batch]
            if len(kept) < len(prompts):
                raise LeftOutError("a prompt was refused")

    run = made(tmp_path)
    for _ in range(2):
        with pytest.raises(LeftOutError):
            ask(run, exam, "base", Choosy())
        assert len(run.samples("base", "talk")) == 2 * (COUNT - 1)


def test_both_turns_are_asked_the_second_with_the_first_in_its_history(exam: Exam, tmp_path: Path) -> None:
    run, policy = made(tmp_path), Policy()
    assert len(judged.missing(run, exam, "base")) == COUNT
    ask(run, exam, "base", policy)
    assert judged.missing(run, exam, "base") == []
    rows = run.samples("base", "talk")
    assert [row["turn"] for row in rows] == [1] * COUNT + [2] * COUNT
    for i in range(COUNT):
        first = rendering.prompt_ids(TOKENIZER, [{"role": "user", "content": f"ask {i}?"}])
        turns = [("user", f"ask {i}?"), ("assistant", f"ask {i}?!"), ("user", f"and {i}?")]
        second = rendering.prompt_ids(TOKENIZER, [{"role": role, "content": text} for role, text in turns])
        for ids in (first, second):
            assert policy.asked.count(TOKENIZER.decode(ids)) == 1
    assert len(set(policy.seeds)) == 2 * COUNT == len({row["seed"] for row in rows})
    one = rows[0]
    assert one["completion"] == one["question"] + "!" and one["ids"][-1] == 1 and one["finished"]
    assert one["tokens"] == len(one["ids"]) and one["score"] is None and one["status"] == "answered"
    again = Policy()
    ask(run, exam, "base", again)
    assert again.asked == []


def test_a_system_message_comes_first(exam: Exam, tmp_path: Path) -> None:
    policy = Policy()
    ask(made(tmp_path), replace(exam, system="Be brief."), "base", policy)
    assert (
        all(text.startswith("<|system|>Be brief.<|end|>") for text in policy.asked) and len(policy.asked) == 2 * COUNT
    )


@pytest.mark.parametrize("dies", [0, 1, 4])
def test_a_kill_loses_at_most_the_batch_in_flight(exam: Exam, tmp_path: Path, dies: int) -> None:
    (tmp_path / "whole").mkdir()
    run, whole = made(tmp_path), Run(tmp_path / "whole", made(tmp_path).recipe)
    ask(whole, exam, "base", Policy())
    asked: list[str] = []
    for _ in range(40):
        policy = Policy(dies=dies if dies else None) if asked or dies else Policy(dies=0)
        try:
            ask(run, exam, "base", policy)
            asked += policy.asked
            break
        except KeyboardInterrupt:
            asked += policy.asked or ["nothing"]
            assert len(run.samples("base", "talk")) == sum(text != "nothing" for text in asked)
    assert len([text for text in asked if text != "nothing"]) == 2 * COUNT, "no turn is asked twice"

    def told(of: Run) -> list[tuple]:
        return sorted((r["problem"], r["turn"], r["completion"], r["seed"]) for r in of.samples("base", "talk"))

    assert told(run) == told(whole)


def test_ratings_become_means_over_questions_with_what_failed_counted(exam: Exam, tmp_path: Path, serving) -> None:
    """Against the sums: the judge's rating is a function of what it is asked, and it is silent about two answers."""

    def script(request: dict, number: int):
        text = request["messages"][-1]["content"]
        return said("No comment.") if "and 3?!" in text or "ask 5?!" in text else rates(request, number)

    server = serving(script)
    run = made(tmp_path, server.url)
    ask(run, exam, "base", Policy())
    found = judge(run, exam, "base")
    entry = found["policies"]["base"]
    ratings = defaultdict(list)
    for request in server.requests:
        text = request["messages"][-1]["content"]
        number = next(i for i in range(COUNT) if f"and {i}?!" in text or (f"ask {i}?!" in text and "and " not in text))
        if not ("and 3?!" in text or "ask 5?!" in text):
            ratings[number].append(stars(request))
    assert {i: len(values) for i, values in ratings.items()} == {**{i: 2 for i in range(COUNT) if i != 5}, 3: 1}
    means = {i: np.mean(values) for i, values in ratings.items()}
    assert entry["rating"]["mean"] == pytest.approx(np.mean(list(means.values())))
    interval = stats.t.interval(0.95, len(means) - 1, np.mean(list(means.values())), stats.sem(list(means.values())))
    assert (entry["rating"]["low"], entry["rating"]["high"]) == pytest.approx(interval)
    for k, category in enumerate(CATEGORIES):
        of = [mean for i, mean in means.items() if i % 8 == k]
        assert entry["categories"][category]["mean"] == pytest.approx(np.mean(of))
    assert list(entry["categories"]) == list(CATEGORIES)
    assert entry["failures"] == 3 and entry["problems"] == COUNT and entry["samples"] == 2 * COUNT
    assert (entry["judge"], entry["prompts"]) == ("judge", "heatbath-1")
    kept = [json.loads(line) for line in (run.folder / "judgments.jsonl").read_text().splitlines()]
    silent = [row for row in kept if row["rating"] is None]
    assert len(kept) == 2 * COUNT and {row["text"] for row in silent} == {"No comment."} and len(silent) == 3
    assert all(row["problem_with_it"] == "no rating" for row in silent)


def test_references_go_to_the_judge_where_the_category_needs_them(exam: Exam, tmp_path: Path, serving) -> None:
    server = serving(rates)
    run = made(tmp_path, server.url)
    ask(run, exam, "base", Policy())
    judge(run, exam, "base")
    for i in range(COUNT):
        asked = [text for text in conversations(server) if f"ask {i}?!" in text]
        assert len(asked) == 2 and all((f"ref {i}" in text) == (CATEGORIES[i % 8] in NEED_REFERENCE) for text in asked)


def test_a_dead_judge_costs_only_what_was_in_flight(exam: Exam, tmp_path: Path, serving) -> None:
    """The server refuses the key after 20 replies; the same command then asks for the rest alone, and a third one for
    nothing."""
    dead = threading.Event()

    def script(request: dict, number: int):
        if number > 20 and not dead.is_set():
            return failed(401, "expired")
        return rates(request, number)

    server = serving(script)
    run = made(tmp_path, server.url)
    ask(run, exam, "base", Policy())
    with pytest.raises(RunError, match="HTTP 401"):
        judge(run, exam, "base")
    assert judged.results(run, run.recipe, exam) == {"policies": {}, "differences": []}
    answered = conversations(server)[:0] + [r["messages"][-1]["content"] for r in server.requests[:20]]
    dead.set()
    before = len(server.requests)
    found = judge(run, exam, "base")
    rest = [r["messages"][-1]["content"] for r in server.requests[before:]]
    assert len(rest) == 2 * COUNT - 20 and not set(rest) & set(answered)
    assert found["policies"]["base"]["failures"] == 0
    before = len(server.requests)
    assert judge(run, exam, "base") == found and len(server.requests) == before


def test_differences_are_paired_over_questions(exam: Exam, tmp_path: Path, serving) -> None:
    server = serving(rates)
    run = made(tmp_path, server.url)
    for policy in ("base", "init", "final"):
        ask(run, exam, policy, Policy(policy))
    found = judge(run, exam, "base", "init", "final")
    scores = {}
    for row in map(json.loads, (run.folder / "judgments.jsonl").read_text().splitlines()):
        scores.setdefault(row["policy"], defaultdict(list))[row["problem"]].append(row["rating"])
    means = {policy: np.array([np.mean(of[p]) for p in sorted(of)]) for policy, of in scores.items()}
    named = [(d["from"], d["to"], d["k"]) for d in found["differences"]]
    assert named == [("base", "init", 1), ("init", "final", 1), ("base", "final", 1)]
    for d in found["differences"]:
        a, b = means[d["from"]], means[d["to"]]
        assert d["mean"] == pytest.approx((b - a).mean()) and d["p"] == pytest.approx(stats.ttest_rel(b, a).pvalue)
        assert (d["low"], d["high"]) == pytest.approx(stats.ttest_rel(b, a).confidence_interval(0.95))


def test_new_answers_and_another_judge_are_judged_anew(exam: Exam, tmp_path: Path, serving) -> None:
    server = serving(rates)
    run = made(tmp_path, server.url)
    for policy in ("base", "init"):
        ask(run, exam, policy, Policy(policy))
    judge(run, exam, "base", "init")
    run.replace_samples([row for row in run.samples() if row["policy"] == "base"])  # init is trained again
    assert list(judged.results(run, run.recipe, exam)["policies"]) == ["base"]
    ask(run, exam, "init", Policy("other "))
    assert list(judged.results(run, run.recipe, exam)["policies"]) == ["base"], "ratings of answers that are gone"
    before = len(server.requests)
    assert list(judge(run, exam, "base", "init")["policies"]) == ["base", "init"]
    assert len(server.requests) - before == 2 * COUNT
    other = made(tmp_path, server.url, "another")
    assert judged.results(other, other.recipe, exam)["policies"] == {}
    assert judge(other, exam, "base")["policies"]["base"]["judge"] == "another"
    assert len(server.requests) - before == 4 * COUNT


def test_answers_that_were_cut_are_counted(exam: Exam, tmp_path: Path, serving) -> None:
    run = made(tmp_path, serving(rates).url)
    ask(run, exam, "base", Policy("cut "))
    entry = judge(run, exam, "base")["policies"]["base"]
    assert entry["truncated_share"] == 1.0
    tokens = [len(row["completion"]) for row in run.samples("base")]
    assert entry["mean_tokens"] == pytest.approx(np.mean(tokens))


def test_a_judged_task_without_a_judge_or_with_more_answers_is_refused(exam: Exam, tmp_path: Path) -> None:
    recipe = made(tmp_path).recipe
    judged.require_judge(recipe, [exam, replace(exam, kind="math", samples=8)])
    nobody = parse({"model": "m", "data": {"source": "arithmetic"}, "eval": {"tasks": ["mt_bench"]}})
    with pytest.raises(RecipeError, match="nobody rates the answers of talk") as caught:
        judged.require_judge(nobody, [exam])
    assert caught.value.where == "eval.judge" and "endpoint" in caught.value.remedy
    with pytest.raises(RecipeError, match="2 samples of talk: one answer is rated"):
        judged.require_judge(recipe, [replace(exam, samples=2)])
    wrong = made(tmp_path, "localhost:8000").recipe
    with pytest.raises(RecipeError, match="is no address of a server"):
        judged.require_judge(wrong, [exam])


def test_the_original_questions_and_prompts(shared_data: Path, tmp_path: Path, serving) -> None:
    """All 80 of FastChat's questions with its own prompts: 160 answers, 160 ratings, ten questions of each category."""
    server = serving(rates)
    task = find("mt_bench")
    table = {"tasks": ["mt_bench"], "data_dir": str(shared_data), "judge": {"endpoint": server.url, "model": "j"}}
    (tmp_path / "run").mkdir()
    run = Run(tmp_path / "run", parse({"model": "m", "data": {"source": "arithmetic"}, "eval": table}))
    exam = Exam("mt_bench", 1, "judge", task.rows(shared_data), None, 1, (1,), Sampling(0.5, 1.0, 64), task)
    ask(run, exam, "base", Policy(width=40))
    entry = judge(run, exam, "base")["policies"]["base"]
    assert (entry["problems"], entry["samples"], entry["failures"]) == (80, 160, 0)
    assert entry["prompts"] == "fastchat" and list(entry["categories"]) == list(CATEGORIES)
    assert len(server.requests) == 160
    with_reference = [text for text in conversations(server) if "Reference" in text]
    assert len(with_reference) == 2 * 30
