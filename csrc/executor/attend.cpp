#include "executor/attend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "base/error.h"
#include "executor/tile.h"

namespace csd {
namespace {

// Queries whose scores against one tile are held at once: 8 KiB, well inside L1 next to the tile.
constexpr int64_t kQueryBlock = 32;

// Rows and queries that go over the pages together. A query m of a kv head is (i, g): query i of the block,
// head g of the group, m = i * group + g, so that neighbours have the same causal bound.
struct Block {
  int64_t row_begin = 0;  // relative to Span::row_begin
  int64_t row_count = 0;
  int64_t query_begin = 0;
  int64_t query_count = 0;
};

struct Heads {
  Heads(const Geometry& geometry, int64_t num_heads)
      : num_heads(num_heads), num_kv_heads(geometry.num_kv_heads), group(num_heads / geometry.num_kv_heads) {}
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t group;
};

// Splits [rows] x [queries] so that bytes_per_query * rows * queries fits the scratch memory; halves queries
// first, because every row's pages are read again for each block of queries. run(block, next): next is null
// for the last one.
template <typename Run>
void for_each_block(int64_t row_count, int64_t q_len, int64_t bytes_per_query, int64_t bytes_max,
                    const Run& run) {
  const int64_t fit = std::max<int64_t>(1, bytes_max / std::max<int64_t>(1, bytes_per_query));
  const int64_t rows = std::clamp<int64_t>(fit / q_len, 1, row_count);
  const int64_t queries = std::clamp<int64_t>(fit / rows, 1, q_len);
  const auto block_at = [&](int64_t row, int64_t query) {
    return Block{row, std::min(rows, row_count - row), query, std::min(queries, q_len - query)};
  };
  for (int64_t row = 0; row < row_count; row += rows) {
    for (int64_t query = 0; query < q_len; query += queries) {
      const bool last_of_row = query + queries >= q_len;
      const bool last = last_of_row && row + rows >= row_count;
      const Block next = last          ? Block{}
                         : last_of_row ? block_at(row + rows, 0)
                                       : block_at(row, query + queries);
      run(block_at(row, query), last ? nullptr : &next);
    }
  }
}

int64_t row_end(const Layer& layer, const Span& span, int64_t row) {
  return span.kv_end >= 0 ? span.kv_end : layer.rows[static_cast<size_t>(span.row_begin + row)].length;
}

// Every page that holds a token of [begin, end) of a row.
void add_uses(const Layer& layer, int64_t row, int64_t begin, int64_t end, std::vector<PageUse>* uses) {
  const Row& stored = layer.rows[static_cast<size_t>(row)];
  for (int64_t index = begin / kPageTokens; index * kPageTokens < end; ++index) {
    const Page* page = stored.page(index).get();
    // The plan looks at each, and since the last call other bytes went through the cache: 0.1 us a page, one
    // by one.
    __builtin_prefetch(page);
    __builtin_prefetch(&page->file_offset);
    uses->push_back({page, row, index});
  }
}

// fp32 copy of a block's queries, [rows][num_kv_heads][query_count * group][width], times factor.
void load_queries(const Kernels& kernels, const QueryView& view, const Heads& heads, const Block& block,
                  int64_t width, float factor, float* target) {
  const auto* base = static_cast<const uint8_t*>(view.data);
  for (int64_t row = 0; row < block.row_count; ++row) {
    for (int64_t h = 0; h < heads.num_kv_heads; ++h) {
      for (int64_t i = 0; i < block.query_count; ++i) {
        for (int64_t g = 0; g < heads.group; ++g) {
          const int64_t offset = (block.row_begin + row) * view.strides[0] +
                                 (h * heads.group + g) * view.strides[1] +
                                 (block.query_begin + i) * view.strides[2];
          kernels.load(view.dtype, base + offset * element_bytes(view.dtype), factor, width, target);
          target += width;
        }
      }
    }
  }
}

// Index of query (i, head) of a row in [row_count, num_heads, q_len].
int64_t output_index(const Heads& heads, const Block& block, int64_t q_len, int64_t row, int64_t h,
                     int64_t m) {
  const int64_t head = h * heads.group + m % heads.group;
  const int64_t query = block.query_begin + m / heads.group;
  return ((block.row_begin + row) * heads.num_heads + head) * q_len + query;
}

// The layouts of a layer's two kinds of pages.
struct Layouts {
  explicit Layouts(const Geometry& geometry)
      : stored(geometry.stored()), full_precision(geometry.full_precision()) {}
  const PageLayout& of(const Page& page) const { return page.quantised ? stored : full_precision; }
  const PageLayout stored;
  const PageLayout full_precision;
};

// ---- attention ----

class AttendPass : public PageConsumer {
 public:
  AttendPass(const PassContext& context, const Layer& layer, const AttendRequest& request, const Block& block,
             int worker_count)
      : kernels_(*context.kernels),
        layer_(layer),
        request_(request),
        block_(block),
        heads_(layer.geometry, request.num_heads),
        layouts_(layer.geometry),
        queries_per_head_(block.query_count * heads_.group),
        queries_per_row_(queries_per_head_ * heads_.num_kv_heads),
        worker_count_(worker_count) {
    const int64_t query_total = block.row_count * queries_per_row_;
    auto* memory = static_cast<uint8_t*>(
        context.scratch->reserve(query_total * bytes_per_query(layer.geometry, worker_count_)));
    q_ = reinterpret_cast<float*>(memory);
    memory += query_total * layer.geometry.head_dim_k * static_cast<int64_t>(sizeof(float));
    out_ = reinterpret_cast<float*>(memory);
    memory += query_total * worker_count_ * layer.geometry.head_dim_v * static_cast<int64_t>(sizeof(float));
    states_ = reinterpret_cast<SoftmaxState*>(memory);
    touched_.assign(static_cast<size_t>(block.row_count * worker_count_), 0);
    load_queries(kernels_, request.q, heads_, block, layer.geometry.head_dim_k, request.scale, q_);
  }

