"""A class list as users give it: a label set, or a text file."""

from pathlib import Path

from stl_offline.errors import InputError
from stl_offline.labels.label_set import open_label_set


def read_class_names(place: str | Path, parameter: str) -> tuple[str, ...]:
    """The class names of a label set (folder or URL), or of a UTF-8 text file with one name per line, in order.

    Empty lines, spaces around names, a byte-order mark and Windows line ends are ignored.

    Args:
        place: the label set or the file.
        parameter: which parameter gave ``place``, for messages.

    Raises:
        InputError: nothing is there, the file is not UTF-8 text, or it names no class or one class twice.
        FormatError: the folder holds no label set.
    """
    forms = f"{parameter} takes a label set, or a text file with one class name per line"
    if "://" not in str(place) and not Path(place).exists():
        raise InputError(f"there is no {place}; {forms}")
    if not Path(place).is_file():
        return open_label_set(place).spec.class_names
    try:
        text = Path(place).read_text(encoding="utf-8-sig")  # universal newlines
    except UnicodeDecodeError as error:
        raise InputError(f"{place} is not UTF-8 text ({error.reason} at byte {error.start}); {forms}") from error
    names = tuple(line.strip() for line in text.split("\n") if line.strip())
    if not names:
        raise InputError(f"{place} names no class; {forms}")
    if len(set(names)) != len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{place} names the class {double!r} twice; {forms}")
    return names
