#include "executor/sparse.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <limits>
#include <mutex>
#include <numeric>
#include <vector>

#include "base/error.h"
#include "executor/attend_pass.h"

namespace csd {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Reading through a gap of this size takes about as long as a request more: 8 to 11 us, by the rows of
// `torch-csd bench sparse` that read the same bytes in 1016 requests and in 127.
constexpr int64_t kGapBytes = int64_t{32} << 10;

int64_t pages_of(int64_t tokens) { return (tokens + kPageTokens - 1) / kPageTokens; }

// Of a page's probabilities from their mean, summed. (In eight sums, which the compiler may keep in vectors.)
float distance(const float* p, float mean) {
  constexpr int64_t kSums = 8;
  float sums[kSums] = {};
  for (int64_t t = 0; t < kPageTokens; t += kSums) {
    for (int64_t i = 0; i < kSums; ++i) sums[i] += std::fabs(p[t + i] - mean);
  }
  return std::accumulate(sums, sums + kSums, 0.0f);
}

// The pages of one row that a pass may choose among, and for each group of kv heads how much they matter.
struct Candidates {
  int64_t row = 0;              // of the block
  std::vector<PageUse> pages;   // that any query sees, by index
  std::vector<uint8_t> always;  // [pages]
  int64_t always_count = 0;
  std::vector<float> values;  // [choices][pages], greater is better
  // [num_kv_heads][queries_per_head][pages], where they are known: what bounds allow of the scores; in logs,
  // the sum of the exponentials of a page's scores (or what bounds allow of it), and how much of it would go
  // to wrong tokens if the page's went to all of its tokens alike.
  std::vector<float> bounds;
  std::vector<float> masses;
  std::vector<float> errors;

  int64_t count() const { return static_cast<int64_t>(pages.size()); }
  // The log of the sum of the exponentials, over the pages that are chosen among.
  float log_sum(const float* logs) const {
    float top = -kInfinity;
    for (int64_t i = 0; i < count(); ++i) {
      if (always[static_cast<size_t>(i)] == 0 && logs[i] > top) top = logs[i];
    }
    if (!std::isfinite(top)) return 0.0f;
    float sum = 0.0f;
    for (int64_t i = 0; i < count(); ++i) {
      if (always[static_cast<size_t>(i)] == 0 && logs[i] <= top) sum += std::exp(logs[i] - top);
    }
    return top + std::log(sum);
  }
};

// Scores of what is kept about pages.
class Bounds {
 public:
  Bounds(const PassContext& context, const Layer& layer, const AttendRequest& request, const AttendPass& pass,
         SummaryKind kind)
      : kernels_(*context.kernels),
        layer_(layer),
        request_(request),
        pass_(pass),
        kind_(kind),
        shape_(layer.geometry, kind),
        heads_(layer.geometry, request.num_heads) {}

  // Room for what score() and rate() find. with_masses, with_errors: these, too.
  void prepare(int64_t choice_count, bool with_masses, bool with_errors, Candidates* candidates) const {
    const int64_t count = candidates->count();
    const auto size = static_cast<size_t>(heads_.num_kv_heads * pass_.queries_per_head() * count);
    candidates->values.assign(static_cast<size_t>(choice_count * count), -kInfinity);
    // What is not summarised may matter as much as it likes.
    if (kind_ == SummaryKind::kBounds) candidates->bounds.assign(size, kInfinity);
    if (with_masses) candidates->masses.assign(size, kInfinity);
    if (with_errors) candidates->errors.assign(size, kInfinity);
  }

  // Pages [begin, end) for the queries of one kv head.
  void score(int64_t h, int64_t begin, int64_t end, Candidates* candidates) const {
    float* masses = of_head(h, &candidates->masses, *candidates);
    if (kind_ == SummaryKind::kSketch) {
      weigh_pages(h, begin, end, *candidates, masses, of_head(h, &candidates->errors, *candidates));
    } else {
      float* bounds = of_head(h, &candidates->bounds, *candidates);
      bound_pages(h, begin, end, *candidates, bounds, masses);
      apply_rules(h, begin, end, candidates, bounds, masses);
    }
  }

  // Once all pages are scored: raises values[i] to what page i matters to the query of this kv head that it
  // matters most to: its bound, relative to all bounds (in logs: the share that it would have of a softmax
  // over them). Where a sketch weighs pages, its mass or error relative to all masses.
  void rate(int64_t h, Candidates* candidates, float* values) const {
    const int64_t count = candidates->count();
    float* masses = of_head(h, &candidates->masses, *candidates);
    float* errors = of_head(h, &candidates->errors, *candidates);
    const bool sketch = kind_ == SummaryKind::kSketch;
    const float* scores = !sketch             ? of_head(h, &candidates->bounds, *candidates)
                          : errors != nullptr ? errors
                                              : masses;
    const float* weights = sketch ? masses : scores;
    for (int64_t m = 0; m < pass_.queries_per_head(); ++m) {
      const float* own = scores + m * count;
      const float base = candidates->log_sum(weights + m * count);
      for (int64_t i = 0; i < count; ++i) {
        // Not a number: keys that are not finite. They have to be looked at.
        values[i] = std::isnan(own[i]) ? kInfinity : std::max(values[i], own[i] - base);
      }
    }
  }

