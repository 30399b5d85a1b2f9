"""Headless Chromium, and a static file server like `python -m http.server`."""

import contextlib
import functools
import http.server
import shutil
import threading
import time

import pytest

CHROMIUM = shutil.which("chromium"), shutil.which("chromedriver")
WORDS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")


@contextlib.contextmanager
def chromium(*words, downloads=None):
    """Start a browser that saves downloads in a folder. Skip the test if Chromium is not installed."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install '.[test]'")
    if None in CHROMIUM:
        pytest.skip("needs chromium and chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM[0]
    for word in (*WORDS, *words):
        options.add_argument(word)
    if downloads:
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(CHROMIUM[1]))
    driver.execute_cdp_cmd("Network.setCacheDisabled", {"cacheDisabled": True})  # files change within a second
    try:
        yield driver
    finally:
        driver.quit()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serve the files of a folder without logging requests."""

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serve_folder(folder):
    """Serve a folder; yield its address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(QuietHandler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


def set_view(browser, width=1100, dark=False, height=800):
    """Show pages at a given width, in light or dark mode."""
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def wait_until(found, seconds=5):
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return value
