"""How tests compile: nearly all of their time is compilation of tiny shapes, whose machine code need not be good."""

from __future__ import annotations

import gc
import importlib.metadata

# Fusions by way of MLIR take as long to compile as all else, and many parts are dear for few cores. XLA aborts on flags
# that it does not know, as another version may not.
_KNOWN = importlib.metadata.version("jaxlib").startswith("0.10.")
_QUICK = " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1" if _KNOWN else ""


def xla_flags(devices: int = 1) -> str:
  """XLA_FLAGS for a process with so many simulated devices."""
  count = f"--xla_force_host_platform_device_count={devices} " if devices > 1 else ""
  return f"{count}--xla_backend_optimization_level=0{_QUICK}"


def collect_seldom() -> None:
  """Tracing makes millions of objects that are no garbage; looking through them is a tenth of its time."""
  gc.set_threshold(200_000, 50, 100)
