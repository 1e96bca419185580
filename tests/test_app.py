"""`hybriddit app`: the session behind it, its functions, and the page itself in a headless browser."""

import io
import json
import math
import shutil
import socket
import sys
import threading
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from tiny_pipelines import tiny_pipeline

import hybriddit
from hybriddit import HybridConfig, hybridize, load_adapter, save_adapter
from hybriddit.cli import main
from hybriddit.generate import generate
from hybriddit.generate.session import SAVED, Session, find_source, measured
from hybriddit.images import read_record

pytest.importorskip("gradio", reason="the page needs gradio")
from hybriddit.app import DENSE, Page, serving  # noqa: E402

TEACHER = str(Path(__file__).parents[1] / "assets/demo-teacher")
PROMPT = "the same boot left and right"
SIZE = {"height": 64, "width": 64, "steps": 2, "max_sequence_length": 24}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two adapters of the demo's teacher, of different configs, with weights that change the image."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, window in (("wide", 7), ("narrow", 3)):
        model = hybridize(FluxPipeline.from_pretrained(TEACHER).transformer, HybridConfig(window=window, map_rank=4))
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if ".hybrid." in parameter_name:
                    parameter.add_(0.02 * torch.randn(parameter.shape))
        save_adapter(model, folder / name)
    return [str(folder / "wide"), str(folder / "narrow")]


@pytest.fixture(scope="module")
def images(adapters):
    """What `generate` makes of the prompt by a pipeline of its own, uint8 [64, 64, 3]: dense, and by each adapter."""
    made = {}
    for name in (None, *adapters):
        pipeline = FluxPipeline.from_pretrained(TEACHER)
        if name is not None:
            load_adapter(pipeline, name)
        [(image, _)] = generate(pipeline, PROMPT, seed=3, **SIZE)
        made[name] = np.asarray(image)
    return made


@pytest.fixture(scope="module")
def session(adapters):
    return Session(find_source(TEACHER, adapters, device="cpu"))


def nearness(one, other):
    return 10 * math.log10(255**2 / max(1e-9, ((one.astype(float) - other.astype(float)) ** 2).mean()))


def test_a_session_makes_what_generate_makes_in_any_order(session, adapters, images):
    wide, narrow = adapters
    assert session.hybrids == adapters
    for name in (narrow, None, wide, None, narrow):
        told = []
        [made], notes = session.make(name, PROMPT, seed=3, tell=lambda *now, told=told: told.append(now), **SIZE)
        assert np.array_equal(np.asarray(made.image), images[name]) and notes == []
        assert told == [(1, 2), (2, 2)] and made.seconds > 0 and made.memory > 100e6
        assert (made.record["adapter"], made.record["model"], made.record["seed"]) == (name, TEACHER, 3)
        assert (made.record["hybrid_config"] is None) == (name is None)
    many, _ = session.make(wide, PROMPT, seed=2, num_images=2, tell=lambda *steps: told.append(steps), **SIZE)
    assert np.array_equal(np.asarray(many[1].image), images[wide]) and told[-1] == (4, 4)


def test_a_comparison(session, adapters, images):
    told = []
    pair, _ = session.compare(adapters[0], PROMPT, seed=3, tell=lambda *steps: told.append(steps), **SIZE)
    assert np.array_equal(np.asarray(pair.teacher.image), images[None])
    assert np.array_equal(np.asarray(pair.hybrid.image), images[adapters[0]])
    assert pair.psnr == pytest.approx(nearness(images[None], images[adapters[0]])) and 0 < pair.ssim < 1
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)] and not pair.hybrid.first
    with pytest.raises(ValueError, match="the dense model is the teacher itself: choose an adapter"):
        session.compare(None, PROMPT, **SIZE)
    with pytest.raises(ValueError, match="no hybrid 'other' is loaded here"):
        session.make("other", PROMPT, **SIZE)


