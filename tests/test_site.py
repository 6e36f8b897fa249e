"""The notebook of the site: its page, its pictures, and what no page may fetch."""

import base64
import importlib
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture
def site_notebook(monkeypatch):
    for package in ("mkdocs", "jupytext", "nbclient"):
        pytest.importorskip(package, reason="needs the docs extra")
    monkeypatch.syspath_prepend(str(DOCS))
    return importlib.import_module("site_notebook")


def test_a_page_has_texts_code_outputs_and_pictures(site_notebook):
    import nbformat.v4 as v4

    shown = v4.new_output("display_data", {"image/png": base64.b64encode(b"png").decode()})
    printed = v4.new_output("stream", text="7\n")
    code = v4.new_code_cell("draw()", outputs=[printed, shown], metadata={"title": "a line"})
    notebook = v4.new_notebook(cells=[v4.new_markdown_cell("# Title"), code])
    text, pictures = site_notebook.rendered(notebook)
    blocks = [
        "# Title",
        "```python\ndraw()\n```",
        "```text\n7\n```",
        "![a line](first_steps/1.png)",
    ]
    assert text == "\n\n".join(blocks) + "\n"
    assert pictures == {"1.png": b"png"}


def test_the_cells_with_pictures_say_what_they_show(site_notebook):
    notebook = site_notebook.jupytext.read(DOCS.parent / "examples" / "first_steps.py")
    drawn = [cell for cell in notebook.cells if "plt.show()" in cell.source]
    assert len(drawn) == 2 and all(cell.metadata["title"] for cell in drawn)


@pytest.mark.parametrize(
    "tag, remote",
    [
        ('<script src="https://cdn.example/mathjax.js">', True),
        ("<script async src='//cdn.example/require.js'>", True),
        ('<link rel="stylesheet" href="https://cdn.example/a.css">', True),
        ('<script src="../assets/bundle.js">', False),
        ('<a href="https://arxiv.org/abs/2410.19258">', False),
    ],
)
def test_no_page_fetches_from_another_host(site_notebook, tag, remote):
    assert bool(site_notebook.REMOTE.search(tag)) == remote
