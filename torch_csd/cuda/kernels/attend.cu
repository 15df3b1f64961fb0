// Attention of up to `queries` queries of one kv head over a run of pages, as a partial (out, lse).
//
// Split-KV (flash-decoding): a block takes one split of one row's pages for one kv head; its warps take the
// pages in turn, each with an online softmax of its own, and are merged at the end. A warp's tile goes from
// memory straight into the operands of tensor cores (operand.cuh). A page costs the same for 1 query as for
// 8, and the arithmetic is far below what the memory allows: the kernel's one task is to keep loads in
// flight. Those of 4 KiB are, in each of the 12 warps of a multiprocessor: 48 KiB, where Little's law asks
// for 30 (4.8 TB/s, 0.8 us, 132 multiprocessors).
//
// Products are as exact as fp32: what is not exactly representable in 16 bits is split into parts (q_parts of
// q, two of a probability, three of everything for float32 tiles).
#include "operand.cuh"

namespace csd {

constexpr int kAttendWarps = 4;
constexpr float kLog2E = 1.4426950408889634f;

// The least power of two that is not above a positive normal number; 1 for anything else. It scales exactly.
CSD_DEVICE float power_of_two(float value) {
  const uint32_t exponent = __float_as_uint(value) & 0x7f800000;
  return exponent == 0 || exponent == 0x7f800000 ? 1.0f : __uint_as_float(exponent);
}

CSD_DEVICE float inverse_power(float power) { return __uint_as_float((254u << 23) - __float_as_uint(power)); }

// The same number, but the compiler no longer knows of what it is made: it would take addresses apart again,
// and keep a register for the parts of each.
CSD_DEVICE int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

CSD_DEVICE float load_element(const void* elements, int kind, int64_t index) {
  if (kind == 0) return static_cast<const float*>(elements)[index];
  const uint16_t bits = static_cast<const uint16_t*>(elements)[index];
  return kind == 1 ? bfloat_to_float(bits) : half_to_float(bits);
}

// The greatest of a run of float16 that are not negative, as the warp's lanes find it together.
CSD_DEVICE float greatest_half(const uint8_t* halves, int count, int begin, int end, int lane) {
  uint32_t greatest = 0;
  for (int i = lane; i < count / 2; i += kWarpLanes) {
    const uint32_t pair = __ldg(reinterpret_cast<const uint32_t*>(halves) + i);
    if (2 * i >= begin && 2 * i < end) greatest = max(greatest, pair & 0xffff);
    if (2 * i + 1 >= begin && 2 * i + 1 < end) greatest = max(greatest, pair >> 16);
  }
  return half_to_float(static_cast<uint16_t>(__reduce_max_sync(kAllLanes, greatest)));
}

// A multiprocessor has 65536 registers. With 128 threads a block, 3 blocks leave 168 to each thread, 2 leave
// 255: what it takes to hold the sums of wide heads or of 16 queries without spilling.
CSD_CONSTEXPR int attend_blocks(int head_dim_v, int queries) {
  return head_dim_v <= 128 && queries == 8 ? 3 : 2;
}

// The greatest power of two that divides both.
CSD_CONSTEXPR int common_power(int power, int count) {
  return count % power == 0 ? power : common_power(power / 2, count);
}

// What one query of the block needs to know of itself.
struct QueryRule {
  int begin, end;  // positions that it sees, before the mask
  int position;
  float slope;
  int64_t mask_row;  // of its mask's column 0
  int64_t target;    // row of out and lse; -1: there are fewer queries
};

// What they need to know together. In shared memory, where a tile looks it up: registers are short.
struct Bounds {
  int some_begin, some_end;  // what any query sees
  int all_begin, all_end;    // where scores need only be scaled, and soft-capped
  float inverse_softcap;
};

template <typename Element, int head_dim_k, int head_dim_v, int queries, int q_parts>
__global__ void __launch_bounds__(kAttendWarps* kWarpLanes, attend_blocks(head_dim_v, queries))
    attend(const void* __restrict__ q,  // [batch, num_heads, q_len, head_dim_k]
           int q_kind,                  // 0: float32, 1: bfloat16, 2: float16
           int q_len, int group,
           const int64_t* __restrict__ addresses,  // of page images
           const int32_t* __restrict__ indices,    // of those pages: token t is at position 64 * index + t
           const int32_t* __restrict__ offsets,  // [batch + 1]: row r has pages offsets[r] ... offsets[r + 1]
           int split_count, int query_blocks, float scale, float softcap,  // 0: none
           int causal,
           int window,                                        // 0: none
           int kv_begin, const int32_t* __restrict__ kv_end,  // [batch]
           const int32_t* __restrict__ positions,             // [batch]: of query 0; null: none has one
           const float* __restrict__ mask,                    // null: none
           int64_t mask_batch, int64_t mask_head, int64_t mask_query,
           int mask_column,                   // strides, elements
           int mask_begin, int mask_count,    // the positions of its columns; it hides all others
           const float* __restrict__ slopes,  // [num_heads]; null: none
           float* __restrict__ out,           // [split_count, batch, num_heads, q_len, head_dim_v]
           float* __restrict__ lse) {         // [split_count, batch, num_heads, q_len]
  using A = Operand<Element>;
  using T = Tile<Element, head_dim_k, head_dim_v>;
  constexpr bool kCodes = Element::kCodes;
  constexpr int kColumns = queries / 8;  // blocks of eight queries: an mma's columns
  constexpr int kKSteps = (head_dim_k + 15) / 16;
  constexpr int kVBlocks = (head_dim_v + kCodeBlockLanes - 1) / kCodeBlockLanes;
  // Steps of loads under way. The sums of very wide heads leave room for half as many.
  constexpr int kAhead = head_dim_v > 256 && A::kAhead > 1 ? A::kAhead / 2 : A::kAhead;
  constexpr int kVAhead = common_power(kAhead, kPageTokens / 16 * kVBlocks);
  constexpr int kVRows = kVAhead / common_power(kVAhead, kVBlocks);  // times 16 tokens: until slots repeat
  constexpr int kPParts = Element::kBits == 32 ? 3 : 2;
  constexpr int kProbabilityStride = kPageTokens + 4;
  constexpr int kQWords = kCodes ? 4 : 2 * q_parts;  // of one lane for one step
  constexpr int kQBytes = kColumns * kKSteps * kQWords * kWarpLanes * 4;
  constexpr int kPBytes = kAttendWarps * queries * kProbabilityStride * 4;
  constexpr int kOutBytes = queries * head_dim_v * 4;
  constexpr int kPoolBytes = kQBytes + kPBytes > kOutBytes ? kQBytes + kPBytes : kOutBytes;

  __shared__ __align__(16) uint8_t pool[kPoolBytes];
  __shared__ QueryRule rules[queries];
  __shared__ Bounds bounds;
  __shared__ float q_units[queries];
  __shared__ float warp_max[kAttendWarps][queries], warp_sum[kAttendWarps][queries];

  const int lane = threadIdx.x % kWarpLanes, warp = threadIdx.x / kWarpLanes;
  const int quad = lane / 4, member = lane % 4;
  const int split = blockIdx.x / query_blocks, first_query = blockIdx.x % query_blocks * queries;
  const int kv_head = blockIdx.y, row = blockIdx.z;
  const int num_kv_heads = gridDim.y, batch = gridDim.z;
  const int query_count =
      min(group * q_len - first_query, queries);  // query m: i = m / group of head m % group
  const int64_t q_rows = (static_cast<int64_t>(row) * num_kv_heads + kv_head) * group * q_len;
  // Of query m's first element, in rows of q.
  auto q_row = [&](int n) {
    const int m = first_query + n;
    return q_rows + static_cast<int64_t>(m % group) * q_len + m / group;
  };

  // ---- the queries, as operands: a lane's registers of one step side by side ----
  for (int n = warp; n < queries; n += kAttendWarps) {
    float greatest = 0.0f;
    if (A::kHalf && n < query_count) {
      for (int d = lane; d < head_dim_k; d += kWarpLanes) {
        greatest = fmaxf(greatest, fabsf(load_element(q, q_kind, q_row(n) * head_dim_k + d)));
      }
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      greatest = fmaxf(greatest, __shfl_xor_sync(kAllLanes, greatest, distance));
    }
    // float16 has few exponents: a query's largest element becomes 2^7 ... 2^8. bfloat16 has those of
    // float32.
    if (lane == 0) q_units[n] = A::kHalf ? power_of_two(greatest) * 0.0078125f : 1.0f;
  }
  if (threadIdx.x < queries) {
    const int n = threadIdx.x;
    const int m = first_query + (n < query_count ? n : 0);
    const int head = kv_head * group + m % group;
    QueryRule rule;
    rule.position = (positions != nullptr ? positions[row] : 0) + m / group;
    rule.begin = kv_begin;
    rule.end = kv_end[row];
    if (causal) rule.end = min(rule.end, rule.position + 1);
    if (window > 0) rule.begin = max(rule.begin, rule.position - window + 1);
    if (mask != nullptr) {
      rule.begin = max(rule.begin, mask_begin);
      rule.end = min(rule.end, mask_begin + mask_count);
    }
    rule.slope = slopes != nullptr ? slopes[head] : 0.0f;
    rule.mask_row = row * mask_batch + head * mask_head + m / group * mask_query;
    const int64_t rows = static_cast<int64_t>(batch) * num_kv_heads * group * q_len;
    rule.target = n < query_count ? split * rows + q_row(n) : -1;
    rules[n] = rule;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    Bounds all = {rules[0].begin, rules[0].end, rules[0].begin, rules[0].end, 1.0f / softcap};
    for (int n = 1; n < queries; ++n) {
      all.some_begin = min(all.some_begin, rules[n].begin);
      all.some_end = max(all.some_end, rules[n].end);
      all.all_begin = max(all.all_begin, rules[n].begin);
      all.all_end = min(all.all_end, rules[n].end);
    }
    if (mask != nullptr || slopes != nullptr) all.all_end = all.all_begin;
    bounds = all;
  }
  for (int i = threadIdx.x; i < kColumns * kKSteps * kWarpLanes; i += kAttendWarps * kWarpLanes) {
    const int n = i / (kKSteps * kWarpLanes) * 8 + i % kWarpLanes / 4;
    const int channel = i / kWarpLanes % kKSteps * 16 + i % 4 * 2;
    const float factor = inverse_power(q_units[n]);
    float x[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int d = channel + j % 2 + j / 2 * 8;
      const bool inside = n < query_count && d < head_dim_k;
      x[j] = inside ? load_element(q, q_kind, q_row(n) * head_dim_k + d) * factor : 0.0f;
    }
    if constexpr (kCodes) {
      reinterpret_cast<float4*>(pool)[i] = make_float4(x[0], x[1], x[2], x[3]);
    } else {
      uint32_t low[q_parts], high[q_parts];
      split_pair<A::kHalf>(x[0], x[1], low);
      split_pair<A::kHalf>(x[2], x[3], high);
#pragma unroll
      for (int part = 0; part < q_parts; ++part) {
        const int place = i / kWarpLanes * q_parts + part;
        reinterpret_cast<uint2*>(pool)[place * kWarpLanes + i % kWarpLanes] =
            make_uint2(low[part], high[part]);
      }
    }
  }
  __syncthreads();

  // Of a lane's part of a tile's first pair, once: what is left of each load's address is then a constant.
  constexpr int kKRowBytes = kPageTokens * Element::kBits / 8, kVRowBytes = head_dim_v * Element::kBits / 8;
  const int k_offset = opaque(2 * member * kKRowBytes + A::kQuadBytes * quad);
  const int v_offset = opaque(T::kKBytes + 2 * member * kVRowBytes + A::kQuadBytes * quad);

  float* probabilities = reinterpret_cast<float*>(pool + kQBytes) + warp * queries * kProbabilityStride;
  float sums[kColumns][kVBlocks][4][4];
  float row_max[kColumns][2], row_sum[kColumns][2],
      zero_sum[kColumns][2];              // of queries 8 * c + 2 * member + i
  float v_unit = 5.9604644775390625e-8f;  // sums are in units of it; codes only
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      row_max[c][i] = -infinity();
      row_sum[c][i] = zero_sum[c][i] = 0.0f;
    }
#pragma unroll
    for (int b = 0; b < kVBlocks; ++b) {
#pragma unroll
      for (int u = 0; u < 4; ++u) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[c][b][u][i] = 0.0f;
      }
    }
  }

  const int page_count = offsets[row + 1] - offsets[row];
  const int share = page_count / split_count,
            rest = page_count % split_count;  // the first `rest` splits have one more
  const int split_begin = offsets[row] + split * share + min(split, rest);
  const int page_end = split_begin + share + (split < rest ? 1 : 0);
  int page = split_begin + warp;
  // One page ahead, so that a tile's loads need not wait for its address. Very wide heads have no registers
  // for that, and long tiles.
  constexpr bool kAddressAhead = head_dim_v <= 256;
  int64_t next_address = 0;
  int next_index = 0;
  if (kAddressAhead && page < page_end) {
    next_address = addresses[page];
    next_index = indices[page];
  }
  for (; page < page_end; page += kAttendWarps) {
    const int64_t address = kAddressAhead ? next_address : addresses[page];
    const int base = (kAddressAhead ? next_index : indices[page]) * kPageTokens;
    const uint8_t* tile =
        reinterpret_cast<const uint8_t*>(address) + static_cast<int64_t>(kv_head) * T::kBytes;
    if (kAddressAhead && page + kAttendWarps < page_end) {
      next_address = addresses[page + kAttendWarps];
      next_index = indices[page + kAttendWarps];
    }
    const int token_begin = max(bounds.some_begin - base, 0);
    const int token_end = min(bounds.some_end - base, kPageTokens);
    if (token_begin >= token_end) continue;

    // ---- scores: rows are tokens, columns queries ----
    const uint8_t* lane_k = tile + k_offset;  // moves on with the loop
    auto load_k = [&](int step, int ahead, int half) {
      const bool inside = 16 * (step + ahead) + 8 * half < head_dim_k;
      return A::load(lane_k + (16 * ahead + 8 * half) * kKRowBytes, kKRowBytes, quad,
                     inside ? kPageTokens : 0, true, true);
    };
    typename A::Raw raw[kAhead][2];
#pragma unroll
    for (int step = 0; step < kAhead && step < kKSteps; ++step) {
      raw[step][0] = load_k(0, step, 0);
      raw[step][1] = load_k(0, step, 1);
    }
    float zeros[kColumns];  // of query 8 * c + quad: the sum of q times zero point over this lane's channels
    float k_factor = 1.0f;  // makes the largest scale 2^6 ... 2^7
    if constexpr (kCodes) {
      const float greatest = greatest_half(tile + T::kKParams, head_dim_k, 0, head_dim_k, lane);
      k_factor = inverse_power(power_of_two(greatest)) * 64.0f;
    }
    float scores[kColumns][4][4];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      zeros[c] = 0.0f;
#pragma unroll
      for (int u = 0; u < 4; ++u) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[c][u][i] = 0.0f;
      }
    }
    // Loops that stay loops: unrolled whole, the compiler moves loads to the front until it spills.
