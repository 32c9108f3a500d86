"""`abyssal bench`: every operation beside its peers, on the device at hand."""

from abyssal.bench.run import Report, bench_ops

__all__ = ["Report", "bench_ops"]
