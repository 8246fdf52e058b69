"""What NCCL is told about cards, by what their driver says."""

from types import SimpleNamespace
from typing import Any

import pytest

from homelab_scaling.watch.p2p import Pair, claims_untruly, nccl_environment, needed_switches

OFF = {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}
RTX, H100 = ["NVIDIA GeForce RTX 4080"] * 2, ["NVIDIA H100 80GB HBM3"] * 2


def pairs(*said: str) -> list[Pair]:
    return [Pair(first=0, second=1, p2p=p2p) for p2p in said]


@pytest.mark.parametrize(
    "names, found, driver, wanted",
    [
        (RTX, pairs("not by these cards"), "570.86.10", OFF),
        (RTX, pairs("not by this chipset"), "570.86.10", OFF),
        (H100, pairs("disabled in the driver"), "570.86.10", OFF),
        (RTX, pairs("yes"), "535.54.03", OFF),  # it says so and hangs
        (RTX, pairs("yes"), "550.40.07", {}),
        (H100, pairs("yes"), "535.54.03", {}),
        (RTX, pairs("unknown (no permission)"), "570.86.10", {}),
        (RTX, pairs("yes"), None, {}),
        (RTX[:1], [], "535.54.03", {}),
    ],
)
def test_switches_are_set_only_where_cards_lack_peer_to_peer(
    names: list[str], found: list[Pair], driver: str | None, wanted: dict[str, str]
) -> None:
    assert needed_switches(names, found, driver) == wanted


def test_only_a_driver_before_550_40_07_is_not_believed() -> None:
    assert claims_untruly(RTX, "550.40.06") and not claims_untruly(RTX, "550.40.07")
    assert not claims_untruly(["NVIDIA GeForce RTX 3090"], "535.54.03")


class Bindings:
    """As much of nvidia-ml-py as is asked: cards of one kind, their peer-to-peer status and the driver's version."""

    class NVMLError(Exception):
        value = 999

    def __init__(self, names: list[str], p2p: int, driver: str = "570.86.10") -> None:
        self.names, self.p2p, self.driver = names, p2p, driver

    def nvmlInit(self) -> None: ...  # noqa: N802
    def nvmlShutdown(self) -> None: ...  # noqa: N802

    def __getattr__(self, name: str) -> Any:
        answers = {
            "nvmlDeviceGetCount": lambda: len(self.names),
            "nvmlDeviceGetHandleByIndex": lambda index: SimpleNamespace(index=index),
            "nvmlDeviceGetUUID": lambda handle: f"GPU-{handle.index}",
            "nvmlDeviceGetName": lambda handle: self.names[handle.index],
            "nvmlDeviceGetP2PStatus": lambda _a, _b, _kind: self.p2p,
            "nvmlSystemGetDriverVersion": lambda: self.driver,
        }
        return answers[name]


def test_a_launch_is_told_what_its_visible_cards_need_and_the_users_word_stands() -> None:
    without = Bindings(RTX, p2p=2)
    assert nccl_environment({}, api=without) == OFF
    assert nccl_environment({"NCCL_P2P_DISABLE": "0"}, api=without) == {"NCCL_IB_DISABLE": "1"}
    assert nccl_environment({"CUDA_VISIBLE_DEVICES": "1"}, api=without) == {}
    assert nccl_environment({"CUDA_VISIBLE_DEVICES": "GPU-0,GPU-1"}, api=without) == OFF
    assert nccl_environment({}, api=Bindings(H100, p2p=0)) == {}
    assert nccl_environment({}, api=Bindings(RTX[:1], p2p=2)) == {}
