"""`radloop serve`, `predict`, `rollback`: a model in use."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from radloop.cli import output
from radloop.cli.common import FAILED, HERE, Json, Project, actor, catalog_at, command, settings_at, short
from radloop.errors import ServingError

if TYPE_CHECKING:
    from radloop.catalog.store import Catalog
    from radloop.serving.desired import ModelRef, State
    from radloop.serving.pool import Pool
    from radloop.settings import Settings


def register(app: typer.Typer) -> None:
    """Add `serve`, `predict` and `rollback`."""

    @command(
        app,
        "serve",
        examples=("radloop serve", "radloop serve --port 0 --ready-file /run/radloop/serve.json"),
        after="`radloop run release` (in another terminal) gives it a model; `radloop predict FILE` asks it.",
    )
    def serve(
        port: Annotated[
            int | None, typer.Option("--port", help="Instead of [serve] port; 0: any free one.", show_default=False)
        ] = None,
        ready_file: Annotated[
            Path | None, typer.Option("--ready-file", help="JSON with host, port, pid, written once it listens.")
        ] = None,
        project: Project = HERE,
        json: Json = False,
    ) -> None:
        """Serve predictions over the Open Inference Protocol (REST), until Ctrl-C or SIGTERM.

        Starts the gateway and one predictor for each model in use, keeps them running, and follows what releases ask
        for. Before the first release it answers 503. On SIGTERM requests under way are answered first. With a Gateway
        under [serve.kserve] predictors run on that cluster, and go on without this process.
        """
        settings = settings_at(project)
        if settings.serve.kserve.gateway:
            from radloop.cli.kserve import serve_on_cluster

            serve_on_cluster(project, settings, ready_file=ready_file, json=json)
        else:
            serve_until_stopped(project, settings, port=port, ready_file=ready_file, json=json)

    @command(
        app,
        "predict",
        examples=("radloop predict study/*.dcm --site site-a", "radloop predict image.dcm --json"),
        after="`radloop trace PREDICTION` leads from an answer to the images that trained the model.",
    )
    def predict(
        files: Annotated[
            list[Path], typer.Argument(metavar="FILE...", help="DICOM files.", exists=True, dir_okay=False)
        ],
        site: Annotated[
            str, typer.Option("--site", help="The sender's site code; needed where files have no IssuerOfPatientID.")
        ] = "",
        url: Annotated[
            str | None, typer.Option("--url", help="The gateway, if it is not this project's own.", show_default=False)
        ] = None,
        project: Project = HERE,
        json: Json = False,
    ) -> None:
        """Ask the served model about DICOM files. They are pseudonymised in memory before anything is logged.

        The answer supports a person's reading and never replaces it. Files that are refused are named, and the exit
        code is then 1.
        """
        answers = ask(project, settings_at(project), files, site=site, url=url)
        if json:
            output.print_json(answers)
        else:
            output.print_table(
                "Predictions",
                ["file", "probability", "decision", "model version", "prediction"],
                [
                    (a["file"], "", a["error"].splitlines()[0], "", "")
                    if "error" in a
                    else (a["file"], f"{a['probability']:.3f}", a["decision"], a["version"], a["id"])
                    for a in answers
                ],
            )
        if any("error" in answer for answer in answers):
            raise typer.Exit(FAILED)

    @command(
        app,
        "rollback",
        examples=("radloop rollback --why 'agreement fell at site B'", "radloop rollback --to 3"),
        after="`radloop status` shows what is served now; `radloop ledger --kind rollback` that it was recorded.",
    )
    def rollback(
        to: Annotated[
            str | None,
            typer.Option("--to", metavar="VERSION", help="A version that was champion.", show_default="the one before"),
        ] = None,
        why: Annotated[str, typer.Option("--why", help="The reason, for the ledger. No patient's data.")] = "",
        by: Annotated[
            str | None, typer.Option("--by", metavar="NAME", help="Your name.", show_default="the system's user")
        ] = None,
        project: Project = HERE,
        json: Json = False,
    ) -> None:
        """Go back to the champion before this one, at once: in serving, in the registry and in the ledger.

        While a challenger is under trial, this takes the challenger out and leaves the champion; run it again to go on
        to the champion before. With --to it goes straight to a version that was champion once. Without a running
        `radloop serve` it takes effect when that starts.
        """
        settings_at(project)
        with catalog_at(project) as catalog:
            told = roll_back(project, catalog, to=to, why=why, by=actor(by))
        if json:
            output.print_json(told)
        else:
            print(told["message"])


def serve_until_stopped(
    project: Path, settings: Settings, *, port: int | None, ready_file: Path | None, json: bool
) -> None:
    """Run the supervisor in this process. Raises ServingError if the port is busy or another one serves this project."""
    from radloop.cli.foreground import announced, ending_with, secret_file
    from radloop.serving.supervisor import Supervisor

    with ExitStack() as stack:
        key = stack.enter_context(secret_file(settings.deidentify.key, project))
        token = stack.enter_context(secret_file(settings.serve.token, project)) if settings.serve.token else None
        host = settings.serve.host
        supervisor = Supervisor(
            project,
            gateway_port=settings.serve.port if port is None else port,
            key_file=key,
            token_file=token,
            host=host,
            pools=pools_of(project, settings),
        )

        bound = [0]

        def ready(at: int) -> None:
            bound[0] = at
            stack.enter_context(announced(ready_file, host, at))
            line = f"radloop serve: http://{host}:{at} (Open Inference Protocol v2); Ctrl-C ends it"
            output.tell(line, stderr=json)
            for name, pool in settings.serve.pools.items():
                several = output.plural(len(pool.servers), "server")
                output.tell(f"radloop serve: http://{host}:{pool.port} is {several} ({name}, {pool.kind})", stderr=json)

        with ending_with(supervisor.stop):
            supervisor.run(on_ready=ready)
    if json:
        output.print_json({"ended": True, "host": host, "port": bound[0]})
    else:
        output.tell("radloop serve: ended")


def pools_of(project: Path, settings: Settings) -> list[Pool]:
    """The pools of radloop.toml, with their tokens. Raises ServingError as `Pool`, SettingsError as `secret`."""
    from radloop.serving.pool import Pool
    from radloop.settings import secret

    return [
        Pool(
            name=name,
            kind=told.kind,
            port=told.port,
            servers=told.servers,
            token=secret(told.token, project).decode() if told.token else "",
        )
        for name, told in settings.serve.pools.items()
    ]


def ask(project: Path, settings: Settings, files: list[Path], *, site: str, url: str | None) -> list[dict[str, Any]]:
    """Send the files one after another: for each the answer, or `error`.

    Raises:
        ServingError: nobody serves there.
    """
    import httpx
    import msgspec

    from radloop.serving.client import predict_dicom
    from radloop.serving.rollout import gateway_url
    from radloop.settings import secret

    where = url or gateway_url(project)
    token = secret(settings.serve.token, project).decode() if settings.serve.token else None
    answers: list[dict[str, Any]] = []
    with httpx.Client() as client, output.progress("predict") as progress:
        for number, path in enumerate(files, 1):
            try:
                said = predict_dicom(where, path.read_bytes(), site=site, token=token, client=client)
            except ServingError as error:
                if error.what == "no answer from the predictor":
                    raise
                answers.append({"file": str(path), "error": str(error)})
            else:
                answers.append({"file": str(path), **msgspec.to_builtins(said)})
            progress(number, len(files))
    return answers


def roll_back(project: Path, catalog: Catalog, *, to: str | None, why: str, by: str) -> dict[str, Any]:
    """Serve another model: desired state first (patients first), then the ledger, then the registry's alias."""
    from radloop.serving.desired import Desired, desire, desired, supervisor_pid
    from radloop.serving.rollout import rolled_back, wait_for

    before = (desired(project) or Desired()).models
    state = rolled_back(project) if to is None else _state_of(project, catalog, to)
    now = state.models.champion
    assert now is not None or before.champion is None
    generation = desire(project, state)
    payload = {
        "step": "rollback",
        "from": _version(before.challenger if before.challenger and now == before.champion else before.champion),
        "to": _version(now),
        "why": why,
    }
    catalog.ledger.append("rollback", now.model_digest if now else "none", payload, actor=by)
    serving = supervisor_pid(project) is not None
    if serving:
        with output.progress("roll back") as progress:
            wait_for(project, generation, progress=progress)
    moved = _move_alias(project, now) if now is not None and (to or now != before.champion) else ""
    return {
        **payload,
        "model_digest": now.model_digest if now else None,
        "in_effect": serving,
        "message": _say_rolled_back(before.challenger, before.champion, now, serving=serving) + moved,
    }


