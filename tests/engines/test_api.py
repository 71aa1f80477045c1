"""Sampling from servers: real ones over HTTP that answer with the small model, each in the manner of another server."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from conftest import small_model, small_tokenizer
from heatbath.engines import api
from heatbath.engines.api import ApiSampler
from heatbath.engines.local import LocalSampler
from heatbath.engines.sampling import Completion, LeftOutError, Sampling, eos_ids_of, open_sampler
from heatbath.errors import HeatbathError, RecipeError, RunError
from scripted_server import Script, Server, failed

ENDS = [1, 7, 9, 26, 33]
PROMPTS = [[10 + i, 20, 30 + i] for i in range(9)]
GREEDY = Sampling(0, 1.0, 20)
OPENAI = {"model", "prompt", "max_tokens", "temperature", "top_p", "seed"}


def ending_model():
    model = small_model()
    model.generation_config.eos_token_id = ENDS
    return model


MODEL = ending_model()


def greedy(ids: list[int], most: int, ends: list[int] = ENDS) -> tuple[list[int], str]:
    new: list[int] = []
    while len(new) < most:
        with torch.no_grad():
            new.append(int(MODEL(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
        if new[-1] in ends:
            return new, "stop"
    return new, "length"


def answer(
    text: str = "", finish: str | None = "stop", usage: object = None, **choice: object
) -> tuple[int, dict, str]:
    content = {
        "object": "text_completion",
        "model": "m",
        "choices": [{"index": 0, "text": text, "finish_reason": finish}],
    }
    content["choices"][0] |= choice
    return 200, {}, json.dumps(content | ({"usage": usage} if usage is not None else {}))


def vllm(request: dict, number: int) -> tuple[int, dict, str]:
    """Token ids in, and out with the end token, and what it read."""
    ids, finish = greedy(request["prompt"], request["max_tokens"], request["stop_token_ids"])
    read = request["prompt"]
    usage = {"prompt_tokens": len(read), "completion_tokens": len(ids)}
    stop = ids[-1] if finish == "stop" else None
    return answer("…", finish, usage, token_ids=ids, prompt_token_ids=read, stop_reason=stop)


def without_the_end(request: dict, number: int) -> tuple[int, dict, str]:
    """Token ids out, but of the end only its name."""
    ids, finish = greedy(request["prompt"], request["max_tokens"])
    if finish == "stop":
        return answer("…", finish, token_ids=ids[:-1], matched_stop=ids[-1])
    return answer("…", finish, token_ids=ids, matched_stop=None)


def llama_cpp(request: dict, number: int) -> tuple[int, dict, str]:
    """Token ids in, text out, fields it does not know ignored."""
    ids, finish = greedy(request["prompt"], request["max_tokens"], [1])
    return answer(small_tokenizer().decode(ids[:-1] if finish == "stop" else ids), finish, {"prompt_tokens": 3})


def text_only(request: dict, number: int) -> tuple[int, dict, str]:
    if not isinstance(request["prompt"], str):
        return failed(422, "prompt: Input should be a valid string")
    prompt = small_tokenizer()(request["prompt"])["input_ids"]
    return llama_cpp(request | {"prompt": prompt}, number)


def strict(request: dict, number: int) -> tuple[int, dict, str]:
    """Only the fields of OpenAI's documentation."""
    if extra := sorted(set(request) - OPENAI):
        return failed(400, f"Unrecognized request argument supplied: {extra[0]}")
    return llama_cpp(request, number)


def strict_text(request: dict, number: int) -> tuple[int, dict, str]:
    return strict(request, number) if set(request) - OPENAI else text_only(request, number)


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Script], Server]]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    started: list[Server] = []

    def start(script: Script) -> Server:
        started.append(Server(script))
        return started[-1]

    yield start
    for server in started:
        server.close()


def sampler(server: Server, concurrency: int = 4, **settings: object) -> ApiSampler:
    settings = {"first_wait": 0.001, "timeout": 20.0, **settings}
    return ApiSampler(server.url, "m", small_tokenizer(), ENDS, concurrency=concurrency, **settings)


def all_of(server: Server, settings: Sampling = GREEDY, seeds=0, **given: object) -> list[Completion]:
    with sampler(server, **given) as engine:
        found = [c for batch in engine.sample(PROMPTS, settings, seeds) for c in batch]
    assert sorted(c.prompt for c in found) == list(range(len(PROMPTS)))
    return sorted(found, key=lambda c: c.prompt)


def local() -> list[Completion]:
    engine = LocalSampler(MODEL, small_tokenizer())
    return sorted((c for batch in engine.sample(PROMPTS, GREEDY, 0) for c in batch), key=lambda c: c.prompt)


# --- what comes back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [vllm, without_the_end])
def test_token_ids_are_those_of_the_local_engine(serving, script: Script) -> None:
    assert {c.finish for c in local()} == {"eos", "length"}
    assert all_of(serving(script)) == local()


