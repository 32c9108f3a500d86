"""The public checkpoint format, in and out: `config.json` and safetensors under Hugging Face's names.

`names` is the one table of names, in both directions; `shards` is one safetensors file; `folder` is which files make
up a checkpoint, and how a save takes their place; `reader` loads, `writer` saves. Weights are read from safetensors
alone: a pickle can run code.
"""

from abyssal.checkpoint.errors import CheckpointError
from abyssal.checkpoint.reader import load, local_folder
from abyssal.checkpoint.writer import save

__all__ = ["CheckpointError", "load", "local_folder", "save"]
