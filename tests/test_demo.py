"""``mixreorg demo``: what the page computes, what its server gives away, and the page in a real browser."""

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mixreorg_fast import demo
from mixreorg_fast.cli import main
from mixreorg_fast.config import ScenesConfig, find_config, load_config
from mixreorg_fast.data.scenes import planning
from mixreorg_fast.data.scenes.painting import Painter
from mixreorg_fast.data.scenes.scene import KINDS
from mixreorg_fast.data.text.tokenizer import Tokenizer
from mixreorg_fast.errors import UserError
from mixreorg_fast.inference.model import Model, load
from tests.evaluation.fakes import draw_photo
from tests.tiny import fill, tiny_config

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    tokenizer = Tokenizer.train(["a photo of a cat and a dog", "a red car on the road"] * 3, 300)
    config = tiny_config(model={"text": {"vocab_size": tokenizer.vocab_size, "context": 24}}).model
    model = Model(config, tokenizer=tokenizer)
    fill(model)
    folder = tmp_path_factory.mktemp("demo") / "weights"
    model.save(folder)
    (folder / "config.json").write_text('{"data": {"scenes": {"train": 77}}}')  # of a run on embedded scenes
    return folder


def test_a_view_of_a_photo(weights, tmp_path):
    photo = draw_photo(tmp_path / "a.png", (60, 40), seed=0)
    model = load(weights)
    view = demo.view(model, str(tmp_path / "a.png"), "cat, dog", 0.0)
    assert list(view.areas) == ["cat", "dog"] and sum(view.areas.values()) == pytest.approx(1)
    assert [stage.size for stage in view.stages] == [photo.size] * 2
    assert view.overlay.width >= photo.width and view.overlay.height > photo.height  # with its legend
    colours = [len(np.unique(np.asarray(stage).reshape(-1, 3), axis=0)) for stage in view.stages]
    assert min(colours) > 1
    background = demo.view(model, str(tmp_path / "a.png"), "cat, dog", 1.0)
    assert background.areas["background"] > 0


@pytest.mark.slow
def test_the_page_takes_what_the_weights_carry(weights, tmp_path):
    """Size, templates and threshold; names are read as everywhere."""
    pytest.importorskip("gradio", reason="needs the demo extra")
    photo, model = draw_photo(tmp_path / "a.png", (60, 40), seed=0), load(weights)
    model.inference = model.inference.with_options(short_side=40, templates="a {}.", background_threshold=0.35)
    view = demo.view(model, str(tmp_path / "a.png"), "cat; dog\nred car", 0.35)
    assert view.areas == model.segment(photo, ["cat", "dog", "red car"]).areas and "background" in view.areas
    assert list(demo.view(model, str(tmp_path / "a.png"), "cat, dog", 0).areas) == ["cat", "dog"]
    page = demo.build(model, [])
    assert [block.value for block in page.blocks.values() if getattr(block, "elem_id", None) == "background"] == [0.35]


def test_large_photos_are_shown_smaller_and_huge_ones_refused(weights, tmp_path, monkeypatch):
    model = load(weights)
    Image.new("RGB", (2600, 1300), "red").save(tmp_path / "large.png")
    assert demo.view(model, str(tmp_path / "large.png"), "cat", 0.0).stages[0].size == (1280, 640)
    monkeypatch.setattr(demo, "MAX_PIXELS", 1_000_000)
    with pytest.raises(UserError, match="too large to decode .at most 1 million pixels"):
        demo.view(model, str(tmp_path / "large.png"), "cat", 0.0)


@pytest.mark.parametrize("scenes", [ScenesConfig(), load_config(find_config("zero2")).data.scenes])
def test_sample_scenes_are_of_the_kind_that_the_weights_know(tmp_path, monkeypatch, scenes):
    monkeypatch.setattr(demo, "SAMPLE_SIDE", 32)
    samples = demo.sample_scenes(scenes, {}, tmp_path)
    assert len(samples) == demo.SAMPLES == len({path for path, _ in samples})
    for path, names in samples:
        assert Image.open(path).size == (32, 32)
        assert names.split(", ") == list(KINDS)


def test_sample_scenes_show_the_kinds_that_were_scored_best(tmp_path, monkeypatch):
    scenes, painted = load_config(find_config("zero2")).data.scenes, []
    paint = Painter.paint
    monkeypatch.setattr(Painter, "paint", lambda self, scene: (painted.append(scene), paint(self, scene))[1])
    demo.sample_scenes(scenes, {**dict.fromkeys(KINDS, 1.0), "ring": None, "star": 90.0, "heart": 80.0}, tmp_path)
    kinds = [scene.things[0].kind for scene in painted]
    assert kinds[:2] == ["star", "heart"] and "ring" not in kinds and len(set(kinds)) == demo.SAMPLES
    held_out = planning.held_out_combinations(scenes.seed)
    evaluated = [planning.plan_scene(scenes, "val", number, held_out) for number in range(scenes.val)]
    assert painted == [next(s for s in evaluated if s.things[0].kind == kind) for kind in kinds]


