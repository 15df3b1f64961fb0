#include "executor/file_reader.h"

#include <pthread.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <ctime>
#include <deque>
#include <map>
#include <mutex>
#include <optional>
#include <system_error>
#include <thread>
#include <utility>

#include "base/error.h"
#include "base/json.h"

namespace csd {
namespace {

// Reads of this size, some of them in flight, reach a drive's rate (benchmarks/README.md, Roofs). They end at
// its multiples, so that what lies in one piece on the drive is asked for in one.
constexpr int64_t kRequestBytes = int64_t{1} << 20;
constexpr int64_t kQueueDepthMax = 4096;
// One registered buffer, as kernels take it.
constexpr size_t kRegisteredBytesMax = size_t{1} << 30;
constexpr int kPreadThreadsMax = 32;  // they only wait: as many requests as the drive sees at once

using Clock = std::chrono::steady_clock;

std::string text(int64_t value) { return std::to_string(value); }

int64_t nanoseconds_since(Clock::time_point start) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - start).count();
}

int64_t mtime_of(const struct stat& info) {
  return int64_t{info.st_mtim.tv_sec} * 1000000000 + info.st_mtim.tv_nsec;
}

// "2026-01-31 23:59:59.123456789 UTC"
std::string time_text(int64_t mtime_ns) {
  constexpr int64_t kSecond = 1000000000;
  const int64_t fraction = (mtime_ns % kSecond + kSecond) % kSecond;
  const std::time_t seconds = (mtime_ns - fraction) / kSecond;
  std::tm parts{};
  char date[64], whole[96];
  if (gmtime_r(&seconds, &parts) == nullptr ||
      std::strftime(date, sizeof(date), "%Y-%m-%d %H:%M:%S", &parts) == 0)
    return text(mtime_ns) + " ns";
  std::snprintf(whole, sizeof(whole), "%s.%09lld UTC", date, static_cast<long long>(fraction));
  return whole;
}

struct File {
  std::string path;
  int fd;
  InputFile as_added;  // or refreshed. Guarded by State::mutex.
};

// What is read together. Guarded by State::mutex.
struct Ticket {
  std::vector<FileRange> ranges;
  std::vector<const File*> files;  // each once
  int64_t byte_count = 0;
  FileReader::Owner owner;
  bool background = false;
  // What has not begun: from this byte of this range on.
  size_t next_range = 0;
  int64_t next_offset = 0;
  int in_flight = 0;
  bool finished = false;
  bool dropped = false;
  bool lost = false;  // the kernel has not given all of its memory back, and cannot be asked
  std::optional<Error> error;

  bool all_begun() const { return next_range == ranges.size(); }
  void begin_no_more() { next_range = ranges.size(); }
  void fail(const Error& reason) {
    if (!error.has_value()) error = reason;
    begin_no_more();
  }
  // Skips what has no bytes.
  void start_range() {
    while (!all_begun() && ranges[next_range].byte_count == 0) next_range++;
    if (!all_begun()) next_offset = ranges[next_range].covering_begin();
  }
};

using TicketPtr = std::shared_ptr<Ticket>;

// One request.
struct Flight {
  TicketPtr ticket;
  const File* file = nullptr;
  int64_t offset = 0;
  int64_t least_bytes = 0;
  iovec segment{};
  bool retried = false;
  bool lost = false;  // see Ticket
};

// To another thread than the one it is from, with a text of its own.
[[noreturn]] void raise(const Error& error) { throw Error(error.kind(), untagged(error)); }

// What the kernel may touch at any time is never let go of.
void keep_for_good(std::vector<Flight> lost) {
  static std::mutex mutex;
  static auto* kept = new std::vector<std::vector<Flight>>();
  std::lock_guard<std::mutex> lock(mutex);
  kept->push_back(std::move(lost));
}

