// A drive: one directory's file, the pages in it and in memory, and everything that is done to them. The ops
// call this.
//
// Thread-safe: one call at a time, in the order in which they came. memory_budget is divided: staging for
// reads in flight and ahead, which grows with what passes read, scratch for partial results, and the arena,
// which holds the tails, the summaries of sparse attention and, in what is left, tiles that it chose lately
// and full pages that then never have to be read. A page that finds no room is written and leaves memory;
// even a tail may, so any budget above the minimum holds any context (with sparse attention: that its
// summaries fit).
#pragma once

#include <sys/types.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/fair_mutex.h"
#include "base/memory_pool.h"
#include "base/ref.h"
#include "executor/ahead.h"
#include "executor/attend.h"
#include "executor/packer.h"
#include "executor/slab_io.h"
#include "executor/sparse.h"
#include "executor/stream.h"
#include "executor/writer.h"
#include "io/io.h"
#include "kernels/kernels.h"
#include "store/arena.h"
#include "store/candidates.h"
#include "store/extents.h"
#include "store/format.h"
#include "store/layer.h"
#include "store/summary.h"
#include "store/table.h"

namespace csd {

struct DriveOptions {
  std::string directory;
  std::string io_engine = "auto";  // "auto" | "io_uring" | "pread"
  std::string simd = "auto";       // "auto" | "serial" | "avx2" | "avx512"
  int64_t memory_budget_bytes = int64_t{1} << 30;
  int64_t threads = 1;
  int64_t queue_depth = 32;
  // Memory for reads before they are needed; 0: none, -1: a share of the budget.
  int64_t read_ahead_bytes = -1;
  LendThreads lend_threads = nullptr;  // see base/thread_pool.h
  bool resident = true;                // false: full pages always leave memory (to measure or test the drive)
  bool checksums = true;               // compared when pages are read; they are computed in any case
  int64_t bytes_max = 0;               // that the file may take; 0: any
  // A file that outlives the process: its path, and how it is opened. Empty: a scratch file in the directory.
  std::string durable_path;
  DurableMode durable_mode = DurableMode::kWrite;
  StoreId store_id{};  // that it is made with, or must have
};

// A layer as a catalogue keeps it.
struct LayerTable {
  int64_t begin = 0;
  std::vector<RowTable> rows;
  std::vector<PageEntry> entries;  // of all rows, in order
};

// A page that is not as it was written.
struct BadPage {
  int64_t row = 0;
  int64_t index = 0;
  int64_t file_offset = 0;
  int error = 0;  // errno of a read that failed; 0: it came back with other bytes
};

// New tokens of one layer: k [row_count, num_kv_heads, q_len, head_dim_k], v likewise, strides in elements,
// last dense.
struct AppendRequest {
  DType dtype = DType::kFloat32;
  int64_t row_count = 0;
  int64_t q_len = 0;
  const void* k = nullptr;
  const void* v = nullptr;
  int64_t k_strides[3] = {0, 0, 0};
  int64_t v_strides[3] = {0, 0, 0};
  const int64_t* lengths = nullptr;  // [row_count] tokens of each row that count; null: all q_len
  // Tokens of each row whose pages the holder of a lease fills, from this token of the append on: k and v
  // leave them out, and q_len does not count them. Whole pages.
  int64_t reserved_begin = 0;
  int64_t reserved_count = 0;
};

// Where a page is now.
struct LeasedPage {
  const Page* page = nullptr;  // identifies it as long as a lease has it
  int64_t file_offset = -1;    // -1: in memory
  uint32_t checksum = 0;       // of what is on the drive
};

// One page of one row; rows share some.
struct LeasedUse {
  int64_t row = 0;
  int64_t index = 0;
  LeasedPage where;
};

// Pages that somebody outside of the drive works with: they stay as they are, and so does their place.
struct Lease {
  int64_t layer_id = 0;
  int64_t page_bytes = 0;  // of each of them
  std::vector<Ref<Page>> pages;
  // Of pages whose bytes are still to come.
  std::vector<std::pair<int64_t, int64_t>> places;  // row, index
  std::vector<int64_t> lengths_before;  // of the rows, when they were reserved; empty: there were none
  int64_t arriving = 0;
  int64_t memory_bytes = 0;  // of these, in memory

