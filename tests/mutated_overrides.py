"""More mutations of recipes: overrides, strategies, extends, comparisons, trainer fields, contradictions."""

from __future__ import annotations

from functools import cache
from typing import Any

import mutated_recipes as recipes
from grounded_recipes import text_of
from mutated_recipes import RUN, Draw, case, named
from mutation_oracle import Case


def override_of_a_key(r: Draw, name: str, text: str) -> Case | None:
    """What is wrong in a file is wrong on the command line."""
    entry = recipes.any_entry(r, text, lambda e: recipes.validated(e) and not e.table.startswith("compare"))
    if entry is None or recipes.kind_of(entry) not in ("number", "text", "bool", "list"):
        return None
    how = r.choice(["misspelt", "type", "range"])
    if how == "misspelt":
        wrong = recipes.misspelt_word(r, entry.key)
        if wrong in recipes.KNOWN:
            return None
        path = f"{entry.table}.{wrong}" if entry.table else wrong
        written, names = f"{path}={entry.text.partition(' #')[0].strip()}", (wrong,)
    else:
        kind = recipes.kind_of(entry)
        if how == "range" and kind != "number":
            return None
        pool = {
            "number": ("fast", "[1,2]", "true", "{a=1}", "1,5", "1e-5x", "--1"),
            "text": ("5", "true", "[1]", "1.5"),
            "bool": ("maybe", "2", "[true]", "yes", "1"),
            "list": ("5", "true", "[[1]]", "[true]", "[1,"),
        }[kind]
        value = r.choice(("-1", "nan", "inf", "-inf", "-0.5") if how == "range" else pool)
        written, names = f"{entry.path}={value}", named(entry.path)
        if entry.path == "eval.tasks" and value == "[1,":
            return None
    return case(f"override: {how}", text, names=(names,), overrides=(written,), note=written[:80])