def test_through_the_recipe_with_the_models_own_end_tokens(serving, tmp_path: Path) -> None:
    MODEL.save_pretrained(tmp_path / "m")
    server, name = serving(vllm), str(tmp_path / "m")
    with open_sampler("api", name, small_tokenizer(), endpoint=server.url, served="m") as engine:
        found = [c for batch in engine.sample(PROMPTS, GREEDY, 0) for c in batch]
    assert sorted(found, key=lambda c: c.prompt) == local()
    assert server.requests[1]["stop_token_ids"] == eos_ids_of(MODEL, small_tokenizer()) == ENDS


@pytest.mark.parametrize("script", [llama_cpp, text_only, strict, strict_text])
def test_text_is_turned_into_our_tokens_and_marked(serving, script: Script) -> None:
    """One token per character: here the ids must be those that were sampled."""
    tokenizer = small_tokenizer()
    for completion, prompt in zip(all_of(serving(script)), PROMPTS, strict=True):
        ids, finish = greedy(prompt, 20, [1])
        assert completion.ids == ids and completion.retokenised
        assert completion.finish == {"stop": "eos", "length": "length"}[finish]
        assert completion.text == tokenizer.decode(ids[:-1] if finish == "stop" else ids)


@pytest.mark.parametrize(
    ("script", "form"),
    [
        (vllm, ("tokens", True)),
        (llama_cpp, ("tokens", True)),
        (strict, ("tokens", False)),
        (text_only, ("text", True)),
        (strict_text, ("text", False)),
    ],
)
def test_the_form_of_request_is_found_once_with_a_single_token(serving, script: Script, form: tuple) -> None:
    server = serving(script)
    with sampler(server) as engine:
        for _ in range(2):
            list(engine.sample(PROMPTS, GREEDY, 0))
    probes, rest = server.requests[: -2 * len(PROMPTS)], server.requests[-2 * len(PROMPTS) :]
    assert 1 <= len(probes) <= 4 and {request["max_tokens"] for request in probes} == {1}
    assert all(isinstance(request["prompt"], str) == (form[0] == "text") for request in rest)
    assert all((request.keys() == OPENAI) == (not form[1]) for request in rest)
    assert {request["max_tokens"] for request in rest} == {20}


def test_a_request_asks_for_the_whole_policy_with_a_seed_of_its_own(serving) -> None:
    server, seeds = serving(vllm), [70, 71, 5, 6, 7, 8, 9, 10, 2**31 - 1]
    all_of(server, Sampling(0.7, 0.9, 5), seeds)
    asked = {tuple(request["prompt"]): request for request in server.requests[1:]}
    assert [asked[tuple(prompt)]["seed"] for prompt in PROMPTS] == seeds
    for request in asked.values():
        assert (request["model"], request["temperature"], request["top_p"]) == ("m", 0.7, 0.9)
        assert (request["top_k"], request["min_p"], request["return_token_ids"]) == (-1, 0.0, True)
        assert request["repetition_penalty"] == request["repeat_penalty"] == 1.0
    assert set(server.paths) == {"/v1/completions"} and set(server.keys) == {"Bearer sk-1"}


@pytest.mark.parametrize(
    ("choice", "finish", "ids"),
    [
        ({"token_ids": [5, 6, 1], "finish": "stop"}, "eos", [5, 6, 1]),
        ({"token_ids": [5, 6, 9], "finish": "stop", "stop_reason": 9}, "eos", [5, 6, 9]),
        ({"token_ids": [5, 6], "finish": "stop", "stop_reason": "###"}, "stop", [5, 6]),
        ({"token_ids": [5, 6], "finish": "stop"}, "stop", [5, 6]),
        ({"token_ids": [], "finish": "stop", "matched_stop": 7}, "eos", [7]),
        ({"token_ids": [5, 6, 8], "finish": "length"}, "length", [5, 6, 8]),
        ({"token_ids": [5, 6, 1], "finish": "length"}, "eos", [5, 6, 1]),
        ({"token_ids": [5, 9, 6, 1, 8], "finish": "length"}, "eos", [5, 9]),
        ({"token_ids": [5], "finish": "content_filter"}, "content_filter", [5]),
        ({"text": "ab", "finish": "content_filter"}, "content_filter", [70, 71]),
        ({"text": "ab", "finish": "length"}, "length", [70, 71]),
        ({"text": "", "finish": "stop"}, "eos", [1]),
    ],
)
def test_why_a_completion_ended(serving, choice: dict, finish: str, ids: list[int]) -> None:
    assert small_tokenizer()("ab")["input_ids"] == [70, 71]
    probed = {"token_ids": [5], "finish": "length"}
    server = serving(lambda request, number: answer(**(choice if number > 1 else probed)))
    assert all_of(server)[4] == Completion(4, ids, finish, choice.get("text"))


