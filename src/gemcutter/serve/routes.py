"""The routes: read a request, check it, hand it to the engine, shape the answer."""

import time

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from gemcutter.serve import metrics
from gemcutter.serve.errors import ApiError, bad_request
from gemcutter.serve.gate import KeyGate, read_json
from gemcutter.serve.reply import Reply
from gemcutter.serve.schema import (
    COMPLETION_TOKENS,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    parse,
    prompts_of,
)
from gemcutter.serve.service import Service, new_id
from gemcutter.serve.shapes import ChatShape, CompletionShape


def build_app(service: Service) -> Starlette:
    """The ASGI application of one served model."""
    config = service.config

    async def read(request: Request, kind: type):
        ask = parse(await read_json(request, config.max_body_bytes), kind)
        service.check_model(ask.model)
        return ask

    async def completions(request: Request) -> Response:
        arrival = time.monotonic()
        ask = await read(request, CompletionRequest)
        clip = ask.max_tokens is None  # only a default may be cut
        params = ask.params(COMPLETION_TOKENS if clip else ask.max_tokens, ask.logprobs)
        prompts, id = prompts_of(ask), new_id("cmpl")
        service.bridge.check_room(len(prompts) * params.n)
        requests = []
        for place, prompt in enumerate(prompts):
            requests += await service.requests(prompt, params, f"{id}-{place}", clip)
        shape = CompletionShape(
            id, service.name, service.tokenizer, bool(ask.return_token_ids), params.logprobs is not None
        )
        return Reply(service.answer(requests, params.n, arrival), shape, bool(ask.stream), _include_usage(ask))

    async def chat(request: Request) -> Response:
        arrival = time.monotonic()
        ask = await read(request, ChatRequest)
        if ask.top_logprobs and not ask.logprobs:
            raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")
        max_tokens = ask.max_tokens if ask.max_completion_tokens is None else ask.max_completion_tokens
        params = ask.params(max_tokens, (ask.top_logprobs or 0) if ask.logprobs else None)
        service.bridge.check_room(params.n)
        tools = None if ask.tool_choice == "none" else ask.tools
        prompt = await service.render(
            ask.messages, tools, ask.add_generation_prompt, ask.chat_template_kwargs or {}
        )
        id = new_id("chatcmpl")
        requests = await service.requests(prompt, params, id)
        shape = ChatShape(id, service.name, service.tokenizer, bool(ask.return_token_ids), bool(ask.logprobs))
        return Reply(service.answer(requests, params.n, arrival), shape, bool(ask.stream), _include_usage(ask))

    async def tokenize(request: Request) -> Response:
        ask = await read(request, TokenizeRequest)
        if (ask.prompt is None) == (ask.messages is None):
            raise bad_request("give either prompt or messages", "prompt")
        if ask.messages is not None:
            kwargs = ask.chat_template_kwargs or {}
            ids = await service.render(ask.messages, ask.tools, ask.add_generation_prompt, kwargs)
        else:
            ids = await service.encode(ask.prompt, ask.add_special_tokens)
        texts = await service.token_texts(ids) if ask.return_token_strs else None
        return _json(
            {"count": len(ids), "max_model_len": service.context_length, "tokens": ids, "token_strs": texts}
        )

    async def detokenize(request: Request) -> Response:
        ask = await read(request, DetokenizeRequest)
        return _json({"prompt": await service.decode(ask.tokens)})

    async def models(request: Request) -> Response:
        return _json({"object": "list", "data": [_card(service)]})

    async def model(request: Request) -> Response:
        service.check_model(request.path_params["name"])
        return _json(_card(service))

    async def health(request: Request) -> Response:
        return _json({"status": service.state}, 200 if service.state == "ok" else 503)

    async def prometheus(request: Request) -> Response:
        service.metrics.stats = service.bridge.stats
        return Response(service.metrics.text(), media_type=metrics.CONTENT_TYPE)

    async def refused(request: Request, error: ApiError) -> Response:
        return error.response()

    async def unrouted(request: Request, error: HTTPException) -> Response:
        what = {404: "no such route", 405: "method not allowed"}.get(error.status_code, str(error.detail))
        return ApiError(error.status_code, f"{what}: {request.method} {request.url.path[:200]}").response()

    async def left(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=400)  # no one reads it

    async def broken(request: Request, error: Exception) -> Response:
        # uvicorn logs the traceback
        return ApiError(500, "internal error; the server's log has the details").response()

    routes = [
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/health", health),
        Route("/metrics", prometheus),
    ]
    errors = {ApiError: refused, HTTPException: unrouted, ClientDisconnect: left, Exception: broken}
    return Starlette(routes=routes, middleware=[Middleware(KeyGate, config.api_key)], exception_handlers=errors)


def _include_usage(ask: CompletionRequest | ChatRequest) -> bool:
    return ask.stream_options is not None and ask.stream_options.include_usage


def _card(service: Service) -> dict:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "gemcutter",
        "root": service.config.model_path,
        "parent": None,
        "max_model_len": service.context_length,
    }


def _json(content: dict, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")