  static int64_t bytes_per_query(const Geometry& geometry, int64_t worker_count) {
    return geometry.head_dim_k * static_cast<int64_t>(sizeof(float)) +
           worker_count * (geometry.head_dim_v * static_cast<int64_t>(sizeof(float)) +
                           static_cast<int64_t>(sizeof(SoftmaxState)));
  }

  // The pages at least one query of a block (this pass's, or another one of the request) sees.
  std::vector<PageUse> uses(const Block& block) const {
    std::vector<PageUse> uses;
    const int64_t row_begin = block.row_begin - block_.row_begin;
    for (int64_t row = row_begin; row < row_begin + block.row_count; ++row) {
      const int64_t first = query_range(row, block.query_begin).first;
      const int64_t last = query_range(row, block.query_begin + block.query_count - 1).second;
      const auto start = uses.size();
      if (first < last)
        add_uses(layer_, request_.span.row_begin + block_.row_begin + row, first, last, &uses);
      if (hides_whole_pages()) {
        uses.erase(std::remove_if(uses.begin() + static_cast<int64_t>(start), uses.end(),
                                  [&](const PageUse& use) { return hidden(row, use.index, first, last); }),
                   uses.end());
      }
    }
    return uses;
  }

  void consume(int worker, const PageUse& use, const uint8_t* page) override {
    const Geometry& geometry = layer_.geometry;
    const int64_t row = use.row - request_.span.row_begin - block_.row_begin;
    float* out = worker_out(worker, row);
    SoftmaxState* states = worker_states(worker, row);
    uint8_t& touched = touched_[static_cast<size_t>(row * worker_count_ + worker)];
    if (touched == 0) {
      touched = 1;
      std::memset(out, 0, static_cast<size_t>(queries_per_row_ * geometry.head_dim_v) * sizeof(float));
      std::fill_n(states, queries_per_row_, SoftmaxState{-std::numeric_limits<float>::infinity(), 0.0f});
    }
    BiasRow bias(request_, block_.row_begin + row, use.index * kPageTokens);
    for (int64_t h = 0; h < heads_.num_kv_heads; ++h) {
      const Tile tile(kernels_, layouts_.of(*use.page), page, h);
      for (int64_t m = 0; m < queries_per_head_; m += kQueryBlock) {
        const int64_t first = h * queries_per_head_ + m;
        const int64_t count = std::min(kQueryBlock, queries_per_head_ - m);
        attend_tile(row, use.index, h, m, count, tile,
                    q_ + (row * queries_per_row_ + first) * geometry.head_dim_k, &bias, states + first,
                    out + first * geometry.head_dim_v);
      }
    }
  }

