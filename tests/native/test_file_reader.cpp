// FileReader over a queue whose requests complete when this file says so: what is read in which order, what
// is tried again, what is told to whom, and how long memory is kept. Plain program: exits non-zero on the
// first failure.

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "base/error.h"
#include "base/types.h"
#include "executor/file_reader.h"
#include "io/engines.h"
#include "io/io.h"

using namespace csd;

#define CHECK(condition)                                                           \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                \
    }                                                                              \
  } while (0)

namespace {

constexpr int64_t kMiB = int64_t{1} << 20;

// What the reader's thread, in the queue, and the test share.
struct Script {
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<IoRequest> begun;  // all, in order
  std::vector<IoRequest> held;   // of those, the ones in flight
  std::vector<IoCompletion> completed;
  bool reaping = false;
  bool refuse = false;  // submissions
  bool lose = false;    // the next reap that waits
  int most_in_flight = 0;
  bool destroyed = false;

  // The places of the file, in MiB, that were asked for, once so many were and the thread waits for them.
  std::vector<int64_t> await_begun(size_t count) {
    std::unique_lock<std::mutex> lock(mutex);
    const bool came =
        changed.wait_for(lock, std::chrono::seconds(20), [&] { return begun.size() >= count && reaping; });
    CHECK(came && begun.size() == count);
    std::vector<int64_t> places;
    for (const IoRequest& request : begun) places.push_back(request.file_offset / kMiB);
    return places;
  }

  // The request for this place ends.
  void complete(int64_t place, int error = 0) {
    std::lock_guard<std::mutex> lock(mutex);
    for (size_t i = 0; i < held.size(); ++i) {
      if (held[i].file_offset / kMiB != place) continue;
      if (error == 0) std::memset(held[i].segments->iov_base, 'x', held[i].segments->iov_len);
      completed.push_back({held[i].tag, error});
      held.erase(held.begin() + static_cast<int64_t>(i));
      reaping = false;
      changed.notify_all();
      return;
    }
    CHECK(!"no such request is in flight");
  }
};

Script* script = nullptr;

class ScriptedQueue : public IoQueue {
 public:
  explicit ScriptedQueue(int depth) : depth_(depth) {}
  ~ScriptedQueue() override { script->destroyed = true; }

  void submit(const IoRequest& request) override {
    std::lock_guard<std::mutex> lock(script->mutex);
    CHECK(in_flight_ < depth_);
    script->begun.push_back(request);
    script->changed.notify_all();
    if (script->refuse) throw Error(ErrorKind::kStore, "refused");
    script->held.push_back(request);
    in_flight_++;
    script->most_in_flight = std::max(script->most_in_flight, in_flight_);
  }
  void reap(bool wait, std::vector<IoCompletion>* completions) override {
    std::unique_lock<std::mutex> lock(script->mutex);
    if (wait && script->completed.empty()) {
      CHECK(in_flight_ > 0);
      script->reaping = true;
      script->changed.notify_all();
      script->changed.wait(lock, [] { return !script->completed.empty() || script->lose; });
      script->reaping = false;
      if (script->completed.empty()) {
        script->lose = false;
        throw Error(ErrorKind::kStore, "they did not complete");
      }
    }
    in_flight_ -= static_cast<int>(script->completed.size());
    for (const IoCompletion& completion : script->completed) completions->push_back(completion);
    script->completed.clear();
  }
  int in_flight() const override { return in_flight_; }
  int depth() const override { return depth_; }

 private:
  const int depth_;
  int in_flight_ = 0;
};

// Of a file's own queues, for its trial, the real one.
class ScriptedEngine : public IoEngine {
 public:
  const char* name() const override { return "pread"; }
  std::unique_ptr<IoQueue> make_queue(int fd, int depth, const std::vector<iovec>& buffers) override {
    if (fd >= 0) return real_->make_queue(fd, depth, buffers);
    return std::make_unique<ScriptedQueue>(depth);
  }

 private:
  std::unique_ptr<IoEngine> real_ = make_pread_engine(1);
};

}  // namespace

bool csd::io_uring_compiled() { return false; }

std::unique_ptr<IoEngine> csd::make_io_engine(const std::string&, int) {
  return std::make_unique<ScriptedEngine>();
}

namespace {

constexpr int64_t kFileBytes = 32 * kMiB - 1000;

struct Fixture {
  explicit Fixture(int64_t depth) {
    script = &own;
    std::strcpy(path, "/tmp/torch_csd-test-XXXXXX");
    const int fd = mkstemp(path);
    CHECK(fd >= 0 && ftruncate(fd, kFileBytes) == 0);
    close(fd);
    memory = static_cast<char*>(std::aligned_alloc(kBlockBytes, 32 * kMiB));
    FileReaderOptions options;
    options.io_engine = "pread";
    options.queue_depth = depth;
    reader = std::make_unique<FileReader>(options);
    CHECK(reader->add_file(path).number == 0);
  }
  ~Fixture() {
    reader.reset();
    CHECK(own.most_in_flight <= 32);
    std::free(memory);
    unlink(path);
  }

