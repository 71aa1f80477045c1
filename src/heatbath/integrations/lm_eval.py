"""Tasks of an installed lm-evaluation-harness: its prompts and its scoring, our sampling.

    eval.tasks = ["lm_eval:gsm8k_cot", "lm_eval_chat:gsm8k_cot@flexible-extract", "mine.yaml"]

The harness builds the prompt (few-shot examples included) and, from the completion, filters and scores by its own code;
a run's policies, samples, intervals and report are heatbath's. `lm_eval:` continues the prompt as it stands, as the
harness does by default; `lm_eval_chat:` puts it into one user turn of the chat template. `@FILTER` names the filter
that decides, by default the task's first.

Only tasks whose answer is generated and whose metric is 0 or 1 for each answer. Their code runs in this process, with
no deadline and no sandbox: those that run programs are refused.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import PrivateAttr

from heatbath.data.rows import Row
from heatbath.data.tasks import LM_EVAL, LM_EVAL_CHAT, Task, TaskSampling
from heatbath.errors import DataError, RecipeError, RunError
from heatbath.verify.verdict import Status, Verdict

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

EXAMPLES_SEED = 1234  # of the few-shot examples, the harness's own default
DEFAULT_TOKENS = 256  # max_gen_toks where the task says nothing, as the harness's own models have it
INVALID = "[invalid]"  # what its filters give for no match
REGISTERED = "one that `lm-eval ls subtasks` lists"
REMEDY = "pip install 'heatbath[lm-eval]'"


class LmEvalTask(Task):
    """A task whose prompts and scores are the harness's."""

    _harness: Any = PrivateAttr(None)
    _chat: bool = PrivateAttr(False)
    _filter: str | None = PrivateAttr(None)

    @property
    def raw(self) -> bool:
        return not self._chat

    @property
    def stops(self) -> list[str]:
        return [stop for stop in stops_of(self._harness) if stop]

    @property
    def origin(self) -> str:
        import lm_eval

        return f"lm-evaluation-harness {lm_eval.__version__}"

    def rows(self, data_dir: Path | None = None, problems: int | None = None) -> list[Row]:
        """The harness's prompts in the order of its documents; `answer` is JSON of the document's number and target."""
        harness = self._harness
        harness.set_fewshot_seed(EXAMPLES_SEED)
        harness.build_all_requests(limit=problems, rank=0, world_size=1)
        made = []
        for instance in harness.instances:
            answer = json.dumps({"doc": instance.doc_id, "target": str(harness.doc_to_target(instance.doc))})
            made.append(Row(instance.args[0], answer=answer, origin=f"{self.name}, document {instance.doc_id}"))
        return made

    def questions(self, data_dir: Path | None = None) -> list[tuple[str, str]]:
        docs = enumerate(self._harness.eval_docs)
        return [(str(self._harness.doc_to_text(doc)), f"{self.name}, document {number}") for number, doc in docs]

    def grader(self, *, workers: int = 2, deadline: float = 10.0, isolation: str | None = None) -> LmEvalGrader:
        return LmEvalGrader(self._harness, self._filter)


class LmEvalGrader:
    """Verdicts by a task's own filters and metric; a gold is {"doc": its number}."""

    def __init__(self, harness: ConfigurableTask, deciding: str | None = None):
        self._harness = harness
        self._docs = harness.eval_docs
        self._filters = [ensemble.name for ensemble in harness._filters]
        self._metric = next(iter(harness.aggregation()))
        self._deciding = deciding if deciding is not None else self._filters[0]
        self._until = stops_of(harness)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is held."""

    def grade(self, completions: Sequence[str], golds: Sequence[Any]) -> list[Verdict]:
        """A verdict for each completion, in order; `rule` holds the metric after every filter. Raises RunError for a
        metric that is not 0 or 1."""
        return [self._verdict(text, gold) for text, gold in zip(completions, golds, strict=True)]

    def _verdict(self, text: str, gold: Any) -> Verdict:
        from lm_eval.api.instance import Instance

        started = time.perf_counter()
        if not isinstance(gold, dict) or not isinstance(gold.get("doc"), int):
            return Verdict("bad_gold", None, "not a document of the task", time.perf_counter() - started)
        doc = self._docs[gold["doc"]]
        instance = Instance("generate_until", doc, (), 0, (None, gold["doc"], 1), [cut(text, self._until)])
        scores, said = {}, None
        try:
            for ensemble in self._harness._filters:
                ensemble.apply([instance])
                filtered = instance.filtered_resps[ensemble.name]
                scores[ensemble.name] = self._harness.process_results(doc, [filtered])[self._metric]
                said = filtered if ensemble.name == self._deciding else said
        except Exception as error:  # noqa: BLE001 - the edge to the task's own code, which may raise anything
            rule = f"{type(error).__name__}: {error}"[:200]
            return Verdict("crashed", None, rule, time.perf_counter() - started)
        value = scores[self._deciding]
        if isinstance(value, tuple | list) or value not in (0, 1):
            raise RunError(
                f"the metric '{self._metric}' is {str(value)[:60]} for one answer, and heatbath counts right and wrong",
                f"{LM_EVAL}{self._harness.task_name}",
                "take a task whose metric is 0 or 1, such as exact_match, or run it with lm_eval itself",
            )
        rule = f"{self._metric} " + ", ".join(f"{name} {score:g}" for name, score in scores.items())
        none = isinstance(said, str) and said.strip() in ("", INVALID)
        status: Status = "right" if value else "no_answer" if none else "wrong"
        return Verdict(status, None if none else str(said)[:1000], rule, time.perf_counter() - started)


def lm_eval_task(name: str) -> LmEvalTask:
    """The task of that name (`lm_eval:NAME`, `lm_eval_chat:NAME`, or a .yaml file), with `@FILTER` where wished.

    Raises RecipeError where lm_eval is not installed, has no such task, or the task is of a kind that is not run here.
    """
    chat = name.startswith(LM_EVAL_CHAT)
    wanted, _, deciding = name.removeprefix(LM_EVAL_CHAT).removeprefix(LM_EVAL).partition("@")
    harness = _loaded(wanted)
    _require_runnable(harness, wanted)
    filters = [ensemble.name for ensemble in harness._filters]
    if deciding and deciding not in filters:
        raise RecipeError(f"'{wanted}' has no filter '{deciding}'", "eval.tasks", f"it has {', '.join(filters)}")
    config = harness.config
    version = (config.metadata or {}).get("version", 1)
    task = LmEvalTask(
        name=f"{LM_EVAL_CHAT if chat else LM_EVAL}{harness.task_name}{'@' * bool(deciding)}{deciding}",
        version=max(1, int(float(version))),
        title=f"{harness.task_name}, as lm-evaluation-harness defines it",
        kind="lm_eval",
        source="lm_eval",
        sampling=_sampling(config.generation_kwargs or {}),
    )
    task._harness, task._chat, task._filter = harness, chat, deciding or None
    return task


def stops_of(harness: Any) -> list[str]:
    """The texts that end an answer of the task."""
    until = (harness.config.generation_kwargs or {}).get("until") or []
    return [until] if isinstance(until, str) else list(until)


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the first stop: the harness stops there, here the policy wrote on until its own end."""
    for stop in until:
        text = text.split(stop)[0] if stop else text
    return text


