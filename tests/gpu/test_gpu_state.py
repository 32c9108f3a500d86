"""On one GPU or two: a state that ranks copy out and write while they train is resumed by one process."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from abyssal.train import read_metrics
from abyssal.train.state import state_folder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SETTINGS = [
    "steps=12", "warmup_steps=0", "batch_tokens=256", "sequence=64", "accumulate=2", "lr=0.003", "log_every=1",
    "validate_every=12",
    "validation_tokens=512", "save_every=3", "keep_states=9", "device=cuda", "model.vocab_size=320",
]  # fmt: skip


def run(command: list[str], ranks: int = 0) -> str:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    command = [sys.executable, *launch, "-m", "abyssal", "train", *command]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_state_written_by_ranks_is_resumed_by_one_process(tmp_path: Path, dtype: str) -> None:
    draw = random.Random(0)
    words = ["the cat", "sat on", "a mat", "and", "saw 1234", "birds;\n"]
    lines = [json.dumps({"text": " ".join(draw.choices(words, k=draw.randint(5, 60)))}) for _ in range(90)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    ranks, whole, part = min(2, torch.cuda.device_count()), tmp_path / "whole", tmp_path / "part"
    settings = [*SETTINGS, f"data={tmp_path / 'text.jsonl'}", f"out={whole}", f"dtype={dtype}"]
    told = run(["tiny", *settings, "--mesh", f"dp={ranks}"], ranks)
    assert f"{ranks} ranks (dp={ranks}), cuda" in told and (whole / "model" / "config.json").is_file()
    shutil.copytree(whole, part)
    for step in (9, 12):
        shutil.rmtree(state_folder(part / "state", step))
    assert "resuming after step 6" in run([str(part), "--resume", "--mesh", ""])
    ours, theirs = ([r["loss"] for r in read_metrics(out / "metrics.jsonl")] for out in (part, whole))
    assert len(ours) == len(theirs) == 12
    torch.testing.assert_close(
        torch.tensor(ours), torch.tensor(theirs), rtol=1e-3 if dtype == "float32" else 2e-2, atol=0.0
    )
