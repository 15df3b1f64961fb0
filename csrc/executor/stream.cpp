#include "executor/stream.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <limits>
#include <optional>

#include "base/checksum.h"
#include "base/error.h"
#include "base/mapped_memory.h"
#include "executor/faults.h"

namespace csd {
namespace {

constexpr int64_t kReadBytes = int64_t{1}
                               << 20;  // where this class of drives reaches its rate, see torch-csd bench io
constexpr int64_t kWakeBytes = int64_t{512}
                               << 10;  // arithmetic on less than this is over before a thread wakes
constexpr int64_t kDepthMax = 1024;    // of one worker's queue

// Reads of chosen tiles are of some 10 to 64 KiB. A slot each, they would leave most of the staging memory
// empty, so that few of them could be on their way while the next ones are chosen.
constexpr int kPartsPerSlot = 32;  // bits of what says which are free
constexpr int64_t kSplitSlotsMax = 64;

constexpr uint32_t part_bits(int count) { return static_cast<uint32_t>((uint64_t{1} << count) - 1); }

// Reads in flight beside other work. A virtio drive's ring has 256 places: who submits more than it holds
// waits until there are (1016 reads of 32 KiB at once took 14 ms to submit). Small reads take the drive 20 us
// each.
constexpr int kAheadInFlightMax = 192;

// Memory pages a worker takes at once. What is fetched ahead ends with them, so the first tile of every claim
// comes from memory at a fifth of the rate; the last claims bound how long workers wait for one another.
constexpr int64_t kPagesPerClaim = 4;  // at least; and beside reads from the drive, reaped between claims
constexpr int64_t kPagesPerClaimMax = 16;
constexpr int64_t kClaimsPerWorker = 16;

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace

// A place in the staging memory. Its worker's thread changes it while it is in flight, whoever took it
// otherwise.
struct PageStream::Slot {
  enum class State : uint8_t { kFree, kInFlight, kLanded };
  enum class Role : uint8_t {
    kNeeded,     // by the pass that runs
    kAhead,      // by one that follows
    kDiscarded,  // by nobody; free as soon as it lands
  };
  State state = State::kFree;
  Role role = Role::kNeeded;
  bool read_ahead = false;  // before the pass that needs it
  bool retried = false;
  int part_count = 0;
  int worker = 0;  // whose queue reads into it
  int64_t file_offset = 0;
  int64_t bytes = 0;
  int64_t used_bytes = 0;  // of what was read ahead
  int64_t use_begin = 0;   // of the plan that needs it
  int64_t use_end = 0;
  iovec segment{};
  std::vector<Ref<Extent>> extents;  // so that what was read ahead stays what the drive holds
};

struct PageStream::Worker {
  int number = 0;
  std::unique_ptr<IoQueue> queue;
  std::vector<IoCompletion> completions;
  int needed = 0;     // slots in flight that the pass waits for
  int discarded = 0;  // slots in flight that will be free
  // Kept until the pass ends: the last to let go gives space back, which only the calling thread may.
  std::vector<Ref<Extent>> extents;
};

struct PageStream::Pass {
  const Plan* plan = nullptr;
  const Plan* next = nullptr;
  int worker_count = 0;
  int64_t pages_per_claim = 0;
  PageConsumer* consumer = nullptr;
  std::atomic<int64_t> next_read{0};
  std::atomic<int64_t> next_ahead{0};
  std::atomic<int64_t> next_memory_use{0};
  std::atomic<bool> failed{false};
  std::mutex mutex;
  std::optional<Error> error;  // the first

  bool reads() const { return !plan->drive_uses.empty(); }
  int64_t read_count() const { return static_cast<int64_t>(plan->reads.size()); }
  int64_t ahead_count() const { return next == nullptr ? 0 : static_cast<int64_t>(next->reads.size()); }