MALFORMED = (
    *("sft.lr", "=3", "=", ".", "sft.", ".lr=3", "sft..lr=3", "sft.lr.=1", "sft.lr.x=1", "sft.=1", "sft.lr==3"),
    *("seed=1\nmodel='x'", "sft.lr=1e-5\nrl=false", "seed=", "eval.k=", "eval.k=[1", "eval=5", "eval=", "eval=[]"),
    *("data=5", "data=arithmetic", "data.source.x=1", "sft.objective.name.x=1", "sft.objective=", "rl.policy="),
    *("extends=smoke", "strategies.gift=5", "strategies.gift.sft.lr=1", "compare.seeds=[1]", "strategy="),
    *("strategy=5", "strategy=[1]", "strategy.x=1", "a.b.c.d.e.f=1", "\udcff=1", "model=\udcff", "name=\udcff"),
    *("data.system=\ud800", "seed=1_0_", "seed=0x", "seed=1e400", "seed=" + "1" * 5000, "seed=" + "[" * 3000),
    *("eval.k=" + "[" * 5000 + "]" * 5000, "x" * 5000 + "=1", "eval." + "x" * 5000 + "=1", "model=" + "x" * 5000),
    *("data.system=" + "x" * 50000, "ünï=1", "\x1b[31m=1", "model=\x1b[31mred", "eval.samples=\x07", "model=a\x00b"),
    *("reward.model=a\x00b", "template=a\x00b", "template=" + "x" * 5000, "template=.", "model=", "model= "),
    *("model=.", "model=/", "model=~", "model=~nobody/x", "published=x", "published=", "precision=fp8", "seed=1.5"),
    *("seed=true", "sft=5", "sft=true", "rl=[]", "lora=5", "lora.rank=0", "lora.targets=[]", "lora.targets="),
    *("lora.targets=5", "lora.dropout=1", "lora.alpha=nan", "lora.targets=((", "reward.weights={verdict=nan}"),
    *("reward.weights={verdict=inf}", "reward.weights=5", "reward.weights={verdict=true}", "reward.weights={':'=1}"),
    *("reward.weights={'a:b'=1}", "reward.weights={'.:.'=1}", "reward.stages=[':']", "reward.stages=x"),
    *("reward.deadline=inf", "reward.deadline=0", "reward.workers=0", "reward.failed_share=2", "reward.kind="),
    *("reward.model=", "eval.temperature=inf", "eval.temperature=-1", "eval.top_p=0", "eval.top_p=nan", "eval.k=[0]"),
    *("eval.k=[1.5]", "eval.judge=5", "eval.judge={}", "eval.engine=api", "eval.endpoint=x", "eval.served={x='y'}"),
    *("eval.problems=0", "eval.tasks=[5]", "eval.tasks=[{}]", "eval.tasks=['arithmetic','arithmetic']"),
    *("eval.tasks=['']", "eval.tasks=['x.toml']", "eval.tasks=['reasoning_gym:']", "eval.tasks=['reasoning_gym:x']"),
    *("eval.tasks=['lm_eval:']", "eval.tasks=['.yaml']", "eval.tasks=['a\\u0000.toml']", "eval.tasks=[[]]"),
    *("eval.tasks=[{name='arithmetic',samples=1,k=[2]}]", "eval.tasks=5", "data.decontaminate=['x']"),
    *("data.decontaminate=5", "data.decontaminate=['']", "data.decontaminate=['.']", "data.ngram=1"),
    *("data.decontaminate=['a\\u0000b']", "data.system=5", "data.digits=10", "data.paths=99", "data.forms=['x']"),
    *("data.data_dir=5", "data.data_dir=~nobody/x", "eval.data_dir=~nobody/x", "model=" + "x/" * 3000),
    *("eval.data_dir=a\x00b",),
)  # fmt: skip
# Of those above, what is no mistake, or may be one of the recipe that it is laid over.
MILD = {
    *("strategy=", "seed=1_0_", "data.system=" + "x" * 50000, "data.system=\ud800", "model=~", "sft.objective="),
    *("sft.lr==3", "eval.problems=0", "data.decontaminate=['x']", "eval.data_dir=~nobody/x", "data.data_dir=~nobody/x"),
    *("data.decontaminate=['.']", "data.digits=10", "data.paths=99", "data.forms=['x']", "eval=5", "name=\udcff"),
}


def malformed_override(r: Draw, name: str, text: str) -> Case | None:
    written = r.choice(MALFORMED)
    key = written.partition("=")[0].strip()
    if key.startswith("data.") and key not in ("data.system", "data.decontaminate", "data.ngram", "data.data_dir"):
        text = text_of("smoke")
    hint = (
        key[:40],
        key.rpartition(".")[2][:40] or "override",
        *([key.partition(".")[0]] if "." in key else []),
        "override",
        "strategy",
        "task",
    )
    if not key.isprintable():
        hint = ("override", "character", "\\x", "\\udc")
    must: Any = "refused" if written not in MILD else "either"
    return case("override: malformed", text, must, (hint,), overrides=(written,), note=ascii(written[:60]))