 private:
  float* of_head(int64_t h, std::vector<float>* all, const Candidates& candidates) const {
    return all->empty() ? nullptr : all->data() + h * pass_.queries_per_head() * candidates.count();
  }

  // masses, errors [queries][pages]: see Candidates; as a sketch has the scores. errors may be null.
  void weigh_pages(int64_t h, int64_t begin, int64_t end, const Candidates& candidates, float* masses,
                   float* errors) const {
    const int64_t count = candidates.count();
    const int64_t queries = pass_.queries_per_head();
    const float* q = pass_.queries(candidates.row, h);
    const PageLayout full = shape_.full();
    alignas(64) float scores[kQueryBlock * kPageTokens];
    ScoreModifier modifiers[kQueryBlock];
    for (int64_t i = begin; i < end; ++i) {
      const PageUse& page = candidates.pages[static_cast<size_t>(i)];
      const RowSummary& summary = layer_.rows[static_cast<size_t>(page.row)].summary(kind_);
      if (page.index >= summary.end_page) break;
      const Tile tile(kernels_, full, summary.block(page.index)->memory, h);
      Rules::BiasRow bias = pass_.rules().bias(candidates.row, page.index);
      for (int64_t m = 0; m < queries; m += kQueryBlock) {
        const int64_t together = std::min(kQueryBlock, queries - m);
        pass_.rules().ranges(candidates.row, page.index, m, together, modifiers);
        tile.score(q + m * layer_.geometry.head_dim_k, together, scores);
        for (int64_t j = 0; j < together; ++j) {
          const int64_t place = (m + j) * count + i;
          if (!pass_.rules().complete(candidates.row, page.index, h, m + j, &bias, &modifiers[j])) {
            masses[place] = -kInfinity;
            if (errors != nullptr) errors[place] = -kInfinity;
            continue;
          }
          SoftmaxState state{-kInfinity, 0.0f};
          const float* p = scores + j * kPageTokens;
          kernels_.softmax_row(scores + j * kPageTokens, modifiers[j], &state);
          masses[place] = state.max + std::log(state.sum);
          if (errors == nullptr) continue;
          errors[place] =
              state.max + std::log(0.5f * distance(p, state.sum / static_cast<float>(kPageTokens)));
        }
      }
    }
  }

  // bounds, masses [queries][pages]: of the scores' maximum, and of the log of the sum of their exponentials.
  void bound_pages(int64_t h, int64_t pages_begin, int64_t pages_end, const Candidates& candidates,
                   float* bounds, float* masses) const {
    const int64_t count = candidates.count();
    const int64_t queries = pass_.queries_per_head();
    const int64_t width = layer_.geometry.head_dim_k;
    const float* q = pass_.queries(candidates.row, h);
    std::vector<float> absolute(static_cast<size_t>(queries * width));
    std::transform(q, q + queries * width, absolute.begin(), [](float value) { return std::fabs(value); });
    const PageLayout filling = shape_.filling();
    const PageLayout full = shape_.full();
    const int64_t members = shape_.members_per_page;
    const float group_mass = std::log(static_cast<float>(kPageTokens / members));
    alignas(64) float centres[kQueryBlock * kPageTokens];
    alignas(64) float radii[kQueryBlock * kPageTokens];
    for (int64_t i = pages_begin; i < pages_end;) {
      const PageUse& first = candidates.pages[static_cast<size_t>(i)];
      const RowSummary& summary = layer_.rows[static_cast<size_t>(first.row)].summary(SummaryKind::kBounds);
      if (first.index >= summary.end_page) break;
      const int64_t block_index = first.index / shape_.pages_per_block();
      int64_t end = i + 1;
      while (end < pages_end && candidates.pages[static_cast<size_t>(end)].index < summary.end_page &&
             candidates.pages[static_cast<size_t>(end)].index / shape_.pages_per_block() == block_index) {
        end++;
      }
      const SummaryBlock& block = *summary.block(block_index);
      const PageLayout& layout = block.full ? full : filling;
      const Tile centre_tile(kernels_, layout, block.memory, 2 * h);
      const Tile radius_tile(kernels_, layout, block.memory, 2 * h + 1);
      for (int64_t m = 0; m < queries; m += kQueryBlock) {
        const int64_t together = std::min(kQueryBlock, queries - m);
        centre_tile.score(q + m * width, together, centres);
        radius_tile.score(absolute.data() + m * width, together, radii);
        for (int64_t j = 0; j < together; ++j) {
          for (int64_t page = i; page < end; ++page) {
            const int64_t slot =
                candidates.pages[static_cast<size_t>(page)].index % shape_.pages_per_block() * members;
            float greatest = -kInfinity;
            float mass = 0.0f;
            for (int64_t member = slot; member < slot + members; ++member) {
              const float bound = capped(centres[j * kPageTokens + member] + radii[j * kPageTokens + member]);
              if (!(bound <= greatest)) greatest = bound;  // a NaN stays
            }
            if (masses != nullptr) {
              for (int64_t member = slot; member < slot + members; ++member) {
                mass += std::exp(capped(centres[j * kPageTokens + member] + radii[j * kPageTokens + member]) -
                                 greatest);
              }
              masses[(m + j) * count + page] = greatest + std::log(mass) + group_mass;
            }
            bounds[(m + j) * count + page] = greatest;
          }
        }
      }
      i = end;
    }
  }

