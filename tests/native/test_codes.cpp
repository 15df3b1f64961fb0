// The kernels of quantised tiles: every instruction set against the plain one. Codes and parameters must be
// equal to the bit, so that a store means the same to every processor; scores and sums as near as integers of
// 16 bits are. Plain program: prints what it did, exits non-zero on the first failure.
//
// In one line, from the repository's root:
//
//   g++ -std=c++17 -O2 -g -Wall -Wextra -Icsrc tests/native/test_codes.cpp csrc/kernels/*.cpp
//   csrc/base/error.cpp -o test_codes

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "base/types.h"
#include "kernels/kernels.h"

using namespace csd;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Of the sum of |weight| * (|zero| + scale * code): a 16-bit weight is off by 2^-16 of the largest one.
constexpr double kTolerance = 1e-4;

[[noreturn]] void fail(const char* kernels, const std::string& what) {
  std::fprintf(stderr, "%s: %s\n", kernels, what.c_str());
  std::exit(1);
}

std::string describe(int code_bits, DType dtype, int64_t head_dim, const char* values) {
  return std::to_string(code_bits) + " bits, " + dtype_name(dtype) + ", head_dim " +
         std::to_string(head_dim) + ", " + values + ": ";
}

// Bytes on a cache line, with guards behind them.
class Buffer {
 public:
  explicit Buffer(int64_t bytes) : bytes_(bytes), storage_(static_cast<size_t>(bytes + 128), kGuard) {}
  Buffer(const Buffer& other) : Buffer(other.bytes_) {
    std::memcpy(data(), other.begin(), static_cast<size_t>(bytes_));
  }
  uint8_t* data() { return const_cast<uint8_t*>(begin()); }
  template <typename T>
  T* as() {
    return reinterpret_cast<T*>(data());
  }
  int64_t bytes() const { return bytes_; }
  bool intact() {
    for (uint8_t* p = data() + bytes_; p < storage_.data() + storage_.size(); ++p) {
      if (*p != kGuard) return false;
    }
    return true;
  }

 private:
  const uint8_t* begin() const {
    return reinterpret_cast<const uint8_t*>((reinterpret_cast<uintptr_t>(storage_.data()) + 63) / 64 * 64);
  }

  static constexpr uint8_t kGuard = 0xa5;
  int64_t bytes_;
  std::vector<uint8_t> storage_;
};

struct Tile {
  Tile(int code_bits, int64_t head_dim)
      : codes(head_dim * kPageTokens * code_bits / 8), k_params(4 * head_dim), v_params(4 * kPageTokens) {}
  Buffer codes;
  Buffer k_params;
  Buffer v_params;
};

using Values = float (*)(std::mt19937* random, int64_t token, int64_t channel);

float normal(std::mt19937* random, int64_t, int64_t) { return std::normal_distribution<float>()(*random); }

// Each group of K or of V gets its own hardship.
float hard(std::mt19937* random, int64_t group, int64_t member) {
  const float x = normal(random, 0, 0);
  switch (group % 16) {
    case 0:
      return 1.5f;
    case 1:
      return member == 7 ? kInfinity : x;
    case 2:
      return member == 3 ? -kInfinity : x;
    case 3:
      return member == 5 ? kNan : x;
    case 4:
      return 1e30f * x;
    case 5:
      return 1e-8f * x;
    case 6:
      return member % 2 == 0 ? 0.0f : -0.0f;
    case 7:
      return -0.0f;
    case 8:
      return member == 0 ? std::numeric_limits<float>::max() : -std::numeric_limits<float>::max();
    case 9:
      return 65504.0f + 100.0f * x;
    case 10:
      return -70000.0f - std::fabs(x);
    case 11:
      return 1e-40f * x;
    case 12:
      return kNan;
    case 13:
      return static_cast<float>(member);  // codes end between integers
    case 14:
      return member == 6 ? 1e5f : x;
    default:
      return x;
  }
}
float hard_channels(std::mt19937* random, int64_t token, int64_t channel) {
  return hard(random, channel, token);
}
float hard_tokens(std::mt19937* random, int64_t token, int64_t channel) {
  return hard(random, token, channel);
}