def _state_of(project: Path, catalog: Catalog, version: str) -> State:
    """The state that serves a version that was promoted once.

    Raises:
        ServingError: it never was champion, or its package is gone.
    """
    from radloop.serving.desired import Desired, Models, State, desired

    now = (desired(project) or Desired()).models
    once = [row for row in catalog.ledger.rows(kind="release") if row.payload.get("step") == "promoted"]
    digests = {str(row.payload.get("version")): row.subject for row in once}
    if version not in digests:
        raise ServingError(
            f"version {version} never was the champion",
            expected=f"one of {', '.join(digests)}" if digests else "a version that was promoted",
            got=version,
            next_step="only what passed the gates and a release can be rolled back to: radloop run release",
        )
    digest = digests[version]
    if now.champion is not None and now.champion.model_digest == digest:  # a rollback that was interrupted ends here
        return State(models=Models(champion=now.champion, previous=now.previous))
    known = [ref for ref in (now.previous, now.challenger) if ref is not None and ref.model_digest == digest]
    return State(models=Models(champion=known[0] if known else _find_package(project, catalog, digest, version)))


def _find_package(project: Path, catalog: Catalog, digest: str, version: str) -> ModelRef:
    """Where the package of a model lies."""
    from radloop.serving.desired import ModelRef

    place = str(catalog.model(digest).info.get("package", ""))
    if not place or not (project / place / "identity.json").is_file():
        raise ServingError(
            f"the package of version {version} is not there any more",
            expected=f"a package of model {short(digest)} under artifacts/",
            next_step="restore artifacts/ from a backup, or roll back to another version",
        )
    return ModelRef(package=place, version=version, model_digest=digest)


