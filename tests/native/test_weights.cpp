// The kernels of quantised rows: every instruction set against the plain one. Rows must be equal to the bit,
// sums as near as their order allows, and nothing outside of the operands is touched: each ends where memory
// ends, so that rows begin at odd addresses too. Plain program: exits non-zero on the first failure.
//
// In one line, from the repository's root:
//
//   g++ -std=c++17 -O2 -g -Wall -Wextra -Icsrc tests/native/test_weights.cpp csrc/kernels/*.cpp
//   csrc/base/error.cpp -o test_weights

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "base/types.h"
#include "kernels/kernels.h"
#include "kernels/weights.h"

using namespace csd;

namespace {

// Of the sum of |x * weight|: fp32 rounding of at most 1089 products, added up in some order.
constexpr double kTolerance = 2e-6;

[[noreturn]] void fail(const char* kernels, const std::string& what) {
  std::fprintf(stderr, "%s: %s\n", kernels, what.c_str());
  std::exit(1);
}

// Bytes right before a page that may not be touched, with guards before them.
class Buffer {
 public:
  explicit Buffer(int64_t bytes) : bytes_(static_cast<size_t>(bytes)) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    mapped_bytes_ = (bytes_ + kGuardBytes + page - 1) / page * page + page;
    void* mapped = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) fail("mmap", "no memory");
    mapped_ = static_cast<uint8_t*>(mapped);
    mprotect(mapped_ + mapped_bytes_ - page, page, PROT_NONE);
    data_ = mapped_ + mapped_bytes_ - page - bytes_;
    std::memset(data_ - kGuardBytes, kGuard, bytes_ + kGuardBytes);
  }
  ~Buffer() { munmap(mapped_, mapped_bytes_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  uint8_t* data() const { return data_; }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }
  bool intact() const {
    return std::all_of(data_ - kGuardBytes, data_, [](uint8_t byte) { return byte == kGuard; });
  }
  bool operator==(const Buffer& other) const { return std::memcmp(data_, other.data_, bytes_) == 0; }

 private:
  static constexpr uint8_t kGuard = 0xa5;
  static constexpr size_t kGuardBytes = 64;
  size_t bytes_;
  size_t mapped_bytes_;
  uint8_t* mapped_;
  uint8_t* data_;
};

struct Case {
  int code_bits;
  DType dtype;
  int64_t in_features;
  int64_t row_count;
};

void test(const Kernels& kernels, const Case& test, std::mt19937* random) {
  const int64_t in_features = test.in_features;
  const std::string what = std::to_string(test.code_bits) + " bits, " + dtype_name(test.dtype) + ", " +
                           std::to_string(in_features) + " features: ";
  std::normal_distribution<float> normal;
  const int64_t row_bytes = weight_row_bytes(test.code_bits, in_features);
  const int64_t source_bytes = in_features * element_bytes(test.dtype);
  // One byte behind the last row: they begin at odd addresses.
  Buffer rows(test.row_count * row_bytes + 1), expected_rows(test.row_count * row_bytes + 1);
  for (int64_t n = 0; n < test.row_count; ++n) {
    std::vector<float> values(static_cast<size_t>(in_features));
    for (float& value : values) value = normal(*random);
    Buffer source(source_bytes);
    kSerialKernels.store(test.dtype, values.data(), 1.0f, in_features, source.data());
    kernels.quantise_weight_row(test.code_bits, test.dtype, source.data(), in_features,
                                rows.data() + n * row_bytes);
    kSerialKernels.quantise_weight_row(test.code_bits, test.dtype, source.data(), in_features,
                                       expected_rows.data() + n * row_bytes);
    // A row of its own, which ends where memory ends.
    Buffer row(row_bytes);
    kernels.quantise_weight_row(test.code_bits, test.dtype, source.data(), in_features, row.data());
    if (!row.intact() || std::memcmp(row.data(), expected_rows.data() + n * row_bytes, row_bytes) != 0) {
      fail(kernels.name, what + "a row differs, or more than it was written");
    }
    Buffer target(source_bytes), expected_target(source_bytes);
    kernels.dequantise_weight_row(test.code_bits, row.data(), in_features, test.dtype, target.data());
    kSerialKernels.dequantise_weight_row(test.code_bits, row.data(), in_features, test.dtype,
                                         expected_target.data());
    if (!target.intact() || !(target == expected_target)) {
      fail(kernels.name, what + "what a row stands for differs, or more was written");
    }
  }
  if (!rows.intact() || !(rows == expected_rows)) fail(kernels.name, what + "rows differ");

  std::vector<float> weight(static_cast<size_t>(test.row_count * in_features));
  for (int64_t n = 0; n < test.row_count; ++n) {
    kSerialKernels.dequantise_weight_row(test.code_bits, rows.data() + n * row_bytes, in_features,
                                         DType::kFloat32, weight.data() + n * in_features);
  }
  const int64_t padded = weight_group_count(in_features) * kWeightGroup;
  for (int64_t x_count = 1; x_count <= kWeightDotsMax; ++x_count) {
    Buffer x(x_count * padded * 4);
    for (int64_t i = 0; i < x_count * padded; ++i) {
      x.as<float>()[i] = i % padded < in_features ? normal(*random) : 0.0f;
    }
    const int64_t out_stride = test.row_count + 3;
    Buffer out(x_count * out_stride * 4);
    std::fill_n(out.as<float>(), x_count * out_stride, -1.0f);
    // Once from an odd address, once to where memory ends.
    kernels.weight_dots(test.code_bits, x.as<float>(), x_count, rows.data(), test.row_count, in_features,
                        out.as<float>(), out_stride);
    Buffer moved(test.row_count * row_bytes);
    std::memcpy(moved.data(), rows.data(), static_cast<size_t>(test.row_count * row_bytes));
    Buffer again(x_count * out_stride * 4);
    std::fill_n(again.as<float>(), x_count * out_stride, -1.0f);
    kernels.weight_dots(test.code_bits, x.as<float>(), x_count, moved.data(), test.row_count, in_features,
                        again.as<float>(), out_stride);
    if (!out.intact() || !(out == again)) fail(kernels.name, what + "sums depend on where rows lie");
    for (int64_t m = 0; m < x_count; ++m) {
      for (int64_t n = 0; n < out_stride; ++n) {
        double sum = n < test.row_count ? 0.0 : -1.0, magnitude = 0.0;
        for (int64_t i = 0; n < test.row_count && i < in_features; ++i) {
          const double product =
              double{x.as<float>()[m * padded + i]} * weight[static_cast<size_t>(n * in_features + i)];
          sum += product;
          magnitude += std::fabs(product);
        }
        const double off = std::fabs(out.as<float>()[m * out_stride + n] - sum);
        if (!(off <= kTolerance * magnitude)) {
          fail(kernels.name, what + "row " + std::to_string(n) + " by " + std::to_string(m) + " of " +
                                 std::to_string(x_count) + " is off by " + std::to_string(off));
        }
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
        for (int64_t in_features : {1,  2,  7,  8,   15,  16,  17,  31,  32,  33,  47,  48,   49,
                                    63, 64, 65, 127, 128, 129, 200, 447, 512, 513, 960, 1024, 1089}) {
          for (int64_t row_count : {1, 4, 7}) {
            test(kernels, {code_bits, dtype, in_features, row_count}, &random);
          }
        }
      }
    }
    std::printf("%s: ok\n", kernels.name);
  }
}