// What became of the files since they were added, if anything. mutex: State's, not held.
std::optional<Error> find_change(const std::vector<const File*>& files, std::mutex& mutex) {
  for (const File* file : files) {
    struct stat info {};
    if (fstat(file->fd, &info) != 0) return io_error(file->path, "looking at the file", errno);
    std::unique_lock<std::mutex> lock(mutex);
    const InputFile was = file->as_added;
    lock.unlock();
    if (info.st_size == was.size_bytes && mtime_of(info) == was.mtime_ns) continue;
    return Error(ErrorKind::kStore,
                 file->path + ": changed while it was in use: was " + text(was.size_bytes) +
                     " bytes, modified at " + time_text(was.mtime_ns) + "; is " + text(info.st_size) +
                     " bytes, modified at " + time_text(mtime_of(info)) + "; load the checkpoint anew");
  }
  return std::nullopt;
}

}  // namespace

// Lock order: add_mutex or close_mutex, then mutex. No lock is held during I/O, and no owner is let go of
// under one: what it owns may run code of its own as it goes.
struct FileReader::State {
  explicit State(FileReaderOptions given) : options(std::move(given)) {}

  const FileReaderOptions options;
  std::mutex add_mutex;    // files are added one by one, and the first makes the engine
  std::mutex close_mutex;  // of the thread's end

  std::mutex mutex;              // of all that follows, tickets included
  std::condition_variable work;  // for the thread: a ticket, or closing
  std::condition_variable done;  // for callers: a ticket has finished
  std::deque<File> files;        // never moved: others point to them
  std::string reason;            // of the first file's engine and mode
  std::unique_ptr<IoEngine> engine;
  std::thread thread;
  bool closing = false;
  int64_t next_ticket = 1;
  std::map<int64_t, TicketPtr> tickets;
  // Tickets with requests to begin, and husks of others. One that was put into the foreground is in both.
  std::deque<TicketPtr> foreground, background;
  std::vector<TicketPtr> ended;  // nothing in flight any more, files still to be looked at
  std::vector<Owner> spent;      // of finished tickets
  int64_t bytes_read = 0, bytes_moved = 0, request_count = 0, wait_ns = 0, busy_ns = 0;
  std::optional<Clock::time_point> busy_since;
  bool warned = false;

  // The thread's alone, once it runs: no lock.
  std::unique_ptr<IoQueue> queue;
  std::vector<Flight> flights;  // as many as the queue is deep
  std::vector<uint64_t> free_slots;
  size_t lost_count = 0;  // of flights

  // ---- for callers; under the lock ----

  void check_open() const {
    if (closing) throw Error(ErrorKind::kClosed, "this reader of files is closed; open a new one");
  }

  TicketPtr find(int64_t number) const {
    const auto found = tickets.find(number);
    if (found == tickets.end()) {
      throw Error(ErrorKind::kValue, "there is no ticket " + text(number) +
                                         ": it was never given, or was waited for or dropped before");
    }
    return found->second;
  }

  void check_number(int64_t file) const {
    if (file >= 0 && file < static_cast<int64_t>(files.size())) return;
    throw Error(ErrorKind::kValue, "there is no file " + text(file) + ", " +
                                       text(static_cast<int64_t>(files.size())) + " were added");
  }

  void check_range(const FileRange& range) const {
    check_number(range.file);
    const File& file = files[static_cast<size_t>(range.file)];
    const int64_t size = file.as_added.size_bytes;
    if (range.offset < 0 || range.byte_count < 0 || range.offset > size ||
        range.byte_count > size - range.offset) {
      throw Error(ErrorKind::kValue, file.path + ": has " + text(size) + " bytes, wanted " +
                                         text(range.byte_count) + " from byte " + text(range.offset) + " on");
    }
    const auto address = reinterpret_cast<uintptr_t>(range.memory);
    if (address % kBlockBytes != 0) {
      throw Error(ErrorKind::kValue, "the memory's address must be a multiple of " + text(kBlockBytes) +
                                         ", its last bits are " +
                                         text(static_cast<int64_t>(address % kBlockBytes)));
    }
  }

  // Its memory is no longer touched (unless it is lost), and callers may know.
  void finish(const TicketPtr& ticket) {
    ticket->finished = true;
    if (!ticket->lost) spent.push_back(std::move(ticket->owner));
    done.notify_all();
  }

