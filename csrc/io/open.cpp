// Opening a drive's file, finding out by doing it which engine and mode reach it, and making it durable.

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <random>
#include <string>

#include "base/error.h"
#include "base/own_descriptors.h"
#include "base/types.h"
#include "io/io.h"

namespace csd {
namespace {

// Closes the descriptor on every way out, unless it is released.
class UniqueFd {
 public:
  explicit UniqueFd(int fd) : fd_(fd) {}
  ~UniqueFd() {
    if (fd_ >= 0) close(fd_);
  }
  UniqueFd(const UniqueFd&) = delete;
  UniqueFd& operator=(const UniqueFd&) = delete;
  int get() const { return fd_; }
  int release() {
    const int fd = fd_;
    fd_ = -1;
    return fd;
  }

 private:
  int fd_;
};

using BlockBuffer = std::unique_ptr<char, decltype(&std::free)>;

BlockBuffer make_block() {
  char* block = static_cast<char*>(std::aligned_alloc(kBlockBytes, kBlockBytes));
  if (block == nullptr) throw std::bad_alloc();
  return BlockBuffer(block, &std::free);
}

std::string hex(uint64_t value) {
  char text[24];
  std::snprintf(text, sizeof(text), "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

struct FileSystemName {
  uint32_t magic;
  const char* name;
};

// Magic numbers that older <linux/magic.h> lack are written out.
constexpr FileSystemName kFileSystems[] = {
    {EXT4_SUPER_MAGIC, "ext4"},   {0x58465342, "xfs"},      {BTRFS_SUPER_MAGIC, "btrfs"},
    {TMPFS_MAGIC, "tmpfs"},       {RAMFS_MAGIC, "ramfs"},   {OVERLAYFS_SUPER_MAGIC, "overlayfs"},
    {NFS_SUPER_MAGIC, "nfs"},     {0x2fc12fc1, "zfs"},      {0x65735546, "fuse"},
    {F2FS_SUPER_MAGIC, "f2fs"},   {0xca451a4e, "bcachefs"}, {0x0bd00bd0, "lustre"},
    {0x47504653, "gpfs"},         {0xff534d42, "cifs"},     {0xfe534d42, "smb2"},
    {CEPH_SUPER_MAGIC, "ceph"},   {V9FS_MAGIC, "9p"},       {ECRYPTFS_SUPER_MAGIC, "ecryptfs"},
    {MSDOS_SUPER_MAGIC, "vfat"},  {0x2011bab0, "exfat"},    {0x7366746e, "ntfs3"},
    {SQUASHFS_MAGIC, "squashfs"}, {0x19830326, "beegfs"},   {REISERFS_SUPER_MAGIC, "reiserfs"},
};

std::string file_system_name(const std::string& directory) {
  struct statfs info;
  if (statfs(directory.c_str(), &info) != 0) return "unknown";
  const uint32_t magic = static_cast<uint32_t>(info.f_type);
  for (const FileSystemName& known : kFileSystems) {
    if (known.magic == magic) return known.name;
  }
  return hex(magic);
}

int64_t free_bytes(const std::string& directory) {
  struct statvfs info;
  if (statvfs(directory.c_str(), &info) != 0) return 0;
  return static_cast<int64_t>(info.f_bavail) * static_cast<int64_t>(info.f_frsize);
}

// The first line of a sysfs file without trailing blanks, or "".
std::string sysfs_line(const std::string& path) {
  std::string line;
  std::ifstream file(path);
  std::getline(file, line);
  line.erase(line.find_last_not_of(" \t\n") + 1);
  return line;
}

// "259:1 nvme0n1p1, Samsung SSD 980, solid state"; only the numbers for what has no block device (tmpfs,
// nfs).
std::string device_text(const std::string& directory) {
  struct stat info;
  if (stat(directory.c_str(), &info) != 0) return "unknown";
  const std::string numbers = std::to_string(major(info.st_dev)) + ":" + std::to_string(minor(info.st_dev));
  const std::string link = "/sys/dev/block/" + numbers;
  char target[4096];
  const ssize_t length = readlink(link.c_str(), target, sizeof(target));
  if (length <= 0 || length == static_cast<ssize_t>(sizeof(target))) return numbers;
  const std::string device(target, static_cast<size_t>(length));
  std::string text = numbers + " " + device.substr(device.rfind('/') + 1);
  // A partition keeps these in the directory of its whole disk.
  const std::string disk = access((link + "/queue").c_str(), F_OK) == 0 ? link : link + "/..";
  const std::string model = sysfs_line(disk + "/device/model");
  const std::string rotational = sysfs_line(disk + "/queue/rotational");
  if (!model.empty()) text += ", " + model;
  if (rotational == "0") text += ", solid state";
  if (rotational == "1") text += ", says it is rotational";
  return text;
}

Error full_error(const std::string& directory, const std::string& what, int errno_value) {
  return Error(ErrorKind::kNoSpace, directory + ": " + what + ": " + std::strerror(errno_value) + ", " +
                                        std::to_string(free_bytes(directory)) +
                                        " bytes free; free some space or choose another directory");
}

bool means_full(int errno_value) { return errno_value == ENOSPC || errno_value == EDQUOT; }

Error open_error(const std::string& directory, int errno_value) {
  const std::string what = "creating a scratch file";
  if (means_full(errno_value)) return full_error(directory, what, errno_value);
  std::string advice;
  if (errno_value == EROFS) advice = "; choose a directory on a file system that can be written";
  if (errno_value == EACCES || errno_value == EPERM) {
    advice = "; choose a directory that user " + std::to_string(geteuid()) + " may write";
  }
  return Error(ErrorKind::kStore, directory + ": " + what + ": " + std::strerror(errno_value) + advice);
}

void check_directory(const std::string& directory) {
  struct stat info;
  if (stat(directory.c_str(), &info) != 0) {
    const int errno_value = errno;
    if (errno_value == ENOENT) {
      throw Error(ErrorKind::kStore, directory + ": no such directory; create it or name another");
    }
    throw io_error(directory, "looking at the directory", errno_value);
  }
  if (!S_ISDIR(info.st_mode)) {
    throw Error(ErrorKind::kStore, directory + ": wanted a directory, this is not one; name a directory");
  }
}

// A file without a name: it is gone with its last descriptor, kill -9 included.
int open_nameless(const std::string& directory) {
  // O_EXCL: no one can link it in later.
  const int fd = open(directory.c_str(), O_TMPFILE | O_EXCL | O_RDWR | O_CLOEXEC, 0600);
  if (fd >= 0) return fd;
  // Without O_TMPFILE (nfs, fuse, ...) it has a name for a moment. Any other reason comes back from this open
  // too.
  std::random_device random;
  for (int attempt = 0; attempt < 16; attempt++) {
    const uint64_t number = (static_cast<uint64_t>(random()) << 32) | random();
    const std::string path =
        directory + "/.torch_csd-" + std::to_string(getpid()) + "-" + hex(number).substr(2);
    UniqueFd named(open(path.c_str(), O_CREAT | O_EXCL | O_NOFOLLOW | O_RDWR | O_CLOEXEC, 0600));
    if (named.get() >= 0) {
      if (unlink(path.c_str()) != 0) throw io_error(path, "unlinking a scratch file", errno);
      return named.release();
    }
    if (errno != EEXIST) throw open_error(directory, errno);
  }
  throw open_error(directory, EEXIST);
}

// 0 or an errno value.
int set_direct(int fd, bool direct) {
  const int flags = fcntl(fd, F_GETFL);
  if (flags < 0) return errno;
  const int wanted = direct ? flags | O_DIRECT : flags & ~O_DIRECT;
  return fcntl(fd, F_SETFL, wanted) == 0 ? 0 : errno;
}

// The alignment that direct I/O on this file wants of offsets and memory, whichever is larger. 0: it has
// none; -1: the kernel (before 6.1) or the file system does not say.
int64_t direct_alignment_bytes(int fd) {
  constexpr unsigned kStatxDioAlign = 0x2000;  // STATX_DIOALIGN, and where the kernel puts its two numbers:
  constexpr size_t kMemoryAlignAt = 0x98;      // glibc's struct has no names for them before 2.38
  struct statx info {};
  static_assert(sizeof(info) >= kMemoryAlignAt + 2 * sizeof(uint32_t), "the kernel's struct statx");
  if (statx(fd, "", AT_EMPTY_PATH, kStatxDioAlign, &info) != 0 || (info.stx_mask & kStatxDioAlign) == 0)
    return -1;
  uint32_t aligns[2];
  std::memcpy(aligns, reinterpret_cast<const char*>(&info) + kMemoryAlignAt, sizeof(aligns));
  return std::max(aligns[0], aligns[1]);
}

// least_bytes: as in IoRequest.
int move_block(IoQueue* queue, IoOp op, char* block, int64_t least_bytes = 0) {
  const iovec segment{block, static_cast<size_t>(kBlockBytes)};
  IoRequest request;
  request.op = op;
  request.segments = &segment;
  request.segment_count = 1;
  request.least_bytes = least_bytes;
  std::vector<IoCompletion> completions;
  queue->submit(request);
  queue->reap(true, &completions);
  return completions.at(0).error;
}

// Something to do through an engine that shows whether it works, and what to call that when it did. run()
// returns "" or what went wrong.
struct Trial {
  int fd;
  std::string done;
  std::function<std::string(IoEngine* engine)> run;
};

std::vector<iovec> as_buffers(const BlockBuffer& block) {
  return {{block.get(), static_cast<size_t>(kBlockBytes)}};
}

// Writes one block at offset 0 and reads it back. Throws kNoSpace: on a full drive no engine and no mode is
// any better.
Trial write_trial(int fd, const std::string& directory) {
  return {fd, "wrote and read back 4096 bytes", [fd, directory](IoEngine* engine) -> std::string {
            const BlockBuffer written = make_block(), read_back = make_block();
            // Random, so that what an earlier attempt left in the file cannot pass for this one's. Only the
            // seed is the device's: a block of it took 56 ms (rdrand, Zen 5 under KVM).
            std::mt19937_64 random{std::random_device()()};
            for (int64_t i = 0; i < kBlockBytes; i += sizeof(uint64_t)) {
              const uint64_t word = random();
              std::memcpy(written.get() + i, &word, sizeof(word));
            }
            std::memset(read_back.get(), 0, kBlockBytes);
            std::vector<iovec> buffers = as_buffers(written);
            buffers.push_back(as_buffers(read_back)[0]);
            const std::unique_ptr<IoQueue> queue = engine->make_queue(fd, 1, buffers);
            int error = move_block(queue.get(), IoOp::kWrite, written.get());
            if (means_full(error)) throw full_error(directory, "writing the first 4096 bytes", error);
            if (error != 0) return std::string("write failed: ") + std::strerror(error);
            error = move_block(queue.get(), IoOp::kRead, read_back.get());
            if (error != 0) return std::string("read-back failed: ") + std::strerror(error);
            if (std::memcmp(written.get(), read_back.get(), kBlockBytes) != 0)
              return "read back other bytes than written";
            return "";
          }};
}

// What a plain read brings of the block at offset 0.
struct FirstBlock {
  std::shared_ptr<BlockBuffer> block;
  int64_t bytes = 0;  // fewer than a block where the file is shorter
};

FirstBlock read_first_block(int fd, const std::string& path) {
  FirstBlock plain{std::make_shared<BlockBuffer>(make_block())};
  ssize_t bytes;
  do {
    bytes = pread(fd, plain.block->get(), static_cast<size_t>(kBlockBytes), 0);
  } while (bytes < 0 && errno == EINTR);
  if (bytes < 0) throw io_error(path, "reading the first 4096 bytes failed", errno);
  plain.bytes = bytes;
  return plain;
}

// Reads the block at offset 0, which must be that one. A file without a byte is found to end there.
Trial read_trial(int fd, const FirstBlock& plain) {
  return {fd, "read " + std::to_string(plain.bytes) + " bytes", [fd, plain](IoEngine* engine) -> std::string {
            const BlockBuffer block = make_block();
            std::memset(block.get(), 0, kBlockBytes);
            const std::unique_ptr<IoQueue> queue = engine->make_queue(fd, 1, as_buffers(block));
            const int error = move_block(queue.get(), IoOp::kRead, block.get(), plain.bytes);
            const bool ended = plain.bytes == 0 && error == EIO;
            if (error != 0 && !ended) return std::string("read failed: ") + std::strerror(error);
            if (std::memcmp(block.get(), plain.block->get(), static_cast<size_t>(plain.bytes)) != 0)
              return "read other bytes than a plain read";
            return "";
          }};
}

// Why direct I/O is not even tried on this file, or "".
std::string direct_objection(int fd, const std::string& file_system) {
  // Kernels from 6.6 on accept O_DIRECT here, but there is no drive below: saying "direct" would mislead.
  if (file_system == "tmpfs" || file_system == "ramfs") return "not tried: files live in memory here";
  const int64_t alignment = direct_alignment_bytes(fd);
  if (alignment == 0) return "not tried: the file system has none for this file";
  if (alignment > kBlockBytes) {
    return "not tried: it wants everything aligned to " + std::to_string(alignment) +
           " bytes, pages are aligned to " + std::to_string(kBlockBytes);
  }
  return "";
}

// Why this file cannot be reached by this engine in this mode, or "".
std::string try_way(const Trial& trial, IoEngine* engine, bool direct, const std::string& file_system) {
  const std::string objection = direct ? direct_objection(trial.fd, file_system) : "";
  if (!objection.empty()) return objection;
  const int error = set_direct(trial.fd, direct);
  if (error != 0) return std::string("refused: ") + std::strerror(error);
  try {
    const std::string failure = trial.run(engine);
    // An engine that had to fall back is not the one that is tried here, although the block came through.
    return engine->fallback_reason() != nullptr ? engine->fallback_reason() : failure;
  } catch (const Error& refused) {
    if (refused.kind() == ErrorKind::kNoSpace) throw;
    return untagged(refused);
  }
}

// Tries the ways in order of preference. Stops at the first that works unless all verdicts are wanted.
OpenedFile choose_way(const Trial& trial, const std::string& directory, const std::string& io_engine,
                      std::vector<std::string>* all_verdicts) {
  const std::string file_system = file_system_name(directory);
  OpenedFile chosen;
  chosen.path = directory + "/(scratch)";
  std::string failures;
  for (const char* engine_name : {"io_uring", "pread"}) {
    if (io_engine != "auto" && io_engine != engine_name) continue;
    std::unique_ptr<IoEngine> engine;
    std::string engine_failure;
    try {
      engine = make_io_engine(engine_name, 1);
    } catch (const Error& refused) {
      engine_failure = untagged(refused);
      failures += "; " + std::string(engine_name) + ": " + engine_failure;
    }
    for (const bool direct : {true, false}) {
      const std::string failure = engine ? try_way(trial, engine.get(), direct, file_system) : engine_failure;
      std::string verdict = std::string(engine_name) + (direct ? " with O_DIRECT: " : " with buffered I/O: ");
      verdict += failure.empty() ? trial.done : failure;
      if (engine) verdict += " (" + file_system + ")";
      if (all_verdicts != nullptr) all_verdicts->push_back(verdict);
      if (failure.empty() && chosen.engine.empty()) {
        chosen.engine = engine_name;
        chosen.direct_io = direct;
        chosen.reason = verdict + failures;
        if (all_verdicts == nullptr) return chosen;
      }
      if (!failure.empty() && engine) failures += "; " + verdict;
    }
  }
  if (chosen.engine.empty()) {
    const std::string advice = io_engine == "auto" ? "" : "; try io_engine=\"auto\"";
    throw Error(ErrorKind::kStore,
                directory + ": wanted to move one block to or from a file here" + failures + advice);
  }
  return chosen;
}

// ---- files that outlive the process ----

std::string parent_directory(const std::string& path) {
  const size_t slash = path.rfind('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

std::string octal(mode_t mode) {
  char text[8];
  std::snprintf(text, sizeof(text), "%04o", static_cast<unsigned>(mode & 07777));
  return text;
}

std::string kind_name(mode_t mode) {
  if (S_ISLNK(mode)) return "a symbolic link";
  if (S_ISDIR(mode)) return "a directory";
  if (S_ISFIFO(mode)) return "a FIFO";
  if (S_ISSOCK(mode)) return "a socket";
  if (S_ISCHR(mode) || S_ISBLK(mode)) return "a device";
  return "something else";
}

// Throws for anything but a file that is ours alone.
void check_private(const std::string& path, const struct stat& info) {
  std::string wrong;
  if (!S_ISREG(info.st_mode)) {
    wrong = "wanted a regular file, this is " + kind_name(info.st_mode) +
            "; it was not made by a store: remove it, or name another directory";
  } else if (info.st_uid != geteuid()) {
    wrong = "wanted a file of user " + std::to_string(geteuid()) + ", this belongs to user " +
            std::to_string(info.st_uid) + "; run as that user, or change its owner";
  } else if ((info.st_mode & 077) != 0) {
    wrong = "wanted a file that only its owner may touch (0600), this has " + octal(info.st_mode) +
            "; chmod it to 600 if nobody else can have changed it";
  } else if (info.st_nlink != 1) {
    wrong = "wanted a file with one name, this has " + std::to_string(info.st_nlink) +
            " hard links; remove the others";
  }
  if (!wrong.empty()) throw Error(ErrorKind::kStore, path + ": " + wrong);
}

Error private_open_error(const std::string& path, DurableMode mode, int errno_value) {
  const std::string wanted = mode == DurableMode::kCreate  ? "creating a file"
                             : mode == DurableMode::kWrite ? "opening the file to write"
                                                           : "opening the file to read";
  if (means_full(errno_value)) return full_error(parent_directory(path), wanted, errno_value);
  std::string advice;
  if (errno_value == ENOENT) advice = "; create a store here first, or name another directory";
  if (errno_value == EEXIST) advice = "; open that one, or remove it";
  if (errno_value == EROFS) advice = "; open it to read only";
  if (errno_value == ELOOP) advice = "; wanted a regular file, this is a symbolic link";
  if (errno_value == EACCES || errno_value == EPERM) {
    advice = "; let user " + std::to_string(geteuid()) + " read" +
             (mode == DurableMode::kReadOnly ? "" : " and write") + " it, or run as its owner";
  }
  return Error(ErrorKind::kStore, path + ": " + wanted + ": " + std::strerror(errno_value) + advice);
}

int open_private(const std::string& path, DurableMode mode) {
  // Without blocking on a FIFO, or becoming the owner of a terminal.
  constexpr int kSafe = O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY;
  struct stat info;
  if (mode == DurableMode::kCreate) {
    UniqueFd fd(open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | kSafe, 0600));
    if (fd.get() < 0) throw private_open_error(path, mode, errno);
    try {
      if (fchmod(fd.get(), 0600) != 0)
        throw io_error(path, "setting its permissions", errno);  // a strange umask
      if (fstat(fd.get(), &info) != 0) throw io_error(path, "looking at the file", errno);
      check_private(path, info);  // a file system may not know of owners and permissions
    } catch (const Error&) {
      unlink(path.c_str());
      throw;
    }
    if (fcntl(fd.get(), F_SETFL, 0) != 0) throw io_error(path, "clearing O_NONBLOCK", errno);
    return fd.release();
  }
  // Looked at first, since opening a device may do something; and again, since it may be another one by then.
  if (lstat(path.c_str(), &info) != 0) throw private_open_error(path, mode, errno);
  check_private(path, info);
  UniqueFd fd(open(path.c_str(), (mode == DurableMode::kWrite ? O_RDWR : O_RDONLY) | kSafe));
  if (fd.get() < 0) throw private_open_error(path, mode, errno);
  if (fstat(fd.get(), &info) != 0) throw io_error(path, "looking at the file", errno);
  check_private(path, info);
  if (fcntl(fd.get(), F_SETFL, 0) != 0) throw io_error(path, "clearing O_NONBLOCK", errno);
  return fd.release();
}

// ---- files of others ----

Error input_error(const std::string& path, int errno_value) {
  std::string advice;
  if (errno_value == ENOENT) advice = "; name a file that is there";
  if (errno_value == ELOOP) advice = "; name a file, not a ring of symbolic links";
  if (errno_value == EACCES || errno_value == EPERM) {
    advice = "; let user " + std::to_string(geteuid()) + " read it";
  }
  return Error(ErrorKind::kStore,
               path + ": opening the file to read: " + std::strerror(errno_value) + advice);
}

void check_input(const std::string& path, const struct stat& info) {
  if (S_ISREG(info.st_mode)) return;
  throw Error(ErrorKind::kStore,
              path + ": wanted a regular file, this is " + kind_name(info.st_mode) + "; name a file");
}

int open_input(const std::string& path) {
  struct stat info;
  // Looked at before and after, as in open_private().
  if (stat(path.c_str(), &info) != 0) throw input_error(path, errno);
  check_input(path, info);
  UniqueFd fd(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY));
  if (fd.get() < 0) throw input_error(path, errno);
  if (fstat(fd.get(), &info) != 0) throw io_error(path, "looking at the file", errno);
  check_input(path, info);
  if (fcntl(fd.get(), F_SETFL, 0) != 0) throw io_error(path, "clearing O_NONBLOCK", errno);
  return fd.release();
}

OpenedFile choose_beside(const std::string& directory, const std::string& io_engine) {
  UniqueFd scratch(open_nameless(directory));
  Trial trial = write_trial(scratch.get(), directory);
  trial.done = "wrote and read back 4096 bytes beside it";
  return choose_way(trial, directory, io_engine, nullptr);
}

// The kernel keeps a file, and this lock on it, until the last write to it has ended, whatever became of the
// process: io_uring goes on for 0.2 s after a kill -9, when a lock on another file has long been free.
void lock_written(int fd, const std::string& path) {
  if (flock(fd, LOCK_EX | LOCK_NB) != 0) {
    throw io_error(path, "locking the file, which another process may still be writing to", errno);
  }
  keep_from_children(fd);
}

}  // namespace

void check_io_engine(const std::string& io_engine) {
  if (io_engine != "auto" && io_engine != "io_uring" && io_engine != "pread") {
    throw Error(ErrorKind::kValue,
                "io_engine must be \"auto\", \"io_uring\" or \"pread\", got \"" + io_engine + "\"");
  }
}

void close_file(int fd) {
  // Closing is not enough where a child that is about to exec has a copy.
  if (forget_descriptor(fd)) flock(fd, LOCK_UN);
  close(fd);
}

OpenedFile open_scratch_file(const std::string& directory, const std::string& io_engine) {
  check_io_engine(io_engine);
  check_directory(directory);
  UniqueFd fd(open_nameless(directory));
  OpenedFile file = choose_way(write_trial(fd.get(), directory), directory, io_engine, nullptr);
  file.fd = fd.release();
  return file;
}

OpenedFile open_durable_file(const std::string& path, const std::string& io_engine, DurableMode mode) {
  check_io_engine(io_engine);
  const std::string directory = parent_directory(path);
  check_directory(directory);
  OpenedFile file;
  bool known = false;
  if (mode == DurableMode::kCreate) {
    // Before there is a file that a failure would leave behind.
    file = choose_beside(directory, io_engine);
    known = true;
  }
  UniqueFd fd(open_private(path, mode));
  if (mode == DurableMode::kWrite) {
    try {
      file = choose_beside(directory, io_engine);
      known = true;
    } catch (const Error& refused) {
      // A store on a full drive can be read, and made smaller.
      if (refused.kind() != ErrorKind::kNoSpace) throw;
    }
  }
  if (!known) {
    const FirstBlock header = read_first_block(fd.get(), path);
    if (header.bytes < kBlockBytes) {
      throw Error(ErrorKind::kCorrupt, path + ": wanted a header of 4096 bytes, the file ends at byte " +
                                           std::to_string(header.bytes) +
                                           "; it is no store's, or was cut off");
    }
    file = choose_way(read_trial(fd.get(), header), directory, io_engine, nullptr);
  }
  const int error = set_direct(fd.get(), file.direct_io);
  if (error != 0) throw io_error(path, "setting O_DIRECT, which a file beside it takes, failed", error);
  if (mode != DurableMode::kReadOnly) lock_written(fd.get(), path);
  file.fd = fd.release();
  file.path = path;
  return file;
}

OpenedFile open_input_file(const std::string& path, const std::string& io_engine) {
  check_io_engine(io_engine);
  UniqueFd fd(open_input(path));
  OpenedFile file =
      choose_way(read_trial(fd.get(), read_first_block(fd.get(), path)), path, io_engine, nullptr);
  const int error = set_direct(fd.get(), file.direct_io);
  if (error != 0) throw io_error(path, "setting O_DIRECT, which it took before, failed", error);
  keep_from_children(fd.get());
  file.fd = fd.release();
  file.path = path;
  return file;
}

void sync_data(int fd, const std::string& path) {
  while (fdatasync(fd) != 0) {
    if (errno != EINTR)
      throw io_error(path, "fdatasync failed: what was written since the last may be lost", errno);
  }
}

void sync_directory(const std::string& path) {
  UniqueFd fd(open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (fd.get() < 0) throw io_error(path, "opening the directory to make it durable failed", errno);
  while (fsync(fd.get()) != 0) {
    // EINVAL: a file system that has nothing to do for a directory.
    if (errno == EINVAL) return;
    if (errno != EINTR) throw io_error(path, "fsync of the directory failed", errno);
  }
}

ProbeResult probe_directory(const std::string& directory, const std::string& io_engine) {
  check_io_engine(io_engine);
  check_directory(directory);
  UniqueFd fd(open_nameless(directory));
  ProbeResult result;
  result.directory = directory;
  result.file_system = file_system_name(directory);
  result.device = device_text(directory);
  result.chosen = choose_way(write_trial(fd.get(), directory), directory, io_engine, &result.verdicts);
  return result;
}

}  // namespace csd