SMOKE_COMBOS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("sft.micro_batch=32", ()),  # of a batch of 16: all at once
    ("sft.batch=17", ("sft: batch",)),
    ("sft.micro_batch=5", ("micro_batch",)),
    ("rl.group_size=1", ("rl.group_size",)),
    ("eval.k=[1,16]", ("pass@16",)),
    ("eval.samples=4", ("pass@8",)),
    ("rl.update_prompts=48", ("update_prompts",)),
    ("rl.prompts=200 rl.update_prompts=100", ("rl: update_prompts",)),
    ("rl.max_new_tokens=0", ("rl.max_new_tokens",)),
    ("eval.max_new_tokens=0", ("eval.max_new_tokens",)),
    ("sft.max_length=1", ("sft.max_length",)),
    ("sft.max_length=5", ("sft.max_length", "max_length = 5")),
    ("rl.eval_every=2 data.test=0", ("rl.eval_every",)),
    ("data.test=0", ("data.test",)),
    ("data.demos=0", ("data.demos",)),
    ("data.prompts=0", ("data.prompts",)),
    ("data.prompts=20", ("data.prompts",)),
    ("data.test=100000", ("data.test",)),
    ("data.demos=100000", ("data.demos",)),
    ("data.paths=3", ("data: paths", "paths = 3")),
    ("data.forms=['tens','tens']", ("data.forms",)),
    ("data.forms=[]", ("data.forms",)),
    ("data.operations=['*']", ("data.operations",)),
    ("pretrain.width=64", ("pretrain",)),
    ("model=false", ("model",)),
    ("preference.data=sums", ("preference",)),
    ("sft.reference=surprise sft.objective=kd", ("'kd'",)),
    ("sft.objective=gift", ("beta",)),
    ("sft.objective={name='gift'}", ("beta",)),
    ("sft.objective={beta=5}", ("sft.objective",)),
    ("sft.objective={name='gift',beta=5,betta=4}", ("betta",)),
    ("sft.objective={name='gift',beta='5'}", ("beta",)),
    ("sft.objective={name='gift',beta=true}", ("beta",)),
    ("sft.objective={name='gift',beta=nan}", ("beta",)),
    ("sft.objective={name='gift',beta=-1}", ("beta",)),
    ("sft.objective={name='gift',beta=[5]}", ("beta",)),
    ("sft.objective={name='gift',beta={}}", ("beta",)),
    ("sft.objective={name='gift',beta={start=5,end=1,steps=0}}", ("beta",)),
    ("sft.objective={name='gift',beta={start='a',end=1,steps=3}}", ("beta",)),
    ("sft.objective={name='gift',beta={column='missing'}}", ("missing",)),
    ("sft.objective={name='gift',beta={column=''}}", ("beta", "column")),
    ("sft.objective={name='gift',beta={left_to_base=2}}", ("left_to_base",)),
    ("sft.objective={name='gift',beta=5,smoothing=1}", ("smoothing",)),
    ("sft.objective={name='gift',beta=5,smoothing='x'}", ("smoothing",)),
    ("sft.objective={name=5}", ("sft.objective",)),
    ("sft.objective={name=''}", ("sft.objective",)),
    ("sft.objective={name=':'}", ("sft.objective",)),
    ("sft.objective={name='.py:'}", ("sft.objective",)),
    ("sft.objective={name='json:loads'}", ("sft.objective",)),
    ("sft.objective={name='json:JSONDecoder'}", ("sft.objective",)),
    ("sft.objective={name='..x:Y'}", ("sft.objective",)),
    ("sft.objective={name='sed',topk=0}", ("topk",)),
    ("sft.objective={name='sed',topk=1.5}", ("topk",)),
    ("sft.objective={name='sed',topk=-3}", ("topk",)),
    ("sft.objective={name='label_smoothing',epsilon=1}", ("epsilon",)),
    ("rl.policy={}", ("rl.policy",)),
    ("rl.policy={name=5}", ("rl.policy",)),
    ("rl.policy={name='grpo',clip_low=-1}", ("clip_low",)),
    ("rl.policy={name='grpo',clip_low=nan}", ("clip_low",)),
    ("rl.policy={name='grpo',kl='x'}", ("kl",)),
    ("rl.policy={name='grpo',kl=-1}", ("kl",)),
    ("rl.policy={name='grpo',kl=inf}", ("kl",)),
    ("rl.policy={name='grpo',advantage=5}", ("advantage",)),
    ("rl.policy={name='grpo',advantage=true}", ("advantage",)),
    ("rl.policy={name='grpo',advantage=[]}", ("advantage",)),
    ("rl.policy={name='grpo',surrogate='x:y'}", ("surrogate", "x:y")),
    ("rl.policy={name='grpo',reduction='x'}", ("reduction",)),
    ("rl.policy={name='trapo',rounds=5}", ("rounds", "trapo")),
    ("rl.policy={name='trapo',rounds=[]}", ("rounds", "trapo")),
    ("rl.policy={name='trapo',rounds=['a']}", ("rounds", "trapo")),
    ("rl.policy={name='trapo',rounds=[4,4,true]}", ("rounds", "trapo")),
    ("rl.policy={name='uft',hint_steps=0}", ("hint_steps",)),
    ("rl.policy={name='uft',hint_steps='x'}", ("hint_steps",)),
    ("rl.policy={name='relift',sft_batch=0}", ("sft_batch",)),
    ("rl.policy={name='relift',sft_lr=-1}", ("sft_lr",)),
    ("rl.policy={name='luffy',traces=9}", ("traces", "luffy")),
    ("rl.policy={name='dapo',length=-1}", ("length", "dapo")),
    ("rl.temperature=inf", ("rl.temperature",)),
    ("rl.temperature=0", ("rl.temperature",)),
    ("rl.truncate=maybe", ("rl.truncate",)),
    ("reward.kind=code", ("reward.kind",)),
    ("reward.kind=choice", ("reward.kind",)),
    ("reward.profile=paper reward.kind=choice", ("reward",)),
    ("reward.isolation=bubblewrap", ("isolation",)),
    ("reward.sqrt_length=true", ("reward",)),
    ("reward.model=nowhere/nothing", ("reward.model", "'nowhere/nothing'")),
    ("reward.model=./nothing", ("./nothing",)),
    ("sft.splits=[]", ("sft.splits",)),
    ("sft.splits=['tests']", ("sft.splits",)),
    ("sft.splits=5 data.source=files", ("sft.splits",)),
    ("sft.splits=[[1]] data.source=files", ("sft.splits",)),
    ("sft=5 sft.objective.name=gift", ("sft",)),
    ("sft.epsilon=0", ("sft.epsilon",)),
    ("sft.adam_betas=[0.9]", ("sft.adam_betas",)),
    ("sft.adam_betas=[1,1]", ("sft.adam_betas",)),
    ("sft.adam_betas=[true,0.9]", ("sft.adam_betas",)),
    ("sft.warmup_steps=-1", ("sft.warmup_steps",)),
    ("sft.max_steps=0", ("sft.max_steps",)),
    ("lora.targets=['lm_head']", ("lora.targets",)),
    ("lora.targets=['x']", ("lora.targets",)),
    ("lora.targets=[5]", ("lora.targets",)),
    ("lora.rank=1000000000000", ()),
    ("data.source=none", ("data.", "data:")),
    ("data.source=deepmath", ()),
    ("data.source=hub", ("data.",)),
    ("data.source=reasoning_gym", ("data.",)),
)
MAY = {
    *("sft.micro_batch=32", "lora.rank=1000000000000", "data.source=deepmath", "model=false"),
    *("rl.policy={name='dapo',length=-1}", "rl.policy={name='uft',hint_steps=0}"),
}


