"""OpenVINO GenAI behind the part of /v1/completions that `serve_bench.py` asks for; peers.py runs it.

    DIR/openvino/bin/python benchmarks/openvino_server.py MODEL.gguf PORT

OpenVINO GenAI has continuous batching but, as a Python package, no server: this is the thinnest one there can be, on
the standard library, in the peer's virtual environment. Imports nothing of Lathe.
"""

import json
import queue
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import openvino_genai

MAX_NUM_SEQS = 16
CACHE_GIB = 1


class Batcher(threading.Thread):
    """Steps the pipeline while there is anything to do; every request's tokens go into its own queue."""

    def __init__(self, model: str) -> None:
        super().__init__(daemon=True)
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = CACHE_GIB
        scheduler.max_num_seqs = MAX_NUM_SEQS
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(model, scheduler, "CPU")
        self.tokenizer = self.pipeline.get_tokenizer()
        self._waiting: queue.Queue[tuple[str, Any, queue.Queue[int | None]]] = queue.Queue()

    def submit(self, prompt: str, max_tokens: int) -> "queue.Queue[int | None]":
        """Token ids as they come, then None."""
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = max_tokens
        config.ignore_eos = True
        config.do_sample = False
        tokens: queue.Queue[int | None] = queue.Queue()
        self._waiting.put((prompt, config, tokens))
        return tokens

    def run(self) -> None:
        running: list[tuple[Any, queue.Queue[int | None]]] = []
        num_requests = 0
        while True:
            while not running or not self._waiting.empty():
                prompt, config, tokens = self._waiting.get()
                handle = self.pipeline.add_request(num_requests, prompt, config)
                running.append((handle, tokens))
                num_requests += 1
            self.pipeline.step()
            for handle, tokens in list(running):
                while handle.can_read():
                    for output in handle.read().values():
                        for token_id in output.generated_ids:
                            tokens.put(token_id)
                if handle.get_status() != openvino_genai.GenerationStatus.RUNNING:
                    tokens.put(None)
                    running.remove((handle, tokens))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    batcher: Batcher

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        tokens = self.batcher.submit(body["prompt"], body["max_tokens"])
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        num_tokens = 0
        while (token_id := tokens.get()) is not None:
            num_tokens += 1
            text = (
                self.batcher.tokenizer.decode([token_id]) or " "
            )  # an event of its own in any case
            self._send({"choices": [{"index": 0, "text": text}]})
        self._send({"choices": [], "usage": {"completion_tokens": num_tokens}})
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def _send(self, chunk: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())

    def log_message(self, *arguments: object) -> None:
        """Nothing: a line per request would be a part of what is measured."""


def main() -> None:
    model, port = sys.argv[1:]
    Handler.batcher = Batcher(model)
    Handler.batcher.start()
    server = ThreadingHTTPServer(("127.0.0.1", int(port)), Handler)
    server.daemon_threads = True
    server.serve_forever()


if __name__ == "__main__":
    main()