  // A ticket for so many MiB from this one on.
  int64_t read(int64_t place, int64_t count = 1, bool background = false, FileReader::Owner owner = nullptr) {
    FileRange range;
    range.offset = place * kMiB;
    range.byte_count = count * kMiB;
    range.memory = memory + place * kMiB;
    return reader->read({range}, background, std::move(owner));
  }

  // What act asks for is looked at together: what comes while the thread waits for something is begun when
  // that is there.
  void together(const std::function<void()>& act) {
    constexpr int64_t kPlug = 30;
    const size_t count = script->begun.size();
    const int64_t plug = read(kPlug);
    script->await_begun(count + 1);
    act();
    script->begun.pop_back();
    script->complete(kPlug);
    reader->wait(plug);
  }

  Script own;
  char path[64];
  char* memory;
  std::unique_ptr<FileReader> reader;
};

using Places = std::vector<int64_t>;

bool throws(ErrorKind kind, const std::string& text, const std::function<void()>& act) {
  try {
    act();
  } catch (const Error& error) {
    if (error.kind() == kind && std::strstr(error.what(), text.c_str()) != nullptr) return true;
    std::fprintf(stderr, "wanted \"%s\", got: %s\n", text.c_str(), error.what());
  }
  return false;
}

// A call that blocks, on a thread of its own.
class Blocked {
 public:
  explicit Blocked(std::function<void()> act)
      : thread_([this, act = std::move(act)] {
          act();
          over_ = true;
        }) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    CHECK(!over_);
  }
  ~Blocked() { thread_.join(); }

 private:
  std::atomic<bool> over_{false};
  std::thread thread_;
};

void tickets_are_read_in_the_order_asked_for_the_foreground_first() {
  Fixture f(1);
  const int64_t first = f.read(0, 2, true);
  CHECK(script->await_begun(1) == Places({0}));
  const int64_t second = f.read(4, 1, true), third = f.read(5), fourth = f.read(6);
  CHECK(!f.reader->is_done(first));
  size_t count = 1;
  for (const int64_t place : {0, 5, 6, 1, 4}) {
    CHECK(script->await_begun(count++).back() == place);
    script->complete(place);
  }
  for (const int64_t ticket : {first, second, third, fourth}) f.reader->wait(ticket);
  CHECK(throws(ErrorKind::kValue, "there is no ticket", [&] { f.reader->wait(first); }));
  CHECK(throws(ErrorKind::kValue, "there is no ticket", [&] { f.reader->is_done(99); }));
}

void waiting_for_a_ticket_puts_it_into_the_foreground() {
  Fixture f(1);
  const int64_t first = f.read(0), second = f.read(1, 1, true), third = f.read(2, 2, true);
  script->await_begun(1);
  {
    Blocked waiting([&] { f.reader->wait(third); });
    size_t count = 1;
    for (const int64_t place : {0, 2, 3, 1}) {
      CHECK(script->await_begun(count++).back() == place);
      script->complete(place);
    }
  }
  f.reader->wait(first);
  f.reader->wait(second);
}

void the_queue_is_kept_full_and_no_fuller() {
  Fixture f(3);
  f.together([&] {
    f.read(0);
    f.read(1);
    f.read(2, 3);
    f.read(5, 1, true);
  });
  size_t count = script->await_begun(3).size();
  for (const int64_t place : {1, 0, 2}) {
    script->complete(place);
    script->await_begun(++count);
  }
  for (const int64_t place : {5, 3, 4}) script->complete(place);
  CHECK(script->most_in_flight == 3 && script->begun.size() == 6);
}

// At most 1 MiB each, up to its multiples; the blocks that cover a range; of the last one, what there is.
void ranges_are_cut_where_the_file_has_whole_mebibytes() {
  Fixture f(8);
  std::vector<FileRange> ranges(3);
  ranges[0].offset = kMiB - 5000;
  ranges[0].byte_count = kMiB + 5001;
  ranges[0].memory = f.memory;
  ranges[1].offset = 17;  // of nothing, no byte
  ranges[1].memory = f.memory;
  ranges[2].offset = kFileBytes - 1;
  ranges[2].byte_count = 1;
  ranges[2].memory = f.memory + 4 * kMiB;
  const int64_t ticket = f.reader->read(ranges, false, nullptr);
  script->await_begun(4);
  const auto is = [&](size_t i, int64_t offset, int64_t bytes, int64_t least, int64_t at) {
    const IoRequest& request = script->begun[i];
    return request.file_offset == offset && static_cast<int64_t>(request.segments->iov_len) == bytes &&
           request.least_bytes == least && request.segments->iov_base == f.memory + at && request.fd >= 0;
  };
  CHECK(is(0, kMiB - 8192, 8192, 8192, 0));
  CHECK(is(1, kMiB, kMiB, kMiB, 8192));
  CHECK(is(2, 2 * kMiB, 4096, 4096, kMiB + 8192));
  CHECK(is(3, 32 * kMiB - 4096, 4096, 3096, 4 * kMiB));
  for (const int64_t place : {0, 1, 2, 31}) script->complete(place);
  f.reader->wait(ticket);
  CHECK(f.reader->stats_json().find("\"bytes_read\": " + std::to_string(kMiB + 5002)) != std::string::npos);
}

