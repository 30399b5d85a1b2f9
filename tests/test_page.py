"""The page that `serve` shows, in headless Chromium: keyboard, phone, light and dark mode."""

import shutil

import files
import pytest
from browsing import chromium, set_view, wait_until
from serving import random_prompt, running_server, small_model, three_prompts

from tinyprompt.files.prompts import Prompts, save_prompt
from tinyprompt.predict import answer

pytest.importorskip("uvicorn", reason="needs the extra serve: pip install '.[serve,test]'")


@pytest.fixture(scope="module")
def browser():
    with chromium() as driver:
        yield driver


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return three_prompts(model, tmp_path_factory.mktemp("prompts"))


@pytest.fixture(scope="module")
def site(folder, model, tmp_path_factory):
    """Start a server with a broken prompt, and one with long label words that contain HTML; yield its address."""
    made = tmp_path_factory.mktemp("site")
    at = shutil.copytree(folder, made / "p")
    save_prompt(random_prompt(model, ("<b onclick=x>", "w" * 90, "good")), at / "<img src=x>.safetensors")
    (at / "<i>.npy").write_bytes(b"no prompt")
    small = files.write(made / "t5", files.SMALL, files.weights())
    with running_server(small, at, {"batch-wait": 0, "reload-every": 0.1}) as (_, port):
        yield f"http://127.0.0.1:{port}"


def open_page(browser, site, width=1100, dark=False):
    """Open the page at a width, and wait until it has the tasks."""
    set_view(browser, width, dark)
    browser.get(site)
    wait_until(lambda: browser.find_elements("css selector", "#task option"))
    return browser


def press(browser, *keys):
    from selenium.webdriver.common.action_chains import ActionChains

    chain = ActionChains(browser)
    for key in keys:
        chain = chain.send_keys(key)
    chain.perform()


def cards(browser):
    """Return the text of each card: the task, and the words with their shares from top to bottom."""
    read = "return [...document.querySelectorAll('article')].map(a => [a.querySelector('h2').textContent, "
    read += "[...a.querySelectorAll('li')].map(li => [...li.querySelectorAll('span')].map(s => s.textContent)), "
    read += "[...a.querySelectorAll('b')].map(b => b.getBoundingClientRect().width)])"
    return browser.execute_script(read)


def test_two_prompts_can_be_compared_by_keyboard(browser, site, model, folder):
    from selenium.webdriver.common.keys import Keys

    open_page(browser, site)
    press(browser, Keys.TAB, Keys.TAB)  # past the link, to the task
    assert browser.switch_to.active_element.get_attribute("id") == "task"
    press(browser, "topic", Keys.TAB, "sentiment", Keys.TAB, "The soup was cold.", Keys.TAB, Keys.ENTER)
    found = wait_until(lambda: len(cards(browser)) == 2 and cards(browser))
    tasks = Prompts(folder, model)
    for (name, bars, widths), task in zip(found, ("topic", "sentiment"), strict=True):
        wanted = answer(model, [(tasks[task], "The soup was cold.")], "numpy")[0]
        ranked = sorted(wanted.probabilities.items(), key=lambda pair: -pair[1])
        assert (name, bars) == (task, [[word, f"{100 * share:.1f}%"] for word, share in ranked])
        assert widths == sorted(widths, reverse=True)
        assert widths[0] / widths[1] == pytest.approx(ranked[0][1] / ranked[1][1], rel=0.05)
    places = browser.execute_script("return [...document.querySelectorAll('article')].map(a => a.offsetTop)")
    assert places[0] == places[1]
    status = browser.find_element("css selector", "[role=status]")
    assert status.text.startswith(f"topic: {found[0][1][0][0]}; sentiment: {found[1][1][0][0]}, in ")


def test_ctrl_enter_answers_and_free_text_is_a_quote(browser, site):
    from selenium.webdriver.common.keys import Keys

    open_page(browser, site).find_element("id", "text").send_keys("soup", Keys.CONTROL, Keys.ENTER)
    wait_until(lambda: len(cards(browser)) == 1)
    browser.find_element("id", "task").send_keys("free")
    browser.find_element("id", "text").send_keys(Keys.CONTROL, Keys.ENTER)
    wait_until(lambda: cards(browser)[0][0] == "free")
    assert not browser.find_elements("css selector", "li")


