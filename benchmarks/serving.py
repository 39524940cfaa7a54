"""What serving adds to a model's own time: ours and peers', in one run.

Method: a DenseNet (107,000 weights, 240 x 240: about 4 ms an image on one core) as ONNX, on CPU; one image a request, raw
float32: as a binary tensor of the Open Inference Protocol v2 where the server speaks it, as the plain body where it does not, as
JSON where it takes nothing else (MLflow). Every server may use two threads or processes for the model. Raw and the peers take one
thread a call (THREADS_A_CALL gives the peers more); ours both for a call that is alone, one each where calls meet (ADR 10).
Clients are h2load (Debian: nghttp2-client), in C, on the same cores: one connection and one request under way each, HTTP/1.1 or
gRPC's HTTP/2. What the clients take (their CPU time is in the table) is lost to the server, not to raw. Raw is onnxruntime in a
process of its own, without a server: one thread for one client, two for more. Rounds alternate between all systems, and those
that are not measured are stopped (SIGSTOP); medians of rounds.

Promises: 0.8 of raw at 1, 8 and 32 clients by binary REST and by gRPC, prediction log on; p99 at one client within 1.5 times
raw's; through Envoy at least 0.9 of the same without it. `gRPC alone` is a server without a model: the share that is left when
its time is added to the model's is what gRPC in Python allows.

    make bench-serving                                  # all; ARGS="--systems raw,rest,grpc --clients 1" for some
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np

from radloop.serving import process

ROUNDS, SECONDS, THREADS = 3, 3, 2
SIZE, NAME = 240, "default"
HERE = Path(__file__).resolve().parent
BENCH = HERE.parent / ".venvs" / "bench" / "bin"
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


# What is sent


def write_bodies(folder: Path) -> int:
    """The request in its four forms: files `oip`, `raw`, `grpc`, `json`. Returns the length of the JSON in `oip`."""
    from radloop.serving.predictor.messages import MESSAGES

    tensor = image()
    told = {"name": "image", "shape": list(tensor.shape), "datatype": "FP32"}
    text = json.dumps({"inputs": [told | {"parameters": {"binary_data_size": tensor.nbytes}}]}).encode()
    (folder / "oip").write_bytes(text + tensor.tobytes())
    (folder / "raw").write_bytes(tensor.tobytes())
    (folder / "json").write_text('{"inputs": [[[' + ", ".join(map(_row, tensor[0, 0])) + "]]]}")
    request = MESSAGES["ModelInferRequest"](model_name=NAME)
    request.inputs.add(name="image", datatype="FP32", shape=tensor.shape)
    request.raw_input_contents.append(tensor.tobytes())
    message = request.SerializeToString()
    (folder / "grpc").write_bytes(b"\0" + len(message).to_bytes(4, "big") + message)
    return len(text)


def _row(values: np.ndarray) -> str:
    return "[" + ", ".join(map(str, values)) + "]"


class Target(msgspec.Struct, frozen=True):
    """Where requests go: a URL, the file of the body, headers; gRPC where `grpc`."""

    url: str
    body: Path
    headers: dict[str, str]
    grpc: bool = False


def load(target: Target, clients: int, seconds: int) -> Load:
    """What h2load measures: requests a second, seconds of each, those that failed, its own CPU time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = ["h2load", "-c", str(clients), "-m", "1", "-t", "1", "-D", str(seconds), "--log-file", str(log)]
        command += [] if target.grpc else ["--h1"]
        command += [f"-H{name}: {value}" for name, value in target.headers.items()]
        subprocess.run([*command, "-d", str(target.body), target.url], check=True, stdout=subprocess.DEVNULL)
        lines = log.read_text().split()  # none, where nothing was answered in time
        rows = np.array(lines, np.int64).reshape(-1, 3)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    good = rows[rows[:, 1] == 200]
    return {
        "rate": len(good) / seconds,
        "seconds": good[:, 2] / 1e6,
        "failed": len(rows) - len(good),
        "client_s": spent,
    }


# Systems


