"""Chromium lays a page out, for tests that look at it; they are skipped where it is absent."""

import html as markup
import json
import re
import shutil
import subprocess

import pytest

PROBE = """
<script>
addEventListener("load", () => {
  const pages = [...document.querySelectorAll("iframe")].map((frame) => {
    const inner = frame.contentDocument;
    inner.querySelectorAll("details").forEach((part) => { part.open = true; });
    const images = [...inner.images];
    const broken = images.filter((image) => !image.complete || !image.naturalWidth).length;
    const boxes = [...inner.querySelectorAll(".wide")];
    const clipped = boxes.filter((box) => box.scrollWidth > box.clientWidth).length;
    const svgs = [...inner.querySelectorAll("svg")]\
.map((picture) => picture.getBoundingClientRect());
    const drawn = svgs.filter((box) => box.width > 200 && box.height > 50).length;
    const fetched = inner.defaultView.performance.getEntriesByType("resource").length;
    return { images: images.length, broken, clipped, drawn, fetched, \
width: inner.documentElement.scrollWidth };
  });
  document.body.innerHTML = "<pre>" + JSON.stringify(pages) + "</pre>";
});
</script>
"""


def lay_out(page, widths, folder):
    """Returns by width what the browser found.

    That is pictures, broken ones, clipped boxes, requests, and the page's width.
    """
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on PATH to lay the page out")
    frames = [
        f'<iframe style="width:{w}px;border:0" srcdoc="{markup.escape(page)}"></iframe>'
        for w in widths
    ]
    outer = folder / "outer.html"
    outer.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><body>{"".join(frames)}{PROBE}</body>',
        encoding="utf-8",
    )
    command = [
        *(
            chromium,
            "--headless",
            "--no-sandbox",
            "--no-first-run",
            "--disable-gpu",
            "--disable-quic",
        ),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *(
            f"--user-data-dir={folder / 'profile'}",
            "--window-size=1400,900",
            "--dump-dom",
            outer.as_uri(),
        ),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return dict(
        zip(widths, json.loads(re.search(r"<pre>(.*)</pre>", done.stdout).group(1)), strict=True)
    )
