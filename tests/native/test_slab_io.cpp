// SlabQueue over a queue whose completions are written here: what is tried again, what is told, and how long
// memory is kept. Plain program: exits non-zero on the first failure.

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/types.h"
#include "executor/slab_io.h"
#include "store/format.h"

using namespace csd;

namespace {

void check(bool fact, const char* what) {
  if (fact) return;
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

// What a scripted queue shares with its test, which outlives it.
struct Script {
  std::deque<int> errors;  // of the requests to come, in order; 0 when it runs out
  std::vector<IoRequest> submitted;
  bool refuse = false;  // to be submitted to
  int waits = 0;        // reaps that were to wait
  bool destroyed = false;
};

class ScriptedQueue : public IoQueue {
 public:
  ScriptedQueue(Script* script, int depth) : script_(script), depth_(depth) {}
  ~ScriptedQueue() override { script_->destroyed = true; }

  void submit(const IoRequest& request) override {
    if (script_->refuse) throw Error(ErrorKind::kStore, "refused");
    check(in_flight() < depth_, "more requests than the depth");
    script_->submitted.push_back(request);
    int error = 0;
    if (!script_->errors.empty()) {
      error = script_->errors.front();
      script_->errors.pop_front();
    }
    flying_.push_back({request.tag, error});
  }
  void reap(bool wait, std::vector<IoCompletion>* completions) override {
    if (wait) {
      check(!flying_.empty(), "waiting with nothing in flight");
      script_->waits++;
    }
    if (flying_.empty()) return;
    completions->push_back(flying_.front());  // one at a time
    flying_.pop_front();
  }
  int in_flight() const override { return static_cast<int>(flying_.size()); }
  int depth() const override { return depth_; }

 private:
  Script* const script_;
  const int depth_;
  std::deque<IoCompletion> flying_;
};

struct Fixture {
  explicit Fixture(std::deque<int> errors, int depth = 4) {
    script.errors = std::move(errors);
    char path[] = "/tmp/torch_csd-test-XXXXXX";
    fd = mkstemp(path);
    check(fd >= 0 && unlink(path) == 0, "no file in /tmp");
    check(ftruncate(fd, kDataOffset + 64 * kBlockBytes) == 0, "ftruncate");
    memory = static_cast<char*>(std::aligned_alloc(kBlockBytes, 64 * kBlockBytes));
    queue =
        std::make_unique<SlabQueue>(std::make_unique<ScriptedQueue>(&script, depth), fd, "the file", true);
  }
  ~Fixture() {
    queue.reset();
    std::free(memory);
    close(fd);
  }

  void submit(int64_t tag, SlabQueue::Owner owner = nullptr) {
    SlabRequest request;
    request.write = true;
    request.file_offset = kDataOffset + (tag & 63) * kBlockBytes;
    request.memory = memory;
    request.byte_count = kBlockBytes;
    request.tag = tag;
    queue->submit(request, std::move(owner));
  }

  Script script;
  int fd;
  char* memory;
  std::unique_ptr<SlabQueue> queue;
};

void check_one(const std::vector<SlabCompletion>& done, int64_t tag, int error, const char* what) {
  check(done.size() == 1 && done[0].tag == tag && done[0].error == error, what);
}

void input_output_errors_are_tried_twice() {
  Fixture once({EIO});
  once.submit(7);
  check_one(once.queue->reap(true), 7, 0, "EIO that passes");
  check(once.script.submitted.size() == 2, "asked for twice");
  check(once.script.submitted[0].file_offset == once.script.submitted[1].file_offset, "the same range");

  Fixture twice({EIO, EIO});
  twice.submit(-3);
  check_one(twice.queue->reap(true), -3, EIO, "EIO that stays");
  check(twice.queue->reap(true).empty(), "told once");

  Fixture other({ENOSPC});
  other.submit(1);
  check_one(other.queue->reap(true), 1, ENOSPC, "ENOSPC");
  check(other.script.submitted.size() == 1, "not tried again");

  Fixture refused({EIO});
  refused.submit(2);
  refused.script.refuse = true;
  check_one(refused.queue->reap(true), 2, EIO, "EIO, and no second try to be had");

  // The slot is as good as new.
  Fixture again({EIO, EIO, EIO}, 1);
  again.submit(1);
  check_one(again.queue->reap(true), 1, EIO, "first");
  again.submit(2);
  check_one(again.queue->reap(true), 2, 0, "a request has a second try whatever the one before it had");
}

void reaping_without_waiting_takes_what_is_there() {
  Fixture fixture({EIO});
  check(fixture.queue->reap(false).empty() && fixture.queue->reap(true).empty(), "nothing in flight");
  fixture.submit(1);
  check(fixture.queue->reap(false).empty(), "its first answer is not one yet");
  check_one(fixture.queue->reap(false), 1, 0, "the second is");
  check(fixture.script.waits == 0, "nobody waited");
}

void memory_is_kept_until_its_request_is_reaped() {
  Fixture fixture({0, 0});
  auto owner = std::make_shared<const int>(5);
  fixture.submit(1, owner);
  fixture.submit(2, owner);
  check(owner.use_count() == 3, "held by both");
  fixture.queue->reap(true);
  check(owner.use_count() == 2, "held by one");
  fixture.queue->close();
  check(owner.use_count() == 1 && fixture.script.destroyed, "closing waits, and lets go");
  fixture.queue->close();
}

void what_is_refused_is_not_in_flight() {
  Fixture fixture({}, 2);
  auto owner = std::make_shared<const int>(5);
  fixture.script.refuse = true;
  for (int i = 0; i < 5; ++i) {
    try {
      fixture.submit(1, owner);
      check(false, "a refusal is thrown");
    } catch (const Error& error) {
      check(error.kind() == ErrorKind::kStore, "as it is");
    }
  }
  check(owner.use_count() == 1, "not held");
  fixture.script.refuse = false;
  fixture.submit(1, owner);
  fixture.submit(2, owner);
  try {
    fixture.submit(3, owner);
    check(false, "deeper than the queue");
  } catch (const Error& error) {
    check(error.kind() == ErrorKind::kInternal, "kInternal");
  }
  check(owner.use_count() == 3, "held by those that fly");
  fixture.queue->close();
  try {
    fixture.queue->reap(false);
    check(false, "closed");
  } catch (const Error& error) {
    check(error.kind() == ErrorKind::kClosed, "kClosed");
  }
}

}  // namespace

int main() {
  input_output_errors_are_tried_twice();
  reaping_without_waiting_takes_what_is_there();
  memory_is_kept_until_its_request_is_reaped();
  what_is_refused_is_not_in_flight();
  std::printf("ok\n");
  return 0;
}
