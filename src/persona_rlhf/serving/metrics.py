"""Figures of the server for Prometheus. A user is a pseudonym here (`access.pseudonym`).

It needs the extra `serve`; no other module imports prometheus_client.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from persona_rlhf.serving.openai_api import TextChunk

_PREFIX = "persona_rlhf_"
_PATHS = ("/health", "/metrics", "/v1/models", "/v1/chat/completions")


class ServerMetrics:
    """Counters of requests, tokens and the policy filter, and the figures of the engine at the time of reading."""

    def __init__(self, figures: Callable[[], Mapping[str, float]] = dict) -> None:
        """`figures` are gauges by name."""
        self._registry = CollectorRegistry()
        self._requests = self._counter("requests", "HTTP requests by status.", "path", "status")
        self._tokens = self._counter("tokens", "Tokens of prompts and of answers.", "kind")
        self._filtered = self._counter("policy_filtered_answers", "Answers that the policy filter replaced.", "by")
        self._judged = self._counter("judged_requests", "Served requests that the watch judged.", "outcome")
        self._lapsed = self._counter("lapsed_certificates", "Certificates that lapsed in service.")
        self._registry.register(_Figures(figures))

    def _counter(self, name: str, description: str, *labels: str) -> Counter:
        return Counter(_PREFIX + name, description, ["user", *labels], registry=self._registry)

    def count_request(self, user: str, path: str, status: int) -> None:
        """Counts a response. `user` is empty without a valid token; unknown paths are counted together."""
        place = next((one for one in reversed(_PATHS) if path == one or path.startswith(f"{one}/")), "other")
        self._requests.labels(user, place, str(status)).inc()

    def counted(self, user: str, chunks: Iterable[TextChunk]) -> Iterator[TextChunk]:
        """An answer; its end adds to the tokens, and to the answers that the policy filter replaced."""
        for chunk in chunks:
            if chunk.usage is not None:
                self._tokens.labels(user, "prompt").inc(chunk.usage.prompt)
                self._tokens.labels(user, "completion").inc(chunk.usage.completion)
            if chunk.filtered is not None:
                self._filtered.labels(user, chunk.filtered).inc()
            yield chunk

    def count_judged(self, user: str, refused: bool) -> None:
        """Counts a served request whose greedy answer was judged."""
        self._judged.labels(user, "refused" if refused else "missed").inc()

    def count_lapse(self, user: str) -> None:
        """Counts a certificate that lapsed."""
        self._lapsed.labels(user).inc()

    def text(self) -> bytes:
        """All figures in Prometheus's text format 0.0.4."""
        return generate_latest(self._registry)


class _Figures(Collector):
    """Gauges that are read when Prometheus asks."""

    def __init__(self, figures: Callable[[], Mapping[str, float]]) -> None:
        self._figures = figures

    def collect(self) -> Iterator[GaugeMetricFamily]:
        for name, value in self._figures().items():
            yield GaugeMetricFamily(_PREFIX + name, name.replace("_", " ").capitalize() + ".", value)
