// SparF: InstInfer (2409.04992, section IV), which is SparQ (2312.04985, algorithm 1) for kv heads that
// several query heads share. torch_csd/reference.py has the formulas.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>

#include "executor/sparse.h"
#include "executor/summarise.h"

namespace csd {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The queries of one kv head as step 1 has them.
struct StepOneQueries {
  // The channels from the first to the last that count: rows of K that lie side by side. The others among
  // them are 0 in q.
  int64_t channel_begin = 0;
  int64_t channel_end = 0;
  std::vector<float> q;      // [queries][head_dim_k], with the temperature
  std::vector<float> range;  // [queries][channel_end - channel_begin] of q
};

// Approximate probabilities of every token for the queries of some kv heads of one row.
class StepOne : public PageConsumer {
 public:
  StepOne(const PassContext& context, const Layer& layer, const AttendRequest& request, const Block& block,
          const AttendPass& pass, int64_t row, const std::vector<PageUse>& pages, int64_t head_begin,
          int64_t head_end, const std::vector<StepOneQueries>& queries, int worker_count)
      : kernels_(*context.kernels),
        request_(request),
        rules_(layer, request, block),
        layouts_(layer.geometry),
        head_dim_(layer.geometry.head_dim_k),
        row_(row),
        pages_(pages),
        head_begin_(head_begin),
        head_count_(head_end - head_begin),
        query_count_(pass.queries_per_head()),
        queries_(queries),
        p_(static_cast<size_t>(head_count_ * query_count_ * page_count() * kPageTokens), 0.0f),
        maxima_(static_cast<size_t>(head_count_ * query_count_ * page_count()), -kInfinity),
        unknown_(static_cast<size_t>(head_count_ * page_count()), 0),
        states_(static_cast<size_t>(worker_count * head_count_ * query_count_),
                SoftmaxState{-kInfinity, 0.0f}) {}

  void consume(int worker, const PageUse& use, const uint8_t* bytes) override {
    const PageLayout& layout = layouts_.of(*use.page);
    const int64_t h = use.begin / layout.tile_bytes();
    const StepOneQueries& queries = queries_[static_cast<size_t>(h)];
    if (use.page->quantised) {
      const Tile tile(kernels_, layout, bytes, 0);
      add(worker, use.slot, h, [&](int64_t m, int64_t count, float* scores) {
        tile.score(queries.q.data() + m * head_dim_, count, scores);
      });
    } else {
      const int64_t width = queries.channel_end - queries.channel_begin;
      add(worker, use.slot, h, [&](int64_t m, int64_t count, float* scores) {
        kernels_.score_tile(layout.dtype, queries.range.data() + m * width, bytes, count, width, scores);
      });
    }
  }

  // The tile of page number i for a kv head. score(m, count, scores) gives those of queries [m, m + count).
  template <typename Score>
  void add(int worker, int64_t i, int64_t h, const Score& score) {
    alignas(64) float scores[kQueryBlock * kPageTokens];
    ScoreModifier modifiers[kQueryBlock];
    const int64_t index = pages_[static_cast<size_t>(i)].index;
    Rules::BiasRow bias = rules_.bias(row_, index);
    for (int64_t m = 0; m < query_count_; m += kQueryBlock) {
      const int64_t count = std::min(kQueryBlock, query_count_ - m);
      const auto [begin, end] = rules_.ranges(row_, index, m, count, modifiers);
      if (begin >= end) continue;
      score(m, count, scores);
      for (int64_t j = 0; j < count; ++j) {
        if (!rules_.complete(row_, index, h, m + j, &bias, &modifiers[j])) continue;
        const int64_t query = (h - head_begin_) * query_count_ + m + j;
        SoftmaxState& state = states_[static_cast<size_t>(worker * head_count_ * query_count_ + query)];
        float* row_scores = scores + j * kPageTokens;
        if (any_not_finite(row_scores, kPageTokens)) set_aside(h, i, modifiers[j], row_scores);
        kernels_.softmax_row(row_scores, modifiers[j], &state);
        std::copy_n(row_scores, kPageTokens, p_.data() + (query * page_count() + i) * kPageTokens);
        maxima_[static_cast<size_t>(query * page_count() + i)] = state.max;
      }
    }
  }

