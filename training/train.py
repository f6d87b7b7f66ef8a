"""Train one of the models with HF's own Gemma 4 modules on one GPU.

The modules hold bf16 weights, as they will when served; the optimiser keeps
fp32 masters and rounds them after every step. So the forward pass that is
trained is the one that is shipped, and rounding at the end costs nothing.

    python training/train.py carat CORPUS.npy OUT_DIR
"""

import argparse
import hashlib
import math
import os
import time
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Gemma4ForCausalLM, Gemma4TextConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import shapes
import tokenizer
from corpus import SAID

ROWS = 64
PEAK = 2e-3
WARMUP = 200
DECAY = 0.05
BALANCE = 0.01
BOS = tokenizer.CONTROL["<bos>"]


def all_experts(self: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Run every expert on every token and weight the unchosen ones zero.

    Experts this small cost little to run in vain, as two plain GEMMs; and as
    nothing is gathered or scattered, the backward pass is deterministic.
    """
    chosen = F.one_hot(index, self.num_experts)  # [tokens, k, experts]
    share = (chosen * weights[..., None]).sum(1)  # [tokens, experts] float32
    self.load = share.mean(0)
    gate_up = F.linear(hidden, self.gate_up_proj.flatten(0, 1)).unflatten(-1, (self.num_experts, -1))
    gate, up = gate_up.chunk(2, dim=-1)
    inner = self.act_fn(gate) * up * share[..., None].to(hidden.dtype)
    return F.linear(inner.flatten(1), self.down_proj.permute(1, 0, 2).flatten(1))


ALL_EXPERTS_FUNCTIONS.register("all_experts", all_experts)


def build(name: str) -> Gemma4ForCausalLM:
    """The untrained model, in bf16."""
    config = Gemma4TextConfig(**{k: v for k, v in shapes.SHAPES[name].items() if k not in ("model_type", "dtype")})
    config._attn_implementation = "eager"
    config._experts_implementation = "all_experts"
    model = Gemma4ForCausalLM(config)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if key.endswith(("q_norm.weight", "k_norm.weight")):
                # Scores are not divided by √head_dim in Gemma 4: the norms carry that scale.
                value.fill_(value.shape[0] ** -0.25)
            elif "router.proj" in key:
                value.normal_(std=0.5)
            elif value.dim() > 1:
                value.normal_(std=shapes.COMMON["hidden_size"] ** -0.5)
            elif "post_" in key and "layernorm." in key:
                value.fill_(0.5)
        for layer in model.model.layers:
            # Not trained, and not 1, so that an engine that forgets it gives wrong answers.
            layer.layer_scalar = torch.tensor([0.75 if layer.layer_idx % 2 else 0.875], dtype=torch.bfloat16)
        # Not model.to(bfloat16): that would round the RoPE frequencies too, which HF keeps in fp32.
        for weight in model.parameters():
            weight.data = weight.data.to(torch.bfloat16)
    return model


def masks(tokens: Tensor, window: int) -> tuple[dict[str, Tensor], Tensor]:
    """Additive masks [rows, 1, length, length] and positions [rows, length] of packed chats."""
    length = tokens.shape[1]
    place = torch.arange(length, device=tokens.device)
    starts = torch.where(tokens == BOS, place, 0).cummax(dim=1).values  # [rows, length]: where my chat begins
    distance = place[:, None] - place[None, :]
    full = (distance >= 0) & (starts[:, :, None] == starts[:, None, :])
    sliding = full & (distance < window)
    floor = torch.finfo(torch.bfloat16).min
    additive = {
        kind: torch.where(seen, 0.0, floor).to(torch.bfloat16)[:, None]
        for kind, seen in ((shapes.FULL, full), (shapes.SLIDING, sliding))
    }
    return additive, place - starts


def losses(model: Gemma4ForCausalLM, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the tokens the model says, and the experts' imbalance (1 is even)."""
    tokens, said = rows & (SAID - 1), rows >= SAID
    mask, positions = masks(tokens, model.config.sliding_window)
    hidden = model.model(tokens, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
    cap = model.config.final_logit_softcapping
    logits = cap * torch.tanh(model.lm_head(hidden[:, :-1]).float() / cap)
    each = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    wanted = said[:, 1:].flatten()
    loss = (each * wanted).sum() / wanted.sum()
    loads = [layer.experts.load for layer in model.model.layers if layer.enable_moe_block]
    imbalance = sum(len(load) * (load / load.sum()).square().sum() for load in loads) / max(1, len(loads))
    return loss, torch.as_tensor(imbalance, device=loss.device)


def rate(step: int, steps: int) -> float:
    """Learning rate relative to its peak: a linear warm-up, then half a cosine."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / max(1, steps - WARMUP)))


def batches(corpus: Path, steps: int, seed: int, device: str):
    """Rows in a shuffled order, reshuffled whenever all have been read."""
    rows = np.load(corpus, mmap_mode="r")
    rng = np.random.default_rng(seed)
    order = np.empty(0, dtype=np.int64)
    for _ in range(steps):
        if len(order) < ROWS:
            order = rng.permutation(len(rows))
        taken, order = order[:ROWS], order[ROWS:]
        yield torch.from_numpy(rows[np.sort(taken)].astype(np.int64)).to(device, non_blocking=True)


def train(model: Gemma4ForCausalLM, data, steps: int, device: str) -> None:
    """AdamW on fp32 masters; the modules see them rounded to bf16."""
    weights = [p for p in model.parameters() if p.requires_grad]
    masters = [w.detach().float() for w in weights]
    groups = [
        {"params": [m for m in masters if m.dim() > 1], "weight_decay": DECAY},
        {"params": [m for m in masters if m.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.98), fused=device == "cuda")
    run = torch.compile(losses) if device == "cuda" else losses
    began = time.perf_counter()
    for step, rows in enumerate(data):
        loss, imbalance = run(model, rows)
        (loss + BALANCE * imbalance).backward()
        for master, weight in zip(masters, weights, strict=True):
            master.grad = weight.grad.float()
            weight.grad = None
        norm = nn.utils.clip_grad_norm_(masters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = PEAK * rate(step, steps)
        optimizer.step()
        torch._foreach_copy_([w.data for w in weights], masters)
        if step % 100 == 0 or step == steps - 1:
            spent = time.perf_counter() - began
            print(
                f"step {step:6d}  loss {loss.item():.4f}  imbalance {imbalance.item():.2f}"
                f"  gradient {norm.item():.3f}  weights {digest(weights)}  {spent:.0f} s",
                flush=True,
            )


def digest(tensors: list[Tensor]) -> str:
    """A fingerprint of weights: two runs that print the same one trained alike."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().float().cpu().numpy().tobytes())
    return sha.hexdigest()[:16]


def save(model: Gemma4ForCausalLM, name: str, folder: Path) -> str:
    """Write an HF checkpoint with released Gemma 4's tensor names; returns the weights' SHA-256."""
    tokenizer.save(folder)
    shapes.save(name, folder)
    tensors = {
        f"model.language_model.{key.removeprefix('model.')}": value.detach().cpu().contiguous()
        for key, value in model.state_dict().items()
        if key != "lm_head.weight"  # tied to embed_tokens
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=shapes.SHAPES)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(True)
    # Tuning kernels by the clock would pick other summation orders on another day.
    torch._inductor.config.deterministic = True
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(args.model).to(device)
    train(model, batches(args.corpus, args.steps, args.seed, device), args.steps, device)
    print("sha256", save(model, args.model, args.out))


if __name__ == "__main__":
    main()
