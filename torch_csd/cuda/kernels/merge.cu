// Merges partial results of attention over disjoint sets of keys: the online softmax (FlashAttention,
// 2205.14135, Alg. 1). An empty partial has lse -inf; its out is never read. Where all are empty, so is the
// result: out 0.
//
// A warp merges one row: one query of one head.
#include "element.cuh"

namespace csd {

constexpr int kMergeWarps = 4;
constexpr int kMergePartials = 8;

// The sum of the weights, and what they are relative to.
struct MergedWeight {
  float from;
  float sum;
};

CSD_DEVICE float merged_lse(const MergedWeight& merged) {
  return merged.sum == 0.0f ? -infinity() : merged.from + logf(merged.sum);
}

CSD_DEVICE float greatest_of_warp(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

// Folds split_count partials, stacked, into a running one.
__global__ void fold(const float* __restrict__ outs,  // [split_count, rows, head_dim_v]
                     const float* __restrict__ lses,  // [split_count, rows]
                     int split_count, int rows, int head_dim_v,
                     float* __restrict__ out,    // [rows, head_dim_v]
                     float* __restrict__ lse) {  // [rows]
  const int lane = threadIdx.x % kWarpLanes;
  const int row = blockIdx.x * kMergeWarps + threadIdx.x / kWarpLanes;
  if (row >= rows) return;  // a whole warp
  const float running = lse[row];
  float greatest = running;
  for (int i = lane; i < split_count; i += kWarpLanes) {
    greatest = fmaxf(greatest, lses[static_cast<int64_t>(i) * rows + row]);
  }
  greatest = greatest_of_warp(greatest);
  MergedWeight merged;
  merged.from = greatest == -infinity() ? 0.0f : greatest;
  const float running_weight = expf(running - merged.from);
  merged.sum = running_weight;
  for (int i = 0; i < split_count; ++i)
    merged.sum += expf(lses[static_cast<int64_t>(i) * rows + row] - merged.from);
  const float factor = merged.sum == 0.0f ? 0.0f : 1.0f / merged.sum;
  for (int d = lane; d < head_dim_v; d += kWarpLanes) {
    float sum = 0.0f;
    if (running_weight != 0.0f) sum = running_weight * out[static_cast<int64_t>(row) * head_dim_v + d];
    for (int i = 0; i < split_count; ++i) {
      const int64_t from_row = static_cast<int64_t>(i) * rows + row;
      const float weight = expf(lses[from_row] - merged.from);
      if (weight != 0.0f) sum += weight * outs[from_row * head_dim_v + d];
    }
    out[static_cast<int64_t>(row) * head_dim_v + d] = sum * factor;
  }
  __syncwarp();  // all lanes have read lse
  if (lane == 0) lse[row] = merged_lse(merged);
}

// Merges `count` partials, each of its own memory, and the sinks: logits that join the softmax and attend to
// nothing.
template <typename Out>
__global__ void merge(int count, const float* out0, const float* out1, const float* out2, const float* out3,
                      const float* out4, const float* out5, const float* out6,
                      const float* out7,  // [rows, head_dim_v]
                      const float* lse0, const float* lse1, const float* lse2, const float* lse3,
                      const float* lse4, const float* lse5, const float* lse6, const float* lse7,  // [rows]
                      const float* __restrict__ sinks,                     // [num_heads]; null: none
                      int rows, int num_heads, int q_len, int head_dim_v,  // rows = batch * num_heads * q_len
                      typename Out::Bits* __restrict__ out,                // [rows, head_dim_v]
                      float* __restrict__ lse) {                           // [rows]
  const float* outs[kMergePartials] = {out0, out1, out2, out3, out4, out5, out6, out7};
  const float* lses[kMergePartials] = {lse0, lse1, lse2, lse3, lse4, lse5, lse6, lse7};
  const int lane = threadIdx.x % kWarpLanes;
  const int row = blockIdx.x * kMergeWarps + threadIdx.x / kWarpLanes;
  if (row >= rows) return;
  const float sink = sinks != nullptr ? sinks[row / q_len % num_heads] : -infinity();
  float weights[kMergePartials];
  float greatest = sink;
#pragma unroll
  for (int i = 0; i < kMergePartials; ++i) {
    weights[i] = i < count ? lses[i][row] : -infinity();
    greatest = fmaxf(greatest, weights[i]);
  }
  MergedWeight merged;
  merged.from = greatest == -infinity() ? 0.0f : greatest;
  merged.sum = expf(sink - merged.from);
#pragma unroll
  for (int i = 0; i < kMergePartials; ++i) {
    weights[i] = expf(weights[i] - merged.from);
    merged.sum += weights[i];
  }
  const float factor = merged.sum == 0.0f ? 0.0f : 1.0f / merged.sum;
  for (int d = lane; d < head_dim_v; d += kWarpLanes) {
    const int64_t place = static_cast<int64_t>(row) * head_dim_v + d;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kMergePartials; ++i) {
      if (i < count && weights[i] != 0.0f) sum += weights[i] * outs[i][place];
    }
    out[place] = narrow(Out(), sum * factor);
  }
  if (lane == 0) lse[row] = merged_lse(merged);
}

}  // namespace csd