  // With the first read, not with the first file: staging that is registered is all resident, and loading a
  // model must not cost it.
  void begin_thread() {
    if (thread.joinable()) return;
    if (queue == nullptr) make_queue();
    // Signals are for the program's own threads.
    sigset_t all_signals, previous;
    sigfillset(&all_signals);
    pthread_sigmask(SIG_SETMASK, &all_signals, &previous);
    int error = 0;
    try {
      thread = std::thread([this] { run(); });
    } catch (const std::system_error& refused) {
      error = refused.code().value();
    }
    pthread_sigmask(SIG_SETMASK, &previous, nullptr);
    if (error != 0) throw io_error("reader of files", "starting a thread", error);
  }

  void make_queue() {
    std::vector<iovec> buffers;
    const iovec& staging = options.staging;
    for (size_t at = 0; at < staging.iov_len; at += kRegisteredBytesMax) {
      buffers.push_back(
          {static_cast<char*>(staging.iov_base) + at, std::min(kRegisteredBytesMax, staging.iov_len - at)});
    }
    queue = engine->make_queue(-1, static_cast<int>(options.queue_depth), buffers);
    flights.resize(static_cast<size_t>(queue->depth()));
    for (size_t slot = flights.size(); slot-- > 0;) free_slots.push_back(slot);
  }

  // ---- the thread's, under the lock but for submit() ----

  // The next ticket with something to begin, or null.
  TicketPtr next_waiting() {
    for (std::deque<TicketPtr>* line : {&foreground, &background}) {
      while (!line->empty()) {
        const TicketPtr& front = line->front();
        if (!front->all_begun() && (line == &foreground || front->background)) return front;
        line->pop_front();
      }
    }
    return nullptr;
  }

  // Fills free slots; those to be submitted are appended.
  void begin_requests(std::vector<uint64_t>* slots) {
    while (!free_slots.empty()) {
      const TicketPtr ticket = next_waiting();
      if (ticket == nullptr) return;
      const FileRange& range = ticket->ranges[ticket->next_range];
      const File& file = files[static_cast<size_t>(range.file)];
      const int64_t begin = ticket->next_offset;
      const int64_t range_end = range.covering_begin() + range.covering_bytes();
      const int64_t end = std::min(range_end, (begin / kRequestBytes + 1) * kRequestBytes);
      const uint64_t slot = free_slots.back();
      free_slots.pop_back();
      Flight& flight = flights[slot];
      flight.ticket = ticket;
      flight.file = &file;
      flight.offset = begin;
      flight.least_bytes = std::min(end, file.as_added.size_bytes) - begin;
      flight.segment = {range.memory + (begin - range.covering_begin()), static_cast<size_t>(end - begin)};
      flight.retried = false;
      ticket->in_flight++;
      ticket->next_offset = end;
      if (end == range_end) {
        ticket->next_range++;
        ticket->start_range();
      }
      slots->push_back(slot);
    }
  }

  void submit(uint64_t slot) {
    const Flight& flight = flights[slot];
    IoRequest request;
    request.fd = flight.file->fd;
    request.file_offset = flight.offset;
    request.segments = &flight.segment;
    request.segment_count = 1;
    request.least_bytes = flight.least_bytes;
    request.tag = slot;
    queue->submit(request);
  }

  Error read_error(const Flight& flight, int errno_value) const {
    return io_error(flight.file->path,
                    "reading " + text(static_cast<int64_t>(flight.segment.iov_len)) + " bytes at byte " +
                        text(flight.offset) + " failed" +
                        (errno_value == EIO ? " twice; see what the kernel's log says of the drive" : ""),
                    errno_value);
  }

  // A request is over.
  void land(uint64_t slot) {
    Flight& flight = flights[slot];
    const TicketPtr ticket = std::exchange(flight.ticket, nullptr);
    if (std::exchange(flight.lost, false)) lost_count--;
    free_slots.push_back(slot);
    if (--ticket->in_flight > 0 || !ticket->all_begun()) return;
    if (ticket->lost) {  // and found after all, long after it finished
      ticket->lost = false;
      spent.push_back(std::move(ticket->owner));
    } else if (ticket->dropped) {
      finish(ticket);
    } else {
      ended.push_back(ticket);
    }
  }

