#include <string>

#include "base/error.h"
#include "io/engines.h"
#include "io/io.h"

namespace csd {

bool io_uring_compiled() {
#ifdef CSD_HAVE_LIBURING
  return true;
#else
  return false;
#endif
}

std::unique_ptr<IoEngine> make_io_engine(const std::string& name, int thread_count) {
  if (name == "pread") return make_pread_engine(thread_count);
  if (name == "io_uring") {
#ifdef CSD_HAVE_LIBURING
    return make_uring_engine(thread_count);
#else
    throw Error(ErrorKind::kStore,
                "not in this build (liburing's headers were missing: install liburing-dev and build again)");
#endif
  }
  throw Error(ErrorKind::kValue, "io_engine must be \"io_uring\" or \"pread\" here, got \"" + name + "\"");
}

}  // namespace csd
