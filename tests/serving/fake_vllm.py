"""What the tests put in vLLM's place: a server process that speaks its few routes, and does as it is told.

The first token of a prompt says what happens; any other prompt is answered with its own tokens, over and over.
"""

import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ON_AND_ON, DIES, FAILS, REFUSED, ABORTED, BREAKS_OFF, ENGINE_DIES = range(10, 17)
FLAGS = dict(a.split("=", 1) if "=" in a else (a, "") for a in sys.argv[1:])
PORT = int(sys.argv[sys.argv.index("--port") + 1])
KEY = os.environ["VLLM_API_KEY"]
loaded: dict[str, str] = {}
left = threading.Event()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/left":  # answers once somebody has left before the end
            left.wait(30)
        told = {"argv": sys.argv[1:], "environment": dict(os.environ), "loaded": loaded}
        self.answer(200, told)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Authorization"] != f"Bearer {KEY}":
            self.answer(401, {"error": "Unauthorized"})
        elif self.path == "/v1/load_lora_adapter":
            if body["lora_name"] in loaded or not Path(body["lora_path"]).exists():
                self.answer(400, {"error": {"message": "no such adapter,\nor there already", "code": 400}})
            else:
                loaded[body["lora_name"]] = body["lora_path"]
                self.answer(200, "Success")
        elif self.path == "/v1/unload_lora_adapter":
            del loaded[body["lora_name"]]
            self.answer(200, "Success")
        else:
            self.complete(body)

    def complete(self, body: dict) -> None:
        told, prompt = body["prompt"][0], body["prompt"]
        if told == REFUSED or body["model"] not in {"base", *loaded}:
            self.answer(400, {"error": {"message": "this prompt is too long", "code": 400}})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")  # what is cut short is seen to be
        self.end_headers()
        error = {FAILS: "out of luck", ENGINE_DIES: "EngineCore encountered an issue"}.get(told)
        if error:
            self.say({"error": {"message": error, "type": "InternalServerError", "code": 500}})
            self.wfile.write(b"0\r\n\r\n")
            return
        made = 0
        while told == ON_AND_ON or made < body["max_tokens"]:
            token = prompt[made % len(prompt)]
            made += 1
            stops = token in body["stop_token_ids"]
            reason = "stop" if stops else "length" if made == body["max_tokens"] else None
            reason = {ON_AND_ON: None, ABORTED: "abort"}.get(told, reason)
            top = {f"token_id:{token}": -0.5, "token_id:7": -1.5}
            logprobs = {"tokens": [f"token_id:{token}"], "token_logprobs": [-0.5], "top_logprobs": [top]}
            choice = {"index": 0, "text": "", "finish_reason": reason, "token_ids": [token]}
            if body.get("logprobs") is not None:
                choice["logprobs"] = logprobs
            try:
                self.say({"choices": [choice]})
            except OSError:
                left.set()
                return
            if told == DIES:
                os._exit(9)
            if reason or told == BREAKS_OFF:
                break
        if told != BREAKS_OFF:
            self.chunk(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def say(self, event: dict) -> None:
        self.chunk(b"data: " + json.dumps(event).encode() + b"\n\n")

    def chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def answer(self, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


if __name__ == "__main__":
    print("the server starts", flush=True)
    if "--fail" in FLAGS:
        sys.exit("no room for keys and values")
    ThreadingHTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