  // Merges the workers' partials and writes out and lse.
  void finish() {
    const Geometry& geometry = layer_.geometry;
    auto* target = static_cast<uint8_t*>(request_.out);
    const int64_t target_bytes = geometry.head_dim_v * element_bytes(request_.q.dtype);
    for (int64_t row = 0; row < block_.row_count; ++row) {
      for (int64_t h = 0; h < heads_.num_kv_heads; ++h) {
        for (int64_t m = 0; m < queries_per_head_; ++m) {
          const int64_t query = h * queries_per_head_ + m;
          const int64_t index = output_index(heads_, block_, request_.q_len, row, h, m);
          float* merged = nullptr;
          SoftmaxState state = merge(row, query, &merged);
          const float sink = request_.sinks != nullptr ? request_.sinks[h * heads_.group + m % heads_.group]
                                                       : -std::numeric_limits<float>::infinity();
          const float top = std::max(state.max, sink);
          if (merged == nullptr || state.sum == 0.0f) {  // nothing to attend to: the empty state, out = 0
            std::memset(target + index * target_bytes, 0, static_cast<size_t>(target_bytes));
            request_.lse[index] = sink;
            continue;
          }
          const float weight = std::exp(state.max - top);
          const float total = state.sum * weight + std::exp(sink - top);
          kernels_.store(request_.q.dtype, merged, weight / total, geometry.head_dim_v,
                         target + index * target_bytes);
          request_.lse[index] = top + std::log(total);
        }
      }
    }
  }

 private:
  // The mask of one page, row by row, converted only when the query or head changes it.
  class BiasRow {
   public:
    BiasRow(const AttendRequest& request, int64_t row, int64_t position)
        : mask_(request.mask),
          offset_(row * mask_.strides[0] + (position - request.span.kv_begin) * mask_.strides[3]) {}

    // Fills the additive bias for tokens [begin, end) of the page. Returns false when all of them are masked.
    bool load(int64_t head, int64_t query, int64_t begin, int64_t end) {
      const int64_t key = head * mask_.strides[1] + query * mask_.strides[2];
      if (key == key_ && begin >= begin_ && end <= end_) return visible_;
      key_ = key;
      begin_ = begin;
      end_ = end;
      visible_ = false;
      for (int64_t t = begin; t < end; ++t) {
        values_[t] = value(offset_ + key + t * mask_.strides[3]);
        visible_ = visible_ || values_[t] != -std::numeric_limits<float>::infinity();
      }
      return visible_;
    }
    const float* values() const { return values_; }

   private:
    float value(int64_t index) const {
      switch (mask_.kind) {
        case MaskKind::kBool:
          return static_cast<const uint8_t*>(mask_.data)[index] != 0
                     ? 0.0f
                     : -std::numeric_limits<float>::infinity();
        case MaskKind::kFloat32:
          return static_cast<const float*>(mask_.data)[index];
        case MaskKind::kBFloat16: {
          const uint32_t bits = uint32_t{static_cast<const uint16_t*>(mask_.data)[index]} << 16;
          float wide;
          std::memcpy(&wide, &bits, sizeof(wide));
          return wide;
        }
        case MaskKind::kFloat16: {
          float wide;
          kSerialKernels.load(DType::kFloat16, static_cast<const uint16_t*>(mask_.data) + index, 1.0f, 1,
                              &wide);
          return wide;
        }
        case MaskKind::kNone:
          break;
      }
      return 0.0f;
    }