def raw(model: Path, clients: int, seconds: int) -> Load:
    """The model alone: one thread, or two that are never idle."""
    code = (
        "import sys, threading, time, json, numpy as np, onnxruntime as ort\n"
        "path, threads, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])\n"
        "o = ort.SessionOptions(); o.intra_op_num_threads = o.inter_op_num_threads = 1\n"
        f"x = np.random.default_rng(0).random((1, 1, {SIZE}, {SIZE}), np.float32)\n"
        "s = ort.InferenceSession(path, o); taken = []\n"
        "for _ in range(50): s.run(None, {'image': x})\n"
        "begun = time.process_time(); end = time.perf_counter() + seconds\n"
        "def work():\n"
        "    while (t := time.perf_counter()) < end:\n"
        "        s.run(None, {'image': x}); taken.append(time.perf_counter() - t)\n"
        "ts = [threading.Thread(target=work) for _ in range(threads)]\n"
        "[t.start() for t in ts]; [t.join() for t in ts]\n"
        "print(json.dumps({'rate': len(taken) / seconds, 'seconds': taken, 'server_s': time.process_time() - begun}))\n"
    )
    command = [sys.executable, "-c", code, str(model), str(min(clients, THREADS)), str(seconds)]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


class Server:
    """A server's processes: they run only while it is measured, and end with this one.

    Args:
        command: starts it.
        announces: its first line says, in JSON, where it listens.
        with_: another server that has to run too.
    """

    started: ClassVar[list[Server]] = []

    def __init__(self, command: list[str], *, announces: bool = False, with_: Server | None = None, **env: str) -> None:
        self.with_, self.errors = with_, Path(tempfile.mkstemp()[1])
        tied = [
            sys.executable,
            "-I",
            "-S",
            process.__file__,
            str(os.getpid()),
            *command,
        ]  # also when this one is killed
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                tied, stdout=subprocess.PIPE if announces else subprocess.DEVNULL, stderr=errors,
                start_new_session=True, env=os.environ | env, cwd=HERE / "peers",
            )  # fmt: skip
        with suppress(OSError):  # Linux shares the processor by sessions: a server's counts as much as this one
            share = Path("/proc/self/autogroup").read_text().split()[-1]
            Path(f"/proc/{self.process.pid}/autogroup").write_text(share)
        self.started.append(self)
        self.announced: dict[str, Any] = {}
        if announces:
            assert self.process.stdout is not None
            self.announced = json.loads(self.process.stdout.readline())

    def signal(self, number: int) -> None:
        """To all its processes."""
        for pid, _ in self._processes():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    @property
    def cpu_s(self) -> float:
        """Seconds of CPU that its processes, those that live, have used."""
        return sum(ticks for _, ticks in self._processes()) / os.sysconf("SC_CLK_TCK")

    def _processes(self) -> list[tuple[int, int]]:
        """All that descend from it, with the clock ticks that they have used."""
        family = {server.process.pid for server in (self, self.with_) if server is not None}
        every = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                told = stat.read_text().rpartition(")")[2].split()
                every[int(stat.parent.name)] = int(told[1]), int(told[11]) + int(told[12])
        while more := {pid for pid, (parent, _) in every.items() if parent in family} - family:
            family |= more
        return [(pid, every[pid][1]) for pid in family & every.keys()]

    def end(self) -> None:
        """For good."""
        self.signal(signal.SIGKILL)
        self.process.wait()
        self.errors.unlink(missing_ok=True)