void what_is_not_in_a_file_is_refused() {
  Fixture f(2);
  FileRange range;
  range.memory = f.memory;
  const auto refused = [&](int64_t file, int64_t offset, int64_t count, const char* text) {
    range.file = file;
    range.offset = offset;
    range.byte_count = count;
    return throws(ErrorKind::kValue, text, [&] { f.reader->read({range}, false, nullptr); });
  };
  constexpr int64_t kHuge = INT64_MAX;
  CHECK(refused(1, 0, 1, "there is no file 1, 1 were added") && refused(-1, 0, 1, "there is no file -1"));
  CHECK(refused(0, kFileBytes, 1, f.path) && refused(0, 0, kFileBytes + 1, "wanted 33553433 from byte 0 on"));
  CHECK(refused(0, -1, 1, f.path) && refused(0, 0, -1, f.path) && refused(0, kHuge, kHuge, f.path));
  CHECK(refused(0, kFileBytes + 1, 0, f.path));
  range.memory = f.memory + 512;
  CHECK(refused(0, 0, 1, "must be a multiple of 4096, its last bits are 512"));
  CHECK(script->begun.empty());
  f.reader->wait(f.reader->read({}, false, nullptr));
}

void input_output_errors_are_tried_twice_and_are_one_tickets_own() {
  Fixture f(2);
  const int64_t bad = f.read(0, 8), good = f.read(10);
  script->await_begun(2);
  script->complete(0, EIO);
  CHECK(script->await_begun(3) == Places({0, 1, 0}));
  script->complete(0, EIO);
  CHECK(script->await_begun(4) == Places({0, 1, 0, 10}));
  script->complete(1, EIO);  // nobody wants it any more
  script->await_begun(4);
  script->complete(10);
  f.reader->wait(good);
  CHECK(throws(ErrorKind::kStore, std::string(f.path) + ": reading 1048576 bytes at byte 0 failed twice",
               [&] { f.reader->wait(bad); }));

  int64_t passing = 0, other = 0;
  f.together([&] {
    passing = f.read(0);
    other = f.read(3);
  });
  script->await_begun(6);
  script->complete(3, ENXIO);
  script->await_begun(6);
  script->complete(0, EIO);
  script->await_begun(7);
  script->complete(0);
  f.reader->wait(passing);
  CHECK(throws(ErrorKind::kStore, "at byte 3145728 failed: No such device", [&] { f.reader->wait(other); }));
}

void a_file_that_was_cut_is_not_a_drive_that_fails() {
  Fixture f(2);
  const int64_t ticket = f.read(0, 3);
  script->await_begun(2);
  CHECK(truncate(f.path, 5) == 0);
  script->complete(0, EIO);
  script->await_begun(3);
  script->complete(0, EIO);
  script->complete(1, EIO);
  CHECK(throws(ErrorKind::kStore, "changed while it was in use: was 33553432 bytes, modified at 20",
               [&] { f.reader->wait(ticket); }));
}

void what_cannot_be_submitted_is_an_error_of_its_ticket() {
  Fixture f(2);
  script->refuse = true;
  const int64_t ticket = f.read(0, 4);
  CHECK(throws(ErrorKind::kStore, "refused", [&] { f.reader->wait(ticket); }));
  {
    std::lock_guard<std::mutex> lock(script->mutex);
    script->refuse = false;
    script->begun.clear();
  }
  const int64_t later = f.read(4);
  script->await_begun(1);
  script->complete(4);
  f.reader->wait(later);
}

void memory_is_kept_until_its_ticket_is_finished() {
  Fixture f(2);
  auto owner = std::make_shared<const int>(5);
  const int64_t ticket = f.read(0, 3, false, owner);
  script->await_begun(2);
  script->complete(0);
  script->await_begun(3);
  script->complete(1);
  script->await_begun(3);
  CHECK(owner.use_count() == 2);
  script->complete(2);
  while (!f.reader->is_done(ticket)) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  f.reader->is_done(ticket);
  CHECK(owner.use_count() == 1);
  f.reader->wait(ticket);
}