    const MaskView& mask_;
    const int64_t offset_;
    int64_t key_ = -1;
    int64_t begin_ = 0;
    int64_t end_ = 0;
    bool visible_ = true;
    float values_[kPageTokens];
  };

  int64_t query_position(int64_t row, int64_t query) const {
    if (request_.causal == Causal::kUpperLeft) return request_.span.kv_begin + query;
    return row_end(layer_, request_.span, block_.row_begin + row) - request_.q_len + query;
  }

  // Positions [first, second) that a query may see by causality and window.
  std::pair<int64_t, int64_t> query_range(int64_t row, int64_t query) const {
    int64_t begin = request_.span.kv_begin;
    int64_t end = row_end(layer_, request_.span, block_.row_begin + row);
    const int64_t position = query_position(row, query);
    if (request_.causal != Causal::kNone) end = std::min(end, position + 1);
    if (request_.window > 0) begin = std::max(begin, position - request_.window + 1);
    // Within the row even where nothing is seen: a window may begin behind its end.
    end = std::max(end, request_.span.kv_begin);
    return {std::min(begin, end), end};
  }

  // A padding mask hides whole pages from all heads and queries: those need not be read.
  bool hides_whole_pages() const {
    return request_.mask.kind == MaskKind::kBool && request_.mask.strides[1] == 0 &&
           request_.mask.strides[2] == 0;
  }
  bool hidden(int64_t row, int64_t index, int64_t first, int64_t last) const {
    BiasRow bias(request_, block_.row_begin + row, index * kPageTokens);
    return !bias.load(0, 0, std::max<int64_t>(0, first - index * kPageTokens),
                      std::min(kPageTokens, last - index * kPageTokens));
  }

  void attend_tile(int64_t row, int64_t index, int64_t h, int64_t m, int64_t count, const Tile& tile,
                   const float* q, BiasRow* bias, SoftmaxState* states, float* out) const {
    alignas(64) float scores[kQueryBlock * kPageTokens];
    float shrink[kQueryBlock];
    ScoreModifier modifiers[kQueryBlock];
    int64_t begin = kPageTokens;  // tokens that any of these queries sees
    int64_t end = 0;
    const int64_t page_position = index * kPageTokens;
    for (int64_t j = 0; j < count; ++j) {
      const int64_t query = block_.query_begin + (m + j) / heads_.group;
      ScoreModifier& modifier = modifiers[j];
      if (j > 0 && (m + j) % heads_.group != 0) {  // the same query for another head
        modifier = modifiers[j - 1];
      } else {
        const auto [first, last] = query_range(row, query);
        modifier.token_begin = std::clamp<int64_t>(first - page_position, 0, kPageTokens);
        modifier.token_end = std::clamp<int64_t>(last - page_position, modifier.token_begin, kPageTokens);
        modifier.softcap = request_.softcap;
      }
      if (modifier.token_begin < modifier.token_end) {
        begin = std::min(begin, modifier.token_begin);
        end = std::max(end, modifier.token_end);
      }
    }
    if (begin >= end) return;
    tile.score(q, count, scores);
    bool any_visible = false;
    for (int64_t j = 0; j < count; ++j) {
      float* row_scores = scores + j * kPageTokens;
      ScoreModifier& modifier = modifiers[j];
      const int64_t head = h * heads_.group + (m + j) % heads_.group;
      const int64_t query = block_.query_begin + (m + j) / heads_.group;
      bool visible = modifier.token_begin < modifier.token_end;
      if (visible && request_.mask.kind != MaskKind::kNone) {
        visible = bias->load(head, query, modifier.token_begin, modifier.token_end);
        modifier.bias = bias->values();
      }
      if (!visible) {
        std::memset(row_scores, 0, kPageTokens * sizeof(float));
        shrink[j] = 1.0f;
        continue;
      }
      any_visible = true;
      if (request_.alibi_slopes != nullptr) {
        modifier.alibi_slope = request_.alibi_slopes[head];
        modifier.alibi_offset = static_cast<float>(page_position - query_position(row, query));
      }
      shrink[j] = kernels_.softmax_row(row_scores, modifier, &states[j]);
    }
    if (!any_visible) return;
    tile.accumulate(scores, shrink, count, begin, end, out);
  }

