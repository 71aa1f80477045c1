"""What `--dry-run` prints: rows, tokens, truncation, masks, steps, memory, and the command that would run."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from heatbath.data import checks, preferences, rendering
from heatbath.data.rendering import Rendered
from heatbath.data.rows import Splits
from heatbath.errors import HeatbathError
from heatbath.launch import Launch
from heatbath.opening import Opening, open_run
from heatbath.ranks import micro_batches
from heatbath.recipe import Recipe
from heatbath.stages import cost, memory, pipeline, replay, rl, sft
from heatbath.stages.exams import exams

ALONE = Launch()


def plan(recipe: Recipe, stages: tuple[str, ...], command: list[str], launch: Launch = ALONE) -> dict[str, Any]:
    """What these stages would do, after reading the data, rendering the demonstrations and running every check.
    `command` is the command line without `--dry-run`, `launch` the processes it asks for. Nothing is trained and
    nothing written."""
    launch.require_recipe(recipe, stages)
    splits, tokenizer = pipeline.check(recipe, stages)
    out: dict[str, Any] = {
        "model": recipe.model or "made by [pretrain]",
        "data": recipe.data.source,
        "rows": {name: len(rows) for name, rows in splits.named().items()},
        "notes": list(splits.notes),
    }
    longest = 0
    if recipe.pretrain is not None and "pretrain" in stages:
        out["pretrain"] = {"steps": sft.total_steps(recipe.pretrain, len(splits.demos))}
    if recipe.sft is not None and "sft" in stages:
        demos = checks.rendered(tokenizer, splits.demos, recipe, "demos")
        longest = max(len(r.input_ids) for r in demos)
        out["sft"] = {
            "objective": recipe.sft.objective.model_dump(),
            **_tokens(demos, tokenizer.eos_token_id),
            "steps": sft.total_steps(recipe.sft, replay.count(recipe, splits.demos)),
        }
        if recipe.sft.replay is not None:
            out["sft"]["replay"] = replay.planned(recipe, tokenizer, splits.demos)
            longest = max(longest, out["sft"]["replay"]["longest"])
    if "preference" in stages:
        out["preference"] = _preference(recipe, splits, tokenizer)
    if "rl" in stages:
        out["rl"] = _rl(recipe, splits)
    if "rl" in stages or "eval" in stages:
        out["reward"] = _reward(recipe)
    if "eval" in stages:
        out["eval"] = _eval(recipe, splits)
    prompts = [rendering.prompt_ids(tokenizer, rendering.messages(r, recipe.data.system)) for r in splits.prompts]
    longest_prompt, longest_preference = max(map(len, prompts), default=0), out.get("preference", {}).get("longest", 0)
    estimated = memory.estimate(recipe, longest, longest_prompt, longest_preference)
    out["memory"] = {stage: parts for stage, parts in estimated.items() if stage in stages}
    if (size := memory.parameters(recipe)) > cost.LARGE:
        on_gpus = memory.estimate(recipe, longest, longest_prompt, longest_preference, gpu=True)
        out["cost"] = {
            "devices": launch.processes if launch.several else cost.DEVICES,
            "device": cost.DEVICE,
            "work": cost.summary(_work(recipe, out, size, sum(map(len, prompts)) / max(len(prompts), 1))),
            "memory": {stage: cost.sharded(on_gpus[stage]) for stage in out["memory"]},
            "assumed": cost.ASSUMED,
        }
    gpu = torch.cuda.is_available() or launch.sharding != "ddp" or size > cost.LARGE
    if launch.several:
        held = memory.estimate(recipe, longest, longest_prompt, longest_preference, gpu=gpu)
        out["processes"] = _shared(recipe, {stage: held[stage] for stage in out["memory"]}, launch, gpu=gpu)
    out["command"] = shlex.join(launch.command(command, gpu=gpu))
    return out


def _shared(recipe: Recipe, held: dict[str, dict[str, float]], launch: Launch, *, gpu: bool) -> dict[str, Any]:
    """What each of several processes does of a step, and what it holds under each way of sharding."""
    own_sampler = "rl" if recipe.rl is not None and not recipe.rl.trainer.get("use_vllm") else None
    room = torch.cuda.get_device_properties(0).total_memory / memory.GIB if torch.cuda.is_available() else cost.CAPACITY
    rows = {
        "sft": recipe.sft and (recipe.sft.batch, recipe.sft.micro_batch),
        "preference": recipe.preference and (recipe.preference.batch, recipe.preference.micro_batch),
        "rl": recipe.rl and (recipe.rl.update_prompts * recipe.rl.group_size, recipe.rl.micro_batch),
    }
    return {
        "count": launch.processes,
        "nodes": launch.nodes,
        "sharding": launch.kind,
        "room": round(room, 1) if gpu else None,  # of a device; H200s where this machine has no GPU
        "loading": {stage: round(cost.loading(parts), 1) for stage, parts in held.items()},
        "micro_batches": {
            stage: micro_batches(*sizes, launch.processes, stage)
            for stage, sizes in rows.items()
            if sizes and stage in held
        },
        "memory": {
            stage: {
                name: round(
                    sum(cost.sharded(parts, launch.processes, name).values())
                    + (cost.gathered(parts) if name == "fsdp2" and stage == own_sampler else 0.0),
                    1,
                )
                for name in cost.SHARDINGS
            }
            for stage, parts in held.items()
        },
    }


def _work(recipe: Recipe, found: dict[str, Any], parameters: int, prompt: float) -> dict[str, cost.Work]:
    """What each planned stage asks of the devices."""
    work: dict[str, cost.Work] = {}
    if "sft" in found:
        s = found["sft"]
        more = s.get("replay", {"answers": 0, "most_tokens": 0})
        shown = (0, 0) if more.get("alone") else (s["tokens"], found["rows"]["demos"])
        tokens, rows = shown[0] + more["most_tokens"], shown[1] + more["answers"]
        learned = cost.sft_work(recipe, parameters, tokens, s["steps"], rows)
        work["sft"] = replace(learned, sampled=cost.eval_work(parameters, more["most_tokens"]).sampled)
    if "preference" in found:
        p = found["preference"]
        assert recipe.preference is not None
        work["preference"] = cost.preference_work(parameters, p["steps"] * recipe.preference.batch * 2 * p["longest"])
    if "rl" in found:
        work["rl"] = cost.rl_work(recipe, parameters, prompt, found["rl"])
    if "eval" in found:
        work["eval"] = cost.eval_work(parameters, found["eval"]["most_tokens"])
    return work


def folder_line(folder: Path, recipe: Recipe, stages: tuple[str, ...], how: Opening, whole: bool) -> str:
    """The run's folder, and what the real command would say about it."""
    try:
        open_run(folder, recipe, stages, how, whole=whole, dry=True)
    except HeatbathError as error:
        return f"{folder}: {error.what}; {error.remedy}"
    return str(folder)


