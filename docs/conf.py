"""The site, of the files as they lie: sphinx-build -W -c docs . build/site.

The root of the repository is the source, so a link in a page leads to the same file on a code host and here. Added are
the menu, formulas as MathML, pages for the files and folders that texts link to, and what docstrings leave to Markdown.
"""

import html
import inspect
import json
import os
import re
import shutil
import sys
from importlib import import_module
from operator import attrgetter
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import TextLexer, find_lexer_class_for_filename
from sphinx import addnodes

ROOT = Path(__file__).parents[1]
REPOSITORY = os.environ.get("SITE_REPOSITORY")  # owner/name on GitHub, for the links that run a lesson
sys.path.insert(0, str(ROOT))  # autodoc imports the package that lies here, not one that is installed

project, copyright = "tinyprompt", "the authors of tinyprompt. Code: Apache-2.0"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.linkcode"]
root_doc = "README"
include_patterns = ["*.md", "docs/*.md", "docs/api/*.rst", "lessons/*.md", "lessons/*.ipynb", "weights/README.md"]
highlight_language = "none"  # of a block that does not say: mostly commands and what they print
smartquotes = False  # in a docstring, a quotation mark may be Python's
default_role = "code"  # docstrings have single backticks, as in Markdown
suppress_warnings = [
    "myst.header",  # a cell of a notebook may begin at any level
    "ref.python",  # what `import tinyprompt` offers is described there, and in its module
]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # lessons/build.py has executed them
nb_merge_streams = True
nb_code_prompt_show, nb_code_prompt_hide = "Show the code", "Hide the code"

autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
add_module_names = False
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = "tinyprompt"
pygments_dark_style = "github-dark"
html_math_renderer = "mathml"
html_show_sphinx = html_copy_source = False
html_static_path = ["site.css"]
html_css_files = ["site.css"]

# The theme begins the menu at its top, where no lesson is. A reader should see where they are.
IN_VIEW = """
addEventListener("DOMContentLoaded", () => {
  const menu = document.querySelector(".sidebar-scroll"), here = menu?.querySelector(".current-page");
  const below = here?.getBoundingClientRect().top - menu?.getBoundingClientRect().top;
  if (here) menu.scrollTo({ top: below - menu.clientHeight / 2, behavior: "instant" });
});
"""

TOC = """
```{{toctree}}
:hidden:
:maxdepth: 1
:caption: {}

{}
```
"""


def order(app, docname, source):
    """Put the pages into the menu; the guides in the order of docs/README.md."""
    if docname == root_doc:
        guides = re.findall(r"^\| \[.*?\]\(([\w-]+)\.md\)", (ROOT / "docs/README.md").read_text(encoding="utf-8"), re.M)
        lessons = sorted(path.stem for path in (ROOT / "lessons").glob("*.ipynb"))
        menu = {
            "Guides": ["docs/README", *(f"docs/{name}" for name in guides)],
            "Lessons": ["lessons/README", *(f"lessons/{name}" for name in lessons), "lessons/TEACHING"],
            "Reference": ["docs/api/index", "weights/README", "CHANGELOG", "CONTRIBUTING", "SECURITY"],
        }
        source[0] += "".join(TOC.format(name, "\n".join(pages)) for name, pages in menu.items())


def folded(app, docname, source):
    """Fold the code of figures and checks in a lesson: it is not what the lesson is about."""
    if (ROOT / f"{docname}.ipynb").exists():
        notebook = json.loads(source[0])
        for cell in notebook["cells"]:
            code = "".join(cell["source"])
            if cell["cell_type"] == "code" and re.search(r"^(plt\.show\(\)|@check\()", code, re.M):
                kind = ["diagram"] if "diagram(" in code or "set_alpha(0)" in code else []
                cell["metadata"]["tags"] = [*cell["metadata"].get("tags", []), "hide-input", *kind]
        source[0] = json.dumps(notebook)


def notebook_links(app, pagename, templatename, context, doctree):
    """Begin a lesson with links to its notebook: the file, and a hosted service if the repository is known."""
    if (ROOT / f"{pagename}.ipynb").exists():
        name = Path(pagename).name
        links = f'<a href="{name}.ipynb" download>Download as notebook</a>'
        if REPOSITORY:
            hosted = f"https://mybinder.org/v2/gh/{REPOSITORY}/HEAD?labpath={pagename}.ipynb"
            links += f' · <a href="{html.escape(hosted)}">Run on Binder</a>'
        context["body"] = f'<p class="notebook">{links}</p>{context["body"]}'


def inline_math(self, node):
    """Write a formula as MathML, which browsers draw without a script."""
    self.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def display_math(self, node):
    """Write a formula on a line of its own."""
    self.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def trimmed(app, doctree):
    """Take away the empty lines at the start of a cell, which the formatter wants in the script."""
    for block in doctree.findall(nodes.literal_block):
        if block.rawsource == block.astext():
            block.rawsource = block.rawsource.strip("\n")
            block[:] = [nodes.Text(block.rawsource)]


