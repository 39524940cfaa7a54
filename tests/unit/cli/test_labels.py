"""Labels find their images, or say why not; whose they are is stored nowhere."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from radloop.cli.labels import read_rows
from radloop.errors import DataError
from radloop.stages.project import open_catalog

from .conftest import Ran, configure, write_dicom

Run = Callable[..., Ran]


def labels_import(run: Run, file: Path, key: str, *more: str, column: str = "key") -> Ran:
    """`radloop labels import FILE --key KEY ...` of columns `key` and `label`."""
    return run("labels", "import", str(file), "--key", key, "--key-column", column, "--value-column", "label", *more)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.fixture
def three(inside: Run, dicom_folder: Path) -> Path:
    """Three studies are in: accession 00121, 00122, 00123; study UID 1.2.3.1 to 1.2.3.3; sub/1.dcm to sub/3.dcm."""
    assert inside("ingest", str(dicom_folder), "--site", "site-a").code == 0
    return dicom_folder


def resolved(project: Path, task: str = "finding") -> list[str]:
    with open_catalog(project) as catalog:
        return sorted(value for value, _ in catalog.resolve_labels(task).values.values())


@pytest.mark.parametrize(
    "key,keys",
    [
        ("accession", ["00121", "00122", "00123"]),
        ("study", ["1.2.3.1", "1.2.3.2", "1.2.3.3"]),
        ("instance", ["1.2.3.1.1.1", "1.2.3.2.1.1", "1.2.3.3.1.1"]),
        ("file", ["sub/1.dcm", "./sub//2.dcm", "sub\\3.dcm"]),
    ],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_labels_join_before_and_after_the_images(
    inside: Run, project: Path, dicom_folder: Path, tmp_path: Path, key: str, keys: list[str], when: str
) -> None:
    """Reads often come first, or years later: both must end on the image they were made of."""
    file = write(
        tmp_path / "l.csv", "key,label\n" + "".join(f"{k},{v}\n" for k, v in zip(keys, ("1", "no", "YES"), strict=True))
    )
    ingest = ("ingest", str(dicom_folder), "--site", "site-a")
    if when == "after":
        inside(*ingest)
    ran = labels_import(inside, file, key, "--json")
    assert ran.code == 0, ran.err
    assert (ran.json["new"], ran.json["unmatched"]) == (3, 0 if when == "after" else 3)
    if when == "before":
        inside(*ingest)
    assert resolved(project) == ["0", "1", "1"]


def test_keys_are_stored_nowhere(inside: Run, project: Path, three: Path, tmp_path: Path) -> None:
    """An accession number in the catalog would lead from the research data back to the patient."""
    file = write(tmp_path / "l.csv", "key,label\nACC-SECRET-77,1\n")
    ran = labels_import(inside, file, "accession")
    assert ran.code == 0, ran.err
    assert "ACC-SECRET" not in ran.out + ran.err
    for path in project.rglob("*"):
        assert not path.is_file() or b"ACC-SECRET" not in path.read_bytes(), path


def test_two_values_for_one_key(inside: Run, project: Path, three: Path, tmp_path: Path) -> None:
    """Whichever of the two were taken, half of the contradictions would train the model wrongly."""
    file = write(tmp_path / "l.csv", "key,label\n1.2.3.1,1\n1.2.3.2,0\n1.2.3.1,0\n")
    ran = labels_import(inside, file, "study")
    assert ran.code == 1
    assert "more than one value" in ran.err
    assert "rows 2, 4" in ran.err
    assert "1.2.3.1" not in ran.err
    assert resolved(project) == []


def test_the_same_value_in_other_words_is_no_contradiction(
    inside: Run, project: Path, three: Path, tmp_path: Path
) -> None:
    """Two readers who write 'yes' and '1' agree."""
    file = write(tmp_path / "l.csv", "key,label\n1.2.3.1,1\n1.2.3.1,Yes\n")
    assert labels_import(inside, file, "study").code == 0
    assert resolved(project) == ["1"]


def test_labels_of_unknown_studies_are_kept_and_counted(inside: Run, three: Path, tmp_path: Path) -> None:
    """Dropped, they would be missing when the images come; unsaid, a wrong key column would look like success."""
    file = write(tmp_path / "l.csv", "key,label\n1.2.3.1,1\n9.9.9.1,1\n9.9.9.2,0\n")
    ran = labels_import(inside, file, "study")
    assert ran.code == 0
    assert "2 match no image yet" in ran.out
    told = inside("labels", "status", "--json").json
    assert (told["labels"], told["images_labelled"], told["unmatched"]) == (3, 1, 2)


def test_a_correction_overtakes(inside: Run, project: Path, three: Path, tmp_path: Path) -> None:
    """A wrong read that was corrected must not stay in the next training."""
    labels_import(inside, write(tmp_path / "l.csv", "key,label\n1.2.3.1,1\n1.2.3.2,1\n"), "study")
    ran = labels_import(inside, write(tmp_path / "l.csv", "key,label\n1.2.3.1,0\n1.2.3.2,1\n"), "study", "--json")
    assert (ran.json["corrected"], ran.json["unchanged"]) == (1, 1)
    assert resolved(project) == ["0", "1"]


def test_unknown_values_import_nothing(inside: Run, project: Path, three: Path, tmp_path: Path) -> None:
    """'uncertain' taken for 'no' is a wrong label; a wrongly chosen column may hold names, so values are not shown."""
    file = write(tmp_path / "l.csv", "key,label\n1.2.3.1,1\n1.2.3.2,Meier\n1.2.3.3,Schmidt\n")
    ran = labels_import(inside, file, "study")
    assert ran.code == 1
    assert "column 'label' holds 2 values that [task] does not name" in ran.err
    assert "lines 3, 4" in ran.err
    assert "Meier" not in ran.err
    assert resolved(project) == []


def test_the_projects_own_words(inside: Run, project: Path, three: Path, tmp_path: Path) -> None:
    """A hospital's export says what it says; nobody should have to rewrite it."""
    configure(project, '[task]\npositive = ["PNEUMONIA"]\nnegative = ["NORMAL"]\n')
    file = write(tmp_path / "l.csv", "key,label\n1.2.3.1,pneumonia\n1.2.3.2,NORMAL\n")
    assert labels_import(inside, file, "study").code == 0
    assert resolved(project) == ["0", "1"]
    configure(project, '[task]\npositive = ["yes"]\nnegative = ["Yes", "no"]\n')
    ran = labels_import(inside, write(tmp_path / "l.csv", "key,label\n1.2.3.1,yes\n"), "study")
    assert ran.code == 1
    assert "share a word" in ran.err


