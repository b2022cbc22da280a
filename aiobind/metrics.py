"""Law: monitoring reads what ``connector.stats()`` says, under a name with a unit; nothing is counted or kept here.

    Collector    ``Collector(connector)``, to be registered with prometheus_client
    Instruments  ``Instruments(meter, connector)``, for OpenTelemetry

Both read the one table `_FIGURES`. A series has the source as its label, the name of the connector, and what the table
adds, but no address, port or destination: there are as many series as sources. Connectors are held weakly, and one that
is forgotten leaves the output.

Both are asked from threads of their own while the loop runs, so this relies on ``stats()`` being safe to call from any
thread. Neither library is imported before it is used. Prometheus needs the extra: ``pip install "aiobind[metrics]"``;
whoever has a meter of OpenTelemetry has ``opentelemetry-api``.
"""

from __future__ import annotations

import threading
import weakref
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from opentelemetry.metrics import CallbackOptions, Meter, Observation
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    from prometheus_client.registry import Collector as _Registrable

    from ._origin import SourceStats
else:
    _Registrable = object  # a registry asks for no class, but its types did until prometheus_client 0.24

__all__ = ["Collector", "Instruments"]


class _Connector(Protocol):
    def stats(self) -> Sequence[SourceStats]: ...


class _Figure(NamedTuple):
    name: str
    kind: str  # of OpenTelemetry's instrument
    unit: str  # by UCUM, as OpenTelemetry has it
    text: str
    label: str | None  # beside the source and the connector
    read: Callable[[SourceStats], Mapping[str, float]]  # by that label


def _connections(stats: SourceStats) -> Mapping[str, float]:
    # Those that are neither are in a TLS handshake or about to close. The three are not of quite the same moment.
    other = stats.connections - stats.in_use - stats.idle
    return {"in_use": stats.in_use, "idle": stats.idle, "other": max(0, other)}


def _quantiles(stats: SourceStats) -> Mapping[str, float]:
    found = {"0.5": stats.latency_p50, "0.99": stats.latency_p99}
    return {quantile: seconds for quantile, seconds in found.items() if seconds is not None}


_FIGURES = (
    _Figure("connections", "up_down_counter", "{connection}", "Open connections.", "state", _connections),
    _Figure("connects", "counter", "{connection}", "Connections made.", None, lambda s: {"": s.connects}),
    _Figure("failures", "counter", "{failure}", "Failed connects, by errno.", "error", lambda s: s.failures),
    _Figure("suspended", "gauge", "1", "1 while suspended.", None, lambda s: {"": int(s.suspended_until is not None)}),
    # Without a sum and a count, quantiles make no summary.
    _Figure("connect_duration", "gauge", "s", "Quantiles of how long connects took.", "quantile", _quantiles),
    _Figure(
        "bytes",
        "counter",
        "By",
        "Payload of all connections.",
        "direction",
        lambda s: {"sent": s.bytes_sent, "received": s.bytes_received},
    ),
    # Ports run out for one destination at a time.
    _Figure(
        "local_ports_used",
        "gauge",
        "{port}",
        "Local ports taken at the destination where most are.",
        None,
        lambda s: {"": max(s.ports.values(), default=0)},
    ),
)

_PROMETHEUS_UNITS = {"s": "seconds", "By": "bytes"}


class _Connectors:
    """Connectors by name, held weakly."""

    def __init__(self, connector: _Connector, name: str) -> None:
        self._lock = threading.Lock()
        #: replaced and never changed, for it is read in other threads
        self._named: dict[str, weakref.ref[_Connector]] = {}
        self.add(connector, name)

    def add(self, connector: _Connector, name: str) -> None:
        """Show the figures of *connector* too, with *name* as the label ``connector``.

        Args:
            connector: an ``aiobind.Connector`` or a ``BoundTCPConnector``.
            name: its name. The connector that has had it is no longer shown, so that no series is there twice.
        """
        with self._lock:
            alive = {other: each for other, each in self._named.items() if each() is not None}
            self._named = {**alive, name: weakref.ref(connector)}

    def _stats(self) -> Iterator[tuple[str, SourceStats]]:
        for name, reference in self._named.items():
            connector = reference()
            for stats in connector.stats() if connector is not None else ():
                yield name, stats


class Collector(_Connectors, _Registrable):
    """The figures of connectors for prometheus_client; one collector for all connectors, to be registered.

    A custom collector has no part in prometheus_client's multiprocess mode: let each process answer for itself.

    Args:
        connector: an ``aiobind.Connector`` or a ``BoundTCPConnector``; ``add`` takes more.
        name: its name, the label ``connector``. Prometheus takes an empty label as none.

    Raises:
        ImportError: it needs ``aiobind[metrics]``.
    """

    def __init__(self, connector: _Connector, name: str = "") -> None:
        try:
            from prometheus_client import core  # noqa: PLC0415 - an extra
        except ImportError as error:
            text = 'aiobind.metrics.Collector needs prometheus_client 0.20 or later: pip install "aiobind[metrics]"'
            raise ImportError(text) from error
        self._core = core
        super().__init__(connector, name)

    def describe(self) -> Iterable[CounterMetricFamily | GaugeMetricFamily]:
        """Return the names, so that a registry needs no figures to learn them."""
        for figure in _FIGURES:
            labels = ["connector", "source", *([figure.label] if figure.label else [])]
            make = self._core.CounterMetricFamily if figure.kind == "counter" else self._core.GaugeMetricFamily
            unit = _PROMETHEUS_UNITS.get(figure.unit, "")
            yield make(f"aiobind_{figure.name}", figure.text, labels=labels, unit=unit)

    def collect(self) -> Iterable[CounterMetricFamily | GaugeMetricFamily]:
        """Return the figures."""
        found = list(self._stats())
        for figure, family in zip(_FIGURES, self.describe(), strict=True):
            for name, stats in found:
                for value_of_label, value in figure.read(stats).items():
                    family.add_metric([name, str(stats.source), value_of_label], value)
            yield family


class Instruments(_Connectors):
    """The figures of connectors as OpenTelemetry's observable instruments; make them once for each meter.

    Args:
        meter: makes the instruments. It would never ask a second set of the same names.
        connector: an ``aiobind.Connector`` or a ``BoundTCPConnector``; ``add`` takes more.
        name: its name, the attribute ``connector``; empty for none.
    """

    def __init__(self, meter: Meter, connector: _Connector, name: str = "") -> None:
        super().__init__(connector, name)
        makers = {
            "counter": meter.create_observable_counter,
            "up_down_counter": meter.create_observable_up_down_counter,
            "gauge": meter.create_observable_gauge,
        }
        for figure in _FIGURES:
            observe = partial(self._observe, figure)
            makers[figure.kind](f"aiobind.{figure.name}", [observe], unit=figure.unit, description=figure.text)

    def _observe(self, figure: _Figure, _: CallbackOptions) -> Iterable[Observation]:
        from opentelemetry.metrics import Observation  # noqa: PLC0415 - whoever has a meter has it

        for name, stats in self._stats():
            for value_of_label, value in figure.read(stats).items():
                labels = {"connector": name, "source": str(stats.source), figure.label or "": value_of_label}
                yield Observation(value, {label: text for label, text in labels.items() if text})