// [kPageTokens][stride] of dtype.
Buffer make_source(std::mt19937* random, DType dtype, int64_t head_dim, int64_t stride, Values values) {
  Buffer source(kPageTokens * stride * element_bytes(dtype));
  for (int64_t t = 0; t < kPageTokens; ++t) {
    std::vector<float> token(static_cast<size_t>(head_dim));
    for (int64_t d = 0; d < head_dim; ++d) token[static_cast<size_t>(d)] = values(random, t, d);
    kSerialKernels.store(dtype, token.data(), 1.0f, head_dim,
                         source.data() + t * stride * element_bytes(dtype));
  }
  return source;
}

void expect_equal(const Kernels& kernels, const std::string& what, Buffer* ours, Buffer* expected) {
  if (!ours->intact()) fail(kernels.name, what + " writes past its end");
  for (int64_t i = 0; i < ours->bytes(); ++i) {
    if (ours->data()[i] != expected->data()[i]) {
      fail(kernels.name, what + " differs at byte " + std::to_string(i) + ": " +
                             std::to_string(ours->data()[i]) + ", serial " +
                             std::to_string(expected->data()[i]));
    }
  }
}

void expect_near(const Kernels& kernels, const std::string& what, const float* ours, const float* expected,
                 const double* magnitude, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const bool both_nan = std::isnan(ours[i]) && std::isnan(expected[i]);
    if (both_nan || std::fabs(double{ours[i]} - expected[i]) <= kTolerance * magnitude[i]) continue;
    fail(kernels.name, what + " differs at " + std::to_string(i) + ": " + std::to_string(ours[i]) +
                           ", serial " + std::to_string(expected[i]) + ", of products of " +
                           std::to_string(magnitude[i]));
  }
}

struct Case {
  int code_bits;
  DType dtype;
  int64_t head_dim;
  const char* name;
  Values values;
};

void test_k(const Kernels& kernels, const Case& test, std::mt19937* random) {
  const int64_t head_dim = test.head_dim;
  const std::string what = describe(test.code_bits, test.dtype, head_dim, test.name);
  const int64_t stride = head_dim + 24;
  Buffer source = make_source(random, test.dtype, head_dim, stride, test.values);
  Tile ours(test.code_bits, head_dim), expected(test.code_bits, head_dim);
  kSerialKernels.quantise_k(test.code_bits, test.dtype, source.data(), stride, head_dim,
                            expected.codes.data(), expected.k_params.as<uint16_t>());
  kernels.quantise_k(test.code_bits, test.dtype, source.data(), stride, head_dim, ours.codes.data(),
                     ours.k_params.as<uint16_t>());
  expect_equal(kernels, what + "K's parameters", &ours.k_params, &expected.k_params);
  expect_equal(kernels, what + "K's codes", &ours.codes, &expected.codes);

  std::vector<float> k(static_cast<size_t>(kPageTokens * head_dim));  // |zero| + scale * code
  Buffer positive = ours.k_params;
  for (int64_t d = 0; d < head_dim; ++d) positive.as<uint16_t>()[head_dim + d] &= 0x7fff;
  kSerialKernels.dequantise_k(test.code_bits, ours.codes.data(), positive.as<uint16_t>(), head_dim, 0,
                              kPageTokens, DType::kFloat32, head_dim, k.data());
  for (int64_t token_begin : {0, 13}) {
    const int64_t token_count = token_begin == 0 ? kPageTokens : 22;
    Buffer tokens(kPageTokens * head_dim * element_bytes(test.dtype));
    Buffer expected_tokens(tokens.bytes());
    kernels.dequantise_k(test.code_bits, ours.codes.data(), ours.k_params.as<uint16_t>(), head_dim,
                         token_begin, token_count, test.dtype, head_dim, tokens.data());
    kSerialKernels.dequantise_k(test.code_bits, ours.codes.data(), ours.k_params.as<uint16_t>(), head_dim,
                                token_begin, token_count, test.dtype, head_dim, expected_tokens.data());
    expect_equal(kernels, what + "dequantised K", &tokens, &expected_tokens);
  }

  for (int64_t query_count : {1, 2, 3, 4, 5, 6, 8, 33}) {
    std::vector<float> q(static_cast<size_t>(query_count * head_dim));
    for (float& x : q) x = normal(random, 0, 0);
    std::vector<double> magnitude(static_cast<size_t>(query_count * kPageTokens));
    for (int64_t m = 0; m < query_count; ++m) {
      for (int64_t t = 0; t < kPageTokens; ++t) {
        double sum = 0.0;
        for (int64_t d = 0; d < head_dim; ++d) {
          sum += std::fabs(double{q[static_cast<size_t>(m * head_dim + d)]} *
                           k[static_cast<size_t>(t * head_dim + d)]);
        }
        magnitude[static_cast<size_t>(m * kPageTokens + t)] = sum;
      }
    }
    Buffer scores(query_count * kPageTokens * 4), expected_scores(query_count * kPageTokens * 4);
    kernels.score_codes(test.code_bits, q.data(), ours.codes.data(), ours.k_params.as<uint16_t>(),
                        query_count, head_dim, scores.as<float>());
    kSerialKernels.score_codes(test.code_bits, q.data(), ours.codes.data(), ours.k_params.as<uint16_t>(),
                               query_count, head_dim, expected_scores.as<float>());
    if (!scores.intact()) fail(kernels.name, what + "score_codes writes past its end");
    expect_near(kernels, what + "scores of " + std::to_string(query_count) + " queries", scores.as<float>(),
                expected_scores.as<float>(), magnitude.data(), query_count * kPageTokens);
  }
}

