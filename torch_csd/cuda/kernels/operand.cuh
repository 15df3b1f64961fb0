// Tiles as operands of the tensor cores: mma.m16n8k16 without shared memory in between.
//
// An A operand's register holds two neighbours along the product's inner dimension, of one row. In a tile
// those are a *pair*: channels 2c and 2c + 1 of K for one token, tokens 2s and 2s + 1 of V for one channel.
// Which token or channel is which row of A is ours to choose, so each lane takes from a pair the eight
// *items* that a 16-byte load (8 bytes of int4) brings it, and its two rows in each of four mma are items 2u
// and 2u + 1. With rows = tokens or channels and columns = queries, eight queries cost what one costs, and a
// lane keeps a few sums, not hundreds.
//
// Lane = 4 * quad + member, as the PTX manual has it: quad says which items, member which pair.
#pragma once

#include "element.cuh"

namespace csd {

constexpr int kItems = 8;  // of a pair, in a lane

#ifdef CSD_EMULATED
template <bool half>
CSD_DEVICE void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                    uint32_t b1) {
  emulation::mma(c, a0, a1, a2, a3, b0, b1, half ? low_half : low_bfloat, half ? high_half : high_bfloat);
}
#else
template <bool half>
CSD_DEVICE void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                    uint32_t b1) {
  if constexpr (half) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}
#endif

#ifdef CSD_EMULATED
CSD_DEVICE uint4 load_16(const uint8_t* bytes, bool inside) {
  return inside ? *reinterpret_cast<const uint4*>(bytes) : make_uint4(0, 0, 0, 0);
}
CSD_DEVICE uint2 load_8(const uint8_t* bytes, bool inside) {
  return inside ? *reinterpret_cast<const uint2*>(bytes) : make_uint2(0, 0);
}
#else
// In the order they are written in: the compiler would bring more of them to the front than there are
// registers for. A tile is read once, so L1 need not keep it.
CSD_DEVICE uint4 load_16(const uint8_t* bytes, bool inside) {
  uint4 words;
  asm volatile(
      "{.reg .pred p; setp.ne.s32 p, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;\n"
      "@p ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];}"
      : "=&r"(words.x), "=&r"(words.y), "=&r"(words.z), "=&r"(words.w)
      : "l"(bytes), "r"(static_cast<int>(inside)));
  return words;
}
CSD_DEVICE uint2 load_8(const uint8_t* bytes, bool inside) {
  uint2 words;
  asm volatile(
      "{.reg .pred p; setp.ne.s32 p, %3, 0; mov.b32 %0, 0; mov.b32 %1, 0;\n"
      "@p ld.global.nc.L1::no_allocate.v2.b32 {%0, %1}, [%2];}"
      : "=&r"(words.x), "=&r"(words.y)
      : "l"(bytes), "r"(static_cast<int>(inside)));
  return words;
}
#endif

// Each type: Raw, what a lane loads of a pair; load(); and parts(), the operands: kParts of them that add up
// to the items. kHalf: they are float16, not bfloat16. item(): the token or channel that item j of a quad is,
// in a line of `lanes`; owns(): whether it is one, for lines of less than 64 leave some quads nothing.
// unit(u): what sums of rows from mma u must be multiplied by.
//
// load(): `first` is what the quad has of the pair's first row (of codes: of its line), kQuadBytes * quad
// from its start; the second row begins row_bytes later. Rows that are not inside are never read and give 0,
// as do quads that own nothing.
template <typename Element>
struct Operand;

template <bool half>
struct Operand16 {
  struct Raw {
    uint4 first, second;
  };
  static constexpr int kParts = 1;
  static constexpr bool kHalf = half;
  static constexpr int kAhead = 2;
  static constexpr int kQuadBytes = 16;
  static CSD_DEVICE int item(int quad, int j, int lanes) { return 8 * quad + j; }
  static CSD_DEVICE bool owns(int quad, int j, int lanes) { return 8 * quad < lanes; }
  static CSD_DEVICE float unit(int u) { return 1.0f; }
  static CSD_DEVICE Raw load(const uint8_t* first, int row_bytes, int quad, int lanes, bool first_inside,
                             bool second_inside) {
    const bool inside = 8 * quad < lanes;
    return {load_16(first, inside && first_inside), load_16(first + row_bytes, inside && second_inside)};
  }
  static CSD_DEVICE void parts(const Raw& raw, uint32_t (&a)[kParts][kItems]) {
    const uint32_t first[4] = {raw.first.x, raw.first.y, raw.first.z, raw.first.w};
    const uint32_t second[4] = {raw.second.x, raw.second.y, raw.second.z, raw.second.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[0][2 * i] = __byte_perm(first[i], second[i], 0x5410);
      a[0][2 * i + 1] = __byte_perm(first[i], second[i], 0x7632);
    }
  }
};
template <>
struct Operand<BFloat16> : Operand16<false> {};
template <>
struct Operand<Float16> : Operand16<true> {};

