"""A hook of mkdocs: pages may link to any file of the repository, as on a code host.

The site has the linked files outside of docs/ in its folder repository/. Markdown becomes a page,
whose own links are followed in the same way; other files are copied. Links are rewritten to these
places. A link to a file that does not exist stays as it is, and fails the strict build.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
OUTSIDE = "repository/"
MADE = {"first_steps.md": "examples/first_steps.py"}
"""Pages that docs/site_notebook.py makes, and their files."""
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)#\s]+)")
"""The path in [text](path#anchor)."""


def source(uri: str) -> str:
    """The file of the repository that the site has at `uri`."""
    if uri in MADE:
        return MADE[uri]
    return uri.removeprefix(OUTSIDE) if uri.startswith(OUTSIDE) else f"docs/{uri}"


def place(file: str) -> str:
    """The inverse of `source`."""
    for page, made_of in MADE.items():
        if file == made_of:
            return page
    return file.removeprefix("docs/") if file.startswith("docs/") else OUTSIDE + file


def target(uri: str, path: str) -> str:
    """The file of the repository that a link on the page at `uri` means."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source(uri)), path))


def on_files(files: Any, config: Any) -> Any:
    """Adds the linked files outside of docs/, and those that they link to."""
    waiting = [file.src_uri for file in files.documentation_pages()]
    while waiting:
        uri = waiting.pop()
        for path in LINK.findall((ROOT / source(uri)).read_text()):
            found = target(uri, path)
            new = place(found)
            if (ROOT / found).is_file() and files.get_file_from_path(new) is None:
                files.append(File.generated(config, new, abs_src_path=str(ROOT / found)))
                waiting += [new] if new.endswith(".md") else []
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """The page with its links as the site has them."""
    uri = page.file.src_uri

    def moved(link: re.Match[str]) -> str:
        return posixpath.relpath(place(target(uri, link[1])), posixpath.dirname(uri) or ".")

    return LINK.sub(moved, markdown)
