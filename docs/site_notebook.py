"""A hook of mkdocs: the site shows an example as a notebook that was run while the site was built.

The example is a script in jupytext's percent format. Its cells run in a kernel, and the page has
their texts, code, outputs and pictures. An error in a cell ends the build. The title of a cell
describes its picture for readers who do not see it. The executed notebook can be downloaded.
"""

import base64
import re
from typing import Any

import jupytext
import nbformat
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from site_links import MADE, ROOT, place

FOLDER = "first_steps"
"""The pictures and the notebook, beside the script."""
REMOTE = re.compile(
    r"<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=.?(?:https?:)?//[^>]*>"
)
SECONDS = 300


def executed(script: str) -> Any:
    """The script as a notebook with the outputs of its cells."""
    notebook = jupytext.read(ROOT / script)
    quiet = ["--IPKernelApp.log_level=ERROR"]  # a warning that it listens on the local host
    client = NotebookClient(
        notebook,
        timeout=SECONDS,
        kernel_name="python3",
        extra_arguments=quiet,
        coalesce_streams=True,
    )
    try:
        client.execute(cwd=str(ROOT))
    except CellExecutionError as error:
        raise PluginError(f"a cell of {script} failed:\n{error}") from None
    return notebook


def rendered(notebook: Any) -> tuple[str, dict[str, bytes]]:
    """The page as Markdown, and its pictures by name."""
    parts, pictures = [], {}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for output in cell.outputs:
            if output.output_type == "stream":
                parts.append(f"```text\n{output.text.rstrip()}\n```")
            elif "image/png" in output.get("data", {}):
                name = f"{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode(output.data["image/png"])
                parts.append(f"![{cell.metadata.get('title', '')}]({FOLDER}/{name})")
    return "\n\n".join(parts) + "\n", pictures


def on_files(files: Any, config: Any) -> Any:
    """Adds the page, its pictures and the notebook."""
    [(page, script)] = MADE.items()
    notebook = executed(script)
    text, pictures = rendered(notebook)
    text += f"\n[This page as a notebook]({FOLDER}/notebook.ipynb), with its outputs.\n"
    files.append(File.generated(config, page, content=text))
    for name, content in {**pictures, "notebook.ipynb": nbformat.writes(notebook)}.items():
        uri = place(f"examples/{FOLDER}/{name}")
        files.append(File.generated(config, uri, content=content))
    return files


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Refuses a page that would fetch something from another host when it is opened."""
    if found := REMOTE.search(output):
        raise PluginError(f"{page.file.src_uri} fetches from another host: {found[0]}")
    return output
