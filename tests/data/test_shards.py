"""Token sets: what is written, how it resumes, and what is refused."""

import hashlib
import json
import multiprocessing
import os
import random
import signal
import time
from typing import Any

import numpy as np
import pytest

from abyssal.data import Tokenizer, TokenSet, documents, prepare

SETTINGS: dict[str, Any] = {"validation": 0.1, "shard_tokens": 3000, "seed": 3, "progress": False}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    rng = random.Random(0)
    words = ["deep", "sea", "fish", "泳ぐ", "été", "<|end_of_text|>", "\n", "light", "1234", "🐙"]
    for n in range(120):
        text = " ".join(rng.choices(words, k=rng.choice([1, 20, 150, 700])))
        (folder / f"{n % 7}").mkdir(exist_ok=True)
        (folder / f"{n % 7}" / f"{n}.txt").write_text(text)
    (folder / "image.png").write_bytes(b"\x89PNG\0")
    (folder / "lines.jsonl").write_text('{"text": "one line"}\n{"broken\n{"text": "another line"}\n')
    return folder


@pytest.fixture(scope="module")
def tokenizer(source):
    return Tokenizer.train((d.text for d in documents(source, lambda *_: None)), 300)


@pytest.fixture(scope="module")
def whole(source, tokenizer, tmp_path_factory):
    """A set made without interruption."""
    folder = tmp_path_factory.mktemp("whole") / "set"
    prepare(source, tokenizer, folder, **SETTINGS)
    return folder


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_every_document_is_there_once_whole_and_ended(source, tokenizer, whole):
    made = TokenSet.open(whole)
    texts = {d.text: d.name for d in documents(source, lambda *_: None)}
    names = {}
    for name in ("train", "validation"):
        split = made.split(name)
        decoded = []
        for i in range(split.documents):
            ids = split.document(i)
            assert ids.dtype == np.uint16 and len(ids) == split.lengths[i]
            assert ids[-1] == tokenizer.eos_id and tokenizer.eos_id not in ids[:-1]
            decoded.append(tokenizer.decode(ids[:-1].tolist()))
        assert split.tokens == split.lengths.sum()
        assert split.text_bytes == sum(len(text.encode()) for text in decoded)
        names[name] = [texts[text] for text in decoded if text in texts]
        assert len(names[name]) == split.documents
    assert sorted(names["train"] + names["validation"], key=str) == sorted(
        (texts[d.text] for d in documents(source, lambda *_: None)), key=str
    )
    assert 3 <= len(names["validation"]) <= 30
    assert made.split("train").documents + made.split("validation").documents == 122 == made.index["documents"]
    assert made.index["skipped"] == {"binary": 1, "malformed JSON": 1}
    assert len([s for s in made.index["shards"] if s.split == "train"]) > 5
    assert Tokenizer.load(made.tokenizer).fingerprint == tokenizer.fingerprint
    assert (made.vocab_size, made.eos_id) == (tokenizer.vocab_size, 1)


def test_documents_are_views_of_the_file(whole):
    split = TokenSet.open(whole).split("train")
    one, again = split.document(5), split.document(5)
    assert np.shares_memory(one, again) and not one.flags.writeable
    for i in (-1, split.documents):
        with pytest.raises(IndexError, match=f"document {i}: split train has {split.documents} documents"):
            split.document(i)
    with pytest.raises(ValueError, match="split 'test': expected one of train, validation"):
        TokenSet.open(whole).split("test")


def test_files_are_plain_arrays_with_the_checksums_told(whole):
    index = json.loads((whole / "index.json").read_text())
    for shard in index["shards"]:
        stem = f"{shard['split']}-{shard['number']:05d}"
        tokens, offsets = (whole / f"{stem}.tokens").read_bytes(), (whole / f"{stem}.offsets").read_bytes()
        assert hashlib.sha256(tokens).hexdigest() == shard["tokens_sha256"]
        assert hashlib.sha256(offsets).hexdigest() == shard["offsets_sha256"]
        ids, places = np.frombuffer(tokens, "<u2"), np.frombuffer(offsets, "<i8")
        assert (np.flatnonzero(ids == 1) + 1 == places[1:]).all() and places[0] == 0
        assert len(ids) == shard["tokens"] and len(places) == shard["documents"] + 1
    train = [s["tokens"] for s in index["shards"] if s["split"] == "train"]
    assert all(n >= SETTINGS["shard_tokens"] for n in train[:-1])


