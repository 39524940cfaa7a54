"""The house holds: what is imported when, what is committed, and whether what the papers say is so.

Which room may import which is import-linter's part (`make lint`); what a process really loads is looked at here.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "packages/radloop/src"

HEAVY = {
    "kfp",
    "matplotlib",
    "mlflow",
    "monai",
    "onnx",
    "onnxruntime",
    "pynetdicom",
    "sklearn",
    "scipy",
    "tensorflow",
    "torch",
}
MLOPS = {"airflow", "distributed", "kfp", "kserve", "kubernetes", "mlflow", "pyspark"}
TABLES = {"pandas", "pyarrow", "sqlalchemy", "alembic"}


def loaded(code: str, *arguments: str) -> set[str]:
    """Return the top-level packages that a fresh interpreter holds after running the code."""
    script = f"import sys\nsys.argv[1:] = {list(arguments)!r}\ntry:\n    exec({code!r})\nexcept SystemExit:\n    pass\n"
    script += "import json\nprint('\\n' + json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def third_party(packages: set[str]) -> set[str]:
    """Return those that are neither Python's nor ours nor the environment's own start-up."""
    return packages - sys.stdlib_module_names - loaded("pass") - {"radloop"}


def modules(under: str = "radloop") -> list[str]:
    """Return the names of radloop's modules."""
    found = (path.relative_to(SOURCE).with_suffix("") for path in (SOURCE / under).rglob("*.py"))
    return sorted(".".join(path.parts).removesuffix(".__init__") for path in found)


def tracked() -> list[Path]:
    """Return the files that git has, or would have."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def test_import_radloop_imports_nothing() -> None:
    """Whoever only wants an exception's class would wait for torch."""
    assert third_party(loaded("import radloop")) == set()


@pytest.mark.parametrize(
    "package", ["stages", "stages.prepare", "loop", "engines", "pipeline", "stage", "settings", "cli.app"]
)
def test_contract_wing_is_light(package: str) -> None:
    """An orchestrator imports these: in an Airflow worker there is no torch, and every CLI call would pay for it."""
    found = loaded(f"import radloop.{package}")
    assert found & (HEAVY | MLOPS) == set()
    assert found & {"pandas", "sqlalchemy"} == set()


def test_help_is_light() -> None:
    """`radloop --help` takes 0.3 s because it loads none of these; one import at a module's top would undo it."""
    found = loaded("from radloop.cli import main; main()", "--help")
    assert found & (HEAVY | MLOPS | TABLES | {"numpy", "rich", "cryptography", "httpx"}) == set()


def test_a_stage_is_light() -> None:
    """An empty stage has 5 ms: the protocol must not bring a database or tables with it."""
    found = loaded("from radloop.cli import main; main()", "stage", "radloop.testing.suite_stages:nothing", "--help")
    assert found & (HEAVY | MLOPS | TABLES | {"numpy", "typer", "rich"}) == set()


def test_no_room_loads_an_mlops_package_when_imported() -> None:
    """kfp, mlflow and their like cost seconds, and only some environments have them: imported when they are used."""
    owner = "radloop.learning.tracking"  # imported by nobody at its top
    names = [name for name in modules() if name != owner and not name.endswith("__main__") and "migrations" not in name]
    code = f"import importlib\nfor name in {names!r}: importlib.import_module(name)"
    assert loaded(code) & MLOPS == set()


def test_nothing_large_is_committed() -> None:
    """A clone must stay small: images and weights have their own places."""
    assert [path.relative_to(ROOT) for path in tracked() if path.stat().st_size > 1_000_000] == []


def test_locks_are_pinned_hashed_and_name_no_place() -> None:
    """A lock with an address in it works only where it was made; one without hashes installs what a mirror makes up."""
    for lock in (ROOT / "locks").glob("*.txt"):
        text = lock.read_text()
        assert "://" not in text, lock.name
        assert "@ file" not in text, lock.name
        entries = [entry for entry in re.split(r"\n(?=[a-z0-9])", text) if not entry.startswith("#")]
        assert entries, lock.name
        for entry in entries:
            assert re.match(
                r"[a-z0-9-]+(\[[a-z0-9,-]+\])?==[^\s\\]+( ; [^\\]+)? \\\n +--hash=sha256:[0-9a-f]{64}", entry
            ), entry[:80]


