"""verl: heatbath's verdicts as its reward, a recipe's `[rl]` as its configuration, an objective as its SFT loss.

Two environments are at work, since verl wants another transformers than heatbath does. In heatbath's own run
`translate.py` (a recipe in verl's keys), `files.py` (what is written for verl) and `launch.py` (the start of the
trainer, and its checkpoint as a policy of the run). In verl's run `reward.py` (what completions earn), `check.py` (the
configuration against the installed package) and `sft.py` (its SFT trainer on an objective); these import nothing of
heatbath's environment but torch and the graders.
"""

from __future__ import annotations

from heatbath.integrations.verl.reward import compute_score, compute_scores

__all__ = ["compute_score", "compute_scores"]
