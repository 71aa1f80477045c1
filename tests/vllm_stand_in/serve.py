"""`vllm serve MODEL` as TRL's client sees it, in a process of its own: python serve.py MODEL PORT [OPTIONS]

`--deaf` answers every weight update and loads none of it; `--dies-after N` ends the process at its N-th completion
request.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import torch
from transformers import AutoModelForCausalLM
from vllm.drawing import drawn

CONTEXT = 256  # tokens, of the small model


class Server:
    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.policy = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
        self.own = dict(self.policy.named_parameters())
        for parameter in self.own.values():  # so that only what the trainer sends can be right
            torch.nn.init.normal_(parameter, std=1.0)
        self.line: socket.socket | None = None
        self.updating, self.asked = False, 0

    def get(self, path: str) -> tuple[int, Any]:
        if path == "/health":
            return 200, {}
        if path == "/v1/models":
            return 200, {"data": [{"id": self.options.model, "max_model_len": CONTEXT}]}
        if path == "/server_info":
            model = {"logprobs_mode": "processed_logprobs"}
            return 200, {"vllm_config": {"model_config": model, "weight_transfer_config": {"backend": "nccl"}}}
        if path == "/get_world_size":
            return 200, {"world_size": 1}
        return 404, {"detail": "Not Found"}

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/v1/completions":
            return self.complete(body)
        if path == "/init_weight_transfer_engine":
            info = body["init_info"]
            self.line = _connected(info["master_address"], info["master_port"])
        elif path == "/start_weight_update":
            self.updating = True
        elif path == "/finish_weight_update":
            self.updating = False
        elif path == "/update_weights":
            self.update(body["update_info"])
        elif path == "/reset_prefix_cache":
            return 200, {"success": True}
        else:
            return 404, {"detail": "Not Found"}
        return 200, {"message": "done"}

    def update(self, info: dict[str, Any]) -> None:
        assert self.updating and self.line is not None
        for name, kind, shape in zip(info["names"], info["dtype_names"], info["shapes"], strict=True):
            dtype = getattr(torch, kind)
            content = _received(self.line, math.prod(shape) * dtype.itemsize)
            value = torch.frombuffer(bytearray(content), dtype=dtype).view(shape)
            if not self.options.deaf:
                self.own[name].data.copy_(value)

    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        self.asked += 1
        if self.asked == self.options.dies_after:
            os._exit(1)
        assert body["return_token_ids"] and body["return_tokens_as_token_ids"] and body["logprobs"] == 0
        most = body["max_tokens"]
        assert max(map(len, body["prompt"])) + most <= CONTEXT
        choices = []
        for prompt in body["prompt"]:
            for ids, logps, finish in drawn(self.policy, prompt, body["n"], body["temperature"], most):
                names = [f"token_id:{i}" for i in ids]
                top = [{name: x} for name, x in zip(names, logps, strict=True)]
                logprobs = {"tokens": names, "token_logprobs": logps, "top_logprobs": top}
                own = {"token_ids": ids, "prompt_token_ids": prompt, "finish_reason": finish, "logprobs": logprobs}
                choices.append({"index": len(choices), "text": "", **own})
        return 200, {"choices": choices}


def _connected(address: str, port: int) -> socket.socket:
    """The trainer may come to the meeting after its request does."""
    for _ in range(1200):
        try:
            return socket.create_connection((address, port))
        except ConnectionRefusedError:
            time.sleep(0.05)
    raise TimeoutError("the trainer did not come")


def _received(line: socket.socket, count: int) -> bytes:
    out = bytearray()
    while len(out) < count:
        part = line.recv(min(count - len(out), 1 << 20))
        if not part:
            raise ConnectionError("the trainer hung up")
        out += part
    return bytes(out)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("port", type=int)
    parser.add_argument("--deaf", action="store_true")
    parser.add_argument("--dies-after", type=int, default=0)
    torch.manual_seed(0)
    server = Server(parser.parse_args())

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self, status: int, content: Any) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self._answer(*server.get(urlsplit(self.path).path))

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self._answer(*server.post(urlsplit(self.path).path, json.loads(content) if content else {}))

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", server.options.port), Handler)
    print(f"serving on {http.server_port}", flush=True)
    http.serve_forever()


if __name__ == "__main__":
    main()
