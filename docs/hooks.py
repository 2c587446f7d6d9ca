"""What `mkdocs` needs beside mkdocs.yml: the Markdown files stay as they are read on GitHub.

Pages       CHANGELOG.md, CONTRIBUTING.md and linked files of results/ become pages or files of the site; a page of the
            API lists the public names of a package
Links       one to a file outside docs/ leads to its place in the site; one to a source becomes its name
Formulas    MathML, which browsers draw themselves
Search      works from the disk, too, without a script from elsewhere
Docstrings  rows of `name   text` become a list, code becomes a code block: `as_markdown`
"""

import ast
import html
import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from textwrap import dedent

import griffe
from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
OUTSIDE = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
PACKAGES = ("routeseg", "training", "evaluation", "engine", "export", "figures", "data.scenes")
MORE = {"training": ("data.config.DataConfig",)}  # shown there, too
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
ABOUT_FILES = re.compile(r"The public names|\w+\.py ")  # paragraphs of a package's docstring
ROW = re.compile(r"(\S.*?) {2,}(\S.*)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">(?:\\\((.*?)\\\)|\\\[(.*?)\\\])</\1>', re.DOTALL)
SPECIAL = re.compile(r"(`[^`]*`)|([*_<\[\]])")

# Browsers refuse workers to pages from the disk: the search runs in a hidden frame there. The theme would fetch a
# script for that from elsewhere.
SHIM = '<script src="https://unpkg.com/iframe-worker/shim"></script>'
HEAD = """<style>
.md-grid { max-width: 76rem }
.md-typeset table:not([class]) { font-size: .62rem }
.md-typeset table:not([class]) :is(th, td) { min-width: 0; padding: .5em .8em }
.md-typeset th code { white-space: nowrap }
.md-typeset td code { word-break: normal }
</style>
<script>
if (location.protocol === "file:") window.Worker = class extends EventTarget {
  constructor(url) {
    super()
    const frame = document.body.appendChild(document.createElement("iframe"))
    frame.hidden = true
    this.inside = frame.contentWindow
    this.inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", {data}))
    const script = this.inside.document.createElement("script")
    this.loaded = new Promise(done => script.onload = done)
    script.src = url
    this.inside.document.body.appendChild(script)
  }
  postMessage(data) {
    this.loaded.then(() => this.inside.dispatchEvent(new MessageEvent("message", {data})))
  }
}
</script>"""


def on_files(files, config):
    """Adds the pages and files from outside docs/."""
    for name, place in OUTSIDE.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / name)))
    linked = set()
    for page in (ROOT / "docs").glob("*.md"):
        for _, _, target, _ in LINK.findall(page.read_text(encoding="utf-8")):
            linked.add(normpath(f"docs/{target}"))
    for name in sorted(linked):
        if name.startswith("results/") and (ROOT / name).is_file():
            files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    for package in PACKAGES:
        files.append(File.generated(config, f"api/{package}.md", content=api_page(package)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turns the links of a file of the repository into those of the site."""
    if not (page.file.abs_src_path and Path(page.file.abs_src_path).is_relative_to(ROOT)):
        return markdown
    home = Path(page.file.abs_src_path).relative_to(ROOT).parent.as_posix()
    here = PurePosixPath(page.file.src_uri).parent.as_posix()

    def link(match):
        picture, text, target, anchor = match.groups()
        name = normpath(f"{home}/{target}")
        if "://" in target or not (ROOT / name).exists():
            return match[0]
        place = OUTSIDE.get(name, name.removeprefix("docs/"))
        if files.get_file_from_path(place):
            return f"{picture}[{text}]({relpath(place, here)}{anchor or ''})"
        return text if text.startswith("`") else f"{text} (`{name}`)"

    return LINK.sub(link, markdown)


def on_page_content(text, page, config, files):
    """Formulas as MathML."""

    def formula(match):
        tex = html.unescape(match[2] or match[3]).replace(r"\big", "")  # brackets grow by themselves
        return convert(tex, display="block" if match[3] else "inline")

    return FORMULA.sub(formula, text)


def on_post_page(output, page, config):
    return output.replace(SHIM, HEAD)


def on_post_template(output_content, template_name, config):
    return output_content.replace(SHIM, HEAD)


def api_page(package):
    """The page of a package: its own docstring, and what its stub or `__all__` names."""
    name = "routeseg" if package == "routeseg" else f"routeseg.{package}"
    folder = ROOT / "src" / name.replace(".", "/")
    stub = folder / "__init__.pyi"
    if stub.exists():
        imports = [node for node in ast.parse(stub.read_text()).body if isinstance(node, ast.ImportFrom)]
        names = [alias.name for node in imports for alias in node.names]
    else:
        (line,) = re.findall(r"^__all__ = (\[.*?\])", (folder / "__init__.py").read_text(), re.MULTILINE | re.DOTALL)
        names = ast.literal_eval(line)
    names = sorted((one for one in names if not one.startswith("__")), key=str.lower)
    paragraphs = (ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or "").split("\n\n")
    text = as_markdown("\n\n".join(one for one in paragraphs if not ABOUT_FILES.match(one)))
    more = [f"routeseg.{one}" for one in MORE.get(package, ())]
    parts = "\n\n".join(f"::: {one}" for one in [*(f"{name}.{one}" for one in names), *more])
    return f"# {name}\n\n{text}\n\n{parts}\n"


def as_markdown(docstring):
    """A docstring of this project as Markdown: rows of `name   text` as a list, code as a code block, words as such."""
    blocks = []
    for paragraph in re.split(r"\n\s*\n", docstring):
        run = []  # lines of one kind: words, rows, or what is indented below words
        if is_code(paragraph):
            blocks.append(f"```python\n{dedent(paragraph).strip()}\n```")
            continue
        for line in paragraph.splitlines():
            indented = line.startswith(" ")
            kind = "row" if ROW.match(line) else "text" if not indented else None
            if kind is None:
                kind = run[-1][0] if run and run[-1][0] != "text" else "block"
            if not run or run[-1][0] != kind:
                run.append((kind, []))
            run[-1][1].append(line)
        for kind, lines in run:
            blocks.append({"row": rows, "text": words, "block": block}[kind](lines))
    return "\n\n".join(blocks)


def is_code(paragraph):
    try:
        tree = ast.parse(dedent(paragraph))
    except SyntaxError:
        return False
    return any(isinstance(node, ast.Call | ast.Import | ast.Assign) for node in ast.walk(tree))


def words(lines):
    """Words outside of backticks mean nothing to Markdown."""
    return SPECIAL.sub(lambda match: match[1] or "\\" + match[2], "\n".join(line.strip() for line in lines))


def rows(lines):
    """`name   text`, and further lines of the text, as a list."""
    items = []
    for line in lines:
        if match := ROW.fullmatch(line):
            names = match[1] if "`" in match[1] else f"`{match[1]}`"
            items.append(f"- {names}: {words([match[2]])}")
        else:
            items.append(f"  {words([line])}")
    return "\n".join(items)


def block(lines):
    """Indented lines below words: rows, or as they stand."""
    text = dedent("\n".join(lines)).splitlines()
    if ROW.fullmatch(text[0]):
        return rows(text)
    return "```text\n" + "\n".join(text) + "\n```"


class Docstrings(griffe.Extension):
    """Docstrings as Markdown; below one with shapes, what their letters mean."""

    def on_object(self, *, obj, **_):
        if obj.is_alias or obj.docstring is None:
            return
        text, legend = obj.docstring.value, None
        if not obj.is_module and "[" in text and obj.module.docstring:
            legend = re.search(r"^Legend: (.*?)(?=\n\s*\n|\n    |\Z)", obj.module.docstring.value, re.M | re.S)
        parts = [as_markdown(text)]
        for base in obj.bases if obj.is_class else ():  # of the same file: what its rows say of inherited fields
            parent = obj.module.members.get(str(base))
            if parent is not None and not parent.is_alias and parent.docstring and "\n- `" in parent.docstring.value:
                parts.append(parent.docstring.value)
        if legend:
            parts.append(f"*{words(legend[1].splitlines())}*")
        obj.docstring.value = "\n\n".join(parts)
