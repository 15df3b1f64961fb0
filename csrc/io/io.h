// Moves bytes between files and buffers. Knows nothing of attention.
//
// An engine makes queues; a queue is used by one thread at a time. Requests are submitted, run
// asynchronously, and are reaped in any order. Short transfers, EINTR and EAGAIN are resumed inside the
// queue: a completion is always the whole request or an error. Two implementations, io_uring and a pread
// thread pool, pass the same tests.
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace csd {

enum class IoOp : uint8_t { kRead, kWrite };

// segments (and the memory they name) belong to the caller and must stay valid and unchanged until the
// completion is reaped. With direct I/O, file_offset and every segment's base and length are multiples of
// kBlockBytes.
struct IoRequest {
  IoOp op = IoOp::kRead;
  int64_t file_offset = 0;
  const iovec* segments = nullptr;
  int segment_count = 0;
  uint64_t tag = 0;         // comes back in the completion
  bool background = false;  // nobody waits for it yet: others may overtake it
  int fd = -1;              // of another file than the queue's own; open until the completion is reaped
  // A read is whole once so many bytes have come: the last block of a file is only partly there. 0: all.
  int64_t least_bytes = 0;
};

struct IoCompletion {
  uint64_t tag = 0;
  int error = 0;  // 0, or an errno value. A read past the end of the file is EIO ("end of file" in the text
                  // we raise), but see IoRequest::least_bytes.
};

class IoQueue {
 public:
  virtual ~IoQueue() = default;  // waits for what is in flight: no buffer is touched afterwards (but see
                                 // make_io_engine() for requests that never complete)
  // At most depth() requests may be in flight. Starts the request now, or at the next reap at the latest. If
  // it throws, the request is not in flight.
  virtual void submit(const IoRequest& request) = 0;
  // Appends finished requests to *completions. wait: blocks until there is at least one (requires in_flight()
  // > 0).
  virtual void reap(bool wait, std::vector<IoCompletion>* completions) = 0;
  virtual int in_flight() const = 0;
  virtual int depth() const = 0;
};

class IoEngine {
 public:
  virtual ~IoEngine() = default;  // its queues are gone by then
  // What carries requests out now: "io_uring" or "pread".
  virtual const char* name() const = 0;
  // Why that is no longer what make_io_engine() was asked for, or null. The text lives as long as the engine.
  // Any thread may ask, at the cost of reading an integer.
  virtual const char* fallback_reason() const { return nullptr; }
  // buffers: memory the queue's requests will mostly use, registered with the kernel where that is possible
  // (a failure to register is not an error; requests outside of it work too). fd -1: the queue has no file of
  // its own, and every request names one. Throws kStore when a queue cannot be made.
  virtual std::unique_ptr<IoQueue> make_queue(int fd, int depth, const std::vector<iovec>& buffers) = 0;
};

// name: "io_uring" or "pread". Throws kStore with the reason (not compiled in, seccomp, sysctl) if it cannot
// run here.
//
// Where the kernel refuses io_uring later (a seccomp filter that is installed after the engine was made), all
// of the engine's queues go over to pread, for good: requests that the kernel has not taken move there, and
// those it holds are awaited in the completion ring, which takes no call. If one of those has not completed
// 60 s after its queue went over, its memory and its part of the file may still be touched at any time: it
// stays in flight, and waiting for it throws kStore from then on.
std::unique_ptr<IoEngine> make_io_engine(const std::string& name, int thread_count);

// True when this build has liburing.
bool io_uring_compiled();

// The file a drive lives in, and how it turned out that it can be reached.
struct OpenedFile {
  int fd = -1;
  bool direct_io = false;
  std::string engine;  // "io_uring" | "pread"
  std::string reason;  // one sentence: why this engine and why (not) direct, with errno text of what failed
  std::string path;    // for error texts: the file's, or the directory plus "/(scratch)"
};

// Opens a scratch file in the directory that leaves nothing behind however the process ends (O_TMPFILE; else
// created 0600 and unlinked at once), then tries, in this order, engine x {O_DIRECT, buffered}: a real write
// of one block through the engine and its read-back, compared. io_engine: "auto", "io_uring" or "pread"; an
// explicit engine that does not work is an error. Throws kStore for a directory that is missing, not a
// directory, not writable or full.
OpenedFile open_scratch_file(const std::string& directory, const std::string& io_engine);

// Opens a file that is somebody else's, to be read only: nothing is written to it, and no lock is taken. Any
// regular file that can be read will do, symbolic links to one included; everything else is kStore. Engine
// and mode are found by reading its first block, or as much of one as there is.
OpenedFile open_input_file(const std::string& path, const std::string& io_engine);

// Throws kValue for anything but "auto", "io_uring" and "pread".
void check_io_engine(const std::string& io_engine);

enum class DurableMode : uint8_t {
  kCreate,    // makes the file, mode 0600; it must not exist
  kWrite,     // reads and writes one that exists
  kReadOnly,  // only reads it, from a directory that cannot be written if need be
};

// Opens a file that outlives the process, but only a regular file of ours with one name that nobody else may
// touch: no link, no FIFO, no device, owned by the effective user, nothing allowed to group and others. Every
// refusal is kStore and says what was wanted, what it is and what to do.
//
// Engine and mode are found as for scratch files, in a scratch file beside it, since nothing may be written
// here; where nothing can be written beside it either (read only, or a full drive), by reading its first
// block, which a file that was made has (kCorrupt if not).
//
// A file that is opened to be written is locked, by flock(LOCK_EX): free is a file that no write of a process
// that was killed is on its way to. kStore if it is not. A forked child does not have the lock.
OpenedFile open_durable_file(const std::string& path, const std::string& io_engine, DurableMode mode);

// Closes what these opened, and lets go of its lock.
void close_file(int fd);

// Returns when what was written to the file is on the drive, whatever happens to the machine then. After an
// error all that was written since the last success must be written again: the kernel forgets what it could
// not write, and a second call may succeed without it.
void sync_data(int fd, const std::string& path);

// The same for which files the directory has.
void sync_directory(const std::string& path);

struct ProbeResult {
  std::string directory;
  std::string file_system;            // e.g. "ext4", "tmpfs", from statfs; hex when unknown
  std::string device;                 // major:minor and, where sysfs tells, its name and model
  OpenedFile chosen;                  // closed: fd = -1
  std::vector<std::string> verdicts;  // one line per engine x mode tried
};

// Everything `torch-csd probe` prints, short of a speed measurement. Leaves nothing behind.
ProbeResult probe_directory(const std::string& directory, const std::string& io_engine);

}  // namespace csd
