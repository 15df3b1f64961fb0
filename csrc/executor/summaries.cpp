// What of a drive keeps summaries: with every append, and where they are missing, by reading pages once.

#include <algorithm>
#include <cstring>
#include <deque>
#include <mutex>
#include <set>

#include "base/error.h"
#include "executor/drive.h"
#include "executor/summarise.h"

namespace csd {
namespace {

constexpr int64_t kCatchUpBytes = int64_t{64}
                                  << 20;  // of pages at once, so that blocks fill one after another

// Summarises pages of one row as they land. Blocks are there already.
class SummaryPass : public PageConsumer {
 public:
  SummaryPass(const Kernels& kernels, const Geometry& geometry, const SummaryShape& shape,
              RowSummary* summary, int64_t page_end, int worker_count, AlignedBuffer* scratch)
      : stored_(geometry.stored()),
        full_precision_(geometry.full_precision()),
        shape_(shape),
        summariser_(kernels, shape),
        summary_(*summary),
        locks_(static_cast<size_t>(page_end / shape.pages_per_block() + 1 - summary->first_block)),
        scratch_(static_cast<float*>(scratch->reserve(worker_count * summariser_.scratch_floats() *
                                                      static_cast<int64_t>(sizeof(float))))) {}

  void consume(int worker, const PageUse& use, const uint8_t* bytes) override {
    const int64_t block = use.index / shape_.pages_per_block();
    float* scratch = scratch_ + worker * summariser_.scratch_floats();
    std::lock_guard<std::mutex> lock(locks_[static_cast<size_t>(block - summary_.first_block)]);
    for (int64_t h = 0; h < shape_.num_kv_heads; ++h) {
      summariser_.add(use.page->quantised ? stored_ : full_precision_, bytes, use.index, h, scratch,
                      summary_.block(block).get());
    }
  }