  // Tokens of page number i whose scores are not finite: they have to be looked at.
  uint64_t unknown(int64_t h, int64_t i) const {
    return unknown_[static_cast<size_t>((h - head_begin_) * page_count() + i)];
  }

  // Turns what was added for a kv head into probabilities; sums them over the queries to summed [pages][64].
  void normalise(int64_t h, int worker_count, float* summed) {
    std::fill_n(summed, page_count() * kPageTokens, 0.0f);
    for (int64_t m = 0; m < query_count_; ++m) {
      const int64_t query = (h - head_begin_) * query_count_ + m;
      float top = -kInfinity;
      float sum = 0.0f;
      const auto state_of = [&](int worker) {
        return states_[static_cast<size_t>(worker * head_count_ * query_count_ + query)];
      };
      for (int worker = 0; worker < worker_count; ++worker) top = std::max(top, state_of(worker).max);
      for (int worker = 0; worker < worker_count; ++worker) {
        if (state_of(worker).sum > 0.0f) sum += state_of(worker).sum * std::exp(state_of(worker).max - top);
      }
      for (int64_t i = 0; i < page_count(); ++i) {
        float* p = p_.data() + (query * page_count() + i) * kPageTokens;
        const float max = maxima_[static_cast<size_t>(query * page_count() + i)];
        const float factor = sum > 0.0f && max > -kInfinity ? std::exp(max - top) / sum : 0.0f;
        float* target = summed + i * kPageTokens;
        for (int64_t t = 0; t < kPageTokens; ++t) {
          p[t] *= factor;
          target[t] += p[t];
        }
      }
    }
  }

  // Of query m: the probabilities of the tokens that bits say.
  float share(int64_t h, int64_t m, const uint64_t* bits) const {
    const int64_t query = (h - head_begin_) * query_count_ + m;
    float sum = 0.0f;
    for (int64_t i = 0; i < page_count(); ++i) {
      if (bits[i] == 0) continue;
      const float* p = p_.data() + (query * page_count() + i) * kPageTokens;
      for (int64_t t = 0; t < kPageTokens; ++t) sum += (bits[i] >> t & 1) != 0 ? p[t] : 0.0f;
    }
    return sum;
  }

 private:
  int64_t page_count() const { return static_cast<int64_t>(pages_.size()); }

  // So that the probabilities of the others are numbers.
  void set_aside(int64_t h, int64_t i, const ScoreModifier& modifier, float* scores) {
    for (int64_t t = modifier.token_begin; t < modifier.token_end; ++t) {
      if (std::isfinite(scores[t])) continue;
      scores[t] = std::numeric_limits<float>::lowest();
      unknown_[static_cast<size_t>((h - head_begin_) * page_count() + i)] |= uint64_t{1} << t;
    }
  }

  const Kernels& kernels_;
  const AttendRequest& request_;
  const Rules rules_;
  const Layouts layouts_;
  const int64_t head_dim_;
  const int64_t row_;
  const std::vector<PageUse>& pages_;
  const int64_t head_begin_;
  const int64_t head_count_;
  const int64_t query_count_;
  const std::vector<StepOneQueries>& queries_;  // by kv head
  std::vector<float> p_;                        // [heads][queries][pages][kPageTokens]
  std::vector<float> maxima_;                   // [heads][queries][pages]: that p is relative to
  std::vector<uint64_t> unknown_;               // [heads][pages]
  std::vector<SoftmaxState> states_;            // [workers][heads][queries]
};

class SparF : public PageConsumer, public TokenChoice {
 public:
  SparF(const PassContext& context, const Layer& layer, const AttendRequest& request,
        const SparseRequest& sparse, const Block& block, int worker_count)
      : context_(context),
        kernels_(*context.kernels),
        layer_(layer),
        geometry_(layer.geometry),
        request_(request),
        sparse_(sparse),
        block_(block),
        heads_(layer.geometry, request.num_heads),
        values_(layer.geometry, SummaryKind::kValues),
        layouts_(layer.geometry),
        worker_count_(worker_count),
        pass_(context, layer, request, block, worker_count),
        rows_(static_cast<size_t>(block.row_count)),
        shares_(static_cast<size_t>(block.row_count * heads_.num_kv_heads * pass_.queries_per_head()), 0.0f),
        mean_(static_cast<size_t>(block.row_count * head_sums() * pass_.queries_per_head()), 0.0f),
        sums_(static_cast<size_t>(worker_count * block.row_count * head_sums()), 0.0) {}

