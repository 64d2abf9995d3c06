"""The local web page, in a real browser: images, films, masks, wrong input, two tabs.

The tests need Chromium and its driver (Debian's chromium and chromium-driver), gradio and selenium.
"""

import io
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the page needs gradio: make app installs it")
pytest.importorskip("selenium", reason="the browser is driven by selenium: make app installs it")
from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from easy_diffusion.app_requests import Requests, read_brush
from easy_diffusion.pretrained import load_model

ROOT = Path(__file__).parents[1]
WAIT = 300              # seconds until a result must have arrived
needs_browser = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="Chromium and its driver are not installed",
)


@pytest.fixture(scope="module")
def address(random_weights):
    """The address of the page, served by another process with random weights."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "easy_diffusion.app", "--weights", str(random_weights)]
    process = subprocess.Popen([*command, "--port", str(port)], cwd=ROOT)
    address = f"http://127.0.0.1:{port}/"
    deadline = time.monotonic() + WAIT
    while True:
        try:
            urllib.request.urlopen(address).close()
            break
        except OSError:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
    yield address
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1500,1400",
        "--enable-unsafe-swiftshader",
    ):
        options.add_argument(argument)
    options.binary_location = shutil.which("chromium")
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def wait_for(browser, condition):
    return WebDriverWait(browser, WAIT).until(condition)


def find(browser, selector):
    """Wait for an element."""
    return wait_for(browser, lambda browser: browser.find_elements(By.CSS_SELECTOR, selector))[0]


def type_text(browser, selector, text):
    """Replace the text of an input field."""
    field = find(browser, selector)
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys(text, Keys.TAB)


def wait_for_source(browser, selector):
    """Wait for an image; returns its address."""
    return find(browser, f"{selector} img").get_attribute("src")


def open_page(browser, address):
    """Open the page, and choose few steps."""
    browser.get(address)
    type_text(browser, "#steps input[type=number]", "4")


@needs_browser
def test_a_name_becomes_an_image_and_then_a_film(browser, address):
    open_page(browser, address)
    type_text(browser, "#name textarea, #name input", "土豆汤")
    find(browser, "#generate").click()
    assert wait_for_source(browser, "#strip").startswith(address)
    find(browser, "#film").click()
    film = wait_for_source(browser, "#animation")
    assert "_circle.gif" in film
    with urllib.request.urlopen(film) as response, Image.open(response) as gif:
        assert gif.size == (256, 256)
        assert gif.n_frames > 1
    assert find(browser, "#file a").get_attribute("href").endswith("circle.gif")


@needs_browser
def test_what_is_drawn_over_is_inpainted(browser, address):
    """The brush is white; after inpainting there is the image of the network instead."""
    open_page(browser, address)
    find(browser, "#inpaint").click()
    wait_for(browser, lambda _: "请先生成" in find(browser, "#message").text)
    find(browser, "#generate").click()
    wait_for_source(browser, "#strip")
    wait_for(browser, lambda _: not find(browser, "#message").text)
    find(browser, "#inpaint").click()
    wait_for(browser, lambda _: "请先用画笔" in find(browser, "#message").text)

    canvas = find(browser, "#editor canvas")

    def middle_is_white():
        image = np.asarray(Image.open(io.BytesIO(canvas.screenshot_as_png)).convert("RGB"))
        height, width = image.shape[:2]
        return (image[height // 2 - 2:height // 2 + 3, width // 2 - 2:width // 2 + 3] > 250).all()

    assert not middle_is_white()
    move = ActionChains(browser).move_to_element_with_offset(canvas, -40, 0).click_and_hold()
    move.move_by_offset(40, 0).move_by_offset(40, 0).release().perform()
    wait_for(browser, lambda _: middle_is_white())
    find(browser, "#inpaint").click()

    def is_inpainted(_):
        if "请先用画笔" in find(browser, "#message").text:      # the click overtook the stroke
            find(browser, "#inpaint").click()
        return not middle_is_white()

    wait_for(browser, is_inpainted)


@needs_browser
def test_an_unknown_name_shows_a_message_and_the_page_goes_on(browser, address):
    open_page(browser, address)
    type_text(browser, "#name textarea, #name input", "西红柿炒蛋")
    find(browser, "#generate").click()
    wait_for(browser, lambda _: "没有这道菜" in find(browser, "#message").text)
    assert "炒鸡蛋" in find(browser, "#message").text
    assert not browser.find_elements(By.CSS_SELECTOR, "#strip img")
    type_text(browser, "#name textarea, #name input", "番茄炒鸡蛋")
    find(browser, "#generate").click()
    wait_for_source(browser, "#strip")


@needs_browser
def test_two_tabs_at_once_both_get_their_images(browser, address):
    open_page(browser, address)
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    open_page(browser, address)
    second = browser.current_window_handle
    for tab, name in ((first, "土豆汤"), (second, "清炒生菜")):
        browser.switch_to.window(tab)
        type_text(browser, "#name textarea, #name input", name)
        find(browser, "#generate").click()
    sources = []
    for tab in (second, first):
        browser.switch_to.window(tab)
        sources.append(wait_for_source(browser, "#strip"))
    assert sources[0] != sources[1]
    browser.switch_to.window(second)
    browser.close()
    browser.switch_to.window(first)


def test_a_brush_stroke_is_a_mask_of_the_image_size():
    layer = np.zeros((512, 512, 4), np.uint8)
    layer[:256, 256:] = 255
    mask = read_brush({"layers": [layer]}, 64)
    assert mask.shape == (64, 64)
    assert mask[:31, 33:].all()
    assert not mask[33:].any()
    assert not mask[:, :31].any()
    assert not read_brush({"layers": []}, 64).any()


def test_wrong_input_becomes_a_message(random_weights, tmp_path):
    requests = Requests(load_model(random_weights), 64)
    assert "没有这道菜" in requests.generate("", 0, 4, 2.0, "DDIM")[0]
    assert "没有这道菜" in requests.generate(None, 0, 4, 2.0, "DDIM")[0]
    (tmp_path / "no_photo.jpg").write_bytes(b"text")
    assert "无法读取" in requests.upload(str(tmp_path / "no_photo.jpg"))[0]
    assert "请先生成" in requests.animate(None, "", "up", 1, "gif", 0, 4, 2.0)[0]


def test_a_photograph_is_cropped_and_has_no_dish(random_weights, tmp_path):
    requests = Requests(load_model(random_weights), 64)
    Image.new("RGB", (200, 100), "red").save(tmp_path / "photo.png")
    message, image, dish, shown = requests.upload(str(tmp_path / "photo.png"))
    assert (message, dish) == ("", "")
    assert image.shape == (64, 64, 3)
    assert shown.shape == (512, 512, 3)


def test_the_mask_is_that_of_all_brush_layers():
    layers = [np.zeros((64, 64, 4), np.uint8) for _ in range(2)]
    layers[0][:8] = 255
    layers[1][-8:] = 255
    mask = read_brush({"layers": layers}, 64)
    assert mask[:8].all()
    assert mask[-8:].all()
    assert mask.sum() == 2 * 8 * 64


@pytest.mark.parametrize("name, guidance", [("番茄汤", 3.5), ("", 1.0)])
def test_an_inpainter_has_another_seed_than_the_dish_and_no_guidance_without_a_name(
    random_weights, monkeypatch, name, guidance
):
    received = []
    monkeypatch.setattr(
        "easy_diffusion.app_requests.make_model_inpainter",
        lambda *options: received.append(options),
    )
    Requests(load_model(random_weights), 64).make_inpainter(name, 7, 25, 3.5, None)
    (*_, received_name, steps, received_guidance, seed, _), = received
    assert (received_name, steps, received_guidance, seed) == (name, 25, guidance, 8)
