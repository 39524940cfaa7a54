# ruff: noqa: I002 - LitServe reads annotations as values
"""LitServe: the raw body by a FastAPI dependency, two workers (a process each), its zero-copy queue. Port: argv[1]."""

import sys
from typing import Annotated

import litserve
from fastapi import Depends, Request
from session import image, session


async def body(request: Request) -> bytes:
    """The request's body as it came."""
    return await request.body()


class Peer(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.session = session()

    def decode_request(self, request: Annotated[bytes, Depends(body)]) -> bytes:
        return request

    def predict(self, data: bytes) -> float:
        return float(self.session.run(None, {"image": image(data)})[0].item())

    def encode_response(self, logit: float) -> dict[str, float]:
        return {"logit": logit}


if __name__ == "__main__":
    server = litserve.LitServer(
        Peer(api_path="/infer"), accelerator="cpu", workers_per_device=2, timeout=60, fast_queue=True
    )
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="error")
