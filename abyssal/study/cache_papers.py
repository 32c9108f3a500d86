"""What the papers print of the cache, or what follows from it, row by row, and what counting says."""

from typing import NamedTuple

from abyssal.config import ModelConfig
from abyssal.costs import BF16, cache_bytes
from abyssal.study.cache_kinds import grouped, without_rotary_key

V2_TABLE = "DeepSeek-V2, table 1 (section 2.1.4)"
V2_ABLATION = "DeepSeek-V2, table 9 (appendix D.2)"
V2_ABSTRACT = "DeepSeek-V2, abstract and section 3.2.3"
V3_SHAPE = "these formulas, at DeepSeek-V3's shape"
INSIGHTS = "Insights into DeepSeek-V3, table 1"


class Row(NamedTuple):
    """A figure of a paper, and the same counted and rounded as it is there."""

    where: str
    what: str
    said: str
    counted: str
    exactly: float  # what was counted, not rounded

    @property
    def agrees(self) -> bool:
        return self.said == self.counted


def rows() -> list[Row]:
    """Every row. Shapes are those the papers' figures imply."""
    v2, v3 = ModelConfig.load("deepseek-v2"), ModelConfig.load("deepseek-v3")
    return [*_table(v2), *_ablation(v2), _against_67b(v2), *_ratios(v3), *_insights(v3)]


def _table(v2: ModelConfig) -> list[Row]:
    """The four formulas, evaluated by hand at V2's n_h 128, d_h 128, l 60, d_c 512, d_h^R 64, with 8 groups."""
    n_h, n_g, d_h, l, d_c, d_r = 128, 8, 128, 60, 512, 64
    formulas = [
        ("MHA: 2·n_h·d_h·l", 2 * n_h * d_h * l, grouped(v2, "mha")),
        ("GQA, 8 groups: 2·n_g·d_h·l", 2 * n_g * d_h * l, grouped(v2, "gqa", 8)),
        ("MQA: 2·d_h·l", 2 * d_h * l, grouped(v2, "mqa")),
        ("MLA: (d_c + d_h^R)·l", (d_c + d_r) * l, v2),
        ("MLA: 9/2·d_h·l", 9 * d_h * l // 2, v2),
    ]
    made = [_count(V2_TABLE, what, said, config) for what, said, config in formulas]
    groups = _elements(v2) / _elements(grouped(v2, "mqa"))
    return [*made, Row(V2_TABLE, "MLA keeps what GQA would with groups", "2.25", f"{groups:.2f}", groups)]


def _ablation(v2: ModelConfig) -> list[Row]:
    shapes = [("small", 27, 16, "110.6K", "15.6K"), ("large", 60, 56, "860.2K", "34.6K")]
    made = []
    for size, layers, heads, mha, mla in shapes:
        shape = v2.replace(num_hidden_layers=layers, num_attention_heads=heads)
        for what, said, config in (("MHA", mha, grouped(shape, "mha")), ("MLA", mla, shape)):
            n = _elements(config)
            what = f"{what}, {size}: {layers} layers of {heads}·128, elements"
            made.append(Row(V2_ABLATION, what, said, f"{n / 1000:.1f}K", n))
    return made


def _against_67b(v2: ModelConfig) -> Row:
    """DeepSeek 67B has 95 layers with 8 groups of keys and values of 128, in bf16; V2 keeps 6 bits an element."""
    before = 16 * _elements(grouped(v2, "gqa", 8).replace(num_hidden_layers=95))
    less = 1 - 6 * _elements(v2) / before
    return Row(V2_ABSTRACT, "V2 at 6 bits, less than DeepSeek 67B by", "93.3%", f"{less:.1%}", less)


def _ratios(v3: ModelConfig) -> list[Row]:
    mha = _elements(grouped(v3, "mha"))
    pairs = [("without the rotary key", "64", without_rotary_key(v3)), ("with it", "57", v3)]
    ratios = [(what, said, mha / _elements(config)) for what, said, config in pairs]
    return [Row(V3_SHAPE, f"MHA, times MLA {w}", s, f"{r:.0f}", r) for w, s, r in ratios]


def _insights(v3: ModelConfig) -> list[Row]:
    def gqa8(layers: int) -> ModelConfig:
        return grouped(v3, "gqa", 8).replace(num_hidden_layers=layers)

    models = [
        ("DeepSeek-V3, MLA", "70.272 KB", v3),
        ("Qwen-2.5 72B: GQA, 80 layers of 8·128", "327.680 KB", gqa8(80)),
        ("LLaMA-3.1 405B: GQA, 126 layers of 8·128", "516.096 KB", gqa8(126)),
    ]
    sizes = [(what, said, cache_bytes(config, 1, BF16)) for what, said, config in models]
    return [Row(INSIGHTS, f"{what}, bf16", said, f"{n / 1000:.3f} KB", n) for what, said, n in sizes]


def _count(where: str, what: str, said: int, config: ModelConfig) -> Row:
    n = _elements(config)
    return Row(where, what, f"{said:,}", f"{n:,}", n)


def _elements(config: ModelConfig) -> int:
    return cache_bytes(config, 1, 1)
