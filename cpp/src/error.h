// The one exception type of the library: a code of the C wall and a message for a person.
#pragma once

#include <stdexcept>
#include <string>

namespace ktt {

enum class ErrorCode { kInvalidArgument, kUnsupported };

class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ErrorCode code() const { return code_; }

 private:
  ErrorCode code_;
};

// Throws kInvalidArgument with the message unless the condition holds.
inline void require(bool condition, const char* message) {
  if (!condition) throw Error(ErrorCode::kInvalidArgument, message);
}

}  // namespace ktt
