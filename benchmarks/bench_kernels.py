"""How fast the card's kernels are, beside a copy of its memory: python benchmarks/bench_kernels.py [--gib 2]

Prints GB/s of page images and the share of what a device-to-device copy reads and writes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from torch_csd.cuda.cuda_device import CudaDevice
from torch_csd.cuda.kernels import Kernels, Pages, Rules
from torch_csd.cuda.layout import PageLayout

# num_kv_heads, head_dim_k, head_dim_v, query heads of each kv head.
GEOMETRIES = [(8, 128, 128, 4), (8, 128, 128, 8), (8, 64, 64, 4), (4, 256, 256, 8), (1, 576, 512, 16)]
ELEMENTS = {"bfloat16": 0, "int8": 8, "int4": 4}
ROUNDS = 20


def seconds(work: Callable[[], None]) -> float:
    """The median of some rounds, by the card's clock."""
    for _ in range(3):
        work()
    times = []
    for _ in range(ROUNDS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return sorted(times)[ROUNDS // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=2.0, help="of page images; more than the card's caches hold")
    byte_count = int(parser.parse_args().gib * 2**30)
    device = CudaDevice()
    kernels, stream = Kernels(device), device.current_stream()
    memory = device.new_memory(byte_count)
    copy = torch.empty(byte_count, dtype=torch.uint8, device=device.torch_device)
    roof = 2 * byte_count / seconds(lambda: copy.copy_(memory)) / 1e9
    print(f"{device.name}, {device.multiprocessor_count} multiprocessors; copy {roof:.0f} GB/s read and written")
    for num_kv_heads, head_dim_k, head_dim_v, group in GEOMETRIES:
        for element, code_bits in ELEMENTS.items():
            layout = PageLayout(num_kv_heads, head_dim_k, head_dim_v, torch.bfloat16, code_bits)
            pages_max = byte_count // layout.page_bytes
            options = {"dtype": torch.bfloat16, "device": device.torch_device}
            tokens = 64 * min(pages_max, 256)
            k = torch.randn(1, num_kv_heads, tokens, head_dim_k, **options)
            v = torch.randn(1, num_kv_heads, tokens, head_dim_v, **options)
            images = memory[: tokens // 64 * layout.page_bytes].view(1, tokens // 64, -1)

            def pack(k=k, v=v, layout=layout, images=images) -> None:
                kernels.pack(k, v, layout, images, token_begin=0, page_count=images.shape[1], stream=stream)

            packing = (k.numel() + v.numel()) * 2 / seconds(pack) / 1e9
            found = torch.empty(images.shape[1], dtype=torch.int32, device=device.torch_device)
            checking_s = seconds(lambda: kernels.checksums(images, layout.page_bytes, found, stream=stream))  # noqa: B023
            for page in range(images.shape[1], pages_max):  # all pages valid: repeat what was packed
                memory[page * layout.page_bytes :][: layout.page_bytes] = images[0, page % images.shape[1]]
            for batch in (1, 16):
                each = pages_max // batch
                at = [memory.data_ptr() + page * layout.page_bytes for page in range(each * batch)]
                pages = Pages.of(
                    [list(zip(at[r * each : (r + 1) * each], range(each), strict=True)) for r in range(batch)],
                    device.torch_device,
                )
                q = torch.randn(batch, num_kv_heads * group, 1, head_dim_k, **options)
                kv_end = torch.full((batch,), each * 64, dtype=torch.int32, device=device.torch_device)
                rules = Rules(scale=head_dim_k**-0.5, kv_end=kv_end)
                partial = kernels.new_partial(batch, num_kv_heads * group, 1, head_dim_v)

                def attend(q=q, pages=pages, layout=layout, rules=rules, partial=partial) -> None:
                    kernels.attend(q, pages, layout, rules, partial, stream=stream)

                took_s = seconds(attend)
                rate = each * batch * layout.num_kv_heads * layout.tile_bytes / took_s / 1e9
                print(
                    f"{num_kv_heads} heads {head_dim_k}/{head_dim_v}, group {group}, {element:8}, {batch:2} rows: "
                    f"attend {rate:5.0f} GB/s ({rate / roof:.2f}), {each * batch * 64 / took_s / 1e6:6.1f} M tokens/s"
                )
            checking = images.numel() / checking_s / 1e9
            print(f"    pack {packing:.0f} GB/s of tokens, checksums {checking:.0f} GB/s")


if __name__ == "__main__":
    main()
