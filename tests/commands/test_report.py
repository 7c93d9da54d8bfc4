import base64
import io
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from age_vlm.commands.report import write_report


SCENE = Image.new("RGB", (64, 64), "red")
CONTENT = {
    "title": "a <run> & more",
    "settings": {"seed": 7, "training": {"lr": 2e-3, "layers": [0, 1]}, "bf16": False},
    "metrics": [
        {"task": "random", "accuracy": 0.97251},
        {"task": "where", "mass": np.float32(0.5), "accuracy": None},
    ],
    "curves": {"loss": [(0, 2.0), (10, 1.0), (20, 0.5)], "nothing logged": []},
    "examples": [
        {
            "image": Image.new("RGB", (64, 64), "red"),
            "question": "is there <b>a car</b>?",
            "answer": "Yes.",
            "expected": "yes",
        },
        {
            "image": Image.new("CMYK", (300, 200)),
            "question": "how many?",
            "answer": "",
            "expected": "two",
            "sheet": None,
        },
        {
            "image": Image.new("RGB", (64, 64)),
            "question": "what colour?",
            "answer": "red",
            "expected": "red",
            "sheet": Image.new("RGB", (480, 240), "blue"),
        },
    ],
    "notes": ["one note", "another"],
}


class Page(HTMLParser):
    """Tags that are open, images, references and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack, self.sources, self.links, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.links += [given[key] for key in ("src", "href") if key in given]
        if tag == "img":
            self.sources.append(given["src"])
        elif tag not in ("meta", "br"):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] != "style":
            self.text += data


@pytest.fixture
def page(tmp_path):
    return Page(write_report(tmp_path / "report.html", **CONTENT).read_text("utf-8"))


def test_page_is_well_formed_and_needs_no_network(page, tmp_path):
    assert page.stack == []
    assert page.links and all(link.startswith("data:") for link in page.links)
    assert not re.search(r"url\(|@import", (tmp_path / "report.html").read_text("utf-8"))


def test_images_are_whole(page):
    images = [base64.b64decode(s.partition(",")[2]) for s in page.sources if s.startswith("data:image/png")]
    sizes = [Image.open(io.BytesIO(data)).size for data in images]
    assert sizes == [(64, 64), (300, 200), (480, 240)]
    plots = [base64.b64decode(s.partition(",")[2]) for s in page.sources if s.startswith("data:image/svg+xml")]
    assert len(plots) == 2 and all(plot.rstrip().endswith(b"</svg>") for plot in plots)


def test_text_is_escaped_and_complete(page):
    for text in (
        "a <run> & more",
        "is there <b>a car</b>?",
        "training.lr",
        "0.002",
        "0, 1",
        "0.973",
        "another",
        "seed",
        "7",
    ):
        assert text in page.text
    assert "0.500" in page.text and "—" in page.text
    assert page.text.count("✓") == 2 and page.text.count("✗") == 1 and "expected two" in page.text


def test_nothing_to_show_leaves_no_empty_section(tmp_path):
    text = write_report(tmp_path / "r.html", title="empty", settings={}, metrics=[], curves={}, examples=[]).read_text(
        "utf-8"
    )
    assert "<h2>" not in text


def test_same_content_gives_the_same_bytes_apart_from_plots(tmp_path):
    content = {**CONTENT, "curves": {}}
    one, two = (write_report(tmp_path / name, **content).read_bytes() for name in ("a.html", "b.html"))
    assert one == two


def test_failure_leaves_the_old_report(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(path, **CONTENT)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["report.html"]


def test_report_is_readable_like_any_new_file(tmp_path):
    (tmp_path / "plain").write_text("x")
    path = write_report(tmp_path / "report.html", **CONTENT)
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_folder_must_exist(tmp_path):
    with pytest.raises(ValueError, match="existing folder"):
        write_report(tmp_path / "none" / "report.html", **CONTENT)
