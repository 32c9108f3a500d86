"""Memory while loading and saving, sampled in a process of its own.

RssAnon is what the process allocated; RssFile is what is mapped of the files: the page cache's, the kernel may take it
back, and we let go of it every 256 MB.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

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

verb, folder, config, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
torch.set_num_threads(1)
if verb == "make":
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
    warm = folder + "/warm"  # what torch imports when it is first used is not the model's
    save(Transformer(ModelConfig.load("tiny")).init_weights(), warm)
    load(warm)
    with Peak() as memory:
        model = load(folder, **options)
tensors = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
print(json.dumps({"model": sum(tensors.values()), **memory.rise()}))
"""


def child(verb: str, folder: Path, config: dict, options: dict) -> dict[str, int]:
    command = [sys.executable, "-c", CHILD, verb, str(folder), json.dumps(config), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def measure(folder: Path, config: dict, largest: int, slack: int, **save_options: int) -> None:
    """`largest` bytes of one stored tensor: the model and that much is all that may be held."""
    saving = child("make", folder, config, save_options)
    assert saving["RssAnon"] < largest + slack, saving
    loading = child("load", folder, {}, {})
    assert 0.9 * loading["model"] < loading["RssAnon"] < loading["model"] + largest + slack, loading
    assert loading["VmRSS"] < loading["model"] + (256 << 20) + 2 * largest + slack, loading
    wider = child("load", folder, {}, {"dtype": "float32"})
    assert 1.99 < wider["model"] / loading["model"] < 2.01
    assert wider["RssAnon"] < wider["model"] + largest + slack, wider


def test_memory_stays_under_the_model_and_one_tensor(tmp_path):
    config = {"vocab_size": 8192, "hidden_size": 1024, "moe_intermediate_size": 512, "n_routed_experts": 16}
    measure(tmp_path, config, largest=8192 * 1024 * 2, slack=24 << 20, max_shard_bytes=40_000_000)


def test_dequantising_stays_under_the_model_and_one_tensor(tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    size = {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 3, "n_routed_experts": None}
    child("make", tmp_path, size, {})
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [n for n in tensors if ".mlp." in n]:
        rows, cols = tensors[name].shape
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[name + "_scale_inv"] = torch.ones(-(-rows // 128), -(-cols // 128))
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    largest = 8192 * 1024 * 2
    for options in ({}, {"dtype": "float32"}, {"keep_fp8": True}):
        loading = child("load", tmp_path, {}, options)
        assert loading["RssAnon"] < loading["model"] + largest + (24 << 20), (options, loading)


@pytest.mark.slow
def test_memory_on_several_gigabytes(tmp_path):
    config = {
        "vocab_size": 64000, "hidden_size": 2048, "intermediate_size": 8192, "moe_intermediate_size": 1024,
        "num_hidden_layers": 6, "n_routed_experts": 64, "q_lora_rank": 512, "kv_lora_rank": 256,
    }  # fmt: skip
    measure(tmp_path, config, largest=64000 * 2048 * 2, slack=64 << 20, max_shard_bytes=2_000_000_000)
    assert sum(f.stat().st_size for f in tmp_path.glob("*.safetensors")) > 4e9
