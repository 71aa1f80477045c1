"""Every command and every Python block of the README runs, on a small model where the real one would take minutes.

`heatbath run smoke` runs as it is: every stage and the report on the tiny base.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from heatbath import recipe as recipes
from mistakes import call

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
SHELL = [line for kind, body in BLOCKS if kind == "sh" for line in body.splitlines() if line and line[0] != "#"]
MAKE_TARGETS = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
SMALL = (
    "precision=fp32 data.demos=8 data.validation=2 data.prompts=6 data.test=2 rl.group_size=2 rl.micro_batch=12 "
    "eval.samples=2 eval.k=[1]"
)
SHORTENED = {"run", "sft", "rl", "eval", "surprise"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    (folder / "answers.jsonl").write_text('{"gold": "4", "response": "so 4"}\n')
    return folder


@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("make")])
def test_make_targets_exist(line: str) -> None:
    words = shlex.split(line, comments=True)
    targets = [w for w in words[1:] if "=" not in w]
    assert targets and set(targets) <= set(MAKE_TARGETS)


@pytest.mark.thorough
def test_commands_run_in_the_order_given(workspace: Path, small_base: Path, tiny_base: str) -> None:
    lines = [line for line in SHELL if not line.startswith(("make", ". "))]
    assert lines, "the README shows no command"
    for line in lines:
        words = shlex.split(line, comments=True)
        assert words[0] == "heatbath", line
        if words[1] in (*SHORTENED, "inspect") and words[2] != "smoke":
            given = [w.partition("=")[0] for w in words]
            extra = [f"model={small_base}", *(SMALL.split() if words[1] in SHORTENED else ())]
            words += [e for e in extra if e.partition("=")[0] not in given]
        if words[1:3] == ["run", "smoke"]:  # one in a process of its own; each costs 8 seconds of imports
            command = [sys.executable, "-m", *words]
            done = subprocess.run(command, cwd=workspace, capture_output=True, text=True, timeout=300, env=os.environ)
            code, said = done.returncode, done.stderr
        else:
            code, said = call(workspace, " ".join(words[1:]))
        assert code == 0, f"{line}\n{said}"
    assert (workspace / "runs" / "smoke" / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("code", [body for kind, body in BLOCKS if kind == "python"])
def test_python_blocks_run(code: str, workspace: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=workspace, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_python_blocks_of_your_own_objective_run(tmp_path: Path) -> None:
    """The page's first block is the file that the others use."""
    page = (ROOT / "docs" / "objectives" / "your-own.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    (tmp_path / "mine.py").write_text(blocks[0])
    code = "\n".join(block for block in blocks if "import heatbath" in block)
    assert code.count("import heatbath") == 3
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, env=os.environ)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_images_exist(page: Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "results").glob("*.md")), ids=lambda page: page.stem)
def test_commands_and_records_of_the_results_are_there(page: Path) -> None:
    """Recipes and overrides are read as a command would, files that a page names exist, no figure was left open."""
    text = page.read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"^```sh\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE))
    for line in blocks.replace("\\\n", "").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["heatbath"] and words[1] in ("compare", "run", "sft", "surprise"):
            first = [i for i, word in enumerate(words) if word.startswith("--")]
            varied = [words[i + 1].split(",")[0] for i in first if words[i] == "--vary"]
            recipes.load(words[2], [*words[3 : min(first, default=len(words))], *varied])
        elif words[:1] == ["python"]:
            assert (ROOT / words[1]).is_file(), line
    for name in re.findall(r"[\w-]+-cpu2\.(?:jsonl?|txt)", text):
        assert (ROOT / "benchmarks" / "results" / name).is_file(), name
    assert not re.search(r"@\w+@", text)
