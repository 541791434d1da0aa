"""How many requests came, and how long did they take? For Prometheus, summed over the workers.

Imported only once PROMETHEUS_MULTIPROC_DIR is set: prometheus-client decides on import where its numbers live.
"""

from functools import lru_cache

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

CONTENT_TYPE = CONTENT_TYPE_LATEST
_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

REQUESTS = Counter("llmtrain_http_requests_total", "Requests answered.", ["method", "route", "status"], registry=None)
SECONDS = Histogram("llmtrain_http_request_seconds", "Seconds to answer.", ["route"], buckets=_BUCKETS, registry=None)


@lru_cache(maxsize=1024)
def of(method: str, route: str, status: str) -> tuple[Counter, Histogram]:
    """The two that a request counts in."""
    return REQUESTS.labels(method, route, status), SECONDS.labels(route)


def exposition() -> bytes:
    """The text that Prometheus reads, over all workers."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry)
