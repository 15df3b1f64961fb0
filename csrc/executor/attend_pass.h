// A block of queries against pages as they come: the online softmax over tiles, on several workers, and their
// merge. What pages those are is up to the caller.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "executor/attend.h"
#include "executor/tile.h"

namespace csd {

// Queries whose scores against one tile are held at once: 8 KiB, well inside L1 next to the tile.
constexpr int64_t kQueryBlock = 32;

// As many queries may each have a mask of their own that is searched for pages nobody sees.
constexpr int64_t kChoosingQueriesMax = 16;

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

// Workers whose partial results of one query fit the scratch memory, next to what they share.
int affordable_workers(const PassContext& context, int64_t shared_bytes, int64_t bytes_per_worker);

// Arithmetic on a page relative to one query's pass over the same bytes, which memory bandwidth hides.
int64_t compute_weight(const Block& block, int64_t group);

// The layouts of a layer's two kinds of pages.
struct Layouts {
  explicit Layouts(const Geometry& geometry)
      : stored(geometry.stored()), full_precision(geometry.full_precision()) {}
  const PageLayout& of(const Page& page) const { return page.quantised ? stored : full_precision; }
  const PageLayout stored;
  const PageLayout full_precision;
};

int64_t row_end(const Layer& layer, const Span& span, int64_t row);

// Every page that holds a token of [begin, end) of a row.
void add_uses(const Layer& layer, int64_t row, int64_t begin, int64_t end, std::vector<PageUse>* uses);

// fp32 copy of a block's queries, [rows][num_kv_heads][query_count * group][width], times factor.
void load_queries(const Kernels& kernels, const QueryView& view, const Heads& heads, const Block& block,
                  int64_t width, float factor, float* target);

// Index of query (i, head) of a row in [row_count, num_heads, q_len].
int64_t output_index(const Heads& heads, const Block& block, int64_t q_len, int64_t row, int64_t h,
                     int64_t m);

// Which tokens the queries of a block may see, and what is done to their scores before the softmax.
class Rules {
 public:
  // The mask of one page, row by row, converted only when the query or head changes it.
  class BiasRow {
   public:
    BiasRow(const AttendRequest& request, int64_t row, int64_t position)
        : mask_(request.mask),
          offset_(row * mask_.strides[0] + (position - request.span.kv_begin) * mask_.strides[3]) {}

    // Fills the additive bias for tokens [begin, end) of the page. Returns false when all of them are masked.
    bool load(int64_t head, int64_t query, int64_t begin, int64_t end);
    const float* values() const { return values_; }

   private:
    float value(int64_t index) const;

    const MaskView& mask_;
    const int64_t offset_;
    int64_t key_ = -1;
    int64_t begin_ = 0;
    int64_t end_ = 0;
    bool visible_ = true;
    float values_[kPageTokens];
  };

  Rules(const Layer& layer, const AttendRequest& request, const Block& block)
      : layer_(layer), request_(request), block_(block), heads_(layer.geometry, request.num_heads) {}

  // The pages at least one query of a block (this one, or another one of the request) sees.
  std::vector<PageUse> uses(const Block& block) const;
  // Row of the block, page.
  BiasRow bias(int64_t row, int64_t index) const {
    return BiasRow(request_, block_.row_begin + row, index * kPageTokens);
  }
  // What queries [m, m + count) of a kv head see of a page by causality and window, to modifiers; returns the
  // tokens that any of them sees, [first, second).
  std::pair<int64_t, int64_t> ranges(int64_t row, int64_t index, int64_t m, int64_t count,
                                     ScoreModifier* modifiers) const;
  // Adds mask and ALiBi of query m of a kv head. False: it sees nothing of the page.
  bool complete(int64_t row, int64_t index, int64_t h, int64_t m, BiasRow* bias,
                ScoreModifier* modifier) const;

