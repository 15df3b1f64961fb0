#include "base/own_descriptors.h"

#include <fcntl.h>
#include <pthread.h>
#include <unistd.h>

#include <mutex>
#include <set>

namespace csd {
namespace {

struct Descriptors {
  std::mutex mutex;
  std::set<int> fds;
};

Descriptors& descriptors() {
  static Descriptors* all = new Descriptors;  // for as long as the process can fork
  return *all;
}

void in_child() {
  Descriptors& all = descriptors();
  const int nothing = open("/dev/null", O_RDONLY | O_CLOEXEC);
  for (const int fd : all.fds) {
    if (nothing < 0 || dup3(nothing, fd, O_CLOEXEC) < 0) close(fd);
  }
  if (nothing >= 0) close(nothing);
  all.fds.clear();
  all.mutex.unlock();
}

}  // namespace

void keep_from_children(int fd) {
  static const int registered =
      pthread_atfork([] { descriptors().mutex.lock(); }, [] { descriptors().mutex.unlock(); }, in_child);
  (void)registered;  // ENOMEM: children then keep what they inherit
  Descriptors& all = descriptors();
  std::lock_guard<std::mutex> lock(all.mutex);
  all.fds.insert(fd);
}

bool forget_descriptor(int fd) {
  Descriptors& all = descriptors();
  std::lock_guard<std::mutex> lock(all.mutex);
  return all.fds.erase(fd) != 0;
}

}  // namespace csd
