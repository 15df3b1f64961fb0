#include "executor/attend.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "executor/attend_pass.h"
#include "executor/tile.h"

namespace csd {
namespace {

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
                   const auto uses_of = [&](const Block& any) { return pass.rules().uses(any); };
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
