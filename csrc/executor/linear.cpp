#include "executor/linear.h"

#include <algorithm>
#include <atomic>

#include "base/aligned_buffer.h"
#include "kernels/weights.h"

namespace csd {
namespace {

// Rows that a thread takes at a time. Small enough that threads end together where one of them is
// interrupted, and that the block stays in the cache while all of x passes: 110 KiB of int4 at 6144 features.
constexpr int64_t kRowBlock = 32;

// Calls task(begin, end) for blocks of rows, on as many threads as the work is worth.
template <typename Task>
void over_rows(const LinearContext& context, int64_t row_count, int64_t threads_worth, const Task& task) {
  struct Run {
    const Task& task;
    int64_t row_count;
    std::atomic<int64_t> next;
  };
  Run run{task, row_count, {0}};
  const auto work = [](void* argument, int) {
    auto* run = static_cast<Run*>(argument);
    for (;;) {
      const int64_t begin = run->next.fetch_add(kRowBlock);
      if (begin >= run->row_count) return;
      run->task(begin, std::min(begin + kRowBlock, run->row_count));
    }
  };
  const int64_t block_count = (row_count + kRowBlock - 1) / kRowBlock;
  const auto count = static_cast<int>(
      std::clamp<int64_t>(std::min(threads_worth, block_count), 1, std::max(context.threads_max, 1)));
  if (count == 1 || context.lend == nullptr || !context.lend(count, work, &run)) work(&run, 0);
}

// Products, or elements made, below which another thread is not worth its waking: some 30 us of one.
constexpr int64_t kProductsPerThread = int64_t{1} << 20;
constexpr int64_t kElementsPerThread = int64_t{1} << 17;

}  // namespace

void quantised_linear(const LinearContext& context, const QuantisedLinear& linear) {
  const int64_t padded = weight_group_count(linear.in_features) * kWeightGroup;
  const int64_t row_bytes = weight_row_bytes(linear.code_bits, linear.in_features);
  const int64_t bytes_per_element = element_bytes(linear.dtype);
  AlignedBuffer buffer;
  auto* x =
      static_cast<float*>(buffer.reserve(linear.x_count * padded * static_cast<int64_t>(sizeof(float))));
  for (int64_t m = 0; m < linear.x_count; ++m) {
    const auto* source = static_cast<const char*>(linear.x) + m * linear.x_stride * bytes_per_element;
    context.kernels.load(linear.dtype, source, 1.0f, linear.in_features, x + m * padded);
    std::fill(x + m * padded + linear.in_features, x + (m + 1) * padded, 0.0f);
  }
  const auto task = [&](int64_t begin, int64_t end) {
    float bias[kRowBlock];
    if (linear.bias != nullptr) {
      context.kernels.load(linear.dtype, static_cast<const char*>(linear.bias) + begin * bytes_per_element,
                           1.0f, end - begin, bias);
    }
    for (int64_t m = 0, count; m < linear.x_count; m += count) {
      // Blocks are even: 8 rows of x go 4 + 4 and not 6 + 2.
      const int64_t left = linear.x_count - m;
      const int64_t blocks = (left + kWeightDotsMax - 1) / kWeightDotsMax;
      count = (left + blocks - 1) / blocks;
      float out[kWeightDotsMax * kRowBlock];
      context.kernels.weight_dots(linear.code_bits, x + m * padded, count, linear.rows + begin * row_bytes,
                                  end - begin, linear.in_features, out, kRowBlock);
      for (int64_t i = 0; i < count; ++i) {
        float* values = out + i * kRowBlock;
        if (linear.bias != nullptr) {
          for (int64_t n = 0; n < end - begin; ++n) values[n] += bias[n];
        }
        auto* target =
            static_cast<char*>(linear.out) + ((m + i) * linear.row_count + begin) * bytes_per_element;
        context.kernels.store(linear.dtype, values, 1.0f, end - begin, target);
      }
    }
  };
  const int64_t products = linear.x_count * linear.row_count * padded;
  over_rows(context, linear.row_count, products / kProductsPerThread, task);
}

void quantise_rows(const LinearContext& context, int code_bits, DType source_dtype, const void* source,
                   int64_t source_stride, int64_t row_count, int64_t in_features, uint8_t* rows) {
  const int64_t row_bytes = weight_row_bytes(code_bits, in_features);
  const auto task = [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const auto* row = static_cast<const char*>(source) + n * source_stride * element_bytes(source_dtype);
      context.kernels.quantise_weight_row(code_bits, source_dtype, row, in_features, rows + n * row_bytes);
    }
  };
  over_rows(context, row_count, row_count * in_features / kElementsPerThread, task);
}

void dequantise_rows(const LinearContext& context, int code_bits, const uint8_t* rows, int64_t row_count,
                     int64_t in_features, DType target_dtype, void* target) {
  const int64_t row_bytes = weight_row_bytes(code_bits, in_features);
  const auto task = [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      auto* row = static_cast<char*>(target) + n * in_features * element_bytes(target_dtype);
      context.kernels.dequantise_weight_row(code_bits, rows + n * row_bytes, in_features, target_dtype, row);
    }
  };
  over_rows(context, row_count, row_count * in_features / kElementsPerThread, task);
}

}  // namespace csd
