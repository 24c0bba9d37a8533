"""Prometheus metrics of one server, in a registry of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from quota.runtime.engine import Engine, Usage
from quota.server.logs import lost_lines

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """`observe` is called on the engine's thread after every step, the rest on the event loop."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"quota_{name}", text, labels, registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"quota_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"quota_{name}", text, buckets=_SECONDS, registry=self.registry)

        self.running = gauge("requests_running", "Requests that hold pages")
        self.waiting = gauge("requests_waiting", "Requests in the queue")
        self.batch = gauge("batch_requests", "Requests of the last step")
        self.pages = gauge("kv_pages", "Pages in use, by layers that share a length", "layers")
        self.idle = gauge("kv_pages_idle", "Pages kept only because their content may be asked for again")
        self.free = gauge("kv_blocks_available", "Blocks that can still be allocated; a block is one layer of a page")
        self.blocks = gauge("kv_blocks", "Blocks of the pool")
        self.prepared = gauge("prepared_image_bytes", "Prepared images of requests that are not answered yet")
        self.http = counter("http_requests", "Responses", "path", "status")
        self.finished = counter("requests_finished", "Answers by reason", "reason")
        self.tokens = counter("generated_tokens", "Tokens generated")
        self.prompt = counter("prompt_tokens", "Prompt tokens of finished requests")
        self.cached = counter("prompt_tokens_cached", "Prompt tokens of finished requests that were not computed again")
        self.visual = counter("visual_tokens", "Visual tokens of finished requests")
        self.kept = counter("visual_tokens_kept", "Those alive in the last layer")
        self.ratio = gauge(
            "kept_token_ratio", "Visual tokens alive in the last layer over all, last finished request that had any"
        )
        self.preemptions = counter("preemptions", "Requests that gave their pages back to others")
        self.decoders_lost = counter(
            "image_workers_replaced", "Decoding processes that were ended: time, died, left", "reason"
        )
        self.first = histogram("time_to_first_token_seconds", "From arrival to the first token")
        self.between = histogram("inter_token_seconds", "Between tokens of a request")
        gauge("log_lines_lost", "Lines of the log that could not be written").set_function(lost_lines)
        self._seen: dict[str, int] = {}

    def observe(self, engine: Engine) -> None:
        stats, scheduler = engine.stats, engine.scheduler
        self.running.set(len(scheduler.running))
        self.waiting.set(len(scheduler.waiting))
        self.batch.set(stats.batch)
        self.idle.set(engine.pool.idle_pages())
        self.free.set(engine.pool.available)
        self.blocks.set(engine.pool.blocks)
        for name, pages in zip(stats.segments, engine.pool.held_pages(), strict=True):
            self.pages.labels(name).set(pages)
        self._advance(self.tokens, "tokens", stats.tokens)
        self._advance(self.preemptions, "preemptions", scheduler.preemptions)
        for reason, count in stats.finished.items():
            self._advance(self.finished.labels(reason), reason, count)
        for durations, target in ((stats.first_token_s, self.first), (stats.between_tokens_s, self.between)):
            while durations:
                target.observe(durations.popleft())

    def _advance(self, target: Counter, name: str, total: int) -> None:
        target.inc(total - self._seen.get(name, 0))
        self._seen[name] = total

    def observe_usage(self, usage: Usage) -> None:
        self.prompt.inc(usage.prompt_tokens)
        self.cached.inc(usage.cached_tokens)
        self.visual.inc(usage.visual_tokens)
        self.kept.inc(usage.visual_kept)
        if usage.visual_tokens:
            self.ratio.set(usage.visual_kept / usage.visual_tokens)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Merged(Collector):
    def __init__(self, texts: Mapping[str, bytes]) -> None:
        self.texts = texts

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for replica, text in sorted(self.texts.items()):
            for family in text_string_to_metric_families(text.decode()):
                known = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                known.samples += [
                    sample._replace(labels={**sample.labels, "replica": replica}) for sample in family.samples
                ]
        yield from families.values()


def merged(texts: Mapping[str, bytes]) -> bytes:
    """One exposition from those of several replicas (name -> text); every sample is labelled with its replica."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Merged(texts))
    return generate_latest(registry)
