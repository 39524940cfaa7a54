"""Sensors: what a DAG waits for before it begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator
from airflow.sdk.exceptions import AirflowException

from radloop_airflow.core import Core
from radloop_airflow.operators import refused
from radloop_airflow.triggers import RadloopDueTrigger

if TYPE_CHECKING:
    from airflow.sdk import Context


class RadloopDueSensor(BaseOperator):
    """Waits in the triggerer, holding no worker, until a pipeline has something new to do.

    For `prepare` that is complete studies in the catalog, for `release` MLflow's alias `challenger` on a version not tried yet;
    see `radloop engine due`. The DAG's parameter `always` passes it at once. Where the question cannot be answered (MLflow is
    down) the task fails, and Airflow tries again as `retries` says.

    Args:
        project, core: see `Core`.
        pipeline: the pipeline asked about.
        poke_s: seconds between two questions.
    """

    ui_color = "#e6f1f2"

    def __init__(self, *, project: str, pipeline: str, core: str = "", poke_s: float = 30.0, **options: Any) -> None:
        super().__init__(**options)
        self.project, self.core, self.pipeline, self.poke_s = project, core, pipeline, poke_s

    def execute(self, context: Context) -> str:
        """Ask once here, and go to the triggerer if it is not due yet."""
        if context["params"].get("always"):
            return "asked for by a person"
        with refused(retry=True):
            told = Core(self.project, self.core).ask("engine", "due", self.pipeline)
        self.log.info("%s is %s: %s", self.pipeline, "due" if told["due"] else "not due", told["why"])
        if told["due"]:
            return str(told["why"])
        trigger = RadloopDueTrigger(project=self.project, core=self.core, pipeline=self.pipeline, poke_s=self.poke_s)
        self.defer(trigger=trigger, method_name="execute_complete")
        return ""

    def execute_complete(self, context: Context, event: dict[str, Any]) -> str:
        """Go on, with the trigger's reason in the log."""
        if "error" in event:
            raise AirflowException(event["error"])
        self.log.info("%s is due: %s", self.pipeline, event["why"])
        return str(event["why"])