  const Ref<Page>& at(int64_t place) const {
    CSD_CHECK(place >= 0 && place < static_cast<int64_t>(pages.size()), "a lease has no such page");
    return pages[static_cast<size_t>(place)];
  }
};

// What an append of so many tokens to each row of some layers, all of one geometry, would have to summarise.
struct SummaryRequest {
  Geometry geometry;
  std::vector<SummaryKind> kinds;
  std::vector<int64_t> layer_ids;  // of those that the store has
  int64_t layer_count = 0;         // that are appended to: any of those, and new ones
  int64_t row_count = 0;
  int64_t q_len = 0;
};

struct LayerInfo {
  Geometry geometry;
  int64_t epoch = 0;
  int64_t begin = 0;
  std::vector<int64_t> lengths;
};

class Drive {
 public:
  explicit Drive(const DriveOptions& options);
  ~Drive();
  Drive(const Drive&) = delete;
  Drive& operator=(const Drive&) = delete;

  // Layers are numbered by the caller; one that already has the id is replaced. number: what the user calls
  // it, for errors to name.
  void create_layer(int64_t layer_id, const Geometry& geometry, int64_t number);
  void fork_layer(int64_t layer_id, int64_t source_id);
  void drop_layer(int64_t layer_id);
  // From now on the layer keeps summaries of the pages that it fills; of those that it has when they are
  // needed.
  void keep_summary(int64_t layer_id, SummaryKind kind);
  LayerInfo info(int64_t layer_id);
  Geometry geometry(int64_t layer_id);  // never changes, so it is still true after the call

  // All or nothing: after an error every row is as long as before. An empty layer takes row_count as its
  // batch. Returns the layer as this call left it, whatever other threads do next.
  LayerInfo append(int64_t layer_id, const AppendRequest& request);
  void truncate(int64_t layer_id, const std::vector<int64_t>& lengths);  // one for all rows, or one per row
  void trim(int64_t layer_id, int64_t begin);
  void reorder(int64_t layer_id, const std::vector<int64_t>& index);
  void flush();  // waits until every page on its way to the drive is there

  // epoch: of the view the caller holds; -1 takes the layer as it is now. Throws kStale when it has changed.
  void attend(int64_t layer_id, int64_t epoch, AttendRequest request);  // kv_begin -1: the first readable
  void attend_sparse(int64_t layer_id, int64_t epoch, AttendRequest request, const SparseRequest& sparse);
  // Begins to read what attend_sparse() would choose for these queries: a guess at those that come. Does
  // nothing while guesses at this layer's queries prove bad, or where it would have to read pages to choose.
  void prefetch(int64_t layer_id, int64_t epoch, AttendRequest request, const SparseRequest& sparse);
  void scores(int64_t layer_id, int64_t epoch, const ScoresRequest& request);
  void weighted_sum(int64_t layer_id, int64_t epoch, const WeightedSumRequest& request);
  void read(int64_t layer_id, int64_t epoch, const ReadRequest& request);

  // ---- pages that somebody outside works with (leases.cpp), a card for one. Leases are numbered by the
  // caller. ----

  // The full pages of a span, by row and index, each row's up to the first that may still change.
  std::vector<LeasedUse> lease(int64_t lease_id, int64_t layer_id, int64_t epoch, const Span& span);
  int64_t leased_page_bytes(int64_t lease_id);
  // Copies those of these pages of a lease that are in memory, each to its place in target; the others'
  // places are left as they are. Returns where each was.
  std::vector<LeasedPage> copy_leased(int64_t lease_id, const std::vector<int64_t>& places, uint8_t* target);
  // As append(), of more tokens: pages are reserved for them, and nothing else can be done to the layer until
  // they have their bytes.
  std::pair<LayerInfo, std::vector<LeasedUse>> append_reserved(int64_t lease_id, int64_t layer_id,
                                                               const AppendRequest& request);
  // Bytes of reserved pages that are in memory, one after another.
  void fill_reserved(int64_t lease_id, const std::vector<int64_t>& places, const uint8_t* source);
  // Reserved pages that have a place on the drive are there.
  void finish_reserved(int64_t lease_id, const std::vector<int64_t>& places,
                       const std::vector<int64_t>& checksums);
  // Idempotent. If reserved pages lack their bytes, the rows are as long as before the append.
  void end_lease(int64_t lease_id);

  // ---- what outlives the process (commit.cpp). A snapshot keeps the space of what a catalogue names. ----

