"""quantization_config of a checkpoint: which of its linears are stored in FP8, and in which scheme.

The format is compressed-tensors': groups of targets with a scheme each, and a list of what is left out. A target is
the name of a module, `re:` and a pattern that matches a name from its beginning, or the class Linear. Names go
before patterns, patterns before the class, and among equals the first in the alphabet counts. Whatever is not known
here is refused by name: a weight that is read in the wrong scheme is noise.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from gemcutter.checkpoint.fields import Fields
from gemcutter.checkpoint.files import CheckpointError

FORMATS = ("float-quantized", "naive-quantized")  # the latter where inputs are not quantised; stored alike
ARGUMENTS = {
    "num_bits", "type", "symmetric", "strategy", "dynamic", "group_size", "block_structure",
    "actorder", "observer", "observer_kwargs", "scale_dtype", "zp_dtype",
}  # fmt: skip
PER_TOKEN = "per token"
STATIC = "per tensor, static"
ONE_SCALE = ((), (1,), (1, 1))  # shapes in which exporters store it
CLASSES = ("Linear", "LinearBase")  # PyTorch's class, and vLLM's name for it


@dataclass(frozen=True)
class Scheme:
    """How a linear's weight is stored, and how its input is rounded before the product."""

    weights: str  # what has one scale: "channel", "tensor" or "block"
    activations: str | None  # PER_TOKEN, STATIC or other words for a message; None where they are not quantised
    block: tuple[int, int] | None = None  # rows and columns

    @property
    def runs(self) -> bool:
        """Whether there are products for it. A scale of a tensor is that of each of its channels."""
        return self.weights != "block" and self.activations == PER_TOKEN

    def scale_shapes(self, rows: int, columns: int) -> tuple[tuple[int, ...], ...]:
        """Shapes in which the scale of a weight [rows, columns] may be stored."""
        if self.block is not None:
            return ((-(-rows // self.block[0]), -(-columns // self.block[1])),)
        return ONE_SCALE if self.weights == "tensor" else ((rows, 1), (rows,))

    def __str__(self) -> str:
        weights = "blocks of {} x {}".format(*self.block) if self.block else self.weights
        return f"weights per {weights}, activations {self.activations or 'not quantised'}"


@dataclass(frozen=True)
class Quantization:
    """Schemes by targets, and what has none."""

    schemes: dict[str, Scheme]
    ignore: tuple[str, ...]
    kv_cache: bool  # the file also holds scales for an FP8 cache

    def scheme_of(self, names: Iterable[str]) -> Scheme | None:
        """Of a linear, by the names that exporters have for it; None where it is not quantised."""
        names = list(names)
        if _first(self.ignore, names) is not None:
            return None
        target = _first(self.schemes, names)
        return None if target is None else self.schemes[target]


def _first(targets: Iterable[str], names: list[str]) -> str | None:
    """The target that counts, of those that match a linear with these names."""
    by_rank = sorted(targets, key=lambda target: (target in CLASSES, target.startswith("re:"), target))
    return next((target for target in by_rank if target in CLASSES or _matches(target, names)), None)


def _matches(target: str, names: list[str]) -> bool:
    if target.startswith("re:"):
        pattern = re.compile(target.removeprefix("re:"))  # `re` keeps the compiled ones
        return any(pattern.match(name) for name in names)
    return target in names


def parse_quantization(*levels: Fields) -> Quantization | None:
    """From a config's levels, of which one at most may have a quantization_config; None where none has.

    Raises:
        CheckpointError: it is damaged, or asks for what we do not do.
    """
    given = [level for level in levels if level.get("quantization_config") is not None]
    if not given:
        return None
    if len(given) > 1:
        given[1].fail("quantization_config", f"stands in {given[0].where} too; keep one of them")
    config = given[0].object("quantization_config")
    if config.get("quant_method") != "compressed-tensors":
        config.fail("quant_method", "must be compressed-tensors; else use the checkpoint in bfloat16")
    _check_format(config)
    for name in ("sparsity_config", "transform_config"):
        inner = config.object(name) if config.get(name) is not None else Fields({}, "")
        if inner.get("config_groups") or inner.get("format", "dense") != "dense":
            config.fail(name, "asks for more than quantisation, which is not supported")
    groups = config.object("config_groups")
    schemes: dict[str, Scheme] = {}
    for name in groups.data:
        group = groups.object(name)
        scheme = _scheme(group)
        for target in _patterns(group, "targets"):
            if target.isidentifier() and target not in CLASSES and target != "lm_head":
                group.fail("targets", "may be names, patterns (re:) and the class Linear, the only one known here")
            if target in schemes:
                raise CheckpointError(f"{groups.where}: {target!r} is a target of two groups; drop it from one")
            schemes[target] = scheme
    if not schemes:
        config.fail("config_groups", "must name what is quantised")
    return Quantization(schemes, tuple(_patterns(config, "ignore")), config.get("kv_cache_scheme") is not None)


def _check_format(fields: Fields) -> None:
    if fields.get("format") is not None and fields.data["format"] not in FORMATS:
        fields.fail("format", f"must be {' or '.join(FORMATS)}, which are FP8; use the checkpoint in bfloat16")


def _patterns(fields: Fields, name: str) -> list[str]:
    values = fields.get(name) or []
    if type(values) is not list or any(type(value) is not str for value in values):
        fields.fail(name, "must be a list of names and patterns")
    for value in values:
        try:
            re.compile(value.removeprefix("re:") if value.startswith("re:") else "")
        except re.error as error:
            raise CheckpointError(
                f"{fields.where}: {name} holds {value!r:.80}, which is no pattern: {error}"
            ) from error
    return values


def _scheme(group: Fields) -> Scheme:
    _check_format(group)
    if group.get("output_activations") is not None:
        group.fail("output_activations", "must be null: outputs are not quantised here")
    weights = group.object("weights")
    strategy = _strategy(weights)
    if weights.get("dynamic", False) is not False:
        weights.fail("dynamic", "must be false: weights are quantised before they are stored")
    block = None
    if strategy == "block":
        block = weights.get("block_structure")
        if type(block) is not list or len(block) != 2 or any(type(n) is not int or n < 1 for n in block):
            weights.fail("block_structure", "must be two numbers, such as [128, 128]")
        block = tuple(block)
    elif strategy not in ("channel", "tensor"):
        weights.fail("strategy", "must be channel, tensor or block")
    if group.get("input_activations") is None:
        return Scheme(strategy, None, block)
    return Scheme(strategy, _activations(group.object("input_activations")), block)


def _activations(inputs: Fields) -> str:
    strategy, dynamic = _strategy(inputs), inputs.get("dynamic", False)
    known = {("token", True): PER_TOKEN, ("tensor", False): STATIC, ("tensor", True): "per tensor"}
    if strategy == "group" and dynamic is True:
        return f"per {inputs.size('group_size')} columns"
    if type(dynamic) is not bool or (strategy, dynamic) not in known:
        inputs.fail("strategy", f"must be token, tensor or group and fit dynamic, which is {dynamic!r:.20}")
    return known[strategy, dynamic]


def _strategy(arguments: Fields) -> str:
    """The strategy of FP8 arguments, said or implied; other arguments than FP8's are refused."""
    unknown = sorted(set(arguments.data) - ARGUMENTS)
    if unknown:
        arguments.fail(unknown[0], "is not known here")
    for name, default, wanted in (("num_bits", 8, 8), ("type", "int", "float"), ("symmetric", True, True)):
        if arguments.get(name, default) != wanted:
            arguments.fail(
                name, f"must be {str(wanted).lower()}: of quantised weights only FP8 (e4m3) is supported"
            )
    if arguments.get("actorder"):
        arguments.fail("actorder", "must be null: columns are not reordered")
    strategy, group = arguments.get("strategy"), arguments.get("group_size")
    if strategy is None:
        return "tensor" if group is None else "channel" if group == -1 else "group"
    if type(strategy) is not str:
        arguments.fail("strategy", "must be a word")
    return strategy