  float capped(float score) const {
    return request_.softcap > 0.0f ? request_.softcap * std::tanh(score / request_.softcap) : score;
  }

  // What masks and ALiBi add at most; minus infinity for pages that a query does not see.
  void apply_rules(int64_t h, int64_t begin, int64_t end, Candidates* candidates, float* bounds,
                   float* masses) const {
    const bool plain = request_.mask.kind == MaskKind::kNone && request_.alibi_slopes == nullptr &&
                       request_.q_len == 1 && request_.window == 0;
    if (plain) return;
    const int64_t count = candidates->count();
    for (int64_t i = begin; i < end; ++i) {
      const int64_t index = candidates->pages[static_cast<size_t>(i)].index;
      Rules::BiasRow bias = pass_.rules().bias(candidates->row, index);
      for (int64_t m = 0; m < pass_.queries_per_head(); ++m) {
        ScoreModifier modifier;
        pass_.rules().ranges(candidates->row, index, m, 1, &modifier);
        float most = -kInfinity;
        if (pass_.rules().complete(candidates->row, index, h, m, &bias, &modifier)) {
          for (int64_t t = modifier.token_begin; t < modifier.token_end; ++t) {
            most = std::max(most, (modifier.bias != nullptr ? modifier.bias[t] : 0.0f) +
                                      modifier.alibi_slope * (modifier.alibi_offset + static_cast<float>(t)));
          }
        }
        const int64_t place = m * count + i;
        // Not a sum: infinity and minus infinity would give no number.
        bounds[place] = most == -kInfinity ? most : bounds[place] + most;
        if (masses != nullptr) masses[place] = most == -kInfinity ? most : masses[place] + most;
      }
    }
  }

  const Kernels& kernels_;
  const Layer& layer_;
  const AttendRequest& request_;
  const AttendPass& pass_;
  const SummaryKind kind_;
  const SummaryShape shape_;
  const Heads heads_;
};

// Attention over the pages that are best by their bounds.
class PageSelection {
 public:
  PageSelection(const PassContext& context, const Layer& layer, const AttendRequest& request,
                const SparseRequest& sparse, const Block& block, int worker_count)
      : context_(context),
        kernels_(*context.kernels),
        layer_(layer),
        request_(request),
        sparse_(sparse),
        block_(block),
        heads_(layer.geometry, request.num_heads),
        kind_(sparse.sketch ? SummaryKind::kSketch : SummaryKind::kBounds),
        shape_(layer.geometry, kind_),
        layouts_(layer.geometry),
        worker_count_(worker_count),
        pass_(context, layer, request, block, worker_count) {}

  // Begins to read what would be chosen.
  int64_t guess() {
    find_candidates();
    ChosenUses chosen(context_, layer_);
    choose([&](const std::vector<PageUse>& uses) {
      chosen.guess(uses);
      chosen.read_on();
    });
    return chosen.begun_bytes();
  }

  void run() {
    find_candidates();
    ChosenUses chosen(context_, layer_);
    choose([&](std::vector<PageUse> uses) {
      chosen.add(std::move(uses));
      chosen.read_on();
    });
    if (has_means()) find_rest(&chosen);
    attend(&chosen);
    if (sparse_.kind == SparseKind::kAdaptive) read_more();
    if (!has_means()) {
      pass_.finish();
      return;
    }
    find_rest(nullptr);
    const AttendPass::Rest rest{rest_masses_.data(), rest_values_.data()};
    pass_.finish(&rest);
  }

 private:
  // The kv heads that choose together, of one row.
  struct Choice {
    Candidates* candidates = nullptr;
    int64_t head_begin = 0;
    int64_t head_end = 0;
    std::vector<int32_t> order;  // pages, the best first; those that are always read are not among them
    int64_t unknown = 0;         // of order, at its begin: what their keys may do has no bound
    int64_t taken = 0;           // of order
    int64_t taken_of_rest = -1;  // when its rest was found
    bool done = false;
  };