 private:
  int64_t query_position(int64_t row, int64_t query) const {
    if (request_.causal == Causal::kUpperLeft) return request_.span.kv_begin + query;
    return row_end(layer_, request_.span, block_.row_begin + row) - request_.q_len + query;
  }
  std::pair<int64_t, int64_t> query_range(int64_t row, int64_t query) const;
  bool hides_whole_pages(const Block& block) const;
  bool hidden(const Block& block, int64_t row, int64_t index, int64_t first, int64_t last) const;

  const Layer& layer_;
  const AttendRequest& request_;
  const Block block_;
  const Heads heads_;
};

// Tokens of a page that count, for each kv head: bit t of at(row of the block, page, kv head).
class TokenChoice {
 public:
  virtual ~TokenChoice() = default;
  virtual uint64_t at(int64_t row, int64_t index, int64_t h) const = 0;
};

class AttendPass : public PageConsumer {
 public:
  AttendPass(const PassContext& context, const Layer& layer, const AttendRequest& request, const Block& block,
             int worker_count);

  static int64_t bytes_per_query(const Geometry& geometry, int64_t worker_count) {
    return geometry.head_dim_k * static_cast<int64_t>(sizeof(float)) +
           worker_count * (geometry.head_dim_v * static_cast<int64_t>(sizeof(float)) +
                           static_cast<int64_t>(sizeof(SoftmaxState)));
  }

  const Rules& rules() const { return rules_; }
  int64_t queries_per_head() const { return queries_per_head_; }
  // The scaled queries of one kv head, [queries_per_head][head_dim_k].
  const float* queries(int64_t row, int64_t h) const {
    return q_ + (row * queries_per_row_ + h * queries_per_head_) * layer_.geometry.head_dim_k;
  }

  // Before it runs, and null for none: which tokens count, and where the mass of each tile goes: the natural
  // log of the sum of its exponentials, for use u (PageUse::slot), the i-th of its heads and query m at
  // masses[(u + i) * queries_per_head + m].
  void choose(const TokenChoice* choice) { choice_ = choice; }
  void record(float* masses) { masses_ = masses; }

  void consume(int worker, const PageUse& use, const uint8_t* bytes) override;

  // Maximum and sum of a query over what was consumed so far, all workers together; the partials stay as they
  // are.
  SoftmaxState state(int64_t row, int64_t h, int64_t m) const;
  // What stands for the tokens that were left out, for each query: the log of the sum of their exponentials,
  // and the mean of their values.
  struct Rest {
    const float* log_masses;  // [rows][num_kv_heads][queries_per_head]; minus infinity: nothing
    const float* values;      // [rows][num_kv_heads][queries_per_head][head_dim_v]
  };
  // Merges the workers' partials and writes out and lse.
  void finish(const Rest* rest = nullptr);

 private:
  void attend_tile(int64_t row, const PageUse& use, int64_t h, int64_t m, int64_t count, const Tile& tile,
                   const float* q, Rules::BiasRow* bias, SoftmaxState* states, float* out) const;
  float* worker_out(int64_t worker, int64_t row) const {
    return out_ + (worker * block_.row_count + row) * queries_per_row_ * layer_.geometry.head_dim_v;
  }
  SoftmaxState* worker_states(int64_t worker, int64_t row) const {
    return states_ + (worker * block_.row_count + row) * queries_per_row_;
  }
  SoftmaxState merge(int64_t row, int64_t query, float** merged) const;

  const Kernels& kernels_;
  const Layer& layer_;
  const AttendRequest& request_;
  const Block block_;
  const Heads heads_;
  const Rules rules_;
  const Layouts layouts_;
  const int64_t queries_per_head_;
  const int64_t queries_per_row_;
  const int worker_count_;
  const TokenChoice* choice_ = nullptr;
  float* masses_ = nullptr;
  float* q_ = nullptr;    // [rows][num_kv_heads][queries_per_head][head_dim_k], times scale
  float* out_ = nullptr;  // [workers][rows][num_kv_heads][queries_per_head][head_dim_v], not normalised
  SoftmaxState* states_ = nullptr;  // [workers][rows][num_kv_heads][queries_per_head]
  std::vector<uint8_t> touched_;    // [rows][workers]: this worker has a partial of this row
};

}  // namespace csd
