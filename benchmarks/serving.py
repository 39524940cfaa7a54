"""What serving adds to a model's own time: ours and peers', in one run.

Method: a DenseNet (107,000 weights, 192 x 192) as ONNX, on CPU. Clients are threads of one process of their own, each with one
connection and one request under way: raw sockets that send prepared bytes (HTTP/1.1) or a gRPC stub that sends them, so that the
client costs next to nothing; one image a request, as a binary tensor of the Open Inference Protocol v2 where the server speaks
it. Raw is onnxruntime in a process of its own, without a server: one thread for one client, two for more (as many as the server
may use). Rounds alternate: raw, ours, peers, raw, ours, peers; medians of rounds; req/s, p50 and p99 in ms, share of raw.

Promises: 0.8 of raw at 1, 8 and 32 clients by binary REST and by gRPC, prediction log on; p99 at one client within 1.5 times
raw's; through Envoy at least 0.9 of the same without it.

    make bench-serving
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

CLIENTS, ROUNDS, SECONDS, THREADS = (1, 8, 32), 3, 4.0, 2
SIZE, NAME = 192, "default"
HERE = Path(__file__).resolve().parent
KEY = bytes(range(32)).hex()
Load = dict[str, Any]


def build(folder: Path) -> None:
    """A package with random weights: what is computed does not matter, how long it takes does."""
    import torch

    from radloop.dicom.uids import Pseudonymiser
    from radloop.imaging.transforms import Preprocessing
    from radloop.learning import network, package
    from radloop.learning.decision import Decision

    torch.manual_seed(0)
    folder.mkdir()
    preprocessing = Preprocessing(size=SIZE)
    parts = {
        "preprocessing": preprocessing,
        "decision": Decision(slope=1.0, intercept=0.0, threshold=0.5, prevalence=0.1),
        "inputs": package.Inputs(modalities=["DX"], size=SIZE, positive="finding", negative="none"),
        "identity": package.Identity(
            task="finding", model_digest="1" * 64, dataset_digest="0" * 64, preprocessing_digest=preprocessing.digest,
            key_id=Pseudonymiser(bytes.fromhex(KEY)).key_id, radloop="none",
        ),
    }  # fmt: skip
    for name, value in parts.items():
        (folder / f"{name}.json").write_bytes(msgspec.json.encode(value))
    package.export(network.create(network.architecture("densenet")), SIZE, folder / "model.onnx")
    opened = package.Packaged(folder)
    package._write_reference(opened, folder / "reference.npz")


def image() -> np.ndarray:
    """One preprocessed image."""
    return np.random.default_rng(0).random((1, 1, SIZE, SIZE), np.float32)


# What is measured: each gives requests a second and latencies


def raw(model: Path, clients: int, seconds: float) -> Load:
    """The model alone: one thread, or two that are never idle."""
    code = (
        "import sys, threading, time, json, numpy as np, onnxruntime as ort\n"
        "path, threads, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])\n"
        "o = ort.SessionOptions(); o.intra_op_num_threads = o.inter_op_num_threads = 1\n"
        f"s = ort.InferenceSession(path, o); x = np.zeros((1, 1, {SIZE}, {SIZE}), np.float32)\n"
        "taken = []\n"
        "for _ in range(50): s.run(None, {'image': x})\n"
        "end = time.perf_counter() + seconds\n"
        "def work():\n"
        "    while (t := time.perf_counter()) < end:\n"
        "        s.run(None, {'image': x}); taken.append(time.perf_counter() - t)\n"
        "ts = [threading.Thread(target=work) for _ in range(threads)]\n"
        "[t.start() for t in ts]; [t.join() for t in ts]\n"
        "print(json.dumps({'rate': len(taken) / seconds, 'seconds': taken}))\n"
    )
    command = [sys.executable, "-c", code, str(model), str(min(clients, THREADS)), str(seconds)]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def driven(kind: str, target: str, payload: Path, clients: int, seconds: float) -> Load:
    """The load of a client process (this file again)."""
    command = [sys.executable, __file__, "--drive", kind, target, str(payload), str(clients), str(seconds)]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def drive(kind: str, target: str, payload: Path, clients: int, seconds: float) -> None:
    """Be the clients: `clients` threads, one request each under way."""
    data, taken, failed = payload.read_bytes(), [], []
    begin = threading.Barrier(clients)

    def work() -> None:
        ask = (_http if kind == "http" else _grpc)(target, data)
        for _ in range(3):
            ask()
        begin.wait()
        end = time.perf_counter() + seconds
        while (started := time.perf_counter()) < end:
            (taken if ask() else failed).append(time.perf_counter() - started)

    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps({"rate": len(taken) / seconds, "seconds": taken, "failed": len(failed)}))


def _http(target: str, data: bytes) -> Callable[[], bool]:
    host, _, port = target.rpartition(":")
    link = socket.create_connection((host, int(port)))
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask() -> bool:
        link.sendall(data)
        answer = link.recv(65536)
        while b"\r\n\r\n" not in answer:
            answer += link.recv(65536)
        head, _, body = answer.partition(b"\r\n\r\n")
        length = next(int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
        while len(body) < length:
            body += link.recv(65536)
        return head.startswith(b"HTTP/1.1 200")

    return ask


def _grpc(target: str, data: bytes) -> Callable[[], bool]:
    import grpc

    channel = grpc.insecure_channel(target, options=[("grpc.use_local_subchannel_pool", 1)])
    call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")

    def ask() -> bool:
        return bool(call(data, timeout=60))

    return ask


def http_request(path: str, body: bytes, **headers: str) -> bytes:
    """A whole HTTP/1.1 request."""
    told = {"host": "127.0.0.1", "content-length": str(len(body))} | headers
    return "\r\n".join([f"POST {path} HTTP/1.1", *(f"{k}: {v}" for k, v in told.items()), "", ""]).encode() + body


def oip_request() -> bytes:
    """One image as a binary tensor."""
    tensor = image()
    told = {"name": "image", "shape": list(tensor.shape), "datatype": "FP32"}
    text = json.dumps({"inputs": [told | {"parameters": {"binary_data_size": tensor.nbytes}}]}).encode()
    length = {"inference-header-content-length": str(len(text)), "content-type": "application/octet-stream"}
    return http_request(f"/v2/models/{NAME}/infer", text + tensor.tobytes(), **length)


def grpc_request() -> bytes:
    """The same, as a gRPC message."""
    from radloop.serving.predictor.messages import MESSAGES

    request = MESSAGES["ModelInferRequest"](model_name=NAME)
    request.inputs.add(name="image", datatype="FP32", shape=[1, 1, SIZE, SIZE])
    request.raw_input_contents.append(image().tobytes())
    return bytes(request.SerializeToString())


@contextmanager
def ours(folder: Path) -> Iterator[dict[str, Any]]:
    """Our predictor, prediction log on; yields what it announced."""
    (folder / "key").write_text(KEY)
    command = [sys.executable, "-m", "radloop.serving.predictor", "--package", str(folder / "package")]
    command += ["--key-file", str(folder / "key"), "--predictions", str(folder / "log"), "--grpc-port", "0"]
    process = subprocess.Popen([*command, "--threads", str(THREADS)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())
    finally:
        process.terminate()
        process.wait()


@contextmanager
def envoy(folder: Path, predictor: dict[str, Any]) -> Iterator[int]:
    """Our gateway in front of one predictor; yields its port."""
    from radloop.serving import gateway

    place = folder / "envoy"
    place.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    upstream = gateway.Upstream(model_digest=predictor["model_digest"], version="1", port=predictor["port"])
    routes = gateway.Routes(champion=upstream, model_name=NAME)
    gateway.write_clusters(place, "1", routes)
    gateway.write_routes(place, "1", routes)
    (place / "bootstrap.json").write_bytes(
        msgspec.json.encode(gateway.bootstrap(place, host="127.0.0.1", port=port, admin_port=0))
    )
    command = [
        str(gateway.envoy_path()),
        "-c",
        str(place / "bootstrap.json"),
        "--concurrency",
        "1",
        "-l",
        "error",
        "--disable-hot-restart",
    ]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", port), 0.2).close()
                break
            except OSError:
                time.sleep(0.1)
        time.sleep(2)
        yield port
    finally:
        process.terminate()
        process.wait()


def figures(loads: list[Load]) -> tuple[float, float, float]:
    """Medians over rounds: requests a second, p50 and p99 in milliseconds."""
    middle = [float(np.percentile(load["seconds"], 50)) * 1e3 for load in loads]
    tail = [float(np.percentile(load["seconds"], 99)) * 1e3 for load in loads]
    return statistics.median(load["rate"] for load in loads), statistics.median(middle), statistics.median(tail)


def main() -> int:
    """Measure, print a table, say which promise is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        build(folder / "package")
        (folder / "http").write_bytes(oip_request())
        (folder / "grpc").write_bytes(grpc_request())
        told = stack.enter_context(ours(folder))
        gate = stack.enter_context(envoy(folder, told))
        systems: dict[str, Callable[[int, float], Load]] = {
            "raw onnxruntime": lambda n, s: raw(folder / "package" / "model.onnx", n, s),
            "radloop REST": lambda n, s: driven("http", f"127.0.0.1:{told['port']}", folder / "http", n, s),
            "radloop gRPC": lambda n, s: driven("grpc", f"127.0.0.1:{told['grpc_port']}", folder / "grpc", n, s),
            "radloop REST, Envoy": lambda n, s: driven("http", f"127.0.0.1:{gate}", folder / "http", n, s),
        }
        return report(systems, options.rounds, options.seconds)


