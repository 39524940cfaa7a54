"""How well radloop and its peers de-identify the same synthetic set, in the MIDI-B challenge's metric.

Prints one table of scores by action for each, and what each missed most. Every tool runs as its documentation says, with its
own defaults; a tool is asked for what its profile claims: radloop's `research` to move dates and keep sex and age, the others
the Basic profile. An instance that a tool refuses counts as missed in all its requirements; the second figure leaves these out,
as the challenge's own script does.

Usage: deidentification_score.py [INSTANCES] [SEED] [PYTHON_OF_THE_PEERS]
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from radloop.dicom.burned_in import Pixels
from radloop.dicom.deidentify import Deidentifier
from radloop.dicom.profile import Profile, chosen, named
from radloop.dicom.uids import Pseudonymiser
from radloop.errors import RadloopError
from radloop.testing.phi.answers import Answer, read_key
from radloop.testing.phi.generate import generate, write
from radloop.testing.phi.score import Output, Score, score

HERE = Path(__file__).resolve().parent
PEERS = ("deid", "dicom-anonymizer", "dicognito")
Outcome = tuple[dict[str, Output], Counter[str]]


def radloop(profile: Profile, images: Path, folder: Path) -> Outcome:
    """Outputs by source file; why others were refused."""
    pseudonymiser, pixels = Pseudonymiser(bytes(range(32))), Pixels("clean")
    cleaner = Deidentifier(pseudonymiser, profile=profile, pixels=pixels)
    outputs: dict[str, Output] = {}
    refused: Counter[str] = Counter()
    for number, file in enumerate(sorted(images.rglob("*.dcm"))):
        target = folder / f"{number}.dcm"
        try:
            done = cleaner.clean_file(file, target, site="A")
        except RadloopError as error:
            refused[str(error).splitlines()[0]] += 1
            continue
        outputs[str(file.relative_to(images))] = Output(f"{done.sop_uid}.dcm", target.read_bytes())
    return outputs, refused


def peer(name: str, python: str, images: Path, folder: Path) -> Outcome:
    """As `radloop`, by a peer in Python; its files keep their names, which it is not blamed for."""
    script = [python, str(HERE / "peer_deidentify.py"), name, str(images), str(folder)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=1800, check=True)
    return _written(folder), Counter(json.loads(done.stdout.splitlines()[-1]))


def gdcmanon(images: Path, folder: Path) -> Outcome:
    """gdcmanon, its Basic profile: what is removed goes encrypted under a certificate that nobody keeps."""
    key, certificate, refused = folder / "key.pem", folder / "certificate.pem", Counter[str]()
    request = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-keyout",
        str(key),
        "-out",
        str(certificate),
    ]
    subprocess.run([*request, "-subj", "/CN=nobody", "-days", "1"], check=True, capture_output=True)
    for file in sorted(images.rglob("*.dcm")):
        target = folder / file.relative_to(images)
        target.parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["gdcmanon", "-e", "-c", str(certificate), str(file), str(target)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            refused[(done.stderr.strip().splitlines() or ["no word"])[-1][:120]] += 1
            target.unlink(missing_ok=True)
    return _written(folder), refused


def _written(folder: Path) -> dict[str, Output]:
    files = {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*.dcm"))}
    return {name: Output(f"{number}.dcm", data) for number, (name, data) in enumerate(files.items())}


def report(name: str, answers: list[Answer], outcome: Outcome, options: list[str]) -> None:
    """Print one tool's table."""
    outputs, refused = outcome
    every = score(answers, outputs, options=options)
    released = score([a for a in answers if a.file in outputs], outputs, options=options)
    print(f"\n## {name}\n\nreleased {len(outputs)} of {len(answers)};", end=" ")
    print(f"score {every.share:.2%}, of the released {released.share:.2%}\n")
    print(_table(every, released))
    for what, count in refused.most_common(5):
        print(f"- refused or failed, {count}: {what}")
    for (action, path), count in list(released.misses().items())[:12]:
        print(f"- {action} {path}: {count}")


def _table(every: Score, released: Score) -> str:
    lines = ["| action | required | correct | share | share of the released |", "|---|---|---|---|---|"]
    for action, needed in every.required.items():
        met, of = every.correct.get(action, 0), released.required.get(action, 0)
        share = released.correct.get(action, 0) / of if of else 0.0
        lines.append(f"| {action} | {needed} | {met} | {met / needed:.2%} | {share:.2%} |")
    return "\n".join(lines)


def main(instances: int, seed: int, python: str) -> None:
    """Make the set once, run every tool on it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, generate(seed, instances))
        answers, images = read_key(folder / "answer_key.json"), folder / "images"
        cleaning = ["clean-descriptors", "clean-structured-content", "retain-safe-private"]
        for profile in (named("research"), named("basic"), chosen("research", cleaning)):
            options = [*(code for code, *_ in profile.codes), "113101"]
            title = f"radloop {profile.name} ({', '.join(options)})"
            report(title, answers, radloop(profile, images, _fresh(folder)), options)
        tools: dict[str, Callable[[Path], Outcome]] = {
            tool: lambda out, tool=tool: peer(tool, python, images, out)
            for tool in PEERS  # type: ignore[misc]
        }
        if shutil.which("gdcmanon"):
            tools["gdcmanon"] = lambda out: gdcmanon(images, out)
        for tool, run in tools.items():
            try:
                report(tool, answers, run(_fresh(folder)), [])
            except (subprocess.SubprocessError, OSError) as error:
                print(f"\n## {tool}\n\nnot run: {type(error).__name__}")


def _fresh(folder: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=folder))


if __name__ == "__main__":
    main(
        int(sys.argv[1]) if len(sys.argv) > 1 else 200,
        int(sys.argv[2]) if len(sys.argv) > 2 else 20241006,
        sys.argv[3] if len(sys.argv) > 3 else str(HERE.parent / ".venvs/bench/bin/python"),
    )
