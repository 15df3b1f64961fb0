// What can be computed from a layer's stored pages, as passes over them: exact attention, the two products of
// an eager attention, and reading back. A pass knows pages in memory and arithmetic; PageStream brings the
// pages.
#pragma once

#include <cstdint>
#include <functional>

#include "base/aligned_buffer.h"
#include "base/thread_pool.h"
#include "base/types.h"
#include "executor/ahead.h"
#include "executor/plan.h"
#include "executor/stream.h"
#include "executor/tile_cache.h"
#include "kernels/kernels.h"
#include "store/layer.h"

namespace csd {

// Which keys query i of q_len may see. Lower right: query i stands at position kv_end - q_len + i (decoding).
// Upper left: at kv_begin + i (torch's is_causal).
enum class Causal : uint8_t { kNone, kLowerRight, kUpperLeft };

enum class MaskKind : uint8_t { kNone, kBool, kFloat32, kBFloat16, kFloat16 };

// [batch, num_heads, q_len, kv_len] with strides in elements; a stride of 0 broadcasts.
struct MaskView {
  MaskKind kind = MaskKind::kNone;
  const void* data = nullptr;
  int64_t kv_len = 0;  // of the mask itself; 1 with a stride of 0
  int64_t strides[4] = {0, 0, 0, 0};
};

// [batch, num_heads, q_len, last] with strides in elements for the first three; the last dimension is dense.
struct QueryView {
  DType dtype = DType::kFloat32;
  const void* data = nullptr;
  int64_t strides[3] = {0, 0, 0};
};

// The part of a layer that a call is about. Positions are absolute.
struct Span {
  int64_t row_begin = 0;
  int64_t row_count = 0;
  int64_t kv_begin = 0;
  int64_t kv_end = -1;  // -1: each row to its own length
};

struct AttendRequest {
  Span span;
  int64_t num_heads = 0;
  int64_t q_len = 0;
  QueryView q;
  float scale = 1.0f;
  Causal causal = Causal::kNone;
  int64_t window = 0;  // sees keys at positions > position - window; 0: all
  float softcap = 0.0f;
  MaskView mask;
  const float* sinks = nullptr;  // [num_heads] logits that take part in the softmax and attend to nothing
  const float* alibi_slopes = nullptr;  // [num_heads]; adds slope * (key position - query position)
  void* out = nullptr;                  // [row_count, num_heads, q_len, head_dim_v], q's dtype
  float* lse = nullptr;                 // [row_count, num_heads, q_len], natural log
};

// Scores q @ K^T into out [row_count, num_heads, q_len, kv_end - kv_begin], q's dtype.
struct ScoresRequest {
  Span span;
  int64_t num_heads = 0;
  int64_t q_len = 0;
  QueryView q;
  void* out = nullptr;
};

// p @ V with p [row_count, num_heads, q_len, kv_end - kv_begin] into out [row_count, num_heads, q_len,
// head_dim_v].
struct WeightedSumRequest {
  Span span;
  int64_t num_heads = 0;
  int64_t q_len = 0;
  QueryView p;
  void* out = nullptr;
};

// Stored tokens back to dense [row_count, num_kv_heads, kv_end - kv_begin, head_dim]; a null target is left
// out.
struct ReadRequest {
  Span span;
  DType dtype = DType::kFloat32;
  void* k = nullptr;
  void* v = nullptr;
};

// Where passes run: the stream they read through, and memory for queries and partial results that they reuse.
struct PassContext {
  const Kernels* kernels = nullptr;
  PageStream* stream = nullptr;
  ThreadPool* pool = nullptr;
  AlignedBuffer* scratch = nullptr;
  // Bounds rows x queries x workers at once: larger calls go over the pages several times. The least is one
  // query of all heads on one worker.
  int64_t scratch_bytes_max = 0;
  ReadAhead* ahead = nullptr;  // null: nothing is read before it is needed
  PassKey pass;
  TileCache* tiles = nullptr;        // null: what is chosen is read every time
  int64_t* guessed_bytes = nullptr;  // where what a guess had read and a pass then used is added up
};

void attend(const PassContext& context, const Layer& layer, const AttendRequest& request);
void scores(const PassContext& context, const Layer& layer, const ScoresRequest& request);
void weighted_sum(const PassContext& context, const Layer& layer, const WeightedSumRequest& request);
void read(const PassContext& context, const Layer& layer, const ReadRequest& request);

}  // namespace csd
