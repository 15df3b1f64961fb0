// The two engines' constructors, for engine.cpp. What they promise is in io.h.
#pragma once

#include <memory>

#include "io/io.h"

namespace csd {

std::unique_ptr<IoEngine> make_pread_engine(int thread_count);
#ifdef CSD_HAVE_LIBURING
// thread_count: of the pread engine that takes over when the kernel refuses io_uring in the middle of a run.
std::unique_ptr<IoEngine> make_uring_engine(int thread_count);
#endif

}  // namespace csd
