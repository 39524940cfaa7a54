"""`radloop demo`: a small simulated hospital, then the real loop: real sockets, real servers, real stages, drawn patients."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import typer

from radloop.cli import output
from radloop.cli.common import Json, command
from radloop.errors import EngineError, SettingsError

if TYPE_CHECKING:
    from radloop.pipeline.records import RunResult
    from radloop.settings import Settings
    from radloop.testing.clinic import Clinic

SENDERS = {"A": "AURORA_CR1", "B": "HELIX_DX2"}
_READY_S = 60.0
_FULL = """
[evaluate]
minimum_patients = 8

[release]
clinical_canary = true
wait_s = 120.0

# The first model is often wrong at site B, so the two must disagree there; the judge still stops on errors and delay.
[release.judge]
minimum_patients = 40
error_rate = 0.15
slow = 0.15
agreement = 0.5
mean_absolute_difference = 0.5
score_shift = 0.5
accuracy_difference = 0.3

[watch]
retrain_patients_per_class = 15
"""
_SMALL = """
[split]
train = 0.5
validation = 0.2
test = 0.3

[train]
epochs = 24
batch_size = 12
patience = 24

[evaluate]
minimum_patients = 3
resamples = 500
examples = 4

[gates]
auc_lower = 0.5
ece = 0.35
subgroup_gap = 0.3
margin = 0.2

[release]
clinical_canary = true
steps = [25, 100]
wait_s = 60.0

[release.judge]
minimum_patients = 30
latency_floor_ms = 250.0
error_rate = 0.25
slow = 0.25
agreement = 0.4
mean_absolute_difference = 0.6
score_shift = 0.6
accuracy_difference = 0.5

[watch]
retrain_patients_per_class = 4

