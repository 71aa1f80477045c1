"""From values to the page: one self-contained HTML file that asks the network for nothing and runs our script alone."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from heatbath.report.tables import minus, numeric


def rendered(template: str, values: dict[str, Any]) -> str:
    """The page of that template; every value is escaped that is not our own drawing (Markup)."""
    environment = Environment(
        loader=PackageLoader("heatbath", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    script, style = (files("heatbath.report").joinpath(name).read_text("utf-8") for name in ("report.js", "style.css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.filters["minus"] = minus
    environment.globals |= {
        "numeric": numeric,
        "script": Markup(script),
        "script_hash": Markup(f"sha256-{digest}"),
        "style": Markup(style),
    }
    text = environment.get_template(template).render(values)
    return text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair, which a model may have written
