"""An OpenAI-compatible server: chat completions, retried, cached by content, in order, a bounded number in flight; and
its other routes, retried.

A judging run costs money and hours. So every reply is kept on disk the moment it arrives (one file each, written
whole or not at all), a run that was killed asks only for what is missing, and several processes may share the folder.
"""

from __future__ import annotations

import email.utils
import hashlib
import json
import math
import os
import random
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from heatbath.addresses import bare, credentials, without_credentials
from heatbath.errors import RecipeError, RunError

Messages = Sequence[Mapping[str, str]]
Read = TypeVar("Read")
LONGEST_BACKOFF = 60.0  # seconds
LONGEST_RETRY_AFTER = 600.0  # seconds; a server that asks for more is an error, not a pause
TRY_AGAIN = frozenset({408, 409, 425, 429})  # and every 5xx
THIS_REQUEST = frozenset({400, 413, 422})  # the conversation is at fault, others may pass
SECRET = 12  # characters: no key of a paid service is shorter
OUT_OF_QUOTA = "insufficient_quota"  # a 429 that no waiting mends


class RefusalError(RunError):
    """The server takes no such conversation (too long, filtered) or setting; asking again changes nothing."""


@dataclass(frozen=True)
class Reply:
    """What the model said. `finish` is the server's own word ("stop", "length"), `served` the model it says it ran."""

    text: str
    finish: str = ""
    served: str = ""
    cached: bool = False