def _move_alias(project: Path, now: ModelRef) -> str:
    """Point the registry's champion at the model; what to add to the message if that fails. Serving does not wait for it."""
    import msgspec

    from radloop.stages.project import open_tracking

    try:
        told = msgspec.json.decode((project / now.package / "identity.json").read_bytes(), type=dict[str, str])
        open_tracking(project).set_alias(told["task"], "champion", int(now.version))
    except Exception as error:  # noqa: BLE001 - MLflow's own too: the roll-back itself is done and must be told
        return (
            f"\nThe registry was not told ({type(error).__name__}): once it answers, run "
            f"`radloop rollback --to {now.version}` again"
        )
    return ""


def _say_rolled_back(
    challenger: ModelRef | None, before: ModelRef | None, now: ModelRef | None, *, serving: bool
) -> str:
    when = "" if serving else "; it takes effect when `radloop serve` starts"
    if now == before and challenger is None:
        return f"version {_version(now)} is the champion already{when}"
    if now == before:
        said = f"the challenger, version {_version(challenger)}, was taken out; the champion is version {_version(now)}"
        return f"{said}{when}\nNext: run `radloop rollback` again to go back to the champion before"
    return f"version {_version(now)} is served again instead of version {_version(before)}{when}"


def _version(ref: ModelRef | None) -> str | None:
    return None if ref is None else ref.version