def free_port() -> int:
    """A port nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ours(folder: Path) -> Server:
    """Our predictor, prediction log on."""
    (folder / "key").write_text(KEY)
    command = [sys.executable, "-m", "radloop.serving.predictor", "--package", str(folder / "package")]
    command += ["--key-file", str(folder / "key"), "--predictions", str(folder / "log"), "--grpc-port", "0"]
    return Server([*command, "--threads", str(THREADS)], announces=True)


def envoy(folder: Path, predictor: Server, port: int) -> Server:
    """Our gateway in front of our predictor."""
    from radloop.serving import gateway

    place, told = folder / "envoy", predictor.announced
    place.mkdir()
    upstream = gateway.Upstream(
        model_digest=told["model_digest"], version="1", port=told["port"], grpc_port=told["grpc_port"]
    )
    routes = gateway.Routes(champion=upstream, model_name=NAME)
    gateway.write_clusters(place, "1", routes)
    gateway.write_routes(place, "1", routes)
    configuration = gateway.bootstrap(place, host="127.0.0.1", port=port, admin_port=0)
    (place / "bootstrap.json").write_bytes(msgspec.json.encode(configuration))
    options = ["--concurrency", "2", "-l", "error", "--disable-hot-restart"]
    return Server([str(gateway.envoy_path()), "-c", str(place / "bootstrap.json"), *options], with_=predictor)


def systems(folder: Path, wanted: set[str]) -> dict[str, tuple[Server, Target]]:
    """Every system that is asked for, started, with where its requests go."""
    length, made = write_bodies(folder), {}
    binary = {"content-type": "application/octet-stream"}
    oip = binary | {"inference-header-content-length": str(length)}
    rpc = {"te": "trailers", "content-type": "application/grpc"}
    infer, method = f"/v2/models/{NAME}/infer", "/inference.GRPCInferenceService/ModelInfer"

    def at(port: int, path: str, body: str, headers: dict[str, str]) -> Target:
        return Target(f"http://127.0.0.1:{port}{path}", folder / body, headers, body == "grpc")

    peer = {"PEER_MODEL": str(folder / "package" / "model.onnx")}
    if wanted & {"rest", "grpc", "envoy", "envoy-grpc"}:
        mine = ours(folder)
        made["rest"] = mine, at(mine.announced["port"], infer, "oip", oip)
        made["grpc"] = mine, at(mine.announced["grpc_port"], method, "grpc", rpc)
    if wanted & {"envoy", "envoy-grpc"}:
        port = free_port()
        gate = envoy(folder, mine, port)
        made["envoy"] = gate, at(port, infer, "oip", oip)
        made["envoy-grpc"] = gate, at(port, method, "grpc", rpc)
    if "grpc-alone" in wanted:
        port = free_port()
        made["grpc-alone"] = Server([sys.executable, "grpc_empty.py", str(port)]), at(port, method, "grpc", rpc)
    if "litserve" in wanted:
        port = free_port()
        server = Server([str(BENCH / "python"), "litserve_peer.py", str(port)], **peer)
        made["litserve"] = server, at(port, "/infer", "raw", binary)
    if "bentoml" in wanted:
        port = free_port()
        command = [str(BENCH / "bentoml"), "serve", "bentoml_peer:Peer", "--host", "127.0.0.1", "--port", str(port)]
        made["bentoml"] = (
            Server(command, **peer, BENTOML_HOME=str(folder / "bento")),
            at(port, "/raw/infer", "raw", binary),
        )
    if wanted & {"kserve", "kserve-grpc"}:
        port, other = free_port(), free_port()
        server = Server([str(BENCH / "python"), "kserve_peer.py", str(port), str(other)], **peer)
        made["kserve"] = server, at(port, infer, "oip", oip)
        made["kserve-grpc"] = server, at(other, method, "grpc", rpc)
    if "mlflow" in wanted:
        made["mlflow"] = (
            mlflow(folder, port := free_port()),
            at(port, "/invocations", "json", {"content-type": "application/json"}),
        )
    return {name: one for name, one in made.items() if name in wanted}


def mlflow(folder: Path, port: int) -> Server:
    """MLflow's own server, two workers."""
    import mlflow.onnx
    import onnx

    mlflow.onnx.save_model(onnx.load(str(folder / "package" / "model.onnx")), str(folder / "mlflow"))
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "models",
        "serve",
        "-m",
        str(folder / "mlflow"),
        "--env-manager",
        "local",
    ]
    return Server(
        [*command, "-h", "127.0.0.1", "-p", str(port), "-w", "2"],
        PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    )


def is_right(name: str, target: Target, expected: float) -> bool:
    """Whether one request, sent by another client, gets the model's answer."""
    if target.grpc:
        import grpc

        from radloop.serving.predictor.messages import MESSAGES

        place = target.url.removeprefix("http://").partition("/")
        with grpc.insecure_channel(place[0]) as channel:
            ask = channel.unary_unary("/" + place[2], response_deserializer=MESSAGES["ModelInferResponse"].FromString)
            answer = ask(target.body.read_bytes()[5:], timeout=5)
        return name == "grpc-alone" or bool(answer.outputs)
    import httpx

    answer = httpx.post(target.url, content=target.body.read_bytes(), headers=target.headers, timeout=5)
    answer.raise_for_status()
    logistic = 1 / (1 + np.exp(-expected))
    return any(abs(number - wanted) < 1e-5 for number in numbers(answer.json()) for wanted in (expected, logistic))


