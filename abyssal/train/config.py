"""A training run's configuration: one flat, checked list of settings, read from TOML or JSON and the command line."""

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from abyssal.config import ConfigError, ModelConfig, preset_names
from abyssal.public_config import read_rope_scaling
from abyssal.train.recompute import OPERATIONS
from abyssal.train.recompute import parse as parse_operations

SAVED = "train.json"  # the configuration in the run's folder

Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Moment = Annotated[float, Field(ge=0, lt=1)]


class TrainConfig(BaseModel):
    """Defaults are DeepSeek-V3's (section 4.2), as fractions of the run where the report counts tokens."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    # What is trained, on what, and where it goes.
    model: str  # a preset's name, a folder with a config.json, or such a file
    model_overrides: dict[str, Any] = {}  # fields of ModelConfig
    data: Path | None = None  # text, or a token set; None: the Python standard library's sources
    data_max_bytes: Count | None = None  # UTF-8 text beyond it is left out
    tokenizer: Path | None = None  # None: a byte-level BPE of the model's vocab_size, trained on the data
    out: Path  # the run's folder

    # How much of it at a time.
    steps: Count  # optimizer steps of the whole run
    batch_tokens: Count = 4096  # tokens a microbatch
    accumulate: Count = 1  # microbatches a step, over all devices
    sequence: Count = 512  # tokens of the longest packed sequence

    # The optimizer.
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: Positive = 2.2e-4
    betas: tuple[Moment, Moment] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.1
    clip: Positive | None = 1.0  # the gradient's largest norm over all parameters
    warmup_steps: Whole = 0
    decay: Literal["cosine", "linear", "sqrt"] = "cosine"
    decay_fraction: Fraction = 0.3  # of the run, at its end; between warm-up and decay the rate is constant
    final_lr: NotNegative = 0.0

    # The losses beside the main one, and the balance of the experts.
    mtp_weight: NotNegative = 0.3
    mtp_weight_late: NotNegative = 0.1
    mtp_late_fraction: Fraction = 1 / 3  # of the run, at its end
    bias_speed: NotNegative = 0.001  # of the auxiliary-loss-free update
    bias_freeze_fraction: Fraction = 0.034  # of the run, at its end, in which the biases stand still
    sequence_balance: NotNegative = 0.0001  # alpha of the sequence-wise loss
    auxiliary_balance: NotNegative = 0.0  # alpha of the classic loss; taken over each microbatch by itself

    # How it is computed.
    seed: Whole = 0
    device: str | None = None  # None: "cuda" if there is one, else "cpu"
    dtype: Literal["float32", "bfloat16", "float64"] | None = None  # None: bfloat16 on GPUs, float32 on CPUs
    recompute: str = "none"  # "none", "block", or operations: "up,attention" (see abyssal.train.recompute)
    compile: bool = False  # blocks, by torch.compile; recompute is then "none" or "block"
    graphs: bool = True  # on a GPU: passes are captured as CUDA graphs where nothing in them waits for it
    fp8: bool = False  # products of the large dense maps, forward and backward, in FP8 (see abyssal.train.fp8)

    # Over how many devices, under torchrun, and how: none of it alters the curve but in its last bits.
    mesh: str = ""  # "dp=2,ep=2": see abyssal.parallel.mesh
    reshard: bool = True  # a block's parameters are dropped between its forward and its backward
    schedule: Literal["gpipe", "1f1b", "interleaved", "zbv", "dualpipev"] = "1f1b"  # of the pipeline's microbatches

    # What is told and kept.
    log_every: Count = 10
    validate_every: Count = 100
    validation_tokens: Count = 65536  # at most so many of the validation split, from its beginning
    save_every: Count = 500
    keep_states: Count = 2
    track: list[Literal["tensorboard", "trackio", "wandb"]] = []  # told to these as well
    profile: bool = False  # a few early steps, into out/profile

    @classmethod
    def read(cls, file: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Reads a packaged run by its name, a TOML or JSON file, or the file saved in a run's folder.

        Each override is `KEY=VALUE` or `model.KEY=VALUE`, the value in JSON or, failing that, plain text.
        Raises FileNotFoundError if there is no such file, ConfigError naming the key otherwise.
        """
        settings = _read_file(file)
        if Path(file).is_dir():
            settings["out"] = str(file)  # the folder may have been moved
        override(settings, overrides)
        return cls.of(settings, where=str(file))

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """What settings are where nobody sets them, as `to_dict` has them; without those that must be set."""
        required = {name for name, field in cls.model_fields.items() if field.is_required()}
        return cls.of({"model": "", "out": "", "steps": 1}).model_dump(mode="json", exclude=required)

    @classmethod
    def of(cls, settings: dict[str, Any], where: str = "config") -> Self:
        """Checks plain settings. Raises ConfigError naming the key, and the nearest one if it is unknown."""
        for key in settings:
            _known(key, cls.model_fields, where)
        try:
            # As JSON, where a list is a tuple and a string a path, and "8" is still not an 8.
            config = cls.model_validate_json(json.dumps(settings))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise ConfigError(f"{where}: {key}: {first['msg']}, got {first['input']!r}") from None
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{where}: {error}") from None
        if config.warmup_steps + round(config.steps * config.decay_fraction) > config.steps:
            raise ConfigError(
                f"{where}: warmup_steps: {config.warmup_steps} and a decay over {config.decay_fraction:g} of "
                f"{config.steps} steps do not fit into the run"
            )
        operations = parse_operations(config.recompute)
        if config.compile and operations and operations != frozenset(OPERATIONS):
            raise ConfigError(
                f"{where}: recompute: {config.recompute!r} looks at every operation of a block, and what is compiled "
                "has none to be seen; with compile, expected 'none' or 'block'"
            )
        for key in config.model_overrides:
            _known(key, [f.name for f in dataclasses.fields(ModelConfig) if f.name != "source"], where, "model.")
        return config

    def model_settings(self) -> ModelConfig:
        """The model's configuration, overrides applied. Raises ConfigError naming the key."""
        types = {f.name: f.type for f in dataclasses.fields(ModelConfig)}
        changes: dict[str, Any] = {}
        for key, value in self.model_overrides.items():
            try:
                if key == "rope_scaling" and isinstance(value, dict):  # as a config.json's is read
                    changes[key] = read_rope_scaling(value)
                else:
                    changes[key] = TypeAdapter(cast(type, types[key])).validate_python(value, strict=True)
            except ConfigError as error:
                raise ConfigError(f"model.{error}") from None
            except ValidationError as error:
                raise ConfigError(f"model.{key}: {error.errors()[0]['msg']}, got {value!r}") from None
        try:
            return ModelConfig.load(self.model).replace(**changes)
        except ConfigError as error:
            raise ConfigError(f"model: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain settings, as JSON has them; `of` reads them back."""
        plain: dict[str, Any] = self.model_dump(mode="json")
        return plain

    def anchored(self) -> Self:
        """A copy whose paths mean the same from any working directory."""
        paths = {key: Path(value).absolute() for key in ("data", "tokenizer", "out") if (value := getattr(self, key))}
        named = self.model in preset_names() or not Path(self.model).exists()  # a preset comes before a folder
        model = self.model if named else str(Path(self.model).absolute())
        return self.model_copy(update={**paths, "model": model})


def override(settings: dict[str, Any], overrides: Sequence[str]) -> None:
    """Takes each `KEY=VALUE` or `model.KEY=VALUE`, the value in JSON or, failing that, plain text, into plain settings.
    Raises ConfigError for another form."""
    inner = settings.get("model_overrides")
    changed: dict[str, Any] = dict(inner) if isinstance(inner, dict) else {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {text!r}: expected KEY=VALUE")
        where, name = (changed, key.removeprefix("model.")) if key.startswith("model.") else (settings, key)
        where[name] = _parse(value)
    if changed:
        settings["model_overrides"] = changed


def run_names() -> list[str]:
    """Names of the runs that come with the package."""
    files = resources.files("abyssal").joinpath("presets").iterdir()
    return sorted(f.name.removesuffix(".toml") for f in files if f.name.endswith(".toml"))


def _read_file(file: str | Path) -> dict[str, Any]:
    path = Path(file)
    if str(file) in run_names():
        name, text = f"{file}.toml", resources.files("abyssal").joinpath("presets", f"{file}.toml").read_text()
    else:
        path = path / SAVED if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"{file}: neither a run of the package ({', '.join(run_names())}), nor a file "
                                    f"in TOML or JSON, nor a run's folder with its {SAVED}")  # fmt: skip
        name, text = path.name, path.read_text("utf-8")
    try:
        settings = tomllib.loads(text) if name.endswith(".toml") else json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{file}: malformed: {error}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{file}: expected an object, got {type(settings).__name__}")
    return settings


def _parse(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


def _known(key: str, keys: Iterable[str], where: str, prefix: str = "") -> None:
    known = list(keys)
    if key in known:
        return
    near = difflib.get_close_matches(key, known, 1, 0.5)
    hint = f"; did you mean {prefix + near[0]!r}?" if near else f"; expected one of {', '.join(sorted(known))}"
    raise ConfigError(f"{where}: unknown key {prefix + key!r}{hint}")
