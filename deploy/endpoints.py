"""What each address of the server does: read, check, prepare in the thread of the engine, answer.

A request holds a ticket from the moment it is accepted until its answer is written, its client has left or
its time is over; whichever it is, the ticket is closed, and the blocks of its answers are free.
"""

import asyncio
import logging
import time

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from deploy import protocol, responses
from deploy.answers import Answers, EventStream, unless_left
from deploy.protocol_error import ProtocolError, require
from deploy.service import Service
from utils.run import UserError

log = logging.getLogger("deploy.serve")
LEFT = 499  # the client has gone: nobody reads this


def json_response(content, status=200, headers=None):
    return Response(responses.dump(content), status, headers, "application/json")


def error_response(error: ProtocolError):
    """A refusal; with 429 and 503, when to come back."""
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    return json_response(error.body(), error.status, headers)


def endpoint(service: Service, handler):
    """A function (service, request) -> Response as an address: errors become those of the protocol."""

    async def answer(request: Request):
        try:
            service.check_key(request.headers.get("authorization", ""))
            response = await handler(service, request)
        except ProtocolError as error:
            response = error_response(error)
        except UserError as error:
            response = error_response(ProtocolError(str(error)))
        except ClientDisconnect:
            service.metrics.cancelled += 1
            response = Response(status_code=LEFT)
        except Exception:
            log.exception("%s failed", request.url.path)
            response = error_response(ProtocolError("the server has failed", status=500))
        service.metrics.count(request.scope["route"].path, response.status_code)
        return response

    return answer


async def read_body(service, request):
    """The JSON object of a request. Raises ProtocolError: of another type, too large, too slow."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # other pages of a browser can send any other type without asking
    require(kind == "application/json", "Content-Type must be application/json", status=415)
    # bounded in time and bytes: a slow or endless body holds nothing up
    raw = bytearray()
    try:
        async with asyncio.timeout(service.body_seconds):
            async for chunk in request.stream():
                raw += chunk
                small = len(raw) <= service.body_bytes
                require(small, f"a body has at most {service.body_bytes} bytes", status=413)
    except TimeoutError:
        raise ProtocolError("the body took too long", status=408) from None
    return protocol.parse_json(bytes(raw))


async def chat(service: Service, request: Request):
    """/v1/chat/completions"""
    asked = protocol.parse_chat(await read_body(service, request), service.limits)
    return await generate(service, request, asked)


async def completions(service: Service, request: Request):
    """/v1/completions"""
    asked = protocol.parse_completion(await read_body(service, request), service.limits)
    return await generate(service, request, asked)


async def generate(service, request, asked):
    """Text for a checked request: whole, or as a stream."""
    # refuse what cannot be answered, before it takes a place
    service.check_model(asked.model)
    service.check_open()
    began = time.monotonic()
    ticket = service.engine_loop.open(len(asked.prompts) * asked.n)
    require(ticket, "too many requests are waiting; try again later", status=429, code="queue_full")
    stays_open = False
    try:
        # prompts, samplers and masks are made by the thread that owns the model
        wanted = await service.engine_loop.run(service.prepare, asked)
        await service.engine_loop.run(service.engine_loop.submit, ticket, wanted)
        # each prompt is counted once, however many answers it has
        prompt_tokens = sum(len(prompt) for prompt, _, _ in wanted[:: asked.n])
        service.metrics.prompt_tokens += prompt_tokens
        answers = Answers(service, asked, ticket, began, prompt_tokens)
        # a stream closes the ticket itself, at its end
        if asked.stream:
            stays_open = True
            return EventStream(answers)
        return json_response(await unless_left(request, answers.whole()))
    finally:
        if not stays_open:
            service.engine_loop.close(ticket)


async def embeddings(service: Service, request: Request):
    """/v1/embeddings: mean of the last hidden states, of length 1."""
    texts, encoding, model = protocol.parse_embedding(await read_body(service, request))
    service.check_model(model)
    service.check_open()
    ticket = service.engine_loop.open(1)
    require(ticket, "too many requests are waiting; try again later", status=429, code="queue_full")
    try:
        vectors = []
        tokens = 0
        # one text between two steps: answers go on meanwhile
        for text in texts:
            ids, vector = await service.engine_loop.run(service.embed, text)
            vectors.append(vector.tolist())
            tokens += len(ids)
    finally:
        service.engine_loop.close(ticket)
    return json_response(responses.embeddings(vectors, encoding, service.name, tokens))


async def models(service: Service, request: Request):
    """/v1/models, /v1/models/{name}"""
    # the list, or the one that is named
    found = responses.models(service.name, service.created)
    name = request.path_params.get("name")
    if name is None:
        return json_response(found)
    service.check_model(name)
    return json_response(found["data"][0])
