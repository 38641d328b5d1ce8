"""Where spans go when ``telemetry.endpoint`` names a receiver: a provider of our own, in the background.

The library's exporter does the work. What it would do to the user is kept from him: a traceback on the terminal every few
seconds while the receiver is away, and an exit that waits a minute for it.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from functools import cache
from typing import Callable, Sequence
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from metagpt_localllm.transport import without_login

__all__ = ["provider_for", "traces_url"]

#: Seconds that the end of the process waits for spans to be delivered.
_PATIENCE = 3.0
_PATH = "/v1/traces"
#: ``complain``: who is told of what the library logs, in the thread that exports for us; None or missing elsewhere.
_HERE = threading.local()


def traces_url(endpoint: str) -> str:
    """The address that spans are posted to: the endpoint, with OTLP's path where it is not there already."""
    base = endpoint.rstrip("/")
    return base if base.endswith(_PATH) else base + _PATH


@cache
def provider_for(endpoint: str, tell: Callable[[str], None]) -> TracerProvider:
    """The provider whose spans go to ``endpoint``; not the application's, and not made known to it.

    OpenTelemetry's environment variables for the resource, headers, certificates, time-outs and batches hold.

    Args:
        tell: gets a warning, once, when spans cannot be delivered; from another thread.
    """
    resource = Resource.create()
    if str(resource.attributes.get("service.name", "")).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": "metagpt"}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(_Exporter(traces_url(endpoint), tell)))
    process = os.getpid()
    atexit.register(lambda: _end(provider, without_login(endpoint), tell) if os.getpid() == process else None)
    return provider


def _end(provider: TracerProvider, where: str, tell: Callable[[str], None]) -> None:
    """Delivers what there is. A receiver that is away or slow does not keep the process."""
    worker = threading.Thread(target=provider.shutdown, name="metagpt-localllm-telemetry", daemon=True)
    worker.start()
    worker.join(_PATIENCE)
    if worker.is_alive():
        tell(f"The last spans did not reach {where} within {_PATIENCE:.0f} s, and are lost (llm.local.telemetry.endpoint).")


class _Exporter(SpanExporter):
    """The library's, without its noise: what goes wrong is told once, in one line."""

    def __init__(self, url: str, tell: Callable[[str], None]) -> None:
        self._url, self._tell, self._told = url, tell, False
        self._inner = OTLPSpanExporter(endpoint=url)
        logger = logging.getLogger(OTLPSpanExporter.__module__)
        if _take_over not in logger.filters:
            logger.addFilter(_take_over)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        _HERE.complain = self._complain
        try:
            return self._inner.export(spans)
        except Exception as error:  # requests' own, and whatever the encoding of a span raises
            self._complain(_root(error))
            return SpanExportResult.FAILURE
        finally:
            _HERE.complain = None

    def shutdown(self) -> None:
        self._inner.shutdown()  # type: ignore[no-untyped-call]

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return True

    def _complain(self, why: str) -> None:
        if self._told:
            return
        self._told = True
        hint = " Port 4317 is usually OTLP over gRPC; over HTTP it is 4318." if urlsplit(self._url).port == 4317 else ""
        self._tell(f"Spans cannot be delivered to {without_login(self._url)} ({why[:200]}); those that cannot are lost. This is said once."
                   f"{hint} Setting in config2.yaml: llm.local.telemetry.endpoint.")  # fmt: skip


def _root(error: BaseException) -> str:
    """The first of what went wrong: requests and urllib3 wrap it in long words that hold the address."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {error}"


def _take_over(record: logging.LogRecord) -> bool:
    """Whether the library may log this: not what it says while it works for us."""
    complain = getattr(_HERE, "complain", None)
    if complain is None:
        return True
    complain(record.getMessage())
    return False
