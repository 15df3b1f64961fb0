#include "base/error.h"

#include <cerrno>
#include <cstring>

namespace csd {
namespace {

const char* tag(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::kValue:
      return "[csd:value] ";
    case ErrorKind::kStore:
      return "[csd:store] ";
    case ErrorKind::kClosed:
      return "[csd:closed] ";
    case ErrorKind::kForked:
      return "[csd:forked] ";
    case ErrorKind::kStale:
      return "[csd:stale] ";
    case ErrorKind::kNoSpace:
      return "[csd:nospace] ";
    case ErrorKind::kBudget:
      return "[csd:budget] ";
    case ErrorKind::kCorrupt:
      return "[csd:corrupt] ";
    case ErrorKind::kInternal:
      return "[csd:internal] ";
  }
  return "";
}

}  // namespace

Error::Error(ErrorKind kind, const std::string& text) : std::runtime_error(tag(kind) + text), kind_(kind) {}

std::string untagged(const Error& error) {
  const std::string text = error.what();
  return text.substr(text.find("] ") + 2);
}

Error io_error(const std::string& path, const std::string& what, int errno_value) {
  const bool no_space = errno_value == ENOSPC || errno_value == EDQUOT;
  return Error(no_space ? ErrorKind::kNoSpace : ErrorKind::kStore,
               path + ": " + what + ": " + std::strerror(errno_value));
}

}  // namespace csd