def test_two_at_once_take_turns(session, adapters):
    order = []

    def work(name):
        session.make(name, PROMPT, tell=lambda done, total: order.append(name), **SIZE)

    threads = [threading.Thread(target=work, args=(name,)) for name in (None, *adapters)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(order) == 6 and all(order[i] == order[i + 1] for i in (0, 2, 4)), order


def test_what_tell_raises_ends_the_work_and_nothing_else(session, adapters, images):
    def stop(done, total):
        raise InterruptedError

    for name in (None, adapters[0]):
        with pytest.raises(InterruptedError):
            session.make(name, PROMPT, tell=stop, **SIZE)
    [made], _ = session.make(adapters[1], PROMPT, seed=3, **SIZE)
    assert np.array_equal(np.asarray(made.image), images[adapters[1]])


def test_a_pipeline_that_was_saved_as_a_hybrid(adapters, images, tmp_path):
    load_adapter(FluxPipeline.from_pretrained(TEACHER), adapters[0]).save_pretrained(tmp_path / "hybrid")
    session = Session(find_source(str(tmp_path / "hybrid"), device="cpu"))
    assert session.hybrids == [SAVED]
    pair, _ = session.compare(SAVED, PROMPT, seed=3, **SIZE)
    assert nearness(np.asarray(pair.hybrid.image), images[adapters[0]]) > 50
    assert nearness(np.asarray(pair.teacher.image), images[None]) > 50
    with pytest.raises(ValueError, match="is hybrid already"):
        session.add(adapters[0])
    with pytest.raises(ValueError, match="hybrid"):
        find_source(str(tmp_path / "hybrid"), adapters[:1])


def test_a_folder_saved_for_another_task_makes_images_of_prompts(tmp_path):
    """Its steps are told of (without which nothing could interrupt them), and its settings are those of the pipeline used."""
    folder = shutil.copytree(TEACHER, tmp_path / "teacher")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxImg2ImgPipeline"}))
    session, told = Session(find_source(str(folder), device="cpu")), []
    session.make(None, PROMPT, tell=lambda *now: told.append(now), **SIZE)
    assert told == [(1, 2), (2, 2)] and "strength" not in session.takes and session.usual("guidance") == 3.5


def test_memory_is_the_peak_within_the_block():
    with measured(torch.device("cpu")) as before:
        pass
    with measured(torch.device("cpu")) as figures:
        held = np.ones(300 << 20, np.uint8)
        threading.Event().wait(0.1)
        del held
    assert 250 << 20 < figures["memory"] - before["memory"] < 400 << 20 and figures["seconds"] >= 0.1


def test_the_functions_of_the_page(adapters, images, tmp_path, monkeypatch):
    page = Page(tmp_path, device="cpu")
    assert page.choices() == [DENSE] and "No model" in page.about()
    with pytest.raises(ValueError, match="no model is loaded"):
        page.generate(DENSE, PROMPT, 3, **SIZE)
    page.load(f" {TEACHER} ", f"{adapters[0]}\n\n", False)
    assert page.choices() == [DENSE, adapters[0]] and "FluxPipeline, float32" in page.about()
    # as the browser sends it: floats, and nothing in fields that are empty
    file, html, record = page.generate(adapters[0], PROMPT, 3.0, negative_prompt="", guidance=None, **SIZE)
    assert np.array_equal(np.asarray(Image.open(file)), images[adapters[0]])
    assert read_record(file) == record and record["adapter"] == adapters[0] and "peak memory of this process" in html
    one, other, html, records = page.compare(adapters[0], PROMPT, 3, guidance=7.0, **SIZE)
    assert np.array_equal(np.asarray(Image.open(one)), images[None]) and one != other
    assert f"{nearness(images[None], images[adapters[0]]):.2f} dB" in html
    assert "guidance has no effect: this model was distilled to need none" in html
    assert read_record(other) == records["hybrid"]
    small = tiny_pipeline("flux_dev").transformer
    save_adapter(hybridize(small, HybridConfig(window=3)), tmp_path / "other")
    # what is found wrong without reading weights leaves the model in place
    monkeypatch.setattr("hybriddit.pipelines.loading.load_base", lambda *args: pytest.fail("a model is loaded"))
    kept = page.session
    for model, more, message in (
        ("", "", "give a model"),
        ("/nowhere", "", "no diffusers pipeline at '/nowhere'"),
        (TEACHER, "/nowhere", "no adapter folder /nowhere"),
        (TEACHER, str(tmp_path / "other"), "does not fit this model"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            page.load(model, more)
    assert page.session is kept


def test_the_command_serves_until_ctrl_c(adapters, monkeypatch, capsys):
    seen = []

    def look():
        address = capsys.readouterr().out.split()[4]
        seen.append((address, urllib.request.urlopen(address).read().decode()))
        raise KeyboardInterrupt

    monkeypatch.setattr("hybriddit.app.wait", look)
    given = ["--model", TEACHER, "--adapter", adapters[0], "--width", "64", "--height", "64", "--device", "cpu"]
    assert main(["app", *given]) == 130
    [(address, text)] = seen
    assert address.startswith("http://127.0.0.1:") and "hybriddit" in text and TEACHER in text
    with pytest.raises(OSError):
        urllib.request.urlopen(address)  # it is over


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--adapter", "run"], "an adapter is for a model: give --model too"),
        (["--model", "/nowhere"], "no diffusers pipeline at '/nowhere'"),
        (["--model", TEACHER, "--adapter", "/nowhere"], "no adapter folder /nowhere"),
        (["--model", TEACHER, "--any-base"], "--any-base is for an adapter"),
        (["--model", TEACHER, "--offload", "model", "--device", "cpu"], "spares the memory of an accelerator"),
        (["--offload", "model", "--device", "cpu"], "spares the memory of an accelerator"),
        (["--steps", "0"], "steps must be 1 or more, not 0"),
        (["--host", "192.0.2.1"], "nothing can be served at 192.0.2.1"),
        (["--port", "70000"], "nothing can be served at 127.0.0.1:70000"),
    ],
)
def test_what_the_command_refuses(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("hybriddit.app.build", lambda page: pytest.fail("it serves"))
    assert main(["app", *arguments]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hybriddit: ")]
    assert len(errors) == 1 and message in errors[0]


def test_a_port_that_is_taken_is_told_before_a_model_is_loaded(capsys, monkeypatch):
    monkeypatch.setattr("hybriddit.app.find_source", lambda *given, **more: pytest.fail("a model is looked for"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["app", "--model", TEACHER, "--port", str(port)]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"127.0.0.1:{port} (Address already in use): give another --port" in said


def test_without_gradio_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "hybriddit.app")
    monkeypatch.delattr(hybriddit, "app", raising=False)
    assert main(["app", "--model", TEACHER]) == 1
    assert 'the page needs gradio: pip install "hybriddit[app]"' in capsys.readouterr().err


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_the_page_in_a_browser(adapters, images):
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright to drive a browser")
    asked, said = [], []
    with (
        serving(TEACHER, tuple(adapters), settings=SIZE, device="cpu") as address,
        playwright.sync_playwright() as driver,
    ):
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(60_000)
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
        page.goto(address)
        assert page.input_value("#attention input") == adapters[1], "the last adapter is chosen"
        assert page.input_value("#width input") == "64"

        def picture(name):
            source = page.get_attribute(f"#{name} img", "src")
            data = urllib.request.urlopen(source).read()
            return np.asarray(Image.open(io.BytesIO(data))), data

        page.fill("#prompt textarea", PROMPT)
        page.fill("#seed input", "3")
        page.click("#generate")
        page.wait_for_selector("#figures .value")
        assert np.array_equal(picture("first")[0], images[adapters[1]])
        assert not page.is_visible("#second")

        page.click("#attention input")
        page.get_by_role("option", name=adapters[0]).click()
        page.click("#compare")
        page.wait_for_selector("#figures .near")
        page.wait_for_selector("#second img")
        assert np.array_equal(picture("first")[0], images[None])
        pixels, data = picture("second")
        assert np.array_equal(pixels, images[adapters[0]])
        assert b'"hybrid_config"' in data, "a download keeps its record"
        assert f"{nearness(images[None], images[adapters[0]]):.2f} dB" in page.inner_text("#figures")
        assert page.inner_text("#figures").count(" MiB") == 2 and page.inner_text("#figures").count(" s\n") == 2

        page.fill("#width input", "33")
        page.click("#generate")
        page.wait_for_selector(".toast-body")
        assert "width 33 is no multiple of 4, which this model needs" in page.inner_text(".toast-body")
        browser.close()
    assert all(url.startswith((address, "data:", "blob:")) for url in asked), "it fetches nothing from elsewhere"
    assert not said
