"""A server that speaks OpenAI's protocol: chat, completions, embeddings, models, health, metrics.

Continuous batching (engine.py) behind HTTP. An ASGI application (starlette) reads and checks requests in an event
loop; one thread drives the engine (engine_loop.py) and sends tokens back; uvicorn speaks HTTP. Text leaves in
whole letters and without stop strings (text_stream.py); answers can be bound to JSON (grammars.py).

    python deploy/serve.py                              # SmolLM2 at http://127.0.0.1:8000/v1
    python deploy/serve.py --once                       # one request of its own, over HTTP
    python deploy/serve.py --int8 --port 0              # int8 layers, a free port
    python deploy/serve.py --int4                       # 4-bit codes for few tokens, int8 for many
    python deploy/serve.py --model outputs/quantize/model     # any folder, also one of quantize.py
"""

import contextlib
import json
import os
import threading
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from deploy import decode, quantized_model
from deploy.engine import Engine
from deploy.http_server import bind, is_loopback, make_server
from deploy.int8_linear import int8_layers
from deploy.low_bit_fused import bytes_held, fused
from deploy.low_bit_layers import int4_layers, int4_smollm2
from utils import run
from utils.run import check
from utils.text import clean, printable

KEY = "VLM_ACTION_API_KEY"  # the environment has it: a flag is seen by all who list processes


@dataclass(frozen=True)
class Config:
    """Serve a language model by OpenAI's protocol."""

    model: str = "smollm2"  # or a folder, also one of quantize.py, or a hub id
    name: str = ""  # of the model, for clients; default: that of --model
    int8: bool = False  # linear layers in int8 (int8_linear.py)
    int4: bool = False  # int4 for decoding, int8 for prefill (low_bit_layers.py), on a CPU
    host: str = "127.0.0.1"  # another one than loopback needs a key, in VLM_ACTION_API_KEY
    port: int = 8000  # 0: a free one
    insecure: bool = False  # serve others without a key
    blocks: int = 512  # of the KV cache
    block_size: int = 8  # tokens
    max_batch: int = 16  # answers that run at once
    max_tokens: int = 256  # new tokens of a step: longer prompts are read in chunks
    waiting: int = 32  # answers that wait beside them; more get status 429
    seconds: float = 300.0  # time of a request
    drain_seconds: float = 30.0  # after SIGTERM, for what is running
    once: bool = False  # send one request to itself, and end
    prompt: str = "What is the capital of France?"  # of --once
    device: str = "auto"
    out: str = "outputs/serve"


