"""Typical mistakes, what heatbath says to each, and the page docs/errors.md made of them.

python tests/mistakes.py     writes the page anew
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from unittest import mock

PAGE = Path(__file__).parents[1] / "docs" / "errors.md"
RECIPE = """\
model = "./base"
precision = "fp32"

[data]
source = "arithmetic"
demos = 8
validation = 2
prompts = 8
test = 4

[sft]
objective = { name = "gift", beta = 4.0 }
batch = 4
micro_batch = 4

[rl]
prompts = 4
update_prompts = 4
group_size = 2
micro_batch = 8
max_new_tokens = 8

[eval]
samples = 2
k = [1]
"""
FILES = """\
model = "./base"

[data]
source = "files"
{data}

[sft]
batch = 1
{sft}
"""


PREFERENCES = """\
model = "./base"

[data]
source = "files"
test_from = "test.jsonl"

[preference]
data = "p.jsonl"
"""


@dataclass(frozen=True)
class Mistake:
    """A command that is wrong, the files beside it, and what its message must hold."""

    title: str
    command: str
    says: tuple[str, ...]
    files: dict[str, str] = field(default_factory=dict)
    code: int = 2
    before: Callable[[Path], None] | None = None


def demos(*rows: object) -> str:
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n"


def files(rows: str, *, data: str = "", sft: str = "", **more: str) -> dict[str, str]:
    """A recipe that learns demos.jsonl, and that file."""
    return {
        "r.toml": FILES.format(data=f'demos_from = "demos.jsonl"\n{data}'.strip(), sft=sft),
        "demos.jsonl": rows,
        **more,
    }


GUIDED = """\
model = "./base"

[data]
source = "files"
prompts_from = "prompts.jsonl"
test_from = "test.jsonl"

[rl]
policy = "luffy"
prompts = 2
update_prompts = 2
group_size = 2
micro_batch = 4
max_new_tokens = 16
"""
ROW = {"question": "What is 1 + 1?", "solution": "1 + 1 = 2", "answer": "2"}


PAIR = {"question": "What is 2 + 2?", "chosen": "2 + 2 = 4", "rejected": "5"}


def preferences(title: str, row: dict[str, object], *says: str, change: str = "") -> Mistake:
    """A preference file whose second row is wrong, or a table that an override makes wrong."""
    tables = {"r.toml": PREFERENCES, "p.jsonl": demos(PAIR, row), "test.jsonl": demos(ROW)}
    return Mistake(title, f"run r.toml {change}--dry-run", says, tables)


def recipe(title: str, change: str, *says: str) -> Mistake:
    """A recipe that an override makes wrong."""
    return Mistake(title, f"run r.toml {change} --dry-run", says, {"r.toml": RECIPE})


def on_verl(title: str, change: str, *says: str) -> Mistake:
    """A recipe that verl's engine cannot take."""
    return Mistake(title, f"rl r.toml {change} --engine verl --dry-run".replace("  ", " "), says, {"r.toml": RECIPE})


def compared(title: str, options: str, *says: str) -> Mistake:
    """A comparison that its options make wrong."""
    return Mistake(title, f"compare r.toml {options} --dry-run", says, {"r.toml": RECIPE})


TUNE = """
[compare.tune]
grid = { "sft.lr" = [1e-3, 1e-4] }
grids = { dft = { "sft.lr" = [1e-3, 1e-4, 1e-5] } }
"""


