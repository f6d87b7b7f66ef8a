"""EngineConfig: every choice a user has, frozen. Command-line flags derive from its fields, SGLang's names kept."""

from dataclasses import dataclass, field


def option(default, help: str, group: str = "engine", choices: tuple[str, ...] | None = None):
    """A config field with the text `--help` shows (units included) and the commands that offer it."""
    return field(default=default, metadata={"help": help, "group": group, "choices": choices})


# Integers and their bounds. A context holds a prompt and an answer, so 2 tokens or more. For each request that may
# run the host keeps a row of page ids, so their number needs a bound.
_COUNTS = {
    "context_length": (2, 2**31),
    "max_total_tokens": (1, 2**31),
    "chunked_prefill_size": (1, 2**31),
    "max_prefill_tokens": (1, 2**31),
    "max_running_requests": (1, 4096),
    "cuda_graph_max_bs": (0, 2**31),
    "port": (0, 65535),
    "max_body_bytes": (1, 2**63),
    "max_queued_requests": (1, 2**31),
}
PAGE_SIZES = (8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """`None` and "auto" are resolved once, at start, into a new object (`Engine.start`).

    Fields of group "engine" configure any use; fields of group "server" only `gemcutter serve`.
    """

    model_path: str = option("carat", "folder or hub id of the checkpoint; carat and carat-edge ship inside")
    revision: str | None = option(None, "branch, tag or commit of a hub checkpoint")
    device: str = option("auto", "auto, cpu, cuda or cuda:N; auto takes a GPU where there is one")
    dtype: str = option(
        "auto",
        "of weights and activations; auto: the checkpoint's own",
        choices=("auto", "bfloat16", "float16", "float32"),
    )
    kv_cache_dtype: str = option(
        "auto",
        "of the KV cache; auto: that of activations; fp8_e4m3: half the bytes, scales from the weights",
        choices=("auto", "bfloat16", "float16", "float32", "fp8_e4m3"),
    )
    load_format: str = option(
        "auto",
        "dummy makes random weights: matrices N(0, 0.02), vectors 1",
        choices=("auto", "safetensors", "dummy"),
    )
    quantization: str = option(
        "auto",
        "fp8 quantises the linears and experts of a checkpoint that is not quantised; auto: as they are stored",
        choices=("auto", "fp8"),
    )
    tensor_parallel_size: int = option(1, "GPUs that share the model; only 1 so far")
    context_length: int | None = option(
        None, "tokens of prompt and answer together; default: the model's, if the cache holds it"
    )
    mem_fraction_static: float = option(0.88, "share of the device's memory for weights and KV cache (GPU)")
    max_total_tokens: int | None = option(
        None, "tokens the full-attention cache holds; default: what memory allows"
    )
    page_size: int = option(16, "tokens per KV page; a power of two")
    chunked_prefill_size: int = option(8192, "tokens of one prompt prefilled in one step")
    max_prefill_tokens: int = option(8192, "prompt tokens of all requests prefilled in one step")
    max_running_requests: int | None = option(None, "requests in a step; default: 128 on a GPU, 16 on a CPU")
    cuda_graph_max_bs: int | None = option(None, "most rows of decoding that CUDA graphs hold; default: all")
    disable_cuda_graph: bool = option(False, "run every step eagerly")
    disable_radix_cache: bool = option(False, "no reuse of cached prefixes")
    random_seed: int = option(0, "seed of dummy weights and of requests that bring none")

    served_model_name: str | None = option(None, "name at the API; default: the model path", "server")
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 opens it to the network", "server")
    port: int = option(30000, "TCP port", "server")
    api_key: str | None = option(None, "require 'Authorization: Bearer KEY' on every route but /health", "server")
    max_body_bytes: int = option(32 * 2**20, "largest request body, bytes; more gets 413", "server")
    max_queued_requests: int = option(4096, "requests waiting or running; more gets 503", "server")

    def __post_init__(self) -> None:
        def require(good: bool, name: str, what: str) -> None:
            if not good:
                raise ValueError(f"{name} must be {what}, got {getattr(self, name)!r}")

        for name, spec in self.__dataclass_fields__.items():
            choices = spec.metadata["choices"]
            require(choices is None or getattr(self, name) in choices, name, f"one of {choices}")
        require(self.tensor_parallel_size == 1, "tensor_parallel_size", "1 so far")
        require(0.0 < self.mem_fraction_static < 1.0, "mem_fraction_static", "between 0 and 1")
        for name, (low, high) in _COUNTS.items():
            value = getattr(self, name)
            if value is not None or self.__dataclass_fields__[name].default is not None:
                require(type(value) is int, name, "an integer")
                require(low <= value <= high, name, f"in [{low}, {high}]")
        power = type(self.page_size) is int and self.page_size in PAGE_SIZES
        require(power, "page_size", "a power of two from 8 to 256")
        require(self.api_key != "", "api_key", "a key or left out")

    @property
    def reads_weights(self) -> bool:
        """Dummy weights need a config.json only; a hub checkpoint's files are then not fetched."""
        return self.load_format != "dummy"