  // Before anything is stored: the space that the sequences of the catalogue take. tables: their entries.
  // Returns the snapshots of those that overlap others: they keep their space, and must not be restored.
  std::vector<int64_t> adopt(const std::vector<int64_t>& snapshot_ids,
                             const std::vector<std::vector<PageEntry>>& tables);
  // A layer of a snapshot. Throws kCorrupt for a table that cannot be one.
  void restore_layer(int64_t layer_id, const Geometry& geometry, int64_t number, const LayerTable& table,
                     int64_t snapshot_id);
  // Everything that these layers hold is on the drive, for good, when this returns: their tables, to be put
  // into the catalogue. Space that the snapshot holds is not written to until it is released.
  std::vector<LayerTable> commit(int64_t snapshot_id, const std::vector<int64_t>& layer_ids);
  void release(int64_t snapshot_id);
  // Reads every page of a layer that is on the drive, and compares.
  std::vector<BadPage> verify(int64_t layer_id);
  int64_t shrink();  // gives the unused end of the file back; its bytes
  // Throws kNoSpace, with the numbers, when so many bytes of pages more cannot be stored.
  void check_room(int64_t bytes);
  // Throws kBudget, with the numbers, when an append of this must fail because memory cannot hold its
  // summaries. It may fail even so: what it needs in memory besides is not looked at.
  void check_summary_room(const SummaryRequest& request);
  int64_t durable_file_bytes() const { return durable_file_bytes_; }  // when it was opened
  int64_t file_bytes();                                               // now, once it has adopted

  // A queue of the drive's own engine over its file, for memory of others (slab_io.cpp). Takes no lock. It
  // must be closed before the drive goes.
  std::shared_ptr<SlabQueue> make_slab_queue(int64_t depth);
  // By which others of this process can open the same file, which may have no name: valid while the drive is
  // open.
  std::string reopen_path() const;

  std::string stats_json();

  // Once, when io_uring was refused in the middle of the run: what happened, for the user. Else empty. Asked
  // after every op, so it takes no lock.
  std::string take_warning() {
    if (engine_->fallback_reason() == nullptr || warned_.exchange(true)) return {};
    return fallback_warning();
  }

 private:
  // A page that an append put another in the place of, kept until the append is sure to stand.
  struct ReplacedPage {
    Row* row;
    int64_t index;
    Ref<Page> page;
  };

  // A page that has just been filled, and is to be summarised while it is in memory.
  struct NewPage {
    const Layer* layer;
    Row* row;
    int64_t index;
    const Page* page;
  };

  // How good guesses at a layer's queries are.
  struct Guesses {
    int64_t begun_bytes = 0;  // by the last one, until the layer's next pass
    double used_share = 1.0;  // of what they read: a mean in which each counts a quarter
    int skipped = 0;          // since the last one
  };

  Layer& find(int64_t layer_id);
  Layer& find_settled(int64_t layer_id);
  Lease& find_lease(int64_t lease_id);
  static LeasedPage describe(const Page& page);
  void check_reserved(const Layer& layer, const AppendRequest& request) const;
  void reserve_pages(const Layer& layer, Row* row, int64_t row_index, int64_t count, Lease* lease);
  std::vector<LeasedUse> hold_reserved(int64_t lease_id, Layer* layer, Lease lease);
  void note_arrived(Lease* lease, int64_t memory_bytes);
  static void truncate_row(const Layer& layer, Row* row, int64_t length);
  void open_file();
  static const Ref<Extent>& extent_at(const std::vector<Ref<Extent>>& extents, int64_t file_offset);
  void check_writable() const;
  static LayerInfo info_of(const Layer& layer);
  std::string fallback_warning() const;
  void check_process() const;
  Row new_row(const Geometry& geometry);
  Ref<Home> new_home(const Geometry& geometry);
  LayerInfo append_locked(Layer* layer, const AppendRequest& request, Lease* lease);
  void append_row(Layer* layer, Row* row, const AppendRequest& request, int64_t index, int64_t token_count,
                  std::vector<ReplacedPage>* replaced, Lease* lease);
  Ref<Page> new_page(const Row& row, const PageLayout& layout);
  const Ref<Page>& writable_tail(const Layer& layer, Row* row, std::vector<ReplacedPage>* replaced);
  void quantise_tails(Layer* layer, const std::vector<int64_t>& lengths_before,
                      std::vector<ReplacedPage>* replaced);
  void finish_packing();
  static int64_t first_tail_page(int64_t length);
  static int64_t summarised_end(const Layer& layer, const Row& row);
  void begin_summaries(const Layer& layer, Row* row);
  void make_summary_room(const Layer& layer, Row* row, int64_t index);
  void expect_summary(const Layer& layer, Row* row, int64_t index, const Page* page);
  SummaryBlock* summary_block(const Layer& layer, SummaryKind kind, RowSummary* summary, int64_t page_index);
  void summarise_new_pages();
  void finish_summaries(const Layer& layer);
  void catch_up(Layer* layer, const Span& span, SummaryKind kind);
  void catch_up_row(const Layer& layer, Row* row, int64_t row_index, SummaryKind kind);
  bool follows(const Layer& layer, SummaryKind kind) const;
  int64_t least_block_bytes(const SummaryShape& shape) const;
  int64_t summary_bytes() const;
  template <typename Visit>
  void visit_summaries(const Visit& visit) const;
  void make_room_for_tiles();
  void list_again(const Packer::Job& job);
  void write_behind(int64_t appended_bytes);
  int64_t write_window() const;
  int64_t staging_room(const Layer& layer, int64_t row_count) const;
  int64_t arena_bytes_max() const;
  void divide_budget(const Layer& layer, int64_t row_count);
  uint8_t* page_memory(int64_t page_bytes, const char* what = "another page");
  enum class Evicted : uint8_t { kNone, kWriting, kGone };
  Evicted evict_one(bool tails_too = true);
  void seal(const Ref<Page>& page);
  const uint8_t* page_image(const Layer& layer, const PageUse& use);
  int read_bytes(int64_t file_offset, int64_t byte_count, const uint8_t** bytes);
  void bring_back(const Layer& layer);
  static int64_t adjacent_pages(const Row& row, int64_t begin, int64_t* end);
  void settle_writes();
  void check_span(const Layer& layer, int64_t epoch, const Span& span) const;
  void check_mask(const Layer& layer, const AttendRequest& request) const;
  Layer& begin_attend(int64_t layer_id, int64_t epoch, AttendRequest* request);
  void note_missing(const AttendRequest& request, const SparseRequest& sparse);
  void note_guess(int64_t layer_id, int64_t used_bytes);
  PassContext context(PassKey pass);
  template <typename Request>
  void run_pass(PassKey key, int64_t epoch, const Request& request,
                void (*pass)(const PassContext&, const Layer&, const Request&));

