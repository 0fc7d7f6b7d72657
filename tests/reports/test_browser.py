"""The page in a real browser, as wide as a phone and as a screen, light and dark; skipped without Chromium."""

import html
import json
import re
import shutil
import subprocess

import pytest
from report_runs import make_run

from fusion_plugins.reports.build import page_of
from fusion_plugins.reports.chain import Options

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
#: opens the page in frames of several widths, and writes what it finds there as its own text
OUTER = """<!doctype html><body><pre id="out"></pre>%s<script>
const found = [];
for (const frame of document.querySelectorAll("iframe")) frame.addEventListener("load", () => {
  const page = frame.contentDocument, root = page.documentElement, view = frame.contentWindow;
  const sizes = [...page.querySelectorAll("svg text")].map(letter => {
    const size = parseFloat(view.getComputedStyle(letter).fontSize), matrix = letter.getScreenCTM();
    return size * Math.hypot(matrix.a, matrix.b);
  });
  const style = view.getComputedStyle(page.body);
  found.push({
    width: frame.width, inner: root.clientWidth, scroll: root.scrollWidth, letters: Math.min(...sizes),
    scripts: page.scripts.length, title: page.title, boxes: page.querySelectorAll("[tabindex='0'][role=region]").length,
    unnamed: [...page.querySelectorAll("[tabindex='0']")].filter(box => !box.getAttribute("aria-label")).length,
    colours: [style.color, style.backgroundColor], clipped: [...page.querySelectorAll("svg")].filter(
      picture => picture.getBoundingClientRect().right > root.clientWidth + 1 && !picture.closest(".wide")).length,
  });
  document.getElementById("out").textContent = JSON.stringify(found);
});
</script>"""


def look(page, folder, dark):
    """What a browser finds in the page, per width."""
    (folder / "page.html").write_text(page)
    frames = "".join(f'<iframe src="page.html" width="{width}" height="900"></iframe>' for width in (390, 1280))
    (folder / "outer.html").write_text(OUTER % frames)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--hide-scrollbars"]
    options += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--user-data-dir={folder / 'profile'}"]
    command = [CHROMIUM, *options, "--virtual-time-budget=5000", "--dump-dom", (folder / "outer.html").as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    return json.loads(html.unescape(re.search(r'<pre id="out">(.*?)</pre>', result.stdout)[1]))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_a_page_fits_a_phone_and_a_screen_and_follows_the_setting_for_dark(tmp_path):
    page = page_of(make_run(tmp_path / "run"), Options())
    light, dark = (look(page, tmp_path, dark) for dark in (False, True))
    for found in (*light, *dark):
        assert found["inner"] >= found["scroll"], "only tables and listings scroll, each in its own box"
        assert found["letters"] >= 10
        assert (found["scripts"], found["unnamed"], found["clipped"]) == (0, 0, 0)
        assert found["boxes"] > 10
    assert {found["width"] for found in light} == {found["width"] for found in dark} == {"390", "1280"}
    assert light[0]["colours"] != dark[0]["colours"]
