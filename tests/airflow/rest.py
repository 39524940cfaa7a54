"""A running Airflow as an outsider sees it: its REST API."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx


class Airflow:
    """The API of an Airflow on loopback.

    Args:
        home: its AIRFLOW_HOME, where the password lies.
        port: where it answers.
    """

    def __init__(self, home: Path, port: int) -> None:
        self.home, self.port = home, port
        passwords = json.loads((home / "simple_auth_manager_passwords.json.generated").read_text())
        ((self.user, password),) = passwords.items()
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120)
        told = self._client.post("/auth/token", json={"username": self.user, "password": password}).json()
        self._client.headers["Authorization"] = f"Bearer {told['access_token']}"

    def close(self) -> None:
        """Hang up."""
        self._client.close()

    def get(self, path: str, **query: Any) -> Any:
        """A resource under /api/v2."""
        return self._done(self._client.get(f"/api/v2/{path}", params=query)).json()

    def _done(self, answer: httpx.Response) -> httpx.Response:
        """An answer, or the error that it tells of; of one that is Airflow's own fault, what its log says."""
        if answer.is_server_error:
            log = (self.home / "logs" / "api-server.log").read_text(errors="replace")
            raise AssertionError(f"{answer.request.method} {answer.url}: {answer.status_code}\n{log[-5000:]}")
        return answer.raise_for_status()

    def trigger(self, dag_id: str) -> str:
        """Start a DAG; the run's id."""
        asked = {"logical_date": None, "conf": {}}
        return str(self._done(self._client.post(f"/api/v2/dags/{dag_id}/dagRuns", json=asked)).json()["dag_run_id"])

    def wait_for_dag(self, dag_id: str) -> None:
        """Wait until the DAG processor has read a DAG."""

        def known() -> bool:
            return self._client.get(f"/api/v2/dags/{dag_id}/details").status_code == 200

        wait_until(known, 120, lambda: f"{dag_id} is not read: {self.get('importErrors')}")

    def state(self, dag_id: str, run: str) -> str:
        """Of a DAG run."""
        return str(self.get(f"dags/{dag_id}/dagRuns/{run}")["state"])

    def states(self, dag_id: str, run: str) -> dict[str, str]:
        """Of a run's tasks."""
        found = self.get(f"dags/{dag_id}/dagRuns/{run}/taskInstances", limit=100)["task_instances"]
        return {task["task_id"]: str(task["state"]) for task in found}

    def runs(self, dag_id: str) -> list[tuple[str, str]]:
        """Id and state of a DAG's runs, oldest first."""
        found = self.get(f"dags/{dag_id}/dagRuns", limit=100, order_by="start_date")["dag_runs"]
        return [(run["dag_run_id"], run["state"]) for run in found]

    def log(self, dag_id: str, run: str, task: str, tries: int = 1) -> str:
        """What a task said."""
        told = self.get(f"dags/{dag_id}/dagRuns/{run}/taskInstances/{task}/logs/{tries}", map_index=-1)
        return "\n".join(line if isinstance(line, str) else json.dumps(line) for line in told["content"])

    def end(self, dag_id: str, run: str, task: str) -> None:
        """Mark a task as failed."""
        path = f"/api/v2/dags/{dag_id}/dagRuns/{run}/taskInstances/{task}"
        self._done(self._client.patch(path, json={"new_state": "failed"}))

    def clear(self, dag_id: str, run: str, task: str) -> None:
        """Have a task and all behind it run again."""
        asked = {
            "dag_run_id": run,
            "task_ids": [task],
            "include_downstream": True,
            "only_failed": False,
            "dry_run": False,
        }
        self._done(self._client.post(f"/api/v2/dags/{dag_id}/clearTaskInstances", json=asked))

    def asked(self, dag_id: str = "~", run: str = "~") -> list[dict[str, Any]]:
        """What waits for a person in Required Actions."""
        found = self.get(f"dags/{dag_id}/dagRuns/{run}/hitlDetails", response_received=False, limit=100)["hitl_details"]
        return [one for one in found if one["task_instance"]["state"] == "awaiting_input"]

    def answer(self, one: dict[str, Any], option: str, why: str = "") -> None:
        """Answer as the person who is signed in would: after reading it (see MIN_HEARTBEAT_INTERVAL in the standalone)."""
        age = datetime.now(UTC) - datetime.fromisoformat(one["created_at"])
        time.sleep(max(0.0, 5.0 - age.total_seconds()))
        task = one["task_instance"]
        path = f"dags/{task['dag_id']}/dagRuns/{task['dag_run_id']}/taskInstances/{task['task_id']}/{task['map_index']}"
        body = {"chosen_options": [option], "params_input": {"why": why}}
        self._done(self._client.patch(f"/api/v2/{path}/hitlDetails", json=body))


def wait_until(true: Callable[[], bool], seconds: float, why: Callable[[], str] = lambda: "") -> None:
    """Look twice a second until it is true. Raises AssertionError with `why` after so many seconds."""
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, why()
        time.sleep(0.5)
