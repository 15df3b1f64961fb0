// Opening a drive's file, and finding out by doing it which engine and mode reach it.

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <random>
#include <string>

#include "base/error.h"
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

// An error's text as part of another text, without the "[csd:kind] " that leads it.
std::string untagged(const Error& error) {
  const std::string text = error.what();
  return text.substr(text.find("] ") + 2);
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

int move_block(IoQueue* queue, IoOp op, char* block) {
  const iovec segment{block, static_cast<size_t>(kBlockBytes)};
  IoRequest request;
  request.op = op;
  request.segments = &segment;
  request.segment_count = 1;
  std::vector<IoCompletion> completions;
  queue->submit(request);
  queue->reap(true, &completions);
  return completions.at(0).error;
}

// Writes one block at offset 0 through the engine and reads it back. "" when it came back as it was written,
// else what went wrong. Throws kNoSpace: on a full drive no engine and no mode is any better.
std::string try_block(int fd, IoEngine* engine, const std::string& directory) {
  const BlockBuffer written = make_block(), read_back = make_block();
  // Random, so that what an earlier attempt left in the file cannot pass for this one's.
  std::random_device seed;  // asked once: virtual machines take 30 us for each answer
  std::mt19937 random(seed());
  for (int64_t i = 0; i < kBlockBytes; i += sizeof(uint32_t)) {
    const auto word = static_cast<uint32_t>(random());
    std::memcpy(written.get() + i, &word, sizeof(word));
  }
  std::memset(read_back.get(), 0, kBlockBytes);
  const std::vector<iovec> buffers = {{written.get(), static_cast<size_t>(kBlockBytes)},
                                      {read_back.get(), static_cast<size_t>(kBlockBytes)}};
  const std::unique_ptr<IoQueue> queue = engine->make_queue(fd, 1, buffers);
  int error = move_block(queue.get(), IoOp::kWrite, written.get());
  if (means_full(error)) throw full_error(directory, "writing the first 4096 bytes", error);
  if (error != 0) return std::string("write failed: ") + std::strerror(error);
  error = move_block(queue.get(), IoOp::kRead, read_back.get());
  if (error != 0) return std::string("read-back failed: ") + std::strerror(error);
  if (std::memcmp(written.get(), read_back.get(), kBlockBytes) != 0)
    return "read back other bytes than written";
  return "";
}

// Why this file cannot be reached by this engine in this mode, or "".
std::string try_way(int fd, IoEngine* engine, bool direct, const std::string& directory,
                    const std::string& file_system) {
  // Kernels from 6.6 on accept O_DIRECT here, but there is no drive below: saying "direct" would mislead.
  if (direct && (file_system == "tmpfs" || file_system == "ramfs"))
    return "not tried: files live in memory here";
  const int error = set_direct(fd, direct);
  if (error != 0) return std::string("refused: ") + std::strerror(error);
  try {
    return try_block(fd, engine, directory);
  } catch (const Error& refused) {
    if (refused.kind() == ErrorKind::kNoSpace) throw;
    return untagged(refused);
  }
}

// Tries the ways in order of preference. Stops at the first that works unless all verdicts are wanted.
OpenedFile choose_way(int fd, const std::string& directory, const std::string& io_engine,
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
      const std::string failure =
          engine ? try_way(fd, engine.get(), direct, directory, file_system) : engine_failure;
      std::string verdict = std::string(engine_name) + (direct ? " with O_DIRECT: " : " with buffered I/O: ");
      verdict += failure.empty() ? "wrote and read back " + std::to_string(kBlockBytes) + " bytes" : failure;
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
                directory + ": wanted to write and read back one block here" + failures + advice);
  }
  return chosen;
}

void check_engine_name(const std::string& io_engine) {
  if (io_engine != "auto" && io_engine != "io_uring" && io_engine != "pread") {
    throw Error(ErrorKind::kValue,
                "io_engine must be \"auto\", \"io_uring\" or \"pread\", got \"" + io_engine + "\"");
  }
}

}  // namespace

OpenedFile open_scratch_file(const std::string& directory, const std::string& io_engine) {
  check_engine_name(io_engine);
  check_directory(directory);
  UniqueFd fd(open_nameless(directory));
  OpenedFile file = choose_way(fd.get(), directory, io_engine, nullptr);
  file.fd = fd.release();
  return file;
}

OpenedFile open_durable_file(const std::string& path, const std::string& io_engine, DurableMode mode) {
  const int flags = mode == DurableMode::kCreate ? O_RDWR | O_CREAT | O_EXCL : mode == DurableMode::kWrite ? O_RDWR : O_RDONLY;
  UniqueFd fd(open(path.c_str(), flags | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (fd.get() < 0) throw io_error(path, "opening", errno);
  const std::string directory = path.substr(0, path.rfind('/'));
  UniqueFd scratch(open_nameless(directory));
  OpenedFile file = choose_way(scratch.get(), directory, io_engine, nullptr);
  set_direct(fd.get(), file.direct_io);
  file.path = path;
  file.fd = fd.release();
  return file;
}
void sync_data(int fd, const std::string& path) { if (fdatasync(fd) != 0) throw io_error(path, "fdatasync", errno); }

ProbeResult probe_directory(const std::string& directory, const std::string& io_engine) {
  check_engine_name(io_engine);
  check_directory(directory);
  UniqueFd fd(open_nameless(directory));
  ProbeResult result;
  result.directory = directory;
  result.file_system = file_system_name(directory);
  result.device = device_text(directory);
  result.chosen = choose_way(fd.get(), directory, io_engine, &result.verdicts);
  return result;
}

}  // namespace csd
