"""The page of a segmenter's scores: what stands beside what, and which severities it lists."""

import re

import numpy as np

from stl_offline.config_transfer import TransferEvaluateConfig
from stl_offline.palette import class_color, hex_color
from stl_offline.reports import segments
from stl_offline.transfer import SegmentExample

NAMES = ("road & kerb", "<b>sky</b>")


def test_predictions_stand_beside_what_was_seen(tmp_path, monkeypatch):
    pixels, ids = np.full((20, 30, 3), 90, np.uint8), np.zeros((20, 30), np.int64)
    views = [(name, pixels, ids) for name in ("clean", "fog 3", "snow 1")]
    mask = ids.astype(np.int32)
    mask[0] = -1
    examples = [SegmentExample("val/1", mask, tuple(views)), SegmentExample("val/2", np.abs(mask), tuple(views))]
    monkeypatch.setattr(segments, "segment_examples", lambda config: (NAMES, examples))
    result = {"samples": 2, "miou": 0.5, f"iou/{NAMES[0]}": 0.5, f"iou/{NAMES[1]}": None}
    result |= {"corrupted": {"fog": {"2": 0.25, "3": 0.125}, "snow": {"1": 0.3}}, "corrupted_miou": 0.2}
    config = TransferEvaluateConfig(data="x", checkpoint="run", page=str(tmp_path / "page.html"))
    html = segments.write_segment_page(config, result | {"retention": 0.4}).read_text()
    assert "run: 2 images, mean IoU 50.00\u00a0%, 20.00\u00a0% on corrupted images, retention 40.00\u00a0%" in html
    assert "road &amp; kerb" in html and "&lt;b&gt;sky&lt;/b&gt;" in html and "<b>" not in html
    assert re.findall(r'fill="(#\w+)"', html)[:2] == [hex_color(class_color(number)) for number in range(2)]
    assert re.findall(r'<th scope="col" class="number">(\d)</th>', html) == ["1", "2", "3"]
    assert re.findall(r'<td class="number">([^<]*)</td>', html)[2:] == [
        "",
        "25.00\u00a0%",
        "12.50\u00a0%",
        "30.00\u00a0%",
        "",
        "",
    ]
    rows = [re.findall(r"<figcaption>([^<]*)</figcaption>", row) for row in html.split('<div class="figures">')[1:]]
    first, *more = rows[:3]
    assert first == ["clean: image", "clean: prediction", "mask (grey: no class)"]
    assert more == [[f"{name}: image", f"{name}: prediction"] for name in ("fog 3", "snow 1")]
    assert rows[3][2] == "mask" and len(rows) == 6
    assert html.count("data:image/jpeg") == 6 and html.count("data:image/png") == 8
