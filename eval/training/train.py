"""Train the probe model on the Python source of this machine and export it as an HF Llama.

    python eval/training/train.py --out build/probe --minutes 8

``--minutes`` bounds the whole run, data preparation and final checks included; the learning rate
follows the share of the time used, so that any budget ends with a finished model.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import corpus
import numpy as np
import torch
import torch.nn.functional as F
from model import ModelConfig, ProbeLlama, training_loss
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vllm_polarquant.eval.probe import episodes as ep

Logits = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    tokens_per_step: int = 131_072
    short_share: float = 0.25  # of the time, on short rows with few pairs: induction forms here
    short_episodes: float = 0.45  # of the rows of a batch
    long_episodes: float = 0.30
    matrix_lr: float = 5e-3
    other_lr: float = 4e-3
    weight_decay: float = 0.05
    warmup: float = 0.015
    decay_from: float = 0.35
    reserve_seconds: float = 30.0  # for the export and the final checks
    log_seconds: float = 20.0
    check_seconds: float = 60.0
    eval_row: int = 2048
    max_steps: int | None = None


def lr_scale(progress: float, config: TrainConfig) -> float:
    if progress < config.warmup:
        return max(progress / config.warmup, 0.01)
    return min(1.0, max(1.0 - progress, 0.0) / (1.0 - config.decay_from))


class Batches:
    """Rows of code and of episodes, gathered on the device that trains."""

    def __init__(self, scratch: Path, device: torch.device, seed: int) -> None:
        def load(name: str) -> Tensor:
            return torch.from_numpy(np.load(scratch / f"{name}.npy")).to(device)

        self.stream = load("stream")
        self.rows = {name: load(f"{name}_rows") for name in ("short", "long")}
        self.weights = {name: load(f"{name}_weights") for name in ("short", "long")}
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.order: dict[str, tuple[Tensor, int]] = {}

    def episode_indices(self, name: str, count: int) -> Tensor:
        """The next rows of a shuffled pass over all episode rows."""
        total = len(self.rows[name])
        order, at = self.order.get(name, (torch.empty(0, device=self.device), 0))
        if at + count > len(order):
            repeats = math.ceil(count / total)
            order = torch.cat(
                [torch.randperm(total, device=self.device, generator=self.generator) for _ in range(repeats)]
            )
            at = 0
        self.order[name] = (order, at + count)
        return order[at : at + count]

    def next(self, name: str, batch: int, share: float) -> tuple[Tensor, Tensor]:
        length = self.rows[name].shape[1]
        n_episodes = round(batch * share)
        starts = torch.randint(
            0,
            len(self.stream) - length,
            (batch - n_episodes, 1),
            device=self.device,
            generator=self.generator,
        )
        code = self.stream[starts + torch.arange(length, device=self.device)]
        code[:, 0] = corpus.BOUNDARY_ID  # every context begins with it, at inference too
        index = self.episode_indices(name, n_episodes)
        rows = torch.cat((code, self.rows[name][index])).long()
        weights = torch.cat((torch.ones_like(code, dtype=torch.uint8), self.weights[name][index]))
        return rows, weights


@contextlib.contextmanager
def attention_backend(backend: SDPBackend | None) -> Iterator[None]:
    if backend is None:
        yield
        return
    with sdpa_kernel([backend, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True):
        yield


def attention_seconds(backend: SDPBackend, config: ModelConfig, batch: int, length: int) -> float:
    """Time of one attention, forward and backward; infinite if the backend refuses it."""

    def heads(count: int) -> Tensor:
        return torch.randn(
            batch, count, length, config.head_dim, device="cuda", dtype=torch.bfloat16
        ).requires_grad_()

    q, k, v = heads(config.num_heads), heads(config.num_kv_heads), heads(config.num_kv_heads)
    try:
        with sdpa_kernel([backend]):
            for attempt in range(4):
                if attempt == 2:
                    torch.cuda.synchronize()
                    begun = time.monotonic()
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                out.sum().backward()
            torch.cuda.synchronize()
    except RuntimeError:
        return math.inf
    return (time.monotonic() - begun) / 2


def probe_step(step: Callable[..., Any], model: ProbeLlama, shapes: list[tuple[int, int]]) -> list[float]:
    """Loss and gradient norm of a fixed random batch of every shape."""
    results = []
    for batch, length in shapes:
        device = model.cos.device
        generator = torch.Generator(device).manual_seed(1)
        rows = torch.randint(
            0, model.config.vocab_size, (batch, length + 1), device=device, generator=generator
        )
        weights = torch.ones(batch, length + 1, dtype=torch.uint8, device=device)
        step(model, rows, weights)[0].backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        model.zero_grad(set_to_none=True)
        results += [norm.item()]
    return results


def choose_step(
    model: ProbeLlama, shapes: list[tuple[int, int]], use_compile: bool
) -> tuple[Callable[..., Any], SDPBackend | None, str]:
    """The fastest training step that agrees with the plain one on this machine."""
    device = model.cos.device
    if device.type != "cuda":
        if not use_compile:
            return training_loss, None, "eager"
        backends: list[SDPBackend | None] = [None]
    else:
        batch, length = shapes[-1]
        known = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
        seconds = {b: attention_seconds(b, model.config, batch, length) for b in known}
        print({b.name: f"{1e3 * t:.1f} ms" for b, t in seconds.items()}, flush=True)
        usable = [b for b in known if seconds[b] < math.inf]
        backends = [*sorted(usable, key=lambda b: seconds[b])] or [None]
    # With zero output projections no gradient reaches the attention: perturb them for the check.
    saved = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.normal_(std=0.02)
    reference_backend = SDPBackend.FLASH_ATTENTION if device.type == "cuda" else None
    with attention_backend(reference_backend):
        reference = probe_step(training_loss, model, shapes)
    chosen: tuple[Callable[..., Any], SDPBackend | None, str] | None = None
    for backend in backends if use_compile else []:
        begun = time.monotonic()
        try:
            torch.compiler.reset()
            compiled = torch.compile(training_loss, dynamic=False)
            with attention_backend(backend):
                found = probe_step(compiled, model, shapes)
        except Exception as error:
            print(f"compile with {backend}: {type(error).__name__}: {error}"[:600], flush=True)
            continue
        name = f"compiled, {backend.name if backend else 'default'}"
        print(
            f"{name}: {time.monotonic() - begun:.1f} s, gradient norms {found} against {reference}",
            flush=True,
        )
        close = all(abs(a - b) <= 0.02 * abs(b) for a, b in zip(found, reference, strict=True))
        if close:
            chosen = (compiled, backend, name)
            break
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(saved[name])
    return chosen or (training_loss, reference_backend, "eager")


def heldout_rows(tokenizer: Tokenizer, texts: list[str], length: int) -> tuple[Tensor, int]:
    """Held-out files in rows of ``length`` tokens, boundary first, and the characters covered."""
    rows, chars = [], 0
    for text in texts:
        encoding = tokenizer.encode(text, add_special_tokens=False)
        ids, offsets = encoding.ids, encoding.offsets
        step = length - 1
        for start in range(0, len(ids) - step + 1, step):
            rows.append([corpus.BOUNDARY_ID, *ids[start : start + step]])
            chars += offsets[start + step - 1][1] - offsets[start][0]
    return torch.tensor(rows), chars


@torch.no_grad()
def mean_loss(logits: Logits, rows: Tensor, device: torch.device, batch: int) -> float:
    total = 0.0
    for part in rows.split(batch):
        part = part.to(device)
        out = logits(part[:, :-1]).float()
        total += F.cross_entropy(out.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
    return total / (rows.shape[0] * (rows.shape[1] - 1))


@torch.no_grad()
def retrieval(
    logits: Logits,
    tokenizer: Tokenizer,
    rows: list[dict[str, Any]],
    device: torch.device,
    batch: int,
    per_episode: int | None = None,
) -> dict[str, float]:
    """Share of queries answered exactly, by nominal length.

    A query counts if every answer token, closing quote included, is the greedy choice given the
    ones before it: exactly then greedy decoding produces the answer.
    """
    hits: dict[str, list[bool]] = {}
    items = []
    for episode in rows:
        for prompt, answer, _ in ep.episode_prompts(episode)[:per_episode]:
            stem = tokenizer.encode(prompt).ids
            full = tokenizer.encode(prompt + answer + "'").ids
            if full[: len(stem)] != stem:
                raise RuntimeError("the prompt's tokens depend on the answer")
            items.append((f"{episode['length']}", full, len(stem)))
    items.sort(key=lambda item: len(item[1]))
    for begin in range(0, len(items), batch):
        group = items[begin : begin + batch]
        width = max(len(full) for _, full, _ in group)
        ids = torch.full((len(group), width), corpus.BOUNDARY_ID)
        for i, (_, full, _) in enumerate(group):
            ids[i, : len(full)] = torch.tensor(full)
        best = logits(ids.to(device)).argmax(-1).cpu()
        for i, (name, full, at) in enumerate(group):
            guess = best[i, at - 1 : len(full) - 1].tolist()
            hits.setdefault(name, []).append(guess == full[at:])
    return {name: sum(v) / len(v) for name, v in sorted(hits.items(), key=lambda kv: int(kv[0]))}


def export(out: Path, model: ProbeLlama) -> None:
    """The files that transformers and vLLM load, beside the tokenizer."""
    c = model.config
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": corpus.BOUNDARY_ID,
        "eos_token_id": corpus.BOUNDARY_ID,
        "pad_token_id": corpus.BOUNDARY_ID,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "hidden_size": c.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": c.intermediate_size,
        "max_position_embeddings": c.max_positions,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": c.num_heads,
        "num_hidden_layers": c.num_layers,
        "num_key_value_heads": c.num_kv_heads,
        "rms_norm_eps": c.norm_eps,
        "rope_parameters": {"rope_theta": c.rope_theta, "rope_type": "default"},
        "rope_theta": c.rope_theta,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": c.vocab_size,
    }
    generation = {
        "bos_token_id": corpus.BOUNDARY_ID,
        "eos_token_id": corpus.BOUNDARY_ID,
        "pad_token_id": corpus.BOUNDARY_ID,
    }
    tokenizer = {
        "bos_token": corpus.BOUNDARY,
        "eos_token": corpus.BOUNDARY,
        "pad_token": corpus.BOUNDARY,
        "clean_up_tokenization_spaces": False,
        "model_max_length": c.max_positions,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    for name, content in (
        ("config.json", config),
        ("generation_config.json", generation),
        ("tokenizer_config.json", tokenizer),
    ):
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tensors = {name: p.detach().to(torch.bfloat16).cpu().contiguous() for name, p in model.named_parameters()}
    path = out / "model.safetensors"
    save_file(tensors, str(path), metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes it for the owner alone


def check_export(
    out: Path,
    model: ProbeLlama,
    rows: Tensor,
    chars: int,
    queries: list[dict[str, Any]],
    batch: int,
) -> dict[str, Any]:
    """Load what was written as a user would, and measure that."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = model.cos.device
    hf = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).to(device).eval()
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    auto = AutoTokenizer.from_pretrained(out)
    text = queries[0]["prompt"]
    if auto(text)["input_ids"] != tokenizer.encode(text).ids:
        raise RuntimeError("AutoTokenizer and tokenizer.json disagree")
    if auto.decode(auto(text)["input_ids"], skip_special_tokens=True) != text:
        raise RuntimeError("the tokenizer does not return the text")

    def logits(ids: Tensor) -> Tensor:
        return hf(input_ids=ids).logits

    sample = rows[:4].to(device)
    with torch.no_grad():
        ours, theirs = model(sample).float(), logits(sample).float()
    error = ((ours - theirs).norm() / ours.norm()).item()
    same = (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()
    loss = mean_loss(logits, rows, device, batch)
    tokens = rows.shape[0] * (rows.shape[1] - 1)
    answers = retrieval(logits, tokenizer, queries, device, max(batch // 2, 1))
    return {
        "logits_relative_error": error,
        "logits_same_argmax": same,
        "heldout_perplexity": math.exp(loss),
        "heldout_bits_per_char": loss * tokens / chars / math.log(2),
        "heldout_tokens": tokens,
        "retrieval": answers,
        "retrieval_queries": sum(len(q["queries"]) for q in queries),
    }


def run(
    out: Path,
    minutes: float,
    seed: int,
    model_config: ModelConfig,
    data_config: corpus.CorpusConfig,
    config: TrainConfig,
    file_limit: int | None,
    use_compile: bool,
) -> None:
    begun = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    dtype = torch.bfloat16 if cuda else torch.float32
    shapes = [
        (max(config.tokens_per_step // length, 1), length)
        for length in (data_config.short_length, data_config.long_length)
    ]
    with tempfile.TemporaryDirectory() as folder:
        # A fresh process: it forks workers of its own, which must not happen beside CUDA.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            prepared = pool.submit(corpus.prepare, out, Path(folder), data_config, file_limit)
            model = ProbeLlama(model_config, dtype).to(device)
            step_loss, backend, how = choose_step(model, shapes, use_compile)
            print(f"step: {how} at {time.monotonic() - begun:.1f} s", flush=True)
            metrics: dict[str, Any] = {"data": prepared.result()}
        batches = Batches(Path(folder), device, seed)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    texts = [row["text"] for row in ep.load_heldout(out / "data" / "heldout.jsonl")]
    rows, chars = heldout_rows(tokenizer, texts, config.eval_row)
    queries = ep.load_episodes(out / "data" / "episodes.jsonl")
    eval_batch = 16 if cuda else 2
    # cuDNN plans every new shape afresh, and those of the checks vary.
    plain_backend = SDPBackend.FLASH_ATTENTION if cuda else None

    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() < 2 or "embed" in n]
    muon = torch.optim.Muon(
        matrices,
        lr=config.matrix_lr,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    adam = torch.optim.AdamW(others, lr=config.other_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=cuda)
    parameters = [*matrices, *others]

    first = time.monotonic()
    seconds = max(begun + 60 * minutes - config.reserve_seconds - first, 1.0)
    step = tokens = 0
    saved = False
    logged = checked = first
    logged_tokens = 0
    history: list[dict[str, Any]] = []
    parts: tuple[Tensor, Tensor, Tensor] | None = None
    while True:
        now = time.monotonic()
        progress = (now - first) / seconds
        if config.max_steps is not None:
            progress = max(progress, step / config.max_steps)
        if parts is not None and (now - logged > config.log_seconds or progress >= 1):
            total, plain, answer = (part.item() for part in parts)  # waits for the device
            now = time.monotonic()
            rate = (tokens - logged_tokens) / max(now - logged, 1e-9)
            entry: dict[str, Any] = {
                "seconds": round(now - first, 1),
                "step": step,
                "tokens": tokens,
                "tokens_per_second": round(rate),
                "loss": round(total, 4),
                "code_loss": round(plain, 4),
                "answer_loss": round(answer, 4),
            }
            if now - checked > config.check_seconds or progress >= 1:
                with attention_backend(plain_backend):
                    loss = mean_loss(model, rows, device, eval_batch)
                    found = retrieval(model, tokenizer, queries, device, eval_batch, 1)
                entry |= {"perplexity": round(math.exp(loss), 3), "retrieval": found}
                checked = time.monotonic()
            if not math.isfinite(total):
                raise RuntimeError(f"the loss is not finite: {entry}")
            history.append(entry)
            print(json.dumps(entry), flush=True)
            logged, logged_tokens = time.monotonic(), tokens
        if progress >= 1:
            break
        if progress >= 0.6 and not saved:
            export(out, model)  # something usable, should the rest be cut short
            saved = True
        short = progress < config.short_share
        batch, length = shapes[0 if short else 1]
        inputs, weights = batches.next(
            "short" if short else "long",
            batch,
            config.short_episodes if short else config.long_episodes,
        )
        scale = lr_scale(progress, config)
        for optimizer, lr in ((muon, config.matrix_lr), (adam, config.other_lr)):
            for group in optimizer.param_groups:
                group["lr"] = lr * scale
        with attention_backend(backend):
            loss_tensor, plain_loss, answer_loss = step_loss(model, inputs, weights)
            loss_tensor.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        muon.step()
        adam.step()
        model.zero_grad(set_to_none=True)
        parts = (loss_tensor.detach(), plain_loss, answer_loss)
        step += 1
        tokens += batch * length
        if cuda and step % 8 == 0:
            torch.cuda.synchronize()  # the clock must not run ahead of the device

    export(out, model)
    metrics |= {
        "parameters": sum(p.numel() for p in model.parameters()),
        "model_bytes": (out / "model.safetensors").stat().st_size,
        "steps": step,
        "tokens": tokens,
        "train_seconds": round(time.monotonic() - first, 1),
        "step_kind": how,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
        "seed": seed,
        "train_config": dataclasses.asdict(config),
        "history": history,
    }

    def write_metrics() -> None:
        metrics["total_seconds"] = round(time.monotonic() - begun, 1)
        (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")

    write_metrics()
    metrics["final"] = check_export(out, model, rows, chars, queries, eval_batch)
    write_metrics()
    print(json.dumps(metrics["final"]), flush=True)
    print(f"done in {metrics['total_seconds']} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0, help="wall time of the whole run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="a dry run of a minute on a CPU")
    args = parser.parse_args()
    model_config, config = ModelConfig(), TrainConfig()
    data_config, file_limit = corpus.CorpusConfig(seed=args.seed), None
    use_compile = not args.no_compile
    if args.tiny:
        model_config = ModelConfig(vocab_size=1024, hidden_size=64, intermediate_size=128, num_layers=2)
        config = dataclasses.replace(
            config,
            tokens_per_step=2048,
            reserve_seconds=10.0,
            log_seconds=4.0,
            check_seconds=8.0,
            eval_row=256,
            max_steps=30,
        )
        data_config = dataclasses.replace(
            data_config,
            vocab_size=1024,
            tokenizer_chars=1_500_000,
            heldout_chars=60_000,
            short_length=256,
            long_length=1024,
            short_tokens=40_000,
            long_tokens=80_000,
            eval_tokens=(300, 600, 900),
            eval_pairs=(6, 12, 20),
            eval_episodes=2,
            eval_queries=2,
            workers=2,
        )
        file_limit = 300
        use_compile = False
    run(
        args.out,
        args.minutes,
        args.seed,
        model_config,
        data_config,
        config,
        file_limit,
        use_compile,
    )


if __name__ == "__main__":
    main()
