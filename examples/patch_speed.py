"""Kernel launches and time of a decode step, patched and not: python examples/patch_speed.py [--config config.json]

Random weights at the shapes of an HF config, nested or of the text model alone; without one, carat's. On a CPU the
ops run their plain PyTorch references: time says nothing there, and operators are counted in place of launches.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, Gemma4ForCausalLM, Gemma4TextConfig

import gemcutter
from gemcutter.checkpoint.files import locate


def build(config: Path, layers: int | None, attention: str, experts: str, device: str) -> Gemma4ForCausalLM:
    fields = json.loads(config.read_text())
    fields = fields.get("text_config", fields)
    if layers is not None:
        fields |= {
            "num_hidden_layers": layers,
            "layer_types": fields["layer_types"][:layers],
            "num_kv_shared_layers": 0,
        }
    made = Gemma4TextConfig(**fields)
    made._attn_implementation, made._experts_implementation = attention, experts
    torch.manual_seed(0)
    with torch.device(device):
        return Gemma4ForCausalLM._from_config(made, dtype=torch.bfloat16).eval()


class Decoding:
    """A batch behind its prompt: one token more a step."""

    def __init__(self, model: Gemma4ForCausalLM, batch: int, context: int):
        self.model, self.cache = model, DynamicCache(config=model.config)
        ids = torch.randint(3, model.config.vocab_size, (batch, context), device=model.device)
        self.token = self.next(ids)

    def next(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids, past_key_values=self.cache, logits_to_keep=1).logits[:, -1:].argmax(-1)

    def step(self) -> None:
        self.token = self.next(self.token)


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def launches(decoding: Decoding) -> int:
    """Kernels, copies and fills that one step puts on the GPU; on a CPU the operators that it calls."""
    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as recorded:
        decoding.step()
        wait()
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    events = [event for event in recorded.events() if event.device_type == kind]
    return len(events if on_gpu else [event for event in events if event.cpu_parent is None])


def milliseconds(decoding: Decoding, steps: int) -> list[float]:
    times = []
    for _ in range(steps):
        wait()
        begin = time.perf_counter()
        decoding.step()
        wait()
        times.append(1e3 * (time.perf_counter() - begin))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=locate("carat") / "config.json")
    parser.add_argument("--layers", type=int, help="only the first so many, each with K and V of its own")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20, help="a round; there are four rounds of each")
    parser.add_argument("--attention", default="sdpa", help="HF's attn_implementation")
    parser.add_argument("--experts", default="grouped_mm", help="HF's experts_implementation")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(args.config, args.layers, args.attention, args.experts, device)
    changes = {"HF": gemcutter.unpatch, "patched": gemcutter.patch}
    counts, times = {}, {name: [] for name in changes}
    with torch.inference_mode():
        for name, change in changes.items():
            change(model)
            decoding = Decoding(model, args.batch, args.context)
            milliseconds(decoding, 3)  # kernels are compiled on their first use
            counts[name] = launches(decoding)
        for _ in range(4):
            for name, change in changes.items():  # in turn, so that a slower clock meets both
                change(model)
                decoding = Decoding(model, args.batch, args.context)
                times[name] += milliseconds(decoding, 1 + args.steps)[1:]  # the first still warms up
    what = "launches" if device == "cuda" else "operators"
    layers = model.config.num_hidden_layers
    print(f"{args.config}: {layers} layers, batch {args.batch}, context {args.context}, {device}")
    for name in changes:
        print(f"{name:8} {counts[name]:6} {what} a step, {counts[name] / layers:6.1f} a layer, "
              f"{statistics.median(times[name]):8.3f} ms a step")  # fmt: skip


if __name__ == "__main__":
    main()