def _sampling(settings: dict[str, Any]) -> TaskSampling:
    """The task's own generation settings; greedy unless it says otherwise, as in the harness."""
    greedy = not settings.get("do_sample", settings.get("temperature", 0.0) > 0) or not settings.get("temperature", 1.0)
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    tokens = next((int(settings[name]) for name in names if settings.get(name)), DEFAULT_TOKENS)
    if greedy:
        return TaskSampling(samples=1, k=[1], temperature=0.0, max_new_tokens=tokens)
    top_p = settings.get("top_p")
    return TaskSampling(temperature=float(settings.get("temperature", 1.0)), top_p=top_p, max_new_tokens=tokens)


def _loaded(name: str) -> Any:
    """The harness's task. Raises RecipeError where there is none, or several of that name."""
    own = name.endswith((".yaml", ".yml"))
    if own and not Path(name).expanduser().is_file():
        raise RecipeError("no such task file", name, "check the path, which is relative to the working folder")
    try:
        manager = _manager(not own)
    except ModuleNotFoundError as error:
        missing = error.name or "lm_eval"
        raise RecipeError(
            f"lm-evaluation-harness is not installed ({missing} is missing)", "eval.tasks", REMEDY
        ) from None
    if not own and name not in manager.all_subtasks:
        if name in manager.all_tasks:
            some = ", ".join([task for task in manager.all_subtasks if task.startswith(name)][:6]) or REGISTERED
            raise RecipeError(f"'{name}' is a group of tasks", "eval.tasks", f"name those you want: {some}, …")
        near = _near(name, manager.all_subtasks)
        raise RecipeError(f"lm-evaluation-harness has no task '{name}'", "eval.tasks", f"did you mean {near}?")
    try:
        found = manager.load([str(Path(name).expanduser()) if own else name])["tasks"]
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        remedy = "it may need a connection, or packages of its own (pip install 'lm-eval[…]')"
        raise DataError(f"lm-evaluation-harness cannot load '{name}': {first}", name, remedy) from None
    if len(found) != 1:
        some = ", ".join(list(found)[:6])
        raise RecipeError(f"'{name}' holds {len(found)} tasks", "eval.tasks", f"name one of {some}")
    return next(iter(found.values()))


@lru_cache(maxsize=2)
def _manager(shipped: bool) -> Any:
    """The harness's index of tasks, its own thousands of files included or not; reading those takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=shipped)


def _near(name: str, known: Sequence[str]) -> str:
    """Names that begin alike come before those that are spelt alike: there are thousands."""
    import difflib

    stem = re.split(r"[_\-]", name)[0]
    like = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    starting = [task for task in known if task.startswith(stem)][:3]
    return ", ".join(dict.fromkeys([*like, *starting])) or REGISTERED


def _require_runnable(harness: Any, name: str) -> None:
    config = harness.config
    where = "eval.tasks"
    if harness.OUTPUT_TYPE != "generate_until":
        raise RecipeError(
            f"'{name}' compares probabilities of given answers ({harness.OUTPUT_TYPE}); only tasks whose answer is "
            "generated (generate_until) are run here",
            where,
            "take its generative form where there is one, heatbath's own task, or lm_eval itself on the checkpoint",
        )
    if getattr(harness, "UNSAFE_CODE", False) or config.unsafe_code:
        remedy = "humaneval_plus and mbpp_plus run programs in a sandbox"
        raise RecipeError(f"'{name}' runs a policy's programs without a sandbox", where, remedy)
    if config.doc_to_image or config.doc_to_audio:
        raise RecipeError(f"'{name}' shows images or plays sounds", where, "take a task of text")
    if config.repeats != 1:
        remedy = "take the form of it with one answer; maj@k is measured for every task with samples ≥ k"
        raise RecipeError(f"'{name}' votes over {config.repeats} answers of its own", where, remedy)
