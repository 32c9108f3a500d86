"""Thinking, tool calls and spans, read out of a text however it was cut into pieces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abyssal.engine.request import Output, Piece
from abyssal.serve.reader import Reader
from abyssal.serve.reasoning import ReasoningSplitter, Segment
from abyssal.serve.tools import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, SEPARATOR, ToolParser

FENCED = (
    f"Let me look.{CALLS_BEGIN}{CALL_BEGIN}function{SEPARATOR}weather\n```json\n"
    f'{{"city": "Pa`ris"}}\n```{CALL_END}\n{CALL_BEGIN}function{SEPARATOR}time\n```json\n{{}}\n```{CALL_END}{CALLS_END}'
)
BARE = (
    f'{CALLS_BEGIN}{CALL_BEGIN}weather{SEPARATOR}{{"city": "Paris"}}{CALL_END}'
    f"{CALL_BEGIN}time{SEPARATOR}{{}}{CALL_END}{CALLS_END}"
)


def cuts(text: str) -> st.SearchStrategy[list[str]]:
    places = st.lists(st.integers(0, len(text)), max_size=8).map(sorted)
    return places.map(lambda at: [text[a:b] for a, b in zip([0, *at], [*at, len(text)])])


def joined(segments: list[Segment]) -> dict[str, str]:
    found: dict[str, str] = {}
    for kind, text in segments:
        found[kind] = found.get(kind, "") + text
    return found


def split(pieces: list[str], opened: bool) -> tuple[str, str]:
    splitter = ReasoningSplitter(opened)
    segments = [s for piece in pieces for s in splitter.push(piece)] + splitter.flush()
    assert "".join(text for _, text in segments) in ("".join(pieces), "".join(pieces).rstrip("\n"))
    found = joined(segments)
    return found.get("reasoning", ""), found.get("content", "")


THINKING = [
    ("<think>\nWell, 1 < 2.\n</think>\n\nYes.", False, ("Well, 1 < 2.", "Yes.")),
    ("  <think>a</think>b</think>c", False, ("a", "b</think>c")),
    ("Well.\n</think>\n\nYes.\n", True, ("Well.", "Yes.\n")),
    ("\nWell", True, ("Well", "")),
    ("Well </thin", True, ("Well </thin", "")),
    ("\n</think>\n\nAt once.", True, ("", "At once.")),
    ("No <think>ing</think> here", False, ("", "No <think>ing</think> here")),
    ("<thi", False, ("", "<thi")),
    ("", False, ("", "")),
]


@pytest.mark.parametrize(("text", "opened", "expected"), THINKING)
def test_thinking_is_told_from_the_answer(text: str, opened: bool, expected: tuple[str, str]) -> None:
    assert split([text], opened) == expected


@given(st.data())
def test_thinking_does_not_depend_on_the_cuts(data: st.DataObject) -> None:
    text, opened, expected = data.draw(st.sampled_from(THINKING))
    assert split(data.draw(cuts(text)), opened) == expected


def parse(pieces: list[str], parser: ToolParser) -> tuple[str, list[tuple[str, str]]]:
    segments = [s for piece in pieces for s in parser.push(piece)] + parser.flush()
    assert "".join(text for _, text in segments) == "".join(pieces)
    content, calls = "", []
    for kind, text in segments:
        if kind == "content":
            content += text
        elif kind == "name":
            calls.append((text, ""))
        elif kind == "arguments":
            calls[-1] = (calls[-1][0], calls[-1][1] + text)
    return content, calls


@given(st.data())
def test_calls_do_not_depend_on_the_cuts(data: st.DataObject) -> None:
    weather, time = ("weather", '{"city": "Pa`ris"}'), ("time", "{}")
    assert parse(data.draw(cuts(FENCED)), ToolParser(True)) == ("Let me look.", [weather, time])
    bare = ("weather", '{"city": "Paris"}')
    assert parse(data.draw(cuts(BARE)), ToolParser(False)) == ("", [bare, time])
    assert parse(data.draw(cuts(BARE)), ToolParser(False, parallel=False)) == ("", [bare])


def test_a_forced_call_begins_in_the_prompt() -> None:
    assert parse(['weather\n```json\n{"a": 1}'], ToolParser(True, inside=True)) == ("", [("weather", '{"a": 1}')])
    assert parse([f"weather{SEPARATOR}{{}}"], ToolParser(False, inside=True)) == ("", [("weather", "{}")])


def test_a_call_that_breaks_off_keeps_what_it_has() -> None:
    assert parse([FENCED[:90]], ToolParser(True))[1] == [("weather", FENCED[:90].partition("json\n")[2])]
    assert parse(["almost <｜tool▁cal"], ToolParser(True)) == ("almost <｜tool▁cal", [])


@given(st.text(alphabet="<｜tool▁callsbegin｜>ab\n`", max_size=60), st.booleans())
def test_no_letter_of_any_text_is_lost_or_moved(text: str, fenced: bool) -> None:
    parser = ToolParser(fenced)
    segments = [s for letter in text for s in parser.push(letter)] + parser.flush()
    assert "".join(said for _, said in segments) == text


@given(st.data())
def test_spans_cut_what_is_told(data: st.DataObject) -> None:
    """Each letter keeps whether it was drafted, whatever is dropped before it and held back."""
    text = f"<think>\nabc\n</think>\n\n{FENCED}"
    reader = Reader(ReasoningSplitter(False), ToolParser(True))
    told = flags = ""
    pieces = data.draw(cuts(text))
    for number, piece in enumerate(pieces, 1):
        output = Output([1], [], text, "stop") if number == len(pieces) else None
        delta = reader.push(Piece(0, piece, output, spans=tuple((letter, letter in "bdk") for letter in piece)))
        said = delta.reasoning + delta.content
        assert "".join(part for part, _ in delta.spans) == said
        told += said
        flags += "".join("1" if drafted else "0" for part, drafted in delta.spans for _ in part)
    assert told == "abcLet me look."
    assert flags == "".join("1" if letter in "bdk" else "0" for letter in told)
    assert reader.calls == 2


def test_the_last_piece_flushes() -> None:
    reader = Reader(ReasoningSplitter(False), ToolParser(True))
    assert not reader.push(Piece(0, "<thi"))
    assert reader.push(Piece(0, "n", Output([1], [], "<thin", "length"))).content == "<thin"
