"""The error tree is as its docstring draws it."""

import re

import pytest

from homelab_scaling import errors
from homelab_scaling.errors import HomelabError


def every_error() -> list[type[HomelabError]]:
    found = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, HomelabError)]
    assert len(found) >= 9
    return found


def test_the_drawing_shows_every_error_with_its_exit_code() -> None:
    drawn = dict(re.findall(r"(\w+) +(\d+) {2,}\S", str(errors.__doc__)))
    assert drawn == {kind.__name__: str(kind.exit_code) for kind in every_error() if kind is not HomelabError}


def test_the_drawing_shows_who_descends_from_whom() -> None:
    depth_of = {kind.__name__: len(kind.__mro__) - HomelabError.__mro__.__len__() for kind in every_error()}
    for line in str(errors.__doc__).splitlines():
        if match := re.match(r"^( *(?:[│ ]+)?)[├└]── (\w+)", line):
            assert depth_of[match[2]] == 1 + match[1].count("│"), line


@pytest.mark.parametrize("kind", every_error())
def test_each_error_says_only_what_it_was_given(kind: type[HomelabError]) -> None:
    assert str(kind("found 1, wanted 2")) == "found 1, wanted 2"
    assert kind.__doc__


def test_exit_codes_are_those_the_design_promises() -> None:
    assert {kind.exit_code for kind in every_error()} == {1, 2, 3, 75}
    assert all(kind.exit_code == 2 for kind in every_error() if issubclass(kind, errors.UserError))
