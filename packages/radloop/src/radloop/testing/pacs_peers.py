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
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import httpx

from radloop.testing.modality import send

if TYPE_CHECKING:
    from radloop.dicom.pacs import Pacs

_READY_S = 120.0
_PLUGIN = "libOrthancDicomWeb.so"
_PLUGINS = Path("/usr/share/orthanc/plugins")
# To the kernel the parent is the thread that made the child: one that lives as long as this process.
_STARTER = ThreadPoolExecutor(1, thread_name_prefix="pacs")
# The child asks the kernel to be ended when its parent is: a killed test leaves no server behind.
_WITH_PARENT = (
    "import ctypes,os,sys;ctypes.CDLL(None).prctl(1,9);os.getppid()=={parent} or os._exit(1);"
    "os.execvp(sys.argv[1],sys.argv[1:])"
)


def has_dicomweb() -> bool:
    """Whether Orthanc's DICOMweb plugin is installed."""
    return (_PLUGINS / _PLUGIN).exists()


def free_port() -> int:
    """A port that nothing listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class _Dimse:
    """How a PACS is spoken to by DIMSE: C-GET, or C-MOVE where `moves`."""

    title = ""
    port = 0
    move_port: int | None = 0
    moves = False

    def pacs(self, **changes: Any) -> Pacs:
        """An adapter."""
        from radloop.dicom.pacs.dimse import Address, Dimse

        address = Address(host="127.0.0.1", port=self.port, called=self.title)
        return Dimse("main", address, move_port=self.move_port, move_first=self.moves, **{"timeout_s": 15.0, **changes})

    def stranger(self) -> Pacs:
        """One under an AE title that the PACS does not know."""
        from radloop.dicom.pacs.dimse import Address, Dimse

        address = Address(host="127.0.0.1", port=self.port, called=self.title, calling="STRANGER")
        return Dimse("main", address, timeout_s=15.0)

    def toml(self) -> str:
        """Its section."""
        return (
            f'[pacs.main]\nkind = "dimse"\nhost = "127.0.0.1"\nport = {self.port}\ncalled = "{self.title}"\n'
            f"move_port = {self.move_port}\nmove_first = {str(self.moves).lower()}\n"
        )


class _Server:
    """A program in the background, with TCP_NODELAY (dcmtk reads it from the environment), its output in a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._process: subprocess.Popen[bytes] | None = None

    def _run(self, *command: str) -> None:
        def run() -> subprocess.Popen[bytes]:
            with (self.folder / "log.txt").open("ab") as log:
                return subprocess.Popen(
                    [sys.executable, "-c", _WITH_PARENT.format(parent=os.getpid()), *command],
                    cwd=self.folder,
                    env={**os.environ, "TCP_NODELAY": "1"},
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )

        self._process = _STARTER.submit(run).result()

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


class Orthanc(_Dimse, _Server):
    """Orthanc with its DICOMweb plugin. By DIMSE it answers RADLOOP only.

    Attributes:
        port: of DIMSE; called AE title ORTHANC.
        move_port: where it sends on C-MOVE to RADLOOP.
        url: of DICOMweb; user `radloop`, password `password`.
    """

    title = "ORTHANC"

    def __init__(self, folder: Path, *, moves: bool = False, tls: bool = False, **more: object) -> None:
        super().__init__(folder)
        self.moves = moves
        self.port, self._http, self.move_port = free_port(), free_port(), free_port()
        self.password = secrets.token_hex(8)
        self.rest = f"http://127.0.0.1:{self._http}"
        self.url = f"{self.rest}/dicom-web"
        settings = {
            "Name": "test",
            "StorageDirectory": str(folder / "storage"),
            "IndexDirectory": str(folder / "storage"),
            "Plugins": [str(_PLUGINS / _PLUGIN)],
            "DicomServerEnabled": True,
            "DicomAet": self.title,
            "DicomCheckCalledAet": True,
            "DicomPort": self.port,
            "DicomModalities": {
                "us": {"AET": "RADLOOP", "Host": "127.0.0.1", "Port": self.move_port, "UseDicomTls": tls},
                "send": ["SENDER", "127.0.0.1", 1],
            },
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


class OrthancWeb(Orthanc):
    """Orthanc, spoken to by DICOMweb."""

    def pacs(self, **changes: Any) -> Pacs:
        """An adapter."""
        from radloop.dicom.pacs.web import DicomWeb

        return DicomWeb("main", self.url, user="radloop", password=self.password, **changes)

    def stranger(self) -> Pacs:
        """One with a wrong password."""
        from radloop.dicom.pacs.web import DicomWeb

        return DicomWeb("main", self.url, user="radloop", password=self.password[::-1])

    def toml(self) -> str:
        """Its section; the password is in the file pacs.password of the project."""
        return (
            f'[pacs.main]\nkind = "dicomweb"\nurl = "{self.url}"\nuser = "radloop"\npassword = "file:pacs.password"\n'
        )


class Dcmqrscp(_Dimse, _Server):
    """dcmtk's query/retrieve SCP: called AE title DCMQRSCP; it knows RADLOOP (for C-MOVE, at `move_port`) and SENDER.

    `compresses`: it keeps JPEG 2000 as it is, and offers it first when it sends.
    """

    title = "DCMQRSCP"

    def __init__(self, folder: Path, *, moves: bool = False, compresses: bool = True, more: Sequence[str] = ()) -> None:
        super().__init__(folder)
        self.moves, self._more = moves, [*more, *(("+xv", "-xv") if compresses else ())]
        self.port, self.move_port = free_port(), free_port()
        (folder / "db").mkdir(exist_ok=True)
        (folder / "dcmqrscp.cfg").write_text(
            f"NetworkTCPPort = {self.port}\nMaxPDUSize = 131072\nMaxAssociations = 16\n"
            f"HostTable BEGIN\nus = (RADLOOP, localhost, {self.move_port})\nsend = (SENDER, localhost, 1)\n"
            "peers = us, send\nHostTable END\nVendorTable BEGIN\nVendorTable END\n"
            f"AETable BEGIN\n{self.title} {folder / 'db'} RW (500, 1024mb) peers\nAETable END\n"
        )

    def start(self) -> None:
        """Start it."""
        self._run("dcmqrscp", *self._more, "-c", str(self.folder / "dcmqrscp.cfg"))
        self._await(self.port)

    def store(self, files: Iterable[Path]) -> None:
        """Give it instances."""
        answers = send(files, "127.0.0.1", self.port, calling_ae="SENDER", called_ae=self.title)
        assert set(answers) == {"0000"}, answers
