"""The site: it builds without warnings, all links work, and it loads nothing external."""

import os
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pytest
from browsing import chromium, serve_folder, set_view, wait_until

import tinyprompt

for package in ("sphinx", "furo", "myst_nb"):
    pytest.importorskip(package, reason="needs the site's tools: pip install '.[docs]'")
ROOT = Path(__file__).parents[1]


def build(source, out):
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-c", str(source / "docs"), source, out]
    env = os.environ | {"SITE_REPOSITORY": "owner/name"}
    return subprocess.run(command, capture_output=True, text=True, cwd=source, env=env)


class Page(HTMLParser):
    """The links, loaded files and anchors of a page."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loads, self.anchors = [], [], {""}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name == "id":
                self.anchors.add(value)
            elif name in ("href", "src", "data", "action"):
                self.links.append(value)
                if tag not in ("a", "form"):
                    self.loads.append(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    done = build(ROOT, out)
    assert done.returncode == 0, done.stderr
    return out


def test_every_link_works(site):
    page_of, dead, count = cache(Page), [], 0
    for path in site.rglob("*.html"):
        for link in page_of(path).links:
            parts = urlsplit(link)
            if not parts.scheme:
                count += 1
                target = path.parent / unquote(parts.path) if parts.path else path
                target = target.resolve()
                known = target.is_file() and (
                    target.suffix != ".html" or unquote(parts.fragment) in page_of(target).anchors
                )
                dead += [] if known else [f"{path.relative_to(site)}: {link}"]
    assert not dead
    assert count > 5000


def test_nothing_external_is_loaded(site):
    pages = [Page(path) for path in site.rglob("*.html")]
    assert [link for page in pages for link in page.loads if urlsplit(link).scheme not in ("", "data")] == []
    styles = [path for path in site.rglob("*.css") if "url(http" in path.read_text(encoding="utf-8").replace('"', "")]
    assert styles == []


def test_all_pages_and_public_names_are_present(site):
    pages = [*ROOT.glob("docs/*.md"), *ROOT.glob("lessons/*.ipynb"), ROOT / "README.md", *ROOT.glob("lessons/*.md")]
    index = Page(site / "index.html")
    for page in pages:
        name = page.relative_to(ROOT).with_suffix(".html").as_posix()
        assert (site / name).exists()
        assert name in index.links or name == "README.html"
    reference = sorted((site / "docs" / "api").glob("*.html"))
    described = {anchor.rpartition(".")[2] for page in reference for anchor in Page(page).anchors}
    modules = {name for name in tinyprompt.__all__ if isinstance(getattr(tinyprompt, name), ModuleType)}
    assert set(tinyprompt.__all__) - modules - {"PROMPT"} <= described
    text = "".join(page.read_text(encoding="utf-8") for page in reference)
    assert "longest input, in tokens" in text  # the help text of a setting
    assert "rows of a group are scored" in text  # the comment of a field


@pytest.mark.parametrize("path", sorted((ROOT / "lessons").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_lesson_folds_its_figures_and_checks_and_links_to_its_notebook(path, site):
    page = site / "lessons" / f"{path.stem}.html"
    links, text = Page(page).links, page.read_text(encoding="utf-8")
    assert path.name in links
    assert (page.with_suffix(".ipynb")).read_bytes() == path.read_bytes()
    assert f"https://mybinder.org/v2/gh/owner/name/HEAD?labpath=lessons/{path.name}" in links
    folds = [part.split("</details>")[0] for part in text.split("<details")[1:]]
    shown = "".join(part.split("</details>")[-1] for part in text.split("<details"))
    assert sum("check" in fold for fold in folds) >= 3
    assert ">@check" not in shown
    assert 'plt</span><span class="o">.</span><span class="n">show' not in shown
    assert 'class="next-page"' in text or path.stem.startswith("11")
    assert 'class="prev-page"' in text


def test_the_menu_shows_the_lesson_and_the_search_works_offline(site):
    with serve_folder(site) as address, chromium("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1") as browser:
        for width in (390, 1200):
            set_view(browser, width)
            browser.get(f"{address}lessons/09_one_model_many_tasks.html")
            menu = "const menu = document.querySelector('.sidebar-scroll').getBoundingClientRect();"
            here = "const here = document.querySelector('.sidebar-tree .current-page').getBoundingClientRect();"
            assert browser.execute_script(menu + here + "return menu.top <= here.top && here.bottom <= menu.bottom")
            assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        browser.get(f"{address}search.html?q=adafactor")
        found = "return document.querySelectorAll('#search-results ul.search li').length"
        wait_until(lambda: browser.execute_script(found) > 3, 30)  # results appear gradually


def test_formulas_are_rendered(site):
    lesson = (site / "lessons" / "01_a_gradient_you_can_check.html").read_text(encoding="utf-8")
    assert lesson.count("<math ") > 20
    assert "$" not in lesson.split("<article")[1].split("How small a step")[0]


def test_a_dead_link_is_named(tmp_path):
    (tmp_path / "docs" / "api").mkdir(parents=True)
    for name in ("conf.py", "site.css"):
        (tmp_path / "docs" / name).write_text((ROOT / "docs" / name).read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "README.md").write_text(
        "# A\n\n## B\n\n[a](docs/none.md) [b](#none) [c](docs/README.md#none) [d](none/)\n"
    )
    (tmp_path / "docs" / "README.md").write_text("# B\n\n[good](../README.md#b) [a file](site.css)\n")
    done = build(tmp_path, tmp_path / "out")
    assert done.returncode == 1
    for target in ("'docs/none.md'", "not found: 'none'", "not found in doc 'docs/README': 'none'", "'none/'"):
        assert target in done.stderr
    assert "/docs/README.md:3" not in done.stderr
