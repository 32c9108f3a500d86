"""GET /metrics: what the engine counts and what the server counts, as Prometheus reads it."""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from abyssal.serve.service import Service

_GAUGES = {
    "running": "Sequences being decoded or taken in.",
    "waiting": "Requests in the queue.",
    "pages_total": "Pages of the latent cache.",
    "pages_free": "Pages that nobody holds.",
    "pages_cached": "Free pages that hold a prefix.",
    "page_bytes": "Bytes of a page.",
    "cached_rows": "Tokens of running sequences in the cache.",
    "mha_bytes_a_token": "What multi-head attention of the same shape would hold for a token.",
    "latent_bytes_a_token": "What the latent cache holds for a token.",
    "tokens_per_second": "Generated, over the last second or so.",
    "speculating": "1 if the last step drafted.",
    "uptime": "Seconds since the engine started.",
}
_COUNTERS = {
    "requests": "Requests taken.",
    "steps": "Steps of the model.",
    "prompt_tokens": "Tokens of prompts.",
    "cached_tokens": "Of these, found in the prefix cache.",
    "generated_tokens": "Tokens generated.",
    "preemptions": "Sequences put back into the queue for want of pages.",
    "evicted_pages": "Pages whose prefix gave way to another.",
    "copied_pages": "Pages copied since a sample wrote into a shared one.",
    "step_seconds": "Seconds spent in steps.",
    "idle_seconds": "Seconds between steps while there was work.",
}
_HISTOGRAMS = {
    "queue_time": "Seconds from a request's arrival to its first step.",
    "first_token": "Seconds from a request's arrival to its first token.",
    "between_tokens": "Seconds between two tokens of a sequence.",
}
_POSITIONS = {"drafted": "Tokens drafted, by place in the draft.", "accepted": "Drafted tokens that were accepted."}


class Metrics:
    """Asked, it reads the engine's newest numbers; `answered` counts what the server said."""

    def __init__(self, service: Service) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._answered: Counter[tuple[str, int]] = Counter()
        self._registry.register(_Numbers(service, self._answered))

    def answered(self, route: str, status: int) -> None:
        self._answered[route, status] += 1

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _Numbers(Collector):
    def __init__(self, service: Service, answered: Counter[tuple[str, int]]) -> None:
        self._service, self._answered = service, answered

    def collect(self) -> Iterable[Metric]:
        service = self._service
        yield from engine_metrics(service.engine.stats())
        yield GaugeMetricFamily("abyssal_engine_alive", "1 unless the engine has ended.", _alive(service))
        yield GaugeMetricFamily("abyssal_engine_pid", "Process of the engine.", service.engine.pid)
        yield GaugeMetricFamily("abyssal_http_in_flight", "Requests being answered.", service.in_flight)
        slow = CounterMetricFamily("abyssal_http_slow_readers", "Streams ended since their client didn't read.")
        slow.add_metric([], service.slow_readers)
        yield slow
        answered = CounterMetricFamily("abyssal_http_responses", "Answers.", labels=("route", "status"))
        for (route, status), count in self._answered.items():
            answered.add_metric((route, str(status)), count)
        yield answered


def engine_metrics(stats: dict[str, Any]) -> Iterator[Metric]:
    """Of `abyssal.engine.metrics.Metrics.snapshot`; what it lacks is left out."""
    for name, help in _GAUGES.items():
        if name in stats:
            yield GaugeMetricFamily(f"abyssal_{name}", help, float(stats[name]))
    for name, help in _COUNTERS.items():
        if name in stats:
            counter = CounterMetricFamily(f"abyssal_{name}", help)
            counter.add_metric([], float(stats[name]))
            yield counter
    prompt, cached = stats.get("prompt_tokens", 0), stats.get("cached_tokens", 0)
    rate = "Share of the prompts' tokens found in the prefix cache."
    yield GaugeMetricFamily("abyssal_prefix_hit_rate", rate, cached / prompt if prompt else 0.0)
    for name, help in _POSITIONS.items():
        counter = CounterMetricFamily(f"abyssal_{name}_tokens", help, labels=("position",))
        for position, count in enumerate(stats.get(name, ())):
            counter.add_metric((str(position),), count)
        yield counter
    acceptance = GaugeMetricFamily("abyssal_acceptance", "Accepted of drafted, by place.", labels=("position",))
    for position, (drafted, accepted) in enumerate(zip(stats.get("drafted", ()), stats.get("accepted", ()))):
        acceptance.add_metric((str(position),), accepted / drafted if drafted else 0.0)
    yield acceptance
    finished = CounterMetricFamily("abyssal_finished", "Samples that ended, by why.", labels=("reason",))
    for reason, count in stats.get("finished", {}).items():
        finished.add_metric((reason,), count)
    yield finished
    load = CounterMetricFamily("abyssal_expert_tokens", "Tokens sent to each expert.", labels=("layer", "expert"))
    for layer, counts in enumerate(stats.get("expert_load", ())):
        for expert, count in enumerate(counts):
            load.add_metric((str(layer), str(expert)), count)
    yield load
    for name, help in _HISTOGRAMS.items():
        if name in stats:
            found = stats[name]
            bounds = [*map(str, found["bounds"]), "+Inf"]
            buckets = list(zip(bounds, accumulate(found["counts"])))
            yield HistogramMetricFamily(f"abyssal_{name}_seconds", help, buckets, found["sum"])


def _alive(service: Service) -> int:
    return int(not service.engine.dead.is_set())
