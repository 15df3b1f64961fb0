#include "executor/attend_pass.h"

#include <cmath>
#include <cstring>
#include <limits>

namespace csd {

int affordable_workers(const PassContext& context, int64_t shared_bytes, int64_t bytes_per_worker) {
  const int64_t fit = (context.scratch_bytes_max - shared_bytes) / bytes_per_worker;
  return static_cast<int>(std::clamp<int64_t>(fit, 1, context.stream->worker_limit()));
}

int64_t compute_weight(const Block& block, int64_t group) {
  return std::max<int64_t>(1, block.query_count * group / 8);
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

int64_t output_index(const Heads& heads, const Block& block, int64_t q_len, int64_t row, int64_t h,
                     int64_t m) {
  const int64_t head = h * heads.group + m % heads.group;
  const int64_t query = block.query_begin + m / heads.group;
  return ((block.row_begin + row) * heads.num_heads + head) * q_len + query;
}

// ---- what queries see ----

bool Rules::BiasRow::load(int64_t head, int64_t query, int64_t begin, int64_t end) {
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

float Rules::BiasRow::value(int64_t index) const {
  switch (mask_.kind) {
    case MaskKind::kBool:
      return static_cast<const uint8_t*>(mask_.data)[index] != 0 ? 0.0f
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
      kSerialKernels.load(DType::kFloat16, static_cast<const uint16_t*>(mask_.data) + index, 1.0f, 1, &wide);
      return wide;
    }
    case MaskKind::kNone:
      break;
  }
  return 0.0f;
}

std::vector<PageUse> Rules::uses(const Block& block) const {
  std::vector<PageUse> uses;
  const int64_t row_begin = block.row_begin - block_.row_begin;
  for (int64_t row = row_begin; row < row_begin + block.row_count; ++row) {
    const int64_t first = query_range(row, block.query_begin).first;
    const int64_t last = query_range(row, block.query_begin + block.query_count - 1).second;
    const auto start = uses.size();
    if (first < last) {
      add_uses(layer_, request_.span.row_begin + block_.row_begin + row, first, last, &uses);
    }
    if (hides_whole_pages(block)) {
      uses.erase(
          std::remove_if(uses.begin() + static_cast<int64_t>(start), uses.end(),
                         [&](const PageUse& use) { return hidden(block, row, use.index, first, last); }),
          uses.end());
    }
  }
  return uses;
}

std::pair<int64_t, int64_t> Rules::ranges(int64_t row, int64_t index, int64_t m, int64_t count,
                                          ScoreModifier* modifiers) const {
  const int64_t page_position = index * kPageTokens;
  int64_t begin = kPageTokens;
  int64_t end = 0;
  for (int64_t j = 0; j < count; ++j) {
    ScoreModifier& modifier = modifiers[j];
    if (j > 0 && (m + j) % heads_.group != 0) {  // the same query for another head
      modifier = modifiers[j - 1];
    } else {
      const auto [first, last] = query_range(row, block_.query_begin + (m + j) / heads_.group);
      modifier.token_begin = std::clamp<int64_t>(first - page_position, 0, kPageTokens);
      modifier.token_end = std::clamp<int64_t>(last - page_position, modifier.token_begin, kPageTokens);
      modifier.softcap = request_.softcap;
    }
    if (modifier.token_begin < modifier.token_end) {
      begin = std::min(begin, modifier.token_begin);
      end = std::max(end, modifier.token_end);
    }
  }
  return {begin, end};
}

bool Rules::complete(int64_t row, int64_t index, int64_t h, int64_t m, BiasRow* bias,
                     ScoreModifier* modifier) const {
  if (modifier->token_begin >= modifier->token_end) return false;
  const int64_t head = h * heads_.group + m % heads_.group;
  const int64_t query = block_.query_begin + m / heads_.group;
  if (request_.mask.kind != MaskKind::kNone) {
    if (!bias->load(head, query, modifier->token_begin, modifier->token_end)) return false;
    modifier->bias = bias->values();
  }
  if (request_.alibi_slopes != nullptr) {
    modifier->alibi_slope = request_.alibi_slopes[head];
    modifier->alibi_offset = static_cast<float>(index * kPageTokens - query_position(row, query));
  }
  return true;
}

// Positions [first, second) that a query may see by causality and window.
std::pair<int64_t, int64_t> Rules::query_range(int64_t row, int64_t query) const {
  int64_t begin = request_.span.kv_begin;
  int64_t end = row_end(layer_, request_.span, block_.row_begin + row);
  const int64_t position = query_position(row, query);
  if (request_.causal != Causal::kNone) end = std::min(end, position + 1);
  if (request_.window > 0) begin = std::max(begin, position - request_.window + 1);
  // Within the row even where nothing is seen: a window may begin behind its end.
  end = std::max(end, request_.span.kv_begin);
  return {std::min(begin, end), end};
}

// A padding mask hides whole pages from all heads and queries, and so does a model's own choice of tokens for
// a few queries: those need not be read.
bool Rules::hides_whole_pages(const Block& block) const {
  return request_.mask.kind == MaskKind::kBool && request_.mask.strides[1] == 0 &&
         (request_.mask.strides[2] == 0 || block.query_count <= kChoosingQueriesMax);
}

bool Rules::hidden(const Block& block, int64_t row, int64_t index, int64_t first, int64_t last) const {
  BiasRow bias(request_, block_.row_begin + row, index * kPageTokens);
  const int64_t begin = std::max<int64_t>(0, first - index * kPageTokens);
  const int64_t end = std::min(kPageTokens, last - index * kPageTokens);
  const int64_t queries = request_.mask.strides[2] == 0 ? 1 : block.query_count;
  for (int64_t query = 0; query < queries; ++query) {
    if (bias.load(0, block.query_begin + query, begin, end)) return false;
  }
  return true;
}

// ---- attention ----

AttendPass::AttendPass(const PassContext& context, const Layer& layer, const AttendRequest& request,
                       const Block& block, int worker_count)
    : kernels_(*context.kernels),
      layer_(layer),
      request_(request),
      block_(block),
      heads_(layer.geometry, request.num_heads),
      rules_(layer, request, block),
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

void AttendPass::consume(int worker, const PageUse& use, const uint8_t* bytes) {
  if (use.keep_at != nullptr) std::memcpy(use.keep_at, bytes, static_cast<size_t>(use.bytes()));
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
  const PageLayout& layout = layouts_.of(*use.page);
  const int64_t head_begin = use.begin / layout.tile_bytes();
  const int64_t head_end = use.whole() ? heads_.num_kv_heads : use.end / layout.tile_bytes();
  Rules::BiasRow bias = rules_.bias(row, use.index);
  for (int64_t h = head_begin; h < head_end; ++h) {
    const Tile tile(kernels_, layout, bytes, h - head_begin);
    for (int64_t m = 0; m < queries_per_head_; m += kQueryBlock) {
      const int64_t first = h * queries_per_head_ + m;
      const int64_t count = std::min(kQueryBlock, queries_per_head_ - m);
      attend_tile(row, use, h, m, count, tile, q_ + (row * queries_per_row_ + first) * geometry.head_dim_k,
                  &bias, states + first, out + first * geometry.head_dim_v);
    }
  }
}

void AttendPass::attend_tile(int64_t row, const PageUse& use, int64_t h, int64_t m, int64_t count,
                             const Tile& tile, const float* q, Rules::BiasRow* bias, SoftmaxState* states,
                             float* out) const {
  alignas(64) float scores[kQueryBlock * kPageTokens];
  float shrink[kQueryBlock];
  ScoreModifier modifiers[kQueryBlock];
  const auto [begin, end] = rules_.ranges(row, use.index, m, count, modifiers);
  if (begin >= end) return;
  uint64_t chosen = ~uint64_t{0};
  if (choice_ != nullptr) {
    chosen = choice_->at(row, use.index, h);
    if (chosen == 0) return;
  }
  tile.score(q, count, scores);
  bool any_visible = false;
  for (int64_t j = 0; j < count; ++j) {
    float* row_scores = scores + j * kPageTokens;
    ScoreModifier& modifier = modifiers[j];
    if (!rules_.complete(row, use.index, h, m + j, bias, &modifier)) {
      std::memset(row_scores, 0, kPageTokens * sizeof(float));
      shrink[j] = 1.0f;
      continue;
    }
    float filter[kPageTokens];
    if (choice_ != nullptr) {
      bool any_chosen = false;
      for (int64_t t = modifier.token_begin; t < modifier.token_end; ++t) {
        const bool counts = (chosen >> t & 1) != 0;
        filter[t] = !counts                    ? -std::numeric_limits<float>::infinity()
                    : modifier.bias != nullptr ? modifier.bias[t]
                                               : 0.0f;
        any_chosen = any_chosen || filter[t] != -std::numeric_limits<float>::infinity();
      }
      if (!any_chosen) {
        std::memset(row_scores, 0, kPageTokens * sizeof(float));
        shrink[j] = 1.0f;
        continue;
      }
      modifier.bias = filter;
    }
    any_visible = true;
    shrink[j] = kernels_.softmax_row(row_scores, modifier, &states[j]);
    if (masses_ != nullptr) {
      const int64_t head = h - use.begin / layouts_.of(*use.page).tile_bytes();
      float sum = 0.0f;
      for (int64_t t = modifier.token_begin; t < modifier.token_end; ++t) sum += row_scores[t];
      masses_[(use.slot + head) * queries_per_head_ + m + j] = states[j].max + std::log(sum);
    }
  }
  if (!any_visible) return;
  tile.accumulate(scores, shrink, count, begin, end, out);
}

SoftmaxState AttendPass::state(int64_t row, int64_t h, int64_t m) const {
  const int64_t query = h * queries_per_head_ + m;
  SoftmaxState merged{-std::numeric_limits<float>::infinity(), 0.0f};
  for (int64_t worker = 0; worker < worker_count_; ++worker) {
    if (touched_[static_cast<size_t>(row * worker_count_ + worker)] == 0) continue;
    const SoftmaxState& other = worker_states(worker, row)[query];
    if (other.sum == 0.0f) continue;
    const float top = std::max(merged.max, other.max);
    merged = {top, merged.sum * std::exp(merged.max - top) + other.sum * std::exp(other.max - top)};
  }
  return merged;
}

void AttendPass::finish(const Rest* rest) {
  const Geometry& geometry = layer_.geometry;
  const int64_t width = geometry.head_dim_v;
  auto* target = static_cast<uint8_t*>(request_.out);
  const int64_t target_bytes = width * element_bytes(request_.q.dtype);
  for (int64_t row = 0; row < block_.row_count; ++row) {
    for (int64_t h = 0; h < heads_.num_kv_heads; ++h) {
      for (int64_t m = 0; m < queries_per_head_; ++m) {
        const int64_t query = h * queries_per_head_ + m;
        const int64_t index = output_index(heads_, block_, request_.q_len, row, h, m);
        float* merged = nullptr;
        const SoftmaxState state = merge(row, query, &merged);
        const float sink = request_.sinks != nullptr ? request_.sinks[h * heads_.group + m % heads_.group]
                                                     : -std::numeric_limits<float>::infinity();
        const bool nothing = merged == nullptr || state.sum == 0.0f;
        const float rest_log = rest != nullptr ? rest->log_masses[row * queries_per_row_ + query]
                                               : -std::numeric_limits<float>::infinity();
        if (nothing && rest_log == -std::numeric_limits<float>::infinity()) {  // the empty state, out = 0
          std::memset(target + index * target_bytes, 0, static_cast<size_t>(target_bytes));
          request_.lse[index] = sink;
          continue;
        }
        const float top = std::max({nothing ? rest_log : state.max, sink, rest_log});
        const float weight = nothing ? 0.0f : std::exp(state.max - top);
        const float rest_weight = std::exp(rest_log - top);
        const float total = (nothing ? 0.0f : state.sum * weight) + std::exp(sink - top) + rest_weight;
        request_.lse[index] = top + std::log(total);
        void* place = target + index * target_bytes;
        if (rest_weight == 0.0f) {
          kernels_.store(request_.q.dtype, merged, weight / total, width, place);
          continue;
        }
        const float* value = rest->values + (row * queries_per_row_ + query) * width;
        if (nothing) {
          kernels_.store(request_.q.dtype, value, rest_weight / total, width, place);
        } else {
          kernels_.blend(merged, weight / total, value, rest_weight / total, width, merged);
          kernels_.store(request_.q.dtype, merged, 1.0f, width, place);
        }
      }
    }
  }
}

// Folds all workers' partials of one query into the first one's memory. FlashAttention (2205.14135), Alg. 1.
SoftmaxState AttendPass::merge(int64_t row, int64_t query, float** merged) const {
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

}  // namespace csd