 private:
  const PageLayout stored_;
  const PageLayout full_precision_;
  const SummaryShape shape_;
  const Summariser summariser_;
  RowSummary& summary_;
  std::deque<std::mutex> locks_;  // of blocks: packing one member may touch its neighbours
  float* const scratch_;
};

bool completes_block(const SummaryShape& shape, int64_t page_index) {
  return (page_index + 1) % shape.pages_per_block() == 0;
}

// Whether all pages of a block are summarised. From the last on, which most often is not.
bool is_whole(const SummaryShape& shape, const RowSummary& summary, int64_t block) {
  const int64_t begin = std::max(block * shape.pages_per_block(), summary.end_page);
  for (int64_t page = (block + 1) * shape.pages_per_block(); page-- > begin;) {
    if (summary.beyond.count(page) == 0) return false;
  }
  return true;
}

// Whether a page that is filled now is one that its row is to know of.
bool wants_page(const RowSummary& summary, int64_t page_index) {
  return summary.follows && page_index >= summary.end_page;
}

}  // namespace

void Drive::keep_summary(int64_t layer_id, SummaryKind kind) {
  check_process();
  std::lock_guard<FairMutex> lock(mutex_);
  find(layer_id).keeps[static_cast<size_t>(kind)] = true;
}

// The pages of a row that can be summarised: full ones, as they will be stored.
int64_t Drive::summarised_end(const Layer& layer, const Row& row) {
  int64_t end = std::min(row.length / kPageTokens, row.end_page());
  while (layer.geometry.quantised() && end > row.first_page && !row.page(end - 1)->quantised) --end;
  return end;
}

// Before an append. Rows that lag behind (summaries were asked for after they had grown) stay behind until
// they catch up.
void Drive::begin_summaries(const Layer& layer, Row* row) {
  for (int kind = 0; kind < kSummaryKinds; ++kind) {
    RowSummary& summary = row->summaries[kind];
    const SummaryShape shape(layer.geometry, static_cast<SummaryKind>(kind));
    summary.trim(row->pages.empty() ? row->length / kPageTokens : row->first_page, shape.pages_per_block());
    summary.beyond.clear();
    summary.end_before = summary.end_page;
    summary.follows = layer.keeps[kind] && summary.end_page >= summarised_end(layer, *row);
  }
}

// Makes room for what is kept about a page that is about to be filled. Not always in order: a row's old tail
// is quantised after the pages behind it.
void Drive::make_summary_room(const Layer& layer, Row* row, int64_t index) {
  for (int kind = 0; kind < kSummaryKinds; ++kind) {
    if (!layer.keeps[kind] || !wants_page(row->summaries[kind], index)) continue;
    summary_block(layer, static_cast<SummaryKind>(kind), &row->summaries[kind], index);
  }
}

// The page, for which there is room, is summarised once the queue is packed. One that is not in the queue any
// more (rows share it) may leave memory at any time, if it has not yet: finish_packing() must come next.
void Drive::expect_summary(const Layer& layer, Row* row, int64_t index, const Page* page) {
  for (int kind = 0; kind < kSummaryKinds; ++kind) {
    if (!layer.keeps[kind] || !wants_page(row->summaries[kind], index)) continue;
    new_pages_.push_back({&layer, row, index, page});
    return;
  }
}

// The block that a page's members go into, which nobody else has, and which is being filled.
SummaryBlock* Drive::summary_block(const Layer& layer, SummaryKind kind, RowSummary* summary,
                                   int64_t page_index) {
  const SummaryShape shape(layer.geometry, kind);
  const bool has_tiles = shape.tiles_per_head > 0;
  const int64_t index = page_index / shape.pages_per_block();
  const auto room = [this](int64_t bytes) { return page_memory(bytes, "a summary for sparse attention"); };
  const auto make = [&] {
    auto block = Ref<SummaryBlock>::make(&table_memory_, &table_memory_, arena_.get(),
                                         shape.pages_per_block() * shape.num_kv_heads);
    if (has_tiles) {
      const int64_t bytes = shape.filling_bytes();
      block->memory = room(bytes);
      std::memset(block->memory, 0, static_cast<size_t>(bytes));  // members that are missing are scored, too
    }
    if (shape.head_dim_v > 0) block->sums = reinterpret_cast<float*>(room(shape.sums_bytes()));
    return block;
  };
  if (summary->blocks.empty()) summary->first_block = summary->end_page / shape.pages_per_block();
  while (summary->end_block() <= index) summary->blocks.push_back(make());
  Ref<SummaryBlock>& place = summary->blocks[static_cast<size_t>(index - summary->first_block)];
  if (place.use_count() > 1 || place->full) {
    Ref<SummaryBlock> copy = make();
    copy->checksums = place->checksums;
    if (place->sums != nullptr) std::memcpy(copy->sums, place->sums, static_cast<size_t>(shape.sums_bytes()));
    if (has_tiles && place->full) {
      const Summariser summariser(kernels_, shape);
      auto* scratch = static_cast<float*>(
          summary_scratch_.reserve(summariser.scratch_floats() * static_cast<int64_t>(sizeof(float))));
      for (int64_t h = 0; h < shape.num_kv_heads; ++h) summariser.reopen(*place, h, scratch, copy->memory);
    } else if (has_tiles) {
      std::memcpy(copy->memory, place->memory, static_cast<size_t>(shape.filling_bytes()));
    }
    place = std::move(copy);
  }
  if (has_tiles && completes_block(shape, page_index) && place->next_memory == nullptr) {
    uint8_t* memory = room(shape.full_bytes());
    place->next_memory = memory;
  }
  return place.get();
}

// All that were expected, once they are filled and before they may leave memory.
void Drive::summarise_new_pages() {
  if (new_pages_.empty()) return;
  struct Item {
    PageLayout layout;
    const uint8_t* image;
    int64_t index;
    SummaryBlock* block;
  };
  const Layer& layer = *new_pages_.front().layer;
  // Only the last may have left memory: see expect_summary().
  const NewPage& last = new_pages_.back();
  const uint8_t* last_image = page_image(layer, {last.page, last.row - layer.rows.data(), last.index});
  for (int kind = 0; kind < kSummaryKinds; ++kind) {
    if (!layer.keeps[kind]) continue;
    const SummaryShape shape(layer.geometry, static_cast<SummaryKind>(kind));
    const Summariser summariser(kernels_, shape);
    std::vector<Item> items;
    std::vector<SummaryBlock*> full;
    for (const NewPage& page : new_pages_) {
      RowSummary& summary = page.row->summaries[kind];
      if (!wants_page(summary, page.index)) continue;
      const int64_t index = page.index / shape.pages_per_block();
      SummaryBlock* block = summary.block(index).get();
      items.push_back({page.page->quantised ? layer.geometry.stored() : layer.geometry.full_precision(),
                       &page == &last ? last_image : page.page->memory, page.index, block});
      summary.beyond.insert(page.index);
      // A block that was begun before keeps its members as they are until the append is sure to stand: codes
      // would not give those of its earlier pages back.
      const bool is_new = index * shape.pages_per_block() >= summary.end_before;
      if (is_whole(shape, summary, index)) (is_new ? full : filled_blocks_[kind]).push_back(block);
      while (summary.beyond.erase(summary.end_page) > 0) summary.end_page++;
    }
    const auto worker_count = static_cast<int>(std::clamp<int64_t>(
        std::min<int64_t>(static_cast<int64_t>(items.size()), shape.num_kv_heads), 1, pool_.worker_count()));
    auto* scratch = static_cast<float*>(summary_scratch_.reserve(worker_count * summariser.scratch_floats() *
                                                                 static_cast<int64_t>(sizeof(float))));
    pool_.compute(worker_count, [&](int worker) {
      float* own = scratch + worker * summariser.scratch_floats();
      for (int64_t h = worker; h < shape.num_kv_heads; h += worker_count) {
        for (const Item& item : items) {
          summariser.add(item.layout, item.image, item.index, h, own, item.block);
        }
        for (SummaryBlock* block : full) summariser.finish(h, own, block);
      }
    });
    for (SummaryBlock* block : full) block->turn();
  }
  new_pages_.clear();
}

// At the end of an append that stands: the codes of the blocks that it made full and had not begun.
void Drive::finish_summaries(const Layer& layer) {
  for (int kind = 0; kind < kSummaryKinds; ++kind) {
    std::vector<SummaryBlock*>& blocks = filled_blocks_[kind];
    if (blocks.empty()) continue;
    const SummaryShape shape(layer.geometry, static_cast<SummaryKind>(kind));
    const Summariser summariser(kernels_, shape);
    const auto worker_count =
        static_cast<int>(std::clamp<int64_t>(shape.num_kv_heads, 1, pool_.worker_count()));
    auto* scratch = static_cast<float*>(summary_scratch_.reserve(worker_count * summariser.scratch_floats() *
                                                                 static_cast<int64_t>(sizeof(float))));
    pool_.compute(worker_count, [&](int worker) {
      float* own = scratch + worker * summariser.scratch_floats();
      for (int64_t h = worker; h < shape.num_kv_heads; h += worker_count) {
        for (SummaryBlock* block : blocks) summariser.finish(h, own, block);
      }
    });
    for (SummaryBlock* block : blocks) block->turn();
    blocks.clear();
  }
}

// Summaries of the full pages that have none yet, for a pass over these rows.
void Drive::catch_up(Layer* layer, const Span& span, SummaryKind kind) {
  layer->keeps[static_cast<size_t>(kind)] = true;
  for (int64_t i = span.row_begin; i < span.row_begin + span.row_count; ++i) {
    catch_up_row(*layer, &layer->rows[static_cast<size_t>(i)], i, kind);
  }
}

void Drive::catch_up_row(const Layer& layer, Row* row, int64_t row_index, SummaryKind kind) {
  const SummaryShape shape(layer.geometry, kind);
  RowSummary& summary = row->summary(kind);
  summary.trim(row->first_page, shape.pages_per_block());
  const int64_t end = summarised_end(layer, *row);
  const int64_t page_bytes = layer.geometry.full_precision().page_bytes();
  const int64_t batch = std::max<int64_t>(1, kCatchUpBytes / page_bytes);
  while (summary.end_page < end) {
    const int64_t begin = summary.end_page;
    const int64_t batch_end = std::min(end, begin + batch);
    for (int64_t index = begin; index < batch_end; ++index) summary_block(layer, kind, &summary, index);
    std::vector<PageUse> uses;
    for (int64_t index = begin; index < batch_end; ++index) {
      uses.push_back({row->page(index).get(), row_index, index});
    }
    stream_->fit(page_bytes);
    Plan plan = make_plan(uses, stream_->read_bytes_max(page_bytes), stream_->staged());
    plan.layer = layer.number;
    const int worker_count = stream_->worker_limit();
    SummaryPass pass(kernels_, layer.geometry, shape, &summary, batch_end, worker_count, &summary_scratch_);
    stream_->run(plan, nullptr, page_bytes, 1, worker_count, &pass);
    const Summariser summariser(kernels_, shape);
    auto* scratch = static_cast<float*>(
        summary_scratch_.reserve(summariser.scratch_floats() * static_cast<int64_t>(sizeof(float))));
    for (int64_t index = begin; index < batch_end; ++index) {
      if (!completes_block(shape, index)) continue;
      SummaryBlock* block = summary.block(index / shape.pages_per_block()).get();
      for (int64_t h = 0; h < shape.num_kv_heads; ++h) summariser.finish(h, scratch, block);
      block->turn();
    }
    summary.end_page = batch_end;
  }
}

// ---- what they take ----

// Each block once, however many rows and forks share it.
template <typename Visit>
void Drive::visit_summaries(const Visit& visit) const {
  std::set<const SummaryBlock*> seen;
  for (const auto& [id, layer] : layers_) {
    for (int kind = 0; kind < kSummaryKinds; ++kind) {
      const SummaryShape shape(layer.geometry, static_cast<SummaryKind>(kind));
      for (const Row& row : layer.rows) {
        for (const Ref<SummaryBlock>& block : row.summaries[kind].blocks) {
          if (seen.insert(block.get()).second) visit(shape, *block);
        }
      }
    }
  }
}

int64_t Drive::summary_bytes() const {
  int64_t bytes = 0;
  visit_summaries([&](const SummaryShape& shape, const SummaryBlock& block) {
    bytes += static_cast<int64_t>(block.checksums.size() * sizeof(uint32_t));
    if (block.memory != nullptr) bytes += block.full ? shape.full_bytes() : shape.filling_bytes();
    if (block.sums != nullptr) bytes += shape.sums_bytes();
  });
  return bytes;
}

// Of the arena, whether the block is being filled or full: filling takes three times as much.
int64_t Drive::least_block_bytes(const SummaryShape& shape) const {
  int64_t bytes = 0;
  if (shape.tiles_per_head > 0) bytes += arena_->share_bytes(shape.full_bytes());
  if (shape.head_dim_v > 0) bytes += arena_->share_bytes(shape.sums_bytes());
  return bytes;
}

// Whether an append to the layer summarises what it fills, in every row.
bool Drive::follows(const Layer& layer, SummaryKind kind) const {
  return layer.keeps[static_cast<size_t>(kind)] &&
         std::all_of(layer.rows.begin(), layer.rows.end(), [&](const Row& row) {
           return row.summary(kind).end_page >= summarised_end(layer, row);
         });
}

// Everything but summaries can leave memory, tails included, so only they count; and where it is not known
// how many there will be, the fewest, so that nothing is refused that would have found room.
void Drive::check_summary_room(const SummaryRequest& request) {
  check_process();
  std::lock_guard<FairMutex> lock(mutex_);
  const Geometry& geometry = request.geometry;
  // An empty row fills so many for good; one that holds tokens already fills no fewer.
  const int64_t pages = geometry.quantised() ? first_tail_page(request.q_len) : request.q_len / kPageTokens;
  int64_t wanted = 0;
  int64_t layers_wanting = 0;
  for (const SummaryKind kind : request.kinds) {
    const SummaryShape shape(geometry, kind);
    int64_t begun = 0;  // hold tokens: what they fill may go on in a block that is there
    int64_t idle = 0;   // of those: may need nothing, because they lag behind or are of another shape
    for (const int64_t id : request.layer_ids) {
      const Layer& layer = find(id);
      const bool is_empty =
          std::all_of(layer.rows.begin(), layer.rows.end(), [](const Row& row) { return row.length == 0; });
      const bool needs_it = follows(layer, kind) && layer.geometry == geometry;
      if (!is_empty || !needs_it) begun++;
      if (!needs_it) idle++;
    }
    const int64_t fresh = std::max<int64_t>(0, request.layer_count - begun);
    const int64_t following = std::max<int64_t>(0, request.layer_count - fresh - idle);
    const int64_t full_blocks = pages / shape.pages_per_block();
    int64_t last_block = 0;
    if (pages % shape.pages_per_block() > 0) {
      last_block = least_block_bytes(shape);
      if (shape.tiles_per_head > 0) {
        last_block += arena_->share_bytes(shape.filling_bytes()) - arena_->share_bytes(shape.full_bytes());
      }
    }
    wanted += request.row_count *
              ((fresh + following) * full_blocks * least_block_bytes(shape) + fresh * last_block);
    layers_wanting = std::max(layers_wanting, fresh + following);
  }
  if (wanted == 0) return;
  int64_t taken = 0;
  visit_summaries([&](const SummaryShape& shape, const SummaryBlock&) { taken += least_block_bytes(shape); });
  const int64_t room = std::max<int64_t>(0, arena_bytes_max() - taken);
  if (wanted <= room) return;
  const auto text = [](int64_t value) { return std::to_string(value); };
  const bool sketch =
      std::find(request.kinds.begin(), request.kinds.end(), SummaryKind::kSketch) != request.kinds.end();
  throw Error(ErrorKind::kBudget,
              "memory_budget of " + text(options_.memory_budget_bytes) + " bytes has no room for " +
                  text(wanted) + " bytes of summaries, which sparse attention keeps in memory of " +
                  text(request.q_len) + " tokens of " + text(request.row_count) + " rows in " +
                  text(layers_wanting) + " layers; " + text(room) +
                  " bytes are available; raise memory_budget, " +
                  (sketch ? "choose by bounds instead of a sketch, or attend exactly (sparse=None)"
                          : "or attend exactly (sparse=None)"));
}

}  // namespace csd
