// How a tile lies in memory (csrc/store/FORMAT.md is normative) and what its elements are: the device's twin
// of csrc/base/types.h and csrc/kernels/quantise.h, which tests/emulation/test_tile.py compares it with.
// Includes nothing: NVRTC has no standard headers.
#pragma once

#ifdef __CUDACC__
#define CSD_CONSTEXPR __host__ __device__ constexpr
#else
#define CSD_CONSTEXPR constexpr
#endif

namespace csd {

using int32_t = int;
using int64_t = long long;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;

constexpr int kPageTokens = 64;
constexpr int kCodeBlockLanes = 64;

// Each element type of a tile. kBits: of an element; kCodes: its elements are codes with float16 parameters.
struct Float32 {
  using Bits = uint32_t;
  static constexpr int kBits = 32;
  static constexpr bool kCodes = false;
};
struct BFloat16 {
  using Bits = uint16_t;
  static constexpr int kBits = 16;
  static constexpr bool kCodes = false;
};
struct Float16 {
  using Bits = uint16_t;
  static constexpr int kBits = 16;
  static constexpr bool kCodes = false;
};
template <int bits>
struct Codes {
  static constexpr int kBits = bits;
  static constexpr bool kCodes = true;
};

CSD_CONSTEXPR int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Bytes of one kv head's part of a page, and where in it things are.
template <typename Element, int head_dim_k, int head_dim_v>
struct Tile {
  static constexpr int kKBytes = head_dim_k * kPageTokens * Element::kBits / 8;
  static constexpr int kVBytes = head_dim_v * kPageTokens * Element::kBits / 8;
  // float16: K scale [head_dim_k], K zero [head_dim_k], V scale [64], V zero [64].
  static constexpr int kKParams = kKBytes + kVBytes;
  static constexpr int kVParams = kKParams + 4 * head_dim_k;
  static constexpr int kEnd = Element::kCodes ? kVParams + 4 * kPageTokens : kKParams;
  static constexpr int kBytes = static_cast<int>(round_up(kEnd, 64));
};

// ---- codes: which bit is which ----

struct CodePlace {
  int word;
  int shift;
};

CSD_CONSTEXPR CodePlace code_place(int code_bits, int lanes, int member, int lane) {
  const int step = lanes / (16 / code_bits);
  return {2 * (lane % step) + member, code_bits * (lane / step)};
}

// 16-bit words of one line of `lanes` lanes.
CSD_CONSTEXPR int line_words(int code_bits, int lanes) { return 2 * lanes * code_bits / 16; }

// Lanes of the V block that starts at `channel`.
CSD_CONSTEXPR int block_lanes(int head_dim, int channel) {
  return head_dim - channel < kCodeBlockLanes ? head_dim - channel : kCodeBlockLanes;
}

}  // namespace csd
