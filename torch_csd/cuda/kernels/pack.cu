// Tokens to page images, and page images to tokens.
//
// A block takes one kv head's K or V of one page. K changes its order on the way, through shared memory,
// kChannels at a time; V does not.
#include "quantise.cuh"

namespace csd {

constexpr int kPackThreads = 256;
constexpr int kChannels = 64;
constexpr int kStride =
    kChannels + 1;  // of shared memory: neighbours along either axis lie in different banks

struct Sizes {
  int num_kv_heads, head_dim_k, head_dim_v;
};

template <typename Element>
struct Places {
  int64_t k_bytes, v_bytes, k_params, v_params, end, tile_bytes;

  CSD_DEVICE explicit Places(const Sizes& sizes) {
    k_bytes = static_cast<int64_t>(sizes.head_dim_k) * kPageTokens * Element::kBits / 8;
    v_bytes = static_cast<int64_t>(sizes.head_dim_v) * kPageTokens * Element::kBits / 8;
    k_params = k_bytes + v_bytes;
    v_params = k_params + 4 * sizes.head_dim_k;
    end = Element::kCodes ? v_params + 4 * kPageTokens : k_params;
    tile_bytes = round_up(end, 64);
  }
};

// Tokens of one row and one kv head. Those beyond the last are zeros.
template <typename Source>
struct Tokens {
  const typename Source::Bits* first;
  int64_t stride;
  int count;

  CSD_DEVICE typename Source::Bits bits(int token, int channel) const {
    return token < count ? first[token * stride + channel] : 0;
  }
};

CSD_DEVICE void zero_bytes(uint8_t* begin, const uint8_t* end) {
  for (uint8_t* byte = begin + threadIdx.x; byte < end; byte += kPackThreads) *byte = 0;
}

// Elements of full precision go out four bytes at a time: one float, or two neighbours.
template <typename Source, typename Element>
struct Packer {
  using Bits = typename Element::Bits;
  static constexpr int kWordElements = 32 / Element::kBits;

  template <typename Get>
  static CSD_DEVICE uint32_t word(const Get& get) {
    uint32_t result = 0;
#pragma unroll
    for (int i = 0; i < kWordElements; ++i)
      result |= static_cast<uint32_t>(get(i)) << (Element::kBits * i % 32);
    return result;
  }

  static CSD_DEVICE void pack_k(const Tokens<Source>& tokens, int head_dim, uint8_t* tile, uint8_t*) {
    __shared__ Bits staged[kPageTokens * kStride];
    auto* words = reinterpret_cast<uint32_t*>(tile);
    constexpr int kLineWords = kPageTokens / kWordElements;
    for (int begin = 0; begin < head_dim; begin += kChannels) {
      const int channels = min(head_dim - begin, kChannels);
      for (int i = threadIdx.x; i < kPageTokens * kChannels; i += kPackThreads) {
        const int token = i / kChannels, channel = i % kChannels;
        if (channel < channels) {
          staged[token * kStride + channel] =
              Convert<Source, Element>::of(tokens.bits(token, begin + channel));
        }
      }
      __syncthreads();
      for (int i = threadIdx.x; i < channels * kLineWords; i += kPackThreads) {
        const int channel = i / kLineWords, token = i % kLineWords * kWordElements;
        words[begin * kLineWords + i] = word([&](int j) { return staged[(token + j) * kStride + channel]; });
      }
      __syncthreads();
    }
  }

  static CSD_DEVICE void pack_v(const Tokens<Source>& tokens, int head_dim, uint8_t* tile, uint8_t*) {
    auto* words = reinterpret_cast<uint32_t*>(tile);
    const int row_words = head_dim / kWordElements;
    for (int i = threadIdx.x; i < kPageTokens * row_words; i += kPackThreads) {
      const int token = i / row_words, channel = i % row_words * kWordElements;
      words[i] = word([&](int j) { return Convert<Source, Element>::of(tokens.bits(token, channel + j)); });
    }
  }
};

// Codes of both members of a line's word pair go out at once.
template <typename Source, int code_bits>
struct Packer<Source, Codes<code_bits>> {
  static constexpr int kWordCodes = 16 / code_bits;
  static constexpr float kTop = (1 << code_bits) - 1;

  // get(member, lane): a value. The pair's word `place` of a line of `lanes`.
  template <typename Get>
  static CSD_DEVICE uint32_t word_pair(int place, int lanes, const CodeParams& even, const CodeParams& odd,
                                       const Get& get) {
    const int step = lanes / kWordCodes;
    uint32_t result = 0;
#pragma unroll
    for (int i = 0; i < kWordCodes; ++i) {
      result |= code_of(get(0, place + step * i), even, kTop) << (code_bits * i);
      result |= code_of(get(1, place + step * i), odd, kTop) << (code_bits * i + 16);
    }
    return result;
  }