def test_the_split_depends_on_seed_and_document_alone(source, tokenizer, whole, tmp_path):
    def validating(made):
        split = made.split("validation")
        return {split.document(i).tobytes() for i in range(split.documents)}

    first = validating(TokenSet.open(whole))
    sizes = prepare(source, tokenizer, tmp_path / "a", **SETTINGS | {"shard_tokens": 10**6})
    assert validating(sizes) == first
    assert validating(prepare(source, tokenizer, tmp_path / "b", **SETTINGS | {"seed": 4})) != first


def in_child(job):
    """Runs `job` in a forked process, cheaper than a new Python that imports torch."""
    child = multiprocessing.get_context("fork").Process(target=job)
    child.start()
    return child


def test_killed_at_any_write_it_resumes_to_the_same_bytes(source, tokenizer, tmp_path):
    real = os.replace
    few = SETTINGS | {"shard_tokens": 14_000}
    prepare(source, tokenizer, tmp_path / "whole", **few)
    expected = contents(tmp_path / "whole")
    shards = sum(name.endswith(".tokens") for name in expected)
    writes = 3 * shards + 2 + 2  # a shard's two files and its line in the index; tokenizer; first and last index
    assert shards > 3
    kills = 0
    for at in range(1000):
        folder = tmp_path / str(at)

        def job(folder=folder, at=at):
            count = 0

            def replace(a, b):
                nonlocal count
                if count == at:  # the file is written and does not have its name yet
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
                real(a, b)

            os.replace = replace
            prepare(source, tokenizer, folder, **few)

        child = in_child(job)
        child.join(120)
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        kills += 1
        finished = (
            at % 2 and (folder / "index.json").exists() and '"complete": true' in (folder / "index.json").read_text()
        )
        if not finished:
            with pytest.raises((ValueError, FileNotFoundError), match=r"unfinished|no such file"):
                TokenSet.open(folder)
        before = {p: p.stat().st_mtime_ns for p in folder.glob("*.tokens")}
        done = json.loads((folder / "index.json").read_text())["shards"] if (folder / "index.json").exists() else []
        prepare(source, tokenizer, folder, **few)
        for shard in done:  # complete shards are not made again
            path = folder / f"{shard['split']}-{shard['number']:05d}.tokens"
            assert path.stat().st_mtime_ns == before[path]
        assert contents(folder) == expected, f"killed at write {at}"
    assert kills == writes


def test_killed_at_random_moments_again_and_again(source, tokenizer, whole, tmp_path):
    rng = random.Random(time.time_ns())
    for trial in range(2):
        folder = tmp_path / str(trial)
        for _ in range(15):
            child = in_child(lambda folder=folder: prepare(source, tokenizer, folder, **SETTINGS))
            child.join(rng.uniform(0.02, 0.15))
            if child.exitcode is None:
                child.kill()
            child.join(120)
            if child.exitcode == 0:
                break
        prepare(source, tokenizer, folder, **SETTINGS)
        assert contents(folder) == contents(whole)


