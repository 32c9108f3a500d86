"""What a figure was measured on: the device's name, and the versions of what matters."""

import platform

import torch


def device_name(device: str | torch.device) -> str:
    """Of a GPU, or of the processor."""
    cuda = torch.device(device).type == "cuda"
    return torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine()


def versions(cuda: bool) -> dict[str, str | None]:
    """Python's, torch's, Triton's, and CUDA's and cuDNN's on a GPU; None where there is none."""
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": str(torch.__version__)}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    found["cuda"] = torch.version.cuda if cuda else None
    cudnn = torch.backends.cudnn.version() if cuda else None
    found["cuDNN"] = str(cudnn) if cudnn else None
    return found