def report(systems: dict[str, Callable[[int, float], Load]], rounds: int, seconds: float) -> int:
    """A table for each number of clients; 1 where a promise is not kept."""
    kept = True
    print(f"{os.cpu_count()} cores; {rounds} rounds of {seconds:g} s")
    for clients in CLIENTS:
        loads: dict[str, list[Load]] = {name: [] for name in systems}
        for _ in range(rounds):
            for name, run in systems.items():
                loads[name].append(run(clients, seconds))
        told = {name: figures(found) for name, found in loads.items()}
        base = told["raw onnxruntime"]
        print(f"\n{clients} clients{'':16}  req/s   p50 ms   p99 ms   of raw")
        for name, (rate, middle, tail) in told.items():
            lost = sum(load.get("failed", 0) for load in loads[name])
            print(
                f"  {name:24} {rate:6.0f} {middle:8.2f} {tail:8.2f} {rate / base[0]:8.2f}"
                + (f"  {lost} failed" if lost else "")
            )
        for name in ("radloop REST", "radloop gRPC"):
            if told[name][0] < 0.8 * base[0] or (clients == 1 and told[name][2] > 1.5 * base[2]):
                kept = False
                print(f"  NOT KEPT: {name}")
        if told["radloop REST, Envoy"][0] < 0.9 * told["radloop REST"][0]:
            kept = False
            print("  NOT KEPT: through Envoy")
    return 0 if kept else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--drive"]:
        drive(sys.argv[2], sys.argv[3], Path(sys.argv[4]), int(sys.argv[5]), float(sys.argv[6]))
        sys.exit(0)
    sys.exit(main())