// A float is the sum of three bfloat16: its upper 8 bits of significand, the next 8, the last 8. Products of
// parts i and j with i + j > 2 are below fp32's rounding and left out.
template <>
struct Operand<Float32> {
  struct Raw {
    uint4 first[2], second[2];
  };
  static constexpr int kParts = 3;
  static constexpr bool kHalf = false;
  static constexpr int kAhead = 1;
  static constexpr int kQuadBytes = 16;
  static CSD_DEVICE int item(int quad, int j, int lanes) { return 4 * quad + j % 4 + 32 * (j / 4); }
  static CSD_DEVICE bool owns(int quad, int j, int lanes) { return item(quad, j, lanes) < lanes; }
  static CSD_DEVICE float unit(int u) { return 1.0f; }
  static CSD_DEVICE Raw load(const uint8_t* first, int row_bytes, int quad, int lanes, bool first_inside,
                             bool second_inside) {
    Raw raw;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool inside = 4 * quad + 32 * i < lanes;
      const uint8_t* bytes = first + 128 * i;
      raw.first[i] = load_16(bytes, inside && first_inside);
      raw.second[i] = load_16(bytes + row_bytes, inside && second_inside);
    }
    return raw;
  }
  // Exact. An infinity leaves nothing, where inf - inf would.
  static CSD_DEVICE uint32_t rest(uint32_t bits) {
    const float value = __uint_as_float(bits), upper = __uint_as_float(bits & 0xffff0000);
    return __float_as_uint(value == upper ? 0.0f : value - upper);
  }
  static CSD_DEVICE void parts(const Raw& raw, uint32_t (&a)[kParts][kItems]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t first[4] = {raw.first[i].x, raw.first[i].y, raw.first[i].z, raw.first[i].w};
      uint32_t second[4] = {raw.second[i].x, raw.second[i].y, raw.second[i].z, raw.second[i].w};
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          a[part][4 * i + j] = __byte_perm(first[j], second[j], 0x7632);
          first[j] = rest(first[j]);
          second[j] = rest(second[j]);
        }
      }
    }
  }
};

// A code in the low bits of a float16 is a subnormal, code * 2^-24, and tensor cores take subnormals at full
// speed: a mask is all it takes to make an operand of a pair of codes.
template <>
struct Operand<Codes<8>> {
  using Raw = uint4;
  static constexpr int kParts = 1;
  static constexpr bool kHalf = true;
  static constexpr int kAhead = 4;
  static constexpr int kQuadBytes = 16;
  static CSD_DEVICE int item(int quad, int j, int lanes) { return 4 * quad + j % 4 + lanes / 2 * (j / 4); }
  static CSD_DEVICE bool owns(int quad, int j, int lanes) { return 4 * quad < lanes / 2; }
  static CSD_DEVICE float unit(int u) { return 16777216.0f; }
  static CSD_DEVICE Raw load(const uint8_t* first, int, int quad, int lanes, bool, bool) {
    return load_16(first, owns(quad, 0, lanes));
  }
  static CSD_DEVICE void parts(const Raw& raw, uint32_t (&a)[kParts][kItems]) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int j = 0; j < kItems; ++j) a[0][j] = (words[j % 4] >> (8 * (j / 4))) & 0x00ff00ff;
  }
};
template <>
struct Operand<Codes<4>> {
  using Raw = uint2;
  static constexpr int kParts = 1;
  static constexpr bool kHalf = true;
  static constexpr int kAhead = 8;
  static constexpr int kQuadBytes = 8;
  static CSD_DEVICE int item(int quad, int j, int lanes) { return 2 * quad + j % 2 + lanes / 4 * (j / 2); }
  static CSD_DEVICE bool owns(int quad, int j, int lanes) { return 2 * quad < lanes / 4; }
  // Codes in bits 4 to 7 stay there: 16 times as much.
  static CSD_DEVICE float unit(int u) { return u % 2 == 0 ? 16777216.0f : 1048576.0f; }
  static CSD_DEVICE Raw load(const uint8_t* first, int, int quad, int lanes, bool, bool) {
    return load_8(first, owns(quad, 0, lanes));
  }
  static CSD_DEVICE void parts(const Raw& raw, uint32_t (&a)[kParts][kItems]) {
    const uint32_t words[2] = {raw.x, raw.y};
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      a[0][j] = (words[j % 2] >> (8 * (j / 4))) & (j / 2 % 2 == 0 ? 0x000f000f : 0x00f000f0);
    }
  }
};

// Two floats as `count` pairs of 16-bit parts that add up to them, the largest first.
template <bool half, int count>
CSD_DEVICE void split_pair(float x, float y, uint32_t (&parts)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) {
    parts[i] = half ? pack_halves(x, y) : pack_bfloats(x, y);
    x -= half ? low_half(parts[i]) : low_bfloat(parts[i]);
    y -= half ? high_half(parts[i]) : high_bfloat(parts[i]);
  }
}

// c += the four mma of two pairs (member and member + 4), over the products of parts that count.
template <typename Element, int b_parts>
CSD_DEVICE void multiply(float (&c)[4][4], const uint32_t (&a0)[Operand<Element>::kParts][kItems],
                         const uint32_t (&a1)[Operand<Element>::kParts][kItems],
                         const uint32_t (&b0)[b_parts], const uint32_t (&b1)[b_parts]) {
#pragma unroll
  for (int i = 0; i < Operand<Element>::kParts; ++i) {
#pragma unroll
    for (int k = 0; k < b_parts; ++k) {
      if (i + k > 2) continue;
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        mma<Operand<Element>::kHalf>(c[u], a0[i][2 * u], a0[i][2 * u + 1], a1[i][2 * u], a1[i][2 * u + 1],
                                     b0[k], b1[k]);
      }
    }
  }
}

}  // namespace csd
