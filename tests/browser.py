"""The browser of the tests that open a page.

Needs Chromium. Where TARFLOWLM_BROWSER is set to its path the tests insist on it; elsewhere they
skip without one.
"""

import importlib.util
import os
import shutil

import pytest

INSISTED = os.environ.get("TARFLOWLM_BROWSER")
BROWSER = INSISTED or shutil.which("chromium") or shutil.which("chromium-browser")
OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
]


def need_browser(*packages: str) -> None:
    """Skip the module that calls this where it lacks a package or Chromium."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if not INSISTED and (missing or BROWSER is None):
        what = " and ".join(missing) or "chromium"
        pytest.skip(f"no {what} to test the page with", allow_module_level=True)


PALE = """() => {
  const pen = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
  const channels = (colour) => {
    pen.clearRect(0, 0, 1, 1);
    pen.fillStyle = colour;
    pen.fillRect(0, 0, 1, 1);
    return [...pen.getImageData(0, 0, 1, 1).data].map((value) => value / 255);
  };
  const over = (top, below) => [0, 1, 2].map((i) => below[i] + top[3] * (top[i] - below[i]));
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const dark = matchMedia('(prefers-color-scheme: dark)').matches;
  const SHOWN = {visibilityProperty: true, opacityProperty: true};
  const found = new Set();
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walk.nextNode()); ) {
    const element = node.parentElement;
    const box = document.createRange();
    box.selectNodeContents(node);
    if (!node.data.trim() || !element.checkVisibility(SHOWN)) continue;
    if (!box.getBoundingClientRect().width) continue;
    if (element.closest(':disabled, svg, style, script')) continue;
    let opacity = 1;
    const grounds = [];
    for (let up = element; up; up = up.parentElement) {
      const style = getComputedStyle(up);
      grounds.push(style.backgroundColor);
      opacity *= style.opacity;
    }
    let ground = dark ? [0, 0, 0] : [1, 1, 1];
    for (const colour of grounds.reverse()) ground = over(channels(colour), ground);
    const ink = channels(getComputedStyle(element).color);
    ink[3] *= opacity;
    const [least, most] = [light(over(ink, ground)), light(ground)].sort((a, b) => a - b);
    const contrast = (most + 0.05) / (least + 0.05);
    const words = `${element.className}: ${node.data.trim().slice(0, 40)}`;
    if (contrast < 4.5) found.add(`${contrast.toFixed(2)} ${words}`);
  }
  return [...found];
}"""
"""Texts on a page whose contrast is below 4.5 (WCAG 2, level AA), as strings."""