void test_v(const Kernels& kernels, const Case& test, std::mt19937* random) {
  const int64_t head_dim = test.head_dim;
  const std::string what = describe(test.code_bits, test.dtype, head_dim, test.name);
  const int64_t stride = head_dim + 40;
  Buffer source = make_source(random, test.dtype, head_dim, stride, test.values);
  Tile ours(test.code_bits, head_dim), expected(test.code_bits, head_dim);
  kSerialKernels.quantise_v(test.code_bits, test.dtype, source.data(), stride, head_dim,
                            expected.codes.data(), expected.v_params.as<uint16_t>());
  kernels.quantise_v(test.code_bits, test.dtype, source.data(), stride, head_dim, ours.codes.data(),
                     ours.v_params.as<uint16_t>());
  expect_equal(kernels, what + "V's parameters", &ours.v_params, &expected.v_params);
  expect_equal(kernels, what + "V's codes", &ours.codes, &expected.codes);

  std::vector<float> v(static_cast<size_t>(kPageTokens * head_dim));  // |zero| + scale * code
  Buffer positive = ours.v_params;
  for (int64_t t = 0; t < kPageTokens; ++t) positive.as<uint16_t>()[kPageTokens + t] &= 0x7fff;
  kSerialKernels.dequantise_v(test.code_bits, ours.codes.data(), positive.as<uint16_t>(), head_dim, 0,
                              kPageTokens, DType::kFloat32, head_dim, v.data());
  for (int64_t token_begin : {0, 13}) {
    const int64_t token_count = token_begin == 0 ? kPageTokens : 22;
    Buffer tokens(kPageTokens * head_dim * element_bytes(test.dtype));
    Buffer expected_tokens(tokens.bytes());
    kernels.dequantise_v(test.code_bits, ours.codes.data(), ours.v_params.as<uint16_t>(), head_dim,
                         token_begin, token_count, test.dtype, head_dim, tokens.data());
    kSerialKernels.dequantise_v(test.code_bits, ours.codes.data(), ours.v_params.as<uint16_t>(), head_dim,
                                token_begin, token_count, test.dtype, head_dim, expected_tokens.data());
    expect_equal(kernels, what + "dequantised V", &tokens, &expected_tokens);
  }

  struct Range {
    int64_t begin, end;
  };
  for (const Range range : {Range{0, 64}, Range{5, 64}, Range{0, 31}, Range{15, 16}, Range{16, 49}}) {
    // The parameters of other tokens do not matter, nor does their p.
    Tile masked = ours;
    for (int64_t t = 0; t < kPageTokens; ++t) {
      if (t >= range.begin && t < range.end) continue;
      masked.v_params.as<uint16_t>()[t] = 0x7e00;
      masked.v_params.as<uint16_t>()[kPageTokens + t] = 0x7e00;
    }
    for (int64_t query_count : {1, 2, 3, 4, 5, 6, 8, 33}) {
      std::vector<float> p(static_cast<size_t>(query_count * kPageTokens));
      std::vector<float> shrink(static_cast<size_t>(query_count), 0.75f);
      Buffer out(query_count * head_dim * 4), expected_out(query_count * head_dim * 4);
      std::vector<double> magnitude(static_cast<size_t>(query_count * head_dim));
      for (int64_t m = 0; m < query_count; ++m) {
        for (int64_t t = 0; t < kPageTokens; ++t) {
          const bool inside = t >= range.begin && t < range.end;
          p[static_cast<size_t>(m * kPageTokens + t)] =
              inside ? std::exp(-4.0f * std::fabs(normal(random, 0, 0))) : kNan;
        }
        for (int64_t d = 0; d < head_dim; ++d) {
          const auto i = static_cast<size_t>(m * head_dim + d);
          out.as<float>()[i] = expected_out.as<float>()[i] = normal(random, 0, 0);
          magnitude[i] = std::fabs(out.as<float>()[i]);
          for (int64_t t = range.begin; t < range.end; ++t) {
            magnitude[i] += std::fabs(double{p[static_cast<size_t>(m * kPageTokens + t)]} *
                                      v[static_cast<size_t>(t * head_dim + d)]);
          }
        }
      }
      kernels.accumulate_codes(test.code_bits, p.data(), shrink.data(), masked.codes.data(),
                               masked.v_params.as<uint16_t>(), query_count, head_dim, range.begin, range.end,
                               out.as<float>());
      kSerialKernels.accumulate_codes(test.code_bits, p.data(), shrink.data(), masked.codes.data(),
                                      masked.v_params.as<uint16_t>(), query_count, head_dim, range.begin,
                                      range.end, expected_out.as<float>());
      if (!out.intact()) fail(kernels.name, what + "accumulate_codes writes past its end");
      expect_near(kernels,
                  what + "sums of " + std::to_string(query_count) + " queries over tokens " +
                      std::to_string(range.begin) + ".." + std::to_string(range.end),
                  out.as<float>(), expected_out.as<float>(), magnitude.data(), query_count * head_dim);
    }
  }
}