def spoil_tokenizer(folder: Path) -> None:
    """A tokenizer that knows one more token than the model."""
    from transformers import AutoTokenizer

    whole = (folder / "base").resolve()
    (folder / "base").unlink()
    shutil.copytree(whole, folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.add_tokens(["<|think|>"])
    tokenizer.save_pretrained(folder / "base")


def train(folder: Path) -> None:
    """A finished warm start in runs/r."""
    assert call(folder, "sft r.toml")[0] == 0


def other_base(folder: Path) -> None:
    """A run whose base is replaced after its warm start."""
    import torch
    from transformers import AutoModelForCausalLM

    train(folder)
    whole = (folder / "base").resolve()
    (folder / "base").unlink()
    shutil.copytree(whole, folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.1)
    model.save_pretrained(folder / "base")


def latin(folder: Path) -> None:
    """A recipe saved by an editor that does not write UTF-8."""
    (folder / "r.toml").write_bytes(f"# a recipe\n# ü\n{RECIPE}".encode("latin-1"))


def cut_off(folder: Path) -> None:
    """A download that ended early."""
    (folder / "demos.jsonl.gz").write_bytes(gzip.compress(demos(ROW).encode())[:-9])


TWICE = "{{ bos_token }}{{ bos_token }}{% for m in messages %}{{ m.content }}\n{% endfor %}"
SECTIONS: dict[str, list[Mistake]] = {
    "The recipe": [
        recipe("A misspelt key", "sft.lrr=1e-5", "sft.lrr: unknown key, did you mean 'lr'?"),
        recipe("A misspelt table", "evl.samples=4", "evl: unknown key, did you mean 'eval'?"),
        recipe("A key in the wrong table", "sft.beta=5", "did you mean 'sft.objective.beta'?"),
        recipe("A value of the wrong type", "sft.lr=fast", "sft.lr: input should be a valid number", "'fast'"),
        recipe("True for a number", "rl.group_size=true", "rl.group_size: input should be a number (got True)"),
        recipe("An infinite temperature", "rl.temperature=inf", "rl.temperature: input should be a finite number"),
        Mistake(
            "A misspelt key of a comparison, told by every command",
            "run r.toml --dry-run",
            ("compare.sedes: unknown key, did you mean 'seeds'?",),
            {"r.toml": RECIPE + "\n[compare]\nsedes = [0, 1]\n"},
        ),
        Mistake(
            "A misspelt key of a strategy that is not chosen",
            "run r.toml --dry-run",
            ("strategies.mine.sft.lrr: unknown key, did you mean 'lr'?",),
            {"r.toml": RECIPE + "\n[strategies.mine]\nsft.lrr = 1e-4\n"},
        ),
        recipe("An override of what only a file holds", "compare.seeds=[1]", "compare: stands only in a recipe's file"),
        recipe(
            "Several mistakes at once",
            "sft.epochs=-1 rl.group_size=1 sed=3 pretrain.width=64",
            "4 mistakes",
            "leave out model, or [pretrain]",
            "sft.epochs",
            "rl.group_size",
            "sed: unknown key, did you mean 'seed'?",
        ),
        recipe("A misspelt objective", "sft.objective.name=gfit", "unknown objective 'gfit', did you mean 'gift'?"),
        recipe("A hyper-parameter out of range", "sft.objective.beta=-2", "beta must be a finite number ≥ 0"),
        recipe("A β that is no number and none of its tables", "sft.objective.beta={left=0.1}", "left_to_base = …"),
        recipe("A direction that there is not", "sft.objective={name='kd',direction='back'}", "'forward', 'reverse'"),
        recipe(
            "An objective of one's own that is not there",
            "sft.objective.name=mine.py:Focal",
            "cannot import",
            "mine.py",
        ),
        recipe(
            "A cache that the objective cannot train from",
            "sft.objective.name=kd sft.reference=surprise",
            "'kd' needs the base everywhere",
            "hidden",
        ),
        recipe("A column that the rows do not have", "sft.objective.name=pear", "reads the column 'generator_logp'"),
        recipe("An unknown source of data", "data.source=arithmatic", "did you mean 'arithmetic'?"),
        recipe("A key of another source", "data.pool=x.jsonl", "data.pool", "it belongs to files and hub"),
        recipe("A key below a value", "model.x=1", "'model' is not a table"),
        Mistake(
            "Neither a model nor a table that makes one",
            "run r.toml --dry-run",
            ("model: required",),
            {"r.toml": RECIPE.partition("\n")[2]},
        ),
        Mistake(
            "A model, and a table that makes another",
            "run r.toml --dry-run",
            ("[pretrain] makes the base from nothing",),
            {"r.toml": RECIPE + "\n[pretrain]\n"},
        ),
        recipe(
            "A batch that its parts do not divide", "sft.batch=6", "batch (6) must be a multiple of micro_batch (4)"
        ),
        recipe("Prompts that the updates do not divide", "rl.prompts=6", "must be a multiple of update_prompts"),
        recipe("A misspelt policy", "rl.policy=daop", "unknown policy 'daop', did you mean 'dapo'?"),
        recipe(
            "A hyper-parameter that the policy does not read",
            "rl.policy.name=cispo rl.policy.clip_low=0.1",
            "policy 'cispo' does not read 'clip_low'",
        ),
        recipe(
            "A reference without a KL to it",
            "rl.policy.name=grpo rl.policy.reference=base",
            "does not read 'reference'",
        ),
        recipe(
            "A policy whose rounds are not the group",
            "rl.policy=trapo",
            "rounds [4, 2, 1, 1] add up to 8, the group has 2",
        ),
        recipe("No rollout beside the demonstration", "rl.policy.name=luffy rl.policy.traces=2", "leave no rollout"),
        recipe("A seed that numpy does not take", "seed=-1", "seed: input should be greater than or equal to 0"),
        recipe("pass@k from too few samples", "eval.k=[1,4]", "pass@4 needs at least 4 samples, not 2"),
        recipe("More solutions than forms", "data.paths=5", "need as many forms, not 4"),
        recipe(
            "A field that the trainer does not have",
            "sft.trainer.neftune_noise_alfa=5",
            "trl.SFTConfig has no field 'neftune_noise_alfa', did you mean 'neftune_noise_alpha'?",
        ),
        recipe(
            "A trainer field that the recipe already sets",
            "rl.trainer.learning_rate=1e-5",
            "learning_rate is set by rl.lr; set that instead",
        ),
        recipe("A trainer field of the wrong type", "sft.trainer.dataloader_num_workers=two", "valid integer", "'two'"),
        recipe(
            "A trainer field that would be ignored",
            "rl.trainer.num_iterations=2",
            "num_iterations cannot be set: each generation is used once",
        ),
        recipe("LoRA on layers that are not there", 'lora.targets=["q_prj"]', "do not fit the model", "q_proj"),
        Mistake("A file that is not TOML", "run r.toml", ("not valid TOML",), {"r.toml": "model = \n"}),
        Mistake("A recipe that is not UTF-8", "run r.toml", ("not UTF-8 at line 2: byte 0xfc",), before=latin),
        Mistake(
            "A recipe that extends nothing",
            "run r.toml",
            ("no such recipe: 'smke'", "r.toml, extends", "did you mean 'smoke'?"),
            {"r.toml": 'extends = "smke"\n'},
        ),
        Mistake("A recipe that is not there", "run smke", ("no such recipe", "did you mean 'smoke'?")),
        recipe("An override without a value", "sft.lr", "an override is section.key=value"),
    ],
    "The model": [
        recipe("A folder that is not there", "model=./bsae", "cannot load the model './bsae': it is no folder"),
        recipe("A misspelt model", "model=tinny", "did you mean 'tiny'?"),
        recipe("A chat template that is not there", "template=alpaca", "no chat template 'alpaca'", "plain"),
        Mistake(
            "Tokenizer and model of different vocabularies",
            "run r.toml --dry-run",
            ("different vocabularies", "<|think|>"),
            {"r.toml": RECIPE},
            1,
            spoil_tokenizer,
        ),
    ],
    "The data": [
        Mistake("A missing file", "sft r.toml", ("cannot read",), {"r.toml": files("")["r.toml"]}),
        Mistake("A row that is not JSON", "sft r.toml", ("not JSON", "row 2"), files(demos(ROW, "{'question'"))),
        Mistake(
            "A key twice in a row",
            "sft r.toml",
            ("'question' is there twice in one object", "row 1"),
            files('{"question": "1 + 1?", "question": "2 + 2?", "solution": "4"}\n'),
        ),
        Mistake(
            "Half a character in a row",
            "sft r.toml",
            ("half of a surrogate pair", "row 2"),
            files(demos(ROW, {**ROW, "question": "2 + 2 \ud83d?"})),
        ),
        Mistake(
            "A compressed file that is cut off",
            "sft r.toml data.demos_from=demos.jsonl.gz",
            ("not a whole gzip file",),
            files(""),
            before=cut_off,
        ),
        Mistake(
            "A chat template that refuses the turns",
            "sft r.toml template=strict.jinja",
            ("the chat template refuses a conversation of user: roles must alternate",),
            files(demos(ROW), **{"strict.jinja": "{{ raise_exception('roles must alternate') }}"}),
        ),
        Mistake(
            "A field under another name",
            "sft r.toml",
            ("no 'question' in the row (it has prompt, solution)", "data.fields.question"),
            files(demos({"prompt": "1 + 1?", "solution": "2"})),
        ),
        Mistake(
            "An empty solution",
            "sft r.toml",
            ("'solution' is empty in the row", "row 2"),
            files(demos(ROW, {**ROW, "solution": " "})),
        ),
        Mistake(
            "A chat that does not end in an answer",
            "sft r.toml",
            ("no assistant turn ends 'messages'",),
            files(
                demos({"messages": [{"role": "user", "content": "1 + 1?"}]}), data='fields = { messages = "messages" }'
            ),
        ),
        Mistake(
            "Nothing to learn in a row",
            "sft r.toml",
            ("no supervised token: the prompt alone fills max_length = 12", "row 1"),
            files(demos(ROW), sft="max_length = 12\ntruncate = true"),
        ),
        Mistake(
            "Rows cut in silence",
            "sft r.toml",
            ("1 of 2 rows (50.0%) are longer than sft.max_length = 40", "sft.truncate = true", "row 2"),
            files(demos(ROW, {**ROW, "question": "2?", "solution": "0" * 60}), sft="max_length = 40"),
        ),
        Mistake(
            "The end token inside a solution",
            "sft r.toml",
            ("the solution contains the end token <|end|>", "row 2"),
            files(demos(ROW, {**ROW, "question": "2?", "solution": "so<|end|>2"})),
        ),
        Mistake(
            "Characters that the tokenizer does not know",
            "sft r.toml",
            ("1 of 2 rows hold characters that the tokenizer does not know (<unk>)", "row 2"),
            files(demos(ROW, {**ROW, "question": "3 × 4?"})),
        ),
        Mistake(
            "BOS twice",
            "sft r.toml template=twice.jinja",
            ("begins with BOS (token 2) twice", "row 1"),
            files(demos(ROW), **{"twice.jinja": TWICE}),
            before=lambda folder: give_bos(folder),
        ),
        Mistake(
            "A test problem among the demonstrations",
            "run r.toml --dry-run",
            ("1 held-out question(s) also stand in data.demos", "test.jsonl, row 1", "demos.jsonl, row 1"),
            files(
                demos(ROW),
                data='test_from = "test.jsonl"',
                **{"test.jsonl": demos({**ROW, "question": "what is 1 + 1?"})},
            ),
        ),
        Mistake(
            "A gold answer that no grader can read",
            "run r.toml --dry-run",
            ("1 of 1 gold answers cannot be graded", "row 1", "data.fields.answer_after"),
            files(
                demos(ROW),
                data='test_from = "test.jsonl"',
                **{"test.jsonl": demos({"question": "2 + 2?", "answer": "N/A"})},
            ),
        ),
        Mistake(
            "Gold answers that a plain statement does not bring",
            "run r.toml --dry-run",
            ("1 of 1 gold answers are not found right", "'The answer is not enough pens.' None is read"),
            files(
                demos(ROW),
                data='test_from = "test.jsonl"',
                **{"test.jsonl": demos({"question": "How many pens?", "answer": "not enough pens"})},
            ),
        ),
        Mistake(
            "Demonstrations whose answers the grader does not read",
            "run r.toml --dry-run",
            ("1 of 1 solutions are not right by their own gold answers", "nothing is read", "'mother'", "row 1"),
            files(
                demos({"question": "Ann bore Bob. What is she to him?", "solution": "mother", "answer": "mother"}),
                data='test_from = "test.jsonl"',
                **{"test.jsonl": demos({**ROW, "question": "2 + 2?", "answer": "4"})},
            ),
        ),
        Mistake(
            "A CSV file with semicolons",
            "sft r.toml data.demos_from=demos.csv",
            ("columns are separated by ';'",),
            files("") | {"demos.csv": "question;solution\n1 + 1?;2\n"},
        ),
        recipe("A value where a table belongs", "lora=true", "lora: a table of its own, such as [lora]"),
        Mistake(
            "An answer without its marker",
            "sft r.toml",
            ("no '####' with an answer after it in '2'",),
            files(demos(ROW), data='fields = { answer_after = "####" }'),
        ),
        Mistake(
            "Prompts without the solution that the policy learns from",
            "run r.toml --dry-run",
            ("1 of 2 prompts have no solution, which the policy 'luffy' learns from", "prompts.jsonl, row 2"),
            {
                "r.toml": GUIDED,
                "test.jsonl": demos({"question": "3 + 3?", "answer": "6"}),
                "prompts.jsonl": demos(ROW, {"question": "2 + 2?", "answer": "4"}),
            },
        ),
        recipe(
            "Demonstrations longer than a completion may be",
            "rl.policy=luffy rl.max_new_tokens=8",
            "solutions are longer than rl.max_new_tokens = 8",
        ),
        recipe("Fewer prompts than one generation takes", "data.prompts=3", "3 prompts, but one generation takes"),
        recipe("Held-out answers during RL, of no problems", "rl.eval_every=5 data.test=0", "and there are none"),
        recipe("More problems than there are", "data.demos=5000", "but only 3,054 exist with 2 digits"),
        Mistake(
            "A stage without its rows",
            "run r.toml --dry-run",
            ("the sft stage reads data.demos, and the recipe gives it no row",),
            {"r.toml": FILES.format(data='test_from = "test.jsonl"', sft="")},
        ),
    ],
    "The folder of a run": [
        Mistake(
            "A folder that holds a run",
            "sft r.toml",
            ("the sft stage of this run is already trained", "--fresh"),
            {"r.toml": RECIPE},
            1,
            train,
        ),
        Mistake(
            "Another recipe than the run's",
            "rl r.toml sft.lr=2e-5",
            ("sft.lr: 1e-05 → 2e-05", "--resume --change sft.lr"),
            {"r.toml": RECIPE},
            before=train,
        ),
        Mistake(
            "A change that a finished stage had to know",
            "rl r.toml sft.lr=2e-5 --resume --change sft.lr",
            ("sft.lr has changed, and the sft stage is finished under its former value",),
            {"r.toml": RECIPE},
            before=train,
        ),
        Mistake(
            "A base that is no longer the same",
            "eval r.toml",
            ("the base model is not the one this run began with",),
            {"r.toml": RECIPE},
            1,
            other_base,
        ),
        Mistake("Both ways of going on", "run r.toml --resume --fresh", ("exclude each other",), {"r.toml": RECIPE}),
        Mistake("A report of something else", "report base", ("not a run: it holds no env.json",), {"r.toml": RECIPE}),
    ],
    "Preferences": [
        recipe(
            "Preferences beside RL", "preference.data=p.jsonl", "both make the policy 'final'; leave out one of them"
        ),
        preferences(
            "A loss of the other method", PAIR, "loss 'bce' is none of method 'dpo'", change="preference.loss=bce "
        ),
        preferences(
            "A trainer field that the loss does not read",
            PAIR,
            "label_smoothing is not read by loss 'sigmoid' of dpo, only by robust",
            change="preference.trainer.label_smoothing=0.1 ",
        ),
        preferences("A row that prefers nothing", ROW, "no preference in the row: it has question, solution, answer"),
        preferences(
            "A scored row for DPO",
            {"prompt": "3 + 3?", "response": "6", "score": 0.9},
            "DPO learns from pairs, and the row is a score",
            "row 2",
        ),
        preferences(
            "A score on another scale",
            {"prompt": "3 + 3?", "response": "6", "score": 4},
            "the score 4 is not a number from 0 to 1",
            change="preference.method=una ",
        ),
        preferences("Twice the same completion", PAIR | {"rejected": "2 + 2 = 4"}, "chosen and rejected are the same"),
        preferences(
            "The end token inside a completion", PAIR | {"chosen": "so<|end|>4"}, "'chosen' contains the end token"
        ),
        preferences(
            "A test problem among the preferences",
            PAIR | {"question": "what is 1 + 1?"},
            "1 preference row(s) ask a test problem",
            "p.jsonl, row 2",
            "test.jsonl, row 1",
        ),
    ],
    "Rewards": [
        recipe("A misspelt kind of answer", "reward.kind=cod", "reward.kind", "'math', 'choice' or 'code'"),
        recipe("A reward that there is not", "reward.weights={verdit=1}", "'verdit' is neither verdict, model nor"),
        recipe("A weight without its model", "reward.weights={model=1}", "there is no reward model: set reward.model"),
        recipe("A profile for programs", "reward={kind='code',profile='paper'}", "profile and stages are for math"),
        recipe("A function that is not there", "reward.weights={'mine.py:brief'=1}", "no function mine.py:brief"),
        recipe("A stage that is not there", "reward.stages=['colours:same']", "no stage colours:same"),
        recipe("A reward model that is not there", "reward.model=./judge", "cannot load the model './judge'"),
        recipe("An isolation that there is not", "reward={kind='code',isolation='docker'}", "no isolation 'docker'"),
        Mistake(
            "Options that are none",
            "run r.toml --dry-run",
            ("'choices' holds no options", "row 1"),
            files(demos(ROW | {"choices": 4}), data='fields = { options = "choices" }'),
        ),
    ],
    "verl": [
        on_verl("A policy that verl does not have", "rl.policy=implicit", "verl has no policy 'implicit'", "rloo with"),
        on_verl("A part that verl does not have", "rl.policy=reinforce", "verl has no advantage 'reward'", "centred"),
        on_verl("Fewer completions than GPUs", "", "no multiple of 8 GPUs", "n_gpus_per_node"),
        on_verl(
            "A key of verl that the recipe decides",
            "rl.micro_batch=1 rl.verl.data.train_batch_size=64",
            "verl's data.train_batch_size is set by the recipe itself",
        ),
    ],
    "Tasks of an evaluation": [
        recipe("A misspelt task", 'eval.tasks=["gsm8"]', "no task is called 'gsm8'", "did you mean 'gsm8k'"),
        Mistake(
            "A task's file with keys that are none",
            'run r.toml eval.tasks=["mine.toml"] --dry-run',
            ("2 mistakes", "fields.anser: unknown key, did you mean 'answer'?", "promt: unknown key", "mine.toml"),
            {
                "r.toml": RECIPE,
                "mine.toml": 'name = "m"\nkind = "math"\nfile = "m.jsonl"\npromt = "?"\nfields = { anser = "a" }\n',
            },
        ),
        recipe(
            "A benchmark that is neither here nor on the hub",
            'eval.tasks=["humaneval_plus"]',
            "no file with the rows of 'humaneval_plus'",
            "set eval.data_dir to a folder with humanevalplus/HumanEvalPlus.jsonl.gz",
            "humanevalplus_release",
        ),
        Mistake(
            "Part of a benchmark",
            'run r.toml eval.tasks=["gsm8k"] eval.data_dir=. --dry-run',
            ("'gsm8k' has 1,319 problems, but here are 1", "gsm8k/test.jsonl"),
            {"r.toml": RECIPE, "gsm8k/test.jsonl": demos({"question": "1 + 1?", "answer": "#### 2"})},
        ),
        Mistake(
            "MT-Bench without a judge",
            'run r.toml eval.tasks=["mine.toml"] --dry-run',
            ("nobody rates the answers of mine", "eval.judge"),
            {
                "r.toml": RECIPE.replace("samples = 2", "samples = 1"),
                "mine.toml": 'name = "mine"\nkind = "judge"\nfile = "mine.jsonl"\n',
                "mine.jsonl": demos({"question_id": 1, "category": "writing", "turns": ["Write.", "Again."]}),
            },
        ),
    ],
    "Models, servers and keys": [
        Mistake(
            "Weights that are a pickle",
            "run r.toml --dry-run",
            ("the weights are pickled (pytorch_model.bin)", "safetensors"),
            {"r.toml": RECIPE},
            before=lambda folder: pickle_weights(folder),
        ),
        Mistake(
            "A model with code of its own",
            "run r.toml --dry-run",
            ("cannot load the model './base'", "set trust_remote_code = true"),
            {"r.toml": RECIPE},
            before=lambda folder: give_code(folder),
        ),
        recipe(
            "A password in an address",
            "eval.engine=api eval.endpoint=https://me:secret@host/v1 eval.served={base='m'}",
            "eval.endpoint: an address holds no name and password",
            "https://***@host/v1",
        ),
        recipe(
            "A setting of vLLM's other mode",
            "rl.trainer={use_vllm=true,vllm_server_port=8001}",
            'vllm_server_port is read only with vllm_mode = "server"',
        ),
        recipe("Settings of vLLM without it", "rl.trainer={vllm_mode='server'}", "read only with use_vllm = true"),
    ],
    "Comparisons": [
        compared(
            "A misspelt strategy", "--vary strategy=sft,gfit", "no strategy is called 'gfit'", "did you mean 'gift'"
        ),
        compared("A key that is none", "--vary sft.lrr=1e-3,1e-4", "sft.lrr: unknown key", "did you mean 'lr'"),
        compared("The same value twice", "--vary sft.lr=1e-3,0.001", "sft.lr has 0.001 twice"),
        compared("A baseline that is not compared", "--vary strategy=sft,dft --baseline gift", "one of sft, dft"),
        Mistake(
            "More trials for one strategy than for another",
            "compare r.toml --vary strategy=sft,dft --dry-run",
            ("'dft' has 3 trials and the others 2", "give all the same number"),
            {"r.toml": RECIPE + TUNE},
        ),
    ],
}
MISTAKES = [mistake for section in SECTIONS.values() for mistake in section]


def give_bos(folder: Path) -> None:
    """A tokenizer with a BOS token."""
    from transformers import AutoTokenizer

    whole = (folder / "base").resolve()
    (folder / "base").unlink()
    shutil.copytree(whole, folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.bos_token = "<|user|>"
    tokenizer.save_pretrained(folder / "base")


def own_base(folder: Path) -> Path:
    """The base as a folder that may be changed."""
    whole = (folder / "base").resolve()
    (folder / "base").unlink()
    return Path(shutil.copytree(whole, folder / "base"))


def pickle_weights(folder: Path) -> None:
    (own_base(folder) / "model.safetensors").rename(folder / "base" / "pytorch_model.bin")


def give_code(folder: Path) -> None:
    config = own_base(folder) / "config.json"
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    config.write_text(json.dumps(json.loads(config.read_text()) | own))


def call(folder: Path, command: str) -> tuple[int, str]:
    """Exit code and stderr of a heatbath command in that folder."""
    from heatbath import cli

    err = StringIO()
    here = Path.cwd()
    os.chdir(folder)
    try:
        with (
            mock.patch.object(sys, "argv", ["heatbath", *command.split()]),
            redirect_stderr(err),
            redirect_stdout(StringIO()),
        ):
            try:
                cli.main()
                code = 0
            except SystemExit as stop:
                code = int(stop.code or 0)
    finally:
        os.chdir(here)
    return code, err.getvalue()


def message(mistake: Mistake, folder: Path, base: Path) -> tuple[int, str]:
    """Exit code, and the message as a user in that folder sees it."""
    (folder / "base").symlink_to(base)
    for name, text in mistake.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    if mistake.before is not None:
        mistake.before(folder)
    code, text = call(folder, mistake.command)
    said = text[text.index("error: ") :] if "error: " in text else text
    return code, said.replace(f"{folder}/", "").strip()


def page(said: dict[str, str]) -> str:
    """The page of all mistakes and messages."""
    lines = [
        "# Errors",
        "",
        "Typical mistakes and what heatbath says to each: what happened, where, and what to do. Exit code 2 means that",
        "the recipe, the data or the command is wrong, 1 that something failed; nothing trains before these checks.",
        "This page is written by `python tests/mistakes.py`, from the table that the tests use.",
    ]
    for section, mistakes in SECTIONS.items():
        lines += ["", f"## {section}"]
        for m in mistakes:
            lines += ["", f"### {m.title}", "", "```text", f"$ heatbath {m.command}", said[m.title], "```"]
    return "\n".join(lines) + "\n"


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    from conftest import small_model, small_tokenizer

    with tempfile.TemporaryDirectory() as name:
        base = Path(name) / "small"
        small_model().save_pretrained(base)
        small_tokenizer().save_pretrained(base)
        said = {}
        for number, mistake in enumerate(MISTAKES):
            folder = Path(name) / str(number)
            folder.mkdir()
            said[mistake.title] = message(mistake, folder, base)[1]
    PAGE.write_text(page(said), encoding="utf-8")


if __name__ == "__main__":
    main()