def linked(app, doctree):
    """Lead links to files and folders, which would be downloads or dead, to pages that show them."""
    page = ROOT / app.env.docname
    for node in [*doctree.findall(addnodes.download_reference), *doctree.findall(addnodes.pending_xref)]:
        path = (page.parent / node["reftarget"]).resolve()
        if node["reftype"] == "myst" and (path.is_dir() or isinstance(node, addnodes.download_reference)):
            name = path.relative_to(ROOT).as_posix()
            app.env.shown = getattr(app.env, "shown", set()) | {name, *inside(name)}
            uri = app.builder.get_relative_uri(app.env.docname, f"files/{name}")
            node.replace_self(nodes.reference("", "", *node.children, refuri=uri, internal=True))


def inside(name):
    """The files that a folder shows; none for a file."""
    found = [path for kind in ("py", "toml", "jsonl") for path in (ROOT / name).glob(f"*.{kind}")]
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def linkcode_resolve(domain, info):
    """Where the source of a function stands: the line of the page of its file, from a page of the API."""
    found = inspect.unwrap(attrgetter(info["fullname"])(import_module(info["module"])))
    found = getattr(found, "fget", getattr(found, "func", found))  # of a property, of a cached one
    name = Path(inspect.getsourcefile(found)).relative_to(ROOT).as_posix()
    return f"../../files/{name}.html#L-{inspect.getsourcelines(found)[1]}"


def files(app):
    """Write a page for each file of the package, and for each file and folder that a text links to."""
    package = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("tinyprompt/**/*.py")}
    for name in sorted(getattr(app.env, "shown", set()) | package):
        if (ROOT / name).is_dir():
            rows = (f'<li><a href="{Path(name).name}/{Path(one).name}.html">{one}</a></li>' for one in inside(name))
            body = f"<ul>{''.join(rows)}</ul>"
        else:
            lexer, text = find_lexer_class_for_filename(name) or TextLexer, (ROOT / name).read_text(encoding="utf-8")
            body = highlight(text, lexer(stripnl=False), HtmlFormatter(lineanchors="L"))
        yield f"files/{name}", {"title": name, "body": f"<h1>{html.escape(name)}</h1>{body}"}, "page.html"


def docstring(app, what, name, obj, options, lines):
    """Read indented lines of a docstring as code, as in Markdown; begin a paragraph for a parameter, and for errors.

    The fields of a class have their words in its source, in a comment or in `help`.
    """
    for i in reversed(range(1, len(lines))):
        if lines[i].startswith("    ") and (not lines[i - 1] or lines[i - 1].endswith(":")):
            lines[i:i] = ["", "::", ""]
        elif re.match(r"[a-z_]+(, [a-z_]+)*: |Raises |Shapes: ", lines[i]):
            lines.insert(i, "")
    if what == "class" and obj.__module__.startswith(project):
        help = {f.name: f.metadata["help"] for f in getattr(obj, "__dataclass_fields__", {}).values() if f.metadata}
        help |= dict(re.findall(r"^    (\w+): [^#\n]+  # (.+)$", inspect.getsource(obj), re.M))
        lines += ["", *(f"- ``{field}``: {words}" for field, words in help.items())]


def signature(app, what, name, obj, options, arguments, returns):
    """Write a default that a dataclass makes anew as `...`, which Sphinx can read."""
    return arguments and arguments.replace("<factory>", "..."), returns


def skipped(app, what, name, obj, skip, options):
    """Leave out the fields of a named tuple, which its first line shows."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def index(app, error):
    """Make each README the page that its folder opens with, and copy the notebooks."""
    for page in [] if error else Path(app.outdir).rglob("README.html"):
        page.with_name("index.html").write_bytes(page.read_bytes())
    for notebook in [] if error else ROOT.glob("lessons/*.ipynb"):
        shutil.copy(notebook, Path(app.outdir) / "lessons")


def setup(app):
    """Connect these functions to Sphinx's events."""
    app.add_js_file(None, body=IN_VIEW)
    app.add_html_math_renderer("mathml", (inline_math, None), (display_math, None))
    app.connect("source-read", order)
    app.connect("source-read", folded)
    app.connect("html-page-context", notebook_links)
    app.connect("doctree-read", trimmed)
    app.connect("doctree-read", linked, priority=400)  # before downloads are collected
    app.connect("html-collect-pages", files)
    app.connect("autodoc-process-docstring", docstring)
    app.connect("autodoc-process-signature", signature)
    app.connect("autodoc-skip-member", skipped)
    app.connect("build-finished", index)
