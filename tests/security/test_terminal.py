"""What a model, a file or a server wrote is shown on a terminal, and not obeyed by it."""

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from heatbath import cli, inspecting
from heatbath import recipe as recipes
from heatbath.errors import RunError
from heatbath.progress import Progress
from heatbath.stages.grade import Grading, run_grade
from heatbath.terminal import echo, printable

TITLE, CLIPBOARD, CLEAR = "\x1b]0;owned\x07", "\x1b]52;c;b3duZWQ=\x1b\\", "\x1b[2J\x1b[1;1H"
HOSTILE = f"4{TITLE}{CLIPBOARD}{CLEAR}\x9b31m\x7f\r5\u202e[link=http://x]y"


def require_harmless(text: str) -> None:
    for sign in ("\x1b]", "\x1b[2J", "\x07", "\x9b", "\x7f", "\r", "\u202e"):
        assert sign not in text


def test_commands_are_written_out_and_text_stays() -> None:
    assert printable("a\tb\nc ñ 漢 − ⟦x⟧ 👍") == "a\tb\nc ñ 漢 − ⟦x⟧ 👍"
    assert printable("\x1b[31m\r") == "\\u001b[31m\\u000d"
    require_harmless(printable(HOSTILE))


def test_json_is_the_same_json(capsys) -> None:
    echo(json.dumps({"said": HOSTILE}, ensure_ascii=False))
    out = capsys.readouterr().out
    require_harmless(out)
    assert json.loads(out) == {"said": HOSTILE}


@pytest.mark.parametrize("terminal", [True, False])
def test_inspect_shows_a_demonstration_and_does_not_obey_it(tmp_path: Path, small_base: Path, terminal: bool) -> None:
    rows = [{"question": "What is 2 + 2?", "solution": "#### 4"}]
    (tmp_path / "demos.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"source": "files", "demos_from": str(tmp_path / "demos.jsonl"), "fields": {"solution": "solution"}}
    recipe = recipes.parse({"model": str(small_base), "data": data, "sft": {}})
    found = inspecting.inspect(recipe, count=1)
    found[0]["tokens"][-2]["text"] = found[0]["origin"] = HOSTILE  # the small tokenizer knows no such characters
    stream = io.StringIO()
    inspecting.show(found, Console(file=stream, force_terminal=terminal, color_system="truecolor", width=80))
    require_harmless(stream.getvalue())
    assert stream.getvalue().count("owned") == 2


def test_progress_shows_names_and_notes_as_they_are(capsys) -> None:
    stream = io.StringIO()
    progress = Progress()
    progress.console = Console(file=stream, force_terminal=True, soft_wrap=True, highlight=False, width=400)
    progress.say(f"note {HOSTILE}")
    with progress.bar(f"eval {HOSTILE}", 2):
        progress.update(1, "right 0.5")
    require_harmless(stream.getvalue().replace("\r", ""))  # which the bar moves itself by
    assert "[link=http://x]y" in stream.getvalue()  # not markup either


def test_a_summary_repeats_a_row_without_obeying_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Verdicts of a hostile file: what could not be read is quoted."""
    rows = [{"response": HOSTILE, "gold": "5"}, {"response": 3, "gold": HOSTILE}, {HOSTILE: 1}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)) + f"\n{HOSTILE}\n")
    monkeypatch.setattr(sys, "argv", ["heatbath", "grade", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "o")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out = capsys.readouterr()
    assert stop.value.code == 2 and "could not be read" in out.out and "owned" in out.out
    require_harmless(out.out + out.err)


def test_verdicts_on_a_terminal_are_json_without_commands(tmp_path: Path, capfdbinary) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({"response": HOSTILE, "gold": "5"}) + "\n")
    run_grade(Grading(str(tmp_path / "in.jsonl"), "-", "math", "strict", 1, 10.0, False), Progress(quiet=True))
    out = capfdbinary.readouterr().out.decode()
    require_harmless(out)
    assert json.loads(out)["response"] == HOSTILE


def test_a_servers_words_in_an_error_are_not_obeyed(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    def app() -> None:
        raise RunError(f"the server said {HOSTILE}", HOSTILE, HOSTILE)

    monkeypatch.setattr(cli, "app", app)
    for verbose in ([], ["-v"]):
        monkeypatch.setattr(sys, "argv", ["heatbath", *verbose])
        with pytest.raises(SystemExit):
            cli.main()
    captured = capsys.readouterr()
    assert captured.err.count("owned") >= 3
    require_harmless(captured.err)