def test_another_source_tokenizer_or_setting_is_refused(source, tokenizer, tmp_path):
    folder = tmp_path / "set"
    (tmp_path / "text").mkdir()
    for n in range(4):
        (tmp_path / "text" / f"{n}.txt").write_text(f"text {n}")
    prepare(tmp_path / "text", tokenizer, folder, **SETTINGS)
    before = contents(folder)
    other = Tokenizer.train(["other words"], 300)
    for call, message in (
        (lambda **more: prepare(source, tokenizer, folder, **SETTINGS, **more), "source_sha256 was"),
        (
            lambda **more: prepare(tmp_path / "text", other, folder, **SETTINGS, **more),
            "tokenizer_sha256 was",
        ),
        (
            lambda **more: prepare(tmp_path / "text", tokenizer, folder, **SETTINGS | {"seed": 9}, **more),
            "seed was 3 and is now 9",
        ),
        (
            lambda **more: prepare(tmp_path / "text", tokenizer, folder, add_bos=True, **SETTINGS, **more),
            "bos_id was None and is now 0",
        ),
    ):
        with pytest.raises(ValueError, match=f"set: holds a token set made otherwise: .*{message}"):
            call()
        assert contents(folder) == before
    (tmp_path / "text" / "2.txt").write_text("text 5")
    with pytest.raises(ValueError, match=r"source_sha256 was .* pass overwrite=True"):
        prepare(tmp_path / "text", tokenizer, folder, **SETTINGS)
    prepare(source, tokenizer, folder, overwrite=True, **SETTINGS)
    prepare(tmp_path / "text", tokenizer, folder, overwrite=True, **SETTINGS)
    prepare(tmp_path / "text", tokenizer, tmp_path / "fresh", **SETTINGS)
    assert contents(folder) == contents(tmp_path / "fresh")  # no shard of the larger set is left


def test_a_source_that_changes_while_it_is_read(tokenizer, tmp_path, monkeypatch):
    text = tmp_path / "lines.jsonl"
    text.write_text('{"text": "a"}\n{"text": "b"}\n')
    save = Tokenizer.save

    def meanwhile(self, folder):
        text.write_text('{"text": "a"}\n{"text": "c"}\n')
        save(self, folder)

    monkeypatch.setattr(Tokenizer, "save", meanwhile)
    with pytest.raises(ValueError, match=r"lines.jsonl: changed while it was being read"):
        prepare(text, tokenizer, tmp_path / "set", **SETTINGS)
    with pytest.raises(ValueError, match="unfinished"):
        TokenSet.open(tmp_path / "set")


def test_damage_is_told_by_file(whole, tmp_path):
    def damaged(name, change):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        for path, data in contents(whole).items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            if path == name:
                data = change(data)
            if data is not None:
                (folder / path).write_bytes(data)
        return folder

    def flipped(data):
        return data[:-1] + bytes([data[-1] ^ 1])

    for name, change, error, message in (
        (
            "train-00002.tokens",
            lambda d: d[:-2],
            ValueError,
            r"train-00002.tokens: expected \d+ bytes, found \d+",
        ),
        ("train-00002.tokens", flipped, ValueError, "train-00002.tokens: expected the checksum"),
        ("train-00001.offsets", flipped, ValueError, "train-00001.offsets: expected the checksum"),
        (
            "validation-00000.tokens",
            lambda d: None,
            FileNotFoundError,
            "validation-00000.tokens: no such file",
        ),
        ("index.json", lambda d: None, FileNotFoundError, "index.json: no such file"),
        ("index.json", lambda d: d[:-9], ValueError, "index.json: Expecting"),
        (
            "index.json",
            lambda d: d.replace(b'"format": 1', b'"format": 2'),
            ValueError,
            "format: expected 1, found 2",
        ),
        (
            "index.json",
            lambda d: d.replace(b"uint16", b"object"),
            ValueError,
            "dtype: expected uint16 or uint32",
        ),
        (
            "index.json",
            lambda d: d.replace(b'"eos_id"', b'"eos"'),
            ValueError,
            "field eos_id: expected int, found None",
        ),
        (
            "index.json",
            lambda d: d.replace(b'"number": 1', b'"number": 8', 1),
            ValueError,
            "train numbered from 0",
        ),
        ("tokenizer/tokenizer.json", lambda d: d + b" ", ValueError, "tokenizer: not the tokenizer that"),
        ("tokenizer/tokenizer.json", lambda d: None, FileNotFoundError, "has neither tokenizer.json"),
    ):
        folder = damaged(name, change)
        with pytest.raises(error, match=message):
            TokenSet.open(folder)
    # Without verification sizes still count, and offsets must fit their shard.
    TokenSet.open(damaged("train-00002.tokens", flipped), verify=False)
    with pytest.raises(ValueError, match=r"train-00002.tokens: expected \d+ bytes"):
        TokenSet.open(damaged("train-00002.tokens", lambda d: d + b"\0\0"), verify=False)
    with pytest.raises(ValueError, match=r"train-00001.offsets: expected offsets rising from 0 to"):
        TokenSet.open(damaged("train-00001.offsets", flipped), verify=False)


