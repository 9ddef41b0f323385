// A test frame of one page: TEST(name) { CHECK(...); } in any file, run by the main below it.
#pragma once

#include <cstdio>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace check {

struct Test {
  const char* name;
  void (*run)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

struct Register {
  Register(const char* name, void (*run)()) { tests().push_back({name, run}); }
};

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Skipped : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class A, class B>
void equal(const A& a, const B& b, const char* text, const char* file, int line) {
  if (a == b) return;
  std::ostringstream message;
  message << file << ":" << line << ": " << text << ": " << a << " is not " << b;
  throw Failure(message.str());
}

inline void that(bool holds, const char* text, const char* file, int line) {
  if (!holds) throw Failure(std::string(file) + ":" + std::to_string(line) + ": " + text);
}

inline int run_all() {
  int num_failed = 0;
  int num_skipped = 0;
  for (const Test& test : tests()) {
    try {
      test.run();
      std::printf("ok       %s\n", test.name);
    } catch (const Skipped& reason) {
      ++num_skipped;
      std::printf("skipped  %s: %s\n", test.name, reason.what());
    } catch (const std::exception& error) {
      ++num_failed;
      std::printf("FAILED   %s: %s\n", test.name, error.what());
    }
  }
  std::printf("%zu tests, %d failed, %d skipped\n", tests().size(), num_failed, num_skipped);
  return num_failed == 0 && !tests().empty() ? 0 : 1;
}

}  // namespace check

#define TEST(name)                                                  \
  static void test_##name();                                        \
  static const check::Register register_##name(#name, test_##name); \
  static void test_##name()

#define CHECK(condition) check::that((condition), #condition, __FILE__, __LINE__)
#define CHECK_EQUAL(a, b) check::equal((a), (b), #a " == " #b, __FILE__, __LINE__)
#define CHECK_THROWS(expression, word)                                              \
  do {                                                                              \
    std::string message_ = "no exception";                                          \
    try {                                                                           \
      static_cast<void>(expression);                                                \
    } catch (const std::exception& error_) {                                        \
      message_ = error_.what();                                                     \
    }                                                                               \
    const bool found_ = message_.find(word) != std::string::npos;                   \
    check::that(found_, (#expression ": " + message_).c_str(), __FILE__, __LINE__); \
  } while (false)