  void find_candidates() {
    const std::vector<PageUse> uses = pass_.rules().uses(block_);
    rows_.resize(static_cast<size_t>(block_.row_count));
    slots_.resize(rows_.size());
    for (int64_t row = 0; row < block_.row_count; ++row) rows_[static_cast<size_t>(row)].row = row;
    for (const PageUse& use : uses) {
      rows_[static_cast<size_t>(use.row - request_.span.row_begin - block_.row_begin)].pages.push_back(use);
    }
    for (Candidates& row : rows_) {
      if (row.pages.empty()) continue;
      mark_always(&row);
      slots_[static_cast<size_t>(row.row)].assign(static_cast<size_t>(row.count() * heads_.num_kv_heads), -1);
      for (int64_t h = 0; h < heads_.num_kv_heads; h += sparse_.heads_per_choice) {
        Choice choice;
        choice.candidates = &row;
        choice.head_begin = h;
        choice.head_end = std::min(heads_.num_kv_heads, h + sparse_.heads_per_choice);
        choices_.push_back(std::move(choice));
      }
    }
  }

  // Scores all pages, in pieces; whoever scores the last one of a choice makes it, and hands over what was
  // chosen, to be read while the pieces of the next ones are scored. chosen(uses): never twice at once.
  template <typename Chosen>
  void choose(const Chosen& chosen) {
    const Bounds bounds(context_, layer_, request_, pass_, kind_);
    struct Piece {
      size_t choice;
      int64_t head;
      int64_t begin;
      int64_t end;
    };
    std::vector<Piece> pieces;
    std::vector<std::atomic<int>> left(choices_.size());  // pieces of each choice
    int64_t members = 0;
    bool in_memory = true;
    for (Candidates& row : rows_) {
      if (row.pages.empty()) continue;
      bounds.prepare(choices_per_row(), knows_masses(), has_means(), &row);
      members += row.count() * shape_.members_per_page * heads_.num_kv_heads;
      in_memory = in_memory && std::all_of(row.pages.begin(), row.pages.end(),
                                           [](const PageUse& use) { return use.page->memory != nullptr; });
    }
    for (size_t i = 0; i < choices_.size(); ++i) {
      const int64_t count = choices_[i].candidates->count();
      for (int64_t h = choices_[i].head_begin; h < choices_[i].head_end; ++h) {
        for (int64_t begin = 0; begin < count; begin += kPagesPerPiece) {
          pieces.push_back({i, h, begin, std::min(count, begin + kPagesPerPiece)});
          left[i]++;
        }
      }
    }
    std::mutex mutex;  // of what the choices share: slots, and what is read
    std::atomic<size_t> next{0};
    const auto task = [&](int) {
      for (size_t i = next++; i < pieces.size(); i = next++) {
        const Piece& piece = pieces[i];
        Choice* choice = &choices_[piece.choice];
        Candidates* row = choice->candidates;
        bounds.score(piece.head, piece.begin, piece.end, row);
        if (--left[piece.choice] > 0) continue;
        float* values = row->values.data() + choice->head_begin / sparse_.heads_per_choice * row->count();
        for (int64_t h = choice->head_begin; h < choice->head_end; ++h) bounds.rate(h, row, values);
        order(*row, values, choice);
        const int64_t more = batch_pages(*row, *choice);
        std::lock_guard<std::mutex> lock(mutex);
        std::vector<PageUse> uses;
        for (int64_t page = 0; page < row->count(); ++page) {
          if (row->always[static_cast<size_t>(page)] != 0) add_use(*choice, page, &uses);
        }
        take(more, choice, &uses);
        chosen(std::move(uses));
      }
    };
    const int workers =
        static_cast<int>(std::clamp<int64_t>(members / 4096, 1, context_.pool->worker_count()));
    // On own threads before the drive is read: lent ones would spin beside those that wait for it.
    if (in_memory) {
      context_.pool->compute(workers, task);
    } else {
      context_.pool->run(workers, task);
    }
  }

  // Attends to what was chosen, and looks at what is left.
  void attend(ChosenUses* chosen) {
    masses_.resize(static_cast<size_t>(next_slot_ * pass_.queries_per_head()), -kInfinity);
    pass_.record(masses_.data());
    chosen->run(worker_count_, compute_weight(block_, heads_.group), &pass_);
    estimate();
  }

  // Adaptive choices: until little enough is left.
  void read_more() {
    for (int round = 1; round < kRoundsMax; ++round) {
      std::vector<PageUse> uses;
      for (Choice& choice : choices_) {
        if (!choice.done) take(batch_pages(*choice.candidates, choice), &choice, &uses);
      }
      if (uses.empty()) return;
      ChosenUses chosen(context_, layer_);
      chosen.add(std::move(uses));
      attend(&chosen);
    }
  }

