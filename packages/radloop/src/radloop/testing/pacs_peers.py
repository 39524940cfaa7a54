"""Real PACS on loopback: Orthanc (DIMSE and DICOMweb) and dcmtk's dcmqrscp, each ended with the process that started it."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from radloop.testing.modality import send

_READY_S = 60.0
_PLUGIN = "libOrthancDicomWeb.so"
_PLUGINS = Path("/usr/share/orthanc/plugins")
# The child asks the kernel to be ended when its parent is: a killed test leaves no server behind.
_WITH_PARENT = (
    "import ctypes,os,sys;ctypes.CDLL(None).prctl(1,9);os.getppid()=={parent} or os._exit(1);"
    "os.execvp(sys.argv[1],sys.argv[1:])"
)


def free_port() -> int:
    """A port that nothing listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class _Server:
    """A program in the background, with TCP_NODELAY (dcmtk reads it from the environment), its output in a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._process: subprocess.Popen[bytes] | None = None

    def _run(self, *command: str, env: dict[str, str] | None = None) -> None:
        with (self.folder / "log.txt").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _WITH_PARENT.format(parent=os.getpid()), *command],
                cwd=self.folder,
                env={**os.environ, "TCP_NODELAY": "1", **(env or {})},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _await(self, port: int) -> None:
        until = time.monotonic() + _READY_S
        while True:
            assert self._process is not None and self._process.poll() is None, (self.folder / "log.txt").read_text()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            assert time.monotonic() < until, "not ready within a minute"
            time.sleep(0.05)

    def kill(self) -> None:
        """End it as a power failure would."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()
            self._process = None

    def start(self) -> None:
        """Start it, again after `kill` too, on the same ports with what it stored."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _tb: TracebackType | None
    ) -> None:
        self.stop()


class Orthanc(_Server):
    """Orthanc with its DICOMweb plugin. It lets anybody but `move_ae` search and fetch only under `calling`.

    Attributes:
        port: of DIMSE; called AE title ORTHANC.
        url: of DICOMweb; user `radloop`, password `password`.
    """

    title = "ORTHANC"

    def __init__(self, folder: Path, *, calling: str = "RADLOOP", move_port: int = 0, **more: object) -> None:
        super().__init__(folder)
        self.port, self._http = free_port(), free_port()
        self.password = secrets.token_hex(8)
        self.url = f"http://127.0.0.1:{self._http}/dicom-web"
        self.rest = f"http://127.0.0.1:{self._http}"
        settings = {
            "Name": "test",
            "StorageDirectory": str(folder / "storage"),
            "IndexDirectory": str(folder / "storage"),
            "Plugins": [str(_PLUGINS / _PLUGIN)],
            "DicomServerEnabled": True,
            "DicomAet": self.title,
            "DicomCheckCalledAet": True,
            "DicomPort": self.port,
            "DicomModalities": {"us": [calling, "127.0.0.1", move_port or 1], "send": ["SENDER", "127.0.0.1", 1]},
            "DicomAlwaysAllowEcho": False,
            "DicomAlwaysAllowStore": False,
            "DicomAlwaysAllowFind": False,
            "DicomAlwaysAllowGet": False,
            "DicomCheckModalityHost": False,
            "HttpPort": self._http,
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": True,
            "RegisteredUsers": {"radloop": self.password},
            "UnknownSopClassAccepted": True,
            "DefaultEncoding": "Utf8",
            "StorageCompression": False,
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/", "EnableWado": False},
            **more,
        }
        (folder / "orthanc.json").write_text(json.dumps(settings))

    def start(self) -> None:
        """Start it and wait until both ports answer."""
        self._run("Orthanc", str(self.folder / "orthanc.json"))
        self._await(self._http)
        self._await(self.port)

    def store(self, files: Iterable[Path]) -> None:
        """Give it instances."""
        with httpx.Client(auth=("radloop", self.password), trust_env=False, timeout=60) as client:
            for path in files:
                client.post(f"{self.rest}/instances", content=path.read_bytes()).raise_for_status()


class Dcmqrscp(_Server):
    """dcmtk's query/retrieve SCP: called AE title DCMQRSCP; it knows RADLOOP (for C-MOVE at `move_port`) and SENDER."""

    title = "DCMQRSCP"

    def __init__(self, folder: Path, *, calling: str = "RADLOOP", move_port: int = 0) -> None:
        super().__init__(folder)
        self.port = free_port()
        (folder / "db").mkdir(exist_ok=True)
        (folder / "dcmqrscp.cfg").write_text(
            f"NetworkTCPPort = {self.port}\nMaxPDUSize = 131072\nMaxAssociations = 16\n"
            f"HostTable BEGIN\nus = ({calling}, localhost, {move_port or 1})\nsend = (SENDER, localhost, 1)\n"
            "peers = us, send\nHostTable END\nVendorTable BEGIN\nVendorTable END\n"
            f"AETable BEGIN\n{self.title} {folder / 'db'} RW (1000, 1024mb) peers\nAETable END\n"
        )

    def start(self) -> None:
        """Start it; it keeps and sends JPEG 2000 as it is."""
        self._run("dcmqrscp", "+xv", "-xv", "-c", str(self.folder / "dcmqrscp.cfg"))
        self._await(self.port)

    def store(self, files: Iterable[Path]) -> None:
        """Give it instances."""
        answers = send(files, "127.0.0.1", self.port, calling_ae="SENDER", called_ae=self.title)
        assert set(answers) == {"0000"}, answers
