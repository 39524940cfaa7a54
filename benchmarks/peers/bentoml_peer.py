"""BentoML: a service with two threads; the raw body by a mounted ASGI application, its documented way to whatever is no JSON."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import bentoml
from session import image, session
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

model, threads = session(), ThreadPoolExecutor(2)


def predict(data: bytes) -> float:
    """The logit of one image."""
    return float(model.run(None, {"image": image(data)})[0].item())


async def infer(request: Request) -> JSONResponse:
    """One request."""
    logit = await asyncio.get_running_loop().run_in_executor(threads, predict, await request.body())
    return JSONResponse({"logit": logit})


@bentoml.service(workers=1, traffic={"timeout": 60, "max_concurrency": 256})
@bentoml.asgi_app(Starlette(routes=[Route("/infer", infer, methods=["POST"])]), path="/raw")
class Peer:
    """Has nothing else."""
