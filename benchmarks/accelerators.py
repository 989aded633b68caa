"""Peak figures of accelerators by jax's device_kind, from the makers' data sheets, for the benchmarks."""

from __future__ import annotations

# Bytes a second of main memory.
BANDWIDTHS = {
  "TPU v4": 1.228e12, "TPU v5 lite": 0.819e12, "TPU v5": 2.765e12, "TPU v6 lite": 1.64e12,
  "NVIDIA A100-SXM4-40GB": 1.555e12, "NVIDIA A100-SXM4-80GB": 2.039e12, "NVIDIA H100 80GB HBM3": 3.35e12,
  "NVIDIA H200": 4.8e12,
}  # fmt: skip

# Operations a second of dense bfloat16 matrix products.
PEAKS = {
  "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5": 459e12, "TPU v6 lite": 918e12,
  "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA H100 80GB HBM3": 989e12,
  "NVIDIA H200": 989e12,
}  # fmt: skip


def share_of_peak(kind: str, operations: float, seconds: float) -> str:
  """The share of a device's bfloat16 peak at which operations were done; 'unknown' for unknown kinds."""
  return f"{operations / seconds / PEAKS[kind]:.1%}" if kind in PEAKS else "unknown"
