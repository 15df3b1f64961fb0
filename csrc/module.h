// What the ops ask of Python itself, short of torch: module.cpp is the only file that includes Python.h.
#pragma once

#include <string>

namespace csd {

// warnings.warn(text) on the calling thread, which may hold the interpreter's lock or not. (torch's own
// warnings, from under an op, go to stderr and past Python's filters.) Where those make an error of it, it is
// printed as one that nobody could raise: what the op has done stands, and so does its result.
void warn_in_python(const std::string& text);

}  // namespace csd
