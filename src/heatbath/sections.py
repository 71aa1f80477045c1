"""The tables of a recipe, typed. Defaults are the first paper's settings (arXiv 2601.09233, appendix E).

Importing this module imports no torch; objectives and trainer fields are looked up only where a recipe names them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from heatbath.data_sections import (
    AnyData,
    Count,
    Finite,
    Name,
    NoData,
    Positive,
    Rate,
    Real,
    Section,
    Share,
    Switch,
    Unit,
    Whole,
    whole,
)
from heatbath.eval_sections import Eval
from heatbath.models import TrustedName
from heatbath.replay_section import Replay

INERT = "inert"  # a key of pydantic's context: the recipe is only read, and imports no code that it names
SHIPPED_PREFERENCES = ("sums", "sums-labelled")
# By method, the default first. TRL's aot and aot_unpaired sort a micro-batch and its sft averages over its tokens, so
# that their value hangs on how a batch is split.
PREFERENCE_LOSSES: dict[str, tuple[str, ...]] = {
    "dpo": (
        "sigmoid",
        "ipo",
        "hinge",
        "robust",
        "nca_pair",
        "bco_pair",
        "sppo_hard",
        "apo_zero",
        "apo_down",
        "sigmoid_norm",
    ),
    "una": ("mse", "bce"),
}


def _checked(info: ValidationInfo, *names: str) -> bool:
    """Whether what is named may be built to check it: code of one's own not where the recipe is only read."""
    return not ((info.context or {}).get(INERT) and any(":" in name for name in names))


class ObjectiveSpec(BaseModel):
    """`name` and that objective's own hyper-parameters, checked against its definition in ideas/objectives.py."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def hyper(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    @field_validator("name")
    @classmethod
    def whole_path(cls, value: str) -> str:
        path, colon, attribute = value.rpartition(":")
        return f"{whole(Path(path))}:{attribute}" if colon and path.endswith(".py") else value

    @model_validator(mode="after")
    def buildable(self, info: ValidationInfo) -> Self:
        if _checked(info, self.name):
            from heatbath.ideas.objectives import objective

            objective(self.name, **self.hyper)
        return self


OWN_PARTS = ("advantage", "surrogate")  # of a policy, which may be functions of one's own


class PolicySpec(BaseModel):
    """`name` and that policy's own hyper-parameters, checked against the table in ideas/policy.py."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def hyper(self) -> dict[str, Any]:
        """As a recipe gives them; functions of one's own by whole paths."""
        return {
            key: ObjectiveSpec.whole_path(value) if key in OWN_PARTS and isinstance(value, str) else value
            for key, value in (self.model_extra or {}).items()
        }

    @model_validator(mode="after")
    def buildable(self, info: ValidationInfo) -> Self:
        if _checked(info, *self.code):
            from heatbath.ideas.policy import policy

            policy(self.name, **self.hyper)
        return self

    @property
    def code(self) -> list[str]:
        """The functions that it names."""
        return [str(self.hyper[key]) for key in ("advantage", "surrogate") if key in self.hyper]


class Optimizer(Section):
    """AdamW, shared by the stages that train. `lr` per step, `schedule` as transformers names it. `save_every` steps
    the stage keeps what it needs to be resumed (0: never), the last `save_total_limit` times."""

    lr: Finite
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Count = 0
    weight_decay: Rate = 0.01
    adam_betas: tuple[Unit, Unit] = (0.9, 0.95)
    max_grad_norm: Finite = 1.0
    save_every: Count = 50
    save_total_limit: Positive = 2


class Pretrain(Optimizer):
    """A small Llama with one token per character, trained from random weights on the demonstrations. `width` is d;
    `batch` counts sequences."""

    width: Positive = 160
    layers: Annotated[Whole, Field(ge=1, le=1000)] = 4  # each is made, if without weights, to count parameters
    heads: Positive = 4
    lr: Finite = 4e-3
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: Count = 50
    epochs: Finite = 4
    batch: Positive = 64

    @model_validator(mode="after")
    def divisible(self) -> Self:
        if self.width % (2 * self.heads):
            raise ValueError(f"width ({self.width}) must be a multiple of 2 × heads ({2 * self.heads})")
        return self


class Lora(Section):
    """Low-rank adapters in every training stage (arXiv 2106.09685), merged into a plain model at the end of each. The
    base's view is then the same model with its adapters off. `quantization` stores the base's linear layers in 4 bits
    while they train (QLoRA, arXiv 2305.14314); "nf4" is its normal float."""

    rank: Positive = 16
    alpha: Finite = 32.0
    dropout: Unit = 0.0
    targets: str | list[str] = "all-linear"
    quantization: Literal["nf4"] | None = None


