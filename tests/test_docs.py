"""The documents are true of the code: their links and lines, the tree, the table, the commands and the snippets.

When code has moved, `python tests/test_docs.py` points the links at where the lines are now.
"""

import ast
import re
import shlex
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file

from abyssal import ModelConfig, Transformer
from abyssal.cli import app
from abyssal.costs import inspect
from abyssal.data import Tokenizer
from abyssal.train import TrainConfig, run_names

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/tour.md", "docs/kernels.md", "docs/serving.md",
    "docs/training.md", "docs/runs.md", "docs/benchmarks.md", "docs/evaluation.md", "docs/study/README.md",
]  # fmt: skip
LINK = re.compile(r"\[[^\]]*\]\(([^)\s#]+)(?:#[^)\s]*)?\)")
LINE_LINK = re.compile(r"\[`([\w.]+)`\]\(([^)\s#]+)#L(\d+)\)")


def read(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", read(name), re.MULTILINE | re.DOTALL)


def all_links() -> list[tuple[str, str]]:
    found = [(name, link) for name in DOCUMENTS for link in LINK.findall(read(name))]
    return sorted({(name, link) for name, link in found if "://" not in link})


def line_links() -> list[tuple[str, str, str, int]]:
    return [(name, *link[:2], int(link[2])) for name in DOCUMENTS for link in LINE_LINK.findall(read(name))]


def places(source: str, name: str) -> list[int]:
    """The lines that `name` may stand for, from 1: where it is defined or, if nowhere, every line that holds it.
    `Class.name` is looked for within the class alone."""
    *outer, last = name.split(".")
    lines = source.splitlines()
    inside = range(1, len(lines) + 1)
    if outer:
        classes = {node.name: node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)}
        if outer[0] not in classes:
            return []
        inside = range(classes[outer[0]].lineno, (classes[outer[0]].end_lineno or 0) + 1)
    word = rf"\b{re.escape(last)}\b"
    defined = [i for i in inside if re.match(rf"\s*(def|class) {word}", lines[i - 1])]
    return defined or [i for i in inside if re.search(word, lines[i - 1])]


@pytest.mark.parametrize(("name", "link"), all_links())
def test_what_is_linked_exists(name: str, link: str) -> None:
    assert ((ROOT / name).parent / link).exists(), f"{name} links to {link}, which does not exist"


@pytest.mark.parametrize(("name", "text", "file", "line"), line_links())
def test_a_linked_line_holds_what_the_link_names(name: str, text: str, file: str, line: int) -> None:
    possible = places(((ROOT / name).parent / file).read_text("utf-8"), text)
    assert line in possible, f"{name}: {text} is not at {file}#L{line} but at {possible}; run tests/test_docs.py"


def test_places() -> None:
    source = "a = 1\nclass A:\n    def f(self):\n        b = a\n\nclass B:\n    def f(self):\n        return f\n"
    assert places(source, "A.f") == [3]
    assert places(source, "f") == [3, 7]
    assert places(source, "b") == [4]
    assert places(source, "a") == [1, 4]
    assert places(source, "C.f") == []


def test_the_tree_is_the_packages() -> None:
    """Every entry exists, and every module of the package is an entry."""
    tree = next(block for block in blocks("README.md", "text") if block.startswith("abyssal/"))
    parents: list[str] = []
    listed = set()
    for line in tree.splitlines():
        indent = len(line) - len(line.lstrip())
        if not line.strip() or indent > 6:  # an annotation that goes on
            continue
        parents = [*parents[: indent // 2], line.split()[0]]
        listed.add("".join(parents))
    missing = [path for path in listed if not (ROOT / path).exists()]
    assert not missing, f"README's tree has {missing}"
    modules = {str(file.relative_to(ROOT)) for file in (ROOT / "abyssal").rglob("*.py") if file.stem[:2] != "__"}
    assert not modules - listed, f"README's tree lacks {sorted(modules - listed)}"


def test_the_cache_table_is_what_inspect_says() -> None:
    cache = inspect(ModelConfig.load("deepseek-v3")).cache
    rungs = [(r.elements_per_token, r.bytes_per_token, r.ratio, r.mha_ratio) for r in cache.compared.values()]
    expected = [(cache.elements_per_token, cache.bytes_per_token, 1.0, cache.mha_ratio), *rungs]
    rows = re.findall(r"^\|[^|]+\| ([\d,]+) \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \|$", read("README.md"), re.MULTILINE)
    assert rows == [(f"{n:,}", f"{size:,}", f"{ratio:.2f}", f"{mha:.1f}") for n, size, ratio, mha in expected]


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_commands_are_understood(document: str) -> None:
    """Each is parsed, and none is run. A packaged run's settings are checked too."""
    group = typer.main.get_command(app)
    targets = re.findall(r"^([\w-]+):", read("Makefile"), re.MULTILINE)
    for block in blocks(document, "bash"):
        for program, *words in (shlex.split(line, comments=True) or [""] for line in block.splitlines()):
            if program == "make":
                assert words[0] in targets
            if program == "abyssal":
                command, verb, arguments = group, "", words
                while hasattr(command, "commands"):  # `study` and `bench` have verbs of their own
                    verb, *arguments = arguments
                    command = command.commands[verb]
                given = command.make_context(verb, arguments).params
                if words[0] == "train" and given["run"] in run_names():
                    TrainConfig.read(given["run"], given["settings"] or []).model_settings()


def test_the_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """README's Python, one block after another, with a tiny model where it expects the run of `make run`."""
    monkeypatch.chdir(tmp_path)
    config = ModelConfig.load("tiny")
    Transformer(config).init_weights(torch.Generator().manual_seed(0)).save("runs/small/model")
    Tokenizer.train([read("README.md")], config.vocab_size).save("runs/small/model")
    names: dict[str, object] = {}
    for block in blocks("README.md", "python"):
        exec(compile(block, "README.md", "exec"), names)
    before, after = Path("runs/small/model"), Path("runs/copy")
    assert (after / "config.json").read_bytes() == (before / "config.json").read_bytes()
    tensors, copied = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    assert tensors.keys() == copied.keys() and all(torch.equal(t, copied[name]) for name, t in tensors.items())
    assert capsys.readouterr().out


def point_links_at_where_the_lines_are() -> None:
    for name in DOCUMENTS:
        folder = (ROOT / name).parent

        def moved(link: re.Match[str], folder: Path = folder) -> str:
            text, file, old = link[1], link[2], int(link[3])
            source = (folder / file).read_text("utf-8")
            possible = places(source, text)
            if not possible or old in possible:
                return link[0]
            assigned = re.compile(rf"\s*(self\.)?{re.escape(text.split('.')[-1])}\b[^=(]*=[^=]")
            best = [i for i in possible if assigned.match(source.splitlines()[i - 1])] or possible
            return f"[`{text}`]({file}#L{min(best, key=lambda line: abs(line - old))})"

        (ROOT / name).write_text(LINE_LINK.sub(moved, read(name)), "utf-8")


if __name__ == "__main__":
    point_links_at_where_the_lines_are()
