"""KServe's own Python server: Open Inference Protocol v2 by REST and gRPC. Ports: argv[1], argv[2]."""

from __future__ import annotations

import asyncio
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import grpc
import kserve
import numpy as np
import uvicorn
from kserve import InferOutput, InferRequest, InferResponse
from session import session

threads = ThreadPoolExecutor(2)


class Peer(kserve.Model):
    """The model, in two threads: `predict` as a plain function would hold up the event loop."""

    def __init__(self) -> None:
        super().__init__("default")
        self.session = session()
        self.ready = True

    async def predict(self, payload: InferRequest, headers: dict[str, str] | None = None, *_: object) -> InferResponse:
        """One request."""
        logits = await asyncio.get_running_loop().run_in_executor(threads, self.run, payload.inputs[0].as_numpy())
        output = InferOutput(name="logit", shape=list(logits.shape), datatype="FP32")
        output.set_data_from_numpy(logits, binary_data=False)
        return InferResponse(response_id=payload.id or "", model_name="default", infer_outputs=[output])

    def run(self, images: np.ndarray) -> np.ndarray:
        """Logits."""
        return self.session.run(None, {"image": images})[0]


def stay_at_home() -> None:
    """KServe listens on all interfaces and has no option for another one."""
    config, listen = uvicorn.Config.__init__, grpc.aio.Server.add_insecure_port
    uvicorn.Config.__init__ = lambda self, *a, **k: config(self, *a, **{**k, "host": "127.0.0.1"})
    grpc.aio.Server.add_insecure_port = lambda self, at: listen(self, at.replace("[::]", "127.0.0.1"))


if __name__ == "__main__":
    stay_at_home()
    os.environ.setdefault("KSERVE_LOGLEVEL", "ERROR")
    server = kserve.ModelServer(
        http_port=int(sys.argv[1]),
        grpc_port=int(sys.argv[2]),
        workers=1,
        enable_latency_logging=False,
        access_log_format=None,
    )
    server.start([Peer()])
