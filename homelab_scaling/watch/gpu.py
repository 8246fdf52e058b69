"""What NVML says about the cards of this machine. The only importer of `pynvml` (from nvidia-ml-py)."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Card:
    """One NVIDIA GPU, as the driver names it."""

    index: int
    """NVML's order (PCI bus), which is CUDA's only with CUDA_DEVICE_ORDER=PCI_BUS_ID."""
    uuid: str
    name: str
    vram_bytes: int
    capability: tuple[int, ...]
    """CUDA compute capability, for example (8, 9)."""

    @property
    def computes_bf16(self) -> bool:
        """bf16 matmul in hardware: Ampere (8.0) and later."""
        return self.capability >= (8, 0)


def list_cards() -> list[Card]:
    """Every card that answers; empty without a driver or a card. A lost card never hides the others."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        cards = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            try:
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                cards.append(
                    Card(
                        index=index,
                        uuid=pynvml.nvmlDeviceGetUUID(handle),
                        name=pynvml.nvmlDeviceGetName(handle),
                        vram_bytes=pynvml.nvmlDeviceGetMemoryInfo(handle).total,
                        capability=tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
                    )
                )
            except pynvml.NVMLError:
                continue
        return cards
    finally:
        pynvml.nvmlShutdown()