  float* worker_out(int64_t worker, int64_t row) const {
    return out_ + (worker * block_.row_count + row) * queries_per_row_ * layer_.geometry.head_dim_v;
  }
  SoftmaxState* worker_states(int64_t worker, int64_t row) const {
    return states_ + (worker * block_.row_count + row) * queries_per_row_;
  }

  // Folds all workers' partials of one query into the first one's memory. FlashAttention (2205.14135),
  // Alg. 1.
  SoftmaxState merge(int64_t row, int64_t query, float** merged) const {
    const int64_t width = layer_.geometry.head_dim_v;
    SoftmaxState state{-std::numeric_limits<float>::infinity(), 0.0f};
    for (int64_t worker = 0; worker < worker_count_; ++worker) {
      if (touched_[static_cast<size_t>(row * worker_count_ + worker)] == 0) continue;
      const SoftmaxState& other = worker_states(worker, row)[query];
      if (other.sum == 0.0f) continue;
      float* partial = worker_out(worker, row) + query * width;
      if (*merged == nullptr) {
        *merged = partial;
        state = other;
        continue;
      }
      const float top = std::max(state.max, other.max);
      const float own_weight = std::exp(state.max - top);
      const float other_weight = std::exp(other.max - top);
      kernels_.blend(*merged, own_weight, partial, other_weight, width, *merged);
      state = {top, state.sum * own_weight + other.sum * other_weight};
    }
    return state;
  }

  const Kernels& kernels_;
  const Layer& layer_;
  const AttendRequest& request_;
  const Block block_;
  const Heads heads_;
  const Layouts layouts_;
  const int64_t queries_per_head_;
  const int64_t queries_per_row_;
  const int worker_count_;
  float* q_ = nullptr;    // [rows][num_kv_heads][queries_per_head][head_dim_k], times scale
  float* out_ = nullptr;  // [workers][rows][num_kv_heads][queries_per_head][head_dim_v], not normalised
  SoftmaxState* states_ = nullptr;  // [workers][rows][num_kv_heads][queries_per_head]
  std::vector<uint8_t> touched_;    // [rows][workers]: this worker has a partial of this row
};

// ---- the products of an eager attention ----

class ScoresPass : public PageConsumer {
 public:
  ScoresPass(const PassContext& context, const Layer& layer, const ScoresRequest& request, const Block& block)
      : kernels_(*context.kernels),
        layer_(layer),
        request_(request),
        block_(block),
        heads_(layer.geometry, request.num_heads),
        layouts_(layer.geometry),
        queries_per_head_(block.query_count * heads_.group) {
    q_ = static_cast<float*>(context.scratch->reserve(block.row_count * heads_.num_kv_heads *
                                                      queries_per_head_ * layer.geometry.head_dim_k *
                                                      static_cast<int64_t>(sizeof(float))));
    load_queries(kernels_, request.q, heads_, block, layer.geometry.head_dim_k, 1.0f, q_);
  }

  void consume(int, const PageUse& use, const uint8_t* page) override {
    const Geometry& geometry = layer_.geometry;
    const int64_t row = use.row - request_.span.row_begin - block_.row_begin;
    const int64_t kv_len = request_.span.kv_end - request_.span.kv_begin;
    const int64_t position = use.index * kPageTokens;
    const int64_t begin = std::max<int64_t>(0, request_.span.kv_begin - position);
    const int64_t end = std::min(kPageTokens, request_.span.kv_end - position);
    alignas(64) float scores[kQueryBlock * kPageTokens];
    auto* out = static_cast<uint8_t*>(request_.out);
    for (int64_t h = 0; h < heads_.num_kv_heads; ++h) {
      const Tile tile(kernels_, layouts_.of(*use.page), page, h);
      for (int64_t m = 0; m < queries_per_head_; m += kQueryBlock) {
        const int64_t count = std::min(kQueryBlock, queries_per_head_ - m);
        const float* q = q_ + ((row * heads_.num_kv_heads + h) * queries_per_head_ + m) * geometry.head_dim_k;
        tile.score(q, count, scores);
        for (int64_t j = 0; j < count; ++j) {
          const int64_t index = output_index(heads_, block_, request_.q_len, row, h, m + j) * kv_len +
                                position + begin - request_.span.kv_begin;
          kernels_.store(request_.q.dtype, scores + j * kPageTokens + begin, 1.0f, end - begin,
                         out + index * element_bytes(request_.q.dtype));
        }
      }
    }
  }

