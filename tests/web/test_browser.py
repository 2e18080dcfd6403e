"""The command as a process and its page in a real browser: headless Chromium, driven by Playwright."""

import json
import shutil
import signal
from pathlib import Path

import pytest
from PIL import Image

from sfv_jax.data.video import read_clip, read_comment
from tests.support.small_model import save_world_model
from tests.web.test_demo import served

WAIT = 300_000  # milliseconds: programs are compiled meanwhile

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def address(small_folder, tmp_path_factory):
    """Address of the page of a process, which ends by Ctrl-C and then leaves no file."""
    pytest.importorskip("uvicorn", reason='needs pip install -e ".[demo]"')
    other = save_world_model(tmp_path_factory.mktemp("browser") / "second", seed=1)
    files = tmp_path_factory.mktemp("files")
    with served(
        small_folder, files, f"--compare={other}", "--max_upload_bytes=100000", "--max_upload_pixels=1000000"
    ) as (process, found):
        yield found
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert not list(files.glob("sfv-demo-*"))


@pytest.fixture(scope="module")
def browser():
    """A Chromium: Playwright's own if it was installed, else that of the system."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (the extra test)")
    names = ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell")
    system = next(filter(None, map(shutil.which, names)), None)
    with playwright.sync_playwright() as driver:
        own = driver.chromium.executable_path
        path = own if Path(own).is_file() else system
        if path is None:
            pytest.skip(
                f"no browser: `playwright install chromium`, or a package that brings one of {', '.join(names)}"
            )
        made = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def page(browser, address):
    """The page, just opened; it may neither fail nor ask anything outside."""
    made, wrong = browser.new_page(), []
    made.set_default_timeout(60_000)
    made.on("pageerror", lambda error: wrong.append(str(error)))
    made.on(
        "console", lambda message: wrong.append(message.text) if "Content Security Policy" in message.text else None
    )
    made.on(
        "request",
        lambda asked: wrong.append(asked.url) if not asked.url.startswith((address, "data:", "blob:")) else None,
    )
    made.goto(address)
    made.wait_for_selector("#examples button")
    yield made
    made.close()
    assert wrong == []


def until(page, expression: str) -> None:
    """Waits for an expression; Playwright's own way evaluates text in the page, which its policy forbids."""
    for _ in range(WAIT // 50):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"{expression}: {page.inner_text('body')}")


def generate(page, count: int = 1) -> None:
    page.click("#go")
    done = f"document.querySelectorAll('.result').length == {count} && document.querySelector('#stop').hidden"
    until(page, f"{done} || !document.querySelector('#error').hidden")
    assert page.is_hidden("#error"), page.inner_text("#error")


def colors(page) -> int:
    """Number of colors on the first canvas of the stage."""
    return page.evaluate(
        "() => { const c = document.querySelector('#stage canvas');"
        "const d = new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer);"
        "return new Set(d).size }"
    )


def downloaded(page, selector: str) -> Path:
    with page.expect_download() as found:
        page.click(selector)
    return Path(found.value.path())


def test_an_image_becomes_a_video_that_plays_and_is_downloaded(page, tmp_path):
    Image.radial_gradient("L").resize((60, 40)).convert("RGB").save(tmp_path / "my moon.png")
    page.set_input_files("#file", tmp_path / "my moon.png")
    page.wait_for_selector("#preview:not([hidden])")
    until(page, "document.querySelector('#about-image').textContent.includes('60 x 40')")
    page.fill("[name=seed]", "11")
    generate(page)
    assert colors(page) > 20
    seen = {page.evaluate("() => (document.querySelector('#number').textContent)") for _ in range(40)}
    for _ in range(40):
        page.wait_for_timeout(50)
        seen.add(page.inner_text("#number"))
    assert {"1 / 3", "2 / 3", "3 / 3"} <= seen  # it plays
    box = page.locator("#stage canvas").bounding_box()
    assert box["width"] >= 160 and box["width"] % 16 == 0  # 16 pixels, enlarged by a whole factor
    names = page.locator(".times span:nth-child(3n+1)").all_inner_texts()
    assert names == ["image encoder", "VAE encoder", "UNet", "decoder", "files"]
    video, record = downloaded(page, ".mp4"), json.loads(downloaded(page, ".json").read_text())
    shutil.copy(video, tmp_path / "video.mp4")
    assert read_clip(tmp_path / "video.mp4", num_frames=3, fps=7).shape == (3, 16, 16, 3)
    inside = json.loads(read_comment(tmp_path / "video.mp4"))
    assert inside["seed"] == record["seed"] == 11 and record["image"] == "my-moon.png"
    assert page.locator("#gallery button").count() == 1


def test_examples_and_two_videos_side_by_side(page):
    page.click("#examples button:nth-child(3)")
    page.select_option("[name=beside]", "seed")
    page.fill("[name=second_seed]", "77")
    generate(page, 2)
    assert page.locator("#stage figcaption").all_inner_texts() == [
        "small, seed 0 (16 x 16)",
        "small, seed 77 (16 x 16)",
    ]
    page.select_option("[name=beside]", "checkpoint")
    assert page.is_hidden("[name=second_seed]")
    generate(page, 2)
    assert "second, seed 0 (16 x 16)" in page.inner_text("#stage")
    assert page.locator("#gallery button").count() == 2
    page.click("#gallery button:nth-child(2)")
    assert "small, seed 77" in page.inner_text("#stage")


def test_bad_images_and_settings_are_sentences(page, tmp_path):
    Image.radial_gradient("L").save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "good.png").read_bytes()[:900])
    (tmp_path / "notes.png").write_text("no image")
    (tmp_path / "heavy.png").write_bytes(bytes(100_001))
    Image.new("1", (2000, 2000)).save(tmp_path / "large.png")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    for name, said in (
        ("broken", "broken.png: cannot read the image: "),
        (
            "notes",
            "notes.png: cannot read the image: not an image of a known kind, or damaged at its beginning (a video is "
            "not read here).",
        ),
        ("heavy", "The file is larger than 0.1 MB, the limit here."),
        ("large", "large.png: 2000x2000 (width x height) is more than 1 megapixels, the limit here: make it smaller."),
        ("huge", "huge.png: more than 1 megapixels, the limit here: make it smaller."),
    ):
        page.evaluate("document.querySelector('#error').hidden = true")
        page.set_input_files("#file", tmp_path / f"{name}.png")
        page.wait_for_selector("#error:not([hidden])")
        assert page.inner_text("#error").startswith(said)
    page.fill("[name=num_inference_steps]", "500")
    page.click("#go")
    until(page, "document.querySelector('#error').textContent.startsWith('num_inference_steps: give a whole')")
    page.fill("[name=num_inference_steps]", "1")
    generate(page)  # the page goes on
