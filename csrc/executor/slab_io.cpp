#include "executor/slab_io.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

#include "base/error.h"
#include "executor/drive.h"
#include "store/format.h"

namespace csd {
namespace {

constexpr int kDepthMax = 4096;

std::string text(int64_t value) { return std::to_string(value); }

void check_aligned(int64_t value, const char* what) {
  if (value % kBlockBytes == 0) return;
  throw Error(ErrorKind::kValue,
              std::string(what) + " must be a multiple of " + text(kBlockBytes) + ", got " + text(value));
}

}  // namespace

SlabQueue::SlabQueue(std::unique_ptr<IoQueue> queue, int fd, std::string path, bool writable)
    : process_(getpid()), fd_(fd), path_(std::move(path)), writable_(writable), queue_(std::move(queue)) {
  flights_.resize(static_cast<size_t>(queue_->depth()));
  for (size_t slot = flights_.size(); slot-- > 0;) free_slots_.push_back(slot);
}

SlabQueue::~SlabQueue() { close(); }

void SlabQueue::submit(const SlabRequest& request, Owner owner) {
  check_open();
  std::lock_guard<std::mutex> lock(mutex_);
  check_open();
  check_range(request);
  CSD_CHECK(!free_slots_.empty(), "more than the queue's depth of " +
                                      text(static_cast<int64_t>(flights_.size())) + " requests in flight");
  const uint64_t slot = free_slots_.back();
  Flight& flight = flights_[slot];
  flight.request = request;
  flight.segment = {request.memory, static_cast<size_t>(request.byte_count)};
  flight.retried = false;
  begin(slot);
  flight.owner = std::move(owner);
  free_slots_.pop_back();
}

std::vector<SlabCompletion> SlabQueue::reap(bool wait) {
  check_open();
  std::vector<Owner> owners;  // let go of without the lock: what they own may run code of its own as it goes
  std::vector<SlabCompletion> done;
  std::lock_guard<std::mutex> lock(mutex_);
  check_open();
  while (queue_->in_flight() > 0) {
    completions_.clear();
    queue_->reap(wait, &completions_);
    for (const IoCompletion& completion : completions_) {
      Flight& flight = flights_[completion.tag];
      if (completion.error == EIO && !std::exchange(flight.retried, true)) {
        try {
          begin(completion.tag);  // the medium may give or take it the second time
          continue;
        } catch (const Error&) {
          // Not even asked: as if it had not.
        }
      }
      done.push_back({flight.request.tag, completion.error});
      owners.push_back(std::move(flight.owner));
      free_slots_.push_back(completion.tag);
    }
    if (!wait || !done.empty()) break;
  }
  return done;
}

void SlabQueue::close() {
  std::vector<Flight> flights;  // as in reap()
  if (getpid() != process_) {
    // The ring and the engine's threads are not in this process, and the lock may be held by a thread that is
    // not either.
    static_cast<void>(queue_.release());
    return;
  }
  std::lock_guard<std::mutex> lock(mutex_);
  queue_.reset();
  flights = std::exchange(flights_, {});
  free_slots_.clear();
}

void SlabQueue::check_open() const {
  if (getpid() != process_) {
    throw Error(ErrorKind::kForked, "this I/O queue was opened in process " + text(process_) +
                                        " and is used in its child " + text(getpid()) +
                                        "; open a store in the child instead");
  }
  if (queue_ == nullptr) {
    throw Error(ErrorKind::kClosed, path_ + ": this I/O queue, or its store, is closed; open a new one");
  }
}

void SlabQueue::check_range(const SlabRequest& request) const {
  check_aligned(request.file_offset, "file_offset");
  check_aligned(request.byte_count, "byte_count");
  check_aligned(static_cast<int64_t>(reinterpret_cast<uintptr_t>(request.memory)), "the memory's address");
  if (request.write && !writable_) {
    throw Error(ErrorKind::kStore,
                path_ + ": opened to be read only; open it without read_only to write to it");
  }
  struct stat info {};
  if (fstat(fd_, &info) != 0) throw io_error(path_, "looking at the file", errno);
  if (request.byte_count <= 0 || request.file_offset < kDataOffset ||
      request.byte_count > info.st_size - request.file_offset) {
    throw Error(ErrorKind::kValue, path_ + ": pages lie in bytes " + text(kDataOffset) + " to " +
                                       text(info.st_size) + ", got " + text(request.byte_count) +
                                       " bytes from " + text(request.file_offset) + " on");
  }
}

void SlabQueue::begin(uint64_t slot) {
  const Flight& flight = flights_[slot];
  IoRequest io;
  io.op = flight.request.write ? IoOp::kWrite : IoOp::kRead;
  io.file_offset = flight.request.file_offset;
  io.segments = &flight.segment;
  io.segment_count = 1;
  io.tag = slot;
  queue_->submit(io);
}

std::shared_ptr<SlabQueue> Drive::make_slab_queue(int64_t depth) {
  check_process();
  if (depth < 1 || depth > kDepthMax) {
    throw Error(ErrorKind::kValue, "depth must be from 1 to " + text(kDepthMax) + ", got " + text(depth));
  }
  const bool writable = options_.durable_path.empty() || options_.durable_mode != DurableMode::kReadOnly;
  return std::make_shared<SlabQueue>(engine_->make_queue(file_.fd, static_cast<int>(depth), {}), file_.fd,
                                     file_.path, writable);
}

std::string Drive::reopen_path() const {
  check_process();
  return "/proc/self/fd/" + text(file_.fd);
}

}  // namespace csd
