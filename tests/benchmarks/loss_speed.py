"""The sparse token loss against soft cross-entropy with a dense target, side by side: time and memory.

    python tests/benchmarks/loss_speed.py

B = 64, N = 196, K = 1000, m = 5. The dense way scatters the same targets into (B, N, K) and takes torch's soft
cross-entropy, as the older systems do; making the dense target is not counted on its side.
"""

import argparse
import statistics
import time
from functools import partial

import torch
import torch.nn.functional as F
from torch_peak import torch_peak_mib

from stl_offline.device import keep_freed_memory
from stl_offline.losses import token_cross_entropy


def sparse(logits, ids, weights, dense):
    return token_cross_entropy(logits, ids, weights, 0.1)


def dense_way(logits, ids, weights, dense):
    return F.cross_entropy(logits.flatten(0, 1), dense.flatten(0, 1), label_smoothing=0.1)


def step(loss, arguments) -> tuple[float, torch.Tensor]:
    """Seconds and the logits' gradient of one forward and backward."""
    arguments[0].grad = None
    started = time.process_time()
    loss(*arguments).backward()
    return time.process_time() - started, arguments[0].grad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=196)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--columns", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=7)
    options = parser.parse_args()
    keep_freed_memory()
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch, options.tokens)
    logits = torch.randn(*shape, options.classes, generator=generator, requires_grad=True)
    ids = torch.randint(0, options.classes, (*shape, options.columns), generator=generator)
    weights = torch.rand(*shape, options.columns, generator=generator)
    weights /= weights.sum(dim=-1, keepdim=True)
    arguments = (logits, ids, weights, torch.zeros_like(logits).scatter_add_(2, ids, weights).detach())
    gradients = [step(loss, arguments)[1].clone() for loss in (sparse, dense_way)]
    torch.testing.assert_close(*gradients, atol=1e-9, rtol=1e-4)
    pairs = [(step(dense_way, arguments)[0], step(sparse, arguments)[0]) for _ in range(options.pairs)]
    ratios = [slow / quick for slow, quick in pairs]
    print("| way | ms (median) | peak MiB beside the logits |\n|---|---|---|")
    for name, loss, column in (("dense", dense_way, 0), ("sparse", sparse, 1)):
        milliseconds = 1000 * statistics.median(pair[column] for pair in pairs)
        print(f"| {name} | {milliseconds:,.0f} | {torch_peak_mib(partial(step, loss, arguments)):,.0f} |")
    print(f"dense / sparse: median {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
