"""The peers: which of them are here, and how to get at one that may not be."""

import importlib
import importlib.metadata
import importlib.util
import os
from types import ModuleType

from abyssal.bench.case import NotInstalled

# The module to import, and the distributions that bring it.
PEERS = {
    "FlashMLA": ("flash_mla", ("tokenspeed-flashmla", "flash-mla", "flash_mla")),
    "FlashInfer": ("flashinfer", ("flashinfer-python",)),
    "liger-kernel": ("liger_kernel", ("liger-kernel", "liger_kernel")),
}


def module(peer: str, name: str | None = None) -> ModuleType:
    """A peer's module, or the named one of its modules. Raises NotInstalled."""
    package = PEERS[peer][0]
    if importlib.util.find_spec(package) is None:
        raise NotInstalled(peer)
    # FlashInfer asks the device otherwise, once for each architecture that its nvcc knows.
    os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", "9.0a")
    return importlib.import_module(name or package)


def versions() -> dict[str, str | None]:
    """Each peer's version, "?" where it has none, None where it is not installed."""
    return {peer: _version(*found) for peer, found in PEERS.items()}


def _version(package: str, distributions: tuple[str, ...]) -> str | None:
    if importlib.util.find_spec(package) is None:
        return None
    for distribution in distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "?"
