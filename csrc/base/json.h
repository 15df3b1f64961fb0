// One "name": value pair of a JSON object each, with what separates it from the next. Pure.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>

namespace csd::json {

inline std::string number(const char* name, int64_t value) {
  return std::string("\"") + name + "\": " + std::to_string(value) + ", ";
}

inline std::string quoted(const char* name, const std::string& value) {
  std::string escaped;
  for (const char c : value) {
    if (c == '"' || c == '\\') escaped.push_back('\\');
    escaped.push_back(static_cast<unsigned char>(c) < 0x20 ? ' ' : c);
  }
  return std::string("\"") + name + "\": \"" + escaped + "\", ";
}

inline std::string fraction(const char* name, double value) {
  char digits[32];
  std::snprintf(digits, sizeof(digits), "%.9g", value);
  return std::string("\"") + name + "\": " + digits + ", ";
}

inline std::string seconds(const char* name, int64_t nanoseconds) {
  return std::string("\"") + name + "\": " + std::to_string(static_cast<double>(nanoseconds) * 1e-9) + ", ";
}

inline std::string object(std::string pairs) {
  pairs.resize(pairs.size() - 2);
  return "{" + pairs + "}";
}

}  // namespace csd::json
