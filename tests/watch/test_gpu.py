"""The sensors on bindings made of Python, and the two instruments they carry: energy and poll times."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homelab_scaling.watch import gpu, meter
from homelab_scaling.watch.gpu import CLOCK_REASONS, Sensors, decode_reasons, list_cards
from homelab_scaling.watch.meter import EnergyMeter, PollTimes, percentile
from homelab_scaling.watch.nvml import Nvml, fault_of, signed


class NVMLError(Exception):  # under the name that the bindings give it
    def __init__(self, value: int) -> None:
        super().__init__(f"code {value}")
        self.value = value


class FakeNvml:
    """The bindings with one card per entry of `cards`; a value that is an exception is raised."""

    def __init__(self, *cards: dict[str, Any], init: Exception | None = None) -> None:
        self.NVMLError, self.nvmlMemory_v2 = NVMLError, 0x2000028
        self.cards, self.init, self.n_open = list(cards), init, 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        functions = {
            "nvmlInit": lambda: self._open(1),
            "nvmlShutdown": lambda: self._open(-1),
            "nvmlDeviceGetCount": lambda: len(self.cards),
            "nvmlDeviceGetHandleByIndex": lambda index: self.cards[index],
            "nvmlDeviceGetMemoryInfo": lambda h, version="": answer(h, "MemoryInfo_v2" if version else "MemoryInfo"),
        }
        if name in functions:
            return functions[name]
        if not name.startswith("nvmlDeviceGet"):
            raise AttributeError(f"module 'pynvml' has no attribute '{name}'")
        return lambda handle, *_: answer(handle, name.removeprefix("nvmlDeviceGet"))

    def _open(self, n: int) -> None:
        if self.init is not None:
            raise self.init
        self.n_open += n


def answer(handle: dict[str, Any], name: str) -> Any:
    value = handle.get(name, NVMLError(3))
    if isinstance(value, Exception):
        raise value
    return value


def card(uuid: str = "GPU-a", **values: Any) -> dict[str, Any]:
    return {
        "UUID": uuid,
        "Name": "card",
        "MemoryInfo": SimpleNamespace(total=100, used=30),
        "MemoryInfo_v2": SimpleNamespace(total=100, used=20, reserved=10),
        "CudaComputeCapability": (8, 6),
        "Temperature": 50,
        "PowerUsage": 100_000,
        **values,
    }


def test_a_card_that_knows_little_still_gives_what_it_knows() -> None:
    sensors = Sensors(api=FakeNvml(card()))
    (facts,), (reading,) = sensors.facts, sensors.poll(0.0).cards
    assert (reading.state, reading.temperature_c, reading.power_w) == ("ok", 50, 100)
    assert (reading.vram_used_bytes, reading.vram_reserved_bytes) == (20, 10)
    assert (reading.energy_j, reading.energy_from) == (0, "integrated")
    assert (facts.slowdown_c, facts.n_fans, facts.has_energy_counter) == (None, None, False)
    unknown = {"slowdown_c", "shutdown_c", "fan_frac", "n_fans", "sm_clock_mhz", "reasons", "energy_counter"}
    assert unknown <= set(facts.missing)
    assert all(facts.missing.values())


def test_nothing_to_measure_energy_with_is_none_and_said() -> None:
    sensors = Sensors(api=FakeNvml(card(PowerUsage=NVMLError(3))))
    reading = sensors.poll(0.0).cards[0]
    assert (reading.energy_j, reading.energy_from, reading.energy_gap_s) == (None, None, None)
    assert sensors.facts[0].missing["energy_j"].startswith("no energy counter (code 3")


def test_a_card_that_answers_nothing_now_is_in_error_and_one_without_a_sensor_is_not() -> None:
    one = card(Temperature=NVMLError(3), PowerUsage=100_000)
    sensors = Sensors(api=FakeNvml(one))
    assert sensors.poll(0.0).cards[0].state == "ok"
    for name in ("PowerUsage", "MemoryInfo_v2"):
        one[name] = NVMLError(999)
    reading = sensors.poll(1.0).cards[0]
    assert (reading.state, reading.error) == (
        "error",
        "power_w: code 999; vram_used_bytes: code 999; vram_reserved_bytes: code 999",
    )
    one["PowerUsage"] = 100_000
    assert sensors.poll(2.0).cards[0].state == "ok"


@pytest.mark.parametrize(
    "fault",
    [
        TypeError("byref() argument"),
        AttributeError("no attribute 'c_nvmlMemory_v2_t'"),
        ValueError("structure too small"),
    ],
)
def test_bindings_that_do_not_fit_cost_one_quantity(fault: Exception) -> None:
    sensors = Sensors(api=FakeNvml(card(MemoryInfo_v2=fault, UtilizationRates=fault)))
    reading = sensors.poll(0.0).cards[0]
    assert (reading.vram_used_bytes, reading.vram_reserved_bytes, reading.utilisation_frac) == (30, None, None)
    assert reading.temperature_c == 50
    assert str(fault) in sensors.facts[0].missing["vram_reserved_bytes"]


def test_margins_come_first_from_ada_on_and_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"MarginTemperature": 40, "TemperatureThreshold": 96}
    (ada,) = Sensors(api=FakeNvml(card(CudaComputeCapability=(8, 9), **both))).facts
    (ampere,) = Sensors(api=FakeNvml(card(**both))).facts
    (odd,) = Sensors(api=FakeNvml(card(CudaComputeCapability=(8, 9), TemperatureThreshold=96))).facts
    (silly,) = Sensors(api=FakeNvml(card(TemperatureThreshold=0))).facts
    assert (ada.slowdown_c, ada.limits_from, ada.shutdown_c) == (90, "margins", None)
    assert ada.missing["shutdown_c"] == "margins tell only the slowdown"
    assert (ampere.slowdown_c, ampere.limits_from) == (96, "thresholds")
    assert (odd.slowdown_c, odd.limits_from) == (96, "thresholds")
    assert silly.slowdown_c is None
    assert "says 0 C" in silly.missing["slowdown_c"]


def test_no_driver_is_a_sentence_and_empty_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    sensors = Sensors(api=FakeNvml(init=NVMLError(9)))
    assert (sensors.error, sensors.facts, sensors.poll(3.0).cards) == ("NVML does not answer: code 9", (), ())
    sensors.close()
    assert Sensors(api=FakeNvml()).error == "the driver lists no card"
    monkeypatch.setattr(gpu.importlib, "import_module", lambda name: SimpleNamespace())
    assert "reinstall nvidia-ml-py" in str(Sensors().error)
    with pytest.raises(ImportError, match="nvidia-ml-py"):
        list_cards()


def test_nobody_else_imports_the_bindings() -> None:
    library = Path(gpu.__file__).parents[1]
    importing = re.compile(r"^\s*(?:import|from) pynvml|import_module\(.pynvml", re.MULTILINE)
    folders = [library, library.parent / "tools", library.parent / "recipes"]
    found = [p for folder in folders for p in folder.rglob("*.py") if importing.search(p.read_text(encoding="utf-8"))]
    assert found == [Path(gpu.__file__)]


def test_the_driver_is_let_go_of() -> None:
    api = FakeNvml(card())
    sensors = Sensors(api=api)
    assert api.n_open == 1
    sensors.close()
    sensors.close()
    assert api.n_open == 0
    assert sensors.poll(1.0).cards == ()


def test_settings_are_reached_by_uuid_and_never_on_a_lost_card() -> None:
    one = card(PersistenceMode=1)
    sensors = Sensors(api=FakeNvml(one))
    assert sensors.call("GPU-a", "nvmlDeviceGetPersistenceMode") == 1
    with pytest.raises(gpu.Fault, match="no card GPU-b"):
        sensors.call("GPU-b", "nvmlDeviceGetPersistenceMode")
    one["PersistenceMode"] = NVMLError(15)
    with pytest.raises(gpu.Fault):
        sensors.call("GPU-a", "nvmlDeviceGetPersistenceMode")
    one["PersistenceMode"] = 1
    with pytest.raises(gpu.Fault) as fault:
        sensors.call("GPU-a", "nvmlDeviceGetPersistenceMode")
    assert fault.value.kind == "lost"
    assert sensors.poll(0.0).cards[0].state == "lost"


def test_every_reason_has_a_word_and_an_unknown_one_its_bit() -> None:
    assert decode_reasons(0) == ()
    assert decode_reasons(sum(CLOCK_REASONS)) == tuple(CLOCK_REASONS.values())
    assert decode_reasons(0x24 | 0x800) == ("power cap", "software thermal", "bit 0x800")


def test_codes_and_margins_are_read_as_nvml_means_them() -> None:
    assert [fault_of(code, "").kind for code in (3, 13, 15, 16, 999, 10)] == [
        *("unsupported", "unsupported", "lost", "lost", "transient", "transient")
    ]
    assert (signed(2**32 - 7), signed(-7), signed(40)) == (-7, -7, 40)
    wide = SimpleNamespace(nvmlReturn=0, valueType=9, value=None)
    api = SimpleNamespace(NVMLError=NVMLError, nvmlDeviceGetFieldValues=lambda *_: [wide])
    with pytest.raises(gpu.Fault, match="unknown type 9"):
        Nvml(api).field(None, 1)


# -------------------------------------------------------------------------------------------------------------- energy


def run_meter(readings: list[tuple[float, float | None, float | None]]) -> EnergyMeter:
    one = EnergyMeter()
    for t_s, counter_j, power_w in readings:
        one.add(t_s, counter_j=counter_j, power_w=power_w)
    return one


@pytest.mark.parametrize(
    ("readings", "total_j", "gap_s"),
    [
        ([(0, None, None)], None, 0),
        ([(0, 9000, 100)], 0, 0),
        ([(0, 9000, 100), (1, 9110, 120)], 110, 0),
        ([(0, 9000, None), (60, 12000, None)], 3000, 0),  # a counter bridges any gap
        ([(0, 9000, 100), (1, 50, 300)], 200, 0),  # reset: bridged by power
        ([(0, 9000, None), (60, 500, None)], 500, 60),  # reset in the dark: at least what it counted since
        ([(0, 9000, 100), (1, 9_000_000, 100), (2, 9_100, 100)], 200, 0),  # a jump and its return
        ([(0, 9000, 100), (1, None, 100), (2, None, 100), (3, 9330, 100)], 330, 0),  # silence, then the truth
        ([(0, 9000, 100), (1, None, None), (2, 9250, 100)], 250, 0),
        ([(0, 9000, 100), (1, None, None)], 0, 1),
        ([(0, 9000, 100), (1, None, 500), (2, 9010, 100)], 300, 0),  # what was said is not taken back
        ([(0, None, 100), (1, None, 300), (3, None, 300)], 800, 0),
        ([(0, None, 100), (6, None, 100), (7, None, 100)], 100, 6),  # over 5 s: flagged, not bridged
        ([(0, None, 100), (1, None, None), (2, None, 100)], 200, 0),
        ([(10, 9000, 100), (5, 9100, 100), (6, 9200, 100)], 200, 0),  # the clock was set back
    ],
)
def test_energy(readings: list[Any], total_j: float | None, gap_s: float) -> None:
    one = run_meter(readings)
    assert (one.total_j, one.gap_s) == (total_j, gap_s)


@settings(derandomize=True, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.floats(0.1, 20),
            st.one_of(st.none(), st.floats(0, 1e6)),
            st.one_of(st.none(), st.floats(0, 600)),
        ),
        max_size=30,
    )
)
def test_energy_never_falls_and_never_outruns_what_a_card_can_draw(
    steps: list[tuple[float, float | None, float | None]],
) -> None:
    one, now_s, before, spent_s = EnergyMeter(), 0.0, 0.0, 0.0
    for dt_s, counter_j, power_w in steps:
        now_s += dt_s
        spent_s += dt_s
        one.add(now_s, counter_j=counter_j, power_w=power_w)
        total = one.total_j
        if total is not None:
            assert before - 1e-6 <= total <= meter.MOST_WATTS * spent_s
            before = total
        assert one.gap_s >= -1e-9


# ---------------------------------------------------------------------------------------------------------- poll times


def test_polling_backs_off_from_a_slow_driver_and_recovers() -> None:
    times = PollTimes(1.0)
    for n in range(500):
        times.add(n, 0.2 if n in (7, 300) else 0.001)
    assert times.interval_s == 1.0, "two hiccups are not a slow driver"
    assert times.p50_s == 0.001
    for n in range(500, 510):
        times.add(n, 0.2)
    assert times.interval_s == 5.0
    assert times.p99_s == 0.2
    for n in range(meter.QUICK_POLLS_TO_RECOVER):
        assert times.interval_s == 5.0
        times.add(510 + 5 * n, 0.001)
    assert times.interval_s == 1.0
    for n in range(3):
        times.add(700 + n, 0.2)
    assert times.interval_s == 5.0, "the polls before the recovery are not held against it, those after are"


def test_poll_times_forget_after_ten_minutes() -> None:
    times = PollTimes(1.0)
    times.add(0.0, 9.0)
    times.add(601.0, 0.001)
    assert times.p99_s == 0.001


def test_percentile_is_the_nearest_rank() -> None:
    assert [percentile(list(range(1, 101)), share) for share in (0.5, 0.99, 1.0)] == [50, 99, 100]
    assert percentile([], 0.5) == 0.0