void what_is_dropped_is_no_longer_touched() {
  Fixture f(2);
  auto owner = std::make_shared<const int>(5);
  const int64_t first = f.read(0, 2), waiting = f.read(4, 2, true, owner), begun = f.read(8, 3, false, owner);
  script->await_begun(2);
  f.reader->drop(waiting);  // not begun: never read
  CHECK(owner.use_count() == 2);
  script->complete(0);
  CHECK(script->await_begun(3) == Places({0, 1, 8}));
  {
    Blocked dropping([&] { f.reader->drop(begun); });
    CHECK(throws(ErrorKind::kValue, "there is no ticket", [&] { f.reader->is_done(begun); }));
    script->complete(8, EIO);  // and not tried again
  }
  CHECK(owner.use_count() == 1);
  script->complete(1);
  f.reader->wait(first);
  f.reader->drop(first);
  f.reader->drop(-7);
  const int64_t done = f.read(20, 1, false, owner);
  script->await_begun(4);
  script->complete(20);
  while (!f.reader->is_done(done)) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  f.reader->drop(done);
  CHECK(owner.use_count() == 1 && script->begun.size() == 4);

  const int64_t awaited = f.read(21);
  script->await_begun(5);
  {
    Blocked waits([&] {
      CHECK(throws(ErrorKind::kValue, "was dropped by another thread", [&] { f.reader->wait(awaited); }));
    });
    Blocked drops([&] { f.reader->drop(awaited); });
    script->complete(21);
  }
}

void closing_waits_for_what_is_in_flight_and_wakes_the_others() {
  Fixture f(1);
  auto owner = std::make_shared<const int>(5);
  const int64_t flying = f.read(0, 1, false, owner), half = f.read(1, 1, false, owner);
  script->await_begun(1);
  std::thread never(
      [&] { CHECK(throws(ErrorKind::kClosed, "before all was read", [&] { f.reader->wait(half); })); });
  std::thread whole([&] { f.reader->wait(flying); });
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  {
    Blocked closing([&] { f.reader->close(); });
    CHECK(throws(ErrorKind::kClosed, "is closed", [&] { f.read(3); }));
    script->complete(0);
  }
  never.join();
  whole.join();
  f.reader->close();
  CHECK(owner.use_count() == 1 && script->begun.size() == 1 && script->destroyed);
  CHECK(throws(ErrorKind::kClosed, "is closed", [&] { f.reader->add_file(f.path); }));
  CHECK(throws(ErrorKind::kClosed, "is closed", [&] { f.reader->wait(flying); }));
  CHECK(throws(ErrorKind::kClosed, "is closed", [&] { f.reader->is_done(flying); }));
  CHECK(throws(ErrorKind::kClosed, "is closed", [&] { f.reader->stats_json(); }));
  f.reader->drop(flying);
}

// io.h says when that is. It may be written to at any time: it is nobody else's again.
void memory_of_requests_that_never_complete_is_kept_for_good() {
  auto owner = std::make_shared<const int>(5);
  {
    Fixture f(2);
    int64_t first = 0, second = 0;
    f.together([&] {
      first = f.read(0, 1, false, owner);
      second = f.read(1, 4, false, owner);
    });
    script->await_begun(2);
    {
      std::lock_guard<std::mutex> lock(script->mutex);
      script->lose = true;
      script->changed.notify_all();
    }
    CHECK(throws(ErrorKind::kStore, "did not complete", [&] { f.reader->wait(first); }));
    CHECK(throws(ErrorKind::kStore, "did not complete", [&] { f.reader->drop(second); }));
    CHECK(owner.use_count() == 3 && script->begun.size() == 2);
    const int64_t third = f.read(9);  // there is no room for it
    CHECK(!f.reader->is_done(third));
    f.reader->drop(third);
    f.reader->close();
  }
  CHECK(owner.use_count() == 3);
}

}  // namespace

int main() {
  tickets_are_read_in_the_order_asked_for_the_foreground_first();
  waiting_for_a_ticket_puts_it_into_the_foreground();
  the_queue_is_kept_full_and_no_fuller();
  ranges_are_cut_where_the_file_has_whole_mebibytes();
  what_is_not_in_a_file_is_refused();
  input_output_errors_are_tried_twice_and_are_one_tickets_own();
  a_file_that_was_cut_is_not_a_drive_that_fails();
  what_cannot_be_submitted_is_an_error_of_its_ticket();
  memory_is_kept_until_its_ticket_is_finished();
  what_is_dropped_is_no_longer_touched();
  closing_waits_for_what_is_in_flight_and_wakes_the_others();
  memory_of_requests_that_never_complete_is_kept_for_good();
  std::printf("ok\n");
  return 0;
}