def test_half_a_character_is_read_as_a_sign_that_a_tokenizer_takes(serving) -> None:
    server = serving(lambda request, number: answer(text="a\ud83d", finish="length"))  # goes out escaped
    assert {completion.text for completion in all_of(server)} == {"a\ufffd"}


# --- trouble --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trouble",
    [
        failed(429, "slow down", Retry_After="0.01"),
        failed(500, "CUDA error"),
        failed(503, "loading the model"),
        (0, {}, ""),
        (200, {}, "<html>a proxy's page</html>"),
        (200, {}, '{"choices": []}'),
        (200, {}, '{"choices": [{"finish_reason": "stop"}]}'),
        (200, {}, '{"choices": [{"finish_reason": "stop", "text": null}]}'),
    ],
    ids=["429", "500", "503", "hang-up", "html", "no choice", "no text", "null"],
)
def test_passing_trouble_is_asked_again(serving, trouble: tuple[int, dict, str]) -> None:
    server = serving(lambda request, number: trouble if number in (1, 4, 5, 6) else vllm(request, number))
    assert all_of(server) == local()
    assert len(server.requests) == 1 + len(PROMPTS) + 4


def test_a_server_that_hangs_is_asked_again(serving) -> None:
    released = threading.Event()

    def script(request: dict, number: int) -> tuple[int, dict, str]:
        if number == 3:
            released.wait(30)
        return vllm(request, number)

    assert all_of(serving(script), timeout=1.0) == local()
    released.set()


def test_no_more_requests_are_in_flight_than_asked_for(serving) -> None:
    def script(request: dict, number: int) -> tuple[int, dict, str]:
        time.sleep(0.02 * (number % 3))
        return vllm(request, number)

    server = serving(script)
    with sampler(server, concurrency=3) as engine:
        sizes = [len(batch) for batch in engine.sample(PROMPTS, GREEDY, 0)]
    assert server.most == 3 and sizes == [3, 3, 3]


def test_what_came_before_a_server_died_is_kept(serving) -> None:
    def script(request: dict, number: int) -> tuple[int, dict, str]:
        return vllm(request, number) if number <= 6 else failed(500, "out of memory")

    server, found = serving(script), []
    with sampler(server, concurrency=2, retries=1) as engine, pytest.raises(RunError) as caught:
        for batch in engine.sample(PROMPTS, GREEDY, 0):
            found += batch
    assert len(found) == 5 and {(c.prompt, tuple(c.ids)) for c in found} < {(c.prompt, tuple(c.ids)) for c in local()}
    assert "out of memory" in caught.value.what and server.url in caught.value.where
    assert "5 of 9 completions came and are kept, and the same command asks for the rest" in caught.value.remedy
    assert "cache" not in caught.value.remedy  # which sampling has not
    assert len(server.requests) <= 6 + 2 * 2  # the others were not even tried


def test_a_prompt_that_is_too_long_holds_up_no_other(serving) -> None:
    def script(request: dict, number: int) -> tuple[int, dict, str]:
        if len(request["prompt"]) > 3:
            return failed(400, "This model's maximum context length is 4 tokens")
        return vllm(request, number)

    server, found = serving(script), []
    with sampler(server) as engine, pytest.raises(LeftOutError) as caught:
        for batch in engine.sample([PROMPTS[0], [5] * 30, *PROMPTS[2:]], GREEDY, 0):
            found += batch
    assert sorted(c.prompt for c in found) == [0, 2, 3, 4, 5, 6, 7, 8]
    assert "maximum context length" in caught.value.what and "shorter prompts" in caught.value.remedy
    assert caught.value.remedy.endswith("8 of 9 completions came and are kept")  # asking again would change nothing


def test_a_dead_server_is_told_before_a_refused_prompt(serving) -> None:
    def script(request: dict, number: int) -> tuple[int, dict, str]:
        if len(request["prompt"]) > 3:
            return failed(400, "too long")
        return vllm(request, number) if number <= 3 else failed(500, "dead")

    with sampler(serving(script), concurrency=1, retries=0) as engine, pytest.raises(RunError, match="dead"):
        list(engine.sample([PROMPTS[0], [5] * 30, *PROMPTS[2:]], GREEDY, 0))


@pytest.mark.parametrize(("status", "word"), [(401, "$OPENAI_API_KEY"), (404, "'m'"), (301, "redirects")])
def test_a_server_that_will_never_answer_is_an_error_at_once(serving, status: int, word: str) -> None:
    server = serving(lambda request, number: failed(status, "no"))
    with pytest.raises(RunError) as caught:
        all_of(server)
    assert len(server.requests) == 1 and word in caught.value.remedy