def test_another_task_keeps_its_values(inside: Run, project: Path, three: Path, tmp_path: Path) -> None:
    """A split that a paper published is used as it is, or its figures cannot be compared."""
    file = write(tmp_path / "l.csv", "key,label\nsub/1.dcm,train\nsub/2.dcm,test\nsub/3.dcm,validation\n")
    assert labels_import(inside, file, "file", "--task", "split").code == 0
    assert resolved(project, "split") == ["test", "train", "validation"]
    assert resolved(project) == []


def test_a_row_without_value_is_passed_over_and_counted(
    inside: Run, project: Path, three: Path, tmp_path: Path
) -> None:
    """Not yet read is not negative."""
    ran = labels_import(inside, write(tmp_path / "l.csv", "key,label\n1.2.3.1,\n1.2.3.2,1\n"), "study")
    assert "1 row without a value passed over" in ran.out
    assert resolved(project) == ["1"]


@pytest.mark.parametrize(
    "text,said",
    [
        ("", "column 'key' is not in"),
        ("key,label\n", "the label file has no rows"),
        ("key,other\n1,2\n", "column 'label' is not in"),
        ("key,label,label\n1,2,3\n", "2 times in"),
        ("key,label\n1.2,1,extra\n", "line 2 of the label file has another number of columns"),
        ('key,label\n"1.2,1\n', "no CSV"),
        ("key,label\n,1\n", "has no key in 1 row"),
        ("key,label\nMeier^Anna,1\n", "holds no UIDs"),
    ],
)
def test_a_file_that_cannot_be_read(inside: Run, tmp_path: Path, text: str, said: str) -> None:
    """What is half understood must not be half imported."""
    ran = labels_import(inside, write(tmp_path / "l.csv", text), "study")
    assert ran.code == 1
    assert said in ran.err
    assert "Meier" not in ran.err


