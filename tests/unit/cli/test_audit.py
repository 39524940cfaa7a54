"""Who had access: every way to what identifies patients leaves its message."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

from sqlalchemy import text

from radloop.cli.intake import landing_at
from radloop.stages.project import open_catalog

from .conftest import NAME, Command, Ran, configure


def _actions(inside: Callable[..., Ran]) -> list[str]:
    found = []
    for row in inside("audit", "list", "--json").json:
        found.append(row["payload"].get("action") or row["payload"].get("state") or row["kind"])
    return found


def test_every_access_leaves_a_message(
    inside: Callable[..., Ran], project: Path, dicom_folder: Path, tmp_path: Path
) -> None:
    """If this failed, somebody could look at patients' data, or take it away, and nobody would ever know."""
    inside("ingest", str(dicom_folder), "--site", "site-a")
    inside("quarantine", "show", "1")
    inside("quarantine", "retry", "1")
    inside("quarantine", "purge", "1")
    (tmp_path / "labels.csv").write_text("acc,label\n00121,1\n")
    ran = inside(
        "labels", "import", str(tmp_path / "labels.csv"), "--key", "accession", "--key-column", "acc",
        "--value-column", "label", "--site", "site-a",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    (tmp_path / "links.csv").write_text("patient_id_a,patient_id_b\nMRN-1,MRN-2\n")
    inside("patients", "link", str(tmp_path / "links.csv"))
    inside("backup", str(tmp_path / "backup"))
    actions = _actions(inside)
    wanted = ["ingest", "quarantine show", "read", "purged", "labels import", "patients link", "backup"]
    assert [action for action in actions if action in wanted] == wanted
    ran = inside("audit", "export", "--by", "ada")
    lines = ran.out.splitlines()
    assert len(lines) == len(actions)
    assert {ElementTree.fromstring(line).tag for line in lines} == {"AuditMessage"}
    for known in (NAME, "MRN-1", "00121", "readme"):
        assert known not in ran.out
    assert _actions(inside)[-1] == "audit read"
    shown = inside("audit", "list")
    assert "patients link" in shown.out
    assert inside("audit", "list", "--since", "2999-01-01", "--json").json == []
    assert inside("audit", "list", "--since", "yesterday").code == 1


def test_reading_the_landing_folder_is_an_access(inside: Callable[..., Ran], project: Path, dicom_folder: Path) -> None:
    """If this failed, the largest reading of identified data of all, the de-identification, would leave no trace."""
    from radloop.cli.run import run_one
    from radloop.settings import load

    inside("ingest", str(dicom_folder), "--site", "site-a")
    result = run_one(project, load(project), "prepare", upto="deidentify")
    assert result.status == "succeeded", result.message
    with open_catalog(project) as catalog:
        [row] = [row for row in catalog.ledger.rows("audit") if row.payload["action"] == "landing read"]
    assert (row.actor, row.payload["instances"], row.payload["studies"]) == ("deidentify", 3, 3)
    assert len(row.payload["pseudonyms"]) == 3


def test_verify_finds_what_was_changed(inside: Callable[..., Ran], project: Path, dicom_folder: Path) -> None:
    """If this failed, the evidence would be worth as much as the honesty of whoever has the database file."""
    inside("ingest", str(dicom_folder), "--site", "site-a")
    inside("audit", "export")
    told = inside("audit", "verify", "--json").json
    assert (told["rows"], told["wrong"]) == (told["seq"], "")
    known = f"{told['seq']}:{told['hash']}"
    assert inside("audit", "verify", "--expect", known).code == 0
    assert known in inside("audit", "verify").out
    other = inside("audit", "verify", "--expect", f"{told['seq']}:{'0' * 64}")
    assert (other.code, "made anew" in other.err) == (1, True)
    cut = inside("audit", "verify", "--expect", f"{told['seq'] + 50}:{'0' * 64}")
    assert (cut.code, "was cut off" in cut.err) == (1, True)
    with open_catalog(project) as catalog, catalog._write() as connection:
        connection.execute(text("DROP TRIGGER ledger_no_update"))
        connection.execute(text("UPDATE ledger SET actor = 'nobody' WHERE seq = 1"))
    ran = inside("audit", "verify")
    assert ran.code == 1
    assert "row 1: it was changed after it was appended" in ran.err


def test_a_listener_tells_a_sink_that_comes_late(
    radloop: Command, project: Path, tmp_path: Path, free_port: int
) -> None:
    """If this failed, a repository that was down in the night would lack the night, or stop the receiving."""
    configure(project, f'[listen.senders]\nCT1 = "site-a"\n[audit]\nsyslog = "udp://127.0.0.1:{free_port}"\n')
    with landing_at(project):
        pass
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", free_port))
        server.settimeout(30)
        with radloop.running("listen", "--port", "0", ready=tmp_path / "ready") as (process, _):
            assert b'csd-code="110120"' in server.recv(65535)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        assert b'csd-code="110121"' in server.recv(65535)


def test_send_says_when_the_sink_is_down(inside: Callable[..., Ran], project: Path, free_port: int) -> None:
    """If this failed, an administrator would believe that messages arrive."""
    assert "there is no audit sink" in inside("audit", "send").err
    configure(project, f'[audit]\nsyslog = "tcp://127.0.0.1:{free_port}"\n')
    assert inside("audit", "export").code == 0
    ran = inside("audit", "send")
    assert ran.code == 1
    assert "cannot be told" in ran.err
    assert "nothing is lost" in ran.err
