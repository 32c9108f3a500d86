"""What every study is made of: a result that survives its JSON, a page that needs nothing else, whole files."""

import base64
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from abyssal.files import write_file
from abyssal.study.output import Places, load, save
from abyssal.study.page import page
from abyssal.study.result import Grid, Picture, Result

VOID = {"meta", "img", "br"}


class Checker(HTMLParser):
    """Every tag is closed where it should be; keeps what a browser would fetch, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.fetched: list[str] = []
        self.ids: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        named = dict(attrs)
        self.fetched += [value for name in ("src", "href") if (value := named.get(name)) is not None]
        self.ids += [value] if (value := named.get("id")) is not None else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def plot(figure: Figure) -> None:
    figure.subplots().plot([1, 2, 3])


def made(name: str = "one", **changes: object) -> Result:
    fields: dict[str, object] = {
        "name": name, "title": f"Study <{name}> & more", "claim": 'They say "a < b" (section 2).',
        "shown": ("a is <b>small</b>",), "not_shown": ("that c",), "command": f"abyssal study {name} --x 'a b'",
        "grids": (Grid("Table <1>", ("word", "number"), (("x < y", "1,024"), ("&", "2")), note="a <note>"),),
        "pictures": (Picture.drawn("a <picture>", plot, (2, 2)), Picture.drawn("two", plot, (3, 2))),
        "numbers": {"a": 1, "b": [0.1, None], "of": {"4096": (1, 2)}, "claims": []}, "seeds": (0, 1, 2), "seconds": 1.5,
    }  # fmt: skip
    return Result(**(fields | changes))  # type: ignore[arg-type]


def parsed(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert not checker.open
    return checker


def test_a_result_survives_its_json() -> None:
    before = made()
    after = Result.from_json(before.to_json(), lambda i: before.pictures[i].png)
    assert after == before and after.to_json() == before.to_json()
    assert before.numbers["of"] == {"4096": [1, 2]}


def test_numbers_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="JSON"):
        made(numbers={"loss": float("nan")}).to_json()


def test_a_row_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="t: expected 2 cells a row, got"):
        Grid("t", ("a", "b"), (("1",),))


def test_the_page_needs_nothing_else() -> None:
    results = [made("one"), made("two")]
    text = page(results, "All <studies>")
    assert "http://" not in text and "https://" not in text and "//" not in re.sub(r"base64,[^\"]*", "", text)
    checker = parsed(text)
    assert "script" not in checker.tags and "link" not in checker.tags
    links = [value for value in checker.fetched if value.startswith("#")]
    assert {link.removeprefix("#") for link in links} == set(checker.ids)
    assert checker.ids == ["studies", "claims", "one", "two"]
    images = [value for value in checker.fetched if not value.startswith("#")]
    pngs = [base64.b64decode(value.removeprefix("data:image/png;base64,"), validate=True) for value in images]
    assert pngs == [picture.png for r in results for picture in r.pictures]
    assert all(png.startswith(b"\x89PNG") for png in pngs)


def test_the_page_says_all_that_the_terminal_does() -> None:
    result = made()
    checker = parsed(page([result], result.title))
    assert not checker.fetched or all(value.startswith("data:") for value in checker.fetched)
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(result.render())
    printed = console.export_text()
    grid = result.grids[0]
    cells = [grid.title, *grid.head, *(cell for row in grid.rows for cell in row), grid.note]
    for said in [result.title, result.claim, *result.shown, *result.not_shown, result.cost(), *cells]:
        assert said in checker.text and said in printed
    assert result.command in checker.text and checker.text.count(result.title) == 2  # the window's, and one heading


def test_the_cost_states_the_seeds() -> None:
    assert "1.5 s on" in made().cost() and made().cost().endswith("seeds 0, 1, 2")
    assert made(seeds=(7,)).cost().endswith("seed 7")
    assert made(seeds=()).cost().endswith("nothing is drawn at random")


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    result = made()
    written = save(result, tmp_path / "a" / "b")
    assert {path.name for path in written} == {"one.json", "one.html", "one.png", "one-2.png"}
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == {path.name for path in written}
    assert load(tmp_path / "a" / "b", "one") == result


def test_a_write_that_fails_leaves_the_file_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_file(path, b"before")

    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_file(path, b"after")
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


def test_places_are_checked_first(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--json: expected a file"):
        Places(json=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"--picture: .* is no folder"):
        Places(picture=tmp_path / "no" / "a.png")
    assert Places().write(made()) == []
