"""The [sft.replay] table of a recipe. Importing this module imports no torch."""

from __future__ import annotations

from heatbath.data_sections import Finite, Positive, Rate, Section, Switch


class Replay(Section):
    """The base's own answers to the demonstrated problems, learned beside the demonstrations (docs/replay.md).

    `samples` of each problem are drawn once, before training, at temperature 1 and of at most `max_new_tokens`; in the
    sum they weigh `weight` times what the problem's demonstrations do. `lift` nats raise those that the recipe's
    [reward] finds right: an answer weighs e^(lift·right) among those of its problem. `alone` leaves the demonstrations
    out.
    """

    samples: Positive = 1
    weight: Finite = 1.0
    lift: Rate = 0.0
    alone: Switch = False
    max_new_tokens: Positive = 1024