  static CSD_DEVICE void pack_k(const Tokens<Source>& tokens, int head_dim, uint8_t* tile, uint8_t* params) {
    __shared__ float staged[kPageTokens * kStride];
    __shared__ CodeParams groups[kChannels];
    auto* words = reinterpret_cast<uint32_t*>(tile);
    auto* halves = reinterpret_cast<uint16_t*>(params);
    constexpr int kLinePairs = kPageTokens / kWordCodes;
    constexpr int kSharers = kPackThreads / kChannels;  // threads of one channel, side by side in a warp
    for (int begin = 0; begin < head_dim; begin += kChannels) {
      const int channels = min(head_dim - begin, kChannels);
      for (int i = threadIdx.x; i < kPageTokens * kChannels; i += kPackThreads) {
        const int token = i / kChannels, channel = i % kChannels;
        const bool inside = channel < channels;
        staged[token * kStride + channel] =
            inside ? widen(Source(), tokens.bits(token, begin + channel)) : 0.0f;
      }
      __syncthreads();
      const int own = threadIdx.x / kSharers;
      Range range = {infinity(), -infinity(), true};
      for (int token = threadIdx.x % kSharers; token < kPageTokens; token += kSharers) {
        range.see(staged[token * kStride + own]);
      }
      range.merge(kSharers);
      if (threadIdx.x % kSharers == 0) {
        groups[own] = code_params(code_bits, range);
        if (own < channels) {
          halves[begin + own] = groups[own].scale_half;
          halves[head_dim + begin + own] = groups[own].zero_half;
        }
      }
      __syncthreads();
      for (int i = threadIdx.x; i < channels / 2 * kLinePairs; i += kPackThreads) {
        const int even = i / kLinePairs * 2;
        words[begin / 2 * kLinePairs + i] =
            word_pair(i % kLinePairs, kPageTokens, groups[even], groups[even + 1],
                      [&](int member, int token) { return staged[token * kStride + even + member]; });
      }
      __syncthreads();
    }
  }