def numbers(value: Any) -> Iterator[float]:
    """All floats in what JSON said."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from numbers(one)


def wait_for(made: dict[str, tuple[Server, Target]], expected: float, patience_s: float = 120) -> None:
    """Until all answer as the model does."""
    import grpc
    import httpx

    for name, (server, target) in made.items():
        deadline = time.monotonic() + patience_s
        while True:
            try:
                assert is_right(name, target, expected), f"{name} answers something else than the model"
                break
            except (httpx.HTTPError, grpc.RpcError):
                if server.process.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"{name} does not answer: {server.errors.read_text()[-2000:]}")
                time.sleep(0.2)


# Figures

TITLES = {
    "raw": "onnxruntime alone", "rest": "radloop, REST", "grpc": "radloop, gRPC", "envoy": "radloop, REST, Envoy",
    "envoy-grpc": "radloop, gRPC, Envoy", "grpc-alone": "gRPC alone, no model", "litserve": "LitServe",
    "bentoml": "BentoML", "kserve": "KServe, REST", "kserve-grpc": "KServe, gRPC", "mlflow": "mlflow models serve",
}  # fmt: skip


class Figures(msgspec.Struct, frozen=True):
    """Medians over rounds: requests a second; p50, p99 and CPU time of server and client a request, in milliseconds."""

    rate: float
    p50: float
    p99: float
    server: float
    client: float
    failed: int

    @classmethod
    def of(cls, loads: list[Load]) -> Figures:
        """Of the rounds of one system."""

        def middle(value: Callable[[Load], float]) -> float:
            return float(statistics.median(map(value, loads)))

        return cls(
            rate=middle(lambda one: one["rate"]),
            p50=middle(lambda one: float(np.percentile(one["seconds"], 50))) * 1e3,
            p99=middle(lambda one: float(np.percentile(one["seconds"], 99))) * 1e3,
            server=middle(lambda one: one["server_s"] / len(one["seconds"])) * 1e3,
            client=middle(lambda one: one.get("client_s", 0.0) / len(one["seconds"])) * 1e3,
            failed=sum(one.get("failed", 0) for one in loads),
        )


def measure(folder: Path, made: dict[str, tuple[Server, Target]], clients: int, options: Any) -> dict[str, Figures]:
    """All systems, in turns."""
    loads: dict[str, list[Load]] = {name: [] for name in ("raw", *made)}
    for _ in range(options.rounds):
        loads["raw"].append(raw(folder / "package" / "model.onnx", clients, options.seconds))
        for name, (server, target) in made.items():
            server.signal(signal.SIGCONT)
            load(target, clients, 1)
            before = server.cpu_s
            one = load(target, clients, options.seconds)
            loads[name].append(one | {"server_s": server.cpu_s - before})
            server.signal(signal.SIGSTOP)
    return {name: Figures.of(several) for name, several in loads.items()}


def report(clients: int, told: dict[str, Figures]) -> bool:
    """A table; whether all promises are kept."""
    base = told["raw"]
    print(f"\n{clients} clients{'':15}  req/s   p50 ms   p99 ms   of raw   CPU ms: server, client")
    for name, one in told.items():
        line = f"  {TITLES[name]:22} {one.rate:6.0f} {one.p50:8.2f} {one.p99:8.2f} {one.rate / base.rate:8.2f}"
        print(f"{line}   {one.server:8.2f} {one.client:8.2f}" + (f"  {one.failed} failed" if one.failed else ""))
    if "grpc-alone" in told:
        alone = told["grpc-alone"]
        limit = base.server / (base.server + alone.server + alone.client)
        print(f"  what gRPC in Python allows: {limit:.2f} of raw")
    broken = [name for name in ("rest", "grpc") if name in told and told[name].rate < 0.8 * base.rate]
    if clients == 1:
        broken += [f"{name}, p99" for name in ("rest", "grpc") if name in told and told[name].p99 > 1.5 * base.p99]
    for name, without in (("envoy", "rest"), ("envoy-grpc", "grpc")):
        broken += [name] if {name, without} <= told.keys() and told[name].rate < 0.9 * told[without].rate else []
    if broken:
        print("  NOT KEPT: " + "; ".join(broken))
    return not broken


def main() -> int:
    """Measure, print tables, say which promise is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=SECONDS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--systems", default=",".join(TITLES))
    options = parser.parse_args()
    if shutil.which("h2load") is None:
        sys.exit("h2load is missing; next: sudo apt-get install -y nghttp2-client")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what is below ends its servers
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build(folder / "package")
        from radloop.learning.package import Packaged

        expected = float(Packaged(folder / "package").logits(image())[0])
        try:
            made = systems(folder, set(options.systems.split(",")))
            wait_for(made, expected)
            for server, _ in made.values():
                server.signal(signal.SIGSTOP)
            print(f"{os.cpu_count()} cores; {options.rounds} rounds of {options.seconds} s; {SIZE} x {SIZE}")
            counts = [int(count) for count in options.clients.split(",")]
            kept = [report(clients, measure(folder, made, clients, options)) for clients in counts]
        finally:
            for server in Server.started:
                server.end()
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())
