#include "executor/drive.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <utility>

#include "base/checksum.h"
#include "base/error.h"
#include "base/json.h"
#include "executor/faults.h"
#include "store/format.h"

namespace csd {
namespace {

constexpr int64_t kMiB = int64_t{1} << 20;
constexpr int64_t kMemoryBudgetMin = 1 * kMiB;
constexpr int64_t kStagingBytesMax = 32 * kMiB;        // 32 reads of 1 MiB, or as many as the budget allows
constexpr int64_t kAheadStagingBytesMax = 256 * kMiB;  // what a drive reads while a model computes
constexpr int64_t kScratchBytesMax = 64 * kMiB;
constexpr int64_t kWriteWindowBytes = 16 * kMiB;  // on the way to the drive at once, to make room
constexpr int64_t kWriteBehindBytes = 64 * kMiB;  // the same while nobody waits for it
constexpr int kWriteDepth = 64;
constexpr int64_t kTailPages = 2;         // of full precision, at most, where older ones are quantised
constexpr int64_t kPackBytes = 8 * kMiB;  // of pages packed together

// Guesses of which less than half is used cost the drive more than they hide: every so often one is tried.
constexpr double kGuessShareMin = 0.5;
constexpr int kGuessEvery = 64;

// Rounded down to whole huge pages (see base/mapped_memory.h), or to blocks where there is less than one.
int64_t in_steps(int64_t bytes) {
  const int64_t step = bytes >= 2 * kMiB ? 2 * kMiB : kBlockBytes;
  return bytes / step * step;
}

// How memory_budget is divided to begin with; the arena has the rest. read_ahead_bytes: as in DriveOptions.
int64_t staging_bytes(int64_t budget_bytes, int64_t read_ahead_bytes) {
  return in_steps(read_ahead_bytes < 0 ? std::min(kStagingBytesMax, budget_bytes / 8 * 3)
                                       : std::min(kStagingBytesMax, budget_bytes / 4) + read_ahead_bytes);
}

// What staging memory is worth having beside resident pages, when the pass that reads most reads so much. A
// pass ahead, as long as that is cheap. Where budgets are small, as much as the drive reads while a model
// computes for half of the time that the pass's reads take: a byte of it hides a byte of reading at every
// pass, where one of a resident page saves a byte only at every step.
int64_t useful_staging_bytes(int64_t budget_bytes, int64_t pass_bytes) {
  const int64_t cheap = std::min(kAheadStagingBytesMax, budget_bytes / 8 * 3);
  return std::max(std::min(staging_bytes(budget_bytes, -1) + pass_bytes, cheap),
                  std::min(pass_bytes / 2, budget_bytes / 4 * 3));
}

int64_t scratch_bytes(int64_t budget_bytes) { return std::min(kScratchBytesMax, budget_bytes / 8); }

// Two pages to read into, so that the drive works while one is computed on, and two in memory: a tail, and
// the copy that a shared tail turns into.
int64_t page_bytes_max(int64_t budget_bytes, int64_t read_ahead_bytes) {
  const int64_t staging = staging_bytes(budget_bytes, read_ahead_bytes);
  return std::min({kStagingBytesMax, staging, budget_bytes - staging - scratch_bytes(budget_bytes)}) / 2;
}

std::string text(int64_t value) { return std::to_string(value); }

// page_end(kind): pages from there on are not summarised any more.
template <typename PageEnd>
void truncate_summaries(const Geometry& geometry, Row* row, const PageEnd& page_end) {
  for (int kind = 0; kind < kSummaryKinds; ++kind) {
    const SummaryShape shape(geometry, static_cast<SummaryKind>(kind));
    row->summaries[kind].truncate(page_end(kind), shape.pages_per_block());
  }
}

}  // namespace

Drive::Drive(const DriveOptions& options)
    : options_(options),
      process_(getpid()),
      kernels_(select_kernels(options.simd.c_str())),
      pool_(static_cast<int>(options.threads), options.lend_threads) {
  if (options.memory_budget_bytes < kMemoryBudgetMin) {
    throw Error(ErrorKind::kBudget, "memory_budget must be at least 1 MiB, got " +
                                        text(options.memory_budget_bytes) + " bytes; raise it");
  }
  const int64_t staging = staging_bytes(options.memory_budget_bytes, options.read_ahead_bytes);
  if (options.read_ahead_bytes > 0 && staging > options.memory_budget_bytes / 2) {
    throw Error(ErrorKind::kBudget, "read_ahead of " + text(options.read_ahead_bytes) +
                                        " bytes leaves less than half of a " + "memory_budget of " +
                                        text(options.memory_budget_bytes) +
                                        " bytes; raise memory_budget, or read less ahead");
  }
  open_file();
  try {
    engine_ = make_io_engine(file_.engine, static_cast<int>(std::max<int64_t>(4, options.threads)));
    scratch_bytes_max_ = scratch_bytes(options.memory_budget_bytes);
    arena_ = std::make_unique<Arena>(options.memory_budget_bytes - staging - scratch_bytes_max_);
    space_ = std::make_unique<FileSpace>(file_.fd, file_.path, options.bytes_max, &table_memory_);
    stream_ = std::make_unique<PageStream>(engine_.get(), file_.fd, file_.path, &pool_,
                                           static_cast<int>(options.queue_depth), staging, options.checksums);
    packer_ = std::make_unique<Packer>(&kernels_, &pool_);
    tiles_ = std::make_unique<TileCache>(arena_.get());
    writer_ = std::make_unique<Writer>(engine_->make_queue(file_.fd, kWriteDepth, {}), file_.path);
    page_queue_ = engine_->make_queue(file_.fd, 1, {});
  } catch (...) {
    close_file(file_.fd);
    throw;
  }
}

Drive::~Drive() {
  page_queue_.reset();
  writer_.reset();
  stream_.reset();
  tiles_.reset();
  leases_.clear();
  layers_.clear();  // pages give their memory back before the arena goes
  snapshots_.clear();
  engine_.reset();
  space_.reset();
  close_file(file_.fd);
}

void Drive::open_file() {
  const bool durable = !options_.durable_path.empty();
  file_ = durable ? open_durable_file(options_.durable_path, options_.io_engine, options_.durable_mode)
                  : open_scratch_file(options_.directory, options_.io_engine);
  try {
    if (!durable || options_.durable_mode == DurableMode::kCreate) {
      write_header(file_.fd, file_.path,
                   {durable ? Lifetime::kDurable : Lifetime::kScratch, options_.store_id});
      if (durable) sync_data(file_.fd, file_.path);
    } else {
      const Header header = read_header(file_.fd, file_.path);
      if (header.lifetime != Lifetime::kDurable) {
        throw Error(ErrorKind::kCorrupt,
                    file_.path + ": the file of a scratch store, which ended with its process");
      }
      if (header.store_id != options_.store_id) {
        throw Error(ErrorKind::kCorrupt, file_.path +
                                             ": belongs to another store than the catalogue beside it; "
                                             "put back the file that was made with it");
      }
    }
    struct stat info {};
    if (fstat(file_.fd, &info) != 0) throw io_error(file_.path, "looking at the file", errno);
    durable_file_bytes_ = durable ? info.st_size : 0;
  } catch (...) {
    close_file(file_.fd);
    throw;
  }
}

void Drive::check_writable() const {
  if (options_.durable_path.empty() || options_.durable_mode != DurableMode::kReadOnly) return;
  throw Error(ErrorKind::kStore,
              file_.path + ": opened to be read only; open it without read_only to store tokens in it");
}

void Drive::check_process() const {
  if (getpid() != process_) {
    throw Error(ErrorKind::kForked,
                "this store was opened in process " + text(process_) + " and is used in its child " +
                    text(getpid()) +
                    "; open a store in the child instead (or start workers with the 'spawn' method)");
  }
}

Layer& Drive::find(int64_t layer_id) {
  const auto found = layers_.find(layer_id);
  if (found == layers_.end()) throw Error(ErrorKind::kClosed, "this layer was freed, or its store closed");
  return found->second;
}

void Drive::create_layer(int64_t layer_id, const Geometry& geometry, int64_t number) {
  check_process();
  std::lock_guard<FairMutex> lock(mutex_);
  const int64_t page_bytes = geometry.full_precision().page_bytes();
  const auto fits = [&](int64_t budget_bytes) {
    return page_bytes <= page_bytes_max(budget_bytes, options_.read_ahead_bytes);
  };
  if (!fits(options_.memory_budget_bytes)) {
    const std::string page = "pages of " + text(page_bytes) + " bytes (" + text(geometry.num_kv_heads) +
                             " kv heads, head_dim " + text(geometry.head_dim_k) + " + " +
                             text(geometry.head_dim_v) + ", " + dtype_name(geometry.dtype) + ")";
    int64_t enough = kMemoryBudgetMin;
    while (!fits(enough) &&
           enough < 8 * kStagingBytesMax + 2 * std::max<int64_t>(0, options_.read_ahead_bytes))
      enough += kMiB;
    if (!fits(enough)) {
      throw Error(ErrorKind::kValue, page + " are larger than the " + text(kStagingBytesMax / 2) +
                                         " that a store can read at once; store fewer kv heads in a layer");
    }
    throw Error(ErrorKind::kBudget, "memory_budget of " + text(options_.memory_budget_bytes) +
                                        " bytes is too small for " + page + "; it must be at least " +
                                        text(enough));
  }
  layers_[layer_id] = Layer{geometry, {}, 0, 0, number};
  ahead_.forget(layer_id);
  stream_->release_unused();
}

void Drive::fork_layer(int64_t layer_id, int64_t source_id) {
  check_process();
  std::lock_guard<FairMutex> lock(mutex_);
  Layer copy = find_settled(source_id);
  for (Row& row : copy.rows) row.home = new_home(copy.geometry);
  layers_[layer_id] = std::move(copy);
  ahead_.forget(layer_id);
  stream_->release_unused();
}

void Drive::drop_layer(int64_t layer_id) {
  check_process();
  std::lock_guard<FairMutex> lock(mutex_);
  tiles_->forget(layer_id);
  layers_.erase(layer_id);
  ahead_.forget(layer_id);
  guesses_.erase(layer_id);
  stream_->release_unused();
}

LayerInfo Drive::info(int64_t layer_id) {
  check_process();
  std::lock_guard<FairMutex> lock(mutex_);
  return info_of(find(layer_id));
}

LayerInfo Drive::info_of(const Layer& layer) {
  LayerInfo info{layer.geometry, layer.epoch, layer.begin, {}};
  info.lengths.reserve(layer.rows.size());
  for (const Row& row : layer.rows) info.lengths.push_back(row.length);
  return info;
}

Geometry Drive::geometry(int64_t layer_id) {
  check_process();
  std::lock_guard<FairMutex> lock(mutex_);
  return find(layer_id).geometry;
}

// ---- changing what is stored ----

Row Drive::new_row(const Geometry& geometry) { return {&table_memory_, new_home(geometry)}; }

Ref<Home> Drive::new_home(const Geometry& geometry) {
  return Ref<Home>::make(&table_memory_, arena_.get(), &candidates_, space_.get(),
                         geometry.stored().page_bytes());
}

LayerInfo Drive::append(int64_t layer_id, const AppendRequest& request) {
  check_process();
  check_writable();
  std::lock_guard<FairMutex> lock(mutex_);
  return append_locked(&find_settled(layer_id), request, nullptr);
}

std::pair<LayerInfo, std::vector<LeasedUse>> Drive::append_reserved(int64_t lease_id, int64_t layer_id,
                                                                    const AppendRequest& request) {
  check_process();
  check_writable();
  std::lock_guard<FairMutex> lock(mutex_);
  Layer& layer = find_settled(layer_id);
  Lease lease;
  lease.layer_id = layer_id;
  lease.page_bytes = layer.geometry.stored().page_bytes();
  for (const Row& row : layer.rows) lease.lengths_before.push_back(row.length);
  LayerInfo info = append_locked(&layer, request, &lease);
  return {std::move(info), hold_reserved(lease_id, &layer, std::move(lease))};
}

// lease: of the pages that are reserved; null: none are.
LayerInfo Drive::append_locked(Layer* layer_of, const AppendRequest& request, Lease* lease) {
  Layer& layer = *layer_of;
  settle_writes();
  if (options_.read_ahead_bytes < 0) divide_budget(layer, request.row_count);
  const bool was_empty = layer.rows.empty();
  if (was_empty) {
    for (int64_t i = 0; i < request.row_count; ++i) layer.rows.push_back(new_row(layer.geometry));
  }
  if (static_cast<int64_t>(layer.rows.size()) != request.row_count) {
    throw Error(ErrorKind::kValue, "append: this layer holds " +
                                       text(static_cast<int64_t>(layer.rows.size())) +
                                       " rows, got a batch of " + text(request.row_count) +
                                       "; reorder() or free() the layer to change its batch");
  }
  if (lease != nullptr) {
    try {
      check_reserved(layer, request);
    } catch (...) {
      if (was_empty) layer.rows.clear();
      throw;
    }
  }
  std::vector<int64_t> lengths_before;
  std::vector<int64_t> ends_before;  // in pages
  for (Row& row : layer.rows) {
    lengths_before.push_back(row.length);
    ends_before.push_back(row.end_page());
    if (!layer.keeps_any()) continue;
    begin_summaries(layer, &row);
    // Whoever chooses pages catches up once they have their bytes.
    if (lease != nullptr) {
      for (RowSummary& summary : row.summaries) summary.follows = false;
    }
  }
  std::vector<ReplacedPage> replaced;
  int64_t token_total = 0;
  arena_full_ = false;
  try {
    for (int64_t i = 0; i < request.row_count; ++i) {
      const int64_t token_count = request.lengths != nullptr ? request.lengths[i] : request.q_len;
      append_row(&layer, &layer.rows[static_cast<size_t>(i)], request, i, token_count, &replaced, lease);
      token_total += token_count;
    }
    finish_packing();
    if (layer.geometry.quantised()) quantise_tails(&layer, lengths_before, &replaced);
    write_behind(token_total * layer.geometry.stored().page_bytes() / kPageTokens);
    writer_->flush();
    settle_writes();
    finish_summaries(layer);
    appended_tokens_ += token_total + (lease != nullptr ? request.row_count * request.reserved_count : 0);
  } catch (...) {
    packer_->cancel([this](const Packer::Job& job) { list_again(job); });
    new_pages_.clear();
    for (std::vector<SummaryBlock*>& blocks : filled_blocks_) blocks.clear();
    // Slots that were written behind a row's length hold nothing; pages are taken off, or put back.
    for (size_t i = 0; i < layer.rows.size(); ++i) {
      Row& row = layer.rows[i];
      row.length = lengths_before[i];
      while (row.end_page() > ends_before[i]) row.pages.pop_back();
      if (layer.keeps_any()) {
        truncate_summaries(layer.geometry, &row, [&](int kind) { return row.summaries[kind].end_before; });
      }
    }
    for (auto page = replaced.rbegin(); page != replaced.rend(); ++page) {
      if (page->page->writable()) candidates_.add(page->page.get());
      page->row->pages[static_cast<size_t>(page->index - page->row->first_page)] = std::move(page->page);
    }
    if (was_empty) layer.rows.clear();
    throw;
  }
  return info_of(layer);
}

void Drive::append_row(Layer* layer, Row* row, const AppendRequest& request, int64_t index,
                       int64_t token_count, std::vector<ReplacedPage>* replaced, Lease* lease) {
  const Geometry& geometry = layer->geometry;
  const PageLayout stored = geometry.stored();
  const PageLayout full_precision = geometry.full_precision();
  const int64_t reserved = lease == nullptr ? 0 : request.reserved_count;
  const int64_t tail = geometry.quantised() ? first_tail_page(row->length + token_count + reserved) : 0;
  const int64_t bytes = element_bytes(request.dtype);
  const auto* k = static_cast<const uint8_t*>(request.k) + index * request.k_strides[0] * bytes;
  const auto* v = static_cast<const uint8_t*>(request.v) + index * request.v_strides[0] * bytes;
  NewTokens tokens;
  tokens.dtype = request.dtype;
  std::copy_n(request.k_strides + 1, 2, tokens.k_strides);
  std::copy_n(request.v_strides + 1, 2, tokens.v_strides);
  row->home->stream.expect((token_count + reserved + kPageTokens - 1) / kPageTokens);
  const auto reserve = [&](int64_t done) {
    if (reserved > 0 && done == request.reserved_begin) {
      reserve_pages(*layer, row, index, reserved / kPageTokens, lease);
    }
  };
  for (int64_t done = 0; done < token_count; done += tokens.count) {
    reserve(done);
    tokens.slot = row->length % kPageTokens;
    tokens.count = std::min(kPageTokens - tokens.slot, token_count - done);
    if (reserved > 0 && done < request.reserved_begin) {
      tokens.count = std::min(tokens.count, request.reserved_begin - done);
    }
    tokens.k = k + done * request.k_strides[2] * bytes;
    tokens.v = v + done * request.v_strides[2] * bytes;
    const int64_t page_index = row->length / kPageTokens;
    // Room for what is kept about a page comes before the page: making it may fill the pages that are queued
    // and send them away, and this one must not go before it is expected.
    if (tokens.count == kPageTokens && page_index < tail) {
      make_summary_room(*layer, row, page_index);
      Ref<Page> page = new_page(*row, stored);
      if (row->pages.empty()) row->first_page = page_index;
      row->pages.push_back(page);
      packer_->add({page, stored, true, tokens, nullptr, {}});
      expect_summary(*layer, row, page_index, page.get());
    } else {
      const bool completes = tokens.slot + tokens.count == kPageTokens && !geometry.quantised();
      if (completes) make_summary_room(*layer, row, page_index);
      const Ref<Page> page = writable_tail(*layer, row, replaced);
      packer_->add({page, full_precision, completes, tokens, nullptr, {}});
      if (completes) expect_summary(*layer, row, page_index, page.get());
    }
    row->length += tokens.count;
    if (packer_->queued_bytes() >= kPackBytes) finish_packing();
  }
  reserve(token_count);
}

Ref<Page> Drive::new_page(const Row& row, const PageLayout& layout) {
  auto page = Ref<Page>::make(&table_memory_, row.home, layout);
  page->memory = page_memory(page->page_bytes());
  return page;
}

// The page that the row's next token goes to: of full precision, in memory, not on the drive, the row's
// alone.
const Ref<Page>& Drive::writable_tail(const Layer& layer, Row* row, std::vector<ReplacedPage>* replaced) {
  const Geometry& geometry = layer.geometry;
  const int64_t index = row->length / kPageTokens;
  const bool exists = index < row->end_page();
  if (exists) {
    const Ref<Page>& last = row->pages.back();
    if (last.use_count() == 1 && last->writable() && !last->quantised) return last;
  }
  Ref<Page> page = new_page(*row, geometry.full_precision());
  if (exists) {  // shared, already on the drive, or quantised (after a crop): continue on a copy
    const Page& old = *row->pages.back();
    const PageUse use{&old, row - layer.rows.data(), index};
    if (old.quantised) {
      packer_->convert(page_image(layer, use), geometry.stored(), page->memory, geometry.full_precision());
    } else {
      std::memcpy(page->memory, page_image(layer, use), static_cast<size_t>(old.page_bytes()));
    }
    replaced->push_back({row, index, std::move(row->pages.back())});
    row->pages.back() = std::move(page);
  } else {
    // Slots that are still empty when a commit writes the page must not hold what others stored here before.
    std::memset(page->memory, 0, static_cast<size_t>(page->page_bytes()));
    if (row->pages.empty()) row->first_page = index;
    row->pages.push_back(std::move(page));
  }
  return row->pages.back();
}

// The first page that is to be of full precision in a row of this length: the newest one or two pages are, so
// that appending and cropping there touch no codes.
int64_t Drive::first_tail_page(int64_t length) {
  return std::max<int64_t>(0, (length + kPageTokens - 1) / kPageTokens - kTailPages);
}

// Quantises the pages of every row that the append has pushed out of the tail. Rows that share one (beams) go
// on sharing it.
void Drive::quantise_tails(Layer* layer, const std::vector<int64_t>& lengths_before,
                           std::vector<ReplacedPage>* replaced) {
  const PageLayout stored = layer->geometry.stored();
  const PageLayout full_precision = layer->geometry.full_precision();
  std::map<const Page*, Ref<Page>> quantised;
  for (size_t i = 0; i < layer->rows.size(); ++i) {
    Row& row = layer->rows[i];
    const int64_t begin = std::max(row.first_page, first_tail_page(lengths_before[i]));
    for (int64_t index = begin; index < first_tail_page(row.length); ++index) {
      Ref<Page>& place = row.pages[static_cast<size_t>(index - row.first_page)];
      if (place->quantised) continue;
      make_summary_room(*layer, &row, index);
      Ref<Page>& page = quantised[place.get()];
      bool converted = false;
      if (page == nullptr) {
        page = new_page(row, stored);
        if (place->evictable()) {
          packer_->add({page, stored, true, {}, place, full_precision});
        } else {  // on the drive, or on its way there: its memory may go before the packer comes to it
          const PageUse use{place.get(), static_cast<int64_t>(i), index};
          packer_->convert(page_image(*layer, use), full_precision, page->memory, stored);
          converted = true;
        }
      }
      expect_summary(*layer, &row, index, page.get());
      if (!page->pinned && !new_pages_.empty()) finish_packing();
      if (converted) seal(page);
      replaced->push_back({&row, index, std::move(place)});
      place = page;
      if (packer_->queued_bytes() >= kPackBytes) finish_packing();
    }
  }
  finish_packing();
}

// Fills the pages that are queued. From then on they may leave memory.
void Drive::finish_packing() {
  packer_->run([this] { summarise_new_pages(); },
               [this](const Packer::Job& job) {
                 if (job.completes) seal(job.page);
                 list_again(job);
               },
               [this](const Packer::Job& job) { list_again(job); });
}

// The pages of a job were pinned, and may have lost their places among the candidates.
void Drive::list_again(const Packer::Job& job) {
  candidates_.add(job.page.get());
  if (job.source != nullptr) candidates_.add(job.source.get());
}

// An append that had to make room is seldom the last: starts writing as much as it brought, so that the next
// one finds room without waiting for the drive.
void Drive::write_behind(int64_t appended_bytes) {
  if (!arena_full_) return;
  const int64_t window = std::min({appended_bytes, kWriteBehindBytes, arena_->limit_bytes() / 4});
  try {
    // What the drive has already can go when its room is needed, at no cost.
    const auto next_is_written = [this] {
      return candidates_.next() != nullptr && candidates_.next()->written;
    };
    while (writer_->pending_bytes() < window && !next_is_written() && evict_one() != Evicted::kNone) {
    }
  } catch (const Error& error) {
    // No space: this append stands. The next one that needs the room says so.
    if (error.kind() != ErrorKind::kNoSpace) throw;
  }
}

void Drive::seal(const Ref<Page>& page) {
  page->sealed = true;
  if (options_.resident) {
    candidates_.add(page.get());
    return;
  }
  writer_->add(page);
  candidates_.remove(page.get());
  while (writer_->pending_bytes() > std::min(kWriteBehindBytes, arena_->limit_bytes() / 4)) {
    writer_->reap(true);
    settle_writes();
  }
}

// ---- how memory_budget is divided ----

int64_t Drive::write_window() const { return std::min(kWriteWindowBytes, arena_->limit_bytes() / 4); }

// What the tails leave of the budget for staging, with as much again of the arena for pages that come and go.
// row_count: of the layer, if it has no rows yet.
int64_t Drive::staging_room(const Layer& layer, int64_t row_count) const {
  std::map<int64_t, int64_t> pages;  // by size, because pages of a size lie in chunks of their own
  for (const auto& [id, other] : layers_) {
    const Geometry& geometry = other.geometry;
    auto rows = static_cast<int64_t>(other.rows.size());
    if (rows == 0) rows = &other == &layer ? row_count : 1;
    pages[geometry.full_precision().page_bytes()] += 2 * rows * (geometry.quantised() ? kTailPages : 1);
    if (geometry.quantised()) pages[geometry.stored().page_bytes()]++;
    for (int kind = 0; kind < kSummaryKinds; ++kind) {
      if (!other.keeps[kind]) continue;
      const SummaryShape shape(geometry, static_cast<SummaryKind>(kind));
      for (const Row& row : other.rows) {
        const auto blocks = static_cast<int64_t>(row.summaries[kind].blocks.size());
        if (shape.tiles_per_head > 0) pages[shape.full_bytes()] += blocks;
        if (shape.head_dim_v > 0) pages[shape.sums_bytes()] += blocks + 1;
      }
      if (shape.tiles_per_head > 0) pages[shape.filling_bytes()] += rows;
    }
  }
  int64_t room = options_.memory_budget_bytes - scratch_bytes_max_;
  for (const auto& [page_bytes, count] : pages) room -= arena_->bytes_for(page_bytes, count);
  return room;
}

// What staging at its least leaves to the arena.
int64_t Drive::arena_bytes_max() const {
  const int64_t budget = options_.memory_budget_bytes;
  return budget - scratch_bytes_max_ - staging_bytes(budget, options_.read_ahead_bytes);
}

// Before an append: moves memory between the arena and staging, a little at a time while pages have to be
// written for it. In large steps, because what is staged is lost; but tails get their room at once.
void Drive::divide_budget(const Layer& layer, int64_t row_count) {
  const auto is_empty = [](const Row& row) { return row.length == 0; };
  if (std::all_of(layer.rows.begin(), layer.rows.end(), is_empty)) {  // something begins: it may be smaller
    int64_t widest = 0;
    for (const auto& [id, other] : layers_) {
      int64_t pages = 0;
      for (const Row& row : other.rows) pages += static_cast<int64_t>(row.pages.size());
      widest = std::max(widest, pages * other.geometry.stored().page_bytes());
    }
    stream_->limit_widest_pass(widest);
    staging_bytes_limit_ = std::numeric_limits<int64_t>::max();
  }
  const int64_t budget = options_.memory_budget_bytes;
  const int64_t rest = budget - scratch_bytes_max_;
  const int64_t now = stream_->staging_bytes();
  const int64_t room = staging_room(layer, row_count);
  const int64_t useful = useful_staging_bytes(budget, stream_->widest_pass_bytes());
  const int64_t wanted = std::max(staging_bytes(budget, options_.read_ahead_bytes),
                                  in_steps(std::min({useful, room, staging_bytes_limit_})));
  const bool crowded = now > room && wanted < now;
  if (!crowded && wanted <= now + now / 4 && wanted >= now - now / 4) {
    arena_->set_limit(rest - now);  // it was lower if the staging memory was about to grow
    return;
  }
  arena_->set_limit(rest - wanted);
  bool stuck = false;
  try {
    while (arena_->mapped_bytes() > arena_->limit_bytes() && writer_->pending_bytes() < write_window() &&
           evict_one(false) != Evicted::kNone) {
    }
    writer_->flush();
  } catch (const Error& error) {
    if (error.kind() != ErrorKind::kNoSpace) throw;
    stuck = true;
  }
  if (arena_->mapped_bytes() > arena_->limit_bytes()) tiles_->clear();
  if (arena_->mapped_bytes() <= arena_->limit_bytes()) {
    stream_->resize(wanted);
  } else if (stuck || writer_->idle()) {  // what is left cannot go
    arena_->set_limit(rest - now);
    staging_bytes_limit_ = now;
  }
}

// Room for one page, made by writing others if there is none.
uint8_t* Drive::page_memory(int64_t page_bytes, const char* what) {
  const int64_t window = write_window();
  for (;;) {
    if (uint8_t* memory = arena_->allocate(page_bytes)) return memory;
    arena_full_ = true;
    // Many pages on their way at once, so that the drive is kept busy; then wait for the first to be done.
    Evicted evicted = Evicted::kWriting;
    while (writer_->pending_bytes() < window && evicted == Evicted::kWriting)
      evicted = evict_one(tiles_->empty());
    if (evicted == Evicted::kGone) continue;
    // Before tails go, whose next tokens would bring them back.
    if (evicted == Evicted::kNone && tiles_->drop_one()) continue;
    writer_->flush();
    if (writer_->idle()) {
      if (packer_->empty()) {
        throw Error(ErrorKind::kBudget, "memory_budget of " + text(options_.memory_budget_bytes) +
                                            " bytes has no room for " + what + " of " + text(page_bytes) +
                                            " bytes; raise it");
      }
      finish_packing();  // what is pinned may go then
      continue;
    }
    writer_->reap(true);
    settle_writes();
  }
}

// Makes one page leave memory: by starting to write it, or at once if the drive has it.
Drive::Evicted Drive::evict_one(bool tails_too) {
  while (Page* next = candidates_.next()) {
    if (!next->sealed && !tails_too) return Evicted::kNone;
    const Ref<Page> page(next);
    const bool evictable = page->evictable();
    if (evictable && page->written) {
      candidates_.remove(next);
      arena_->release(std::exchange(page->memory, nullptr));
      return Evicted::kGone;
    }
    if (evictable) {
      writer_->add(page);
      if (!page->sealed) tail_spills_++;
    }
    candidates_.remove(
        next);  // if it is pinned, the packer's end lists it again; if it is written, the writer
    if (evictable) return Evicted::kWriting;
  }
  return Evicted::kNone;
}

// Takes note of writes that ended. Those that failed left their pages in memory: they stay candidates, to be
// tried last.
void Drive::settle_writes() {
  writer_->reap(false);
  for (const Ref<Page>& page : writer_->take_failed()) candidates_.add_last(page.get());
  writer_->throw_error();
}

// A page's bytes, until the next call: where they are in memory, else read.
const uint8_t* Drive::page_image(const Layer& layer, const PageUse& use) {
  const Page& page = *use.page;
  if (page.memory != nullptr) return page.memory;
  const uint8_t* bytes = nullptr;
  const int error = read_bytes(page.file_offset, page.page_bytes(), &bytes);
  if (error != 0) {
    throw unreadable_pages(file_.path, layer.number, &use, 1, page.file_offset, error);
  }
  if (options_.checksums) {
    const uint32_t found = crc32c(bytes, page.page_bytes());
    if (found != page.checksum) {
      throw damaged_page(file_.path, layer.number, use, {0, page.page_bytes(), found, page.checksum});
    }
  }
  return bytes;
}

// 0, and the bytes until the next call, or an errno value. Into memory of our own, whatever it is for: where
// the queue gives up waiting, it goes on being written to, and nobody else may have it.
int Drive::read_bytes(int64_t file_offset, int64_t byte_count, const uint8_t** bytes) {
  std::vector<IoCompletion> completions;
  while (page_queue_->in_flight() > 0) page_queue_->reap(true, &completions);
  page_segment_ = {page_image_.reserve(byte_count), static_cast<size_t>(byte_count)};
  IoRequest request;
  request.file_offset = file_offset;
  request.segments = &page_segment_;
  request.segment_count = 1;
  const auto read = [&] {
    completions.clear();
    page_queue_->submit(request);
    while (completions.empty()) page_queue_->reap(true, &completions);
    return completions.front().error;
  };
  *bytes = static_cast<const uint8_t*>(page_segment_.iov_base);
  const int error = read();
  return error == EIO ? read() : error;  // the medium may give it the second time
}

void Drive::truncate(int64_t layer_id, const std::vector<int64_t>& lengths) {
  check_process();
  std::lock_guard<FairMutex> lock(mutex_);
  Layer& layer = find_settled(layer_id);
  const bool one_for_all = lengths.size() == 1;
  if (!one_for_all && lengths.size() != layer.rows.size()) {
    throw Error(ErrorKind::kValue, "truncate: wanted one length or one per row (" +
                                       text(static_cast<int64_t>(layer.rows.size())) + "), got " +
                                       text(static_cast<int64_t>(lengths.size())));
  }
  for (size_t i = 0; i < layer.rows.size(); ++i) {
    const int64_t length = lengths[one_for_all ? 0 : i];
    if (length < layer.begin) {
      throw Error(ErrorKind::kValue, "truncate: length must be at least " + text(layer.begin) +
                                         " (older tokens were trimmed), got " + text(length));
    }
  }
  bool shortened = false;
  size_t pages_gone = 0;
  for (size_t i = 0; i < layer.rows.size(); ++i) {
    Row& row = layer.rows[i];
    const int64_t length = lengths[one_for_all ? 0 : i];
    if (length >= row.length) continue;
    pages_gone += row.pages.size();
    truncate_row(layer, &row, length);
    pages_gone -= row.pages.size();
    shortened = true;
  }
  if (!shortened) return;
  layer.epoch++;
  if (pages_gone > 0) tiles_->release_unused();
  stream_->release_unused();
}

void Drive::truncate_row(const Layer& layer, Row* row, int64_t length) {
  row->truncate(length);
  if (layer.keeps_any()) truncate_summaries(layer.geometry, row, [&](int) { return length / kPageTokens; });
  if (row->pages.empty()) row->home->stream.restart();
}

void Drive::trim(int64_t layer_id, int64_t begin) {
  check_process();
  std::lock_guard<FairMutex> lock(mutex_);
  Layer& layer = find_settled(layer_id);
  for (const Row& row : layer.rows) {
    if (begin > row.length) {
      throw Error(ErrorKind::kValue, "trim: begin must not lie behind a row's end (" + text(row.length) +
                                         "), got " + text(begin));
    }
  }
  if (begin <= layer.begin) return;
  layer.begin = begin;
  const int64_t pages_before = layer.rows.empty() ? 0 : layer.rows[0].first_page;
  for (Row& row : layer.rows) {
    while (!row.pages.empty() && (row.first_page + 1) * kPageTokens <= begin) {
      row.pages.pop_front();
      row.first_page++;
    }
    for (int kind = 0; kind < kSummaryKinds; ++kind) {
      const SummaryShape shape(layer.geometry, static_cast<SummaryKind>(kind));
      row.summaries[kind].trim(begin / kPageTokens, shape.pages_per_block());
    }
  }
  if (!layer.rows.empty() && layer.rows[0].first_page != pages_before) tiles_->release_unused();
  stream_->release_unused();
}

void Drive::reorder(int64_t layer_id, const std::vector<int64_t>& index) {
  check_process();
  std::lock_guard<FairMutex> lock(mutex_);
  Layer& layer = find_settled(layer_id);
  const auto row_count = static_cast<int64_t>(layer.rows.size());
  bool identity = static_cast<int64_t>(index.size()) == row_count;
  for (size_t i = 0; i < index.size(); ++i) {
    if (index[i] < 0 || index[i] >= row_count) {
      throw Error(ErrorKind::kValue, "reorder: index must be in [0, " + text(row_count) + "), got " +
                                         text(index[i]) + " at position " + text(static_cast<int64_t>(i)));
    }
    identity = identity && index[i] == static_cast<int64_t>(i);
  }
  if (identity) return;
  std::vector<int64_t> uses_left(layer.rows.size(), 0);
  for (const int64_t source : index) uses_left[static_cast<size_t>(source)]++;
  std::vector<Row> rows;
  rows.reserve(index.size());  // growing would copy page tables
  for (const int64_t source : index) {
    Row& old = layer.rows[static_cast<size_t>(source)];
    if (--uses_left[static_cast<size_t>(source)] == 0) {
      rows.push_back(std::move(old));  // the last user of a row takes it over, with the extent it fills
    } else {
      rows.push_back(old);
      rows.back().home = new_home(layer.geometry);
    }
  }
  layer.rows = std::move(rows);
  layer.epoch++;
  tiles_->release_unused();
  stream_->release_unused();
}

void Drive::flush() {
  check_process();
  std::lock_guard<FairMutex> lock(mutex_);
  writer_->drain();
  settle_writes();
}

// ---- computing from it ----

PassContext Drive::context(PassKey pass) {
  ReadAhead* ahead = options_.read_ahead_bytes != 0 ? &ahead_ : nullptr;
  return {&kernels_, stream_.get(), &pool_, &scratch_, scratch_bytes_max_, ahead, pass, nullptr};
}

void Drive::check_span(const Layer& layer, int64_t epoch, const Span& span) const {
  if (epoch >= 0 && epoch != layer.epoch) {
    throw Error(
        ErrorKind::kStale,
        "the tokens this StorageTensor stood for were reordered, truncated or freed since it was made; take "
        "the layer's keys and values anew");
  }
  const auto row_count = static_cast<int64_t>(layer.rows.size());
  if (span.row_begin < 0 || span.row_count < 0 || span.row_begin > row_count - span.row_count) {
    throw Error(ErrorKind::kValue, "wanted " + text(span.row_count) + " rows from row " +
                                       text(span.row_begin) + " on, the layer holds " + text(row_count));
  }
  if (span.kv_begin < 0 || span.kv_end < -1 || (span.kv_end >= 0 && span.kv_end < span.kv_begin)) {
    throw Error(ErrorKind::kValue, "wanted tokens from position " + text(span.kv_begin) + " to " +
                                       text(span.kv_end) +
                                       "; positions count from 0, the end is not before the begin");
  }
  if (span.kv_begin < layer.begin) {
    throw Error(ErrorKind::kStale, "tokens before position " + text(layer.begin) +
                                       " were trimmed (sliding window), wanted them from " +
                                       text(span.kv_begin));
  }
  for (int64_t i = 0; i < span.row_count; ++i) {
    const int64_t length = layer.rows[static_cast<size_t>(span.row_begin + i)].length;
    if (span.kv_end > length) {
      throw Error(ErrorKind::kValue, "wanted tokens up to position " + text(span.kv_end) + ", row " +
                                         text(span.row_begin + i) + " has " + text(length));
    }
  }
}

void Drive::check_mask(const Layer& layer, const AttendRequest& request) const {
  if (request.mask.kind == MaskKind::kNone || request.mask.kv_len == 1) return;
  const Span& span = request.span;
  int64_t kv_len = span.kv_end - span.kv_begin;
  if (span.kv_end < 0) {
    kv_len = 0;
    for (int64_t i = 0; i < span.row_count; ++i) {
      const Row& row = layer.rows[static_cast<size_t>(span.row_begin + i)];
      kv_len = std::max(kv_len, row.length - span.kv_begin);
    }
  }
  if (request.mask.kv_len != kv_len) {
    throw Error(ErrorKind::kValue, "mask must be broadcastable to [" + text(span.row_count) + ", " +
                                       text(request.num_heads) + ", " + text(request.q_len) + ", " +
                                       text(kv_len) + "], got size " + text(request.mask.kv_len) +
                                       " in dimension 3");
  }
}

// What every attention begins with; the lock is held.
Layer& Drive::begin_attend(int64_t layer_id, int64_t epoch, AttendRequest* request) {
  Layer& layer = find_settled(layer_id);
  if (request->span.kv_begin == -1) request->span.kv_begin = layer.begin;
  check_span(layer, epoch, request->span);
  check_mask(layer, *request);
  if (std::exchange(layer.restored, false) && options_.resident) bring_back(layer);
  return layer;
}

void Drive::attend(int64_t layer_id, int64_t epoch, AttendRequest request) {
  check_process();
  std::lock_guard<FairMutex> lock(mutex_);
  const Layer& layer = begin_attend(layer_id, epoch, &request);
  csd::attend(context({layer_id, PassKind::kAttend}), layer, request);
  attend_calls_++;
}

void Drive::attend_sparse(int64_t layer_id, int64_t epoch, AttendRequest request,
                          const SparseRequest& sparse) {
  check_process();
  std::lock_guard<FairMutex> lock(mutex_);
  Layer& layer = begin_attend(layer_id, epoch, &request);
  for (const SummaryKind kind : summary_kinds(sparse)) catch_up(&layer, request.span, kind);
  PassContext with_tiles = context({layer_id, PassKind::kAttend});
  with_tiles.tiles = tiles_.get();
  int64_t guessed_bytes = 0;
  with_tiles.guessed_bytes = &guessed_bytes;
  // Half of what pages have: those that stay in memory are of use to every query a little, tiles that were
  // chosen much to the next one.
  tiles_->begin(layer_id, options_.resident ? arena_->limit_bytes() / 2 : 0);
  try {
    csd::attend_sparse(with_tiles, layer, request, sparse);
  } catch (...) {
    tiles_->end(false);
    throw;
  }
  tiles_->end(true);
  if (tiles_->wants_room()) make_room_for_tiles();
  note_guess(layer_id, guessed_bytes);
  attend_calls_++;
  sparse_attends_++;
  note_missing(request, sparse);
}

void Drive::prefetch(int64_t layer_id, int64_t epoch, AttendRequest request, const SparseRequest& sparse) {
  check_process();
  std::lock_guard<FairMutex> lock(mutex_);
  if (options_.read_ahead_bytes == 0) return;
  const Layer& layer = find_settled(layer_id);
  if (request.span.kv_begin == -1) request.span.kv_begin = layer.begin;
  check_span(layer, epoch, request.span);
  if (layer.restored) return;
  for (int64_t i = 0; i < request.span.row_count; ++i) {
    const Row& row = layer.rows[static_cast<size_t>(request.span.row_begin + i)];
    for (const SummaryKind kind : summary_kinds(sparse)) {
      if (row.summary(kind).end_page < summarised_end(layer, row)) return;
    }
  }
  const int64_t queries = request.num_heads * request.q_len * request.span.row_count;
  if (AttendPass::bytes_per_query(layer.geometry, 1) * queries > scratch_bytes_max_) return;
  Guesses& guesses = guesses_[layer_id];
  if (guesses.used_share < kGuessShareMin && ++guesses.skipped < kGuessEvery) return;
  guesses.skipped = 0;
  guesses.begun_bytes = 0;
  PassContext with_tiles = context({layer_id, PassKind::kAttend});
  with_tiles.tiles = tiles_.get();
  try {
    guesses.begun_bytes = csd::read_ahead_sparse(with_tiles, layer, request, sparse);
  } catch (const Error& error) {
    // Who needs it reads it, and fails if that fails too.
    if (error.kind() != ErrorKind::kStore) throw;
  }
  guessed_bytes_ += guesses.begun_bytes;
}

void Drive::note_guess(int64_t layer_id, int64_t used_bytes) {
  const auto found = guesses_.find(layer_id);
  if (found == guesses_.end() || found->second.begun_bytes == 0) return;
  Guesses& guesses = found->second;
  const double share = static_cast<double>(used_bytes) / static_cast<double>(guesses.begun_bytes);
  guesses.used_share += (share - guesses.used_share) / 4;
  guesses.begun_bytes = 0;
  guessed_used_bytes_ += used_bytes;
}

// Tiles that are chosen again and again are worth more than pages that happened to stay in memory: some of
// those go, a few at a call, and without waiting for the drive.
void Drive::make_room_for_tiles() {
  try {
    writer_->reap(
        false);  // not settle_writes(): what failed is the next append's to say, not this attention's
    int64_t wanted = write_window();
    while (wanted > 0 && writer_->pending_bytes() < write_window() && candidates_.next() != nullptr) {
      const int64_t bytes = candidates_.next()->page_bytes();
      if (evict_one(false) == Evicted::kNone) break;
      wanted -= bytes;
    }
    writer_->flush();
  } catch (const Error& error) {
    // No space to write to: what is in memory stays there.
    if (error.kind() != ErrorKind::kNoSpace) throw;
  }
}

void Drive::note_missing(const AttendRequest& request, const SparseRequest& sparse) {
  const int64_t count = request.span.row_count * request.num_heads * request.q_len;
  for (int64_t i = 0; i < count; ++i) {
    if (!std::isfinite(sparse.missing[i])) continue;  // keys that are not finite
    missing_sum_ += sparse.missing[i];
    missing_max_ = std::max(missing_max_, sparse.missing[i]);
    missing_count_++;
  }
}

template <typename Request>
void Drive::run_pass(PassKey key, int64_t epoch, const Request& request,
                     void (*pass)(const PassContext&, const Layer&, const Request&)) {
  check_process();
  std::lock_guard<FairMutex> lock(mutex_);
  const Layer& layer = find_settled(key.layer_id);
  check_span(layer, epoch, request.span);
  pass(context(key), layer, request);
}

void Drive::scores(int64_t layer_id, int64_t epoch, const ScoresRequest& request) {
  run_pass({layer_id, PassKind::kScores}, epoch, request, csd::scores);
}

void Drive::weighted_sum(int64_t layer_id, int64_t epoch, const WeightedSumRequest& request) {
  run_pass({layer_id, PassKind::kWeightedSum}, epoch, request, csd::weighted_sum);
}

void Drive::read(int64_t layer_id, int64_t epoch, const ReadRequest& request) {
  run_pass({layer_id, PassKind::kRead}, epoch, request, csd::read);
}

// ---- reporting ----

std::string Drive::fallback_warning() const {
  return file_.path + ": " + engine_->fallback_reason() +
         "; this drive reads and writes with pread from now on";
}

std::string Drive::stats_json() {
  check_process();
  std::lock_guard<FairMutex> lock(mutex_);
  writer_->reap(false);
  int64_t pages_on_drive = 0;
  int64_t pages_resident = 0;
  int64_t stored_bytes = 0;  // a page that rows share counts for each
  for (const auto& [id, layer] : layers_) {
    for (const Row& row : layer.rows) {
      for (const Ref<Page>& page : row.pages) {
        (page->memory != nullptr ? pages_resident : pages_on_drive)++;
        stored_bytes += page->page_bytes();
      }
    }
  }
  const StreamCounters& counters = stream_->counters();
  using namespace json;
  std::string json;
  json += quoted("directory", options_.directory);
  const char* fallback = engine_->fallback_reason();
  json += quoted("io_engine", engine_->name());
  json +=
      quoted("io_reason", fallback == nullptr ? file_.reason
                                              : "pread since io_uring was refused: " + std::string(fallback) +
                                                    "; it began with " + file_.reason);
  json += std::string("\"direct_io\": ") + (file_.direct_io ? "true, " : "false, ");
  json += std::string("\"checksums\": ") + (options_.checksums ? "true, " : "false, ");
  json += quoted("simd", kernels_.name);
  json += number("threads", stream_->worker_limit());
  json += number("memory_budget_bytes", options_.memory_budget_bytes);
  json += number("memory_used_bytes",
                 arena_->mapped_bytes() + stream_->staging_bytes_touched() + scratch_.bytes());
  json += number("metadata_bytes", table_memory_.bytes());
  json += number("summary_bytes", summary_bytes());
  json += number("staging_bytes", stream_->staging_bytes());
  json += number("drive_read_bytes", counters.drive_read_bytes + brought_back_bytes_);
  json += number("read_ahead_bytes", counters.read_ahead_bytes);
  json += number("read_ahead_wasted_bytes", counters.read_ahead_wasted_bytes);
  json += number("reused_bytes", tiles_->served_bytes());
  json += number("guessed_bytes", guessed_bytes_);
  json += number("guessed_used_bytes", guessed_used_bytes_);
  json += number("resident_read_bytes", counters.resident_read_bytes);
  json += number("drive_written_bytes", writer_->written_bytes());
  json += number("drive_pending_bytes", writer_->pending_bytes());
  json += number("attend_calls", attend_calls_);
  json += number("sparse_attends", sparse_attends_);
  json +=
      fraction("missing_mass_mean", missing_sum_ / static_cast<double>(std::max<int64_t>(1, missing_count_)));
  json += fraction("missing_mass_max", missing_max_);
  json += number("leased_copy_bytes", leased_copy_bytes_);
  json += number("appended_tokens", appended_tokens_);
  json += number("tail_spills", tail_spills_);
  json += seconds("io_wait_s", counters.io_wait_ns);
  json += seconds("compute_s", counters.compute_ns);
  json += number("file_bytes", space_->file_bytes());
  json += number("pages_on_drive", pages_on_drive);
  json += number("pages_resident", pages_resident);
  json += number("stored_bytes", stored_bytes);
  return object(std::move(json));
}

}  // namespace csd