#pragma unroll 1
    for (int first = 0; first < kKSteps; first += kAhead, lane_k += 16 * kAhead * kKRowBytes) {
#pragma unroll
      for (int slot = 0; slot < kAhead; ++slot) {
        const int step = first + slot;
        if (step >= kKSteps) break;
        uint32_t a0[A::kParts][kItems], a1[A::kParts][kItems];
        A::parts(raw[slot][0], a0);
        A::parts(raw[slot][1], a1);
        if (step + kAhead < kKSteps) {
          raw[slot][0] = load_k(first, slot + kAhead, 0);
          raw[slot][1] = load_k(first, slot + kAhead, 1);
        }
        if constexpr (kCodes) {
          float k_scale[4], k_zero[4];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const bool inside = 16 * step + 8 * half < head_dim_k;
            const auto* params =
                reinterpret_cast<const uint32_t*>(tile + T::kKParams) + 8 * step + 4 * half + member;
            const uint32_t scale_pair = inside ? __ldg(params) : 0;
            const uint32_t zero_pair = inside ? __ldg(params + head_dim_k / 2) : 0;
            k_scale[2 * half] = low_half(scale_pair) * k_factor;
            k_scale[2 * half + 1] = high_half(scale_pair) * k_factor;
            k_zero[2 * half] = low_half(zero_pair);
            k_zero[2 * half + 1] = high_half(zero_pair);
          }
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
            const float4 x = reinterpret_cast<const float4*>(pool)[(c * kKSteps + step) * kWarpLanes + lane];
            uint32_t b0[2], b1[2];
            split_pair<true>(x.x * k_scale[0], x.y * k_scale[1], b0);
            split_pair<true>(x.z * k_scale[2], x.w * k_scale[3], b1);
            zeros[c] += x.x * k_zero[0] + x.y * k_zero[1] + x.z * k_zero[2] + x.w * k_zero[3];
            multiply<Element>(scores[c], a0, a1, b0, b1);
          }
        } else {
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
            uint32_t b0[q_parts], b1[q_parts];
#pragma unroll
            for (int part = 0; part < q_parts; ++part) {
              const int place = (c * kKSteps + step) * q_parts + part;
              const uint2 b = reinterpret_cast<const uint2*>(pool)[place * kWarpLanes + lane];
              b0[part] = b.x;
              b1[part] = b.y;
            }
            multiply<Element>(scores[c], a0, a1, b0, b1);
          }
        }
      }
    }

    // ---- what is done to scores, in ScoreModifier's order (csrc/kernels/kernels.h) ----
    const bool whole = base >= bounds.all_begin && base + kPageTokens <= bounds.all_end;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int n = 8 * c + 2 * member + i;
        const float factor = scale * q_units[n];
        float zero = 0.0f;
        if constexpr (kCodes) {
          float sum = zeros[c];
          sum += __shfl_xor_sync(kAllLanes, sum, 1);
          sum += __shfl_xor_sync(kAllLanes, sum, 2);
          zero = __shfl_sync(kAllLanes, sum, 4 * (2 * member + i));
        }