def test_parquet_and_other_separators_say_the_same(tmp_path: Path) -> None:
    """A German Excel writes semicolons, pandas writes numbers: the accession number keeps its noughts in all of them."""
    rows = [("00123", "1"), ("A;4", "0")]
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=";").writerows([("key", "label"), *rows])
    pq.write_table(pa.table({"key": ["00123", "A;4"], "label": [1.0, 0.0], "x": [1, 2]}), tmp_path / "b.parquet")
    assert [row[1:] for row in read_rows(tmp_path / "a.csv", "key", "label")] == rows
    assert [row[1:] for row in read_rows(tmp_path / "b.parquet", "key", "label")] == rows


def test_a_parquet_of_dates_or_fractions_is_refused(tmp_path: Path) -> None:
    """A score of 0.7 is no label, and would become one by rounding."""
    pq.write_table(pa.table({"key": ["a"], "label": [0.7]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="neither text nor whole numbers"):
        list(read_rows(tmp_path / "b.parquet", "key", "label"))


words = st.text(st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="\ufeff"), max_size=12).map(
    str.strip
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.lists(st.tuples(words, words), min_size=1, max_size=8), st.sampled_from(",;\t"))
def test_what_a_csv_writer_writes_is_read_back(tmp_path: Path, rows: list[tuple[str, str]], separator: str) -> None:
    """A key that is read a character short is another patient's, or nobody's."""
    with (tmp_path / "p.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=separator).writerows([("key", "label"), *rows])
    assert [row[1:] for row in read_rows(tmp_path / "p.csv", "key", "label")] == rows


def two_sites(project: Path, tmp_path: Path, inside: Run, *, shared: str | None = None) -> None:
    """Site A has accession A1, site B has B1; both have `shared` if given."""
    for number, site in enumerate(("a", "b"), 1):
        folder = tmp_path / site
        write_dicom(folder / "1.dcm", study=number * 10, patient=f"MRN-{site}", accession=f"{site}1")
        if shared:
            write_dicom(folder / "2.dcm", study=number * 10 + 1, patient=f"MRN-{site}", accession=shared)
        assert inside("ingest", str(folder), "--site", f"site-{site}").code == 0


def test_accessions_of_several_sites_find_their_own(inside: Run, project: Path, tmp_path: Path) -> None:
    """One file for a network of hospitals is usual; each number belongs to the one site that knows it."""
    two_sites(project, tmp_path, inside)
    ran = labels_import(inside, write(tmp_path / "l.csv", "key,label\nA1,1\nb1,0\n"), "accession")
    assert ran.code == 0, ran.err
    assert resolved(project) == ["0", "1"]


def test_an_accession_that_two_sites_know_is_refused(inside: Run, project: Path, tmp_path: Path) -> None:
    """Numbers run from 1 in every hospital: the label of A's study on B's patient would be a wrong label."""
    two_sites(project, tmp_path, inside, shared="77")
    file = write(tmp_path / "l.csv", "key,label\n77,1\n")
    ran = labels_import(inside, file, "accession")
    assert ran.code == 1
    assert "1 known to several sites" in ran.err
    assert "--site" in ran.err
    assert resolved(project) == []
    assert labels_import(inside, file, "accession", "--site", "site-b").code == 0
    assert resolved(project) == ["1"]


def test_accessions_nobody_knows_yet_need_their_site(inside: Run, project: Path, tmp_path: Path) -> None:
    """Kept for every site, the label would wait for whichever patient comes first."""
    two_sites(project, tmp_path, inside)
    file = write(tmp_path / "l.csv", "key,label\n9000,1\n")
    assert labels_import(inside, file, "accession").code == 1
    assert "1 match no image yet" in labels_import(inside, file, "accession", "--site", "site-a").out


def test_accessions_of_images_with_an_issuer(inside: Run, project: Path, tmp_path: Path) -> None:
    """IssuerOfPatientID says who gave the PatientID, not the accession number: labels must not need it."""
    write_dicom(tmp_path / "in/1.dcm", study=1, accession="55", issuer="NORTH")
    inside("ingest", str(tmp_path / "in"), "--site", "site-a")
    assert labels_import(inside, write(tmp_path / "l.csv", "key,label\n55,1\n"), "accession").code == 0
    assert resolved(project) == ["1"]


def test_site_is_for_accessions_only(inside: Run, tmp_path: Path) -> None:
    """An option that does nothing would be believed to do something."""
    ran = labels_import(inside, write(tmp_path / "l.csv", "key,label\n1.2,1\n"), "study", "--site", "site-a")
    assert ran.code == 1
    assert "belongs to accession numbers" in ran.err