// The largest sums int32 must hold: every code and every weight at its top.
void test_largest_sums(const Kernels& kernels) {
  for (int code_bits : {4, 8}) {
    const int64_t head_dim = kHeadDimMax;
    Tile tile(code_bits, head_dim);
    std::memset(tile.codes.data(), 0xff, static_cast<size_t>(tile.codes.bytes()));
    for (int64_t d = 0; d < 2 * head_dim; ++d) tile.k_params.as<uint16_t>()[d] = d < head_dim ? 0x3c00 : 0;
    const std::vector<float> q(static_cast<size_t>(head_dim), 1.0f);
    Buffer scores(kPageTokens * 4);
    kernels.score_codes(code_bits, q.data(), tile.codes.data(), tile.k_params.as<uint16_t>(), 1, head_dim,
                        scores.as<float>());
    const double expected = static_cast<double>(head_dim * ((1 << code_bits) - 1));
    for (int64_t t = 0; t < kPageTokens; ++t) {
      if (std::fabs(scores.as<float>()[t] - expected) > kTolerance * expected) {
        fail(kernels.name, "the largest sum overflows: " + std::to_string(scores.as<float>()[t]));
      }
    }
  }
}

}  // namespace

int main() {
  std::string names = supported_kernels();
  for (size_t begin = 0; begin < names.size();) {
    const size_t end = std::min(names.find(',', begin), names.size());
    const Kernels& kernels = select_kernels(names.substr(begin, end - begin).c_str());
    begin = end + 1;
    std::mt19937 random(7);
    for (int code_bits : {4, 8}) {
      for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
        for (int64_t head_dim : {8, 16, 24, 40, 56, 64, 72, 96, 104, 128, 192, 256, 376, 512, 576}) {
          test_k(kernels, {code_bits, dtype, head_dim, "normal values", normal}, &random);
          test_k(kernels, {code_bits, dtype, head_dim, "hard channels", hard_channels}, &random);
          test_v(kernels, {code_bits, dtype, head_dim, "normal values", normal}, &random);
          test_v(kernels, {code_bits, dtype, head_dim, "hard tokens", hard_tokens}, &random);
        }
      }
    }
    test_largest_sums(kernels);
    std::printf("%s: ok\n", kernels.name);
  }
}
