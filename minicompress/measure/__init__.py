"""What a model costs: numbers, bytes, arithmetic, time, memory, quality."""

from .counts import macs, macs_by_layer, nonzero, params
from .fidelity import agreement, relative_error, sqnr
from .hardware import (
    Machine,
    Timing,
    amdahl,
    compare,
    latency,
    machine,
    peak_memory,
    roofline,
)
from .tables import Report, Table, report, table

__all__ = [
    "Machine",
    "Report",
    "Table",
    "Timing",
    "agreement",
    "amdahl",
    "compare",
    "latency",
    "machine",
    "macs",
    "macs_by_layer",
    "nonzero",
    "params",
    "peak_memory",
    "relative_error",
    "report",
    "roofline",
    "sqnr",
    "table",
]
