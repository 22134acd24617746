import pytest

from edgeguard.errors import InputError
from edgeguard.quant.width import Width, WidthControl, parse_width, parse_widths


def test_parsing():
    assert parse_width("4") == Width(4, 4)
    assert parse_width(" W4A8 ") == Width(4, 8)
    assert str(Width(4, 4)) == "4"
    assert str(Width(4, 8)) == "w4a8"
    assert parse_widths("8,w4a8,2") == (Width(8, 8), Width(4, 8), Width(2, 2))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("17", "bit-width 17 is not supported; expected 2 to 8, or up to 16 for training alone"),
        ("1", "bit-width 1"),
        ("w4", "'w4' is not a bit-width"),
        ("4,,2", "empty entry"),
        ("", "empty entry"),
        ("4,4", "names a width twice"),
        ("-4", "is not a bit-width"),
    ],
)
def test_bad_widths_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse_widths(text)


def test_widths_above_8_are_for_training():
    assert [parse_width(text).deployable for text in ("8", "2", "w4a8", "9", "w8a16", "16")] == [True] * 3 + [False] * 3


def test_control_switches_and_restores():
    control = WidthControl(parse_widths("8,2"))
    with control.at(Width(2, 2)):
        assert control.current == Width(2, 2)
    assert control.current == Width(8, 8)
    with pytest.raises(InputError, match="not trained at 4 bits; its widths are 8, 2"):
        control.select(Width(4, 4))