[watch.drift]
minimum_patients = 10
"""


def register(app: typer.Typer) -> None:
    """Add `demo`."""

    @command(
        app,
        "demo",
        examples=("radloop demo --yes", "radloop demo --size small --yes --fresh"),
        after="open radloop-demo/reports/report.html, then `radloop init` for a project of your own.",
    )
    def demo(
        directory: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where the demo's project lies.")] = Path(
            "radloop-demo"
        ),
        size: Annotated[Literal["full", "small"], typer.Option(help="600 images, or 120.")] = "full",
        yes: Annotated[
            bool, typer.Option("--yes", help="Give the approvals that a person would; recorded as such.")
        ] = False,
        fresh: Annotated[
            bool, typer.Option("--fresh", help="Start afresh; without it a demo that was cut short goes on.")
        ] = False,
        json: Json = False,
    ) -> None:
        """Take a simulated hospital through the whole loop, on this machine, and write the report.

        Two sites send drawn radiographs by C-STORE; site A's train the first model; site B's arrive later and drift; labels come
        late; the model trained on both replaces the first after shadow and canary. Patients and scanners are simulated, all
        else is what runs in a hospital.
        """
        told = Demo(directory, size, yes).run(fresh=fresh)
        if json:
            output.print_json(told)
        raise typer.Exit(told["exit"])


class Stopped(Exception):
    """The demo ends early because a pipeline did not succeed."""

    def __init__(self, result: RunResult) -> None:
        super().__init__(result.message)
        self.result = result


class Demo:
    """One demo project: its steps, which of them are done, and how long they took.

    Args:
        folder: the project.
        size: full or small.
        yes: give the approvals that a person would.
        run: runs a pipeline of the project by its name, on whatever engine; the `local` one, if left out.
    """

    def __init__(
        self, folder: Path, size: str, yes: bool, *, run: Callable[[Path, Settings, str], RunResult] | None = None
    ) -> None:
        self.folder, self.size, self.yes, self._run = folder.resolve(), size, yes, run
        self.steps: list[tuple[str, Callable[[], object]]] = [
            ("draw the hospital", self.draw),
            ("site A sends its studies", lambda: self.send("A")),
            ("site A's labels arrive", lambda: self.labels("A")),
            ("prepare dataset version 1", lambda: self.pipeline("prepare")),
            ("develop the first model", lambda: self.pipeline("develop")),
            ("release it", lambda: self.pipeline("release")),
            ("site B sends its studies", lambda: self.send("B")),
            ("both sites ask for predictions", self.predict),
            ("watch: what drifted", lambda: self.pipeline("watch")),
            ("site B's labels arrive, late", lambda: self.labels("B")),
            ("watch: is it time to train", self.decide),
            ("prepare dataset version 2", lambda: self.pipeline("prepare")),
            ("develop the challenger", lambda: self.pipeline("develop")),
            ("release it: shadow and canary", self.release_under_traffic),
            ("both sites ask for predictions", self.predict),
            ("watch the new champion", lambda: self.pipeline("watch")),
            ("write the report", self.report),
        ]
        self.done: list[dict[str, Any]] = []

    @property
    def state(self) -> Path:
        """Which steps are done."""
        return self.folder / "demo.json"

    def run(self, *, fresh: bool) -> dict[str, Any]:
        """Run what is left to run; the summary."""
        from radloop.stage.protocol import EXIT
        from radloop.testing.clinic import mail_sink

        self._open(fresh)
        status = "succeeded"
        with ExitStack() as stack:
            self.mail = stack.enter_context(mail_sink(lambda line: output.say(f"  {line}")))
            self._write_settings()
            if len(self.done) < len(self.steps):
                self.listener = stack.enter_context(self._child("listen"))
                self.gateway = stack.enter_context(self._child("serve"))
            try:
                for number, (name, step) in list(enumerate(self.steps))[len(self.done) :]:
                    began = time.monotonic()
                    output.say(f"\n[{number + 1}/{len(self.steps)}] {name}")
                    step()
                    self.done.append({"step": name, "seconds": round(time.monotonic() - began, 2)})
                    self._save()
            except Stopped as stopped:
                status = stopped.result.status
                self.report()
                output.fail(stopped.result.message)
        return self._summary(status, EXIT[status])

    def _open(self, fresh: bool) -> None:
        if self.folder.exists() and not self.state.exists():
            raise SettingsError(
                "this folder is no demo project",
                expected="a new folder, or one of an earlier demo",
                got=str(self.folder),
            )
        known = msgspec.json.decode(self.state.read_bytes()) if self.state.exists() else None
        if known and (fresh or known["size"] != self.size):
            why = "asked for" if fresh else f"the last one was of size {known['size']}"
            output.say(f"Starting afresh ({why}): {self.folder} is made anew.")
            shutil.rmtree(self.folder)
            known = None
        elif known and len(known["done"]) == len(self.steps):
            output.say(f"This demo is complete: {self.folder} (--fresh starts another).")
        elif known:
            output.say(
                f"Going on after step {len(known['done'])} of {len(self.steps)} in {self.folder} (--fresh starts afresh)."
            )
        else:
            output.say(f"A new demo in {self.folder}.")
        if known:
            self.done = known["done"]
            return
        from radloop.cli.init import make_project

        make_project(self.folder)
        # Drawn patients need no secret: with the same pseudonyms the demo is the same on every machine.
        for name in ("radloop.key", "crosswalk.key"):
            (self.folder / name).write_text(hashlib.sha256(f"radloop demo {name}".encode()).hexdigest() + "\n")
        self._save()

    def _save(self) -> None:
        scratch = self.state.with_suffix(".new")
        scratch.write_bytes(msgspec.json.encode({"size": self.size, "done": self.done}))
        os.replace(scratch, self.state)

    def _write_settings(self) -> None:
        """The project's radloop.toml; the mail sink's port is another each time."""
        head = f"""# Written by `radloop demo` ({self.size}). Not a medical device: the patients are drawn.
[task]
name = "opacity"
intended_use = "Demonstration of radloop on drawn phantoms. For no clinical use."

[listen]
port = 0

[listen.senders]
{SENDERS["A"]} = "site-a"
{SENDERS["B"]} = "site-b"

[ingest]
quiet_s = 0.0  # the steps below wait until all is sent

[serve]
port = 0

[alerts]
smtp_host = "127.0.0.1"
smtp_port = {self.mail.port}
recipients = ["physicist@hospital.invalid"]

