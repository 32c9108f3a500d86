"""The parts of a model that gradients are told by."""

PARTS = ("embedding", "attention", "experts", "shared experts", "dense", "router", "norms", "head", "prediction")


def part_of(name: str) -> int:
    """The place in PARTS of a parameter of `Transformer`, by its name."""
    pieces = name.split(".")
    if pieces[0] == "mtp":
        part = "prediction"
    elif pieces[0] in ("embed", "head"):
        part = {"embed": "embedding", "head": "head"}[pieces[0]]
    elif any("norm" in piece for piece in pieces):
        part = "norms"
    elif "attn" in pieces:
        part = "attention"
    else:
        inner = {"gate": "router", "experts": "experts", "shared_experts": "shared experts"}
        part = next((inner[piece] for piece in pieces if piece in inner), "dense")
    return PARTS.index(part)
