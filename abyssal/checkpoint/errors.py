"""What is wrong with a checkpoint."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read as it stands: names the file, the tensor and what was expected."""
