"""Figures for Prometheus, where its client (the extra `metrics`) is installed; otherwise nothing is counted.

With several workers each keeps its figures in a folder that all share (`PROMETHEUS_MULTIPROC_DIR`, which must be set
before this module is imported), and any of them answers for all.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Literal

try:
    import prometheus_client
    from prometheus_client import multiprocess
except ImportError:
    AVAILABLE = False
else:
    AVAILABLE = True

FOLDER = "PROMETHEUS_MULTIPROC_DIR"

if AVAILABLE:
    CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # it has no types here (0.26)
    _turns = prometheus_client.Counter("chatkit_turns", "Requests for a turn that have ended", ["outcome"])
    _first_token = prometheus_client.Histogram(
        "chatkit_time_to_first_token_seconds",
        "From the request to the first word of the model",
        buckets=(0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120),
    )
    _streams = prometheus_client.Gauge(
        "chatkit_open_streams", "Answers that are being streamed", multiprocess_mode="livesum"
    )
    _store = prometheus_client.Histogram(
        "chatkit_store_seconds",
        "How long the database took, with the wait for it",
        ["kind"],
        buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
    )
    _store_by_kind = {kind: _store.labels(kind) for kind in ("read", "write")}
    _jwks = prometheus_client.Counter("chatkit_jwks_fetches", "Fetches of the issuer's keys", ["result"])
    _quota = prometheus_client.Counter("chatkit_quota_refusals", "What was refused for a quota", ["quota"])
    _tokens = prometheus_client.Counter("chatkit_tokens", "Tokens that models used", ["model", "direction"])


def count_turn(outcome: str, first_token_seconds: float | None) -> None:
    """Count a request for a turn that has ended, whether a turn began or was refused."""
    if AVAILABLE:
        _turns.labels(outcome).inc()
        if first_token_seconds is not None:
            _first_token.observe(first_token_seconds)


def count_open_streams(change: Literal[1, -1]) -> None:
    if AVAILABLE:
        _streams.inc(change)


def store_latency(kind: Literal["read", "write"]) -> AbstractContextManager[object]:
    """Return what measures the work of the database that is done inside."""
    return _store_by_kind[kind].time() if AVAILABLE else nullcontext()


def count_jwks_fetch(*, failed: bool) -> None:
    if AVAILABLE:
        _jwks.labels("failed" if failed else "fetched").inc()


def count_quota_refusal(quota: str) -> None:
    """Count a refusal; `quota` is that of `QuotaExceeded`."""
    if AVAILABLE:
        _quota.labels(quota).inc()


def count_tokens(model: str, input_tokens: int, output_tokens: int) -> None:
    if AVAILABLE:
        _tokens.labels(model, "input").inc(input_tokens)
        _tokens.labels(model, "output").inc(output_tokens)


def exposition() -> bytes:
    """Return all figures in Prometheus' text format: of this process, or of all that share its folder."""
    folder = os.environ.get(FOLDER)
    if folder is None:
        return prometheus_client.generate_latest()
    _forget_dead(Path(folder))
    registry = prometheus_client.CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]  # it has no types here (0.26)
    return prometheus_client.generate_latest(registry)


@contextmanager
def shared_folder() -> Iterator[None]:
    """Keep a folder for the figures of the workers that are started inside."""
    with tempfile.TemporaryDirectory(prefix="chatkit-metrics-", ignore_cleanup_errors=True) as folder:
        os.environ[FOLDER] = folder
        try:
            yield
        finally:
            del os.environ[FOLDER]


def _forget_dead(folder: Path) -> None:
    """Remove what processes that are gone had open; what they had counted stays."""
    for file in folder.glob("gauge_live*_*.db"):
        pid = file.stem.rpartition("_")[2]
        try:
            with suppress(PermissionError):  # it is there, and is another user's
                os.kill(int(pid), 0)
        except ProcessLookupError:
            file.unlink(missing_ok=True)
