"""Several engines behind one address, with Ray Serve. Needs the `ray` extra.

A replica is a process with a model, an engine and the whole application of `quota serve`. Ray's proxy listens, spreads
requests over the replicas, replaces one that dies or whose engine has stopped, and restarts them one after the other.
Answers do not depend on the replica: the same request has the same bits on each.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import queue
import secrets
import signal
from typing import Any

from fastapi import FastAPI

from quota.core.errors import QuotaError, UsageError
from quota.server.app import create_app
from quota.server.config import Settings, settings
from quota.server.logs import CountingHandler, configure
from quota.server.metrics import merged
from quota.server.service import load_recipes, with_model

log = logging.getLogger("quota.server")
NAME = "quota"  # of the application and of its only deployment
AFFINITY_ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
_LOGGING = {
    "log_level": "WARNING",
    "enable_access_log": False,
}  # of Ray; the application writes its own line per request
_PROBES = 64  # places beyond the engine's, so that a full replica still answers: probes, and 429 in OpenAI's form
_SCRAPE_S = 5.0
_LAST_BYTES_S = 1.0  # what engines have finished still has to pass the proxy


class Replica:
    """One engine and its application. generation: a new number makes Ray start new replicas and stop the old ones."""

    def __init__(self, values: dict[str, Any], generation: int) -> None:
        made = Settings(**values)
        configure(made.log_file)
        self.service = with_model(made)
        log.info(
            "serving",
            extra={
                "model": self.service.name,
                "recipes": self.service.recipes,
                "pid": os.getpid(),
                "generation": generation,
            },
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self.service, self.scrape)

    def metrics(self) -> tuple[str, bytes]:
        """(name of this replica, its metrics)."""
        from ray import serve

        return str(serve.get_replica_context().replica_id.unique_id), self.service.metrics.text()

    async def scrape(self) -> bytes:
        """The metrics of all replicas, whichever was asked; one that does not answer is left out."""
        from ray import serve

        answers = (
            await serve.get_deployment_handle(NAME, NAME)
            .broadcast("metrics")
            .results_async(timeout_s=_SCRAPE_S, return_exceptions=True)
        )
        return merged(dict(answer for answer in answers if not isinstance(answer, BaseException)))

    async def drain(self) -> None:
        """Refuse new requests and wait for the running ones, at most `drain_s`."""
        await self.service.drain()

    def check_health(self) -> None:
        """Ray replaces a replica for which this raises."""
        if not self.service.engine.healthy:
            raise RuntimeError("the engine has stopped")


def application(args: dict[str, Any]) -> Any:
    """What `serve deploy` and a RayService name as `import_path: quota.server.replicas:application`. args: any of the
    settings; those of the environment count too. Ray's proxies may listen anywhere, so API keys are needed."""
    made = settings(args)
    if not made.accepted_keys():
        raise UsageError(
            "api_keys: Ray's proxies are reachable from elsewhere; give API keys (QUOTA_SERVE_API_KEYS, or api_key_file"
            " on every node)"
        )
    return bound(made, 0)


def bound(made: Settings, generation: int) -> Any:
    """The Ray Serve application of these settings."""
    if made.device != "cpu":
        raise UsageError(
            f"device: engines behind Ray run on the CPU so far, got {made.device}; leave it at cpu, or start a server"
            " per GPU without --replicas"
        )
    from ray import serve

    replicas = max(1, made.replicas)
    options: dict[str, Any] = {
        "num_replicas": replicas,
        "max_ongoing_requests": made.max_running + made.max_waiting + _PROBES,
        "max_queued_requests": made.max_waiting,
        "graceful_shutdown_timeout_s": made.drain_s,
        "graceful_shutdown_wait_loop_s": 0.2,
        "health_check_period_s": 5,
        "max_constructor_retry_count": 3,
        # one more than there have to be: the new replica takes requests before the old one leaves
        "rolling_update_percentage": 1 / replicas,
        "max_surge_percent": math.ceil(100 / replicas),
        "ray_actor_options": {"num_cpus": threads_of(made)},
        "logging_config": _LOGGING,
    }
    if made.session_affinity:
        options["request_router_config"] = {"request_router_class": AFFINITY_ROUTER}
    values = {**made.model_dump(mode="json"), "threads": threads_of(made)}
    return serve.deployment(name=NAME, **options)(serve.ingress()(Replica)).bind(values, generation)


def threads_of(made: Settings) -> int:
    """Compute threads of one replica: all that were asked for, or its share of this machine's."""
    return made.threads or max(1, (os.cpu_count() or 1) // max(1, made.replicas))


def serve_replicas(made: Settings, handler: CountingHandler) -> None:
    """Serve until SIGTERM or SIGINT, which drain; SIGHUP opens the log file again and restarts the replicas one after
    the other, reading checkpoint, recipes and keys again. handler: of this process's log.

    On a Ray cluster of its own on this machine, or the one that RAY_ADDRESS names.
    """
    # all before the import, which reads them
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports its use to its makers otherwise
    if not os.environ.get("RAY_ADDRESS"):
        # Ray's ports are open on every interface; without a token any client that reaches one can run code. The
        # one Ray makes would stay in the home folder
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        import ray
        from ray import serve
    except ImportError as error:
        raise UsageError(
            f"replicas: needs the package {error.name}; install it from the clone: pip install -e '.[serve,ray]'"
        ) from None
    if os.environ.get("RAY_ADDRESS"):
        ray.init()
        location = "EveryNode"
    else:
        # logical processors: enough for every replica twice, since old and new ones overlap in a restart
        ray.init(num_cpus=2 * made.replicas * threads_of(made) + 1, include_dashboard=False)
        location = "HeadOnly"
    try:
        options = {"host": made.host, "port": made.port, "keep_alive_timeout_s": 15}
        serve.start(proxy_location=location, http_options=options, logging_config=_LOGGING)
        _deploy(made, 0)
        _until_told(made, handler)
    finally:
        serve.shutdown()
        ray.shutdown()


def _deploy(made: Settings, generation: int) -> None:
    """Returns when the replicas of this generation serve. UsageError when they do not start, RecipeError for a recipe
    that cannot be read."""
    from ray import serve

    load_recipes(made)  # a wrong file is an error here, not a line in a replica's log
    try:
        serve.run(bound(made, generation), name=NAME)
    except RuntimeError as error:
        raise UsageError(
            f"replicas: did not start ({str(error).splitlines()[-1]}); --log-file and Ray's logs say why"
        ) from None


def _until_told(made: Settings, handler: CountingHandler) -> None:
    from ray import serve

    told: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, frame: told.put(received))
    generation = 0
    while told.get() == signal.SIGHUP:
        generation += 1
        handler.reopen()
        log.info("restarting the replicas", extra={"generation": generation})
        try:
            _deploy(made, generation)
        except QuotaError as error:
            log.error("%s; the old replicas go on", error)
    handle = serve.get_deployment_handle(NAME, NAME)

    async def drain() -> None:
        await handle.broadcast("drain").results_async(timeout_s=made.drain_s + _SCRAPE_S, return_exceptions=True)
        await asyncio.sleep(_LAST_BYTES_S)

    try:
        asyncio.run(drain())
    except TimeoutError:
        log.error("the replicas did not drain within %g s", made.drain_s)