#pragma unroll
        for (int j = 0; j < kItems; ++j) {  // token item(quad, j)
          float& s = scores[c][j / 2][j % 2 * 2 + i];
          if constexpr (kCodes) s = s * (inverse_power(k_factor) * A::unit(j / 2)) + zero;
          s *= factor;
          if (softcap != 0.0f) s = softcap * tanhf(s * bounds.inverse_softcap);
        }
        if (whole) continue;
        const QueryRule rule = rules[n];
        const float* mask_row = mask + rule.mask_row;
#pragma unroll
        for (int j = 0; j < kItems; ++j) {
          float& s = scores[c][j / 2][j % 2 * 2 + i];
          const int position = base + A::item(quad, j, kPageTokens);
          const bool inside = position >= rule.begin && position < rule.end;
          if (mask != nullptr && inside)
            s += mask_row[static_cast<int64_t>(position - mask_begin) * mask_column];
          s += rule.slope * static_cast<float>(position - rule.position);
          if (!inside) s = -infinity();
        }
      }
    }

    // V's first loads are under way while the softmax computes.
    const uint8_t* lane_v = tile + v_offset;  // these three move on with the loop
    int lane_begin = opaque(token_begin - 2 * member), lane_end = opaque(token_end - 2 * member);
    auto load_v = [&](int step, int half) {
      const int block = step % kVBlocks * kCodeBlockLanes;
      const int token = 16 * (step / kVBlocks) + 8 * half;  // from lane_v on
      // A line of codes has both tokens.
      const int offset = token * kVRowBytes + (kCodes ? 2 : 1) * block * Element::kBits / 8;
      return A::load(lane_v + offset, kVRowBytes, quad, block_lanes(head_dim_v, block),
                     token >= lane_begin && token < lane_end,
                     token + 1 >= lane_begin && token + 1 < lane_end);
    };