  // slots: gets it if it is to be asked for once more.
  void take(const IoCompletion& completion, std::vector<uint64_t>* slots) {
    Flight& flight = flights[completion.tag];
    request_count++;
    if (completion.error == 0) {
      bytes_moved += flight.least_bytes;
    } else {
      const bool wanted = !flight.ticket->error.has_value() && !flight.ticket->dropped;
      if (completion.error == EIO && wanted && !std::exchange(flight.retried, true)) {
        slots->push_back(completion.tag);  // the medium may give it the second time
        return;
      }
      flight.ticket->fail(read_error(flight, completion.error));
    }
    land(completion.tag);
  }

  // None of those in flight comes back (io.h says when): their tickets fail, their memory is kept for good.
  void lose_flights(const Error& reason) {
    for (Flight& flight : flights) {
      if (flight.ticket == nullptr || flight.lost) continue;
      flight.lost = true;
      lost_count++;
      flight.ticket->fail(reason);
      flight.ticket->lost = true;
      if (!flight.ticket->finished) finish(flight.ticket);
    }
  }

  void note_busy(bool busy) {
    if (busy == busy_since.has_value()) return;
    if (!busy) busy_ns += nanoseconds_since(*busy_since);
    busy_since = busy ? std::optional(Clock::now()) : std::nullopt;
  }

  void run() {
    std::vector<uint64_t> slots;  // to be submitted
    std::vector<std::pair<uint64_t, Error>> refused;
    std::vector<IoCompletion> completions;
    std::vector<TicketPtr> ending;
    std::vector<std::optional<Error>> changes;  // of each of those
    std::optional<Error> lost;
    std::unique_lock<std::mutex> lock(mutex);
    for (;;) {
      begin_requests(&slots);
      ending = std::exchange(ended, {});
      const bool in_flight = free_slots.size() + lost_count < flights.size();
      note_busy(in_flight);
      if (!in_flight && ending.empty()) {
        if (closing) return;
        work.wait(lock);
        continue;
      }

      lock.unlock();
      for (const uint64_t slot : slots) {
        try {
          submit(slot);
        } catch (const Error& error) {
          refused.emplace_back(slot, error);
        }
      }
      slots.clear();
      for (const TicketPtr& ticket : ending) changes.push_back(find_change(ticket->files, mutex));
      const bool wait = ending.empty() && refused.empty();
      try {
        if (queue->in_flight() > static_cast<int>(lost_count)) queue->reap(wait, &completions);
      } catch (const Error& error) {
        lost = error;
      }
      lock.lock();

      for (size_t i = 0; i < ending.size(); ++i) {
        const TicketPtr& ticket = ending[i];
        if (ticket->finished) continue;                          // dropped in the meantime
        if (changes[i].has_value()) ticket->error = changes[i];  // whatever it was that made a read fail
        if (!ticket->error.has_value()) bytes_read += ticket->byte_count;
        finish(ticket);
      }
      ending.clear();
      changes.clear();
      for (const auto& [slot, error] : refused) {
        flights[slot].ticket->fail(error);
        land(slot);
      }
      refused.clear();
      for (const IoCompletion& completion : completions) take(completion, &slots);
      completions.clear();
      if (lost.has_value()) lose_flights(*lost);
      lost.reset();
    }
  }
};

FileReader::FileReader(FileReaderOptions options) : process_(getpid()) {
  check_io_engine(options.io_engine);
  if (options.queue_depth < 1 || options.queue_depth > kQueueDepthMax) {
    throw Error(ErrorKind::kValue, "queue_depth must be from 1 to " + text(kQueueDepthMax) + ", got " +
                                       text(options.queue_depth));
  }
  state_ = std::make_unique<State>(std::move(options));
}

FileReader::~FileReader() {
  if (getpid() != process_) {
    static_cast<void>(state_.release());
    return;
  }
  close();
}