  // The newest tokens, the first ones, and pages that nothing is known of.
  void mark_always(Candidates* row) const {
    const int64_t count = row->count();
    row->always.assign(static_cast<size_t>(count), 0);
    const Row& stored = layer_.rows[static_cast<size_t>(row->pages.front().row)];
    const int64_t summarised = stored.summary(kind_).end_page;
    const int64_t end = row_end(layer_, request_.span, block_.row_begin + row->row);
    const int64_t first_local = std::max<int64_t>(0, end - sparse_.local_tokens) / kPageTokens;
    const int64_t sinks = std::min(count, pages_of(sparse_.sink_tokens));
    for (int64_t i = 0; i < count; ++i) {
      const int64_t index = row->pages[static_cast<size_t>(i)].index;
      const bool local = sparse_.local_tokens > 0 && index >= first_local;
      const bool always = i < sinks || local || index >= summarised;
      row->always[static_cast<size_t>(i)] = always ? 1 : 0;
      row->always_count += always ? 1 : 0;
    }
  }

  // Of equal pages the newer comes first.
  void order(const Candidates& row, const float* values, Choice* choice) const {
    choice->order.reserve(static_cast<size_t>(row.count() - row.always_count));
    for (int64_t i = 0; i < row.count(); ++i) {
      if (row.always[static_cast<size_t>(i)] == 0) choice->order.push_back(static_cast<int32_t>(i));
    }
    choice->unknown = std::count_if(choice->order.begin(), choice->order.end(),
                                    [values](int32_t i) { return values[i] == kInfinity; });
    const auto better = [values](int32_t a, int32_t b) {
      return values[a] != values[b] ? values[a] > values[b] : a > b;
    };
    if (sparse_.kind == SparseKind::kAdaptive) {
      std::sort(choice->order.begin(), choice->order.end(), better);
      return;
    }
    const auto wanted = choice->order.begin() +
                        std::min(page_count(row, *choice), static_cast<int64_t>(choice->order.size()));
    std::nth_element(choice->order.begin(), wanted, choice->order.end(), better);
    // The last of them tell what the best of those that are left out are like.
    std::sort(choice->order.begin(), wanted, better);
  }

  // Pages that are chosen by their bounds, beside those that are always read.
  int64_t page_count(const Candidates& row, const Choice& choice) const {
    const int64_t wanted =
        sparse_.fraction > 0.0
            ? static_cast<int64_t>(std::ceil(sparse_.fraction * static_cast<double>(row.count()) - 1e-9))
            : pages_of(sparse_.tokens);
    return std::max(choice.unknown, wanted - row.always_count);
  }

  int64_t choices_per_row() const {
    return (heads_.num_kv_heads + sparse_.heads_per_choice - 1) / sparse_.heads_per_choice;
  }

  // The next of the best pages.
  void take(int64_t count, Choice* choice, std::vector<PageUse>* uses) {
    const int64_t left = static_cast<int64_t>(choice->order.size()) - choice->taken;
    const int64_t more = std::min(left, count);
    for (int64_t i = 0; i < more; ++i) {
      add_use(*choice, choice->order[static_cast<size_t>(choice->taken + i)], uses);
    }
    choice->taken += more;
    choice->done = sparse_.kind != SparseKind::kAdaptive || more == left;
  }

  // The first batch of an adaptive choice is 1/128 of the row, or what a sketch says; each other one doubles
  // what was taken.
  int64_t batch_pages(const Candidates& row, const Choice& choice) const {
    if (sparse_.kind == SparseKind::kPageTopK) return page_count(row, choice);
    if (choice.taken > 0) return choice.taken;
    return std::max(
        {kFirstBatchPages, choice.unknown, sparse_.sketch ? pages_for_mass(row, choice) : row.count() / 128});
  }

  // As many of the best pages as leave out less than 1 - mass for every query, as a sketch weighs them.
  int64_t pages_for_mass(const Candidates& row, const Choice& choice) const {
    int64_t pages = 0;
    for (int64_t h = choice.head_begin; h < choice.head_end; ++h) {
      for (int64_t m = 0; m < pass_.queries_per_head(); ++m) {
        const int64_t place = (h * pass_.queries_per_head() + m) * row.count();
        const float* masses = row.masses.data() + place;
        const float* errors = has_means() ? row.errors.data() + place : masses;
        const float total = row.log_sum(masses);
        float rest = 0.0f;
        auto left = static_cast<int64_t>(choice.order.size());
        while (left > 0) {
          const int32_t page = choice.order[static_cast<size_t>(left - 1)];
          rest += std::exp(errors[page] - total) + kSketchErrorMin * std::exp(masses[page] - total);
          if (!(rest < 1.0f - static_cast<float>(sparse_.mass))) break;
          left--;
        }
        pages = std::max(pages, left);
      }
    }
    return pages;
  }

