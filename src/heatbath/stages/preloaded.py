"""What the process that cells of a comparison are forked from imports once, so that no cell has to: 8 s saved each."""

import heatbath.stages.pipeline
import heatbath.stages.preference
import heatbath.stages.rl
import heatbath.stages.sft
import heatbath.stages.shift
import heatbath.verify.worker  # noqa: F401
