"""What the tests ask verl itself, run by the python of its environment: `inside_verl.py QUESTION FOLDER`.

Reads FOLDER/asked.json and prints one line of JSON behind "answer: ". Everything here is verl's own code on what
heatbath wrote.
"""

import asyncio
import json
import sys
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir


def composed(path: str):
    with initialize_config_dir(config_dir=str(Path(path).parent), version_base=None):
        return compose(config_name=Path(path).stem)


def checks(asked: dict) -> list:
    """What heatbath's check of a configuration says under each list of overrides: exit code and stderr."""
    from contextlib import redirect_stderr
    from io import StringIO

    from heatbath.integrations.verl import check

    out = []
    for path, overrides in asked["calls"]:
        said = StringIO()
        with redirect_stderr(said):
            code = check.main([path, *overrides])
        out.append([code, said.getvalue()])
    return out


def rows(asked: dict) -> dict:
    """Our tables through verl's dataset class, and the ids that its agent loop would begin with."""
    from verl.trainer.ppo.utils import create_rl_dataset
    from verl.utils import hf_tokenizer
    from verl.utils.tokenizer import normalize_token_ids

    config = composed(asked["config"])
    tokenizer = hf_tokenizer(config.actor_rollout_ref.model.tokenizer_path)
    out = {}
    for name, files in (("train", config.data.train_files), ("val", config.data.val_files)):
        dataset = create_rl_dataset(files, config.data, tokenizer, None, is_train=name == "train")
        found = [dataset[i] for i in range(len(dataset))]
        ids = [
            normalize_token_ids(
                tokenizer.apply_chat_template(row["raw_prompt"], add_generation_prompt=True, tokenize=True)
            )
            for row in found
        ]
        out[name] = [
            {"ids": i, "gold": row["reward_model"]["ground_truth"], "index": row["index"], "source": row["data_source"]}
            for i, row in zip(ids, found, strict=True)
        ]
    return out


def reward(asked: dict) -> list:
    """Responses through verl's reward loader and its reward manager, as its reward workers call them."""
    import numpy as np
    from verl import DataProto
    from verl.trainer.ppo.reward import load_reward_manager
    from verl.utils import hf_tokenizer

    config = composed(asked["config"])
    tokenizer = hf_tokenizer(config.actor_rollout_ref.model.tokenizer_path)

    async def scores() -> list:
        manager = load_reward_manager(config, tokenizer)

        async def one(row: dict) -> dict:
            ids = tokenizer(row["response"], add_special_tokens=False, return_tensors="pt")["input_ids"]
            padded = torch.nn.functional.pad(ids, (0, 5), value=tokenizer.pad_token_id)
            mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 5))
            tensors = {"prompts": ids[:, :1], "responses": padded, "attention_mask": torch.cat([mask[:, :1], mask], 1)}
            own = {
                "data_source": np.array([row["data_source"]], dtype=object),
                "reward_model": np.array([{"ground_truth": row["gold"]}], dtype=object),
                "extra_info": np.array([row["extra_info"]], dtype=object),
            }
            return await manager.run_single(DataProto.from_dict(tensors=tensors, non_tensors=own))

        return list(await asyncio.gather(*(one(row) for row in asked["rows"])))

    return [
        {"score": float(s["reward_score"]), **{k: s["reward_extra_info"].get(k) for k in ("status", "acc")}}
        for s in asyncio.run(scores())
    ]


def losses(asked: dict) -> list:
    """The loss of a batch and its gradient under each configuration: verl's advantage, policy loss, KL and entropy,
    put together as its `ppo_loss` does."""
    import numpy as np
    from verl.trainer.ppo import core_algos
    from verl.utils.config import omega_conf_to_dataclass

    given = {k: torch.tensor(v, dtype=torch.float64) for k, v in asked["tensors"].items()}
    mask = given["mask"]
    out = []
    for path in asked["configs"]:
        config = composed(path)
        actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
        actor.global_batch_info.update(
            dp_size=1,
            batch_num_tokens=int(mask.sum()),
            global_batch_size=len(mask),
            loss_scale_factor=actor.loss_scale_factor,
        )
        at_the_end = torch.zeros_like(mask)
        at_the_end[torch.arange(len(mask)), mask.sum(1).long() - 1] = given["rewards"]
        more = {}
        if config.algorithm.adv_estimator == "grpo":
            more["norm_adv_by_std_in_grpo"] = config.algorithm.norm_adv_by_std_in_grpo
        estimate = core_algos.get_adv_estimator_fn(config.algorithm.adv_estimator)
        groups = np.array(asked["groups"], dtype=object)
        advantages, _ = estimate(token_level_rewards=at_the_end, response_mask=mask, index=groups, **more)
        logp = given["logp"].clone().requires_grad_()
        loss, _ = core_algos.get_policy_loss_fn(actor.policy_loss.loss_mode)(
            old_log_prob=given["old_logp"],
            log_prob=logp,
            advantages=advantages,
            response_mask=mask.bool(),
            loss_agg_mode=actor.loss_agg_mode,
            config=actor,
        )
        reduced = {"loss_mask": mask.bool(), "loss_agg_mode": actor.loss_agg_mode, **actor.global_batch_info}
        if actor.entropy_coeff:
            loss = loss - actor.entropy_coeff * core_algos.agg_loss(loss_mat=given["entropy"], **reduced)
        if actor.use_kl_loss:
            kl = core_algos.kl_penalty(logprob=logp, ref_logprob=given["ref_logp"], kl_penalty=actor.kl_loss_type)
            loss = loss + actor.kl_loss_coef * core_algos.agg_loss(loss_mat=kl, **reduced)
        loss.backward()
        out.append({"loss": float(loss), "gradient": logp.grad.tolist()})
    return out


if __name__ == "__main__":
    question, folder = sys.argv[1], Path(sys.argv[2])
    answers = {"checks": checks, "rows": rows, "reward": reward, "losses": losses}
    print("answer: " + json.dumps(answers[question](json.loads((folder / "asked.json").read_text()))))