  // What heads choose together is one use, so that it can be kept and found again.
  void add_use(const Choice& choice, int64_t i, std::vector<PageUse>* uses) {
    const int64_t head_count = heads_.num_kv_heads;
    const Candidates& row = *choice.candidates;
    const PageUse& page = row.pages[static_cast<size_t>(i)];
    const RowSummary& summary = layer_.rows[static_cast<size_t>(page.row)].summary(kind_);
    int32_t* slots = slots_[static_cast<size_t>(row.row)].data() + i * head_count;
    if (slots[choice.head_begin] >= 0) return;  // a whole page, which another choice wanted, too
    // Of a page without a summary all heads want everything, and no checksums of its tiles are known.
    const bool summarised = page.index < summary.end_page;
    const int64_t begin = summarised ? choice.head_begin : 0;
    const int64_t end = summarised ? choice.head_end : head_count;
    PageUse use = page;
    if (begin > 0 || end < head_count) {
      const int64_t tile_bytes = layouts_.of(*page.page).tile_bytes();
      use.begin = static_cast<int32_t>(begin * tile_bytes);
      use.end = static_cast<int32_t>(end * tile_bytes);
      use.tile_count = static_cast<int32_t>(end - begin);
      const int64_t block = page.index / shape_.pages_per_block();
      const int64_t place = page.index % shape_.pages_per_block() * head_count + begin;
      use.checksums = summary.block(block)->checksums.data() + place;
    }
    use.slot = static_cast<int32_t>(next_slot_);
    for (int64_t head = begin; head < end; ++head) slots[head] = static_cast<int32_t>(next_slot_++);
    uses->push_back(use);
  }

  // What is left out, as a share of the whole: as many pages as are left out, each with the mean mass of the
  // worst quarter of those that were read. Bounds order pages, so those left out should have less.
  void estimate() {
    for (Choice& choice : choices_) {
      const Candidates& row = *choice.candidates;
      const int64_t left = static_cast<int64_t>(choice.order.size()) - choice.taken;
      float worst = 0.0f;
      for (int64_t h = choice.head_begin; h < choice.head_end; ++h) {
        for (int64_t m = 0; m < pass_.queries_per_head(); ++m) {
          const float share = left == 0 ? 0.0f : left_out(row, choice, h, m);
          const int64_t index = output_index(heads_, block_, request_.q_len, row.row, h, m);
          sparse_.missing[index] = share;
          worst = std::max(worst, share);
        }
      }
      if (worst < 1.0 - sparse_.mass) choice.done = true;
    }
  }

  float left_out(const Candidates& row, const Choice& choice, int64_t h, int64_t m) const {
    const SoftmaxState state = pass_.state(row.row, h, m);
    if (state.sum == 0.0f) return 1.0f;
    float total = state.sum;
    if (request_.sinks != nullptr) {
      total += std::exp(request_.sinks[h * heads_.group + m % heads_.group] - state.max);
    }
    const auto size = static_cast<int64_t>(choice.order.size());
    float rest = 0.0f;
    if (knows_masses()) {
      const int64_t place = (h * pass_.queries_per_head() + m) * row.count();
      const float* masses = row.masses.data() + place;
      const float* errors = has_means() ? row.errors.data() + place : masses;
      float error = 0.0f;
      for (int64_t i = choice.taken; i < size; ++i) {
        const int32_t page = choice.order[static_cast<size_t>(i)];
        rest += std::exp(std::min(80.0f, masses[page] - state.max));
        error += std::exp(std::min(80.0f, errors[page] - state.max));
      }
      if (sparse_.sketch) error += sketch_error(row, choice, h, m) * rest;
      return error / (total + rest);
    } else {
      const auto slots = [&](int64_t page) {
        return slots_[static_cast<size_t>(row.row)][static_cast<size_t>(page * heads_.num_kv_heads + h)];
      };
      const auto mass = [&](int64_t page) {
        const float value = masses_[static_cast<size_t>(slots(page) * pass_.queries_per_head() + m)];
        return std::exp(value - state.max);
      };
      const int64_t quarter = (choice.taken + 3) / 4;
      for (int64_t i = choice.taken - quarter; i < choice.taken; ++i) {
        rest += mass(choice.order[static_cast<size_t>(i)]);
      }
      if (quarter == 0) {  // nothing was chosen: what is always read has to do
        for (int64_t i = 0; i < row.count(); ++i) {
          if (row.always[static_cast<size_t>(i)] != 0) rest += mass(i);
        }
      }
      rest *= static_cast<float>(size - choice.taken) /
              static_cast<float>(std::max<int64_t>(1, quarter > 0 ? quarter : row.always_count));
    }
    return rest / (total + rest);
  }

  // How far off a sketch's weights are, relatively: as far as they are off for the pages that were read.
  float sketch_error(const Candidates& row, const Choice& choice, int64_t h, int64_t m) const {
    const float* masses = row.masses.data() + (h * pass_.queries_per_head() + m) * row.count();
    const float base = row.log_sum(masses);
    float estimated = 0.0f;
    float found = 0.0f;
    for (int64_t i = 0; i < choice.taken; ++i) {
      const int32_t page = choice.order[static_cast<size_t>(i)];
      const int32_t slot =
          slots_[static_cast<size_t>(row.row)][static_cast<size_t>(page * heads_.num_kv_heads + h)];
      estimated += std::exp(masses[page] - base);
      found += std::exp(masses_[static_cast<size_t>(slot * pass_.queries_per_head() + m)] - base);
    }
    return estimated > 0.0f ? std::max(kSketchErrorMin, std::fabs(found / estimated - 1.0f))
                            : kSketchErrorMin;
  }