def test_examples_are_for_weights_of_scenes_alone(weights, tmp_path):
    assert demo.scenes_of(weights)[0].train == 77
    run = tmp_path / "run"
    shutil.copytree(weights, run / "checkpoints" / "step_00000004")
    (run / "checkpoints" / "step_00000004" / "config.json").unlink()
    assert demo.scenes_of(run) == (None, {})
    (run / "eval.json").write_text('{"scenes": {"per_class": {"star": 50.0}}}')
    for data, known in (({}, True), ({"shards": ["data/scenes/train-0.tar"]}, True), ({"shards": "x.tar"}, False)):
        (run / "config.json").write_text(json.dumps({"data": data}))
        for place in (run, run / "checkpoints" / "step_00000004"):
            scenes, scores = demo.scenes_of(place)
            assert (scenes is not None) == known and scores == {"star": 50.0}


def test_without_weights_nothing_is_trained_unasked(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("gradio", reason="needs the demo extra")
    commands = []

    def train(command):
        commands.append(command)
        shutil.copytree(weights, tmp_path / "runs" / "scenes" / "checkpoints" / "step_00000004")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", train)
    assert main(["demo", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--weights DIR" in error and "--train" in error and not commands
    assert demo.embedded_run(train=True) == Path("runs/scenes") == demo.embedded_run()
    ((_, *command),) = commands
    assert command[1:3] == ["mixreorg_fast.cli", "train"] and command[-2:] == ["--device", "cpu"]

    shutil.rmtree(tmp_path / "runs")
    monkeypatch.setattr(subprocess, "run", lambda command: SimpleNamespace(returncode=1))
    with pytest.raises(UserError, match="the training failed"):
        demo.embedded_run(train=True)


@pytest.mark.slow
def test_segment_without_a_photo_says_so(weights):
    pytest.importorskip("gradio", reason="needs the demo extra")
    page = demo.build(load(weights), [])
    said = {
        event: function.fn(None, "cat", 0.0)[0]
        for function in page.fns.values()
        for _, event in function.targets
        if event in ("change", "click", "submit", "release")
    }
    assert said == {"change": "", "release": "", **dict.fromkeys(("click", "submit"), "**Choose a photo first.**")}


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--port", "99999"], "--port must lie in 1..65535"), (["--short-side", "0"], "--short-side must be at least 1")],
)
def test_refuses_in_one_line(weights, capsys, options, message):
    assert main(["demo", "--weights", str(weights), *options]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


# ---------------------------------------------------------------------------------- the command, and a real browser


@pytest.fixture(scope="module")
def server(weights, tmp_path_factory):
    """A running page: its address and the folder of its temporary files. After SIGTERM the folder is empty."""
    pytest.importorskip("gradio", reason="needs the demo extra")
    folder = tmp_path_factory.mktemp("served")
    command = [sys.executable, "-m", "mixreorg_fast.cli", "demo", "--weights", str(weights), "--short-side", "64"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    limit = threading.Timer(180, process.kill)
    limit.start()
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if " shows " in line:
                break
        else:
            pytest.fail("".join(lines))
        limit.cancel()
        yield SimpleNamespace(url=lines[-1].split()[0], folder=folder)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 0 and "Traceback" not in output, output
        assert not list(folder.glob("mixreorg-demo-*"))
    finally:
        limit.cancel()
        process.kill()


def status(url: str, **request) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, **request), timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.launch
def test_no_file_but_the_pages_own_is_served(server):
    assert status(server.url) == 200
    own = next(server.folder.glob("mixreorg-demo-*/uploads/*/scene*.png"))
    assert status(f"{server.url}gradio_api/file={own}") == 200
    for path in ("/etc/passwd", ROOT / "setup.py", "setup.py", f"{own.parent}/../../../../x", ROOT / "README.md"):
        assert status(f"{server.url}gradio_api/file={path}") == 403
    for path in ("file=http://127.0.0.1/", "file=https://example.com/", "proxy=https://example.hf.space/"):
        assert status(f"{server.url}gradio_api/{path}") == 404


@pytest.mark.launch
def test_uploads_are_bounded(server):
    body = b"--x\r\nContent-Disposition: form-data; name=files; filename=a.jpg\r\n\r\n%b\r\n--x--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    upload = f"{server.url}gradio_api/upload"
    assert status(upload, data=body % b"small", headers=headers, method="POST") == 200
    connection = http.client.HTTPConnection(server.url.split("/")[2], timeout=20)
    for length in ({"Content-Length": str(demo.MAX_UPLOAD * 2)}, {"Transfer-Encoding": "chunked"}):
        connection.request("POST", "/gradio_api/upload", headers=headers | length)
        answer = connection.getresponse()
        assert answer.status == 413 and answer.read() == b"too large"
        connection.close()


@pytest.mark.launch
def test_it_listens_at_one_address_and_says_when_it_cannot(server, weights, capsys):
    host, port = server.url.split("/")[2].split(":")
    assert host == "127.0.0.1"
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://127.0.0.2:{port}/", timeout=5)
    for place in (["--port", port], ["--host", "no.such.host.invalid"]):
        assert main(["demo", "--weights", str(weights), *place]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: --host") and f"{' '.join(place)}: cannot listen there" in error


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no browser: install Debian's chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", "disable-dev-shm-usage", "window-size=1200,1600",
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    service = webdriver.chrome.service.Service(driver)  # named, else Selenium would look for one on the network
    browser = webdriver.Chrome(options=options, service=service)
    yield browser
    browser.quit()


class Page:
    """The page as its users see it."""

    def __init__(self, browser, url: str) -> None:
        self.browser = browser
        browser.get(url)

    def find(self, selector: str):
        return self.until(lambda: self.browser.find_elements("css selector", selector))[0]

    def until(self, condition, seconds: float = 60):
        """The first true value of `condition`."""
        from selenium.common.exceptions import WebDriverException

        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if value := condition():
                    return value
            except WebDriverException:  # the page is redrawn meanwhile
                pass
            time.sleep(0.1)
        raise AssertionError(f"not within {seconds} s; the page says: {self.find('body').text}")

    def picture(self, name: str) -> str | None:
        found = self.browser.find_elements("css selector", f"#{name} img")
        return found[0].get_attribute("src") if found else None

    def next_picture(self, name: str, before: str | None) -> str:
        return self.until(lambda: self.picture(name) not in (before, None) and self.picture(name))

    def type(self, selector: str, text: str) -> None:
        from selenium.webdriver.common.keys import Keys

        self.find(selector).send_keys(Keys.CONTROL, "a")
        self.find(selector).send_keys(text, Keys.ENTER)

    def upload(self, path: Path) -> None:
        for button in self.browser.find_elements("css selector", "#photo button[aria-label=Clear]"):
            button.click()
        self.find("#photo input[type=file]").send_keys(str(path))

    def drop(self, name: str, kind: str) -> None:
        """Drop a file of MIME type `kind` onto the photo's place."""
        script = """
            const data = new DataTransfer(), place = document.querySelector("#photo button.upload-container");
            data.items.add(new File(["some text"], arguments[0], {type: arguments[1]}));
            for (const event of ["dragenter", "dragover", "drop"])
                place.dispatchEvent(new DragEvent(event, {bubbles: true, cancelable: true, dataTransfer: data}));
        """
        self.find("#photo button.upload-container")
        self.browser.execute_script(script, name, kind)


@pytest.mark.launch
@pytest.mark.slow
def test_a_file_of_the_wrong_kind_gets_a_line(browser, server):
    page = Page(browser, server.url)
    page.drop("notes.txt", "text/plain")
    page.until(lambda: "Invalid file type: notes.txt. Only image/* allowed." in page.find("body").text)
    page.drop("drawing.svg", "image/svg+xml")
    wanted = "drawing.svg: not a picture (expected JPEG, PNG, WebP, BMP, TIFF or GIF)"
    page.until(lambda: page.find("#message").text == wanted)


@pytest.mark.browser
@pytest.mark.launch
def test_the_page_in_a_browser(browser, server, tmp_path):
    page = Page(browser, server.url)
    page.find("tr.tr-body").click()  # a sample scene
    scene = page.next_picture("overlay", None)
    names = page.find("#names textarea, #names input").get_attribute("value")
    assert page.until(lambda: set(names.split(", ")) <= set(page.find("#areas").text.split()))
    assert page.picture("stage1") and page.picture("stage2")

    draw_photo(tmp_path / "photo.png", (90, 60), seed=1)
    page.upload(tmp_path / "photo.png")
    photo = page.next_picture("overlay", scene)
    page.type("#names textarea, #names input", "road, car")
    named = page.next_picture("overlay", photo)
    assert page.until(lambda: {"road", "car"} <= set(page.find("#areas").text.split()))
    page.type("#background input[type=number]", "1")
    page.find("#segment").click()
    page.next_picture("overlay", named)
    assert page.until(lambda: "background" in page.find("#areas").text)

    page.type("#names textarea, #names input", "road, ")
    assert page.until(lambda: "expected names separated by commas" in page.find("#message").text)
    page.until(lambda: page.picture("overlay") is None)
    (tmp_path / "bad.jpg").write_text("no picture")
    page.upload(tmp_path / "bad.jpg")
    page.type("#names textarea, #names input", "road")
    wanted = "bad.jpg: not a picture (expected JPEG, PNG, WebP, BMP, TIFF or GIF)"
    page.until(lambda: page.find("#message").text == wanted)
    assert "Traceback" not in page.find("body").text and str(server.folder) not in page.find("body").text

    page.upload(tmp_path / "photo.png")  # and all is well again
    page.next_picture("overlay", None)
    assert page.until(lambda: page.find("#message").text == "")
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert loaded and all(name.startswith((server.url, "data:", "blob:")) for name in loaded)