def contradiction(r: Draw, name: str, text: str) -> Case | None:
    overrides, names = r.choice(SMOKE_COMBOS)
    must: Any = "either" if overrides in MAY else "refused"
    wanted = (names,) if names else ()
    return case("contradiction", text_of("smoke"), must, wanted, overrides=tuple(overrides.split()), note=overrides)


# --- strategies, extends, compare ----------------------------------------------------------------------------------
def strategies(r: Draw, name: str, text: str) -> Case | None:
    top, _, rest = text_of("smoke").partition("\n\n")
    made = r.choice(
        [
            (f'{top}\nstrategy = "gfit"\n{rest}', ("'gfit'",), "refused"),
            (f"{top}\nstrategy = 5\n{rest}", ("strategy",), "refused"),
            (f"{top}\nstrategy = [1]\n{rest}", ("strategy",), "refused"),
            (f"{top}\nstrategy = false\n{rest}", ("strategy",), "refused"),
            (f'{top}\nstrategy = ""\n{rest}', ("strategy",), "refused"),
            (f"{top}\nstrategies = 5\n{rest}", ("strategies",), "refused"),
            (f'{top}\nstrategy = "gift"\nstrategies = 5\n{rest}', ("strategies",), "refused"),
            (f'{top}\nstrategy = "gift"\nstrategies = {{ gift = 5 }}\n{rest}', ("strategies.gift",), "refused"),
            (f"{top}\nstrategies = {{ mine = 5 }}\n{rest}", ("strategies.mine",), "refused"),
            (f"{top}\nstrategies = {{ mine = [1] }}\n{rest}", ("strategies.mine",), "refused"),
            (f"{top}\nstrategies = {{ mine = {{ sft = 5 }} }}\n{rest}", ("strategies.mine",), "refused"),
            (f"{top}\n{rest}\n[strategies.mine]\nsft.lrr = 1\n", ("lrr",), "refused"),
            (f"{top}\n{rest}\n[strategies.mine]\nsftt.lr = 1\n", ("sftt",), "refused"),
            (f"{top}\n{rest}\n[strategies.mine]\nlr = 1\n", ("strategies.mine", "lr:"), "refused"),
            (f"{top}\n{rest}\n[[strategies]]\nsft.lr = 1\n", ("strategies",), "refused"),
            (f"{top}\n{rest}\n[strategies.mine.sft]\nlr = -1\n", ("sft.lr",), "either"),
            (f'{top}\nstrategy = "mine"\n{rest}\n[strategies.mine.sft]\nlr = -1\n', ("sft.lr",), "refused"),
            (f'{top}\nstrategy = "mine"\n{rest}\n[strategies.mine]\nsft = false\n', (), "taken"),
            (f'{top}\nstrategy = "mine"\n{rest}\n[strategies.mine]\ndata = false\n', ("data", "sft"), "refused"),
            (
                f'{top}\nstrategy = "mine"\n{rest}\n[strategies.mine]\nsft.objective = false\n',
                ("objective",),
                "refused",
            ),
            (f'{top}\nstrategy = "mine"\n{rest}\n[strategies.mine]\nstrategy = "gift"\n', ("strategy",), "refused"),
            (f'{top}\nstrategy = "direct-rl"\n{rest}', ("sft",), "sft.lr=1"),
            (f'{top}\nstrategy = "direct-rl"\n{rest}', (), "taken"),
        ]
    )
    text, names, must = made
    overrides = (must,) if "=" in must else ()
    must = "refused" if overrides else must
    return case("strategies", text, must, (names,) if names else (), overrides=overrides)