def test_a_server_that_refuses_every_form_is_an_error_with_its_first_words(serving) -> None:
    server = serving(lambda request, number: failed(400, f"refusal {number}"))
    with pytest.raises(RunError, match="refusal 1"):
        all_of(server)
    assert len(server.requests) == len(api.FORMS)


def test_more_tokens_than_were_asked_for_are_an_error(serving) -> None:
    server = serving(lambda request, number: answer("", "length", token_ids=[5] * (request["max_tokens"] + 1)))
    with pytest.raises(RunError, match="gave 2 tokens where at most 1"):
        all_of(server)


@pytest.mark.parametrize("finish", ["abort", "error", "repetition", None])
def test_an_end_for_no_reason_of_its_own_is_an_error(serving, finish: str | None) -> None:
    server = serving(lambda request, number: answer("", finish, token_ids=[5]))
    with pytest.raises(RunError, match=f"ended a completion with '{finish}'"):
        all_of(server)


@pytest.mark.parametrize(
    "said",
    [
        {"token_ids": [5], "prompt_token_ids": [2, 10, 20, 30]},
        {"token_ids": [5], "prompt_token_ids": [10, 20, 31]},
        {"token_ids": [5], "usage": {"prompt_tokens": 4}},
        {"text": "a", "usage": {"prompt_tokens": 4}},
    ],
)
def test_a_server_that_read_another_prompt_is_an_error(serving, said: dict) -> None:
    with pytest.raises(RunError, match=r"read a prompt of \d tokens where 3 were meant"):
        all_of(serving(lambda request, number: answer(finish="length", **said)))


@pytest.mark.parametrize("usage", [{"prompt_tokens": 1}, {"prompt_tokens": None}, {}, "none", {"prompt_tokens": 3}])
def test_tokens_that_were_cached_need_not_be_counted(serving, usage: object) -> None:
    assert len(all_of(serving(lambda request, number: answer("a", "length", usage)))) == len(PROMPTS)


# --- prompts as text ------------------------------------------------------------------------------------------------


class WithStart:
    """A tokenizer that puts BOS before text, as a server with the same tokenizer does."""

    eos_token_id = 1

    def __init__(self) -> None:
        self.own = small_tokenizer()

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = self.own(text)["input_ids"]
        return {"input_ids": [2, *ids] if add_special_tokens else ids}

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return str(self.own.decode(ids, skip_special_tokens=skip_special_tokens))


def test_bos_is_left_to_the_server_that_puts_it_there(serving) -> None:
    tokenizer, seen = WithStart(), []

    def script(request: dict, number: int) -> tuple[int, dict, str]:
        if not isinstance(request["prompt"], str):
            return failed(400, "text, please")
        seen.append(request["prompt"])
        count = len(tokenizer(request["prompt"])["input_ids"])
        return answer("ab", "stop", {"prompt_tokens": count})

    server = serving(script)
    with ApiSampler(server.url, "m", tokenizer, ENDS) as engine:
        (batch,) = engine.sample([[2, 70, 71]], GREEDY, 0)
    assert set(seen) == {"ab"}
    assert batch == [Completion(0, [70, 71, 1], "eos", "ab")]


def test_a_prompt_that_text_cannot_hold_is_an_error(serving) -> None:
    server = serving(text_only)
    with sampler(server) as engine, pytest.raises(RecipeError, match="does not survive as text"):
        list(engine.sample([[10, 200]], GREEDY, 0))  # a number that no text stands for


def test_special_tokens_of_a_prompt_survive_as_text(serving) -> None:
    server = serving(text_only)
    with sampler(server) as engine:
        list(engine.sample([[2, 70, 1, 3]], GREEDY, 0))
    assert server.requests[-1]["prompt"] == "<|user|>a<|end|><|assistant|>"


# --- manners --------------------------------------------------------------------------------------------------------


def test_an_abandoned_draw_asks_for_no_more(serving) -> None:
    server = serving(vllm)
    with sampler(server, concurrency=2) as engine:
        batches = engine.sample(PROMPTS, GREEDY, 0)
        next(batches)
        working = [thread for thread in threading.enumerate() if thread.name == "sampling"]
        assert working and all(thread.daemon for thread in working)  # an interrupted command ends at once
        batches.close()
        time.sleep(0.2)
        asked = len(server.requests)
        time.sleep(0.3)
    assert len(server.requests) == asked < 1 + len(PROMPTS)


def test_nothing_is_asked_of_no_prompts(serving) -> None:
    server = serving(vllm)
    with sampler(server) as engine:
        assert list(engine.sample([], GREEDY, 0)) == []
    assert server.requests == []


def test_an_address_that_is_none_is_the_recipes_fault() -> None:
    with pytest.raises(HeatbathError, match="no address of a server"):
        ApiSampler("localhost:8000", "m", small_tokenizer(), ENDS)