def app(model, tokenizer, engine=None, name="model", hosts=("*",), **about):
    """-> the ASGI application; `about`: further arguments of Service. hosts: the names under which the server
    may be called."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route

    from deploy import endpoints
    from deploy.protocol_error import ProtocolError
    from deploy.service import Service

    service = Service(model, tokenizer, engine or Engine(model), name, **about)

    def health(request):
        """200 while new requests are taken: a load balancer asks."""
        return PlainTextResponse("", 503 if service.draining else 200)

    def metrics(request):
        text = service.metrics.text(service.engine, service.engine_loop.taken())
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    def refused(request, error):
        """Addresses and methods that there are not."""
        found = ProtocolError(error.detail, status=error.status_code)
        return endpoints.error_response(found)

    @contextlib.asynccontextmanager
    async def lifespan(made):
        service.engine_loop.start()
        yield
        service.engine_loop.stop()

    def post(path, handler):
        return Route(path, endpoints.endpoint(service, handler), methods=["POST"])

    def get(path, handler):
        return Route(path, endpoints.endpoint(service, handler), methods=["GET"])

    made = Starlette(
        routes=[
            post("/v1/chat/completions", endpoints.chat),
            post("/v1/completions", endpoints.completions),
            post("/v1/embeddings", endpoints.embeddings),
            get("/v1/models", endpoints.models),
            get("/v1/models/{name:path}", endpoints.models),
            Route("/health", health),
            Route("/metrics", metrics),
        ],
        # a page of another site that calls this machine by a name of its own (DNS rebinding)
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
        exception_handlers={HTTPException: refused},
        lifespan=lifespan,
    )
    made.state.service = service
    return made


def low_bit(model, cfg):
    """Linear layers in the bits that are asked for, in place -> the model. Raises UserError."""
    check(not (cfg.int8 and cfg.int4), "--int8 or --int4: one of them")
    if cfg.int8:
        return int8_layers(model)
    if cfg.int4:
        check(model.device.type == "cpu", "--int4 is a product of CPUs: say --device cpu")
        # SmolLM2 keeps the codes of its file; other models are rounded to such codes
        in_int4 = int4_smollm2 if cfg.model == "smollm2" else int4_layers
        return in_int4(model, prefill_int8=True)
    return model


def load(cfg: Config):
    """-> tokenizer, model in float32, in fewer bits if asked for, further arguments of Service."""
    on = run.device(cfg.device)
    # a folder of quantize.py, or ordinary weights
    if quantized_model.is_ours(cfg.model):
        plain = not cfg.int8 and not cfg.int4
        check(plain, "--int8, --int4: this model is quantised already; leave them out")
        tokenizer, model = quantized_model.load(cfg.model, on)
    else:
        tokenizer, model = decode.load(cfg.model, on)
    return tokenizer, low_bit(model.float(), cfg), {}


def ask(address, model, content, key=""):
    """One request for a chat, over HTTP -> the answer, as an object. content: a text, or parts of one."""
    body = {"model": model, "messages": [{"role": "user", "content": content}]}
    body |= {"max_tokens": 32, "temperature": 0}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"{address}/chat/completions", data, headers)
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.load(response)


def serve(cfg: Config, load, content) -> dict:
    """Serve until SIGTERM or Ctrl-C; writes what was served. load: flags -> tokenizer, model, further arguments
    of Service; content: what --once asks."""
    numbers = (cfg.blocks, cfg.block_size, cfg.max_batch, cfg.max_tokens)
    check(min(numbers) > 0 and cfg.waiting >= 0, "--blocks, --max-batch ...: at least 1")
    check(min(cfg.seconds, cfg.drain_seconds) > 0, "--seconds, --drain-seconds: above 0")
    check(0 <= cfg.port < 2**16, "--port must be from 0 to 65535")
    # who may ask: anybody on this machine, others with a key
    key = os.environ.get(KEY, "")
    private = is_loopback(cfg.host)
    safe = private or key or cfg.insecure
    check(safe, f"--host {printable(cfg.host)} serves others: set {KEY}, or say --insecure")
    # the port first: if it is taken, no weights are read in vain
    listening = bind(cfg.host, cfg.port)
    tokenizer, model, more = load(cfg)
    folder = run.output(cfg.out, cfg)
    # engine and application
    name = cfg.name or Path(cfg.model).name or "model"
    # layers of few bits take less time than the operations between them: fewer, larger ones
    llama = fused(model) if cfg.int8 or cfg.int4 else model
    engine = Engine(llama, cfg.blocks, cfg.block_size, cfg.max_batch, cfg.max_tokens)
    hosts = ("127.0.0.1", "localhost", "[::1]", "::1", cfg.host) if private else ("*",)
    about = {"key": key, "waiting": cfg.waiting, "request_seconds": cfg.seconds} | more
    made = app(model, tokenizer, engine, printable(name), hosts, **about)
    # port 0 has become a number
    host, port = listening.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"

    def ready():
        print(f"listening at {address}, model {printable(name)}", flush=True)
        if cfg.once:
            threading.Thread(target=ask_and_end).start()

    def ask_and_end():
        try:
            answer = ask(address, name, content, key)
            text = answer["choices"][0]["message"]["content"]
            print(clean(f"{cfg.prompt}\n{text}\n{answer['usage']}"))
            answers.append(answer)
        finally:
            server.handle_exit(0, None)

    # HTTP, until a signal ends it
    answers = []
    server = make_server(made, cfg.drain_seconds, ready)
    start = time.process_time()
    server.run(sockets=[listening])
    seconds = time.process_time() - start
    check(answers or not cfg.once, "--once: the request got no answer")
    # what was served
    counts = made.state.service.metrics
    metrics = {
        "requests": sum(counts.requests.values()),
        "prompt tokens": counts.prompt_tokens,
        "new tokens": counts.generated_tokens,
        "CPU seconds while serving": seconds,
        "weights, MB": bytes_held(model, engine.llama) / 1e6,
    }
    return run.report(folder, metrics, then="deploy/serve.md: curl, openai, load")


def main(cfg: Config) -> dict:
    """Serve a language model."""
    return serve(cfg, load, cfg.prompt)


if __name__ == "__main__":
    run.cli(main, Config)
