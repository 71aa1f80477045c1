"""Without lm-evaluation-harness its tasks are refused with the command that installs it."""

import sys

import pytest

from heatbath.data.tasks import find
from heatbath.errors import RecipeError
from heatbath.integrations.lm_eval import _manager


def test_without_the_harness_its_tasks_name_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    _manager.cache_clear()
    with pytest.raises(RecipeError, match="lm-evaluation-harness is not installed") as caught:
        find("lm_eval:gsm8k_cot")
    assert caught.value.remedy == "pip install 'heatbath[lm-eval]'"
