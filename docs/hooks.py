"""What this site adds to MkDocs: formulas in MathML, notebooks as pages, and no other host."""

import base64
import functools
import html
import itertools
import json
import re
from pathlib import Path, PurePosixPath

from math_core import LatexToMathML
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
# The picture that tells most of a notebook, where it is not the first one.
PICTURE = {"06_parts_with_their_own_memory": 2, "09_other_cells": 4, "10_pace": 3}


# ---------------------------------------------------------------------- the pages


def on_config(config):
    """The notebooks stand in the contents after the page that tells of them."""
    (section,) = (part["Notebooks"] for part in config.nav if "Notebooks" in part)
    section += [{short_title(path): f"notebooks/{path.stem}.md"} for path in notebooks()]


def on_files(files, config):
    """Each notebook becomes a page, with its pictures as files."""
    for path in notebooks():
        page = File.generated(config, f"notebooks/{path.stem}.md", content=as_page(path, config))
        page.edit_uri = f"../notebooks/{path.stem}.py"
        files.append(page)
        for number, picture in enumerate(pictures(path), 1):
            name = f"notebooks/{path.stem}/{number}.png"
            files.append(File.generated(config, name, content=picture))


def on_page_markdown(markdown, page, config, files):
    """On the page of the notebooks their table becomes a gallery."""
    if page.file.src_uri == "notebooks.md":
        return with_gallery(markdown)
    return markdown


def on_page_content(content, page, config, files):
    """Formulas become MathML, which browsers show by themselves."""
    return re.sub(
        r'<(span|div) class="arithmatex">(.*?)</\1>',
        functools.partial(formula, page),
        content,
        flags=re.DOTALL,
    )


def on_post_page(output, page, config):
    """The link to the repository stays; the theme no longer asks its host for a count of stars."""
    return output.replace(' data-md-component="source"', "")


def on_post_template(output_content, template_name, config):
    """The same for the page that a reader of a wrong address gets."""
    return on_post_page(output_content, template_name, config)


def formula(page, found):
    """A formula as arithmatex leaves it, in MathML."""
    tag, text = found.groups()
    latex = html.unescape(text).strip()[2:-2]
    try:
        maths = LatexToMathML().convert_with_local_state(latex, displaystyle=tag == "div")
    except Exception as error:
        raise PluginError(f"{page.file.src_uri}: no formula: {latex}: {error}") from error
    return f'<{tag} class="arithmatex">{maths}</{tag}>'


# ------------------------------------------------------------------ the notebooks


def notebooks():
    return sorted(NOTEBOOKS.glob("*.ipynb"))


def cells(path):
    return json.loads(path.read_text("utf-8"))["cells"]


def source(cell):
    return "".join(cell["source"])


def title(path):
    """The heading of a notebook."""
    texts = (source(cell) for cell in cells(path) if cell["cell_type"] == "markdown")
    return re.search(r"^# (.*)", "\n\n".join(texts), re.MULTILINE)[1]


def short_title(path):
    return title(path).split(":")[0]


def pictures(path):
    """The pictures of a notebook, as PNG files."""
    outputs = [output for cell in cells(path) for output in cell.get("outputs", [])]
    shown = [output["data"]["image/png"] for output in outputs if is_picture(output)]
    return [base64.b64decode("".join(picture)) for picture in shown]


def is_picture(output):
    return "image/png" in output.get("data", {})


def as_page(path, config):
    """A notebook in Markdown."""
    where = f"{config.repo_url}/blob/main/notebooks/{path.name}"
    colab = where.replace("https://github.com", "https://colab.research.google.com/github")
    links = f"[Open in Colab]({colab}) · [The notebook]({where})\n{{ .notebook-links }}"
    numbers = itertools.count(1)
    text = "\n\n".join(as_markdown(cell, path, numbers, config) for cell in cells(path))
    heading = f"# {title(path)}\n"
    text = text.replace(heading, f"{heading}\n{links}\n", 1)
    return f"---\nhide: [toc]\nsearch:\n  boost: 0.5\n---\n\n{text}\n"


def as_markdown(cell, path, numbers, config):
    """A cell with what it printed and drew."""
    if cell["cell_type"] == "markdown":
        return re.sub(
            r"\]\((?!\w+:|#)(.*?)\)", functools.partial(link, config), without_badge(cell)
        )
    code = fenced(source(cell), "python")
    if "%pip" in code:
        head = "<details markdown data-search-exclude><summary>Installs what is needed</summary>"
        code = f"{head}\n\n{code}\n\n</details>"
    outputs = (shown(output, path, numbers) for output in cell["outputs"])
    return "\n\n".join([code, *outputs])


def without_badge(cell):
    """The text of a cell without a badge, which is a picture on another host."""
    badge = r"\[!\[.*?\]\(https:.*?\)\]\(https:.*?\)|<a [^>]*><img [^>]*></a>"
    return re.sub(rf"^(?:{badge})$\n*", "", source(cell), flags=re.MULTILINE)


def link(config, found):
    """A link of a notebook to another file, as a link to that page or to the repository."""
    file, hash_, anchor = found[1].partition("#")
    if file.endswith(".ipynb"):
        file = f"{PurePosixPath(file).stem}.md"
    elif file.startswith("../docs/"):
        file = "../" + file.removeprefix("../docs/")
    else:
        inside = file.removeprefix("../") if file.startswith("../") else f"notebooks/{file}"
        file = f"{config.repo_url}/blob/main/{inside}"
    return f"]({file}{hash_}{anchor})"


def shown(output, path, numbers):
    """What a cell printed or drew."""
    if is_picture(output):
        number = next(numbers)
        return f"![Picture {number} of {short_title(path)!r}]({path.stem}/{number}.png)"
    text = "".join(output.get("text") or output["data"]["text/plain"])
    text = "\n".join(line.rpartition("\r")[2] for line in text.rstrip().split("\n"))
    return fenced(text, "{ .text .output }")


def fenced(text, language):
    longest = max(map(len, re.findall(r"^`+", text, re.MULTILINE)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


# -------------------------------------------------------------------- the gallery

ROW = re.compile(r"^\| \[.*?\]\(\.\./notebooks/(\w+)\.ipynb\) \| (.*?) \| (.*?) \|\n", re.MULTILINE)


def with_gallery(markdown):
    """The rows of the table as cards: a picture, the title, the story, what it is compared with."""
    rows = {found[1]: found for found in ROW.finditer(markdown)}
    if list(rows) != [path.stem for path in notebooks()]:
        raise PluginError("notebooks.md: the table does not list the notebooks there are, in order")
    cards = [card(path, *rows[path.stem].groups()[1:]) for path in notebooks()]
    gallery = '<div class="gallery" markdown>\n\n' + "\n\n".join(cards) + "\n\n</div>\n"
    first = ROW.search(markdown).start()
    above = markdown[:first].rstrip("\n").rsplit("\n", 2)[0]  # without the table's head
    below = ROW.sub("", markdown[first:])
    return f"{above}\n\n{gallery}{below}"


def card(path, story, against):
    number = PICTURE.get(path.stem, 1)
    number = number if number <= len(pictures(path)) else 1
    page = f"notebooks/{path.stem}.md"
    return "\n\n".join(
        [
            '<div class="card" markdown>',
            f"[![](notebooks/{path.stem}/{number}.png)]({page})",
            f"[{title(path)}]({page})\n{{ .card-title }}",
            story,
            f"Compared with: {against}.\n{{ .card-compared }}",
            "</div>",
        ]
    )
