"""The HTTP server as a Ray Serve deployment: the same app in several replicas, on several machines.

    serve run peftrank.serving.ray_serve:build store=/shared/adapters replicas=4

Each replica has a base of its own and follows the store, so what `peftrank adapters activate`
makes active is soon served by all of them. Needs the extras `peftrank[ray,serve]`.
"""

# No postponed annotations here: Ray reads the type of `build`'s argument.

from pathlib import Path

import torch
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from peftrank.serving import server
from peftrank.serving.app import create_app
from peftrank.serving.history import open_history
from peftrank.serving.logs import set_up
from peftrank.serving.metrics import Metrics
from peftrank.serving.settings import ServeSettings
from peftrank.serving.watch import Watcher


class Arguments(BaseModel):
    """What follows `serve run peftrank.serving.ray_serve:build`, as NAME=VALUE."""

    model_config = ConfigDict(extra="forbid")

    store: Path = Path("adapters")
    """Every replica must see it; name it by its whole path on a cluster."""
    domains: str | None = None
    """Those to serve, as news,video; absent: all with an active version."""
    base: str | None = None
    """Absent: the base of the first domain's adapter."""
    quantization: str | None = None
    history: str | None = None
    """See `open_history`. Replicas on several machines need redis://; absent: none is kept."""
    replicas: int = Field(1, ge=1)
    cpus: float = Field(1, gt=0)
    """Of a replica."""
    gpus: float | None = Field(None, ge=0)
    """Of a replica; absent: one, if the machine where this is read has any."""
    log_level: str = "info"


def build(arguments: Arguments) -> serve.Application:
    """Returns the application; PEFTRANK_TOKEN and PEFTRANK_ADMIN_TOKEN are read here."""
    settings = ServeSettings().with_tokens()
    gpus = arguments.gpus
    if gpus is None:
        gpus = 1 if torch.cuda.is_available() else 0

    def app() -> FastAPI:
        return _app(arguments, settings)

    deployment = serve.deployment(
        serve.ingress(app)(_Replica),
        name="peftrank",
        num_replicas=arguments.replicas,
        ray_actor_options={"num_cpus": arguments.cpus, "num_gpus": gpus},
        # The app batches what is under way, and answers 429 itself when it is too much.
        max_ongoing_requests=2 * settings.max_requests,
        graceful_shutdown_timeout_s=settings.grace_seconds,
    )
    return deployment.bind()


class _Replica:
    """What Ray asks a replica beside its requests."""

    app: FastAPI

    def check_health(self) -> None:
        """Raises RuntimeError when scoring has ended, so that Ray starts another replica."""
        if not self.app.state.service.alive:
            raise RuntimeError("the scoring thread has died")


def _app(arguments: Arguments, settings: ServeSettings) -> FastAPI:
    """Returns a replica's app, with its base and adapters loaded: Ray counts it as ready then."""
    set_up(arguments.log_level)
    domains = None
    if arguments.domains is not None:
        domains = [name.strip() for name in arguments.domains.split(",")]
    ranker = server.load_ranker(
        server.wanted_base(arguments.store, domains, arguments.base, arguments.quantization),
        device="auto",
        store=arguments.store,
        device_bytes=None,
        host_bytes=0,
        prefix_bytes=server.PREFIX_BYTES,
    )
    Watcher(ranker, Metrics(), domains=domains).load_all()
    history = None if arguments.history is None else open_history(arguments.history)
    return create_app(ranker, settings, history=history, domains=domains)
