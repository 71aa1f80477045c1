"""heatbath warm-starts reinforcement learning of language models, runs the RL, and measures whether it helped."""
