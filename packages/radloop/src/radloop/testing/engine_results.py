"""A pytest plugin: what each engine's conformance suite found, kept as `DIR/ENGINE.json` for docs/engines.md.

    pytest -p radloop.testing.engine_results --engine-results docs/engines

A run of a whole suite that finds something else than what is kept fails, so that the page cannot say what is no longer so;
`--engine-results-write` keeps what was found.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the plugin's options."""
    group = parser.getgroup("radloop")
    group.addoption("--engine-results", metavar="DIR", type=Path, help="where the engines' results are kept")
    group.addoption("--engine-results-write", action="store_true", help="keep what the suites found")


def pytest_configure(config: pytest.Config) -> None:
    """Watch the session, if it is told where results are kept."""
    if (folder := config.getoption("--engine-results")) is not None:
        write = config.getoption("--engine-results-write")
        config.pluginmanager.register(_Results(config.rootpath / folder, write=write), "radloop-engine-results")


class _Results:
    def __init__(self, folder: Path, *, write: bool) -> None:
        self.folder, self.write = folder, write
        self.wanted: dict[str, set[str]] = {}
        self.found: dict[str, dict[str, str]] = {}
        self.differs: list[str] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Find the engines whose whole suite is about to run."""
        from radloop.testing.engine_suite import EngineSuite

        cases = {name for name in vars(EngineSuite) if name.startswith("test_")}
        for item in items:
            suite = getattr(item, "cls", None)
            if isinstance(suite, type) and issubclass(suite, EngineSuite) and suite.name and item.name in cases:
                self.wanted.setdefault(suite.name, set()).add(item.name)
                item.user_properties.append(("radloop-engine", suite.name))
        self.wanted = {engine: names for engine, names in self.wanted.items() if names == cases}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note what passed."""
        engine = dict(report.user_properties).get("radloop-engine")
        if engine in self.wanted and (report.when == "call" or report.failed or report.skipped):
            name = report.nodeid.rpartition("::")[2]
            if self.found.setdefault(str(engine), {}).get(name, "passed") == "passed":
                self.found[str(engine)][name] = report.outcome

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Keep the results of whole suites, or fail where they are not those that are kept."""
        for engine, names in self.wanted.items():
            found = self.found.get(engine, {})
            if set(found) != names:
                continue
            path = self.folder / f"{engine}.json"
            kept = json.loads(path.read_text()) if path.exists() else {}
            # What cannot be tried here (a small disk is mounted by root only) says nothing against what is kept.
            found = {name: kept.get(name, told) if told == "skipped" else told for name, told in found.items()}
            text = json.dumps(dict(sorted(found.items())), indent=1) + "\n"
            if self.write:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
            elif not path.exists() or path.read_text() != text:
                self.differs.append(str(path))
        if self.differs and session.exitstatus == 0:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Say what to do."""
        for path in self.differs:
            terminalreporter.write_line(
                f"{path} is not what the suite found\n  next: the same tests with --engine-results-write, then make docs",
                red=True,
            )
