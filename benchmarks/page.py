"""Looks at the page in Chromium: films it, and measures how soon and how smoothly it shows.

    python benchmarks/page.py --images=PHOTOS --query=a.jpg  # docs/serving.png, _phone.png, .webp
    python benchmarks/page.py --count=100000                 # drawn images, 512 dimensions
    python benchmarks/page.py --count=100000 --minutes=10    # memory of the page and the server

Of drawn images it prints the time from the answer to the first grid that is painted, and frames per
second while it scrolls by, from Chromium's trace.
"""

import argparse
import io
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.serving import make_index, resident, started  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")  # else Playwright's own
RATE = 8  # pictures of the film in a second
WIDTH = 960  # pixels of the film


class Film:
    """Pictures of a page, taken while something is done."""

    def __init__(self, page: Page):
        self.page, self.pictures = page, []

    def take(self, count: int = 1) -> None:
        """Takes so many, in the rhythm of the film."""
        for _ in range(count):
            image = Image.open(io.BytesIO(self.page.screenshot())).convert("RGB")
            height = image.height * WIDTH // image.width
            self.pictures.append(image.resize((WIDTH, height), Image.Resampling.LANCZOS))

    def save(self, path: Path) -> None:
        """Writes an animated WebP."""
        first, *rest = self.pictures
        options = {"append_images": rest, "duration": 1000 // RATE, "loop": 0, "method": 6}
        first.save(path, save_all=True, quality=38, minimize_size=True, **options)
        print(f"{path}: {len(self.pictures) / RATE:.0f} s, {path.stat().st_size / 1e6:.2f} MB")


@contextmanager
def chromium(address: str, **options) -> Iterator[Page]:
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(base_url=f"http://{address}", **options)
        yield context.new_page()
        browser.close()


def settle(page: Page) -> None:
    page.wait_for_load_state("networkidle")
    while not all(page.locator("#grid img").evaluate_all("all => all.map((one) => one.complete)")):
        page.wait_for_timeout(100)
    page.wait_for_timeout(300)


def film(address: str, query: Path, out: Path) -> None:
    """Goes through the page as a visitor would; saves pictures and a film."""
    size = {"width": 1400, "height": 900}
    with chromium(address, viewport=size) as page:
        page.goto("/")
        settle(page)
        seen = Film(page)
        seen.take(5)
        for _ in range(10):
            page.mouse.wheel(0, 260)
            page.wait_for_timeout(120)
            seen.take()
        page.evaluate("() => scrollTo(0, 0)")
        page.set_input_files("#file", query)
        page.locator("#grid .alike").first.wait_for()
        settle(page)
        seen.take(12)
        page.screenshot(path=out / "serving.png")
        page.locator("#why").click()
        for _ in range(60):
            page.wait_for_timeout(500)
            if page.locator("#grid canvas").count() >= 15:
                break
        page.wait_for_timeout(1500)
        seen.take(12)
        page.locator("#grid li").nth(2).hover()
        page.locator("#grid .look").nth(2).click()
        settle(page)
        page.wait_for_timeout(1500)
        seen.take(12)
        page.keyboard.press("ArrowRight")
        settle(page)
        page.wait_for_timeout(1500)
        seen.take(8)
        page.keyboard.press("Escape")
        page.locator("#why").click()
        frame = page.locator("#frame").bounding_box()
        left, top = frame["x"] + frame["width"] / 2, frame["y"] + 5
        page.mouse.move(left, top)
        page.mouse.down()
        for i in range(1, 7):
            page.mouse.move(left + frame["width"] / 13 * i, top + frame["height"] / 18 * i)
            seen.take()
        page.mouse.up()
        settle(page)
        seen.take(14)
        seen.save(out / "serving.webp")
    phone = {"width": 390, "height": 844}
    with chromium(address, viewport=phone, has_touch=True, is_mobile=True) as page:
        page.goto("/")
        page.set_input_files("#file", query)
        page.locator("#grid .alike").first.wait_for()
        settle(page)
        page.screenshot(path=out / "serving_phone.png")
    for name in ("serving.png", "serving_phone.png"):
        picture = Image.open(out / name).convert("RGB")
        colors = picture.quantize(256, method=Image.Quantize.MAXCOVERAGE)
        picture.quantize(palette=colors).save(out / name, optimize=True)


PAINTED = """() => new Promise((done) => {
  const known = performance.getEntriesByType("resource");
  const answer = known.find((one) => one.name.includes("/collection?"));
  const look = () => {
    const images = [...document.querySelectorAll("#grid img")];
    if (images.length && images.every((one) => one.complete)) {
      requestAnimationFrame(() => requestAnimationFrame(
        () => done([window.tiled - answer.responseEnd, performance.now() - answer.responseEnd])));
    } else requestAnimationFrame(look);
  };
  look();
})"""
# When the first tiles are in the document, whose paint follows within a frame.
WATCH = """new MutationObserver(() => {
  if (document.querySelector("#grid li a") && !window.tiled)
    requestAnimationFrame(() => requestAnimationFrame(() => (window.tiled = performance.now())));
}).observe(document, { childList: true, subtree: true });"""


def measure(address: str, pid: int, minutes: float) -> None:
    """Prints when the first grid was painted, frames per second, and memory."""
    with chromium(address, viewport={"width": 1400, "height": 900}) as page:
        page.add_init_script(WATCH)
        found = []
        for _ in range(7):
            page.goto("/")
            page.locator("#grid a").first.wait_for()
            found.append(page.evaluate(PAINTED))
        tiles, images = (statistics.median(times) for times in zip(*found, strict=True))
        print(f"from the answer to a grid: {tiles:.0f} ms, with its pictures: {images:.0f} ms")
        tools = page.context.new_cdp_session(page)
        events: list[dict] = []
        ended = threading.Event()
        tools.on("Tracing.dataCollected", lambda data: events.extend(data["value"]))
        tools.on("Tracing.tracingComplete", lambda _: ended.set())
        tools.send(
            "Tracing.start", {"categories": "disabled-by-default-devtools.timeline.frame,cc"}
        )
        begin = time.monotonic()
        page.evaluate(
            """() => new Promise((done) => {
              let left = 300;
              const step = () => (scrollBy(0, 60), --left ? requestAnimationFrame(step) : done());
              step();
            })"""
        )
        elapsed = time.monotonic() - begin
        tools.send("Tracing.end")
        while not ended.is_set():
            page.wait_for_timeout(50)
        drawn = sum(event["name"] == "DrawFrame" for event in events)
        print(f"scrolling: {drawn / elapsed:.0f} frames/s of {elapsed:.1f} s, by the trace")
        memory = lambda: tools.send("Runtime.getHeapUsage")["usedSize"] / 1e6
        print(f"memory: page {memory():.0f} MB, server {resident(pid):.0f} MB", flush=True)
        end, height = time.monotonic() + 60 * minutes, 1
        while time.monotonic() < end:
            height = height * 48271 % 2147483647
            page.evaluate(
                "(part) => scrollTo(0, part * document.body.scrollHeight)", height / 2**31
            )
            page.wait_for_timeout(700)
            if height % 4 == 0:
                page.locator("#grid [data-id]").nth(9).click()
                settle(page)
                page.go_back()
                settle(page)
        tools.send("HeapProfiler.collectGarbage")
        nodes = page.evaluate("() => document.querySelectorAll('*').length")
        print(
            f"after {minutes:g} minutes: page {memory():.0f} MB in {nodes} elements, server "
            f"{resident(pid):.0f} MB"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="folder to index and film")
    parser.add_argument("--query", type=Path, help="image to search by in the film")
    parser.add_argument("--index", help="of these images, if there is one")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--count", type=int, default=100_000, help="drawn images")
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--minutes", type=float, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        address = given.index or str(Path(scratch, "index"))
        if given.images is None and given.index is None:
            make_index(address, given.count, given.dimension)
        with started(address, given.images) as (where, pid):
            if given.images:
                film(where, given.query, given.out)
            else:
                measure(where, pid, given.minutes)


if __name__ == "__main__":
    main()
