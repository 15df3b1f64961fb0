// Reads files that are not ours into memory that others own, in the background and in the order asked for.
// Never writes to them. Knows nothing of tensors or of what the files are.
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/types.h"
#include "io/io.h"

namespace csd {

struct FileReaderOptions {
  std::string io_engine = "auto";  // or "io_uring", "pread"
  int64_t queue_depth = 32;        // requests in flight at once
  iovec staging{};  // memory that is mostly read to: registered with the kernel where it can be
  std::shared_ptr<const void> staging_owner;
};

// A file as it was when it was added, or refreshed.
struct InputFile {
  int64_t number = 0;
  uint64_t device = 0;
  uint64_t inode = 0;
  int64_t size_bytes = 0;
  int64_t mtime_ns = 0;  // since 1970
  bool direct_io = false;
};

// Bytes of a file, and where they go: memory is a multiple of kBlockBytes and gets the blocks that cover
// them, [round_down(offset), round_up(offset + byte_count)), so that the first byte asked for comes to memory
// + offset % kBlockBytes. Of memory for what lies beyond the end of the file nothing is promised: a drive may
// bring what is left of the last block.
struct FileRange {
  int64_t file = 0;  // its number
  int64_t offset = 0;
  int64_t byte_count = 0;  // 0: no memory is touched
  char* memory = nullptr;

  int64_t covering_begin() const { return offset / kBlockBytes * kBlockBytes; }
  int64_t covering_bytes() const {
    return byte_count == 0 ? 0 : round_up(offset + byte_count, kBlockBytes) - covering_begin();
  }
};

// Thread-safe. One thread of its own, begun with the first read, moves the bytes; it sleeps while there is
// nothing to do. What is read together is a ticket. Tickets in the foreground are read in the order asked
// for, those in the background in theirs while no other has a request left to begin.
//
// An error is that of one ticket; it is raised where the ticket is waited for. Every call throws kForked in a
// forked child, where destruction does nothing, and kClosed after close().
class FileReader {
 public:
  // What the memory of a ticket belongs to. Let go of on a thread that calls, never on the reader's own: with
  // the first call after the ticket is finished, or as it is dropped.
  using Owner = std::shared_ptr<const void>;

  // Throws kValue for a queue_depth or an io_engine that is none. Files and engine are tried in add_file().
  explicit FileReader(FileReaderOptions options);
  ~FileReader();  // as close()
  FileReader(const FileReader&) = delete;
  FileReader& operator=(const FileReader&) = delete;

  // Opens it: see open_input_file(). It stays open, whatever becomes of its name. With io_engine "auto" the
  // first file decides on the engine. One call at a time, the others wait.
  InputFile add_file(const std::string& path);

  // What was done to the file is no change from now on: someone wrote to it who says so. What of it is being
  // read may be of before or after. Throws kValue for a number that is none, kStore if the file has shrunk:
  // what was found to be in it no longer is.
  InputFile refresh_file(int64_t number);

  // Returns a ticket's number at once. Throws kValue for a range outside of its file, or memory that is not
  // aligned; nothing is read then. Several ranges may be of the same file, and in any order.
  int64_t read(const std::vector<FileRange>& ranges, bool background, Owner owner);
  // Returns when all of the ticket is there, and forgets it. Puts it into the foreground. Throws kStore for
  // what could not be read (EIO was tried twice), or when a file is no longer as it was added: truncated,
  // grown or written to. kValue for a ticket that is unknown: never given, waited for or dropped.
  void wait(int64_t ticket);
  // Whether wait() would return, or throw, at once.
  bool is_done(int64_t ticket);
  // What has not begun is never read; what has is waited for: no memory is touched afterwards. Forgets the
  // ticket. Does nothing for one that is unknown.
  void drop(int64_t ticket);
  // Waits for what is in flight; what has not begun is never read. Then all who wait get kClosed. Idempotent.
  void close();

  // bytes_read: of whole tickets, as asked for; bytes_moved: of requests, with their covering blocks.
  std::string stats_json();
  // As Drive::take_warning().
  std::string take_warning();

 private:
  struct State;

  void check_process() const;

  const int64_t process_;
  std::unique_ptr<State> state_;  // left alone in a forked child: its thread and its locks are not there
};

}  // namespace csd