[environments]
tfdv = "{tfdv_python(self.folder)}"
"""
        (self.folder / "radloop.toml").write_text(head + (_FULL if self.size == "full" else _SMALL))

    @contextmanager
    def _child(self, name: str) -> Iterator[int]:
        """`radloop NAME` as a child of this process; its port. It ends with the demo, however that ends."""
        ready = self.folder / "serving" / f"{name}.ready"
        ready.parent.mkdir(exist_ok=True, mode=0o700)
        ready.unlink(missing_ok=True)
        command_line = [sys.executable, "-m", "radloop.cli", name, "--port", "0", "--ready-file", str(ready)]
        log = (self.folder / "serving" / f"{name}.log").open("ab")
        with (
            log,
            subprocess.Popen(
                [*command_line, "--project", str(self.folder)], stdout=log, stderr=log, preexec_fn=_die_with_parent
            ) as child,
        ):
            try:
                yield _port(child, ready, Path(log.name))
            finally:
                child.terminate()
                try:
                    child.wait(30)
                except subprocess.TimeoutExpired:
                    child.kill()

    # The steps

    def draw(self) -> None:
        """Phantom radiographs of both sites, with everything that modalities and PACS get wrong."""
        from radloop.testing.hospital import demo_hospitals

        hospital = self.folder / "hospital"
        shutil.rmtree(hospital, ignore_errors=True)
        with output.progress("draw") as progress:
            sites = demo_hospitals(hospital, self.size, workers=os.cpu_count() or 1, progress=progress)
        for site, made in sites.items():
            told = {
                "sent": [str(p.relative_to(hospital)) for p in made.files],
                "good": [str(one.path.relative_to(hospital)) for one in made.good],
                "labels": str(made.labels.relative_to(hospital)),
            }
            (hospital / f"{site}.json").write_bytes(msgspec.json.encode(told))
            output.say(f"  site {site}: {len(made.files)} files, {len(made.good)} of them as they should be")

    def _site(self, site: str) -> dict[str, Any]:
        told: dict[str, Any] = msgspec.json.decode((self.folder / "hospital" / f"{site}.json").read_bytes())
        return told

    def send(self, site: str) -> None:
        """C-STORE over a real socket; what no modality could send comes by folder."""
        from radloop.testing.modality import send

        files = [self.folder / "hospital" / name for name in self._site(site)["sent"]]
        with output.progress(f"C-STORE from site {site}") as progress:
            statuses = send(
                files, "127.0.0.1", self.listener, calling_ae=SENDERS[site], called_ae="RADLOOP", progress=progress
            )
        output.say(f"  {len(files)} files, by C-STORE status: {output.counts_line(statuses)}")

    def labels(self, site: str) -> None:
        """A CSV keyed by the original accession numbers, as a reading room would export it."""
        self._radloop(
            *("labels", "import", str(self.folder / "hospital" / self._site(site)["labels"])),
            *("--key", "accession", "--key-column", "AccessionNumber", "--value-column", "label"),
            *("--site", f"site-{site.lower()}"),
        )

    def _radloop(self, *arguments: str) -> None:
        from radloop.cli.app import run_app

        if (code := run_app([*arguments, "--project", str(self.folder)])) != 0:
            raise EngineError(f"radloop {arguments[0]} ended with {code}", next_step="its message stands above")

    def pipeline(self, name: str) -> RunResult:
        """Run a pipeline; where it waits for a person, --yes approves and says so in the ledger."""
        from radloop.cli.run import run_one
        from radloop.settings import load

        while True:
            result = (self._run or run_one)(self.folder, load(self.folder), name)
            if result.status == "succeeded":
                return result
            if self.yes and result.pipeline == "prepare" and result.status == "stopped" and self._accept_schema(result):
                continue
            subjects = self._waiting(result) if self.yes and result.status == "waiting" else []
            new = [digest for digest in subjects if self._approve(digest, result.message)]
            if not new:
                raise Stopped(result)

    def _accept_schema(self, result: RunResult) -> bool:
        """What a physicist would do who finds site B's data right: the proposed schema becomes the reviewed one."""
        from radloop.artifact import file_digest

        proposed = result.output("validate.validation").path / "schema.proposed.pbtxt"
        if not proposed.exists() or not self._approve(file_digest(proposed), result.message):
            return False
        shutil.copyfile(proposed, self.folder / "schema.pbtxt")
        output.say("  the proposed schema was accepted: site B's scanner differs in more than its picture")
        return True

    def _waiting(self, result: RunResult) -> list[str]:
        """Digests of what the run waits for: a gate's verdict, or the package to be released."""
        from radloop.artifact import open_artifact
        from radloop.begin import inputs_of

        found = [result.output(source).digest for source in result.outputs if source.endswith(".verdict")]
        if result.pipeline == "release":
            package = inputs_of(self.folder, "release")["package"]
            assert package is not None
            found.append(open_artifact(package).digest)
        return found

    def _approve(self, digest: str, why: str) -> bool:
        """True if this approval is new."""
        from radloop.stages import approvals
        from radloop.stages.project import open_catalog

        why = f"demo --yes, no person looked: {why}"
        with open_catalog(self.folder) as catalog:
            given = approvals.give(self.folder, catalog, digest, role="clinical", why=why, by="demo")
        return bool(given["new"])

    def _clinic(self) -> Clinic:
        """Both sites' good studies in turn."""
        from radloop.testing.clinic import Clinic

        files = [[(name, f"site-{site.lower()}") for name in self._site(site)["good"]] for site in SENDERS]
        mixed = [one for pair in itertools.zip_longest(*files) for one in pair if one is not None]
        return Clinic(f"http://127.0.0.1:{self.gateway}", [(self.folder / "hospital" / n, site) for n, site in mixed])

    def predict(self) -> None:
        """Every good study goes to the gateway as a router would send it: site A's and site B's in turn."""
        with self._clinic() as clinic, output.progress("predict") as progress:
            clinic.ask_all(progress)
        output.say(f"  {clinic.answered} answers, {clinic.failed} failures")

    def decide(self) -> None:
        """Watch again, now that labels are there: does it ask for a new model?"""
        from radloop.cli.run import decision

        told = decision(self.pipeline("watch"))
        output.say(f"  {told['why']}")
        if not told["retrain"]:
            raise EngineError(
                "the demo's watch asked for no training", expected="drift and labels enough", got=told["why"]
            )

    def release_under_traffic(self) -> None:
        """Release while the clinic goes on asking: the judge needs patients answered by both models."""
        with self._clinic() as clinic:
            clinic.keep_asking()
            self.pipeline("release")
        output.say(f"  {clinic.answered} requests were answered meanwhile, {clinic.failed} failed")

    def report(self) -> None:
        """One self-contained page."""
        from radloop.cli.export import write_report

        output.say(f"  {write_report(self.folder)}")

    def _summary(self, status: str, code: int) -> dict[str, Any]:
        from radloop.stages.project import open_catalog

        with open_catalog(self.folder) as catalog:
            datasets, models = catalog.datasets(), catalog.models()
        seconds = round(sum(step["seconds"] for step in self.done), 1)
        output.print_table("Where the time went", ["step", "seconds"], [(s["step"], s["seconds"]) for s in self.done])
        lines = [f"{status} in {seconds:.0f} s", f"{len(datasets)} dataset versions, {len(models)} models registered"]
        lines.append(
            f"{len(self.mail.messages)} mails were sent" if self.mail.messages else "no mail was sent in this run"
        )
        report = self.folder / "reports" / "report.html"
        output.say("\n" + "; ".join(lines) + f"\nreport: {report}\nnext: radloop status --project {self.folder}")
        return {
            "status": status,
            "exit": code,
            "seconds": seconds,
            "steps": self.done,
            "mails": [m["subject"] for m in self.mail.messages],
            "report": str(report),
        }


def tfdv_python(project: Path) -> Path:
    """The TFDV environment's Python: beside the running one in a checkout, or in the project."""
    candidates = [Path(sys.prefix).parent / "tfdv", project / ".venvs" / "tfdv"]
    for environment in candidates:
        if (environment / "bin" / "python").exists():
            return environment / "bin" / "python"
    raise SettingsError(
        "the TFDV environment is not there",
        expected=" or ".join(map(str, candidates)),
        next_step=f"make setup in a checkout, or radloop setup --project {project}",
    )


def _port(child: subprocess.Popen[bytes], ready: Path, log: Path) -> int:
    until = time.monotonic() + _READY_S
    while time.monotonic() < until:
        if ready.exists():
            return int(msgspec.json.decode(ready.read_bytes())["port"])
        if child.poll() is not None:
            break
        time.sleep(0.05)
    raise EngineError(
        f"{ready.stem} did not start", expected="ready within a minute", got=log.read_text(errors="replace")[-800:]
    )


def _die_with_parent() -> None:
    """Runs in the child: end it when the demo is gone, also by SIGKILL."""
    if sys.platform == "linux":
        import ctypes
        import signal

        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
