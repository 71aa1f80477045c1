"""Verdicts on completions.

A verdict (`verdict.py`) comes from a grader (`graders.py`), of which there is one for each kind of answer:

- `math.py`: `extract.py` finds the answer, `cascade.py` compares it by `answers/` (exact, no computer algebra), and
  what is left is asked of `algebra.py` in a worker. `paper.py` has the rules of the paper.
- `choice.py`: the option that a completion asserts, by `choice_rules.py`.
- `code.py`: `code_tests.py` reads a problem's tests, `sandbox.py` runs the program, whose end of it is `inside.py`.

`pool.py` and `worker.py` are the processes that may be killed. `reward_model.py`, `judge.py` and `win_rate.py` score
what has no right answer; the last two over `endpoint.py`.
"""