def extended(r: Draw, name: str, text: str) -> Case | None:
    made: tuple[str, dict[str, bytes | None], tuple[str, ...], Any]
    made = r.choice(
        [
            ('extends = "r.toml"', {}, ("extends",), "refused"),
            ('extends = "a.toml"', {"a.toml": b'extends = "r.toml"\n'}, ("extends",), "refused"),
            ('extends = "a"', {"a.toml": b'extends = "b"\n', "b.toml": b'extends = "a"\n'}, ("extends",), "refused"),
            ('extends = "smok"', {}, ("'smoke'",), "refused"),
            ('extends = "./smok.toml"', {}, ("smok",), "refused"),
            ("extends = 5", {}, ("extends",), "refused"),
            ("extends = true", {}, ("extends",), "refused"),
            ('extends = ["smoke", "demo"]', {}, ("extends",), "refused"),
            ('extends = { name = "smoke" }', {}, ("extends",), "refused"),
            ('extends = ""', {}, ("extends",), "refused"),
            ('extends = "."', {}, ("extends",), "refused"),
            ('extends = "a\\u0000b"', {}, ("extends",), "refused"),
            (f'extends = "{"x" * 300}"', {}, ("extends",), "refused"),
            (f'extends = "{"x/" * 3000}"', {}, ("extends",), "refused"),
            ('extends = "sub"', {"sub": None}, ("extends", "sub"), "refused"),
            ('extends = "a.toml"', {"a.toml": b"model = \n"}, ("a.toml",), "refused"),
            ('extends = "a.toml"', {"a.toml": b"\xff\xfe"}, ("a.toml",), "refused"),
            ('extends = "a.toml"', {"a.toml": b"sft = 5\n"}, ("model",), "refused"),
            ('extends = "smoke"\nsft = 5', {}, ("sft",), "refused"),
            ('extends = "smoke"\nsft.lrr = 5', {}, ("sft.lrr",), "refused"),
            ('extends = "smoke"\nrl = false\nsft = false', {}, (), "taken"),
            ('extends = "smoke"\nrl = 0', {}, ("rl",), "refused"),
            ('extends = "smoke"\nmodel = false', {}, ("model",), "refused"),
        ]
    )
    text, files, names, must = made
    return case("extends", text + "\n", must, (names,) if names else (), files=files, note=text[:60])


