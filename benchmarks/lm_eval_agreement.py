"""The same task and the same samples scored by lm-evaluation-harness, by it through heatbath, and by heatbath.

    python benchmarks/lm_eval_agreement.py --data ../shared/data --out benchmarks/results/lm-eval-agreement.json

Needs lm-eval (`pip install 'heatbath[lm-eval]'`) and under --data `gsm8k/test.jsonl` and the 5,276 labelled responses
of `verdicts_gsm8k`. The task is the harness's own gsm8k over the local file. Each response, which ends in a line
"A: 18", is scored as it is and with that line in other forms.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.metadata
import json
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from heatbath.data.tasks import Task, find
from heatbath.run import environment
from heatbath.verify.graders import as_gold

FILTERS = ("strict-match", "flexible-extract")
HARNESS_TASK = r"""
task: gsm8k_local
dataset_path: json
dataset_kwargs: { data_files: { test: "%s" } }
output_type: generate_until
test_split: test
doc_to_text: "Question: {{question}}\nAnswer:"
doc_to_target: "{{answer}}"
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
    ignore_punctuation: false
    regexes_to_ignore: [",", "\\$", "(?s).*#### ", "\\.$"]
generation_kwargs: { until: ["Question:", "</s>", "<|im_end|>"], do_sample: false, temperature: 0.0 }
num_fewshot: 0
filter_list:
  - name: strict-match
    filter:
      - { function: regex, regex_pattern: "#### (\\-?[0-9\\.\\,]+)" }
      - { function: take_first }
  - name: flexible-extract
    filter:
      - { function: regex, group_select: -1, regex_pattern: "(-?[$0-9.,]{2,})|(-?[0-9]+)" }
      - { function: take_first }
metadata: { version: 3.0 }
"""


def forms(response: str) -> dict[str, str]:
    """The response as it is, and with its last line in other forms."""
    body, _, answer = response.rpartition("\nA: ")
    return {
        "A: 18": response,
        "#### 18": f"{body}\n#### {answer}",
        "\\boxed{18}": f"{body}\n\\boxed{{{answer}}}",
        "#### $18.00": f"{body}\n#### ${answer}.00",
        "#### 18, then a sentence": f"{body}\n#### {answer}\nI checked it in 3 ways.",
    }


def written(folder: Path, data: Path) -> Path:
    """The task's file."""
    path = folder / "gsm8k.yaml"
    path.write_text(HARNESS_TASK.replace("%s", str(data.absolute())))
    return path


def responses(data: Path) -> dict[str, list[dict[str, Any]]]:
    """Model → its 1,319 responses with their labels, in the order of the problems."""
    with gzip.open(data / "verdicts_gsm8k" / "model_solutions_labelled.jsonl.gz", "rt") as stream:
        rows = [json.loads(line) for line in stream]
    models = dict.fromkeys(row["model"] for row in rows)
    return {model: sorted((r for r in rows if r["model"] == model), key=lambda r: r["idx"]) for model in models}


def by_the_harness(path: Path, texts: Sequence[str]) -> dict[str, list[bool]]:
    """Filter → score of each text, from its own `evaluate` with a model that says these texts."""
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    class Stored(LM):
        def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
            return [texts[request.doc_id] for request in requests]

        def loglikelihood(self, requests: list) -> list:
            raise NotImplementedError

        def loglikelihood_rolling(self, requests: list) -> list:
            raise NotImplementedError

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_defaults=False)
    found = lm_eval.evaluate(Stored(), manager.load([str(path)]), limit=len(texts), bootstrap_iters=0)
    scores: dict[str, dict[int, bool]] = {}
    for sample in next(iter(found["samples"].values())):
        scores.setdefault(sample["filter"], {})[sample["doc_id"]] = bool(sample["exact_match"])
    return {name: [of[i] for i in range(len(texts))] for name, of in scores.items()}


def by_heatbath(task: Task, texts: Sequence[str], data: Path | None = None) -> list[bool]:
    golds = [as_gold(task.kind, str(row.answer)) for row in task.rows(data, len(texts))]
    with task.grader() as grader:
        return [verdict.status == "right" for verdict in grader.grade(list(texts), golds)]


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", type=Path, default=Path("../shared/data"))
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    os.environ.setdefault("TQDM_DISABLE", "1")
    table: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder), given.data / "gsm8k" / "test.jsonl")
        for rows in responses(given.data).values():
            labels = [row["expected"] for row in rows]
            for form in forms(""):
                texts = [forms(row["response"])[form] for row in rows]
                harness, own = by_the_harness(path, texts), by_heatbath(find("gsm8k"), texts, given.data)
                columns = {"labelled right": labels, "heatbath": own} | harness
                counts = table.setdefault(
                    form, dict.fromkeys(["samples", *columns, "heatbath not as labelled", "adapter differs"], 0)
                )
                counts["samples"] += len(rows)
                for name, values in columns.items():
                    counts[name] += sum(values)
                counts["heatbath not as labelled"] += sum(a != b for a, b in zip(own, labels, strict=True))
                for name in FILTERS:
                    through = by_heatbath(find(f"{path}@{name}"), texts)
                    counts["adapter differs"] += sum(a != b for a, b in zip(through, harness[name], strict=True))
    for form, counts in table.items():
        print(f"{form:26}", "  ".join(f"{name} {count:,}" for name, count in counts.items()))
    if given.out:
        about = {"command": "python " + " ".join(sys.argv), "environment": environment("fp32")}
        about |= {"lm_eval": importlib.metadata.version("lm_eval"), "right": table}
        given.out.write_text(json.dumps(about, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