 private:
  const Kernels& kernels_;
  const Layer& layer_;
  const ScoresRequest& request_;
  const Block block_;
  const Heads heads_;
  const Layouts layouts_;
  const int64_t queries_per_head_;
  float* q_ = nullptr;
};

class WeightedSumPass : public PageConsumer {
 public:
  WeightedSumPass(const PassContext& context, const Layer& layer, const WeightedSumRequest& request,
                  const Block& block, int worker_count)
      : kernels_(*context.kernels),
        layer_(layer),
        request_(request),
        block_(block),
        heads_(layer.geometry, request.num_heads),
        layouts_(layer.geometry),
        queries_per_head_(block.query_count * heads_.group),
        worker_count_(worker_count),
        values_per_worker_(block.row_count * heads_.num_kv_heads * queries_per_head_ *
                           layer.geometry.head_dim_v) {
    const int64_t bytes = worker_count_ * values_per_worker_ * static_cast<int64_t>(sizeof(float));
    out_ = static_cast<float*>(context.scratch->reserve(bytes));
    std::memset(out_, 0, static_cast<size_t>(bytes));
  }

  void consume(int worker, const PageUse& use, const uint8_t* page) override {
    const Geometry& geometry = layer_.geometry;
    const int64_t row = use.row - request_.span.row_begin - block_.row_begin;
    const int64_t position = use.index * kPageTokens;
    const int64_t begin = std::max<int64_t>(0, request_.span.kv_begin - position);
    const int64_t end = std::min(kPageTokens, request_.span.kv_end - position);
    alignas(64) float weights[kQueryBlock * kPageTokens];
    float shrink[kQueryBlock];
    std::fill_n(shrink, kQueryBlock, 1.0f);
    const auto* p = static_cast<const uint8_t*>(request_.p.data);
    for (int64_t h = 0; h < heads_.num_kv_heads; ++h) {
      const Tile tile(kernels_, layouts_.of(*use.page), page, h);
      for (int64_t m = 0; m < queries_per_head_; m += kQueryBlock) {
        const int64_t count = std::min(kQueryBlock, queries_per_head_ - m);
        for (int64_t j = 0; j < count; ++j) {
          const int64_t head = h * heads_.group + (m + j) % heads_.group;
          const int64_t query = block_.query_begin + (m + j) / heads_.group;
          const int64_t index = (block_.row_begin + row) * request_.p.strides[0] +
                                head * request_.p.strides[1] + query * request_.p.strides[2] + position +
                                begin - request_.span.kv_begin;
          kernels_.load(request_.p.dtype, p + index * element_bytes(request_.p.dtype), 1.0f, end - begin,
                        weights + j * kPageTokens + begin);
        }
        float* out = out_ + worker * values_per_worker_ +
                     ((row * heads_.num_kv_heads + h) * queries_per_head_ + m) * geometry.head_dim_v;
        tile.accumulate(weights, shrink, count, begin, end, out);
      }
    }
  }