COMPARES = (
    ("compare = 5", ("compare",)),
    ("compare = []", ("compare",)),
    ('compare = "x"', ("compare",)),
    ("[[compare]]\nseeds = [1]", ("compare",)),
    ("[compare]\nseed = [1]", ("compare.seed",)),
    ("[compare]\nseeds = []", ("compare.seeds",)),
    ("[compare]\nseeds = [1, 1]", ("seeds",)),
    ("[compare]\nseeds = [true, false]", ("compare.seeds",)),
    ("[compare]\nseeds = [-1]", ("seed",)),
    ("[compare]\nseeds = ['a']", ("compare.seeds",)),
    ("[compare]\nseeds = 5", ("compare.seeds",)),
    ("[compare]\nvary = 5", ("compare.vary",)),
    ("[compare]\nvary = { seed = [1, 2] }", ("seed",)),
    ("[compare]\nvary = { 'sft.lr' = 1e-3 }", ("compare.vary",)),
    ("[compare]\nvary = { 'sft.lr' = [] }", ("compare.vary",)),
    ("[compare]\nvary = { 'sft.lrr' = [1e-3] }", ("sft.lrr",)),
    ("[compare]\nvary = { 'sft.lr' = [-1.0, 1e-3] }", ("sft.lr",)),
    ("[compare]\nvary = { 'sft.lr' = [nan] }", ("sft.lr",)),
    ("[compare]\nvary = { '' = [1] }", ("override", "compare.vary")),
    ("[compare]\nvary = { 'sft.lr' = [[[]]] }", ("sft.lr",)),
    ("[compare]\nvary = { strategy = ['sft', 'gfit'] }", ("'gfit'",)),
    ("[compare]\nvary = { strategy = [5] }", ("strategy",)),
    ("[compare]\nvary = { strategy = ['tuning'] }", ("tuning",)),
    ("[compare]\nbaseline = 5", ("compare.baseline",)),
    ("[compare]\nbaseline = 'x'", ("compare.baseline",)),
    ("[compare]\nshift = 'maybe'", ("compare.shift",)),
    ("[compare]\ntune = 5", ("compare.tune",)),
    ("[compare.tune]", ("compare.tune.grid",)),
    ("[compare.tune]\ngrid = {}\ngrids = { x = { 'sft.lr' = [1, 2] } }", ("'x'",)),
    ("[compare.tune]\ngrid = { 'sft.lr' = [1e-3] }\nseeds = [0]", ("seeds",)),
    ("[compare.tune]\ngrid = { 'sft.lr' = [1e-3] }\ngrids = { nobody = { 'sft.lr' = [1e-3] } }", ("'nobody'",)),
    ("[compare.tune]\ngrid = { 'sft.lr' = [1e-3] }\nk = 0", ("compare.tune.k",)),
    ("[compare.tune]\ngrid = { 'sft.lr' = [1e-3] }\noverrides = 5", ("compare.tune.overrides",)),
    ("[compare.tune]\ngrid = { 'sft.lr' = [1e-3] }\noverrides = { 'sft.lrr' = 5 }", ("sft.lrr",)),
    ("[compare.tune]\ngrid = { 'sft.lrr' = [1e-3] }", ("sft.lrr",)),
    ("[compare.tunes]\ngrid = { 'sft.lr' = [1e-3] }", ("compare.tunes",)),
    ("[compare.tune]\ngridd = { 'sft.lr' = [1e-3] }", ("compare.tune.gridd",)),
)
FOUND_ONLY_BY_COMPARE = (
    *("vary = { 'sft", "vary = { ''", "vary = { strategy", "baseline = 'x'", "overrides = { '", "nobody"),
    *("grid = { 'sft.lrr", "seeds = [-1]", "grids = { x"),
)


