"""The only reader and writer of the project's TOML and JSON files.

Frozen dataclasses are the truth; cattrs turns them into plain data and back, strictly: unknown keys, missing keys and
wrong types are errors with their path ("ladder.toml: optim.beta2: ..."), `6.5` never becomes `6`, `true` never becomes
`1`. Integral floats (TOML's `4.5e9`) are accepted for integers because nothing is lost.

Files are replaced atomically (temporary file, fsync, rename) or appended line by line; NaN and infinity are refused.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import cattrs
from cattrs.gen import make_dict_structure_fn

from homelab_scaling.errors import DataError, MachineError, SpecError

T = TypeVar("T")


def _strict_int(value: Any, _: type) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"wants a whole number, found {value!r}")
    if isinstance(value, float) and not value.is_integer():
        raise ValueError(f"wants a whole number, found {value!r}")
    return int(value)


def _strict_float(value: Any, _: type) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"wants a number, found {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"wants a finite number, found {value!r}")
    return float(value)


def _strict_str(value: Any, _: type) -> str:
    if not isinstance(value, str):
        raise ValueError(f"wants text in quotes, found {value!r}")
    return value


def _strict_bool(value: Any, _: type) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"wants true or false, found {value!r}")
    return value


def _is_literal(kind: Any) -> bool:
    return getattr(kind, "__origin__", None) is Literal


def _strict_literal(value: Any, kind: Any) -> Any:
    allowed = get_args(kind)
    if value not in allowed or isinstance(value, bool) != any(isinstance(a, bool) and a == value for a in allowed):
        raise ValueError(f"wants one of {', '.join(map(repr, allowed))}, found {value!r}")
    return value


SCALARS = frozenset({str, int, float, bool})


def _is_scalar_union(kind: Any) -> bool:
    """`str | int | float | bool | None` and the like: JSON tells them apart by itself."""
    members = set(get_args(kind)) - {type(None)}
    if get_origin(kind) not in (Union, UnionType):  # dict[str, float] has such members, too
        return False
    return len(members) > 1 and members <= SCALARS


def _one_of_scalars(value: Any, kind: Any) -> Any:
    if type(value) not in get_args(kind) or (isinstance(value, float) and not math.isfinite(value)):
        names = ", ".join("null" if member is type(None) else member.__name__ for member in get_args(kind))
        raise ValueError(f"wants one of {names}, found {value!r}")
    return value


def _is_tuple(kind: Any) -> bool:
    return getattr(kind, "__origin__", None) is tuple


def _make_converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True, detailed_validation=True)
    converter.register_structure_hook(int, _strict_int)
    converter.register_structure_hook(float, _strict_float)
    converter.register_structure_hook(str, _strict_str)
    converter.register_structure_hook(bool, _strict_bool)
    converter.register_structure_hook_func(_is_literal, _strict_literal)
    converter.register_structure_hook_func(_is_scalar_union, _one_of_scalars)

    def tuple_hook(value: Any, kind: Any) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple):
            raise ValueError(f"wants a list, found {value!r}")
        (item, *_rest) = get_args(kind)
        structured, faults = [], []
        for index, v in enumerate(value):
            try:
                structured.append(converter.structure(v, item))
            except Exception as error:
                error.add_note(cattrs.IterableValidationNote(f"item {index}", index, item))
                faults.append(error)
        if faults:
            raise cattrs.IterableValidationError("list", faults, kind)
        return tuple(structured)

    def dataclass_hook_factory(kind: Any) -> Any:
        inner = make_dict_structure_fn(kind, converter)

        def structure(value: Any, _: Any) -> Any:
            if not isinstance(value, dict):
                raise ValueError(f"wants a table, found {value!r}")
            return inner(value, kind)

        return structure

    converter.register_structure_hook_func(_is_tuple, tuple_hook)
    converter.register_structure_hook_factory(dataclasses.is_dataclass, dataclass_hook_factory)
    return converter


_CONVERTER = _make_converter()


def to_plain(obj: Any) -> Any:
    """Dataclass to plain dicts, lists and scalars, ready for JSON."""
    return _CONVERTER.unstructure(obj)


def from_plain(plain: Any, kind: type[T], where: str) -> T:
    """Plain data to a `kind`.

    Args:
        plain: what a TOML or JSON reader returned.
        kind: the dataclass wanted.
        where: the file's name, to begin the error message with.

    Raises:
        SpecError: with every fault and its path, in one sentence.
    """
    try:
        return _CONVERTER.structure(plain, kind)
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from None
    except Exception as error:  # cattrs groups every fault; they become one sentence
        faults = list(dict.fromkeys(_faults(error, "")))
        shown = "; ".join(faults[:4]) + (f"; and {len(faults) - 4} more" if len(faults) > 4 else "")
        raise SpecError(f"{where}: {shown}") from None


def _faults(error: BaseException, path: str) -> Iterator[str]:
    """Flattens cattrs' nested exception groups to "path: what is wrong"."""
    if isinstance(error, cattrs.errors.ForbiddenExtraKeysError):
        known = sorted(f.name for f in dataclasses.fields(error.cl)) if dataclasses.is_dataclass(error.cl) else []
        for key in sorted(error.extra_fields):
            yield f"{_join(path, key)}: no such key{_closest(key, known)}"
        return
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            name = _location(inner)
            yield from _faults(inner, _join(path, name) if name else path)
        return
    if isinstance(error, KeyError):
        yield f"{_join(path, str(error.args[0]))}: this key is missing"
        return
    yield f"{path}: {error}" if path else str(error)


