"""Class colours: the same everywhere, told apart by colour-blind readers too; letters where colours run out."""

import numpy as np
import pytest

from stl_offline.palette import (
    CONFIDENT,
    FIRST_COLORS,
    UNCONFIDENT,
    UNLABELLED,
    class_color,
    class_marks,
    class_pixels,
    hex_color,
    ink_on,
    rgb,
)

# Machado, Oliveira and Fernandes 2009, severity 1.0, on linear RGB.
SEEN_BY = {
    "all": np.eye(3),
    "protanopes": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopes": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopes": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
# Björn Ottosson's OKLab (2020): linear RGB to cone responses, and their cube roots to lightness and two hues.
TO_CONES = [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566]]
TO_CONES += [[0.0883024619, 0.2817188376, 0.6299787005]]
TO_LAB = [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099]]
TO_LAB += [[0.0259040371, 0.7827717662, -0.8086757660]]


def linear(colors: np.ndarray) -> np.ndarray:
    return np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)


def nearest(colors: list, matrix) -> float:
    """The smallest distance in OKLab between two of the colours, as somebody sees them."""
    seen = np.clip(linear(np.array(colors)) @ np.array(matrix).T, 0, 1)
    lab = np.cbrt(seen @ np.array(TO_CONES).T) @ np.array(TO_LAB).T
    distances = np.linalg.norm(lab[:, None] - lab, axis=-1)
    return distances[~np.eye(len(lab), dtype=bool)].min()


@pytest.mark.parametrize("who", SEEN_BY)
def test_the_first_colours_stay_apart(who):
    # Four times the distance that is just noticed (0.02).
    assert nearest([*map(rgb, FIRST_COLORS), UNLABELLED], SEEN_BY[who]) > 0.085
    assert nearest([CONFIDENT, UNCONFIDENT], SEEN_BY[who]) > 0.3


def test_the_measure_finds_colours_that_do_not():
    assert nearest([rgb("#c87137"), rgb("#7f8f2b")], SEEN_BY["deuteranopes"]) < 0.07
    assert nearest([rgb("#c87137"), rgb("#7f8f2b")], SEEN_BY["all"]) > 0.12


def test_colours_depend_on_the_class_alone_and_differ():
    colors = [class_color(class_id) for class_id in range(1000)]
    assert len(set(colors)) == 1000
    assert UNLABELLED not in colors
    assert class_color(-1) == UNLABELLED


def test_pixels_are_the_classes_colours():
    class_ids = np.array([[0, 12], [-1, 0], [999, 3]])
    pixels = class_pixels(class_ids)
    assert pixels.shape == (3, 2, 3)
    for place, class_id in np.ndenumerate(class_ids):
        assert pixels[place] == pytest.approx(np.array(class_color(int(class_id))) * 255, abs=0.51)


def test_hexadecimal_notation_round_trips():
    assert rgb("#0b5fa5") == (11 / 255, 95 / 255, 165 / 255)
    assert all(hex_color(rgb(text)) == text for text in FIRST_COLORS)


def test_ink_has_the_contrast_that_text_needs():
    for class_id in range(300):
        color = class_color(class_id)
        light = float(linear(np.array(color)) @ [0.2126, 0.7152, 0.0722]) + 0.05
        assert (light / 0.05 if ink_on(color) == "#000000" else 1.05 / light) >= 4.5


def test_letters_go_to_the_classes_with_most_tokens():
    assert class_marks({7: 1, 3: 20, -1: 99, 5: 2}) == {3: "A", 5: "B", 7: "C"}
    many = class_marks({class_id: class_id for class_id in range(100)})
    assert sorted(many) == list(range(48, 100))
    assert len(set(many.values())) == 52