#pragma unroll
    for (int step = 0; step < kVAhead; ++step) {
      raw[step][0] = load_v(step, 0);
      raw[step][1] = load_v(step, 1);
    }
    uint32_t v_scales[kItems / 2], v_zeros[kItems / 2];  // of this lane's tokens, in pairs
    float v_shrink = 1.0f, v_factor = 1.0f;
    if constexpr (kCodes) {
      const float unit = fmaxf(
          v_unit, power_of_two(greatest_half(tile + T::kVParams, kPageTokens, token_begin, token_end, lane)));
      const float inverse = inverse_power(unit);
      v_shrink = v_unit * inverse;
      v_factor = inverse * 8192.0f;  // the largest scale becomes 2^13 ... 2^14
      v_unit = unit;
#pragma unroll
      for (int j = 0; j < kItems; j += 2) {
        const int token = A::item(quad, j, kPageTokens);
        const auto* params = reinterpret_cast<const uint32_t*>(tile + T::kVParams) + token / 2;
        const uint32_t first = token >= token_begin && token < token_end ? 0xffff : 0;
        const uint32_t second = token + 1 >= token_begin && token + 1 < token_end ? 0xffff0000 : 0;
        v_scales[j / 2] = __ldg(params) & (first | second);
        v_zeros[j / 2] = __ldg(params + kPageTokens / 2) & (first | second);
      }
    }

    // ---- online softmax (FlashAttention, 2205.14135, Alg. 1), in powers of two ----
    __syncwarp();  // the probabilities of the tile before have been read
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int n = 8 * c + 2 * member + i;
        float s[kItems];
