"""Sampling from an OpenAI-compatible server, through /v1/completions: tokens in, tokens out where it offers that, else
text.

vLLM and SGLang take a prompt as token ids and answer with ids (`return_token_ids`); llama.cpp takes ids and answers
with text; others know only text. A first request for one token finds out. Where the answer is text, the completion's
ids are our own tokenizer's of it, which need not be those that were sampled; it is then marked as `retokenised`.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from heatbath.engines.sampling import Closing, Completion, LeftOutError, Sampling, seeds_of, until_eos
from heatbath.errors import HeatbathError, RecipeError, RunError
from heatbath.verify.endpoint import Endpoint, RefusalError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PATIENCE = 1800.0  # seconds: a long completion arrives in one piece, without a byte before it
# Servers have samplers of their own on by default (llama.cpp top-k 40 and min-p 0.05, vLLM whatever the model's
# generation config says); each of these turns one off, or is ignored by a server that does not know it.
WHOLE_POLICY = {
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "repeat_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
FORMS = tuple(itertools.product(("tokens", "text"), (True, False)))  # the prompt as, and with more than OpenAI's fields


class ApiSampler(Closing):
    """Samples the model that a server calls `served`, at most `concurrency` requests at a time.

    `eos_ids` are the tokens that end a completion of that model, `tokenizer` is its own.
    """

    def __init__(
        self,
        endpoint: str,
        served: str,
        tokenizer: PreTrainedTokenizerBase,
        eos_ids: Sequence[int],
        *,
        concurrency: int = 32,
        **settings: Any,
    ):
        self._server = Endpoint(endpoint, served, concurrency=concurrency, **{"timeout": PATIENCE, **settings})
        self._tokenizer, self._eos_ids = tokenizer, list(eos_ids)
        self._form: tuple[str, bool] | None = None

    def sample(
        self, prompts: Sequence[list[int]], settings: Sampling, seeds: int | Sequence[int]
    ) -> Iterator[list[Completion]]:
        """Yields completions in the order in which they come, `concurrency` at a time.

        Raises RunError where the server fails for long, reads another prompt than was sent, or answers with more tokens
        than were asked for; everything that had come is yielded first. A prompt that is refused (too long) holds up no
        other: LeftOutError says so in the end.
        """
        own, come = seeds_of(seeds, len(prompts)), 0
        if prompts and self._form is None:
            self._form = self._settle(min(prompts, key=len), settings)
        ready: list[Completion] = []
        failures: list[HeatbathError] = []
        threads = self._server.concurrency
        for found in _in_parallel(
            lambda i, stop: self._ask(i, prompts[i], settings, own[i], stop), len(prompts), threads
        ):
            if isinstance(found, HeatbathError):
                failures.append(found)
                continue
            ready.append(found)
            if len(ready) == threads:
                come += len(ready)
                yield ready
                ready = []
        if ready:
            come += len(ready)
            yield ready
        if failures:
            first = min(failures, key=lambda error: isinstance(error, RefusalError))
            remedy = f"{_remedy(first)}; {come:,} of {len(prompts):,} completions came and are kept"
            if isinstance(first, RefusalError):
                raise LeftOutError(first.what, first.where, remedy)
            raise RunError(first.what, first.where, f"{remedy}, and the same command asks for the rest")

    def close(self) -> None:
        self._server.close()

    def _settle(self, prompt: list[int], settings: Sampling) -> tuple[str, bool]:
        """The first form of request that the server does not refuse."""
        refusals = []
        for form in FORMS:
            self._form = form
            try:
                self._ask(0, prompt, Sampling(settings.temperature, settings.top_p, 1), 0, threading.Event())
            except RefusalError as refusal:
                refusals.append(refusal)
            else:
                return form
        self._form = None
        raise RunError(refusals[0].what, refusals[0].where, _remedy(refusals[0]))

    def _ask(self, number: int, prompt: list[int], settings: Sampling, seed: int, stop: threading.Event) -> Completion:
        kind, more = self._form or FORMS[0]
        request: dict[str, Any] = {
            "model": self._server.model,
            "prompt": prompt if kind == "tokens" else self._text_of(prompt),
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "seed": seed,
        }
        if more:
            request |= WHOLE_POLICY | {"return_token_ids": True, "stop_token_ids": self._eos_ids}
        content = self._server.post("completions", request, _checked, stop)
        self._require_same_prompt(prompt, content)
        return self._completion(number, content["choices"][0], settings.max_new_tokens)

    def _completion(self, number: int, choice: dict[str, Any], most: int) -> Completion:
        ids, why = choice.get("token_ids"), str(choice.get("finish_reason"))
        if why not in ("stop", "length", "content_filter"):
            raise self._fault(f"the server ended a completion with '{why}'", "look into its log")
        if ids is None:
            text = str(choice["text"]).encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # no half pairs
            ids = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
            if why == "stop" and self._tokenizer.eos_token_id is not None:  # no other stop was asked for
                return Completion(number, [*ids, self._tokenizer.eos_token_id], "eos", text)
            return Completion(number, ids, why, text)
        if len(ids) > most:
            raise self._fault(f"the server gave {len(ids):,} tokens where at most {most:,} were asked for", "update it")
        end = choice.get("stop_reason", choice.get("matched_stop"))
        if why == "stop" and end in self._eos_ids:
            ids = [*ids, end]  # a server may leave the end out
        ids = until_eos(ids, self._eos_ids)  # or know fewer tokens that end a completion
        return Completion(number, ids, "eos" if ids and ids[-1] in self._eos_ids else why)

    def _text_of(self, prompt: list[int]) -> str:
        """A text that a server's tokenizer, which puts BOS before text if ours does, reads as this prompt."""
        whole = str(self._tokenizer.decode(prompt, skip_special_tokens=False))
        rest = str(self._tokenizer.decode(prompt[1:], skip_special_tokens=False))
        for text in (whole, rest):
            if self._tokenizer(text)["input_ids"] == prompt:
                return text
        raise RecipeError(
            "a prompt does not survive as text, and the server takes no token ids",
            self._server.base_url,
            "a server that takes ids (vLLM, SGLang, llama.cpp), or another engine",
        )

    def _require_same_prompt(self, prompt: list[int], content: dict[str, Any]) -> None:
        """Compares what the server says it read with what was meant; fewer tokens are those it had cached."""
        read = content["choices"][0].get("prompt_token_ids")
        usage = content.get("usage")
        count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        if (read is not None and list(read) != prompt) or (isinstance(count, int) and count > len(prompt)):
            tokens = count if read is None else len(read)
            raise self._fault(
                f"the server read a prompt of {tokens:,} tokens where {len(prompt):,} were meant",
                "serve the model with its own tokenizer, and nothing put before the prompt",
            )

    def _fault(self, what: str, remedy: str) -> RunError:
        return RunError(what, f"{self._server.base_url}, model '{self._server.model}'", remedy)