def test_small_sources(tokenizer, tmp_path):
    def lines(*texts):
        path = tmp_path / "x.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return path

    with pytest.raises(ValueError, match=r"x.jsonl: 1 document\(s\); expected at least two"):
        prepare(lines("only"), tokenizer, tmp_path / "one", progress=False)
    assert not (tmp_path / "one").exists()
    for n, validation in ((2, 0.001), (2, 0.999), (5, 0.001), (5, 0.999)):
        texts = ["a" * i for i in range(1, n + 1)]
        made = prepare(lines(*texts), tokenizer, tmp_path / f"{n}{validation}", validation=validation, progress=False)
        few = made.split("validation" if validation < 0.5 else "train")
        assert few.documents == 1
        assert made.split("train").documents + made.split("validation").documents == n
    with pytest.raises(ValueError, match=r"0 document\(s\) within max_bytes 2;"):
        prepare(lines("abc", "d"), tokenizer, tmp_path / "none", max_bytes=2, progress=False)
    made = prepare(lines("é", "bb", "ccc", "d"), tokenizer, tmp_path / "some", max_bytes=6, progress=False)
    assert made.index["documents"] == 2 and made.index["text_bytes"] == 4


def test_wide_vocabularies_and_the_first_token(tokenizer, tmp_path):
    definition = json.loads(tokenizer.files["tokenizer.json"])
    for id in range(tokenizer.vocab_size, 2**16 + 1):
        definition["model"]["vocab"][f"{id:x}☃"] = id
    wide = Tokenizer(tokenizer.files | {"tokenizer.json": json.dumps(definition).encode()})
    assert wide.vocab_size == 2**16 + 1
    (tmp_path / "x.jsonl").write_text('{"text": "sea"}\n{"text": "sea"}\n')
    made = prepare(tmp_path / "x.jsonl", wide, tmp_path / "set", add_bos=True, progress=False)
    assert made.split("train").document(0).dtype == np.uint32
    assert made.split("train").document(0).tolist() == [0, *tokenizer.encode("sea"), 1]


def test_bad_arguments_by_message(source, tokenizer, tmp_path):
    for settings, message in (
        ({"validation": 0.0}, r"validation 0.0: expected a fraction between 0 and 1"),
        ({"validation": 1.0}, r"validation 1.0: expected"),
        ({"shard_tokens": 0}, "shard_tokens 0: expected at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(source, tokenizer, tmp_path / "set", progress=False, **settings)
    endless = Tokenizer({"tokenizer.json": tokenizer.files["tokenizer.json"]})
    with pytest.raises(ValueError, match="has no eos_token"):
        prepare(source, endless, tmp_path / "set", progress=False)
    with pytest.raises(FileNotFoundError, match="absent"):
        prepare(tmp_path / "absent", tokenizer, tmp_path / "set", progress=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"mine: is not empty and has no index.json"):
            prepare(source, tokenizer, tmp_path / "mine", overwrite=overwrite, progress=False)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "mine"


def test_progress_is_shown_or_silent(tokenizer, tmp_path, capsys):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": "b"}\nbroken\n')
    prepare(tmp_path / "x.jsonl", tokenizer, tmp_path / "silent", progress=False)
    assert capsys.readouterr() == ("", "")
    prepare(tmp_path / "x.jsonl", tokenizer, tmp_path / "loud")
    assert "1 left out: malformed JSON" in capsys.readouterr().out.replace("\n", " ").replace("  ", " ")