  void run() {
    for (const PageUse& use : pass_.rules().uses(block_)) row_of(use).pages.push_back(use);
    for (int64_t row = 0; row < block_.row_count; ++row) step_one(row);
    pass_.choose(this);
    ChosenUses chosen(context_, layer_);
    chosen.add(step_two_uses());
    chosen.run(worker_count_, compute_weight(block_, heads_.group), this);
    if (!sparse_.mean_value) {
      pass_.finish();
      return;
    }
    find_means();
    const std::vector<float> log_masses = rest_masses();
    const AttendPass::Rest rest{log_masses.data(), mean_.data()};
    pass_.finish(&rest);
  }

  // Step 2. Pages whose values are not summed yet are here for that, too.
  void consume(int worker, const PageUse& use, const uint8_t* bytes) override {
    if (use.whole() && !summed(use)) add_values(worker, use, bytes);
    pass_.consume(worker, use, bytes);
  }

  uint64_t at(int64_t row, int64_t index, int64_t h) const override {
    const Chosen& chosen = rows_[static_cast<size_t>(row)];
    return chosen.bits[static_cast<size_t>(h * chosen.page_count() + index - chosen.first_index())];
  }

 private:
  struct Chosen {
    std::vector<PageUse> pages;  // that any query sees
    std::vector<uint64_t> bits;  // [num_kv_heads][page_count()]: tokens that are attended to
    int64_t first_index() const { return pages.empty() ? 0 : pages.front().index; }
    // Of all pages between the first and the last: a mask may hide some.
    int64_t page_count() const { return pages.empty() ? 0 : pages.back().index + 1 - pages.front().index; }
  };

  Chosen& row_of(const PageUse& use) {
    return rows_[static_cast<size_t>(use.row - request_.span.row_begin - block_.row_begin)];
  }
  const RowSummary& summary_of(const PageUse& use) const {
    return layer_.rows[static_cast<size_t>(use.row)].summary(SummaryKind::kValues);
  }
  // The sum of its values is known: of a summarised page, all of whose tokens the span has.
  bool summed(const PageUse& use) const {
    const int64_t row = use.row - request_.span.row_begin;
    return use.index < summary_of(use).end_page && use.index * kPageTokens >= request_.span.kv_begin &&
           (use.index + 1) * kPageTokens <= row_end(layer_, request_.span, row);
  }
  int64_t head_sums() const { return heads_.num_kv_heads * geometry_.head_dim_v; }

