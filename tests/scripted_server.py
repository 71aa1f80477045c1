"""A real HTTP server that follows a script, for the tests of what talks to OpenAI-compatible servers."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Script = Callable[[dict, int], tuple[int, dict, str]]  # (request, its number) → status, headers, body


def failed(status: int, message: str, **headers: str) -> tuple[int, dict, str]:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, names, json.dumps({"error": {"message": message, "type": "x"}})


class Server:
    """An OpenAI-compatible server that follows a script, and remembers what it was asked and how much at once."""

    def __init__(self, script: Script):
        self.script, self.requests, self.keys, self.paths = script, [], [], []
        self.now, self.most, self.lock = 0, 0, threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                outer.serve(self)

            def log_message(self, *_: object) -> None:
                pass

        class Listener(ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None:  # a client that was killed
                pass

        self.http = Listener(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        request = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            self.requests.append(request)
            self.paths.append(handler.path)
            self.keys.append(handler.headers.get("Authorization"))
            number, self.now = len(self.requests), self.now + 1
            self.most = max(self.most, self.now)
        status, headers, body = self.script(request, number)
        with self.lock:
            self.now -= 1
        if status == 0:  # hangs up
            handler.close_connection = True
            return
        content = body.encode()
        handler.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content)

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
