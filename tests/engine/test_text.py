import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from abyssal.engine.text import StopWatcher

LETTERS = st.text("ab<", max_size=14)


def before_the_first(text: str, stops: tuple[str, ...]) -> str:
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]


@given(
    pieces=st.lists(LETTERS | st.text(max_size=4), max_size=8),
    stops=st.lists(st.text("ab<", min_size=1, max_size=5), max_size=4).map(tuple),
)
@example(pieces=list("<ab"), stops=("<ab", "a"))
@example(pieces=list("<aa"), stops=("<ab", "a"))
@example(pieces=list("aab"), stops=("ab",))
@settings(max_examples=400, deadline=None)
def test_however_it_is_cut_the_text_ends_before_the_first_stop(pieces, stops):
    watcher, shown, reached, pushed = StopWatcher(stops), "", False, ""
    for piece in pieces:
        pushed += piece
        out, now = watcher.push(piece)
        assert now >= reached and not (reached and out)
        shown, reached = shown + out, now
        assert before_the_first(pushed, stops).startswith(shown)
        assert reached <= any(stop in pushed for stop in stops)
    shown += watcher.flush()
    whole = "".join(pieces)
    assert shown == before_the_first(whole, stops)
    assert watcher.reached == any(stop in whole for stop in stops)


def test_text_is_held_back_only_while_it_may_begin_a_stop():
    watcher = StopWatcher(("</end>",))
    assert watcher.push("one ") == ("one ", False)
    assert watcher.push("two </e") == ("two ", False)
    assert watcher.push("m> three") == ("</em> three", False)
    assert watcher.push(" <") == (" ", False)
    assert watcher.push("/end> four") == ("", True)
    assert watcher.push("five") == ("", True)
    assert watcher.flush() == ""


def test_a_stop_is_reached_with_its_last_character():
    watcher = StopWatcher(("\n\n", "\nUser:"))
    assert watcher.push("yes\n") == ("yes", False)
    assert watcher.push("\n") == ("", True)


def test_without_stops_everything_passes():
    watcher = StopWatcher(())
    assert watcher.push("all of it") == ("all of it", False)
    assert watcher.flush() == "" and not watcher.reached


def test_what_only_began_a_stop_is_shown_at_the_end():
    watcher = StopWatcher(("STOP",))
    assert watcher.push("a STO") == ("a ", False)
    assert watcher.flush() == "STO" and not watcher.reached


def test_empty_stops_are_refused():
    with pytest.raises(ValueError, match="not empty"):
        StopWatcher(("a", ""))