  // The channels in which the queries are largest, and SparQ's temperature for what they leave out.
  StepOneQueries queries_of(int64_t row, int64_t h) const {
    const int64_t width = geometry_.head_dim_k;
    const int64_t count = pass_.queries_per_head();
    const float* q = pass_.queries(row, h);
    StepOneQueries queries;
    queries.q.assign(q, q + count * width);
    queries.channel_end = width;
    const int64_t channels = std::min(sparse_.channels, width);
    if (!sparse_.sketch && channels < width) {
      std::vector<float> sizes(static_cast<size_t>(width), 0.0f);
      for (int64_t i = 0; i < count * width; ++i) sizes[static_cast<size_t>(i % width)] += std::fabs(q[i]);
      std::vector<int64_t> order(static_cast<size_t>(width));
      std::iota(order.begin(), order.end(), 0);
      std::nth_element(order.begin(), order.begin() + channels, order.end(), [&](int64_t a, int64_t b) {
        const float of_a = sizes[static_cast<size_t>(a)], of_b = sizes[static_cast<size_t>(b)];
        return of_a != of_b ? of_a > of_b : a < b;
      });
      std::vector<uint8_t> counts(static_cast<size_t>(width), 0);
      for (int64_t i = 0; i < channels; ++i) counts[static_cast<size_t>(order[static_cast<size_t>(i)])] = 1;
      const auto bounds = std::minmax_element(order.begin(), order.begin() + channels);
      queries.channel_begin = *bounds.first / kHeadDimMultiple * kHeadDimMultiple;
      queries.channel_end = round_up(*bounds.second + 1, kHeadDimMultiple);
      for (int64_t m = 0; m < count; ++m) {
        float* own = queries.q.data() + m * width;
        float all = 0.0f;
        float kept = 0.0f;
        for (int64_t d = 0; d < width; ++d) {
          all += std::fabs(own[d]);
          if (counts[static_cast<size_t>(d)] == 0) {
            own[d] = 0.0f;
          } else {
            kept += std::fabs(own[d]);
          }
        }
        const float factor = kept > 0.0f ? std::sqrt(all / kept) : 1.0f;
        for (int64_t d = 0; d < width; ++d) own[d] *= factor;
      }
    }
    const int64_t range = queries.channel_end - queries.channel_begin;
    queries.range.resize(static_cast<size_t>(count * range));
    for (int64_t m = 0; m < count; ++m) {
      std::copy_n(queries.q.data() + m * width + queries.channel_begin, range,
                  queries.range.data() + m * range);
    }
    return queries;
  }

  // As many kv heads at once as the scratch memory holds the probabilities of.
  void step_one(int64_t row) {
    Chosen& chosen = rows_[static_cast<size_t>(row)];
    if (chosen.pages.empty()) return;
    chosen.bits.assign(static_cast<size_t>(heads_.num_kv_heads * chosen.page_count()), 0);
    std::vector<StepOneQueries> queries;
    for (int64_t h = 0; h < heads_.num_kv_heads; ++h) queries.push_back(queries_of(row, h));
    const auto count = static_cast<int64_t>(chosen.pages.size());
    const int64_t bytes_per_head =
        pass_.queries_per_head() * count * kPageTokens * static_cast<int64_t>(sizeof(float));
    const int64_t at_once =
        std::clamp<int64_t>(context_.scratch_bytes_max / bytes_per_head, 1, heads_.num_kv_heads);
    for (int64_t begin = 0; begin < heads_.num_kv_heads; begin += at_once) {
      const int64_t end = std::min(heads_.num_kv_heads, begin + at_once);
      const int workers = context_.pool->worker_count();
      StepOne step(context_, layer_, request_, block_, pass_, row, chosen.pages, begin, end, queries,
                   workers);
      const int64_t sketched =
          sparse_.sketch ? score_sketches(chosen.pages, begin, end, queries, workers, &step) : 0;
      read_channels(chosen.pages, sketched, begin, end, queries, workers, &step);
      choose(row, begin, end, workers, &step);
    }
  }

