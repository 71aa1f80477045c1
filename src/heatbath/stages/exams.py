"""What an evaluation asks: the run's own test problems, and the tasks of `eval.tasks`, each with its grader and its
sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from heatbath.data import rendering, tasks
from heatbath.data.rows import Row, Splits
from heatbath.engines.sampling import Sampling
from heatbath.errors import RecipeError
from heatbath.eval_sections import TaskEntry
from heatbath.recipe import Recipe
from heatbath.run import OWN_TEST
from heatbath.stages.rewards import grader_of
from heatbath.verify.graders import Grader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Exam:
    """Problems with everything that a sample of them depends on, and how many samples are wanted."""

    name: str
    version: int
    kind: str
    rows: list[Row]
    system: str | None
    samples: int
    k: tuple[int, ...]
    sampling: Sampling
    task: tasks.Task | None = None

    @property
    def conditions(self) -> dict[str, Any]:
        """What samples drawn before must share with new ones."""
        s = self.sampling
        return {
            "version": self.version,
            "temperature": s.temperature,
            "top_p": s.top_p,
            "max_new_tokens": s.max_new_tokens,
        }

    def grader(self, recipe: Recipe) -> Grader:
        """Of the recipe's own problems the recipe's; of a task its own."""
        reward = recipe.reward
        if self.task is None:
            return grader_of(reward)
        isolation = reward.isolation if self.kind == "code" else None
        return self.task.grader(workers=reward.workers, deadline=reward.deadline, isolation=isolation)

    def prompt_ids(self, tokenizer: PreTrainedTokenizerBase, row: Row) -> list[int]:
        """What a policy is asked."""
        if self.task is not None:
            return tasks.prompt_ids(self.task, tokenizer, row)
        return rendering.prompt_ids(tokenizer, rendering.messages(row, self.system))


def exams(recipe: Recipe, splits: Splits) -> list[Exam]:
    """The exams of a recipe, its own first. Raises RecipeError or DataError for tasks that are not there, that share a
    name, or that want a pass@k of more samples than theirs."""
    settings = recipe.eval
    own = Sampling(settings.temperature, settings.top_p, settings.max_new_tokens)
    made = []
    if splits.test:
        kind, asked = recipe.reward.kind, (settings.samples, tuple(settings.k))
        made.append(Exam(OWN_TEST, 1, kind, splits.test, recipe.data.system, *asked, own))
    made += [_of_task(tasks.find(entry.name), entry, recipe) for entry in settings.tasks]
    names = [exam.name for exam in made]
    if twice := next((name for name in names if names.count(name) > 1), None):
        files = [str(entry.name) for entry in settings.tasks if tasks.find(entry.name).name == twice]
        raise RecipeError(
            f"two tasks are called '{twice}', and their samples would be taken for each other's",
            f"eval.tasks, {' and '.join(files)}",
            "give one of the two files another `name`",
        )
    return made


def _of_task(task: tasks.Task, entry: TaskEntry, recipe: Recipe) -> Exam:
    """A task as the recipe's entry, else its own definition, else [eval] wants it sampled."""
    settings = recipe.eval

    def wanted(key: str) -> Any:
        asked = getattr(entry, key), getattr(task.sampling, key), getattr(settings, key)
        return next(value for value in asked if value is not None)

    samples, own = wanted("samples"), entry.k or task.sampling.k
    if own is not None and max(own) > samples:
        raise RecipeError(
            f"pass@{max(own)} of {task.name} needs at least {max(own)} samples, not {samples}",
            f"eval.tasks, {entry.name}",
            f'for example {{ name = "{entry.name}", samples = {samples}, k = [{samples}] }}',
        )
    # [eval] may ask for a k that a task of fewer samples cannot have; 1 is always there.
    k = tuple(own or [k for k in settings.k if k <= samples] or [1])
    rows = task.rows(settings.data_dir, entry.problems or settings.problems)
    sampling = Sampling(wanted("temperature"), wanted("top_p"), wanted("max_new_tokens"))
    return Exam(task.name, task.version, task.kind, rows, task.system, samples, k, sampling, task)