def _tokens(demos: list[Rendered], eos: int) -> dict[str, Any]:
    lengths = np.array([len(r.input_ids) for r in demos])
    return {
        "tokens": int(lengths.sum()),
        "supervised_tokens": sum(r.supervised for r in demos),
        "median_length": int(np.median(lengths)),
        "longest": int(lengths.max()),
        "truncated": sum(r.truncated for r in demos),
        "ends_with_eos": sum(r.labels[-1] == eos for r in demos),
    }


def _reward(recipe: Recipe) -> str:
    """The grader, and what is summed where that is more than its verdicts."""
    settings = recipe.reward
    grader = f"{settings.kind} ({settings.profile if settings.kind == 'math' else settings.isolation or 'bubblewrap'})"
    if settings.kind == "choice":
        grader = "choice"
    if settings.stages:
        grader += f" with {', '.join(settings.stages)}"
    names = {"verdict": f"verdict of {grader}", "model": settings.model or ""}
    parts = [f"{weight:g} × {names.get(name, name)}" for name, weight in settings.weighted.items() if weight]
    return " + ".join(parts)


def _preference(recipe: Recipe, splits: Splits, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    assert recipe.preference is not None
    loaded, notes = preferences.load(recipe, splits.test)
    rows = preferences.rendered(tokenizer, loaded, recipe)
    return {
        "method": recipe.preference.method,
        "steps": sft.total_steps(recipe.preference, len(rows)),
        "rows": len(rows),
        "longest": max(row.longest for row in rows),
        "truncated": sum(row.truncated for row in rows),
        "notes": list(notes),
    }


def _eval(recipe: Recipe, splits: Splits) -> dict[str, Any]:
    policies = 1 + sum(stage is not None for stage in (recipe.sft, recipe.preference, recipe.rl))
    asked = exams(recipe, splits)
    return {
        "policies": policies,
        "problems": len(splits.test),
        "samples": policies * sum(len(exam.rows) * exam.samples for exam in asked),
        "most_tokens": policies * sum(len(e.rows) * e.samples * e.sampling.max_new_tokens for e in asked),
        "tasks": {exam.name: [len(exam.rows), exam.samples] for exam in asked if exam.task is not None},
    }


def _rl(recipe: Recipe, splits: Splits) -> dict[str, Any]:
    assert recipe.rl is not None
    steps = rl.total_steps(recipe.rl, len(splits.prompts))
    before = min(recipe.rl.readiness, len(splits.prompts)) * recipe.rl.group_size
    held_out = min(recipe.rl.eval_prompts, len(splits.test)) * (
        1 + steps // recipe.rl.eval_every if recipe.rl.eval_every else 0
    )
    return {
        "policy": recipe.rl.policy.model_dump(),
        "steps": steps,
        "completions": steps * recipe.rl.update_prompts * recipe.rl.group_size,
        "readiness_completions": before,
        "held_out_completions": held_out,
        "most_completion_tokens": recipe.rl.max_new_tokens,
    }


def show(found: dict[str, Any]) -> str:
    """The plan as lines of text."""
    rows = ", ".join(f"{count:,} {name}" for name, count in found["rows"].items())
    lines = [f"model     {found['model']}", f"rows      {rows} ({found['data']})"]
    lines += [f"          {note}" for note in found["notes"]]
    if "pretrain" in found:
        lines.append(f"pretrain  {found['pretrain']['steps']:,} steps")
    if "sft" in found:
        s = found["sft"]
        total = found["rows"]["demos"]
        hyper = ", ".join(f"{k} {v}" for k, v in s["objective"].items() if k != "name")
        lines += [
            f"sft       {s['steps']:,} steps of {s['objective']['name']}{f' ({hyper})' if hyper else ''}",
            f"          {s['tokens']:,} tokens, {s['supervised_tokens']:,} of them supervised; length "
            f"{s['median_length']} (median), {s['longest']} (longest)",
            f"          {s['truncated']:,} of {total:,} truncated ({s['truncated'] / total:.1%}), "
            f"{s['ends_with_eos']:,} end in a supervised EOS",
        ]
        if "replay" in s:
            r, only = s["replay"], ", and no demonstration" if s["replay"]["alone"] else ""
            lines.append(f"          {r['answers']:,} answers of the base of at most {r['longest']:,} tokens{only}")
    if "preference" in found:
        p = found["preference"]
        lines += [
            f"preference {p['steps']:,} steps of {p['method']}; of {p['rows']:,} rows {p['truncated']:,} truncated, "
            f"longest {p['longest']} tokens",
            *(f"          {note}" for note in p["notes"]),
        ]
    if "rl" in found:
        r = found["rl"]
        hyper = ", ".join(f"{k} {v}" for k, v in r["policy"].items() if k != "name")
        lines.append(
            f"rl        {r['steps']:,} steps of {r['policy']['name']}{f' ({hyper})' if hyper else ''}, "
            f"{r['completions']:,} completions of at most {r['most_completion_tokens']:,} tokens "
            f"(+ {r['readiness_completions']:,} for readiness, {r['held_out_completions']:,} held out)"
        )
    if "rl" in found or "eval" in found:
        lines.append(f"reward    {found['reward']}")
    if "eval" in found:
        e = found["eval"]
        lines.append(f"eval      {e['problems']:,} problems, {e['samples']:,} samples of {e['policies']} policies")
        lines += [f"          {task}: {rows:,} problems × {samples}" for task, (rows, samples) in e["tasks"].items()]
    for stage, parts in found["memory"].items() if "processes" not in found else ():
        total = sum(parts.values())
        listed = ", ".join(f"{name} {gib:.2f}" for name, gib in parts.items())
        lines.append(f"memory    {stage}: about {total:.1f} GiB on each device ({listed})")
    if "processes" in found:
        lines += _shown_processes(found["processes"])
    if "cost" in found:
        lines += _shown_cost(found["cost"], memory="processes" not in found)
    lines += ["checks    passed", *([f"folder    {found['folder']}"] if "folder" in found else [])]
    lines.append(f"launcher  {found['command']}")
    return "\n".join(lines)


def _shown_processes(found: dict[str, Any]) -> list[str]:
    """How the steps are shared, and the memory of each device under each way of sharding."""
    nodes = f" on {found['nodes']} machines" if found["nodes"] > 1 else ""
    shares = [f"{stage} {count} × {micro} rows" for stage, (micro, count) in found["micro_batches"].items()]
    lines = [
        f"processes {found['count']}{nodes}; each takes of a step: {', '.join(shares) or 'its share of the samples'}"
    ]
    chosen, room = found["sharding"], found["room"]
    for stage, kinds in found["memory"].items():
        whole = found["loading"][stage] if chosen == "fsdp2" else 0.0  # before it is sharded
        others = ", ".join(f"{name} {gib:,.1f}" for name, gib in kinds.items() if name != chosen)
        loaded = f", {whole:,.1f} while it is loaded" if whole > kinds[chosen] else ""
        lines.append(f"memory    {stage}: about {kinds[chosen]:,.1f} GiB on each device{loaded} ({chosen}; {others})")
        if room is not None and max(whole, kinds[chosen]) > room:
            lines.append(f"          {stage} does not fit the {room:,.0f} GiB of a device")
    return lines


def _shown_cost(found: dict[str, Any], *, memory: bool) -> list[str]:
    """Operations and GPU-hours of each stage, memory where it is sharded (and not told already), and what both
    assume."""
    devices, *stages = found["devices"], *found["work"].items()
    told = [f"{name} {w['operations']:.1e} operations, {w['gpu_hours']:,.1f} GPU-hours" for name, w in stages]
    hours = found["work"]["total"]["gpu_hours"] / devices
    held = []
    for stage, parts in found["memory"].items():
        cached = parts.get(cost.CACHED, 0.0)
        room = f" + {cached:.0f} for the cache of all completions at once (vLLM holds as many as fit, and the weights)"
        held.append(f"{stage} about {sum(parts.values()) - cached:.0f} GiB{room if cached else ''}")
    return [
        f"cost      {devices} × {found['device']}, estimated: {'; '.join(told)} ({hours:,.1f} hours)",
        *([f"          memory on each of {devices}, sharded: {', '.join(held)}"] if memory else []),
        f"          assumed: {found['assumed']}",
    ]