  // For every query: what the pages that were not read weigh together, and the mean of their values. Where a
  // choice has taken no more since the last time, that stands. chosen: what is read meanwhile; may be null.
  void find_rest(ChosenUses* chosen) {
    const int64_t queries = pass_.queries_per_head();
    const auto count = static_cast<size_t>(block_.row_count * heads_.num_kv_heads * queries);
    rest_masses_.resize(count, -kInfinity);
    rest_values_.resize(count * static_cast<size_t>(layer_.geometry.head_dim_v), 0.0f);
    struct Query {
      const Choice* choice;
      int64_t head;
      int64_t number;
    };
    std::vector<Query> changed;
    for (Choice& choice : choices_) {
      if (choice.taken_of_rest == choice.taken) continue;
      choice.taken_of_rest = choice.taken;
      for (int64_t h = choice.head_begin; h < choice.head_end; ++h) {
        for (int64_t m = 0; m < queries; ++m) changed.push_back({&choice, h, m});
      }
    }
    if (changed.empty()) return;
    std::mutex mutex;
    std::atomic<size_t> next{0};
    const int workers = std::clamp<int>(static_cast<int>(changed.size()), 1, context_.pool->worker_count());
    context_.pool->run(workers, [&](int) {
      for (size_t i = next++; i < changed.size(); i = next++) {
        add_rest(*changed[i].choice, changed[i].head, changed[i].number);
        if (chosen == nullptr) continue;
        std::lock_guard<std::mutex> lock(mutex);
        chosen->read_on();
      }
    });
  }

  void add_rest(const Choice& choice, int64_t h, int64_t m) {
    const Candidates& row = *choice.candidates;
    const int64_t queries = pass_.queries_per_head();
    const int64_t width = layer_.geometry.head_dim_v;
    const int64_t query = (row.row * heads_.num_kv_heads + h) * queries + m;
    const float* masses = row.masses.data() + (h * queries + m) * row.count();
    const auto size = static_cast<int64_t>(choice.order.size());
    float top = -kInfinity;
    for (int64_t i = choice.taken; i < size; ++i) {
      top = std::max(top, masses[choice.order[static_cast<size_t>(i)]]);
    }
    rest_masses_[static_cast<size_t>(query)] = -kInfinity;
    if (!std::isfinite(top)) return;
    const RowSummary& values =
        layer_.rows[static_cast<size_t>(row.pages.front().row)].summary(SummaryKind::kValues);
    const int64_t per_block = SummaryShape(layer_.geometry, SummaryKind::kValues).pages_per_block();
    float* mean = rest_values_.data() + query * width;
    std::fill_n(mean, width, 0.0f);
    float sum = 0.0f;
    for (int64_t i = choice.taken; i < size; ++i) {
      const int32_t page = choice.order[static_cast<size_t>(i)];
      const float weight = std::exp(masses[page] - top);
      if (weight < 1e-9f) continue;
      const int64_t index = row.pages[static_cast<size_t>(page)].index;
      const float* of_page =
          values.block(index / per_block)->sums + (index % per_block * heads_.num_kv_heads + h) * width;
      kernels_.blend(mean, 1.0f, of_page, weight / static_cast<float>(kPageTokens), width, mean);
      sum += weight;
    }
    kernels_.blend(mean, 1.0f / sum, mean, 0.0f, width, mean);
    rest_masses_[static_cast<size_t>(query)] = top + std::log(sum);
  }

  // Of every page, from what is kept about it: at most that, or by a sketch about that.
  bool knows_masses() const { return sparse_.provable || sparse_.sketch; }
  // Pages that are left out count with the mean of their values.
  bool has_means() const { return sparse_.sketch && sparse_.mean_value; }

  static constexpr int64_t kPagesPerPiece = 128;
  static constexpr int kRoundsMax = 64;
  static constexpr int64_t kFirstBatchPages = 4;
  static constexpr float kSketchErrorMin = 0.01f;  // where pages that were read say less

  const PassContext& context_;
  const Kernels& kernels_;
  const Layer& layer_;
  const AttendRequest& request_;
  const SparseRequest& sparse_;
  const Block block_;
  const Heads heads_;
  const SummaryKind kind_;
  const SummaryShape shape_;
  const Layouts layouts_;
  const int worker_count_;
  AttendPass pass_;
  std::vector<Candidates> rows_;
  std::vector<Choice> choices_;
  std::vector<std::vector<int32_t>> slots_;  // by row: [pages][num_kv_heads], of what was read; -1: not yet
  std::vector<float> masses_;                // [slots][queries_per_head]
  int64_t next_slot_ = 0;
  std::vector<float> rest_masses_;  // [rows][num_kv_heads][queries_per_head]
  std::vector<float> rest_values_;  // [rows][num_kv_heads][queries_per_head][head_dim_v]
};

}  // namespace