  void fail(const Error& reason) {
    std::lock_guard<std::mutex> lock(mutex);
    if (!error) error = reason;
    failed = true;
  }
};

PageStream::PageStream(IoEngine* engine, int fd, std::string path, ThreadPool* pool, int queue_depth,
                       int64_t staging_bytes, bool checksums)
    : engine_(engine),
      fd_(fd),
      path_(std::move(path)),
      queue_depth_(queue_depth),
      checksums_(checksums),
      staging_bytes_(staging_bytes),
      pool_(*pool) {
  const int64_t share = staging_bytes_ / pool_.worker_count() / 2;
  fit(std::max(kBlockBytes, std::min(kReadBytes, share) / kBlockBytes * kBlockBytes));
}

PageStream::~PageStream() {
  workers_.clear();  // their queues wait for reads in flight before the staging memory goes
  if (staging_ != nullptr) unmap_memory(staging_, staging_bytes_);
}

// ---- slots ----

// Slots only grow, so that layers of different page sizes do not take turns at losing what was read ahead.
void PageStream::fit(int64_t page_bytes) {
  if (page_bytes <= slot_bytes_) return;
  CSD_CHECK(2 * page_bytes <= staging_bytes_, "the staging memory does not hold two pages");
  drain();
  divide(page_bytes);
}

void PageStream::resize(int64_t staging_bytes) {
  CSD_CHECK(2 * slot_bytes_ <= staging_bytes, "the staging memory does not hold two pages");
  drain();
  workers_.clear();  // their queues know the memory
  if (staging_ != nullptr) unmap_memory(staging_, staging_bytes_);
  staging_ = nullptr;
  staging_bytes_ = staging_bytes;
  divide(slot_bytes_);
}

void PageStream::divide(int64_t slot_bytes) {
  slot_bytes_ = slot_bytes;
  part_bytes_ = slot_bytes_ / kPartsPerSlot / kBlockBytes * kBlockBytes;
  const int64_t split_count = part_bytes_ > 0 ? std::min(whole_count(), kSplitSlotsMax) : 0;
  slots_ = std::vector<Slot>(static_cast<size_t>(whole_count() + split_count * (kPartsPerSlot - 1)));
  free_parts_.assign(static_cast<size_t>(split_count), part_bits(kPartsPerSlot));
  free_.clear();
  for (int whole = 0; whole < static_cast<int>(whole_count()); ++whole) free_.push_back(whole);
  partly_free_.clear();
  landed_.clear();
  landed_.reserve(slots_.size());
}

int64_t PageStream::read_bytes_max(int64_t page_bytes) const {
  return std::max(page_bytes, slot_bytes_ / page_bytes * page_bytes);
}

// Maps the memory and makes the queues of the first worker_count workers.
void PageStream::prepare(int worker_count) {
  if (staging_ == nullptr) staging_ = map_memory(staging_bytes_, "reads in flight");
  // A worker's share of the slots as they are now: larger slots are fewer.
  const auto share = static_cast<int64_t>(slots_.size()) / std::max(1, pool_.worker_count());
  const auto depth = static_cast<int>(std::clamp<int64_t>(share, 3, kDepthMax));
  while (static_cast<int>(workers_.size()) < worker_count) {
    auto worker = std::make_unique<Worker>();
    worker->number = static_cast<int>(workers_.size());
    worker->queue = engine_->make_queue(fd_, depth, {iovec{staging_, static_cast<size_t>(staging_bytes_)}});
    workers_.push_back(std::move(worker));
  }
}

// Slots are numbered by their first part; those of whole slots that are never split follow.
int PageStream::whole_of(int slot) const {
  const auto split_count = static_cast<int>(free_parts_.size());
  const int first_unsplit = split_count * kPartsPerSlot;
  return slot < first_unsplit ? slot / kPartsPerSlot : split_count + slot - first_unsplit;
}

int PageStream::first_slot_of(int whole) const {
  const auto split_count = static_cast<int>(free_parts_.size());
  return whole < split_count ? whole * kPartsPerSlot : split_count * (kPartsPerSlot - 1) + whole;
}

uint8_t* PageStream::memory_of(int slot) const {
  const int whole = whole_of(slot);
  return staging_ + slot_bytes_ * whole + (slot - first_slot_of(whole)) * part_bytes_;
}

// A slot for a read of so many bytes; -1: there is no room for it.
int PageStream::take_free(int64_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  const int64_t parts = part_bytes_ > 0 ? (bytes + part_bytes_ - 1) / part_bytes_ : kPartsPerSlot;
  if (parts < kPartsPerSlot) {
    for (size_t i = 0; i < partly_free_.size(); ++i) {
      const int slot = take_parts(partly_free_[i], static_cast<int>(parts));
      if (slot < 0) continue;
      if (free_parts_[static_cast<size_t>(partly_free_[i])] == 0) {
        partly_free_[i] = partly_free_.back();
        partly_free_.pop_back();
      }
      return slot;
    }
    for (size_t i = 0; i < free_.size(); ++i) {
      const int whole = free_[i];
      if (whole >= static_cast<int>(free_parts_.size())) continue;
      free_.erase(free_.begin() + static_cast<int64_t>(i));
      partly_free_.push_back(whole);
      return take_parts(whole, static_cast<int>(parts));
    }
  }
  if (free_.empty()) return -1;
  const int whole = free_.back();
  free_.pop_back();
  if (whole < static_cast<int>(free_parts_.size())) free_parts_[static_cast<size_t>(whole)] = 0;
  const int slot = first_slot_of(whole);
  slots_[static_cast<size_t>(slot)].part_count = kPartsPerSlot;
  return slot;
}

// Neighbouring parts of one that is split.
int PageStream::take_parts(int whole, int count) {
  uint32_t& free_parts = free_parts_[static_cast<size_t>(whole)];
  uint32_t begins = free_parts;  // of so many that are free
  for (int i = 1; i < count && begins != 0; ++i) begins &= free_parts >> i;
  if (begins == 0) return -1;
  const int first = __builtin_ctz(begins);
  free_parts &= ~(part_bits(count) << first);
  const int slot = first_slot_of(whole) + first;
  slots_[static_cast<size_t>(slot)].part_count = count;
  return slot;
}

int PageStream::take_landed() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (landed_.empty()) return -1;
  const int slot = landed_.back();
  landed_.pop_back();
  return slot;
}

// During a pass its extents stay.
void PageStream::release(int slot) {
  Slot& gone = slots_[static_cast<size_t>(slot)];
  gone.state = Slot::State::kFree;
  const int whole = whole_of(slot);
  std::lock_guard<std::mutex> lock(mutex_);
  if (whole < static_cast<int>(free_parts_.size())) {
    uint32_t& free_parts = free_parts_[static_cast<size_t>(whole)];
    const bool was_listed = free_parts != 0;
    free_parts |= part_bits(gone.part_count) << (slot - first_slot_of(whole));
    const bool lists = free_parts != part_bits(kPartsPerSlot);
    if (lists && !was_listed) partly_free_.push_back(whole);
    if (!lists && was_listed) {
      partly_free_.erase(std::find(partly_free_.begin(), partly_free_.end(), whole));
    }
    if (lists) return;
  }
  free_.push_back(whole);
}

// What was read ahead and will not be used. Not during a pass.
void PageStream::discard(int slot) {
  Slot& gone = slots_[static_cast<size_t>(slot)];
  counters_.read_ahead_wasted_bytes += gone.bytes;
  gone.extents.clear();
  if (gone.state == Slot::State::kInFlight) {
    gone.role = Slot::Role::kDiscarded;
    workers_[static_cast<size_t>(gone.worker)]->discarded++;
  } else {
    release(slot);
  }
}

// Empties the staging memory.
void PageStream::drain() {
  for (const std::unique_ptr<Worker>& worker : workers_) {
    while (worker->queue->in_flight() > 0) reap(worker.get(), true, nullptr);
  }
  for (size_t slot = 0; slot < slots_.size(); ++slot) {
    if (slots_[slot].state != Slot::State::kFree) discard(static_cast<int>(slot));
  }
}

std::vector<StagedRun>* PageStream::staged() {
  staged_.clear();
  for (const std::unique_ptr<Worker>& worker : workers_) {
    if (worker->queue->in_flight() > 0) reap(worker.get(), false, nullptr);
  }
  for (size_t slot = 0; slot < slots_.size(); ++slot) {
    const Slot& run = slots_[slot];
    if (run.state == Slot::State::kFree || run.role != Slot::Role::kAhead) continue;
    staged_.push_back({run.file_offset, run.bytes, static_cast<int>(slot), false});
  }
  std::sort(staged_.begin(), staged_.end(),
            [](const StagedRun& a, const StagedRun& b) { return a.file_offset < b.file_offset; });
  return &staged_;
}

void PageStream::release_unused() {
  std::vector<const Ref<Extent>*> held;
  for (const Slot& run : slots_) {
    if (run.state == Slot::State::kFree || run.role != Slot::Role::kAhead) continue;
    for (const Ref<Extent>& extent : run.extents) held.push_back(&extent);
  }
  if (held.empty()) return;
  const auto by_extent = [](const auto* a, const auto* b) { return a->get() < b->get(); };
  std::sort(held.begin(), held.end(), by_extent);
  std::vector<const Extent*> unused;
  for (size_t i = 0; i < held.size();) {
    size_t end = i;
    while (end < held.size() && held[end]->get() == held[i]->get()) end++;
    if (held[i]->use_count() == static_cast<int64_t>(end - i)) unused.push_back(held[i]->get());
    i = end;
  }
  if (unused.empty()) return;
  for (size_t slot = 0; slot < slots_.size(); ++slot) {
    const Slot& run = slots_[slot];
    if (run.state == Slot::State::kFree || run.role != Slot::Role::kAhead) continue;
    if (std::any_of(run.extents.begin(), run.extents.end(), [&](const Ref<Extent>& extent) {
          return std::binary_search(unused.begin(), unused.end(), extent.get());
        })) {
      discard(static_cast<int>(slot));
    }
  }
}

// ---- reads ----

void PageStream::start(Worker* worker, int slot, const ReadRun& run) {
  Slot& target = slots_[static_cast<size_t>(slot)];
  target.state = Slot::State::kInFlight;
  target.worker = worker->number;
  target.file_offset = run.file_offset;
  target.bytes = run.bytes;
  target.segment = {memory_of(slot), static_cast<size_t>(run.bytes)};
  IoRequest request;
  request.file_offset = run.file_offset;
  request.segments = &target.segment;
  request.segment_count = 1;
  request.tag = static_cast<uint64_t>(slot);
  request.background = target.role == Slot::Role::kAhead;
  try {
    worker->queue->submit(request);
  } catch (...) {
    if (target.role == Slot::Role::kNeeded) worker->needed--;
    release(slot);
    throw;
  }
  counters_.drive_read_bytes += run.bytes;
}

// Starts the next read of the pass, or the next one ahead of it. False when there is nothing to start, or no
// slot.
bool PageStream::start_one(Worker* worker, Pass* pass) {
  for (;;) {
    int64_t index = pass->next_read;
    const bool needed = index < pass->read_count();
    if (!needed) index = pass->next_ahead;
    if (!needed && index >= pass->ahead_count()) return false;
    const Plan& plan = needed ? *pass->plan : *pass->next;
    const ReadRun& run = plan.reads[static_cast<size_t>(index)];
    // Whoever has a slot claims a run, never the other way round: no run waits for a worker without slots.
    const int slot = take_free(run.bytes);
    if (slot < 0) return false;
    if (!(needed ? pass->next_read : pass->next_ahead).compare_exchange_strong(index, index + 1)) {
      release(slot);  // another worker was faster
      continue;
    }
    Slot& target = slots_[static_cast<size_t>(slot)];
    target.read_ahead = false;
    target.retried = false;
    if (needed) {
      target.role = Slot::Role::kNeeded;
      target.use_begin = run.use_begin;
      target.use_end = run.use_end;
      worker->needed++;
    } else {
      target.role = Slot::Role::kAhead;
      for (Ref<Extent>& extent : target.extents) worker->extents.push_back(std::move(extent));
      target.extents.clear();
      for (int64_t i = run.use_begin; i < run.use_end; ++i) {
        const Ref<Extent>& extent = plan.drive_uses[static_cast<size_t>(i)].page->extent;
        if (target.extents.empty() || target.extents.back() != extent) target.extents.push_back(extent);
      }
    }
    start(worker, slot, run);
    return true;
  }
}

void PageStream::fill(Worker* worker, Pass* pass, int in_flight_max) {
  while (!pass->failed && worker->queue->in_flight() < in_flight_max && start_one(worker, pass)) {
  }
}

// pass: null between passes.
void PageStream::reap(Worker* worker, bool wait, Pass* pass) {
  worker->completions.clear();
  worker->queue->reap(wait, &worker->completions);
  for (const IoCompletion& completion : worker->completions) {
    land(worker, static_cast<int>(completion.tag), completion.error, pass);
  }
}

void PageStream::land(Worker* worker, int slot, int error, Pass* pass) {
  Slot& run = slots_[static_cast<size_t>(slot)];
  run.state = Slot::State::kLanded;
  switch (run.role) {
    case Slot::Role::kDiscarded:
      worker->discarded--;
      release(slot);
      return;
    case Slot::Role::kAhead:
      // Not an error: whoever needs these pages will read them, and fail if that fails too.
      if (error != 0) {
        counters_.read_ahead_wasted_bytes += run.bytes;
        if (pass == nullptr) run.extents.clear();
        release(slot);
      }
      return;
    case Slot::Role::kNeeded:
      break;
  }
  CSD_CHECK(pass != nullptr, "a read that a pass needs landed after it");
  worker->needed--;
  // What failed while nobody needed it, or because of the medium, may succeed the second time.
  if (error != 0 && (run.read_ahead || error == EIO) && !run.retried && !pass->failed) {
    if (run.read_ahead) counters_.read_ahead_wasted_bytes += run.bytes;
    run.read_ahead = false;
    run.retried = true;
    worker->needed++;
    try {
      start(worker, slot, {run.file_offset, run.bytes, run.use_begin, run.use_end});
    } catch (const Error& refused) {
      pass->fail(refused);  // not thrown: others landed with it
    }
    return;
  }
  if (error != 0) {
    pass->fail(unreadable_pages(path_, pass->plan->layer, pass->plan->drive_uses.data() + run.use_begin,
                                run.use_end - run.use_begin, run.file_offset, error));
  }
  if (pass->failed) {
    release(slot);
    return;
  }
  std::lock_guard<std::mutex> lock(mutex_);
  landed_.push_back(slot);
}

// ---- passes ----

void PageStream::run(const Plan& plan, const Plan* next, int64_t page_bytes, int64_t compute_weight,
                     int worker_count_max, PageConsumer* consumer) {
  const auto memory_uses = static_cast<int64_t>(plan.memory_uses.size());
  const auto drive_uses = static_cast<int64_t>(plan.drive_uses.size());
  if (memory_uses == 0 && drive_uses == 0) return;
  int64_t pass_bytes = plan.read_bytes;
  for (const StagedUse& use : plan.staged) pass_bytes += use.bytes;
  widest_pass_bytes_ = std::max(widest_pass_bytes_, pass_bytes);
  const int64_t weight = (memory_uses + drive_uses) * page_bytes * compute_weight;
  auto worker_count = static_cast<int>(std::clamp<int64_t>(1 + weight / kWakeBytes, 1, worker_count_max));
  // A worker needs two slots, so that the drive works while it computes.
  if (drive_uses > 0) worker_count = std::min(worker_count, static_cast<int>(whole_count() / 2));
  Pass pass;
  pass.plan = &plan;
  pass.next = next;
  pass.worker_count = worker_count;
  pass.pages_per_claim = drive_uses > 0 ? kPagesPerClaim
                                        : std::clamp<int64_t>(memory_uses / (worker_count * kClaimsPerWorker),
                                                              kPagesPerClaim, kPagesPerClaimMax);
  pass.consumer = consumer;
  if (!pass.reads()) {
    pool_.compute(worker_count, [&](int number) { this->work(number, &pass); });
  } else {
    begin(&pass);
    try {
      pool_.run(worker_count, [&](int number) { this->work(number, &pass); });
      CSD_CHECK(pass.failed || pass.next_read >= pass.read_count(), "a pass ended before its reads began");
    } catch (...) {
      pass.failed = true;
      end(&pass);
      throw;
    }
    end(&pass);
    if (pass.error) throw *pass.error;
  }
  counters_.resident_read_bytes += plan.memory_bytes;
}

// Gives the staged slots to the pass, or to the next, or lets them go.
void PageStream::begin(Pass* pass) {
  prepare(pass->worker_count);
  std::vector<uint8_t> stays(slots_.size(), 0);
  for (const StagedUse& use : pass->plan->staged) {
    Slot& slot = slots_[static_cast<size_t>(use.slot)];
    stays[static_cast<size_t>(use.slot)] = 1;
    slot.role = Slot::Role::kNeeded;
    slot.read_ahead = true;
    slot.used_bytes = use.bytes;
    slot.use_begin = use.use_begin;
    slot.use_end = use.use_end;
    if (slot.state == Slot::State::kLanded) {
      landed_.push_back(use.slot);
    } else {
      workers_[static_cast<size_t>(slot.worker)]->needed++;
    }
  }
  if (pass->next != nullptr) {
    // The pass comes first: what stays for the next may not take the slots that it reads through. (One part
    // takes all of the slot from a large read.)
    auto spare = whole_count();
    if (pass->read_count() > 0) spare -= std::min<int64_t>(spare, 2 * pass->worker_count);
    std::vector<uint8_t> occupied(static_cast<size_t>(whole_count()), 0);
    for (const StagedUse& use : pass->next->staged) {
      uint8_t& whole = occupied[static_cast<size_t>(whole_of(use.slot))];
      if (whole == 0 && spare == 0) continue;
      spare -= whole == 0 ? 1 : 0;
      whole = 1;
      stays[static_cast<size_t>(use.slot)] = 1;
    }
  }
  for (size_t slot = 0; slot < slots_.size(); ++slot) {
    const bool ahead = slots_[slot].state != Slot::State::kFree && slots_[slot].role == Slot::Role::kAhead;
    if (ahead && stays[slot] == 0) discard(static_cast<int>(slot));
  }
}

// Leaves nothing in flight that belongs to the pass, and the staging memory full of what comes next.
void PageStream::end(Pass* pass) {
  if (pass->failed) {
    landed_.clear();
    for (size_t slot = 0; slot < slots_.size(); ++slot) {
      if (slots_[slot].state == Slot::State::kFree || slots_[slot].role != Slot::Role::kNeeded) continue;
      if (slots_[slot].state == Slot::State::kInFlight) {
        workers_[static_cast<size_t>(slots_[slot].worker)]->needed--;
        slots_[slot].role = Slot::Role::kDiscarded;
        workers_[static_cast<size_t>(slots_[slot].worker)]->discarded++;
      } else {
        release(static_cast<int>(slot));
      }
    }
  }
  for (Slot& slot : slots_) {
    if (slot.state == Slot::State::kFree || slot.role != Slot::Role::kAhead) slot.extents.clear();
  }
  for (const std::unique_ptr<Worker>& worker : workers_) worker->extents.clear();
  if (!pass->failed) start_ahead(pass, std::numeric_limits<int>::max());
}

// Reads ahead, on the queues of all workers of a pass in turn, until so many are in flight. Not during it.
void PageStream::start_ahead(Pass* pass, int in_flight_max) {
  try {
    int in_flight = 0;
    for (int number = 0; number < pass->worker_count; ++number) {
      in_flight += workers_[static_cast<size_t>(number)]->queue->in_flight();
    }
    for (bool any = true; any;) {
      any = false;
      for (int number = 0; number < pass->worker_count && in_flight < in_flight_max; ++number) {
        Worker* worker = workers_[static_cast<size_t>(number)].get();
        if (worker->queue->in_flight() == worker->queue->depth() || !start_one(worker, pass)) continue;
        any = true;
        in_flight++;
      }
    }
  } catch (const Error&) {
    // Whoever needs what was to be read will read it, and fail if that fails too.
    for (Slot& slot : slots_) {
      if (slot.state == Slot::State::kFree) slot.extents.clear();
    }
  }
}

int64_t PageStream::read_ahead(const Plan& plan, int64_t first) {
  const Plan nothing;
  Pass pass;
  pass.plan = &nothing;
  pass.next = &plan;
  pass.next_ahead = first;
  pass.worker_count = pool_.worker_count();
  if (first >= pass.ahead_count()) return first;
  prepare(pass.worker_count);
  for (const std::unique_ptr<Worker>& worker : workers_) {
    if (worker->queue->in_flight() > 0) reap(worker.get(), false, nullptr);
  }
  start_ahead(&pass, kAheadInFlightMax);
  for (const std::unique_ptr<Worker>& worker : workers_) worker->extents.clear();
  return pass.next_ahead;
}

bool PageStream::intact(const PageUse& use, const uint8_t* bytes, Pass* pass) const {
  const Page& page = *use.page;
  if (use.whole()) {
    const uint32_t found = crc32c(bytes, page.page_bytes());
    if (found == page.checksum) return true;
    pass->fail(damaged_page(path_, pass->plan->layer, use, {0, page.page_bytes(), found, page.checksum}));
    return false;
  }
  if (use.checksums == nullptr) return true;
  const int64_t tile_bytes = use.bytes() / use.tile_count;
  for (int64_t i = 0; i < use.tile_count; ++i) {
    const uint32_t found = crc32c(bytes + i * tile_bytes, tile_bytes);
    if (found == use.checksums[i]) continue;
    const Mismatch mismatch{use.begin + i * tile_bytes, tile_bytes, found, use.checksums[i]};
    pass->fail(damaged_page(path_, pass->plan->layer, use, mismatch));
    return false;
  }
  return true;
}

void PageStream::consume(int number, int slot, Pass* pass) {
  const Slot& run = slots_[static_cast<size_t>(slot)];
  const uint8_t* bytes = memory_of(slot);
  const Page* checked = nullptr;  // rows that share a page use it one after another
  for (int64_t i = run.use_begin; i < run.use_end && !pass->failed; ++i) {
    const PageUse& use = pass->plan->drive_uses[static_cast<size_t>(i)];
    const uint8_t* needed = bytes + (use.page->file_offset + use.begin - run.file_offset);
    // Just before it is computed on, so that it comes from memory once.
    if (checksums_ && use.page != checked && !intact(use, needed, pass)) break;
    checked = use.whole() ? use.page : nullptr;
    pass->consumer->consume(number, use, needed);
  }
  if (run.read_ahead) {
    counters_.read_ahead_bytes += run.used_bytes;
    counters_.read_ahead_wasted_bytes += run.bytes - run.used_bytes;
  }
  release(slot);
}

// One worker of a pass. It keeps its queue reading, and computes on what has landed, or on pages in memory.
// Queues of workers that do not take part (the pass is a small one) are shared out.
void PageStream::work(int number, Pass* pass) {
  const Plan& plan = *pass->plan;
  const auto memory_count = static_cast<int64_t>(plan.memory_uses.size());
  const int in_flight_max = std::max(2, queue_depth_ / pool_.worker_count());
  int in_flight_limit = 0;
  const bool reads = pass->reads();
  const int64_t start_ns = now_ns();
  int64_t wait_ns = 0;
  try {
    for (;;) {
      if (reads) {
        Worker* own = workers_[static_cast<size_t>(number)].get();
        in_flight_limit = std::min(in_flight_max, own->queue->depth());
        fill(own, pass, in_flight_limit);
        for (size_t i = static_cast<size_t>(number); i < workers_.size();
             i += static_cast<size_t>(pass->worker_count)) {
          if (workers_[i]->queue->in_flight() > 0) reap(workers_[i].get(), false, pass);
        }
        // What has landed first: its slot goes back to reading.
        const int slot = take_landed();
        if (slot >= 0) {
          fill(own, pass, in_flight_limit);
          consume(number, slot, pass);
          continue;
        }
      }
      const int64_t memory_use =
          pass->failed ? memory_count
                       : pass->next_memory_use.fetch_add(pass->pages_per_claim, std::memory_order_relaxed);
      for (int64_t i = memory_use; i < std::min(memory_use + pass->pages_per_claim, memory_count); ++i) {
        const PageUse& use = plan.memory_uses[static_cast<size_t>(i)];
        pass->consumer->consume(number, use, use.memory());
      }
      if (memory_use < memory_count) continue;
      if (!reads) break;
      // Nothing to compute on: wait for a read of the pass, or for a slot to start one with.
      const bool wants_slot = !pass->failed && pass->next_read < pass->read_count();
      Worker* waits_for = nullptr;
      for (size_t i = static_cast<size_t>(number); i < workers_.size() && waits_for == nullptr;
           i += static_cast<size_t>(pass->worker_count)) {
        Worker* worker = workers_[i].get();
        if (worker->queue->in_flight() == 0) continue;
        // Reads ahead may fill the queue that a read of the pass has to go through. (Where they landed since
        // this worker last tried to start one, it tries again below.)
        const bool crowded = worker->number == number && worker->queue->in_flight() >= in_flight_limit;
        if (worker->needed > 0 || (wants_slot && (worker->discarded > 0 || crowded))) waits_for = worker;
      }
      if (waits_for == nullptr) {
        if (wants_slot && start_one(workers_[static_cast<size_t>(number)].get(), pass)) continue;
        break;
      }
      const int64_t wait_start_ns = now_ns();
      reap(waits_for, true, pass);
      wait_ns += now_ns() - wait_start_ns;
    }
  } catch (...) {
    pass->failed = true;
    throw;
  }
  counters_.io_wait_ns += wait_ns;
  counters_.compute_ns += now_ns() - start_ns - wait_ns;
}

}  // namespace csd
