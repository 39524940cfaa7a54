"""`radloop export kserve`: serving on Kubernetes, as files, and onto the cluster on request."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from radloop.cli import output
from radloop.cli.common import HERE, Json, Project, catalog_at, command, settings_at, short
from radloop.errors import GateError, ServingError, SettingsError

if TYPE_CHECKING:
    from radloop.catalog.store import Catalog
    from radloop.serving.desired import ModelRef, State
    from radloop.serving.manifests import Place
    from radloop.settings import Settings


class Strategy(StrEnum):
    """Who answers, as docs/serving.md says."""

    SINGLE = "single"
    SHADOW = "shadow"
    CANARY = "canary"


class Mesh(StrEnum):
    """What routes: the Gateway API, or Istio."""

    GATEWAY = "gateway"
    ISTIO = "istio"


def register(exports: typer.Typer) -> None:
    """Add `export kserve`."""

    @command(
        exports,
        "kserve",
        examples=(
            "radloop export kserve k8s --gateway infra/edge --host radloop.example",
            "radloop export kserve k8s --strategy canary --percent 5 --apply",
        ),
        after="--apply, or kubectl apply -f DIR/predictors.yaml, wait until both are Ready, then -f DIR/routes.yaml.",
    )
    def kserve(
        directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where predictors.yaml and routes.yaml go.")],
        gateway: Annotated[
            str,
            typer.Option(metavar="NAMESPACE/NAME", help="The Gateway that leads in; that of [serve.kserve]."),
        ] = "",
        host: Annotated[
            list[str],
            typer.Option(
                "--host", help="Host names it is asked by; that of [serve.kserve] url, or all of the Gateway's."
            ),
        ] = [],  # noqa: B006 - typer's way to say a list
        strategy: Annotated[
            Strategy | None, typer.Option(help="shadow where there is a challenger, else single.", show_default=False)
        ] = None,
        percent: Annotated[
            int | None,
            typer.Option(min=0, max=100, help="A canary's share; the first of [release] steps.", show_default=False),
        ] = None,
        champion: Annotated[str, typer.Option(metavar="VERSION", help="Instead of the registry's champion.")] = "",
        challenger: Annotated[str, typer.Option(metavar="VERSION", help="Instead of the registry's challenger.")] = "",
        mesh: Annotated[
            Mesh | None,
            typer.Option(help="Gateway API's HTTPRoute, or Istio's VirtualService; that of [serve.kserve]."),
        ] = None,
        replicas: Annotated[
            int | None, typer.Option(min=1, help="Pods of each predictor; those of [serve.kserve].")
        ] = None,
        apply: Annotated[bool, typer.Option("--apply", help="Put them onto the cluster, too.")] = False,
        wait_s: Annotated[
            float, typer.Option(min=0, help="With --apply: how long predictors may take to be Ready.")
        ] = 600,
        project: Project = HERE,
        json: Json = False,
    ) -> None:
        """Write KServe predictors of champion and challenger, and the routes of a release, as YAML.

        Image, namespace, claim and Secret are those of [kubernetes], all else of [serve.kserve]. The Secret holds the
        project key, and the token of [serve], under the names of their files or variables. Promotion and roll-back write
        the files anew: --champion VERSION --strategy single. A model answers only if it was promoted, or its release was
        approved. --apply changes no route before every predictor is Ready.
        """
        from radloop.serving.manifests import manifests, to_yaml

        settings = settings_at(project)
        place = place_of(project, settings, gateway=gateway, hosts=tuple(host), replicas=replicas)
        with catalog_at(project) as catalog:
            state = state_of(project, settings, catalog, champion, challenger, strategy, percent)
        files = manifests(state, place, mesh.value if mesh else settings.serve.kserve.mesh)
        directory.mkdir(parents=True, exist_ok=True)
        for name, documents in files.items():
            (directory / name).write_bytes(to_yaml(documents))
        if apply:
            from radloop.serving.apply import Cluster, release

            cluster = Cluster(str(settings.kubernetes.get("kubeconfig", "")))
            with output.progress("predictors ready") as progress:
                release(cluster, *files.values(), timeout_s=wait_s, progress=progress)
        written = [str(directory / name) for name in files]
        told = {
            "files": written,
            "strategy": state.routing.strategy,
            "percent": state.routing.percent,
            "applied": apply,
        }
        if json:
            output.print_json(told)
        else:
            print("\n".join(written))


def serve_on_cluster(project: Path, settings: Settings, *, ready_file: Path | None, json: bool) -> None:
    """Follow releases onto the cluster, in this process. Raises ServingError if another one serves this project."""
    import sys
    from contextlib import ExitStack
    from urllib.parse import urlsplit

    from radloop.cli.foreground import announced, ending_with
    from radloop.serving.apply import Cluster
    from radloop.serving.controller import Controller

    url = settings.serve.kserve.url
    at = urlsplit(url)
    if at.scheme not in ("http", "https") or not at.hostname:
        raise SettingsError(
            "where clients reach the cluster's Gateway is not said",
            expected='[serve.kserve] url = "https://radloop.example"',
            got=url or "nothing",
        )
    cluster = Cluster(str(settings.kubernetes.get("kubeconfig", "")))
    controller = Controller(
        project, place_of(project, settings), cluster, url=url.rstrip("/"), mesh=settings.serve.kserve.mesh
    )
    port = at.port or {"http": 80, "https": 443}[at.scheme]
    with ExitStack() as stack:

        def ready() -> None:
            stack.enter_context(announced(ready_file, at.hostname or "", port))
            line = f"radloop serve: {url} (predictors on {cluster.address}); Ctrl-C ends this process, not them"
            print(line, file=sys.stderr if json else sys.stdout, flush=True)

        with ending_with(controller.stop):
            controller.run(on_ready=ready)
    if json:
        output.print_json({"ended": True, "host": at.hostname, "port": port})
    else:
        print("radloop serve: ended")


def place_of(
    project: Path, settings: Settings, *, gateway: str = "", hosts: tuple[str, ...] = (), replicas: int | None = None
) -> Place:
    """Where predictors run: by [kubernetes] and [serve.kserve], or as told. Raises SettingsError where something is missing."""
    import msgspec

    from radloop.serving.manifests import Place

    told, ours, owner = settings.kubernetes, settings.serve.kserve, project.resolve().stat()
    user, group = (owner.st_uid, owner.st_gid) if owner.st_uid else (10001, 10001)  # root's pod would not be started
    for setting in ("image", "secret"):
        if not told.get(setting):
            raise SettingsError(
                f"serving on Kubernetes needs [kubernetes] {setting}",
                expected={"image": '"registry/name:tag"', "secret": '"the name of a Secret"'}[setting],
                got="nothing",
                next_step="set it in radloop.toml; docs/serving.md, On Kubernetes",
            )
    asked_by = _name_in(ours.url)
    place = Place(
        image=told["image"],
        secret=told["secret"],
        gateway=gateway or ours.gateway,
        key=_in_secret(settings.deidentify.key),
        token=_in_secret(settings.serve.token),
        claim=told.get("claim", ""),
        host_path=told.get("host_path", "") or ("" if told.get("claim") else str(project.resolve())),
        hosts=hosts or ((asked_by,) if asked_by else ()),
        namespace=told.get("namespace", "default"),
        replicas=ours.replicas if replicas is None else replicas,
        user=user,
        group=group,
        pod=told.get("pod", {}),
    )
    return msgspec.structs.replace(place, resources=ours.resources) if ours.resources else place


def _name_in(url: str) -> str:
    """The host that a route can be for: a name, never an address."""
    from ipaddress import ip_address
    from urllib.parse import urlsplit

    host = urlsplit(url).hostname or ""
    try:
        ip_address(host)
    except ValueError:
        return host
    return ""


def _in_secret(reference: str) -> str:
    """Under which name the Secret holds what env:NAME or file:PATH refers to here."""
    return Path(reference.partition(":")[2]).name


def state_of(
    project: Path,
    settings: Settings,
    catalog: Catalog,
    champion: str,
    challenger: str,
    strategy: Strategy | None,
    percent: int | None,
) -> State:
    """What shall be served.

    Raises:
        ServingError: there is no champion or challenger, or the combination means nothing.
        GateError: the model that would answer was neither promoted nor approved; or canaries are not allowed.
    """
    from radloop.serving.desired import Models, Routing, State
    from radloop.stages.project import open_tracking

    if not champion or (not challenger and strategy is not Strategy.SINGLE):
        tracking, name = open_tracking(project), settings.task.name
        champion = champion or str(tracking.alias(name, "champion") or "")
        if strategy is not Strategy.SINGLE:
            challenger = challenger or str(tracking.alias(name, "challenger") or "")
    if not champion:
        raise ServingError(
            "there is no champion to route to",
            expected="a version with the alias champion",
            next_step="--champion VERSION names the first; radloop approve its release before",
        )
    challenger = "" if challenger == champion else challenger
    chosen = strategy or (Strategy.SHADOW if challenger else Strategy.SINGLE)
    share = 0
    if chosen is Strategy.CANARY:
        share = settings.release.steps[0] if percent is None else percent
    elif percent:
        raise ServingError("only a canary has a share", expected="--strategy canary", got=f"{chosen} with {percent} %")
    models = Models(
        champion=model_of(catalog, champion), challenger=model_of(catalog, challenger) if challenger else None
    )
    state = State(models=models, routing=Routing(chosen.value, share))
    _check_allowed(project, settings, catalog, state)
    return state


def model_of(catalog: Catalog, version: str) -> ModelRef:
    """A registered version's package. Raises DataError where there is no such version."""
    from radloop.serving.desired import ModelRef

    model = catalog.model(version)
    return ModelRef(package=str(model.info["package"]), version=str(model.version), model_digest=model.digest)


def _check_allowed(project: Path, settings: Settings, catalog: Catalog, state: State) -> None:
    """Hold a cluster to what `radloop run release` holds this machine to."""
    from radloop.stages.approvals import approved

    answering = [state.models.champion]
    if state.routing.strategy == "canary":
        if not settings.release.clinical_canary:
            raise GateError(
                "a canary's answers reach clinicians",
                expected="[release] clinical_canary = true",
                got="false",
                next_step="--strategy shadow asks it without anybody seeing its answers",
            )
        answering.append(state.models.challenger)
    role = settings.release.approver_role
    for model in answering:
        assert model is not None
        rows = catalog.ledger.rows(kind="release", subject=model.model_digest)
        package = str(catalog.model(model.model_digest).info.get("package_digest", ""))
        if any(row.payload.get("step") == "promoted" for row in rows) or approved(project, catalog, package, role):
            continue
        raise GateError(
            f"version {model.version} may not answer: it was neither promoted nor approved",
            expected=f"an approval of package {short(package)} by someone who is {role}",
            got="none in the ledger",
            next_step="radloop run release, then radloop approve; --strategy shadow needs none for the challenger",
        )
