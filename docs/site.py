"""How the documentation becomes a site (`make docs`): the README is its first page, the public names are its reference,
and the recipes and raw results that pages link to lie beside them."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
BESIDE = ("recipes/*.toml", "benchmarks/results/*")


def on_files(files: Files, config: Any) -> Files:
    made = {"index.md": (ROOT / "README.md").read_text(encoding="utf-8"), "api.md": _reference()}
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    for path in sorted(path for pattern in BESIDE for path in ROOT.glob(pattern)):
        files.append(File.generated(config, str(path.relative_to(ROOT)), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links of the repository as links of the site, whose root is docs/."""
    if page.file.src_uri == "index.md":
        return markdown.replace("](docs/", "](")
    up = "../" * page.file.src_uri.count("/")
    return re.sub(r"\]\((?:\.\./)+(recipes|benchmarks)/", rf"]({up}\1/", markdown)


def _reference() -> str:
    """A heading for each public name, in the order of the package's own table."""
    package = ast.parse((ROOT / "src" / "heatbath" / "__init__.py").read_text(encoding="utf-8"))
    tables = [node.value for node in package.body if isinstance(node, ast.Assign)]
    homes: dict[str, str] = next(ast.literal_eval(table) for table in tables if isinstance(table, ast.Dict))
    names = [f"::: heatbath.{home}.{name}" for name, home in homes.items()]
    return "\n\n".join(["# The public names", *names, "::: heatbath.rewards"]) + "\n"
