"""Requests in, tokens out: the latent cache, the decoding step, sampling and speculation."""

from abyssal.engine.llm import LLM
from abyssal.engine.request import Output, Piece, Totals
from abyssal.engine.sampling import Sampling

__all__ = ["LLM", "Output", "Piece", "Sampling", "Totals"]
