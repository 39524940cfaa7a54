"""The doctor finds what is wrong before a patient's image does; set-up makes what validation needs."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from radloop.cli import setup
from radloop.cli.init import make_project
from radloop.engines import local
from radloop.pipeline import Builder
from radloop.settings import load
from radloop.stages.project import open_catalog
from radloop.testing import suite_stages as s

from .conftest import Ran, configure

Run = Callable[..., Ran]


def verdicts(ran: Ran) -> dict[str, tuple[str, str]]:
    return {check["name"]: (check["verdict"], check["found"]) for check in ran.json}


def test_a_new_project_is_well(inside: Run, project: Path) -> None:
    """A doctor who always finds something is not listened to."""
    ran = inside("doctor", "--json")
    assert ran.code == 0, ran.out
    found = verdicts(ran)
    assert found["project key"][0] == "ok"
    assert found["environment tfdv"][0] == "warn"
    assert "radloop setup" in inside("doctor").out


def test_a_key_that_others_can_read(inside: Run, project: Path) -> None:
    """Whoever reads it can tell from a list of patients who is who."""
    (project / "crosswalk.key").chmod(0o640)
    ran = inside("doctor", "--json")
    assert ran.code == 1
    assert verdicts(ran)["keys"][0] == "fail"
    assert any("chmod 600" in check["next_step"] for check in ran.json)


def test_another_key_than_the_images_were_made_with(inside: Run, project: Path, dicom_folder: Path) -> None:
    """With another key every patient who comes again is two patients, one of them perhaps in the test part."""
    inside("ingest", str(dicom_folder), "--site", "site-a")
    with open_catalog(project) as catalog:
        rows = catalog.pending()
    (project / "radloop.key").write_text("ab" * 32)
    ran = inside("doctor", "--json")
    assert ran.code == 1
    assert verdicts(ran)["pseudonyms"][0] == "fail"
    assert rows[0].key_id in verdicts(ran)["pseudonyms"][1]


def test_a_typo_in_a_room_s_section(inside: Run, project: Path) -> None:
    """A gate's bound that is misspelt is a gate at its default."""
    configure(project, "[gates]\nauc_lwoer = 0.9\n")
    ran = inside("doctor", "--json")
    assert ran.code == 1
    assert any("did you mean 'auc_lower'" in check["next_step"] for check in ran.json)


def test_a_network_that_was_brought(inside: Run, project: Path) -> None:
    """Hours of preparation must not end at a wrong path, or at a framework that is not installed."""
    configure(project, '[train]\nnetwork = "models/vendor.onnx"')
    assert verdicts(inside("doctor", "--json"))["network"][0] == "fail"
    (project / "models").mkdir()
    (project / "models/vendor.onnx").write_bytes(b"onnx")
    assert verdicts(inside("doctor", "--json"))["network"] == ("ok", "models/vendor.onnx, onnx, for onnxruntime")


def test_a_landing_folder_that_others_may_enter(inside: Run, project: Path) -> None:
    """Identified images lie there."""
    (project / "landing").mkdir(mode=0o755)
    (project / "landing").chmod(0o755)
    ran = inside("doctor", "--json")
    assert verdicts(ran)["private folders"] == ("fail", "others may enter landing")


def test_an_artifact_that_was_changed(inside: Run, project: Path) -> None:
    """A model file that was changed after its gates is a model that passed no gate."""
    b = Builder("p")
    b.add(s.numbers)
    made = local.run(b.build(), home=project).output("numbers.made")
    assert verdicts(inside("doctor", "--json"))["artifacts"] == ("ok", "1 there, 1 read and unchanged")
    made.file("numbers.json").write_text("{}")
    ran = inside("doctor", "--all", "--json")
    assert ran.code == 1
    assert "changed after it was committed" in verdicts(ran)["artifacts"][1]