  // Returns how many pages had one.
  int64_t score_sketches(const std::vector<PageUse>& pages, int64_t head_begin, int64_t head_end,
                         const std::vector<StepOneQueries>& queries, int workers, StepOne* step) const {
    const RowSummary& summary =
        layer_.rows[static_cast<size_t>(pages.front().row)].summary(SummaryKind::kSketch);
    const PageLayout layout = SummaryShape(geometry_, SummaryKind::kSketch).full();
    const auto behind = std::find_if(pages.begin(), pages.end(),
                                     [&](const PageUse& use) { return use.index >= summary.end_page; });
    const int64_t count = behind - pages.begin();
    std::atomic<int64_t> next{0};
    context_.pool->run(std::clamp<int>(static_cast<int>(count / 16), 1, workers), [&](int worker) {
      constexpr int64_t kClaim = 16;
      for (int64_t first = next.fetch_add(kClaim); first < count; first = next.fetch_add(kClaim)) {
        for (int64_t i = first; i < std::min(count, first + kClaim); ++i) {
          const SummaryBlock& block = *summary.block(pages[static_cast<size_t>(i)].index);
          for (int64_t h = head_begin; h < head_end; ++h) {
            const Tile tile(kernels_, layout, block.memory, h);
            step->add(worker, i, h, [&](int64_t m, int64_t together, float* scores) {
              tile.score(queries[static_cast<size_t>(h)].q.data() + m * geometry_.head_dim_k, together,
                         scores);
            });
          }
        }
      }
    });
    return count;
  }

  // From page `first` on. What is read of a tile is the range of its channels: no checksum is of that. Codes
  // of channels have their scales behind V: those tiles are read whole, and compared.
  void read_channels(const std::vector<PageUse>& pages, int64_t first, int64_t head_begin, int64_t head_end,
                     const std::vector<StepOneQueries>& queries, int workers, StepOne* step) const {
    std::vector<PageUse> uses;
    for (auto i = static_cast<size_t>(first); i < pages.size(); ++i) {
      const PageLayout& layout = layouts_.of(*pages[i].page);
      for (int64_t h = head_begin; h < head_end; ++h) {
        PageUse use = pages[i];
        if (layout.code_bits != 0) {
          use = tile_use(pages[i], h);
        } else {
          const StepOneQueries& own = queries[static_cast<size_t>(h)];
          const int64_t channel_bytes = kPageTokens * element_bytes(layout.dtype);
          const int64_t tile = h * layout.tile_bytes();
          use.begin = static_cast<int32_t>(tile + own.channel_begin * channel_bytes);
          use.end = static_cast<int32_t>(tile + own.channel_end * channel_bytes);
        }
        use.slot = static_cast<int32_t>(i);
        uses.push_back(use);
      }
    }
    PassContext context = context_;
    context.tiles = nullptr;
    ChosenUses chosen(context, layer_);
    chosen.add(std::move(uses));
    chosen.run(workers, compute_weight(block_, heads_.group), step);
  }

  void choose(int64_t row, int64_t head_begin, int64_t head_end, int workers, StepOne* step) {
    std::atomic<int64_t> next{head_begin};
    const int count = static_cast<int>(std::clamp<int64_t>(head_end - head_begin, 1, workers));
    context_.pool->run(count, [&](int) {
      for (int64_t h = next++; h < head_end; h = next++) choose_head(row, h, workers, step);
    });
  }

