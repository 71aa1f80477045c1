"""What the process that cells of a comparison are forked from imports once, so that no cell has to: 8 s saved each."""

import logging
from importlib import import_module

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it, and it talks of a package that it misses
for module in ("pipeline", "preference", "rl", "sft", "shift"):
    import_module(f"heatbath.stages.{module}")
import_module("heatbath.verify.worker")