#pragma unroll
        for (int j = 0; j < kItems; ++j) s[j] = scores[c][j / 2][j % 2 * 2 + i];
        float greatest = s[0];
#pragma unroll
        for (int j = 1; j < kItems; ++j) greatest = fmaxf(greatest, s[j]);
#pragma unroll
        for (int distance = 4; distance < kWarpLanes; distance *= 2) {
          greatest = fmaxf(greatest, __shfl_xor_sync(kAllLanes, greatest, distance));
        }
        // fmaxf passes over a NaN, which then poisons the sum. Where nothing is seen yet all p are
        // exp2(-inf).
        const float new_max = fmaxf(row_max[c][i], greatest);
        const float from = new_max == -infinity() ? 0.0f : new_max;
        const float shrink = exp2f((row_max[c][i] - from) * kLog2E);
        row_max[c][i] = new_max;
        row_sum[c][i] *= shrink;
        zero_sum[c][i] *= shrink;
#pragma unroll
        for (int b = 0; b < kVBlocks; ++b) {
#pragma unroll
          for (int u = 0; u < 4; ++u) {
            sums[c][b][u][i] *= shrink * v_shrink;
            sums[c][b][u][i + 2] *= shrink * v_shrink;
          }
        }
#pragma unroll
        for (int j = 0; j < kItems; ++j) {
          float p = exp2f((s[j] - from) * kLog2E);
          row_sum[c][i] += p;
          if constexpr (kCodes) {
            zero_sum[c][i] += p * (j % 2 == 0 ? low_half(v_zeros[j / 2]) : high_half(v_zeros[j / 2]));
            p *= v_factor * (j % 2 == 0 ? low_half(v_scales[j / 2]) : high_half(v_scales[j / 2]));
          } else if constexpr (A::kHalf) {
            p *= 16384.0f;  // keeps both parts of a small p out of float16's subnormals
          }
          probabilities[n * kProbabilityStride + A::item(quad, j, kPageTokens)] = p;
        }
      }
    }
    __syncwarp();

    // ---- weighted sum of V: rows are channels, columns queries ----
