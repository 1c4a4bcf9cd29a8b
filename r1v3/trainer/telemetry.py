"""Throughput of a stage and the state of its devices, for the metrics of every step.

All keys start with "machine_": they describe the machine, not the model, and differ between two
runs of the same seed. Readings are taken between steps; nothing runs in the background. GPU
readings need nvidia-ml-py; a reading that the driver or the device refuses is left out.
"""

import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import InternVLConfig

from r1v3.model.flops import Dimensions, Work, train_flops
from r1v3.ranks import ALONE, Ranks

# Dense bfloat16 FLOP/s by the driver's device name, from NVIDIA's data sheets of H100, H200, A100
# and HGX B200 (half of the figures with sparsity). A device that is not listed has no MFU.
PEAK_FLOPS = {
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA B200": 2250e12,
}

# Reductions over the ranks.
_ACROSS_RANKS: dict[str, Callable[[list[float]], float]] = {
    "machine_memory_gb": max,
    "machine_memory_reserved_gb": max,
    "machine_power_watts": lambda values: sum(values) / len(values),
    "machine_temperature_celsius": max,
    "machine_sm_clock_mhz": min,
    "machine_throttled": sum,
    "machine_ecc_errors": sum,
    "machine_xid_errors": sum,
}


class Telemetry:
    """Throughput, memory and GPU readings of a training step.

    Args:
        config: of the model.
        modules: whether each of vision, connector and llm is trained.
        device: this rank's device.
        dtype: of the weights; MFU is relative to the bfloat16 peak, and given for bfloat16 only.
        ranks: all processes of the job, one device each.
    """

    def __init__(
        self,
        config: InternVLConfig,
        modules: Mapping[str, bool],
        *,
        device: torch.device | str,
        dtype: str = "float32",
        ranks: Ranks = ALONE,
    ) -> None:
        self.dims, self.modules, self.ranks = Dimensions.of(config), dict(modules), ranks
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        self.peak: float | None = None
        self._gpu: GPU | None = None
        if self.cuda:
            if dtype == "bfloat16":
                self.peak = PEAK_FLOPS.get(torch.cuda.get_device_name(self.device))
            self._gpu = GPU.of(self.device)
        self._started = 0.0

    def start(self) -> None:
        """Start measuring, right before the gradient steps."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        if self._gpu is not None:
            self._gpu.start()
        self._started = time.perf_counter()

    def finish(self, work: Work) -> dict[str, float]:
        """Stop measuring, right after the gradient steps; collective over the ranks.

        Args:
            work: of all replicas.

        Returns:
            `machine_...` metrics, the same on every rank: tokens and samples per second of the
            whole job, model TFLOP/s per device, MFU where the peak is known, and the largest peak
            memory of a rank in GB (on the CPU: of the process so far). With GPUs also mean power,
            highest temperature, lowest clock, and the counts of throttled devices and of errors.
        """
        seconds = time.perf_counter() - self._started
        rate = sum(train_flops(self.dims, work, self.modules).values()) / seconds / self.ranks.size
        metrics = {
            "machine_tokens_per_second": work.tokens / seconds,
            "machine_samples_per_second": work.samples / seconds,
            "machine_tflops_per_device": rate / 1e12,
        }
        if self.peak is not None:
            metrics["machine_mfu"] = rate / self.peak
        return metrics | combine(self.ranks.gather(self._readings()))

    def _readings(self) -> dict[str, float]:
        if not self.cuda:
            unit = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
            return {"machine_memory_gb": peak / 1e9}
        readings = {
            "machine_memory_gb": torch.cuda.max_memory_allocated(self.device) / 1e9,
            "machine_memory_reserved_gb": torch.cuda.max_memory_reserved(self.device) / 1e9,
        }
        return readings | (self._gpu.finish() if self._gpu is not None else {})


def combine(readings: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Reduce the readings of all ranks to one value for each name."""
    return {
        name: reduce([reading[name] for reading in readings if name in reading])
        for name, reduce in _ACROSS_RANKS.items()
        if any(name in reading for reading in readings)
    }


class GPU:
    """Power, clocks, temperature and errors of one device.

    Args:
        nvml: the `pynvml` module of nvidia-ml-py, initialized.
        handle: NVML handle of the device.
    """

    # Clocks lowered by heat or by the power supply, not by the user.
    THROTTLES = (
        "nvmlClocksThrottleReasonHwSlowdown",
        "nvmlClocksThrottleReasonSwThermalSlowdown",
        "nvmlClocksThrottleReasonHwThermalSlowdown",
        "nvmlClocksThrottleReasonHwPowerBrakeSlowdown",
    )

    def __init__(self, nvml: Any, handle: Any) -> None:
        self.nvml, self.handle = nvml, handle
        self._energy: float | None = None
        self._at = 0.0
        self._xid = 0
        self._events = self._read(self._watch_errors)

    @classmethod
    def of(cls, device: torch.device) -> "GPU | None":
        """Open a CUDA device; return None without nvidia-ml-py or without its driver."""
        try:
            import pynvml
        except ImportError:
            return None
        try:
            pynvml.nvmlInit()
            # By identity: NVML does not know how CUDA_VISIBLE_DEVICES renumbers.
            uuid = torch.cuda.get_device_properties(device).uuid
            return cls(pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
        except pynvml.NVMLError:
            return None

    def start(self) -> None:
        """Read the energy counter."""
        self._energy = self._read(self.nvml.nvmlDeviceGetTotalEnergyConsumption, self.handle)
        self._at = time.perf_counter()

    def finish(self) -> dict[str, float]:
        """Return current readings, and the mean power since `start`."""
        nvml, handle = self.nvml, self.handle
        readings = {
            "machine_power_watts": self._power(),
            "machine_temperature_celsius": self._read(
                nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU
            ),
            "machine_sm_clock_mhz": self._read(
                nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM
            ),
            "machine_throttled": self._throttled(),
            "machine_ecc_errors": self._read(
                nvml.nvmlDeviceGetTotalEccErrors,
                handle,
                nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
                nvml.NVML_VOLATILE_ECC,
            ),
            "machine_xid_errors": self._errors(),
        }
        return {name: float(value) for name, value in readings.items() if value is not None}

    def _read(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call NVML; return None where the device or driver does not support the call."""
        try:
            return function(*arguments)
        except self.nvml.NVMLError:
            return None

    def _power(self) -> float | None:
        energy = self._read(self.nvml.nvmlDeviceGetTotalEnergyConsumption, self.handle)
        seconds = time.perf_counter() - self._at
        if energy is not None and self._energy is not None and seconds > 0.2:
            return (energy - self._energy) / 1e3 / seconds  # millijoules
        milliwatts = self._read(self.nvml.nvmlDeviceGetPowerUsage, self.handle)
        return None if milliwatts is None else milliwatts / 1e3

    def _throttled(self) -> float | None:
        reasons = self._read(self.nvml.nvmlDeviceGetCurrentClocksThrottleReasons, self.handle)
        if reasons is None:
            return None
        return float(any(reasons & getattr(self.nvml, name) for name in self.THROTTLES))

    def _watch_errors(self) -> Any:
        events = self.nvml.nvmlEventSetCreate()
        kind = self.nvml.nvmlEventTypeXidCriticalError
        self.nvml.nvmlDeviceRegisterEvents(self.handle, kind, events)
        return events

    def _errors(self) -> float | None:
        """Count XID errors since this process started, without waiting."""
        if self._events is None:
            return None
        while self._read(self.nvml.nvmlEventSetWait_v2, self._events, 0) is not None:
            self._xid += 1
        return float(self._xid)
