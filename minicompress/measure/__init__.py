"""What a model costs: numbers, bytes, arithmetic, time, memory, quality."""

from .answers import (
    calibration_error,
    exemplars,
    negative_flips,
    per_class,
    reliability,
    temperature,
)
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
    "calibration_error",
    "compare",
    "exemplars",
    "latency",
    "machine",
    "macs",
    "macs_by_layer",
    "negative_flips",
    "nonzero",
    "params",
    "peak_memory",
    "per_class",
    "relative_error",
    "reliability",
    "report",
    "roofline",
    "sqnr",
    "table",
    "temperature",
]
