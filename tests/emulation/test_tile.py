"""tile.cuh, which the device goes by, against the C++ that the CPU goes by; and what the emulation itself promises."""

from __future__ import annotations

import subprocess

import pytest
import torch
from emulation import emulated_device
from emulation.emulated_device import EmulatedDevice, compiler
from support import DTYPES

from torch_csd.catalogue import page_bytes
from torch_csd.cuda.device import Kernel
from torch_csd.cuda.kernels import source
from torch_csd.cuda.layout import PageLayout

pytestmark = pytest.mark.skipif(compiler() is None, reason="the emulation needs g++")

# Everything is constexpr: that it compiles is the test.
COMPARISON = """
#include "kernels/quantise.h"
namespace device {
#include "%s/tile.cuh"
}
constexpr int kDims[] = {8, 24, 64, 72, 80, 104, 128, 192, 512, 576};

template <typename Element, int k, int v>
constexpr bool same_tile(csd::DType dtype, int code_bits) {
  using T = device::csd::Tile<Element, k, v>;
  const csd::PageLayout layout = {1, k, v, dtype, code_bits};
  return T::kKBytes == layout.k_bytes() && T::kVBytes == layout.v_bytes() && T::kKParams == layout.params_offset() &&
         T::kVParams - T::kKParams == (code_bits != 0 ? layout.k_params_bytes() : 4 * k) &&
         T::kBytes == layout.tile_bytes();
}
template <int k, int v>
constexpr bool same_tiles() {
  return same_tile<device::csd::Float32, k, v>(csd::DType::kFloat32, 0) &&
         same_tile<device::csd::BFloat16, k, v>(csd::DType::kBFloat16, 0) &&
         same_tile<device::csd::Float16, k, v>(csd::DType::kFloat16, 0) &&
         same_tile<device::csd::Codes<8>, k, v>(csd::DType::kFloat16, 8) &&
         same_tile<device::csd::Codes<4>, k, v>(csd::DType::kFloat16, 4);
}
static_assert(same_tiles<8, 8>() && same_tiles<64, 64>() && same_tiles<80, 80>() && same_tiles<24, 104>() &&
              same_tiles<128, 128>() && same_tiles<192, 128>() && same_tiles<576, 512>() && same_tiles<72, 8>());

constexpr bool same_codes() {
  for (int bits = 4; bits <= 8; bits += 4) {
    for (int lanes = 8; lanes <= 64; lanes += 8) {
      if (csd::line_words(bits, lanes) != device::csd::line_words(bits, lanes)) return false;
      for (int lane = 0; lane < lanes; ++lane) {
        for (int member = 0; member < 2; ++member) {
          const auto expected = csd::code_place(bits, lanes, member, lane);
          const auto found = device::csd::code_place(bits, lanes, member, lane);
          if (expected.word != found.word || expected.shift != found.shift) return false;
        }
      }
    }
  }
  for (const int dim : kDims) {
    for (int channel = 0; channel < dim; channel += 64) {
      if (csd::block_lanes(dim, channel) != device::csd::block_lanes(dim, channel)) return false;
    }
  }
  return true;
}
static_assert(same_codes());
static_assert(csd::kPageTokens == device::csd::kPageTokens && csd::kCodeBlockLanes == device::csd::kCodeBlockLanes);
"""

WRONG = """
namespace csd {
__global__ void some_lanes_only(int* out) {
  if (threadIdx.x % 32 < 7) out[threadIdx.x] = __shfl_sync(0xffffffff, 1, 0);
}
__global__ void some_threads_only(int* out) {
  if (threadIdx.x < 40) __syncthreads();
}
__global__ void different_places(int* out) {
  if (threadIdx.x % 2 == 0) {
    __syncwarp();
  } else {
    out[threadIdx.x] = __shfl_sync(0xffffffff, 1, 0);
  }
}
__global__ void right(int* out) {
  __shared__ int sums[2];
  int sum = threadIdx.x;
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffff, sum, distance);
  sums[threadIdx.x / 32] = sum;
  __syncthreads();
  out[blockIdx.x * 64 + threadIdx.x] = sums[0] + sums[1] + blockIdx.x;
}
}  // namespace csd
"""


def test_device_and_cpu_agree_on_every_place_in_a_tile(tmp_path):
    program = tmp_path / "comparison.cpp"
    program.write_text(COMPARISON % source.DIRECTORY)
    csrc = source.DIRECTORY.parents[2] / "csrc"
    if not csrc.is_dir():
        pytest.skip("the C++ sources are not beside an installed package")
    command = [compiler(), "-std=c++17", "-fsyntax-only", f"-I{csrc}", str(program)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "float16", "int8", "int4"])
def test_layouts_have_the_catalogues_page_sizes(kv_dtype):
    code_bits = {"int8": 8, "int4": 4}.get(kv_dtype, 0)
    for dims in [(1, 8, 8), (3, 80, 24), (8, 128, 128), (1, 576, 512), (5, 72, 104)]:
        layout = PageLayout(*dims, DTYPES.get(kv_dtype, DTYPES["bfloat16"]), code_bits)
        assert layout.page_bytes == page_bytes(*dims, kv_dtype)


def launch_wrong(monkeypatch, name):
    monkeypatch.setattr(emulated_device, "source_text", lambda _: WRONG)
    out = torch.zeros(128, dtype=torch.int32)
    device = EmulatedDevice()
    device.launch(Kernel("wrong", f"csd::{name}"), (2, 1, 1), (64, 1, 1), (out,), stream=device.current_stream())
    return out


@pytest.mark.parametrize("name", ["some_lanes_only", "some_threads_only", "different_places"])
def test_threads_that_wait_for_others_in_vain_are_an_error(monkeypatch, name):
    emulated_device.compiled.cache_clear()
    with pytest.raises(RuntimeError, match=f"csd::{name}: deadlock"):
        launch_wrong(monkeypatch, name)


def test_threads_of_a_block_meet_at_barriers_and_shuffles(monkeypatch):
    emulated_device.compiled.cache_clear()
    assert launch_wrong(monkeypatch, "right").tolist() == [2016] * 64 + [2017] * 64