void FileReader::check_process() const {
  if (getpid() == process_) return;
  throw Error(ErrorKind::kForked, "this reader of files was opened in process " + text(process_) +
                                      " and is used in its child " + text(getpid()) +
                                      "; open one in the child instead");
}

InputFile FileReader::add_file(const std::string& path) {
  check_process();
  State& state = *state_;
  std::lock_guard<std::mutex> adding(state.add_mutex);
  std::string io_engine = state.options.io_engine;
  bool first;
  {
    std::lock_guard<std::mutex> lock(state.mutex);
    state.check_open();
    first = state.engine == nullptr;
    if (!first && io_engine != "auto") io_engine = state.engine->name();  // it may be pread by now
  }
  const OpenedFile opened = open_input_file(path, io_engine);
  try {
    struct stat info {};
    if (fstat(opened.fd, &info) != 0) throw io_error(path, "looking at the file", errno);
    std::unique_ptr<IoEngine> engine;
    if (first) {
      const int depth = static_cast<int>(state.options.queue_depth);
      engine = make_io_engine(opened.engine, std::min(depth, kPreadThreadsMax));
    }
    std::lock_guard<std::mutex> lock(state.mutex);
    state.check_open();
    InputFile file;
    file.number = static_cast<int64_t>(state.files.size());
    file.device = info.st_dev;
    file.inode = info.st_ino;
    file.size_bytes = info.st_size;
    file.mtime_ns = mtime_of(info);
    file.direct_io = opened.direct_io;
    state.files.push_back({path, opened.fd, file});
    if (first) {
      state.engine = std::move(engine);
      state.reason = opened.reason;
    }
    return file;
  } catch (...) {
    close_file(opened.fd);
    throw;
  }
}

InputFile FileReader::refresh_file(int64_t number) {
  check_process();
  State& state = *state_;
  std::lock_guard<std::mutex> lock(state.mutex);
  state.check_open();
  state.check_number(number);
  File& file = state.files[static_cast<size_t>(number)];
  struct stat info {};
  if (fstat(file.fd, &info) != 0) throw io_error(file.path, "looking at the file", errno);
  if (info.st_size < file.as_added.size_bytes) {
    throw Error(ErrorKind::kStore, file.path + ": cut short while it was in use: was " +
                                       text(file.as_added.size_bytes) + " bytes, is " + text(info.st_size));
  }
  file.as_added.size_bytes = info.st_size;
  file.as_added.mtime_ns = mtime_of(info);
  return file.as_added;
}

int64_t FileReader::read(const std::vector<FileRange>& ranges, bool background, Owner owner) {
  check_process();
  State& state = *state_;
  std::vector<Owner> spent;
  auto ticket = std::make_shared<Ticket>();
  ticket->ranges = ranges;
  ticket->background = background;
  std::lock_guard<std::mutex> lock(state.mutex);
  state.check_open();
  spent = std::exchange(state.spent, {});
  for (const FileRange& range : ranges) {
    state.check_range(range);
    ticket->byte_count += range.byte_count;
    const File* file = &state.files[static_cast<size_t>(range.file)];
    if (std::find(ticket->files.begin(), ticket->files.end(), file) == ticket->files.end())
      ticket->files.push_back(file);
  }
  ticket->start_range();
  ticket->owner = std::move(owner);
  const int64_t number = state.next_ticket++;
  if (ticket->files.empty()) {
    state.finish(ticket);
  } else {
    state.begin_thread();
    if (ticket->all_begun()) {
      state.ended.push_back(ticket);  // there is not a byte in it
    } else {
      (background ? state.background : state.foreground).push_back(ticket);
    }
    state.work.notify_one();
  }
  state.tickets[number] = std::move(ticket);
  return number;
}

void FileReader::wait(int64_t number) {
  check_process();
  State& state = *state_;
  std::vector<Owner> spent;
  std::unique_lock<std::mutex> lock(state.mutex);
  if (state.tickets.count(number) == 0) state.check_open();
  const TicketPtr ticket = state.find(number);
  if (std::exchange(ticket->background, false) && !ticket->all_begun()) state.foreground.push_back(ticket);
  if (!ticket->finished) {
    const Clock::time_point start = Clock::now();
    state.done.wait(lock, [&] { return ticket->finished; });
    state.wait_ns += nanoseconds_since(start);
  }
  state.tickets.erase(number);
  spent = std::exchange(state.spent, {});
  if (ticket->dropped)
    throw Error(ErrorKind::kValue, "ticket " + text(number) + " was dropped by another thread");
  if (ticket->error.has_value()) raise(*ticket->error);
}

