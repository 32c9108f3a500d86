"""Whether a written answer is right."""

import re

_STATED = re.compile(r"(?:####|[Tt]he answer is)\s*\$?(-?[0-9][0-9.,]*|-?\.[0-9]+)")
_NUMBER = re.compile(r"-?\$?(?:[0-9][0-9.,]*|\.[0-9]+)")
_OPEN = r"[ \t*$(]*(?:\\(?:boxed|text|textbf|mathrm)\{\(?)*"
# "is" without a colon wants a capital: an answer may be "a matter of taste".
_LETTER = re.compile(rf"(?i:answer)[ \t*]*(?:(?:is)?[ \t*]*:{_OPEN}([A-Ja-j])|is{_OPEN}([A-J]))(?![A-Za-z'’])")
_BLOCK = re.compile(r"```(?:[Pp]ython|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


def stated_number(answer: str) -> str | None:
    """GSM8K's own rule: the number after the first `####`, or, in chains of thought, "The answer is"."""
    found = _STATED.search(answer)
    return None if found is None else plain_number(found[1])


def last_number(answer: str) -> str | None:
    """The last number that stands in an answer."""
    found = _NUMBER.findall(answer)
    return plain_number(found[-1]) if found else None


def plain_number(text: str) -> str:
    """Without currency, commas between thousands, and what ends a sentence."""
    return text.replace("$", "").replace(",", "").rstrip(".")


def plain_words(text: str) -> str:
    """Without the case of letters, spaces around, and the full stop."""
    return text.strip().rstrip(".").casefold()


def stated_letter(answer: str) -> str | None:
    """The letter of the last "Answer: X" or "answer is X", in a box, in bold or in brackets."""
    found = _LETTER.findall(answer)
    return "".join(found[-1]).upper() if found else None


def equal_mathematics(gold: str, answer: str) -> bool:
    """By math-verify: whether an answer's last formula, or what it puts in a box, is the same as `gold`."""
    from math_verify import parse, verify

    return bool(verify(parse(f"\\boxed{{{gold}}}"), parse(answer)))


def code_of(answer: str, entry: str, beginning: str) -> str:
    """The program of an answer: the block of code that defines `entry`, or else the beginning and what goes on with
    it."""
    blocks = [str(block) for block in _BLOCK.findall(answer)]
    whole = [block for block in blocks if f"def {entry}(" in block]
    # A block may repeat the function and rely on the imports and functions above it.
    if whole:
        return f"{beginning.partition(f'def {entry}(')[0]}\n{whole[-1]}"
    return beginning + (blocks[-1] if blocks else answer)