def test_the_text_box_describes_the_answers_of_the_task(browser, site):
    from selenium.webdriver.support.ui import Select

    text = open_page(browser, site).find_element("id", "text")
    for task, wanted in (("topic", "food, sport"), ("free", "A text to answer"), ("sentiment", "good")):
        Select(browser.find_element("id", "task")).select_by_visible_text(task)
        wait_until(lambda wanted=wanted: wanted in text.get_attribute("placeholder"))


def test_names_are_not_parsed_as_html_and_a_phone_needs_no_sideways_scrolling(browser, site):
    from selenium.webdriver.common.keys import Keys

    open_page(browser, site, width=320)
    browser.find_element("id", "task").send_keys("<img")
    browser.find_element("id", "text").send_keys("x" * 300, Keys.CONTROL, Keys.ENTER)
    (name, bars, _), *_ = wait_until(lambda: cards(browser))
    assert name == "<img src=x>"
    assert {word for word, _ in bars} == {"<b onclick=x>", "w" * 90, "good"}
    assert not browser.find_elements("css selector", "article img, article b[onclick]")
    assert browser.execute_script("return document.documentElement.scrollWidth") == 320
    sizes = "return [...document.querySelectorAll('select, textarea')].map(x => getComputedStyle(x).fontSize)"
    assert set(browser.execute_script(sizes)) == {"16px"}  # phones zoom in on smaller text


def test_an_error_is_announced_and_shown_in_red(browser, site):
    from selenium.webdriver.common.keys import Keys

    text = open_page(browser, site).find_element("id", "text")
    browser.execute_script("arguments[0].value = 'x'.repeat(10001)", text)
    text.send_keys(Keys.CONTROL, Keys.ENTER)
    status = browser.find_element("css selector", "[role=status]")
    wait_until(lambda: "has 10,001 characters; at most 10,000" in status.text)
    assert status.get_attribute("class") == "wrong"
    assert browser.find_element("css selector", "button").is_enabled()


def test_an_unexpected_reply_is_shown_as_text(browser, site):
    """A proxy may reply instead of the server, and a file of the folder may not be a prompt."""
    from selenium.webdriver.common.keys import Keys

    text = open_page(browser, site).find_element("id", "text")
    browser.execute_script("window.fetch = async () => new Response('<b>Bad gateway</b>', { status: 502 })")
    text.send_keys("soup", Keys.CONTROL, Keys.ENTER)
    status = browser.find_element("css selector", "[role=status]")
    wait_until(lambda: status.text == "The server answered 502 without JSON: <b>Bad gateway</b>")
    assert status.get_attribute("class") == "wrong"
    assert "<i>.npy" in browser.find_element("id", "problems").text


CONTRAST = """
const parts = text => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
const light = text => parts(text).map(x => (x /= 255) <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4)
  .reduce((sum, x, i) => sum + x * [.2126, .7152, .0722][i], 0);
const ground = node => { const c = getComputedStyle(node).backgroundColor;
  return c === 'rgba(0, 0, 0, 0)' ? ground(node.parentElement) : c };
return [...document.querySelectorAll('h1, h2, p, label, select, textarea, button, a, li span, li b, [role=status]')]
  .filter(x => x.textContent.trim() || x.matches('li b')).map(x => {
    const style = getComputedStyle(x), bar = x.matches('li b');
    const [a, b] = [light(bar ? style.backgroundColor : style.color), light(bar ? ground(x.parentElement) : ground(x))];
    return [x.tagName, (Math.max(a, b) + .05) / (Math.min(a, b) + .05)] });
"""


@pytest.mark.parametrize("dark", [False, True])
def test_contrast_is_sufficient_in_light_and_dark_mode(browser, site, dark):
    from selenium.webdriver.common.keys import Keys

    open_page(browser, site, dark=dark).find_element("id", "text").send_keys("soup", Keys.CONTROL, Keys.ENTER)
    wait_until(lambda: cards(browser))
    grounds = (
        browser.execute_script("return getComputedStyle(document.body).backgroundColor").strip("rgba()").split(",")
    )
    assert (int(grounds[0]) < 128) is dark
    found = browser.execute_script(CONTRAST)
    assert len(found) > 10
    assert not [pair for pair in found if pair[1] < (1.5 if pair[0] == "B" else 4.5)]  # WCAG 2.2, 1.4.3


def test_the_api_page_shows_every_path(browser, site):
    browser.get_log("browser")  # discard the log of earlier pages
    browser.get(f"{site}/docs")
    wait_until(lambda: len(browser.find_elements("css selector", "section")) == 4)
    assert "curl" in browser.find_element("css selector", "section").text
    assert browser.get_log("browser") == []