  void finish() {
    const int64_t width = layer_.geometry.head_dim_v;
    auto* target = static_cast<uint8_t*>(request_.out);
    for (int64_t worker = 1; worker < worker_count_; ++worker) {
      kernels_.blend(out_, 1.0f, out_ + worker * values_per_worker_, 1.0f, values_per_worker_, out_);
    }
    const float* source = out_;
    for (int64_t row = 0; row < block_.row_count; ++row) {
      for (int64_t h = 0; h < heads_.num_kv_heads; ++h) {
        for (int64_t m = 0; m < queries_per_head_; ++m, source += width) {
          const int64_t index = output_index(heads_, block_, request_.q_len, row, h, m);
          kernels_.store(request_.p.dtype, source, 1.0f, width,
                         target + index * width * element_bytes(request_.p.dtype));
        }
      }
    }
  }

 private:
  const Kernels& kernels_;
  const Layer& layer_;
  const WeightedSumRequest& request_;
  const Block block_;
  const Heads heads_;
  const Layouts layouts_;
  const int64_t queries_per_head_;
  const int worker_count_;
  const int64_t values_per_worker_;
  float* out_ = nullptr;  // [workers][rows][num_kv_heads][queries_per_head][head_dim_v]
};

class ReadPass : public PageConsumer {
 public:
  ReadPass(const Kernels& kernels, const Layer& layer, const ReadRequest& request)
      : kernels_(kernels), layer_(layer), request_(request), layouts_(layer.geometry) {}

  void consume(int, const PageUse& use, const uint8_t* page) override {
    const Geometry& geometry = layer_.geometry;
    const int64_t row = use.row - request_.span.row_begin;
    const int64_t kv_len = request_.span.kv_end - request_.span.kv_begin;
    const int64_t position = use.index * kPageTokens;
    const int64_t begin = std::max<int64_t>(0, request_.span.kv_begin - position);
    const int64_t end = std::min(kPageTokens, request_.span.kv_end - position);
    for (int64_t h = 0; h < geometry.num_kv_heads; ++h) {
      const Tile tile(kernels_, layouts_.of(*use.page), page, h);
      const int64_t token =
          (row * geometry.num_kv_heads + h) * kv_len + position + begin - request_.span.kv_begin;
      const int64_t bytes = element_bytes(request_.dtype);
      if (request_.k != nullptr) {
        tile.unpack_k(begin, end - begin, request_.dtype,
                      static_cast<uint8_t*>(request_.k) + token * geometry.head_dim_k * bytes);
      }
      if (request_.v != nullptr) {
        tile.unpack_v(begin, end - begin, request_.dtype,
                      static_cast<uint8_t*>(request_.v) + token * geometry.head_dim_v * bytes);
      }
    }
  }

