"""Every typical mistake is told with its remedy, and docs/errors.md shows what is told."""

from pathlib import Path

import pytest

from mistakes import MISTAKES, PAGE, Mistake, message, page

SAID: dict[str, str] = {}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: m.title)
def test_a_mistake_is_told_with_place_and_remedy(mistake: Mistake, tmp_path: Path, small_base: Path) -> None:
    code, said = message(mistake, tmp_path, small_base)
    SAID[mistake.title] = said
    assert code == mistake.code, said
    for text in mistake.says:
        assert text in said
    assert said.startswith("error: ") and "\n  where:  " in said and "\n  remedy: " in said and "Traceback" not in said


def test_the_page_shows_what_is_said() -> None:
    if len(SAID) < len(MISTAKES):
        pytest.skip("needs the messages of every test above")
    assert len(MISTAKES) >= 30
    assert PAGE.read_text(encoding="utf-8") == page(SAID), "python tests/mistakes.py writes the page anew"