def _location(error: BaseException) -> str | None:
    for note in getattr(error, "__notes__", []):
        if isinstance(note, cattrs.AttributeValidationNote):
            return str(note.name)
        if isinstance(note, cattrs.IterableValidationNote):
            return f"[{note.index}]"
    return None


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and not name.startswith("[") else f"{path}{name}"


def _closest(key: str, known: list[str]) -> str:
    from difflib import get_close_matches

    close = get_close_matches(key, known, n=1)
    if close:
        return f" (did you mean {close[0]}?)"
    return f" (known: {', '.join(known)})" if known else ""


def read_toml(path: Path, kind: type[T]) -> T:
    """A `kind` from a TOML file, or SpecError naming file and key."""
    return from_plain(_parse(path, tomllib.loads), kind, path.name)


def read_json(path: Path, kind: type[T]) -> T:
    """A `kind` from a JSON file, or SpecError naming file and key."""
    return from_plain(read_plain_json(path), kind, path.name)


def read_plain_json(path: Path) -> Any:
    """Plain data from a JSON file, or SpecError naming the file."""
    return _parse(path, lambda text: json.loads(text, parse_constant=_refuse_constant))


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number anyone can use")


def _parse(path: Path, parse: Any) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise SpecError(f"{path}: no such file; give the path of an existing one") from None
    except IsADirectoryError:
        raise SpecError(f"{path}: this is a folder, a file is wanted") from None
    except PermissionError:
        raise SpecError(f"{path}: may not be read; change its permissions") from None
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except ValueError as error:  # json and tomllib errors are ValueErrors
        raise SpecError(f"{path}: cannot be read ({error}); mend the file or restore it") from None


def dumps(obj: Any) -> str:
    """The JSON text of a dataclass or plain value; NaN and infinity raise ValueError."""
    return json.dumps(to_plain(obj), indent=1, allow_nan=False, ensure_ascii=False)


def write_json(path: Path, obj: Any, *, durable: bool = True) -> None:
    """Replaces `path` atomically with the JSON of `obj`."""
    write_text(path, dumps(obj) + "\n", durable=durable)


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Replaces `path` atomically, as `write_bytes` does."""
    write_bytes(path, text.encode(), durable=durable)


def write_bytes(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Replaces `path` atomically: temporary file beside it, fsync, rename, fsync of the folder.

    Args:
        durable: False leaves both fsyncs out: for what is worth nothing after a power cut and must not wait for a disk
            that is busy with a checkpoint.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if durable:
            sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):  # its folder may be what could not be made
            temporary.unlink()
        raise MachineError(
            f"{path}: could not be written ({error.strerror}); free space or choose another folder"
        ) from error


def sync_folder(folder: Path) -> None:
    """Makes renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Appends one JSON line per record in a single write."""
    text = "".join(json.dumps(r, allow_nan=False, ensure_ascii=False) + "\n" for r in records)
    if not text:
        return
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)
        file.flush()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a JSON-lines file; a torn last line (killed writer) is left out, another one is an error."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except ValueError:
            if number == len(lines):  # no newline after it: the writer died here
                break
            raise DataError(
                f"{path}: line {number} is not JSON; the file was edited or damaged, remove that line"
            ) from None
    return records


def stable_hash(obj: Any, n_chars: int = 64) -> str:
    """SHA-256 of the canonical JSON of `obj`: equal content, equal hash, on every machine."""
    text = json.dumps(to_plain(obj), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:n_chars]