@dataclass(eq=False)
class Endpoint:
    """A model behind `base_url` + /chat/completions; its methods may be called from any thread.

    The key is read from the environment variable `key_env` (a local server needs none) and never stored or shown.
    `temperature` and `max_tokens` are left out of the request where None, for models that refuse them; `body` holds
    further fields of it. `timeout` is in seconds without a byte. A reply is found in `cache` by what decides it (model,
    messages, sampling settings, attempt), not by the server's address: the same model moved to another port is the
    same model, and two different models must not share a name.
    """

    base_url: str
    model: str
    _: KW_ONLY
    key_env: str = "OPENAI_API_KEY"
    temperature: float | None = 0.0
    max_tokens: int | None = 2048
    retries: int = 6
    timeout: float = 180.0
    concurrency: int = 8
    cache: Path | str | None = None
    body: Mapping[str, Any] = field(default_factory=dict)
    first_wait: float = 1.0  # seconds before the first retry; doubles, with jitter

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RecipeError(
                f"'{self._shown_url}' is no address of a server", "base_url", "for example http://localhost:8000/v1"
            )
        if self.concurrency < 1 or self.retries < 0:
            raise RecipeError("concurrency must be at least 1, retries at least 0", self._shown_url, "")
        # Kept apart from the address: HTTP libraries log addresses.
        self._login, self.base_url = credentials(self.base_url), bare(self.base_url)
        self.cache = None if self.cache is None else Path(self.cache).expanduser()
        self._slots = threading.BoundedSemaphore(self.concurrency)
        self._lock = threading.Lock()
        self._client: Any = None

    def answer(self, messages: Messages, *, attempt: int = 0) -> Reply:
        """The reply to one conversation. `attempt` > 0 asks again for a reply that was not usable.

        Raises RefusalError where the server refuses this conversation, RunError where it refuses the key or the
        model, or could not be reached after `retries` more tries.
        """
        return self._answer(messages, attempt, threading.Event())

    def answers(
        self,
        conversations: Sequence[Messages],
        *,
        attempt: int = 0,
        refused: Literal["raise", "return"] = "raise",
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Reply | RefusalError]:
        """The replies in order; with refused="return" the error itself where one conversation was refused.

        Any other failure stops it once the requests in flight have ended; what was answered is in the cache.
        `progress` gets done and total.
        """
        replies: dict[int, Reply | RefusalError] = {}
        stop = threading.Event()
        with ThreadPoolExecutor(self.concurrency, "endpoint") as pool:
            futures = {pool.submit(self._answer, c, attempt, stop): i for i, c in enumerate(conversations)}
            try:
                for done, future in enumerate(as_completed(futures), 1):
                    try:
                        replies[futures[future]] = future.result()
                    except RefusalError as error:
                        if refused == "raise":
                            raise
                        replies[futures[future]] = error
                    if progress is not None:
                        progress(done, len(futures))
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [replies[i] for i in range(len(conversations))]

    def close(self) -> None:
        with self._lock:
            if self._client is not None:
                self._client.close()
                self._client = None

    def _answer(self, messages: Messages, attempt: int, stop: threading.Event) -> Reply:
        request = self._request(messages)
        path = self._path(request, attempt)
        known = _read(path, request)
        if known is not None:
            return known
        kept = "what was answered is in the cache" if self.cache else "set `cache`, so that answers are kept"
        reply = self.post("chat/completions", request, _reply, stop, kept=f" ({kept})")
        if path is not None:
            _write(path, {"request": request, "attempt": attempt, "url": self._shown_url, "reply": vars(reply)})
        return reply

    def _request(self, messages: Messages) -> dict[str, Any]:
        request: dict[str, Any] = {"model": self.model, "messages": [dict(message) for message in messages]}
        settings = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        request |= {name: value for name, value in settings.items() if value is not None} | dict(self.body)
        return dict(json.loads(json.dumps(request)))  # as it is read back from the cache

    def _path(self, request: dict[str, Any], attempt: int) -> Path | None:
        if self.cache is None:
            return None
        content = json.dumps([request, attempt], sort_keys=True, ensure_ascii=False)
        digest = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()
        return Path(self.cache) / digest[:2] / f"{digest}.json"

    def post(
        self, route: str, request: dict[str, Any], read: Callable[[Any], Read], stop: threading.Event, *, kept: str = ""
    ) -> Read:
        """What `read` makes of the server's JSON answer to a request, which is not cached.

        It is asked again while `read` finds nothing there (IndexError, KeyError, TypeError, AttributeError); `stop`
        ends the waiting between two tries. Raises as `answer` does; `kept` says where earlier answers are.
        """
        http, url, key = _http(), f"{self.base_url.rstrip('/')}/{route}", self._key()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        content = json.dumps(request)  # ASCII: a lone surrogate in an answer goes through
        what = ""
        for number in range(self.retries + 1):
            if stop.is_set():
                break
            wait = 0.0
            try:
                with self._slots:
                    response = self._http_client(http).post(url, content=content, headers=headers)
            except http.TimeoutException:
                what = f"no answer within {self.timeout:g} seconds"
            except http.RequestError as error:
                what = f"no connection: {without_credentials(str(error))}"
            else:
                found, what = _understood(response, read, key)
                if found is not None:
                    return found
                what = _without(what, key)[:400]
                if not _may_pass_later(response):
                    raise self._fault(response.status_code, what)
                wait = _retry_after(response.headers.get("retry-after", ""))
                if wait > LONGEST_RETRY_AFTER:
                    what += f"; the server asks to wait {wait:,.0f} seconds"
                    break
            if number < self.retries:
                backoff = min(self.first_wait * 2**number, LONGEST_BACKOFF) * random.uniform(0.5, 1.0)
                stop.wait(max(wait, backoff))
        raise RunError(
            f"the server gave no usable answer in {number + 1} tries; the last: {what or 'stopped'}",
            self._shown_url,
            f"check that it runs at this address, or lower `concurrency`, and run again{kept}",
        )

    def _fault(self, status: int, what: str) -> RunError:
        """The error of a request that fails however often it is sent."""
        if status in THIS_REQUEST:
            return RefusalError(
                f"the server refused a request (HTTP {status}): {what}",
                self._shown_url,
                "shorten the conversation, or leave out a setting the model does not take (temperature = None, "
                'max_tokens = None and body = {"max_completion_tokens": …})',
            )
        remedies = {
            401: f"put a valid key into ${self.key_env}",
            403: f"put a key that may use '{self.model}' into ${self.key_env}",
            404: f"check base_url (it usually ends in /v1) and that the server has a model '{self.model}'",
            429: "the account's quota is used up: add to it, or use another key",
        }
        redirect = "give the address that the server redirects to as base_url"
        remedy = redirect if 300 <= status < 400 else remedies.get(status, "check base_url and the model's name")
        return RunError(f"the server refused the request (HTTP {status}): {what}", self._shown_url, remedy)

    def _key(self) -> str:
        key = os.environ.get(self.key_env, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise RecipeError("the key holds characters that no HTTP header takes", f"${self.key_env}", "set it anew")
        return key

    @property
    def _shown_url(self) -> str:
        return without_credentials(self.base_url)

    def __repr__(self) -> str:
        return f"Endpoint({self._shown_url!r}, {self.model!r})"

    def _http_client(self, http: ModuleType) -> Any:
        with self._lock:
            if self._client is None:
                limits = http.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
                self._client = http.Client(timeout=self.timeout, limits=limits, auth=self._login)
            return self._client


def _http() -> ModuleType:
    """httpx, or httpx2, its successor that newer versions of huggingface_hub bring; the names used are in both."""
    try:
        import httpx2

        return httpx2  # type: ignore[no-any-return]
    except ModuleNotFoundError:
        pass
    try:
        import httpx

        return httpx  # type: ignore[no-any-return]
    except ModuleNotFoundError:
        raise RecipeError("no HTTP client is installed", "httpx", "pip install 'heatbath[api]'") from None


def _without(text: str, key: str) -> str:
    return text.replace(key, "***") if key else text


def _understood(response: Any, read: Callable[[Any], Read], key: str = "") -> tuple[Read | None, str]:
    """What `read` finds, or why there is nothing. An answer that repeats the key is kept without it; a key of a few
    letters is the placeholder of a local server ("EMPTY", "x"), which answers hold by chance."""
    try:
        content = json.loads(_without(response.text, key)) if len(key) >= SECRET else response.json()
    except ValueError:
        content = None
    if response.status_code == 200:
        try:
            return read(content), ""
        except (KeyError, IndexError, TypeError, AttributeError):
            return None, f"HTTP 200 with no completion in it: {_message(content, response.text)}"
    return None, f"HTTP {response.status_code}: {_message(content, response.text)}"


def _reply(content: Any) -> Reply:
    choice = content["choices"][0]
    text = choice["message"]["content"] or ""  # null where the model refused, or only reasoned
    return Reply(str(text), str(choice.get("finish_reason") or ""), str(content.get("model") or ""))


def _message(content: Any, text: str) -> str:
    """The server's own words, in whichever of the usual fields they stand."""
    found = content
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(name):
            found = found[name]
    words = found if isinstance(found, str) else text
    return " ".join(words.split()) or "(an empty body)"


def _may_pass_later(response: Any) -> bool:
    if response.status_code == 429 and OUT_OF_QUOTA in response.text:
        return False
    return response.status_code == 200 or response.status_code in TRY_AGAIN or response.status_code >= 500


def _retry_after(value: str) -> float:
    """Seconds that a Retry-After header asks for: a number, or a date; 0 where it says neither."""
    try:
        seconds = float(value)
        return max(0.0, seconds) if math.isfinite(seconds) else 0.0
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


def _read(path: Path | None, request: dict[str, Any]) -> Reply | None:
    """The cached reply; None where there is none, or a file that a full disk or a power cut left unreadable."""
    if path is None:
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return Reply(**(record["reply"] | {"cached": True})) if record["request"] == request else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, record: dict[str, Any]) -> None:
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # names of killed processes are never read
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(record), encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise RunError(f"cannot keep a reply: {error}", f"cache = {path.parent.parent}", "free space there") from error