 private:
  const Kernels& kernels_;
  const Layer& layer_;
  const ReadRequest& request_;
  const Layouts layouts_;
};

// uses_of(block): the pages of a block of this call. next: the block after this one, null for the last.
template <typename Uses>
void run(const PassContext& context, const Layer& layer, const Uses& uses_of, const Block& block,
         const Block* next, int64_t compute_weight, int worker_count, PageConsumer* pass) {
  PageStream& stream = *context.stream;
  const int64_t page_bytes = layer.geometry.full_precision().page_bytes();
  const std::vector<PageUse> uses = uses_of(block);
  const bool in_memory =
      std::all_of(uses.begin(), uses.end(), [](const PageUse& use) { return use.page->memory != nullptr; });
  if (in_memory) {
    stream.run(make_plan(uses, page_bytes), nullptr, page_bytes, compute_weight, worker_count, pass);
    return;
  }
  stream.fit(page_bytes);
  std::vector<StagedRun>* staged = stream.staged();
  Plan plan = make_plan(uses, stream.read_bytes_max(page_bytes), staged);
  plan.layer = layer.number;
  Plan ahead;
  if (context.ahead != nullptr && context.pass.kind != PassKind::kRead) {
    if (block.row_begin == 0 && block.query_begin == 0) context.ahead->note(context.pass, uses);
    const int64_t bytes = context.ahead->worthwhile_bytes(stream.staging_bytes());
    if (next != nullptr) {
      extend_plan(uses_of(*next), stream.read_bytes_max(page_bytes), staged, &ahead);
    } else {
      for (const auto& later : context.ahead->after(context.pass, bytes, stream.slot_bytes())) {
        extend_plan(later, stream.slot_bytes(), staged, &ahead);
      }
    }
    limit_plan(bytes, &ahead);
  }
  stream.run(plan, &ahead, page_bytes, compute_weight, worker_count, pass);
}

// Of a block: every page of the span in its rows.
auto all_uses(const Layer& layer, const Span& span) {
  return [&layer, &span](const Block& block) {
    std::vector<PageUse> uses;
    for (int64_t row = 0; row < block.row_count; ++row) {
      add_uses(layer, span.row_begin + block.row_begin + row, span.kv_begin, span.kv_end, &uses);
    }
    return uses;
  };
}

// Workers whose partial results of one query fit the scratch memory, next to what they share.
int affordable_workers(const PassContext& context, int64_t shared_bytes, int64_t bytes_per_worker) {
  const int64_t fit = (context.scratch_bytes_max - shared_bytes) / bytes_per_worker;
  return static_cast<int>(std::clamp<int64_t>(fit, 1, context.stream->worker_limit()));
}

// Arithmetic on a page relative to one query's pass over the same bytes, which memory bandwidth hides.
int64_t compute_weight(const Block& block, int64_t group) {
  return std::max<int64_t>(1, block.query_count * group / 8);
}

}  // namespace

void attend(const PassContext& context, const Layer& layer, const AttendRequest& request) {
  const int64_t shared_bytes = AttendPass::bytes_per_query(layer.geometry, 0) * request.num_heads;
  const int64_t bytes_per_worker =
      AttendPass::bytes_per_query(layer.geometry, 1) * request.num_heads - shared_bytes;
  const int workers = affordable_workers(context, shared_bytes, bytes_per_worker);
  const int64_t bytes = shared_bytes + workers * bytes_per_worker;
  for_each_block(request.span.row_count, request.q_len, bytes, context.scratch_bytes_max,
                 [&](const Block& block, const Block* next) {
                   AttendPass pass(context, layer, request, block, workers);
                   const auto uses_of = [&](const Block& any) { return pass.uses(any); };
                   run(context, layer, uses_of, block, next,
                       compute_weight(block, request.num_heads / layer.geometry.num_kv_heads), workers,
                       &pass);
                   pass.finish();
                 });
}

void scores(const PassContext& context, const Layer& layer, const ScoresRequest& request) {
  const int64_t bytes = request.num_heads * layer.geometry.head_dim_k * static_cast<int64_t>(sizeof(float));
  for_each_block(request.span.row_count, request.q_len, bytes, context.scratch_bytes_max,
                 [&](const Block& block, const Block* next) {
                   ScoresPass pass(context, layer, request, block);
                   run(context, layer, all_uses(layer, request.span), block, next,
                       compute_weight(block, request.num_heads / layer.geometry.num_kv_heads),
                       context.stream->worker_limit(), &pass);
                 });
}

void weighted_sum(const PassContext& context, const Layer& layer, const WeightedSumRequest& request) {
  const int64_t bytes_per_worker =
      request.num_heads * layer.geometry.head_dim_v * static_cast<int64_t>(sizeof(float));
  const int workers = affordable_workers(context, 0, bytes_per_worker);
  const int64_t bytes = workers * bytes_per_worker;
  for_each_block(request.span.row_count, request.q_len, bytes, context.scratch_bytes_max,
                 [&](const Block& block, const Block* next) {
                   WeightedSumPass pass(context, layer, request, block, workers);
                   run(context, layer, all_uses(layer, request.span), block, next,
                       compute_weight(block, request.num_heads / layer.geometry.num_kv_heads), workers,
                       &pass);
                   pass.finish();
                 });
}

void read(const PassContext& context, const Layer& layer, const ReadRequest& request) {
  ReadPass pass(*context.kernels, layer, request);
  const Block block{0, request.span.row_count, 0, 1};
  run(context, layer, all_uses(layer, request.span), block, nullptr, 1, context.stream->worker_limit(),
      &pass);
}

}  // namespace csd