std::vector<SummaryKind> summary_kinds(const SparseRequest& sparse) {
  const bool sparf = sparse.kind == SparseKind::kSparF;
  if (!sparf && !sparse.sketch) return {SummaryKind::kBounds};
  std::vector<SummaryKind> kinds;
  if (sparf || sparse.mean_value) kinds.push_back(SummaryKind::kValues);
  if (sparse.sketch) kinds.push_back(SummaryKind::kSketch);
  return kinds;
}

void ChosenUses::add(std::vector<PageUse> uses) {
  if (context_.tiles != nullptr) context_.tiles->serve(&uses);
  uses_.insert(uses_.end(), uses.begin(), uses.end());
  for (const PageUse& use : uses) {
    if (!use.in_memory()) added_.push_back(use);
  }
}

void ChosenUses::guess(const std::vector<PageUse>& uses) {
  for (const PageUse& use : uses) {
    if (!use.in_memory() && use.page->sealed && (context_.tiles == nullptr || !context_.tiles->has(use))) {
      added_.push_back(use);
    }
  }
}

void ChosenUses::read_on() {
  if (context_.ahead == nullptr) return;
  PageStream& stream = *context_.stream;
  if (!added_.empty()) {
    stream.fit(page_bytes_);
    // Planned anew with what was not begun: neighbours that another choice added are one read.
    for (auto i = static_cast<size_t>(next_read_); i < plan_.reads.size(); ++i) {
      const ReadRun& run = plan_.reads[i];
      added_.insert(added_.end(), plan_.drive_uses.begin() + run.use_begin,
                    plan_.drive_uses.begin() + run.use_end);
    }
    plan_ = make_plan(added_, stream.read_bytes_max(page_bytes_), stream.staged(), kGapBytes);
    next_read_ = 0;
    added_.clear();
    if (context_.guessed_bytes != nullptr) {
      for (const StagedUse& use : plan_.staged) *context_.guessed_bytes += use.bytes;
    }
  }
  const int64_t begun = stream.read_ahead(plan_, next_read_);
  for (; next_read_ < begun; ++next_read_) {
    const ReadRun& run = plan_.reads[static_cast<size_t>(next_read_)];
    for (int64_t i = run.use_begin; i < run.use_end; ++i) {
      const PageUse& use = plan_.drive_uses[static_cast<size_t>(i)];
      begun_bytes_ += use.file_end() - use.file_begin();
    }
  }
}

void ChosenUses::run(int worker_count, int64_t weight, PageConsumer* pass) {
  PageStream& stream = *context_.stream;
  const bool in_memory =
      std::all_of(uses_.begin(), uses_.end(), [](const PageUse& use) { return use.in_memory(); });
  if (!in_memory) stream.fit(page_bytes_);
  Plan plan =
      make_plan(uses_, stream.read_bytes_max(page_bytes_), in_memory ? nullptr : stream.staged(), kGapBytes);
  plan.layer = layer_.number;
  int64_t bytes = 0;
  for (const PageUse& use : uses_) bytes += use.bytes();
  const int64_t mean_bytes = bytes / std::max<int64_t>(1, static_cast<int64_t>(uses_.size()));
  stream.run(plan, nullptr, mean_bytes, weight, worker_count, pass);
}

void attend_sparse(const PassContext& context, const Layer& layer, const AttendRequest& request,
                   const SparseRequest& sparse) {
  const int64_t queries = request.num_heads * request.q_len;
  const int64_t shared_bytes = AttendPass::bytes_per_query(layer.geometry, 0) * queries;
  const int64_t bytes_per_worker = AttendPass::bytes_per_query(layer.geometry, 1) * queries - shared_bytes;
  const int workers = affordable_workers(context, shared_bytes, bytes_per_worker);
  // Rows may be divided, but not queries: those of a row choose together.
  for_each_block(request.span.row_count, 1, shared_bytes + workers * bytes_per_worker,
                 context.scratch_bytes_max, [&](const Block& rows, const Block*) {
                   const Block block{rows.row_begin, rows.row_count, 0, request.q_len};
                   if (sparse.kind == SparseKind::kSparF) {
                     attend_sparf(context, layer, request, sparse, block, workers);
                   } else {
                     PageSelection(context, layer, request, sparse, block, workers).run();
                   }
                 });
}

int64_t read_ahead_sparse(const PassContext& context, const Layer& layer, const AttendRequest& request,
                          const SparseRequest& sparse) {
  if (sparse.kind == SparseKind::kSparF) return 0;
  const Block block{0, request.span.row_count, 0, request.q_len};
  return PageSelection(context, layer, request, sparse, block, 1).guess();
}

}  // namespace csd