def test_an_archived_image_that_is_gone(inside: Run, project: Path, dicom_folder: Path) -> None:
    """A dataset version whose images are gone can be trained on no more, and nobody would know until then."""
    from radloop.catalog.schema import Archived

    inside("ingest", str(dicom_folder), "--site", "site-a")
    with open_catalog(project) as catalog:
        rows = catalog.pending()
        catalog.mark_archived(
            Archived(
                sop_uid=r.sop_uid, revision=r.revision, archive_path=f"{n}.dcm", file_sha256="0" * 64, deid_digest="x"
            )
            for n, r in enumerate(rows)
        )
    (project / "archive").mkdir()
    assert verdicts(inside("doctor", "--json"))["archive"] == ("fail", "3 of 3 images are gone, such as 0.dcm")
    for number in range(3):
        (project / f"archive/{number}.dcm").write_bytes(b"other")
    assert "3 of 3 images read were changed" in verdicts(inside("doctor", "--json"))["archive"][1]


def test_a_busy_port_is_a_warning(inside: Run, project: Path) -> None:
    """It may be radloop itself."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        configure(project, f"[listen]\nport = {taken.getsockname()[1]}\n[serve]\nport = 0\n")
        found = verdicts(inside("doctor", "--json"))
    assert found["port of listen"][0] == "warn"
    assert found["port of serve"] == ("ok", "any free one")


def test_setup_takes_the_checkouts_environment(inside: Run, project: Path, tfdv_python: Path) -> None:
    """Two gigabytes that are there already are not fetched again, and the user is told which line was added."""
    ran = inside("setup", "--json")
    assert ran.code == 0, ran.err
    assert (project / "radloop.toml").read_text().count("tfdv = ") == 1
    assert load(project).environments["tfdv"] == ran.json["python"]
    assert Path(ran.json["python"]).is_absolute()
    assert f'tfdv = "{ran.json["python"]}"' == ran.json["added"]
    again = inside("setup", "--json")
    assert (again.json["added"], again.json["made"]) == ("", False)
    assert verdicts(inside("doctor", "--json"))["environment tfdv"][0] == "ok"


def test_setup_does_not_touch_a_line_of_the_users(inside: Run, project: Path) -> None:
    """An interpreter that somebody chose is theirs to correct."""
    configure(project, f'[environments]\ntfdv = "{sys.executable}"\n')  # it has no TFDV
    ran = inside("setup")
    assert ran.code == 1
    assert "does not work" in ran.err
    assert load(project).environments["tfdv"] == sys.executable


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[task]\nname = 'a'\n",
        "[environments]\n",
        "[environments] # mine\nother = '/x'\n[task]\nname = 'a'\n",
        "a = 1",
    ],
)
def test_a_line_is_added_and_nothing_else_changed(tmp_path: Path, text: str) -> None:
    """The file is the user's, comments and all."""
    import tomllib

    file = tmp_path / "radloop.toml"
    file.write_text(text)
    file.chmod(0o640)
    setup.enter(file, 'tfdv = "/p"')
    assert tomllib.loads(file.read_text())["environments"]["tfdv"] == "/p"
    assert [line for line in text.splitlines() if line not in file.read_text().splitlines()] == []
    assert file.stat().st_mode & 0o777 == 0o640


def test_the_template_takes_the_line(tmp_path: Path) -> None:
    """What `init` wrote is what `setup` meets."""
    make_project(tmp_path)
    setup.enter(tmp_path / "radloop.toml", 'tfdv = "/p"')
    assert load(tmp_path).environments == {"tfdv": "/p"}


def test_from_a_wheel_the_same_version_is_installed(tmp_path: Path) -> None:
    """Another radloop over there would compute other digests."""
    from radloop import __version__

    by_pip = setup.commands(tmp_path / "e", None, tmp_path, None)
    assert by_pip[0][:3] == [sys.executable, "-m", "venv"]
    assert f"radloop-tfdv=={__version__}" in by_pip[1]
    assert f"radloop=={__version__}" in by_pip[1]
    checkout = setup.find_checkout()
    assert checkout is not None
    by_uv = setup.commands(tmp_path / "e", checkout, None, "/usr/bin/uv")
    assert "--require-hashes" in by_uv[1]
    assert by_uv[2][-1] == str(checkout / "packages/radloop-tfdv")
