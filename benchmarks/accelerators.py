"""What accelerators do at most, by jax's device_kind, from the makers' data sheets: benchmarks compare with it."""

from __future__ import annotations

# Main memory's bytes a second.
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
  """The share of a device's bfloat16 peak that so many operations in so many seconds are; unknown kinds say so."""
  return f"{operations / seconds / PEAKS[kind]:.1%}" if kind in PEAKS else "unknown"