  MemoryPool table_memory_;  // of pages and extents: outlives all of them
  Candidates candidates_{&table_memory_};
  const DriveOptions options_;
  const pid_t process_;
  const Kernels& kernels_;
  OpenedFile file_;
  std::unique_ptr<IoEngine> engine_;
  std::atomic<bool> warned_{false};  // that it fell back
  std::unique_ptr<Arena> arena_;
  std::unique_ptr<FileSpace> space_;
  int64_t scratch_bytes_max_ = 0;
  int64_t staging_bytes_limit_ = std::numeric_limits<int64_t>::max();  // what was tried for more in vain
  ThreadPool pool_;
  std::unique_ptr<PageStream> stream_;
  std::unique_ptr<Writer> writer_;
  std::unique_ptr<Packer> packer_;
  std::unique_ptr<TileCache> tiles_;
  std::unique_ptr<IoQueue> page_queue_;  // for single pages read back into the tail
  AlignedBuffer page_image_;             // what it reads into
  iovec page_segment_{};
  AlignedBuffer scratch_;

  FairMutex mutex_;  // of everything here
  std::map<int64_t, Layer> layers_;
  ReadAhead ahead_{&layers_};

  std::map<int64_t, std::vector<Ref<Extent>>> snapshots_;  // each by file offset
  int64_t durable_file_bytes_ = 0;
  bool sync_failed_ = false;  // no later one can be trusted

  std::vector<NewPage> new_pages_;                                       // of the append that runs
  std::array<std::vector<SummaryBlock*>, kSummaryKinds> filled_blocks_;  // by it
  AlignedBuffer summary_scratch_;

  std::map<int64_t, Lease> leases_;
  int64_t arriving_memory_bytes_ = 0;  // of pages in memory that lack their bytes
  int64_t leased_copy_bytes_ = 0;

  std::map<int64_t, Guesses> guesses_;
  int64_t guessed_bytes_ = 0;
  int64_t guessed_used_bytes_ = 0;

  int64_t brought_back_bytes_ = 0;
  int64_t attend_calls_ = 0;
  int64_t sparse_attends_ = 0;
  double missing_sum_ = 0.0;  // of the estimated shares of what was left out, one for each query and head
  int64_t missing_count_ = 0;
  float missing_max_ = 0.0f;
  int64_t appended_tokens_ = 0;
  int64_t tail_spills_ = 0;  // tails that had to leave memory
  bool arena_full_ = false;  // an append had to make room since the last one began
};

}  // namespace csd