def locked(name: str) -> dict[str, str]:
    """Return the version of each package in a lock."""
    return dict(
        re.findall(r"^([a-z0-9-]+)(?:\[[^\]]*\])?==([^\s\\]+)", (ROOT / f"locks/{name}.txt").read_text(), re.MULTILINE)
    )


@pytest.mark.parametrize(
    ("lock", "package", "extras"),
    [
        ("core", "radloop", ["pixels", "train", "serve", "demo"]),
        ("tfdv", "radloop", []),
        ("tfdv", "radloop-tfdv", []),
        ("airflow", "radloop", []),
        ("airflow", "radloop-airflow", []),
    ],
)
def test_locks_hold_what_the_packages_ask_for(lock: str, package: str, extras: list[str]) -> None:
    """A dependency added without `make lock` would be missing on every machine but its author's."""
    project = tomllib.loads((ROOT / f"packages/{package}/pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    versions = locked(lock)
    for requirement in map(Requirement, wanted):
        name = canonicalize_name(requirement.name)
        if name != "radloop":
            assert name in versions, f"{name}: make lock"
            assert requirement.specifier.contains(versions[name], prereleases=True), f"{requirement}: make lock"


def test_an_orchestrator_has_nothing_that_trains() -> None:
    """An Airflow worker that must hold torch is a worker nobody upgrades; stages run in environments of their own."""
    heavy = {"torch", "monai", "mlflow", "mlflow-skinny", "kfp", "onnxruntime", "tensorflow", "kubernetes"}
    assert heavy & set(locked("airflow")) == set()


def test_no_path_of_a_machine_is_committed() -> None:
    """What works only where it was written does not work."""
    places = re.compile("|".join(["/ro" + "ot/", "/ho" + "me/[a-z]+/", "/wo" + "rk/", "/Us" + "ers/"]))
    text = {".py", ".toml", ".md", ".txt", ".in", ".yaml", ".yml", ".json", ".j2", ""}
    found = [
        path.relative_to(ROOT)
        for path in tracked()
        if path.suffix in text and places.search(path.read_text("utf-8", "ignore"))
    ]
    assert found == []


def test_generated_docs_are_what_the_code_says() -> None:
    """A reader of docs/schemas or docs/cli.md would be told what was true last month."""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/generate_docs.py", "--check"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def commands(page: Path) -> Iterator[list[str]]:
    """Yield each command line in the page's code blocks that starts with `make` or `radloop`."""
    text = page.read_text()
    blocks = re.findall(r"^```(?:sh|bash|console)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()] + re.findall(r"^    (.*)$", text, re.MULTILINE)
    for line in lines:
        words = (
            shlex.split(line.strip().removeprefix("$ "), comments=True)
            if re.match(r"\s*(\$ )?(make|radloop)\b", line)
            else []
        )
        if words:
            yield words


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_commands_in_the_papers_exist(page: str) -> None:
    """The first command a stranger types must not be one we renamed."""
    import typer

    from radloop.cli.app import make_app

    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    top = typer.main.get_command(make_app())
    found = list(commands(ROOT / page))
    assert found
    for words in found:
        if words[0] == "make":
            named = {word for word in words[1:] if "=" not in word}
            assert named <= targets, words
            continue
        command, rest = top, words[1:]
        while rest and rest[0] in getattr(command, "commands", {}):
            command, rest = command.commands[rest[0]], rest[1:]
        assert not getattr(command, "commands", {}) or not rest or rest[0].startswith("-"), f"no such command: {words}"
        known = {name for parameter in command.params for name in parameter.opts + parameter.secondary_opts} | {
            "-h",
            "--help",
        }
        assert {word.split("=")[0] for word in rest if word.startswith("--")} <= known, words