def compared(r: Draw, name: str, text: str) -> Case | None:
    """`run` reads [compare] too, though only `compare` goes by it."""
    added, names = r.choice(COMPARES)
    smoke = text_of("smoke")
    made = f"{smoke}\n{added}\n" if added.startswith("[") else f"{added}\n{smoke}"
    run = r.random() < 0.4
    must: Any = "either" if run and any(part in added for part in FOUND_ONLY_BY_COMPARE) else "refused"
    argv = RUN if run else ("compare", "r.toml", "--dry-run")
    return case("compare", made, must, (names,), argv=argv, note=f"{argv[0]}: {added}"[:90].replace("\n", " "))


# --- trainer fields ------------------------------------------------------------------------------------------------
@cache
def fields_of(stage: str) -> tuple[str, ...]:
    from dataclasses import fields

    import trl

    made = {"sft": trl.SFTConfig, "rl": trl.GRPOConfig, "preference": trl.DPOConfig}[stage]
    return tuple(f.name for f in fields(made) if f.init)


VALUES = (
    "5",
    "-1",
    "0",
    "true",
    "'x'",
    "''",
    "[]",
    "[1]",
    "{}",
    "{a=1}",
    "nan",
    "inf",
    "1e300",
    "2026-01-01",
    "'./nothing.json'",
)


def trainer_field(r: Draw, name: str, text: str) -> Case | None:
    stage = r.choice(["sft", "rl", "preference"])
    field = r.choice(fields_of(stage))
    key = f"{stage}.trainer.{field}"
    written = f"{key}={r.choice(VALUES)}"
    base = text_of("preference-tiny" if stage == "preference" else "smoke")
    names = (key, field, f"{stage}.trainer", f"[{stage}.trainer]")
    return case("trainer field", base, "either", (names,), overrides=(written,), note=written, isolated=True)


def wrong_trainer(r: Draw, name: str, text: str) -> Case | None:
    """Fields that there are not, that the recipe sets, and a table that is none."""
    stage = r.choice(["sft", "rl", "preference"])
    wrong = recipes.misspelt_word(r, r.choice(fields_of(stage)))
    misspelt = f"{stage}.trainer.{wrong}"
    choices = [(f"{misspelt}=1", misspelt.rpartition(".")[2])] if wrong not in fields_of(stage) else []
    choices += [(f"{stage}.trainer={value}", f"{stage}.trainer") for value in ("5", "[]", "x", "true", "nan")]
    choices += [(f"{stage}.trainer.{f}=1", f) for f in ("learning_rate", "output_dir", "seed", "bf16", "max_steps", "")]
    written, named_by = r.choice(choices)
    base = text_of("preference-tiny" if stage == "preference" else "smoke")
    return case("trainer table", base, "refused", ((named_by or "trainer",),), overrides=(written,), note=written)


MUTATIONS = (
    *(override_of_a_key, override_of_a_key, malformed_override, malformed_override, contradiction, contradiction),
    *(strategies, extended, compared, compared, trainer_field, wrong_trainer),
)