class SFT(Optimizer):
    """The warm start. `batch` and `micro_batch` count sequences: per optimizer step, and per forward pass. `max_steps`
    ends before `epochs` do. `splits` is what is learned from: the demonstrations, or also the prompts' solutions.

    `reference` is where the base's view comes from: a frozen model (with LoRA the adapters off), or a cache on disk:
    "hidden" states of every token, exact, or its "surprise" at every token and hidden states only where the target
    leaves the base more than `epsilon`.

    More than 1 % of rows longer than `max_length` is an error unless `truncate`. `packing` lays the sequences of a
    micro-batch end to end instead of padding them; none sees another. `trainer` holds any field of `trl.SFTConfig`.
    `replay` adds answers of the base's own.
    """

    objective: ObjectiveSpec = Field(default_factory=lambda: ObjectiveSpec(name="sft"))
    reference: Literal["model", "hidden", "surprise"] = "model"
    epsilon: Annotated[Real, Field(gt=0, lt=1)] = 1e-3
    reduction: Literal["token_mean", "sequence_sum", "microbatch_token_mean"] = "token_mean"
    splits: Annotated[list[Literal["demos", "prompts"]], Field(min_length=1)] = ["demos"]
    lr: Finite = 1e-5
    epochs: Finite = 6
    max_steps: Positive | None = None
    batch: Positive = 128
    micro_batch: Positive = 8
    max_length: Annotated[Whole, Field(ge=2)] = 8192
    truncate: Switch = False
    packing: Switch = False
    replay: Replay | None = None
    log_every: Positive = 1
    trainer: dict[str, Any] = {}

    @field_validator("objective", mode="before")
    @classmethod
    def shorthand(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("trainer")
    @classmethod
    def known_fields(cls, value: dict[str, Any]) -> dict[str, Any]:
        return _checked_fields("sft", value)

    @model_validator(mode="after")
    def divisible(self) -> Self:
        if self.batch % min(self.micro_batch, self.batch):
            raise ValueError(f"batch ({self.batch}) must be a multiple of micro_batch ({self.micro_batch})")
        return self

    @model_validator(mode="after")
    def cache_suffices(self, info: ValidationInfo) -> Self:
        if self.reference == "surprise" and _checked(info, self.objective.name):
            from heatbath.ideas.objectives import objective

            goal = objective(self.objective.name, **self.objective.hyper)
            if {"ref_ce", "rev_ce", "ref_entropy"} & set(goal.needs) and not hasattr(goal, "target_mass"):
                raise ValueError(
                    f"'{self.objective.name}' needs the base everywhere, which reference = \"surprise\" does not hold; "
                    'take "hidden" or "model"'
                )
        return self


class Preference(Optimizer):
    """Learning from preferences written down beforehand, from the warm start (or the base): no sampling, no grading.
    Makes the policy `final`, as `[rl]` does.

    `method` is "dpo" (arXiv 2305.18290), for pairs, or "una" (arXiv 2408.15339), for pairs, scores in [0, 1] and
    labels, also mixed. `data` is a file of them (docs/preference.md), or one that ships with heatbath: "sums" (pairs)
    or "sums-labelled". `beta` scales the implicit reward; without it pairs take 0.1 (TRL and DPO's authors), scores
    0.03 and labels 0.01 (UNA's authors). `loss` of "dpo" is one of TRL's that are means over pairs (default sigmoid),
    of "una" what scores and labels are compared by: "mse" (default) or "bce".

    lr, schedule and AdamW's numbers are TRL's, batch and epochs those of DPO's paper. UNA's authors train LoRA adapters
    with lr 3e-5 (scores) or 5e-6 (labels). `batch` and `micro_batch` count rows; a pair is two sequences. Dropout is
    off, that of `[lora]` too. More than 1 % of rows longer than `max_length` is an error unless `truncate`. `trainer`
    holds any field of `trl.DPOConfig`.
    """

    method: Literal["dpo", "una"] = "dpo"
    data: Name
    beta: Finite | None = None
    loss: str | None = None
    lr: Finite = 1e-6
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    weight_decay: Rate = 0.0
    adam_betas: tuple[Unit, Unit] = (0.9, 0.999)
    epochs: Finite = 1
    max_steps: Positive | None = None
    batch: Positive = 64
    micro_batch: Positive = 8
    max_length: Annotated[Whole, Field(ge=2)] = 1024
    truncate: Switch = False
    log_every: Positive = 1
    trainer: dict[str, Any] = {}

    @field_validator("data")
    @classmethod
    def whole_path(cls, value: str) -> str:
        return value if value in SHIPPED_PREFERENCES else str(whole(Path(value)))

    @field_validator("trainer")
    @classmethod
    def known_fields(cls, value: dict[str, Any]) -> dict[str, Any]:
        return _checked_fields("preference", value)

    @model_validator(mode="after")
    def fitting_loss(self) -> Self:
        known = PREFERENCE_LOSSES[self.method]
        if self.loss is not None and self.loss not in known:
            raise ValueError(f"loss '{self.loss}' is none of method '{self.method}', which has {', '.join(known)}")
        if self.trainer or self.loss == "robust":
            from heatbath.stages.trainer_fields import check_read

            check_read(self.method, self.loss or known[0], self.trainer)
        return self

    @model_validator(mode="after")
    def divisible(self) -> Self:
        if self.batch % min(self.micro_batch, self.batch):
            raise ValueError(f"batch ({self.batch}) must be a multiple of micro_batch ({self.micro_batch})")
        return self

    def beta_of(self, kind: str) -> float:
        """The β of a row that is a "pair", a "score" or a "label"."""
        return self.beta if self.beta is not None else {"pair": 0.1, "score": 0.03, "label": 0.01}[kind]


class RL(Optimizer):
    """Reinforcement learning. `prompts` are sampled at once, `update_prompts` enter one optimizer step, each with
    `group_size` completions; `micro_batch` counts completions per forward pass. `max_steps` ends before `epochs` do.
    `save_every` is rounded up to whole generations. `trainer` holds any field of `trl.GRPOConfig`, `verl` any key of
    verl's own configuration, for `--engine verl` (docs/verl.md).

    `policy` is a name of the table (`heatbath recipes --policies`) or `{ name = "dapo", clip_high = 0.3 }`. Every
    `eval_every` steps (0: never) the first `eval_prompts` test problems are answered once each. Before the first step
    `readiness` prompts are answered by the start, `group_size` times each, to say whether RL would have a signal.

    Of policies that learn from the prompts' solutions more than 1 % of these being longer than `max_new_tokens` is an
    error unless `truncate`.
    """

    policy: PolicySpec = Field(default_factory=lambda: PolicySpec(name="paper"))
    lr: Finite = 1e-6
    epochs: Finite = 1
    max_steps: Positive | None = None
    prompts: Positive = 128
    update_prompts: Positive = 64
    group_size: Annotated[Whole, Field(ge=2)] = 8
    micro_batch: Positive = 8
    temperature: Finite = 1.0
    max_new_tokens: Positive = 8192
    truncate: Switch = False
    kl_every: Positive = 1
    eval_every: Count = 0
    eval_prompts: Positive = 64
    readiness: Count = 32
    save_every: Count = 10
    trainer: dict[str, Any] = {}
    verl: dict[str, Any] = {}

    @field_validator("policy", mode="before")
    @classmethod
    def shorthand(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("trainer")
    @classmethod
    def known_fields(cls, value: dict[str, Any]) -> dict[str, Any]:
        return _checked_fields("rl", value)

    @model_validator(mode="after")
    def whole_groups(self, info: ValidationInfo) -> Self:
        if not _checked(info, *self.policy.code):
            return self
        from heatbath.ideas.guided import Guided
        from heatbath.ideas.policy import policy

        made = policy(self.policy.name, **self.policy.hyper)
        if isinstance(made, Guided):
            try:
                made.rounds_of(self.group_size)
            except ValueError as error:
                raise ValueError(f"policy '{self.policy.name}', group_size = {self.group_size}: {error}") from None
        return self

    @model_validator(mode="after")
    def divisible(self) -> Self:
        if self.prompts % self.update_prompts:
            raise ValueError(f"prompts ({self.prompts}) must be a multiple of update_prompts ({self.update_prompts})")
        if (self.update_prompts * self.group_size) % self.micro_batch:
            raise ValueError(
                f"update_prompts × group_size ({self.update_prompts * self.group_size}) must be a multiple of "
                f"micro_batch ({self.micro_batch})"
            )
        return self


class Reward(Section):
    """What a completion earns: the verdict of a grader, and where wished a reward model or functions of one's own.

    `kind` is what a gold answer is; `profile` and `stages` (import paths) are for math, `isolation` for code. `model`
    is a sequence-classification checkpoint, which is then the whole reward unless `weights` says otherwise: a number
    for `verdict`, for `model` and for any reward function in TRL's form, by import path. `sqrt_length` divides the
    model's score by the square root of the completion's tokens. A verdict may take `deadline` seconds; `workers`
    processes grade. More than `failed_share` of a step's verdicts (and more than one) that are failures of grading stop
    the run.
    """

    kind: Literal["math", "choice", "code"] = "math"
    profile: Literal["strict", "paper"] = "strict"
    stages: list[str] = []
    isolation: str | None = None
    model: str | None = None
    sqrt_length: Switch = False
    weights: dict[str, Real] = {}
    deadline: Finite = 10.0
    workers: Positive = 2
    failed_share: Share = 0.01

    @field_validator("weights")
    @classmethod
    def known_rewards(cls, value: dict[str, float]) -> dict[str, float]:
        for name in value:
            if name not in ("verdict", "model") and ":" not in name:
                raise ValueError(f"'{name}' is neither verdict, model nor an import path such as rewards.py:brevity")
        return value

    @model_validator(mode="after")
    def fitting_settings(self) -> Self:
        if self.kind != "math" and (self.profile != "strict" or self.stages):
            raise ValueError(f"profile and stages are for math answers, not for {self.kind}")
        if self.kind != "code" and self.isolation is not None:
            raise ValueError(f"isolation is for code, not for {self.kind} answers")
        if self.model is None and ("model" in self.weights or self.sqrt_length):
            raise ValueError("there is no reward model: set reward.model")
        return self

    @property
    def weighted(self) -> dict[str, float]:
        """The weight of each reward; verdicts are measured even where theirs is 0."""
        return {"verdict": float(self.model is None)} | ({"model": 1.0} if self.model else {}) | self.weights


class Recipe(Section):
    """A whole run. A stage without its table is left out: no `[sft]` is direct RL, no `[rl]` is SFT alone.
    `[preference]` takes the place of `[rl]`.

    `model` is where the base comes from, unless `[pretrain]` makes it. `name` is that of the strategy. `template` is a
    chat template for models without one (or instead of theirs): the name of a shipped one, or a Jinja file.
    `published` is the table of scores that the report shows beside the run's own (docs/paper.md). `trust_remote_code`
    lets Python code that lies with the model run on this machine (docs/security.md).
    """

    model: str | None = None
    name: str | None = None
    published: str | None = None
    seed: Annotated[Whole, Field(ge=0, lt=2**32)] = 0  # what numpy takes
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    template: str | None = None
    trust_remote_code: bool = False
    data: AnyData = Field(default_factory=lambda: NoData(source="none"))
    pretrain: Pretrain | None = None
    lora: Lora | None = None
    sft: SFT | None = None
    preference: Preference | None = None
    rl: RL | None = None
    eval: Eval = Eval()
    reward: Reward = Reward()

    @field_validator("published")
    @classmethod
    def known_scores(cls, value: str | None) -> str | None:
        if value is not None:
            from heatbath import published

            published.require(value)
        return value

    @model_validator(mode="after")
    def trusted(self) -> Self:
        if self.trust_remote_code and self.model is not None:
            object.__setattr__(self, "model", TrustedName(self.model))  # frozen, but for what it is made of
        return self

    @model_validator(mode="before")
    @classmethod
    def one_data_dir(cls, table: Any) -> Any:
        """Tasks are read from the same files wherever a recipe names them."""
        data, own = (table.get(key) for key in ("data", "eval")) if isinstance(table, dict) else (None, None)
        if isinstance(data, dict) and isinstance(own, dict) and data.get("decontaminate") and own.get("data_dir"):
            return table | {"data": {"data_dir": own["data_dir"]} | data}
        return table


def contradictions(table: dict[str, Any]) -> list[str]:
    """What no single table of a recipe can know, read from the raw tables so that it is told beside other mistakes."""
    found = []
    table = {key: value for key, value in table.items() if value is not None}
    if not {"model", "pretrain"} & table.keys():
        found.append("model: required (or a [pretrain] table that makes one)")
    if {"model", "pretrain"} <= table.keys():
        found.append("model: [pretrain] makes the base from nothing; leave out model, or [pretrain]")
    if {"preference", "rl"} <= table.keys():
        found.append("preference: [preference] and [rl] both make the policy 'final'; leave out one of them")
    data = table.get("data")
    if isinstance(data, dict) and data.get("source") in ("files", "hub"):
        sft = table.get("sft")
        splits = sft.get("splits", ["demos"]) if isinstance(sft, dict) else ["demos"]
        learned = [split for split in splits if split in ("demos", "prompts")] if isinstance(splits, list) else []
        for stage, split in (("pretrain", "demos"), *(("sft", split) for split in learned), ("rl", "prompts")):
            given = data.get(split) != 0 if data.get(f"{split}_from") else bool(data.get(split))
            if stage in table and not given:
                found.append(f"data: the {stage} stage reads data.{split}, and the recipe gives it no row")
    return found


def _checked_fields(stage: str, given: dict[str, Any]) -> dict[str, Any]:
    if given:
        from heatbath.stages.trainer_fields import check_fields

        check_fields(stage, given)
    return given
