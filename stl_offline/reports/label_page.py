"""The page of a label set: an article for each scene, the histogram, as much of it as fits into the size."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from stl_offline.reports.colors import class_marks, confidence_pixels
from stl_offline.reports.encode import jpeg_url, shrink
from stl_offline.reports.html import (
    Article,
    Panel,
    class_rows,
    label_cells,
    opaque_cells,
    outline_points,
    say_shares,
    tinted_cells,
    token_data,
)
from stl_offline.reports.png import draw_cells, own_cells
from stl_offline.reports.scene import Scene, TokenMap

IMAGE_PIXELS = 320  # longer side of an image on a page


def scene_article(scene: Scene, class_names: Sequence[str], threshold: float, marks: Mapping[int, str]) -> Article:
    """One scene as a part of the page."""
    name = class_names[scene.class_id]
    of = f"of {scene.key}"
    pixels, panels = {}, []
    tokens = {"map": token_data(scene.tokens, scene.view)}
    if scene.image is not None:
        pixels["image"] = jpeg_url(shrink(scene.image, IMAGE_PIXELS))
        seen = scene.student_view if scene.student_view is not None else scene.view
        what = "the student's crop" if scene.student_view is not None else "the labeler's crop"
        panels.append(
            Panel(
                "image",
                f"The image {scene.key}, of the class {name}; {what} is outlined",
                scene.image.shape[1] / scene.image.shape[0],
                pixels="image",
                grey=False,
                outline=None if seen is scene.view and scene.whole else outline_points(seen),
            )
        )
        if scene.whole:
            under = "image"
        else:
            under = "crop"
            pixels["crop"] = jpeg_url(shrink(scene.tokens.pixels, IMAGE_PIXELS))
            panels.append(_crop_panel(f"The crop that the labeler saw {of}", "labeler's crop", scene.tokens, "crop"))
    else:
        under = None
    outline = outline_points(scene.student_view) if scene.student_view is not None and scene.whole else None
    panels += _map_panels(scene, class_names, threshold, under, outline)
    if scene.student is not None:
        tokens["student"] = token_data(scene.student, scene.student_view)
        if scene.student.pixels is not None:
            pixels["student"] = jpeg_url(scene.student.pixels)
            flipped = " It is flipped." if np.linalg.det(scene.student_view.matrix[:, :2]) < 0 else ""
            panels.append(
                _crop_panel(f"The student's random crop {of}.{flipped}", "student's crop", scene.student, "student")
            )
        panels += _student_panels(scene, class_names)
    return Article(
        key=scene.key,
        title=scene.key if scene.whole else f"{scene.key}, crop {scene.view_index}",
        note="" if scene.image is not None else "The image is not at hand: labels alone.",
        pixels=pixels,
        panels=tuple(panels),
        rows=class_rows([scene.tokens], scene.class_id, class_names, marks),
        tokens=tokens,
        own=scene.class_id,
        tables={"map": "label map"} | ({"student": "student's crop"} if scene.student is not None else {}),
        caption=_caption(scene, threshold),
    )


def scene_marks(scenes: Sequence[Scene]) -> dict[int, str]:
    """The letters of a page's classes."""
    return class_marks(sum((scene.all_tokens() for scene in scenes), Counter()))


def _map_panels(
    scene: Scene, class_names: Sequence[str], threshold: float, under: str | None, outline: str | None
) -> list[Panel]:
    tokens, of = scene.tokens, f"of {scene.key}"
    base = {"aspect": tokens.aspect, "pixels": under, "tokens": "map"}
    own = tokens.own(scene.class_id)
    confident = int((own & (tokens.confidence >= threshold)).sum())
    kept = int(tokens.kept.sum())
    return [
        Panel(
            "token labels",
            f"Token labels {of}: {say_shares(tokens, class_names)}",
            cells=label_cells(tokens),
            letters="best",
            outline=outline,
            reach=True,
            **base,
        ),
        Panel(
            "own class",
            f"Foreground {of}: {confident} tokens say {class_names[scene.class_id]} with a confidence from "
            f"{threshold:g} on, {int(own.sum()) - confident} with less, out of {own.size}",
            cells=tinted_cells(*own_cells(tokens, scene.class_id, threshold)),
            **base,
        ),
        Panel(
            "confidence",
            f"Confidence {of}: {tokens.confidence.min():.0%} to {tokens.confidence.max():.0%}, "
            f"mean {tokens.confidence.mean():.0%}",
            cells=opaque_cells(confidence_pixels(tokens.confidence)),
            **base,
        ),
        Panel(
            "one draw",
            f"One Gumbel draw {of}: {kept} of {own.size} tokens keep their most probable class",
            cells=tinted_cells(*draw_cells(tokens)),
            letters="kept",
            **base,
        ),
    ]


def _student_panels(scene: Scene, class_names: Sequence[str]) -> list[Panel]:
    student, of = scene.student, f"of {scene.key}"
    base = {"aspect": student.aspect, "pixels": "student" if student.pixels is not None else None, "tokens": "student"}
    return [
        Panel(
            "labels in the crop",
            f"Token labels under the student's crop {of}: {say_shares(student, class_names)}",
            cells=label_cells(student),
            letters="best",
            reach=True,
            **base,
        ),
        Panel(
            "draw in the crop",
            f"One Gumbel draw under the student's crop {of}: {int(student.kept.sum())} of {student.best.size} tokens "
            "keep their most probable class",
            cells=tinted_cells(*draw_cells(student)),
            letters="kept",
            **base,
        ),
    ]


def _crop_panel(alt: str, title: str, tokens: TokenMap, pixels: str) -> Panel:
    return Panel(title, alt, tokens.aspect, pixels=pixels, grey=False)


def _caption(scene: Scene, threshold: float) -> str:
    tokens = scene.tokens
    own = tokens.own(scene.class_id)
    confident = own & (tokens.confidence >= threshold)
    text = (
        f"{own.sum()} of {own.size} tokens say the image's class, {confident.sum()} of them confidently; "
        f"the draw keeps {tokens.kept.sum()}"
    )
    if scene.student is not None:
        return f"{text}, and {scene.student.kept.sum()} under the crop"
    return f"{text}; students replay this crop, and get these labels bit for bit"