def _checked(content: Any) -> dict[str, Any]:
    """An answer that has what is read of it; otherwise one of the errors that mean to ask again."""
    choice = content["choices"][0]
    if choice.get("token_ids") is None:
        choice["text"] + ""
    return dict(content)


def _remedy(error: HeatbathError) -> str:
    if isinstance(error, RefusalError):
        return (
            "take shorter prompts, a lower max_new_tokens or a longer context of the server, so that both fit into it"
        )
    return error.remedy


def _in_parallel(
    ask: Callable[[int, threading.Event], Completion], count: int, threads: int
) -> Iterator[Completion | HeatbathError]:
    """What `ask` makes of the numbers below `count`, as it comes. After a failure that is not of one request alone no
    more are asked, but those in flight are awaited.

    The threads are daemons, so that an interrupted command ends at once instead of with its last request.
    """
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    come: queue.SimpleQueue[Completion | BaseException | None] = queue.SimpleQueue()
    stop = threading.Event()
    for number in range(count):
        todo.put(number)

    def work() -> None:
        while not stop.is_set():
            try:
                number = todo.get_nowait()
            except queue.Empty:
                break
            try:
                come.put(ask(number, stop))
            except RefusalError as refusal:
                come.put(refusal)
            except BaseException as error:  # noqa: BLE001 - raised where the results are read
                stop.set()
                come.put(error)
        come.put(None)

    working = min(threads, count)
    for _ in range(working):
        threading.Thread(target=work, name="sampling", daemon=True).start()
    try:
        while working:
            found = come.get()
            if found is None:
                working -= 1
            elif isinstance(found, Completion | HeatbathError):
                yield found
            else:
                raise found
    finally:
        stop.set()