#pragma unroll 1
    for (int first = 0; first < kPageTokens / 16; first += kVRows) {
      uint32_t b0[kColumns][kPParts], b1[kColumns][kPParts];
#pragma unroll
      for (int step = 0; step < kVRows * kVBlocks; ++step) {
        const int block = step % kVBlocks, slot = step % kVAhead;
        if (block == 0) {
          const int token = 16 * (first + step / kVBlocks) + 2 * member;
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
            const float* p = probabilities + (8 * c + quad) * kProbabilityStride + token;
            const float2 low = *reinterpret_cast<const float2*>(p),
                         high = *reinterpret_cast<const float2*>(p + 8);
            split_pair<A::kHalf>(low.x, low.y, b0[c]);
            split_pair<A::kHalf>(high.x, high.y, b1[c]);
          }
        }
        uint32_t a0[A::kParts][kItems], a1[A::kParts][kItems];
        A::parts(raw[slot][0], a0);
        A::parts(raw[slot][1], a1);
        if (first + (step + kVAhead) / kVBlocks < kPageTokens / 16) {
          raw[slot][0] = load_v(step + kVAhead, 0);
          raw[slot][1] = load_v(step + kVAhead, 1);
        }
#pragma unroll
        for (int c = 0; c < kColumns; ++c) multiply<Element>(sums[c][block], a0, a1, b0[c], b1[c]);
      }
      lane_v += 16 * kVRows * kVRowBytes;
      lane_begin -= 16 * kVRows;
      lane_end -= 16 * kVRows;
    }
  }

  // ---- the warps' results become the split's ----
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int distance = 4; distance < kWarpLanes; distance *= 2) {
        row_sum[c][i] += __shfl_xor_sync(kAllLanes, row_sum[c][i], distance);
        zero_sum[c][i] += __shfl_xor_sync(kAllLanes, zero_sum[c][i], distance);
      }
      if (quad == 0) {
        warp_max[warp][8 * c + 2 * member + i] = row_max[c][i];
        warp_sum[warp][8 * c + 2 * member + i] = row_sum[c][i];
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int n = 8 * c + 2 * member + i;
      float greatest = -infinity();
      for (int w = 0; w < kAttendWarps; ++w) greatest = fmaxf(greatest, warp_max[w][n]);
      const float weight = exp2f((row_max[c][i] - (greatest == -infinity() ? 0.0f : greatest)) * kLog2E);
      zero_sum[c][i] *= weight;
#pragma unroll
      for (int b = 0; b < kVBlocks; ++b) {
#pragma unroll
        for (int j = 0; j < kItems; ++j) {
          float& sum = sums[c][b][j / 2][j % 2 * 2 + i];
          if constexpr (kCodes) {
            sum = sum * (weight * v_unit * A::unit(j / 2) * 0.0001220703125f) + zero_sum[c][i];
          } else {
            sum *= A::kHalf ? weight * 0.00006103515625f : weight;
          }
        }
      }
    }
  }
  float* merged =
      reinterpret_cast<float*>(pool);  // [queries][head_dim_v]; q and the probabilities are done with
  for (int i = threadIdx.x; i < queries * head_dim_v; i += kAttendWarps * kWarpLanes) merged[i] = 0.0f;
  __syncthreads();
  for (int turn = 0; turn < kAttendWarps; ++turn) {
    if (turn == warp) {
#pragma unroll
      for (int b = 0; b < kVBlocks; ++b) {
        const int lanes = block_lanes(head_dim_v, b * kCodeBlockLanes);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
#pragma unroll
          for (int j = 0; j < kItems; ++j) {
            float* place =
                merged + (8 * c + 2 * member) * head_dim_v + b * kCodeBlockLanes + A::item(quad, j, lanes);
            if (A::owns(quad, j, lanes)) {
              place[0] += sums[c][b][j / 2][j % 2 * 2];
              place[head_dim_v] += sums[c][b][j / 2][j % 2 * 2 + 1];
            }
          }
        }
      }
    }
    __syncthreads();
  }
  for (int i = threadIdx.x; i < queries * head_dim_v; i += kAttendWarps * kWarpLanes) {
    const int n = i / head_dim_v, d = i % head_dim_v;
    const int64_t target = rules[n].target;
    if (target < 0) break;
    float greatest = -infinity(), sum = 0.0f;
    for (int w = 0; w < kAttendWarps; ++w) greatest = fmaxf(greatest, warp_max[w][n]);
    const float from = greatest == -infinity() ? 0.0f : greatest;
    for (int w = 0; w < kAttendWarps; ++w) sum += warp_sum[w][n] * exp2f((warp_max[w][n] - from) * kLog2E);
    out[target * head_dim_v + d] = sum == 0.0f ? 0.0f : merged[i] / sum;
    if (d == 0) lse[target] = sum == 0.0f ? -infinity() : from + logf(sum);
  }
}

}  // namespace csd