  void choose_head(int64_t row, int64_t h, int workers, StepOne* step) {
    Chosen& chosen = rows_[static_cast<size_t>(row)];
    const auto count = static_cast<int64_t>(chosen.pages.size());
    std::vector<float> summed(static_cast<size_t>(count * kPageTokens));
    step->normalise(h, workers, summed.data());
    const int64_t end = row_end(layer_, request_.span, block_.row_begin + row);
    const int64_t local = std::max(request_.span.kv_begin, end - sparse_.local_tokens);
    std::vector<int32_t> order;  // of the tokens that are not always attended to
    std::vector<uint64_t> bits(static_cast<size_t>(count), 0);
    order.reserve(summed.size());
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t t = 0; t < kPageTokens; ++t) {
        const int64_t position = chosen.pages[static_cast<size_t>(i)].index * kPageTokens + t;
        if (position < request_.span.kv_begin || position >= end) continue;
        if (position >= local || (step->unknown(h, i) >> t & 1) != 0) {
          bits[static_cast<size_t>(i)] |= uint64_t{1} << t;
        } else {
          order.push_back(static_cast<int32_t>(i * kPageTokens + t));
        }
      }
    }
    const auto wanted = order.begin() + std::min(sparse_.tokens, static_cast<int64_t>(order.size()));
    if (wanted != order.end()) {
      std::nth_element(order.begin(), wanted, order.end(), [&](int32_t a, int32_t b) {
        const float of_a = summed[static_cast<size_t>(a)], of_b = summed[static_cast<size_t>(b)];
        return of_a != of_b ? of_a > of_b : a > b;
      });
    }
    for (auto token = order.begin(); token != wanted; ++token) {
      bits[static_cast<size_t>(*token / kPageTokens)] |= uint64_t{1} << (*token % kPageTokens);
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t place = chosen.pages[static_cast<size_t>(i)].index - chosen.first_index();
      chosen.bits[static_cast<size_t>(h * chosen.page_count() + place)] = bits[static_cast<size_t>(i)];
    }
    for (int64_t m = 0; m < pass_.queries_per_head(); ++m) {
      const int64_t query = (row * heads_.num_kv_heads + h) * pass_.queries_per_head() + m;
      const float share = std::clamp(step->share(h, m, bits.data()), 0.0f, 1.0f);
      shares_[static_cast<size_t>(query)] = share;
      sparse_.missing[output_index(heads_, block_, request_.q_len, row, h, m)] = 1.0f - share;
    }
  }

  // One kv head's tile of a page.
  PageUse tile_use(const PageUse& page, int64_t h) const {
    PageUse use = page;
    if (heads_.num_kv_heads == 1) return use;  // all of it
    const int64_t tile_bytes = layouts_.of(*page.page).tile_bytes();
    use.begin = static_cast<int32_t>(h * tile_bytes);
    use.end = static_cast<int32_t>((h + 1) * tile_bytes);
    use.tile_count = 1;
    const RowSummary& summary = summary_of(page);
    if (page.index < summary.end_page) {
      const int64_t block = page.index / values_.pages_per_block();
      const int64_t number = page.index % values_.pages_per_block() * heads_.num_kv_heads + h;
      use.checksums = summary.block(block)->checksums.data() + number;
    }
    return use;
  }

  std::vector<PageUse> step_two_uses() const {
    std::vector<PageUse> uses;
    for (const Chosen& chosen : rows_) {
      for (const PageUse& page : chosen.pages) {
        if (!summed(page)) {
          uses.push_back(page);
          continue;
        }
        for (int64_t h = 0; h < heads_.num_kv_heads; ++h) {
          const int64_t place = h * chosen.page_count() + page.index - chosen.first_index();
          if (chosen.bits[static_cast<size_t>(place)] != 0) uses.push_back(tile_use(page, h));
        }
      }
    }
    return uses;
  }

  // ---- the mean of V ----

  void add_values(int worker, const PageUse& use, const uint8_t* bytes) {
    const int64_t row = use.row - request_.span.row_begin - block_.row_begin;
    const int64_t width = geometry_.head_dim_v;
    const int64_t position = use.index * kPageTokens;
    const int64_t begin = std::max<int64_t>(0, request_.span.kv_begin - position);
    const int64_t end =
        std::min(kPageTokens, row_end(layer_, request_.span, block_.row_begin + row) - position);
    std::vector<float> v(static_cast<size_t>(std::max<int64_t>(0, end - begin) * width));
    double* sums = sums_.data() + (worker * block_.row_count + row) * head_sums();
    for (int64_t h = 0; h < heads_.num_kv_heads; ++h, sums += width) {
      Tile(kernels_, layouts_.of(*use.page), bytes, h)
          .unpack_v(begin, end - begin, DType::kFloat32, v.data());
      for (size_t i = 0; i < v.size(); ++i) sums[i % static_cast<size_t>(width)] += v[i];
    }
  }

  void find_means() {
    for (int64_t row = 0; row < block_.row_count; ++row) {
      const Chosen& chosen = rows_[static_cast<size_t>(row)];
      if (chosen.pages.empty()) continue;
      std::vector<double> sums(static_cast<size_t>(head_sums()), 0.0);
      const auto add = [&](const auto* values) {
        for (size_t i = 0; i < sums.size(); ++i) sums[i] += static_cast<double>(values[i]);
      };
      for (int64_t worker = 0; worker < worker_count_; ++worker) {
        add(sums_.data() + (worker * block_.row_count + row) * head_sums());
      }
      const RowSummary& summary = summary_of(chosen.pages.front());
      const int64_t per_block = values_.pages_per_block();
      const int64_t end = row_end(layer_, request_.span, block_.row_begin + row);
      int64_t tokens = 0;
      for (size_t i = 0; i < chosen.pages.size();) {
        const int64_t index = chosen.pages[i].index;
        if (!summed(chosen.pages[i])) {
          tokens += std::min(end, (index + 1) * kPageTokens) -
                    std::max(request_.span.kv_begin, index * kPageTokens);
          i++;
          continue;
        }
        const SummaryBlock& block = *summary.block(index / per_block);
        // A block of which all pages are seen has their sum.
        const size_t last = i + static_cast<size_t>(per_block) - 1;
        const bool all = block.full && index % per_block == 0 && last < chosen.pages.size() &&
                         chosen.pages[last].index == index + per_block - 1 && summed(chosen.pages[last]);
        add(block.sums + (all ? per_block : index % per_block) * head_sums());
        tokens += (all ? per_block : 1) * kPageTokens;
        i += all ? static_cast<size_t>(per_block) : 1;
      }
      const int64_t width = geometry_.head_dim_v;
      float* mean = mean_.data() + row * pass_.queries_per_head() * head_sums();
      for (int64_t h = 0; h < heads_.num_kv_heads; ++h) {
        for (int64_t m = 0; m < pass_.queries_per_head(); ++m, mean += width) {
          for (int64_t d = 0; d < width; ++d) {
            mean[d] = static_cast<float>(sums[static_cast<size_t>(h * width + d)] /
                                         static_cast<double>(std::max<int64_t>(1, tokens)));
          }
        }
      }
    }
  }

  // The mass that gives what was attended to its share beside what is left out.
  std::vector<float> rest_masses() const {
    std::vector<float> logs(shares_.size(), -kInfinity);
    for (int64_t query = 0; query < static_cast<int64_t>(shares_.size()); ++query) {
      const int64_t queries = pass_.queries_per_head();
      const int64_t head = query / queries;
      const SoftmaxState state =
          pass_.state(head / heads_.num_kv_heads, head % heads_.num_kv_heads, query % queries);
      const float share = shares_[static_cast<size_t>(query)];
      if (share < 1.0f && share > 0.0f && state.sum > 0.0f) {
        logs[static_cast<size_t>(query)] = state.max + std::log(state.sum) + std::log(1.0f / share - 1.0f);
      }
    }
    return logs;
  }

  const PassContext& context_;
  const Kernels& kernels_;
  const Layer& layer_;
  const Geometry geometry_;
  const AttendRequest& request_;
  const SparseRequest& sparse_;
  const Block block_;
  const Heads heads_;
  const SummaryShape values_;
  const Layouts layouts_;
  const int worker_count_;
  AttendPass pass_;
  std::vector<Chosen> rows_;
  std::vector<float>
      shares_;  // [rows][num_kv_heads][queries_per_head]: of what is attended to, as step 1 sees it
  std::vector<float> mean_;   // [rows][num_kv_heads][queries_per_head][head_dim_v]
  std::vector<double> sums_;  // [workers][rows][num_kv_heads][head_dim_v], of pages that are not summarised
};

}  // namespace

void attend_sparf(const PassContext& context, const Layer& layer, const AttendRequest& request,
                  const SparseRequest& sparse, const Block& block, int worker_count) {
  SparF(context, layer, request, sparse, block, worker_count).run();
}

}  // namespace csd
