"""lm-evaluation-harness: the same task and samples scored by it and through heatbath agree, and what differs is named.

Runs where lm_eval is installed (`pip install 'heatbath[lm-eval]'`); the responses are real ones, with OpenAI's labels.
"""

import json
import re
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

from conftest import small_tokenizer
from heatbath.data import tasks
from heatbath.data.tasks import find
from heatbath.errors import RecipeError, RunError
from heatbath.verify.graders import as_gold

lm_eval = pytest.importorskip(
    "lm_eval", reason="lm-evaluation-harness is not installed: pip install 'heatbath[lm-eval]'"
)

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "lm_eval_agreement.py"
agreement = SourceFileLoader("lm_eval_agreement", str(SCRIPT)).load_module()
FORMS = list(agreement.forms(""))


@pytest.fixture(scope="module")
def gsm8k(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the harness's own gsm8k task is, over a local file."""
    return agreement.written(tmp_path_factory.mktemp("harness"), shared_data / "gsm8k" / "test.jsonl")


@pytest.mark.parametrize("form", FORMS)
def test_the_same_samples_score_alike(gsm8k: Path, shared_data: Path, form: str) -> None:
    """40 real responses of each of four models."""
    for rows in agreement.responses(shared_data).values():
        check(gsm8k, shared_data, form, rows[:40])


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_every_sample_scores_alike(gsm8k: Path, shared_data: Path, form: str) -> None:
    for rows in agreement.responses(shared_data).values():
        check(gsm8k, shared_data, form, rows)


def check(gsm8k: Path, shared_data: Path, form: str, rows: list[dict]) -> None:
    """Through heatbath's adapter every score is the harness's own. heatbath's grader agrees with OpenAI's label in
    every form; the harness does where its pattern fits the form."""
    assert [row["idx"] for row in rows] == list(range(len(rows)))
    texts, labels = [agreement.forms(row["response"])[form] for row in rows], [row["expected"] for row in rows]
    scores = agreement.by_the_harness(gsm8k, texts)
    for name in agreement.FILTERS:
        assert agreement.by_heatbath(find(f"{gsm8k}@{name}"), texts) == scores[name]
    strict, flexible = (scores[name] for name in agreement.FILTERS)
    own = agreement.by_heatbath(find("gsm8k"), texts, shared_data)
    if form == "#### $18.00":  # ".00" makes a price of a whole number only
        whole = [re.search(r"\nA: -?[0-9]+\Z", row["response"]) is not None for row in rows]
        own, labels, flexible = ([v for v, ok in zip(of, whole, strict=True) if ok] for of in (own, labels, flexible))
    assert own == labels
    if form == "A: 18":  # the strict pattern wants ####
        assert not any(strict) and flexible == labels
    elif form == "#### 18":
        assert strict == labels and flexible == labels
    elif form == "\\boxed{18}":
        assert not any(strict) and flexible == labels
    elif form == "#### $18.00":  # its pattern has no $, and 18.00 is not the text 18
        assert not any(strict) and not any(flexible)
    else:  # the last number of the text is the 3
        assert strict == labels
        assert not any(f for f, row in zip(flexible, rows, strict=True) if row["gold"] != "3")


def test_prompts_and_generation_are_the_tasks_own(gsm8k: Path, shared_data: Path, tmp_path: Path) -> None:
    task = find(gsm8k)
    rows = task.rows(None, 3)
    first = json.loads((shared_data / "gsm8k" / "test.jsonl").read_text().split("\n")[0])
    assert rows[0].question == f"Question: {first['question']}\nAnswer:"
    assert (task.name, task.kind, task.version, task.raw) == ("lm_eval:gsm8k_local", "lm_eval", 3, True)
    assert task.sampling.model_dump(exclude_none=True) == {
        "samples": 1,
        "k": [1],
        "temperature": 0.0,
        "max_new_tokens": 256,
    }
    assert task.questions()[0][0] == rows[0].question
    few = tmp_path / "few.yaml"
    text = gsm8k.read_text().replace("num_fewshot: 0", "num_fewshot: 2\nfewshot_split: test")
    few.write_text(text.replace("temperature: 0.0", "max_gen_toks: 99"))
    shown = find(few).rows(None, 2)
    assert shown == find(few).rows()[:2] and all(row.question.count("Question:") == 3 for row in shown)
    assert find(few).sampling.max_new_tokens == 99
    drawn = tmp_path / "drawn.yaml"
    drawn.write_text(
        gsm8k.read_text().replace("do_sample: false, temperature: 0.0", "do_sample: true, temperature: 0.7")
    )
    assert find(drawn).sampling.model_dump(exclude_none=True) == {"temperature": 0.7, "max_new_tokens": 256}


def test_a_prompt_is_continued_as_it_stands_or_asked_in_a_chat(gsm8k: Path) -> None:
    tokenizer = small_tokenizer()
    plain, chat = find(gsm8k), find(f"lm_eval_chat:{gsm8k}")
    (row,) = plain.rows(None, 1)
    assert tokenizer.decode(tasks.prompt_ids(plain, tokenizer, row)).startswith("Question: Janet")
    assert chat.rows(None, 1) == [row] and chat.name == "lm_eval_chat:gsm8k_local"
    assert tokenizer.decode(tasks.prompt_ids(chat, tokenizer, row)).startswith("<|user|>Question: Janet")


def test_what_stands_behind_a_stop_text_does_not_count(gsm8k: Path) -> None:
    task = find(gsm8k)
    assert task.stops == ["Question:", "</s>", "<|im_end|>"]
    golds = [as_gold("lm_eval", str(row.answer)) for row in task.rows(None, 1)]
    told = ["#### 18\nQuestion: 1 + 1?\nAnswer: #### 2", "Question: #### 18", "#### 18</s>#### 3", "#### 17", ""]
    with task.grader() as grader:
        found = grader.grade(told, golds * 5)
        assert [v.status for v in found] == ["right", "no_answer", "right", "wrong", "no_answer"]
        assert found[3].rule == "exact_match strict-match 0, flexible-extract 0" and found[3].answer == "17"
        assert [v.status for v in grader.grade(["#### 18"] * 2, [{"dco": 0}, "0"])] == ["bad_gold"] * 2


def test_a_task_whose_code_fails_is_counted_and_one_with_shares_is_told(gsm8k: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "def fails(doc, results):\n    return {'exact_match': 1 / 0}\n\n\n"
        "def shares(doc, results):\n    return {'exact_match': 0.37}\n"
    )
    for name in ("fails", "shares"):
        text = gsm8k.read_text() + f"process_results: !function own.{name}\n"
        (tmp_path / f"{name}.yaml").write_text(text)
    golds = [as_gold("lm_eval", str(row.answer)) for row in find(gsm8k).rows(None, 1)]
    with find(tmp_path / "fails.yaml").grader() as grader:
        (verdict,) = grader.grade(["18"], golds)
    assert verdict.status == "crashed" and "ZeroDivisionError" in verdict.rule
    with find(tmp_path / "shares.yaml").grader() as grader, pytest.raises(RunError, match=r"'exact_match' is 0\.37"):
        grader.grade(["18"], golds)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "output_type: generate_until",
            "output_type: multiple_choice\ndoc_to_choice: [a, b]",
            "probabilities of given",
        ),
        ("num_fewshot: 0", "num_fewshot: 0\nrepeats: 4", "votes over 4 answers"),
        ("num_fewshot: 0", "num_fewshot: 0\nunsafe_code: true", "without a sandbox"),
    ],
)
def test_tasks_that_are_not_run_here_are_refused(gsm8k: Path, tmp_path: Path, old: str, new: str, said: str) -> None:
    (tmp_path / "other.yaml").write_text(gsm8k.read_text().replace(old, new))
    with pytest.raises(RecipeError, match=said):
        find(tmp_path / "other.yaml")


def test_names_that_are_not_there_are_told(gsm8k: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="has no filter 'flexible'") as caught:
        find(f"{gsm8k}@flexible")
    assert "strict-match, flexible-extract" in caught.value.remedy
    with pytest.raises(RecipeError, match="no such task file"):
        find(tmp_path / "absent.yaml")
    with pytest.raises(RecipeError, match="no task 'gsm8k_coot'") as caught:
        find("lm_eval:gsm8k_coot")
    assert "gsm8k_cot" in caught.value.remedy
    with pytest.raises(RecipeError, match="'agieval' is a group of tasks") as caught:
        find("lm_eval:agieval")
    assert "agieval_" in caught.value.remedy
