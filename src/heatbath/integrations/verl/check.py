"""The written configuration against the installed verl.

    python -m heatbath.integrations.verl.check rl.yaml [key=value …]

Composes it with verl's own defaults, refuses keys that verl does not have, runs verl's own validation, builds its
configuration classes, and loads the reward as verl's workers will. Writes what was composed beside it. Runs in verl's
environment; exit code 2 and one line where something is wrong.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

OPEN = ("reward.reward_kwargs", "reward.custom_reward_function.reward_kwargs")  # tables of a reward's own keys
BUILT = (  # tables that verl makes objects of, which refuse what they do not know; the reference's has keys to rename
    "actor_rollout_ref.actor",
    "actor_rollout_ref.model",
    "actor_rollout_ref.rollout",
    "actor_rollout_ref.ref.fsdp_config",
    "algorithm",
)


def compose(path: Path, overrides: list[str]) -> Any:
    """The configuration as `verl.trainer.main_ppo` composes it. Raises ValueError on a key that verl does not have."""
    from hydra import compose as composed
    from hydra import initialize_config_dir, initialize_config_module

    with initialize_config_module(config_module="verl.trainer.config", version_base=None):
        known = composed(config_name="ppo_trainer")
    with initialize_config_dir(config_dir=str(path.resolve().parent), version_base=None):
        config = composed(config_name=path.stem, overrides=overrides)
    unknown = [key for key in _leaves(config) if not _known(known, key)]
    if unknown:
        raise ValueError(f"verl has no key {', '.join(unknown)}")
    return config


def validate(config: Any) -> None:
    """verl's own validation, its configuration classes, and the reward. Raises whatever verl raises."""
    from verl.trainer.ppo.reward import get_custom_reward_fn
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    validate_config(config=config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    for key in BUILT:
        table = config
        for part in key.split("."):
            table = table[part]
        omega_conf_to_dataclass(table)
    found = get_custom_reward_fn(config)(
        data_source="check", solution_str="so \\boxed{4}", ground_truth="4", extra_info={"kind": "math"}
    )
    if found["score"] != 1.0:
        raise ValueError(f"the reward gave {found} for a right answer")


def _leaves(config: Any, prefix: str = "") -> list[str]:
    from omegaconf import DictConfig

    out: list[str] = []
    for key in config:
        whole = f"{prefix}{key}"
        if whole in OPEN:
            continue
        value = config._get_node(key)
        inner = isinstance(value, DictConfig) and not value._is_none() and len(value)
        out += _leaves(value, f"{whole}.") if inner else [whole]
    return out


def _known(known: Any, key: str) -> bool:
    """Whether verl's defaults have a key; below a table with a class (`_target_`) that class decides."""
    table = known
    for part in key.split("."):
        if table is None or not hasattr(table, "_get_node") or part not in table:
            return table is None or "_target_" in table
        table = table._get_node(part)
    return True


def main(arguments: list[str]) -> int:
    from omegaconf import OmegaConf

    path, overrides = Path(arguments[0]), arguments[1:]
    try:
        config = compose(path, overrides)
        validate(config)
    except Exception as error:  # noqa: BLE001 - the edge to verl and hydra, which raise anything
        said = " ".join(str(error).split())[:600]
        print(f"error: verl refuses the configuration: {type(error).__name__}: {said}", file=sys.stderr)
        return 2
    whole = path.with_name(f"{path.stem}.composed.yaml")
    whole.write_text(OmegaConf.to_yaml(config), encoding="utf-8")
    print(f"verl accepts {path.name}; composed with its defaults: {whole.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
