"""Memory while loading and saving, sampled in a process of its own.

RssAnon is what the process allocated; RssFile is what is mapped of the files: the page cache's, the kernel may take it
back, and we let go of it every 256 MB.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from abyssal.checkpoint.names import table
from abyssal.config import ModelConfig

CHILD = r"""
import json, sys, threading, time
import torch
from abyssal.checkpoint import load, save
from abyssal.config import ModelConfig
from abyssal.model.transformer import Transformer

def status():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return {key: int(fields[key].split()[0]) * 1024 for key in ("RssAnon", "VmRSS")}

class Peak:
    def __enter__(self):
        self.before, self.peak, self.on = status(), status(), True
        self.thread = threading.Thread(target=self.sample)
        self.thread.start()
        return self
    def sample(self):
        while self.on:
            now = status()
            self.peak = {key: max(value, now[key]) for key, value in self.peak.items()}
            time.sleep(0.001)
    def __exit__(self, *_):
        self.on = False
        self.thread.join()
    def rise(self):
        return {key: self.peak[key] - self.before[key] for key in self.peak}

def report(model, memory):
    tensors = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    print(json.dumps({"model": sum(tensors.values()), **memory.rise()}))

folder, runs = sys.argv[1], json.loads(sys.argv[2])
torch.set_num_threads(1)
warm = folder + "/warm"  # what torch imports when it is first used is not the model's
save(Transformer(ModelConfig.load("tiny")).init_weights(), warm)
load(warm)
for config, options in runs:
    if config:
        with torch.device("meta"):
            model = Transformer(ModelConfig.load("tiny").replace(**config))
        model.to(torch.bfloat16).to_empty(device="cpu")
        with torch.no_grad():
            for tensor in [*model.parameters(), *model.buffers()]:
                tensor.fill_(0.5)
        with Peak() as memory:
            save(model, folder, **options)
    else:
        options = {key: getattr(torch, value) if key == "dtype" else value for key, value in options.items()}
        with Peak() as memory:
            model = load(folder, **options)
    report(model, memory)
    del model
"""


def child(folder: Path, *runs: tuple[dict, dict]) -> list[dict[str, int]]:
    """Each run is a configuration to save a model of, empty to load, and options; measures each."""
    command = [sys.executable, "-c", CHILD, str(folder), json.dumps(runs)]
    # With a fixed threshold malloc hands every large block back, so that one run is not served from the last.
    fixed = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=fixed)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def measure(folder: Path, config: dict, largest: int, slack: int, **save_options: int) -> None:
    """`largest` bytes of one stored tensor: the model and that much is all that may be held."""
    saving, loading, wider = child(folder, (config, save_options), ({}, {}), ({}, {"dtype": "float32"}))
    assert saving["RssAnon"] < largest + slack, saving
    assert 0.9 * loading["model"] < loading["RssAnon"] < loading["model"] + largest + slack, loading
    assert loading["VmRSS"] < loading["model"] + (256 << 20) + 2 * largest + slack, loading
    assert 1.99 < wider["model"] / loading["model"] < 2.01
    assert wider["RssAnon"] < wider["model"] + largest + slack, wider


def test_memory_stays_under_the_model_and_one_tensor(tmp_path):
    config = {"vocab_size": 8192, "hidden_size": 1024, "moe_intermediate_size": 512, "n_routed_experts": 16}
    measure(tmp_path, config, largest=8192 * 1024 * 2, slack=24 << 20, max_shard_bytes=40_000_000)


def test_dequantising_stays_under_the_model_and_one_tensor(make, write, tmp_path):
    config = ModelConfig.load("tiny").replace(hidden_size=1024, intermediate_size=8192, n_routed_experts=None)
    tensors = {}
    for name, slot in table(make(config, dtype=torch.bfloat16)).items():
        tensors[name] = slot.tensor
        if ".mlp." in name:
            rows, cols = slot.tensor.shape
            tensors[name] = slot.tensor.to(torch.float8_e4m3fn)
            tensors[name + "_scale_inv"] = torch.ones(-(-rows // 128), -(-cols // 128))
    write(tmp_path, config.replace(fp8=True).to_dict(), tensors)
    largest = 8192 * 1024 * 2
    for loading in child(tmp_path, ({}, {}), ({}, {"dtype": "float32"}), ({}, {"keep_fp8": True})):
        assert 0.9 * loading["model"] < loading["RssAnon"] < loading["model"] + largest + (24 << 20), loading


@pytest.mark.slow
def test_memory_on_several_gigabytes(tmp_path):
    config = {
        "vocab_size": 64000, "hidden_size": 2048, "intermediate_size": 8192, "moe_intermediate_size": 1024,
        "num_hidden_layers": 6, "n_routed_experts": 64, "q_lora_rank": 512, "kv_lora_rank": 256,
    }  # fmt: skip
    measure(tmp_path, config, largest=64000 * 2048 * 2, slack=64 << 20, max_shard_bytes=2_000_000_000)
    assert sum(f.stat().st_size for f in tmp_path.glob("*.safetensors")) > 4e9
