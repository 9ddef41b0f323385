#include "fork.h"

#include <pthread.h>

namespace ktt {
namespace {

uint32_t generation = 0;  // changed by a forked process only, before it has other threads

void enter_child() { ++generation; }

}  // namespace

uint32_t fork_generation() {
  static const int registered = pthread_atfork(nullptr, nullptr, enter_child);
  static_cast<void>(registered);
  return generation;
}

}  // namespace ktt
