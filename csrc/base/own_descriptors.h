// Descriptors that belong to this process alone. A forked child would keep the file behind them, and the
// locks on it, for as long as it lives: its copies are made descriptors of /dev/null, so that nobody else
// gets their numbers. Thread-safe.
#pragma once

namespace csd {

void keep_from_children(int fd);
// Before it is closed. False if it was never kept.
bool forget_descriptor(int fd);

}  // namespace csd
