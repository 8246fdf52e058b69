"""NVML asked politely: every question ends in an answer or in a `Fault` that says of which kind it is.

The bindings are an argument (`gpu.bindings()` gives the real ones), so that a test can hand in its own.
"""

from collections.abc import Sequence
from typing import Any, Literal

Kind = Literal["unsupported", "transient", "lost"]

UNSUPPORTED_CODES = frozenset({2, 3, 4, 13, 22, 25, 26})
"""INVALID_ARGUMENT, NOT_SUPPORTED, NO_PERMISSION, FUNCTION_NOT_FOUND, VGPU_ECC_..., ARGUMENT_VERSION_MISMATCH,
DEPRECATED: asking again changes nothing."""
LOST_CODES = frozenset({15, 16})
"""GPU_IS_LOST, RESET_REQUIRED: its handle must not be used again (a stale one has crashed monitors)."""

FIELD_MEMBERS = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")
"""Member of a field's union by its valueType."""


class Fault(Exception):
    """A question that NVML did not answer."""

    def __init__(self, kind: Kind, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def fault_of(code: int, text: str) -> Fault:
    """The fault that a return code means."""
    if code in LOST_CODES:
        return Fault("lost", text)
    return Fault("unsupported" if code in UNSUPPORTED_CODES else "transient", text)


class Nvml:
    """The driver's library through its Python bindings."""

    def __init__(self, api: Any) -> None:
        self.api = api

    def call(self, name: str, *args: Any, **options: Any) -> Any:
        """What `name(*args)` returns.

        Raises:
            Fault: the driver refused, the card is gone, or bindings and driver do not fit (a structure of another
                version, a function that one of them lacks): the last is `unsupported`, never a crash.
        """
        try:
            return getattr(self.api, name)(*args, **options)
        except self.api.NVMLError as error:
            raise fault_of(error.value, str(error)) from None
        except Exception as error:  # bindings of another driver fail in as many ways as ctypes can
            raise Fault("unsupported", f"the bindings do not fit the driver: {error}") from None

    def fields(self, handle: Any, ids: Sequence[int]) -> list[int | float | Fault]:
        """One value or fault per field id; the call as a whole raises only when it fails as a whole."""
        found: list[int | float | Fault] = []
        for field in self.call("nvmlDeviceGetFieldValues", handle, list(ids)):
            if field.nvmlReturn != 0:
                found.append(fault_of(field.nvmlReturn, str(self.api.NVMLError(field.nvmlReturn))))
            elif field.valueType >= len(FIELD_MEMBERS):
                found.append(Fault("unsupported", f"a value of unknown type {field.valueType}"))
            else:
                found.append(getattr(field.value, FIELD_MEMBERS[field.valueType]))
        return found

    def field(self, handle: Any, field_id: int) -> int | float:
        """The value of one field.

        Raises:
            Fault: it has none.
        """
        (value,) = self.fields(handle, [field_id])
        if isinstance(value, Fault):
            raise value
        return value


def signed(value: int | float) -> int | float:
    """A margin that came as an unsigned 32-bit number, below zero again."""
    return value - 2**32 if 2**31 <= value < 2**32 else value