bool FileReader::is_done(int64_t number) {
  check_process();
  State& state = *state_;
  std::vector<Owner> spent;
  std::lock_guard<std::mutex> lock(state.mutex);
  state.check_open();
  spent = std::exchange(state.spent, {});
  return state.find(number)->finished;
}

void FileReader::drop(int64_t number) {
  check_process();
  State& state = *state_;
  std::vector<Owner> spent;
  std::unique_lock<std::mutex> lock(state.mutex);
  const auto found = state.tickets.find(number);
  if (found == state.tickets.end()) return;
  const TicketPtr ticket = found->second;
  state.tickets.erase(found);
  if (!ticket->finished) {
    ticket->dropped = true;
    ticket->begin_no_more();
    if (ticket->in_flight == 0) state.finish(ticket);
    state.done.wait(lock, [&] { return ticket->finished; });
  }
  spent = std::exchange(state.spent, {});
  if (ticket->lost) raise(*ticket->error);
}

void FileReader::close() {
  if (getpid() != process_) return;
  State& state = *state_;
  std::vector<Owner> spent;
  std::lock_guard<std::mutex> ending(state.close_mutex);
  {
    std::lock_guard<std::mutex> lock(state.mutex);
    state.closing = true;
    for (auto& [number, ticket] : state.tickets) {
      if (ticket->finished || ticket->all_begun()) continue;
      ticket->fail(Error(ErrorKind::kClosed, "this reader of files was closed before all was read"));
      if (ticket->in_flight == 0) state.finish(ticket);
    }
    state.work.notify_one();
  }
  if (state.thread.joinable()) state.thread.join();
  state.queue.reset();
  if (state.lost_count > 0) keep_for_good(std::move(state.flights));
  std::lock_guard<std::mutex> lock(state.mutex);
  state.engine.reset();
  for (const File& file : state.files) close_file(file.fd);
  state.files.clear();
  state.tickets.clear();
  state.foreground.clear();
  state.background.clear();
  state.flights.clear();
  spent = std::exchange(state.spent, {});
}

std::string FileReader::stats_json() {
  check_process();
  State& state = *state_;
  std::lock_guard<std::mutex> lock(state.mutex);
  state.check_open();
  const char* fallback = state.engine == nullptr ? nullptr : state.engine->fallback_reason();
  const auto is_direct = [](const File& file) { return file.as_added.direct_io; };
  const int64_t busy_ns =
      state.busy_ns + (state.busy_since.has_value() ? nanoseconds_since(*state.busy_since) : 0);
  using namespace json;
  std::string json;
  json += quoted("io_engine", state.engine == nullptr ? "none yet" : state.engine->name());
  json +=
      quoted("io_reason", fallback == nullptr ? state.reason
                                              : "pread since io_uring was refused: " + std::string(fallback) +
                                                    "; it began with " + state.reason);
  json += number("file_count", static_cast<int64_t>(state.files.size()));
  json += number("direct_file_count", std::count_if(state.files.begin(), state.files.end(), is_direct));
  json += number("bytes_read", state.bytes_read);
  json += number("bytes_moved", state.bytes_moved);
  json += number("request_count", state.request_count);
  json += seconds("wait_s", state.wait_ns);
  json += seconds("busy_s", busy_ns);
  return object(std::move(json));
}

std::string FileReader::take_warning() {
  check_process();
  State& state = *state_;
  std::lock_guard<std::mutex> lock(state.mutex);
  if (state.engine == nullptr || state.engine->fallback_reason() == nullptr) return {};
  if (std::exchange(state.warned, true)) return {};
  return state.files.front().path + ": " + state.engine->fallback_reason() +
         "; files are read with pread from now on";
}

}  // namespace csd