  static CSD_DEVICE void pack_v(const Tokens<Source>& tokens, int head_dim, uint8_t* tile, uint8_t* params) {
    auto* halves = reinterpret_cast<uint16_t*>(params);
    const int lane = threadIdx.x % kWarpLanes;
    constexpr int kBlockPairs = kCodeBlockLanes / kWordCodes;
    const int line_pairs = head_dim / kWordCodes;
    // A warp takes two tokens: their values are read again from the cache.
    for (int line = threadIdx.x / kWarpLanes; line < kPageTokens / 2; line += kPackThreads / kWarpLanes) {
      CodeParams groups[2];
#pragma unroll
      for (int member = 0; member < 2; ++member) {
        const int token = 2 * line + member;
        Range range = {infinity(), -infinity(), true};
        for (int d = lane; d < head_dim; d += kWarpLanes) range.see(widen(Source(), tokens.bits(token, d)));
        range.merge(kWarpLanes);
        groups[member] = code_params(code_bits, range);
        if (lane == 0) {
          halves[token] = groups[member].scale_half;
          halves[kPageTokens + token] = groups[member].zero_half;
        }
      }
      auto* words = reinterpret_cast<uint32_t*>(tile) + line * line_pairs;
      for (int i = lane; i < line_pairs; i += kWarpLanes) {
        const int block = i / kBlockPairs * kCodeBlockLanes;
        words[i] = word_pair(i % kBlockPairs, block_lanes(head_dim, block), groups[0], groups[1],
                             [&](int member, int channel) {
                               return widen(Source(), tokens.bits(2 * line + member, block + channel));
                             });
      }
    }
  }
};

// Grid: (page_count, num_kv_heads, 2 * batch). Page p of a row takes the tokens from token_begin + 64 * p on;
// slots beyond the last token, and the padding of tiles and pages, become zeros.
template <typename Source, typename Element>
__global__ void __launch_bounds__(kPackThreads)
    pack(const typename Source::Bits* __restrict__ k,  // [batch, num_kv_heads, tokens, head_dim_k], dense in
                                                       // the last
         int64_t k_row, int64_t k_head, int64_t k_token,  // strides in elements
         const typename Source::Bits* __restrict__ v, int64_t v_row, int64_t v_head, int64_t v_token,
         int token_begin, int token_count,  // of those in k and v
         int head_dim_k, int head_dim_v, uint8_t* __restrict__ images, int64_t row_bytes,
         int64_t page_bytes) {
  const Sizes sizes = {static_cast<int>(gridDim.y), head_dim_k, head_dim_v};
  const Places<Element> places(sizes);
  const int64_t row = blockIdx.z / 2, head = blockIdx.y;
  const int begin = token_begin + static_cast<int>(blockIdx.x) * kPageTokens;
  const int count = min(token_count - begin, kPageTokens);
  uint8_t* page = images + row * row_bytes + blockIdx.x * page_bytes;
  uint8_t* tile = page + head * places.tile_bytes;
  if (blockIdx.z % 2 == 0) {
    const Tokens<Source> tokens = {k + row * k_row + head * k_head + begin * k_token, k_token, count};
    Packer<Source, Element>::pack_k(tokens, head_dim_k, tile, tile + places.k_params);
  } else {
    const Tokens<Source> tokens = {v + row * v_row + head * v_head + begin * v_token, v_token, count};
    Packer<Source, Element>::pack_v(tokens, head_dim_v, tile + places.k_bytes, tile + places.v_params);
    zero_bytes(tile + places.end, tile + places.tile_bytes);
    if (blockIdx.y == gridDim.y - 1) zero_bytes(tile + places.tile_bytes, page + page_bytes);
  }
}

// ---- the other way ----

template <typename Element, typename Target>
struct Unpacker {
  static CSD_DEVICE typename Target::Bits k(const uint8_t* codes, const uint8_t*, int, int channel,
                                            int token) {
    return Convert<Element, Target>::of(
        reinterpret_cast<const typename Element::Bits*>(codes)[channel * kPageTokens + token]);
  }
  static CSD_DEVICE typename Target::Bits v(const uint8_t* codes, const uint8_t*, int head_dim, int channel,
                                            int token) {
    return Convert<Element, Target>::of(
        reinterpret_cast<const typename Element::Bits*>(codes)[token * head_dim + channel]);
  }
};

template <int code_bits, typename Target>
struct Unpacker<Codes<code_bits>, Target> {
  static CSD_DEVICE typename Target::Bits value(uint16_t word, int shift, uint16_t scale, uint16_t zero) {
    const float code = static_cast<float>((word >> shift) & ((1 << code_bits) - 1));
    return narrow(Target(), __fadd_rn(half_to_float(zero), __fmul_rn(half_to_float(scale), code)));
  }
  static CSD_DEVICE typename Target::Bits k(const uint8_t* codes, const uint8_t* params, int head_dim,
                                            int channel, int token) {
    const auto* halves = reinterpret_cast<const uint16_t*>(params);
    const CodePlace place = code_place(code_bits, kPageTokens, channel % 2, token);
    const auto* line =
        reinterpret_cast<const uint16_t*>(codes) + channel / 2 * line_words(code_bits, kPageTokens);
    return value(line[place.word], place.shift, halves[channel], halves[head_dim + channel]);
  }
  static CSD_DEVICE typename Target::Bits v(const uint8_t* codes, const uint8_t* params, int head_dim,
                                            int channel, int token) {
    const auto* halves = reinterpret_cast<const uint16_t*>(params);
    const int block = channel / kCodeBlockLanes * kCodeBlockLanes;
    const CodePlace place = code_place(code_bits, block_lanes(head_dim, block), token % 2, channel - block);
    const auto* line = reinterpret_cast<const uint16_t*>(codes) +
                       token / 2 * line_words(code_bits, head_dim) + line_words(code_bits, block);
    return value(line[place.word], place.shift, halves[token], halves[kPageTokens + token]);
  }
};

// Grid: (page_count, num_kv_heads, 2). Slots that hold no token give what is there.
template <typename Element, typename Target>
__global__ void __launch_bounds__(kPackThreads)
    unpack(const int64_t* __restrict__ addresses,  // of page images
           int head_dim_k, int head_dim_v,
           typename Target::Bits* __restrict__ k,    // [page_count, num_kv_heads, 64, head_dim_k]
           typename Target::Bits* __restrict__ v) {  // [page_count, num_kv_heads, 64, head_dim_v]
  __shared__ typename Target::Bits staged[kChannels * kStride];
  const Sizes sizes = {static_cast<int>(gridDim.y), head_dim_k, head_dim_v};
  const Places<Element> places(sizes);
  const auto* tile = reinterpret_cast<const uint8_t*>(addresses[blockIdx.x]) +
                     static_cast<int64_t>(blockIdx.y) * places.tile_bytes;
  const int64_t tile_number = static_cast<int64_t>(blockIdx.x) * gridDim.y + blockIdx.y;
  if (blockIdx.z == 1) {
    auto* target = v + tile_number * kPageTokens * head_dim_v;
    for (int i = threadIdx.x; i < kPageTokens * head_dim_v; i += kPackThreads) {
      target[i] = Unpacker<Element, Target>::v(tile + places.k_bytes, tile + places.v_params, head_dim_v,
                                               i % head_dim_v, i / head_dim_v);
    }
    return;
  }
  auto* target = k + tile_number * kPageTokens * head_dim_k;
  for (int begin = 0; begin < head_dim_k; begin += kChannels) {
    const int channels = min(head_dim_k - begin, kChannels);
    for (int i = threadIdx.x; i < channels * kPageTokens; i += kPackThreads) {
      const int channel = i / kPageTokens, token = i % kPageTokens;
      staged[channel * kStride + token] =
          Unpacker<Element, Target>::k(tile, tile + places.k_params, head_dim_k, begin + channel, token);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kPageTokens * kChannels; i += kPackThreads) {
      const int token = i / kChannels, channel = i % kChannels;
      if (channel < channels)
        target[token * head_dim_k + begin + channel] = staged[channel * kStride + token];
    }
    __syncthreads();
  }
}

}  // namespace csd
