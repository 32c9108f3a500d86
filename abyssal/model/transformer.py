"""DeepSeek-V3: embedding, blocks, head; the whole forward pass on one screen."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from abyssal.config import ModelConfig
from abyssal.model.attention import GroupedAttention
from abyssal.model.cache import Cache, Leaves
from abyssal.model.experts import Gate, MoE, Routing
from abyssal.model.latent import LatentAttention
from abyssal.model.layers import MLP, Linear, RMSNorm
from abyssal.model.packing import Packing
from abyssal.model.positions import Rotary, added_positions, rotary
from abyssal.model.prediction import Prediction, PredictionModule, predict_further


class Block(nn.Module):
    """Attention, then a dense MLP or DeepSeekMoE, each on a normalised input and added to the stream."""

    def __init__(self, config: ModelConfig, experts: bool) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.attn_norm = RMSNorm(width, eps)
        self.attn = LatentAttention(config) if config.attention == "mla" else GroupedAttention(config)
        self.ffn_norm = RMSNorm(width, eps)
        self.ffn = MoE(config) if experts else MLP(width, config.intermediate_size)

    def forward(
        self,
        x: Tensor,
        angles: Rotary | None,
        packing: Packing,
        cache: dict[str, Tensor] | None = None,
        path: str | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """`x [T, D]` -> `[T, D]`, and what the gate decided where there is one."""
        x, normed = self.attn_norm.beside(x)
        x, y, routing = self.parts(x, normed, angles, packing, cache, path)
        return x + y, routing

    def parts(
        self,
        x: Tensor,
        normed: Tensor,
        angles: Rotary | None,
        packing: Packing,
        cache: dict[str, Tensor] | None = None,
        path: str | None = None,
    ) -> tuple[Tensor, Tensor, Routing | None]:
        """The stream after attention, what is yet to be added to it, and what the gate decided; `normed` is
        `attn_norm(x)`."""
        x, normed = self.ffn_norm.of_sum(x, self.attend(normed, angles, packing, cache, path))
        y = self.ffn(normed)
        y, routing = y if isinstance(y, tuple) else (y, None)
        return x, y, routing

    def attend(
        self, normed: Tensor, angles: Rotary | None, packing: Packing, cache: dict[str, Tensor] | None, path: str | None
    ) -> Tensor:
        """Attention, of each part by itself where the packing has several: one decodes, another is of prompts."""
        if not packing.parts:
            return cast(Tensor, self.attn(normed, angles, packing, cache, path))
        outs, start = [], 0
        for part in packing.parts:
            own = slice(start, start + part.positions.shape[0])
            turned = None if angles is None else Rotary(angles.cos[own], angles.sin[own])
            outs.append(self.attn(normed[own], turned, part, cache, path))
            start = own.stop
        return torch.cat(outs)


class Hidden(NamedTuple):
    """What the blocks make of a batch."""

    states: Tensor  # [T, D] after the final norm: what the head and the first MTP module read
    routings: list[Routing]  # one a layer with experts, first layer first


class Transformer(nn.Module):
    """The model. Its parameters are uninitialised until `init_weights`, `load` or `load_state_dict`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        dense = config.first_k_dense_replace if config.has_experts else config.num_hidden_layers
        # Not drawn at random, only to be overwritten.
        self.embed = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size), freeze=False)
        self.layers = nn.ModuleList(Block(config, l >= dense) for l in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.head.weight = cast(nn.Parameter, self.embed.weight)
        self.mtp = nn.ModuleList(
            PredictionModule(config, Block(config, config.mtp_has_experts))
            for _ in range(config.num_nextn_predict_layers)
        )
        self.stored: object = None  # what `abyssal.load` leaves here for `save`; nothing in model/ reads it

    def forward(self, tokens: Tensor, lengths: Sequence[int] | Tensor | Packing) -> Tensor:
        """`tokens [T]` int64, `lengths` of the packed sequences -> logits `[T, vocab]`, float32 or wider.

        Raises ValueError if the lengths do not sum to T.
        """
        return self.logits(self.hidden(tokens, Packing.of(lengths, tokens)).states)

    def hidden(self, tokens: Tensor, packing: Packing, cache: Cache | None = None, path: str | None = None) -> Hidden:
        """All but the head. With a cache, writes what the tokens leave behind and attends to what stands there."""
        x, angles = self.enter(tokens, packing), rotary(self.config, packing.positions)
        if cache is not None:
            return self.hidden_cached(x, angles, packing, cache, path)
        routings = []
        for layer in self.layers:
            x, routing = layer(x, angles, packing, None, path)
            if routing is not None:
                routings.append(routing)
        return Hidden(self.norm(x), routings)

    def hidden_cached(
        self, x: Tensor, angles: Rotary | None, packing: Packing, cache: Cache, path: str | None
    ) -> Hidden:
        """The blocks over a cache. What a block adds to the stream is added together with the norm that comes next,
        the next block's or the last: one pass over memory."""
        layers = cast(list[Block], list(self.layers))
        norms = [*(layer.attn_norm for layer in layers), self.norm]
        normed, routings = norms[0](x), []
        for layer, following, rows in zip(layers, norms[1:], cache.layers):
            x, y, routing = layer.parts(x, normed, angles, packing, rows, path)
            x, normed = following.of_sum(x, y)
            if routing is not None:
                routings.append(routing)
        return Hidden(normed, routings)

    def join(self) -> "Transformer":
        """For inference: maps that read the same input get their weights one behind the other in memory, and are one
        product. No number, name or shape changes; where weights are moved afterwards, the maps are separate again."""
        for module in self.modules():
            if isinstance(module, LatentAttention | MLP):
                module.join()
        return self

    def enter(self, tokens: Tensor, packing: Packing) -> Tensor:
        """[T, D]: the embeddings, and positions on top where they are added."""
        x = self.embed(tokens)
        added = added_positions(self.config, packing.positions, x.dtype)
        return x if added is None else x + added

    def logits(self, states: Tensor) -> Tensor:
        """`[T, D]` -> `[T, vocab]`, float32 or wider."""
        return self.head(states).to(torch.promote_types(states.dtype, torch.float32))

    def predict_states(
        self, states: Tensor, tokens: Tensor, packing: Packing, ahead: Sequence[tuple[Tensor, Tensor]] | None = None
    ) -> list[Prediction]:
        """The MTP modules in sequence over whole sequences, from the main model's states. `ahead` as in
        `predict_further`."""
        return predict_further(self, states, tokens, packing, ahead)

    def predict(self, tokens: Tensor, lengths: Sequence[int] | Tensor | Packing) -> list[Tensor]:
        """The MTP modules' logits, one `[T, vocab]` a module: row t of module d, from 1, predicts token t+1+d.
        Rows without the tokens they need are undefined."""
        packing = Packing.of(lengths, tokens)
        states = self.hidden(tokens, packing).states
        return [self.logits(p.states) for p in self.predict_states(states, tokens, packing)]

    def leaves(self) -> list[Leaves]:
        """What a token leaves behind in each layer, the MTP modules' after the main model's."""
        blocks = [*self.layers, *(module.block for module in self.mtp)]
        return [block.attn.leaves() for block in blocks]

    def gates(self) -> list[Gate]:
        """Every router, in the order of a training step's routings: the layers', then the MTP modules'."""
        return [m for m in self.modules() if isinstance(m, Gate)]

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> "Transformer":
        """Every matrix from N(0, initializer_range), norms at 1, router biases at 0 (DeepSeek-V3, section 4.2).

        One number is drawn from `generator`; it and a parameter's name make the parameter's own generator. So each can
        be drawn by itself, as a thread a core does here, and its numbers depend on no other's.
        """
        device = "cpu" if generator is None else generator.device
        seed = int(torch.randint(2**62, (), generator=generator, device=device))

        def draw(named: tuple[str, nn.Parameter]) -> None:
            name, p = named
            own = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8])
            with torch.no_grad():  # which each thread has of its own
                p.normal_(0.0, self.config.initializer_range, generator=torch.Generator(p.device).manual_seed(own))

        # The largest first, so that the last to end are small.
        drawn = sorted(self.named_parameters(), key=lambda named: -named[1].numel())
        threads = torch.get_num_threads() if all(p.device.type == "cpu" for _, p in drawn) else 1
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(draw, drawn))
        for module in self.modules():
            if isinstance(module, RMSNorm):
                module.weight.fill_(1.0)
            elif isinstance(module, Gate) and module.bias is not None:
                module.bias.zero_()
        return self

    def save(self, path: str | Path) -> None:
        """Writes a public-format folder. See `abyssal.checkpoint.save`."""
        from abyssal.checkpoint import save

        save(self, path)
